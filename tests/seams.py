"""What tests need of handler.py beyond its contract, in one place: tests import it from here and touch nothing else.

A redesign of handler.py then has this file to mend, not the tests. tests/test_seams.py watches over it.
"""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

import handler


def set(monkeypatch: pytest.MonkeyPatch, **constants: Any) -> None:  # noqa: A001 - read as seams.set
    """Other values of handler's constants for one test: seams.set(monkeypatch, NAME=value)."""
    for name, value in constants.items():
        monkeypatch.setattr(handler, name, value)


# --- settings


def settings() -> handler.Settings:
    """The settings as the environment has them: most can be told from outside only by a cold start."""
    return handler.Settings.from_environ()


def set_volume(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Another folder in /runpod-volume's place, which tests cannot make; looked for again now and after the test."""
    set(monkeypatch, VOLUME=folder)
    monkeypatch.setattr(handler, "default_cache_dir", handler.default_cache_dir.__wrapped__)


# --- the engine


def engine() -> handler.Engine:
    """The process's engine, loaded at the first use: its pipeline is what tests make fail."""
    return handler.WORKER.engine()


def gpu() -> threading.Lock:
    """The lock by which jobs take turns: holding it says when a turn begins."""
    return handler.WORKER.gpu


def serve(engine: handler.Engine | None) -> handler.Engine | None:
    """Has this engine serve the jobs; None: one that the next job loads. Returns the one before."""
    before, handler.WORKER._engine = handler.WORKER._engine, engine
    return before


def engine_around(pipe: Any, loras: dict[str, Path], stack: Any = None) -> handler.Engine:
    """An engine for a pipeline that was not loaded from files: the GPU benchmark compares several."""
    files = handler.ModelFiles(Path("none.safetensors"), loras, {})
    stack = stack or handler.LoraStack(pipe, loras)
    return handler.Engine(settings(), files, pipe, stack, handler.PromptEncoder(pipe), pipe.scheduler.config)


def compile_unet(pipe: Any, backend: str) -> None:
    """What TORCH_COMPILE=1 does to a pipeline: the benchmark compiles the one that it built."""
    handler.compile_unet(pipe, backend)


def load_in_float16() -> None:
    """Pipelines are loaded in float16 without a GPU too, where the full size would take 22 GB."""
    import torch

    build = handler.build_pipeline
    handler.build_pipeline = lambda settings, checkpoint, _: build(settings, checkpoint, torch.float16)


# --- prompts

PromptEncoder = handler.PromptEncoder  # one that has seen no prompt yet, and the four tensors, which no answer shows
parse_prompt = handler.parse_prompt  # A1111's language against the oracle, thousands of texts without a picture each
split_lora_tags = handler.split_lora_tags  # as above


def job_chunks(tokenizers: list[Any], prompt: str, long_prompt: str) -> list[list[Any]]:
    """How a job cuts a prompt, in pieces with their tokens: for its speed, and for the tokens of long words."""
    return handler.chunk_prompt(handler.Reader(*tokenizers, special_as_text=True), prompt, long_prompt)


# --- jobs


def parse(given: Any) -> handler.JobRequest:
    """A job's input as the worker reads it: a limit that is taken would cost the largest job to be seen from outside."""
    return handler.JobRequest.parse(given, settings())


def refused() -> type[Exception]:
    """What parse and parse_prompt raise for INVALID_INPUT."""
    return handler.InvalidInput


def field_names() -> list[str]:
    """All fields of a job under all their names, so that none goes untried."""
    declared = [field for field in dataclasses.fields(handler.JobRequest) if field.metadata]
    return [name for field in declared for name in (field.name, *field.metadata["also"])]


def posted(run: Any, job: dict[str, Any]) -> tuple[bytes, bool]:
    """The body that the queue's loop posts for what `run` makes of a job, and whether the worker then ends."""
    return handler.JobLoop(run, Future()).run_to_body(job, handler.Observer())


# --- images

NamedModel = handler.NamedModel  # the recipe of models that are not in the table
write_recipe = handler.write_recipe  # recipes with any prompt, without drawing a picture for each
encode_images = handler.encode_images  # files of any pixels
deliver = handler.deliver  # answers of any pixels and limit: the largest job would take minutes to draw
checkpoint_hash = handler.checkpoint_hash  # of a fetched file: a worker that fetches one would have to load it
LOSSLESS_WEBP = handler.LOSSLESS_WEBP  # for the benchmark of what a too large answer is sent as


# --- recipes

quick_searches = (handler.PROMPT_EDITING.search, handler.parse_prompt, handler.split_lora_tags)  # no text may be slow


def recipe_of(request: handler.JobRequest) -> str:
    """The recipe that a job's first image carries: thousands of jobs without a picture each."""
    config = settings()
    checkpoint = handler.NamedModel.of(config.checkpoint, "0123456789")
    loras = [handler.NamedModel.of(config.stack[n], "a1b2c3d4e5f6", s) for n, s in request.loras.items() if s]
    return handler.write_recipe(request, request.seed, Path(config.vae_model).name, checkpoint, loras)
