"""SDXL worker for RunPod serverless: Civitai checkpoint, LoRA stack, prompts of any length, images as base64 or links.

The way of a job, and the order of this file:

    configuration   models and settings; every setting is an environment variable, parsed into Settings
    errors          one class per code that a client can see
    store           Civitai or the volume -> verified files in the model store
    pipeline, LoRAs files -> StableDiffusionXLPipeline on the GPU, LoRA stack merged into its weights
    prompts         A1111 text -> chunks of 75 tokens -> embeddings, blended into one 77-token tensor
    images          pixels -> PNG, JPEG or WebP file that carries its recipe -> base64 or links
    jobs            schedulers; {"input": {...}} -> checked request -> images, seed and metadata
    entry           the command line here, RunPod's job loop there

    python handler.py                      runs test_input.json and saves the images to OUTPUT_DIR
    python handler.py custom_input.json    the same with another job
    python handler.py --rp_serve_api       the SDK's local HTTP server; its other options work too

With RUNPOD_WEBHOOK_GET_JOB set (RunPod sets it) the same command is the serverless worker.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import ctypes
import difflib
import errno
import functools
import gc
import glob
import hashlib
import heapq
import importlib
import io
import json
import logging
import math
import mmap
import os
import random
import re
import secrets
import signal
import struct
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain, count, islice, pairwise
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urljoin, urlsplit

from PIL import Image, PngImagePlugin


class Lazy:
    """A module that is imported when one of its names is first used: torch, diffusers and runpod cost 4-7 s at a
    cold start, time in which the models are fetched."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._module), name)


torch, diffusers, transformers, runpod = Lazy("torch"), Lazy("diffusers"), Lazy("transformers"), Lazy("runpod")
requests, urllib3, tqdm = Lazy("requests"), Lazy("urllib3"), Lazy("tqdm")
safetensors, peft = Lazy("safetensors"), Lazy("peft")
aiohttp, regex = Lazy("aiohttp"), Lazy("regex")
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


def civitai_url(version_id: int, query: str = SAFETENSOR_QUERY) -> str:
    """The download address of a Civitai model version."""
    return f"{CIVITAI}/api/download/models/{version_id}?{query}"


def lora_config(name: str, version_id: int, scale: float, filename: str) -> dict[str, Any]:
    """One row of LORA_CONFIGS."""
    return {"name": name, "url": civitai_url(version_id), "scale": scale, "filename": filename}


CHECKPOINT_CONFIG = {
    "name": "Jib Mix Illustrious Realistic",
    "url": civitai_url(1590699, f"{SAFETENSOR_QUERY}&size=pruned&fp=fp16"),
    "filename": "jib_mix_illustrious_realistic_v2.safetensors",
}
LORA_CONFIGS = [
    lora_config("Detail Tweaker XL", 135867, 1.5, "detail_tweaker_xl.safetensors"),
    lora_config("Hand Detail FLUX & XL", 294259, 1.0, "hand_detail_flux_xl.safetensors"),
    lora_config("Boring Reality primaryV3.0", 348625, 0.3, "boring_reality_v3.safetensors"),
    lora_config("Boring Reality primaryV4.0", 348837, 0.4, "boring_reality_v4.safetensors"),
    lora_config("epiCRealismXL-KiSS Enhancer", 1051156, 1.0, "epicrealism_xl_kiss.safetensors"),
    lora_config("Dramatic Lighting Slider", 1242203, 1.0, "dramatic_lighting_slider.safetensors"),
    lora_config("Pony Realism Slider", 1253021, 3.0, "pony_realism_slider.safetensors"),
    lora_config("Amateur style - slider (Pony)", 1594293, 1.0, "amateur_style_slider.safetensors"),
    lora_config("Real Skin Slider", 1681921, 1.0, "real_skin_slider.safetensors"),
]
VAE_MODEL = "madebyollin/sdxl-vae-fp16-fix"
SDXL_CONFIG = "stabilityai/stable-diffusion-xl-base-1.0"
MAX_LORA_SCALE = 10.0


def version_id(config: Mapping[str, Any]) -> str:
    """The Civitai version id in a model's URL: ".../api/download/models/135867?type=Model" -> "135867"."""
    found = re.search(r"/models/(\d+)", config["url"])
    return found[1] if found else ""


def sanitize_name(name: str) -> str:
    """A PEFT-safe adapter name: "Hand Detail FLUX & XL" -> "hand_detail_flux_xl", "" -> "adapter".

    PEFT keeps adapters in a ModuleDict, whose keys may not hold a dot.
    """
    return re.sub(r"[^0-9a-z]+", "_", name.lower()).strip("_") or "adapter"


def adapter_names(configs: list[dict[str, Any]]) -> list[str]:
    """One adapter name per config, none of them twice: "A", "a!", "a 2" -> "a", "a_2", "a_2_2"."""
    names: list[str] = []
    for config in configs:
        name, n = sanitize_name(config["name"]), 1
        unique = name
        while unique in names:
            n += 1
            unique = f"{name}_{n}"
        names.append(unique)
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
    """Every setting of the worker, parsed and checked: see Settings.from_environ and the README's table."""

    civitai_api_key: str = field(repr=False)
    civitai_base_url: str
    checkpoint_dir: Path
    lora_dir: Path
    compile_cache_dir: Path
    checkpoint: dict[str, Any]
    loras: list[dict[str, Any]]
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

    @classmethod
    def from_environ(cls) -> Settings:
        """Raises SetupFailed with the setting's name, its rule and, unless it is secret, its value."""
        environ = {name: value.strip() for name, value in os.environ.items()}
        on_runpod = "RUNPOD_WEBHOOK_GET_JOB" in environ
        store = Path(environ.get("MODEL_CACHE_DIR") or default_model_dir())
        return cls(
            civitai_api_key=parse_key(environ.get("CIVITAI_API_KEY", "")),
            civitai_base_url=parse_base_url(environ.get("CIVITAI_BASE_URL") or CIVITAI),
            checkpoint_dir=Path(environ.get("CHECKPOINT_DIR") or store / "checkpoints"),
            lora_dir=Path(environ.get("LORA_DIR") or store / "loras"),
            compile_cache_dir=store / "torch_compile",
            checkpoint=parse_checkpoint(environ.get("CHECKPOINT", "")),
            loras=parse_loras(environ.get("LORAS")),
            sdxl_config=environ.get("SDXL_CONFIG") or SDXL_CONFIG,
            vae_model=environ.get("VAE_MODEL") or VAE_MODEL,
            output_dir=Path(environ.get("OUTPUT_DIR") or "output"),
            max_response_bytes=int(parse_number(environ, "MAX_RESPONSE_MB", 9.5, 0.01, 1000) * MB),
            jobs_in_flight=int(parse_number(environ, "JOBS_IN_FLIGHT", 2, 1, 16, whole=True)),
            allow_cpu=parse_switch(environ, "ALLOW_CPU", not on_runpod),
            torch_compile=parse_switch(environ, "TORCH_COMPILE", False),
            bucket=parse_bucket(environ),
        )


def default_model_dir() -> str:
    """The network volume where one is mounted, else a folder here."""
    return "/runpod-volume/models" if Path("/runpod-volume").is_dir() else "models"


def parse_number(environ: Mapping[str, str], name: str, default: float, low: float, high: float, whole=False) -> float:
    """A number within [low, high]; an empty setting is the default."""
    text = environ.get(name) or str(default)
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        kind = "whole number" if whole else "number"
        raise SetupFailed(f"{name} must be a {kind} from {low:g} to {high:g}, got {text!r}")
    return value


def parse_switch(environ: Mapping[str, str], name: str, default: bool) -> bool:
    """1 or 0, also spelled true/false, yes/no, on/off."""
    text = environ.get(name, "").lower()
    if text in ("1", "true", "yes", "on"):
        return True
    if text in ("0", "false", "no", "off"):
        return False
    if text:
        raise SetupFailed(f"{name} must be 1 or 0, got {text!r}")
    return default


def parse_key(text: str) -> str:
    """The Civitai key, fit for a header: the error of an HTTP library would quote it."""
    if not re.fullmatch(r"[\x21-\x7e]*", text):
        raise SetupFailed(
            "CIVITAI_API_KEY must be one word of plain ASCII; copy it again from your Civitai account page"
        )
    return text


def parse_base_url(text: str) -> str:
    """Scheme and host of the Civitai server, without a slash at the end."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise SetupFailed("CIVITAI_BASE_URL must be an address such as https://civitai.com")
    return text.rstrip("/")


def parse_checkpoint(text: str) -> dict[str, Any]:
    """CHECKPOINT, a Civitai model version id; "" is the table's checkpoint."""
    if not text or text == version_id(CHECKPOINT_CONFIG):
        return dict(CHECKPOINT_CONFIG)
    if not re.fullmatch(r"[0-9]{1,12}", text):
        raise SetupFailed(f"CHECKPOINT must be a Civitai model version id such as 1590699, got {text!r}")
    return {"name": f"civitai_{text}", "url": civitai_url(int(text)), "filename": f"civitai_{text}.safetensors"}


def parse_loras(text: str | None) -> list[dict[str, Any]]:
    """LORAS: None -> the table, "" -> no LoRAs, "135867@1.5,294259" -> those two at 1.5 and 1.0."""
    if text is None:
        return [dict(config) for config in LORA_CONFIGS]
    return [parse_lora(item.strip()) for item in text.split(",") if item.strip()]


def parse_lora(item: str) -> dict[str, Any]:
    """One LoRA of LORAS: "135867@1.5", the scale optional."""
    found = re.fullmatch(r"([0-9]{1,12})(?:\s*@\s*(-?[0-9]*\.?[0-9]+))?", item)
    scale = float(found[2] or 1.0) if found else math.nan
    if not abs(scale) <= MAX_LORA_SCALE:
        raise SetupFailed(
            f"LORAS must list Civitai version ids with an optional scale from -10 to 10, "
            f"such as 135867@1.5,294259; got {item!r}"
        )
    known = {version_id(config): config for config in LORA_CONFIGS}
    config = known.get(found[1]) or lora_config(
        f"civitai_{found[1]}", int(found[1]), 1.0, f"civitai_{found[1]}.safetensors"
    )
    return {**config, "scale": scale}


def parse_bucket(environ: Mapping[str, str]) -> Bucket | None:
    """The bucket, where all three BUCKET_* are set; some of them alone would lose images silently."""
    names = ("BUCKET_ENDPOINT_URL", "BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY")
    missing = [name for name in names if not environ.get(name)]
    if len(missing) == len(names):
        return None
    if missing:
        raise SetupFailed(f"a bucket needs all of {', '.join(names)}; missing: {', '.join(missing)}")
    return Bucket(*(environ[name] for name in names))


# ---------------------------------------------------------------------------------------------------------------------
# errors


class WorkerError(Exception):
    """A failure with a code of its own. The message goes to the client: no path, key or traceback in it.

    detail is for the log alone: paths, and what a library said.
    """

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


def failure_answer(failure: WorkerError) -> dict[str, Any]:
    """What a client gets: {"error": sentence, "code": code}, and refresh_worker where the worker must be replaced."""
    answer = {"error": str(failure), "code": failure.code}
    return answer | {"refresh_worker": True} if failure.refresh_worker else answer


# torch raises OutOfMemoryError for its own allocator; the others say so in words only
OUT_OF_MEMORY_SIGNS = (
    "out of memory",
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def explain(error: Exception) -> WorkerError:
    """The failure that a client sees for what a library raised."""
    said = str(error)
    if isinstance(error, MemoryError) or any(sign in said for sign in OUT_OF_MEMORY_SIGNS):
        return OutOfMemory("the job did not fit into memory: ask for fewer or smaller images", detail=error)
    if "CUDA error" in said or gpu_is_lost():
        return GpuLost("the GPU failed during the job; the worker is being replaced: send the job again", detail=error)
    return GenerationFailed(f"generating failed with {type(error).__name__}; the worker's log says more", detail=error)


def gpu_is_lost() -> bool:
    """After a CUDA error that is sticky, such as an illegal address, every later call of the process fails too."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.ones(1, device="cuda").item()
    except torch.OutOfMemoryError:  # full of other jobs' tensors, but alive
        return False
    except RuntimeError:
        return True
    return False


# ---------------------------------------------------------------------------------------------------------------------
# store

USER_AGENT = "sdxl-worker/1.0"  # Civitai leads what looks like a browser to a login page, and tells others 401
SEGMENT, LONGEST_RUN, BLOCK = MIB, 32, MIB // 4  # bytes that a mark stands for; segments a request; bytes a read
FEW, MANY, FAST, JUDGED_S = 8, 24, 16 * MB, 0.2  # connections of all files; bytes/s at which few of them are enough
CONNECT_S, STALL_S, LISTING_S, LOOK_S = 10.0, 30.0, 5.0, 10.0
TRIES, FEW_TRIES, ONE_TRY = 8, 3, 1  # in a row, without progress
FIRST_BACKOFF_S, LAST_BACKOFF_S, PATIENCE_S = 1.0, 30.0, 300.0  # RunPod gives a start 7 minutes
LOCK_BEAT_S, LOCK_POLL_S, LOCK_DEAD_S = 5.0, 1.0, 40.0  # changed and looked at so often; unchanged for so long is dead
SILENT_S = 24 * 3600.0  # after which a worker elsewhere will not come back to its part
REPORT_S, HASH_BYTES, HASH_POLL_S = 5.0, 16 * MIB, 0.01
FIRST_READERS, READERS, READ_BYTES, SLOW_READ_S = 2, 8, 32 * MIB, 0.25  # 32 MiB in 0.25 s are 134 MB/s
REFUSALS = dict.fromkeys((401, 403), "set CIVITAI_API_KEY to a valid key; an early-access model must be bought first")
REFUSALS |= {
    404: "check the version id",
    410: "its creator or Civitai has removed it",
    451: "not served in this region",
}


@dataclass(frozen=True)
class ModelFiles:
    """What the model store holds after a cold start."""

    checkpoint: Path
    loras: dict[str, Path]  # adapter name -> file
    failed: dict[str, str]  # adapter name -> why it could not be had


def fetch_models(settings: Settings) -> ModelFiles:
    """The checkpoint and all LoRAs, fetched side by side where they are not in place. Raises DownloadError for the
    checkpoint, and where the files do not fit together; a LoRA that cannot be had is named in `failed`."""
    store, loras, failed = Store(settings), {}, {}
    store.sweep()
    checkpoint = Download(store, settings.checkpoint, settings.checkpoint_dir)
    downloads = {name: Download(store, config, settings.lora_dir) for name, config in settings.stack.items()}
    store.downloads = [checkpoint, *downloads.values()]
    wait([in_background(download.look) for download in store.downloads], timeout=LOOK_S)
    store.check_space()
    path, *futures = [in_background(download.ensure) for download in store.downloads]
    path.result()  # without it nothing else matters
    for name, future in zip(downloads, futures, strict=True):
        try:
            loras[name] = future.result()
        except DownloadError as error:
            failed[name] = str(error)
            log.warning("LoRA %s is left out: %s%s", name, error, error.detail)
    return ModelFiles(path.result(), loras, failed)


def setup_models() -> tuple[Path, dict[str, Path]]:
    """Makes the configured models ready: the checkpoint's path, and adapter name -> LoRA path of those to be had."""
    files = fetch_models(Settings.from_environ())
    return files.checkpoint, files.loras


def ensure_model_exists(config: dict[str, Any], model_dir: Path) -> Path:
    """The path of the config's file in model_dir, fetched where it is missing or unusable.

    config: {"name", "url", "filename"}, and "sha256" where the file must have it. Raises DownloadError.
    """
    return Store(Settings.from_environ()).ensure(config, Path(model_dir))


def download_file(url: str, filepath: Path) -> None:
    """Fetches a file, from Civitai or any other server, whether or not one is in place already.

    Raises DownloadError; filepath never holds a partial or wrong file.
    """
    config = {"name": Path(filepath).name, "url": url, "filename": Path(filepath).name}
    Store(Settings.from_environ()).ensure(config, Path(filepath).parent, again=True)


class Store:
    """The folders of model files, and what their downloads share: HTTP, connections, space on the disk, progress.

    Beside a file <name> lie, all hidden: .<name>.json, what is known of it; .<name>.lock, while a worker fetches it;
    and the files of a Part. Several workers may use one folder.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings, self.base_url, self.key = settings, settings.civitai_base_url, settings.civitai_api_key
        self.session, self.connections, self.ahead = requests.Session(), Connections(), ReadAhead()
        for scheme in ("https://", "http://"):
            self.session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=MANY))
        self.downloads: list[Download] = []  # that share space and progress
        self.lock, self.running = threading.Lock(), 0

    def ensure(self, config: Mapping[str, Any], folder: Path, again: bool = False) -> Path:
        """The path of a config's file in a folder, fetched where it is not in place, or `again`; for many threads at
        once. Raises DownloadError."""
        download = Download(self, config, folder)
        with self.lock:
            self.downloads = [download, *(self.downloads if self.running else ())]
        return download.ensure(again)

    def sweep(self) -> None:
        """Deletes what downloads left that nobody will resume: the file is not configured any more, or in place, and
        their worker has ended here, or was silent for a day."""
        settings = self.settings
        wanted = {settings.checkpoint_dir / settings.checkpoint["filename"]}
        wanted |= {settings.lora_dir / config["filename"] for config in settings.loras}
        for file in chain(*(folder.glob(".*") for folder in {settings.checkpoint_dir, settings.lora_dir})):
            found = re.fullmatch(r"\.(.+?)\.(?:(\w+-\d+-\w+)\.(?:part|journal)|lock)", file.name)
            path = file.with_name(found[1]) if found else file
            if not found or (path in wanted and not path.exists()):
                continue
            with suppress(OSError), tempfile.TemporaryFile(dir=file.parent) as probe:
                silent_s = os.fstat(probe.fileno()).st_mtime - file.stat().st_mtime  # by the file server's clock
                if is_gone(found[2] or file.read_text(errors="replace")) or silent_s > SILENT_S:
                    file.unlink()
                    log.info("%s is left of a download that nobody resumes: deleted", file.name)

    def check_space(self) -> None:
        """Refuses what does not fit together, by what each file still needs. Raises DownloadError."""
        volumes: dict[int, list[Download]] = {}
        for download in self.downloads:
            if download.size < math.inf and not download.fetched:
                download.path.parent.mkdir(parents=True, exist_ok=True)
                volumes.setdefault(download.path.parent.stat().st_dev, []).append(download)
        for together in volumes.values():
            volume = os.statvfs(together[0].path.parent)
            needed = sum(max(0, download.size - bytes_on_disk(download.path)) for download in together)
            free = volume.f_bavail * volume.f_frsize
            if volume.f_blocks and needed > free:  # some network file systems tell nothing
                what = (
                    f"{together[0]} needs" if len(together) == 1 else f"{together[0]} and {len(together) - 1} more need"
                )
                raise DownloadError(
                    f"{what} {needed / MB:.0f} MB, but the model store has {free / MB:.0f} MB free: take a larger "
                    "network volume, or another MODEL_CACHE_DIR"
                )

    @contextmanager
    def progress(self) -> Iterator[None]:
        """Shows how far all files together are, while at least one is fetched."""
        with self.lock:
            self.running += 1
            if self.running == 1:
                in_background(self.report)
        try:
            yield
        finally:
            self.running -= 1

    def report(self) -> None:
        """A bar on a terminal, a line every REPORT_S in a log."""
        drawn, next_line = sys.stderr.isatty(), time.monotonic() + REPORT_S
        text = None if drawn else "{desc}: {percentage:.0f} % of {total_fmt}B, {rate_fmt}, {remaining} left"
        place = sys.stderr if drawn else io.StringIO()
        with tqdm.tqdm(desc="models", unit="B", unit_scale=True, leave=False, bar_format=text, file=place) as bar:
            while self.running > 0:
                time.sleep(0.1)
                parts = [download.part for download in self.downloads if download.part]
                bar.total = sum(part.expected for part in parts)
                bar.update(sum(part.came for part in parts) - bar.n)
                if bar.total and not drawn and time.monotonic() > next_line:
                    log.info("%s", bar)
                    next_line += REPORT_S

    def get(self, url: str, byte_range: str = "", stall_s: float | None = None) -> Any:
        """The open response at the end of at most 5 redirects, to https or this very machine alone; the key goes to
        Civitai's origin alone. Raises Fault."""
        headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity"}
        headers |= {"Range": f"bytes={byte_range}"} if byte_range else {}
        keep = {"auth": lambda request: request, "allow_redirects": False}  # else a .netrc would replace the key
        keep |= {"stream": True, "timeout": (CONNECT_S, stall_s or STALL_S)}
        with network_faults():
            for _ in range(6):
                at_home = self.key and origin(url) == origin(self.base_url)
                key = {"Authorization": f"Bearer {self.key}"} if at_home else {}
                response = self.session.get(url, headers=headers | key, **keep)
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
        try:
            with network_faults():
                answer = json.loads(response.content if origin(response.url) == origin(self.base_url) else "{}")
            said = answer.get("message") or answer.get("error")
        except (Fault, AttributeError):  # it is no JSON, or no object
            return ""
        if not isinstance(said, str) or re.search(r"<\s*[a-z!/]", said, re.IGNORECASE):
            return ""
        said = said.replace(self.key, "…") if self.key else said
        said = re.sub(r"\S*(://|www\.|\.\w+/)\S*", "…", said)
        said = " ".join("".join(c if c.isprintable() else " " for c in said).split())
        return f": {said[:200]}" if said else ""


class Connections:
    """Places for requests; `with` waits for one. Civitai's CDN caps each connection far below what a data centre's line
    carries, and then all are needed; where they are fast, those beyond a few cost CPU alone."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.busy, self.most, self.limit, self.reduced = 0, FEW, FEW, -math.inf

    def __enter__(self) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.busy < self.most)
            self.busy += 1

    def __exit__(self, *_: object) -> None:
        with self.changed:
            self.busy -= 1
            self.changed.notify()

    def count(self, size: int, seconds: float) -> None:
        """A request has brought so many bytes so far: more at once where they come slowly, or again after a fault."""
        with self.changed:
            if self.limit == FEW and seconds > JUDGED_S and size / seconds < FAST:
                self.most = self.limit = MANY
            self.most = min(self.most + 1, self.limit)
            self.changed.notify_all()

    def reduce(self, began: float) -> None:
        """Half as many, after the fault of a request that began since the last time."""
        with self.changed:
            if began > self.reduced:
                self.most, self.reduced = max(min(self.busy, self.most) // 2, 1), time.monotonic()


class ReadAhead:
    """Brings files into the page cache by large reads, two at a time; up to eight where each is slow.

    from_single_file maps the file, which then comes page by page: five times as slow on a cold local disk, and far
    worse on a network volume. There every read waits for the server, and many side by side help; two fill a local
    disk, where more would keep the imports from it. Nobody waits for this: mapped pages come no later for it.
    """

    def __init__(self) -> None:
        self.todo: deque[tuple[Path, int]] = deque()  # file and offset
        self.lock, self.readers = threading.Lock(), 0

    def add(self, path: Path) -> None:
        """Begins with a file, behind those that were added before."""
        self.todo.extend((path, offset) for offset in range(0, path.stat().st_size, READ_BYTES))
        for _ in range(FIRST_READERS):
            self.start_reader(FIRST_READERS)

    def start_reader(self, most: int) -> None:
        """One more reader, where there are not as many as that."""
        with self.lock:
            if self.readers < most:
                self.readers += 1
                in_background(self.read)

    def read(self) -> None:
        """Reads what is to be read; a chunk that cannot be is left to whoever needs it."""
        while True:
            with self.lock:  # in one step: else a file added just then would find this reader counted
                if not self.todo:
                    self.readers -= 1
                    return
                path, offset = self.todo.popleft()
            started = time.monotonic()
            try:
                read_chunk(path, offset)
            except OSError as error:
                log.warning("%s cannot be read ahead at byte %d: %s", path.name, offset, error.strerror)
            if time.monotonic() - started > SLOW_READ_S:
                self.start_reader(READERS)


def read_chunk(path: Path, offset: int) -> None:
    """Brings READ_BYTES of a file into the page cache, unless all are there already."""
    with path.open("rb", buffering=0) as file:
        try:
            for at in range(offset, offset + READ_BYTES, MIB):
                os.preadv(file.fileno(), [bytearray(1)], at, os.RWF_NOWAIT)
        except OSError:  # not there, or the file system cannot tell; the buffers are all the same memory
            os.preadv(file.fileno(), [bytearray(MIB)] * (READ_BYTES // MIB), offset)


# what is in place


def record_file(path: Path) -> Path:
    """Where the store notes what it knows of a file: {"size", "mtime_ns", "sha256"}."""
    return path.with_name(f".{path.name}.json")


def read_record(path: Path) -> tuple[str | None, bool]:
    """The recorded hash of a file, if any, and whether the file is untouched since. The times are both the file
    server's, so its clock does not matter."""
    try:
        stat, record = path.stat(), json.loads(record_file(path).read_bytes())
        return record["sha256"], (record["size"], record["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns)
    except (OSError, ValueError, LookupError, TypeError):  # there is none that can be read
        return None, False


def write_record(path: Path, stat: os.stat_result, sha256: str | None) -> None:
    """Notes a file's stamp and hash, whole or not at all."""
    temporary = part_files(path, new_owner())[1]  # which is swept like one after a kill
    temporary.write_text(json.dumps({"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256}))
    temporary.replace(record_file(path))


def recorded_sha256(path: Path) -> str | None:
    """The hash (lower case) that a file had when it was fetched or checked; None where it was touched since, was put
    there by hand, or has gone."""
    sha256, untouched = read_record(path)
    return sha256 if untouched else None


def content_problem(path: Path, name: str) -> str:
    """Why a file cannot be a model, "" where it can. A safetensors header tells the size of the whole file."""
    if path.stat().st_size == 0:
        return "is empty"
    try:
        if name.endswith(".safetensors"):
            with safetensors.safe_open(path, framework="np"):
                pass
    except (safetensors.SafetensorError, OSError):
        return "is no whole safetensors file"
    return ""


WRONG_HASH = "has another SHA256 than the published file"


def pick_sha256(files: list[dict[str, Any]], size: float, query: str) -> str | None:
    """The hash of the listed file that a download of `size` bytes is. A version may hold training data and other
    precisions too: the exact size tells, then what the URL asked for, then Civitai's own choice."""
    wanted = dict(parse_qsl(query))

    def fit(file: dict[str, Any]) -> tuple[bool, bool, int, bool]:
        metadata = file.get("metadata") or {}
        asked = sum(metadata.get(name) == value for name, value in wanted.items())
        same_size = abs(file.get("sizeKB", 0) * 1024 - size) < 1
        return same_size, file.get("type") == wanted.get("type"), asked, bool(file.get("primary"))

    hashed = [file for file in files if (file.get("hashes") or {}).get("SHA256")]
    return max(hashed, key=fit)["hashes"]["SHA256"].lower() if hashed else None


# what can go wrong


class Fault(Exception):
    """Why a file's bytes do not come, and how many tries in a row that is worth."""

    def __init__(self, reason: str, tries: int = TRIES, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.tries, self.wait_s = tries, wait_s


class WrongFile(Exception):
    """What came is not the file that was asked for."""


class LockLost(Exception):
    """Another worker took the lock over, since it saw no beat of ours."""


@contextmanager
def network_faults() -> Iterator[None]:
    """Turns what the HTTP libraries raise into Fault. Their texts quote signed links, so only the type is kept."""
    try:
        yield
    except ValueError as error:  # InvalidURL and its like, in a configured address or a redirect's
        raise Fault("its address is not a valid URL", ONE_TRY) from error
    except (requests.Timeout, urllib3.exceptions.TimeoutError):
        raise Fault("the server sent nothing for too long") from None
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise Fault(f"the connection failed ({type(error).__name__})") from None


@contextmanager
def disk_errors(download: Download) -> Iterator[None]:
    """Turns what the file system refuses into DownloadError, its path for the log alone."""
    try:
        yield
    except OSError as error:
        advice = "the model store cannot be used: check MODEL_CACHE_DIR, CHECKPOINT_DIR and LORA_DIR"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # RunPod's volumes say EDQUOT with space left
            advice = "the model store is full, or its quota is used up: take a larger network volume"
        raise DownloadError(f"{download} cannot be stored, {advice}", detail=error) from error


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
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
        return f"{boot}{Path('/proc/self/ns/pid').stat().st_ino:x}"
    except OSError:
        return secrets.token_hex(8)


def new_owner() -> str:
    """A name for one piece of work of this process: "3f2a91bcf0000041-1234-9a8b7c6d"."""
    return f"{machine()}-{os.getpid()}-{secrets.token_hex(4)}"


def is_gone(owner: str) -> bool:
    """Whether an owner's process has surely ended. Of one in another container or machine nothing is sure."""
    found = re.match(r"(\w+)-(\d+)-\w+", owner)
    if not found or found[1] != machine():
        return False
    with suppress(PermissionError):
        try:
            os.kill(int(found[2]), 0)
        except ProcessLookupError:
            return True
    return False


class StoreLock:
    """One worker at a time fetches a file; `with` waits for its turn.

    The lock is a file made with O_EXCL, which network file systems keep where flock silently does nothing. Its owner
    writes a beat into it: one whose beat has not changed for LOCK_DEAD_S of our own clock is dead. Where O_EXCL does
    nothing either, several fetch the same file under names of their own, and the result is still right.
    """

    def __init__(self, path: Path) -> None:
        self.name, self.file, self.owner = path.name, path.with_name(f".{path.name}.lock"), new_owner()
        self.dead: set[str] = set()  # whose locks were taken over
        self.waited, self.released = False, threading.Event()

    def __enter__(self) -> StoreLock:
        seen, since = "", time.monotonic()
        while not self.take():
            beat = self.read()
            if beat != seen:
                seen, since = beat, time.monotonic()
            if is_gone(beat) or time.monotonic() - since > LOCK_DEAD_S:
                log.warning("%s: the worker that was fetching it is gone; taking over", self.name)
                self.dead.add(beat.split(" ")[0])
                if self.read() == beat:  # else it is another's by now
                    self.file.unlink(missing_ok=True)
                continue
            if not self.waited:
                log.info("%s: another worker is fetching it; waiting", self.name)
            self.waited = True
            time.sleep(LOCK_POLL_S)
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        if self.read().startswith(self.owner):
            self.file.unlink(missing_ok=True)

    def take(self) -> bool:
        """Whether the lock is ours now."""
        try:
            descriptor = os.open(self.file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        os.write(descriptor, f"{self.owner} 0".encode())
        in_background(self.beat, descriptor)
        return True

    def beat(self, descriptor: int) -> None:
        """Shows that this worker lives. Through the open file: a lock taken from us is another's file."""
        beats, failed = 0, False
        while not self.released.wait(LOCK_BEAT_S):
            beats += 1
            try:
                os.pwrite(descriptor, f"{self.owner} {beats}".encode(), 0)
                os.fsync(descriptor)  # a network file system shows it to others now
            except OSError as error:  # a full disk, a stale handle: it may pass before others take the lock for dead
                if not failed:
                    log.warning("%s: the lock's beat cannot be written: %s", self.name, error.strerror)
                failed = True
        os.close(descriptor)

    def read(self) -> str:
        """The lock's owner and beat; "" where it has gone."""
        try:
            return self.file.read_text(errors="replace")
        except FileNotFoundError:
            return ""


# the bytes of one file


def part_files(path: Path, owner: str) -> tuple[Path, Path]:
    """Where an owner's part of a file lies: its bytes, its journal."""
    return path.with_name(f".{path.name}.{owner}.part"), path.with_name(f".{path.name}.{owner}.journal")


def part_owners(path: Path) -> set[str]:
    """All whose parts of a file lie in the store."""
    files = path.parent.glob(f".{glob.escape(path.name)}.*")
    return {file.stem.removeprefix(f".{path.name}.") for file in files if file.suffix in (".part", ".journal")}


def bytes_on_disk(path: Path) -> int:
    """What the disk already holds of a file: parts that are resumed or deleted, and an unusable file in its place."""
    total = 0
    for file in (path, *(part_files(path, owner)[0] for owner in part_owners(path))):
        with suppress(FileNotFoundError):
            total += file.stat().st_blocks * 512
    return total


class Part:
    """The bytes of a file that have come, segment by segment, and marks of them that survive `kill -9`.

    .<name>.<owner>.part      the bytes, in their place
    .<name>.<owner>.journal   a line that says what they are of, then a byte for each segment: 1 where it has come
    """

    def __init__(self, path: Path, lock: StoreLock, size: float, identity: str, hashed: bool) -> None:
        """identity: what tells this file's bytes from others. hashed: whether a hash will find lost writes in the end;
        else bytes that came on another machine, or before this one crashed, do not count."""
        self.path, self.dead, self.size, self.identity, self.hashed = path, lock.dead, size, identity, hashed
        self.data, self.journal = part_files(path, lock.owner)
        self.header = f"{identity} {machine()}\n".encode()
        self.segments = 0 if size == math.inf else -(-size // SEGMENT)
        self.done: set[int] = set()
        self.lock, self.ended = threading.Lock(), threading.Event()  # all has come, or the download was given up
        self.given_up, self.came = False, 0

    def __enter__(self) -> Part:
        """Opens the part, with what a dead worker left of the same file."""
        for owner in part_owners(self.path):
            if owner in self.dead or owner.startswith("free-") or is_gone(owner):
                with suppress(FileNotFoundError):  # where locks do nothing, another worker may be quicker
                    self.adopt(*part_files(self.path, owner))
                for file in part_files(self.path, owner):
                    file.unlink(missing_ok=True)
        if not self.done:
            self.journal.write_bytes(self.header)
        self.data.touch()
        # open until the last thread that uses this part lets go of it: a number closed earlier could be another file's
        self.marks, self.bytes = self.journal.open("r+b", buffering=0), self.data.open("r+b", buffering=0)
        self.todo = deque(segment for segment in range(self.segments) if segment not in self.done)
        self.expected = sum(self.end(segment) - segment * SEGMENT for segment in self.todo)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Leaves the bytes to the next try, but for those of a wrong file or on a full disk."""
        self.given_up = True
        self.ended.set()
        keep = kind is not None and not issubclass(kind, WrongFile | OSError)
        free = part_files(self.path, f"free-0-{secrets.token_hex(4)}")
        for file, kept in zip((self.data, self.journal), free, strict=True):
            with suppress(FileNotFoundError):  # published
                file.rename(kept) if keep else file.unlink()

    def adopt(self, data: Path, journal: Path) -> None:
        """Takes a part over, where it is of the same file. Its journal first: so a kill loses nothing."""
        header, _, marks = journal.read_bytes().partition(b"\n")
        identity, _, where = header.decode(errors="replace").partition(" ")
        of_this_file = identity == self.identity and (self.hashed or where == machine())
        if of_this_file and not self.done and data.exists():
            self.header = header + b"\n"
            self.journal.write_bytes(self.header + marks)
            data.rename(self.data)
            self.done = {segment for segment, mark in enumerate(marks[: self.segments]) if mark == 1}

    def end(self, segment: int) -> int:
        """Where a segment ends."""
        return min((segment + 1) * SEGMENT, self.size)

    def take(self) -> deque[int]:
        """Segments for one request; the fewer the less is left, so that all connections end at about the same time."""
        with self.lock:
            longest = min(max(len(self.todo) // (2 * MANY), 1), LONGEST_RUN)
            run: deque[int] = deque()
            while self.todo and len(run) < longest and (not run or self.todo[0] == run[-1] + 1):
                run.append(self.todo.popleft())
            return run

    def write(self, start: int, block: bytes) -> None:
        """Puts a block into its place."""
        view = memoryview(block)
        with self.lock:  # the kernel lets one thread at a time write to a file, and has the others spin
            if self.given_up:
                raise Fault("the download was given up")
            while view:
                written = os.pwrite(self.bytes.fileno(), view, start)
                start, view = start + written, view[written:]

    def mark(self, segment: int, size: int) -> None:
        """Notes that a segment has come: a kill before costs no more than the segment."""
        with self.lock:
            os.pwrite(self.marks.fileno(), b"\1", len(self.header) + segment)
            self.done.add(segment)
            self.came += size
            if len(self.done) == self.segments:
                self.ended.set()

    def sha256(self) -> str:
        """The hash of the whole file, made behind the front of what has come. Of the mapped file, as safetensors maps
        it later: reading would copy every byte once more."""
        digest, at, front = hashlib.sha256(), 0, 0
        while at < self.size and not self.given_up:
            while front in self.done:
                front += 1
            end = min(front * SEGMENT, self.size, at + HASH_BYTES)
            if end == at:
                time.sleep(HASH_POLL_S)
                continue
            with mmap.mmap(self.bytes.fileno(), end - at, mmap.MAP_PRIVATE, mmap.PROT_READ, offset=at) as pages:
                digest.update(pages)
            at = end
        return digest.hexdigest()

    def publish(self, sha256: str) -> None:
        """Gives the file its name, with every byte on the disk before."""
        os.fsync(self.bytes.fileno())
        write_record(self.path, os.fstat(self.bytes.fileno()), sha256)
        self.data.replace(self.path)
        folder = os.open(self.path.parent, os.O_RDONLY)
        with suppress(OSError):  # some network file systems cannot make a rename last, and need not
            os.fsync(folder)
        os.close(folder)
        for file in chain(*(part_files(self.path, owner) for owner in part_owners(self.path))):
            file.unlink(missing_ok=True)


class Patience:
    """How long the faults of one file are borne: some tries in a row, and PATIENCE_S without a byte."""

    def __init__(self) -> None:
        self.lock, self.resume = threading.Lock(), 0.0
        self.progressed()

    def progressed(self) -> None:
        """Bytes came: faults count from here again."""
        self.faults, self.deadline = 0, time.monotonic() + PATIENCE_S

    def bear(self, what: Download, fault: Fault, began: float = math.inf) -> float:
        """Seconds to wait before the next try. Raises DownloadError where there have been enough.

        began: when the request was sent; those of before the last wait's end are part of the fault waited for.
        """
        with self.lock:
            now = time.monotonic()
            if began > self.resume:
                self.faults += 1
                backoff = min(FIRST_BACKOFF_S * 2 ** (self.faults - 1), LAST_BACKOFF_S) * random.uniform(0.5, 1)
                self.resume = now + (fault.wait_s or backoff)
                if self.faults >= fault.tries or self.resume > self.deadline:
                    message = f"{what} cannot be downloaded: {fault}"
                    raise DownloadError(message, detail=f"{self.faults} tries in a row") from None
                log.warning("%s: %s; trying again in %.1f s", what, fault, self.resume - now)
            return max(0.0, self.resume - now)


@dataclass(frozen=True)
class Source:
    """Where a file's bytes come from, as the server describes it."""

    link: str
    size: float  # bytes; inf where the server does not tell
    tag: str
    whole: Any  # the open response with the whole file, where the server has no ranges


class Download:
    """One file: what it is called, where it comes from and goes, and its way into the store.

    Not by hf_transfer: 0.1.9 resumes nothing, holds the GIL throughout, and takes a wrong answer for the file.
    """

    def __init__(self, store: Store, config: Mapping[str, Any], folder: Path) -> None:
        self.store, self.name, self.path = store, config["name"], folder / config["filename"]
        self.url = re.sub(r"^https?://(www\.)?civitai\.com(?=/)", lambda _: store.base_url, config["url"])
        self.version = version_id(config) if self.url.startswith(f"{store.base_url}/") else ""  # "": from elsewhere
        self.sha256 = (config.get("sha256") or "").lower()  # that the file must have whatever Civitai says
        self.source: Source | None = None
        self.size, self.part, self.fetched = math.inf, None, False
        self.patience, self.renewing = Patience(), threading.Lock()

    def __str__(self) -> str:
        return f"{self.name} (Civitai model version {self.version})" if self.version else self.name

    def problem(self) -> str:
        """Why the file in place cannot be used, "" where it can. One that was touched since it was recorded, or put
        there by hand, is checked: by its header, and by its hash where one is known."""
        if not self.path.exists():
            return "is missing"
        recorded, untouched = read_record(self.path)
        expected = self.sha256 or recorded
        if untouched and recorded == expected:
            return ""
        stat = self.path.stat()
        if problem := content_problem(self.path, self.path.name):
            return problem
        if expected:
            with self.path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    return WRONG_HASH
        with suppress(OSError):  # a volume may be read-only
            write_record(self.path, stat, expected)
        return ""

    def look(self) -> None:
        """Asks for the size of a file that is not in place; a server that does not answer is asked again later."""
        if self.problem():
            with suppress(Fault):
                self.source = self.ask()

    def ensure(self, again: bool = False) -> Path:
        """The path of the file, fetched where it is not in place, or `again`. Raises DownloadError."""
        with disk_errors(self):
            if again or self.problem():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.store.progress():
                    while not self.take_turn(again):
                        log.warning("%s: another worker has taken it over", self)
            if not self.fetched:  # what was fetched is in the page cache
                self.store.ahead.add(self.path)
        return self.path

    def take_turn(self, again: bool) -> bool:
        """Fetches the file, unless another worker has done so while this one waited. False where the lock was lost."""
        with StoreLock(self.path) as lock:
            if not again or lock.waited:
                problem = self.problem()
                if not problem:
                    return True
                if self.path.exists():
                    log.warning("%s: the file in place %s: fetching it again", self, problem)
                    self.path.unlink()
            try:
                self.fetch(lock)
            except LockLost:
                return False
            except FileNotFoundError:  # where locks do nothing, a worker that has published the file sweeps ours away
                if self.problem():
                    raise
        return True

    def fetch(self, lock: StoreLock) -> None:
        """Fetches the file; what comes and fails its checks is thrown away and fetched once more, then refused."""
        self.patience.progressed()
        for last in (False, True):
            try:
                self.patiently(self.fetch_once, lock)
                return
            except WrongFile as wrong:
                if last:
                    raise DownloadError(f"{self} was refused: what came {wrong}, twice") from None
                log.warning("%s: what came %s: fetching it once more", self, wrong)

    def patiently(self, step: Callable[..., Any], *args: Any) -> Any:
        """step(*args), again and again while its faults may pass."""
        while True:
            try:
                return step(*args)
            except Fault as fault:
                time.sleep(self.patience.bear(self, fault))

    def fetch_once(self, lock: StoreLock) -> None:
        """The file from the first request to its name. Raises WrongFile, Fault, LockLost or DownloadError."""
        started = time.monotonic()
        # 1. where it is, how long it is, and what hash it must have
        source = self.source if self.source and not self.part and not self.source.whole else self.ask()
        self.source = source
        expected = self.sha256 or self.listed_sha256(source.size)
        told = secrets.token_hex() if source.whole else f"{urlsplit(self.url).path} {source.size} {source.tag}"
        identity = hashlib.sha256(f"{told} {SEGMENT}".encode()).hexdigest()  # of one stream: of no use to another
        # 2. room for it, and what others left of it
        self.store.check_space()
        with Part(self.path, lock, source.size, identity, bool(expected)) as part:
            self.part = part
            hashing = in_background(part.sha256)
            # 3. the bytes
            self.fetch_whole(part) if source.whole else self.fetch_ranges(part)
            # 4. checks, and its name
            if problem := content_problem(part.data, self.path.name):
                raise WrongFile(problem)
            if expected and hashing.result() != expected:
                raise WrongFile(WRONG_HASH)
            if not lock.read().startswith(lock.owner):
                raise LockLost
            part.publish(hashing.result())
        self.fetched, seconds = True, time.monotonic() - started
        note = "SHA256 verified" if expected else "no SHA256 to verify it by"
        log.info("%s: %.1f MB in %.1f s, %s", self, part.size / MB, seconds, note)

    def ask(self) -> Source:
        """Follows the URL to where the bytes are. Civitai refuses HEAD, so this asks for one byte."""
        response = self.store.get(self.url, "0-0")
        self.check_status(response)
        if response.status_code == 200:
            length = response.headers.get("content-length")
            self.size, whole = int(length) if length else math.inf, response
        else:
            found = re.fullmatch(r"bytes 0-0/(\d+)", response.headers.get("content-range", ""))
            response.close()
            if not found:
                raise Fault("the server described a range wrongly", FEW_TRIES)
            self.size, whole = int(found[1]), None
        return Source(response.url, self.size, tag_of(response), whole)

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

    def listed_sha256(self, size: float) -> str | None:
        """The hash that Civitai publishes for the file of `size` bytes; None where it tells none."""
        why = ""
        for _ in range(2 if self.version else 0):
            try:
                url = f"{self.store.base_url}/api/v1/model-versions/{self.version}"
                with self.store.get(url, stall_s=LISTING_S) as response, network_faults():
                    status, body = response.status_code, response.content
                if status == 200:
                    return pick_sha256(json.loads(body)["files"], size, urlsplit(self.url).query)
                why = f"it answered {status}{self.store.said_by_civitai(response)}"
            except Fault as fault:
                why = str(fault)
            except ValueError:
                is_page = body.lstrip()[:1] == b"<"
                why = (
                    "a web page came" if is_page else "what came is not JSON" if body.strip() else "its answer is empty"
                )
            except (LookupError, TypeError, AttributeError):
                why = "its listing has not the form that is known"
            log.warning("%s: Civitai tells no hash: %s", self, why)
        return None

    def fetch_whole(self, part: Part) -> None:
        """The bytes in one stream, from a server without ranges."""
        with self.store.connections, network_faults(), self.source.whole as response:
            for segment in count():
                reached = self.receive(response, part, segment)
                if reached < (segment + 1) * SEGMENT:
                    break
        part.size = reached if part.size == math.inf else part.size
        if reached < part.size:
            raise Fault("the server ended the file early")

    def fetch_ranges(self, part: Part) -> None:
        """The missing segments over many connections."""
        running = [in_background(self.fetch_runs, part) for _ in range(min(len(part.todo), MANY))]
        for future in wait(running, return_when=FIRST_EXCEPTION).done:
            future.result()

    def fetch_runs(self, part: Part) -> None:
        """Fetches segments as long as there are any; waits after a fault, and asks for a new link."""
        while not part.given_up and (run := part.take()):
            source = self.source
            with self.store.connections:
                began = time.monotonic()
                try:
                    self.fetch_run(part, run, source, began)
                    continue
                except Fault as error:
                    fault = error
            with part.lock:
                part.todo.extendleft(reversed(run))
            if not part.given_up:
                self.store.connections.reduce(began)
                part.ended.wait(self.patience.bear(self, fault, began))
                self.renew(part, source)

    def fetch_run(self, part: Part, run: deque[int], source: Source, began: float) -> None:
        """One request for a run of segments; those that come leave the run."""
        first, start = run[0], run[0] * SEGMENT
        with network_faults(), self.store.get(source.link, f"{start}-{part.end(run[-1]) - 1}") as response:
            self.check_status(response)
            described = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("content-range", ""))
            if not described or (int(described[1]), int(described[2])) != (start, source.size):
                raise Fault("the server ignored a range")
            if tag_of(response) != source.tag:
                raise Fault("the server sent another file")
            while run:
                if self.receive(response, part, run[0]) < part.end(run[0]):
                    raise Fault("the server ended a range early")
                self.store.connections.count((run.popleft() - first + 1) * SEGMENT, time.monotonic() - began)

    def receive(self, response: Any, part: Part, segment: int) -> int:
        """Takes a segment's bytes from a body, marks it where they are all there, and returns where they end."""
        at, start, end = segment * SEGMENT, segment * SEGMENT, part.end(segment)
        while at < end and (block := response.raw.read(min(BLOCK, end - at), decode_content=False)):
            part.write(at, block)
            at += len(block)
        if at > start and (at == end or part.size == math.inf):
            part.mark(segment, at - start)
            self.patience.progressed()
        return at

    def renew(self, part: Part, source: Source) -> None:
        """Asks for a new link in place of this one, which may have expired, unless another thread has done so. Raises
        WrongFile where it leads to another file."""
        with self.renewing:
            if self.source is not source or part.ended.is_set():
                return
            new = self.patiently(self.ask)
            if new.whole:
                raise Fault("the server has stopped serving ranges")
            if (new.size, new.tag) != (source.size, source.tag):
                raise WrongFile("has changed in mid-download")
            self.source = new


# ---------------------------------------------------------------------------------------------------------------------
# pipeline and LoRAs

# At 1024² an fp16 SDXL with its activations peaks near 11 GiB; "16 GB" cards report between 14.5 and 16 GiB.
RESIDENT_GPU_BYTES = int(14.5 * GIB)
UNTILED_PIXELS = 1_500_000


# the LoRA stack


# A LoRA adds scale * alpha / rank * up @ down to a weight. The stack is merged into the weights: nine PEFT adapters
# turn the 1,870 kernels of a UNet forward into 27,851. Reading the files' many formats stays diffusers' business.

LORA_COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
LORA_KEY = re.compile(r"[._](lora_(down|up)|lora_[AB]|lora\.(down|up)|lora_linear_layer\.(down|up))\.weight$|\.alpha$")
OTHER_KINDS = {  # part of a tensor's name -> what only that kind of file has
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_mid": "Tucker-decomposed LoCon (lora_mid)",
    "oft_": "OFT",
    ".diff": "full-difference",
    "lora_B.bias": "bias",
}
JOB_BYTES = 12 * GIB  # stays free on the GPU for the largest jobs: an estimate, with room to spare


class BadLora(Exception):
    """Why a file cannot go into the stack, in words for a client."""


@dataclass(frozen=True)
class Factors:
    """A LoRA's share in one weight: the job's scale * scaling * up @ down."""

    up: Any  # (rows, rank); of a convolution (rows, rank, 1, 1)
    down: Any  # (rank, columns); of a convolution (rank, channels, kernel, kernel)
    scaling: float  # alpha / rank


@dataclass
class Target:
    """A weight that LoRAs of the stack change."""

    module: Any
    original: Any  # the weight as in the checkpoint; never written to
    factors: dict[str, Factors] = field(default_factory=dict)  # adapter name -> its share


class LoraStack:
    """LoRAs merged into a pipeline's weights, so that a job runs exactly the operations of the bare checkpoint.

    `failed` says which files cannot be used, and why: nothing of them is in any weight. `applied` is what is in the
    weights now, adapter name -> scale.
    """

    def __init__(self, pipe: Any, files: Mapping[str, Path]) -> None:
        """Reads all files, adapter name -> path. Best before the pipeline leaves host memory: see settle()."""
        self.pipe = pipe
        self.failed: dict[str, str] = {}
        self.applied: dict[str, float] = {}
        self.adapters: set[str] = set()  # what can be applied
        self.targets: dict[str, Target] = {}
        self.settled = False
        modules = lora_modules(pipe)
        for adapter, file in files.items():
            try:
                shares = read_lora(pipe, file, modules)
            except BadLora as reason:
                self.failed[adapter] = str(reason)
                log.warning("LoRA %s is left out: %s (%s, %r)", adapter, reason, file, reason.__cause__)
                continue
            self.adapters.add(adapter)
            for name, factors in shares.items():
                target = self.targets.setdefault(name, Target(modules[name], modules[name].weight.detach()))
                target.factors[adapter] = factors

    def apply(self, scales: Mapping[str, float]) -> bool:
        """Puts exactly this combination in force, adapter name -> scale; False where it was in force already.

        Scale 0 means without that LoRA; names in `failed` are left out. Raises KeyError for a name that is not in the
        stack. Every change starts from the originals: nothing adds up from job to job.
        """
        wanted = {name: scale for name, scale in scales.items() if scale and name not in self.failed}
        if wanted == self.applied:
            return False
        if unknown := wanted.keys() - self.adapters:
            raise KeyError(*unknown)
        changed = {name for name in self.adapters if wanted.get(name) != self.applied.get(name)}
        device = self.pipe._execution_device  # the GPU, also where offloading keeps the weights in host memory
        with torch.inference_mode(False), torch.no_grad():
            if not self.settled:
                self.settle()
            # NaN equals no scale: after a change that fails half-way the next one writes every weight anew
            self.applied = dict.fromkeys(self.adapters, math.nan)
            for target in self.targets.values():
                if not changed.isdisjoint(target.factors):
                    merge(target, wanted, device)
        self.applied = wanted
        return True

    def settle(self) -> None:
        """Gives the originals a place of their own before the first change: on the GPU where the largest jobs fit
        beside them, else in host memory, where a float16 pipeline's are pages of the checkpoint file itself."""
        targets = self.targets.values()
        size = sum(t.original.nbytes + sum(f.up.nbytes + f.down.nbytes for f in t.factors.values()) for t in targets)
        on_gpu = self.pipe.device.type == "cuda" and torch.cuda.mem_get_info()[0] - size >= JOB_BYTES
        for target in targets:
            keep_original(target, on_gpu)
        self.settled = True
        where = "on the GPU" if on_gpu else "in host memory"
        log.info("LoRA stack: %d weights; originals and LoRAs, %.1f GB, %s", len(targets), size / 1e9, where)


def keep_original(target: Target, on_gpu: bool) -> None:
    """Parts the original from the weight that is going to be changed."""
    weight = target.module.weight
    if on_gpu:
        target.original = weight.detach().clone()
        for adapter, factors in target.factors.items():
            up, down = factors.up.to(weight.device), factors.down.to(weight.device)
            target.factors[adapter] = Factors(up, down, factors.scaling)
    elif weight.data_ptr() == target.original.data_ptr():
        half = weight.detach().half()
        if weight.dtype == torch.float32 and torch.equal(half.float(), weight):
            target.original = half  # float32 pipelines too come from float16 files: half the memory holds them exactly
        else:
            weight.data = weight.detach().clone()


def merge(target: Target, scales: Mapping[str, float], device: Any) -> None:
    """weight = original + all LoRAs, summed in float32 by one matrix product and rounded once."""
    weight = target.module.weight
    shares = [(factors, scales[name] * factors.scaling) for name, factors in target.factors.items() if name in scales]
    if not shares:
        weight.copy_(target.original)
        return
    # to(device) first: a copy that converts as well would convert on the CPU, and move twice the bytes
    original = target.original.to(device).float().flatten(1)  # (rows, columns)
    up = torch.cat([factors.up.to(device).float().flatten(1) * scale for factors, scale in shares], 1)  # (rows, ranks)
    down = torch.cat([factors.down.to(device).float().flatten(1) for factors, _ in shares])  # (ranks, columns)
    merged = torch.addmm(original, up, down).to(weight.dtype)
    weight.copy_(merged.view_as(weight))  # in place: torch.compile and hooks hold on to it


def lora_modules(pipe: Any) -> dict[str, Any]:
    """The layers that a LoRA can change, "unet.mid_block.attentions.0.proj_in" -> module."""
    return {
        f"{component}.{name}": module
        for component in LORA_COMPONENTS
        for name, module in getattr(pipe, component).named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
    }


def read_lora(pipe: Any, file: Path, modules: Mapping[str, Any]) -> dict[str, Factors]:
    """A file in Kohya's, PEFT's or diffusers' format -> module name -> Factors. Raises BadLora.

    The conversion of names and alphas is diffusers' own. Its load_lora_weights goes on to inject an adapter, where
    PEFT compares every module with every name: 3 s a file, more with each.
    """
    try:
        with safetensors.safe_open(file, "pt") as tensors:
            check_keys(list(tensors.keys()))
        state, alphas, metadata = pipe.lora_state_dict(
            str(file.parent),
            weight_name=file.name,
            use_safetensors=True,
            local_files_only=True,
            unet_config=pipe.unet.config,
            return_lora_metadata=True,
        )
        shares: dict[str, Factors] = {}
        for component in LORA_COMPONENTS:
            shares |= component_factors(component, state, alphas, metadata)
    except (OSError, safetensors.SafetensorError) as error:
        raise BadLora("the file is damaged or not a safetensors file") from error
    except (ValueError, LookupError, ArithmeticError, RuntimeError) as error:
        raise BadLora("made for another base model: its layers are not named like SDXL's") from error
    if unknown := len(state) // 2 - len(shares.keys() & modules.keys()):
        raise BadLora(f"made for another base model: {unknown} of its {len(state) // 2} layers are not in SDXL")
    for name, factors in shares.items():
        check_factors(name, factors, modules[name].weight)
    return shares


def check_keys(keys: list[str]) -> None:
    """Raises BadLora unless the tensors' names are those of a plain LoRA, each with its other half."""
    other = [key for key in keys if not LORA_KEY.search(key)]
    for part, kind in OTHER_KINDS.items():
        if any(part in key for key in other):
            raise BadLora(f"{kind} weights are not supported: without them the LoRA would draw something else")
    halves = Counter(LORA_KEY.sub("", key) for key in keys if LORA_KEY.search(key) and not key.endswith(".alpha"))
    if not halves:
        raise BadLora("the file holds no LoRA weights")
    if other:
        raise BadLora(f"the file holds weights that are not a LoRA's, such as {other[0][:80]!r}")
    if lonely := [layer for layer, count in halves.items() if count != 2]:
        raise BadLora(f"one half of {len(lonely)} of its {len(halves)} layers is missing")


def component_factors(component: str, state: Mapping[str, Any], alphas: Any, metadata: Any) -> dict[str, Factors]:
    """The part of a LoRA that changes one component, as diffusers and PEFT read it: alpha is the layer's own where
    PEFT's rules find one, else the file's commonest, else the rank."""
    tensors = {key: tensor for key, tensor in state.items() if key.startswith(f"{component}.")}
    if not tensors:
        return {}
    if component == "unet":
        tensors = diffusers.utils.convert_unet_state_dict_to_peft(tensors)
    else:
        tensors = diffusers.utils.convert_state_dict_to_diffusers(tensors)
        tensors = diffusers.utils.convert_state_dict_to_peft(tensors)
    downs = {key.removesuffix(".lora_A.weight"): tensor for key, tensor in tensors.items() if ".lora_A." in key}
    ranks = {name: down.shape[0] for name, down in downs.items()}
    if metadata:  # written by diffusers from 0.34 on
        config = {key.removeprefix(f"{component}."): value for key, value in metadata.items()}
    else:
        own = {key: alpha for key, alpha in (alphas or {}).items() if key.startswith(f"{component}.")}
        config = diffusers.utils.get_peft_kwargs(ranks, own, tensors, is_unet=component == "unet")
    scalings = {name: layer_alpha(config, name, bool(metadata)) / rank for name, rank in ranks.items()}
    return {name: Factors(tensors[f"{name}.lora_B.weight"], down, scalings[name]) for name, down in downs.items()}


def layer_alpha(config: Mapping[str, Any], name: str, patterns: bool) -> float:
    """The alpha of a layer; in a configuration of PEFT's own, alpha_pattern is one of regular expressions."""
    key = peft.utils.other.get_pattern_key(config["alpha_pattern"], name.partition(".")[2]) if patterns else name
    return config["alpha_pattern"].get(key, config["lora_alpha"])


def check_factors(name: str, factors: Factors, weight: Any) -> None:
    """Raises BadLora unless up @ down has the weight's shape and only finite numbers."""
    up, down = factors.up, factors.down
    rows, *columns = weight.shape
    rank = down.numel() // math.prod(columns)
    if not rank or up.shape != (rows, rank, *[1] * len(columns[1:])) or down.shape != (rank, *columns):
        found = f"{tuple(up.shape)} x {tuple(down.shape)}"
        raise BadLora(f"made for another base model: {name} is {found} in it, and {tuple(weight.shape)} in SDXL")
    for tensor in (up, down):
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise BadLora(f"weights of type {str(tensor.dtype).removeprefix('torch.')} are not supported")
        if not all(math.isfinite(bound) for bound in tensor.aminmax()):  # 20 times as fast as isfinite, and keeps NaN
            raise BadLora("the file holds NaN or infinite numbers")
    if not math.isfinite(factors.scaling):
        raise BadLora("the file holds an alpha that is no finite number")


COMPILED_BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")  # 70 and 17 of them do nearly all of the UNet's work


def keep_compiled_code(settings: Settings) -> None:
    """Sends what torch.compile makes to the model store, for later workers; torch reads this while it is imported."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(settings.compile_cache_dir))
    os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "1")


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


# loading


def load_pipeline() -> Any:
    """The ready StableDiffusionXLPipeline: float16 on CUDA, float32 on CPU, its LoRA stack merged at the configured
    scales. `pipe.lora_stack` is the stack, `pipe.scheduler_config` what every job's scheduler is built from,
    `pipe.model_files` the files that its images' recipes name.

    Raises SetupFailed (DownloadError where a file could not be had).
    """
    settings = Settings.from_environ()
    files = in_background(fetch_models, settings)  # beside the imports, which take 4-7 s
    if settings.torch_compile:
        keep_compiled_code(settings)
    with phase("imports"), garbage_left():
        device = choose_device(settings)
        import_libraries()
    models = files.result()
    with phase("checkpoint and VAE"):
        pipe = build_pipeline(settings, models.checkpoint, torch.float16 if device == "cuda" else torch.float32)
    with phase("LoRA files"):
        pipe.lora_stack = LoraStack(pipe, models.loras)
        pipe.lora_stack.failed.update(models.failed)
    with phase("move to %s", device):
        place_pipeline(pipe, device)
    with phase("merging the LoRA stack"):
        pipe.lora_stack.apply({name: config["scale"] for name, config in settings.stack.items()})
    pipe.model_files = models
    in_background(hash_models, models)
    if settings.torch_compile:
        compile_unet(pipe)
    return pipe


def choose_device(settings: Settings) -> str:
    """ "cuda", or "cpu" where the settings allow it; raises SetupFailed otherwise."""
    if torch.cuda.is_available():
        check_cuda()
        return "cuda"
    if settings.allow_cpu:
        return "cpu"
    raise SetupFailed(
        "no CUDA device was found: choose a GPU that CUDA 11.8 supports, or set ALLOW_CPU=1 for a slow run without one",
        detail=f"torch {torch.__version__}, CUDA {torch.version.cuda}",
    )


def check_cuda() -> None:
    """Multiplies two small matrices: a GPU without kernels for it (Blackwell), or a broken one, is told before the
    models are there. Raises SetupFailed."""
    try:
        ones = torch.ones(64, 64, dtype=torch.float16, device="cuda")
        works = (ones @ ones).eq(64).all().item()
        cause: object = "wrong result"
    except RuntimeError as error:
        works, cause = False, error
    if not works:
        raise SetupFailed("the GPU does not work: choose one that CUDA 11.8 supports (up to Hopper)", detail=cause)


@contextmanager
def garbage_left() -> Iterator[None]:
    """No garbage collection for a while: what 3,000 modules make while they are imported stays for good, and looking
    through it again and again takes a seventh of their time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def import_libraries() -> None:
    """Imports what a pipeline needs."""
    _ = diffusers.StableDiffusionXLPipeline, diffusers.AutoencoderKL  # diffusers imports a class when it is named
    # progress bars of the libraries' own loading steps would stand between the log's lines
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def build_pipeline(settings: Settings, checkpoint: Path, dtype: Any) -> Any:
    """The bare checkpoint's pipeline, in host memory."""
    try:
        vae = diffusers.AutoencoderKL.from_pretrained(settings.vae_model, torch_dtype=dtype)
    except (OSError, ValueError, RuntimeError) as error:
        raise SetupFailed("the VAE could not be loaded: check VAE_MODEL", detail=error) from error
    if vae.config.force_upcast:  # the original SDXL VAE overflows in float16
        vae.float()
    try:
        pipe = diffusers.StableDiffusionXLPipeline.from_single_file(
            str(checkpoint), config=settings.sdxl_config, vae=vae, torch_dtype=dtype, add_watermarker=False
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise SetupFailed(
            "the checkpoint could not be loaded: check that CHECKPOINT is an SDXL model, and SDXL_CONFIG",
            detail=error,
        ) from error
    pipe.scheduler_config = pipe.scheduler.config
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty(), desc="denoising")
    return pipe


def place_pipeline(pipe: Any, device: str) -> None:
    """Everything on the GPU where it fits, else each model only while it works (model CPU offload)."""
    if device == "cuda" and torch.cuda.get_device_properties(0).total_memory < RESIDENT_GPU_BYTES:
        pipe.enable_model_cpu_offload()
    else:
        pipe.to(device)


# decoding


def decode(pipe: Any, latents: Any) -> list[Any]:
    """Latents (n, 4, h/8, w/8) -> n PIL images.

    An image with NaN or nothing but black is decoded again in float32: fp16 VAEs overflow on some latents, and
    diffusers would return the black image with a RuntimeWarning only. Raises GenerationFailed where it stays so.
    """
    pipe.vae.use_slicing = len(latents) > 1
    pipe.vae.enable_tiling(latents[0, 0].numel() * pipe.vae_scale_factor**2 > UNTILED_PIXELS)
    pixels = decode_pixels(pipe, latents)
    bad = is_black(pixels)
    if bad.any():
        log.warning("%d of %d images came out black: decoding again in float32", bad.sum(), len(bad))
        pixels[bad] = decode_in_float32(pipe, latents[bad])
        if is_black(pixels).any():
            raise GenerationFailed("the image came out black or with NaN, in float32 too: try another seed or prompt")
    pixels = pixels.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()  # (n, height, width, 3)
    return [Image.fromarray(image) for image in pixels]


def decode_pixels(pipe: Any, latents: Any) -> Any:
    """Latents (n, 4, h/8, w/8) -> float32 pixels (n, 3, h, w) in 0..1, NaN kept."""
    config = pipe.vae.config
    latents = latents.to(pipe.vae.dtype) / config.scaling_factor
    if config.get("latents_mean") and config.get("latents_std"):
        mean, std = (torch.tensor(config[key]).view(1, -1, 1, 1).to(latents) for key in ("latents_mean", "latents_std"))
        latents = latents * std + mean
    pixels = pipe.vae.decode(latents, return_dict=False)[0]
    pixels = pixels.nan_to_num(nan=math.nan, posinf=math.nan, neginf=math.nan)  # the clamp to 0..1 would hide overflow
    return pipe.image_processor.denormalize(pixels).float()


def decode_in_float32(pipe: Any, latents: Any) -> Any:
    """decode_pixels with the VAE in float32 for this once; float16 -> float32 -> float16 loses nothing."""
    dtype = pipe.vae.dtype
    pipe.vae.to(torch.float32)
    try:
        return decode_pixels(pipe, latents)
    finally:
        pipe.vae.to(dtype)


def is_black(pixels: Any) -> Any:
    """Per image of (n, 3, h, w): whether it holds NaN, or nothing that would show."""
    return ~(pixels.flatten(1).amax(1) >= 0.5 / 255)  # NaN compares false, and amax hands it on


# ---------------------------------------------------------------------------------------------------------------------
# prompts

LONG_PROMPT_MODES = ("blend", "concat", "truncate")
WINDOW = 77  # positions of CLIP's text encoders: BOS, tokens, EOS, padding
CHUNK_TOKENS = WINDOW - 2
CLAUSE_TOKENS = 20  # how far back a cut looks for a comma, as in A1111
SEEN_PROMPTS = 2 * 32  # prompts and negative prompts of the last 32 jobs

# What CLIPTokenizer takes for white space. Other control characters it drops, and joins what they stood between.
SPACE = " \t\n\r\u00a0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
BORDER = re.compile(rf"(?<=[{SPACE}])(?=[^{SPACE}])|(?<=,)(?=[^\W\d_])")
CLAUSE_END = re.compile(rf"[,.!?…，。！？、][\"')\]”’»」』]*[{SPACE}]*$")

LORA_TAG = re.compile(r"<(?:lora|lyco):([^:>]*)(?::([^:>]*)[^>]*)?>", re.IGNORECASE)
SYNTAX = re.compile(
    r"\\(?P<escaped>[()\[\]\\]?)"  # a backslash before anything else vanishes, as in A1111
    r"|(?P<open>[(\[])"
    r"|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)"
    r"|(?P<close>[)\]])"
    r"|(?P<BREAK>\bBREAK\b)"
    r"|[^\\()\[\]:B]+|.",
    re.DOTALL,
)
CLOSING = {"(": ")", "[": "]"}
FACTORS = {")": 1.1, "]": 1 / 1.1}


def split_lora_tags(prompt: str) -> tuple[str, list[tuple[str, float]]]:
    """The prompt without its LoRA tags, and the tags: "a cat <lora:film:0.8>" -> ("a cat ", [("film", 0.8)]).

    Without a scale it is 1.0; a scale that is no number is NaN, which no range lets pass. Where a tag has several (for
    the text encoders, for the UNet, for blocks), the first counts.
    """
    tags = [(name.strip(), lora_scale(scale)) for name, scale in LORA_TAG.findall(prompt)]
    return LORA_TAG.sub("", prompt), tags


def lora_scale(text: str) -> float:
    """The number in a LoRA tag: "0.8" -> 0.8, "" -> 1.0, "strong" -> NaN."""
    try:
        return float(text or 1.0)
    except ValueError:
        return math.nan


def parse_prompt(prompt: str) -> list[list[tuple[str, float]]]:
    """A1111's prompt language: the stretches between BREAKs, each a list of texts with their weights.

    "a (cat:1.3), [fog] BREAK b" -> [[("a ", 1.0), ("cat", 1.3), (", ", 1.0), ("fog", 0.91), (" ", 1.0)], [(" b", 1.0)]]
    A bracket that is never closed acts on all that follows, one never opened is text. A BREAK between brackets is a
    BREAK as well (A1111 would weigh it, and read it as a word). Its prompt editing ([a:b:0.5]) and AND are text here.
    """
    texts: list[str | None] = []  # None is a BREAK
    weights = torch.ones(len(prompt), dtype=torch.float64)
    opened: dict[str, list[int]] = {")": [], "]": []}
    for match in SYNTAX.finditer(prompt):
        found, kind = match[0], match.lastgroup
        if kind == "open":
            opened[CLOSING[found]].append(len(texts))
        elif kind in ("weight", "close") and opened[found[-1]]:
            factor = float(match["weight"] or FACTORS[found[-1]])
            weights[opened[found[-1]].pop() : len(texts)] *= factor  # innermost first: rounded as A1111 rounds
        else:
            texts.append(None if kind == "BREAK" else match["escaped"] if kind == "escaped" else found)
    for closing, starts in opened.items():
        for start in starts:
            weights[start : len(texts)] *= FACTORS[closing]
    return join_texts(texts, weights.tolist())


def join_texts(texts: list[str | None], weights: list[float]) -> list[list[tuple[str, float]]]:
    """Stretches between BREAKs (None), in which neighbours of equal weight are joined."""
    stretches: list[list[tuple[str, float]]] = [[]]
    for text, weight in zip(texts, weights, strict=False):
        if text is None:
            stretches.append([])
        elif stretches[-1] and stretches[-1][-1][1] == weight:
            stretches[-1][-1] = stretches[-1][-1][0] + text, weight
        else:
            stretches[-1].append((text, weight))
    return stretches


def well_formed(text: str) -> str:
    """The text with U+FFFD for each lone surrogate, which UTF-8 cannot carry."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def merge_symbols(ranks: Mapping[tuple[str, str], int], symbols: list[str]) -> list[str]:
    """Byte-pair encoding of one word in n log n: its symbols -> its tokens. CLIPTokenizer's own loop is quadratic.

    As in that loop, every occurrence of the best pair is merged, from left to right, before a new pair counts.
    """
    symbols = [*symbols, ""]  # the end, in no pair; [-1] is before the start too
    after, before = list(range(1, len(symbols) + 1)), list(range(-1, len(symbols) - 1))
    heap: list[tuple[int, int]] = []
    changed: Iterable[int] = range(len(symbols) - 1)
    while True:
        for left in changed:
            rank = ranks.get((symbols[left], symbols[after[left]])) if symbols[left] else None
            if rank is not None:
                heapq.heappush(heap, (rank, left))
        if not heap:
            return [symbol for symbol in symbols if symbol]
        best, changed = heap[0][0], []
        while heap and heap[0][0] == best:
            left = heapq.heappop(heap)[1]
            right = after[left]
            if symbols[left] and ranks.get((symbols[left], symbols[right])) == best:  # else merged since it was pushed
                symbols[left], symbols[right] = symbols[left] + symbols[right], ""
                after[left], before[after[right]] = after[right], left
                changed += [before[left], left]


def linear_tokenizer(tokenizer: Any) -> Any:
    """A tokenizer with the same ids and no quadratic loop: for the slow one a copy that merges with merge_symbols."""
    if not hasattr(tokenizer, "bpe_ranks"):
        return tokenizer

    @functools.cache
    def bpe(word: str) -> str:
        if word in tokenizer.cache:  # special tokens are there from the start
            return tokenizer.cache[word]
        return " ".join(merge_symbols(tokenizer.bpe_ranks, [*word[:-1], word[-1] + "</w>"]))

    twin = copy.copy(tokenizer)
    twin.bpe = bpe
    return twin


Tokens = tuple[list[str], ...]  # of one text, one list for each tokenizer


class Reader:
    """Texts to CLIP's tokens, each read once.

    SDXL's tokenizers differ: the second reads each "!" as its padding token, so "wow!!!" is two tokens for the first
    and four for the second. special_as_text reads a written "<|endoftext|>" as the words that it is made of; as a
    token it would end the prompt for the pooled embedding.
    """

    def __init__(self, *tokenizers: Any, special_as_text: bool = False) -> None:
        self.tokenizers = [linear_tokenizer(tokenizer) for tokenizer in tokenizers]
        special = ("<|startoftext|>", "<|endoftext|>") if special_as_text else ()
        self.words = {token: self.tokenizers[0].tokenize(f"<| {token[2:-2]} |>") for token in special}
        self.special = set(tokenizers[0].all_special_tokens)
        self.known: dict[str, Tokens] = {}

    def __call__(self, text: str) -> Tokens:
        """ "a <|endoftext|>" -> (["a</w>", "<|endoftext|>"], ["a</w>", "<|endoftext|>"])."""
        if text not in self.known:
            found = [tokenizer.tokenize(text) for tokenizer in self.tokenizers]
            self.known[text] = tuple([t for token in row for t in self.words.get(token, [token])] for row in found)
        return self.known[text]

    def size(self, text: str) -> int:
        """How many of a chunk's tokens a text takes up."""
        return max(map(len, self(text)))

    def ends_word(self, token: str) -> bool:
        """Whether a word ends with a token of the first tokenizer."""
        return token.endswith("</w>") or token in self.special


@dataclass(frozen=True)
class Piece:
    """A part of a prompt that no cut goes through: "cat, " -> tokens ["cat</w>", ",</w>"]."""

    text: str
    tokens: Tokens
    weight: float = 1.0
    continues: bool = False  # goes on with the word of the piece before

    @property
    def size(self) -> int:
        """Tokens that it takes up in a chunk."""
        return max(map(len, self.tokens))


def cut_pieces(read: Reader, text: str, max_tokens: int, weight: float = 1.0) -> Iterator[Piece]:
    """Pieces of at most max_tokens, whose texts, joined, are the text, and whose tokens, joined, are its tokens.

    Pieces end at white space and at commas before a letter. What is longer than max_tokens is cut between its words
    (Chinese and tag lists have no spaces), a longer word between its characters.
    """
    for part in BORDER.split(text):
        for word in [part] if read.size(part) <= max_tokens else cut_words(read, part):
            for i, piece in enumerate(cut_characters(read, word, max_tokens)):
                yield Piece(piece, read(piece), weight, continues=i > 0)


def cut_words(read: Reader, text: str) -> list[str]:
    """An unspaced text cut where a token ends a word: "cat,dog" -> ["cat", ",", "dog"].

    Tokens spell the bytes of the cleaned text; how many of them a character makes up shows when it is read alone, or
    together with the accents that the tokenizer composes it with.
    """

    @functools.cache
    def lengths(part: str) -> list[int]:
        return [len(token.removesuffix("</w>")) for token in read(part)[0]]

    places = accumulate(lengths(text))
    ends = {place for place, token in zip(places, read(text)[0], strict=True) if read.ends_word(token)}
    for characters in (list(text), regex.findall(r"\X", text)):
        reached = list(accumulate(sum(lengths(character)) for character in characters))
        if reached[-1] == sum(lengths(text)):
            cuts = [i + 1 for i, place in enumerate(reached) if place in ends]
            return ["".join(characters[start:end]) for start, end in pairwise([0, *cuts])]
    return [text]


def cut_characters(read: Reader, word: str, max_tokens: int) -> list[str]:
    """[word], or where that is longer than max_tokens about equal parts that are not: only ids at the cuts change."""
    if read.size(word) <= max_tokens or len(word) == 1:
        return [word]
    length = math.ceil(len(word) / math.ceil(1.1 * read.size(word) / max_tokens))  # a tenth to spare: cuts cost tokens
    parts = (word[i : i + length] for i in range(0, len(word), length))
    return [piece for part in parts for piece in cut_characters(read, part, max_tokens)]


def pack_chunks(pieces: Iterable[Piece], max_tokens: int) -> list[list[Piece]]:
    """Fills chunks of at most max_tokens, one after the other: 160 one-token words -> chunks of 75, 75, 10.

    No tokens, no chunks. A piece that continues a word starts a chunk: glued to the piece before it would read as
    other tokens.
    """
    chunks: list[list[Piece]] = []
    chunk: list[Piece] = []
    size = 0
    for piece in pieces:
        if size and (piece.continues or size + piece.size > max_tokens):
            kept = len(chunk) if piece.continues else clause_end(chunk, max_tokens - piece.size)
            chunks.append(chunk[:kept])
            chunk = chunk[kept:]
            size = sum(moved.size for moved in chunk)
        chunk.append(piece)
        size += piece.size
    if chunks and not size:  # characters that CLIP ignores
        return [*chunks[:-1], chunks[-1] + chunk]
    return [*chunks, chunk] if size else []


def clause_end(chunk: list[Piece], room: int) -> int:
    """How many pieces of a full chunk stay in it: up to the last comma or sentence end in its last 20 tokens, where
    the next chunk has room for what follows; else all."""
    moved = 0
    for kept in range(len(chunk), 0, -1):
        if CLAUSE_END.search(chunk[kept - 1].text):
            return kept
        moved += chunk[kept - 1].size
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
    pieces = cut_pieces(Reader(tokenizer), well_formed(prompt), max_tokens)
    return ["".join(piece.text for piece in chunk).strip(SPACE) for chunk in pack_chunks(pieces, max_tokens)]


def chunk_prompt(read: Reader, prompt: str, long_prompt: str) -> list[list[Piece]]:
    """A job's prompt, its syntax read, in chunks; at least one. "truncate" leaves all in one, which the window cuts.

    BREAK fills a chunk, be it empty: "a BREAK b" -> 2 chunks, "BREAK a" -> 2, "a BREAK" -> 1, as in A1111.
    """
    stretches = parse_prompt(split_lora_tags(prompt)[0])
    if long_prompt == "truncate":
        return [[Piece(text, read(text), weight) for text, weight in chain(*stretches)]]
    chunks: list[list[Piece]] = []
    for stretch in stretches:
        pieces = (piece for text, weight in stretch for piece in cut_pieces(read, text, CHUNK_TOKENS, weight))
        chunks += pack_chunks(pieces, CHUNK_TOKENS) or [[]]
    return chunks if chunks[-1] or len(chunks) == 1 else chunks[:-1]


@dataclass(frozen=True)
class ChunkState:
    """What the text encoders make of one chunk."""

    hidden: tuple[Any, ...]  # weighted, one an encoder: (1, 77, 768), (1, 77, 1280)
    counts: tuple[int, ...]  # real tokens, one an encoder
    pooled: Any  # (1, 1280), not weighted


def encode_chunks(pipe: Any, chunks: list[list[Piece]], clip_skip: int) -> list[ChunkState]:
    """All chunks in one batch through each text encoder, equal ones once."""
    hidden, counts = [], []
    device, dtype = pipe._execution_device, pipe.text_encoder_2.dtype
    encoders = ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2))
    for k, (tokenizer, encoder) in enumerate(encoders):
        tokens = [[token for piece in chunk for token in piece.tokens[k]][:CHUNK_TOKENS] for chunk in chunks]
        counts.append([len(row) for row in tokens])
        windows = [window_ids(tokenizer, row) for row in tokens]
        place = {window: i for i, window in enumerate(dict.fromkeys(windows))}
        output = encoder(torch.tensor(list(place), device=device), output_hidden_states=True)
        order = [place[window] for window in windows]
        weights = torch.tensor([window_weights(chunk, k) for chunk in chunks], device=device).unsqueeze(-1)
        hidden.append((output.hidden_states[-clip_skip][order] * weights).to(dtype))  # (n, 77, D)
    pooled = output.text_embeds[order]  # (n, 1280), the second encoder's alone
    return [
        ChunkState(tuple(h[i : i + 1] for h in hidden), tuple(c[i] for c in counts), pooled[i : i + 1])
        for i in range(len(chunks))
    ]


def window_ids(tokenizer: Any, tokens: list[str]) -> tuple[int, ...]:
    """BOS, the tokens' ids, EOS, and the tokenizer's own padding: 77 ids."""
    ids = (tokenizer.bos_token_id, *tokenizer.convert_tokens_to_ids(tokens), tokenizer.eos_token_id)
    return ids + (tokenizer.pad_token_id,) * (WINDOW - len(ids))


def window_weights(chunk: list[Piece], k: int) -> list[float]:
    """The weight of each of the 77 positions: 1.0 for BOS, EOS and padding."""
    weights = [1.0, *(piece.weight for piece in chunk for _ in piece.tokens[k])][: CHUNK_TOKENS + 1]
    return weights + [1.0] * (WINDOW - len(weights))


def build_77_token_tensor(text_chunks: list[Any], token_counts: list[int] | None = None) -> Any:
    """Blends n tensors (1, 77, D) into one (1, 77, D), in float32 at least; one comes back unchanged.

    Position 0 is the first chunk's BOS. Every later position is the mean over the chunks that hold a real token there
    (token_counts[i] of them in chunk i, at 1 to token_counts[i]), where none does over all: of chunks with 2 and 1
    tokens position 1 is the mean of both, 2 is the first's, 3 and on are means of both. Without counts all are means.
    """
    if not text_chunks or any(chunk.shape != text_chunks[0].shape or len(chunk) != 1 for chunk in text_chunks):
        raise ValueError(f"chunks must be tensors of one shape (1, 77, D), got {[tuple(c.shape) for c in text_chunks]}")
    if token_counts is not None and len(token_counts) != len(text_chunks):
        raise ValueError(f"{len(text_chunks)} chunks need as many token counts, got {len(token_counts)}")
    if len(text_chunks) == 1:
        return text_chunks[0]
    dtype = text_chunks[0].dtype
    chunks = torch.cat(list(text_chunks)).to(torch.promote_types(dtype, torch.float32))  # (n, 77, D)
    counts = torch.tensor([0] * len(chunks) if token_counts is None else token_counts, device=chunks.device)
    real = torch.arange(chunks.shape[1], device=chunks.device) <= counts.unsqueeze(1)  # (n, 77)
    real = (real | ~real.any(dim=0)).unsqueeze(-1)
    blended = torch.where(real, chunks, 0).sum(dim=0) / real.sum(dim=0)  # (77, D)
    blended[0] = chunks[0, 0]
    return blended.unsqueeze(0).to(dtype)


@dataclass(frozen=True)
class Encoded:
    """One prompt as the UNet takes it."""

    embeds: Any  # (1, 77, 2048); (1, 77·n, 2048) where n chunks were concatenated
    pooled: Any  # (1, 1280)
    chunks: int

    def to(self, device: Any) -> Encoded:
        """The same on another device."""
        return replace(self, embeds=self.embeds.to(device), pooled=self.pooled.to(device))


def join_states(states: list[ChunkState], long_prompt: str) -> Encoded:
    """Concatenated to (1, 77·n, 2048) with the first chunk's pooled embedding, or blended to (1, 77, 2048)."""
    if long_prompt == "concat" or len(states) == 1:
        embeds = torch.cat([torch.cat(state.hidden, dim=-1) for state in states], dim=1)
        return Encoded(embeds, states[0].pooled, len(states))
    halves = [
        build_77_token_tensor([state.hidden[k] for state in states], [state.counts[k] for state in states])
        for k in range(len(states[0].hidden))
    ]
    pooled = torch.cat([state.pooled for state in states])
    pooled = pooled.float().mean(dim=0, keepdim=True).to(pooled.dtype)
    return Encoded(torch.cat(halves, dim=-1), pooled, len(states))


def long_prompt_to_embedding(pipe: Any, prompt: str, max_tokens: int = CHUNK_TOKENS) -> tuple[Any, Any]:
    """The blended ((1, 77, 2048), (1, 1280)) of a prompt that is longer than CLIP's window, without reading any syntax
    in it; (None, None) where it fits into the 77 tokens."""
    if not 1 <= max_tokens <= CHUNK_TOKENS:
        raise ValueError(f"max_tokens must be from 1 to {CHUNK_TOKENS}, got {max_tokens}")
    read, prompt = Reader(pipe.tokenizer, pipe.tokenizer_2, special_as_text=True), well_formed(prompt)
    if read.size(prompt) <= CHUNK_TOKENS:
        return None, None
    with torch.no_grad():
        states = encode_chunks(pipe, pack_chunks(cut_pieces(read, prompt, max_tokens), max_tokens), clip_skip=2)
        encoded = join_states(states, "blend")
    return encoded.embeds, encoded.pooled


@dataclass(frozen=True)
class Conditioning:
    """Both prompts of a job, as the pipeline takes them."""

    prompt_embeds: Any  # (1, 77·n, 2048)
    negative_prompt_embeds: Any  # the same shape; None without guidance
    pooled_prompt_embeds: Any  # (1, 1280)
    negative_pooled_prompt_embeds: Any
    prompt_chunks: int
    negative_prompt_chunks: int  # 0 where the negative prompt is empty or has no effect
    warnings: tuple[str, ...] = ()


class PromptEncoder:
    """Encodes the prompts of jobs, and remembers the last ones."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.seen: dict[Hashable, Encoded] = {}  # in host memory, the last used at the end

    def encode(
        self, prompt: str, negative_prompt: str, *, long_prompt: str, clip_skip: int, stack: Hashable, guidance: bool
    ) -> Conditioning:
        """Both prompts, in one batch for each text encoder; stack is what the encoders' weights depend on.

        An empty negative prompt (nothing but white space and LoRA tags) is zeros, as SDXL was trained. Where the
        batch fails each prompt is tried alone, and where that fails cut to its first 75 tokens, with a warning.
        """
        prompts = {"prompt": prompt}
        if guidance and split_lora_tags(negative_prompt)[0].strip():
            prompts["negative prompt"] = negative_prompt
            if long_prompt == "concat":
                prompts["filling"] = ""
        options = long_prompt, clip_skip, stack
        warnings: list[str] = []
        try:
            encoded = self.encode_prompts(list(prompts.values()), *options)
        except Exception as error:  # noqa: BLE001 - the contract's fallback: all but the GPU's failures
            raise_gpu_failure(error)
            encoded = [self.encode_alone(name, prompt, warnings, *options) for name, prompt in prompts.items()]
        return condition([side.to(self.pipe._execution_device) for side in encoded], guidance, tuple(warnings))

    def encode_prompts(self, prompts: list[str], long_prompt: str, clip_skip: int, stack: Hashable) -> list[Encoded]:
        """The prompts, those not seen before in one batch."""
        keys = {prompt: (prompt, long_prompt, clip_skip, stack) for prompt in prompts}
        new = [prompt for prompt, key in keys.items() if key not in self.seen]
        if new:
            read = Reader(self.pipe.tokenizer, self.pipe.tokenizer_2, special_as_text=True)
            chunks = {prompt: chunk_prompt(read, prompt, long_prompt) for prompt in new}
            states = iter(encode_chunks(self.pipe, list(chain(*chunks.values())), clip_skip))
            for prompt in new:
                own = list(islice(states, len(chunks[prompt])))
                self.seen[keys[prompt]] = join_states(own, long_prompt).to("cpu")
        for key in keys.values():
            self.seen[key] = self.seen.pop(key)
        while len(self.seen) > SEEN_PROMPTS:
            del self.seen[next(iter(self.seen))]
        return [self.seen[keys[prompt]] for prompt in prompts]

    def encode_alone(self, name: str, prompt: str, warnings: list[str], long_prompt: str, *options: Any) -> Encoded:
        """One prompt; where its chunks cannot be encoded, its first 75 tokens and a warning."""
        try:
            return self.encode_prompts([prompt], long_prompt, *options)[0]
        except Exception as error:  # noqa: BLE001 - as in encode
            raise_gpu_failure(error)
            log.warning("the chunks of the %s could not be encoded: %r", name, error)
            warnings.append(f"the chunks of the {name} could not be encoded: it was cut to its first 75 tokens")
            return self.encode_prompts([prompt], "truncate", *options)[0]


def raise_gpu_failure(error: Exception) -> None:
    """Raises what no other way of encoding would cure: out of memory, and CUDA errors."""
    failure = explain(error)
    if isinstance(failure, OutOfMemory | GpuLost):
        raise failure from error


def condition(sides: list[Encoded], guidance: bool, warnings: tuple[str, ...]) -> Conditioning:
    """Prompt, negative prompt where it has an effect, and the empty chunk that fills up the shorter of the two."""
    positive, *rest = sides
    embeds, pooled = positive.embeds, positive.pooled
    if not rest:
        zeros = (torch.zeros_like(embeds), torch.zeros_like(pooled)) if guidance else (None, None)
        return Conditioning(embeds, zeros[0], pooled, zeros[1], positive.chunks, 0, warnings)
    negative = rest[0]
    filling = rest[1].embeds if len(rest) > 1 else None  # "concat" alone has chunks to fill up
    length = max(embeds.shape[1], negative.embeds.shape[1])
    embeds, negative_embeds = (fill_up(side, filling, length) for side in (embeds, negative.embeds))
    return Conditioning(embeds, negative_embeds, pooled, negative.pooled, positive.chunks, negative.chunks, warnings)


def fill_up(embeds: Any, filling: Any, length: int) -> Any:
    """(1, 77·n, 2048) -> (1, length, 2048), with the encoded empty chunk as often as it takes."""
    return torch.cat([embeds, *[filling] * ((length - embeds.shape[1]) // WINDOW)], dim=1)


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


@dataclass(frozen=True)
class NamedModel:
    """A checkpoint or LoRA as a recipe names it; short_hash is "" where unknown, scale a LoRA's."""

    name: str
    filename: str
    version: str
    short_hash: str
    scale: float | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any], short_hash: str, scale: float | None = None) -> NamedModel:
        """A config's model."""
        return cls(config["name"], config["filename"], version_id(config), short_hash, scale)


def image_recipes(request: JobRequest, settings: Settings, files: ModelFiles, loras: list[dict[str, Any]]) -> list[str]:
    """One recipe an image, each with its own seed; "" where the job wants none. loras: the metadata's."""
    if not request.embed_metadata:
        return [""] * request.num_images
    checkpoint = NamedModel.of(settings.checkpoint, checkpoint_hash(files.checkpoint))
    configs = settings.stack
    scales = {lora["name"]: lora["scale"] for lora in loras}
    stack = [NamedModel.of(configs[name], addnet_hash(files.loras[name]), scale) for name, scale in scales.items()]
    vae = Path(settings.vae_model).name
    return [a1111_parameters(request, seed, vae, checkpoint, stack) for seed in request.seeds]


def a1111_parameters(request: JobRequest, seed: int, vae: str, checkpoint: NamedModel, loras: list[NamedModel]) -> str:
    """What A1111 and Civitai read back from an image, unknown parts left out:

        a cat
        Negative prompt: blurry
        Steps: 24, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 4.5, Seed: 1, Size: 1024x1024, ...

    Fields in A1111's order, values quoted by its rule, Civitai's own list last.
    """
    sampler, schedule = split_schedule(request.scheduler)
    hashes = ", ".join(f"{plain_stem(lora)}: {lora.short_hash}" for lora in loras if lora.short_hash)
    fields = {
        "Steps": request.steps,
        "Sampler": sampler,
        "Schedule type": schedule,
        "CFG scale": f"{request.guidance_scale:.10g}",
        "Seed": seed,
        "Size": f"{request.width}x{request.height}",
        "Model hash": checkpoint.short_hash,
        "Model": plain_stem(checkpoint),
        "VAE": vae,
        "Clip skip": request.clip_skip if request.clip_skip > 1 else "",  # A1111 leaves its default, 1, out
        "Lora hashes": hashes,
    }
    details = ", ".join(f"{name}: {quote(str(value))}" for name, value in fields.items() if value != "")
    negative = f"\nNegative prompt: {request.negative_prompt}" if request.negative_prompt else ""
    resources = civitai_resources([checkpoint, *loras])
    text = f"{request.prompt}{negative}\n{details}{resources}".strip()
    return text.replace("\0", "")  # which would end a PNG's text


def split_schedule(scheduler: str) -> tuple[str, str]:
    """A1111's sampler and schedule type: "DPM++ 2M Karras" -> ("DPM++ 2M", "Karras"), "Euler" -> ("Euler", "")."""
    for schedule in filter(None, SCHEDULE_TYPES):
        if scheduler.endswith(f" {schedule}"):
            return scheduler.removesuffix(f" {schedule}"), schedule
    return scheduler, ""


def plain_stem(model: NamedModel) -> str:
    """The file's name as A1111 writes it, without suffix, commas and colons."""
    return re.sub("[,:]", "", Path(model.filename).stem)


def quote(value: str) -> str:
    """A1111's rule for values: 'a' -> 'a', 'a: 1, b: 2' -> '"a: 1, b: 2"'."""
    return json.dumps(value, ensure_ascii=False) if re.search(r"[,:\n]", value) else value


def civitai_resources(models: Iterable[NamedModel]) -> str:
    """By which Civitai links an image to its models; its parser takes the JSON up to the first "}]"."""
    resources = [
        {"type": "checkpoint" if model.scale is None else "lora"}
        | ({} if model.scale is None else {"weight": model.scale})
        | {"modelVersionId": int(model.version), "modelName": model.name}
        for model in models
        if model.version
    ]
    listed = json.dumps(resources, separators=(",", ":"), ensure_ascii=False)
    return f", Civitai resources: {listed}" if resources else ""


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


@functools.cache
def checkpoint_hash(file: Path) -> str:
    """A1111's hash of a checkpoint: 10 digits of its SHA256, "" where the store has none on record."""
    try:
        return (recorded_sha256(file) or "")[:10]
    except OSError as error:
        log.warning("no hash of %s: %s", file.name, error)
        return ""


def hash_models(files: ModelFiles) -> None:
    """Computes the hashes ahead of the first job that writes them; to be run in the background."""
    checkpoint_hash(files.checkpoint)
    for file in files.loras.values():
        addnet_hash(file)


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
    """The answer with its images: links where there is a bucket, else base64."""
    if bucket is None:
        return fit_answer(answer, images, recipes, max_bytes)
    image_format = answer["metadata"]["image_format"]
    files = encode_images(images, recipes, image_format)
    return answer | {"images": upload_images(files, image_format, bucket, job_id)}


def fit_answer(answer: dict[str, Any], images: list[Any], recipes: list[str], max_bytes: int) -> dict[str, Any]:
    """The answer with its images in base64, at most max_bytes of JSON: RunPod drops a larger one after the GPU time is
    spent. What would be larger goes as lossless WebP, then as JPEG of falling quality, and metadata says so.

    answer: all but the images and the times. Raises GenerationFailed where nothing fits.
    """
    wanted = answer["metadata"]["image_format"]
    for image_format, options, what in attempts(wanted):
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


def attempts(wanted: str) -> Iterator[tuple[str, dict[str, Any], str]]:
    """The formats to try, largest first: name, Pillow's options, words for a warning."""
    yield wanted, {}, wanted
    if wanted == "png":
        yield "webp", LOSSLESS_WEBP, "lossless WebP"
    for quality in FALLING_QUALITIES:
        yield "jpeg", {"quality": quality}, f"JPEG of quality {quality}"


S3_CONFIG = {
    "endpointUrl": "endpoint_url",
    "accessId": "access_key_id",
    "accessSecret": "secret_access_key",
    "bucketName": "name",
}
LINK_SECONDS = 7 * 24 * 3600  # the longest that S3 signs, and the SDK's choice


def parse_s3_config(job: Mapping[str, Any]) -> Bucket | None:
    """The bucket that a job brings along in its envelope. Raises UploadFailed for one with pieces missing."""
    config = job.get("s3Config")
    if config is None:
        return None
    given = config if isinstance(config, dict) else {}
    missing = [key for key in S3_CONFIG if not (isinstance(given.get(key), str) and given[key].strip())]
    if missing:
        raise UploadFailed(f"s3Config needs {', '.join(S3_CONFIG)} as text; missing: {', '.join(missing)}")
    return Bucket(**{attribute: given[key].strip() for key, attribute in S3_CONFIG.items()})


def upload_images(files: list[bytes], image_format: str, bucket: Bucket, job_id: str) -> list[str]:
    """Puts the files to <bucket>/<job id>/ and returns links that are good for seven days, as the SDK's rp_upload does;
    that would go on without a bucket when it is refused, and wait for minutes. Raises UploadFailed."""
    name = bucket.name or time.strftime("%m-%y")

    def upload(file: bytes) -> str:
        place = {"Bucket": name, "Key": f"{job_id}/{secrets.token_hex(4)}.{image_format}"}
        client.put_object(**place, Body=file, ContentType=f"image/{image_format}")
        return client.generate_presigned_url("get_object", Params=place, ExpiresIn=LINK_SECONDS)

    try:
        client = s3_client(bucket)
        with ThreadPoolExecutor(len(files)) as pool:
            return list(pool.map(upload, files))
    except botocore.exceptions.ClientError as error:
        code = re.sub("[^A-Za-z0-9]", "", str(error.response["Error"].get("Code")))
        raise UploadFailed(f"the bucket refused the image: {code}") from None
    except (botocore.exceptions.BotoCoreError, ValueError) as error:
        reason = type(error).__name__
        raise UploadFailed(f"the upload failed with {reason}: check the bucket's endpoint and name") from None


def s3_client(bucket: Bucket) -> Any:
    """A boto3 client that gives up after about a minute, not boto3's three."""
    return boto3.Session().client(
        "s3",
        endpoint_url=bucket.endpoint_url,
        aws_access_key_id=bucket.access_key_id,
        aws_secret_access_key=bucket.secret_access_key,
        region_name=rp_upload.extract_region_from_url(bucket.endpoint_url),
        config=botocore.config.Config(
            signature_version="s3v4",
            connect_timeout=5,
            read_timeout=20,
            retries={"max_attempts": 3, "mode": "standard"},
            request_checksum_calculation="when_required",  # the default's trailers are unknown to older S3 servers
            response_checksum_validation="when_required",
        ),
    )


# ---------------------------------------------------------------------------------------------------------------------
# jobs

# schedulers
# A1111's samplers in diffusers' classes, after the table in diffusers' "Schedulers" overview. Left out: DPM++ 2S a, DPM
# fast, DPM adaptive and Restart, which diffusers has not; LMS, which needs SciPy; DPM++ 3M SDE, where diffusers 0.34
# differs from k-diffusion by the sign of a term.
SDE = {"algorithm_type": "sde-dpmsolver++"}
SCHEDULED_SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", SDE),
    "DPM++ 2M SDE Heun": ("DPMSolverMultistepScheduler", SDE | {"solver_type": "heun"}),
    # A1111 calls the network twice a step here, diffusers once; lower_order_final spares a warning
    "DPM++ SDE": ("DPMSolverSinglestepScheduler", SDE | {"lower_order_final": True}),
    "DPM2": ("KDPM2DiscreteScheduler", {}),
    "DPM2 a": ("KDPM2AncestralDiscreteScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
}
# SDXL's own configuration spaces the timesteps as "leading", which never reaches the last one. A1111 starts there, and
# its Karras and exponential sigmas run from the highest to the lowest: both are "linspace" here.
LINSPACE, TRAILING = {"timestep_spacing": "linspace"}, {"timestep_spacing": "trailing"}
SCHEDULE_TYPES: dict[str, dict[str, Any]] = {
    "": LINSPACE,
    "Karras": LINSPACE | {"use_karras_sigmas": True},
    "Exponential": LINSPACE | {"use_exponential_sigmas": True},
    "SGM Uniform": TRAILING,
}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}
PLMS = ("PNDMScheduler", LEADING | {"skip_prk_steps": True})
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"{sampler} {schedule}".strip(): (kind, extra | spacing)
        for sampler, (kind, extra) in SCHEDULED_SAMPLERS.items()
        for schedule, spacing in SCHEDULE_TYPES.items()
    },
    "Euler a": ("EulerAncestralDiscreteScheduler", LINSPACE),
    "Euler a SGM Uniform": ("EulerAncestralDiscreteScheduler", TRAILING),
    "UniPC": ("UniPCMultistepScheduler", LINSPACE),
    "DEIS": ("DEISMultistepScheduler", LINSPACE),
    "LCM": ("LCMScheduler", {"original_inference_steps": 200}),  # the default, 50, refuses more steps than that
    "DDIM": ("DDIMScheduler", LEADING | {"clip_sample": False}),
    "PLMS": PLMS,
    # the official RunPod SDXL worker's names, with the checkpoint's own spacing as there
    "PNDM": PLMS,
    "K_EULER": ("EulerDiscreteScheduler", {}),
    "K_EULER_ANCESTRAL": ("EulerAncestralDiscreteScheduler", {}),
    "DPMSolverMultistep": ("DPMSolverMultistepScheduler", {}),
    "DPMSolverSinglestep": ("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
}
DEFAULT_SCHEDULER = "DPM++ 2M Karras"
NEEDS_SCIPY = ("klms", "lms", "lms karras")


def scheduler_name(name: str, value: Any) -> str:
    """A name of SCHEDULERS, capitals or not: "euler A" -> "Euler a". Raises InvalidInput."""
    spelled = value.strip().lower() if isinstance(value, str) else ""
    if spelled in NEEDS_SCIPY:
        raise InvalidInput(f"{name} {value} needs SciPy, which this worker does without: use K_EULER")
    return one_of(SCHEDULERS)(name, {known.lower(): known for known in SCHEDULERS}.get(spelled, value))


def build_scheduler(name: str, config: Mapping[str, Any], steps: int) -> Any:
    """The scheduler of SCHEDULERS on the checkpoint's own configuration, whose prediction type and noise schedule stay.

    config: the pipeline's first scheduler's, never that of the last job's.
    """
    kind, extra = SCHEDULERS[name]
    if steps == 1:  # a single linspace or leading step is at t = 0 or 1, where there is no noise to take away
        extra = extra | TRAILING
    return getattr(diffusers, kind).from_config(config, **extra)


MAX_PROMPT = 10_000
MAX_SEED = 2**32
REQUIRED = object()


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
    close = difflib.get_close_matches(name.lower(), lowered, n=1)
    return f'; did you mean "{lowered[close[0]]}"?' if close else ""


Check = Callable[[str, Any], Any]


def text_of(low: int, high: int) -> Check:
    """Text of low to high characters."""

    def check(name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise InvalidInput(f"{name} must be text, got {shown(value)}")
        if not low <= len(value) <= high:
            raise InvalidInput(f"{name} must have {low:,} to {high:,} characters, got {len(value):,}")
        return value

    return check


def whole_number(low: int, high: int, multiple_of: int = 1) -> Check:
    """A whole number from low to high; JSON's true is none."""

    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidInput(f"{name} must be a whole number, got {shown(value)}")
        if not low <= value <= high:
            raise InvalidInput(f"{name} must be from {low} to {high}, got {shown(value)}")
        if value % multiple_of:
            raise InvalidInput(f"{name} must be a multiple of {multiple_of}, got {value}")
        return value

    return check


def real_number(low: float, high: float) -> Check:
    """A number from low to high; neither true nor NaN."""

    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InvalidInput(f"{name} must be a number, got {shown(value)}")
        if not low <= value <= high:
            raise InvalidInput(f"{name} must be from {low:g} to {high:g}, got {shown(value)}")
        return float(value)

    return check


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
    return whole_number(0, MAX_SEED - 1)(name, value)


def lora_list(name: str, value: Any) -> list[tuple[str, float | None]] | None:
    """[{"name": "a"}] -> [("a", None)], None for the configured scale; null -> None, the configured stack."""
    if value is None:
        return None
    if not isinstance(value, list):
        raise InvalidInput(f'{name} must be a list such as [{{"name": "...", "scale": 1.0}}], got {shown(value)}')
    return [lora_item(f"{name}[{i}]", item) for i, item in enumerate(value)]


def lora_item(name: str, item: Any) -> tuple[str, float | None]:
    """One entry of `loras`."""
    if not isinstance(item, dict) or "name" not in item:
        raise InvalidInput(f'{name} must be an object such as {{"name": "...", "scale": 1.0}}, got {shown(item)}')
    refuse_unknown(item, ("name", "scale"), f"{name}: ")
    scale = item.get("scale")
    if scale is not None:
        scale = real_number(-MAX_LORA_SCALE, MAX_LORA_SCALE)(f"{name}.scale", scale)
    return text_of(1, 200)(f"{name}.name", item["name"]), scale


def refuse_unknown(given: Mapping[Any, Any], known: Iterable[str], where: str = "") -> None:
    """Raises InvalidInput for a field that is not known, and suggests the nearest."""
    for name in given:
        if name not in known:
            raise InvalidInput(f"{where}unknown field {shown(name)}{nearest(str(name), known)}")


@dataclass(frozen=True)
class Field:
    """How one field of the input is read."""

    check: Check
    default: Any = REQUIRED
    also: tuple[str, ...] = ()  # other names that the field is accepted under


FIELDS = {
    "prompt": Field(text_of(1, MAX_PROMPT)),
    "negative_prompt": Field(text_of(0, MAX_PROMPT), ""),
    "width": Field(whole_number(256, 2048, multiple_of=8), 1024),
    "height": Field(whole_number(256, 2048, multiple_of=8), 1024),
    "steps": Field(whole_number(1, 150), 24, also=("num_inference_steps",)),
    "guidance_scale": Field(real_number(1, 30), 4.5, also=("cfg_scale",)),
    "seed": Field(seed_or_random, None),
    "num_images": Field(whole_number(1, 4), 1, also=("batch_size",)),
    "scheduler": Field(scheduler_name, DEFAULT_SCHEDULER, also=("sampler", "sampler_name")),
    "clip_skip": Field(whole_number(1, 12), 2),
    "long_prompt": Field(one_of(LONG_PROMPT_MODES), "blend"),
    "loras": Field(lora_list, None),
    "image_format": Field(one_of(ENCODINGS), "png"),
    "embed_metadata": Field(true_or_false, True),
}


@dataclass(frozen=True)
class JobRequest:
    """A job's input, checked; the field names are the contract's."""

    prompt: str
    negative_prompt: str
    width: int
    height: int
    steps: int
    guidance_scale: float
    seed: int
    num_images: int
    scheduler: str
    clip_skip: int
    long_prompt: str
    loras: dict[str, float]  # adapter -> scale, lora tags of the prompt included
    image_format: str
    embed_metadata: bool
    warnings: tuple[str, ...] = ()

    @property
    def seeds(self) -> list[int]:
        """One seed an image: any of them can be made again alone."""
        return [(self.seed + i) % MAX_SEED for i in range(self.num_images)]


def parse_request(raw: Any, settings: Settings) -> JobRequest:
    """Raises InvalidInput, with the field, its rule and the value; nothing has cost anything by then."""
    if not isinstance(raw, dict):
        raise InvalidInput(f'a job must be {{"input": {{"prompt": "..."}}}}, got {shown(raw)} as input')
    refuse_unknown(raw, [name for key, spec in FIELDS.items() for name in (key, *spec.also)])
    values = {name: read_field(name, spec, raw) for name, spec in FIELDS.items()}
    warnings: list[str] = []
    for name in ("prompt", "negative_prompt"):
        clean = well_formed(values[name])
        if clean != values[name]:
            warnings.append(f"{name} held lone surrogates: each was replaced by U+FFFD")
        values[name] = clean
    values["loras"] = choose_loras(values, settings, warnings)
    return JobRequest(**values, warnings=tuple(warnings))


def read_field(name: str, spec: Field, raw: Mapping[str, Any]) -> Any:
    """The checked value of a field, given under its own name or another of its names, or its default."""
    given = [key for key in (name, *spec.also) if key in raw]
    if len(given) > 1:
        raise InvalidInput(f"{given[0]} and {given[1]} are the same field: give one of them")
    if not given and spec.default is REQUIRED:
        raise InvalidInput(f"{name} is required")
    return spec.check(given[0] if given else name, raw[given[0]] if given else spec.default)


def choose_loras(values: Mapping[str, Any], settings: Settings, warnings: list[str]) -> dict[str, float]:
    """The job's stack, adapter -> scale: its `loras` or the configured ones, then the prompt's <lora:…> tags."""
    stack = settings.stack
    files = {sanitize_name(Path(config["filename"]).stem): name for name, config in stack.items()}
    known = files | {name: name for name in stack}
    if values["loras"] is None:
        chosen = {name: config["scale"] for name, config in stack.items()}
    else:
        chosen = {}
        for name, scale in values["loras"]:
            adapter = known.get(sanitize_name(name))
            if adapter is None:
                raise InvalidInput(f"loras: {shown(name)} is not in the stack: {', '.join(stack) or 'it is empty'}")
            if adapter in chosen:
                raise InvalidInput(f"loras: {shown(name)} is given twice")
            chosen[adapter] = stack[adapter]["scale"] if scale is None else scale
    for name, scale in split_lora_tags(values["prompt"])[1]:
        adapter = known.get(sanitize_name(name))
        if adapter is None:
            warnings.append(f"<lora:{name}> was left out: the stack holds {', '.join(stack) or 'no LoRA'}")
        else:
            chosen[adapter] = real_number(-MAX_LORA_SCALE, MAX_LORA_SCALE)(f"the scale of <lora:{name}>", scale)
    return chosen


# running a job


class Observer:
    """Is told how far a job has come. This one ignores it; Progress reports it to RunPod."""

    def denoising(self) -> None:
        """The GPU has begun to denoise."""

    def step(self, step: int, steps: int) -> None:
        """A denoising step was launched; must return at once."""


class Timings:
    """Seconds of a job's phases, each read after the GPU has finished it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str, gpu: bool = True) -> Iterator[None]:
        started = time.monotonic()
        yield
        if gpu and torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[name] = round(time.monotonic() - started, 3)


class Worker:
    """What the process holds for its life: the pipeline, its prompt encoder, and the lock that keeps GPU work of
    several jobs one after the other."""

    def __init__(self) -> None:
        self.gpu = threading.Lock()
        self._loading = threading.Lock()
        self._ready: tuple[Any, PromptEncoder] | None = None

    def ready(self) -> tuple[Any, PromptEncoder]:
        """Pipeline and encoder, loaded at the first use. Raises SetupFailed; the next call tries again."""
        with self._loading:
            if self._ready is None:
                pipe = load_pipeline()
                self._ready = pipe, PromptEncoder(pipe)
            return self._ready


WORKER = Worker()


def handler(job: dict[str, Any]) -> dict[str, Any]:
    """Answers a RunPod job {"id": ..., "input": {...}} with {"images": [...], "seed": ..., "metadata": {...}} or with
    {"error": ..., "code": ...}; never raises for bad input. Safe to call from several threads."""
    return run_job(job, Observer())


def run_job(job: dict[str, Any], observer: Observer) -> dict[str, Any]:
    """handler, telling an observer how far it is."""
    given = job.get("id") if isinstance(job, dict) else None
    job_id = given if isinstance(given, str) else "local"
    try:
        return answer_job(job, job_id, observer)
    except Exception as error:  # noqa: BLE001 - the edge of a job: any failure becomes an answer
        failure = worker_error(error, job_id)
    log.error("job %s: %s: %s%s", job_id, failure.code, failure, failure.detail)
    return failure_answer(failure)


def answer_job(job: Any, job_id: str, observer: Observer) -> dict[str, Any]:
    """The one long path: check, load, generate, encode, answer. Raises WorkerError."""
    # 1. all that can be refused, before anything costs
    settings = Settings.from_environ()
    request = parse_request(job.get("input") if isinstance(job, dict) else None, settings)
    bucket = parse_s3_config(job) or settings.bucket
    # 2. the models, where the start has not loaded them
    pipe, encoder = WORKER.ready()
    # 3. the GPU's work, one job at a time
    timings = Timings()
    with WORKER.gpu, torch.inference_mode():
        started = time.monotonic()
        try:
            images, conditioning = generate(pipe, encoder, request, timings, observer)
        except Exception as error:  # noqa: BLE001 - cleared away before the next job's turn
            raise clear_failure(worker_error(error, job_id), error, pipe) from None
        metadata = describe(request, settings, pipe.lora_stack, conditioning)
    # 4. files and links, beside the next job's GPU work
    answer = {"images": [], "seed": request.seed, "metadata": metadata}
    with timings("images", gpu=False):
        recipes = image_recipes(request, settings, pipe.model_files, metadata["loras"])
        answer = deliver(answer, images, recipes, bucket, settings.max_response_bytes, job_id)
    answer["metadata"] |= {"processing_time": round(time.monotonic() - started, 3), "timings": timings.seconds}
    log.info(
        "job %s: %s, seed %d, %d+%d chunks: %.1f s %s",
        job_id,
        f"{request.num_images} x {request.width}x{request.height}",
        request.seed,
        conditioning.prompt_chunks,
        conditioning.negative_prompt_chunks,
        answer["metadata"]["processing_time"],
        timings.seconds,
    )
    return answer


def worker_error(error: Exception, job_id: str) -> WorkerError:
    """The failure that a client sees; what a library raised goes to the log."""
    if isinstance(error, WorkerError):
        return error
    log.exception("job %s: unexpected failure", job_id)
    return explain(error)


def clear_failure(failure: WorkerError, error: BaseException | None, pipe: Any) -> WorkerError:
    """failure, after all that the failed job left on the GPU is gone."""
    while error:
        error.__traceback__ = None  # its frames hold the job's tensors
        error = error.__context__
    with suppress(RuntimeError):  # once the GPU is lost, nothing can be freed either
        free_memory()
        pipe.maybe_free_model_hooks()
    return failure


DESCRIBED = (
    *("prompt", "negative_prompt", "width", "height", "steps", "guidance_scale", "seeds", "scheduler"),
    *("clip_skip", "long_prompt", "image_format"),
)


def describe(request: JobRequest, settings: Settings, stack: LoraStack, conditioning: Conditioning) -> dict[str, Any]:
    """The answer's metadata, apart from times."""
    failed = [f"LoRA {name} was left out: {stack.failed[name]}" for name in request.loras if name in stack.failed]
    return {name: getattr(request, name) for name in DESCRIBED} | {
        "prompt_chunks": conditioning.prompt_chunks,
        "negative_prompt_chunks": conditioning.negative_prompt_chunks,
        "model": settings.checkpoint["name"],
        "model_version": version_id(settings.checkpoint),
        "vae": Path(settings.vae_model).name if Path(settings.vae_model).is_dir() else settings.vae_model,
        "loras": [{"name": name, "scale": scale} for name, scale in stack.applied.items()],
        "loras_failed": [{"name": name, "error": reason} for name, reason in stack.failed.items()],
        "warnings": [*request.warnings, *conditioning.warnings, *failed],
    }


def generate(
    pipe: Any, encoder: PromptEncoder, request: JobRequest, timings: Timings, observer: Observer
) -> tuple[list[Any], Conditioning]:
    """Stack, prompts, latents, pixels: everything of a job that needs the GPU."""
    stack = pipe.lora_stack
    with timings("loras"):
        changed = stack.apply(request.loras)
    if not changed:
        del timings.seconds["loras"]
    with timings("encode"):
        conditioning = encoder.encode(
            request.prompt,
            request.negative_prompt,
            long_prompt=request.long_prompt,
            clip_skip=request.clip_skip,
            stack=tuple(sorted(stack.applied.items())),
            guidance=request.guidance_scale > 1,
        )
    observer.denoising()
    with timings("denoise"):
        latents = denoise(pipe, request, conditioning, observer)
    with timings("decode"):
        images = decode(pipe, latents)
        pipe.maybe_free_model_hooks()
    return images, conditioning


def denoise(pipe: Any, request: JobRequest, conditioning: Conditioning, observer: Observer) -> Any:
    """Latents (num_images, 4, height/8, width/8). Image i is drawn from seeds[i] with a CPU generator of its own."""

    def on_step_end(_pipe: Any, step: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
        observer.step((step + 1) * request.steps // pipe.num_timesteps, request.steps)  # Heun takes two a step
        return {}

    pipe.scheduler = build_scheduler(request.scheduler, pipe.scheduler_config, request.steps)
    return pipe(
        prompt_embeds=conditioning.prompt_embeds,
        negative_prompt_embeds=conditioning.negative_prompt_embeds,
        pooled_prompt_embeds=conditioning.pooled_prompt_embeds,
        negative_pooled_prompt_embeds=conditioning.negative_pooled_prompt_embeds,
        width=request.width,
        height=request.height,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        num_images_per_prompt=request.num_images,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in request.seeds],
        callback_on_step_end=on_step_end,
        output_type="latent",
    ).images


def free_memory() -> None:
    """Gives a failed job's memory back, so that the next job finds it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------------------------------------
# entry

POLL_S = 90  # RunPod holds a job-take open for less; the SDK's own limit
# before the next poll, after a status: 204 is an empty queue, 400 FlashBoot, 429 the rate limit
POLL_PAUSES_S, POLL_PAUSE_S = {204: 0.1, 400: 0.1, 429: 5.0}, 1.0
LAST_POLL_S = 2  # how long an idle worker's open poll outlives SIGTERM
ANSWER_TRY_S, ANSWER_RETRY_S = 30, 180  # one post of an answer; all of them
FIRST_PAUSE_S, LAST_PAUSE_S = 0.5, 8.0  # between two posts of an answer
PROGRESS_S, PROGRESS_TRY_S, LAST_PROGRESS_S = 1, 10, 2  # between updates; for one; for the last before the answer
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def serve_queue() -> None:
    """The worker on RunPod: the SDK's start() with JobLoop in its loop's place, while the models load beside it."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # PID 1 ignores a signal without a handler
    with tempfile.TemporaryDirectory(prefix="runpod-", ignore_cleanup_errors=True) as state:
        start_heartbeat(state)
        loop = JobLoop(run_job, in_background(set_up))
        take_over(load_sdk(state), loop)
        runpod.serverless.start({"handler": handler})
    sys.stdout.flush()
    os._exit(0)  # taking torch and CUDA apart can last for seconds, and for ever after the GPU was lost


def start_heartbeat(state: str) -> None:
    """The SDK's heartbeat in a process that ends with this one, forked while there are no threads, models or CUDA.

    SDK 1.7.13 forks it after the models were loaded, and it outlives a kill -9, pinging the dead job's id for ever.
    """
    needed = ("RUNPOD_WEBHOOK_PING", "RUNPOD_POD_ID", "RUNPOD_AI_API_KEY")  # as in the SDK's start_ping
    worker = os.getpid()
    if not all(map(os.environ.get, needed)) or os.fork():
        return
    try:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to the whole group, it would leave the last job unpinged
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == worker:
            load_sdk(state).rp_ping.Heartbeat().ping_loop()
    finally:
        os._exit(1)


def import_sdk() -> None:
    """Imports runpod in a third of the time: 1.7.13 looks up the processor's name meanwhile, which takes 1.2 s of a
    core, for a debug output of its own."""
    importlib.import_module("cpuinfo").get_cpu_info = dict  # without a name in it
    importlib.import_module("runpod")


def load_sdk(state: str) -> Any:
    """runpod.serverless.modules, with the ids of the jobs in progress kept in the folder `state`.

    SDK 1.7.13 keeps them in the working directory: a worker killed there waits for its dead jobs for ever.
    """
    import_sdk()
    modules = runpod.serverless.modules
    in_progress = modules.worker_state.JobsProgress
    in_progress._STATE_DIR, in_progress._STATE_FILE = state, f"{state}/.runpod_jobs.pkl"
    set.clear(in_progress())  # what the import found in the working directory
    return modules


def take_over(sdk: Any, loop: JobLoop) -> None:
    """Makes the SDK's start() run our loop, without a second heartbeat."""

    class Scaler(sdk.rp_scale.JobScaler):
        def start(self) -> None:
            """Instead of the SDK's get_jobs and run_jobs, and of its signal handlers, which do not wake the loop."""
            asyncio.run(loop.serve())

    sdk.rp_scale.JobScaler = Scaler
    sdk.rp_ping.Heartbeat._process_started = True


def set_up() -> int:
    """Makes the worker ready, or raises WorkerError; returns how many jobs it may hold."""
    settings = Settings.from_environ()
    check_store(settings)
    pipe, encoder = WORKER.ready()
    with phase("warm-up image"), WORKER.gpu, torch.inference_mode():
        side = 1024 if torch.cuda.is_available() else 256
        request = parse_request({"prompt": "warm-up", "seed": 0, "steps": 2, "width": side, "height": side}, settings)
        images, _ = generate(pipe, encoder, request, Timings(), Observer())
    encode_images(images, [""], request.image_format)
    return settings.jobs_in_flight


def check_store(settings: Settings) -> None:
    """Raises SetupFailed where a model file is missing and its folder cannot be written to; the downloads see to the
    free space, once they know a file's size."""
    files = [settings.checkpoint_dir / settings.checkpoint["filename"]]
    files += [settings.lora_dir / config["filename"] for config in settings.loras]
    for folder in {file.parent for file in files if not file.is_file()}:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise SetupFailed("the model store cannot be written to: check MODEL_CACHE_DIR", detail=error) from error


# the job loop


class JobLoop:
    """Takes jobs from RunPod's queue, runs each in a thread and posts its answer, beside the next one.

    The SDK's own loop (1.7.13) leaves the GPU idle for 0.3 to 1.5 s between two jobs, takes two at once from under a
    free worker's nose when told to hold two, loses the job that an open poll brings after SIGTERM, drops jobs
    without "input", and gives an answer up at the first reset. Its HTTP session, addresses and heartbeat stay in use.

    run answers a job in a thread; set_up's result is how many jobs may be held, from taking one to its answer's post.
    """

    def __init__(self, run: Callable[[dict[str, Any], Observer], dict[str, Any]], set_up: Future) -> None:
        self.run, self.set_up, self.limit = run, set_up, 1
        self.held: set[asyncio.Task] = set()
        self.waiting: set[str] = set()  # the ids of jobs whose denoising is still to come
        self.changed = asyncio.Event()
        self.stopping = False
        self.poll: asyncio.Task | None = None

    async def serve(self) -> None:
        """Serves until SIGTERM or an answer with refresh_worker; returns once every job held is answered."""
        self.loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            self.loop.add_signal_handler(number, self.on_signal)
        await self.be_ready()
        async with runpod.http_client.AsyncClientSession() as self.session:
            while await self.may_ask():
                self.poll = self.loop.create_task(self.take_job())
                await asyncio.wait([self.poll])
                if not self.poll.cancelled() and (job := self.poll.result()):
                    self.hold(job)
            await asyncio.gather(*self.held)

    async def be_ready(self) -> None:
        """Waits for set_up. Where it failed, jobs are answered with the reason instead of waiting for their time-out
        of up to 24 h."""
        try:
            self.limit = await asyncio.wrap_future(self.set_up)
            return
        except WorkerError as error:
            failure = error
        except Exception as error:
            log.exception("unexpected failure of the start")
            failure = SetupFailed("the worker could not be made ready; its log says more", detail=error)
        log.error("the start failed: %s%s", failure, failure.detail)
        answer = failure_answer(SetupFailed(str(failure)))
        self.run = lambda *_: dict(answer)

    def on_signal(self) -> None:
        """SIGTERM: nothing new is asked for, and a job that the open poll still brings is run. The poll stays open for
        a moment, and while a job runs."""
        if not self.set_up.done():
            os._exit(0)  # the thread that loads the models cannot be stopped
        log.info("asked to stop with %d jobs held", len(self.held))
        self.stop()
        self.last_poll = self.loop.create_task(self.close_last_poll())

    def stop(self) -> None:
        """Asks for nothing new."""
        self.stopping = True
        self.changed.set()

    async def close_last_poll(self) -> None:
        """Hangs up; RunPod gives the poll's job to another worker."""
        await asyncio.sleep(LAST_POLL_S)
        while self.held:
            await asyncio.wait(self.held)
        if self.poll:
            self.poll.cancel()

    async def may_ask(self) -> bool:
        """Waits until one more job may be asked for, False once stopping: there must be room, and no job may wait for
        the GPU here that a free worker could start."""
        while not self.stopping and (self.waiting or len(self.held) >= self.limit):
            self.changed.clear()
            await self.changed.wait()
        return not self.stopping

    async def take_job(self) -> dict[str, Any] | None:
        """One long poll; None where it brought no job."""
        pause = POLL_PAUSE_S
        address, timeout = runpod.serverless.modules.rp_job._job_get_url(), aiohttp.ClientTimeout(total=POLL_S)
        try:
            async with self.session.get(address, timeout=timeout) as response:
                if response.status == 200:
                    return parse_job(await response.read())
                if response.status not in (204, 400):
                    log.warning("asking for a job: HTTP %d", response.status)
                pause = POLL_PAUSES_S.get(response.status, pause)
        except (aiohttp.ClientError, TimeoutError) as error:
            log.warning("asking for a job: %s", type(error).__name__)
        await asyncio.sleep(pause)
        return None

    def hold(self, job: dict[str, Any]) -> None:
        """Begins with a job, in a task of its own."""
        self.waiting.add(job["id"])
        task = self.loop.create_task(self.serve_job(job))
        self.held.add(task)
        task.add_done_callback(self.held.discard)
        task.add_done_callback(lambda _: self.changed.set())

    def begun(self, job_id: str) -> None:
        """A job has its turn on the GPU, or will never need it."""
        self.waiting.discard(job_id)
        self.changed.set()

    async def serve_job(self, job: dict[str, Any]) -> None:
        """One job, from the queue to its answer."""
        job_id = job["id"]
        in_progress = runpod.serverless.modules.worker_state.JobsProgress()
        in_progress.add(job_id)  # the id alone: the SDK would write the whole job to the disk, s3Config's key included
        progress = Progress(self, job_id)
        body, refresh = await asyncio.to_thread(self.run_to_body, job, progress)
        self.begun(job_id)
        if refresh:
            self.stop()
            self.poll.cancel()
        await progress.close()
        await self.post_answer(job_id, body)
        in_progress.remove(job_id)

    def run_to_body(self, job: dict[str, Any], progress: Observer) -> tuple[bytes, bool]:
        """The job's answer as it is posted, and whether the worker must be replaced."""
        try:
            answer = self.run(job, progress)
        except Exception as error:  # unanswered, the job would wait for its time-out
            log.exception("job %s: unexpected failure", job["id"])
            answer = failure_answer(
                GpuLost("the worker failed and is being replaced: send the job again", detail=error)
            )
        try:
            return result_body(answer), bool(answer.get("refresh_worker"))
        except (TypeError, ValueError, RecursionError):
            log.exception("job %s: the answer is no JSON", job["id"])
            return result_body(failure_answer(GenerationFailed("the answer could not be written as JSON"))), False

    async def post_answer(self, job_id: str, body: bytes) -> None:
        """Posts the answer; where RunPod will not have it, a short one, since clients would see a job COMPLETED
        without output."""
        refused = failure_answer(GenerationFailed("RunPod refused the job's answer"))
        if not await self.is_accepted(job_id, body) and not await self.is_accepted(job_id, result_body(refused)):
            log.error("job %s: stays unanswered", job_id)

    async def is_accepted(self, job_id: str, body: bytes) -> bool:
        """Posts an answer until RunPod takes it, or refuses it for good, or ANSWER_RETRY_S is over."""
        deadline, pause = self.loop.time() + ANSWER_RETRY_S, FIRST_PAUSE_S
        while True:
            try:
                await self.post(job_id, body, ANSWER_TRY_S)
                return True
            except (aiohttp.ClientError, TimeoutError) as error:
                status = getattr(error, "status", None)  # None where there was no answer
                reason = f"HTTP {status}" if status else type(error).__name__
                log.warning("job %s: posting its answer: %s", job_id, reason)
            lasting = status and status < 500 and status not in (408, 429)
            if lasting or self.loop.time() > deadline:
                return False
            await asyncio.sleep(pause)
            pause = min(2 * pause, LAST_PAUSE_S)

    async def post(self, job_id: str, body: bytes, timeout_s: float) -> None:
        """Posts a result or a progress update as the SDK does; raises aiohttp.ClientError or TimeoutError."""
        address = runpod.serverless.modules.rp_http.JOB_DONE_URL.replace("$ID", job_id) + "&isStream=false"
        headers = {"charset": "utf-8", "Content-Type": "application/x-www-form-urlencoded", "X-Request-ID": job_id}
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        data = io.BytesIO(body)
        async with self.session.post(address, data=data, headers=headers, timeout=timeout, raise_for_status=True):
            pass


class Progress(Observer):
    """Reports one job's denoising to RunPod, at most once a second, and none after close()."""

    def __init__(self, jobs: JobLoop, job_id: str) -> None:
        self.jobs, self.job_id = jobs, job_id
        self.update: asyncio.Task | None = None
        self.next_at = 0.0

    def denoising(self) -> None:
        """In the job's thread: the next job may be asked for."""
        self.jobs.loop.call_soon_threadsafe(self.jobs.begun, self.job_id)

    def step(self, step: int, steps: int) -> None:
        """In the job's thread."""
        self.jobs.loop.call_soon_threadsafe(self.report, step, steps)

    def report(self, step: int, steps: int) -> None:
        """Sends an update, unless one is under way or was answered less than a second ago."""
        if self.jobs.loop.time() >= self.next_at:
            self.next_at = math.inf
            self.update = self.jobs.loop.create_task(self.send(step, steps))

    async def send(self, step: int, steps: int) -> None:
        """One update; one that gets lost is no harm."""
        output = {"step": step, "steps": steps, "percent": round(100 * step / steps)}
        body = json.dumps({"status": "IN_PROGRESS", "output": output}).encode()
        try:
            await self.jobs.post(self.job_id, body, PROGRESS_TRY_S)
        except (aiohttp.ClientError, TimeoutError) as error:
            log.info("job %s: a progress update was lost: %s", self.job_id, type(error).__name__)
        self.next_at = self.jobs.loop.time() + PROGRESS_S

    async def close(self) -> None:
        """Ends the update under way: one that arrived after the result would leave the job IN_PROGRESS for good."""
        if self.update:
            await asyncio.wait([self.update], timeout=LAST_PROGRESS_S)
            self.update.cancel()  # closes its connection
            await asyncio.wait([self.update])


def parse_job(body: bytes) -> dict[str, Any] | None:
    """The job in an answer of job-take; None for what has no id that could be answered."""
    try:
        job = json.loads(body, parse_int=lambda digits: int(digits[:1000]))  # int() refuses more than 4,300 digits
    except (ValueError, RecursionError):
        job = None
    if isinstance(job, dict) and isinstance(job.get("id"), str) and job["id"]:
        return job
    log.error("the queue sent %d bytes that are no job", len(body))
    return None


def result_body(answer: Mapping[str, Any]) -> bytes:
    """An answer as the SDK posts it: {"error": "e", "code": "c"} -> {"output": {"code": "c"}, "error": "e"}.

    Raises what json.dumps does for an answer that strict JSON cannot carry.
    """
    output = {key: value for key, value in answer.items() if key not in ("error", "refresh_worker")}
    result = {"output": output}
    if answer.get("error"):
        result["error"] = answer["error"]
    if answer.get("refresh_worker"):
        result["stopPod"] = True
    return json.dumps(result, ensure_ascii=False, allow_nan=False).encode(errors="replace")  # lone surrogates


# the command line


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
        in_background(WORKER.ready)  # the first request waits for it, and is told where it failed
        runpod.serverless.start({"handler": handler_in_thread})
        return
    if not options.test_input:
        sys.argv[1:] = ["--test_input", read_job_file(rest), *[option for option in sys.argv[1:] if option not in rest]]
    elif problem := job_problem(options.test_input):
        sys.exit(f"--test_input {problem}")
    runpod.serverless.start({"handler": run_and_save})


def configure_logging() -> None:
    """One line per phase on stderr; stdout is for results."""
    output = logging.StreamHandler()
    output.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S"))
    log.addHandler(output)
    log.setLevel(logging.INFO)
    log.propagate = False  # importing runpod sets the root logger up a second time


async def handler_in_thread(job: dict[str, Any]) -> dict[str, Any]:
    """handler for the SDK's HTTP server, which would answer nobody else while a plain function runs."""
    return await asyncio.to_thread(handler, job)


def read_job_file(arguments: list[str]) -> str:
    """The text of the job file named on the command line, or of test_input.json here or beside handler.py."""
    if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
        sys.exit(f"usage: python handler.py [job.json] [the SDK's options]; cannot make sense of {arguments}")
    default = Path("test_input.json")
    file = Path(arguments[0]) if arguments else default if default.is_file() else Path(__file__).with_name(default.name)
    try:
        job = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"{file} cannot be read: {error}")
    if problem := job_problem(job):
        sys.exit(f"{file} {problem}")
    return job


def job_problem(job: str) -> str:
    """What keeps a text from being a job, "" where nothing does; the SDK would end with a traceback."""
    try:
        parsed = json.loads(job)
    except ValueError as error:
        return f"is not valid JSON: {error}"
    return "" if isinstance(parsed, dict) and "input" in parsed else 'must hold {"input": {"prompt": "..."}}'


def run_and_save(job: dict[str, Any]) -> dict[str, Any]:
    """handler for a local run: saves the images to OUTPUT_DIR, prints where and the metadata."""
    answer = handler(job)
    if "error" in answer:
        return answer
    saved = save_images(answer, Settings.from_environ().output_dir)
    print(json.dumps(answer["metadata"], indent=2, ensure_ascii=False))
    print("\n".join(saved))
    return {"images": saved}


def save_images(answer: Mapping[str, Any], folder: Path) -> list[str]:
    """Writes the answer's images, named by time and seed; addresses of uploaded images come back as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp, saved = time.strftime("%Y%m%d-%H%M%S"), []
    for image, image_seed in zip(answer["images"], answer["metadata"]["seeds"], strict=True):
        if not image.startswith(("http://", "https://")):
            file = folder / f"{stamp}-{image_seed}.{answer['metadata']['image_format']}"
            file.write_bytes(base64.b64decode(image))
            image = str(file)
        saved.append(image)
    return saved


if __name__ == "__main__":
    main()
