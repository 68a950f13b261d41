"""Generated jobs through handler(): never an exception, always strict JSON.

python tests/test_fuzz.py --jobs 10000      the long form; pytest runs a few hundred
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import random
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import seams  # noqa: E402
from world import API_KEY, World, build_world  # noqa: E402

import handler  # noqa: E402

BASE = {"prompt": "a cat", "width": 256, "height": 256, "steps": 1}
FIELDS = [*seams.field_names(), "parameters", "Promt", "", "\ud800"]
CHEAP = {"width": 320, "height": 320, "steps": 2, "num_inference_steps": 2, "num_images": 2, "batch_size": 2}
NUMBERS = (
    *(0, 1, -1, 2, 12, 30, 75, 256, 257, 2048, 2056, 2**31, 2**32 - 1, 2**32, 2**63, 10**40, -(10**5000), 10**308),
    *(0.0, -0.0, 0.5, 1.0, 4.5, 30.0, 30.1, 1e-320, 1e308, float("nan"), float("inf"), float("-inf")),
)
TEXTS = (
    *("", " ", "a cat", "1024", "true", "null", "\0", "\ud800", "\udfff\ud800", "é" * 77, "猫" * 30, "🦦" * 40),
    *(
        "((((",
        "))))",
        "(a:9e999)",
        "(a:nan)",
        "(" * 99,
        "((a:99):99)",
        f"(a:{9**999})",
        "[",
        "\\(",
        "BREAK",
        "BREAK BREAK",
        "<lora:x:1>",
        "<lora:",
        "a" * 300,
    ),
    *("<lora:detail_tweaker_xl:1e9>", "<|endoftext|>", "word, " * 400, "\u202ertl\u202c", "../../etc/passwd", "%s%n"),
    *("x" * 10_001, "DPM++ 2M Karras", "euler a", "blend", "concat", "truncate", "PNG", "jpeg", "webp"),
)


def any_json(dice: random.Random, depth: int = 3) -> Any:
    """A JSON value of any kind, now and then as deep as a parser lets through."""
    kind = dice.random()
    if kind < 0.02:
        value: Any = 0
        for _ in range(dice.choice((50, 900))):
            value = [value] if dice.random() < 0.5 else {"a": value}
        return value
    if kind < 0.30 or depth == 0:
        return dice.choice((None, True, False, dice.choice(NUMBERS)))
    if kind < 0.60:
        return dice.choice(TEXTS)
    if kind < 0.80:
        return [any_json(dice, depth - 1) for _ in range(dice.randint(0, 4))]
    return {dice.choice((*FIELDS, "name", "scale")): any_json(dice, depth - 1) for _ in range(dice.randint(0, 4))}


def any_loras(dice: random.Random) -> list[dict[str, Any]]:
    """A list of LoRAs, right or nearly so."""
    names = (*(config["name"] for config in handler.LORA_CONFIGS), "real_skin_slider", "nobody", "")
    return [
        {"name": dice.choice(names), "scale": dice.choice((*NUMBERS, 0.3, -2, "1", None))}
        for _ in range(dice.randint(0, 3))
    ]


def any_job(dice: random.Random) -> Any:
    """Mostly a good job with some of its fields spoilt; sometimes no job at all."""
    if dice.random() < 0.1:
        return any_json(dice)
    job_input = copy.deepcopy(BASE)
    for _ in range(dice.randint(0, 3)):
        name, kind = dice.choice(FIELDS), dice.random()
        if kind < 0.1:
            job_input.pop(name, None)
        elif name == "loras" and kind < 0.8:
            job_input[name] = any_loras(dice)
        else:
            job_input[name] = dice.choice((dice.choice(NUMBERS), dice.choice(TEXTS), any_json(dice)))
    for name, most in CHEAP.items():  # what is good is run: keep it quick
        if type(job_input.get(name)) is int and 0 < job_input[name] <= 2048:
            job_input[name] = min(job_input[name], most)
    job = {"id": any_json(dice) if dice.random() < 0.1 else "fuzz", "input": job_input}
    if dice.random() < 0.05:
        job["s3Config"] = any_json(dice)
    return job


def fuzz(jobs: int, world: World, seed: int = 0) -> Counter[str]:
    """Runs the jobs; returns how many answers had which code. Raises AssertionError."""
    dice, codes = random.Random(seed), Counter()
    for n in range(jobs):
        job = any_job(dice)
        answer = handler.handler(job)
        text = json.dumps(answer, allow_nan=False, ensure_ascii=False)
        text.encode()
        if "error" in answer:
            assert set(answer) == {"error", "code"}, (n, job, answer)
            assert answer["error"] and isinstance(answer["error"], str) and len(answer["error"]) < 1000, (n, job)
            assert "generating failed with" not in answer["error"], (n, job, answer)
        else:
            assert set(answer) == {"images", "seed", "metadata"}, (n, job)
        assert not any(secret in text for secret in (API_KEY, str(world.folder), "Traceback")), (n, job, answer)
        codes[answer.get("code", "images")] += 1
    return codes


def validation_ms(jobs: int, seed: int = 1) -> float:
    """The median time that it takes to check a job."""
    dice, settings, times = random.Random(seed), seams.settings(), []
    for _ in range(jobs):
        job = any_job(dice)
        raw = job.get("input") if isinstance(job, dict) else None
        started = time.perf_counter()
        with contextlib.suppress(seams.refused()):
            seams.parse(raw, settings)
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)


def test_any_json_is_answered(pipe, world):
    """Whatever JSON a job is, handler() answers in strict JSON: images, or a sentence and a code of the contract."""
    codes = fuzz(200, world)
    assert set(codes) <= {"images", "INVALID_INPUT", "GENERATION_FAILED", "UPLOAD_FAILED"}
    assert codes["images"] > 10 and codes["INVALID_INPUT"] > 100


def test_validation_is_quick(pipe):
    """Checking a job takes less than a millisecond at the median."""
    assert validation_ms(300) < 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    world = build_world(TESTS / ".cache")
    os.environ |= world.environ()
    started = time.monotonic()
    codes = fuzz(options.jobs, world, options.seed)
    print(f"{options.jobs} jobs in {time.monotonic() - started:.0f} s: {dict(codes.most_common())}")
    print(f"validation: {validation_ms(options.jobs):.3f} ms at the median")


if __name__ == "__main__":
    main()
