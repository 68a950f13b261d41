"""What a cold start costs: the worker's, which reads its files while it imports, beside the same steps in sequence.

    python tests/benchmarks/coldstart.py                         full size, 3 rounds: 10 minutes, the first time 15
    python tests/benchmarks/coldstart.py --size tiny --rounds 1
    python tests/benchmarks/coldstart.py --world ../other/tests/.cache

From the start of the process to where float16 weights would move to the GPU: all imports done, the pipeline built, and
every byte of its weights in memory. In sequence means imports, from_single_file, then touching every weight, page by
page of the mapped file. All files lie in the store; "cold" drops the page cache before each start, where that is
permitted, and with it the libraries' own files; "warm" has everything in it. The two take turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]
DROP = Path("/proc/sys/vm/drop_caches")
PAGE = 4096


def start(way: str) -> None:
    """The child process: one start; prints the seconds of its phases and the moment of its end."""
    import seams

    settings, marks = seams.settings(), {}
    began = time.monotonic()

    def mark(phase: str) -> None:
        nonlocal began
        began, marks[phase] = time.monotonic(), time.monotonic() - began

    if way == "worker":  # as serve_queue and load_pipeline do
        checkpoint_of = seams.begin_start(settings)
    import_all()
    mark("imports")
    checkpoint = settings.checkpoint_dir / settings.checkpoint["filename"]
    if way == "worker":
        checkpoint = checkpoint_of()
    mark("files")
    pipe = seams.build_pipeline(settings, checkpoint)
    mark("pipeline")
    touch(pipe)
    mark("bytes")
    print(time.monotonic(), *(f"{phase} {seconds:.2f}" for phase, seconds in marks.items()))
    sys.stdout.flush()
    os._exit(0)


def import_all() -> None:
    """What the worker imports before it can serve."""
    import diffusers
    import peft  # noqa: F401
    import runpod  # noqa: F401
    import transformers

    assert all((diffusers.StableDiffusionXLPipeline, diffusers.AutoencoderKL, transformers.CLIPTextModelWithProjection))


def touch(pipe: Any) -> None:
    """Reads one byte of every page of every weight, as the copy to a GPU would read them all."""
    import torch

    for name in ("unet", "text_encoder", "text_encoder_2", "vae"):
        for weight in getattr(pipe, name).parameters():
            weight.detach().view(-1).view(torch.uint8)[::PAGE].sum()


def measure(way: str, cold: bool) -> tuple[float, str]:
    """Seconds of one start, and of its phases."""
    os.sync()
    if cold:
        DROP.write_text("3")
    started = time.monotonic()
    command = [sys.executable, __file__, "--way", way]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    ended, _, phases = done.stdout.strip().partition(" ")
    return float(ended) - started, phases


def compare(cold: bool, rounds: int) -> None:
    """Both ways in turn; prints a row each."""
    rows: dict[str, list[tuple[float, str]]] = {"sequence": [], "worker": []}
    if not cold:
        measure("sequence", False)  # fills the page cache
    for _ in range(rounds):
        for way, results in rows.items():
            results.append(measure(way, cold))
    median = {way: statistics.median(seconds for seconds, _ in results) for way, results in rows.items()}
    for way, results in rows.items():
        last = results[-1][1]
        each = " ".join(f"{seconds:.1f}" for seconds, _ in results)
        share = median[way] / median["sequence"]
        print(
            f"| {'cold' if cold else 'warm'} | {way} | {median[way]:.1f} | {share:.2f} | {each} | {last} |", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "full"), default="full")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--world", type=Path, default=TESTS / ".cache", help="where the model world is, or is made")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        start(options.way)
    from world import build_world

    world = build_world(options.world, options.size)
    with tempfile.TemporaryDirectory(dir=options.world) as store:
        for file in (world.checkpoint, *world.loras):  # links, so that the worker's records stay out of the world
            link = Path(store) / file.relative_to(world.store)
            link.parent.mkdir(exist_ok=True)
            os.link(file, link)
        os.environ |= world.environ(store=Path(store)) | {"HF_HUB_OFFLINE": "1"}
        size = sum(file.stat().st_size for file in (world.checkpoint, *world.loras))
        print(f"{size / 1e9:.2f} GB in {1 + len(world.loras)} files, {options.rounds} rounds, {os.cpu_count()} cores\n")
        print("| page cache | way | median s | to sequence | each | phases of the last |\n|---|---|---|---|---|---|")
        if os.access(DROP, os.W_OK):
            compare(True, options.rounds)
        compare(False, options.rounds)


if __name__ == "__main__":
    main()
