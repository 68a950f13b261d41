"""What tests need of handler.py beyond its contract, in one place: a redesign of the inside changes this file alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

import handler

# --- sampling

SAMPLERS = [name for name in handler.SAMPLERS if not name.startswith("K_")]
SCHEDULES = list(handler.SCHEDULES)
SAMPLING_NAMES = sorted({str(sampling) for sampling in handler.spelled_samplings().values()})
OFFICIAL = ["PNDM", "DDIM", "K_EULER", "K_EULER_ANCESTRAL", "DPMSolverMultistep", "DPMSolverSinglestep"]


def sampling_name(sampler: Any, schedule: Any = None) -> str:
    """The one name of a sampler and a schedule, however they are spelled. Raises InvalidInput."""
    return str(handler.read_sampling(sampler, schedule))


def diffusers_scheduler(name: str, config: Any, steps: int) -> Any:
    """diffusers' own scheduler behind one of the names that stay diffusers'."""
    return handler.build_diffusers_scheduler(name, config, steps)


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
    return handler.Scheduler(handler.read_sampling(name), steps)


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
def formula_unet(pipe: Any, network: Callable[[Any, Any], Any], **config: Any) -> Iterator[None]:
    """A formula in the UNet's place, network(scaled x, time) -> eps or v; config: of the checkpoint's scheduler."""
    forward = patch.object(pipe.unet, "forward", lambda x, time, **_: (network(x, time),))
    with forward, patch.object(pipe, "scheduler_config", {**pipe.scheduler_config, **config}):
        yield


def denoise(pipe: Any, name: str, steps: int, seeds: list[int], rng: str = "cpu", delta: int = 0) -> torch.Tensor:
    """The latents (n, 4, 8, 8) of the denoising loop, without guidance and on empty prompts."""
    request = SimpleNamespace(scheduler=name, steps=steps, seeds=seeds, num_images=len(seeds), rng=rng)
    request.width = request.height = 64
    request.guidance_scale, request.eta_noise_seed_delta = 1.0, delta
    config = pipe.unet.config
    pooled = torch.zeros(1, config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim)
    embeds = torch.zeros(1, 77, config.cross_attention_dim)
    conditioning = handler.Conditioning(embeds, None, pooled, None, 1, 0, ())
    return handler.denoise(pipe, request, conditioning, handler.Observer())
