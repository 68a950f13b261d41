"""Prints the relative error of the last latents against k-diffusion, for every sampler and schedule.

    python tests/sampling_errors.py                 at 8, 24 and 50 steps, from the seed itself, float32, on the CPU
    python tests/sampling_errors.py --steps 1 150

The network is the formula of kdiffusion.Network; LCM's and DDIM's oracles are A1111's own. Rows are written as they
come: torchsde's trees take most of the time.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]
os.environ["HF_HUB_OFFLINE"] = "1"

import kdiffusion  # noqa: E402
import seams  # noqa: E402
import torch  # noqa: E402
from world import build_world  # noqa: E402


def oracle(sampler: str, schedule: str, steps: int, seeds: list[int]) -> torch.Tensor:
    """What the reference gives."""
    if sampler == "LCM":
        return kdiffusion.run_lcm(schedule, steps, seeds)
    if sampler == "DDIM":
        return kdiffusion.run_ddim(steps, seeds)
    return kdiffusion.run(sampler, schedule, steps, seeds)


def main() -> None:
    """One line a sampler and schedule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 24, 50])
    parser.add_argument("--samplers", nargs="+", default=[*kdiffusion.FUNCTIONS, "LCM", "DDIM"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ |= build_world(TESTS / ".cache").environ()
    print("| sampler | schedule |", " | ".join(f"{steps} steps" for steps in arguments.steps), "|")
    print("|---|---|" + "---|" * len(arguments.steps))
    for sampler in arguments.samplers:
        for schedule in ["Uniform"] if sampler == "DDIM" else seams.SCHEDULES:
            errors = []
            with seams.formula_engine(kdiffusion.Network()) as engine:
                for steps in arguments.steps:
                    ours = seams.denoise(engine, seams.sampling_name(sampler, schedule), steps, [7])
                    errors.append(kdiffusion.error(ours, oracle(sampler, schedule, steps, [7])))
            print(f"| {sampler} | {schedule} |", " | ".join(f"{error:.1e}" for error in errors), "|", flush=True)


if __name__ == "__main__":
    main()
