"""What tests need of handler.py beyond its contract, in one place: tests import it from here and touch nothing else.

A redesign of handler.py then has this file to mend, not the tests. tests/test_seams.py watches over it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

import handler

torch = handler.torch  # imported when it is first used: light workers start without it
TESTS = Path(__file__).resolve().parent  # the folder that models for tests are cached in


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
log = handler.log  # whose lines are read
in_background = handler.in_background  # threads whose errors come back
machine = handler.machine  # for locks and journals as if of this machine, or of another
origin = handler.origin  # what a key is bound to, of addresses that no test can serve
recorded_hash = handler.recorded_hash  # what is known of a file in place: a worker that fetches one would load it
QUICK = {"FIRST_BACKOFF_S": 0.01, "LAST_BACKOFF_S": 0.05, "LISTING_S": 30}  # seconds
QUICK |= {"SEGMENT": 1 << 18, "BLOCK": 1 << 16}
QUICK_LOCKS = {"LOCK_POLL_S": 0.02, "LOCK_BEAT_S": 0.05, "LOCK_DEAD_S": 2.0}  # seconds


def constant(name: str) -> float:
    """A constant of the store."""
    return getattr(handler, name)


def model_address(config: dict, folder: Path) -> tuple[str, str]:
    """The address that is asked for a config's file, and its version id at Civitai, "" for one from elsewhere."""
    download = handler.Download(handler.Store(handler.Settings.from_environ()), config, folder)
    return download.url, download.version


def pick_sha256(files: list[dict], size: float, query: str) -> str:
    """The hash of the listed file that a download is: listings of many kinds, without a server each."""
    return handler.Listed.of({"files": files}, size, query).sha256


def record_of(path: Path) -> Path:
    """Where the store notes what it knows of a file."""
    return path.with_name(f".{path.name}.json")


def write_record(path: Path, sha256: str | None) -> None:
    """Notes a file's stamp and hash, as after a download."""
    handler.write_record(path, path.stat(), sha256)


def sweep() -> None:
    """What every start does with leftovers of downloads."""
    handler.Store(handler.Settings.from_environ()).sweep()


WorkerError = handler.WorkerError  # the code and the sentence of a job that fails before it is run


def job_store() -> handler.Store:
    """The store of one worker's jobs: a whole job would need models that fit, and cannot be two workers."""
    return handler.Store(handler.Settings.from_environ())


def fetch_for_job(store: handler.Store, version: int, kind: str = "lora") -> Path:
    """The file of a LoRA or an embedding that a job names by its id."""
    folders = {"lora": store.settings.lora_dir, "embedding": store.settings.embedding_dir}
    return store.fetch_for_job(handler.civitai_config(str(version)), folders[kind])


def mark_of(path: Path) -> Path:
    """What tells a file that a job has brought from a configured one, and who used it last."""
    return handler.beside(path, "job")


def dead_owner() -> str:
    """The owner of leftovers whose process has ended on this machine."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return f"{handler.machine()}-{child}-{secrets.token_hex(4)}"


def read_ahead(*paths: Path) -> None:
    """Brings files into the page cache."""
    store = handler.Store(handler.Settings.from_environ())
    for path in paths:
        handler.read_ahead(path, store)


# --- the engine


def engine() -> handler.Engine:
    """The process's engine, loaded at the first use: its pipeline is what tests make fail."""
    return handler.WORKER.engine()


@contextlib.contextmanager
def engine_with_settings() -> Iterator[None]:
    """The process's engine with the settings of now, which a start would read: where jobs fetch models from."""
    before, now = handler.WORKER.engine(), settings()
    serve(dataclasses.replace(before, settings=now, store=handler.Store(now)))
    yield
    serve(before)


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
    encoder, store = handler.PromptEncoder(pipe), handler.Store(settings())
    return handler.Engine(settings(), files, pipe, stack, encoder, {}, store, pipe.scheduler.config)


def compile_unet(pipe: Any, backend: str) -> None:
    """What TORCH_COMPILE=1 does to a pipeline: the benchmark compiles the one that it built."""
    handler.compile_unet(pipe, backend)


def load_in_float16() -> None:
    """Pipelines are loaded in float16 without a GPU too, where the full size would take 22 GB."""
    build = handler.build_pipeline
    handler.build_pipeline = lambda settings, checkpoint, _: build(settings, checkpoint, torch.float16)


# --- LoRAs

adapter_names = handler.adapter_names  # which adapter a LoRA of the table is, without loading a stack

LoraStack = handler.LoraStack  # LoraStack(pipe, files).apply(scales); failed, warnings, embeddings, applied
LORA_COMPONENTS = tuple(handler.LORA_COMPONENTS)  # the models that files may change: each is tried


def changed_tensors(stack: handler.LoraStack) -> set[str]:
    """The tensors that the stack's LoRAs change, "unet.conv_in.weight"."""
    return {*stack.targets}  # set is another function here


def merge_into(layer: Any, shares: Mapping[str, tuple[Any, Any, float]], scales: Mapping[str, float]) -> None:
    """Merges plain LoRAs, adapter name -> (up, down, alpha / rank), into the weight of a single layer."""
    target = handler.Target(layer, "weight", layer.weight.detach().clone())
    for name, (up, down, scaling) in shares.items():
        target.shares[name] = handler.Share(handler.low_rank, {"up": up, "down": down}, scaling, None)
    with torch.no_grad():
        target.settle(on_gpu=False)
        handler.merge(target, scales, torch.device("cpu"))


# --- prompts

PromptEncoder = handler.PromptEncoder  # one that has seen no prompt yet, and the four tensors, which no answer shows
parse_prompt = handler.parse_prompt  # A1111's language against the oracle, thousands of texts without a picture each
split_lora_tags = handler.split_lora_tags  # as above
read_embedding = handler.read_embedding  # embeddings of any tensors, without a server and a worker for each
BadModel = handler.BadModel  # what it raises


def job_chunks(tokenizers: list[Any], prompt: str, long_prompt: str) -> list[list[Any]]:
    """How a job cuts a prompt, in pieces with their tokens: for its speed, and for the tokens of long words."""
    return handler.chunk_prompt(handler.Tokenizer(*tokenizers, special_as_text=True), prompt, long_prompt)


# --- sampling

SAMPLERS = [name for name, one in handler.SAMPLERS.items() if one.run and not name.startswith("K_")]  # k-diffusion's
SCHEDULES = list(handler.SCHEDULES)  # so that none goes untried
SAMPLING_NAMES = sorted({str(name) for name in handler.known_samplings().values()})  # what the README lists
OFFICIAL = ["PNDM", "DDIM", "K_EULER", "K_EULER_ANCESTRAL"]  # the official worker's names
OFFICIAL += ["DPMSolverMultistep", "DPMSolverSinglestep"]


def sampling_name(sampler: Any, schedule: Any = None) -> str:
    """The one name of a sampler and a schedule, however they are spelled. Raises InvalidInput."""
    return str(handler.read_sampling("scheduler", sampler, schedule))


def diffusers_scheduler(name: str, config: Any, steps: int) -> Any:
    """diffusers' own scheduler behind one of the names that stay diffusers'."""
    return handler.build_diffusers_scheduler(handler.read_sampling("scheduler", name), config, steps)


def philox_normal(seed: int, draw: int, count: int) -> torch.Tensor:
    """The draw-th float32 (count,) of a seed's numbers as CUDA draws them."""
    return torch.from_numpy(handler.philox_normal(seed, draw, count))


def drawn_ahead(draw: Callable[[int], torch.Tensor], count: int) -> tuple[Iterator[torch.Tensor], Callable[[], None]]:
    """The noise that draw(i) gives for i from 0 to count - 1, drawn in the background; what waits for its thread."""
    pool = ThreadPoolExecutor(1)
    taken = handler.drawn_ahead(pool, [lambda i, _: draw(i)], [(i, i) for i in range(count)], "cpu")
    return taken, lambda: pool.submit(int).result()


def scheduler(name: str, steps: int) -> Any:
    """The worker's own scheduler object behind a sampler's name; `noise` is where it takes its noise from."""
    return handler.SamplerAsScheduler(handler.read_sampling("scheduler", name), steps, {}, steps)


def normal_stream(rng: str, seed: int, shape: tuple[int, ...]) -> Callable[[], torch.Tensor]:
    """What draws a seed's next numbers."""
    return handler.normal_stream(rng, seed, shape)


def walk_tree(rng: str, name: str, steps: int, shape: tuple[int, ...]) -> None:
    """Draws all the noise of an image whose sampler walks a Brownian tree."""
    requests, sigmas = scheduler(name, steps).noise_requests, scheduler(name, steps).sigmas
    tree = handler.BrownianTree(rng, 1, sigmas[sigmas > 0].min().item(), sigmas.max().item(), shape)
    for request in requests:
        tree.noise(*request)


@contextlib.contextmanager
def formula_engine(network: Callable[[Any, Any], Any], **config: Any) -> Iterator[handler.Engine]:
    """The engine with a formula in the UNet's place, network(scaled x, time) -> eps or v; config: what else the
    checkpoint's scheduler knows."""
    engine = handler.WORKER.engine()
    with patch.object(engine.pipe.unet, "forward", lambda x, time, **_: (network(x, time),)):
        yield dataclasses.replace(engine, scheduler_config={**engine.scheduler_config, **config})


def denoise(
    engine: handler.Engine, name: str, steps: int, seeds: list[int], rng: str = "cpu", delta: int = 0, **stage: Any
) -> torch.Tensor:
    """The latents (n, 4, 8, 8) of the denoising loop, without guidance and on empty prompts. stage: what else is said
    of the pass: run, latents, mask."""
    request = SimpleNamespace(steps=steps, seeds=seeds, num_images=len(seeds), rng=rng)
    request.width = request.height = 64
    request.scheduler = handler.read_sampling("scheduler", name)
    request.guidance_scale, request.eta_noise_seed_delta = 1.0, delta
    config = engine.pipe.unet.config
    pooled = torch.zeros(1, config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim)
    embeds = torch.zeros(1, 77, config.cross_attention_dim)
    conditioning = handler.Conditioning(handler.Encoded(embeds, pooled, 1), handler.Encoded(None, None, 0))
    one = handler.Pass(64, 64, steps, **{"run": steps, **stage})
    return handler.denoise(engine, request, conditioning, one, lambda _: None)


def progress(**fields: Any) -> list[tuple[int, int]]:
    """The (step, steps) that an observer of a small job is told."""
    seen: list[tuple[int, int]] = []
    observer = handler.Observer()
    observer.step = lambda step, steps: seen.append((step, steps))
    handler.handler({"id": "test", "input": {"prompt": "a cat", "width": 256, "height": 256, **fields}}, observer)
    return seen[1:]  # behind the beginning


def run_and_stop(job: dict[str, Any], after_s: float) -> dict[str, Any]:
    """What becomes of a job that RunPod stops so long after its start: no answer of the kind leaves the worker."""
    end = time.monotonic() + after_s

    class Stopping(handler.Observer):
        def check(self) -> None:
            if time.monotonic() > end:
                raise handler.Stopped("stopped")

    return handler.handler(job, Stopping())


# --- a pretended GPU


def start_from(monkeypatch: pytest.MonkeyPatch, build: Callable[[], Any], check: bool) -> None:
    """Starts take the pipeline from build(), not from files of 7 GB, and read a LoRA of one content once. check: look
    through the weights, too, which takes 6 s on a pretended device."""
    read, known = handler.read_lora, {}

    def read_once(file: Path, *arguments: Any) -> handler.Lora:
        inode = file.stat().st_ino
        if inode not in known:
            known[inode] = read(file, *arguments)
        return known[inode]

    set(monkeypatch, build_pipeline=lambda *_: build(), read_lora=read_once)
    if not check:
        set(monkeypatch, check_weights=lambda _: None)


def run_watched(job: dict[str, Any], at_step: Callable[[], None]) -> dict[str, Any]:
    """A job's answer; at_step() is called when denoising begins and whenever a step was launched."""
    observer = handler.Observer()
    observer.step = lambda *_: at_step()
    return handler.handler(job, observer)


def come_out_black(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first pictures that are decoded are found black; on the pretended device no pixel has a number."""
    found = iter([True])
    set(monkeypatch, is_black=lambda pixels: torch.full((len(pixels),), next(found, False)).to(pixels.device))


# --- recipes

quick_searches = (handler.PROMPT_EDITING.search, handler.parse_prompt, handler.split_lora_tags)  # no text may be slow


def recipe_of(request: handler.JobRequest) -> str:
    """The recipe that a job's first image carries: thousands of jobs without a picture each."""
    config = settings()

    def used(kind: str, model: dict, short_hash: str, scale: float | None = None) -> handler.UsedModel:
        stem, version = Path(model["filename"]).stem, handler.version_id(model)
        return handler.UsedModel(kind, model["name"], stem, version, short_hash, scale)

    models = [used("checkpoint", config.checkpoint, "0123456789")]
    models += [used("lora", config.stack[name], "a1b2c3d4e5f6", s) for name, s in request.loras.items() if s]
    return handler.write_recipe(request, request.seed, Path(config.vae_model).name, models)


# --- images

UsedModel = handler.UsedModel  # the recipe of models that are not in the table
write_recipe = handler.write_recipe  # recipes with any prompt, without drawing a picture for each
encode_images = handler.encode_images  # files of any pixels
deliver = handler.deliver  # answers of any pixels and limit: the largest job would take minutes to draw
LOSSLESS_WEBP = handler.LOSSLESS_WEBP  # for the benchmark of what a too large answer is sent as


def encoded_chunks(pipe: Any, texts: list[str]) -> tuple[Any, list[int], Any]:
    """Chunks as a job encodes them, before they are joined: states (n, 77, D), token counts, pooled vectors (n, P)."""
    tokenize = handler.Tokenizer(pipe.tokenizer, pipe.tokenizer_2, special_as_text=True)
    with torch.inference_mode():
        chunks = [handler.chunk_prompt(tokenize, text, "truncate")[0] for text in texts]
        *states, pooled, counts = handler.encode_chunks(pipe, chunks, clip_skip=2, emphasis="no norm")
    return torch.cat(states, dim=-1), [*map(max, counts)], pooled


def blended_chunks(states: Any, counts: list[int], pooled: Any) -> tuple[Any, Any]:
    """What encoded_chunks gives, blended as a job's is: (1, 77, D), (1, P)."""
    width = states.shape[-1] - pooled.shape[-1]  # of the first encoder's states
    clip_l, clip_g = states[..., :width].clone(), states[..., width:].clone()
    encoded = handler.join_chunks(clip_l, clip_g, pooled, [(count, count) for count in counts], "blend")
    return encoded.embeds, encoded.pooled


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


# --- queue


def serve_with(run: Callable[[dict[str, Any], Any], dict[str, Any]]) -> None:
    """The worker of RunPod's queue with another job function and no models: what is measured is the queue alone."""
    handler.configure_logging()
    handler.handler, handler.warm_up = run, lambda: handler.Settings.from_environ().jobs_in_flight
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


# --- pipeline


def begin_start(settings: handler.Settings) -> Callable[[], Path]:
    """The first part of a cold start, which the benchmark times alone: files beside imports; gives the checkpoint."""
    files = handler.in_background(handler.fetch_models, settings)
    sdk = handler.in_background(handler.import_sdk)
    handler.import_libraries()
    sdk.result()
    return lambda: files.result().checkpoint


def build_pipeline(settings: handler.Settings, checkpoint: Path) -> Any:
    """The bare checkpoint's pipeline in float16, which on a machine without a GPU no start builds."""
    return handler.build_pipeline(settings, checkpoint, handler.torch.float16)


COMPILED_BLOCKS = handler.COMPILED_BLOCKS  # to count what torch.compile made


def load_engine() -> handler.Engine:
    """What a start makes of the environment: the pipeline and all that belongs to it."""
    return handler.Engine.load(handler.Settings.from_environ())


# --- pictures

UPSCALERS = list(handler.UPSCALERS)  # so that none goes untried


def passes(**fields: Any) -> list[tuple[int, int, int, int]]:
    """(width, height, steps of the schedule, steps run) of each pass of a job: the largest jobs would take hours."""
    return [
        (one.width, one.height, one.steps, one.run) for one in handler.plan_passes(parse({"prompt": "x", **fields}))
    ]


def enlarge(latents: torch.Tensor, width: int, height: int, upscaler: str) -> torch.Tensor:
    """Latents in another size, by one of the upscalers that need no pixels."""
    return handler.enlarge(None, latents, width, height, upscaler)


def is_public(address: str) -> bool:
    """Whether an address may be asked for a picture; names resolve to a few of them only."""
    return handler.is_public(address)
