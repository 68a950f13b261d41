"""Host time of one denoising step, network apart: this worker's scheduler beside diffusers' of the same name.

    python tests/benchmarks/sampling.py             24 steps on latents (1, 4, 16, 16), CUDA where it is there
    python tests/benchmarks/sampling.py --side 128  the latents of 1024²

A step is scale_model_input and step, as StableDiffusionXLPipeline calls them: on CUDA the time until both are launched,
waiting included; on the CPU the thread's own time, so that a busy machine does not count. Then what drawing noise costs
beside the loop: a step's noise of one image, and all nodes of a Brownian tree.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import sys
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import diffusers  # noqa: E402
import seams  # noqa: E402
import torch  # noqa: E402
from world import SCHEDULER  # noqa: E402

STEPS, RUNS = 24, 7
clock = time.perf_counter if torch.cuda.is_available() else time.thread_time
KARRAS, SDE = {"use_karras_sigmas": True}, {"algorithm_type": "sde-dpmsolver++"}
DIFFUSERS = {
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "DPM2 Karras": ("KDPM2DiscreteScheduler", KARRAS),
    "DPM2 a Karras": ("KDPM2AncestralDiscreteScheduler", KARRAS),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", KARRAS),
    "DPM++ SDE Karras": ("DPMSolverSinglestepScheduler", KARRAS | SDE | {"lower_order_final": True}),
    "DPM++ 2M SDE Karras": ("DPMSolverMultistepScheduler", KARRAS | SDE),
    "DDIM Uniform": ("DDIMScheduler", {}),
    "LCM": ("LCMScheduler", {}),
    "LMS": (None, {}),  # diffusers' needs SciPy
    "DPM++ 2S a Karras": (None, {}),  # nor has it these two
    "DPM++ 3M SDE Karras": (None, {}),
}


def step_ms(scheduler: Any, shape: tuple[int, ...], device: str, **options: Any) -> float:
    """Milliseconds of host time a step of the schedule, the median of some runs."""
    output = torch.randn(shape, device=device)
    times = []
    for _ in range(RUNS):
        noises = [torch.randn(shape, device=device)] * 400
        if hasattr(scheduler, "noise"):
            scheduler.noise = iter(noises)
        scheduler.set_timesteps(STEPS, device=device)
        x = torch.randn(shape, device=device) * scheduler.init_noise_sigma
        timesteps = list(scheduler.timesteps)
        if device == "cuda":
            torch.cuda.synchronize()
        started = clock()
        for timestep in timesteps:
            scheduler.scale_model_input(x, timestep)
            x = scheduler.step(output, timestep, x, **options, return_dict=False)[0]
        times.append((clock() - started) * 1000 / STEPS)
    return statistics.median(times)


def draw_ms(draw: Any) -> float:
    """Milliseconds of one call, the median of some."""
    times = []
    for _ in range(RUNS):
        started = clock()
        draw()
        times.append((clock() - started) * 1000)
    return statistics.median(times)


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=16, help="of the latents")
    side = parser.parse_args().side
    shape, device = (1, 4, side, side), "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    config = diffusers.EulerDiscreteScheduler.from_config(SCHEDULER).config
    print(f"latents {shape} on {device}, ms a step of {STEPS}\n| sampler | worker | diffusers |\n|---|---|---|")
    with torch.inference_mode():
        for name, (kind, extra) in DIFFUSERS.items():
            ours = step_ms(seams.scheduler(name, STEPS), shape, device)
            theirs = "-"
            if kind:
                scheduler = getattr(diffusers, kind).from_config(config, **extra)
                takes_generator = "generator" in inspect.signature(scheduler.step).parameters
                options = {"generator": [torch.Generator().manual_seed(1)]} if takes_generator else {}
                theirs = f"{step_ms(scheduler, shape, device, **options):.3f}"
            print(f"| {name} | {ours:.3f} | {theirs} |", flush=True)
    for rng in ("cpu", "gpu"):
        one = draw_ms(seams.normal_stream(rng, 1, shape[1:]))
        tree = draw_ms(lambda rng=rng: seams.walk_tree(rng, "DPM++ 2M SDE Karras", STEPS, shape[1:]))
        print(f"rng {rng}: a step's noise {one:.2f} ms, a Brownian tree of {STEPS} steps {tree:.0f} ms, an image")


if __name__ == "__main__":
    main()
