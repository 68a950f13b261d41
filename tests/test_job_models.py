"""Models that jobs name by id: what is refused, what they may take of the store, and what goes when it is full."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import seams
from civitai_server import CivitaiServer, Fault, sha256
from test_downloads import KEY, MIB, write_model
from test_store import ELSEWHERE

import handler

IDS = (11, 12, 13, 14)  # of 1 MiB each; two of them fit
BIG = 20  # 2 MiB


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CivitaiServer]:
    """Civitai with a few LoRAs; the worker's jobs may keep two of them."""
    files = {version: write_model(tmp_path / f"{version}.origin", MIB) for version in (1, 135867, *IDS)}
    files[BIG] = write_model(tmp_path / "big.origin", 2 * MIB)
    seams.set(monkeypatch, **seams.QUICK | seams.QUICK_LOCKS)
    with CivitaiServer(files, key=KEY) as server:
        environ = {"CIVITAI_BASE_URL": server.url, "CIVITAI_API_KEY": KEY, "MODEL_CACHE_DIR": str(tmp_path / "models")}
        environ |= {"CHECKPOINT": "1", "LORAS": "", "JOB_MODELS_GB": "0.0025", "JOB_MODEL_MAX_MB": "3"}
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "models" / "loras"


def fetch(version: int, kind: str = "lora") -> Path:
    """As a worker does that has just started."""
    return seams.fetch_for_job(seams.job_store(), version, kind)


def failure(version: int, kind: str = "lora") -> tuple[str, str]:
    """Code and sentence of a refusal; the worker stays usable, and nothing secret is told."""
    with pytest.raises(seams.WorkerError) as caught:
        fetch(version, kind)
    assert not caught.value.refresh_worker
    assert not any(secret in str(caught.value) for secret in (KEY, "http", "/models"))
    return caught.value.code, str(caught.value)


def there(folder: Path) -> set[int]:
    """The ids of the files in a folder, each with its record."""
    files = list(folder.glob("civitai_*.safetensors"))
    assert {seams.record_of(file).name for file in files} == {file.name for file in folder.glob(".*.json")}
    return {int(file.stem.removeprefix("civitai_")) for file in files}


def age(path: Path, seconds: float, user: str | None = None) -> None:
    """A file's last use was so long ago, and by this user."""
    mark = seams.mark_of(path)
    if user:
        mark.write_text(f"{user} {path.stat().st_size}\n")
    os.utime(mark, (time.time() - seconds,) * 2)


def test_fetched_once(server, folder):
    """A model by id is fetched, verified and kept under its id; the next job that names it asks for nothing."""
    path = fetch(11)
    assert path == folder / "civitai_11.safetensors"
    assert seams.recorded_hash(path, 64) == sha256(server.files[11]).lower()
    server.clear()
    assert fetch(11) == path
    assert server.requests == []


def test_embedding(server, folder):
    """An embedding has its own folder."""
    server.kinds[11] = "TextualInversion"
    assert fetch(11, "embedding") == folder.parent / "embeddings" / "civitai_11.safetensors"


def test_two_jobs_at_once(server):
    """Two jobs with the same new id fetch it once."""
    server.rate = MIB
    store = seams.job_store()
    paths = {future.result(30) for future in [seams.in_background(seams.fetch_for_job, store, 11) for _ in range(2)]}
    assert len(paths) == 1
    assert server.bytes_sent("cdn") == server.files[11].stat().st_size + 1


def test_known_model_in_place(server, folder, monkeypatch):
    """A model of the table that is in place under its own name is used as it is, though not configured."""
    monkeypatch.setenv("LORAS", "135867")
    handler.setup_models()
    monkeypatch.setenv("LORAS", "")
    server.clear()
    assert fetch(135867) == folder / "detail_tweaker_xl.safetensors"
    assert server.requests == []


# what is refused


@pytest.mark.parametrize(("setting", "value"), [("JOB_MODEL_MAX_MB", "2"), ("JOB_MODELS_GB", "0.002")])
def test_too_large(server, folder, monkeypatch, setting, value):
    """A file over a limit is refused before its bytes, with the setting and both sizes; nothing is left of it."""
    monkeypatch.setenv(setting, value)
    server.files[BIG] = write_model(folder.parent.parent / "big.origin", 2_600_000)
    code, said = failure(BIG)
    assert code == "INVALID_INPUT"
    assert all(word in said for word in (setting, "2.0 MB", "2.6 MB", str(BIG)))
    assert server.bytes_sent("cdn") == 1
    assert list(folder.iterdir()) == []


def test_size_unknown(server, folder):
    """A server that does not tell a file's size does not get it past the limit."""
    server.faults[BIG] = [Fault(ignore_range=True, no_length=True, times=-1)]
    code, said = failure(BIG)
    assert code == "DOWNLOAD_FAILED"
    assert "how large" in said
    assert list(folder.iterdir()) == []


def test_another_size_than_admitted(server, folder):
    """A file that is replaced by a larger one once it was admitted is refused by the size that it has now."""
    larger = write_model(folder.parent.parent / "larger.origin", 4 * MIB)
    server.faults[11] = [Fault("info", delay_s=1.0)]
    fetching = seams.in_background(fetch, 11)
    while not server.requests_of("info", 11):  # the size has been asked for before
        time.sleep(0.005)
    server.files[11] = larger
    with pytest.raises(seams.WorkerError, match="JOB_MODEL_MAX_MB"):
        fetching.result(30)
    assert there(folder) == set()


def test_switched_off(server, folder, monkeypatch):
    """JOB_MODELS_GB=0: jobs may name no model by id, but for configured ones, which take up nothing."""
    monkeypatch.setenv("JOB_MODELS_GB", "0")
    assert failure(11)[0] == "INVALID_INPUT"
    assert server.bytes_sent("cdn") == 1
    monkeypatch.setenv("LORAS", "11")
    handler.setup_models()
    assert fetch(11) == folder / "civitai_11.safetensors"


@pytest.mark.parametrize(
    ("kind", "listed"), [("lora", "Checkpoint"), ("lora", "TextualInversion"), ("embedding", "LORA")]
)
def test_another_kind(server, kind, listed):
    """A file that Civitai lists as something else is refused before its bytes, by that name."""
    server.kinds[11] = listed
    code, said = failure(11, kind)
    assert code == "INVALID_INPUT"
    assert listed in said
    assert server.bytes_sent("cdn") == 1


@pytest.mark.parametrize("listed", ["LORA", "LoCon", "DoRA", "Other", "<b>", None])
def test_kind_that_may_fit(server, listed):
    """Each of Civitai's kinds of LoRA is fetched, and what it cannot tell the kind of."""
    server.kinds[11] = listed
    server.faults[11] = [] if listed else [Fault("info", status=451, times=-1)]
    assert fetch(11).exists()


@pytest.mark.parametrize(("status", "told"), [(401, "log in"), (403, "CIVITAI_API_KEY"), (404, "id"), (410, "removed")])
def test_cannot_be_had(server, status, told):
    """What Civitai refuses is DOWNLOAD_FAILED, with its reason and the version id; the next job finds all in order."""
    body = b'{"message": "please log in"}' if status == 401 else b"{}"
    server.faults[11] = [Fault("api", status=status, body=body, times=-1)]
    code, said = failure(11)
    assert code == "DOWNLOAD_FAILED"
    assert told in said
    assert "version 11" in said
    assert fetch(12).exists()


def test_patience(server):
    """A job waits a minute at most, since its client waits for the answer: a start would bear this fault."""
    server.faults[11] = [Fault("api", status=429, headers={"Retry-After": "70"}, times=-1)]
    assert failure(11)[0] == "DOWNLOAD_FAILED"
    assert len(server.requests) == 1
    assert seams.constant("JOB_PATIENCE_S") < 70 < seams.constant("PATIENCE_S")


# what goes when the room is full


@pytest.mark.parametrize("restarted", [True, False])
def test_least_recently_used_goes(server, folder, restarted):
    """Where the room would be exceeded the least recently used goes, with all that belongs to it; uses are remembered
    by the next worker."""
    store = seams.job_store()
    for version in (11, 12):
        age(seams.fetch_for_job(store, version), 100 - version)
    seams.fetch_for_job(store, 11)
    fetch(13) if restarted else seams.fetch_for_job(store, 13)
    assert there(folder) == {11, 13}
    assert {file.name for file in folder.glob(".*.job")} == {f".civitai_{n}.safetensors.job" for n in (11, 13)}


def test_a_full_disk_has_less_room(server, folder, monkeypatch):
    """Where the disk has less left than JOB_MODELS_GB allows, jobs' files go too; with none to go it is an error."""
    monkeypatch.setenv("JOB_MODELS_GB", "1")
    fetch(11)
    real = os.statvfs

    def full(_path: Path) -> os.statvfs_result:  # room for two files
        blocks = 600 - 260 * len(list(folder.glob("civitai_*")))
        return os.statvfs_result((4096, 4096, 600, blocks, blocks, *real("/")[5:]))

    monkeypatch.setattr(os, "statvfs", full)
    fetch(12)
    assert there(folder) == {11, 12}
    fetch(13)
    assert len(there(folder)) == 2 and 13 in there(folder)
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((4096, 4096, 512, 9, 9, *real("/")[5:])))
    code, told = failure(14)
    assert code == "DOWNLOAD_FAILED" and "free" in told


def test_embeddings_share_the_room(server, folder):
    """LoRAs and embeddings that jobs have brought take up the same room."""
    age(fetch(11, "embedding"), 50)
    fetch(12)
    fetch(13)
    assert there(folder) == {12, 13}
    assert there(folder.parent / "embeddings") == set()


def test_configured_stays(server, folder, monkeypatch):
    """A configured file never goes: neither one of this worker nor one of another endpoint on the same volume."""
    monkeypatch.setenv("LORAS", "11")
    handler.setup_models()
    monkeypatch.setenv("LORAS", "")
    os.utime(folder / "civitai_11.safetensors", (1, 1))
    for version in (12, 13, 14):
        fetch(version)
    assert 11 in there(folder)
    assert len(there(folder)) == 3


def test_configured_later(server, folder, monkeypatch):
    """A job's file that a start configures is one of its own from then on."""
    age(fetch(11), 1000)
    monkeypatch.setenv("LORAS", "11")
    server.clear()
    handler.setup_models()
    assert not server.requests_of("api", 11)
    for version in (11, 12, 13, 14):
        fetch(version)
    assert there(folder) == {11, 13, 14}


def test_configured_that_a_job_brings(server, folder, monkeypatch):
    """A configured file that the start could not have, and a job brings, is configured all the same."""
    monkeypatch.setenv("LORAS", "11")
    server.faults[11] = [Fault("api", status=401)]
    handler.setup_models()
    for version in (11, 12, 13, 14):
        fetch(version)
    assert there(folder) == {11, 13, 14}


@pytest.mark.parametrize(
    ("user", "used_s", "goes"),
    [("elsewhere", 60, False), ("elsewhere", 180, True), ("ended here", 60, True), ("this worker", 1, True)],
)
def test_in_use_by_another_worker(server, folder, user, used_s, goes):
    """A file that another living worker used within two minutes stays, and a job that needs its room is told so."""
    store = seams.job_store()
    path = seams.fetch_for_job(store, 11)
    users = {"elsewhere": ELSEWHERE, "ended here": seams.dead_owner(), "this worker": None}
    age(path, used_s, users[user])
    if goes:
        seams.fetch_for_job(store, BIG)
    else:
        code, said = failure(BIG)
        assert code == "DOWNLOAD_FAILED"
        assert "JOB_MODELS_GB" in said
    assert there(folder) == ({BIG} if goes else {11})


def test_fetched_by_another_worker(server, folder):
    """A file that another worker is fetching anew stays, however long ago it was used."""
    path = fetch(11)
    age(path, 1000, ELSEWHERE)
    lock = path.with_name(f".{path.name}.lock")
    lock.write_text(f"{ELSEWHERE} 5")
    assert failure(BIG)[0] == "DOWNLOAD_FAILED"
    lock.unlink()
    fetch(BIG)
    assert there(folder) == {BIG}


def test_room_for_two_at_once(server, folder):
    """Jobs that fetch at the same time do not exceed the room together: those beyond it are told so."""
    server.rate = MIB / 4
    store = seams.job_store()
    fetching = [seams.in_background(seams.fetch_for_job, store, version) for version in IDS]
    failures = [error for future in fetching if (error := future.exception(60))]
    assert [error.code for error in failures] == ["DOWNLOAD_FAILED"] * 2
    assert len(there(folder)) == 2


def test_mark_without_a_file(server, folder):
    """What a job's download has left is swept as any other's; the mark of a file in place is not."""
    path = fetch(11)
    lost = folder / "civitai_12.safetensors"
    for file in (path, lost):
        seams.mark_of(file).write_text(f"{ELSEWHERE} 1000\n")
        os.utime(seams.mark_of(file), (time.time() - 90_000,) * 2)
    seams.sweep()
    assert seams.mark_of(path).exists()
    assert not seams.mark_of(lost).exists()
