"""What a download costs: this worker beside one requests stream, hf_transfer and aria2c, from a server on loopback.

    python tests/benchmarks/download.py                          both servers, 3 rounds: about 4 minutes
    python tests/benchmarks/download.py --mb 512 --rounds 5      --folder /dev/shm takes the disk out of it

The capped server gives every connection --cap MB/s, as CDNs do; the uncapped one gives what it can. It runs in a
process of its own and sends with sendfile. All clients fetch the same bytes, in turn, each in a process of its own
that has its imports before the clock starts. Only this worker checks what it fetched, and waits until the disk has it;
"+ sync" rows are the others with a wait for the disk, as a worker needs that shares a volume with others.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import requests

ROOT = Path(__file__).resolve().parents[2]
ID = 135867


def serve(path: Path, rate: float, ports: object) -> None:
    """Sends ranges of a file at `rate` bytes/s and connection (0: no cap), and answers Civitai's two other routes."""
    size, sha256 = path.stat().st_size, hashlib.file_digest(path.open("rb"), "sha256").hexdigest()
    listener = socket.create_server(("127.0.0.1", 0), backlog=200)
    port = listener.getsockname()[1]
    files = [{"sizeKB": size / 1024, "hashes": {"SHA256": sha256}, "primary": True, "type": "Model"}]
    listing = json.dumps({"files": files}).encode()

    def answer(connection: socket.socket, head: str) -> None:
        if head.startswith("GET /api/v1/"):
            connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {len(listing)}\r\n\r\n".encode() + listing)
        elif head.startswith("GET /api/"):
            location = f"Location: http://localhost:{port}/file\r\nContent-Length: 0\r\n\r\n"
            connection.sendall(f"HTTP/1.1 307 Temporary Redirect\r\n{location}".encode())
        else:
            send_file(connection, re.search(r"\r\nrange: bytes=(\d+)-(\d*)", head.lower()))

    def send_file(connection: socket.socket, asked: re.Match[str] | None) -> None:
        start, end = (int(asked[1]), min(int(asked[2] or size), size - 1) + 1) if asked else (0, size)
        status = f"206 Partial Content\r\nContent-Range: bytes {start}-{end - 1}/{size}" if asked else "200 OK"
        head = f'HTTP/1.1 {status}\r\nContent-Length: {end - start}\r\nAccept-Ranges: bytes\r\nETag: "1"\r\n\r\n'
        connection.sendall(head.encode())
        began, at = time.monotonic(), start
        with path.open("rb") as file:
            while at < end:
                step = min(end - at, int(rate / 50) or 1 << 24)
                at += os.sendfile(connection.fileno(), file.fileno(), at, step)
                if rate:
                    time.sleep(max(0.0, (at - start) / rate - (time.monotonic() - began)))

    def talk(connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        received = b""
        try:
            while data := connection.recv(65536):
                received += data
                while b"\r\n\r\n" in received:
                    head, _, received = received.partition(b"\r\n\r\n")
                    answer(connection, head.decode())
        except OSError:
            connection.close()

    print(port, file=ports, flush=True)
    while True:
        threading.Thread(target=talk, args=(listener.accept()[0],), daemon=True).start()


def fetch_with_worker(url: str, path: Path) -> None:
    """handler.download_file: many connections, hashed while they come, on the disk before it is visible."""
    import handler

    handler.download_file(url, path)


def fetch_with_requests(url: str, path: Path) -> None:
    """One stream."""
    with requests.get(url, stream=True, timeout=30) as response, path.open("wb") as file:
        for block in response.iter_content(1 << 20):
            file.write(block)


def fetch_with_hf_transfer(url: str, path: Path) -> None:
    """As huggingface_hub calls it, from the CDN: it follows no redirect with a key."""
    import hf_transfer

    hf_transfer.download(url, str(path), 128, 10 * 1024**2, parallel_failures=8, max_retries=5)


def fetch_with_aria2c(url: str, path: Path) -> None:
    """Sixteen connections, as its users ask for."""
    command = [
        "aria2c",
        "-q",
        "-x16",
        "-s16",
        "-k1M",
        "--file-allocation=none",
        "-d",
        path.parent,
        "-o",
        path.name,
        url,
    ]
    subprocess.run(command, check=True)


def synced(fetch: object) -> object:
    """A client that waits for the disk afterwards, as this worker does."""

    def fetch_and_sync(url: str, path: Path) -> None:
        fetch(url, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())

    return fetch_and_sync


CLIENTS = {
    "this worker, verified": fetch_with_worker,
    "requests, one stream": fetch_with_requests,
    "hf_transfer": fetch_with_hf_transfer,
    "aria2c -x16 -s16": fetch_with_aria2c,
    "hf_transfer + sync": synced(fetch_with_hf_transfer),
    "aria2c -x16 -s16 + sync": synced(fetch_with_aria2c),
}


def fetch_once(client: str, port: int, path: Path) -> None:
    """The child process of one measurement: prints the seconds."""
    sys.path.insert(0, str(ROOT))
    os.environ["CIVITAI_BASE_URL"] = f"http://127.0.0.1:{port}"
    import hf_transfer  # noqa: F401
    import numpy  # noqa: F401
    import safetensors  # noqa: F401
    import tqdm  # noqa: F401

    import handler  # noqa: F401

    route = f"http://127.0.0.1:{port}/api/download/models/{ID}"
    url = route if "worker" in client else f"http://localhost:{port}/file"
    started = time.perf_counter()
    CLIENTS[client](url, path)
    print(time.perf_counter() - started)


def measure(client: str, port: int, folder: Path) -> float:
    """Seconds of one client for one file; what it wrote is compared with what was served."""
    target = folder / "target" / "model.safetensors"
    target.parent.mkdir()
    command = [sys.executable, __file__, "--client", client, "--port", str(port), "--folder", str(target)]
    seconds = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    subprocess.run(["cmp", target, folder / "source.safetensors"], check=True)
    shutil.rmtree(target.parent)
    os.sync()  # none pays for another's writes
    return seconds


def write_source(path: Path, size: int) -> None:
    """A safetensors file of random bytes."""
    header = json.dumps({"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for at in range(0, size, 1 << 20):
            file.write(os.urandom(min(1 << 20, size - at)))


def compare(folder: Path, size: int, rate: float, rounds: int, clients: list[str]) -> None:
    """One server, all clients, in turn; prints the table."""
    command = [sys.executable, __file__, "--serve", str(folder / "source.safetensors"), "--rate", str(rate)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        port = int(server.stdout.readline())
        seconds = {client: [] for client in clients}
        for _ in range(rounds):
            for client, list_ in seconds.items():
                list_.append(measure(client, port, folder))
        server.terminate()
    cap = f"{rate / 1e6:g} MB/s a connection" if rate else "no cap"
    print(f"\n{size / 1e6:.0f} MB, {cap}, {rounds} rounds\n")
    print("| client | median s | MB/s | speed to one stream | to aria2c |\n|---|---|---|---|---|")
    middle = {client: statistics.median(list_) for client, list_ in seconds.items()}
    one, aria2c = middle["requests, one stream"], middle.get("aria2c -x16 -s16", math.nan)  # where it is not installed
    for client, s in middle.items():
        print(f"| {client} | {s:.2f} | {size / s / 1e6:.0f} | {one / s:.1f} | {aria2c / s:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=1000, help="size of the file from the uncapped server")
    parser.add_argument("--capped-mb", type=float, default=200, help="and from the capped one")
    parser.add_argument("--cap", type=float, default=5, help="MB/s of a capped connection")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the files are written")
    for option in ("--client", "--serve"):
        parser.add_argument(option, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rate", type=float, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(Path(options.serve), options.rate, sys.stdout)
    if options.client:
        return fetch_once(options.client, options.port, options.folder)
    clients = [c for c in CLIENTS if "aria2c" not in c or shutil.which("aria2c")]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for megabytes, cap in ((options.capped_mb, options.cap), (options.mb, 0)):
            write_source(Path(folder, "source.safetensors"), int(megabytes * 1e6))
            compare(Path(folder), int(megabytes * 1e6), cap * 1e6, options.rounds, clients)
    return None


if __name__ == "__main__":
    main()
