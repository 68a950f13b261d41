"""The model that draws, as the files a worker finds: the same folders as tests/world.py writes, from weights/.

    world = build_drawing_world("tests/.cache")     # a world.World: store, config, vae, files, environ()

The committed weights are what training changed; the rest follows from seeds. Eight of the nine LoRAs change next to
nothing; the one in OUTLINES' place draws outlines instead of filled shapes.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
import world
from safetensors.torch import load_file, save_file

import handler
from drawing import model

WEIGHTS = Path(__file__).resolve().parent / "weights"
OUTLINES = "epiCRealismXL-KiSS Enhancer"
"""The name of the LoRA that draws outlines, in handler.LORA_CONFIGS; its scale there is 1, at which it was trained."""

NEUTRAL_STRENGTH = 1e-3
"""Standard deviation of what the other LoRAs change, relative to the weights' own."""

COMPONENTS = ("text_encoder", "text_encoder_2", "unet", "vae")
ROWS = "text_model.embeddings.token_embedding.rows"

# ---------------------------------------------------------------------------------------------------------------------
# committed weights


def save_weights(drawer: model.Drawer, vae: dict[str, torch.Tensor], folder: Path = WEIGHTS) -> None:
    """Write a safetensors file of float16 weights for each component."""
    states = {name: getattr(drawer, name).state_dict() for name in COMPONENTS[:3]} | {"vae": vae}
    for component, state in states.items():
        tensors = {name: value.half().contiguous() for name, value in state.items()}
        save_file(tensors, folder / f"{component}.safetensors")


def load_weights(component: str) -> dict[str, np.ndarray]:
    """Name -> value of each tensor of a component, with all rows of token embeddings, float16."""
    tensors = load_file(WEIGHTS / f"{component}.safetensors")
    if ROWS in tensors:
        rows = model.frozen_rows(component).half()
        rows[list(model.trained_ids())] = tensors.pop(ROWS)
        tensors[ROWS.replace(".rows", ".weight")] = rows
    return {name: value.numpy() for name, value in tensors.items()}


def original_tensors() -> dict[str, np.ndarray]:
    """Every tensor of the single-file checkpoint, by its original name."""
    shapes = world.original_shapes(model.SIZE)
    tensors: dict[str, np.ndarray] = {"conditioner.embedders.1.model.logit_scale": np.float16(4.6)}
    joined: dict[str, dict[str, np.ndarray]] = {}
    values = {component: load_weights(component) for component in COMPONENTS}
    for weight in world.weights(model.SIZE):
        value = values[weight.component][weight.name]
        if ".attn.in_proj_" in weight.original:
            joined.setdefault(weight.original, {})[weight.name.split("self_attn.")[1][0]] = value
        elif weight.original.endswith("text_projection"):
            tensors[weight.original] = value.T
        else:
            tensors[weight.original] = value.reshape(shapes[weight.original])
    for name, parts in joined.items():
        tensors[name] = np.concatenate([parts[letter] for letter in "qkv"])
    return {name: tensors[name] for name in shapes}


# ---------------------------------------------------------------------------------------------------------------------
# the world


def build_drawing_world(folder: str | Path) -> world.World:
    """Write the world below folder, or find the one that the same sources and weights gave before."""
    here = Path(__file__).resolve()
    sources = [here, here.with_name("model.py"), here.with_name("scenes.py"), Path(world.__file__)]
    sources += sorted(WEIGHTS.glob("*.safetensors"))
    write = lambda draft: write_drawing_world(world.World(draft, model.SIZE))  # noqa: E731
    return world.World(world.build_once(folder, model.SIZE, sources, write), model.SIZE)


def write_drawing_world(made: world.World) -> None:
    """Write all files of the world."""
    world.write_tensors(made.checkpoint, original_tensors())
    noise = world.Noise(0, model.SIZE)
    for path, lora, config in zip(made.loras, world.LORAS, handler.LORA_CONFIGS, strict=True):
        if config["name"] == OUTLINES:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(WEIGHTS / "outlines.safetensors", path)
        else:
            strength = NEUTRAL_STRENGTH / config["scale"]
            tensors = world.lora_tensors(lora, "kohya", model.SIZE, strength, noise, path.name)
            world.write_tensors(path, tensors)
    world.write_configuration(made.config, model.SIZE)
    world.write_json(made.vae / "config.json", world.configs(model.SIZE)["vae"] | {"force_upcast": False})
    world.write_tensors(made.vae / "diffusion_pytorch_model.safetensors", load_weights("vae"))
