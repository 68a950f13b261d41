"""The model world: a complete SDXL worker's files, with random weights, as they would come from Civitai and the hub.

    store/checkpoints/*.safetensors   the checkpoint in the original single-file (sgm) layout, float16
    store/loras/*.safetensors         the nine LoRAs of handler.LORA_CONFIGS in Kohya's format
    config/                           SDXL_CONFIG: model_index.json, scheduler, configurations, the real CLIP vocabulary
    vae/                              VAE_MODEL: another VAE than the one in the checkpoint

`build_world("tests/.cache")` writes it once and answers a World; size="full" has SDXL's real dimensions. Every tensor
follows from its name and the seed. Shapes come from diffusers' own models on the meta device, the original names from
inverting diffusers' conversion; tests/test_world.py proves the round trip. `write_lora` and `write_bad_lora` write
single LoRA files of every kind.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import importlib.util
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from transformers.models.clip.tokenization_clip import bytes_to_unicode

import handler

API_KEY = "civitai-test-key-0123456789abcdef"

# ---------------------------------------------------------------------------------------------------------------------
# dimensions

DIMENSIONS: dict[str, dict[str, Any]] = {
    "full": {
        "unet": {
            "block_out_channels": [320, 640, 1280],
            "attention_head_dim": [5, 10, 20],
            "transformer_layers_per_block": [1, 2, 10],
            "cross_attention_dim": 2048,
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "norm_num_groups": 32,
        },
        "vae": {"block_out_channels": [128, 256, 512, 512], "norm_num_groups": 32},
        "text_encoder": {"hidden_size": 768, "heads": 12, "layers": 12},
        "text_encoder_2": {"hidden_size": 1280, "heads": 20, "layers": 32},
    },
    # clip_skip goes to 12: each text encoder needs 12 layers. Its hidden sizes differ: so diffusers tells them apart.
    "tiny": {
        "unet": {
            "block_out_channels": [16, 32, 64],
            "attention_head_dim": [1, 1, 2],
            "transformer_layers_per_block": [1, 1, 2],
            "cross_attention_dim": 32 + 64,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 64 + 6 * 8,
            "norm_num_groups": 8,
        },
        "vae": {"block_out_channels": [8, 16, 16, 16], "norm_num_groups": 4},
        "text_encoder": {"hidden_size": 32, "heads": 2, "layers": 12},
        "text_encoder_2": {"hidden_size": 64, "heads": 4, "layers": 14},
    },
}

UNET = {
    "addition_embed_type": "text_time",
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 2,
    "sample_size": 128,
    "use_linear_projection": True,
}
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
MODEL_INDEX = {
    "force_zeros_for_empty_prompt": True,
    "add_watermarker": None,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def text_config(hidden_size: int, heads: int, layers: int, act: str, name: str) -> dict[str, Any]:
    """A CLIP text encoder as SDXL base's configuration has it; eos_token_id 2 is that repository's own."""
    return {
        "architectures": [name],
        "model_type": "clip_text_model",
        "hidden_size": hidden_size,
        "projection_dim": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "hidden_act": act,
        "max_position_embeddings": 77,
        "vocab_size": 49408,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def configs(size: str) -> dict[str, dict[str, Any]]:
    """The configuration of each component that has weights."""
    dims = DIMENSIONS[size]
    return {
        "unet": {"_class_name": "UNet2DConditionModel", **UNET, **dims["unet"]},
        "vae": {"_class_name": "AutoencoderKL", **VAE, **dims["vae"], "force_upcast": True},
        "text_encoder": text_config(**dims["text_encoder"], act="quick_gelu", name="CLIPTextModel"),
        "text_encoder_2": text_config(**dims["text_encoder_2"], act="gelu", name="CLIPTextModelWithProjection"),
    }


# ---------------------------------------------------------------------------------------------------------------------
# tensors and their names


@dataclass(frozen=True)
class Weight:
    """One tensor of a component, by its name there and in the original single-file layout."""

    component: str
    name: str
    original: str
    shape: tuple[int, ...]


@lru_cache
def weights(size: str) -> list[Weight]:
    """Every tensor of the four components; the models exist on the meta device only."""
    found = []
    for component, config in configs(size).items():
        with torch.device("meta"):
            if component in ("unet", "vae"):
                model = getattr(diffusers, config["_class_name"]).from_config(config)
            else:
                model = getattr(transformers, config["architectures"][0])(transformers.CLIPTextConfig(**config))
        rename = ORIGINAL_NAMES[component]
        found += [Weight(component, k, rename(k), tuple(v.shape)) for k, v in model.state_dict().items()]
    return found


def substitute(rules: Iterable[tuple[str, str]], name: str) -> str:
    """All regular-expression rules, one after the other."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


UNET_RULES = [
    (r"^time_embedding\.linear_1", "time_embed.0"),
    (r"^time_embedding\.linear_2", "time_embed.2"),
    (r"^add_embedding\.linear_1", "label_emb.0.0"),
    (r"^add_embedding\.linear_2", "label_emb.0.2"),
    (r"^conv_in", "input_blocks.0.0"),
    (r"^conv_norm_out", "out.0"),
    (r"^conv_out", "out.2"),
    (r"^mid_block\.attentions\.0", "middle_block.1"),
    (r"^mid_block\.resnets\.0", "middle_block.0"),
    (r"^mid_block\.resnets\.1", "middle_block.2"),
]
RESNET_RULES = [
    (r"\.norm1", ".in_layers.0"),
    (r"\.conv1", ".in_layers.2"),
    (r"\.norm2", ".out_layers.0"),
    (r"\.conv2", ".out_layers.3"),
    (r"\.time_emb_proj", ".emb_layers.1"),
    (r"\.conv_shortcut", ".skip_connection"),
]
VAE_RULES = [
    (r"coder\.conv_norm_out", "coder.norm_out"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"group_norm", "norm"),
    (r"to_out\.0", "proj_out"),
    (r"\.to_([qkv])\.", r".\1."),
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"conv_shortcut", "nin_shortcut"),
]
OPEN_CLIP_RULES = [
    (r"^text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^text_model\.embeddings\.token_embedding", "token_embedding"),
    (r"^text_model\.final_layer_norm", "ln_final"),
    (r"^text_projection\.weight", "text_projection"),
    (r"^text_model\.encoder\.layers", "transformer.resblocks"),
    (r"layer_norm(\d)", r"ln_\1"),
    (r"\.fc1\.", ".c_fc."),
    (r"\.fc2\.", ".c_proj."),
    (r"self_attn\.[qkv]_proj\.", "attn.in_proj_"),
    (r"self_attn\.out_proj", "attn.out_proj"),
]


def unet_original(name: str) -> str:
    """ "down_blocks.1.attentions.0.norm.bias" -> "model.diffusion_model.input_blocks.4.1.norm.bias"."""
    found = re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.*)", name)
    if found:
        way, block, kind, layer, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
        if kind == "downsamplers":
            name = f"input_blocks.{block * 3 + 3}.0.{rest.replace('conv', 'op')}"
        elif kind == "upsamplers":  # both upsampled levels of SDXL have attention, which is layer 1
            name = f"output_blocks.{block * 3 + 2}.2.{rest}"
        else:
            first = f"input_blocks.{block * 3 + 1 + layer}" if way == "down" else f"output_blocks.{block * 3 + layer}"
            name = f"{first}.{int(kind == 'attentions')}.{rest}"
    resnet = ".attentions." not in name and "transformer_blocks" not in name
    return "model.diffusion_model." + substitute(UNET_RULES + RESNET_RULES * resnet, name)


def vae_original(name: str) -> str:
    """ "decoder.up_blocks.0.resnets.1.conv1.bias" -> "first_stage_model.decoder.up.3.block.1.conv1.bias"."""
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{3 - int(m[1])}.block", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", name)
    return "first_stage_model." + substitute(VAE_RULES, name)


ORIGINAL_NAMES = {
    "unet": unet_original,
    "vae": vae_original,
    "text_encoder": lambda name: "conditioner.embedders.0.transformer." + name,
    "text_encoder_2": lambda name: "conditioner.embedders.1.model." + substitute(OPEN_CLIP_RULES, name),
}


def original_shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in the single file; 2,514 of them at full size."""
    shapes: dict[str, tuple[int, ...]] = {"conditioner.embedders.1.model.logit_scale": ()}
    for w in weights(size):
        shape = w.shape
        if ".attn.in_proj_" in w.original:  # query, key and value in one tensor
            shape = (3 * shape[0], *shape[1:])
        if w.original.endswith("text_projection"):
            shape = shape[::-1]
        if ".attn_1." in w.original and len(shape) == 2:  # the original VAE's attention is made of 1x1 convolutions
            shape = (*shape, 1, 1)
        shapes[w.original] = shape
    return shapes


BLUR = np.outer([1, 2, 1], [1, 2, 1]).astype(np.float16) / np.float16(16)


class Noise:
    """Random values of a tensor by its name; cut from one block, so that 7 GB of them are cheap."""

    def __init__(self, seed: int, size: str) -> None:
        count = 2**24 if size == "full" else 2**22
        self.block = np.random.default_rng(seed).standard_normal(count, dtype=np.float32)

    def normal(self, name: str, shape: tuple[int, ...], std: float) -> np.ndarray:
        """float16 values of mean 0."""
        count = int(np.prod(shape))
        offset = zlib.crc32(name.encode()) % max(len(self.block) - count, 1)
        values = np.resize(self.block[offset : offset + count], count).reshape(shape)  # repeated where it is larger
        return (values * np.float32(std)).astype(np.float16)

    def weight(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A value of a network that neither dies out nor explodes: matrices keep the variance of their input."""
        if len(shape) < 2:
            is_norm = name.endswith("weight")
            return self.normal(name, shape, 0.05) + np.float16(is_norm)
        if "position" in name:
            return self.normal(name, shape, 0.1)
        if "token_embedding" in name:
            return self.normal(name, shape, 1.0)
        if "decoder." in name and shape[-1] == 3:  # these convolutions blur: soft patterns, not a weave of pixels
            return self.normal(name, (*shape[:2], 1, 1), 1.3 * shape[1] ** -0.5) * BLUR
        return self.normal(name, shape, float(np.prod(shape[1:])) ** -0.5)


def write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]], values: Any, dtype: str = "F16") -> None:
    """Stream tensors to a file, one after the other in memory: values(name, shape) -> array."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width = {"F16": 2, "F32": 4}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + width * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            file.write(np.ascontiguousarray(values(name, shape)).data)


# ---------------------------------------------------------------------------------------------------------------------
# LoRAs


@dataclass(frozen=True)
class Lora:
    """What one LoRA of the world is made of."""

    rank: int
    alpha: float
    parts: tuple[str, ...] = ("unet",)
    modules: str = "attention"  # attention, linear (all that Kohya's trainer reaches) or conv (those and LoCon layers)


LORAS = [
    Lora(8, 8.0, ("unet", "text_encoder", "text_encoder_2"), "linear"),
    Lora(4, 1.0),
    Lora(16, 8.0, modules="conv"),
    Lora(16, 16.0, ("unet", "text_encoder")),
    Lora(32, 16.0, ("unet", "text_encoder", "text_encoder_2"), "linear"),
    Lora(4, 4.0, modules="linear"),
    Lora(8, 1.0),
    Lora(4, 2.0, modules="conv"),
    Lora(2, 1.0, modules="linear"),
]
KINDS = {
    "attention": r"\.(attn\d\.to_(q|k|v|out\.0)|self_attn\.(q|k|v|out)_proj)\.weight$",
    "linear": r"(attentions|encoder\.layers)\.\d.*\.(to_.+|ff\.net\..+|proj_in|proj_out|\w+_proj|fc\d)\.weight$",
    "conv": r"(resnets\.\d\.(conv\d|conv_shortcut|time_emb_proj)|samplers\.0\.conv)\.weight$",
}
STYLES = ("kohya", "peft", "diffusers")
PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


def lora_targets(size: str, parts: Iterable[str], modules: str) -> list[Weight]:
    """The weights that a LoRA changes."""
    pattern = KINDS["linear"] + "|" + KINDS["conv"] if modules == "conv" else KINDS[modules]
    return [w for w in weights(size) if w.component in parts and re.search(pattern, w.name)]


def lora_keys(target: Weight, style: str) -> tuple[str, str, str | None]:
    """Names of the down, up and alpha tensors of one module."""
    module = target.name.removesuffix(".weight")
    if style == "peft":
        return f"{target.component}.{module}.lora_A.weight", f"{target.component}.{module}.lora_B.weight", None
    if style == "diffusers":
        infix = "lora" if target.component == "unet" else "lora_linear_layer"
        return (
            f"{target.component}.{module}.{infix}.down.weight",
            f"{target.component}.{module}.{infix}.up.weight",
            None,
        )
    if target.component == "unet":  # Kohya's trainer works on the original layout
        module = target.original.removeprefix("model.diffusion_model.").removesuffix(".weight")
    name = PREFIXES[target.component] + module.replace(".", "_")
    return f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"


def lora_tensors(lora: Lora, style: str, size: str, strength: float, noise: Noise, salt: str) -> dict[str, np.ndarray]:
    """All tensors of a LoRA file. strength is the standard deviation of the change relative to the weights' own."""
    tensors = {}
    alpha = lora.alpha if style == "kohya" else lora.rank  # the other two formats carry none
    up_std = strength * lora.rank**0.5 / alpha
    for target in lora_targets(size, lora.parts, lora.modules):
        down, up, alpha_name = lora_keys(target, style)
        rows, columns, *kernel = target.shape
        down_std = (columns * float(np.prod(kernel))) ** -0.5
        tensors[down] = noise.normal(salt + down, (lora.rank, columns, *kernel), down_std)
        tensors[up] = noise.normal(salt + up, (rows, lora.rank, *[1 for _ in kernel]), up_std)
        if alpha_name:
            tensors[alpha_name] = np.float16(alpha)
    return tensors


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    """Write float16 arrays as safetensors."""
    write_safetensors(path, {k: np.shape(v) for k, v in tensors.items()}, lambda name, _: tensors[name])
    return path


def write_lora(
    path: Path,
    style: str = "kohya",
    lora: Lora = Lora(4, 2.0),
    size: str = "tiny",
    strength: float = 0.3,
    seed: int = 0,
) -> Path:
    """Write one good LoRA; style is kohya, peft or diffusers (their ways to name the tensors)."""
    return write_tensors(path, lora_tensors(lora, style, size, strength, Noise(seed, "tiny"), path.name))


BAD_LORAS = (
    "sd15",
    "flux",
    "half",
    "nan",
    "inf",
    "no_keys",
    "empty",
    "html",
    "truncated",
)


def write_bad_lora(path: Path, kind: str, size: str = "tiny") -> Path:
    """Write a file that must not go into the stack; kind is one of BAD_LORAS."""
    good = lora_tensors(Lora(4, 2.0), "kohya", size, 0.3, Noise(0, "tiny"), kind)
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "html":
        path.write_bytes(b"<!doctype html><html><body>Sign in to Civitai</body></html>")
    elif kind == "truncated":
        path.write_bytes(write_tensors(path, good).read_bytes()[:-1000])
    else:
        write_tensors(path, bad_tensors(good)[kind])
    return path


def bad_tensors(good: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Kind -> tensors that are not those of an SDXL LoRA, or broken; made from a good file's."""
    ups = [name for name in good if name.endswith("lora_up.weight")]
    last = ups[-1]
    one_value = np.arange(good[last].size).reshape(good[last].shape) == 0
    sd15 = "lora_unet_down_blocks_{}_attentions_0_transformer_blocks_0_attn2_to_k"  # named after diffusers' blocks
    return {
        "sd15": kohya_module(sd15.format(0), 320, 768) | kohya_module(sd15.format(1), 640, 768),
        "flux": kohya_module("lora_unet_double_blocks_0_img_attn_proj", 3072, 3072),
        "half": {name: tensor for name, tensor in good.items() if name != last},
        "nan": good | {last: np.where(one_value, np.float16("nan"), good[last])},
        "inf": good | {last: np.where(one_value, np.float16("inf"), good[last])},
        "no_keys": {"model.weight": np.ones((4, 4), np.float16)},
    }


def kohya_module(name: str, rows: int, columns: int, rank: int = 4) -> dict[str, np.ndarray]:
    """One module of a Kohya file."""
    return {
        f"{name}.lora_down.weight": np.full((rank, columns), 0.01, np.float16),
        f"{name}.lora_up.weight": np.full((rows, rank), 0.01, np.float16),
        f"{name}.alpha": np.float16(rank),
    }


# ---------------------------------------------------------------------------------------------------------------------
# configuration folder


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write one configuration file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2))


def clip_vocabulary() -> tuple[dict[str, int], list[str]]:
    """CLIP's real vocabulary and merges; open_clip is found, not imported: its dependency ftfy changes token ids."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        raise ModuleNotFoundError("the CLIP vocabulary is in: pip install --no-deps open_clip_torch==3.3.0")
    packed = Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    merges = gzip.decompress(packed.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    symbols = list(bytes_to_unicode().values())
    tokens = [*symbols, *(s + "</w>" for s in symbols), *("".join(m.split()) for m in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}, merges


def write_tokenizer(folder: Path, pad_token: str) -> None:
    """A slow CLIPTokenizer as SDXL base has it."""
    vocabulary, merges = clip_vocabulary()
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad_token,
    }
    write_json(folder / "tokenizer_config.json", config)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


def write_configuration(folder: Path, size: str) -> None:
    """The folder for SDXL_CONFIG."""
    write_json(folder / "model_index.json", {"_class_name": "StableDiffusionXLPipeline", **MODEL_INDEX})
    scheduler = {"_class_name": "EulerDiscreteScheduler", **SCHEDULER}
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    for component, config in configs(size).items():
        write_json(folder / component / "config.json", config)
    write_tokenizer(folder / "tokenizer", "<|endoftext|>")
    write_tokenizer(folder / "tokenizer_2", "!")


# ---------------------------------------------------------------------------------------------------------------------
# the world


@dataclass(frozen=True)
class World:
    """Where everything lies. store is a filled MODEL_CACHE_DIR: read it, or copy it, but leave it as it is."""

    folder: Path
    size: str

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def config(self) -> Path:
        return self.folder / "config"

    @property
    def vae(self) -> Path:
        return self.folder / "vae"

    @property
    def checkpoint(self) -> Path:
        return self.store / "checkpoints" / handler.CHECKPOINT_CONFIG["filename"]

    @property
    def loras(self) -> list[Path]:
        """The nine, in the table's order."""
        return [self.store / "loras" / config["filename"] for config in handler.LORA_CONFIGS]

    @property
    def files(self) -> dict[int, Path]:
        """Civitai version id -> file: what a CivitaiServer serves."""
        configs = [handler.CHECKPOINT_CONFIG, *handler.LORA_CONFIGS]
        paths = [self.checkpoint, *self.loras]
        ids = [int(re.search(r"/models/(\d+)", config["url"])[1]) for config in configs]
        return dict(zip(ids, paths, strict=True))

    def environ(self, base_url: str = "http://127.0.0.1:9", store: Path | None = None) -> dict[str, str]:
        """A worker's settings. Without a store of its own it finds every file in place; port 9 answers nobody."""
        return {
            "CIVITAI_BASE_URL": base_url,
            "CIVITAI_API_KEY": API_KEY,
            "MODEL_CACHE_DIR": str(store or self.store),
            "SDXL_CONFIG": str(self.config),
            "VAE_MODEL": str(self.vae),
            "ALLOW_CPU": "1",
        }


def build_world(folder: str | Path, size: str = "tiny", seed: int = 0) -> World:
    """Write the world below folder, or find the one that this very file wrote before."""
    built = build_once(folder, f"{size}-{seed}", [Path(__file__)], lambda draft: write_world(World(draft, size), seed))
    return World(built, size)


def build_once(folder: str | Path, name: str, sources: list[Path], write: Callable[[Path], None]) -> Path:
    """The folder <name>-<version> below folder; write makes it, unless these very sources did before."""
    version = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]
    final = Path(folder).resolve() / f"{name}-{version}"
    final.parent.mkdir(parents=True, exist_ok=True)
    with (final.parent / f".{name}.lock").open("w") as lock:  # of several processes one builds it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not final.exists():
            draft = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
            write(draft)
            draft.rename(final)  # all or nothing: a killed builder does no harm
            for old in final.parent.glob(f"{name}-*"):
                if old != final:
                    shutil.rmtree(old, ignore_errors=True)
    return final


def write_world(world: World, seed: int) -> None:
    """Write all files of the world."""
    noise = Noise(seed, world.size)
    write_safetensors(world.checkpoint, original_shapes(world.size), noise.weight)
    for path, lora, config in zip(world.loras, LORAS, handler.LORA_CONFIGS, strict=True):
        write_tensors(path, lora_tensors(lora, "kohya", world.size, 0.3 / config["scale"], noise, path.name))
    write_configuration(world.config, world.size)
    write_json(world.vae / "config.json", configs(world.size)["vae"] | {"force_upcast": False})
    shapes = {w.name: w.shape for w in weights(world.size) if w.component == "vae"}
    other = Noise(seed + 1, world.size)
    write_safetensors(world.vae / "diffusion_pytorch_model.safetensors", shapes, other.weight)
