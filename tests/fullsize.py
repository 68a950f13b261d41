"""The full-size check: a random checkpoint of SDXL's real dimensions (6.9 GB) and nine LoRAs (0.5 GB) go through
handler.load_pipeline(). Prints the seconds of each phase and the peak memory; ends with 1 where a LoRA failed.

    python tests/fullsize.py [folder] [--cold] [--float16] [--image]

folder     where the files are written once, tests/.cache by default
--cold     first push the files out of the page cache, so that they come from the disk
--float16  without a GPU too, where the weights are float32 otherwise: 10 instead of 22 GB of memory
--image    then draw one image of 256x256 in two steps

Needs 8 GB of disk.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))


def main() -> int:
    """Build the files, load them, report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", default=str(TESTS / ".cache"))
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--float16", action="store_true")
    parser.add_argument("--image", action="store_true")
    options = parser.parse_args()

    import seams
    from world import build_world

    import handler

    started = time.monotonic()
    world = build_world(options.folder, "full")
    files = [world.checkpoint, *world.loras]
    size = sum(file.stat().st_size for file in files) / 1e9
    print(f"files: {size:.2f} GB, {world.checkpoint.stat().st_size / 1e9:.2f} of them the checkpoint; {since(started)}")
    if options.cold:
        for file in files:
            forget(file)
    if options.float16:
        seams.load_in_float16()
    os.environ |= world.environ()
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("worker").setLevel(logging.INFO)
    started = time.monotonic()
    engine = seams.engine()  # load_pipeline(), and ready for the job
    print(f"load_pipeline: {since(started)}, {memory()}")
    failed = engine.stack.failed
    print(f"LoRAs: {len(world.loras) - len(failed)} of {len(world.loras)} in the weights {failed or ''}")
    if options.image:
        job = {"prompt": "a cat", "width": 256, "height": 256, "steps": 2, "seed": 1}
        answer = handler.handler({"id": "full", "input": job})
        print(f"image: {answer.get('error') or answer['metadata']['timings']}, {memory()}")
        failed |= {"image": answer["error"]} if "error" in answer else {}
    return int(bool(failed))


def forget(file: Path) -> None:
    """Push a file out of the page cache."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def since(started: float) -> str:
    """ "3.2 s"."""
    return f"{time.monotonic() - started:.1f} s"


def memory() -> str:
    """Peak and present memory of this process; mapped files count in the first two."""
    status = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/self/status").read_text()))
    peak, now, own = (int(status[name]) / 1e6 for name in ("VmHWM", "VmRSS", "RssAnon"))
    return f"peak {peak:.1f} GB, now {now:.1f} GB, of which {own:.1f} GB not mapped files"


if __name__ == "__main__":
    sys.exit(main())
