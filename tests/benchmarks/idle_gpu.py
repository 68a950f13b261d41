"""How long the GPU idles between two queued jobs, how early they are taken, what several workers serve together.

    python tests/benchmarks/idle_gpu.py     20 jobs of 1.2 s GPU and 0.45 s encoding, simulated by sleeping
    python tests/benchmarks/idle_gpu.py --gpu 2 --images 0.3 --jobs 50 --workers 1 2 4
    python tests/benchmarks/idle_gpu.py --gpu 60 --fetch 0.5 --jobs 4 --ways loop     each job-take lasts half a second

Ways of serving: "loop" is handler.py's loop with its default of two jobs in flight, "sdk" the SDK's plain loop,
"tight" calls the job function again and again without any queue. A job's GPU work and the encoding of its images are
sleeps of the given length, the first under a lock as in handler.py, so that no GPU is needed and nothing but the
loops differs; its answer carries 4 MB of base64, one 1024x1024 PNG. RunPod counts a job's executionTimeout from when
it was taken: "taken ahead" is how long it then waited for the GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from runpod_server import RunPodServer  # noqa: E402


class Simulation:
    """A job function whose GPU work and encoding are sleeps; notes when the GPU was busy."""

    def __init__(self, gpu_s: float, images_s: float, notes: Path) -> None:
        self.gpu_s, self.images_s, self.notes = gpu_s, images_s, notes
        self.gpu = threading.Lock()

    def run(self, job: dict[str, Any], observer: Any = None) -> dict[str, Any]:
        with observer.turn(self.gpu) if observer else self.gpu:
            started = time.monotonic()
            if observer:
                observer.step(0, 24)
            for step in range(1, 25):
                time.sleep(self.gpu_s / 24)
                if observer:
                    observer.step(step, 24)
            ended = time.monotonic()
        with self.notes.open("a") as notes:
            notes.write(json.dumps([started, ended, job["id"]]) + "\n")
        time.sleep(self.images_s)
        return {"images": ["A" * 4_000_000]}


def serve(way: str, simulation: Simulation) -> None:
    """The worker process."""
    if way == "loop":
        import seams

        seams.serve_with(simulation.run)
    else:
        import runpod

        runpod.serverless.start({"handler": simulation.run})


def measure(way: str, options: argparse.Namespace, workers: int = 1) -> dict[str, float]:
    """Serves the jobs; gaps within each worker in milliseconds, and jobs a minute of all of them. options.fetch: what
    each job-take costs in seconds."""
    taken: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, RunPodServer() as server:
        notes = [Path(folder, f"{n}.jsonl") for n in range(workers)]
        if way == "tight":
            simulation = Simulation(options.gpu, options.images, notes[0])
            for n in range(options.jobs):
                simulation.run({"id": str(n)})
        else:
            taken = serve_from_queue(way, options, server, notes)
        busy = [[json.loads(line) for line in note.read_text().splitlines()] for note in notes if note.exists()]
    gaps = [1000 * (b[0] - a[1]) for jobs in busy for a, b in itertools.pairwise(jobs)]
    jobs = [job for worker in busy for job in worker]
    span = max(job[1] for job in jobs) - min(job[0] for job in jobs)
    return {
        "median": statistics.median(gaps),
        "max": max(gaps),
        "ahead": max((job[0] - taken[job[2]] for job in jobs if job[2] in taken), default=0.0),
        "per_minute": 60 * len(jobs) / span,
        "jobs": len(jobs),
        "fewest": min(map(len, busy)),  # what the least busy worker served
    }


def serve_from_queue(
    way: str, options: argparse.Namespace, server: RunPodServer, notes: list[Path]
) -> dict[str, float]:
    """Starts the workers, lets them poll, then queues the jobs and waits for every answer; when each was taken."""
    command = [sys.executable, __file__, "--gpu", str(options.gpu), "--images", str(options.images), "--serve", way]
    processes = [
        subprocess.Popen(
            [*command, str(note)],
            env=os.environ | server.env(f"pod-{n}", RUNPOD_LOG_LEVEL="ERROR"),
            cwd=note.parent if way == "loop" else tempfile.mkdtemp(dir=note.parent),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for n, note in enumerate(notes)
    ]
    try:
        server.wait_for(lambda: len({poll.pod for poll in server.open_polls()}) == len(notes))
        server.wait_for(lambda: len({ping.pod for ping in server.pings}) == len(notes))  # the heartbeats' start is over
        server.inject("job-take", itertools.repeat(options.fetch))
        ids = [server.submit({"n": n}) for n in range(options.jobs)]
        for job_id in ids:
            server.result(job_id, timeout=600)
        assert all(len(job.results) == 1 for job in server.jobs.values()), "a job was answered twice"
        assert not server.violations, server.violations
        return {job.id: job.taken[0][0] for job in server.jobs.values()}
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)  # the plain SDK's heartbeat would live on
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", type=float, default=1.2, help="seconds of GPU work per job")
    parser.add_argument("--images", type=float, default=0.45, help="seconds of encoding per job")
    parser.add_argument("--fetch", type=float, default=0.0, help="seconds that a job-take lasts at least")
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--ways", nargs="*", default=["tight", "sdk", "loop"])
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--serve", nargs=2, metavar=("WAY", "NOTES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        sys.argv[1:] = []
        serve(options.serve[0], Simulation(options.gpu, options.images, Path(options.serve[1])))
        return
    print(f"{options.jobs} jobs, GPU {options.gpu} s, encoding {options.images} s")
    print("| way | workers | idle GPU between jobs, median ms | max ms | taken ahead, max s | jobs a minute |")
    print("| --- | --- | --- | --- | --- | --- |")
    rows = [("tight", 1), ("sdk", 1), *(("loop", workers) for workers in options.workers)]
    for way, workers in (row for row in rows if row[0] in options.ways):
        found = measure(way, options, workers)
        figures = f"{found['median']:.0f} | {found['max']:.0f} | {found['ahead']:.1f} | {found['per_minute']:.1f}"
        print(f"| {way} | {workers} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
