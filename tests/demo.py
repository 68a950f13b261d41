"""The worker from end to end without GPU, key or internet: makes a tiny model world, serves it as Civitai would, and
runs `python handler.py` as a user would.

    python tests/demo.py                       runs test_input.json
    python tests/demo.py job.json              the same with another job, or any other arguments of handler.py

Everything it writes lies below tests/.cache. The models hold random weights: the images are abstract patterns.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT, DEMO = TESTS.parent, TESTS / ".cache" / "demo"
sys.path.insert(0, str(ROOT))
KEEP = ("PATH", "HOME", "LANG", "TMPDIR", "SYSTEMROOT")  # of the environment; settings of a real worker stay outside


def main() -> None:
    """Make the world, start the server, run the worker; ends with its exit status."""
    from civitai_server import CivitaiServer
    from world import API_KEY, build_world

    started = time.monotonic()
    world = build_world(TESTS / ".cache")
    print(f"demo: checkpoint and {len(world.loras)} LoRAs with random weights ready, {elapsed(started)}", flush=True)
    shutil.rmtree(DEMO, ignore_errors=True)  # so that every run shows the downloads
    with CivitaiServer(world.files, key=API_KEY) as server:
        environ = {name: os.environ[name] for name in KEEP if name in os.environ}
        environ |= world.environ(server.url, store=DEMO / "models") | {"OUTPUT_DIR": str(DEMO / "output")}
        print(f"demo: python handler.py {' '.join(sys.argv[1:])}", flush=True)
        done = subprocess.run([sys.executable, "handler.py", *sys.argv[1:]], cwd=ROOT, env=environ)
        sent, count = sum(request.sent for request in server.requests) / 1e6, len(server.requests)
    print(f"demo: the Civitai-like server sent {sent:.1f} MB in {count} requests; {elapsed(started)} in all")
    images = sorted((DEMO / "output").glob("*"))
    print("\n".join(f"demo: made {image.relative_to(ROOT)}" for image in images) or "demo: no image was made")
    sys.exit(done.returncode or not images)


def elapsed(started: float) -> str:
    """ "3.2 s"."""
    return f"{time.monotonic() - started:.1f} s"


if __name__ == "__main__":
    main()
