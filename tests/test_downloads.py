"""One file over HTTP: what is asked, what is checked, and what becomes of every fault."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import seams
from civitai_server import CivitaiServer, Fault, sha256

import handler

ID = 135867
KEY = "key-of-the-tests"
MIB = 1024**2
TESTS = Path(__file__).resolve().parent


def civitai_url(version: int) -> str:
    """The address of a model version."""
    return f"https://civitai.com/api/download/models/{version}?type=Model&format=SafeTensor"


def write_model(path: Path, size: int, fill: bytes | None = None) -> Path:
    """A safetensors file with one tensor of `size` random bytes."""
    header = json.dumps({"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + (fill or os.urandom(size)))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "detail.safetensors", 6 * MIB)


@pytest.fixture
def server(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CivitaiServer]:
    """Civitai with one model; the worker's patience is shrunk to match a test's."""
    seams.set(monkeypatch, **seams.QUICK)
    with CivitaiServer({ID: model}, key=KEY) as server:
        monkeypatch.setenv("CIVITAI_BASE_URL", server.url)
        monkeypatch.setenv("CIVITAI_API_KEY", KEY)
        yield server


def config(**extra: object) -> dict:
    return {"name": "Detail Tweaker XL", "url": civitai_url(ID), "filename": "detail.safetensors", **extra}


def fetch(tmp_path: Path, **extra: object) -> Path:
    return handler.ensure_model_exists(config(**extra), tmp_path / "store")


def refusal(tmp_path: Path, **extra: object) -> str:
    """What a refused download says: it names the model, and nothing secret; nothing is under the final name."""
    with pytest.raises(handler.DownloadError) as caught:
        fetch(tmp_path, **extra)
    said = str(caught.value)
    assert not (tmp_path / "store" / "detail.safetensors").exists()
    assert said.startswith("Detail Tweaker XL")
    assert KEY not in f"{said} {caught.value.detail}"
    assert str(tmp_path) not in said
    return said


def leftovers(tmp_path: Path) -> list[str]:
    return [file.name for file in (tmp_path / "store").iterdir() if file.suffix in (".part", ".journal", ".lock")]


# what is asked


def test_many_connections(server, model, tmp_path):
    """A file comes whole in ranges over many connections, each byte once, and its verified hash is recorded."""
    path = fetch(tmp_path)
    assert path.read_bytes() == model.read_bytes()
    assert len(server.requests_of("cdn", ID)) > 8
    assert server.bytes_sent("cdn") == model.stat().st_size + 1  # the one that asks for the size
    assert seams.recorded_hash(path, 64) == sha256(model).lower()
    assert leftovers(tmp_path) == []


def test_connections_side_by_side(server, model, tmp_path):
    """Connections that are capped add up."""
    server.rate = 150_000
    fetch(tmp_path)
    assert 8 < server.peak <= seams.constant("CONNECTIONS")


def test_connections_are_kept(server, tmp_path):
    """Requests share their connections: no more are opened than may be used at once, and Civitai's own."""
    fetch(tmp_path)
    assert server.connections <= seams.constant("CONNECTIONS") + 2


def test_key_goes_to_civitai_alone(server, tmp_path, monkeypatch):
    """The key goes to Civitai, not to its CDN, the User-Agent to both; a .netrc does not replace the key."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login somebody password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    fetch(tmp_path)
    assert {request.authorization for request in server.requests_of("api")} == {f"Bearer {KEY}"}
    assert {request.authorization for request in server.requests_of("cdn")} == {""}
    assert {request.headers["user-agent"] for request in server.requests} == {"sdxl-worker/1.0"}


def test_key_stays_at_home(server, model, tmp_path, monkeypatch):
    """A file from another server is fetched without key and without questions about its hash."""
    monkeypatch.delenv("CIVITAI_BASE_URL")
    handler.download_file(server.signed_url(ID), tmp_path / "plain.bin")
    assert (tmp_path / "plain.bin").read_bytes() == model.read_bytes()
    assert {request.route for request in server.requests} == {"cdn"}
    assert {request.authorization for request in server.requests} == {""}


@pytest.mark.parametrize("target", ["http://192.0.2.1/file", "http://localhost.example/file", "ftp://127.0.0.1/file"])
def test_unsafe_redirect(server, tmp_path, target):
    """A redirect to anything but https or this machine is not followed."""
    server.faults[ID] = [Fault("api", status=307, headers={"Location": target})]
    assert "without encryption" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("https://civitai.com/a?b", "https://civitai.com:443", True),
        ("https://civitai.com", "http://civitai.com", False),
        ("http://127.0.0.1:8000", "http://127.0.0.1:8001", False),
        ("https://civitai.com", "https://civitai.com.example.org", False),
        ("https://civitai.com", "https://civitai.com@example.org", False),
    ],
)
def test_origin(one, other, same):
    """A key is bound to scheme, host and port."""
    assert (seams.origin(one) == seams.origin(other)) == same


@pytest.mark.parametrize(
    ("configured", "asked"),
    [
        ("https://civitai.com/api/download/models/7?a=b", "http://mirror:8/api/download/models/7?a=b"),
        ("http://www.civitai.com/api/download/models/7", "http://mirror:8/api/download/models/7"),
        ("https://civitai.com.example/api/download/models/7", "https://civitai.com.example/api/download/models/7"),
        ("https://example.org/civitai.com/models/7", "https://example.org/civitai.com/models/7"),
    ],
)
def test_base_url(monkeypatch, tmp_path, configured, asked):
    """CIVITAI_BASE_URL replaces scheme and host of Civitai's URLs alone; only those have a version id."""
    monkeypatch.setenv("CIVITAI_BASE_URL", "http://mirror:8")
    assert seams.model_address(config(url=configured), tmp_path) == (asked, "7" if "mirror" in asked else "")


# faults that pass

PASSING = {
    "api 503": [Fault("api", status=503, times=2)],
    "api 404 for a moment": [Fault("api", status=404)],
    "api 429": [Fault("api", status=429)],
    "cdn 500": [Fault(status=500, times=3)],
    "cdn 503 amid the ranges": [Fault(), Fault(status=503, times=5)],
    "cdn 429": [Fault(), Fault(status=429, headers={"Retry-After": "0"}, times=3)],
    "reset": [Fault(), Fault(cut_after=100_000, reset=True, times=4)],
    "reset before a byte": [Fault(), Fault(cut_after=0, reset=True, times=4)],
    "reset while asking": [Fault("api", cut_after=0, reset=True)],
    "short body": [Fault(), Fault(cut_after=100_000, times=4)],
    "stall": [Fault(), Fault(cut_after=100_000, stall_s=60)],
    "a drip": [Fault(), Fault(drip_s=0.1)],
    "web page from Civitai": [Fault("api", html=True)],
    "web page from the CDN": [Fault(), Fault(html=True)],
    "ranges ignored": [Fault(ignore_range=True, times=-1)],
    "ranges ignored at first": [Fault(ignore_range=True, cut_after=100_000), Fault(ignore_range=True, times=-1)],
    "ranges ignored, no length": [Fault(ignore_range=True, no_length=True, times=-1)],
    "ranges ignored, odd length": [Fault(ignore_range=True, no_length=True, headers={"Content-Length": "x"}, times=-1)],
    "ranges ignored amid the ranges": [Fault(), Fault(ignore_range=True, times=3)],
    "ranges answered short": [Fault(), Fault(short_range=70_000, times=5)],
    "another file's range": [Fault(), Fault(headers={"Content-Range": "bytes 5-9/10"})],
    "flipped byte": [Fault(), Fault(flip_at=3 * MIB, times=100)],
    "no hash for a moment": [Fault("info", status=500)],
    "no hash": [Fault("info", status=404, times=-1)],
    "hashes as a web page": [Fault("info", html=True, times=-1)],
}


@pytest.mark.parametrize("faults", PASSING.values(), ids=PASSING)
def test_passing_fault(server, model, tmp_path, monkeypatch, faults):
    """A fault that passes ends in the whole file, with nothing left beside it."""
    if any(fault.stall_s or fault.drip_s for fault in faults):
        seams.set(monkeypatch, STALL_S=1.5)
    if faults[-1].flip_at:  # in the first try alone, that is
        faults = [Fault(), *[Fault(flip_at=3 * MIB, times=11)]]
    server.faults[ID] = [Fault(**vars(fault)) for fault in faults]
    assert fetch(tmp_path).read_bytes() == model.read_bytes()
    assert leftovers(tmp_path) == []


def test_expired_link(server, model, tmp_path):
    """A signed link that expires in mid-download is asked for again; what has come is kept."""
    server.link_uses = 3
    assert fetch(tmp_path).read_bytes() == model.read_bytes()
    assert 403 in [request.status for request in server.requests_of("cdn")]
    assert len(server.requests_of("api")) > 1
    assert server.bytes_sent("cdn") < 1.1 * model.stat().st_size


def test_retry_after(server, tmp_path):
    """Retry-After is kept to."""
    server.faults[ID] = [Fault("api", status=429, headers={"Retry-After": "1"})]
    fetch(tmp_path)
    first, second = server.requests_of("api")[:2]
    assert second.started - first.started >= 1


def test_few_at_a_time(server, model, tmp_path):
    """Where the server refuses some connections, the file comes over those that it allows."""
    server.most, server.rate = threading.BoundedSemaphore(3), 2 * MIB
    assert fetch(tmp_path).read_bytes() == model.read_bytes()
    assert 429 in [request.status for request in server.requests_of("cdn")]


def test_file_changes_in_between(server, model, tmp_path):
    """A file that is replaced on the server in mid-download is fetched from the start: never one half of each."""
    other = write_model(tmp_path / "detail.safetensors", 6 * MIB)
    server.rate = 400_000
    fetching = seams.in_background(fetch, tmp_path)
    while sum(request.sent for request in server.requests_of("cdn")) < 2 * MIB:
        time.sleep(0.01)
    server.files[ID] = other
    assert fetching.result(30).read_bytes() == other.read_bytes()


# faults that stay


@pytest.mark.parametrize("status", [401, 403])
def test_refused_key(server, tmp_path, status):
    """A refused key is no passing fault: one request, and a message that names model, version and setting."""
    server.faults[ID] = [Fault("api", status=status, times=-1)]
    said = refusal(tmp_path)
    assert [request.route for request in server.requests] == ["api"]
    assert all(word in said for word in ("Detail Tweaker XL", str(ID), "CIVITAI_API_KEY", "early", str(status)))


def test_removed(server, tmp_path):
    """410 is final."""
    server.faults[ID] = [Fault("api", status=410, times=-1)]
    assert "removed" in refusal(tmp_path)
    assert len(server.requests) == 1


def test_missing(server, tmp_path):
    """404 is tried a few times."""
    server.faults[ID] = [Fault("api", status=404, times=-1)]
    assert "version id" in refusal(tmp_path)
    assert len(server.requests) == seams.constant("FEW_TRIES")


LASTING = {
    "api 503": [Fault("api", status=503, times=-1)],
    "cdn 503": [Fault(status=503, times=-1)],
    "cdn 503 later": [Fault(times=5), Fault(status=503, times=-1)],
    "cdn 403": [Fault(status=403, times=-1)],
    "429 for an hour": [Fault("api", status=429, headers={"Retry-After": "3600"}, times=-1)],
    "reset": [Fault(), Fault(cut_after=0, reset=True, times=-1)],
    "web page": [Fault("api", html=True, times=-1)],
    "one stream cut": [Fault(ignore_range=True, cut_after=1 * MIB, times=-1)],
    "redirects in circles": [Fault("api", status=307, headers={"Location": "/api/download/models/135867"}, times=-1)],
    "wrong hash": [Fault("info", wrong_hash=True, times=-1)],
    "flipped byte": [Fault(flip_at=3 * MIB, times=-1)],
}


@pytest.mark.parametrize("faults", LASTING.values(), ids=LASTING)
def test_lasting_fault(server, tmp_path, faults):
    """A fault that stays ends in one DownloadError that names the model, after few requests."""
    server.faults[ID] = [Fault(**vars(fault)) for fault in faults]
    assert f"Detail Tweaker XL (Civitai model version {ID})" in refusal(tmp_path)
    assert len(server.requests) < 250
    assert not list((tmp_path / "store").glob("*.lock"))


def test_stall(server, tmp_path, monkeypatch):
    """A server that sends nothing any more is left."""
    seams.set(monkeypatch, TRIES=3, STALL_S=0.4)
    server.faults[ID] = [Fault(), Fault(cut_after=0, stall_s=60, times=-1)]
    assert "sent nothing" in refusal(tmp_path)


def test_nobody_there(server, tmp_path, monkeypatch):
    """A server that cannot be reached is a passing fault, too."""
    monkeypatch.setenv("CIVITAI_BASE_URL", "http://127.0.0.1:9")
    assert "the connection failed" in refusal(tmp_path)


@pytest.mark.parametrize("url", ["nonsense", "http://", "http://[", "https://civitai.com:port/x"])
def test_bad_url(server, tmp_path, url):
    """An address that is none is refused."""
    assert "not a valid URL" in refusal(tmp_path, url=url)


def test_patience_is_five_minutes():
    """Passing faults are borne for at most five minutes without progress: RunPod gives a start seven."""
    longest = sum(
        min(seams.constant("FIRST_BACKOFF_S") * 2**n, seams.constant("LAST_BACKOFF_S"))
        for n in range(seams.constant("TRIES") - 1)
    )
    assert longest < seams.constant("PATIENCE_S") <= 300
    assert seams.constant("STALL_S") == 30


REFUSED = {
    "login": (401, {"message": "The creator of this asset requires you to log in"}, "requires you to log in"),
    "early access": (403, {"error": "Early access until 2026-12-01"}, "Early access until 2026-12-01"),
    "lines": (
        403,
        {"message": "Downloads are\n\tdisabled\x07 by the creator"},
        "Downloads are disabled by the creator",
    ),
    "long": (403, {"message": "no " * 500}, "no no"),
    "addresses": (403, {"message": f"see https://civitai.com/x?token={KEY} or www.civitai.com, {KEY}"}, "see …"),
    "markup": (401, {"message": "<b>Sign in</b>"}, "401; set CIVITAI_API_KEY"),
    "no text": (401, {"message": {"code": 1}}, "401; set CIVITAI_API_KEY"),
    "no object": (401, [1], "401; set CIVITAI_API_KEY"),
    "removed": (410, {"error": "The file was archived"}, "The file was archived"),
    "region": (451, {"message": "Not available in your region"}, "Not available in your region"),
}


@pytest.mark.parametrize(("status", "body", "told"), REFUSED.values(), ids=REFUSED)
def test_refusal_says_why(server, tmp_path, status, body, told):
    """Civitai's own message stands in a refusal: one short printable line, no markup, address or key in it."""
    server.faults[ID] = [Fault("api", status=status, body=json.dumps(body).encode(), times=-1)]
    said = refusal(tmp_path)
    assert told in said
    assert said.isprintable()
    assert len(said) < 420
    assert not any(word in said for word in ("http", "www.", "<", "token"))


LISTINGS = {
    "web page": (Fault("info", html=True, times=-1), "a web page came"),
    "empty": (Fault("info", body=b"", times=-1), "its answer is empty"),
    "region": (Fault("info", status=451, body=b'{"error": "blocked here"}', times=-1), "it answered 451: blocked here"),
    "no JSON": (Fault("info", body=b"{]", times=-1), "what came is no JSON"),
    "a list": (Fault("info", body=b"[1]", times=-1), "has not the form"),
    "no files": (Fault("info", body=b'{"files": null}', times=-1), "has not the form"),
    "odd files": (Fault("info", body=b'{"files": [1, "x"]}', times=-1), "has not the form"),
}


@pytest.mark.parametrize(("fault", "told"), LISTINGS.values(), ids=LISTINGS)
def test_unreadable_listing(server, model, tmp_path, caplog, fault, told):
    """A listing that cannot be read is said as what it is, and the file is fetched without its hash."""
    server.faults[ID] = [Fault(**vars(fault))]
    path = fetch(tmp_path)
    assert path.read_bytes() == model.read_bytes()
    assert "Civitai tells no hash" in caplog.text
    assert told in caplog.text
    assert "valid URL" not in caplog.text


@pytest.mark.parametrize("fault", [Fault("info", drip_s=0.1, times=-1), Fault("info", endless=True, times=-1)])
def test_listing_without_an_end(server, model, tmp_path, monkeypatch, fault):
    """A listing that drips, or never ends, keeps no download waiting."""
    seams.set(monkeypatch, LISTING_S=0.5)
    server.faults[ID] = [fault]
    assert fetch(tmp_path).read_bytes() == model.read_bytes()
    assert len(server.requests_of("info")) == 2


def test_link_that_never_works(server, tmp_path):
    """A link that is refused before it has brought a byte is a fault, and asked for a few times alone."""
    server.faults[ID] = [Fault(), Fault(status=403, times=-1)]
    assert "403 to the link" in refusal(tmp_path)
    assert len(server.requests_of("api")) <= seams.constant("FEW_TRIES")


def test_compressed_body(server, tmp_path):
    """A body that comes compressed, though none was asked for, is refused."""
    server.faults[ID] = [Fault(headers={"Content-Encoding": "gzip"}, times=-1)]
    assert "compressed" in refusal(tmp_path)


# what is checked


def test_refused_twice(server, model, tmp_path):
    """A file with the wrong hash is thrown away, fetched once more and refused; nothing of it is left."""
    server.faults[ID] = [Fault("info", wrong_hash=True, times=-1)]
    assert "SHA256" in refusal(tmp_path)
    assert server.bytes_sent("cdn") == 2 * (model.stat().st_size + 1)
    assert leftovers(tmp_path) == []


def test_config_hash_precedes(server, model, tmp_path):
    """A config's own sha256 counts, whatever Civitai says."""
    server.faults[ID] = [Fault("info", wrong_hash=True, times=-1)]
    assert fetch(tmp_path, sha256=sha256(model)).exists()
    (tmp_path / "store" / "detail.safetensors").unlink()
    assert "SHA256" in refusal(tmp_path, sha256="0" * 64)


@pytest.mark.parametrize("damage", ["truncated", "a web page", "empty"])
def test_not_safetensors(server, model, tmp_path, damage):
    """Where Civitai tells no hash, a safetensors file still has to be whole by its own header."""
    bad = tmp_path / "detail.safetensors"
    content = {"truncated": model.read_bytes()[:-1000], "a web page": b"<!DOCTYPE html>" * 1000, "empty": b""}
    bad.write_bytes(content[damage])
    server.files[ID] = bad
    server.faults[ID] = [Fault("info", status=404, times=-1)]
    refusal(tmp_path)


def test_pick_sha256():
    """Of a version's files the hash of the one with the exact size counts, then what the URL asked for."""

    def file(digest: str, size_kb: float, **extra: object) -> dict:
        return {"hashes": {"SHA256": digest}, "sizeKB": size_kb, "type": "Model", **extra}

    full = file("FULL", 2000.25, primary=True, metadata={"fp": "fp32", "size": "full"})
    pruned = file("PRUNED", 1000.5, metadata={"fp": "fp16", "size": "pruned"})
    training = file("ZIP", 1000.5) | {"type": "Training Data"}
    files = [{"name": "no hash", "sizeKB": 1000.5, "hashes": {}}, training, full, pruned]
    query = "type=Model&size=pruned&fp=fp16"
    assert seams.pick_sha256(files, 1000.5 * 1024, query) == "pruned"
    assert seams.pick_sha256(files, 2000.25 * 1024, query) == "full"
    assert seams.pick_sha256(files, 12345, query) == "pruned"
    assert seams.pick_sha256(files, 12345, "type=Model") == "full"
    assert seams.pick_sha256(files[:1], 12345, query) == ""


def test_download_file_replaces(server, model, tmp_path):
    """download_file fetches again over a file in place, and leaves that one where it cannot."""
    path = tmp_path / "mine.safetensors"
    path.write_bytes(b"before")
    server.faults[ID] = [Fault("api", status=401)]
    with pytest.raises(handler.DownloadError):
        handler.download_file(civitai_url(ID), path)
    assert path.read_bytes() == b"before"
    handler.download_file(civitai_url(ID), path)
    assert path.read_bytes() == model.read_bytes()


# the disk


def test_no_room(server, tmp_path, monkeypatch):
    """A file that cannot fit is refused before its first byte."""
    real = os.statvfs
    small = os.statvfs_result((4096, 4096, 1000, 500, 500, *real(tmp_path)[5:]))
    monkeypatch.setattr(os, "statvfs", lambda _: small)
    said = refusal(tmp_path)
    assert "needs 6 MB" in said
    assert "has 2 MB free" in said
    assert server.bytes_sent("cdn") == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_disk_fills_up(server, tmp_path, monkeypatch, number):
    """A disk or quota that is used up while writing ends the download, and what it took is given back."""
    written, real = [], os.pwrite

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        written.append(len(data))
        if sum(written) > 3 * MIB:
            raise OSError(number, os.strerror(number), str(tmp_path))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    assert "full, or its quota is used up" in refusal(tmp_path)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("folder", ["/proc/store", "/dev/null/store"])
def test_store_cannot_be_written(server, folder):
    """A model store that cannot be written is named by its setting, its path is for the log."""
    with pytest.raises(handler.DownloadError, match="MODEL_CACHE_DIR") as caught:
        handler.ensure_model_exists(config(), Path(folder))
    assert folder not in str(caught.value)
    assert folder.split("/")[1] in str(caught.value.detail)


MEASURE = """
import resource, sys
from pathlib import Path
import handler, requests, safetensors
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
handler.download_file(sys.argv[1], Path(sys.argv[2]))
print(peak() - before)
"""


def test_memory(server, tmp_path):
    """A download adds less than 300 MB of memory, to a file far larger than that too."""
    big = tmp_path / "big.bin"
    with big.open("wb") as file:
        file.truncate(500 * MIB)
    server.files[ID] = big
    command = [sys.executable, "-c", MEASURE, server.signed_url(ID), str(tmp_path / "store.bin")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent, check=True)
    assert int(done.stdout) < 300_000, done.stderr


# progress


def test_progress_lines(server, tmp_path, monkeypatch, caplog):
    """In a log, a line tells percent, speed and time left."""
    seams.set(monkeypatch, REPORT_S=0.1)
    server.rate = 500_000
    with caplog.at_level(logging.INFO, seams.log.name):
        fetch(tmp_path)
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("models: ")]
    assert len(lines) >= 2
    assert all("% of 6.29MB" in line and "B/s" in line and "left" in line for line in lines)


def test_progress_of_a_file_fetched_twice(server, tmp_path, monkeypatch, caplog):
    """A file that is fetched again after a wrong hash is counted once: its progress stays within 100 % of its size."""
    seams.set(monkeypatch, REPORT_S=0.1)
    server.rate = 500_000
    server.faults[ID] = [Fault("info", wrong_hash=True, times=-1)]
    with caplog.at_level(logging.INFO, seams.log.name):
        refusal(tmp_path)
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("models: ")]
    assert lines
    assert all("% of 6.29MB" in line for line in lines)
    assert max(int(line.split()[1]) for line in lines) <= 100


def test_progress_bar(server, tmp_path, monkeypatch):
    """On a terminal, a bar does."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    server.rate = 500_000
    fetch(tmp_path)
    assert "models:" in terminal.getvalue()
    assert "6.29M" in terminal.getvalue()
