"""A LoRA that draws outlines instead of filled shapes, trained on the finished model, in Kohya's format."""

from __future__ import annotations

import random
import time
from pathlib import Path

import torch
import world
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrize

from drawing import diffusion, model

RANK = 8
STEPS, BATCH, LR = 300, 8, 2e-3


class Change(nn.Module):
    """A weight plus up @ down; nothing is added in the beginning."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(RANK, *weight.shape[1:]) / weight[0].numel() ** 0.5)
        self.up = nn.Parameter(torch.zeros(len(weight), RANK))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + (self.up @ self.down.flatten(1)).view_as(weight)


def kohya_tensors(changes: dict[str, Change]) -> dict[str, torch.Tensor]:
    """Name of a UNet's weight -> its change, as the tensors of a LoRA file, float16."""
    tensors = {}
    for target in world.lora_targets(model.SIZE, ("unet",), "conv"):
        down, up, alpha = world.lora_keys(target, "kohya")
        change = changes[target.name]
        kernel = [1] * (change.down.ndim - 2)  # a convolution's up is one of 1x1
        tensors[down] = change.down.detach().half().contiguous()
        tensors[up] = change.up.detach().half().view(*change.up.shape, *kernel).contiguous()
        tensors[str(alpha)] = torch.tensor(float(RANK), dtype=torch.float16)
    return tensors


def train_outlines(drawer: model.Drawer, out: Path) -> None:
    """Train on pictures of outlines whose captions do not say so; writes outlines.safetensors."""
    torch.set_num_threads(1)
    torch.manual_seed(3)
    rng = random.Random(3)
    drawer.requires_grad_(False)
    changes = {}
    for target in world.lora_targets(model.SIZE, ("unet",), "conv"):
        module = drawer.unet.get_submodule(target.name.removesuffix(".weight"))
        changes[target.name] = Change(module.weight)
        parametrize.register_parametrization(module, "weight", changes[target.name])
    parameters = [p for change in changes.values() for p in change.parameters()]
    adam = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.0)
    pool = diffusion.Pool(256, 256, 0.25, 3, outline=True)
    pool.grow(128)
    started, recent = time.monotonic(), []
    for step in range(STEPS):
        pool.grow(4)
        batch, latents = pool.batch(BATCH)
        with torch.no_grad():
            encoded = drawer.encode([diffusion.prompt_ids(rng, scene) for scene in batch])
        loss = diffusion.diffusion_loss(drawer.unet, latents, *encoded)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.param_groups[0]["lr"] = LR * min(1, (step + 1) / 20) * min(1, 2 * (1 - step / STEPS))
        adam.step()
        adam.zero_grad()
        recent = [*recent[-24:], loss.item()]
        if step % 20 == 0 or step + 1 == STEPS:
            mean, seconds = sum(recent) / len(recent), time.monotonic() - started
            print(f"outlines {step + 1}/{STEPS}: loss {mean:.4f}, {seconds:.0f} s", flush=True)
            save_file(kohya_tensors(changes), out / "outlines.safetensors")
