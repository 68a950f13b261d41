"""Seconds an image takes on this machine: the bare checkpoint, nine unfused adapters, the worker, the worker compiled.

    python tests/benchmarks/gpu.py            with CUDA: SDXL's full size in float16, 1024², 24 steps, 5 runs each
    python tests/benchmarks/gpu.py --small    anywhere, in half a minute: so that this file cannot rot

A random SDXL is built on the device; it takes as long as a trained one. Every way runs whole jobs through
handler.handler, each with a long prompt that was not seen before. Then a hires job, changes of the stack, one picture
on the CPU and on the GPU, and two threads that keep the worker busy, as RunPod's loop does: what a job takes then
beyond its own GPU work is what PNG, base64 and JSON cost in truth. Cold starts: coldstart.py; memory by count, to hold
the peaks against: tests/memory.py; noise and samplers on the host: sampling.py.
"""

from __future__ import annotations

import argparse
import base64
import gc
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import diffusers  # noqa: E402
import numpy as np  # noqa: E402
import seams  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402
from world import PREFIXES, SCHEDULER, Lora, configs, write_configuration, write_lora  # noqa: E402

import handler  # noqa: E402

FORWARD_TFLOP = 13.5  # one UNet forward at 1024² with guidance: a batch of two
PEAK_TFLOPS = {  # dense float16 with float32 accumulation, from the vendor's data sheets; the first name that fits
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "4090": 165,
    "3090": 71,
    "RTX 6000 Ada": 364,
    "RTX A6000": 155,
    "RTX A5000": 111,
}
SCALES = {handler.sanitize_name(config["name"]): config["scale"] for config in handler.LORA_CONFIGS}
# What a job spends its time on, in its metadata's timings; the rest is outside.
GPU_PHASES = ("loras", "encode", "denoise", "decode")


@dataclass
class Scale:
    """How large everything is: the full size on CUDA, or small anywhere."""

    size: str
    device: str
    dtype: torch.dtype
    job: dict[str, Any]
    picture: dict[str, Any]  # what is drawn on the CPU and on the device
    batches: tuple[int, ...]
    runs: int
    scales: dict[str, float]  # the stack, adapter name -> scale


@dataclass
class Result:
    """One way of serving at one batch size."""

    way: str
    batch: int
    cold_s: float
    jobs_s: list[float] = field(default_factory=list)
    timings: list[dict[str, float]] = field(default_factory=list)
    peak_bytes: int = 0

    @property
    def image_s(self) -> list[float]:
        return [seconds / self.batch for seconds in self.jobs_s]

    def median(self, phase: str) -> float:
        return statistics.median(timings[phase] for timings in self.timings)


class Adapters:
    """The nine LoRAs as diffusers keeps them, beside the layers, in the place of the worker's stack."""

    def __init__(self, pipe: Any, files: dict[str, Path], scales: dict[str, float]) -> None:
        self.failed: dict[str, str] = {}
        self.loras = {name: SimpleNamespace(warnings=[], embeddings={}) for name in files}
        self.applied = scales
        for name, file in files.items():
            pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
        pipe.set_adapters(list(scales), list(scales.values()))

    def apply(self, _scales: dict[str, float]) -> bool:
        return False


def build_pipe(scale: Scale, folder: Path) -> Any:
    """A random SDXL on the device, with what load_pipeline adds to a pipeline."""
    write_configuration(folder, scale.size)
    models = {}
    for name, config in configs(scale.size).items():
        with torch.device(scale.device):
            if name in ("unet", "vae"):
                model = getattr(diffusers, config["_class_name"]).from_config(config)
            else:
                model = getattr(transformers, config["architectures"][0])(transformers.CLIPTextConfig(**config))
        models[name] = model.to(scale.dtype).eval().requires_grad_(False)
    tokenizers = {
        name: transformers.CLIPTokenizer.from_pretrained(folder / name) for name in ("tokenizer", "tokenizer_2")
    }
    scheduler = diffusers.EulerDiscreteScheduler.from_config(SCHEDULER)
    pipe = diffusers.StableDiffusionXLPipeline(**models, **tokenizers, scheduler=scheduler, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_loras(scale: Scale, folder: Path) -> dict[str, Path]:
    """LoRAs over every layer that Kohya's trainer reaches."""
    folder.mkdir()
    lora = Lora(16, 8.0, tuple(PREFIXES), "linear")
    return {
        name: write_lora(folder / f"{name}.safetensors", "kohya", lora, scale.size, strength=0.05, seed=seed)
        for seed, name in enumerate(scale.scales)
    }


def seconds(function: Callable[[], Any]) -> tuple[Any, float]:
    """The result and how long it took, the GPU's part included."""
    synchronize()
    started = time.perf_counter()
    result = function()
    synchronize()
    return result, time.perf_counter() - started


def synchronize() -> None:
    """Waits for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


PROMPTS = iter(range(10**9))


def run_job(scale: Scale, batch: int, scales: dict[str, float], **fields: Any) -> dict[str, Any]:
    """One job with a prompt of several chunks that no job had before."""
    words = ", ".join(f"detail {n} of picture {next(PROMPTS)}" for n in range(24))
    job = {"prompt": f"a photo of a cat, {words}", "negative_prompt": "blurry, " * 12, "seed": 1, "num_images": batch}
    loras = [{"name": name, "scale": scale} for name, scale in scales.items()]
    answer = handler.handler({"id": "benchmark", "input": {**scale.job, **job, **fields, "loras": loras}})
    assert "error" not in answer, answer
    assert len(answer["images"]) == batch and answer["metadata"]["prompt_chunks"] > 1
    return answer


def measure(scale: Scale, way: str, cold_s: float, scales: dict[str, float]) -> Iterator[Result]:
    """Runs a way's jobs at every batch size: one to warm up, then those that count."""
    for batch in scale.batches:
        result = Result(way, batch, cold_s)
        run_job(scale, batch, scales)
        if scale.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(scale.runs):
            answer, job_s = seconds(lambda batch=batch: run_job(scale, batch, scales))
            result.jobs_s.append(job_s)
            result.timings.append(answer["metadata"]["timings"])
        if scale.device == "cuda":
            result.peak_bytes = torch.cuda.max_memory_allocated()
        print(f"  {way}, batch {batch}: {statistics.median(result.image_s):.2f} s/image", file=sys.stderr, flush=True)
        yield result


def measure_all(scale: Scale, pipe: Any, files: dict[str, Path], compiled: bool) -> Iterator[Result]:
    """The four ways on one pipeline: its weights are the bare checkpoint's again before each."""
    seams.serve(seams.engine_around(pipe, {}))
    yield from measure(scale, "bare checkpoint", 0.0, {})
    adapters, cold_s = seconds(lambda: Adapters(pipe, files, scale.scales))
    seams.serve(seams.engine_around(pipe, files, adapters))
    yield from measure(scale, f"{len(files)} unfused adapters", cold_s, scale.scales)
    pipe.unload_lora_weights()
    gc.collect()

    def load() -> Any:
        engine = seams.engine_around(pipe, files)
        engine.stack.apply(scale.scales)
        return engine

    engine, cold_s = seconds(load)
    seams.serve(engine)
    assert engine.stack.applied == scale.scales and not engine.stack.failed
    yield from measure(scale, "worker", cold_s, scale.scales)
    if compiled:
        backend = "inductor" if scale.device == "cuda" else "eager"  # a C++ compiler would need minutes
        _, compile_s = seconds(lambda: seams.compile_unet(pipe, backend))
        print(f"  torch.compile: {compile_s:.0f} s", file=sys.stderr, flush=True)
        yield from measure(scale, "worker, compiled", cold_s, scale.scales)


def measure_extras(scale: Scale) -> str:
    """A job with hires, changes of the stack there and back, and the same picture on the CPU and on the device."""
    hires, hires_s = seconds(lambda: run_job(scale, 1, scale.scales, hires={"scale": 1.5, "strength": 0.5}))
    stack, changes = seams.engine().stack, []
    for _ in range(scale.runs):
        for factor in (0.5, 1):
            scales = {name: factor * value for name, value in scale.scales.items()}
            changes.append(seconds(lambda scales=scales: stack.apply(scales))[1])
    pictures = []
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        tiny = build_pipe(replace(scale, size="tiny", device="cpu", dtype=torch.float32), Path(folder))
    for device in ("cpu", scale.device):
        before = seams.serve(seams.engine_around(tiny.to(device), {}))
        job = {"prompt": "a photo of a cat", "seed": 1, "loras": [], **scale.picture}
        image = handler.handler({"id": "benchmark", "input": job})["images"][0]
        pictures.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(image))), dtype=int))
        seams.serve(before)
    apart = np.abs(pictures[0] - pictures[1])
    return (
        f"hires by 1.5, one image: {hires_s:.2f} s, {hires['metadata']['timings']}\n"
        f"a change of the whole stack: {statistics.median(changes):.3f} s\n"
        f"one seed on the CPU and on {scale.device}, a tiny model in float32: pixels differ by {apart.max()} of 255 at "
        f"most, by {apart.mean():.4f} on average"
    )


def measure_busy(scale: Scale, jobs: int) -> tuple[float, float]:
    """Seconds a job takes where the next always waits, and its share that is not GPU work."""
    with ThreadPoolExecutor(2) as pool:
        answers, wall_s = seconds(lambda: list(pool.map(lambda _: run_job(scale, 1, scale.scales), range(jobs))))
    gpu_s = sum(answer["metadata"]["timings"].get(phase, 0) for answer in answers for phase in GPU_PHASES)
    return wall_s / jobs, 1 - gpu_s / wall_s


def peak_tflops() -> tuple[float, str]:
    """What the device can do: by its data sheet, else measured with a large product of matrices."""
    if not torch.cuda.is_available():
        return 0.0, ""
    name = torch.cuda.get_device_name()
    for part, tflops in PEAK_TFLOPS.items():
        if part in name:
            return tflops, "data sheet"
    a = torch.randn(8192, 8192, dtype=torch.float16, device="cuda")
    seconds(lambda: a @ a)
    _, many_s = seconds(lambda: [a @ a for _ in range(20)])
    return 20 * 2 * 8192**3 / 1e12 / many_s, "measured"


def table(scale: Scale, results: list[Result]) -> str:
    """Markdown: medians, and the lowest and highest run."""
    peak, _ = peak_tflops()
    titles = (
        "batch, s/image (lowest to highest), encode, denoise, decode, images, of the bound, peak memory, LoRAs cold"
    )
    lines = [f"| | {titles.replace(', ', ' | ')} |", "|---" * 10 + "|"]
    for r in results:
        spread = f"{statistics.median(r.image_s):.2f} ({min(r.image_s):.2f} to {max(r.image_s):.2f})"
        phases = " | ".join(f"{r.median(phase):.2f}" for phase in ("encode", "denoise", "decode", "images"))
        tflops = FORWARD_TFLOP * scale.job["steps"] * r.batch / r.median("denoise")
        bound = f"{100 * tflops / peak:.0f} %" if peak and scale.size == "full" else "-"
        memory = f"{r.peak_bytes / 1e9:.1f} GB" if r.peak_bytes else "-"
        cold = f"{r.cold_s:.1f} s" if r.cold_s else "-"
        lines.append(f"| {r.way} | {r.batch} | {spread} | {phases} | {bound} | {memory} | {cold} |")
    return "\n".join(lines)


def parse_arguments() -> tuple[Scale, bool]:
    """The scale, and whether to compile."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="tiny models and pictures, two LoRAs, on any machine")
    parser.add_argument("--runs", type=int, help="runs that count: 5, or 1 where small")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled worker out")
    options = parser.parse_args()
    if options.small:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        job = {"width": 256, "height": 256, "steps": 1}
        dtype = torch.float16 if device == "cuda" else torch.float32
        scale = Scale("tiny", device, dtype, job, job, (1,), options.runs or 1, dict(list(SCALES.items())[:2]))
    else:
        job = {"width": 1024, "height": 1024, "steps": 24}
        picture = {"width": 512, "height": 512, "steps": 8}
        scale = Scale("full", "cuda", torch.float16, job, picture, (1, 4), options.runs or 5, SCALES)
    return scale, not options.no_compile


def main() -> None:
    """Prints the machine, the table and what stays outside the GPU's work."""
    scale, compiled = parse_arguments()
    if scale.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device here; --small runs anywhere")
    os.environ |= {"ALLOW_CPU": "1", "MAX_RESPONSE_MB": "200"}
    diffusers.utils.logging.set_verbosity_error()
    name = torch.cuda.get_device_name() if scale.device == "cuda" else "CPU"
    peak, source = peak_tflops()
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, diffusers {diffusers.__version__}"
    print(f"{name}, {peak:.0f} TFLOPS ({source}); {versions}, transformers {transformers.__version__}")
    print(f"{scale.job}, {scale.dtype}; medians of {scale.runs} runs")
    with tempfile.TemporaryDirectory() as folder:
        pipe = build_pipe(scale, Path(folder, "config"))
        files = write_loras(scale, Path(folder, "loras"))
        results = list(measure_all(scale, pipe, files, compiled))
        print(table(scale, results))
        print(measure_extras(scale))
        job_s, outside = measure_busy(scale, 4 * scale.runs if scale.size == "full" else 2)
    print(f"kept busy, the last way takes {job_s:.2f} s a job; {100 * outside:.1f} % of it is not GPU work")


if __name__ == "__main__":
    main()
