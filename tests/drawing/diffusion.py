"""What the UNet learns from: scenes with captions, and the loss of predicting the noise in their latents."""

from __future__ import annotations

import random

import torch
from torch.nn import functional

from drawing import model, scenes

# ---------------------------------------------------------------------------------------------------------------------
# data


class Pool:
    """Scenes of one size and their latents; it grows while the training goes on, up to 12,000 scenes."""

    def __init__(self, width: int, height: int, pair_share: float, seed: int, outline: bool = False) -> None:
        self.width, self.height, self.pair_share, self.outline = width, height, pair_share, outline
        self.rng = random.Random(seed)
        self.scenes: list[scenes.Scene] = []
        self.latents: list[torch.Tensor] = []

    def grow(self, count: int) -> None:
        """Draw count more scenes; in a full pool they take the place of others."""
        for _ in range(count):
            scene = scenes.random_scene(self.rng, self.pair_share)
            picture = torch.from_numpy(scenes.draw(scene, self.width, self.height, self.outline))
            latent = model.latents_of(picture[None])[0]
            if len(self.scenes) < 12_000:
                self.scenes.append(scene)
                self.latents.append(latent)
            else:
                place = self.rng.randrange(len(self.scenes))
                self.scenes[place], self.latents[place] = scene, latent

    def batch(self, count: int) -> tuple[list[scenes.Scene], torch.Tensor]:
        """count scenes and their latents, (count, 4, height/8, width/8)."""
        picks = [self.rng.randrange(len(self.scenes)) for _ in range(count)]
        return [self.scenes[i] for i in picks], torch.stack([self.latents[i] for i in picks])


def prompt_ids(rng: random.Random, scene: scenes.Scene) -> list[int]:
    """Token ids of a caption, at most 75; one in ten has a lot of decoration before it."""
    ids = model.token_ids(scenes.caption(rng, scene, model.random_words()))
    if rng.random() < 0.1 and len(ids) < 40:
        decoration = ", ".join(scenes.filler(rng, model.random_words()) for _ in range(rng.randrange(1, 14)))
        ids = model.token_ids(decoration + ",")[: model.MAX_TOKENS - len(ids)] + ids
    return ids[: model.MAX_TOKENS]


# ---------------------------------------------------------------------------------------------------------------------
# loss

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
KEPT = torch.cumprod(1 - BETAS, 0)
"""Share of the picture's variance that is left at each of SDXL's 1,000 timesteps."""

NO_PROMPT_SHARE = 0.1
PURE_NOISE_SHARE = 0.04
OFFSET_NOISE = 0.05
MAX_LOSS_WEIGHT = 40.0
EDGE_WEIGHT = 2.0


def edges(latents: torch.Tensor) -> torch.Tensor:
    """(n, 4, h, w) -> (n, 1, h, w): 0 on plain areas, up to 1 where colours meet."""
    contrast = functional.max_pool2d(latents, 3, 1, 1) + functional.max_pool2d(-latents, 3, 1, 1)
    return contrast.amax(1, keepdim=True).clamp(max=1)


def diffusion_loss(unet: torch.nn.Module, latents: torch.Tensor, hidden: torch.Tensor, pooled: torch.Tensor):
    """The loss of predicting the noise, one number. Early timesteps, which decide on colours and shapes, count more.

    One in ten pictures has no prompt: zeros, which is what SDXL takes for an empty negative prompt. Some start from
    noise alone, as sampling does, though SDXL's last timestep still holds a little of the picture.
    """
    n, _, h, w = latents.shape
    t = (1000 * ((torch.arange(n) + torch.rand(n)) / n) ** 0.8).long().clamp(max=999)
    alone = torch.rand(n) < PURE_NOISE_SHARE
    t = torch.where(alone, torch.randint(940, 1000, (n,)), t)
    noise = torch.randn_like(latents) + OFFSET_NOISE * torch.randn(n, 4, 1, 1)
    kept = KEPT[t][:, None, None, None]
    noisy = torch.where(alone[:, None, None, None], noise, kept.sqrt() * latents + (1 - kept).sqrt() * noise)
    target = (noisy - kept.sqrt() * latents) / (1 - kept).sqrt()
    prompted = (torch.rand(n) >= NO_PROMPT_SHARE).float()
    conditions = {
        "text_embeds": pooled * prompted[:, None],
        "time_ids": torch.tensor([[8.0 * h, 8.0 * w, 0, 0, 8.0 * h, 8.0 * w]]).expand(n, 6),
    }
    guess = unet(noisy, t, hidden * prompted[:, None, None], added_cond_kwargs=conditions, return_dict=False)[0]
    where = 1 + EDGE_WEIGHT * edges(latents)
    loss = (where * (guess - target).square()).mean((1, 2, 3)) / where.mean((1, 2, 3))
    noise_to_picture = (1 - kept).flatten() / kept.flatten()
    return ((1 + noise_to_picture).clamp(max=MAX_LOSS_WEIGHT) * loss).mean() / 4
