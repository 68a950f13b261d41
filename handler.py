"""SDXL worker for RunPod serverless: Civitai checkpoint, LoRA stack, prompts of any length, base64 PNGs.

The way of a job, and the order of this file:

    configuration   models and settings; every setting is an environment variable, parsed into Settings
    errors          one class per code that a client can see
    downloads       Civitai or the volume -> verified files in the model store
    pipeline, LoRAs files -> StableDiffusionXLPipeline on the GPU, LoRA stack merged into its weights
    prompts         A1111 text -> chunks of 75 tokens -> embeddings, blended into one 77-token tensor
    images          latents' pixels -> PNG, JPEG or WebP that carries its recipe
    jobs            {"input": {...}} -> checked request -> images -> {"images": [...], "metadata": {...}}
    entry           the command line here, RunPod's job loop there

    python handler.py                      runs test_input.json and saves the images to OUTPUT_DIR
    python handler.py custom_input.json    the same with another job
    python handler.py --rp_serve_api       the SDK's local HTTP server; its other options work too

With RUNPOD_WEBHOOK_GET_JOB set (RunPod sets it) the same command is the serverless worker.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


class Lazy:
    """A module that is imported when one of its names is first used: torch, diffusers and runpod cost 4-7 s at a
    cold start, time in which the models are fetched."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._module), name)


torch, diffusers, transformers, runpod = Lazy("torch"), Lazy("diffusers"), Lazy("transformers"), Lazy("runpod")

log = logging.getLogger("worker")

# ---------------------------------------------------------------------------------------------------------------------
# configuration

MB = 1_000_000  # RunPod's limits count in these
GIB = 1024**3
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

    @classmethod
    def from_environ(cls) -> Settings:
        """Raises SetupFailed with the setting's name, its rule and, unless it is secret, its value."""
        environ = {name: value.strip() for name, value in os.environ.items()}
        on_runpod = "RUNPOD_WEBHOOK_GET_JOB" in environ
        store = Path(environ.get("MODEL_CACHE_DIR") or default_model_dir())
        return cls(
            civitai_api_key=environ.get("CIVITAI_API_KEY", ""),
            civitai_base_url=parse_base_url(environ.get("CIVITAI_BASE_URL") or CIVITAI),
            checkpoint_dir=Path(environ.get("CHECKPOINT_DIR") or store / "checkpoints"),
            lora_dir=Path(environ.get("LORA_DIR") or store / "loras"),
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
        number = int(text) if whole else float(text)
    except ValueError:
        number = math.nan
    if not low <= number <= high:
        kind = "whole number" if whole else "number"
        raise SetupFailed(f"{name} must be a {kind} from {low:g} to {high:g}, got {text!r}")
    return number


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
        self.detail = detail


class InvalidInput(WorkerError):
    """The caller's fault; nothing was run."""

    code = "INVALID_INPUT"


class SetupFailed(WorkerError):
    """The models could not be made ready; a fresh worker may do better."""

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
    """The bucket refused the image."""

    code = "UPLOAD_FAILED"


# ---------------------------------------------------------------------------------------------------------------------
# downloads


@dataclass(frozen=True)
class ModelFiles:
    """What the model store holds after a cold start."""

    checkpoint: Path
    loras: dict[str, Path]  # adapter name -> file
    failed: dict[str, str]  # adapter name -> why it could not be had


# ---------------------------------------------------------------------------------------------------------------------
# pipeline and LoRAs


# ---------------------------------------------------------------------------------------------------------------------
# prompts


# ---------------------------------------------------------------------------------------------------------------------
# images


# ---------------------------------------------------------------------------------------------------------------------
# jobs


# ---------------------------------------------------------------------------------------------------------------------
# entry
