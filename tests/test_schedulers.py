"""Schedulers: each name gives the sampler it says, at any number of steps, whatever the job before asked for."""

import inspect
import re
from pathlib import Path

import diffusers
import pytest
import torch

import handler

STEPS = (1, 2, 5, 24, 50, 150)
SPREAD = 0.7  # standard deviation of the data that the ideal denoiser was "trained" on
SDXL = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "use_karras_sigmas": False,
    "clip_sample": False,
    "trained_betas": None,
}  # stabilityai/stable-diffusion-xl-base-1.0, scheduler/scheduler_config.json


@pytest.fixture(scope="module")
def base():
    """The configuration of SDXL's own scheduler, as a pipeline holds it."""
    return diffusers.EulerDiscreteScheduler.from_config(SDXL).config


def noise_level(scheduler, timestep: float) -> torch.Tensor:
    """Sigma at a timestep, between the trained ones too."""
    sigmas = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt().log()
    below = int(timestep)
    return torch.lerp(sigmas[below], sigmas[min(below + 1, 999)], timestep - below).exp()


def sample(scheduler, steps: int, seed: int = 0) -> torch.Tensor:
    """Denoises 4,096 numbers with the ideal denoiser of Gaussian data: what comes out is spread as the data is."""
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 4, 32, 32, generator=generator) * scheduler.init_noise_sigma
    kwargs = {"generator": [generator]} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for timestep in scheduler.timesteps:
        sigma = noise_level(scheduler, float(timestep))
        alpha = (1 + sigma**2).rsqrt()
        model_input = scheduler.scale_model_input(x, timestep)
        eps = model_input * sigma * alpha / (alpha**2 * SPREAD**2 + sigma**2 * alpha**2)
        x = scheduler.step(eps, timestep, x, **kwargs, return_dict=False)[0]
    return x


@pytest.mark.parametrize("name", handler.SCHEDULERS)
def test_every_scheduler_removes_the_noise(base, name):
    """Finite at every number of steps; at 50 the result has the data's spread, so scale and formulas are right."""
    for steps in STEPS:
        x = sample(handler.build_scheduler(name, base, steps), steps)
        assert torch.isfinite(x).all(), steps
        if steps == 50 and name != "LCM":  # which draws from a distilled model only
            assert x.std().item() == pytest.approx(SPREAD, abs=0.09)


@pytest.mark.parametrize("name", handler.SCHEDULERS)
def test_one_step_starts_in_the_noise(base, name):
    """A single step takes the whole noise away: the mean of the data, not a picture of noise."""
    scheduler = handler.build_scheduler(name, base, 1)
    assert sample(scheduler, 1).std().item() < 0.1
    assert float(scheduler.timesteps[0]) >= 990


def karras(scheduler, steps: int) -> torch.Tensor:
    """k-diffusion's get_sigmas_karras with A1111's rho of 7."""
    low, high = (noise_level(scheduler, t).double() ** (1 / 7) for t in (0, 999))
    return torch.cat([(high + torch.linspace(0, 1, steps).double() * (low - high)) ** 7, torch.zeros(1)])


def k_diffusion_dpmpp_2m(x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """k-diffusion's sample_dpmpp_2m on the ideal denoiser; x has the variance of sigmas[0]."""
    previous = None
    for i in range(len(sigmas) - 1):
        denoised = x * SPREAD**2 / (SPREAD**2 + sigmas[i] ** 2)
        h = sigmas[i].log() - sigmas[i + 1].log()
        extrapolated = denoised
        if previous is not None and sigmas[i + 1] > 0:
            r = (sigmas[i - 1].log() - sigmas[i].log()) / h
            extrapolated = (1 + 1 / (2 * r)) * denoised - previous / (2 * r)
        x = sigmas[i + 1] / sigmas[i] * x - (-h).expm1() * extrapolated
        previous = denoised
    return x


@pytest.mark.parametrize("steps", [2, 5, 24, 150])
def test_the_default_is_a1111s_dpmpp_2m_karras(base, steps):
    """DPM++ 2M Karras runs on k-diffusion's sigmas and gives k-diffusion's result."""
    scheduler = handler.build_scheduler(handler.DEFAULT_SCHEDULER, base, steps)
    scheduler.set_timesteps(steps)
    sigmas = karras(scheduler, steps)
    assert torch.allclose(scheduler.sigmas.double(), sigmas, rtol=1e-5)
    x = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    ours = x.clone()
    for i, timestep in enumerate(scheduler.timesteps):
        sigma = sigmas[i]
        ours = scheduler.step(ours * sigma * (1 + sigma**2).sqrt() / (SPREAD**2 + sigma**2), timestep, ours)[0]
    theirs = k_diffusion_dpmpp_2m(x * (1 + sigmas[0] ** 2).sqrt(), sigmas)
    assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("steps", [2, 5, 24, 150])
@pytest.mark.parametrize("name", ["Euler", "Euler a", "Heun", "DPM2", "DPM2 a"])
def test_plain_names_start_and_end_where_a1111_does(base, name, steps):
    """A1111's uniform sigmas: the network's timesteps evenly from 999 to 0, then no noise."""
    scheduler = handler.build_scheduler(name, base, steps)
    scheduler.set_timesteps(steps)
    expected = torch.stack([noise_level(scheduler, t) for t in torch.linspace(999, 0, steps).tolist()])
    for sigma in expected:
        assert torch.isclose(scheduler.sigmas, sigma, rtol=2e-3).any()
    assert scheduler.sigmas[0] == pytest.approx(expected[0].item(), rel=1e-4) and scheduler.sigmas[-1] == 0


@pytest.mark.parametrize("name", [name for name in handler.SCHEDULERS if name.endswith(("Karras", "Exponential"))])
def test_karras_and_exponential_span_all_sigmas(base, name):
    """From the highest trained sigma to the lowest, as in k-diffusion, not from where SDXL's own spacing begins."""
    scheduler = handler.build_scheduler(name, base, 24)
    scheduler.set_timesteps(24)
    assert scheduler.sigmas[0] == pytest.approx(noise_level(scheduler, 999).item(), rel=1e-3)
    lowest = scheduler.sigmas[scheduler.sigmas > 0].min()
    assert lowest == pytest.approx(noise_level(scheduler, 0).item(), rel=1e-2)


@pytest.mark.parametrize("name", handler.SCHEDULERS)
def test_the_checkpoints_prediction_type_stays(name):
    """A v-prediction checkpoint with a zero terminal SNR is sampled as one, and its configuration is left as it was."""
    config = diffusers.EulerDiscreteScheduler.from_config(
        {**SDXL, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    ).config
    before = dict(config)
    built = handler.build_scheduler(name, config, 24)
    assert built.config.prediction_type == "v_prediction"
    assert built.config.get("rescale_betas_zero_snr", True) is True
    assert dict(config) == before


def test_no_scheduler_alters_the_next(base):
    """After any other scheduler has run, the default one gives the same numbers."""
    first = sample(handler.build_scheduler(handler.DEFAULT_SCHEDULER, base, 5), 5)
    for name in handler.SCHEDULERS:
        sample(handler.build_scheduler(name, base, 2), 2)
        assert torch.equal(first, sample(handler.build_scheduler(handler.DEFAULT_SCHEDULER, base, 5), 5)), name


@pytest.mark.parametrize("name", handler.SCHEDULERS)
def test_noise_of_a_batch_is_each_images_own(base, name):
    """Ancestral and SDE samplers draw each image's noise from its generator: image 1 of a batch is image 1 alone."""
    drawn = []
    for seeds in ([7, 8], [8]):
        scheduler = handler.build_scheduler(name, base, 4)
        scheduler.set_timesteps(4)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        x = torch.cat([torch.randn(1, 4, 8, 8, generator=generator) for generator in generators])
        kwargs = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
        for timestep in scheduler.timesteps:
            x = scheduler.step(0.5 * x, timestep, x, **kwargs, return_dict=False)[0]
        drawn.append(x[-1])
    assert torch.allclose(*drawn, atol=1e-5)


def one_name_a_class() -> list[str]:
    """The first name of each class and algorithm."""
    first = {(kind, extra.get("algorithm_type")): name for name, (kind, extra) in reversed(handler.SCHEDULERS.items())}
    return sorted(first.values())


class Steps(handler.Observer):
    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def step(self, step: int, steps: int) -> None:
        self.seen.append((step, steps))


def job(scheduler: str, observer: handler.Observer, **fields) -> dict:
    fields = {"prompt": "a cat", "width": 256, "height": 256, "steps": 3, "seed": 7, **fields}
    return handler.run_job({"id": "test", "input": {**fields, "scheduler": scheduler}}, observer)


@pytest.mark.usefixtures("pipe")
@pytest.mark.parametrize("name", one_name_a_class())
def test_jobs_run_with_every_class(name):
    """Each class gives a picture, progress ends at the steps asked for, and the next job is not altered."""
    control = job(handler.DEFAULT_SCHEDULER, handler.Observer())["images"]
    steps = Steps()
    answer = job(name, steps)
    assert "error" not in answer and answer["metadata"]["scheduler"] == name
    assert [step for step, _ in steps.seen] == sorted(step for step, _ in steps.seen)
    assert steps.seen[-1] == (3, 3) and all(total == 3 for _, total in steps.seen)
    assert job(handler.DEFAULT_SCHEDULER, handler.Observer())["images"] == control


OFFICIAL = {"PNDM", "DDIM", "K_EULER", "K_EULER_ANCESTRAL", "DPMSolverMultistep", "DPMSolverSinglestep"}


def test_the_official_workers_names_are_known():
    """A job for RunPod's own SDXL worker names a scheduler that this one knows."""
    assert set(handler.SCHEDULERS) >= OFFICIAL


@pytest.mark.parametrize("name", sorted(OFFICIAL))
def test_official_names_space_the_steps_as_there(base, name):
    """K_EULER and the like keep the checkpoint's own spacing, so that a client sees the same picture as before."""
    kind = handler.SCHEDULERS[name][0]
    theirs = getattr(diffusers, kind).from_config(base)
    ours = handler.build_scheduler(name, base, 24)
    theirs.set_timesteps(24)
    ours.set_timesteps(24)
    assert torch.equal(ours.timesteps, theirs.timesteps)


@pytest.mark.parametrize("given", ["DPM++ 2M Karras", "dpm++ 2m karras", " DPM++ 2M KARRAS "])
def test_capitals_do_not_matter(given):
    """Names are taken in any case, and metadata gets the one spelling."""
    assert handler.scheduler_name("scheduler", given) == "DPM++ 2M Karras"
    assert len({name.lower() for name in handler.SCHEDULERS}) == len(handler.SCHEDULERS)


@pytest.mark.parametrize("given", ["KLMS", "klms", "LMS", "LMS Karras"])
def test_lms_is_refused_with_its_reason(given):
    """KLMS needs SciPy: the sentence says so and names what to take instead."""
    with pytest.raises(handler.InvalidInput, match=f"sampler {given} needs SciPy.*K_EULER"):
        handler.scheduler_name("sampler", given)


@pytest.mark.parametrize("given", ["DPM++ 2M Kerras", "", 5, None, True, ["Euler"]])
def test_unknown_names_are_refused(given):
    """Anything else is InvalidInput; a misspelt name gets the nearest as a hint."""
    with pytest.raises(handler.InvalidInput) as caught:
        handler.scheduler_name("scheduler", given)
    assert ("did you mean" in str(caught.value)) == (given == "DPM++ 2M Kerras")


README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_readme_lists_exactly_these():
    """The README's table between its <!-- schedulers --> markers, each sampler with each of its schedules, is the
    table of handler.py."""
    section = re.search(r"<!-- schedulers -->(.*?)<!-- /schedulers -->", README, re.DOTALL)
    listed = []
    for samplers, schedules in re.findall(r"^\| (`.*) \| (.*) \|$", section[1], re.MULTILINE):
        assert schedules.startswith("none"), "every sampler goes by its plain name too"
        listed += re.findall(r"`([^`]+)`", samplers)
        listed += [f"{a} {b}" for a in re.findall(r"`([^`]+)`", samplers) for b in re.findall(r"`([^`]+)`", schedules)]
    assert sorted(listed) == sorted(handler.SCHEDULERS)
