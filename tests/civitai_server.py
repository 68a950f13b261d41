"""A loopback server that behaves like Civitai (FACTS: what its download, CDN and version routes answer).

GET  /api/download/models/<id>     api    checks the key, 307 to a signed link on another host name
GET  /cdn/<id>/<name>?X-Expires=…  cdn    the file; 400 with an Authorization header, 403 when the link has expired
GET  /api/v1/model-versions/<id>   info   hashes and sizes; public
HEAD anything                             405

with CivitaiServer({135867: path}, key="secret") as server:
    server.faults[135867] = [Fault("cdn", cut_after=1000, reset=True), Fault("cdn", status=503)]
    ...                                    # server.url is the CIVITAI_BASE_URL
    assert [r.status for r in server.requests_of("cdn", 135867)] == [200, 503, 206]
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import re
import socket
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

LOGIN_PAGE = b"<!DOCTYPE html><html><head><title>Sign in to Civitai</title></head><body>Sign in</body></html>"


@dataclass
class Fault:
    """One thing that goes wrong, `times` times (-1: always), on one route of one version; then the next in the list."""

    route: str = "cdn"  # api, cdn or info
    times: int = 1
    status: int | None = None  # answer this instead
    body: bytes | None = None  # and with this body; 200 where no status is given
    headers: dict[str, str] = field(default_factory=dict)  # headers to add, such as Retry-After or a wrong ETag
    html: bool = False  # answer 200 with a login page instead
    delay_s: float = 0  # before anything is answered
    cut_after: int | None = None  # close the connection after so many bytes of the body
    stall_s: float = 0  # keep the connection silent for so long at cut_after (before the close)
    reset: bool = False  # RST instead of FIN at cut_after
    ignore_range: bool = False  # 200 and the whole file, whatever was asked for
    no_length: bool = False  # no Content-Length: the end of the connection is the end of the file
    short_range: int = 0  # a correct 206 of that many bytes fewer than asked for
    flip_at: int | None = None  # the byte at this offset of the file comes inverted
    wrong_hash: bool = False  # info names another SHA256
    drip_s: float = 0  # a byte of the body (info, cdn) at a time, so far apart
    endless: bool = False  # info's body never ends


@dataclass
class Request:
    """One request as the server saw it; sent counts the bytes of the body that went out."""

    method: str
    host: str
    path: str
    query: str
    headers: dict[str, str]
    route: str = ""
    version_id: int = 0
    status: int = 0
    sent: int = 0
    started: float = 0.0  # time.monotonic()
    done: bool = False  # answered, or given up

    @property
    def range(self) -> str:
        return self.headers.get("range", "")

    @property
    def authorization(self) -> str:
        return self.headers.get("authorization", "")


class CivitaiServer:
    """Serves files by version id at `url`, from a CDN at `cdn_url`; a context manager."""

    def __init__(
        self, files: dict[int, Path], key: str | None = None, rate: float | None = None, link_s: float = 3600.0
    ) -> None:
        """rate: bytes per second and connection; link_s: how long a signed link lives."""
        self.files, self.key, self.rate, self.link_s = dict(files), key, rate, link_s
        self.link_uses: int | None = None  # requests that a signed link is good for; it has expired afterwards
        self.uses: Counter[str] = Counter()  # of each link
        self.serving, self.peak = 0, 0  # requests that the CDN serves now, and served at once at most
        self.faults: dict[int, list[Fault]] = {}
        self.kinds: dict[int, str] = {}  # the types of models, such as LORA and TextualInversion; else Other
        self.requests: list[Request] = []
        self.connections = 0  # opened so far
        self.most = threading.BoundedSemaphore(1000)  # requests that the CDN serves at once; 429 beyond
        self.closing = threading.Event()
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"civitai": self}))
        self.http.daemon_threads = True
        self.http.handle_error = lambda *_: None  # clients that hang up are no error
        self.port = self.http.server_address[1]
        self.url, self.cdn_url = f"http://127.0.0.1:{self.port}", f"http://localhost:{self.port}"

    def __enter__(self) -> CivitaiServer:
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()

    def requests_of(self, route: str, version_id: int | None = None) -> list[Request]:
        """What was asked on one route, in order."""
        return [r for r in self.requests if r.route == route and version_id in (None, r.version_id)]

    def bytes_sent(self, route: str) -> int:
        """What went out on one route, once its requests are done: a client has its bytes before they are counted."""
        deadline = time.monotonic() + 10
        while not all(request.done for request in self.requests_of(route)) and time.monotonic() < deadline:
            time.sleep(0.005)
        return sum(request.sent for request in self.requests_of(route))

    def clear(self) -> None:
        """Forget all requests and faults."""
        self.requests.clear()
        self.faults.clear()

    def take_fault(self, route: str, version_id: int) -> Fault:
        """The first fault of this route that has a turn left, or one that does nothing."""
        with self.lock:
            for fault in self.faults.get(version_id, []):
                if fault.route == route and fault.times:
                    fault.times -= 1
                    return fault
        return Fault()

    def signature(self, version_id: int, expires: str) -> str:
        """What makes a link signed."""
        return hmac.new(b"r2", f"{version_id} {expires}".encode(), "sha256").hexdigest()

    def signed_url(self, version_id: int) -> str:
        """A link to the CDN that lives for link_s seconds."""
        expires = f"{time.time() + self.link_s:.6f}"
        query = f"X-Expires={expires}&X-Signature={self.signature(version_id, expires)}"
        return f"{self.cdn_url}/cdn/{version_id}/{self.files[version_id].name}?{query}"


@lru_cache
def sha256_of(path: Path, _size: int, _mtime_ns: int) -> str:
    """Upper case, as Civitai writes it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().upper()


def sha256(path: Path) -> str:
    """The file's hash, read again when size or time have changed."""
    stat = path.stat()
    return sha256_of(path, stat.st_size, stat.st_mtime_ns)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    civitai: CivitaiServer

    def setup(self) -> None:
        super().setup()
        with self.civitai.lock:
            self.civitai.connections += 1

    def log_message(self, *_: object) -> None:
        """Quiet."""

    request_seen: Request | None = None

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        finally:
            if self.request_seen:
                self.request_seen.done = True

    def do_HEAD(self) -> None:
        self.open_request("")
        self.answer(405, b"")

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        for route, pattern in (
            ("api", r"/api/download/models/(\d+)"),
            ("cdn", r"/cdn/(\d+)/[^/]+"),
            ("info", r"/api/v1/model-versions/(\d+)"),
        ):
            found = re.fullmatch(pattern, path)
            on_cdn = self.headers.get("Host", "").startswith("localhost")
            if found and on_cdn == (route == "cdn"):
                return self.serve(route, int(found[1]))
        self.open_request("login" if path == "/login" else "")
        return self.answer(200, LOGIN_PAGE, "text/html") if path == "/login" else self.answer(404, b"{}")

    def serve(self, route: str, version_id: int) -> None:
        """Answer one of the three routes, or let its fault happen."""
        self.open_request(route, version_id)
        fault = self.civitai.take_fault(route, version_id)
        if fault.delay_s:
            self.civitai.closing.wait(fault.delay_s)
        if fault.html:
            self.answer(200, LOGIN_PAGE, "text/html; charset=utf-8")
        elif fault.status or fault.body is not None:
            body = b'{"error":"injected"}' if fault.body is None else fault.body
            self.answer(fault.status or 200, body, headers=fault.headers)
        elif fault.cut_after is not None and route != "cdn":
            self.hang_up(fault)
        elif version_id not in self.civitai.files:
            self.answer(404, b'{"error":"Model version not found"}')
        else:
            getattr(self, f"serve_{route}")(version_id, fault)

    def open_request(self, route: str, version_id: int = 0) -> None:
        """Record the request."""
        parts = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.request_seen = Request(
            self.command, headers.get("host", ""), parts.path, parts.query, headers, route, version_id
        )
        self.request_seen.started = time.monotonic()
        self.civitai.requests.append(self.request_seen)

    def serve_api(self, version_id: int, _: Fault) -> None:
        """307 with the right key; else a login page for browsers, JSON for others."""
        civitai = self.civitai
        if civitai.key is None or self.headers.get("Authorization") == f"Bearer {civitai.key}":
            return self.answer(307, b"", headers={"Location": civitai.signed_url(version_id)})
        if "mozilla" in self.headers.get("User-Agent", "").lower():
            return self.answer(307, b"", headers={"Location": f"{civitai.url}/login?reason=download-auth"})
        return self.answer(
            401, b'{"error":"Unauthorized","message":"The creator of this asset requires you to log in"}'
        )

    def serve_info(self, version_id: int, fault: Fault) -> None:
        """The model version: the primary file is not the first one."""
        civitai, path = self.civitai, self.civitai.files[version_id]
        digest = "0" * 64 if fault.wrong_hash else sha256(path)
        link = f"{civitai.url}/api/download/models/{version_id}"
        hashes = {"AutoV2": digest[:10], "SHA256": digest}
        file = {"id": version_id, "name": path.name, "type": "Model", "sizeKB": path.stat().st_size / 1024}
        file |= {"primary": True, "hashes": hashes, "downloadUrl": link, "metadata": {"format": "SafeTensor"}}
        training = {"id": 1, "name": "training.zip", "type": "Training Data", "sizeKB": 17.5, "primary": False}
        training |= {"hashes": {"SHA256": "F" * 64}, "downloadUrl": f"{link}?type=Training%20Data"}
        version = {"id": version_id, "name": "v1.0", "model": {"type": civitai.kinds.get(version_id, "Other")}}
        body = json.dumps(version | {"files": [training, file]}).encode()
        if not fault.drip_s and not fault.endless:
            return self.answer(200, body)
        self.head(200, None, "application/json", {})
        self.close_connection = True
        piece = b" " * (1 << 16 if fault.endless else 1)
        with contextlib.suppress(ConnectionError):
            while not self.civitai.closing.wait(fault.drip_s):
                self.wfile.write(piece)
                self.request_seen.sent += len(piece)
        return None

    def serve_cdn(self, version_id: int, fault: Fault) -> None:
        """The file or a range of it."""
        query = parse_qs(urlsplit(self.path).query)
        expires, signature = query.get("X-Expires", ["0"])[0], query.get("X-Signature", [""])[0]
        if "Authorization" in self.headers:
            return self.answer(400, b"<Error><Code>InvalidArgument</Code></Error>", "application/xml")
        with self.civitai.lock:
            self.civitai.uses[expires] += 1
            used_up = self.civitai.link_uses is not None and self.civitai.uses[expires] > self.civitai.link_uses
        if used_up or signature != self.civitai.signature(version_id, expires) or float(expires) < time.time():
            return self.answer(403, b"<Error><Code>ExpiredRequest</Code></Error>", "application/xml")
        if not self.civitai.most.acquire(blocking=False):
            return self.answer(429, b"<Error><Code>SlowDown</Code></Error>", "application/xml")
        try:
            with self.civitai.lock:
                self.civitai.serving += 1
                self.civitai.peak = max(self.civitai.peak, self.civitai.serving)
            return self.serve_file(version_id, fault)
        finally:
            with self.civitai.lock:
                self.civitai.serving -= 1
            self.civitai.most.release()

    def serve_file(self, version_id: int, fault: Fault) -> None:
        """The file or a range of it, to whom may have it."""
        path = self.civitai.files[version_id]
        size, etag = path.stat().st_size, f'"{sha256(path)[:32].lower()}"'
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if fault.ignore_range or self.headers.get("If-Range", etag) != etag:
            found = None
        start, end = (int(found[1]), min(int(found[2] or size), size - 1) + 1) if found else (0, size)
        if start >= size:
            return self.answer(416, b"", headers={"Content-Range": f"bytes */{size}"})
        headers = {"ETag": etag, "Accept-Ranges": "bytes"}
        if found:
            end = max(end - fault.short_range, start + 1)
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        self.head(
            206 if found else 200,
            None if fault.no_length else end - start,
            "application/octet-stream",
            headers | fault.headers,
        )
        return self.send_file(path, start, end - start, fault)

    def send_file(self, path: Path, start: int, count: int, fault: Fault) -> None:
        """The bytes, as fast as they go or at the server's rate, up to where the fault cuts them off."""
        allowed = count if fault.cut_after is None else min(count, fault.cut_after)
        piece = allowed if not self.civitai.rate and fault.flip_at is None else 1 << 16
        if fault.drip_s:
            piece = 1
        if self.civitai.rate:  # small steps: what lies in the socket when a client is killed was sent in vain
            piece = min(piece, max(1024, int(self.civitai.rate / 100)))
        began = time.monotonic()
        with contextlib.suppress(ConnectionError), path.open("rb") as file:
            while self.request_seen.sent < allowed and not self.civitai.closing.is_set():
                sent, step = self.request_seen.sent, min(piece, allowed - self.request_seen.sent)
                if self.civitai.rate:
                    time.sleep(max(0.0, (sent + step) / self.civitai.rate - (time.monotonic() - began)))
                self.civitai.closing.wait(fault.drip_s)
                if fault.flip_at is None:
                    self.request_seen.sent += self.connection.sendfile(file, start + sent, step)
                else:
                    file.seek(start + sent)
                    data = bytearray(file.read(step))
                    if 0 <= (at := fault.flip_at - start - sent) < step:
                        data[at] ^= 0xFF
                    self.connection.sendall(data)
                    self.request_seen.sent += step
        if fault.cut_after is not None:
            self.hang_up(fault)

    def hang_up(self, fault: Fault) -> None:
        """End the connection, in order or with a reset."""
        self.civitai.closing.wait(fault.stall_s)
        self.close_connection = True
        if fault.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def head(self, status: int, length: int | None, kind: str, headers: dict[str, str]) -> None:
        """Status line and headers."""
        self.request_seen.status = status
        self.send_response(status)
        ends = {"Connection": "close"} if length is None else {"Content-Length": str(length)}
        for name, value in {"Content-Type": kind, **ends, **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def answer(
        self, status: int, body: bytes, kind: str = "application/json", headers: dict[str, str] | None = None
    ) -> None:
        """A whole small answer."""
        self.head(status, len(body), kind, headers or {})
        if self.command != "HEAD":
            self.wfile.write(body)
            self.request_seen.sent = len(body)
