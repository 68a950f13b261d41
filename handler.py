"""SDXL worker for RunPod serverless: Civitai checkpoint, LoRA stack, prompts of any length, images as base64 or links.

The way of a job, and the order of this file:

    configuration   models and settings; every setting is an environment variable, parsed into Settings
    errors          one class per code that a client can see
    store           Civitai or the volume -> verified files in the model store
    pipeline        files -> StableDiffusionXLPipeline on the GPU, held by an Engine with all that belongs to it
    LoRAs           LoRA files -> changes of weights, merged into them as a stack
    prompts         A1111 text -> chunks of 75 tokens -> embeddings, blended into one 77-token tensor
    sampling        noise, samplers and schedules as k-diffusion and A1111 have them -> latents
    images          pixels -> PNG, JPEG or WebP file that carries its recipe -> base64 or links
    jobs            {"input": {...}} -> checked request -> images, seed and metadata
    queue           RunPod's job loop
    entry           the command line

    python handler.py                      runs test_input.json and saves the images to OUTPUT_DIR
    python handler.py custom_input.json    the same with another job
    python handler.py --rp_serve_api       the SDK's local HTTP server; its other options work too

With RUNPOD_WEBHOOK_GET_JOB set (RunPod sets it) the same command is the serverless worker.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import difflib
import errno
import functools
import gc
import glob
import hashlib
import importlib
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import random
import re
import secrets
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from http.client import HTTPException
from itertools import accumulate, chain, count, islice, pairwise
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urljoin, urlsplit

from PIL import Image, ImageFilter, ImageOps, PngImagePlugin


class Lazy:
    """A module that is imported when one of its names is first used: torch, diffusers and runpod cost 4-7 s at a
    cold start, time in which the models are fetched."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._module), name)


torch, diffusers, transformers, runpod = Lazy("torch"), Lazy("diffusers"), Lazy("transformers"), Lazy("runpod")
np, requests, urllib3, tqdm = Lazy("numpy"), Lazy("requests"), Lazy("urllib3"), Lazy("tqdm")
safetensors, peft = Lazy("safetensors"), Lazy("peft")
aiohttp, regex, tokenizers = Lazy("aiohttp"), Lazy("regex"), Lazy("tokenizers")
boto3, botocore, rp_upload = Lazy("boto3"), Lazy("botocore"), Lazy("runpod.serverless.utils.rp_upload")

log = logging.getLogger("worker")


def in_background(function: Callable[..., Any], *args: Any) -> Future:
    """The future of function(*args), run in a daemon thread, so that a start that fails can end the process."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:  # noqa: BLE001 - it is raised again at result()
            future.set_exception(error)

    threading.Thread(target=run, name=function.__name__, daemon=True).start()
    return future


@contextmanager
def phase(what: str, *args: object) -> Iterator[None]:
    """Logs a phase of the start with its seconds; what is a format for args."""
    started = time.monotonic()
    yield
    log.info("%s: %.1f s", what % args, time.monotonic() - started)


# ---------------------------------------------------------------------------------------------------------------------
# configuration

MB = 1_000_000  # RunPod's limits count in these
MIB, GIB = 1024**2, 1024**3
CIVITAI = "https://civitai.com"
SAFETENSOR_QUERY = "type=Model&format=SafeTensor"
VOLUME = Path("/runpod-volume")  # where RunPod mounts a network volume


def civitai_url(version: int | str, query: str = SAFETENSOR_QUERY) -> str:
    """The download address of a Civitai model version."""
    return f"{CIVITAI}/api/download/models/{version}?{query}"


def civitai_config(version: str) -> dict[str, Any]:
    """The config of a model that is known by its Civitai version id alone."""
    return {"name": f"civitai_{version}", "url": civitai_url(version), "filename": f"civitai_{version}.safetensors"}


CHECKPOINT_CONFIG = {
    "name": "Jib Mix Illustrious Realistic",
    "url": civitai_url(1590699, f"{SAFETENSOR_QUERY}&size=pruned&fp=fp16"),
    "filename": "jib_mix_illustrious_realistic_v2.safetensors",
}
LORA_CONFIGS = [
    {"name": name, "url": civitai_url(version), "scale": scale, "filename": filename}
    for name, version, scale, filename in (
        ("Detail Tweaker XL", 135867, 1.5, "detail_tweaker_xl.safetensors"),
        ("Hand Detail FLUX & XL", 294259, 1.0, "hand_detail_flux_xl.safetensors"),
        ("Boring Reality primaryV3.0", 348625, 0.3, "boring_reality_v3.safetensors"),
        ("Boring Reality primaryV4.0", 348837, 0.4, "boring_reality_v4.safetensors"),
        ("epiCRealismXL-KiSS Enhancer", 1051156, 1.0, "epicrealism_xl_kiss.safetensors"),
        ("Dramatic Lighting Slider", 1242203, 1.0, "dramatic_lighting_slider.safetensors"),
        ("Pony Realism Slider", 1253021, 3.0, "pony_realism_slider.safetensors"),
        ("Amateur style - slider (Pony)", 1594293, 1.0, "amateur_style_slider.safetensors"),
        ("Real Skin Slider", 1681921, 1.0, "real_skin_slider.safetensors"),
    )
]
VAE_MODEL = "madebyollin/sdxl-vae-fp16-fix"
SDXL_CONFIG = "stabilityai/stable-diffusion-xl-base-1.0"
MAX_LORA_SCALE = 10.0
EMBEDDING_NAME = r"[\w.-]{1,100}"  # a prompt uses it as a word
VERSION_ID = "[1-9][0-9]{0,11}"  # of a model version at Civitai
# Civitai's names of model versions, urn:air:<ecosystem>:<type>:civitai:<model>@<version>; these are made for SDXL
AIR_ECOSYSTEMS = "sdxl|sdxldistilled|sdxllightning|pony|illustrious|noobai"
AIR = re.compile(rf"urn:air:(?:{AIR_ECOSYSTEMS}):(\w+):civitai:[0-9]{{1,12}}@({VERSION_ID})", re.IGNORECASE)
LORA_TYPES, EMBEDDING_TYPES = ("lora", "lycoris", "locon", "dora"), ("embedding", "textualinversion")


def version_id(config: Mapping[str, Any]) -> str:
    """The Civitai version id in a model's URL: ".../api/download/models/135867?type=Model" -> "135867"."""
    found = re.search(r"/models/(\d+)", config["url"])
    return found[1] if found else ""


def read_air(air: Any) -> tuple[str, str]:
    """Type and version id of a model for SDXL: "urn:air:sdxl:lora:civitai:1@135867" -> ("lora", "135867"); twice "" for
    anything else."""
    found = AIR.fullmatch(air) if isinstance(air, str) else None
    return (found[1].lower(), found[2]) if found else ("", "")


def sanitize_name(name: str) -> str:
    """A key for PEFT's ModuleDict, which may hold no dot: "Hand Detail FLUX & XL" -> "hand_detail_flux_xl", "" ->
    "adapter"."""
    return re.sub(r"[^0-9a-z]+", "_", name.lower()).strip("_") or "adapter"


def adapter_names(configs: list[dict[str, Any]]) -> list[str]:
    """One adapter name per config, none of them twice: "A", "a!", "a 2" -> "a", "a_2", "a_2_2"."""
    names: list[str] = []
    for name in (sanitize_name(config["name"]) for config in configs):
        numbered = chain([name], (f"{name}_{n}" for n in count(2)))
        names.append(next(one for one in numbered if one not in names))
    return names


@dataclass(frozen=True)
class Bucket:
    """Where images go when the answer is to hold URLs; the secrets stay out of every repr."""

    endpoint_url: str
    access_key_id: str = field(repr=False)
    secret_access_key: str = field(repr=False)
    name: str | None = None  # None: the SDK's own choice, the month as "11-26"


@dataclass(frozen=True)
class Settings:
    """Every setting of the worker, read from the environment and checked; the README's table explains them."""

    civitai_api_key: str = field(repr=False)
    civitai_base_url: str
    checkpoint_dir: Path
    lora_dir: Path
    embedding_dir: Path
    compile_cache_dir: Path
    checkpoint: dict[str, Any]  # as CHECKPOINT_CONFIG
    loras: list[dict[str, Any]]  # as LORA_CONFIGS
    embeddings: list[dict[str, Any]]  # the same without a scale
    job_models_bytes: int  # what models that jobs name by id may take of the store
    job_model_max_bytes: int  # the largest of them
    sdxl_config: str
    vae_model: str
    output_dir: Path
    max_response_bytes: int
    jobs_in_flight: int
    allow_cpu: bool
    torch_compile: bool
    bucket: Bucket | None

    @property
    def stack(self) -> dict[str, dict[str, Any]]:
        """The configured LoRAs by adapter name."""
        return dict(zip(adapter_names(self.loras), self.loras, strict=True))

    def adapter(self, version: str) -> str:
        """The adapter name of the LoRA with a version id: the stack's, or for one that is not in it its own."""
        return {version_id(config): name for name, config in self.stack.items()}.get(version, f"civitai_{version}")

    def allows(self, version: str) -> bool:
        """Whether a job may name a LoRA or embedding by this id."""
        return self.job_models_bytes > 0 or version in map(version_id, (*self.loras, *self.embeddings))

    @classmethod
    def from_environ(cls) -> Settings:
        """Raises SetupFailed with the setting's name, its rule and, unless it is secret, its value."""
        environ = {name: value.strip() for name, value in os.environ.items()}
        on_runpod = "RUNPOD_WEBHOOK_GET_JOB" in environ
        key, base_url = environ.get("CIVITAI_API_KEY", ""), environ.get("CIVITAI_BASE_URL") or CIVITAI
        if not re.fullmatch(r"[\x21-\x7e]*", key):  # the error of an HTTP library would quote it
            raise SetupFailed(
                "CIVITAI_API_KEY must be one word of plain ASCII; copy it again from your Civitai account page"
            )
        if not is_address(base_url):
            raise SetupFailed("CIVITAI_BASE_URL must be an address such as https://civitai.com")
        cache = Path(environ.get("MODEL_CACHE_DIR") or default_cache_dir())
        return cls(
            civitai_api_key=key,
            civitai_base_url=base_url.rstrip("/"),
            checkpoint_dir=Path(environ.get("CHECKPOINT_DIR") or cache / "checkpoints"),
            lora_dir=Path(environ.get("LORA_DIR") or cache / "loras"),
            embedding_dir=cache / "embeddings",
            compile_cache_dir=cache / "torch_compile",
            checkpoint=parse_checkpoint(environ.get("CHECKPOINT", "")),
            loras=parse_loras(environ.get("LORAS")),
            embeddings=parse_embeddings(environ.get("EMBEDDINGS", "")),
            job_models_bytes=int(parse_number(environ, "JOB_MODELS_GB", 20, 0, 100_000) * 1000 * MB),
            job_model_max_bytes=int(parse_number(environ, "JOB_MODEL_MAX_MB", 2000, 1, 100_000) * MB),
            sdxl_config=environ.get("SDXL_CONFIG") or SDXL_CONFIG,
            vae_model=environ.get("VAE_MODEL") or VAE_MODEL,
            output_dir=Path(environ.get("OUTPUT_DIR") or "output"),
            max_response_bytes=int(parse_number(environ, "MAX_RESPONSE_MB", 9.5, 0.01, 1000) * MB),
            jobs_in_flight=int(parse_number(environ, "JOBS_IN_FLIGHT", 2, 1, 16, whole=True)),
            allow_cpu=parse_switch(environ, "ALLOW_CPU", not on_runpod),
            torch_compile=parse_switch(environ, "TORCH_COMPILE", False),
            bucket=parse_bucket(environ),
        )


@functools.cache
def default_cache_dir() -> Path:
    """models/ on the network volume, else here. The volume's folder can be there without a volume that may be written
    to: RunPod keeps its own model cache below it."""
    on_volume = VOLUME / "models"
    if VOLUME.is_dir() and not on_volume.is_dir():
        try:
            on_volume.mkdir(exist_ok=True)
        except OSError as error:
            log.warning("%s cannot be written to (%s): the model store is ./models", VOLUME, error.strerror)
    return on_volume if on_volume.is_dir() else Path("models")


def is_address(text: str) -> bool:
    """Whether a text is the address of a server: scheme and host, and no user in it."""
    with suppress(ValueError):  # "http://[" has no host that could be read
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc
    return False


def quoted(text: str) -> str:
    """A setting as an error quotes it, unless it is long or an address: it may be a key, or hold one."""
    return repr(text) if re.fullmatch(r"[\w@.,+\s-]{0,24}", text) else "an address, a key or another long text"


def parse_number(
    environ: Mapping[str, str], name: str, default: float, low: float, high: float, whole: bool = False
) -> float:
    """A number within [low, high]; an empty setting is the default."""
    text, value = environ.get(name) or str(default), math.nan
    with suppress(ValueError):
        value = int(text) if whole else float(text)
    if not low <= value <= high:
        kind = "whole number" if whole else "number"
        raise SetupFailed(f"{name} must be a {kind} from {low:g} to {high:g}, got {quoted(text)}")
    return value


def parse_switch(environ: Mapping[str, str], name: str, default: bool) -> bool:
    """1 or 0, also spelled true/false, yes/no, on/off."""
    switches = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(("0", "false", "no", "off"), False)
    text = environ.get(name, "").lower()
    if text and text not in switches:
        raise SetupFailed(f"{name} must be 1 or 0, got {quoted(text)}")
    return switches.get(text, default)


def parse_checkpoint(text: str) -> dict[str, Any]:
    """CHECKPOINT, a Civitai model version id; "" is the table's checkpoint."""
    if not text or text == version_id(CHECKPOINT_CONFIG):
        return dict(CHECKPOINT_CONFIG)
    if not re.fullmatch(VERSION_ID, text):
        raise SetupFailed(f"CHECKPOINT must be a Civitai model version id such as 1590699, got {quoted(text)}")
    return civitai_config(text)


def parse_loras(text: str | None) -> list[dict[str, Any]]:
    """LORAS: None -> the table, "" -> no LoRAs, "135867@1.5,294259" -> those two at 1.5 and 1.0."""
    if text is None:
        return [dict(config) for config in LORA_CONFIGS]
    known = {version_id(config): config for config in LORA_CONFIGS}
    loras = []
    for item in filter(None, map(str.strip, text.split(","))):
        found = re.fullmatch(rf"({VERSION_ID})(?:\s*@\s*(-?[0-9]*\.?[0-9]+))?", item)
        scale = float(found[2] or 1.0) if found else math.nan
        if not abs(scale) <= MAX_LORA_SCALE:
            raise SetupFailed(
                f"LORAS must list Civitai version ids with an optional scale from -10 to 10, "
                f"such as 135867@1.5,294259; got {quoted(item)}"
            )
        loras.append({**(known.get(found[1]) or civitai_config(found[1])), "scale": scale})
    return loras


def parse_embeddings(text: str) -> list[dict[str, Any]]:
    """EMBEDDINGS: "134583@negativeXL_D,250712" -> two configs, the first with the name; the other's is the stem of its
    file's name at Civitai, which the store knows."""
    embeddings = []
    for item in filter(None, map(str.strip, text.split(","))):
        found = re.fullmatch(rf"({VERSION_ID})(?:\s*@\s*({EMBEDDING_NAME}))?", item)
        if not found:
            raise SetupFailed(
                f"EMBEDDINGS must list Civitai version ids with an optional name of letters, digits, _, - and ., "
                f"such as 134583@negativeXL_D,250712; got {quoted(item)}"
            )
        embeddings.append(civitai_config(found[1]) | ({"name": found[2]} if found[2] else {}))
    return embeddings


def parse_bucket(environ: Mapping[str, str]) -> Bucket | None:
    """The bucket, where all three BUCKET_* are set; some of them alone would lose images silently."""
    names = ("BUCKET_ENDPOINT_URL", "BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY")
    missing = [name for name in names if not environ.get(name)]
    if missing and len(missing) < len(names):
        raise SetupFailed(f"a bucket needs all of {', '.join(names)}; missing: {', '.join(missing)}")
    if not missing and not is_address(environ[names[0]]):
        raise SetupFailed(f"{names[0]} must be an address such as https://s3.eu-central-1.amazonaws.com")
    return None if missing else Bucket(*(environ[name] for name in names))


# ---------------------------------------------------------------------------------------------------------------------
# errors


class WorkerError(Exception):
    """A failure with a code of its own. The message goes to the client: no path, key or traceback in it. detail is for
    the log alone: paths, and what a library said."""

    code = "GENERATION_FAILED"
    refresh_worker = False

    def __init__(self, message: str, *, detail: object = None) -> None:
        super().__init__(message)
        self.detail = "" if detail is None else f" ({detail})"  # no exception: its frames hold a job's tensors


class InvalidInput(WorkerError):
    """The caller's fault; nothing was run."""

    code = "INVALID_INPUT"


class SetupFailed(WorkerError):
    """A setting is wrong, or the models could not be made ready; a fresh worker may do better."""

    code = "SETUP_FAILED"
    refresh_worker = True


class DownloadError(SetupFailed):
    """A model file could not be fetched, or what came is not the file."""


class DownloadFailed(WorkerError):
    """What a job names by its address cannot be had; the worker stays usable."""

    code = "DOWNLOAD_FAILED"


class OutOfMemory(WorkerError):
    """The job did not fit into the GPU's memory; the worker stays usable."""

    code = "OUT_OF_MEMORY"


class GenerationFailed(WorkerError):
    """Anything else that went wrong while generating."""


class GpuLost(GenerationFailed):
    """A CUDA error after which the process can no longer be trusted."""

    refresh_worker = True


class UploadFailed(WorkerError):
    """The bucket refused the image, or the job's s3Config has pieces missing."""

    code = "UPLOAD_FAILED"


class Stopped(WorkerError):
    """RunPod has cancelled the job or let it time out: nobody is told its answer."""

    code = "STOPPED"


class BadModel(Exception):
    """Why a model's file cannot be used, in words for a client."""


def failure_answer(failure: WorkerError) -> dict[str, Any]:
    """What a client gets: {"error": sentence, "code": code}, and refresh_worker where the worker must be replaced."""
    answer = {"error": str(failure), "code": failure.code}
    return answer | {"refresh_worker": True} if failure.refresh_worker else answer


def is_out_of_memory(error: BaseException) -> bool:
    """torch raises OutOfMemoryError for its own allocator alone; NumPy, cuDNN and cuBLAS say it in words. cuBLAS says
    NOT_INITIALIZED where its own start found no memory."""
    signs = ("out of memory", "can't allocate memory", "CUDNN_STATUS_ALLOC_FAILED")
    signs += ("CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


def explain(error: Exception) -> WorkerError:
    """The failure that a client sees for what a job raised."""
    if isinstance(error, WorkerError):
        return error
    if is_out_of_memory(error):
        return OutOfMemory("the job did not fit into memory: ask for fewer or smaller images", detail=error)
    if "CUDA error" in str(error) or gpu_is_lost():
        return GpuLost("the GPU failed during the job; the worker is being replaced: send the job again", detail=error)
    return GenerationFailed(f"generating failed with {type(error).__name__}; the worker's log says more", detail=error)


def gpu_is_lost() -> bool:
    """After a CUDA error that is sticky, such as an illegal address, every later call of the process fails too."""
    try:
        if torch.cuda.is_available():
            torch.ones(1, device="cuda").item()
    except RuntimeError as error:
        return not is_out_of_memory(error)  # full of other jobs' tensors, but alive
    return False


# ---------------------------------------------------------------------------------------------------------------------
# store

USER_AGENT = "sdxl-worker/1.0"  # Civitai leads what looks like a browser to a login page, and tells others 401
SEGMENT, BLOCK = MIB, MIB // 4  # bytes that a mark stands for; bytes a read
CONNECTIONS = 24  # of all files together; Civitai's CDN caps each far below what a data centre's line carries
STALL_S, LISTING_S = 30.0, 5.0  # STALL_S is also what a block may take
TRIES, FEW_TRIES, ONE_TRY = 8, 3, 1  # in a row, without progress
FIRST_BACKOFF_S, LAST_BACKOFF_S = 1.0, 30.0
PATIENCE_S, JOB_PATIENCE_S = 300.0, 60.0  # RunPod gives a start 7 minutes; a client of /runsync waits 90 s for its job
LOCK_BEAT_S, LOCK_POLL_S, LOCK_DEAD_S = 5.0, 1.0, 40.0  # changed and looked at so often; unchanged for so long is dead
REPORT_S, HEADER_BYTES = 5.0, 32
FIRST_READERS, SPARE_READERS, READ_BYTES, SLOW_READ_S = 2, 6, 32 * MIB, 0.25  # 32 MiB in 0.25 s are 134 MB/s
WRONG_HASH = "has another SHA256 than the published file"
REFUSALS = dict.fromkeys((401, 403), "set CIVITAI_API_KEY to a valid key; an early-access model must be bought first")
REFUSALS |= {404: "check the version id", 410: "its creator or Civitai removed it", 451: "not served in this region"}


@dataclass(frozen=True)
class ModelFiles:
    """What the model store holds after a cold start: LoRAs by adapter name, embeddings by the name that a prompt uses;
    of those that could not be had, why."""

    checkpoint: Path
    loras: dict[str, Path]
    failed: dict[str, str]  # of the LoRAs
    embeddings: dict[str, Path] = field(default_factory=dict)
    embeddings_failed: dict[str, str] = field(default_factory=dict)


def fetch_models(settings: Settings) -> ModelFiles:
    """All configured models, fetched side by side where they are not in place. Raises DownloadError for the checkpoint,
    and where the files do not fit together; a LoRA or embedding that cannot be had is left out."""
    store = Store(settings)
    store.sweep()
    store.downloads = [*store.configured]
    wait([in_background(download.look) for download in store.downloads], timeout=10)  # seconds
    with disk_errors(store.downloads[0]):
        store.check_space()
    checkpoint, *others = [in_background(download.ensure) for download in store.downloads]
    files = ModelFiles(store.downloads[0].path, {}, {}, {}, {})
    named = [("LoRA", name, files.loras, files.failed) for name in settings.stack]
    named += [("embedding", one["name"], files.embeddings, files.embeddings_failed) for one in settings.embeddings]
    with progress(store.downloads):
        checkpoint.result()  # without it nothing else matters
        for (kind, name, there, failed), future in zip(named, others, strict=True):
            try:
                path = future.result()
            except DownloadError as error:
                failed[name] = str(error)
                log.warning("%s %s is left out: %s%s", kind, name, error, error.detail)
                continue
            if kind == "embedding" and name == path.stem:  # civitai_<id>: the setting gives no name
                name = listed_name(path) or name
            taken = name.lower() in map(str.lower, there)
            there[path.stem if taken else name] = path
    return files


def setup_models() -> tuple[Path, dict[str, Path]]:
    """Makes the configured models ready: the checkpoint's path, and adapter name -> LoRA path of those to be had."""
    files = fetch_models(Settings.from_environ())
    return files.checkpoint, files.loras


def ensure_model_exists(config: dict[str, Any], model_dir: Path) -> Path:
    """The path of the config's file in model_dir, fetched where it is missing or unusable. Raises DownloadError.
    config: {"name", "url", "filename"}, and "sha256" where the file must have it."""
    store = Store(Settings.from_environ())
    return store.ensure(Download(store, config, Path(model_dir)))


def download_file(url: str, filepath: Path) -> None:
    """Fetches a file, from Civitai or any other server, whether or not one is in place already. Raises DownloadError;
    filepath never holds a partial or wrong file."""
    store, path = Store(Settings.from_environ()), Path(filepath)
    download = Download(store, {"name": path.name, "url": url, "filename": path.name}, path.parent)
    with suppress(OSError):  # there is none, or the store cannot be used, which ensure says
        download.outdated = path.stat().st_ino
    store.ensure(download)


class Store:
    """The folders of model files, and what their downloads share: HTTP, connections, space on the disk.

    Beside a file <name> lie, all hidden: .<name>.json, what is known of it; .<name>.lock, while a worker fetches it;
    the files of a Part; and that of a JobFile. Several workers may use one folder.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings, self.base_url, self.key = settings, settings.civitai_base_url, settings.civitai_api_key
        self.connections = threading.Semaphore(CONNECTIONS)
        self.readers, self.spare_readers = threading.Semaphore(FIRST_READERS), threading.Semaphore(SPARE_READERS)
        self.session = requests.Session()
        self.session.headers.update({"User-Agent": USER_AGENT, "Accept-Encoding": "identity"})
        self.session.auth = lambda request: request  # else a .netrc would replace the key
        for scheme in ("https://", "http://"):
            self.session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=CONNECTIONS))
        self.user, self.making_room = f"{machine()}-{os.getpid()}-jobs", threading.Lock()
        folders = [(settings.checkpoint, settings.checkpoint_dir)]
        folders += [(config, settings.lora_dir) for config in settings.loras]
        folders += [(config, settings.embedding_dir) for config in settings.embeddings]
        self.configured = [Download(self, config, folder) for config, folder in folders]
        self.downloads: list[Download] = []  # that share the space

    def ensure(self, download: Download) -> Path:
        """Download.ensure with its progress; for many threads at once."""
        self.downloads.append(download)
        try:
            with progress([download]):
                return download.ensure()
        finally:
            self.downloads.remove(download)

    def fetch_for_job(self, config: dict[str, Any], folder: Path) -> Path:
        """The path of a model that a job names by its version id, fetched where it is not in place; for many threads
        at once. It is to be read at once: the file goes when another job's needs its room. Raises InvalidInput where
        the limits or Civitai's listing refuse it for its folder, DownloadFailed where it cannot be had."""
        for known in LORA_CONFIGS:  # whose file has a name of its own
            if version_id(known) == version_id(config) and (folder / known["filename"]).exists():
                config = known
        download = Download(self, config, folder)
        download.patience_s = JOB_PATIENCE_S
        try:
            with disk_errors(download), self.making_room:
                file = JobFile.read(download.path)
                by_another_endpoint = not file and download.path.exists()  # one that shares the store has configured it
                download.of_job = not by_another_endpoint and all(download.path != one.path for one in self.configured)
                if file:  # note the use, but make no new mark: a start that configures the file deletes it
                    with suppress(OSError), beside(download.path, "job").open("r+") as mark:
                        mark.write(f"{self.user} {file.size}\n")
            with disk_errors(download):
                in_place = not download.problem()
            return download.path if in_place else self.ensure(download)
        except DownloadError as error:
            failure = DownloadFailed(str(error))
            failure.detail = error.detail
            raise failure from error

    def admit(self, download: Download, kind: str) -> None:
        """Makes room for a job's file, which its mark keeps from now on: of the idle ones that jobs have brought the
        least recently used go. kind: its model's type at Civitai, "" where unknown. Raises InvalidInput for another
        than its folder holds and for a file too large, DownloadFailed where its size is unknown or there is no room."""
        path, size, limit = download.path, download.source.size, self.settings.job_models_bytes
        wanted = ("LORA", "LoCon", "DoRA") if path.parent == self.settings.lora_dir else ("TextualInversion",)
        if kind not in ("", "Other", *wanted):
            raise InvalidInput(f"{download} must be a {' or '.join(wanted)}, but Civitai lists it as {kind}")
        if size == math.inf:
            raise DownloadFailed(f"{download} cannot be downloaded: the server does not tell how large it is")
        for name, most in {"JOB_MODEL_MAX_MB": self.settings.job_model_max_bytes, "JOB_MODELS_GB": limit}.items():
            if size > most:
                raise InvalidInput(
                    f"{download} has {size / MB:.1f} MB; {name} allows at most {most / MB:.1f} MB in a job"
                )
        with self.making_room:
            write_whole(path, "job", f"{self.user} {size}\n")
            now = beside(path, "job").stat().st_mtime  # by the file server's clock
            marks = chain(*(one.glob(".*.job") for one in {self.settings.lora_dir, self.settings.embedding_dir}))
            files = [file for mark in marks if (file := JobFile.read(mark.with_name(mark.name[1:-4])))]
            idle = sorted(file for file in files if file.path != path and file.is_idle(self.user, now))
            excess = sum(file.size for file in files) - limit
            if excess > sum(file.size for file in idle):
                beside(path, "job").unlink()
                raise DownloadFailed(
                    f"{download} needs {size / MB:.0f} MB, but models in use take up what JOB_MODELS_GB allows; "
                    f"try later, or set more than {limit / MB:.0f} MB"
                )
            excess = max(excess, size - free_disk_bytes(path.parent))  # a full one has less room than is allowed
            for file in idle:
                if excess > 0:
                    file.delete()
                    excess -= file.size

    def sweep(self) -> None:
        """Deletes what downloads left that nobody will resume: the file is not configured any more, or in place, and
        their worker has ended here, or was silent for a day."""
        settings, wanted = self.settings, {download.path for download in self.configured}
        folders = {settings.checkpoint_dir, settings.lora_dir, settings.embedding_dir}
        for file in chain(*(sorted(folder.glob(".*")) for folder in folders)):
            found = re.fullmatch(r"\.(.+?)\.(?:\w+\.part|\w+\.journal|job|lock)", file.name)
            path = file.with_name(found[1]) if found else file
            if not found or (path.exists() if file.suffix == ".job" else path in wanted and not path.exists()):
                continue
            with suppress(OSError), tempfile.TemporaryFile(dir=file.parent) as probe:
                silent_s = os.fstat(probe.fileno()).st_mtime - file.stat().st_mtime  # by the file server's clock
                if silent_s > 24 * 3600 or is_gone(StoreLock(path).read()):
                    file.unlink()  # the lock, which says who the worker was, is the last in order
                    log.info("%s is left of a download that nobody resumes: deleted", file.name)

    def check_space(self) -> None:
        """Refuses what does not fit together, by what each file still needs. Raises DownloadError."""
        volumes: dict[int, tuple[Path, dict[Download, float]]] = {}
        sized = {one.path: one for one in self.downloads if one.source.size != math.inf and not one.fetched}
        for download in sized.values():  # one a file, which several may be for
            missing = download.source.size
            for file in (download.path, *left_of(download.path)):  # parts are resumed or deleted, a file is replaced
                with suppress(FileNotFoundError):
                    missing -= file.stat().st_blocks * 512
            folder = next(folder for folder in download.path.parents if folder.exists())  # more would be made
            volumes.setdefault(folder.stat().st_dev, (folder, {}))[1][download] = max(0, missing)
        for folder, missing_bytes in volumes.values():
            first, *others = missing_bytes
            needed, free = sum(missing_bytes.values()), free_disk_bytes(folder)
            if needed > free:
                raise DownloadError(
                    f"{first} {f'and {len(others)} more need' if others else 'needs'} {needed / MB:.0f} MB, but the "
                    f"model store has {free / MB:.0f} MB free: take a larger network volume, or another MODEL_CACHE_DIR"
                )

    def get(self, url: str, byte_range: str = "", stall_s: float | None = None) -> Any:
        """The open response at the end of at most 5 redirects, to https or this very machine alone; the key goes to
        Civitai's origin alone. Raises Fault."""
        options = {"allow_redirects": False, "stream": True, "timeout": (10, stall_s or STALL_S)}  # seconds
        for _ in range(6):
            with network_faults():
                at_home = self.key and origin(url) == origin(self.base_url)
                headers = {"Range": f"bytes={byte_range}"} if byte_range else {}
                headers |= {"Authorization": f"Bearer {self.key}"} if at_home else {}
                response = self.session.get(url, headers=headers, **options)
                if not response.is_redirect:
                    return response
                response.close()
                url = urljoin(url, response.headers["location"])
                scheme, host, _ = origin(url)
            loopback = re.fullmatch(r"localhost|127(\.\d{1,3}){3}|::1", host or "")
            if scheme != "https" and not (scheme == "http" and loopback):
                raise Fault("the server redirects to an address without encryption", ONE_TRY)
        raise Fault("the server redirects in circles", FEW_TRIES)

    def said_by_civitai(self, response: Any) -> str:
        """Civitai's message, after ": ": one short line without markup, addresses or the key; "" where it has none."""
        if origin(response.url) != origin(self.base_url):
            return ""
        try:
            answer = json.loads(read_body(response, MIB, LISTING_S))
            said = answer.get("message") or answer.get("error")
        except (Fault, ValueError, AttributeError):  # it is no JSON, or no object
            return ""
        if not isinstance(said, str) or re.search(r"<\s*[a-z!/]", said, re.IGNORECASE):
            return ""
        said = said.replace(self.key, "…") if self.key else said
        said = re.sub(r"\S*(://|www\.|\.\w+/)\S*", "…", said)
        said = " ".join("".join(c if c.isprintable() else " " for c in said).split())
        return f": {said[:200]}" if said else ""


@contextmanager
def progress(downloads: list[Download]) -> Iterator[None]:
    """Shows how far downloads are together, once one has begun: a bar on a terminal, a line every REPORT_S in a log."""
    ended, terminal = threading.Event(), sys.stderr if sys.stderr.isatty() else None
    options = {"unit": "B", "unit_scale": True, "leave": False, "delay": 0.1}  # no bar where nothing is fetched
    line = None if terminal else "{desc}: {percentage:.0f} % of {total_fmt}B, {rate_fmt}, {remaining} left"

    def report() -> None:
        next_line = time.monotonic() + REPORT_S
        with tqdm.tqdm(desc="models", file=terminal or io.StringIO(), bar_format=line, **options) as bar:
            while not ended.wait(0.1):
                parts = [download.part for download in downloads if download.part]
                bar.total = sum(part.expected for part in parts)
                bar.update(sum(part.came for part in parts) - bar.n)
                if bar.total and not terminal and time.monotonic() > next_line:
                    log.info("%s", bar)
                    next_line += REPORT_S

    in_background(report)
    try:
        yield
    finally:
        ended.set()


def read_ahead(path: Path, store: Store) -> None:
    """Brings a file into the page cache by large reads, which nobody waits for: two at a time, up to eight where every
    read waits for a server. Two fill a local disk, where more would keep the imports from it.

    from_single_file maps the file: page by page it comes five times as slowly from a cold local disk, and far worse
    from a network volume.
    """
    offsets = iter(range(0, path.stat().st_size, READ_BYTES))  # which the threads share

    def read_all() -> None:
        for offset in offsets:
            with store.readers:
                started = time.monotonic()
                try:
                    with path.open("rb", buffering=0) as file:
                        os.preadv(file.fileno(), [bytearray(MIB)] * (READ_BYTES // MIB), offset)  # all the same memory
                except OSError as error:
                    log.warning("%s cannot be read ahead at byte %d: %s", path.name, offset, error.strerror)
                if time.monotonic() - started > SLOW_READ_S and store.spare_readers.acquire(blocking=False):
                    store.readers.release()  # one more at a time from now on

    for _ in range(FIRST_READERS + SPARE_READERS):
        in_background(read_all)


def free_disk_bytes(folder: Path) -> float:
    """What still fits onto the folder's volume; inf where a network file system does not tell."""
    volume = os.statvfs(folder)
    return volume.f_bavail * volume.f_frsize if volume.f_blocks else math.inf


def beside(path: Path, kind: str) -> Path:
    """The hidden file of a kind beside a model's file: "x.safetensors", "lock" -> ".x.safetensors.lock"."""
    return path.with_name(f".{path.name}.{kind}")


def left_of(path: Path) -> list[Path]:
    """What downloads of a file have left beside it: parts and journals."""
    return [file for file in path.parent.glob(f".{glob.escape(path.name)}.*") if file.suffix in (".part", ".journal")]


def write_whole(path: Path, kind: str, text: str) -> None:
    """Writes the hidden file of a kind beside a model's file, whole or not at all."""
    temporary = beside(path, f"{secrets.token_hex(8)}.journal")  # which is swept as one after a kill
    temporary.write_text(text)
    temporary.replace(beside(path, kind))


def read_record(path: Path) -> tuple[str | None, str, bool]:
    """A file's recorded hash, if any, its name at Civitai, "" where unknown, and whether it is untouched since: both
    times are the file server's."""
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):  # there is none that can be read
        stat, record = path.stat(), json.loads(beside(path, "json").read_bytes())
        untouched = (record["size"], record["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns)
        return record["sha256"], str(record.get("name", "")), untouched
    return None, "", False


def write_record(path: Path, stat: os.stat_result, sha256: str | None, name: str = "") -> None:
    """Notes a file's stamp, hash and name at Civitai."""
    record = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256, "name": name}
    write_whole(path, "json", json.dumps(record))


def recorded_hash(path: Path, digits: int = 10) -> str:
    """The first digits, in lower case, of the SHA256 that a file had when it was fetched or checked; "" where it was
    touched since, put there by hand, or has gone. A1111 shows 10 of a checkpoint's and 12 of an embedding's."""
    sha256, _, untouched = read_record(path)
    return sha256[:digits] if sha256 and untouched else ""


def listed_name(path: Path) -> str:
    """The stem of a fetched file's name at Civitai, as a word of a prompt: "negativeXL_D"; "" where it is unknown."""
    return re.sub(r"[^\w.-]+", "_", Path(read_record(path)[1]).stem)[:100]


@dataclass(frozen=True, order=True)
class JobFile:
    """A model that no configuration but a job has brought. The mark beside it, .<name>.job, holds "<user> <bytes>", and
    its time is that of the last use."""

    used: float  # seconds, by the file server's clock
    path: Path
    user: str  # the last, named as the owner of a lock is
    size: int  # which takes up room before the first byte is there

    @classmethod
    def read(cls, path: Path) -> JobFile | None:
        """The file's mark; None where it has none."""
        with suppress(FileNotFoundError):
            used, text = beside(path, "job").stat().st_mtime, beside(path, "job").read_text(errors="replace")
            found = re.match(r"(\S+) (\d+)\n", text)
            return cls(used, path, found[1], int(found[2])) if found else cls(used, path, "", path.stat().st_size)
        return None

    def is_idle(self, user: str, now: float) -> bool:
        """Whether no worker fetches it, and none but the user's may be reading it: jobs read theirs at once, so two
        minutes are enough. now: by the file server's clock."""
        lock = StoreLock(self.path)
        with suppress(FileNotFoundError):
            if now - lock.file.stat().st_mtime < LOCK_DEAD_S and not is_gone(lock.read()):
                return False
        return self.user == user or is_gone(self.user) or now - self.used > 120

    def delete(self) -> None:
        """Its mark goes last: a file without one counts as configured."""
        log.info("%s makes room for other models of jobs: deleted", self.path.name)
        for file in (self.path, *left_of(self.path), beside(self.path, "json"), beside(self.path, "job")):
            file.unlink(missing_ok=True)


def content_problem(path: Path, name: str) -> str:
    """Why a file cannot be a model, "" where it can. A safetensors header tells the size of the whole file."""
    if not name.endswith(".safetensors"):
        return "" if path.stat().st_size else "is empty"
    try:
        with safetensors.safe_open(path, framework="np"):
            return ""
    except (safetensors.SafetensorError, OSError):
        return "is no whole safetensors file"


@dataclass(frozen=True)
class Listed:
    """What Civitai lists of a file."""

    sha256: str = ""  # lower case
    name: str = ""  # "negativeXL_D.safetensors"
    kind: str = ""  # of its model: "LORA", "TextualInversion", "Checkpoint"

    @classmethod
    def of(cls, listing: dict[str, Any], size: float, query: str) -> Listed:
        """The listed file that a download of `size` bytes is. A version may hold training data and other precisions
        too: the exact size tells, then what the URL asked for, then Civitai's own choice."""
        wanted, model = dict(parse_qsl(query)), listing.get("model") or {}

        def fit(file: dict[str, Any]) -> tuple[bool, bool, int, bool]:
            metadata = file.get("metadata") or {}
            asked = sum(metadata.get(name) == value for name, value in wanted.items())
            same_size = abs(file.get("sizeKB", 0) * 1024 - size) < 1
            return same_size, file.get("type") == wanted.get("type"), asked, bool(file.get("primary"))

        file = max((file for file in listing["files"] if (file.get("hashes") or {}).get("SHA256")), key=fit, default={})
        kind = re.fullmatch(r"\w{1,40}", str(model.get("type") or ""))  # clients read it
        return cls(file["hashes"]["SHA256"].lower() if file else "", str(file.get("name", "")), kind[0] if kind else "")


# what can go wrong


class Fault(Exception):
    """Why a file's bytes do not come, and how many tries in a row that is worth."""

    def __init__(self, reason: str, tries: int = TRIES, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.tries, self.wait_s = tries, wait_s


class WrongFile(Exception):
    """What came is not the file that was asked for."""


@contextmanager
def network_faults() -> Iterator[None]:
    """Turns what the HTTP libraries raise into Fault. Their texts quote signed links, so only the type is kept."""
    try:
        yield
    except ValueError as error:  # InvalidURL and its like, in a configured address or a redirect's
        raise Fault("its address is not a valid URL", ONE_TRY) from error
    except (requests.Timeout, urllib3.exceptions.TimeoutError):
        raise Fault("the server sent nothing for too long") from None
    except (OSError, urllib3.exceptions.HTTPError) as error:  # RequestException is an OSError
        raise Fault(f"the connection failed ({type(error).__name__})") from None


@contextmanager
def disk_errors(what: object) -> Iterator[None]:
    """Turns what the file system refuses into DownloadError, its path for the log alone."""
    try:
        yield
    except OSError as error:
        advice = "the model store cannot be used: check MODEL_CACHE_DIR, CHECKPOINT_DIR and LORA_DIR"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # RunPod's volumes say EDQUOT with space left
            advice = "the model store is full, or its quota is used up: take a larger network volume"
        raise DownloadError(f"{what} cannot be stored, {advice}", detail=error) from error


def read_body(response: Any, size: int, seconds: float) -> bytes:
    """The next `size` bytes of a body; fewer at its end alone. Raises Fault, also for a body that drips for longer,
    without a pause that a timeout sees."""
    blocks, deadline = [], time.monotonic() + seconds
    read = getattr(response.raw, "read1", response.raw.read)  # urllib3 1 has no read1
    with network_faults():
        while size and (block := read(size, decode_content="content-encoding" in response.headers)):
            blocks.append(block)
            size -= len(block)
            if size and time.monotonic() > deadline:
                raise Fault("the server sent too little for too long")
    return b"".join(blocks)


def origin(url: str) -> tuple[str, str | None, int | None]:
    """Scheme, host and port, which a key is bound to: "https://civitai.com/a?b" -> ("https", "civitai.com", 443)."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def tag_of(response: Any) -> str:
    """What changes with a file: its ETag, else its date."""
    return response.headers.get("etag") or response.headers.get("last-modified", "")


# one worker at a time


@functools.cache
def machine() -> str:
    """The running kernel and its PID namespace: where a process id means one process. Random where neither shows."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
        return f"{boot}{Path('/proc/self/ns/pid').stat().st_ino:x}"
    return secrets.token_hex(8)


def is_gone(owner: str) -> bool:
    """Whether a lock's owner has surely ended: a process of this machine, of another one nothing is sure."""
    found = re.match(r"(\w+)-(\d+)-\w+", owner)
    return bool(found) and found[1] == machine() and not Path(f"/proc/{found[2]}").exists()


class StoreLock:
    """One worker at a time fetches a file; `with` waits for its turn.

    The lock is a file made with O_EXCL, which network file systems keep where flock silently does nothing. Its owner
    writes a beat into it: one whose beat has not changed for LOCK_DEAD_S of our own clock is dead. Where O_EXCL does
    nothing either, several write the same bytes into one part, and the result is still right.
    """

    def __init__(self, path: Path) -> None:
        self.file, self.owner = beside(path, "lock"), f"{machine()}-{os.getpid()}-{secrets.token_hex(4)}"
        self.released = threading.Event()

    def __enter__(self) -> StoreLock:
        seen, since = "", time.monotonic()
        while True:
            with suppress(FileExistsError):
                descriptor = os.open(self.file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
                os.write(descriptor, f"{self.owner} 0".encode())
                in_background(self.beat, descriptor)
                return self
            beat = self.read()
            if is_gone(beat) or (beat == seen and time.monotonic() - since > LOCK_DEAD_S):
                log.warning("%s: the worker that was fetching the file is gone; taking over", self.file.name)
                if self.read() == beat:  # else it is another's by now
                    self.file.unlink(missing_ok=True)
                continue
            if not seen:
                log.info("%s: another worker is fetching it; waiting", self.file.name)
            if beat != seen:
                seen, since = beat, time.monotonic()
            time.sleep(LOCK_POLL_S)

    def __exit__(self, *_: object) -> None:
        self.released.set()
        if self.read().startswith(self.owner):
            self.file.unlink(missing_ok=True)

    def beat(self, descriptor: int) -> None:
        """Shows that this worker lives. Through the open file: a lock taken from us is another's file."""
        beats, failed = count(1), False
        while not self.released.wait(LOCK_BEAT_S):
            try:
                os.pwrite(descriptor, f"{self.owner} {next(beats)}".encode(), 0)
                os.fsync(descriptor)  # a network file system shows it to others now
            except OSError as error:  # a full disk, a stale handle: it may pass before others take the lock for dead
                if not failed:
                    log.warning("%s: its beat cannot be written: %s", self.file.name, error.strerror)
                failed = True
        os.close(descriptor)

    def read(self) -> str:
        """The lock's owner and beat; "" where it has gone."""
        with suppress(FileNotFoundError):
            return self.file.read_text(errors="replace")
        return ""


class Part:
    """The bytes of a file that have come, segment by segment, and marks of them that survive `kill -9`.

    .<name>.<identity>.part      the bytes, in their place
    .<name>.<identity>.journal   the machine that they came on, then a byte for each segment: 1 where it has come

    The identity tells a file's bytes from those of others, so whoever fetches the same ones goes on with the same part,
    and workers that do so at once, where locks do nothing, do each other no harm.
    """

    def __init__(self, path: Path, size: float, identity: str, hashed: bool) -> None:
        """hashed: whether a hash will find lost writes; else bytes of another machine, or from before this one's crash,
        do not count."""
        self.path, self.size, self.hashed = path, size, hashed
        self.data, self.journal = (beside(path, f"{identity}.{kind}") for kind in ("part", "journal"))
        self.segments = 0 if size == math.inf else -(-size // SEGMENT)
        self.begun: dict[int, int] = {}  # segment -> where its next byte goes
        self.lock, self.ended = threading.Lock(), threading.Event()  # all has come, or the download was given up
        self.came = 0

    def __enter__(self) -> Part:
        """Opens the part with what has come before, and deletes what is left of other bytes."""
        kept, header = {self.data, self.journal} & set(left_of(self.path)), machine().encode().ljust(HEADER_BYTES)
        if len(kept) < 2 or not (self.hashed or self.journal.read_bytes().startswith(header)):
            kept = set()
        for file in set(left_of(self.path)) - kept:
            file.unlink(missing_ok=True)
        if not kept:
            self.journal.write_bytes(header)
        self.data.touch()
        # open until the last thread that uses this part lets go of it: a number closed earlier could be another file's
        self.marks, self.bytes = self.journal.open("r+b", buffering=0), self.data.open("r+b", buffering=0)
        marks, held = self.marks.read()[HEADER_BYTES:], os.fstat(self.bytes.fileno()).st_size
        self.done = {n for n, mark in enumerate(marks[: self.segments]) if mark == 1 and self.end(n) <= held}
        self.todo = deque(segment for segment in range(self.segments) if segment not in self.done)
        self.expected = sum(self.end(segment) - segment * SEGMENT for segment in self.todo)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Leaves the bytes to the next try, but for those of a wrong file or on a full disk."""
        self.ended.set()
        if kind and issubclass(kind, WrongFile | OSError) and kind is not FileNotFoundError:
            for file in (self.data, self.journal):
                file.unlink(missing_ok=True)

    def check_ours(self) -> None:
        """Raises FileNotFoundError where locks do nothing and another worker has published or replaced this part: we
        would write into its file, or check another's."""
        if not os.path.samestat(os.fstat(self.bytes.fileno()), self.data.stat()):
            raise FileNotFoundError(self.data)

    def end(self, segment: int) -> int:
        """Where a segment ends."""
        return min((segment + 1) * SEGMENT, self.size)

    def take(self) -> deque[int]:
        """Segments for one request; the fewer the less is left, so that all connections end at about the same time."""
        self.check_ours()
        with self.lock:
            longest = min(max(len(self.todo) // (2 * CONNECTIONS), 1), 32)
            run: deque[int] = deque()
            while self.todo and len(run) < longest and (not run or self.todo[0] == run[-1] + 1):
                run.append(self.todo.popleft())
            return run

    def write(self, segment: int, at: int, block: bytes) -> None:
        """Puts a block into its place. With its last the segment is marked: a kill before costs no more than that."""
        view = memoryview(block)
        with self.lock:  # the kernel lets one thread at a time write to a file, and has the others spin
            if self.ended.is_set():
                raise Fault("the download was given up")
            while view:
                written = os.pwrite(self.bytes.fileno(), view, at)
                at, view = at + written, view[written:]
            self.begun[segment] = at
            self.came += len(block)
            if at == self.end(segment):
                os.pwrite(self.marks.fileno(), b"\1", HEADER_BYTES + segment)
                self.done.add(segment)
                if len(self.done) == self.segments:
                    self.ended.set()

    def sha256(self) -> str:
        """The hash of the whole file, made segment by segment as they come."""
        digest, segment = hashlib.sha256(), 0
        while segment * SEGMENT < self.size:
            given_up = self.ended.is_set()
            if segment in self.done:
                digest.update(os.pread(self.bytes.fileno(), SEGMENT, segment * SEGMENT))
                segment += 1
            elif given_up:
                break
            else:
                time.sleep(0.01)
        return digest.hexdigest()

    def publish(self, sha256: str, name: str) -> None:
        """Gives the file its name (one lost in a crash leaves the part), with every byte on the disk before. name: the
        one at Civitai."""
        os.fsync(self.bytes.fileno())
        write_record(self.path, os.fstat(self.bytes.fileno()), sha256, name)
        self.data.replace(self.path)
        for file in left_of(self.path):
            file.unlink(missing_ok=True)


@dataclass(frozen=True)
class Source:
    """Where a file's bytes come from, as the server describes it."""

    link: str = ""  # "": nobody has asked yet
    size: float = math.inf  # bytes; inf where the server does not tell
    tag: str = ""
    whole: Any = None  # the open response with the whole file, where the server has no ranges


class Download:
    """One file: what it is called, where it comes from and goes, and its way into the store.

    Not by hf_transfer: 0.1.9 resumes nothing, holds the GIL throughout, and takes a wrong answer for the file.
    """

    def __init__(self, store: Store, config: Mapping[str, Any], folder: Path) -> None:
        self.store, self.name, self.path = store, config["name"], folder / config["filename"]
        self.url = re.sub(r"^https?://(www\.)?civitai\.com(?=/)", lambda _: store.base_url, config["url"])
        self.version = version_id(config) if self.url.startswith(f"{store.base_url}/") else ""  # "": from elsewhere
        self.sha256 = (config.get("sha256") or "").lower()  # that the file must have whatever Civitai says
        self.source, self.renewing = Source(), threading.Lock()
        self.part: Part | None = None  # of the last try
        self.fetched = False
        self.outdated = 0  # the inode of a file that is to be replaced, whatever it is
        self.patience_s, self.of_job = PATIENCE_S, False  # of_job: no configuration but a job asks for it

    def __str__(self) -> str:
        return f"{self.name} (Civitai model version {self.version})" if self.version else self.name

    def problem(self) -> str:
        """Why the file in place cannot be used, "" where it can. One that was touched since it was recorded, or put
        there by hand, is checked: by its header, and by its hash where one is known."""
        if not self.of_job:  # it is no job's file any more, which would go for the next
            with suppress(OSError):
                beside(self.path, "job").unlink()
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            return "is missing"
        if stat.st_ino == self.outdated:
            return "is to be replaced"
        recorded, listed, untouched = read_record(self.path)
        expected = self.sha256 or recorded
        if untouched and recorded == expected:
            return ""
        if problem := content_problem(self.path, self.path.name):
            return problem
        if expected:
            with self.path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    return WRONG_HASH
        with suppress(OSError):  # a volume may be read-only
            write_record(self.path, stat, expected, listed)
        return ""

    def look(self) -> None:
        """Asks for the size of a file that is not in place. What is raised here will be so again at ensure."""
        if self.problem():
            self.source = self.ask()

    def ensure(self) -> Path:
        """The path of the file, fetched where it is not in place. Raises DownloadError; of a job's file what
        Store.admit raises, too."""
        with disk_errors(self):
            while not self.fetched and self.problem():
                self.take_turn()
            if not self.fetched:  # what was fetched is in the page cache
                read_ahead(self.path, self.store)
        return self.path

    def take_turn(self) -> None:
        """Fetches the file with patience, unless another worker has done so while this one waited. What comes and fails
        its checks is thrown away and fetched once more, then refused."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with StoreLock(self.path) as lock:
            if self.path.exists() and not self.outdated and (problem := self.problem()):
                log.warning("%s: the file in place %s: fetching it again", self, problem)
                self.path.unlink()
            self.progressed(math.inf)
            refused = False
            while not self.fetched and self.problem():
                try:
                    self.fetch(lock)
                except Fault as fault:
                    time.sleep(self.backoff_s(fault))
                except WrongFile as wrong:
                    log.warning("%s: what came %s", self, wrong)
                    if refused and self.problem():  # where locks do nothing, another worker may have brought it
                        raise DownloadError(f"{self} was refused: what came {wrong}, twice") from wrong
                    refused = True
                    self.progressed(math.inf)
                except FileNotFoundError:  # where locks do nothing, others publish or delete our part
                    log.warning("%s: another worker has taken it over", self)
                    time.sleep(LOCK_POLL_S)
                    break
            if not self.fetched and not self.problem():  # by another worker: our part is in vain
                for file in left_of(self.path):
                    file.unlink(missing_ok=True)

    def progressed(self, left: float) -> None:
        """Bytes came, and so many are left to come: faults count from here again."""
        self.faults, self.deadline, self.left = 0, time.monotonic() + self.patience_s, left

    def backoff_s(self, fault: Fault) -> float:
        """Seconds to wait before the next try. Raises DownloadError after enough tries in a row, and after patience_s
        without a byte."""
        self.faults += 1
        backoff = min(FIRST_BACKOFF_S * 2 ** (self.faults - 1), LAST_BACKOFF_S) * random.uniform(0.5, 1)
        wait_s = fault.wait_s or backoff
        if self.faults >= fault.tries or time.monotonic() + wait_s > self.deadline:
            raise DownloadError(f"{self} cannot be downloaded: {fault}", detail=f"after {self.faults} tries") from None
        log.warning("%s: %s; trying again in %.1f s", self, fault, wait_s)
        return wait_s

    def fetch(self, lock: StoreLock) -> None:
        """The file from the first request to its name. Raises WrongFile, Fault, FileNotFoundError where another
        worker has taken it over, and what check_space and admit raise."""
        started = time.monotonic()
        # 1. where it is, how long it is, and what hash it must have
        if self.part or self.source.whole or not self.source.link:  # what look has learnt serves once
            self.source = self.ask()
        source = self.source
        listed = Listed() if self.sha256 else self.look_up(source.size)
        expected = self.sha256 or listed.sha256
        known_by = f"{urlsplit(self.url).path} {source.size} {source.tag}"
        if source.whole:  # a stream without ranges cannot be resumed, and its part is of no use to another
            known_by = secrets.token_hex()
        identity = hashlib.sha256(f"{known_by} {SEGMENT}".encode()).hexdigest()[:16]
        # 2. room for it, and what others left of it
        if self.of_job:
            self.store.admit(self, listed.kind)
        self.store.check_space()
        with Part(self.path, source.size, identity, bool(expected)) as part:
            self.part = part
            hashing = in_background(part.sha256)
            # 3. the bytes
            if source.whole:
                self.fetch_whole(part)
            else:  # over many connections, up to the first error that no new link cures
                connections = [in_background(self.fetch_runs, part) for _ in range(min(len(part.todo), CONNECTIONS))]
                for ended in wait(connections, return_when=FIRST_EXCEPTION).done:
                    ended.result()
            # 4. checks, and its name
            part.check_ours()
            if problem := content_problem(part.data, self.path.name):
                raise WrongFile(problem)
            if expected and hashing.result() != expected:
                raise WrongFile(WRONG_HASH)
            if not lock.read().startswith(lock.owner):
                raise FileNotFoundError(lock.file)
            part.publish(hashing.result(), listed.name)
        self.fetched, seconds = True, time.monotonic() - started
        note = "SHA256 verified" if expected else "no SHA256 to verify it by"
        log.info("%s: %.1f MB in %.1f s, %s", self, part.size / MB, seconds, note)

    def ask(self) -> Source:
        """Follows the URL to where the bytes are. Civitai refuses HEAD, so this asks for one byte. Raises Fault."""
        response = self.store.get(self.url, "0-0")
        self.check_status(response)
        if response.status_code == 200:
            length = response.headers.get("content-length", "")
            return Source(response.url, int(length) if length.isdecimal() else math.inf, tag_of(response), response)
        response.close()
        found = re.fullmatch(r"bytes 0-0/(\d+)", response.headers.get("content-range", ""))
        if not found:
            raise Fault("the server described a range wrongly", FEW_TRIES)
        return Source(response.url, int(found[1]), tag_of(response))

    def check_status(self, response: Any) -> None:
        """Raises Fault for an answer without the file's bytes; only what may pass is worth many tries."""
        status, said = response.status_code, f"the server answered {response.status_code}"
        if status in (200, 206):
            if response.headers.get("content-type", "").startswith("text/html"):
                raise Fault("a web page came instead of the file; check CIVITAI_API_KEY", FEW_TRIES)
            if response.headers.get("content-encoding", "identity") != "identity":
                raise Fault("the file came compressed, which was not asked for", FEW_TRIES)
        elif status == 429 or status >= 500:
            wait_s = None
            with suppress(urllib3.exceptions.InvalidHeader):
                wait_s = urllib3.util.Retry().get_retry_after(response.raw)
            raise Fault(f"{said}; try later", wait_s=wait_s or 0.0)
        elif origin(response.url) != origin(self.url):
            raise Fault(f"{said} to the link that Civitai gave", FEW_TRIES)
        else:
            said += f"{self.store.said_by_civitai(response)}; {REFUSALS.get(status, 'it refuses the request')}"
            raise Fault(said, FEW_TRIES if status == 404 else ONE_TRY)

    def look_up(self, size: float) -> Listed:
        """What Civitai's listing tells of the file of `size` bytes; nothing where it cannot be had."""
        for _ in range(2 if self.version else 0):
            try:
                url = f"{self.store.base_url}/api/v1/model-versions/{self.version}"
                with self.store.get(url, stall_s=LISTING_S) as response:
                    if response.status_code != 200:
                        raise Fault(f"it answered {response.status_code}{self.store.said_by_civitai(response)}")
                    body = read_body(response, 16 * MIB, LISTING_S)
                return Listed.of(json.loads(body), size, urlsplit(self.url).query)
            except Fault as fault:
                why = str(fault)
            except ValueError:
                found = body.strip()[:1]
                why = "a web page came" if found == b"<" else "what came is no JSON" if found else "its answer is empty"
            except (LookupError, TypeError, AttributeError):
                why = "its listing has not the form that is known"
            log.warning("%s: Civitai tells no hash: %s", self, why)
        return Listed()

    def fetch_whole(self, part: Part) -> None:
        """The bytes in one stream, from a server without ranges."""
        at = segment = 0
        with self.store.connections, self.source.whole as response:
            while at == segment * SEGMENT and at < part.size:
                at = self.receive(response, part, segment)
                segment += 1
        if part.size == math.inf:
            part.size = at
            part.write(segment - 1, at, b"")  # marks it
        if at < part.size:
            raise Fault("the server ended the file early")

    def fetch_runs(self, part: Part) -> None:
        """Fetches runs of segments as long as there are any; after a fault by a new link."""
        while not part.ended.is_set() and (run := part.take()):
            try:
                with self.store.connections:
                    source = self.source
                    self.fetch_run(part, run, source)
            except Fault as fault:
                with part.lock:
                    part.todo.extendleft(reversed(run))
                self.renew(part, source, fault)

    def fetch_run(self, part: Part, run: deque[int], source: Source) -> None:
        """One request for a run of segments, from where an earlier one was cut off; those that come leave the run."""
        start = part.begun.get(run[0], run[0] * SEGMENT)
        with self.store.get(source.link, f"{start}-{part.end(run[-1]) - 1}") as response:
            self.check_status(response)
            described = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("content-range", ""))
            if not described or (int(described[1]), int(described[2])) != (start, source.size):
                raise Fault("the server ignored a range")
            if tag_of(response) != source.tag:
                raise Fault("the server sent another file")
            while run:
                at = self.receive(response, part, run[0])
                if at < part.end(run[0]):
                    raise Fault("the server ended a range early")
                run.popleft()

    def receive(self, response: Any, part: Part, segment: int) -> int:
        """Takes a segment's bytes from a body; where they end, short of the segment's end where the body ends."""
        at, end = part.begun.get(segment, segment * SEGMENT), part.end(segment)
        while at < end and (block := read_body(response, size := min(BLOCK, end - at), STALL_S)):
            part.write(segment, at, block)
            at += len(block)
            left = part.expected - part.came
            if left < self.left and len(block) == size:  # else it came before, or drips
                self.progressed(left)
        return at

    def renew(self, part: Part, source: Source, fault: Fault) -> None:
        """Waits after a fault and asks for a new link, until there is one, be it by another connection that failed.
        Raises WrongFile where it leads to another file."""
        with self.renewing:
            while self.source is source and not part.ended.is_set():
                if part.ended.wait(self.backoff_s(fault)):
                    return
                try:
                    found = self.ask()
                except Fault as again:
                    fault = again
                    continue
                if found.whole:
                    raise Fault("the server has stopped serving ranges")
                if (found.size, found.tag) != (source.size, source.tag):
                    raise WrongFile("has changed in mid-download")
                self.source = found


# ---------------------------------------------------------------------------------------------------------------------
# pipeline

# part of a tensor's name -> what a file with it is; an SDXL checkpoint has none of these
OTHER_CHECKPOINTS = {
    "edm_mean": "a Playground 2.5 model (EDM)",
    "edm_vpred.": "a CosXL model (EDM, v-prediction)",
    "conditioner.embedders.0.model.": "an SDXL refiner",
    "cond_stage_model.transformer.": "a Stable Diffusion 1.5 model",
    "cond_stage_model.model.": "a Stable Diffusion 2 model",
    "joint_blocks.": "a Stable Diffusion 3 model",
    "double_blocks.": "a Flux model",
    "double_layers.": "an AuraFlow model",
    "lora_": "a LoRA",
    "hada_": "a LoRA (LoHa)",
    "lokr_": "a LoRA (LoKr)",
    "down_blocks.": "in diffusers' layout, not in the single-file one",
}
UNET_KEY = "model.diffusion_model."
TEXT_ENCODER_KEYS = ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")

# GPU memory, counted on a pretended device of full size (tests/memory.py); live tensors alone, in float16
DENOISE_BYTES = 316  # a pixel and image, both prompts in one batch; the prompts' length hardly counts
VAE_BYTES = 1_536  # a pixel, one image after the other; tiles are of 1024 x 1024. Encoding takes a sixth less
SPARE_BYTES = GIB  # beside what is counted: CUDA's workspaces, and blocks that are not where they are needed
JOB_BYTES = 6 * GIB  # stays free for jobs beside the LoRAs' originals: four pictures of 2048 x 2048, and SPARE_BYTES
UNTILED_PIXELS = 1_500_000  # of one picture, on the CPU
COMPILED_BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")  # 70 and 17 of them do nearly all of the UNet's work


@contextmanager
def as_setup_failure(message: str) -> Iterator[None]:
    """Turns what a library raises while the models load into SetupFailed, with this message or, out of memory, with
    what to choose instead."""
    try:
        yield
    except WorkerError:
        raise
    except Exception as error:  # libraries raise all kinds, diffusers some of its own
        if is_out_of_memory(error):
            message = "the models do not fit into memory: choose a GPU with at least 16 GB, or fewer or smaller LORAS"
        elif "meta tensor" in str(error) or type(error).__name__ == "SingleFileComponentError":
            # which torch and diffusers raise where the file has no weight
            message = "the checkpoint is no whole SDXL model: some of its weights are missing; set another CHECKPOINT"
        raise SetupFailed(message, detail=f"{type(error).__name__}: {error}") from error


@dataclass
class Engine:
    """What draws: the pipeline and all that belongs to it. One a process; jobs share it."""

    settings: Settings
    files: ModelFiles
    pipe: Any  # StableDiffusionXLPipeline: float16 on CUDA, float32 on CPU
    stack: LoraStack
    encoder: PromptEncoder
    embeddings: dict[str, Embedding]  # the configured ones by name
    store: Store  # which fetches what jobs name by id
    scheduler_config: Mapping[str, Any]  # the checkpoint's own, which every job's scheduler is built from

    @classmethod
    @as_setup_failure("the models could not be made ready")
    def load(cls, settings: Settings) -> Engine:
        """Fetches the models, builds the pipeline and merges the configured LoRA stack. Raises SetupFailed
        (DownloadError where a file could not be had)."""
        fetching = in_background(fetch_models, settings)  # beside the imports, which take 4-7 s
        if settings.torch_compile:  # what it compiles goes to the model store, for later workers; read at the import
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(settings.compile_cache_dir))
            os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "1")
        with phase("imports"):
            device = choose_device(settings)
            import_libraries()
        files = fetching.result()
        dtype = torch.float16 if device == "cuda" else torch.float32
        scheduler_config = read_checkpoint(files.checkpoint)
        with phase("checkpoint and VAE"):
            pipe = build_pipeline(settings, files.checkpoint, dtype)
        with phase("LoRA files"):
            embeddings = {}
            for name, path in files.embeddings.items():
                try:
                    embeddings[name] = read_embedding(name, path, pipe)
                except BadModel as reason:
                    files.embeddings_failed[name] = str(reason)
                    log.warning("embedding %s is left out: %s (%s)", name, reason, path)
            stack = LoraStack(pipe, files.loras)
            stack.failed.update(files.failed)
        with phase("move to %s", device), as_setup_failure("the models could not be moved to the GPU"):
            models = (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
            resident_bytes = sum(m.get_memory_footprint() for m in models) + VAE_BYTES * 1024**2 + SPARE_BYTES
            if device == "cuda" and torch.cuda.mem_get_info()[0] < resident_bytes:
                for model in models:
                    keep_host_weights(model)
                pipe.enable_model_cpu_offload()  # each model is on the GPU only while it works
            else:
                pipe.to(device)
        check_weights(pipe)
        with phase("merging the LoRA stack"), as_setup_failure("the LoRA stack could not be merged"):
            stack.apply({name: config["scale"] for name, config in settings.stack.items()})
        in_background(lambda: list(map(addnet_hash, files.loras.values())))  # ahead of the first recipe
        if settings.torch_compile:
            compile_unet(pipe)
        scheduler_config = {**pipe.scheduler.config, **scheduler_config}
        return cls(settings, files, pipe, stack, PromptEncoder(pipe), embeddings, Store(settings), scheduler_config)


def load_pipeline() -> Any:
    """The ready StableDiffusionXLPipeline, its LoRA stack merged at the configured scales. Raises SetupFailed."""
    return Engine.load(Settings.from_environ()).pipe


def choose_device(settings: Settings) -> str:
    """ "cuda" where two small matrices can be multiplied on it, so that a GPU without kernels for it (Blackwell), or a
    broken one, is told before the models are there; "cpu" where the settings allow it. Raises SetupFailed."""
    if not torch.cuda.is_available():
        if settings.allow_cpu:
            return "cpu"
        raise SetupFailed(
            "no CUDA device was found: choose a GPU that CUDA 11.8 supports, or set ALLOW_CPU=1 for a slow run "
            "without one",
            detail=f"torch {torch.__version__}, CUDA {torch.version.cuda}",
        )
    try:
        ones = torch.ones(64, 64, dtype=torch.float16, device="cuda")
        if (ones @ ones).eq(64).all():
            return "cuda"
        cause: object = "wrong result"
    except RuntimeError as error:
        cause = error
    raise SetupFailed("the GPU does not work: choose one that CUDA 11.8 supports (up to Hopper)", detail=cause)


def import_libraries() -> None:
    """Imports what a pipeline needs, without garbage collection: what 3,000 modules make while they are imported stays
    for good, and looking through it again and again takes a seventh of their time."""
    gc.disable()
    try:
        _ = diffusers.StableDiffusionXLPipeline, diffusers.AutoencoderKL  # diffusers imports a class when it is named
    finally:
        gc.enable()
    # progress bars of the libraries' own loading steps would stand between the log's lines
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    # it would list each scale of a float8 checkpoint as unused; missing weights are told all the same
    logging.getLogger("diffusers.loaders.single_file_model").setLevel(logging.ERROR)


def read_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint's header says that its scheduler must know: prediction_type and rescale_betas_zero_snr, by the
    tensors `v_pred` and `ztsnr` or the metadata. Raises SetupFailed for a file that cannot be run, before it is loaded,
    and says what it is."""
    with (
        as_setup_failure("the checkpoint cannot be read: delete it, and it is fetched again"),
        safetensors.safe_open(checkpoint, framework="pt") as file,
    ):
        names, metadata = set(file.keys()), file.metadata() or {}
        first = f"{UNET_KEY}input_blocks.0.0.weight"
        channels = file.get_slice(first).get_shape()[1] if first in names else 4
    kind = next((kind for sign, kind in OTHER_CHECKPOINTS.items() if any(sign in name for name in names)), "")
    parts = {"UNet": UNET_KEY, "first text encoder": TEXT_ENCODER_KEYS[0], "second text encoder": TEXT_ENCODER_KEYS[1]}
    missing = [part for part, key in parts.items() if not any(name.startswith(key) for name in names)]
    if not kind and channels != 4:
        kind = "an SDXL inpainting model" if channels == 9 else f"an SDXL model that takes {channels} channels"
    if not kind and missing:
        kind = f"a file without {' and '.join(missing)}"
    if kind:
        raise SetupFailed(f"the checkpoint is {kind}, which cannot be run here: set CHECKPOINT to an SDXL checkpoint")
    predicts_v = "v_pred" in names or metadata.get("modelspec.prediction_type", "").lower().startswith("v")
    config: dict[str, Any] = {"prediction_type": "v_prediction"} if predicts_v else {}
    return config | ({"rescale_betas_zero_snr": True} if "ztsnr" in names else {})


def check_weights(pipe: Any) -> None:
    """Raises SetupFailed where the checkpoint or the VAE holds NaN or infinite numbers, which would
    make every image black."""
    for component in ("unet", "text_encoder", "text_encoder_2", "vae"):
        weights = dict(getattr(pipe, component).named_parameters())
        bounds = torch.stack([torch.stack(weight.detach().aminmax()).float() for weight in weights.values()])
        finite = bounds.isfinite().all(1).tolist()
        if not all(finite):
            name = list(weights)[finite.index(False)]
            what = "VAE" if component == "vae" else "checkpoint"
            raise SetupFailed(f"the {what} is damaged: its {component} holds NaN or infinite numbers, in {name}")


def build_pipeline(settings: Settings, checkpoint: Path, dtype: Any) -> Any:
    """The bare checkpoint's pipeline, in host memory."""
    with as_setup_failure("the VAE could not be loaded: check VAE_MODEL"):
        vae = diffusers.AutoencoderKL.from_pretrained(settings.vae_model, torch_dtype=dtype)
    if vae.config.force_upcast:  # the original SDXL VAE overflows in float16
        vae.float()
    with as_setup_failure(
        "the checkpoint could not be loaded: check that CHECKPOINT is an SDXL model, and SDXL_CONFIG"
    ):
        pipe = diffusers.StableDiffusionXLPipeline.from_single_file(
            str(checkpoint), config=settings.sdxl_config, vae=vae, torch_dtype=dtype, add_watermarker=False
        )
        scale_float8(pipe, checkpoint)
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty(), desc="denoising")
    return pipe


def keep_host_weights(model: Any) -> None:
    """Has an offloaded model go back from the GPU to the host tensors that it came from: nothing changes them
    meanwhile, and accelerate 1.9 would copy 5 GB of them after each job."""
    kind, held = type(model), []

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        target = str(args[0]) if args else ""
        with torch.inference_mode(False):  # or the weights could not be written to afterwards
            if target == "cpu":
                for module, name, weight, data in held:
                    weight.data, module._parameters[name] = data, weight
                held.clear()
            elif target.startswith("cuda") and not held and self.device.type == "cpu":
                for module in self.modules():
                    parameters = module.named_parameters(recurse=False)
                    held.extend((module, name, weight, weight.data) for name, weight in parameters)
        return kind.to(self, *args, **kwargs)

    model.__class__ = type(kind.__name__, (kind,), {"to": to})  # accelerate removes a `to` of the model's own


def scale_float8(pipe: Any, checkpoint: Path) -> None:
    """Multiplies the weights of a scaled float8 checkpoint by their `scale_weight`, which diffusers leaves out."""
    with safetensors.safe_open(checkpoint, framework="pt") as file:
        scales = {name: file.get_tensor(name) for name in file.keys() if name.endswith(".scale_weight")}  # noqa: SIM118
    if not scales:
        return
    layers = {f"{UNET_KEY}{original}": f"unet.{name}" for name, original in ldm_names(pipe.unet).items()}
    layers |= {f"{TEXT_ENCODER_KEYS[0]}{name}": f"text_encoder.{name}" for name, _ in pipe.text_encoder.named_modules()}
    for name, scale in scales.items():
        layer = layers.get(name.removesuffix(".scale_weight"))
        if layer is None and name.startswith("first_stage_model."):  # its VAE is not used
            continue
        if layer is None:
            raise SetupFailed(f"the checkpoint has scaled float8 weights that cannot be read here, such as {name}")
        weight = attrgetter(layer)(pipe).weight
        weight.data = (weight.data.float() * scale.float()).to(weight.dtype)


def compile_unet(pipe: Any, backend: str = "inductor") -> None:
    """Compiles the UNet's repeated blocks and runs a step, so that no job waits for it. Raises SetupFailed.

    Blocks of one shape share their code. All sizes are symbols in it: other resolutions, batches and prompts of 77 * n
    tokens run the same code, and so does another LoRA stack. Only a batch of one (one image at guidance_scale 1)
    is compiled anew when it first comes.
    """
    torch._dynamo.config.cache_size_limit = 64  # two shapes of transformer, twelve of ResNet; the default is 8
    pipe.unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor2_0())  # one object, or none share
    blocks = [block for block in pipe.unet.modules() if type(block).__name__ in COMPILED_BLOCKS]
    for block in blocks:
        block.compile(dynamic=True, backend=backend)
    try:
        with phase("torch.compile of %d blocks", len(blocks)), torch.inference_mode():  # the mode that jobs run in
            # equal sizes would share a symbol: a square image would be compiled for squares
            pipe("", width=1216, height=832, num_inference_steps=1, output_type="latent")
    except RuntimeError as error:
        raise SetupFailed("torch.compile failed on this machine: unset TORCH_COMPILE", detail=error) from error


# latents to and from pixels; a latent stands for 8 x 8 of them

# the modes of torch's interpolate, and whether it smooths before it makes smaller; None goes by way of pixels
UPSCALERS: dict[str, tuple[str, bool] | None] = {
    "latent": ("bilinear", False),
    "latent (antialiased)": ("bilinear", True),
    "latent (bicubic)": ("bicubic", False),
    "latent (bicubic antialiased)": ("bicubic", True),
    "latent (nearest)": ("nearest", False),
    "latent (nearest-exact)": ("nearest-exact", False),
    "lanczos": None,
}


def decode(pipe: Any, latents: Any) -> list[Any]:
    """Latents (n, 4, h/8, w/8) -> n PIL images. Raises GenerationFailed where one stays black."""
    area = latents[0, 0].numel() * pipe.vae_scale_factor**2
    pixels = through_vae(pipe, "decoding", decode_pixels, latents, area, is_black)
    # made contiguous before the one copy to the host, which else would go number by number
    pixels = pixels.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()  # (n, h, w, 3)
    return [Image.fromarray(image) for image in pixels]


def encode(pipe: Any, images: list[Any]) -> Any:
    """n PIL images of one size -> float32 latents (n, 4, h/8, w/8). Raises GenerationFailed where they stay NaN."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))  # (n, h, w, 3), a byte a number
    pixels = pixels.to(pipe._execution_device).permute(0, 3, 1, 2).float() / 255
    return through_vae(pipe, "encoding", encode_pixels, pixels, pixels[0, 0].numel(), has_nan)


def enlarge(pipe: Any, latents: Any, width: int, height: int, upscaler: str) -> Any:
    """Latents (n, 4, …) as those of pictures of width x height pixels, by one of UPSCALERS."""
    if UPSCALERS[upscaler] is None:
        images = [image.resize((width, height), Image.Resampling.LANCZOS) for image in decode(pipe, latents)]
        return encode(pipe, images)
    mode, antialias = UPSCALERS[upscaler]
    return torch.nn.functional.interpolate(latents, (height // 8, width // 8), mode=mode, antialias=antialias)


def through_vae(
    pipe: Any, doing: str, convert: Callable[[Any, Any], Any], batch: Any, area: int, is_bad: Callable[[Any], Any]
) -> Any:
    """convert(pipe, batch), one picture of `area` pixels after the other, large ones in tiles.

    What is bad of the result, (n,) by is_bad, is converted again in float32: fp16 VAEs overflow on some pictures, and
    diffusers would return a black image with a RuntimeWarning only. Raises GenerationFailed where it stays so.
    """
    vae = pipe.vae
    vae.use_slicing = len(batch) > 1
    choose_tiling(pipe, area)
    result = convert(pipe, batch)
    bad = is_bad(result)
    if bad.any():
        log.warning("%d of %d images came out black: %s again in float32", bad.sum(), len(bad), doing)
        dtype = vae.dtype
        try:
            vae.to(torch.float32)  # inside: without memory it ends half-way
            choose_tiling(pipe, area)
            result[bad] = convert(pipe, batch[bad])
        finally:
            vae.to(dtype)  # float16 -> float32 -> float16 loses nothing
        if is_bad(result).any():
            raise GenerationFailed(
                "the image came out black or with NaN, in float32 too: try another seed, prompt or picture"
            )
    return result


def decode_pixels(pipe: Any, latents: Any) -> Any:
    """Latents (n, 4, h/8, w/8) -> float32 pixels (n, 3, h, w) in 0..1, NaN kept."""
    coded = latents / pipe.vae.config.scaling_factor
    pixels = pipe.vae.decode(coded.to(pipe.vae.dtype), return_dict=False)[0]
    pixels = pixels.nan_to_num(nan=math.nan, posinf=math.nan, neginf=math.nan)  # the clamp to 0..1 would hide overflow
    return pipe.image_processor.denormalize(pixels).float()


def encode_pixels(pipe: Any, pixels: Any) -> Any:
    """Float32 pixels (n, 3, h, w) in 0..1 -> float32 latents, the mode of the VAE's posterior: no draw of its own."""
    coded = pipe.vae.encode((pixels * 2 - 1).to(pipe.vae.dtype)).latent_dist.mode()
    return coded.float() * pipe.vae.config.scaling_factor


def choose_tiling(pipe: Any, area: int) -> None:
    """Whether the VAE works in tiles: where a whole picture of `area` pixels does not fit, since the seams of tiles can
    be seen, and overlapping they take a third more time."""
    whole = area <= UNTILED_PIXELS
    if pipe._execution_device.type == "cuda":
        whole = VAE_BYTES * area * pipe.vae.dtype.itemsize / 2 + SPARE_BYTES <= free_gpu_bytes(pipe.vae)
    pipe.vae.enable_tiling(not whole)


def free_gpu_bytes(model: Any) -> int:
    """What a job's tensors can take while this model works; offloading brings its weights to the GPU first."""
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return free if model.device.type == "cuda" else free - model.get_memory_footprint()


def check_memory(pipe: Any, request: JobRequest) -> None:
    """Raises OutOfMemory for a job that surely does not fit, before anything is run; what is counted leaves out CUDA's
    own needs, so that no job is refused that would fit."""
    if pipe._execution_device.type != "cuda":
        return
    last, free, free_to_decode = plan_passes(request)[-1], free_gpu_bytes(pipe.unet), free_gpu_bytes(pipe.vae)
    pixels, size = last.width * last.height, f"{last.width}x{last.height}"
    image_bytes = DENOISE_BYTES * pixels * (1 if request.guidance_scale > 1 else 0.5)
    tile_bytes = VAE_BYTES * min(pixels, 1024**2)
    if tile_bytes > free_to_decode:
        raise OutOfMemory(
            f"to decode an image of {size} takes {tile_bytes / GIB:.1f} GiB beside the models, and this GPU has "
            f"{free_to_decode / GIB:.1f} GiB left: choose a larger GPU"
        )
    if image_bytes * request.num_images > free:
        most, side = int(free / image_bytes), int(math.sqrt(max(free, 0) / DENOISE_BYTES)) // 8 * 8
        instead = f"at most {most} image{'s' * (most > 1)} at once" if most > 0 else f"at most {side}x{side} pixels"
        raise OutOfMemory(
            f"{request.num_images} of {size} need {image_bytes * request.num_images / GIB:.1f} GiB beside the models, "
            f"and this GPU has {free / GIB:.1f} GiB left: ask for {instead}, or choose a larger GPU"
        )


def is_black(pixels: Any) -> Any:
    """Per image of (n, 3, h, w): whether it holds NaN, or nothing that would show."""
    return ~(pixels.flatten(1).amax(1) >= 0.5 / 255)  # NaN compares false, and amax hands it on


def has_nan(latents: Any) -> Any:
    """Per picture of (n, 4, h, w)."""
    return ~latents.isfinite().flatten(1).all(1)


# ---------------------------------------------------------------------------------------------------------------------
# LoRAs

# Whatever a file's names, kinds and ways of scaling, it is read into Shares: what it adds to single tensors of the
# checkpoint, by the formulas of lycoris-lora and PEFT. The stack is merged into the weights: nine PEFT adapters turn
# the 1,870 kernels of a UNet forward into 27,851.

LORA_COMPONENTS = {  # component -> how the names of its layers begin in files, with "_" for each "."
    "unet": ("lora_unet_", "lycoris_", "unet_", "diffusion_model_", "base_model_model_", "base_model_model_unet_", ""),
    "text_encoder": ("lora_te1_", "lora_te_", "text_encoder_", "text_encoders_clip_l_transformer_", "clip_l_"),
    "text_encoder_2": ("lora_te2_", "text_encoder_2_", "text_encoders_clip_g_transformer_", "clip_g_"),
}
LORA_PART = re.compile(  # how a tensor's name ends: which part of its layer it is
    r"(.+)[._](?:lora(?:_linear_layer)?[._](up|down|mid|A|B)(?:\.default)?\.weight|lora_(magnitude_vector)(?:\.weight)?"
    r"|(alpha|dora_scale|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|diff|w_norm|diff_b|b_norm))"
)
LORA_PARTS = {"A": "down", "B": "up", "w_norm": "diff", "b_norm": "diff_b"}  # the same parts by other names
RANK_PARTS = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")  # the first of them that a layer has tells its rank
OTHER_KINDS = {  # found in the list of a file's tensors, lines such as "name [4, 4]" -> what the file is
    r"boft_|oft_blocks \[\d+, \d+, \d+, \d+\]": "a BOFT network",
    r"oft_(blocks|diag|[rR]\b)": "an OFT network",
    r"\.([ab][12]|bm[12])\.weight ": "a GLoRA network",
    r"\.on_input |\bia3_": "an IA³ network",
    r"^lora_controlnet |zero_convs|input_hint_block|controlnet_|lllite_": "a ControlNet or control-LoRA",
    r"^(clip_[lg]|emb_params|string_to_param\S*) ": "a textual-inversion embedding",
    r"^(first_stage_model|conditioner|cond_stage_model|model\.diffusion_model)\.": "a checkpoint",
}
OTHER_MODELS = {  # the same, for a file whose layers are not SDXL's
    r"(double|single)_blocks[._]|single_transformer_blocks[._]": "a LoRA for Flux or a model of its kind",
    r"joint_blocks[._]|[._]attn[._]add_[qkv]_proj": "a LoRA for Stable Diffusion 3 or a model of its kind",
    r"(?<!encoder)[._](transformer_blocks|blocks|layers)[._]\d+[._](self_|cross_)?attn[._]": "a LoRA of a transformer",
    r"attn2[._]to_[kv]\S*(down|_A|_b)(\.weight)? \[\d+, 768\b": "a LoRA for Stable Diffusion 1",
    r"attn2[._]to_[kv]\S*(down|_A|_b)(\.weight)? \[\d+, 1024\b": "a LoRA for Stable Diffusion 2",
    r"down_blocks[._]0[._]attentions|input_blocks[._][12][._]1[._]": "a LoRA for Stable Diffusion 1 or 2",
}
JOB_LORAS_BYTES = 4 * GIB  # of host memory for the LoRAs of jobs that are not applied now


# kinds


def low_rank(parts: Mapping[str, Any]) -> Any:
    """LoRA and LoCon: up (rows, rank, 1, 1) times down (rank, columns, kernel, kernel)."""
    return parts["up"].flatten(1) @ parts["down"].flatten(1)


def hadamard(parts: Mapping[str, Any]) -> Any:
    """LoHa: two products, multiplied number by number."""
    return matrix(parts, "hada_w1") * matrix(parts, "hada_w2")


def kronecker(parts: Mapping[str, Any]) -> Any:
    """LoKr: the Kronecker product of two matrices, each whole or factored; a convolution's kernel is the second's."""
    w1, w2 = matrix(parts, "lokr_w1"), matrix(parts, "lokr_w2")
    return torch.kron(w1.reshape(*w1.shape, *[1] * (w2.ndim - 2)), w2.contiguous())  # it fails on other layouts


def matrix(parts: Mapping[str, Any], name: str) -> Any:
    """The part of this name, or its factors' product: a (rows, rank) times b (rank, columns); with a Tucker core
    (rank, rank, kernel, kernel) a is (rank, rows)."""
    if name in parts:
        return parts[name]
    a, b, core = parts[f"{name}_a"], parts[f"{name}_b"], parts.get(name.replace("w", "t"))
    return a @ b if core is None else torch.einsum("ijkl,ip,jr->prkl", core, a, b)


LORA_KINDS = {  # how the names of the parts begin -> their kind; else it is low_rank
    "hada": hadamard,
    "lokr": kronecker,
    "diff": itemgetter("diff"),  # differences of whole weights, norms and biases are the change itself
}


@dataclass(frozen=True)
class Share:
    """What a file adds to one weight or bias of the checkpoint at scale 1."""

    kind: Callable[[Mapping[str, Any]], Any]  # its parts -> the change, but for the scaling
    parts: Mapping[str, Any]
    scaling: float  # alpha / rank
    magnitude: Any  # DoRA: the lengths of the new weight's rows, (rows,), or of its columns, (1, columns); else None

    @property
    def size_bytes(self) -> int:
        """What its numbers take."""
        return sum(part.nbytes for part in self.parts.values())

    def to(self, device: Any) -> Share:
        """The same on another device; the host does not wait for it."""
        parts = {name: part.to(device, non_blocking=True) for name, part in self.parts.items()}
        magnitude = None if self.magnitude is None else self.magnitude.to(device, non_blocking=True)
        return replace(self, parts=parts, magnitude=magnitude)

    def change(self, original: Any) -> Any:
        """The change in float32, for the checkpoint's own tensor in float32; all on one device."""
        parts = {name: part.float() for name, part in self.parts.items()}
        change = self.scaling * self.kind(parts).reshape(original.shape)
        if self.magnitude is None:
            return change
        turned, kept = original + change, self.magnitude.ndim - 1  # kept: the dimension of rows or columns
        norm = torch.linalg.vector_norm(turned, dim=[d for d in range(turned.ndim) if d != kept], keepdim=True)
        stretch = self.magnitude.float().view(norm.shape) / norm.clamp(min=torch.finfo(norm.dtype).eps)
        return turned * stretch - original


@dataclass(frozen=True)
class Lora:
    """What a file holds."""

    shares: dict[str, Share]  # "unet.mid_block.attentions.0.proj_in.weight" -> its share
    embeddings: dict[str, Embedding]  # which it brings along, by name
    warnings: list[str]
    size_bytes: int  # of the file, which is about what its numbers take


@functools.lru_cache
def change_shape(kind: Callable[..., Any], shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> tuple[int, ...]:
    """The shape of the change that parts of these shapes make up; torch tries it without numbers."""
    return kind({name: torch.empty(shape, device="meta") for name, shape in shapes}).shape


# files


def ldm_names(unet: Any) -> dict[str, str]:
    """diffusers' name of each layer -> its name in the original (LDM) layout, in which most LoRAs are written:
    "down_blocks.1.resnets.0.conv1" -> "input_blocks.4.0.in_layers.2".

    diffusers only converts in the other direction: it is given every name that a block could hold.
    """
    resnet = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection")
    attention = {name.partition(".attentions.")[2][2:] for name, _ in unet.named_modules() if ".attentions." in name}
    blocks = [f"{side}_blocks.{n}" for side in ("input", "output") for n in range(9)]
    names = ["time_embed.0", "time_embed.2", "label_emb.0.0", "label_emb.0.2", "input_blocks.0.0", "out.0", "out.2"]
    names += [f"{block}.0.{layer}" for block in (*blocks, "middle_block") for layer in (*resnet, "op")]
    names += [f"{block}.1.{layer}" for block in (*blocks, "middle_block") for layer in attention]
    names += [f"middle_block.2.{layer}" for layer in resnet] + [f"{block}.2.conv" for block in blocks]
    tensors = {f"model.diffusion_model.{name}.{end}": name for name in names for end in ("weight", "bias")}
    converted = diffusers.loaders.single_file_utils.convert_ldm_unet_checkpoint(tensors, unet.config)
    return {name.removesuffix(".weight"): old for name, old in converted.items() if name.endswith(".weight")}


def layer_spellings(pipe: Any) -> dict[str, str]:
    """Every way to write a layer's name, with "_" for each "." -> the layer, "unet.mid_block.attentions.0.proj_in"."""
    originals, spellings = ldm_names(pipe.unet), {}
    for component, prefixes in LORA_COMPONENTS.items():
        for name, module in getattr(pipe, component).named_modules():
            if getattr(module, "weight", None) is None:
                continue
            old = re.sub(r"self_attn\.(\w+)_proj$", r"self_attn.to_\1", name).replace("to_out.0", "to_out")
            for spelled in {name, old, originals.get(name, name)}:
                spellings |= {prefix + spelled.replace(".", "_"): f"{component}.{name}" for prefix in prefixes}
    return spellings


def read_lora(file: Path, spellings: Mapping[str, str], pipe: Any) -> Lora:
    """Reads a file into memory of its own, so that it may be deleted afterwards. spellings are layer_spellings(pipe).
    Raises BadModel."""
    try:
        content = file.read_bytes()
        tensors = safetensors.torch.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        configs = peft_configs(header.get("__metadata__", {}))
    except (OSError, KeyError, safetensors.SafetensorError) as error:  # KeyError: a type that torch lacks
        raise BadModel("the file is damaged or not a safetensors file") from error
    refuse(tensors, OTHER_KINDS)
    changes, unknown, bundled = sort_tensors(tensors, spellings)
    if not changes:
        if not any(map(LORA_PART.fullmatch, tensors)):
            raise BadModel("the file holds no LoRA weights")
        refuse(tensors, OTHER_MODELS)
        raise BadModel(f"none of its {len(unknown)} layers is in SDXL, such as {min(unknown)[:80]!r}")
    shares, places = {}, ((name, *name.rpartition(".")[::2]) for name in changes)
    changed = {name: getattr(attrgetter(layer)(pipe), end, None) for name, layer, end in places}
    unknown |= {name for name, tensor in changed.items() if tensor is None and changes[name]["diff"].any()}  # no bias
    for name, tensor in changed.items():
        try:
            shares[name] = None if tensor is None else read_share(name, changes[name], tensor.shape, configs)
        except KeyError as part:
            raise BadModel(f"its layer {name} lacks the part {part}") from part
        except (ValueError, RuntimeError, IndexError, TypeError) as error:
            refuse(tensors, OTHER_MODELS)
            raise BadModel(f"its layer {name} does not fit SDXL's, which is {tuple(tensor.shape)}") from error
    warnings, embeddings = [], {}
    if unknown:
        such = f"such as {min(unknown)[:80]!r}"
        warnings.append(f"{len(unknown)} of its layers and biases are not in SDXL and are left out, {such}")
    for name, parts in bundled.items():
        try:
            embeddings[name] = read_embedding(name, parts, pipe)
        except BadModel as reason:
            warnings.append(f"its embedding {name[:80]!r} is left out: {reason}")
    return Lora({name: share for name, share in shares.items() if share}, embeddings, warnings, len(content))


def refuse(tensors: Mapping[str, Any], kinds: Mapping[str, str]) -> None:
    """Raises BadModel where a row of the table says what the file is."""
    listing = "\n".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
    for pattern, what in kinds.items():
        if re.search(pattern, listing, re.MULTILINE):
            raise BadModel(f"the file is {what}: only LoRA, LoHa, LoKr, DoRA and difference files for SDXL can be used")


def sort_tensors(tensors: Mapping[str, Any], spellings: Mapping[str, str]) -> tuple[dict, set[str], dict]:
    """A file's tensors by what they change, "unet.conv_in.weight" -> part -> tensor; the names of layers that SDXL
    lacks; the tensors of bundled embeddings, name -> part -> tensor. Raises BadModel for what could only be guessed."""
    changes, unknown, bundled = {}, set(), {}
    for key, tensor in tensors.items():
        if key.startswith("bundle_emb."):
            name, _, part = key.removeprefix("bundle_emb.").partition(".")
            bundled.setdefault(name, {})[part] = tensor
            continue
        found = LORA_PART.fullmatch(key.replace(".processor.", "."))  # "attn1.processor.to_q_lora.up.weight"
        spelled, part = (found[1], found[found.lastindex]) if found else (key, "")
        part, layer = LORA_PARTS.get(part, part), spellings.get(spelled.replace(".", "_"))
        if found and layer:
            name, part = (f"{layer}.bias", "diff") if part == "diff_b" else (f"{layer}.weight", part)
            if changes.setdefault(name, {}).setdefault(part, tensor) is not tensor:
                raise BadModel(f"the file holds {name} twice, under two names")
        elif not found and any(key[: dot.start()].replace(".", "_") in spellings for dot in re.finditer(r"\.", key)):
            raise BadModel(f"the file holds weights of an unknown kind, such as {key[:80]!r}")
        else:
            unknown.add(spelled)
    return changes, unknown, bundled


def read_share(name: str, parts: Mapping[str, Any], shape: Any, configs: Mapping[str, Any]) -> Share | None:
    """A file's share in a tensor of this name and shape; None for rank 0. configs are PEFT's, for each component.

    Raises BadModel for numbers that cannot be used, KeyError for a part that is missing, and what torch raises, or
    ValueError, where the parts do not make up that shape.
    """
    parts = {part: usable(tensor.float() if part == "alpha" else tensor) for part, tensor in parts.items()}
    component, _, layer = name.removesuffix(".weight").partition(".")
    rank = next((len(parts[part]) for part in RANK_PARTS if part in parts), None)
    if rank == 0:
        return None
    scaling, alpha, config = 1.0, parts.pop("alpha", None), configs.get(component)
    if rank and alpha is not None:
        scaling = float(alpha) / rank
    elif rank and config:
        alpha = config.alpha_pattern.get(
            peft.utils.other.get_pattern_key(config.alpha_pattern, layer), config.lora_alpha
        )
        scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    magnitude = parts.pop("dora_scale", None)  # (rows, 1, ...) or (1, columns, ...)
    if magnitude is not None:
        magnitude = magnitude.flatten(1) if len(magnitude) == 1 else magnitude.flatten()
    if "magnitude_vector" in parts or (config and config.use_dora and "down" in parts):
        magnitude = parts.pop("magnitude_vector").flatten()  # (rows,), or (1, rows, 1, 1) of a convolution
    kind, *others = {LORA_KINDS.get(part[:4], low_rank) for part in parts} or {low_rank}
    if others:
        raise BadModel(f"its layer {name} is of several kinds at once")
    if "mid" in parts:  # Tucker: mid (m, n, kernel, kernel) and down (n, columns) make up one down
        parts["down"] = torch.einsum("mnkl,nj->mjkl", parts.pop("mid").float(), parts["down"].float().flatten(1))
    made = change_shape(kind, tuple((part, tensor.shape) for part, tensor in parts.items()))
    fits = made[:1] == shape[:1] and math.prod(made) == math.prod(shape)
    if not fits or (magnitude is not None and magnitude.numel() != shape[magnitude.ndim - 1]):
        raise ValueError("another shape")
    return Share(kind, parts, scaling, magnitude)


def usable(tensor: Any) -> Any:
    """The tensor in a type that torch can compute with. Raises BadModel for NaN and infinite numbers."""
    if not tensor.is_floating_point():
        raise BadModel(f"weights of type {str(tensor.dtype).removeprefix('torch.')} are not supported")
    tensor = tensor.half() if tensor.element_size() == 1 else tensor  # float8: float16 holds it exactly
    if tensor.numel() and not all(map(math.isfinite, tensor.aminmax())):  # 20 times as fast as isfinite, and keeps NaN
        raise BadModel("the file holds NaN or infinite numbers")
    return tensor


def peft_configs(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Component -> PEFT's configuration, which diffusers from 0.34 on writes into a file's header. Raises BadModel."""
    configs: dict[str, Any] = {}
    try:
        for key, value in json.loads(metadata.get("lora_adapter_metadata", "{}")).items():
            component, _, name = key.partition(".")
            if name in ("lora_alpha", "alpha_pattern", "use_rslora", "use_dora") and value is not None:
                configs.setdefault(component, {})[name] = value
        configs = {component: peft.LoraConfig(**fields) for component, fields in configs.items()}
        for config in configs.values():
            config.lora_alpha = float(config.lora_alpha)
            config.alpha_pattern = {key: float(alpha) for key, alpha in config.alpha_pattern.items()}
            for key in config.alpha_pattern:
                re.compile(rf"(.*\.)?({key})$")  # as PEFT will
            if not math.isfinite(sum((config.lora_alpha, *config.alpha_pattern.values()))):
                raise ValueError("no finite alpha")
        return configs
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError, re.error) as error:
        raise BadModel("its PEFT configuration cannot be read") from error


# the stack


@dataclass
class Target:
    """A weight or bias that LoRAs of the stack change."""

    module: Any
    name: str  # "weight" or "bias"
    original: Any  # as in the checkpoint; never written to
    apart: bool = False  # whether the original has a place of its own
    shares: dict[str, Share] = field(default_factory=dict)  # adapter name -> its share

    def settle(self, on_gpu: bool) -> None:
        """Parts the original from the tensor that is going to be changed."""
        tensor = getattr(self.module, self.name).detach()
        if on_gpu:
            self.original = tensor.clone()
        elif tensor.device.type == "cuda":
            self.original = self.original.cpu()  # no copy where it still is a page of the checkpoint file
        elif tensor.dtype == torch.float32 and torch.equal(tensor.half().float(), tensor):
            self.original = tensor.half()  # exact: float32 pipelines too come from float16 files
        else:
            getattr(self.module, self.name).data = tensor.clone()
        self.apart = True


def merge(target: Target, scales: Mapping[str, float], device: Any) -> None:
    """Makes a tensor its original + what the LoRAs add, summed in float32 and rounded once. In place, since
    torch.compile and hooks hold on to the tensor."""
    tensor = getattr(target.module, target.name)
    shares = {name: share.to(device) for name, share in target.shares.items() if name in scales}
    if not shares:
        tensor.copy_(target.original)
        return
    merged = original = target.original.to(device).float()
    plain = {name: share for name, share in shares.items() if share.kind is low_rank and share.magnitude is None}
    if plain:  # their factors are joined to one product, whatever the number of LoRAs
        ups = torch.cat([share.parts["up"].flatten(1) for share in plain.values()], dim=1).float()
        downs = torch.cat([share.parts["down"].flatten(1) for share in plain.values()]).float()
        factors = [
            scales[name] * share.scaling for name, share in plain.items() for _ in range(len(share.parts["down"]))
        ]
        ups *= torch.tensor(factors).to(device, non_blocking=True)
        merged = torch.addmm(original.reshape(len(original), -1), ups, downs).view_as(original)
    for name, share in shares.items():
        if name not in plain:
            merged = merged + scales[name] * share.change(original)
    tensor.copy_(merged.to(tensor.dtype))  # to() first: it would convert on the CPU, and move twice the bytes


class LoraStack:
    """LoRAs merged into a pipeline's weights, so that a job runs exactly the operations of the bare checkpoint.

    `failed` says which configured files cannot be used, and why: nothing of them is in any weight. `loras` are the
    others, the configured ones and those that jobs brought. `applied` is what is in the weights now, adapter name ->
    scale.
    """

    def __init__(self, pipe: Any, files: Mapping[str, Path]) -> None:
        """Reads the configured files, adapter name -> path; best before the pipeline leaves host memory: see settle."""
        self.pipe, self.spellings = pipe, layer_spellings(pipe)
        self.failed: dict[str, str] = {}
        self.applied: dict[str, float] = {}
        self.configured = set(files)
        self.loras: dict[str, Lora] = {}  # the least recently applied first; the configured ones' shares are in targets
        self.targets: dict[str, Target] = {}
        for adapter, file in files.items():
            try:
                self.add(adapter, read_lora(file, self.spellings, pipe))
            except BadModel as reason:
                self.failed[adapter] = str(reason)
                log.warning("LoRA %s is left out: %s (%s, %r)", adapter, reason, file, reason.__cause__)

    def add(self, adapter: str, lora: Lora) -> None:
        """Takes in what was read of a LoRA; a job's numbers stay in host memory. Like apply() only within the GPU's
        turn."""
        if adapter in self.loras:
            return
        self.loras[adapter] = replace(lora, shares={}, size_bytes=0) if adapter in self.configured else lora
        for warning in lora.warnings:
            log.warning("LoRA %s: %s", adapter, warning)
        for name, share in lora.shares.items():
            layer, _, end = name.rpartition(".")
            if name not in self.targets:
                self.targets[name] = Target(attrgetter(layer)(self.pipe), end, attrgetter(name)(self.pipe).detach())
            self.targets[name].shares[adapter] = share

    def apply(self, scales: Mapping[str, float]) -> bool:
        """Puts exactly this combination in force, adapter name -> scale; False where it was in force already.

        Scale 0 means without that LoRA; names in `failed` are left out. Raises KeyError for a name that is not in the
        stack. Every change starts from the originals: nothing adds up from job to job.
        """
        wanted = {name: scale for name, scale in scales.items() if scale and name not in self.failed}
        if wanted == self.applied:
            return False
        for name in wanted:
            self.loras[name] = self.loras.pop(name)
        changed = {name for name in self.loras if wanted.get(name) != self.applied.get(name)}
        device = self.pipe._execution_device  # the GPU, also where offloading keeps the weights in host memory
        with torch.inference_mode(False), torch.no_grad():
            self.settle()
            # NaN equals no scale: after a change that fails half-way the next one writes every tensor anew
            self.applied = dict.fromkeys(self.loras, math.nan)
            for target in self.targets.values():
                if not changed.isdisjoint(target.shares):
                    merge(target, wanted, device)
        self.applied = wanted
        for name in [name for name in self.loras if name not in self.configured | wanted.keys()]:
            if sum(lora.size_bytes for lora in self.loras.values()) > JOB_LORAS_BYTES:
                del self.loras[name]
                for target in self.targets.values():
                    target.shares.pop(name, None)
        self.targets = {name: target for name, target in self.targets.items() if target.shares}
        return True

    def settle(self) -> None:
        """Gives originals a place of their own before their first change: on the GPU where the largest jobs fit beside
        them, else in host memory, where a float16 pipeline's are pages of the checkpoint file itself. The configured
        LoRAs go with them."""
        fresh = [target for target in self.targets.values() if not target.apart]
        if not fresh:
            return
        size = sum(target.original.nbytes for target in fresh)
        size += sum(share.size_bytes for t in fresh for name, share in t.shares.items() if name in self.configured)
        on_gpu = self.pipe.device.type == "cuda" and free_gpu_bytes(self.pipe.unet) - size >= JOB_BYTES
        for target in fresh:
            target.settle(on_gpu)
        for target, name in [(t, name) for t in fresh if on_gpu for name in t.shares.keys() & self.configured]:
            target.shares[name] = target.shares[name].to("cuda")
        where = "on the GPU" if on_gpu else "in host memory"
        log.info("LoRA stack: %d more tensors; originals and LoRAs, %.1f GB, %s", len(fresh), size / 1e9, where)


# ---------------------------------------------------------------------------------------------------------------------
# prompts

LONG_PROMPT_MODES = ("blend", "concat", "truncate")
EMPHASES = ("no norm", "original")
MAX_WEIGHT = 100.0  # beyond it states overflow, and a whole job ends in a black image
WINDOW = 77  # positions of CLIP's text encoders: BOS, tokens, EOS, padding
CHUNK_TOKENS = WINDOW - 2
CLAUSE_TOKENS = 20  # how far back a cut looks for a comma, as in A1111
MANY_STATES, RUN_STATES = 4_000, 500  # of a prompt with more, those that are compared with each other
NO_LIKENESS = -2.0  # less than any cosine
CHUNKS_AT_ONCE = 64  # through a text encoder, which keeps the states of all its layers: 1.6 GB of a hundred chunks
SEEN_PROMPTS = 2 * 32  # prompts and negative prompts of the last 32 jobs

# What CLIPTokenizer takes for white space. Other control characters it drops, and joins what they stood between.
SPACE = " \t\n\r\u00a0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
MARK = re.compile("([\ud800-\udfff])")  # stands for an embedding: lone surrogates, which no job's text holds
BORDER = re.compile(
    rf"(?<=[{SPACE}])(?=[^{SPACE}])|(?<=,)(?=[^\W\d_])|(?<=[\ud800-\udfff])(?=.)|(?<=.)(?=[\ud800-\udfff])", re.DOTALL
)
CLAUSE_END = re.compile(rf"[,.!?…，。！？、][\"')\]”’»」』]*[{SPACE}]*$")

LORA_TAG = re.compile(r"<(?:lora|lyco):([^:>]*+)(?::([^:>]*+)[^>]*+)?>", re.IGNORECASE)
UNKNOWN_EMBEDDING = re.compile(r"(?<![\w\\-])embedding:(?!\s*+[+-]?[\d.]++\s*+\))([\w.-]*\w)", re.IGNORECASE)
SYNTAX = re.compile(
    r"\\(?P<escaped>[()\[\]\\]?)"  # a backslash before anything else vanishes, as in A1111
    r"|(?P<open>[(\[])"
    # possessive: 10,000 digits take no time; what is no finite number is read, to be refused
    r"|:\s*+(?P<weight>[+-]?(?:(?:\d++\.?\d*+|\.\d++)(?:[eE][+-]?\d++)?+|(?i:nan|inf(?:inity)?+)))\s*+\)"
    r"|(?P<close>[)\]])"
    r"|(?P<BREAK>\bBREAK\b)"
    r"|[^\\()\[\]:B]+|.",
    re.DOTALL,
)
# A1111's [from:to:when], [a|b] and AND; times and ratios have no letter in them
PROMPT_EDITING = re.compile(
    r"(?<!\\)\[(?=[^\[\]]*[^\W\d_])(?:[^\[\]|]*+\|[^\[\]]*+|[^\[\]]*:\s*+(?:\d++\.?\d*+|\.\d++)\s*+)\]|\bAND\b"
)
FACTORS = {")": 1.1, "]": 1 / 1.1}


# embeddings


@dataclass(frozen=True)
class Embedding:
    """A textual inversion: vectors that a prompt has, each as a token, where it says the name. Equal ones have the
    same name and vectors."""

    name: str
    clip_l: Any = field(compare=False, repr=False)  # float32 (n, 768), for the first text encoder
    clip_g: Any = field(compare=False, repr=False)  # float32 (n, 1280), for the second
    digest: str  # of the vectors


@dataclass(frozen=True)
class Vector:
    """One of an embedding's vectors, in the place of a token."""

    embedding: Embedding
    index: int


def read_embedding(name: str, source: Path | Mapping[str, Any], pipe: Any) -> Embedding:
    """The embedding of a safetensors file, or of the tensors clip_l and clip_g that a LoRA's file bundles.

    Raises BadModel for what is none for SDXL, or has more vectors than a chunk of a prompt has tokens.
    """
    if isinstance(source, Path):
        try:
            with safetensors.safe_open(source, "pt") as opened:
                source = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - it is no mapping
        except (OSError, safetensors.SafetensorError) as error:
            raise BadModel("the file is damaged or not a safetensors file") from error
    widths = {"clip_l": pipe.text_encoder.config.hidden_size, "clip_g": pipe.text_encoder_2.config.hidden_size}
    if missing := widths.keys() - source.keys():
        what = "an embedding for Stable Diffusion 1 or 2" if "emb_params" in source else "no embedding for SDXL"
        raise BadModel(f"the file is {what}: it lacks the vectors {' and '.join(sorted(missing))}")
    for part, width in widths.items():
        if source[part].shape[1:] != (width,) or not source[part].is_floating_point():
            raise BadModel(f"its {part} must be floating-point numbers (n, {width}), got {[*source[part].shape]}")
    vectors = [source[part].float().contiguous() for part in widths]  # float8 and bfloat16 too, exactly
    sizes = [len(rows) for rows in vectors]
    if sizes[0] != sizes[1] or not 1 <= sizes[0] <= CHUNK_TOKENS:
        raise BadModel(f"it must have as many vectors clip_l as clip_g, 1 to {CHUNK_TOKENS}, got {sizes}")
    if not all(rows.isfinite().all() for rows in vectors):
        raise BadModel("the file holds NaN or infinite numbers")
    digest = hashlib.sha256(b"".join(rows.numpy().tobytes() for rows in vectors))
    return Embedding(name, *vectors, digest.hexdigest())


def embedding_use(names: str) -> re.Pattern[str]:
    """Where a prompt uses embeddings whose names this pattern tells: as whole words, in any case, or as ComfyUI's
    "embedding:name" and "embedding:name.safetensors"."""
    suffix = r"(?(prefix)(?:\.(?:safetensors|pt)\b)?)"
    return re.compile(rf"(?<![\w\\-])(?P<prefix>embedding:)?(?:{names}){suffix}(?![\w-])", re.IGNORECASE)


def mark_embeddings(prompt: str, marks: Mapping[str, Embedding]) -> str:
    """The prompt with a mark for each use of an embedding: "(negativeXL_D:1.2), bad" -> "(\\ud800:1.2), bad". The
    longest name wins, and a backslash makes the name a word like others."""
    if not marks:
        return prompt
    longest = sorted(marks, key=lambda mark: len(marks[mark].name), reverse=True)
    names = "|".join(f"({re.escape(marks[mark].name)})" for mark in longest)
    return embedding_use(names).sub(lambda found: longest[found.lastindex - 2], prompt)


# A1111's prompt language


def split_lora_tags(prompt: str) -> tuple[str, list[tuple[str, float]]]:
    """The prompt without its LoRA tags, and the tags: "a cat <lora:film:0.8>" -> ("a cat ", [("film", 0.8)]).

    Without a scale it is 1.0; a scale that is no number is NaN, which no range lets pass. Where a tag has several (for
    the text encoders, for the UNet, for blocks), the first counts.
    """
    tags = []
    for name, scale in LORA_TAG.findall(prompt):
        try:
            tags.append((name.strip(), float(scale or 1.0)))
        except ValueError:
            tags.append((name.strip(), math.nan))
    return LORA_TAG.sub("", prompt), tags


def parse_prompt(prompt: str) -> list[list[tuple[str, float]]]:
    """A1111's prompt language: the stretches between BREAKs, each a list of texts with their weights.

    "a (cat:1.3), [fog] BREAK b" -> [[("a ", 1.0), ("cat", 1.3), (", ", 1.0), ("fog", 0.91), (" ", 1.0)], [(" b", 1.0)]]
    A bracket that is never closed acts on all that follows, one never opened is text. A BREAK between brackets is a
    BREAK as well (A1111 would weigh it, and read it as a word). Its prompt editing ([a:b:0.5]) and AND are text here.
    Raises InvalidInput for a weight beyond ±MAX_WEIGHT.
    """
    # 1. the texts (None is a BREAK) with the product of the factors of all brackets around each
    texts: list[str | None] = []
    weights = torch.ones(len(prompt), dtype=torch.float64)
    opened: dict[str, list[int]] = {closing: [] for closing in FACTORS}
    for match in SYNTAX.finditer(prompt):
        found, kind = match[0], match.lastgroup
        if kind == "open":
            opened[")" if found == "(" else "]"].append(len(texts))
        elif kind in ("weight", "close") and opened[found[-1]]:
            factor = float(match["weight"] or FACTORS[found[-1]])
            if not abs(factor) <= MAX_WEIGHT:
                raise InvalidInput(f"a weight must be from -100 to 100, got {shown(match['weight'])}")
            weights[opened[found[-1]].pop() : len(texts)] *= factor  # innermost first: rounded as A1111 rounds
        else:
            texts.append(None if kind == "BREAK" else match["escaped"] if kind == "escaped" else found)
    for closing, starts in opened.items():
        for start in starts:
            weights[start : len(texts)] *= FACTORS[closing]
    if not (weights.abs() <= MAX_WEIGHT).all():
        raise InvalidInput(f"weights of nested brackets must multiply to at most 100, got {weights.abs().amax():.4g}")
    # 2. neighbours of equal weight joined, so that words are tokenized whole
    stretches: list[list[tuple[str, float]]] = [[]]
    for text, weight in zip(texts, weights.tolist(), strict=False):
        if text is None:
            stretches.append([])
        elif stretches[-1] and stretches[-1][-1][1] == weight:
            stretches[-1][-1] = stretches[-1][-1][0] + text, weight
        else:
            stretches[-1].append((text, weight))
    return stretches


def well_formed(text: str) -> str:
    """The text with U+FFFD for each lone surrogate, which UTF-8 cannot carry."""
    return MARK.sub("\ufffd", text)


# tokens

Tokens = tuple[list[str | Vector], ...]  # of one text, one list for each tokenizer


@functools.lru_cache(maxsize=4)
def in_linear_time(tokenizer: Any) -> Any:
    """A copy of the slow CLIPTokenizer that gives the same tokens, but whose time does not grow with the square of a
    word's length; any other tokenizer as it is."""
    if not hasattr(tokenizer, "bpe_ranks"):
        return tokenizer
    bpe = tokenizers.models.BPE(tokenizer.encoder, list(tokenizer.bpe_ranks), end_of_word_suffix="</w>")
    twin = copy.copy(tokenizer)
    # its cache has the special tokens from the start
    twin.bpe = lambda word: tokenizer.cache.get(word) or " ".join(token.value for token in bpe.tokenize(word))
    return twin


class Tokenizer:
    """Texts to the tokens of CLIP's tokenizers, each once: "a cat" -> (["a</w>", "cat</w>"], ["a</w>", "cat</w>"]).

    SDXL's two differ: the second reads each "!" as its padding token, so "wow!!!" is two tokens for the first and four
    for the second. special_as_text reads a written "<|endoftext|>" as the words that it is made of; as a token it would
    end the prompt for the pooled embedding. A mark is the vectors of its embedding.
    """

    def __init__(
        self, *tokenizers: Any, special_as_text: bool = False, marks: Mapping[str, Embedding] | None = None
    ) -> None:
        self.tokenizers = [in_linear_time(tokenizer) for tokenizer in tokenizers]
        self.special = set(tokenizers[0].all_special_tokens)
        special = ("<|startoftext|>", "<|endoftext|>") if special_as_text else ()
        self.words = {token: self.tokenizers[0].tokenize(f"<| {token[2:-2]} |>") for token in special}
        self.marks = marks or {}
        self.known: dict[str, Tokens] = {}

    def __call__(self, text: str) -> Tokens:
        if text not in self.known:
            found: Tokens = tuple([] for _ in self.tokenizers)
            for part in MARK.split(text):
                embedding = self.marks.get(part)
                vectors = [Vector(embedding, index) for index in range(len(embedding.clip_l))] if embedding else None
                for row, tokenizer in zip(found, self.tokenizers, strict=True):
                    tokens = vectors or tokenizer.tokenize(part)
                    row += [t for token in tokens for t in self.words.get(token, [token])]
            self.known[text] = found
        return self.known[text]


def size_of(tokens: Tokens) -> int:
    """How many of a chunk's tokens a text takes up."""
    return max(map(len, tokens))


# chunks


@dataclass(frozen=True)
class Piece:
    """A part of a prompt that no cut goes through: "cat, " -> tokens ["cat</w>", ",</w>"]."""

    text: str
    tokens: Tokens
    weight: float = 1.0
    continues: bool = False  # goes on with the word of the piece before


def cut_pieces(tokenize: Tokenizer, text: str, max_tokens: int, weight: float = 1.0) -> Iterator[Piece]:
    """Pieces of at most max_tokens, whose texts, joined, are the text, and whose tokens, joined, are its tokens.

    Pieces end at white space, at commas before a letter, and around embeddings. What is longer than max_tokens is cut
    between its words (Chinese and tag lists have no spaces), a longer word between its characters.
    """
    for part in BORDER.split(text):
        for word in [part] if size_of(tokenize(part)) <= max_tokens else cut_words(tokenize, part):
            for i, piece in enumerate(cut_characters(tokenize, word, max_tokens)):
                yield Piece(piece, tokenize(piece), weight, continues=i > 0)


def cut_words(tokenize: Tokenizer, text: str) -> list[str]:
    """An unspaced text cut where a token ends a word: "cat,dog" -> ["cat", ",", "dog"].

    Tokens spell the bytes of the cleaned text; how many of them a character makes up shows when it is read alone, or
    together with the accents that the tokenizer composes it with.
    """

    def lengths(part: str) -> list[int]:
        """Bytes that each token of a part spells."""
        return [len(token.removesuffix("</w>")) for token in tokenize(part)[0]]

    ends = {
        place
        for place, token in zip(accumulate(lengths(text)), tokenize(text)[0], strict=True)
        if token.endswith("</w>") or token in tokenize.special
    }
    for characters in (list(text), regex.findall(r"\X", text)):
        reached = list(accumulate(sum(lengths(character)) for character in characters))
        if reached[-1] == sum(lengths(text)):
            cuts = [i + 1 for i, place in enumerate(reached) if place in ends]
            return ["".join(characters[start:end]) for start, end in pairwise([0, *cuts])]
    return [text]


def cut_characters(tokenize: Tokenizer, word: str, max_tokens: int) -> list[str]:
    """[word], or where that is longer than max_tokens about equal parts that are not: only ids at the cuts change."""
    size = size_of(tokenize(word))
    if size <= max_tokens or len(word) == 1:
        return [word]
    length = math.ceil(len(word) / math.ceil(1.1 * size / max_tokens))  # a tenth to spare: cuts cost tokens
    parts = (word[i : i + length] for i in range(0, len(word), length))
    return [piece for part in parts for piece in cut_characters(tokenize, part, max_tokens)]


def pack_chunks(pieces: Iterable[Piece], max_tokens: int) -> list[list[Piece]]:
    """Fills chunks of at most max_tokens, one after the other: 160 one-token words -> chunks of 75, 75, 10.

    No tokens, no chunks. A piece that continues a word starts a chunk: glued to the piece before it would read as
    other tokens.
    """
    chunks: list[list[Piece]] = []
    chunk: list[Piece] = []
    size = 0
    for piece in pieces:
        tokens = size_of(piece.tokens)
        if size and tokens and (piece.continues or size + tokens > max_tokens):  # what CLIP ignores starts none
            kept = len(chunk) if piece.continues else clause_end(chunk, max_tokens - tokens)
            chunks.append(chunk[:kept])
            chunk = chunk[kept:]
            size = sum(size_of(moved.tokens) for moved in chunk)
        chunk.append(piece)
        size += tokens
    return [*chunks, chunk] if size else []


def clause_end(chunk: list[Piece], room: int) -> int:
    """How many pieces of a full chunk stay in it: up to the last comma or sentence end in its last 20 tokens, where
    the next chunk has room for what follows; else all."""
    moved = 0
    for kept in range(len(chunk), 0, -1):
        if CLAUSE_END.search(chunk[kept - 1].text):
            return kept
        moved += size_of(chunk[kept - 1].tokens)
        if moved >= CLAUSE_TOKENS or moved > room:
            break
    return len(chunk)


def tokenize_chunks(tokenizer: Any, prompt: str, max_tokens: int = CHUNK_TOKENS) -> list[str]:
    """Cuts a prompt, without reading any syntax in it, into texts of at most max_tokens tokens besides BOS and EOS.

    Their token ids, joined, are the prompt's own: 160 one-token words -> texts of 75, 75 and 10 of them; "" -> [].
    A cut prefers the last comma or sentence end in a chunk's last 20 tokens and goes through no word, but for one that
    is longer than max_tokens: its pieces, joined, are its text. Lone surrogates become U+FFFD, which CLIP ignores.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    pieces = cut_pieces(Tokenizer(tokenizer), well_formed(prompt), max_tokens)
    return ["".join(piece.text for piece in chunk).strip(SPACE) for chunk in pack_chunks(pieces, max_tokens)]


def chunk_prompt(tokenize: Tokenizer, prompt: str, long_prompt: str) -> list[list[Piece]]:
    """A job's prompt, its syntax read, in chunks; at least one. "truncate" leaves all in one, which the window cuts.

    BREAK fills a chunk, be it empty: "a BREAK b" -> 2 chunks, "BREAK a" -> 2, "a BREAK" -> 1, as in A1111.
    """
    stretches = parse_prompt(prompt)
    if long_prompt == "truncate":
        return [[Piece(text, tokenize(text), weight) for text, weight in chain(*stretches)]]
    chunks: list[list[Piece]] = []
    for stretch in stretches:
        pieces = (piece for text, weight in stretch for piece in cut_pieces(tokenize, text, CHUNK_TOKENS, weight))
        chunks += pack_chunks(pieces, CHUNK_TOKENS) or [[]]
    return chunks if chunks[-1] or len(chunks) == 1 else chunks[:-1]


# states


def put_vectors(part: str, windows: list[tuple[int | Vector, ...]]) -> Callable[..., Any]:
    """A forward hook by which a text encoder's embedding layer gives a batch's vectors, whatever ids stand in their
    places: CLIPTextModel takes ids alone. part: which of an embedding's tensors are for this encoder."""
    tokens = [(row, position, token) for row, window in enumerate(windows) for position, token in enumerate(window)]
    places = {(row, position): token for row, position, token in tokens if isinstance(token, Vector)}

    def put(_module: Any, _ids: Any, embedded: Any) -> Any:  # (n, 77, D)
        if not places:
            return embedded
        vectors = torch.stack([getattr(token.embedding, part)[token.index] for token in places.values()])
        return embedded.index_put(tuple(torch.tensor([*places], device=embedded.device).T), vectors.to(embedded))

    return put


def encode_chunks(pipe: Any, chunks: list[list[Piece]], clip_skip: int, emphasis: str) -> tuple[Any, ...]:
    """All chunks in one batch through each text encoder, equal ones once.

    Returns each encoder's weighted states, (n, 77, 768) and (n, 77, 1280); the second's pooled vectors (n, 1280), never
    weighted; and how many tokens each chunk has for either encoder. Emphasis: a token's state is multiplied by its
    weight; "original" then restores the chunk's mean over the 77 positions, as A1111 does.
    """
    hidden, counts = [], []
    device, dtype = pipe._execution_device, pipe.text_encoder_2.dtype
    encoders = ((pipe.tokenizer, pipe.text_encoder, "clip_l"), (pipe.tokenizer_2, pipe.text_encoder_2, "clip_g"))
    for k, (tokenizer, encoder, part) in enumerate(encoders):
        # 1. windows
        windows, weights = [], torch.ones(len(chunks), WINDOW, 1)  # BOS, EOS and padding weigh 1
        for i, chunk in enumerate(chunks):
            tokens = [token for piece in chunk for token in piece.tokens[k]][:CHUNK_TOKENS]
            while tokens and isinstance(last := tokens[-1], Vector) and last.index + 1 < len(last.embedding.clip_l):
                tokens.pop()  # the window's end is in an embedding, of which a part means something else
            window = [tokenizer.convert_tokens_to_ids(token) if isinstance(token, str) else token for token in tokens]
            window = [tokenizer.bos_token_id, *window, tokenizer.eos_token_id]
            windows.append((*window, *[tokenizer.pad_token_id] * (WINDOW - len(window))))
            factors = [piece.weight for piece in chunk for _ in piece.tokens[k]][: len(tokens)]
            weights[i, 1 : 1 + len(tokens), 0] = torch.tensor(factors)
            counts.append(len(tokens))
        # 2. states (n, 77, D) and pooled vectors (n, D)
        place = {window: i for i, window in enumerate(dict.fromkeys(windows))}
        distinct, found = list(place), []
        for start in range(0, len(distinct), CHUNKS_AT_ONCE):
            batch = distinct[start : start + CHUNKS_AT_ONCE]
            # in place of vectors id 0, since EOS or one above it would move the pooled vector
            ids = [[token if isinstance(token, int) else 0 for token in window] for window in batch]
            with encoder.get_input_embeddings().register_forward_hook(put_vectors(part, batch)):
                output = encoder(torch.tensor(ids, device=device), output_hidden_states=True)
            found.append((output.hidden_states[-clip_skip], output[0]))  # output[0]: of the second, text_embeds
        order = [place[window] for window in windows]
        states, pooled = (torch.cat(parts)[order] for parts in zip(*found, strict=True))
        # 3. emphasis
        weighted = states * weights.to(device)
        if emphasis == "original":
            before, after = (t.float().mean((1, 2), keepdim=True) for t in (states, weighted))
            weighted = weighted * (before / after)
        hidden.append(weighted.to(dtype))
    return *hidden, pooled, list(zip(counts[: len(chunks)], counts[len(chunks) :], strict=True))


def build_77_token_tensor(text_chunks: list[Any], token_counts: list[int] | None = None) -> Any:
    """Blends n tensors (1, 77, D) into one (1, 77, D) by likeness; one comes back unchanged.

    Position 0 is the first chunk's BOS state. The others are the chunks' real states in the prompt's order: of chunk i
    those at 1 to token_counts[i] and the EOS behind them, without counts all 76. The most alike are merged until 76
    are left; where there are fewer, padding states of the first chunk, then of the next, fill up. A mean by position
    would be a mean of unrelated words, which says nothing: see the README, long_prompt.
    """
    if len({chunk.shape for chunk in text_chunks}) != 1 or text_chunks[0].shape[:-1] != (1, WINDOW):
        raise ValueError(f"chunks must be tensors of one shape (1, 77, D), got {[tuple(c.shape) for c in text_chunks]}")
    counts = [CHUNK_TOKENS] * len(text_chunks) if token_counts is None else token_counts
    if len(counts) != len(text_chunks) or not all(0 <= count <= CHUNK_TOKENS for count in counts):
        raise ValueError(f"{len(text_chunks)} chunks need as many token counts from 0 to {CHUNK_TOKENS}, got {counts}")
    if len(text_chunks) == 1:
        return text_chunks[0]
    dtype = text_chunks[0].dtype
    chunks = torch.cat(list(text_chunks)).to(torch.promote_types(dtype, torch.float32))  # (n, 77, D)
    ends = [count + 2 for count in counts]  # behind each EOS
    real = torch.cat([chunk[1:end] for chunk, end in zip(chunks, ends, strict=True)])  # (N, D)
    padding = torch.cat([chunk[end:] for chunk, end in zip(chunks, ends, strict=True)])
    merged = merge_alike(real, WINDOW - 1)
    blended = torch.cat([chunks[0, :1], merged, padding[: WINDOW - 1 - len(merged)]])  # (77, D)
    return blended.unsqueeze(0).to(dtype)


def merge_alike(states: Any, most: int) -> Any:
    """(N, D) -> (most, D) means of like states, in the order of each mean's first state; at most that many come back
    as they are.

    More than MANY_STATES, which 10,000 characters are in Chinese and its like alone, are halved in runs before: all at
    once they would take a minute.
    """
    group, host = np.arange(len(states)), states.cpu()  # each state's group; sums, whose order must be the same always
    if len(states) > MANY_STATES // 2:  # equal ones, as of a thousand BREAKs, would take a round each
        seen: dict[bytes, int] = {}
        equal = np.array([seen.setdefault(row.tobytes(), i) for i, row in enumerate(host.detach().numpy())])
        joined = np.flatnonzero(equal != group)[most - len(group) :]  # no fewer than `most` are left
        group[joined] = equal[joined]
        group = np.unique(group, return_inverse=True)[1]
    while True:
        index, sizes = torch.from_numpy(group), np.bincount(group)
        count = len(sizes)
        means = torch.zeros_like(host[:count]).index_add_(0, index, host) / torch.bincount(index).unsqueeze(1)
        means = means.to(states.device)
        if count <= most:
            return means
        run, left = (count, most) if count <= MANY_STATES else (RUN_STATES, RUN_STATES // 2)
        found: list[Any] = []
        for start in range(0, count, run):
            likeness, norms = compare(means[start : start + run].detach())  # who is like whom has no gradient
            groups = group_alike(likeness, sizes[start : start + run].astype(likeness.dtype), norms, left)
            found.append(groups + (found[-1].max() + 1 if found else 0))
        group = np.concatenate(found)[group]


def compare(states: Any) -> tuple[Any, Any]:
    """(N, D) -> every cosine (N, N) and every length (N,), in host memory. A state without a direction (zeros, NaN,
    infinities) is like no other."""
    norms = states.norm(dim=1, keepdim=True)
    directions = torch.where(norms.isfinite(), states / norms.clamp_min(1e-30), 0.0)
    likeness = directions @ directions.T
    likeness = (likeness + likeness.T) / 2  # to the last bit, or pairs might wait for each other for ever
    return likeness.cpu().numpy(), norms.flatten().nan_to_num(1.0).clamp(1e-30, 1e15).cpu().numpy()


def group_alike(likeness: Any, sizes: Any, norms: Any, most: int) -> Any:
    """The group, from 0 to most - 1, of each of N states: (N, N), (N,), (N,) -> (N,). What is given is overwritten.

    Rounds: pairs that are each other's most alike are merged into the mean of all that they stand for, the most alike
    quarter of them, then anew: all at once would merge unlike ones early. A mean's likeness follows from its parts'. It
    is done in host memory: hundreds of rounds of small steps, each of which a GPU would be asked for and waited for.
    """
    count, group = len(sizes), np.arange(len(sizes))
    np.fill_diagonal(likeness, NO_LIKENESS)
    while count > most:
        # 1. the most alike quarter of the pairs that are each other's nearest
        own, nearest = np.arange(len(sizes)), likeness.argmax(axis=1)
        first = np.flatnonzero((nearest[nearest] == own) & (own < nearest))
        alike = likeness[first, nearest[first]]
        chosen = np.sort(np.argsort(-alike, kind="stable")[: min(max(len(first) // 4, 1), count - most)])
        first, second, alike = first[chosen], nearest[first[chosen]], alike[chosen]
        # 2. the second joins the first
        total = sizes[first] + sizes[second]
        a, b = norms[first] * sizes[first] / total, norms[second] * sizes[second] / total  # parts of the mean's length
        norms[first] = np.sqrt((a * a + b * b + 2 * a * b * alike).clip(1e-30))
        a, b = (a / norms[first])[:, None], (b / norms[first])[:, None]
        merged = likeness[first] * a + likeness[second] * b
        mutual = merged[:, first] * a.T + merged[:, second] * b.T
        merged[:, first], merged[:, second] = (mutual + mutual.T) / 2, NO_LIKENESS
        merged[np.arange(len(first)), first] = NO_LIKENESS
        likeness[first], likeness[:, first] = merged, merged.T
        likeness[second], likeness[:, second] = NO_LIKENESS, NO_LIKENESS
        sizes[first], sizes[second], own[second] = total, 0, first
        group, count = own[group], count - len(first)
        # 3. rows that joined others are taken out now and then
        if count < 0.8 * len(sizes) or count <= most:
            left = np.flatnonzero(sizes)
            group, sizes, norms = np.searchsorted(left, group), sizes[left], norms[left]
            likeness = likeness[np.ix_(left, left)]
    return group


@dataclass(frozen=True)
class Encoded:
    """One prompt as the UNet takes it."""

    embeds: Any  # (1, 77, 2048); (1, 77·n, 2048) where n chunks were concatenated
    pooled: Any  # (1, 1280)
    chunks: int  # 0 for an empty negative prompt

    def to(self, device: Any) -> Encoded:
        """The same on another device."""
        return replace(self, embeds=self.embeds.to(device), pooled=self.pooled.to(device))


def join_chunks(clip_l: Any, clip_g: Any, pooled: Any, counts: list[tuple[int, int]], long_prompt: str) -> Encoded:
    """A prompt's chunks blended to (1, 77, 2048), or concatenated to (1, 77·n, 2048) with the first chunk's pooled
    embedding, as in A1111.

    A chunk's EOS state and its pooled embedding sum it up, and would contradict each other: one of a chunk without an
    object says that there is none. Blended, each EOS state is the mean of all, and so is the pooled embedding. The
    tensors given are overwritten.
    """
    blends = long_prompt != "concat" and len(counts) > 1
    if blends:
        pooled = pooled.float().mean(dim=0, keepdim=True).to(pooled.dtype)
        for states, tokens in zip((clip_l, clip_g), zip(*counts, strict=True), strict=True):
            ends = range(len(tokens)), [count + 1 for count in tokens]
            states[ends] = states[ends].float().mean(dim=0).to(states.dtype)
    states = torch.cat([clip_l, clip_g], dim=-1)  # (n, 77, 2048)
    embeds = build_77_token_tensor([*states.split(1)], [*map(max, counts)]) if blends else states.flatten(0, 1)[None]
    return Encoded(embeds, pooled[:1], len(counts))


def long_prompt_to_embedding(pipe: Any, prompt: str, max_tokens: int = CHUNK_TOKENS) -> tuple[Any, Any]:
    """The blended ((1, 77, 2048), (1, 1280)) of a prompt that is longer than CLIP's window, without reading any syntax
    in it; (None, None) where it fits into the 77 tokens."""
    if not 1 <= max_tokens <= CHUNK_TOKENS:
        raise ValueError(f"max_tokens must be from 1 to {CHUNK_TOKENS}, got {max_tokens}")
    tokenize, prompt = Tokenizer(pipe.tokenizer, pipe.tokenizer_2, special_as_text=True), well_formed(prompt)
    if size_of(tokenize(prompt)) <= CHUNK_TOKENS:
        return None, None
    chunks = pack_chunks(cut_pieces(tokenize, prompt, max_tokens), max_tokens)
    with torch.no_grad():
        encoded = join_chunks(*encode_chunks(pipe, chunks, clip_skip=2, emphasis="no norm"), "blend")
    return encoded.embeds, encoded.pooled


# a job's prompts


@dataclass(frozen=True)
class Conditioning:
    """Both prompts of a job."""

    prompt: Encoded
    negative: Encoded  # of the same shape
    warnings: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()  # the names of those that were used


class PromptEncoder:
    """Encodes the prompts of jobs, and remembers the last ones."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.seen: dict[Hashable, Encoded] = {}  # in host memory, the last used at the end

    def encode(self, request: JobRequest, stack: Hashable, embeddings: Mapping[str, Embedding]) -> Conditioning:
        """Both prompts, in one batch for each text encoder; stack is what the encoders' weights depend on, embeddings,
        by their names, are what the prompts may use.

        A negative prompt that is empty (nothing but white space and LoRA tags) is zeros, as SDXL was trained; so is one
        that is not used, without guidance.
        """
        marks = {chr(0xD800 + i): embedding for i, embedding in enumerate(embeddings.values())}
        prompts = {"prompt": request.prompt}
        if request.guidance_scale > 1 and split_lora_tags(request.negative_prompt)[0].strip():
            prompts["negative prompt"] = request.negative_prompt
        prompts = {name: mark_embeddings(split_lora_tags(text)[0], marks) for name, text in prompts.items()}
        text, warnings = "\n".join(prompts.values()), []
        if unknown := [*dict.fromkeys(UNKNOWN_EMBEDDING.findall(text))]:
            few = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
            warnings.append(f"the prompts name embeddings that are not here, read as words: {few}")
        encode = functools.partial(self.encode_prompts, request, stack, marks)
        encoded = encode_or_cut(encode, prompts, request.long_prompt, warnings)
        positive, *rest = [prompt.to(self.pipe._execution_device) for prompt in encoded]
        if rest:
            positive, negative = match_lengths(positive, rest[0], encode)
        else:
            negative = Encoded(torch.zeros_like(positive.embeds), torch.zeros_like(positive.pooled), 0)
        used = tuple(embedding.name for mark, embedding in marks.items() if mark in text)
        return Conditioning(positive, negative, tuple(warnings), used)

    def encode_prompts(
        self, request: JobRequest, stack: Hashable, marks: Mapping[str, Embedding], prompts: list[str], long_prompt: str
    ) -> list[Encoded]:
        """The prompts in host memory, those not seen before encoded in one batch."""
        keys = {}
        for prompt in prompts:
            used = tuple(marks[mark] for mark in MARK.findall(prompt))  # the same, whichever marks they have
            keys[prompt] = MARK.sub("\ud800", prompt), used, long_prompt, request.clip_skip, request.emphasis, stack
        if new := [prompt for prompt, key in keys.items() if key not in self.seen]:
            tokenize = Tokenizer(self.pipe.tokenizer, self.pipe.tokenizer_2, special_as_text=True, marks=marks)
            chunks = [chunk_prompt(tokenize, prompt, long_prompt) for prompt in new]
            encoded = encode_chunks(self.pipe, [*chain(*chunks)], request.clip_skip, request.emphasis)
            ends = accumulate(map(len, chunks), initial=0)
            for prompt, (start, end) in zip(new, pairwise(ends), strict=True):
                self.seen[keys[prompt]] = join_chunks(*(part[start:end] for part in encoded), long_prompt).to("cpu")
        for key in keys.values():
            self.seen[key] = self.seen.pop(key)
        while len(self.seen) > SEEN_PROMPTS:
            del self.seen[next(iter(self.seen))]
        return [self.seen[keys[prompt]] for prompt in prompts]


def encode_or_cut(
    encode: Callable[..., list[Encoded]], prompts: Mapping[str, str], long_prompt: str, warnings: list[str]
) -> list[Encoded]:
    """encode(texts, long_prompt); where the batch fails each prompt is tried alone, and where that fails cut to its
    first 75 tokens, with a warning. prompts: what each is called -> its text."""
    try:
        return encode([*prompts.values()], long_prompt)
    except Exception as error:  # the contract's fallback: all but the GPU's failures
        failure = explain(error)
        if isinstance(failure, OutOfMemory | GpuLost):
            raise failure from error
        if len(prompts) > 1:
            return [encode_or_cut(encode, dict([one]), long_prompt, warnings)[0] for one in prompts.items()]
        [name] = prompts
        log.warning("the chunks of the %s could not be encoded: %r", name, error)
        warnings.append(f"the chunks of the {name} could not be encoded: it was cut to its first 75 tokens")
        return encode([*prompts.values()], "truncate")


def match_lengths(a: Encoded, b: Encoded, encode: Callable[..., list[Encoded]]) -> tuple[Encoded, Encoded]:
    """Two concatenated prompts in as many chunks, which the UNet asks for: both repeated to the least common multiple,
    since attention over repeated states is the same, so this is what A1111 gets by running them apart. Where that is
    more than four times the longer, the shorter is filled up with the empty chunk."""
    longer, common = max(a.chunks, b.chunks), math.lcm(a.chunks, b.chunks)
    if a.embeds.shape[1] == b.embeds.shape[1]:
        return a, b
    if common <= 4 * longer:
        embeds = [side.embeds.repeat(1, common // side.chunks, 1) for side in (a, b)]
    else:
        empty = encode([""], "concat")[0].to(a.embeds.device).embeds  # (1, 77, 2048)
        embeds = [torch.cat([side.embeds, *[empty] * (longer - side.chunks)], dim=1) for side in (a, b)]
    return replace(a, embeds=embeds[0]), replace(b, embeds=embeds[1])


# ---------------------------------------------------------------------------------------------------------------------
# sampling
#
# k-diffusion's samplers on its noise schedules, as A1111 1.10 calls them (Karras et al., arXiv:2206.00364). σ is the
# standard deviation of the noise in x = image + σ·noise: a float32 tensor without dimensions on the CPU, so that the
# arithmetic is k-diffusion's to the last bit and CUDA's kernels take it as an argument without waiting. x, denoised
# and noise are float32 (n, 4, height/8, width/8) on the UNet's device.

Run = Generator[tuple[Any, Any], Any, Any]  # a sampler: yields (x, σ), is sent denoised, returns the last x
Noise = Callable[[Any, Any], Any]  # noise(σ, next σ): standard normal, of x's shape

# samplers, each after k-diffusion's function of that name (sampling.py)


def ancestral_step(sigma: Any, following: Any, eta: float = 1.0) -> tuple[Any, Any]:
    """get_ancestral_step: the σ to step down to and the σ of the noise to add, together the following σ."""
    if not eta:
        return following, 0.0
    up = min(following, (following**2 * (sigma**2 - following**2) / sigma**2) ** 0.5)
    return (following**2 - up**2) ** 0.5, up


def sample_euler(x: Any, sigmas: Any, noise: Noise, eta: float = 0.0) -> Run:
    """sample_euler; with eta 1 sample_euler_ancestral: down further, then noise up."""
    for sigma, following in pairwise(sigmas):
        denoised = yield x, sigma
        down, up = ancestral_step(sigma, following, eta)
        x = x + (x - denoised) / sigma * (down - sigma)
        if up > 0:
            x = x + noise(sigma, following) * up
    return x


def sample_heun(x: Any, sigmas: Any, _noise: Noise) -> Run:
    """Algorithm 2 of Karras et al.: the mean of the slopes at both ends of a step."""
    for sigma, following in pairwise(sigmas):
        slope = (x - (yield x, sigma)) / sigma
        end = x + slope * (following - sigma)
        if following > 0:
            slope = (slope + (end - (yield end, following)) / following) / 2
        x = x + slope * (following - sigma)
    return x


def sample_lms(x: Any, sigmas: Any, _noise: Noise) -> Run:
    """Linear multistep of order 4: the polynomial through the last slopes, integrated over the step. Two Gauss-Legendre
    nodes do that exactly for a cubic, without SciPy's quad."""
    past: deque[tuple[float, Any]] = deque(maxlen=4)  # (σ, slope there), the newest first
    for sigma, following in pairwise(sigmas):
        past.appendleft((sigma.item(), (x - (yield x, sigma)) / sigma))
        centre, half = (sigma.item() + following.item()) / 2, (following.item() - sigma.item()) / 2
        weighted = []
        for at, slope in past:
            others = [other for other, _ in past if other != at]
            nodes = centre - half / 3**0.5, centre + half / 3**0.5
            integral = half * sum(math.prod((node - other) / (at - other) for other in others) for node in nodes)
            weighted.append(integral * slope)
        x = x + sum(weighted)
    return x


def sample_dpm_2(x: Any, sigmas: Any, noise: Noise, eta: float = 0.0) -> Run:
    """A step with the slope at its middle in log σ; with eta 1 sample_dpm_2_ancestral."""
    for sigma, following in pairwise(sigmas):
        slope = (x - (yield x, sigma)) / sigma
        down, up = ancestral_step(sigma, following, eta)
        if down > 0:
            middle = sigma.log().lerp(down.log(), 0.5).exp()
            half = x + slope * (middle - sigma)
            slope = (half - (yield half, middle)) / middle
        x = x + slope * (down - sigma)
        if up > 0:
            x = x + noise(sigma, following) * up
    return x


# DPM-Solver++ (arXiv:2211.01095) counts in t = -log σ. k-diffusion goes to t and back, and so do these: the Brownian
# tree tells the last bit of σ apart.


def step_towards(denoised: Any, x: Any, t: Any, t_next: Any) -> Any:
    """DPM-Solver++'s step of first order; to σ = 0, where t_next is infinite, it arrives at denoised."""
    return (-t_next).exp() / (-t).exp() * x - (t - t_next).expm1() * denoised


def sample_dpmpp_2s_ancestral(x: Any, sigmas: Any, noise: Noise) -> Run:
    """DPM-Solver++(2S): steps down with denoised at the step's middle in t, then noise up."""
    for sigma, following in pairwise(sigmas):
        denoised = yield x, sigma
        down, up = ancestral_step(sigma, following)
        t, t_down = -sigma.log(), -down.log()
        if down > 0:
            middle = t + 0.5 * (t_down - t)
            denoised = yield step_towards(denoised, x, t, middle), (-middle).exp()
        x = step_towards(denoised, x, t, t_down)
        if following > 0:
            x = x + noise(sigma, following) * up
    return x


def sample_dpmpp_sde(x: Any, sigmas: Any, noise: Noise) -> Run:
    """DPM-Solver++ (stochastic): an ancestral step to the middle in t, then the whole one with denoised from there."""
    for sigma, following in pairwise(sigmas):
        denoised = yield x, sigma
        if following == 0:
            return denoised
        t, t_next = -sigma.log(), -following.log()
        start, middle, end = (-t).exp(), (-(t + (t_next - t) * 0.5)).exp(), (-t_next).exp()
        down, up = ancestral_step(start, middle)
        half = step_towards(denoised, x, t, -down.log()) + noise(start, middle) * up
        denoised = yield half, middle
        down, up = ancestral_step(start, end)
        x = step_towards(denoised, x, t, -down.log()) + noise(start, end) * up
    return x


def sample_dpmpp_2m(x: Any, sigmas: Any, _noise: Noise) -> Run:
    """DPM-Solver++(2M): extrapolates denoised from the last two."""
    previous = h_last = None
    for sigma, following in pairwise(sigmas):
        denoised = yield x, sigma
        t, t_next = -sigma.log(), -following.log()
        h, ahead = t_next - t, denoised
        if previous is not None and following > 0:
            r = h_last / h
            ahead = (1 + 1 / (2 * r)) * denoised - (1 / (2 * r)) * previous
        x = step_towards(ahead, x, t, t_next)
        previous, h_last = denoised, h
    return x


def sample_dpmpp_2m_sde(x: Any, sigmas: Any, noise: Noise, heun: bool = False) -> Run:
    """DPM-Solver++(2M) SDE, its solver_type "midpoint" or "heun"."""
    previous = h_last = None
    for sigma, following in pairwise(sigmas):
        denoised = yield x, sigma
        if following == 0:
            return denoised
        h = sigma.log() - following.log()
        x = following / sigma * (-h).exp() * x - (-2 * h).expm1() * denoised
        if previous is not None:
            weight = (-2 * h).expm1() / (2 * h) + 1 if heun else -0.5 * (-2 * h).expm1()
            x = x + weight * (h / h_last) * (denoised - previous)
        x = x + noise(sigma, following) * following * (-(-2 * h).expm1()).sqrt()
        previous, h_last = denoised, h
    return x


def sample_dpmpp_3m_sde(x: Any, sigmas: Any, noise: Noise) -> Run:
    """DPM-Solver++(3M) SDE: first and second differences of the last three denoised."""
    past: deque[tuple[Any, Any]] = deque(maxlen=2)  # (denoised, h) of the last steps, the newest first
    for sigma, following in pairwise(sigmas):
        denoised = yield x, sigma
        if following == 0:
            return denoised
        h = sigma.log() - following.log()
        x = (-2 * h).exp() * x - (-2 * h).expm1() * denoised
        phi_2 = (-2 * h).expm1() / (2 * h) + 1
        if past:
            r0 = past[0][1] / h
            d1 = first = (denoised - past[0][0]) / r0
            if len(past) == 2:
                r1 = past[1][1] / h
                second = (past[0][0] - past[1][0]) / r1
                d1 = first + (first - second) * r0 / (r0 + r1)
                x = x - (phi_2 / (2 * h) - 0.5) * (first - second) / (r0 + r1)
            x = x + phi_2 * d1
        x = x + noise(sigma, following) * following * (-(-2 * h).expm1()).sqrt()
        past.appendleft((denoised, h))
    return x


def sample_ddim(x: Any, sigmas: Any, noise: Noise) -> Run:
    """A1111's ddim (sd_samplers_timesteps_impl.py) with eta 0: Euler's steps, ending at t = 1 with the noise of there
    in the scale in which the network sees x."""
    x = yield from sample_euler(x, sigmas, noise)
    return x / (1 + sigmas[-1] ** 2) ** 0.5


def sample_lcm(x: Any, sigmas: Any, noise: Noise) -> Run:
    """A1111's sample_lcm (sd_samplers_lcm.py): new noise on each denoised. The consistency model's own c_skip and c_out
    are within 7e-6 of 0 and 1 at all times that it runs at, and left out."""
    for sigma, following in pairwise(sigmas):
        x = yield x, sigma
        if following > 0:
            x = x + following * noise(sigma, following)
    return x


# schedules


class NoiseLevels:
    """The σ that the network was trained with, and the times that it knows them by: σ[i] at time i of 0 to 999. A
    network distilled for LCM knows every 20th alone, times 19 to 999 (A1111's LCMCompVisDenoiser)."""

    def __init__(self, every: int = 1, zero_snr: bool = False) -> None:
        """SDXL's scaled_linear betas; with zero_snr as A1111 rescales ᾱ, so that the last time is nothing but noise."""
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        alphas = (1 - betas).cumprod(0).float()
        if zero_snr:
            root = alphas.sqrt()
            alphas = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
            alphas[-1] = 4.8973451890853435e-08
        self.sigmas = (((1 - alphas) / alphas) ** 0.5)[every - 1 :: every]  # float32 (1000 / every,), rising
        self.every = every

    def time_of(self, sigmas: Any) -> Any:
        """DiscreteSchedule.sigma_to_t: between two σ by the logarithm; LCM's network knows the nearest."""
        logs, wanted = self.sigmas.log(), sigmas.log()
        below = (torch.searchsorted(logs, wanted, right=True) - 1).clamp(0, len(logs) - 2)
        weight = ((logs[below] - wanted) / (logs[below] - logs[below + 1])).clamp(0, 1)
        place = (1 - weight) * below + weight * (below + 1)
        return (place if self.every == 1 else place.round()) * self.every + (self.every - 1)

    def evenly_in_time(self, count: int) -> Any:
        """The σ (DiscreteSchedule.t_to_sigma) of count times, evenly from the last to the first."""
        place = (torch.linspace(999, self.every - 1, count) - (self.every - 1)) / self.every
        weight, logs = place.frac(), self.sigmas.log()
        return ((1 - weight) * logs[place.floor().long()] + weight * logs[place.ceil().long()]).exp()

    def schedule(self, name: str, steps: int) -> Any:
        """Falling σ, float32 (steps + 1,), after k-diffusion's get_sigmas_… and A1111's sd_schedulers.py; name: of
        SCHEDULES, or a sampler's own grid. All but KL Optimal and DDIM's end in 0."""
        low, high = self.sigmas[0].item(), self.sigmas[-1].item()
        match name:
            case "Uniform":  # DiscreteSchedule.get_sigmas; ComfyUI calls it normal
                sigmas = self.evenly_in_time(steps)
            case "SGM Uniform":  # one more time, and the last left out
                sigmas = self.evenly_in_time(steps + 1)[:-1]
            case "Simple":  # every 1000/steps-th trained σ from the highest down
                sigmas = self.sigmas[[-1 - int(i * (len(self.sigmas) / steps)) for i in range(steps)]]
            case "Karras":  # evenly in σ^(1/7): ρ is 7
                first, last = high ** (1 / 7.0), low ** (1 / 7.0)
                sigmas = (first + torch.linspace(0, 1, steps) * (last - first)) ** 7.0
            case "Exponential":  # evenly in log σ
                sigmas = torch.linspace(math.log(high), math.log(low), steps).exp()
            case "Polyexponential":  # with ρ 1, which is A1111's: exponential but for the last bits
                sigmas = (torch.linspace(1, 0, steps) * (math.log(high) - math.log(low)) + math.log(low)).exp()
            case "Align Your Steps":  # A1111 would run one step from the lowest σ; here it starts at the highest
                at, places = np.linspace(0, 1, steps), np.linspace(0, 1, len(ALIGN_YOUR_STEPS))
                sigmas = torch.from_numpy(np.exp(np.interp(at, places, np.log(ALIGN_YOUR_STEPS)))).float()
            case "KL Optimal":  # evenly in arctan σ (Align Your Steps' page)
                place = torch.arange(steps + 1) / steps
                return torch.tan(place * self.sigmas[0].arctan() + (1.0 - place) * self.sigmas[-1].arctan())
            case "DDIM":  # A1111's get_timesteps: t = 1 + i · (1000 // steps) below 1000, so 24 steps are 24, 20 are 19
                times = (torch.arange(0, 1000, 1000 // steps) + 1).clamp(max=999).flip(0)
                if steps > 1:
                    return self.sigmas[times]
                sigmas = self.sigmas[-1:]  # nothing would be left
            case "leading":  # diffusers' spacing in SDXL's own configuration; one step from the highest σ
                sigmas = self.sigmas[torch.arange(steps).flip(0) * (1000 // steps) + 1 if steps > 1 else [-1]]
        return torch.cat([sigmas, torch.zeros(1)])


# NVIDIA's ten steps for SDXL (research.nvidia.com/labs/toronto-ai/AlignYourSteps); others by log-linear interpolation
ALIGN_YOUR_STEPS = (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029)
SCHEDULES = (
    "Uniform",
    "Karras",
    "Exponential",
    "SGM Uniform",
    "Simple",
    "Align Your Steps",
    "KL Optimal",
    "Polyexponential",
)


# names


@dataclass(frozen=True)
class Sampler:
    """How a name's sampler is run: by one of the functions above on any of SCHEDULES, or by diffusers' own class."""

    run: Callable[..., Run] | None = None
    automatic: str = "Uniform"  # the schedule that A1111 gives it when none is chosen
    uniform: str = "Uniform"  # what Uniform means for it
    brownian: bool = False  # its noise is the differences of a Brownian motion along σ
    drops_next_to_last: bool = False  # A1111 makes one σ more and drops the next to last
    starts_at_sigma: bool = True  # the first latents are noise · σ₀; otherwise noise · √(1 + σ₀²)
    every: int = 1  # of the trained levels
    # what the name alone runs: diffusers' class, and what is changed of the checkpoint's configuration
    diffusers: tuple[str, dict[str, Any]] | None = None
    instead: str = ""  # what comes nearest for image and hires, where the name alone begins with noise only


LEADING = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}
LINSPACE = {"timestep_spacing": "linspace"}
DDIM = ("DDIMScheduler", LEADING | {"clip_sample": False})
SINGLESTEP = ("DPMSolverSinglestepScheduler", {"lower_order_final": True})
PNDM = Sampler(diffusers=("PNDMScheduler", LEADING | {"skip_prk_steps": True}), instead="LMS")
K_EULER = Sampler(sample_euler, uniform="leading", starts_at_sigma=False, instead="Euler")
SAMPLERS = {
    "Euler": Sampler(sample_euler),
    "Euler a": Sampler(functools.partial(sample_euler, eta=1)),
    "Heun": Sampler(sample_heun),
    "LMS": Sampler(sample_lms),
    "DPM2": Sampler(sample_dpm_2, "Karras", drops_next_to_last=True),
    "DPM2 a": Sampler(functools.partial(sample_dpm_2, eta=1), "Karras", drops_next_to_last=True),
    "DPM++ 2S a": Sampler(sample_dpmpp_2s_ancestral, "Karras"),
    "DPM++ 2M": Sampler(sample_dpmpp_2m, "Karras"),
    "DPM++ SDE": Sampler(sample_dpmpp_sde, "Karras", brownian=True),
    "DPM++ 2M SDE": Sampler(sample_dpmpp_2m_sde, "Exponential", brownian=True),
    "DPM++ 2M SDE Heun": Sampler(functools.partial(sample_dpmpp_2m_sde, heun=True), "Exponential", brownian=True),
    "DPM++ 3M SDE": Sampler(sample_dpmpp_3m_sde, "Exponential", brownian=True, drops_next_to_last=True),
    "LCM": Sampler(sample_lcm, every=20),
    # alone diffusers' own, as the official worker's; "DDIM Uniform" is A1111's
    "DDIM": Sampler(sample_ddim, uniform="DDIM", starts_at_sigma=False, diffusers=DDIM, instead="DDIM Uniform"),
    "UniPC": Sampler(diffusers=("UniPCMultistepScheduler", LINSPACE), instead="DPM++ 2M"),
    "DEIS": Sampler(diffusers=("DEISMultistepScheduler", LINSPACE), instead="DPM++ 2M"),
    "PLMS": PNDM,
    # the official RunPod SDXL worker's names, with the checkpoint's own spacing as there
    "PNDM": PNDM,
    "DPMSolverMultistep": Sampler(diffusers=("DPMSolverMultistepScheduler", {}), instead="DPM++ 2M"),
    "DPMSolverSinglestep": Sampler(diffusers=SINGLESTEP, instead="DPM++ 2M"),
    "K_EULER": K_EULER,
    "K_EULER_ANCESTRAL": replace(K_EULER, run=functools.partial(sample_euler, eta=1), instead="Euler a"),
}
# samplers of A1111 and of the official worker that are not here, and what comes nearest
NOT_HERE = {"DPM fast": "DPM++ 2M", "DPM adaptive": "DPM++ 2M Karras", "Restart": "Heun Karras", "KLMS": "LMS"}
DEFAULT_SCHEDULER = "DPM++ 2M Karras"


@dataclass(frozen=True)
class Sampling:
    """A sampler and its schedule, chosen. str() gives the name in answers: "DPM++ 2M Karras", "Euler"."""

    name: str  # of SAMPLERS
    sampler: Sampler
    schedule: str  # of SCHEDULES; "" where diffusers' class runs

    def __str__(self) -> str:
        plain = self.schedule == "Uniform" and not self.sampler.diffusers
        return self.name if plain else f"{self.name} {self.schedule}".strip()

    @property
    def instead(self) -> str:
        """The nearest name for image and hires, where this one begins with noise only; else ""."""
        return "" if self.schedule and self.sampler.diffusers else self.sampler.instead


def spelling(name: str) -> str:
    """What is left of a name when spellings do not count: "DPM++ 2S a" and ComfyUI's "dpmpp_2s_ancestral" ->
    "dpmpp2sa"; "dpmpp_sde_gpu" is "dpmpp_sde" there with other noise."""
    name = re.sub(r"[\s_-]+", "", name.lower())
    return name.replace("++", "pp").replace("ancestral", "a").replace("sdegpu", "sde")


@functools.cache
def known_samplings() -> dict[str, Sampling]:
    """spelling -> what it chooses, for every name that is understood."""
    known = {}
    for name, sampler in SAMPLERS.items():
        schedules = {"Automatic": sampler.automatic if sampler.run else ""}
        if sampler.run and sampler.uniform != "leading":
            schedules |= {"Normal": "Uniform"} | {schedule: schedule for schedule in SCHEDULES}
        schedules[""] = "" if sampler.diffusers else "Uniform"
        known |= {spelling(name + given): Sampling(name, sampler, schedule) for given, schedule in schedules.items()}
    return known


def read_sampling(field: str, sampler: Any, schedule: Any = None) -> Sampling:
    """The choice that a job's or a recipe's field names, in A1111's, ComfyUI's or the official worker's spelling.

    "DPM++ 2M Karras" -> 2M, Karras; "dpmpp_2m", "karras" -> the same; "DPM++ 2M" -> Uniform; "DPM++ 2M", "Automatic"
    -> Karras, the sampler's own. "DDIM" is diffusers' own, "DDIM", "Uniform" A1111's. Raises InvalidInput, naming the
    field and the nearest names.
    """
    schedule = "" if schedule is None else schedule
    for text in (sampler, schedule):
        if not isinstance(text, str):
            raise InvalidInput(f"{field} must be text, got {shown(text)}")
    given = f"{sampler} {schedule}".strip()
    known, spelled = known_samplings(), spelling(given)
    if spelled in known:
        return known[spelled]
    alone = known.get(spelling(sampler))
    if schedule and alone and spelling(schedule) in (spelling(alone.schedule), "automatic"):
        return alone  # "DPM++ 2M Karras" has its schedule already
    names = [name for absent, name in NOT_HERE.items() if spelled.startswith(spelling(absent))]
    if not names:
        close = [known[key] for key in difflib.get_close_matches(spelled[:80], known, n=9, cutoff=0.4)]
        names = [str(near) for near in (alone, *close) if near] or [DEFAULT_SCHEDULER, "Euler a"]
    hint = ", ".join(f'"{name}"' for name in list(dict.fromkeys(names))[:3])
    raise InvalidInput(f"{field} must be a sampler of this worker, got {shown(given)}; nearest: {hint}")


# noise


def philox_normal(seed: int, draw: int, count: int) -> Any:
    """float32 (count,), standard normal: what torch.randn draws on CUDA, where the card has a thread for each number,
    as the draw-th of a generator with this seed (0 is the first). Seed 0 begins -0.92466259, -0.42534415.

    Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") of the counter (draw, 0, element,
    0), then Box-Muller; after A1111's rng_philox.py.
    """
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)  # 32-bit words in 64 bits, so that products fit
    keys = [seed & 0xFFFFFFFF, seed >> 32]
    words = [np.uint64(draw), np.uint64(0), np.arange(count, dtype=np.uint64), np.uint64(0)]
    for _ in range(10):
        first, second = words[0] * np.uint64(0xD2511F53), words[2] * np.uint64(0xCD9E8D57)
        words = [
            (second >> half) ^ words[1] ^ np.uint64(keys[0]),
            second & low,
            (first >> half) ^ words[3] ^ np.uint64(keys[1]),
            first & low,
        ]
        keys = [(keys[0] + 0x9E3779B9) & 0xFFFFFFFF, (keys[1] + 0xBB67AE85) & 0xFFFFFFFF]
    radius = np.sqrt(-2 * np.log(words[0] * 2.0**-32 + 2.0**-33))
    return (radius * np.sin(2 * math.pi * (words[1] * 2.0**-32 + 2.0**-33))).astype(np.float32)


def normal_stream(rng: str, seed: int, shape: tuple[int, ...]) -> Callable[..., Any]:
    """A function that draws a seed's next float32 tensor of standard normal numbers, whatever it is given: with rng
    "cpu" as torch's generator there does, with "gpu" as CUDA's."""
    if rng == "cpu":
        generator = torch.Generator().manual_seed(seed)
        return lambda *_: torch.randn(shape, generator=generator)
    draws = itertools.count()
    return lambda *_: torch.from_numpy(philox_normal(seed, next(draws), math.prod(shape))).view(shape)


class BrownianTree:
    """A Brownian motion B along σ, of one image, as torchsde.BrownianTree(entropy=seed) grows it: B is 0 at the lowest
    σ; an interval's middle is drawn from a seed of its own, given the ends, down to σ of 6 digits. So B(σ) depends
    on neither the number of steps nor their order."""

    def __init__(self, rng: str, seed: int, low: float, high: float, shape: tuple[int, ...]) -> None:
        self.seed, self.low, self.high = seed, round(low, 6), round(high, 6)
        self._draw = lambda node_seed: normal_stream(rng, int(node_seed), shape)()
        end = self._draw(np.random.SeedSequence(seed, pool_size=24).generate_state(3)[0]) * math.sqrt(high - low)
        self._known = {self.low: torch.zeros(shape), self.high: end}  # σ -> B(σ)
        self._top = math.inf  # above it all is forgotten

    def noise(self, sigma: Any, following: Any) -> Any:
        """(B(following) - B(sigma)) / √|following - sigma|: k-diffusion's BrownianTreeNoiseSampler. Samplers go down:
        what lies above sigma is not asked for again, and forgotten."""
        before, after = self.at(sigma.item()), self.at(following.item())
        self._top = round(sigma.item(), 6)
        self._known = {point: value for point, value in self._known.items() if point <= self._top}
        return (after - before) / (following - sigma).abs().sqrt()

    def at(self, sigma: float) -> Any:
        """B(σ)."""
        wanted = min(max(round(sigma, 6), self.low), self.high)
        start, end, key, depth = self.low, self.high, 0, 0
        while wanted not in self._known:
            middle = round(0.5 * (start + end), 6)
            if middle not in self._known and middle <= self._top:
                node = np.random.SeedSequence(self.seed, spawn_key=(key, depth), pool_size=24).generate_state(4)[0]
                share, variance = (middle - start) / (end - start), (middle - start) * (end - middle) / (end - start)
                mean = self._known[start] + share * (self._known[end] - self._known[start])
                self._known[middle] = mean + math.sqrt(variance) * self._draw(node)
            right = wanted > middle
            start, end = (middle, end) if right else (start, middle)
            key, depth = 2 * key + right, depth + 1
        return self._known[wanted]


def drawn_ahead(
    pool: ThreadPoolExecutor, streams: list[Noise], requests: Iterable[tuple[Any, Any]], device: Any
) -> Iterator[Any]:
    """The noise (n, 4, h/8, w/8) of each (σ, next σ) in turn, on the device; streams: each image's. It is drawn in the
    pool's one thread while the GPU works, from now on, and moved without waiting."""

    def draw(request: tuple[Any, Any]) -> Any:
        noise = torch.stack([draw_one(*request) for draw_one in streams])
        return noise.pin_memory() if torch.device(device).type == "cuda" else noise

    def take() -> Iterator[Any]:
        while pending:
            noise = pending.popleft().result().to(device, non_blocking=True)
            pending.extend(pool.submit(draw, request) for request in islice(left, 1))
            yield noise

    left = iter(requests)
    pending = deque(pool.submit(draw, request) for request in islice(left, 4))  # more would only take memory
    return take()


# the loop


def rehearse(run: Callable[..., Run], sigmas: Any) -> tuple[list[Any], list[tuple[Any, Any]]]:
    """The σ of each network call, the (σ, next σ) of each noise: no picture changes them, so a run on 0 tells."""
    asked: list[tuple[Any, Any]] = []

    def noise(sigma: Any, following: Any) -> float:
        asked.append((sigma, following))
        return 0.0

    running = run(torch.zeros(()), sigmas, noise)
    network_sigmas = [next(running)[1]]
    with suppress(StopIteration):
        while True:
            network_sigmas.append(running.send(torch.zeros(()))[1])
    return network_sigmas, asked


class SamplerAsScheduler:
    """A sampler behind diffusers' scheduler interface: what StableDiffusionXLPipeline asks of one. Runs the last `run`
    of a schedule's steps. config: the checkpoint's."""

    def __init__(self, sampling: Sampling, steps: int, config: Mapping[str, Any], run: int) -> None:
        self.sampler = sampler = sampling.sampler
        self.v_prediction = config.get("prediction_type") == "v_prediction"
        levels = NoiseLevels(sampler.every, config.get("rescale_betas_zero_snr", False))
        schedule = sampler.uniform if sampling.schedule == "Uniform" else sampling.schedule
        self.sigmas = levels.schedule(schedule, steps + sampler.drops_next_to_last)
        if sampler.drops_next_to_last:
            self.sigmas = torch.cat([self.sigmas[:-2], self.sigmas[-1:]])
        self.span = self.sigmas[self.sigmas > 0].min().item(), self.sigmas.max().item()  # of all steps, run or not
        if run < steps:
            self.sigmas = self.sigmas[-run - 1 :]
        first = self.sigmas[0]
        self.init_noise_sigma = first if sampler.starts_at_sigma else (1 + first**2) ** 0.5
        self.network_sigmas, self.noise_requests = rehearse(sampler.run, self.sigmas)
        self.timesteps = levels.time_of(torch.stack(self.network_sigmas))  # float32 (network calls,)
        self.order = max(1, round(len(self.timesteps) / run))  # network calls a step
        self.noise: Iterator[Any] = iter(())  # one tensor for each of noise_requests
        self.keep: Callable[[Any], Any] = lambda denoised: denoised  # what a mask makes of it

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:  # noqa: ARG002 - diffusers' signature
        """Begins a run."""
        self.timesteps = self.timesteps.to(device)
        self._calls, self._running = 0, None

    def scale_model_input(self, sample: Any, _timestep: Any) -> Any:
        """x / √(1 + σ²), of variance 1: what the network was trained on."""
        return sample * (1 / (self.network_sigmas[self._calls] ** 2 + 1) ** 0.5)

    def step(self, model_output: Any, _timestep: Any, sample: Any, return_dict: bool = False) -> tuple[Any]:  # noqa: ARG002
        """From the network's output for x to the next x that it is to see, and in the end to the image's latents."""
        sigma = self.network_sigmas[self._calls]
        if self.v_prediction:  # VDenoiser.get_scalings
            denoised = sample / (sigma**2 + 1) - model_output * (sigma / (sigma**2 + 1) ** 0.5)
        else:
            denoised = sample - model_output * sigma
        denoised = self.keep(denoised)
        if self._running is None:
            self._running = self.sampler.run(sample, self.sigmas, lambda *_: next(self.noise))
            next(self._running)
        self._calls += 1
        try:
            return (self._running.send(denoised)[0],)
        except StopIteration as end:
            return (end.value,)


def build_diffusers_scheduler(sampling: Sampling, config: Mapping[str, Any], steps: int) -> Any:
    """diffusers' own class on the checkpoint's own configuration, whose prediction type stays."""
    kind, changes = sampling.sampler.diffusers
    if steps == 1:  # a single linspace or leading step is at t = 0 or 1, where there is no noise to take away
        changes = changes | {"timestep_spacing": "trailing"}
    return getattr(diffusers, kind).from_config(config, **changes)


@dataclass(frozen=True)
class Pass:
    """One run of a sampler: the last `run` steps of a schedule of `steps`, from noise, or from latents with as much
    noise on them as belongs there."""

    width: int
    height: int
    steps: int
    run: int
    latents: Any = None  # float32 (n or 1, 4, height/8, width/8) to start from; None: noise alone
    mask: Any = None  # bool (height/8, width/8): where they are drawn anew; None: everywhere


def plan_passes(request: JobRequest) -> list[Pass]:
    """The passes of a job, as A1111's setup_img2img_steps counts them; latents and masks are not there yet.

    Of 24 steps at strength 0.75 the last 19 run; 24 hires steps at 0.5 are the last of a schedule of 48.
    """
    width, height, steps, hires = request.width, request.height, request.steps, request.hires
    if request.image:
        return [Pass(width, height, steps, int(min(request.strength, 0.999) * steps) + 1)]
    passes = [Pass(width, height, steps, steps)]
    if hires:
        steps = hires.steps or steps
        width, height = (int(side * hires.scale) // 8 * 8 for side in (width, height))
        passes.append(Pass(width, height, int(min(steps / min(hires.strength, 0.999), MAX_HIRES_SCHEDULE + 1)), steps))
    return passes


def denoise(
    engine: Engine, request: JobRequest, conditioning: Conditioning, stage: Pass, on_step: Callable[[int], None]
) -> Any:
    """float32 latents (num_images, 4, height/8, width/8). Image i is what seeds[i] gives alone, whatever the batch.
    on_step is told how many of the pass's steps were launched."""
    pipe = copy.copy(engine.pipe)  # it gets the run's scheduler, and goes with the run's tensors
    unet, sampling, config = pipe.unet, request.scheduler, engine.scheduler_config
    shape = (unet.config.in_channels, stage.height // 8, stage.width // 8)
    streams = [normal_stream(request.rng, seed, shape) for seed in request.seeds]
    latents = torch.stack([draw() for draw in streams])
    if request.eta_noise_seed_delta:
        streams = [normal_stream(request.rng, seed + request.eta_noise_seed_delta, shape) for seed in request.seeds]

    def on_step_end(_pipe: Any, step: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
        on_step((step + 1) * stage.run // pipe.num_timesteps)  # Heun takes two a step
        return {}

    with (
        ThreadPoolExecutor(1, "noise") as pool,
        # the UNet takes float32 latents and gives float32: guidance and sampler do not round to its own type
        unet.register_forward_pre_hook(lambda _unet, args: (args[0].to(unet.dtype), *args[1:])),
        unet.register_forward_hook(lambda _unet, _args, output: (output[0].float(), *output[1:])),
    ):
        if sampling.schedule:
            scheduler = SamplerAsScheduler(sampling, stage.steps, config, stage.run)
            if scheduler.sampler.brownian:
                streams = [BrownianTree(request.rng, seed, *scheduler.span, shape).noise for seed in request.seeds]
            scheduler.noise = drawn_ahead(pool, streams, scheduler.noise_requests, pipe._execution_device)
            if stage.latents is not None:
                latents = stage.latents + latents.to(stage.latents.device) * scheduler.sigmas[0]
                scheduler.init_noise_sigma = 1.0
            if stage.mask is not None:
                scheduler.keep = lambda denoised: torch.where(stage.mask, denoised, stage.latents)
        else:
            scheduler = build_diffusers_scheduler(sampling, config, stage.steps)
        pipe.scheduler = scheduler
        latents = pipe(
            prompt_embeds=conditioning.prompt.embeds,
            negative_prompt_embeds=conditioning.negative.embeds,
            pooled_prompt_embeds=conditioning.prompt.pooled,
            negative_pooled_prompt_embeds=conditioning.negative.pooled,
            width=stage.width,
            height=stage.height,
            num_inference_steps=stage.run,
            guidance_scale=request.guidance_scale,
            num_images_per_prompt=request.num_images,
            latents=latents,
            callback_on_step_end=on_step_end,
            output_type="latent",
        ).images
    return latents if stage.mask is None else torch.where(stage.mask, latents, stage.latents)


# ---------------------------------------------------------------------------------------------------------------------
# images

# Z_RLE looks for runs alone: after PNG's filters a photograph has hardly any other repeats, so this is two to
# six times as fast as Pillow's default, and the file no larger.
ENCODINGS: dict[str, dict[str, Any]] = {
    "png": {"compress_level": 1, "compress_type": zlib.Z_RLE},
    "jpeg": {"quality": 95, "subsampling": 0},  # 4:4:4
    "webp": {"quality": 95},
}
LOSSLESS_WEBP = {"lossless": True, "method": 1, "quality": 20}  # method and quality: how long it tries to be small
FALLING_QUALITIES = (95, 90, 80, 65, 50, 35, 20, 10, 5)
EXIF_MAX_BYTES = 65_533  # what a JPEG marker holds
TIMES_BYTES = 300  # of an answer's metadata: the seconds, which are known last
LINK_SECONDS = 7 * 24 * 3600  # the longest that S3 signs, and the SDK's choice


# pictures that a job brings along

MAX_PICTURE_BYTES, MAX_PICTURE_PIXELS, MIN_PICTURE_SIDE = 20 * MB, 32_000_000, 64
PICTURE_S, MAX_REDIRECTS = 10, 3  # seconds for all that an address takes
# what Python's is_global lets pass: multicast, IETF's own (Oracle's metadata service), tunnels to IPv4 (6to4, Teredo)
NOT_PUBLIC = ("224.0.0.0/4", "192.0.0.0/24", "2002::/16", "2001::/32")
DATA_URI = re.compile(r"\s*data:[^,]*;\s*base64\s*,", re.IGNORECASE)
# what Pillow raises for broken files, and for headers of pictures too large
PICTURE_FAULTS = (OSError, ValueError, SyntaxError, LookupError, TypeError, ArithmeticError, struct.error, zlib.error)
PICTURE_FAULTS += (EOFError, Image.DecompressionBombError)


def read_picture(text: str, name: str) -> Image.Image:
    """The PNG, JPEG or WebP file in base64, a data: URI or at an https address, as RGB; its info["sha256"], by which a
    recipe tells it, is of the file. name is the job's field. Nothing of the text or the picture stands in an error.
    Raises InvalidInput, DownloadFailed."""
    if text[:100].strip().lower().startswith("https:"):
        data = fetch_picture(text.strip(), name)
    else:
        start = DATA_URI.match(text)
        encoded = "".join(text[start.end() if start else 0 :].split())
        try:
            data = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
        except ValueError:
            raise InvalidInput(f"{name} must be base64, a data: URI of base64, or an https address") from None
    if len(data) > MAX_PICTURE_BYTES:
        raise InvalidInput(f"{name} must have at most {MAX_PICTURE_BYTES / MB:g} MB, got {len(data) / MB:.1f} MB")
    limits = f"with sides of at least {MIN_PICTURE_SIDE} and at most {MAX_PICTURE_PIXELS / 1e6:g} million pixels"
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))  # reads the header
        if min(image.size) < MIN_PICTURE_SIDE or image.width * image.height > MAX_PICTURE_PIXELS:
            raise InvalidInput(f"{name} must be a picture {limits}, got {image.width}x{image.height}")
        image = as_rgb(ImageOps.exif_transpose(image))
    except PICTURE_FAULTS:
        raise InvalidInput(
            f"{name} must be a whole PNG, JPEG or WebP picture {limits}: it is another file, or damaged or cut off"
        ) from None
    image.info = {"sha256": hashlib.sha256(data).hexdigest()}  # alone: the file's profile is not the drawn picture's
    return image


def as_rgb(image: Any) -> Any:
    """A PIL image of any mode as RGB, its transparent parts on white."""
    if image.mode.startswith("I"):  # grey of 16 bits, which Pillow would clip to white
        image = Image.fromarray((np.asarray(image) / 257 + 0.5).astype(np.uint8))
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def fetch_picture(url: str, name: str) -> bytes:
    """The file at an https address. All of it takes PICTURE_S at most: looking names up, redirects, and servers that
    send a byte a second. Raises InvalidInput for addresses that are not public, DownloadFailed."""
    opened: list[Any] = []
    try:
        return in_background(follow_address, url, name, time.monotonic() + PICTURE_S, opened).result(PICTURE_S)
    except TimeoutError:
        for sock in opened:  # which ends the thread too
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        raise DownloadFailed(f"{name}: its address took longer than {PICTURE_S} s") from None
    except (OSError, ValueError, HTTPException, urllib3.exceptions.HTTPError) as error:
        raise DownloadFailed(f"{name}: its address could not be fetched ({type(error).__name__})") from None


def follow_address(url: str, name: str, until: float, opened: list[Any]) -> bytes:
    """fetch_picture in its thread; opened gets the sockets, none after `until`. A name is looked up once, and the
    connection goes to what was checked, by no proxy: the name stands in certificate and Host alone."""
    for _ in range(MAX_REDIRECTS + 1):
        parts = urllib3.util.Url()
        with suppress(urllib3.exceptions.LocationParseError):
            parts = urllib3.util.parse_url(url)
        if parts.scheme != "https" or not parts.host or parts.auth:
            raise InvalidInput(f"{name} must be an https address without a user name, and redirect to no other")
        host, port = parts.host.strip("[]"), parts.port or 443
        address = public_address(host, port, name)
        trust = {"server_hostname": host, "ca_certs": requests.certs.where(), "cert_reqs": "CERT_REQUIRED"}
        left_s = max(until - time.monotonic(), 0.1)
        connection = urllib3.connection.HTTPSConnection(address, port, timeout=left_s, **trust)
        headers = {"Host": parts.netloc, "User-Agent": USER_AGENT, "Accept-Encoding": "identity"}
        try:
            connection.connect()
            opened.append(connection.sock)
            if time.monotonic() > until:
                raise TimeoutError
            connection.request("GET", parts.request_uri, headers=headers, preload_content=False)
            response = connection.getresponse()
            if response.status == 200:
                return response.read(MAX_PICTURE_BYTES + 1)
            if not (location := response.get_redirect_location()):
                raise DownloadFailed(f"{name}: its address answers with status {response.status}")
            url = urljoin(url, location)
        finally:
            connection.close()
    raise InvalidInput(f"{name} must be an address that redirects at most {MAX_REDIRECTS} times")


def public_address(host: str, port: int, name: str) -> str:
    """An IP address of the host, IPv4 if there is one. Raises InvalidInput where any of them is not public,
    DownloadFailed where there is none."""
    try:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except UnicodeError:
        found = []
    except OSError:
        raise DownloadFailed(f"{name}: its host cannot be found") from None
    if not found or not all(map(is_public, found)):
        raise InvalidInput(f"{name} must be at a public address of the internet; this host is not")
    return min(found, key=lambda address: ":" in address)


def is_public(address: str) -> bool:
    """Whether an IP address is of the public internet, and none of NOT_PUBLIC."""
    ip = ipaddress.ip_address(address)
    is_unicast = ip.version == 4 or ip in ipaddress.ip_network("2000::/3")
    return ip.is_global and is_unicast and not any(ip in ipaddress.ip_network(network) for network in NOT_PUBLIC)


# recipes

RECIPE_KEY = re.compile(r"\s*(\w[\w \-/]+):\s*")
RECIPE_VERSION = "sdxl-worker"
RECIPE_RNG = {"CPU": "cpu", "GPU": "gpu", "NV": "gpu"}  # A1111's words; NV is its GPU noise on any card
COMFYUI_KEYS = {"CFG Scale": "CFG scale", "Scheduler": "Schedule type"}  # as its savers write A1111's keys
# what a recipe notes and no picture depends on
RECIPE_NOTES = ("User", "Created Date", "Civitai metadata", "Batch size", "Batch pos", "VAE hash")
RECIPE_NOTES += ("Template", "Negative Template")  # of the Dynamic Prompts extension


@dataclass(frozen=True)
class UsedModel:
    """A checkpoint, LoRA or embedding as a recipe names it."""

    kind: str  # Civitai's word: "checkpoint", "lora", "embed"
    name: str
    stem: str  # the file's name without its suffix; what prompts call an embedding
    version: str
    short_hash: str  # "" where unknown
    scale: float | None = None  # a LoRA's


def used_models(
    engine: Engine, models: JobModels, scales: Mapping[str, float], embeddings: Iterable[str]
) -> list[UsedModel]:
    """What a job's pictures are drawn with: the checkpoint, LoRAs at their scales, embeddings by their names."""
    settings, config = engine.settings, engine.settings.checkpoint
    stem, short_hash = Path(config["filename"]).stem, recorded_hash(engine.files.checkpoint)
    used = [UsedModel("checkpoint", config["name"], stem, version_id(config), short_hash)]
    for adapter, scale in scales.items():
        file = models.files.get(("loras", adapter)) or engine.files.loras[adapter]
        config = settings.stack.get(adapter) or civitai_config(adapter.removeprefix("civitai_"))
        used.append(UsedModel("lora", config["name"], file.stem, version_id(config), addnet_hash(file), scale))
    for name in embeddings:
        file = models.files.get(("embeddings", name)) or engine.files.embeddings.get(name)
        if file:  # else a LoRA brings it along
            version = file.stem.removeprefix("civitai_")
            used.append(UsedModel("embed", name, name, version, recorded_hash(file, 12)))
    return used


def write_recipe(request: JobRequest, seed: int, vae: str, models: list[UsedModel]) -> str:
    """What A1111 and Civitai read back from an image, unknown parts left out:

        a cat
        Negative prompt: blurry
        Steps: 24, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 4.5, Seed: 1, Size: 1024x1024, ...

    Fields in A1111's order, values quoted by its rule. Civitai's own list, by which it links an image to its models,
    comes last: its parser takes the JSON up to the first "}]".
    """
    sampling, checkpoint = request.scheduler, models[0]
    named = [(model.kind, re.sub("[,:]", "", model.stem), model.short_hash) for model in models if model.short_hash]
    hashes = {
        kind: ", ".join(f"{stem}: {short_hash}" for of_kind, stem, short_hash in named if of_kind == kind)
        for kind in ("lora", "embed")  # as A1111 writes "Detail_v1: a1b2c3d4"
    }
    plain = str(sampling) == sampling.name  # which A1111 and this worker read as the sampler alone
    fields = {
        "Steps": request.steps,
        "Sampler": sampling.name,
        "Schedule type": "" if plain else sampling.schedule,
        "CFG scale": repr(request.guidance_scale).removesuffix(".0"),
        "Seed": seed,
        "Size": f"{request.width}x{request.height}",
        "Model hash": checkpoint.short_hash,
        "Model": re.sub("[,:]", "", checkpoint.stem),
        "VAE": vae,
        "Clip skip": request.clip_skip,
        "ENSD": request.eta_noise_seed_delta or "",
        "Lora hashes": hashes["lora"],
        "TI hashes": hashes["embed"],
        "Emphasis": "No norm" if request.emphasis == "no norm" else "",
        "RNG": "CPU" if request.rng == "cpu" else "",
        **picture_keys(request),
        "Long prompt": "" if request.long_prompt == "concat" else request.long_prompt,
        "Version": RECIPE_VERSION,
    }
    details = [f"{name}: {quote(str(value))}" for name, value in fields.items() if value != ""]
    resources = [
        {"type": model.kind}
        | ({} if model.scale is None else {"weight": model.scale})
        | {"modelVersionId": int(model.version), "modelName": model.name}
        for model in models
        if model.version
    ]
    if resources:
        details.append(f"Civitai resources: {json.dumps(resources, separators=(',', ':'), ensure_ascii=False)}")
    prompts = {"Exact prompt": request.prompt, "Exact negative prompt": request.negative_prompt}
    # NUL would end a PNG's text; a line of a prompt that begins with "Steps:" would hide the recipe's from Civitai,
    # which takes the first
    lines = [prompt.replace("\0", "").replace("Steps:", "Steps :") for prompt in prompts.values()]
    text = lines[0] + (f"\nNegative prompt: {lines[1]}" if lines[1] else "") + "\n"
    *read, _ = parse_recipe(text + ", ".join(details))
    for (name, prompt), known in zip(prompts.items(), read, strict=True):
        if prompt != known:  # without commas and colons, which other readers would take for a key's
            exact = re.sub(r"[,:]|[^\S ]", lambda c: f"\\u{ord(c[0]):04x}", json.dumps(prompt, ensure_ascii=False))
            details.append(f"{name}: {exact}")
    return (text + ", ".join(details)).strip()


def picture_keys(request: JobRequest) -> dict[str, Any]:
    """What a recipe says of the picture that a job began with and of hires, in A1111's words."""
    keys: dict[str, Any] = {}
    if hires := request.hires:
        keys |= {
            "Denoising strength": hires.strength,
            "Hires upscale": repr(hires.scale).removesuffix(".0"),
            "Hires steps": hires.steps or "",
            "Hires upscaler": hires.upscaler.capitalize(),
        }
    if request.image:
        keys |= {"Denoising strength": request.strength, "Image SHA256": request.image.info["sha256"]}
    if request.mask:
        keys |= {"Mask blur": request.mask_blur, "Mask SHA256": request.mask.info["sha256"]}
    return keys


def read_picture_keys(keys: dict[str, str], warnings: list[str]) -> dict[str, tuple[str, Any]]:
    """The fields that picture_keys' keys, which it takes, stand for; of the pictures image_sha256 and mask_sha256."""
    found: dict[str, tuple[str, Any]] = {}
    for name in ("Image SHA256", "Mask SHA256"):
        if name in keys:
            found[name.lower().replace(" ", "_")] = name, keys.pop(name)
    numbers = {"Mask blur": "mask_blur"} | ({} if "Hires upscale" in keys else {"Denoising strength": "strength"})
    found |= {field: (key, as_number(keys.pop(key))) for key, field in numbers.items() if key in keys}
    if "Hires upscale" not in keys:
        return found
    hires = {"Hires upscale": "scale", "Denoising strength": "strength", "Hires steps": "steps"}
    values = {field: as_number(keys.pop(key)) for key, field in hires.items() if key in keys}
    upscaler = keys.pop("Hires upscaler", "Latent")
    values["upscaler"] = upscaler.lower()
    if values["upscaler"] not in UPSCALERS:
        if upscaler != "None":  # which is A1111's word for Lanczos here
            warnings.append(f"the recipe's Hires upscaler {shown(upscaler)} is not here: lanczos was taken")
        values["upscaler"] = "lanczos"
    return found | {"hires": ("Hires", values)}


def hires_scale(resize: str, size: str) -> str:
    """A1111's "Hires resize" as "Hires upscale": "1664x2432" or "1664x0" of "832x1216" -> "2.0"; "" where no scale
    leads to these sides, such as those of another shape, to which A1111 would crop."""
    with suppress(ValueError, ArithmeticError):
        sides = [(int(to), int(side)) for to, side in zip(resize.split("x"), size.split("x"), strict=True)]
        for scale in (to / side for to, side in sides if to > 0):
            for near in (scale, math.nextafter(scale, math.inf)):  # int() may round a side down
                if all(to in (0, int(side * near)) for to, side in sides):
                    return str(near)
    return ""


def quote(value: str) -> str:
    """A1111's rule for values: 'a' -> 'a', 'a: 1, b: 2' -> '"a: 1, b: 2"'."""
    return json.dumps(value, ensure_ascii=False) if re.search(r"[,:\n]", value) else value


def parse_recipe(text: str) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt, and the keys and values of the last line; no keys where that is not a recipe's, which
    has "Steps" first and at least three.

    "a cat\\nSteps: 20, Sampler: Euler a, Size: 8x8" -> "a cat", "", {"Steps": "20", "Sampler": "Euler a", ...}. Reads
    as A1111's parse_generation_parameters does, and JSON, which Civitai writes without quotes, whole. What stands
    between two commas without a key is a key without a value; what a key says a second time stands under "… again".
    """
    # the Dynamic Prompts extension writes below it of which templates it made the prompts
    text = re.sub(r"^(Steps: .*)\n(Negative )?Template[\s\S]*", r"\1", text.strip(), flags=re.MULTILINE)
    lines = text.split("\n")
    # 1. prompts
    prompts: tuple[list[str], list[str]] = [], []
    negative = False
    for line in map(str.strip, lines[:-1]):
        if line.startswith("Negative prompt:"):
            negative, line = True, line.removeprefix("Negative prompt:").strip()
        prompts[negative].append(line)
    # 2. keys
    line, at, pairs, keys = lines[-1], 0, 0, {}
    while at < len(line):
        key = RECIPE_KEY.match(line, at)
        start = key.end() if key else at
        end = line.find(",", start) % (len(line) + 1)  # the line's where there is no comma
        name, value = (key[1], line[start:end].strip()) if key else (line[start:end].strip(), "")
        name = COMFYUI_KEYS.get(name, name)
        if key and line[start : start + 1] in ('"', "[", "{"):
            with suppress(ValueError, RecursionError):
                parsed, stop = json.JSONDecoder().raw_decode(line, start)
                if after := re.compile(r"\s*(?=,|$)").match(line, stop):
                    end, value = after.end(), parsed if isinstance(parsed, str) else line[start:stop]
        if name and keys.setdefault(name, value) != value:
            keys[f"{name} again"] = value
        at, pairs = end + 1, pairs + bool(key)
    return *map("\n".join, prompts), keys if pairs >= 3 and next(iter(keys)) == "Steps" else {}


def read_recipe(text: str, settings: Settings) -> tuple[dict[str, tuple[str, Any]], list[str]]:
    """Generation data, as A1111, Forge, Civitai and this worker write it: job field -> (the recipe's key, the value),
    and a warning for all that cannot be honoured. What a recipe leaves out is A1111's default, not this worker's.

    Raises InvalidInput for a text that is no recipe; the values are the fields' to check.
    """
    prompt, negative_prompt, keys = parse_recipe(text)
    if not keys:
        raise InvalidInput(
            "parameters must be a picture's generation data: its last line begins with Steps and holds at least three "
            '"key: value" pairs, such as "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 1024x1024"'
        )
    own, warnings = keys.pop("Version", "") == RECIPE_VERSION, []
    for note in RECIPE_NOTES:
        keys.pop(note, None)
    if absent := [key for key in ("Sampler", "CFG scale", "Seed", "Size") if key not in keys]:
        warnings.append(f"the recipe names no {', '.join(absent)}: the job's other fields or their defaults stand")
    # 1. prompts; where the lines above do not give them back to the letter, they stand among the keys
    negative_prompt = keys.pop("Exact negative prompt", negative_prompt)
    prompt, models = keys.pop("Exact prompt", prompt), RecipeModels(keys, settings)
    models.read_resources(f"{prompt} {negative_prompt}")
    prompt = models.read_hashes(prompt)
    models.read_checkpoint()
    if models.missing:
        warnings.append(f"the recipe names models that this worker does not have: {', '.join(models.missing)}")
    # 2. numbers and words
    clip_skip = as_number(keys.pop("Clip skip", "2"))
    rng, emphasis = keys.pop("RNG", "GPU"), keys.pop("Emphasis", "original").lower()
    if emphasis not in EMPHASES:
        warnings.append(f"the recipe's Emphasis {shown(emphasis)} is not here: original was taken")
        emphasis = "original"
    fields: dict[str, tuple[str, Any]] = {
        "prompt": ("prompt", prompt),
        "negative_prompt": ("negative prompt", negative_prompt),
        "loras": ("Civitai resources", [*models.loras.values()]),
        "embeddings": ("Civitai resources", [*models.embeddings.values()]),
        "clip_skip": ("Clip skip", clip_skip if own else 2),  # A1111's does nothing on SDXL
        "rng": ("RNG", RECIPE_RNG.get(rng, rng)),
        "emphasis": ("Emphasis", emphasis),
        "long_prompt": ("Long prompt", keys.pop("Long prompt", "concat")),
    }
    numbers = {"Steps": "steps", "CFG scale": "guidance_scale", "Seed": "seed", "ENSD": "eta_noise_seed_delta"}
    fields |= {field: (key, as_number(keys.pop(key))) for key, field in numbers.items() if key in keys}
    if "Size" in keys:
        if scale := hires_scale(keys.get("Hires resize", ""), keys["Size"]):
            keys["Hires upscale"] = scale
            del keys["Hires resize"]
        width, _, height = keys.pop("Size").partition("x")
        fields |= {"width": ("Size's width", as_number(width)), "height": ("Size's height", as_number(height))}
    # 3. sampler and schedule
    if "Sampler" in keys:
        sampler, schedule = keys.pop("Sampler"), keys.pop("Schedule type", None)
        if sampler == "DDIM" and not own:
            schedule = "Uniform"  # A1111's, which knows no other; alone it would be diffusers'
        try:
            sampler = str(read_sampling("Sampler", sampler, schedule))
        except InvalidInput:  # where it is for the sampler, the field's check says so
            if schedule:
                warnings.append(f"the recipe's Schedule type {shown(schedule)} is not here for {shown(sampler)}")
        fields["scheduler"] = "Sampler", sampler
    # 4. pictures and the rest
    fields |= read_picture_keys(keys, warnings)
    if keys:
        rest = ", ".join(f"{key} {shown(value)}" if value else shown(key) for key, value in keys.items())
        warnings.append(f"of the recipe, this worker leaves out: {rest}")
    return fields, warnings


def as_number(value: str) -> int | float | str:
    """The number that a recipe's value spells, else the value: "20" -> 20, "4.5" -> 4.5, "big" -> "big"."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(value)
    return value


@dataclass
class RecipeModels:
    """What a recipe says of models, by their version ids, hashes and names. Each method reads some of the keys and
    takes them; what cannot be read is left among them."""

    keys: dict[str, str]
    settings: Settings
    loras: dict[str, dict[str, Any]] = field(default_factory=dict)  # adapter -> entry of the job's field
    embeddings: dict[str, dict[str, Any]] = field(default_factory=dict)  # version id -> entry of the job's field
    checkpoints: dict[str, Any] = field(default_factory=dict)  # version id -> name
    missing: list[str] = field(default_factory=list)  # what is not here, in words

    def take_json(self, key: str) -> Any:
        """What a key holds; None where that is no JSON."""
        with suppress(KeyError, ValueError, RecursionError):
            found = json.loads(self.keys[key])
            del self.keys[key]
            return found
        return None

    def read_resources(self, prompts: str) -> None:
        """Civitai's own list. prompts: of an embedding's names the one that they use counts."""
        settings, resources = self.settings, self.take_json("Civitai resources") or []
        words: set[str] = set()
        for item in resources if isinstance(resources, list) else [resources]:
            model = item if isinstance(item, dict) else {"modelName": item}
            kind, version = read_air(model.get("air"))  # as ComfyUI's savers write it
            if kind:
                model = model | {"type": kind, "modelVersionId": version}
            version, name, weight = (model.get(key) for key in ("modelVersionId", "modelName", "weight"))
            version = str(version) if re.fullmatch(VERSION_ID, str(version)) else ""
            kind, adapter = str(model.get("type")).lower(), settings.adapter(version)
            by_id = version and settings.allows(version)
            if adapter in settings.stack or (by_id and kind in LORA_TYPES):
                called = {"name": adapter} if adapter in settings.stack else {"civitai": int(version)}
                self.loras[adapter] = called | {"scale": 1.0 if weight is None else weight}
            elif kind in ("checkpoint", "model"):
                self.checkpoints[version] = name
            elif by_id and kind in ("embed", *EMBEDDING_TYPES):
                self.embeddings[version] = {"civitai": int(version)}
                # other writers put the model's title here, this worker the word that the prompt uses
                if isinstance(name, str) and re.fullmatch(EMBEDDING_NAME, name) and name.lower() not in words:
                    found = embedding_use(re.escape(name)).search(prompts)
                    self.embeddings[version] |= {"name": name} if found else {}
                    words |= {name.lower()} if found else set()
            else:
                named = [shown(model[key]) for key in ("type", "modelName", "modelVersionId") if key in model]
                self.missing.append(" ".join(named))

    def read_hashes(self, prompt: str) -> str:
        """What hashes tell; the prompt, in which <lora:…> tags whose file one tells get the stack's names."""
        hashes, embedding_hashes = (
            dict(map(str.strip, pair.split(":", 1)) for pair in self.keys.pop(key, "").split(",") if ":" in pair)
            for key in ("Lora hashes", "TI hashes")
        )
        noted = self.take_json("Hashes")  # {"model": ..., "lora:<name>": ..., "embed:<name>": ...}
        for key, digits in noted.items() if isinstance(noted, dict) else ():
            kind, _, name = key.partition(":")
            kind = kind.lower()
            of_kind = {"lora": hashes, "lyco": hashes, "embed": embedding_hashes}.get(kind)
            if of_kind is not None:
                of_kind.setdefault(name, digits if isinstance(digits, str) else "")
            elif kind == "model" and isinstance(digits, str):
                self.keys.setdefault("Model hash", digits)
            elif kind != "vae":
                self.missing.append(shown(key))
        known, by_hash = stack_names(self.settings), {}
        unknown = [name for name in hashes if sanitize_name(name) not in known]
        for adapter, config in self.settings.stack.items() if unknown else ():
            file = self.settings.lora_dir / config["filename"]
            if file.is_file():
                by_hash |= dict.fromkeys((addnet_hash(file)[:10], recorded_hash(file)), adapter)
        by_hash.pop("", None)
        renamed = {name: by_hash[short] for name in unknown if (short := hashes[name][:10].lower()) in by_hash}
        tags, by_id = dict(split_lora_tags(prompt)[1]), any("civitai" in lora for lora in self.loras.values())
        for name in hashes:
            if name not in tags and renamed.get(name, known.get(sanitize_name(name))) not in self.loras and not by_id:
                self.missing.append(f"LoRA {shown(name)}, which the prompt does not use")  # by an id it may be in use
        if not self.embeddings:
            here = [config["name"].lower() for config in self.settings.embeddings]
            self.missing += [f"embedding {shown(name)}" for name in embedding_hashes if name.lower() not in here]
        return LORA_TAG.sub(
            lambda tag: tag[0].replace(f":{tag[1]}", f":{renamed.get(tag[1].strip(), tag[1])}", 1), prompt
        )

    def read_checkpoint(self) -> None:
        """The checkpoint, by version id, else by hash, else by name, and the VAE, where this worker has others."""
        checkpoint, keys = self.settings.checkpoint, self.keys
        name, digits, vae = keys.pop("Model", ""), keys.pop("Model hash", "").lower(), keys.pop("VAE", "")
        own_hash = recorded_hash(self.settings.checkpoint_dir / checkpoint["filename"])
        if self.checkpoints:
            same = version_id(checkpoint) in self.checkpoints
            name = name or next(iter(self.checkpoints.values())) or next(iter(self.checkpoints))
        elif own_hash and len(digits) >= len(own_hash):
            same = digits.startswith(own_hash)
        else:
            names = [sanitize_name(text) for text in (checkpoint["name"], Path(checkpoint["filename"]).stem)]
            same = not (name or digits) or sanitize_name(name) in names
        if not same:
            self.missing.append(f"checkpoint {shown(name or digits)} (here it is {checkpoint['name']})")
        own_vae = Path(self.settings.vae_model).name
        if vae not in ("", "None", "Automatic", own_vae) and not re.match("sdxl[-_ ]?vae", vae, re.IGNORECASE):
            self.missing.append(f"VAE {shown(vae)} (here it is {own_vae})")


@functools.cache
def addnet_hash(file: Path) -> str:
    """A1111's hash of a LoRA: 12 digits of the SHA256 of what follows the safetensors header, "" if unreadable."""
    try:
        with file.open("rb") as stream:
            stream.seek(8 + int.from_bytes(stream.read(8), "little"))
            return hashlib.file_digest(stream, "sha256").hexdigest()[:12]
    except OSError as error:
        log.warning("no hash of %s: %s", file.name, error)
        return ""


# files


def encode_image(image: Any, recipe: str, image_format: str, **options: Any) -> bytes:
    """A PIL image as a png, jpeg or webp file with its recipe; options overrule ENCODINGS."""
    options = ENCODINGS[image_format] | options
    if recipe and image_format == "png":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_text("parameters", recipe)  # tEXt, or iTXt for what Latin-1 cannot write
    elif recipe:
        options["exif"] = exif_user_comment(recipe)
        if image_format == "jpeg" and len(options["exif"]) > EXIF_MAX_BYTES:
            log.warning("a recipe of %d characters does not fit into a JPEG and is left out", len(recipe))
            del options["exif"]
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def exif_user_comment(text: str) -> bytes:
    """An EXIF block that holds a UserComment, as A1111 writes it: big-endian, UTF-16. By hand, since Pillow would
    type the comment BYTE instead of UNDEFINED, which A1111's reader, piexif, does not take."""
    comment = b"UNICODE\0" + text.encode("utf-16-be")
    header = struct.pack(">2sHI", b"MM", 42, 8)
    pointer = struct.pack(">HHHIII", 1, 0x8769, 4, 1, 26, 0)  # IFD 0: one LONG, the offset of the Exif IFD
    entry = struct.pack(">HHHIII", 1, 0x9286, 7, len(comment), 44, 0)  # Exif IFD: one UNDEFINED, the comment
    return b"Exif\0\0" + header + pointer + entry + comment


def encode_images(images: list[Any], recipes: list[str], image_format: str, **options: Any) -> list[bytes]:
    """The files of a batch, encoded side by side: zlib, libjpeg and libwebp work without the GIL."""
    with ThreadPoolExecutor(len(images)) as pool:
        return list(pool.map(lambda *given: encode_image(*given, image_format, **options), images, recipes))


# answers and buckets


def deliver(
    answer: dict[str, Any], images: list[Any], recipes: list[str], bucket: Bucket | None, max_bytes: int, job_id: str
) -> dict[str, Any]:
    """The answer with its images: links where there is a bucket, else base64.

    In base64 it is at most max_bytes of JSON: RunPod drops a larger one after the GPU time is spent. What would be
    larger goes as lossless WebP, then as JPEG of falling quality, and metadata says so.
    answer: all but the images and the times. Raises GenerationFailed where nothing fits, UploadFailed.
    """
    wanted = answer["metadata"]["image_format"]
    if bucket:
        return answer | {"images": upload_images(encode_images(images, recipes, wanted), wanted, bucket, job_id)}
    attempts: list[tuple[str, dict[str, Any], str]] = [(wanted, {}, wanted)]
    if wanted == "png":
        attempts.append(("webp", LOSSLESS_WEBP, "lossless WebP"))
    for quality in FALLING_QUALITIES[wanted == "jpeg" :]:  # a JPEG of the first was tried
        attempts.append(("jpeg", {"quality": quality}, f"JPEG of quality {quality}"))
    for image_format, options, what in attempts:
        files = encode_images(images, recipes, image_format, **options)
        metadata = answer["metadata"] | {"image_format": image_format}
        if options:
            note = f"as {wanted} the answer would be larger than {max_bytes / MB:g} MB: sent as {what}"
            metadata["warnings"] = [*metadata["warnings"], note]
        images_bytes = sum(-(-len(file) // 3) * 4 + len('"", ') for file in files)
        if len(json.dumps({"output": answer | {"metadata": metadata}})) + TIMES_BYTES + images_bytes <= max_bytes:
            return answer | {"images": [base64.b64encode(file).decode() for file in files], "metadata": metadata}
    raise GenerationFailed(
        f"the images do not fit into an answer of {max_bytes / MB:g} MB: ask for fewer or smaller ones, or set a bucket"
    )


def job_bucket(job: Mapping[str, Any], settings: Settings) -> Bucket | None:
    """The bucket that a job brings along in its envelope, else the configured one. Raises UploadFailed for an s3Config
    with pieces missing."""
    config = job.get("s3Config")
    if config is None:
        return settings.bucket
    given = config if isinstance(config, dict) else {}
    keys = ("endpointUrl", "accessId", "accessSecret", "bucketName")
    missing = [key for key in keys if not (isinstance(given.get(key), str) and given[key].strip())]
    if missing:
        raise UploadFailed(f"s3Config needs {', '.join(keys)} as text; missing: {', '.join(missing)}")
    if not is_address(given["endpointUrl"].strip()):
        raise UploadFailed(
            "check the bucket's endpoint and name: endpointUrl must be an address such as https://s3.host"
        )
    return Bucket(*(given[key].strip() for key in keys))


def upload_images(files: list[bytes], image_format: str, bucket: Bucket, job_id: str) -> list[str]:
    """Puts the files to <bucket>/<job id>/ and returns links that are good for seven days, as the SDK's rp_upload does;
    that would go on without a bucket when it is refused, and wait for minutes. Raises UploadFailed."""
    name = bucket.name or time.strftime("%m-%y")

    def upload(file: bytes) -> str:
        place = {"Bucket": name, "Key": f"{job_id}/{secrets.token_hex(4)}.{image_format}"}
        client.put_object(**place, Body=file, ContentType=f"image/{image_format}")
        return client.generate_presigned_url("get_object", Params=place, ExpiresIn=LINK_SECONDS)

    try:
        client = boto3.Session().client(
            "s3",
            endpoint_url=bucket.endpoint_url,
            aws_access_key_id=bucket.access_key_id,
            aws_secret_access_key=bucket.secret_access_key,
            region_name=rp_upload.extract_region_from_url(bucket.endpoint_url),
            config=botocore.config.Config(
                signature_version="s3v4",
                connect_timeout=5,  # with these it gives up after about a minute, not after three
                read_timeout=20,
                retries={"max_attempts": 3, "mode": "standard"},
                request_checksum_calculation="when_required",  # the default's trailers are unknown to older S3 servers
                response_checksum_validation="when_required",
            ),
        )
        with ThreadPoolExecutor(len(files)) as pool:
            return list(pool.map(upload, files))
    except botocore.exceptions.ClientError as error:
        code = re.sub("[^A-Za-z0-9]", "", str(error.response["Error"].get("Code")))
        raise UploadFailed(f"the bucket refused the image: {code}") from None
    except (botocore.exceptions.BotoCoreError, ValueError) as error:
        reason = type(error).__name__
        raise UploadFailed(f"the upload failed with {reason}: check the bucket's endpoint and name") from None


# ---------------------------------------------------------------------------------------------------------------------
# jobs

MAX_PROMPT, MAX_RECIPE = 10_000, 30_000  # characters
MAX_SEED = 2**32
SIDES = 256, 2048  # pixels
MAX_HIRES_SIDE, MAX_HIRES_SCHEDULE = 4096, 999  # pixels; steps: the network knows 1,000 levels of noise
MAX_LISTED = 64  # LoRAs, embeddings
REQUIRED = object()


# checks: each takes a field's name and its value, and returns the value as the worker uses it, or raises InvalidInput

Check = Callable[[str, Any], Any]


def shown(value: object) -> str:
    """A value as an error message quotes it: short, printable, whatever it is."""
    if isinstance(value, int) and abs(value) >= 10**40:
        return "a huge integer"
    try:
        text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    except (ValueError, RecursionError):  # int -> str refuses more than 4,300 digits, here somewhere within
        return "a huge value"
    return text if len(text) <= 80 else f"{text[:77]}..."


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint for a misspelt name: "heigth" -> '; did you mean "height"?'."""
    lowered = {known.lower(): known for known in names}
    close = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.45)
    return f'; did you mean "{lowered[close[0]]}"?' if close else ""


def refuse_unknown(given: Mapping[Any, Any], known: Iterable[str], where: str = "") -> None:
    """Raises InvalidInput for a field that is not known, and suggests the nearest."""
    for name in given:
        if name not in known:
            raise InvalidInput(f"{where}unknown field {shown(name)}{nearest(str(name), known)}")


def text_of(low: int, high: int) -> Check:
    """Text of low to high characters."""

    def check(name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise InvalidInput(f"{name} must be text, got {shown(value)}")
        if not low <= len(value) <= high:
            raise InvalidInput(f"{name} must have {low:,} to {high:,} characters, got {len(value):,}")
        return value

    return check


def number(low: float, high: float, whole: bool = False, multiple_of: int = 1, above: bool = False) -> Check:
    """A number from low, or above it, to high; neither true nor NaN."""
    limits = f"{'above' if above else 'from'} {low:.10g}{', up' * above} to {high:.10g}"

    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            raise InvalidInput(f"{name} must be a {'whole ' * whole}number, got {shown(value)}")
        if not low <= value <= high or (above and value == low):
            raise InvalidInput(f"{name} must be {limits}, got {shown(value)}")
        if value % multiple_of and whole:
            raise InvalidInput(f"{name} must be a multiple of {multiple_of}, got {value}")
        return value if whole else float(value)

    return check


above_0_to_1 = number(0, 1, above=True)  # a strength: how much of the noise a picture gets


def one_of(choices: Iterable[str]) -> Check:
    """One of the names."""

    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            hint = nearest(value, choices) if isinstance(value, str) else ""
            raise InvalidInput(f"{name} must be one of {', '.join(choices)}; got {shown(value)}{hint}")
        return value

    return check


def true_or_false(name: str, value: Any) -> bool:
    """true or false."""
    if not isinstance(value, bool):
        raise InvalidInput(f"{name} must be true or false, got {shown(value)}")
    return value


def seed_or_random(name: str, value: Any) -> int:
    """A seed from 0 to 2**32-1; null and -1 draw one."""
    if value is None or (type(value) is int and value == -1):
        return secrets.randbelow(MAX_SEED)
    return int(number(0, MAX_SEED - 1, whole=True)(name, value))


def picture_text(name: str, value: Any) -> str | None:
    """A picture's text, not read yet; null is none. Quotes nothing of it."""
    if value is not None and not isinstance(value, str):
        raise InvalidInput(f"{name} must be text: base64, a data: URI or an https address")
    return value


def or_null(check: Check) -> Check:
    """What check takes, or null."""
    return lambda name, value: None if value is None else check(name, value)


def hires_pass(name: str, value: Any) -> Hires:
    """{"scale": 2} -> Hires(2.0, 0.5, 0, "latent")."""
    if not isinstance(value, dict):
        raise InvalidInput(
            f'{name} must be an object such as {{"scale": 1.5, "upscaler": "latent"}}, got {shown(value)}'
        )
    declared = {spec.name: spec.metadata for spec in fields(Hires)}
    refuse_unknown(value, declared, f"{name}: ")
    if "scale" not in value:
        raise InvalidInput(f"{name}.scale is required")
    return Hires(
        **{key: spec["check"](f"{name}.{key}", value.get(key, spec["default"])) for key, spec in declared.items()}
    )


@dataclass(frozen=True)
class NamedModel:
    """An entry of a job's `loras` or `embeddings`."""

    name: str | None  # of a LoRA in the stack; what prompts call an embedding, None: by the name of its file
    version: str | None  # Civitai's version id; None for what is called by its name in the stack
    scale: float | None = None  # a LoRA's; None: the configured one, else 1


def entries(
    name: str, value: Any, ids: tuple[str, ...], more: tuple[str, ...], types: tuple[str, ...]
) -> Iterator[tuple[str, dict[str, Any], str | None]]:
    """A list's objects: the place, "loras[0]"; the object, which has one of the keys `ids` and maybe some `more`; its
    version id, which `civitai` or `air` tell, an AIR of one of these types."""
    example = json.dumps({"civitai": 135867} | ({"scale": 0.8} if "scale" in more else {"name": "word"}))
    if not isinstance(value, list):
        raise InvalidInput(f"{name} must be a list such as [{example}], got {shown(value)}")
    if len(value) > MAX_LISTED:
        raise InvalidInput(f"{name} must have at most {MAX_LISTED} entries, got {len(value)}")
    for i, item in enumerate(value):
        place, version = f"{name}[{i}]", None
        if not isinstance(item, dict) or not any(key in item for key in ids):
            raise InvalidInput(f"{place} must be an object such as {example}, got {shown(item)}")
        refuse_unknown(item, (*ids, *more), f"{place}: ")
        if len(given := [key for key in ids if key in item]) > 1:
            raise InvalidInput(f"{place} must have one of {' and '.join(given)}")
        if "air" in item:
            kind, version = read_air(item["air"])
            if kind not in types:
                form = f"urn:air:sdxl:{types[0]}:civitai:<model>@<version>, of a model for SDXL"
                raise InvalidInput(f"{place}.air must be {form}, got {shown(item['air'])}")
        elif "civitai" in item:
            given_id = item["civitai"]
            if isinstance(given_id, str) and re.fullmatch(VERSION_ID, given_id):
                given_id = int(given_id)
            version = str(number(1, 10**10 - 1, whole=True)(f"{place}.civitai", given_id))
        yield place, item, version


def lora_list(name: str, value: Any) -> list[NamedModel]:
    """[{"civitai": 135867, "scale": 0.8}] -> [NamedModel(None, "135867", 0.8)]."""
    scale, called = or_null(number(-MAX_LORA_SCALE, MAX_LORA_SCALE)), text_of(1, 200)
    return [
        NamedModel(
            called(f"{at}.name", item["name"]) if "name" in item else None,
            version,
            scale(f"{at}.scale", item.get("scale")),
        )
        for at, item, version in entries(name, value, ("name", "civitai", "air"), ("scale",), LORA_TYPES)
    ]


def embedding_list(name: str, value: Any) -> list[NamedModel]:
    """[{"civitai": 134583, "name": "negativeXL_D"}] -> [NamedModel("negativeXL_D", "134583")]; null -> []."""
    listed = []
    for at, item, version in entries(
        name, [] if value is None else value, ("civitai", "air"), ("name",), EMBEDDING_TYPES
    ):
        called = item.get("name")
        if called is not None and not (isinstance(called, str) and re.fullmatch(EMBEDDING_NAME, called)):
            raise InvalidInput(f"{at}.name must be one word of letters, digits, _, - and ., got {shown(called)}")
        if any(version == one.version for one in listed):
            raise InvalidInput(f"{at}: Civitai model version {version} is given twice")
        if called and any(called.lower() == (one.name or "").lower() for one in listed):
            raise InvalidInput(f"{at}: the name {called} is given twice; its case does not count")
        listed.append(NamedModel(called, version))
    return listed


# a job's input


def job_field(check: Check, default: Any = REQUIRED, also: tuple[str, ...] = (), answered: bool = True) -> Any:
    """A field of the input: how its value is read, its other names, and whether the answer's metadata repeats it."""
    return field(metadata={"check": check, "default": default, "also": also, "answered": answered})


@dataclass(frozen=True)
class Hires:
    """A job's second pass, as its field `hires` has it."""

    scale: float = job_field(number(1, 4))
    strength: float = job_field(above_0_to_1, 0.5)
    steps: int = job_field(number(0, 150, whole=True), 0)  # 0: as the first pass
    upscaler: str = job_field(one_of(UPSCALERS), "latent")


@dataclass(frozen=True)
class JobRequest:
    """A job's input, checked. Here a field is declared; parse() reads it, the README's table explains it."""

    prompt: str = job_field(text_of(1, MAX_PROMPT))
    negative_prompt: str = job_field(text_of(0, MAX_PROMPT), "")
    width: int = job_field(number(*SIDES, whole=True, multiple_of=8), 1024)  # with an image its own
    height: int = job_field(number(*SIDES, whole=True, multiple_of=8), 1024)
    steps: int = job_field(number(1, 150, whole=True), 24, also=("num_inference_steps",))
    guidance_scale: float = job_field(number(1, 30), 4.5, also=("cfg_scale",))
    seed: int = job_field(seed_or_random, None, answered=False)  # the answer has one for each image
    num_images: int = job_field(number(1, 4, whole=True), 1, also=("batch_size",), answered=False)
    scheduler: Sampling = job_field(read_sampling, DEFAULT_SCHEDULER, also=("sampler", "sampler_name"))
    clip_skip: int = job_field(number(1, 12, whole=True), 2)
    rng: str = job_field(one_of(("cpu", "gpu")), "cpu")
    emphasis: str = job_field(one_of(EMPHASES), "no norm")
    eta_noise_seed_delta: int = job_field(number(0, MAX_SEED - 1, whole=True), 0, answered=False)
    long_prompt: str = job_field(one_of(LONG_PROMPT_MODES), "blend")
    loras: dict[str, float] = job_field(or_null(lora_list), None, answered=False)  # adapter -> scale, <lora:…> too
    embeddings: tuple[NamedModel, ...] = job_field(embedding_list, None, answered=False)
    image: Image.Image | None = job_field(picture_text, None, also=("init_image", "image_url"), answered=False)
    strength: float | None = job_field(or_null(above_0_to_1), None, also=("denoising_strength",))  # None: no image
    mask: Image.Image | None = job_field(picture_text, None, also=("mask_image",), answered=False)
    mask_blur: int = job_field(number(0, 64, whole=True), 4, answered=False)
    hires: Hires | None = job_field(or_null(hires_pass), None)
    image_format: str = job_field(one_of(ENCODINGS), "png")
    embed_metadata: bool = job_field(true_or_false, True, answered=False)
    warnings: tuple[str, ...] = ()
    optional: frozenset[str] = frozenset()  # of loras and embeddings: given by a recipe, so that any may be left out

    @classmethod
    def parse(cls, given: Any, settings: Settings) -> JobRequest:
        """Raises InvalidInput, with the field, its rule and the value; nothing has cost anything by then."""
        # 1. every field by itself
        found, recipe, warnings = given_fields(given, settings)
        values: dict[str, Any] = {}
        for name, spec in ((spec.name, spec.metadata) for spec in fields(cls) if spec.metadata):
            called, value = found.get(name, (name, spec["default"]))
            if value is REQUIRED:
                raise InvalidInput(f"{name} is required")
            values[name] = spec["check"](called, value)
        called = {name: called for name, (called, _) in found.items()}
        # 2. prompts
        for name in ("prompt", "negative_prompt"):
            values[name] = check_prompt(name, values[name], warnings)
        # 3. models; those of a recipe may be left out
        optional = frozenset({"loras", "embeddings"} & recipe.keys() - given.keys())
        by_id = [item.version for item in (*(values["loras"] or ()), *values["embeddings"]) if item.version]
        if not all(map(settings.allows, by_id)):
            raise InvalidInput("loras and embeddings by id are switched off on this worker: JOB_MODELS_GB is 0")
        values["loras"] = choose_loras(values["loras"], values["prompt"], settings, warnings, "loras" in optional)
        # 4. pictures, last: their addresses take time
        check_passes(values, called)
        if values["image"] is not None:
            read_pictures(values, called)
            for name in ("image", "mask"):
                key, noted = recipe.get(f"{name}_sha256", ("", None))
                if noted and (values[name] is None or values[name].info["sha256"] != noted):
                    warnings.append(f"the recipe was made with another {name}: its {key} is {shown(noted)}")
        return cls(**values, warnings=tuple(warnings), optional=optional)

    @property
    def seeds(self) -> list[int]:
        """One seed an image: any of them can be made again alone."""
        return [(self.seed + i) % MAX_SEED for i in range(self.num_images)]


def given_fields(
    given: Any, settings: Settings
) -> tuple[dict[str, tuple[str, Any]], dict[str, tuple[str, Any]], list[str]]:
    """What a job gives, field -> (its name for it, the value), not checked yet; the same of its pasted recipe, which
    stands where the job does not have a field itself; warnings."""
    if not isinstance(given, dict):
        raise InvalidInput(f'a job must be {{"input": {{"prompt": "..."}}}}, got {shown(given)} as input')
    names = {spec.name: (spec.name, *spec.metadata["also"]) for spec in fields(JobRequest) if spec.metadata}
    refuse_unknown(given, ["parameters", *chain(*names.values())])
    given, recipe, warnings = dict(given), {}, []
    if {"sampler_name", "scheduler"} <= given.keys() and "sampler" not in given:  # A1111's two, since version 1.9
        sampling = read_sampling("sampler_name with scheduler", given.pop("sampler_name"), given.pop("scheduler"))
        given["sampler"] = str(sampling)
    if given.get("parameters") is not None:
        recipe, warnings = read_recipe(text_of(1, MAX_RECIPE)("parameters", given["parameters"]), settings)
        pictured = any(given.get(name) is not None for name in names["image"])
        for name in [name for name in (("hires",) if pictured else ("strength", "mask_blur")) if name in recipe]:
            why = "does not go with image" if pictured else "only goes with image"
            warnings.append(f"the recipe's {recipe.pop(name)[0]} is left out: it {why}")
    found = {name: (f"parameters: {key}", value) for name, (key, value) in recipe.items()}
    for name, keys in names.items():
        used = [key for key in keys if key in given]
        if len(used) > 1:
            raise InvalidInput(f"{used[0]} and {used[1]} are the same field: give one of them")
        if used:
            found[name] = used[0], given[used[0]]
    return found, recipe, warnings


def check_prompt(name: str, prompt: str, warnings: list[str]) -> str:
    """The prompt as it is encoded, with warnings for what it does not mean here. Raises InvalidInput."""
    clean = well_formed(prompt)
    if clean != prompt:
        warnings.append(f"{name} held lone surrogates: each was replaced by U+FFFD")
    if any(parse_recipe(line)[2] for line in clean.split("\n")):
        raise InvalidInput(f"{name} holds a picture's generation data: give that text, once, as parameters")
    try:
        parse_prompt(clean)
    except InvalidInput as error:
        raise InvalidInput(f"{name}: {error}") from None
    if found := PROMPT_EDITING.search(clean):
        warnings.append(f"{name}: prompt editing and AND are read as text here, such as {shown(found[0])}")
    return clean


def check_passes(values: Mapping[str, Any], called: Mapping[str, str]) -> None:
    """Raises InvalidInput for fields of pictures and hires that do not go together. called: the names that they were
    given under."""
    pictured, hires, sampling = values["image"] is not None, values["hires"], values["scheduler"]
    for name in ("strength", "mask"):
        if values[name] is not None and not pictured:
            raise InvalidInput(f"{called[name]} can only be given together with image: give an image, or leave it out")
    if hires and pictured:
        raise InvalidInput("hires does not go with image: give one of them")
    if (hires or pictured) and sampling.instead:
        raise InvalidInput(f'scheduler "{sampling}" cannot be used with image or hires; nearest: "{sampling.instead}"')
    if not hires:
        return
    last = plan_passes(JobRequest(**values))[-1]
    if max(last.width, last.height) > MAX_HIRES_SIDE:
        sides = f"{last.width}x{last.height}"
        raise InvalidInput(f"hires.scale must lead to sides of at most {MAX_HIRES_SIDE:,}, got {sides}")
    if last.steps > MAX_HIRES_SCHEDULE:
        raise InvalidInput(
            f"hires.strength must lead to a schedule of at most {MAX_HIRES_SCHEDULE} steps, "
            f"got {last.run} / {hires.strength:g}"
        )


def read_pictures(values: dict[str, Any], called: Mapping[str, str]) -> None:
    """Image and mask in the job's size, by default the image's own: scaled in its shape until its sides are within
    limits, then to multiples of 8. Changes values. Raises InvalidInput, DownloadFailed."""
    image = read_picture(values["image"], called["image"])
    size = image.size
    mask = None if values["mask"] is None else read_picture(values["mask"], called["mask"])
    if mask and mask.size != size:
        sides, wanted = ("{}x{}".format(*picture.size) for picture in (mask, image))
        raise InvalidInput(f"{called['mask']} must have the image's size, {wanted}, got {sides}")
    low, high = SIDES
    if not {"width", "height"} <= called.keys() and max(size) * low > min(size) * high:
        raise InvalidInput(f"an image of {size[0]}x{size[1]} is too long for a size of its own: give width and height")
    scale = min(max(1, low / min(size)), high / max(size))
    for name, side in zip(("width", "height"), size, strict=True):
        if name not in called:
            values[name] = int(side * scale / 8 + 0.5) * 8
    size = values["width"], values["height"]
    values["image"] = image.resize(size, Image.Resampling.LANCZOS)
    if mask:  # as A1111 uses it: black and white alone, blurred, in the drawn picture's size
        mask = mask.convert("L").point(lambda level: 255 * (level > 128))
        mask = mask.filter(ImageFilter.GaussianBlur(values["mask_blur"]))
        values["mask"] = mask.resize(size, Image.Resampling.LANCZOS)
    if values["strength"] is None:
        values["strength"] = 0.75


def stack_names(settings: Settings) -> dict[str, str]:
    """Sanitized names by which a job may call the stack's LoRAs -> adapter: its own, and its file's."""
    by_file = {sanitize_name(Path(config["filename"]).stem): name for name, config in settings.stack.items()}
    return by_file | {name: name for name in settings.stack}


def choose_loras(
    listed: list[NamedModel] | None, prompt: str, settings: Settings, warnings: list[str], of_recipe: bool
) -> dict[str, float]:
    """The job's stack, adapter -> scale: the `loras` that it lists or the configured ones, then <lora:…> tags. What is
    listed by its id and is not of the configured stack is the adapter civitai_<id>."""
    stack, known = settings.stack, stack_names(settings)
    chosen = {name: config["scale"] for name, config in stack.items()} if listed is None else {}
    for item in listed or ():
        adapter = settings.adapter(item.version) if item.version else known.get(sanitize_name(item.name))
        called = shown(item.name) if item.version is None else f"Civitai model version {item.version}"
        if adapter is None:
            raise InvalidInput(f"loras: {called} is not in the stack: {', '.join(stack) or 'it is empty'}")
        if adapter in chosen:
            raise InvalidInput(f"loras: {called} is given twice")
        chosen[adapter] = stack.get(adapter, {"scale": 1.0})["scale"] if item.scale is None else item.scale
    known |= {adapter: adapter for adapter in chosen}
    # of a recipe's tags and version ids nothing but the scale tells which belong together
    untagged, unmatched, unknown = dict(chosen) if of_recipe else {}, [], []
    for name, scale in split_lora_tags(prompt)[1]:
        if adapter := known.get(sanitize_name(name)):
            chosen[adapter] = number(-MAX_LORA_SCALE, MAX_LORA_SCALE)(f"the scale of <lora:{name[:40]}>", scale)
            untagged.pop(adapter, None)
        else:
            unmatched.append((name, scale))
    scales = [*untagged.values()]
    for name, scale in unmatched:
        if scale in scales:
            scales.remove(scale)
        else:
            unknown.append(f"<lora:{name[:40]}>")
    if unknown:
        such = f"{unknown[0]} was" if len(unknown) == 1 else f"{len(unknown)} tags, {unknown[0]} first, were"
        warnings.append(f"{such} left out: the stack holds {', '.join(stack) or 'no LoRA'}")
    return chosen


# running a job

STOP_CHECK_S = 0.1  # between two looks of a job that waits for the GPU


class Observer:
    """Is told how far a job has come, and may end it. This one does neither; the queue's reports it to RunPod."""

    def check(self) -> None:
        """Raises Stopped where the answer is no longer wanted."""

    @contextmanager
    def turn(self, gpu: threading.Lock) -> Iterator[None]:
        """Holds the GPU's lock, for which jobs wait here. Raises Stopped instead, at the latest after STOP_CHECK_S."""
        while not gpu.acquire(timeout=STOP_CHECK_S):
            self.check()
        try:
            self.check()
            yield
        finally:
            gpu.release()

    def step(self, step: int, steps: int) -> None:
        """`step` of all `steps` are launched, 0 where the first begins; must return at once. May raise Stopped."""


class Timings(dict[str, float]):
    """Seconds of a job's phases, each read after the GPU has finished it."""

    @contextmanager
    def __call__(self, name: str, gpu: bool = True) -> Iterator[None]:
        """Times a phase; gpu: whether the GPU works in it."""
        started = time.monotonic()
        yield
        if gpu and torch.cuda.is_available():
            torch.cuda.synchronize()
        self[name] = round(time.monotonic() - started, 3)


class Worker:
    """What the process holds for its life: the engine, and the lock by which jobs take turns at the GPU."""

    def __init__(self) -> None:
        self.gpu = threading.Lock()
        self._loading = threading.Lock()
        self._engine: Engine | None = None

    def engine(self) -> Engine:
        """The engine, loaded at the first use. Raises SetupFailed; the next call tries again."""
        with self._loading:
            if self._engine is None:
                self._engine = Engine.load(Settings.from_environ())
            return self._engine


WORKER = Worker()


def handler(job: dict[str, Any], observer: Observer | None = None) -> dict[str, Any]:
    """Answers a RunPod job {"id": ..., "input": {...}} with {"images": [...], "seed": ..., "metadata": {...}} or with
    {"error": ..., "code": ...}; never raises for bad input. Safe to call from several threads."""
    given = job.get("id") if isinstance(job, dict) else None
    job_id = given if isinstance(given, str) else "local"
    try:
        return answer_job(job, job_id, observer or Observer())
    except Exception as error:  # noqa: BLE001 - the edge of a job: any failure becomes an answer
        failure = worker_error(error, job_id)
    level = logging.INFO if isinstance(failure, Stopped) else logging.ERROR
    log.log(level, "job %s: %s: %s%s", job_id, failure.code, failure, failure.detail)
    return failure_answer(failure)


def worker_error(error: Exception, job_id: str) -> WorkerError:
    """explain, with the traceback of what was not foreseen in the log."""
    if not isinstance(error, WorkerError):
        log.exception("job %s: unexpected failure", job_id)
    return explain(error)


def answer_job(job: Any, job_id: str, observer: Observer) -> dict[str, Any]:
    """The one long path: check, load, generate, encode, answer. Raises WorkerError."""
    # 1. all that can be refused, before anything costs
    settings = Settings.from_environ()
    request = JobRequest.parse(job.get("input") if isinstance(job, dict) else None, settings)
    bucket = job_bucket(job, settings)
    # 2. the models: the engine where the start has not loaded it, and what the job names, beside others' GPU work
    engine, timings = WORKER.engine(), Timings()
    models = fetch_job_models(engine, request, timings, observer)
    # 3. the GPU's work, one job at a time
    with observer.turn(WORKER.gpu), torch.inference_mode():
        started = time.monotonic()
        try:
            images, conditioning = generate(engine, request, models, timings, observer)
        except Exception as error:  # noqa: BLE001 - its memory is given back before the next job's turn
            failure = worker_error(error, job_id)
            while error:
                error.__traceback__ = None  # its frames hold the job's tensors
                error = error.__context__
            with suppress(RuntimeError):  # once the GPU is lost, nothing can be freed either
                gc.collect()
                torch.cuda.empty_cache()
                engine.pipe.maybe_free_model_hooks()
            raise failure from None
        loras = dict(engine.stack.applied)
        metadata = describe(request, engine, models, loras, conditioning)
    # 4. files and links, beside the next job's GPU work
    observer.check()
    with timings("images", gpu=False):
        used = used_models(engine, models, loras, conditioning.embeddings)
        vae = Path(settings.vae_model).name
        recipes = [write_recipe(request, seed, vae, used) if request.embed_metadata else "" for seed in request.seeds]
        answer = {"images": [], "seed": request.seed, "metadata": metadata}
        answer = deliver(answer, images, recipes, bucket, settings.max_response_bytes, job_id)
    seconds = round(time.monotonic() - started, 3)
    answer["metadata"] |= {"processing_time": seconds, "timings": timings}
    log.info(
        "job %s: %d x %dx%d, seed %d, %d+%d chunks: %.1f s %s",
        *(job_id, request.num_images, request.width, request.height, request.seed),
        *(conditioning.prompt.chunks, conditioning.negative.chunks, seconds, timings),
    )
    return answer


@dataclass(frozen=True)
class JobModels:
    """What a job names by version ids, ready to be used; what may be left out, and is, has a warning."""

    loras: dict[str, Lora] = field(default_factory=dict)  # by adapter name
    embeddings: dict[str, Embedding] = field(default_factory=dict)  # by the name that prompts call it
    files: dict[tuple[str, str], Path] = field(default_factory=dict)  # of both, by field and name
    warnings: list[str] = field(default_factory=list)


def fetch_job_models(engine: Engine, request: JobRequest, timings: Timings, observer: Observer) -> JobModels:
    """The LoRAs and embeddings that a job names by their ids, fetched side by side where the store does not have them.
    Raises InvalidInput for a file that cannot be used, DownloadFailed for one that cannot be had."""
    settings, models = engine.settings, JobModels()
    adapters = [adapter for adapter in request.loras if adapter not in settings.stack]
    wanted = [("loras", NamedModel(adapter, adapter.removeprefix("civitai_"))) for adapter in adapters]
    wanted += [("embeddings", item) for item in request.embeddings]
    if not wanted:
        return models
    folders = {"loras": settings.lora_dir, "embeddings": settings.embedding_dir}

    def fetch(kind: str, item: NamedModel) -> tuple[str, Path, Any]:
        """Name, file and content of one."""
        config = civitai_config(item.version)
        for _ in range(3):
            path = engine.store.fetch_for_job(config, folders[kind])
            try:
                if kind == "loras":
                    lora = engine.stack.loras.get(item.name) or read_lora(path, engine.stack.spellings, engine.pipe)
                    addnet_hash(path)  # for the recipe, while the file is there
                    return item.name, path, lora
                name = item.name or listed_name(path) or config["name"]
                return name, path, read_embedding(name, path, engine.pipe)
            except BadModel as error:
                if path.exists():  # else it made room meanwhile
                    message = f"{kind}: Civitai model version {item.version}: {error}"
                    raise InvalidInput(message, detail=path) from error
        raise DownloadFailed(
            f"{kind}: Civitai model version {item.version} made room for models of other jobs again and again: "
            f"set a larger JOB_MODELS_GB"
        )

    with timings("models", gpu=False):
        futures = [in_background(fetch, *one) for one in wanted]
        while wait(futures, timeout=STOP_CHECK_S).not_done:
            observer.check()
    for (kind, _), future in zip(wanted, futures, strict=True):
        error = future.exception()
        if kind in request.optional and isinstance(error, InvalidInput | DownloadFailed):
            models.warnings.append(f"{error}; it was left out")
            continue
        name, path, content = future.result()
        if kind == "embeddings" and name.lower() in map(str.lower, models.embeddings):  # two files of one name
            name, content = path.stem, replace(content, name=path.stem)
        models.files[kind, name], getattr(models, kind)[name] = path, content
    return models


def generate(
    engine: Engine, request: JobRequest, models: JobModels, timings: Timings, observer: Observer
) -> tuple[list[Any], Conditioning]:
    """Stack, prompts, latents, pixels: everything of a job that needs the GPU."""
    pipe, stack = engine.pipe, engine.stack
    check_memory(pipe, request)
    with timings("loras"):
        here = engine.settings.stack | models.loras  # without those of a recipe that cannot be had
        scales = {name: scale for name, scale in request.loras.items() if scale and name in here}
        for adapter in scales.keys() & models.loras:
            stack.add(adapter, models.loras[adapter])
        changed = stack.apply(scales)
    if not changed:
        del timings["loras"]
    with timings("encode"):
        bundled = chain.from_iterable(stack.loras[adapter].embeddings.values() for adapter in stack.applied)
        known = chain(engine.embeddings.values(), bundled, models.embeddings.values())  # of equal names the last counts
        embeddings = {embedding.name.lower(): embedding for embedding in known}
        conditioning = engine.encoder.encode(request, tuple(sorted(stack.applied.items())), embeddings)
        latents = encode(pipe, [request.image]) if request.image else None
    mask = None
    if request.mask:  # bool (h/8, w/8), half of white rounds up
        mask = request.mask.resize(latents.shape[:-3:-1], Image.Resampling.BICUBIC)
        mask = torch.from_numpy(np.asarray(mask) > 127).to(latents.device)
    passes, done = plan_passes(request), 0
    total = sum(stage.run for stage in passes)
    observer.step(0, total)
    with timings("denoise"):
        for stage in passes:
            if done:
                latents = enlarge(pipe, latents, stage.width, stage.height, request.hires.upscaler)
            stage = replace(stage, latents=latents, mask=mask)
            latents = denoise(
                engine, request, conditioning, stage, lambda step, done=done: observer.step(done + step, total)
            )
            done += stage.run
    observer.check()
    with timings("decode"):
        images = decode(pipe, latents)
        pipe.maybe_free_model_hooks()
        if request.mask:  # where the blurred mask is 0, the pixels are the picture's
            drawn = request.mask.point(lambda level: min(2 * level, 255))
            images = [Image.composite(image, request.image, drawn) for image in images]
    return images, conditioning


def describe(
    request: JobRequest, engine: Engine, models: JobModels, loras: Mapping[str, float], conditioning: Conditioning
) -> dict[str, Any]:
    """The answer's metadata, apart from times. loras: those in the weights, adapter -> scale."""
    settings, stack, failed = engine.settings, engine.stack, engine.stack.failed
    of_models = [f"LoRA {name} was left out: {failed[name]}" for name in request.loras if name in failed]
    of_models += [f"LoRA {name}: {warning}" for name in loras for warning in stack.loras[name].warnings]
    prompts, absent = f"{request.prompt} {request.negative_prompt}", engine.files.embeddings_failed
    used = [name for name in absent if embedding_use(re.escape(name)).search(prompts)]
    of_models += [f"embedding {name} was left out: {absent[name]}" for name in used]
    repeated = {spec.name: getattr(request, spec.name) for spec in fields(request) if spec.metadata.get("answered")}
    answered = {name: value for name, value in repeated.items() if value is not None}
    answered["scheduler"] = str(request.scheduler)
    if request.hires:
        answered["hires"] = vars(request.hires)
    if request.embeddings:
        answered["embeddings"] = [
            {"name": name, "civitai": int(models.files["embeddings", name].stem.removeprefix("civitai_"))}
            for name in models.embeddings
        ]
    return answered | {
        "seeds": request.seeds,
        "prompt_chunks": conditioning.prompt.chunks,
        "negative_prompt_chunks": conditioning.negative.chunks,
        "model": settings.checkpoint["name"],
        "model_version": version_id(settings.checkpoint),
        "vae": Path(settings.vae_model).name if Path(settings.vae_model).is_dir() else settings.vae_model,
        "loras": [{"name": name, "scale": scale} for name, scale in loras.items()],
        "loras_failed": [{"name": name, "error": reason} for name, reason in failed.items()],
        "warnings": [*request.warnings, *models.warnings, *conditioning.warnings, *of_models],
    }


# ---------------------------------------------------------------------------------------------------------------------
# queue

POLL_S, LAST_POLL_S = 90, 2  # the SDK's limit of a long poll, RunPod's is less; what is left of an idle one at SIGTERM
# before the next poll, after a status: 204 is an empty queue, 400 FlashBoot, 429 the rate limit; 0: any other end
TAKE_PAUSES_S = {204: 0.1, 400: 0.1, 429: 5.0, 0: 1.0}
STOP_PAUSES_S, STOP_PAUSE_S = {204: 0.0, 404: 600.0, 429: 30.0, 0: 5.0}, 1.0  # by status; after each poll, as the SDK
STOP_LEAD_S = 2.0  # by which a stop may overtake its job; not for long, as a job that is sent again keeps its id
# A job is asked for so long before its turn. RunPod counts executionTimeout from there, so it is short; but the answer
# of a job-take, with the pause and the error that may come before, and the reading of a job are to fit into it.
ASK_AHEAD_S = 3.0
RECENT_STEPS = 6  # whose pace tells a job's end; more than two, as Heun reports each step twice
POLL_WARNING_S = 60  # between two warnings of one kind about polls
ANSWER_TRY_S, ANSWER_RETRY_S = 30, 180  # one post of an answer; all of them
FIRST_PAUSE_S, LAST_PAUSE_S = 0.5, 8.0  # between two posts of an answer
PROGRESS_S, PROGRESS_TRY_S, LAST_PROGRESS_S = 1, 10, 2  # between updates; for one; for the last before the answer


def serve_queue() -> None:
    """The worker on RunPod: the SDK's start() with JobLoop in its loop's place, while the models load beside it."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # PID 1 ignores a signal without a handler
    jobs = JobLoop(handler, in_background(warm_up))
    import_sdk()
    sdk = runpod.serverless.modules
    # in place of the SDK's get_jobs and run_jobs, and of its signal handlers, which do not wake the loop
    sdk.rp_scale.JobScaler.start = lambda _: asyncio.run(jobs.serve())
    # 1.7.13 forks the models, threads and CUDA for its heartbeat, which outlives a killed worker and pings its jobs for
    # ever; and it keeps their ids in the working directory, where the next worker waits for them
    sdk.rp_ping.Process, sdk.rp_ping.Heartbeat.process_loop = threading.Thread, keep_pinging
    sdk.worker_state.JobsProgress.get_job_list = lambda _: ",".join({job.id for job in [*jobs.held.values()]}) or None
    runpod.serverless.start({"handler": handler})
    sys.stdout.flush()
    os._exit(0)  # taking torch and CUDA apart can last for seconds, and for ever after the GPU was lost


def keep_pinging(_test: bool) -> None:
    """The SDK's heartbeat, anew whatever ends it: RunPod takes a worker that is silent for dead."""
    while True:
        try:
            runpod.serverless.modules.rp_ping.Heartbeat().ping_loop()
        except Exception:
            log.exception("the heartbeat failed; it is started again")
            time.sleep(1)


def warm_up() -> int:
    """Loads the models and draws a first image, or raises WorkerError; returns how many jobs the worker may hold."""
    engine = WORKER.engine()
    settings = engine.settings
    with phase("warm-up image"), WORKER.gpu, torch.inference_mode():
        side = 1024 if torch.cuda.is_available() else 256
        request = JobRequest.parse({"prompt": "warm-up", "steps": 2, "width": side, "height": side}, settings)
        images, _ = generate(engine, request, JobModels(), Timings(), Observer())
    encode_images(images, [""], request.image_format)
    return settings.jobs_in_flight


def import_sdk() -> None:
    """Imports runpod in a third of the time: 1.7.13 looks up the processor's name meanwhile, 1.2 s of a core."""
    importlib.import_module("cpuinfo").get_cpu_info = dict  # without a name in it
    importlib.import_module("runpod")


class JobLoop:
    """Takes jobs from RunPod's queue; each is then served by a HeldJob in a task of its own. run answers a job in a
    thread; warming gives how many jobs may be held, from taking one to its answer's post.

    The SDK's own loop (1.7.13) leaves the GPU idle for 0.3 to 1.5 s between two jobs, takes two at once that a free
    worker could have had when told to hold two, loses the job that an open poll brings after SIGTERM, drops jobs
    without "input", and gives an answer up at the first reset. Its HTTP session, addresses and heartbeat stay in use.
    """

    def __init__(self, run: Callable[[dict[str, Any], Observer], dict[str, Any]], warming: Future) -> None:
        self.run, self.warming, self.limit = run, warming, 1
        self.held: dict[asyncio.Task, HeldJob] = {}
        self.changed = asyncio.Event()  # what may_ask looks at
        self.leaving: asyncio.Task | None = None  # nothing is asked for any more
        self.take: asyncio.Task | None = None  # the poll for a job
        self.stops: list[Any] = []  # the ids that RunPod named last
        self.stops_until = 0.0  # when they count no more
        self.next_warning: dict[tuple[str, str], float] = {}

    async def serve(self) -> None:
        """Serves until SIGTERM or an answer with refresh_worker; returns once every job held is answered."""
        self.loop, modules = asyncio.get_running_loop(), runpod.serverless.modules
        for number in (signal.SIGTERM, signal.SIGINT):
            self.loop.add_signal_handler(number, self.leave)
        try:
            self.limit = await asyncio.wrap_future(self.warming)
        except Exception as error:  # jobs are told the reason, instead of waiting for their time-out of up to 24 h
            foreseen = isinstance(error, WorkerError)
            log.error("the start failed: %s%s", error, error.detail if foreseen else "", exc_info=not foreseen)
            reason = str(error) if foreseen else "the worker could not be made ready; its log says more"
            self.run = lambda *_: failure_answer(SetupFailed(reason))
        async with runpod.http_client.AsyncClientSession() as self.session:
            stops = self.loop.create_task(self.obey_stops())
            while await self.may_ask():
                poll = self.poll(modules.rp_job._job_get_url(), "id", str, TAKE_PAUSES_S)
                self.take = self.loop.create_task(poll)
                await asyncio.wait([self.take])
                if not self.take.cancelled() and (taken := self.take.result()):
                    job = HeldJob(self, taken)
                    task = self.loop.create_task(job.serve())
                    self.held[task] = job
                    task.add_done_callback(self.let_go)
                    self.stop_named()
            while self.held:
                await asyncio.wait(self.held)
            stops.cancel()

    async def may_ask(self) -> bool:
        """Waits until one more job may be asked for, False once leaving: there must be room, and the GPU be free within
        ASK_AHEAD_S of every job here. One that waited for longer could be run by a free worker meanwhile, and its
        executionTimeout counts."""
        while not self.leaving:
            free_at = max((job.ends_at for job in self.held.values()), default=0.0) - ASK_AHEAD_S
            if len(self.held) >= self.limit:
                free_at = math.inf
            pause = free_at - self.loop.time()
            if pause <= 0:
                return True
            self.changed.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self.changed.wait(), None if pause == math.inf else pause)
        return False

    async def poll(self, address: str, key: str, kind: type, pauses: Mapping[int, float]) -> dict[str, Any] | None:
        """One long poll for an object in which `key` has a value of this kind; None, after a pause, without one."""
        pause, timeout = pauses[0], aiohttp.ClientTimeout(total=POLL_S)
        try:
            async with self.session.get(address, timeout=timeout) as response:
                brought = await response.read() if response.status == 200 else b""
                with suppress(ValueError, RecursionError):  # int() refuses more than 4,300 digits
                    brought = json.loads(brought, parse_int=lambda digits: int(digits[:1000]))
                if isinstance(brought, dict) and isinstance(brought.get(key), kind):
                    return brought
                trouble = "" if response.status in (204, 400) else f"HTTP {response.status}"
                pause = pauses.get(response.status, pause)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            trouble = type(error).__name__
        if trouble and self.loop.time() >= self.next_warning.get((key, trouble), 0):
            self.next_warning[key, trouble] = self.loop.time() + POLL_WARNING_S
            log.warning("a poll of RunPod brought no %s: %s", key, trouble)
        await asyncio.sleep(pause)
        return None

    async def obey_stops(self) -> None:
        """Ends the jobs that RunPod says were cancelled or have timed out, those that are held here.

        SDK 1.10 asks so (rp_job.get_stop_signals, rp_scale.monitor_stop_signals), 1.7.13 never: the address of job-take
        with /job-stop/ in it answers {"jobsToStop": [ids]}, or 204 once the poll has lasted long enough.
        """
        take = runpod.serverless.modules.rp_job.JOB_GET_URL
        address = take.replace("/job-take/", "/job-stop/")
        while address != take:
            brought = await self.poll(address, "jobsToStop", list, STOP_PAUSES_S)
            if brought:
                self.stops, self.stops_until = brought["jobsToStop"], self.loop.time() + STOP_LEAD_S
                self.stop_named()
            await asyncio.sleep(STOP_PAUSE_S)

    def stop_named(self) -> None:
        """Stops those of the jobs held that RunPod named just now."""
        recent = self.loop.time() < self.stops_until
        for task, job in self.held.items():
            if recent and job.id in self.stops:
                log.info("job %s: stopped by RunPod", job.id)
                job.stopped = True  # its thread ends at the next check
                task.cancel()

    def let_go(self, task: asyncio.Task) -> None:
        """A job's task has ended; the next job may be asked for, whatever ended it."""
        job = self.held.pop(task)
        self.changed.set()
        if job.update:
            job.update.cancel()
        if not task.cancelled() and (error := task.exception()):
            log.error("job %s: stays unanswered", job.id, exc_info=error)

    def leave(self) -> None:
        """SIGTERM, or an answer with refresh_worker: nothing new is asked for, and a job that the open poll still
        brings is run."""
        if not self.warming.done():
            os._exit(0)  # the thread that loads the models cannot be stopped
        log.info("leaving, with %d jobs held", len(self.held))
        self.leaving = self.loop.create_task(self.close_poll())
        self.changed.set()

    async def close_poll(self) -> None:
        """The poll stays open for a moment, and while a job runs; then RunPod gives its job to another worker."""
        await asyncio.sleep(LAST_POLL_S)
        while self.held:
            await asyncio.wait(self.held)
        if self.take:
            self.take.cancel()


class HeldJob(Observer):
    """One job, from the queue to its answer; reports its denoising to RunPod, at most once a second."""

    def __init__(self, jobs: JobLoop, job: dict[str, Any]) -> None:
        self.jobs, self.job, self.id = jobs, job, job["id"]
        self.stopped = False
        self.ends_at = math.inf  # when it will have left the GPU, by the loop's clock, as far as its steps tell
        self.paces: deque[tuple[int, float]] = deque(maxlen=RECENT_STEPS)  # (step, when it was launched)
        self.update: asyncio.Task | None = None  # the last progress update
        self.next_update = 0.0

    async def serve(self) -> None:
        """Runs the job in a thread and posts its answer; cancelled where RunPod stops the job."""
        try:
            body = await asyncio.to_thread(lambda: self.body(self.jobs.run(self.job, self)))
        except Exception as error:  # noqa: BLE001 - no thread, no JSON: unanswered, it would wait for hours
            body = self.body(failure_answer(worker_error(error, self.id)))
        self.ends_at = 0.0
        self.jobs.changed.set()
        if self.update:  # one that arrived after the result would leave the job IN_PROGRESS for good
            await asyncio.wait([self.update], timeout=LAST_PROGRESS_S)
            self.update.cancel()  # closes its connection
            await asyncio.wait([self.update])
        # where RunPod will not have the answer, a short one: clients would see a job COMPLETED without output
        refused = failure_answer(GenerationFailed("RunPod refused the job's answer"))
        if not await self.is_accepted(body) and not await self.is_accepted(self.body(refused)):
            log.error("job %s: stays unanswered", self.id)

    def body(self, answer: dict[str, Any]) -> bytes:
        """An answer as the SDK posts it: {"error": "e", "code": "c"} -> {"output": {"code": "c"}, "error": "e"}. In any
        thread; after refresh_worker, even of a stopped job, the loop ends. Raises what json.dumps does for an answer
        that strict JSON cannot carry."""
        result = {"output": {key: value for key, value in answer.items() if key not in ("error", "refresh_worker")}}
        if answer.get("error"):
            result["error"] = answer["error"]
        if answer.get("refresh_worker"):
            result["stopPod"] = True
            self.jobs.loop.call_soon_threadsafe(self.jobs.leave)
        return json.dumps(result, ensure_ascii=False, allow_nan=False).encode(errors="replace")  # lone surrogates

    def check(self) -> None:
        """In the job's thread, as step."""
        if self.stopped:
            raise Stopped("RunPod no longer wants the job's answer")

    def step(self, step: int, steps: int) -> None:
        self.check()
        now = self.jobs.loop.time()
        self.paces.append((step, now))
        first, then = self.paces[0]
        if step > first:
            ends_at = now + (steps - step) * (now - then) / (step - first)
            self.jobs.loop.call_soon_threadsafe(self.report, step, steps, ends_at)

    def report(self, step: int, steps: int, ends_at: float) -> None:
        """Sends an update, unless one is under way or was answered less than a second ago."""
        self.ends_at = ends_at
        self.jobs.changed.set()
        if self.jobs.loop.time() >= self.next_update and not self.stopped:
            self.next_update = math.inf
            self.update = self.jobs.loop.create_task(self.send_update(step, steps))

    async def send_update(self, step: int, steps: int) -> None:
        """One progress update; one that gets lost is no harm."""
        output = {"step": step, "steps": steps, "percent": round(100 * step / steps)}
        body = json.dumps({"status": "IN_PROGRESS", "output": output}).encode()
        try:
            await self.post(body, PROGRESS_TRY_S)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            log.info("job %s: a progress update was lost: %s", self.id, type(error).__name__)
        self.next_update = self.jobs.loop.time() + PROGRESS_S

    async def is_accepted(self, body: bytes) -> bool:
        """Posts an answer until RunPod takes it, or refuses it for good, or ANSWER_RETRY_S is over."""
        deadline, pause = self.jobs.loop.time() + ANSWER_RETRY_S, FIRST_PAUSE_S
        while True:
            try:
                await self.post(body, ANSWER_TRY_S)
                return True
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                status = getattr(error, "status", None)  # None where there was no answer
                log.warning("job %s: posting its answer: %s %s", self.id, type(error).__name__, status or "")
            lasting = status and status < 500 and status not in (408, 429)
            if lasting or self.jobs.loop.time() > deadline:
                return False
            await asyncio.sleep(pause)
            pause = min(2 * pause, LAST_PAUSE_S)

    async def post(self, body: bytes, timeout_s: float) -> None:
        """Posts a result or a progress update as the SDK does; raises aiohttp.ClientError, TimeoutError or OSError."""
        address = runpod.serverless.modules.rp_http.JOB_DONE_URL.replace("$ID", self.id) + "&isStream=false"
        headers = {"charset": "utf-8", "Content-Type": "application/x-www-form-urlencoded", "X-Request-ID": self.id}
        options = {"headers": headers, "timeout": aiohttp.ClientTimeout(total=timeout_s), "raise_for_status": True}
        async with self.jobs.session.post(address, data=io.BytesIO(body), **options):
            pass


# ---------------------------------------------------------------------------------------------------------------------
# entry


def main() -> None:
    """The worker loop on RunPod, the SDK's HTTP server for --rp_serve_api, else one job from a file."""
    configure_logging()
    os.environ.setdefault("RUNPOD_LOG_LEVEL", "INFO")  # the SDK's default, DEBUG, prints whole jobs
    if "RUNPOD_WEBHOOK_GET_JOB" in os.environ:
        serve_queue()
        return
    import_sdk()
    options, rest = runpod.serverless.parser.parse_known_args()
    if options.rp_serve_api:
        in_background(WORKER.engine)  # the first request waits for it, and is told where it failed
        # in a thread: the server would answer nobody else while a plain function runs
        runpod.serverless.start({"handler": lambda job: asyncio.to_thread(handler, job)})
        return
    job = read_job(options.test_input, rest)
    sys.argv[1:] = ["--test_input", job, *(option for option in sys.argv[1:] if option not in rest)]
    runpod.serverless.start({"handler": run_and_save})


def configure_logging() -> None:
    """One line per phase on stderr; stdout is for results."""
    output = logging.StreamHandler()
    output.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S"))
    log.addHandler(output)
    log.setLevel(logging.INFO)
    log.propagate = False  # importing runpod sets the root logger up a second time


def read_job(test_input: str | None, arguments: list[str]) -> str:
    """The text of the job: of --test_input, of the file named on the command line, or of test_input.json here or beside
    handler.py. What is no job ends the process with a sentence; the SDK would end it with a traceback."""
    source, job = "--test_input", test_input or ""
    if not test_input:
        if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
            sys.exit(f"usage: python handler.py [job.json] [the SDK's options]; cannot make sense of {arguments}")
        default = Path("test_input.json")
        source = arguments[0] if arguments else default if default.is_file() else Path(__file__).with_name(default.name)
        try:
            job = Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            sys.exit(f"{source} cannot be read: {error}")
    try:
        parsed = json.loads(job)
    except ValueError as error:
        sys.exit(f"{source} is not valid JSON: {error}")
    if not isinstance(parsed, dict) or "input" not in parsed:
        sys.exit(f'{source} must hold {{"input": {{"prompt": "..."}}}}')
    return job


def run_and_save(job: dict[str, Any]) -> dict[str, Any]:
    """handler for a local run: saves the images to OUTPUT_DIR, named by time and seed, prints where and the metadata.
    Addresses of uploaded images stay as they are."""
    answer = handler(job)
    if "error" in answer:
        return answer
    folder, metadata, saved = Settings.from_environ().output_dir, answer["metadata"], []
    folder.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for image, image_seed in zip(answer["images"], metadata["seeds"], strict=True):
        if not image.startswith(("http://", "https://")):
            file = folder / f"{stamp}-{image_seed}.{metadata['image_format']}"
            file.write_bytes(base64.b64decode(image))
            image = str(file)
        saved.append(image)
    print(json.dumps(metadata, indent=2, ensure_ascii=False))
    print("\n".join(saved))
    return {"images": saved}


if __name__ == "__main__":
    main()
