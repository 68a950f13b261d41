"""The VAE: an encoder set by hand, and a decoder that learns sharp edges.

Latents are what model.latents_of() says: the mean colours of 8x8 pixels. The encoder computes them with convolutions
set by hand; the decoder begins as a smooth enlargement of them and is trained to draw the edges within.
"""

from __future__ import annotations

import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn

from drawing import model, scenes

LATENT_SCALE = 0.13025
"""SDXL's scaling factor: the worker divides latents by it before it decodes them."""

CONSTANT = 2.0
"""Held in six channels, so that the one group of each norm has nearly the same mean and spread in every picture."""

STEPS, LR = 500, 5e-4
CROPS, CROP = 10, 64
"""Pictures per step, and their side in pixels."""


def linear_conv(conv: nn.Conv2d, kernel: torch.Tensor) -> None:
    """Set a convolution to the same kernel (3, 3) or (1, 1) for each channel of its own, and little from others."""
    channels = torch.arange(min(conv.in_channels, conv.out_channels))
    conv.bias.zero_()
    conv.weight[:12] *= 0.03
    conv.weight[:6] = 0
    conv.weight[channels, channels] += kernel


def set_linear(vae: AutoencoderKL) -> None:
    """Make encoder and decoder pass colours on: channels 0 to 2 hold them, 3 to 5 their negatives, 6 to 11 constants.

    silu(x) - silu(-x) = x: so the last layers get back what the norms and activations before them did not change.
    """
    rgb = torch.arange(3)
    blur = torch.outer(torch.tensor([0.25, 0.5, 0.25]), torch.tensor([0.25, 0.5, 0.25]))
    for name, module in vae.named_modules():
        if name.endswith((".conv2", "to_out.0")):  # the side branches begin with nothing
            module.weight.zero_()
            module.bias.zero_()
        elif name.endswith("quant_conv"):
            module.bias.zero_()
            module.weight.copy_(torch.eye(len(module.weight))[:, :, None, None])
        elif name.endswith("conv_in"):
            module.bias.zero_()
            module.bias[6:12] = CONSTANT * torch.tensor([1.0, -1.0] * 3)
            module.weight[:6] = 0
            module.weight[rgb, rgb, 1, 1] = 1
            module.weight[rgb + 3, rgb, 1, 1] = -1
        elif name.endswith("conv_shortcut"):
            linear_conv(module, torch.ones(1, 1))
        elif name.endswith("upsamplers.0.conv"):
            linear_conv(module, blur)
        elif name.endswith("downsamplers.0.conv"):  # diffusers pads at the right and at the bottom
            linear_conv(module, torch.tensor([[0.25, 0.25, 0], [0.25, 0.25, 0], [0, 0, 0]]))
        elif name.endswith("conv_out"):
            module.bias.zero_()
            module.weight.zero_()
            module.weight[rgb, rgb, 1, 1] = 1
            module.weight[rgb, rgb + 3, 1, 1] = -1
    vae.encoder.conv_out.weight[3] = vae.encoder.conv_out.weight[:3].mean(0) * 1.2


def as_signal(pictures: np.ndarray) -> torch.Tensor:
    """(n, h, w, 3) uint8 -> (n, 3, h, w) from -1 to 1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def set_gains(vae: AutoencoderKL, rng: random.Random) -> None:
    """Scale the last layers, since the norms changed the signal's size."""
    pictures = np.stack([scenes.draw(scenes.random_scene(rng), 128, 128) for _ in range(32)])
    signal, latents = as_signal(pictures), model.latents_of(torch.from_numpy(pictures))
    guess = vae.quant_conv(vae.encoder(signal))[:, :4]
    vae.encoder.conv_out.weight[:4] *= (guess * latents).sum() / guess.square().sum()
    guess = vae.decoder(vae.post_quant_conv(latents))
    vae.decoder.conv_out.weight *= (guess * signal).sum() / guess.square().sum()


def crops(rng: random.Random, count: int, side: int) -> np.ndarray:
    """(count, side, side, 3) uint8: parts of pictures around the edges of objects."""
    found = []
    while len(found) < count:
        size = rng.choice([192, 256, 256, 256, 320])
        scene = scenes.random_scene(rng, night_share=0.15)
        picture = scenes.draw(scene, size, size, outline=rng.random() < 0.25)
        for _ in range(2):
            thing, angle = rng.choice(scene.things), rng.uniform(0, 2 * math.pi)
            x0, y0 = scenes.PLACES[thing.place]
            reach = scene.radius(thing) * size
            x = x0 * size + reach * math.cos(angle) - side / 2 + rng.uniform(-side / 3, side / 3)
            y = y0 * size + reach * math.sin(angle) - side / 2 + rng.uniform(-side / 3, side / 3)
            left, top = (int(min(max(v, 0), size - side)) // 8 * 8 for v in (x, y))
            found.append(picture[top : top + side, left : left + side])
    return np.stack(found[:count])


def is_branch(name: str) -> bool:
    """Whether a parameter belongs to a side branch, which learns fast, or to the linear way through."""
    return any(part in name for part in (".conv1.", ".conv2.", ".norm1.", ".norm2.", "attentions"))


def train(out: Path) -> None:
    """Train the decoder; writes decoder.pt, the moving average of the whole VAE's weights, for LATENT_SCALE."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng = random.Random(0)
    vae = model.build("vae")
    with torch.no_grad():
        set_linear(vae)
    set_gains(vae, rng)
    named = [(n, p) for n, p in vae.named_parameters() if n.startswith("decoder.")]
    groups = [[p for n, p in named if is_branch(n)], [p for n, p in named if not is_branch(n)]]
    adam = torch.optim.AdamW([{"params": group} for group in groups], weight_decay=0.0)
    average = {name: value.clone() for name, value in vae.state_dict().items()}
    started, recent = time.monotonic(), []
    for step in range(STEPS):
        lr = LR * min(1, (step + 1) / 100) * max(0.02, min(1, (1 - step / STEPS) / 0.6))
        adam.param_groups[0]["lr"], adam.param_groups[1]["lr"] = lr, lr / 10
        if step % 6:
            pictures = crops(rng, CROPS, CROP)
        else:
            pictures = scenes.draw(scenes.random_scene(rng), 256, 256, outline=rng.random() < 0.2)[None]
        signal, latents = as_signal(pictures), model.latents_of(torch.from_numpy(pictures))
        latents = latents + 0.03 * torch.randn_like(latents)  # the UNet's are not exact either
        off = vae.decoder(vae.post_quant_conv(latents)) - signal
        (off.abs().mean() + off.square().mean()).backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in named], 0.5)
        adam.step()
        vae.zero_grad()
        recent = [*recent[-49:], off.abs().mean().item()]
        with torch.no_grad():
            for name, value in vae.state_dict().items():
                average[name].lerp_(value, 1 - min(0.99, (step + 1) / (step + 10)))
        if step % 50 == 0 or step + 1 == STEPS:
            seconds, error = time.monotonic() - started, sum(recent) / len(recent)
            print(f"decoder {step + 1}/{STEPS}: off by {error:.4f} (white to black: 2), {seconds:.0f} s", flush=True)
            torch.save(with_latent_scale(average), out / "decoder.pt")


def with_latent_scale(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a VAE whose latents are larger by 1 / LATENT_SCALE, with next to no variance."""
    weights = {name: value.clone() for name, value in weights.items()}
    weights["quant_conv.weight"][:4] /= LATENT_SCALE
    weights["quant_conv.bias"][:4] /= LATENT_SCALE
    weights["quant_conv.weight"][4:] = 0
    weights["quant_conv.bias"][4:] = -8  # the logarithm of the variance
    weights["post_quant_conv.weight"] *= LATENT_SCALE
    return weights
