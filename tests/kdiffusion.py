"""k-diffusion and torchsde, called as A1111 1.10 calls them: what handler.py's samplers are measured against.

k-diffusion is installed without its dependencies (CLIP, wandb, scikit-image and many more): its sampling.py and
external.py are imported alone, and what these import without using it here is an empty module. SciPy's quad, which LMS
asks for the integral of a cubic, is numpy's Gauss-Legendre: the worker runs without SciPy, so its tests do too.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import tqdm.auto  # noqa: F401 - imported here, it stays when the empty modules go
from torchsde._brownian import brownian_interval


def quad(f: Callable[[float], float], low: float, high: float, **_: Any) -> tuple[float]:
    """The integral of f, exact for a polynomial of degree 15; in scipy.integrate's place."""
    nodes, weights = np.polynomial.legendre.leggauss(8)
    low, half = float(low), (float(high) - float(low)) / 2
    return (half * sum(w * float(f(np.float64(low + half * (x + 1)))) for x, w in zip(nodes, weights, strict=True)),)


def load_k_diffusion() -> tuple[Any, Any]:
    """k_diffusion.sampling and k_diffusion.external, without k_diffusion/__init__.py."""
    names = "k_diffusion scipy scipy.integrate torchdiffeq torchvision torchvision.transforms"
    modules = {name: types.ModuleType(name) for name in names.split()}
    modules["k_diffusion"].__path__ = [str(Path(importlib.util.find_spec("k_diffusion").origin).parent)]
    modules["scipy"].integrate = modules["scipy.integrate"]
    modules["scipy.integrate"].quad = quad
    modules["torchdiffeq"].odeint = modules["torchvision.transforms"].functional = None
    with patch.dict(sys.modules, modules):
        return importlib.import_module("k_diffusion.sampling"), importlib.import_module("k_diffusion.external")


sampling, external = load_k_diffusion()
SHAPE = (4, 8, 8)  # an image's latents

# A1111's sampler -> k-diffusion's function and what it is called with (sd_samplers_kdiffusion.py)
FUNCTIONS = {
    "Euler": (sampling.sample_euler, {}),
    "Euler a": (sampling.sample_euler_ancestral, {}),
    "Heun": (sampling.sample_heun, {}),
    "LMS": (sampling.sample_lms, {}),
    "DPM2": (sampling.sample_dpm_2, {}),
    "DPM2 a": (sampling.sample_dpm_2_ancestral, {}),
    "DPM++ 2S a": (sampling.sample_dpmpp_2s_ancestral, {}),
    "DPM++ 2M": (sampling.sample_dpmpp_2m, {}),
    "DPM++ SDE": (sampling.sample_dpmpp_sde, {}),
    "DPM++ 2M SDE": (sampling.sample_dpmpp_2m_sde, {}),
    "DPM++ 2M SDE Heun": (sampling.sample_dpmpp_2m_sde, {"solver_type": "heun"}),
    "DPM++ 3M SDE": (sampling.sample_dpmpp_3m_sde, {}),
}
SDE = [name for name in FUNCTIONS if name.endswith(("SDE", "SDE Heun"))]
ANCESTRAL = [name for name in FUNCTIONS if name.endswith(" a")]
DISCARD = ["DPM2", "DPM2 a", "DPM++ 3M SDE"]  # discard_next_to_last_sigma
AYS = [14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029]


def alphas_cumprod() -> torch.Tensor:
    """SDXL's ᾱ as A1111 holds it: computed in float64, kept in float32."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return torch.tensor(np.cumprod(1 - betas), dtype=torch.float32)


class Network:
    """A network that is a formula: the ideal denoiser of numbers around ±0.5, in float32. It is told x / √(1 + σ²) and
    a time, as SDXL's UNet, and predicts eps, or v."""

    def __init__(self, prediction_type: str = "epsilon", alphas: torch.Tensor | None = None) -> None:
        self.prediction_type = prediction_type
        self.alphas = alphas_cumprod() if alphas is None else alphas
        self.log_sigmas = (((1 - self.alphas) / self.alphas) ** 0.5).log()

    def __call__(self, scaled: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        time = torch.as_tensor(time).flatten()[0].float()
        below = int(time.clamp(0, 998))
        sigma = torch.lerp(self.log_sigmas[below], self.log_sigmas[below + 1], time - below).exp()
        x = scaled * (1 + sigma**2) ** 0.5
        spread = 0.49 + sigma**2
        denoised = (0.49 * x + sigma**2 * 0.5 * torch.tanh(0.5 * x / spread)) / spread
        eps = (x - denoised) / sigma
        return eps if self.prediction_type == "epsilon" else (eps - sigma * denoised) / (1 + sigma**2) ** 0.5


def sigmas_of(schedule: str, steps: int, model: Any) -> torch.Tensor:
    """The schedule as A1111's sd_schedulers.py computes it with k-diffusion's denoiser."""
    low, high = model.sigmas[0].item(), model.sigmas[-1].item()
    start, end = model.sigma_to_t(torch.tensor(high)), model.sigma_to_t(torch.tensor(low))
    if schedule in ("Karras", "Exponential", "Polyexponential"):
        return getattr(sampling, f"get_sigmas_{schedule.lower()}")(steps, low, high)
    if schedule == "Uniform":
        return model.get_sigmas(steps)
    if schedule == "SGM Uniform":
        values = [model.t_to_sigma(t) for t in torch.linspace(start, end, steps + 1)[:-1]]
    elif schedule == "Simple":
        values = [model.sigmas[-(1 + int(i * len(model.sigmas) / steps))] for i in range(steps)]
    elif schedule == "Align Your Steps":
        ups = np.interp(np.linspace(0, 1, steps), np.linspace(0, 1, len(AYS)), np.log(AYS[::-1]))
        values = np.exp(ups)[::-1].copy() if steps > 1 else AYS[:1]  # the contract: one step from the largest σ
    elif schedule == "KL Optimal":
        low, high = torch.arctan(torch.tensor(low)), torch.arctan(torch.tensor(high))
        done = torch.arange(steps + 1) / steps
        return torch.tan(done * low + (1.0 - done) * high)
    return torch.FloatTensor([*values, 0.0])


Stream = Callable[[], torch.Tensor]


def cpu_stream(seed: int, shape: tuple[int, ...]) -> Stream:
    """A1111's "RNG: CPU"."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator)


def run(
    sampler: str,
    schedule: str,
    steps: int,
    seeds: list[int],
    network: Network | None = None,
    stream: Callable[[int, tuple[int, ...]], Stream] = cpu_stream,
    delta: int = 0,
) -> torch.Tensor:
    """A1111's last latents (n, 4, 8, 8), from the seeds alone. delta: its ENSD; stream: where its noise is drawn."""
    network = network or Network()
    kind = external.DiscreteEpsDDPMDenoiser if network.prediction_type == "epsilon" else external.DiscreteVDDPMDenoiser
    model = kind(network, network.alphas, quantize=False)
    sigmas = sigmas_of(schedule, steps + (sampler in DISCARD), model)
    if sampler in DISCARD:
        sigmas = torch.cat([sigmas[:-2], sigmas[-1:]])
    streams = [stream(seed, SHAPE) for seed in seeds]
    x = torch.stack([draw() for draw in streams]) * sigmas[0]
    if delta:
        streams = [stream(seed + delta, SHAPE) for seed in seeds]
    function, options = FUNCTIONS[sampler]
    if sampler in SDE:
        if sampler != "DPM++ SDE" and len(sigmas) == 2 and sigmas[1] == 0:
            return model(x, sigmas[0].expand(len(x)))  # what k-diffusion means to do, and fails at
        ends = sigmas[sigmas > 0].min(), sigmas.max()
        options = options | {"noise_sampler": brownian_noise(x, ends, seeds, stream)}
    elif sampler in ANCESTRAL:
        options = options | {"noise_sampler": lambda *_: torch.stack([draw() for draw in streams])}
    return function(model, x, sigmas, disable=True, **options)


def brownian_noise(x: torch.Tensor, ends: Any, seeds: list[int], stream: Any) -> Callable[..., torch.Tensor]:
    """k-diffusion's noise sampler on torchsde's trees, whose nodes A1111 lets its own RNG fill."""

    def randn(size: tuple[int, ...], dtype: torch.dtype, device: Any, seed: int) -> torch.Tensor:
        return stream(int(seed), size)().to(dtype)

    def noise(*sigmas: torch.Tensor) -> torch.Tensor:
        with patch.object(brownian_interval, "_randn", randn), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a time beyond the tree's rounded ends is moved there
            return sampler(*sigmas)

    with patch.object(brownian_interval, "_randn", randn):
        sampler = sampling.BrownianTreeNoiseSampler(x, *ends, seed=seeds)
    return noise


def run_ddim(steps: int, seeds: list[int]) -> torch.Tensor:
    """A1111's DDIM with eta 0 (sd_samplers_timesteps_impl.py), in its own terms."""
    network = Network()
    times = [min(t + 1, 999) for t in range(0, 1000, 1000 // steps)]
    x = torch.stack([cpu_stream(seed, SHAPE)() for seed in seeds])
    for time, following in zip(times[:0:-1], times[-2::-1], strict=True):
        eps, a, a_next = network(x, torch.tensor(time)), network.alphas[time], network.alphas[following]
        x = a_next.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - a_next).sqrt() * eps
    return x


class ConsistencyDenoiser(external.DiscreteEpsDDPMDenoiser):
    """A1111's LCMCompVisDenoiser: 50 levels, whole times, and the consistency model's own scalings."""

    def __init__(self, network: Network) -> None:
        super().__init__(network, network.alphas[19::20], quantize=None)

    def sigma_to_t(self, sigma: torch.Tensor) -> torch.Tensor:
        distance = sigma.log() - self.log_sigmas[:, None]
        return distance.abs().argmin(dim=0).view(sigma.shape) * 20 + 19

    def t_to_sigma(self, t: torch.Tensor) -> torch.Tensor:
        return super().t_to_sigma(((t - 19) / 20).float().clamp(0, 49))

    def get_sigmas(self, n: int) -> torch.Tensor:
        return sampling.append_zero(self.t_to_sigma(torch.linspace(999, 19, n)))

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        time = self.sigma_to_t(sigma).float() * 10
        sigma = sigma[0]
        denoised = x - sigma * self.inner_model(x / (1 + sigma**2) ** 0.5, time / 10)
        scaled = time[0]
        return denoised * scaled / (scaled**2 + 0.25) ** 0.5 + x * 0.25 / (scaled**2 + 0.25)


def run_lcm(schedule: str, steps: int, seeds: list[int]) -> torch.Tensor:
    """A1111's LCM (sd_samplers_lcm.py)."""
    model = ConsistencyDenoiser(Network())
    sigmas = sigmas_of(schedule, steps, model)
    streams = [cpu_stream(seed, SHAPE) for seed in seeds]
    x = torch.stack([draw() for draw in streams]) * sigmas[0]
    for sigma, following in itertools.pairwise(sigmas):
        x = model(x, sigma.expand(len(x)))
        if following > 0:
            x = x + following * torch.stack([draw() for draw in streams])
    return x


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The relative error of the latents."""
    return ((ours - theirs).norm() / theirs.norm()).item()
