"""What tests need of handler.py beyond its contract, in one place: tests import it from here and touch nothing else.

A redesign of handler.py then has this file to mend, not the tests. tests/test_seams.py watches over it.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import handler

TESTS = Path(__file__).resolve().parent


def set(monkeypatch: pytest.MonkeyPatch, **constants: Any) -> None:
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


# --- store

Settings = handler.Settings  # what a start is given
fetch_models = handler.fetch_models  # which LoRAs could not be had, and why: an answer tells them after a whole job
recorded_sha256 = handler.recorded_sha256  # what is known of a file in place
log = handler.log  # whose lines are read
in_background = handler.in_background  # threads whose errors come back
machine = handler.machine  # for locks and journals as if of this machine, or of another
pick_sha256 = handler.pick_sha256  # listings of many kinds, without a server each
origin = handler.origin  # what a key is bound to, of addresses that no test can serve
QUICK = {"FIRST_BACKOFF_S": 0.01, "LAST_BACKOFF_S": 0.05, "LISTING_S": 30}  # seconds
QUICK |= {"SEGMENT": 1 << 18, "BLOCK": 1 << 16}
QUICK_LOCKS = {"LOCK_POLL_S": 0.02, "LOCK_BEAT_S": 0.05, "LOCK_DEAD_S": 2.0}  # seconds


def tune(monkeypatch: pytest.MonkeyPatch, **constants: float) -> None:
    """Sets constants of the store for one test."""
    for name, value in constants.items():
        monkeypatch.setattr(handler, name, value)


def constant(name: str) -> float:
    """A constant of the store."""
    return getattr(handler, name)


def model_address(config: dict, folder: Path) -> tuple[str, str]:
    """The address that is asked for a config's file, and its version id at Civitai, "" for one from elsewhere."""
    download = handler.Download(handler.Store(handler.Settings.from_environ()), config, folder)
    return download.url, download.version


def record_of(path: Path) -> Path:
    """Where the store notes what it knows of a file."""
    return path.with_name(f".{path.name}.json")


def write_record(path: Path, sha256: str | None) -> None:
    """Notes a file's stamp and hash, as after a download."""
    handler.write_record(path, path.stat(), sha256)


def sweep() -> None:
    """What every start does with leftovers of downloads."""
    handler.Store(handler.Settings.from_environ()).sweep()


def dead_owner() -> str:
    """The owner of leftovers whose process has ended on this machine."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return f"{handler.machine()}-{child}-{secrets.token_hex(4)}"


def read_ahead(*paths: Path) -> Any:
    """Brings files into the page cache; .busy of what is returned is how many reads are under way."""
    readers = handler.Places(handler.FIRST_READERS)
    for path in paths:
        handler.read_ahead(path, readers)
    return readers


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


def import_libraries() -> None:
    """Imports what a pipeline needs, as a start does: the benchmark of cold starts times it alone."""
    handler.import_libraries()


def build_pipeline(settings: handler.Settings, checkpoint: Path, dtype: Any) -> Any:
    """The pipeline in host memory: the benchmark of cold starts ends where it would move to a GPU."""
    return handler.build_pipeline(settings, checkpoint, dtype)


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


# --- images

NamedModel = handler.NamedModel  # the recipe of models that are not in the table
write_recipe = handler.write_recipe  # recipes with any prompt, without drawing a picture for each
encode_images = handler.encode_images  # files of any pixels
deliver = handler.deliver  # answers of any pixels and limit: the largest job would take minutes to draw
checkpoint_hash = handler.checkpoint_hash  # of a fetched file: a worker that fetches one would have to load it
LOSSLESS_WEBP = handler.LOSSLESS_WEBP  # for the benchmark of what a too large answer is sent as


def encoded_chunks(pipe: Any, texts: list[str]) -> tuple[Any, list[int], Any]:
    """Chunks as a job encodes them, before they are joined: states (n, 77, D), token counts, pooled vectors (n, P)."""
    import torch

    read = handler.Reader(pipe.tokenizer, pipe.tokenizer_2, special_as_text=True)
    with torch.inference_mode():
        chunks = [handler.chunk_prompt(read, text, "truncate")[0] for text in texts]
        states = handler.encode_chunks(pipe, chunks, clip_skip=2)
    counts = [state.count for state in states]
    return torch.cat([state.hidden for state in states]), counts, torch.cat([state.pooled for state in states])


# --- jobs


def parse(given: Any, settings: handler.Settings | None = None) -> handler.JobRequest:
    """A job's input as the worker reads it: to see from outside that a limit is taken would cost the largest job."""
    return handler.JobRequest.parse(given, settings or handler.Settings.from_environ())


def refused() -> type[Exception]:
    """What parse and parse_prompt raise for INVALID_INPUT."""
    return handler.InvalidInput


def field_names() -> list[str]:
    """All fields of a job under all their names, so that none goes untried."""
    declared = [field for field in dataclasses.fields(handler.JobRequest) if field.metadata]
    return [name for field in declared for name in (field.name, *field.metadata["also"])]


def posted(run: Any, job: dict[str, Any]) -> tuple[bytes, bool]:
    """The body that the queue's loop posts for what `run` makes of a job, and whether the worker then ends."""
    return handler.run_to_body(run, job, handler.Observer())


# --- queue


def serve_with(run: Callable[[dict[str, Any], Any], dict[str, Any]]) -> None:
    """The worker of RunPod's queue with another job function and no models: what is measured is the queue alone."""
    handler.configure_logging()
    handler.run_job, handler.warm_up = run, lambda: handler.Settings.from_environ().jobs_in_flight
    handler.serve_queue()


def change_pipeline(change: Callable[[Any], None]) -> None:
    """Has every pipeline changed once it is built: a worker's process cannot be reached in any other way."""
    build = handler.build_pipeline

    def build_changed(*arguments: Any) -> Any:
        pipe = build(*arguments)
        change(pipe)
        return pipe

    handler.build_pipeline = build_changed


def import_sdk() -> None:
    """Imports runpod as the worker does."""
    handler.import_sdk()


def scheduler_names() -> list[str]:
    """All samplers that a job may ask for."""
    return list(dict.fromkeys([*handler.SAMPLERS, *handler.DIFFUSERS_SAMPLERS]))
