"""RunPod's queue on loopback, as SDK 1.7.13 speaks to it: job-take, job-take-batch, job-done, ping; job-stop as 1.10.

    with RunPodServer() as server, Worker(server, folder, world.environ()) as worker:
        job = server.submit({"prompt": "a cat"})
        print(server.result(job))

Everything is recorded with time.monotonic() stamps: `server.jobs[id]` holds when a job was taken and by whom, its
progress updates and its results; `server.polls`, `stop_polls` and `pings` hold the rest. What a worker may not send
(JSON that is not strict, other than UTF-8, a wrong key or content type) is listed in `server.violations`.

`server.inject("job-done", ["reset", 429, "hang", 2.0])` spoils the next four requests: "reset" resets the connection,
a whole number is answered as that HTTP status, "hang" is never answered, a float is seconds of delay. Endpoints:
"job-take", "job-stop", "job-done", "progress" (job-done with status IN_PROGRESS), "ping".
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

KEY = "rpa_canary_key_of_the_endpoint"
TICK_S = 0.02
ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Post:
    """A request to job-done. ended: when it was answered or its connection closed; None while it is open."""

    pod: str
    payload: Any
    size: int
    arrived: float
    ended: float | None = None
    status: int | None = None  # what it was answered with


@dataclass
class Job:
    """A job's life at the queue."""

    id: str
    envelope: Any
    submitted: float
    taken: list[tuple[float, str]] = field(default_factory=list)  # (when, pod)
    progress: list[Post] = field(default_factory=list)
    attempts: list[Post] = field(default_factory=list)  # every result posted, spoilt ones too
    stopped: float | None = None  # when a worker was told

    @property
    def results(self) -> list[Post]:
        """The results that were accepted."""
        return [post for post in self.attempts if post.status == 200]


@dataclass
class Poll:
    """A job-take or job-stop: taken is how many jobs or ids it brought, closed whether the worker hung up."""

    pod: str
    started: float
    batch: int
    in_progress: str
    ended: float | None = None
    taken: int = 0
    closed: bool = False


@dataclass
class Ping:
    """A heartbeat with the ids it names."""

    pod: str
    at: float
    ids: list[str]


class RunPodServer:
    """The queue of one endpoint, for any number of workers; a context manager."""

    def __init__(self, poll_s: float = 20.0) -> None:
        self.poll_s = poll_s
        self.jobs: dict[str, Job] = {}
        self.queue: deque[Job] = deque()
        self.polls: list[Poll] = []
        self.stop_polls: list[Poll] = []
        self.stops: list[tuple[str, Any]] = []  # (pod, id) that nobody was told yet
        self.pings: list[Ping] = []
        self.violations: list[str] = []
        self.changed = threading.Condition()
        self.closing = False
        self._faults: dict[tuple[str, str], Iterator[Any]] = {}
        self._numbers = itertools.count(1)
        self._http = Server(("127.0.0.1", 0), Handler)
        self._http.owner = self

    def __enter__(self) -> RunPodServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with self.changed:
            self.closing = True
            self.changed.notify_all()
        self._http.shutdown()
        self._http.server_close()

    def env(self, pod: str = "pod-1", **more: str) -> dict[str, str]:
        """The variables that RunPod gives to a worker."""
        base = f"http://127.0.0.1:{self._http.server_port}/v2/endpoint"
        return {
            "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID?gpu=TEST",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID?gpu=TEST",
            "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID?gpu=TEST",
            "RUNPOD_PING_INTERVAL": "1000",
            "RUNPOD_POD_ID": pod,
            "RUNPOD_ENDPOINT_ID": "endpoint",
            "RUNPOD_AI_API_KEY": KEY,
            **more,
        }

    def submit(self, job_input: Any, **envelope: Any) -> str:
        """Queues {"id": ..., "input": job_input, **envelope}; returns the id."""
        job_id = f"job-{next(self._numbers)}-u1"
        return self.submit_raw({"id": job_id, "input": job_input, **envelope}, job_id)

    def submit_raw(self, envelope: Any, job_id: str = "") -> str:
        """Queues anything; bytes are sent as they are. Give job_id where the envelope holds an id."""
        job = Job(job_id, envelope, time.monotonic())
        with self.changed:
            if job_id:
                self.jobs[job_id] = job
            self.queue.append(job)
            self.changed.notify_all()
        return job_id

    def stop(self, job_id: str) -> None:
        """Cancels a job: one that waits here is gone, one that was taken is named to its worker."""
        with self.changed:
            job = self.jobs[job_id]
            if job in self.queue:
                self.queue.remove(job)
            self.stops += [(pod, job_id) for _, pod in job.taken]
            self.changed.notify_all()

    def inject(self, endpoint: str, faults: Iterable[Any], job_id: str = "") -> None:
        """Spoils the endpoint's next requests, or those for one job, one fault each; None lets one pass."""
        self._faults[endpoint, job_id] = iter(faults)

    def fault(self, endpoint: str, job_id: str = "") -> Any:
        """The fault for this request, None for most."""
        with self.changed:
            faults = self._faults.get((endpoint, job_id)) or self._faults.get((endpoint, ""), iter(()))
            return next(faults, None)

    def wait_for(self, condition: Callable[[], Any], timeout: float = 60.0) -> Any:
        """The condition's first true value; raises TimeoutError."""
        deadline = time.monotonic() + timeout
        with self.changed:
            while not (value := condition()):
                if time.monotonic() > deadline:
                    raise TimeoutError("the worker did not do it in time")
                self.changed.wait(TICK_S)
        return value

    def result(self, job_id: str, timeout: float = 60.0) -> dict[str, Any]:
        """The payload of the job's accepted result."""
        return self.wait_for(lambda: self.jobs[job_id].results, timeout)[0].payload

    def open_polls(self) -> list[Poll]:
        """The polls that wait now."""
        return [poll for poll in self.polls if poll.ended is None]


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64
    owner: RunPodServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A worker that hangs up is no news."""


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    @property
    def queue(self) -> RunPodServer:
        return self.server.owner  # type: ignore[attr-defined]

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        """job-take, job-take-batch, ping."""
        url = urlsplit(self.path)
        parts, query = url.path.split("/")[3:], parse_qs(url.query)
        self.check(self.headers["Authorization"] == KEY, "without the endpoint's key")
        if parts[0] == "ping":
            ids = query.get("job_id", [""])[0]
            with self.queue.changed:
                self.queue.pings.append(Ping(parts[1], time.monotonic(), ids.split(",") if ids else []))
                self.queue.changed.notify_all()
            self.spoil(self.queue.fault("ping")) or self.answer(200)
        elif parts[0] == "job-stop":
            poll = Poll(parts[1], time.monotonic(), 1, "")
            self.queue.stop_polls.append(poll)
            try:
                self.spoil(self.queue.fault("job-stop")) or self.tell_stops(poll)
            finally:
                poll.ended = time.monotonic()
        elif parts[0] in ("job-take", "job-take-batch"):
            batch = int(query.get("batch_size", ["1"])[0])
            poll = Poll(parts[1], time.monotonic(), batch, query.get("job_in_progress", [""])[0])
            self.queue.polls.append(poll)
            try:
                self.take(poll, as_list=parts[0] == "job-take-batch")
            finally:
                poll.ended = time.monotonic()
        else:
            self.check(False, f"to an unknown path {url.path}")
            self.answer(404)

    def take(self, poll: Poll, as_list: bool) -> None:
        """Waits for a job, up to the poll's end; a worker that has hung up gets none."""
        if self.spoil(self.queue.fault("job-take")):
            return
        jobs = self.next_jobs(poll)
        if not jobs:
            poll.closed = self.hung_up()
            self.answer(204)
            return
        with self.queue.changed:
            poll.taken = len(jobs)
            for job in jobs:
                job.taken.append((time.monotonic(), poll.pod))
            self.queue.changed.notify_all()
        body = [job.envelope for job in jobs] if as_list else jobs[0].envelope
        self.answer(200, body if isinstance(body, bytes) else json.dumps(body).encode())

    def tell_stops(self, poll: Poll) -> None:
        """Waits for ids of the worker's jobs, up to the poll's end; a worker that has hung up is told none."""
        queue, deadline = self.queue, poll.started + self.queue.poll_s
        with queue.changed:
            while not (ids := [job_id for pod, job_id in queue.stops if pod == poll.pod]):
                if time.monotonic() > deadline or queue.closing or self.hung_up():
                    poll.closed = self.hung_up()
                    self.answer(204)
                    return
                queue.changed.wait(TICK_S)
            if self.hung_up():
                poll.closed = True
                return
            queue.stops = [(pod, job_id) for pod, job_id in queue.stops if pod != poll.pod]
            poll.taken = len(ids)
            for job in filter(None, (queue.jobs.get(job_id) for job_id in ids)):
                job.stopped = time.monotonic()
            self.answer(200, json.dumps({"jobsToStop": ids}).encode())
            queue.changed.notify_all()

    def next_jobs(self, poll: Poll) -> list[Job]:
        queue, deadline = self.queue, poll.started + self.queue.poll_s
        with queue.changed:
            while not queue.queue:
                if time.monotonic() > deadline or queue.closing or self.hung_up():
                    return []
                queue.changed.wait(TICK_S)
            if self.hung_up():
                return []
            return [queue.queue.popleft() for _ in range(min(poll.batch, len(queue.queue)))]

    def do_POST(self) -> None:
        """job-done: a result or a progress update."""
        arrived = time.monotonic()
        url = urlsplit(self.path)
        name, pod, job_id = url.path.split("/")[3:]
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        payload = self.strict_json(body)
        self.check(name == "job-done", f"to an unknown path {url.path}")
        self.check(self.headers["Authorization"] == KEY, "without the endpoint's key")
        self.check(self.headers["Content-Type"] == "application/x-www-form-urlencoded", "with another content type")
        self.check(parse_qs(url.query).get("isStream") == ["false"], "without isStream=false")
        job = self.queue.jobs.get(job_id)
        self.check(job is not None, f"an answer for an unknown job {job_id!r}")
        post = Post(pod, payload, len(body), arrived)
        progress = isinstance(payload, dict) and payload.get("status") == "IN_PROGRESS"
        if job:
            with self.queue.changed:
                (job.progress if progress else job.attempts).append(post)
        post.status = self.spoil(self.queue.fault("progress" if progress else "job-done", job_id)) or 200
        post.ended = time.monotonic()
        if post.status == 200:
            self.answer(200, b"OK")
        with self.queue.changed:
            self.queue.changed.notify_all()

    def spoil(self, fault: Any) -> int:
        """Plays a fault; returns the HTTP status it came to, -1 where none was sent, 0 where the request may pass."""
        if isinstance(fault, float):
            time.sleep(fault)
            return 0
        if fault is None:
            return 0
        if isinstance(fault, int):
            self.answer(fault)
            return fault
        if fault == "hang":
            while not self.hung_up() and not self.queue.closing:
                select.select([self.connection], [], [], 1)  # readable once the worker hangs up
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()
        return -1

    def answer(self, status: int, body: bytes = b"") -> None:
        head = f"HTTP/1.1 {status} x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self.connection.sendall(head.encode() + body)

    def hung_up(self) -> bool:
        """Whether the worker has closed the connection."""
        try:
            readable = select.select([self.connection], [], [], 0)[0]
            return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)
        except (OSError, ValueError):
            return True

    def strict_json(self, body: bytes) -> Any:
        try:
            payload = json.loads(body.decode("utf-8"), parse_constant=refuse_constant)
            json.dumps(payload, ensure_ascii=False).encode()  # refuses lone surrogates, escaped ones too
            return payload
        except ValueError as error:
            self.check(False, f"a body that is not strict JSON in UTF-8: {error}")
            return None

    def check(self, holds: bool, complaint: str) -> None:
        if not holds:
            self.queue.violations.append(f"{self.command} {urlsplit(self.path).path} {complaint}")


class Worker:
    """`python handler.py` as RunPod starts it, or any other command; a context manager that leaves no process behind.

    environ is added to the server's; log is the file with what it printed.
    """

    def __init__(
        self, server: RunPodServer, folder: Path, environ: Mapping[str, str], *command: str, pod: str = "pod-1"
    ) -> None:
        self.pod, self.server, self.log = pod, server, folder / f"{pod}.log"
        clean = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS", "HF_HUB_OFFLINE") if name in os.environ}
        self.process = subprocess.Popen(
            [sys.executable, *(command or (str(ROOT / "handler.py"),))],
            env={**clean, "HOME": str(folder), **server.env(pod), **environ},
            cwd=folder,
            stdout=self.log.open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def ready(self, timeout: float = 110.0) -> Worker:
        """Waits until it asks for its first job."""
        self.server.wait_for(lambda: any(poll.pod == self.pod for poll in self.server.polls), timeout)
        return self

    def terminate(self) -> None:
        """SIGTERM, to the worker alone, as a container's runtime sends it."""
        self.process.terminate()

    def wait(self, timeout: float) -> int:
        """Its exit status."""
        return self.process.wait(timeout)
