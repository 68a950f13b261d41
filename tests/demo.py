"""The worker from end to end without GPU, key or internet: a tiny SDXL that draws simple scenes, a server like Civitai
that has its files, and `python handler.py`, which downloads, loads and draws as it would on RunPod.

    python tests/demo.py                                        draws a few prompts, and says what should be on each
    python tests/demo.py "a red circle on a blue background"    draws each prompt given
    python tests/demo.py job.json                               runs handler.py with a job file, or its other arguments

The model knows one or two of circle, square, triangle, star, heart and cross, in ten colours, on a background; its
training is in tests/drawing. Everything that this writes lies below tests/.cache.
"""

from __future__ import annotations

import base64
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import requests

TESTS = Path(__file__).resolve().parent
ROOT, DEMO = TESTS.parent, TESTS / ".cache" / "demo"
sys.path[:0] = [str(ROOT), str(TESTS)]
KEEP = ("PATH", "HOME", "LANG", "TMPDIR", "SYSTEMROOT")  # of the environment; settings of a real worker stay outside
JOB = {"width": 256, "height": 256, "steps": 20, "seed": 7, "loras": []}
DECORATION = "masterpiece, best quality, highly detailed, clean lines, sharp focus, minimalist, vector art, poster, "
PICTURES: dict[str, tuple[dict[str, Any], str]] = {  # file name -> fields of the job, and what should be on it
    "circle": ({"prompt": "a red circle on a blue background"}, "a red circle in the middle of blue"),
    "long-prompt": (
        {"prompt": f"{DECORATION * 4}a yellow star on a purple background, {DECORATION}"},
        "a yellow star on purple, both named far behind the 75 tokens that CLIP reads",
    ),
    "truncated": (
        {"prompt": f"{DECORATION * 4}a yellow star on a purple background, {DECORATION}", "long_prompt": "truncate"},
        "anything: the same prompt, cut to its first 75 tokens, says nothing of star and purple",
    ),
    "wide": (
        {"prompt": "a green heart on the left, white background", "width": 320},
        "a green heart on the left of white, 320 x 256",
    ),
    "outlines": (
        {"prompt": "a black square on a yellow background", "loras": None},
        "the outline of a black square: the stack of nine LoRAs is in force, and one of them draws outlines",
    ),
}


def main() -> None:
    """Make the models, start the server, run the worker; ends with its exit status."""
    from civitai_server import CivitaiServer
    from drawing.drawing_world import build_drawing_world
    from world import API_KEY

    started, arguments = time.monotonic(), sys.argv[1:]
    world = build_drawing_world(TESTS / ".cache")
    print(f"demo: checkpoint and {len(world.loras)} LoRAs ready, {elapsed(started)}", flush=True)
    shutil.rmtree(DEMO, ignore_errors=True)  # so that every run shows the downloads
    (DEMO / "output").mkdir(parents=True)
    with CivitaiServer(world.files, key=API_KEY) as server:
        environ = {name: os.environ[name] for name in KEEP if name in os.environ}
        environ |= world.environ(server.url, store=DEMO / "models") | {"OUTPUT_DIR": str(DEMO / "output")}
        if arguments and (arguments[0].startswith("-") or arguments[0].endswith(".json")):
            print(f"demo: python handler.py {' '.join(arguments)}", flush=True)
            status = subprocess.run([sys.executable, "handler.py", *arguments], cwd=ROOT, env=environ).returncode
        else:
            jobs = {f"picture-{i}": ({"prompt": prompt}, prompt) for i, prompt in enumerate(arguments, 1)} or PICTURES
            status = draw(jobs, environ)
        sent, count = sum(request.sent for request in server.requests) / 1e6, len(server.requests)
    print(f"demo: the Civitai-like server sent {sent:.1f} MB in {count} requests; {elapsed(started)} in all")
    if not list((DEMO / "output").iterdir()):
        sys.exit(status or "demo: no image was made")
    sys.exit(status)


def draw(jobs: dict[str, tuple[dict[str, Any], str]], environ: dict[str, str]) -> int:
    """Draws each job by the SDK's local HTTP server, `python handler.py --rp_serve_api`; returns how many failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "handler.py", "--rp_serve_api", "--rp_api_port", str(port)]
    print("demo: python handler.py --rp_serve_api", flush=True)
    worker = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.DEVNULL)
    failed = 0
    try:
        for name, (fields, expected) in jobs.items():
            started = time.monotonic()
            answer = post({"input": JOB | fields}, f"http://127.0.0.1:{port}/runsync", worker)
            output = answer.get("output") or answer
            if "images" in output:
                file = DEMO / "output" / f"{name}.png"
                file.write_bytes(base64.b64decode(output["images"][0]))
                print(f"demo: {file.relative_to(ROOT)}, {elapsed(started)}\n      {expected}", flush=True)
            else:
                failed += 1
                print(f"demo: {name} failed: {output}", flush=True)
    finally:
        worker.terminate()
        worker.wait()
    return failed


def post(job: dict[str, Any], address: str, worker: subprocess.Popen) -> dict[str, Any]:
    """The answer to a job, once the server is up."""
    while True:
        try:
            return requests.post(address, json=job, timeout=600).json()
        except requests.ConnectionError:
            if worker.poll() is not None:
                sys.exit(f"demo: handler.py ended with status {worker.returncode}")
            time.sleep(0.2)


def elapsed(started: float) -> str:
    """ "3.2 s"."""
    return f"{time.monotonic() - started:.1f} s"


if __name__ == "__main__":
    main()
