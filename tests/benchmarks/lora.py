"""What a LoRA stack costs: the worker's beside diffusers' load_lora_weights, set_adapters and fuse_lora.

    python tests/benchmarks/lora.py                 full size, float16, nine LoRAs over all 986 modules: 5 minutes
    python tests/benchmarks/lora.py --cpu-time      CPU seconds of one thread: for a machine that others use too
    python tests/benchmarks/lora.py --size tiny --repeat 1
    python tests/benchmarks/lora.py --kind loha     LoHa files; also lokr and dora: the worker alone, diffusers has none

Both ways run in turn on fresh pipelines of the same checkpoint, in one process. A CUDA device is used where there is
one. Checkpoint and LoRAs are in memory before the clock runs: reading a disk would cost both ways the same.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import diffusers  # noqa: E402
import seams  # noqa: E402
import torch  # noqa: E402
from world import Lora, Noise, World, build_world, lora_keys, lora_targets, write_lora, write_tensors  # noqa: E402

Seconds = defaultdict[str, list[float]]


PARTS = ("unet", "text_encoder", "text_encoder_2")


def write_loras(world: World, count: int, rank: int, kind: str) -> dict[str, Path]:
    """Files over every module that Kohya's trainer reaches, adapter name -> file."""
    lora = Lora(rank, rank / 2, PARTS, "linear")
    files = {f"lora_{n}": world.folder / f"benchmark_{kind}_{rank}_{n}.safetensors" for n in range(count)}
    for seed, file in enumerate(files.values()):
        if file.exists():
            continue
        write_lora(file, "kohya", lora, world.size, strength=0.05, seed=seed)
        if kind != "lora":
            write_kind(file, world, kind, rank, seed)
    return files


def write_kind(file: Path, world: World, kind: str, rank: int, seed: int) -> None:
    """The same layers as LoHa, LoKr or DoRA."""
    noise, tensors = Noise(seed, world.size), {}
    for target in lora_targets(world.size, PARTS, "linear"):
        layer = lora_keys(target, "kohya")[2].removesuffix(".alpha")
        rows, columns = target.shape
        shapes = {
            "loha": {f"hada_w{n}_{s}": (rows, rank) if s == "a" else (rank, columns) for n in (1, 2) for s in "ab"},
            "lokr": {"lokr_w1": (8, 8), "lokr_w2_a": (rows // 8, rank), "lokr_w2_b": (rank, columns // 8)},
            "dora": {"lora_up.weight": (rows, rank), "lora_down.weight": (rank, columns), "dora_scale": (rows, 1)},
        }[kind]
        tensors |= {f"{layer}.{part}": noise.normal(f"{layer}.{part}", shape, 0.05) for part, shape in shapes.items()}
    write_tensors(file, tensors)


def build_pipe(world: World, dtype: torch.dtype) -> Any:
    """The bare checkpoint as the worker loads it, off the mapped file: its pages would be read within a measurement."""
    vae = diffusers.AutoencoderKL.from_pretrained(world.vae, torch_dtype=dtype)
    pipe = diffusers.StableDiffusionXLPipeline.from_single_file(
        str(world.checkpoint), config=str(world.config), vae=vae, torch_dtype=dtype, add_watermarker=False
    )
    for component in PARTS:
        for parameter in getattr(pipe, component).parameters():
            parameter.data = parameter.data.clone()
    return pipe


def measure(seconds: Seconds, name: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Calls the function and notes how long it and the GPU took."""
    started = CLOCK()
    result = function(*args, **options)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[name].append(CLOCK() - started)
    return result


def run_worker(pipe: Any, files: dict[str, Path], scales: dict[str, float], seconds: Seconds) -> None:
    """The worker's way, with a job's changes of the stack."""
    stack = measure(seconds, "read", seams.LoraStack, pipe, files)
    assert not stack.failed, stack.failed
    pipe.to(DEVICE)
    measure(seconds, "merge", stack.apply, scales)
    measure(seconds, "change one", stack.apply, scales | {"lora_0": -2.0})
    measure(seconds, "none", stack.apply, {})
    measure(seconds, "back", stack.apply, scales)
    measure(seconds, "in force", stack.apply, scales)


def run_diffusers(pipe: Any, files: dict[str, Path], scales: dict[str, float], seconds: Seconds) -> None:
    """diffusers' way to the same weights."""
    pipe.to(DEVICE)

    def load() -> None:
        for name, file in files.items():
            pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
        pipe.set_adapters(list(scales), list(scales.values()))

    measure(seconds, "read", load)
    measure(seconds, "merge", pipe.fuse_lora, components=list(PARTS))


def compare(
    world: World, files: dict[str, Path], dtype: torch.dtype, repeat: int, alone: bool
) -> tuple[Seconds, Seconds]:
    """Seconds of the worker's way and, unless it is alone, of diffusers', one after the other in every round."""
    scales = {name: 0.5 + n / 10 for n, name in enumerate(files)}
    ours, theirs = defaultdict(list), defaultdict(list)
    for _ in range(repeat):
        for run, seconds in ((run_worker, ours), (run_diffusers, theirs))[: 1 if alone else 2]:
            run(build_pipe(world, dtype), files, scales, seconds)
            gc.collect()
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # or the next pipeline would not fit into 20 GB
    return ours, theirs


def report(ours: Seconds, theirs: Seconds) -> str:
    """The table: medians, lowest and highest."""

    def cell(values: list[float]) -> str:
        if not values:
            return ""
        return f"{statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f})"

    def row(name: str, mine: list[float], plain: list[float]) -> str:
        times = f"{statistics.median(plain) / statistics.median(mine):.1f}x" if plain else ""
        return f"| {name} | {cell(mine)} | {cell(plain)} | {times} |"

    both = [[sum(pair) for pair in zip(s["read"], s["merge"], strict=True)] for s in (ours, theirs)]
    jobs = {"change one": "one scale changed", "none": "no LoRAs", "back": "the stack again", "in force": "no change"}
    return "\n".join(
        [
            "| | worker | diffusers | |",
            "|---|---|---|---|",
            row("read and resolved (load_lora_weights, set_adapters)", ours["read"], theirs["read"]),
            row("merged and ready (with fuse_lora)", *both),
            *(f"| a job with {name} | {cell(ours[key])} | | |" for key, name in jobs.items()),
        ]
    )


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOCK = time.process_time if "--cpu-time" in sys.argv else time.perf_counter


def main() -> None:
    """Prints the machine and the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=("tiny", "full"), default="full")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    parser.add_argument("--loras", type=int, default=9)
    parser.add_argument("--kind", choices=("lora", "loha", "lokr", "dora"), default="lora")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help="without diffusers, whose way takes 24 GB")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds, on one thread")
    options = parser.parse_args()
    if options.cpu_time:
        torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    world = build_world(TESTS / ".cache", options.size)
    files = write_loras(world, options.loras, options.rank, options.kind)
    size = sum(len(file.read_bytes()) for file in files.values())
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{device}; torch {torch.__version__}, diffusers {diffusers.__version__}; {options.dtype}, {options.size} size"
    )
    print(f"{options.loras} files ({options.kind}, rank {options.rank}), {size / 1e9:.2f} GB; {options.repeat} rounds")
    print(f"seconds by {CLOCK.__name__}")
    alone = options.alone or options.kind != "lora"
    print(report(*compare(world, files, getattr(torch, options.dtype), options.repeat, alone)))


if __name__ == "__main__":
    main()
