"""The model store: what is in place, what a killed worker leaves, and many workers on one folder."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import seams
from civitai_server import CivitaiServer, Fault, sha256
from test_downloads import KEY, MIB, TESTS, civitai_url, leftovers, write_model

import handler

ROUNDS = int(os.environ.get("STORE_ROUNDS", "2"))  # of eight workers on one folder; 20 for the long form
KILLS = int(os.environ.get("STORE_KILLS", "30"))
IDS = [135867, 294259, 348625]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CivitaiServer]:
    """Civitai with a checkpoint and two LoRAs, which are what the settings ask for."""
    names = ["civitai_1", "detail_tweaker_xl", "hand_detail_flux_xl"]
    files = {n: write_model(tmp_path / f"{name}.origin", MIB) for n, name in zip([1, *IDS], names, strict=False)}
    seams.set(monkeypatch, **seams.QUICK)
    with CivitaiServer(files, key=KEY) as server:
        environ = {"CIVITAI_BASE_URL": server.url, "CIVITAI_API_KEY": KEY, "MODEL_CACHE_DIR": str(tmp_path / "models")}
        for name, value in (environ | {"CHECKPOINT": "1", "LORAS": "135867,294259@0.5"}).items():
            monkeypatch.setenv(name, value)
        yield server


def config(version: int = 135867, **extra: object) -> dict:
    return {"name": "Detail", "url": civitai_url(version), "filename": "detail.safetensors", **extra}


# all files


def test_all_files_side_by_side(server, tmp_path):
    """setup_models fetches checkpoint and LoRAs at the same time, each into its folder, under its adapter name."""
    server.rate = 200_000
    checkpoint, loras = handler.setup_models()
    assert checkpoint == tmp_path / "models" / "checkpoints" / "civitai_1.safetensors"
    folder = tmp_path / "models" / "loras"
    names = ("detail_tweaker_xl", "hand_detail_flux_xl")
    assert loras == {name: folder / f"{name}.safetensors" for name in names}
    for version, path in zip([1, *IDS[:2]], [checkpoint, *loras.values()], strict=True):
        assert path.read_bytes() == server.files[version].read_bytes()
    assert server.peak > 5  # one file has no more segments


def test_lora_that_cannot_be_had(server):
    """A LoRA that cannot be fetched is named with its reason; the others and the checkpoint are there."""
    server.faults[294259] = [Fault("api", status=403, times=-1)]
    files = seams.fetch_models(seams.Settings.from_environ())
    assert list(files.loras) == ["detail_tweaker_xl"]
    assert files.checkpoint.exists()
    assert "294259" in files.failed["hand_detail_flux_xl"]


def test_checkpoint_that_cannot_be_had(server):
    """Without its checkpoint a worker cannot start."""
    server.faults[1] = [Fault("api", status=401, times=-1)]
    with pytest.raises(handler.DownloadError, match="CIVITAI_API_KEY"):
        handler.setup_models()


# embeddings


def test_embeddings(server, tmp_path, monkeypatch):
    """Configured embeddings are fetched with the rest, each by its configured name, else by its file's at Civitai; the
    next start knows that name without a request, touched files included."""
    for version, name in ((7, "negativeXL_D"), (8, "Neg Hands (v2)"), (9, "unused")):
        server.files[version] = write_model(tmp_path / f"{name}.safetensors", MIB)
    monkeypatch.setenv("EMBEDDINGS", "7,8,9@mine")
    folder = tmp_path / "models" / "embeddings"
    named = {"negativeXL_D": 7, "Neg_Hands_v2_": 8, "mine": 9}
    for start in ("cold", "warm"):
        files = seams.fetch_models(seams.Settings.from_environ())
        assert files.embeddings == {name: folder / f"civitai_{version}.safetensors" for name, version in named.items()}
        assert files.embeddings_failed == {}
        assert bool(server.requests) == (start == "cold")
        os.utime(folder / "civitai_7.safetensors")
        server.clear()
    assert seams.fetch_models(seams.Settings.from_environ()).embeddings == files.embeddings


def test_embedding_without_a_name_of_its_own(server, tmp_path, monkeypatch):
    """An embedding is civitai_<id> where its name is taken, in whatever case, or unknown; one that cannot be had is
    named with its reason."""
    for version, folder in ((7, "a"), (8, "b"), (9, "c")):
        (tmp_path / folder).mkdir()
        server.files[version] = write_model(tmp_path / folder / "same.safetensors", MIB)
    server.faults = {9: [Fault("info", status=451, times=-1)], 10: [Fault("api", status=410, times=-1)]}
    monkeypatch.setenv("EMBEDDINGS", "7@Same,8,9,10")
    files = seams.fetch_models(seams.Settings.from_environ())
    assert list(files.embeddings) == ["Same", "civitai_8", "civitai_9"]
    assert list(files.embeddings_failed) == ["civitai_10"]
    assert "removed" in files.embeddings_failed["civitai_10"]


def test_sweep_of_embeddings(server, tmp_path):
    """What is left of embeddings that nobody configures is swept, too."""
    folder = tmp_path / "models" / "embeddings"
    folder.mkdir(parents=True)
    part = folder / f".civitai_7.safetensors.{'ab' * 8}.part"
    part.write_bytes(b"x")
    os.utime(part, (time.time() - 90_000,) * 2)
    seams.sweep()
    assert not part.exists()


# what is in place

WARM_START = """
import hashlib, sys, socket
opened = []
sys.addaudithook(lambda event, args: opened.append(event) if event in ("socket.connect", "socket.getaddrinfo") else 0)
import handler
hashlib.file_digest = None  # hashing would fail
checkpoint, loras = handler.setup_models()
print(len(loras), opened)
"""


def test_warm_start(server):
    """With all files in place a start opens no connection and hashes nothing; without a network it is the same."""
    handler.setup_models()
    server.clear()
    alone = (
        ["unshare", "-rn"] if subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode == 0 else []
    )
    command = [*alone, sys.executable, "-c", WARM_START]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent)
    assert done.stdout == "2 []\n", done.stderr
    assert server.requests == []


def test_read_only_store(server, monkeypatch):
    """Files in place serve from a store that cannot be written, recorded or not."""
    checkpoint, _ = handler.setup_models()
    seams.record_of(checkpoint).unlink()
    server.clear()
    real = os.open

    def read_only(path: str, flags: int, *args: object, **kwargs: object) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and str(path).startswith(str(checkpoint.parent)):
            raise OSError(30, "Read-only file system")
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", read_only)
    monkeypatch.setattr(Path, "write_text", lambda path, _: read_only(path, os.O_WRONLY))
    assert handler.setup_models()[0] == checkpoint
    assert server.requests == []


def test_file_put_there_by_hand(server, tmp_path):
    """A whole file put there by hand is taken without a request, and recorded."""
    shutil.copy(server.files[135867], tmp_path / "detail.safetensors")
    path = handler.ensure_model_exists(config(), tmp_path)
    assert server.requests == []
    assert seams.record_of(path).exists()
    assert seams.recorded_hash(path) == ""


@pytest.mark.parametrize("damage", ["truncated", "longer", "web page", "empty"])
def test_unusable_file(server, tmp_path, damage):
    """A file in place that is no whole safetensors file is fetched again."""
    whole = server.files[135867].read_bytes()
    content = {"truncated": whole[:-1], "longer": whole + b"x", "web page": b"<!DOCTYPE html>" * 99, "empty": b""}
    path = tmp_path / "detail.safetensors"
    path.write_bytes(content[damage])
    assert handler.ensure_model_exists(config(), tmp_path) == path
    assert path.read_bytes() == whole


def test_unusable_file_is_removed(server, tmp_path):
    """An unusable file does not stay where no better one can be had."""
    (tmp_path / "detail.safetensors").write_bytes(b"<!DOCTYPE html>")
    server.faults[135867] = [Fault("api", status=401)]
    with pytest.raises(handler.DownloadError):
        handler.ensure_model_exists(config(), tmp_path)
    assert not (tmp_path / "detail.safetensors").exists()


def test_touched_file(server, tmp_path):
    """A file that was touched is hashed: taken where it is the same, fetched again where a byte has changed."""
    path = handler.ensure_model_exists(config(), tmp_path)
    digest = seams.recorded_hash(path, 64)
    os.utime(path)
    assert seams.recorded_hash(path) == ""
    server.clear()
    handler.ensure_model_exists(config(), tmp_path)
    assert server.requests == []
    assert seams.recorded_hash(path, 64) == digest
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    handler.ensure_model_exists(config(), tmp_path)
    assert path.read_bytes() == server.files[135867].read_bytes()


def test_configured_hash_of_a_file_in_place(server, tmp_path):
    """A config's sha256 is checked for a file put there by hand, and for one that was recorded with another hash."""
    path = write_model(tmp_path / "detail.safetensors", MIB)
    digest = sha256(server.files[135867])
    handler.ensure_model_exists(config(sha256=sha256(path)), tmp_path)
    assert server.requests == []
    handler.ensure_model_exists(config(sha256=digest), tmp_path)
    assert path.read_bytes() == server.files[135867].read_bytes()
    assert seams.recorded_hash(path, 64) == digest.lower()


@pytest.mark.parametrize("record", [b"", b"[]", b"{", b'{"size": "x"}', b"\xff"])
def test_damaged_record(server, tmp_path, record):
    """A record that cannot be read is as none."""
    path = handler.ensure_model_exists(config(), tmp_path)
    seams.record_of(path).write_bytes(record)
    assert seams.recorded_hash(path) == ""
    assert handler.ensure_model_exists(config(), tmp_path) == path


def test_read_ahead(tmp_path):
    """Reading ahead brings every byte of the files into the page cache."""
    paths = [write_model(tmp_path / f"{size}.safetensors", size * MIB) for size in (70, 3)]
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    seams.read_ahead(*paths)
    deadline = time.monotonic() + 20
    for path in paths:
        with path.open("rb") as file:
            while not all(is_cached(file.fileno(), at) for at in range(0, path.stat().st_size, MIB)):
                assert time.monotonic() < deadline
                time.sleep(0.05)


@pytest.mark.parametrize(("slow_s", "most"), [(60, 2), (0.0, 8)])
def test_readers(tmp_path, monkeypatch, slow_s, most):
    """Two read ahead on a fast disk, eight where every read waits for a server; all is read."""
    seams.set(monkeypatch, READ_BYTES=MIB, SLOW_READ_S=slow_s)
    now, seen, read, lock = 0, 0, 0, threading.Lock()

    def preadv(_descriptor: int, _buffers: list, _offset: int) -> int:
        nonlocal now, seen, read
        with lock:
            now, seen = now + 1, max(seen, now + 1)
        time.sleep(0.02)
        with lock:
            now, read = now - 1, read + 1
        return MIB

    monkeypatch.setattr(os, "preadv", preadv)
    seams.read_ahead(*(write_model(tmp_path / f"{i}.safetensors", 20 * MIB) for i in range(3)))
    while read < 3 * 21:
        time.sleep(0.01)
    assert seen == most


def is_cached(descriptor: int, offset: int) -> bool:
    """Whether a byte of a file is in the page cache; on file systems that do not tell, it is."""
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False


def test_read_ahead_goes_on(tmp_path, monkeypatch, caplog):
    """A chunk that cannot be read ahead is logged and left out; all others are read."""
    seams.set(monkeypatch, READ_BYTES=MIB)
    read, real = [], os.preadv

    def preadv(descriptor: int, buffers: list, offset: int) -> int:
        if offset < 4 * MIB:
            raise OSError(5, "Input/output error")
        read.append(offset)
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    seams.read_ahead(write_model(tmp_path / "a.safetensors", 20 * MIB))
    while len(read) < 17:
        time.sleep(0.01)
    assert sorted(read) == list(range(4 * MIB, 21 * MIB, MIB))
    assert "cannot be read ahead" in caplog.text


# room on the disk


def test_no_room_for_all(server, tmp_path, monkeypatch):
    """Files that fit one by one but not together are refused before the first byte, with the sum in MB."""
    real = os.statvfs
    blocks = int(2.5 * MIB) // 4096
    monkeypatch.setattr(
        os, "statvfs", lambda _: os.statvfs_result((4096, 4096, blocks, blocks, blocks, *real("/")[5:]))
    )
    with pytest.raises(handler.DownloadError, match="need 3 MB, but the model store has 3 MB free"):
        handler.setup_models()
    assert server.bytes_sent("cdn") == 3  # those that ask for the sizes
    assert not list((tmp_path / "models").rglob("*.safetensors"))


def test_a_file_of_two_adapters_needs_its_room_once(server, monkeypatch):
    """The same version id twice in LORAS is one file, fetched where one fits."""
    monkeypatch.setenv("LORAS", "135867@1,135867@0.5")
    real = os.statvfs
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((4096, 4096, 640, 640, 640, *real("/")[5:])))
    assert len(set(handler.setup_models()[1].values())) == 1


def test_store_that_cannot_be_made(server, monkeypatch):
    """A start whose store cannot be written says which setting names it."""
    monkeypatch.setenv("MODEL_CACHE_DIR", "/proc/store")
    with pytest.raises(handler.DownloadError, match="MODEL_CACHE_DIR") as caught:
        handler.setup_models()
    assert "/proc" not in str(caught.value)


# what nobody resumes


@pytest.mark.parametrize("name", ["another.safetensors", "detail_tweaker_xl.safetensors", "civitai_1.safetensors"])
@pytest.mark.parametrize("owner", ["ended here", "elsewhere", "silent elsewhere", "given up"])
def test_sweep(server, tmp_path, owner, name):
    """Every start deletes what downloads left of models that nobody configures, or that are in place, where their
    worker has ended here or was silent for a day; what may be resumed, or is at work, stays."""
    folder = tmp_path / "models" / "loras"
    folder.mkdir(parents=True)
    if name.startswith("detail"):
        shutil.copy(server.files[135867], folder / name)
    left = [folder / f".{name}.{'ab' * 8}.{kind}" for kind in ("part", "journal")]
    left.append(folder / f".{name}.lock")
    for file in left:
        file.write_text(f"{seams.dead_owner() if owner == 'ended here' else ELSEWHERE} 5")
        if owner == "silent elsewhere":
            os.utime(file, (time.time() - 90_000,) * 2)
    if owner == "given up":
        left.pop().unlink()
    seams.sweep()
    swept = owner in ("ended here", "silent elsewhere")
    assert [file.exists() for file in left] == [not swept] * len(left)


def test_sweep_keeps_what_is_resumed(server, tmp_path):
    """The part of a configured model that is missing is kept for its download, however old it is."""
    folder = tmp_path / "models" / "checkpoints"
    folder.mkdir(parents=True)
    part = folder / f".civitai_1.safetensors.{'ab' * 8}.part"
    part.write_bytes(b"x")
    seams.sweep()
    assert part.exists()


def test_another_checkpoint(server, tmp_path, monkeypatch):
    """A download killed, then another CHECKPOINT: nothing of the first is left."""
    server.rate = MIB / 2
    store = tmp_path / "models" / "checkpoints"
    play((store, 1, 0.1))
    assert list(store.glob(".detail.safetensors.*.part"))
    server.rate = None
    handler.setup_models()
    assert sorted(file.name for file in store.iterdir()) == [".civitai_1.safetensors.json", "civitai_1.safetensors"]


# workers that are killed, and many at once: real processes, forked from one that has its imports

FORKER = """
import json, logging, os, signal, sys, time
from pathlib import Path
import handler, requests, safetensors, tqdm
job = json.loads(sys.argv[1])
for name, value in job["constants"].items():
    setattr(handler, name, value)
if not job["locks"]:  # a file system where O_EXCL silently does nothing
    real = os.open
    os.open = lambda path, flags, *rest, **more: real(path, flags & ~os.O_EXCL, *rest, **more)
logging.basicConfig(level=logging.INFO)
def start(folder):
    child = os.fork()
    if child == 0:
        try:
            handler.ensure_model_exists(job["config"], Path(folder))
            os._exit(0)
        except handler.DownloadError as error:
            print(error, error.detail, file=sys.stderr)
            os._exit(1)
    return child
for folder, workers, kill_after in job["acts"]:
    children = [start(folder) for _ in range(workers)]
    if kill_after is not None:
        while not job["any_moment"] and not any(file.stat().st_size > 32 for file in Path(folder).glob("*.journal")):
            time.sleep(0.01)  # on a busy machine a worker takes seconds to its first bytes
        time.sleep(kill_after)
        for child in children:
            os.kill(child, signal.SIGKILL)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(json.dumps([statuses, time.monotonic(), sorted(os.listdir(folder)) if os.path.isdir(folder) else []]))
"""
FAST = {**seams.QUICK_LOCKS, "SEGMENT": 32 * 1024, "BLOCK": 32 * 1024}
Act = tuple[Path, int, float | None]  # a store, how many workers fetch into it, and when they are killed


def play(
    *acts: Act, locks: bool = True, any_moment: bool = False
) -> tuple[list[tuple[list[int], float, list[str]]], str]:
    """Runs acts one after the other: exit statuses, time of the end and files of each, and the log of all. Workers are
    killed so long after their first bytes came; any_moment: after their start."""
    job = {"constants": FAST, "config": config(), "locks": locks, "any_moment": any_moment}
    job["acts"] = [(str(folder), workers, kill_after) for folder, workers, kill_after in acts]
    command = [sys.executable, "-c", FORKER, json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def sent(server: CivitaiServer, since: float = 0.0, until: float = math.inf) -> int:
    """Bytes of bodies of the requests of a time."""
    return sum(request.sent for request in server.requests_of("cdn") if since <= request.started < until)


DONE = [".detail.safetensors.json", "detail.safetensors"]  # what is in a store in the end


def test_kill_at_any_moment(server, tmp_path):
    """Killed at any moment, over and over, a worker leaves nothing wrong, and the next one asks only for what is
    missing: no more than 5 % of what had come by then is fetched again."""
    server.files[135867] = origin = write_model(tmp_path / "big.origin", 24 * MIB)
    server.rate = MIB  # of each connection
    store = tmp_path / "store"
    kills = [(store, 1, random.uniform(0.0, 90 / KILLS / 10)) for _ in range(KILLS)]
    played, said = play(*kills, (store, 1, None), any_moment=True)
    assert all("detail.safetensors" not in files or files == DONE for _, _, files in played)
    assert played[-1][0] == [0], said
    assert played[-1][2] == DONE
    assert (store / "detail.safetensors").read_bytes() == origin.read_bytes()
    finished = [sent(server, until=ended) for _, ended, _ in played if sent(server, until=ended) < 24 * MIB]
    assert len(finished) > KILLS / 3
    assert sent(server) - origin.stat().st_size < 0.05 * sum(finished)


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "locks that do nothing"])
def test_many_workers(server, tmp_path, locks):
    """Eight workers on one folder all end with the right file. With locks that work it is fetched once, and the
    others wait, saying so; with locks that silently do nothing the result is the same."""
    server.rate = 0.5 * MIB
    origin = server.files[135867]
    for n in range(ROUNDS):
        folder = tmp_path / f"store{n}"
        server.clear()
        [(statuses, _, files)], said = play((folder, 8, None), locks=locks)
        assert statuses == [0] * 8, said
        assert (folder / "detail.safetensors").read_bytes() == origin.read_bytes()
        assert files == DONE
        if locks:
            assert sent(server) < 1.05 * origin.stat().st_size
            assert "another worker is fetching it; waiting" in said


def test_many_workers_killed(server, tmp_path):
    """Eight workers killed at once, with locks or without, leave a store in which the next one succeeds."""
    server.rate = 0.5 * MIB
    for locks in (True, False):
        folder = tmp_path / f"store{locks}"
        [_, (statuses, _, files)], said = play((folder, 8, 0.1), (folder, 1, None), locks=locks)
        assert statuses == [0], said
        assert (folder / "detail.safetensors").read_bytes() == server.files[135867].read_bytes()
        assert files == DONE


# locks of others

ELSEWHERE = "0123456789ab-77-abcdef01"  # a worker on another machine


def make_lock(folder: Path, owner: str = ELSEWHERE, mtime: float | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    lock = folder / ".detail.safetensors.lock"
    lock.unlink(missing_ok=True)  # a worker that writes its beat into the one before shall not write into this one
    lock.write_text(f"{owner} 5")
    if mtime is not None:
        os.utime(lock, (mtime, mtime))
    return lock


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    seams.set(monkeypatch, **FAST)


def test_a_dead_worker_blocks_nobody_for_a_minute():
    """A lock without a beat is taken over within a minute, and a living worker has several beats in that time."""
    assert seams.constant("LOCK_DEAD_S") + 2 * seams.constant("LOCK_POLL_S") < 60
    assert seams.constant("LOCK_BEAT_S") * 4 < seams.constant("LOCK_DEAD_S")


def test_dead_lock(server, tmp_path, hurry):
    """The lock of a dead worker elsewhere is taken over after LOCK_DEAD_S, whatever the file server's clock says."""
    started, fetching = time.monotonic(), []
    for skew_s in (-1e6, 0, 1e6):
        folder = tmp_path / f"store{skew_s}"
        make_lock(folder, mtime=time.time() + skew_s)
        fetching.append(seams.in_background(handler.ensure_model_exists, config(), folder))
    assert all(future.result(60).exists() for future in fetching)
    assert time.monotonic() - started > seams.constant("LOCK_DEAD_S")
    assert not list(tmp_path.glob("store*/.*.lock"))


def test_living_lock(server, tmp_path, hurry):
    """A lock whose beat goes on is waited for, and what its owner has fetched is taken."""
    lock = make_lock(tmp_path / "store")
    waiting = seams.in_background(handler.ensure_model_exists, config(), tmp_path / "store")
    for beat in range(6, 66):
        time.sleep(seams.constant("LOCK_DEAD_S") / 30)
        lock.write_text(f"{ELSEWHERE} {beat}")
    assert not waiting.done()
    assert server.requests == []
    shutil.copy(server.files[135867], tmp_path / "store" / "detail.safetensors")
    lock.unlink()
    assert waiting.result(5).exists()
    assert server.requests == []


def fail_beats(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """The next beats of locks cannot be written."""
    real, failed = os.pwrite, []

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        if bytes(data).startswith(seams.machine().encode()) and len(failed) < times:
            failed.append(descriptor)
            raise OSError(116, "Stale file handle")
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)


def test_beat_that_fails_for_a_while(server, tmp_path, hurry, monkeypatch, caplog):
    """A live lock whose beat cannot be written for a while is not taken over; the log says so once."""
    fail_beats(monkeypatch, times=4)
    server.faults[135867] = [Fault("cdn"), Fault("cdn", delay_s=3.5)]
    store = tmp_path / "store"
    workers = [seams.in_background(handler.ensure_model_exists, config(), store) for _ in range(2)]
    assert {worker.result(60) for worker in workers} == {store / "detail.safetensors"}
    assert "taking over" not in caplog.text
    assert caplog.text.count("beat cannot be written") == 1
    assert sent(server) < 1.1 * server.files[135867].stat().st_size


def test_lock_that_was_lost(server, tmp_path, hurry):
    """A worker whose lock was taken over does not publish over the other's file: it waits, and takes that one."""
    server.rate = MIB / 8
    store = tmp_path / "store"
    fetching = seams.in_background(handler.ensure_model_exists, config(), store)
    while not sent(server) > 3 * 65536:
        time.sleep(0.02)
    lock = make_lock(store)
    server.rate = None
    for beat in range(6, 66):
        time.sleep(seams.constant("LOCK_DEAD_S") / 30)
        lock.write_text(f"{ELSEWHERE} {beat}")
    assert not (store / "detail.safetensors").exists()
    shutil.copy(server.files[135867], store / "detail.safetensors")
    inode = (store / "detail.safetensors").stat().st_ino
    lock.unlink()
    assert fetching.result(30).stat().st_ino == inode


def test_dead_lock_of_a_file_to_be_replaced(server, tmp_path, hurry):
    """download_file that waits for a worker which turns out to be dead still replaces the file in place."""
    path = write_model(tmp_path / "detail.safetensors", MIB)
    make_lock(tmp_path)
    handler.download_file(civitai_url(135867), path)
    assert path.read_bytes() == server.files[135867].read_bytes()


def test_lock_of_a_gone_process(server, tmp_path):
    """A lock of a process of this machine that has ended is taken over at once."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    make_lock(tmp_path / "store", f"{seams.machine()}-{ended.pid}-abcdef01")
    started = time.monotonic()
    handler.ensure_model_exists(config(), tmp_path / "store")
    assert time.monotonic() - started < seams.constant("LOCK_DEAD_S")


def test_part_of_a_dead_worker_elsewhere(server, tmp_path, hurry):
    """What a dead worker on another machine has fetched is adopted where its hash can be checked in the end."""
    server.files[135867] = origin = write_model(tmp_path / "big.origin", 16 * MIB)
    server.rate = MIB
    play((tmp_path / "store", 1, 0.2))
    before = sent(server)
    assert before > MIB
    (journal,) = (tmp_path / "store").glob("*.journal")
    journal.write_bytes(
        journal.read_bytes().replace(seams.machine().encode(), b"0123456789ab".ljust(len(seams.machine())))
    )
    make_lock(tmp_path / "store")
    handler.ensure_model_exists(config(), tmp_path / "store")
    assert sent(server) < 1.1 * origin.stat().st_size
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("hashed", [True, False], ids=["hash known", "no hash"])
def test_part_of_another_machine(server, tmp_path, hurry, hashed):
    """What came on another machine, or before this one crashed, counts only where a hash can find lost writes; what
    came on this one counts without, too."""
    server.files[135867] = origin = write_model(tmp_path / "big.origin", 16 * MIB)
    for where in ("here", "elsewhere"):
        server.clear()
        server.rate = MIB
        store = tmp_path / where
        play((store, 1, 0.2))
        (journal,) = store.glob("*.journal")
        if where == "elsewhere":
            journal.write_bytes(
                journal.read_bytes().replace(seams.machine().encode(), b"0123456789ab".ljust(len(seams.machine())))
            )
        server.rate = None
        server.faults[135867] = [] if hashed else [Fault("info", status=404, times=-1)]
        path = handler.ensure_model_exists(config(), store)
        assert path.read_bytes() == origin.read_bytes()
        assert (sent(server) < 1.1 * origin.stat().st_size) == (hashed or where == "here")


def test_part_of_another_file(server, tmp_path, hurry):
    """What is left of a file that has changed since is not mixed into it, but deleted."""
    server.files[135867] = write_model(tmp_path / "old.origin", 4 * MIB)
    server.rate = MIB
    play((tmp_path / "store", 1, 0.2))
    assert leftovers(tmp_path)
    server.files[135867] = new = write_model(tmp_path / "new.origin", 4 * MIB)
    server.rate = None
    path = handler.ensure_model_exists(config(), tmp_path / "store")
    assert path.read_bytes() == new.read_bytes()
    assert leftovers(tmp_path) == []


def test_leftovers_without_their_other_half(server, tmp_path):
    """A part without its journal, a journal without its part and a record half written are deleted."""
    (tmp_path / "store").mkdir()
    for n, kind in enumerate(["part", "journal"]):
        (tmp_path / "store" / f".detail.safetensors.{str(n) * 16}.{kind}").write_bytes(b"{")
    handler.ensure_model_exists(config(), tmp_path / "store")
    assert sorted(file.name for file in (tmp_path / "store").iterdir()) == DONE


def test_lost_writes(server, tmp_path, hurry):
    """A part whose bytes were lost, as in a crash of the machine, is found out by its hash and fetched again."""
    server.rate = MIB
    play((tmp_path / "store", 1, 0.1))
    (part,) = (tmp_path / "store").glob("*.part")
    part.write_bytes(bytes(part.stat().st_size))
    server.rate = None
    path = handler.ensure_model_exists(config(), tmp_path / "store")
    assert path.read_bytes() == server.files[135867].read_bytes()


def test_torn_journal(server, tmp_path, hurry):
    """A journal that ends in the middle of an entry is read up to there."""
    server.rate = MIB
    play((tmp_path / "store", 1, 0.1))
    (journal,) = (tmp_path / "store").glob("*.journal")
    journal.write_bytes(journal.read_bytes()[:-7])
    path = handler.ensure_model_exists(config(), tmp_path / "store")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == seams.recorded_hash(path, 64)


def test_given_up_and_tried_again(server, tmp_path):
    """What came before a download was given up is used by the next try of the same worker."""
    server.files[135867] = origin = write_model(tmp_path / "big.origin", 4 * MIB)
    server.faults[135867] = [Fault(times=8), Fault(status=503, times=-1)]
    with pytest.raises(handler.DownloadError):
        handler.ensure_model_exists(config(), tmp_path / "store")
    assert sent(server) > MIB
    server.faults.clear()
    handler.ensure_model_exists(config(), tmp_path / "store")
    assert sent(server) < 1.05 * origin.stat().st_size
    assert leftovers(tmp_path) == []


def test_no_hash_of_a_file_that_is_gone(tmp_path):
    """A file deleted from under a running worker has no recorded hash; no job fails for it."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"x")
    seams.write_record(path, "ab" * 32)
    assert seams.recorded_hash(path, 64) == "ab" * 32
    path.unlink()
    assert seams.recorded_hash(path) == ""
