"""Sampling: k-diffusion's last latents from the seed alone, by every sampler and schedule, whatever else is in a batch.

The oracle is k-diffusion with torchsde (kdiffusion.py) on a network that is a formula. The worker runs its own loop:
diffusers' pipeline with the formula in the UNet's place.
"""

import functools
import re
import threading
from pathlib import Path

import diffusers
import kdiffusion
import pytest
import seams
import torch
from kdiffusion import Network, error

import handler

SEEDS = [7, 8]
README = Path(__file__).parent.parent / "README.md"
ODE = [name for name in kdiffusion.FUNCTIONS if name not in kdiffusion.SDE]


@pytest.fixture
def formula(pipe):
    """The worker's engine with the formula in the UNet's place."""
    with seams.formula_engine(Network()) as engine:
        yield engine


def gpu_stream(seed: int, shape: tuple[int, ...]) -> kdiffusion.Stream:
    """A1111's default RNG: each draw counts up in Philox's counter."""
    draws = iter(range(10**6))
    return lambda: seams.philox_normal(seed, next(draws), torch.Size(shape).numel()).view(shape)


# ---------------------------------------------------------------------------------------------------------------------
# what k-diffusion gives


@pytest.mark.parametrize("schedule", seams.SCHEDULES)
@pytest.mark.parametrize("sampler", kdiffusion.FUNCTIONS)
def test_every_sampler_with_every_schedule_is_k_diffusions(formula, sampler, schedule):
    """Few and many steps, one too; relative error at most 1e-4, with a Brownian tree 1e-3."""
    for steps in (1, 8) if sampler in ODE else (1, 4):
        ours = seams.denoise(formula, seams.sampling_name(sampler, schedule), steps, SEEDS[:1])
        theirs = kdiffusion.run(sampler, schedule, steps, SEEDS[:1])
        assert error(ours, theirs) < (1e-4 if sampler in ODE else 1e-3), steps


@pytest.mark.parametrize("sampler", kdiffusion.FUNCTIONS)
def test_many_steps_are_k_diffusions(formula, sampler):
    """150, the most that a job may ask for; 40 where torchsde's trees would take the test's time."""
    steps = 150 if sampler in ODE else 40
    ours = seams.denoise(formula, f"{sampler} Karras", steps, SEEDS[:1])
    assert error(ours, kdiffusion.run(sampler, "Karras", steps, SEEDS[:1])) < (1e-4 if sampler in ODE else 1e-3)


@pytest.mark.parametrize("schedule", ["Uniform", "Karras", "SGM Uniform", "Simple"])
def test_lcm_is_a1111s(formula, schedule):
    """LCM on its 50 levels, whose own scalings the worker leaves out."""
    for steps in (1, 4, 60):
        ours = seams.denoise(formula, seams.sampling_name("LCM", schedule), steps, SEEDS)
        assert error(ours, kdiffusion.run_lcm(schedule, steps, SEEDS)) < 1e-4


def test_ddim_with_a_schedule_type_is_a1111s(formula):
    """Which ends at t = 1, and for step counts that do not divide 1000 takes one more than those that do."""
    for steps in (2, 20, 24, 150):
        ours = seams.denoise(formula, "DDIM Uniform", steps, SEEDS)
        assert error(ours, kdiffusion.run_ddim(steps, SEEDS)) < 1e-4, steps


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", ["Euler", "DPM++ 2M", "DPM++ 2S a", "DPM++ 3M SDE"])
@pytest.mark.usefixtures("pipe")
def test_the_checkpoints_prediction_type_and_zero_snr(sampler, prediction_type):
    """A v-prediction checkpoint with a zero terminal SNR is sampled as one: its σ go up to 4,519."""
    root = kdiffusion.alphas_cumprod().sqrt()
    alphas = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    alphas[-1] = 4.8973451890853435e-08
    for levels, zero_snr in ((None, False), (alphas, True)):
        network = Network(prediction_type, levels)
        config = {"prediction_type": prediction_type, "rescale_betas_zero_snr": zero_snr}
        with seams.formula_engine(network, **config) as engine:
            ours = seams.denoise(engine, sampler, 6, SEEDS[:1])
        theirs = kdiffusion.run(sampler, "Uniform", 6, SEEDS[:1], network)
        assert error(ours, theirs) < (1e-4 if sampler in ODE else 1e-3), zero_snr


@pytest.mark.parametrize("name", [*seams.OFFICIAL, "UniPC", "DEIS", "PLMS"])
@pytest.mark.parametrize("steps", [1, 5, 24])
def test_official_names_give_diffusers_own_results(formula, name, steps):
    """From float32 noise, on the checkpoint's own spacing; one step starts in the noise all the same."""
    kinds = {"K_EULER": "EulerDiscreteScheduler", "K_EULER_ANCESTRAL": "EulerAncestralDiscreteScheduler"}
    config = formula.scheduler_config
    if name in kinds:
        extra = {"timestep_spacing": "trailing"} if steps == 1 else {}
        scheduler = getattr(diffusers, kinds[name]).from_config(config, **extra)
    else:
        scheduler = seams.diffusers_scheduler(name, config, steps)
    scheduler.set_timesteps(steps)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    x = torch.cat([torch.randn(1, 4, 8, 8, generator=generator) for generator in generators])
    options = {"generator": generators} if name == "K_EULER_ANCESTRAL" else {}
    x, network = x * scheduler.init_noise_sigma, Network()
    for time in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, time), time)
        x = scheduler.step(output, time, x, **options, return_dict=False)[0]
    # one K_EULER step starts at noise · √(1 + σ²), diffusers' trailing spacing at noise · σ: 0.23 % apart
    assert error(seams.denoise(formula, name, steps, SEEDS), x) < (3e-3 if name in kinds and steps == 1 else 2e-5)


# ---------------------------------------------------------------------------------------------------------------------
# noise


def test_philox_is_cudas():
    """Seed 0 begins as on every card; the seed's upper word, the draw and the element each count."""
    begin = torch.tensor([-0.92466259, -0.42534415, -2.6438457, 0.14518388])
    assert torch.allclose(seams.philox_normal(0, 0, 4), begin, rtol=0, atol=1e-7)
    assert torch.equal(seams.philox_normal(0, 0, 4096)[:4], seams.philox_normal(0, 0, 4))
    many = torch.stack([seams.philox_normal(seed, draw, 4096) for seed in (5, 5 + 2**32) for draw in (0, 1)])
    assert torch.corrcoef(many).fill_diagonal_(0).abs().max() < 0.06
    assert many.mean().abs() < 0.03 and abs(many.std() - 1) < 0.02


def philox_words(seed: int, draw: int, element: int) -> list[int]:
    """Philox 4x32-10 in whole numbers, after the paper's figure."""
    a, b, c, d = draw, 0, element, 0
    low, high = seed & 0xFFFFFFFF, seed >> 32
    for i in range(10):
        left, right = 0xD2511F53 * a, 0xCD9E8D57 * c
        first, second = (low + i * 0x9E3779B9) & 0xFFFFFFFF, (high + i * 0xBB67AE85) & 0xFFFFFFFF
        a, b, c, d = right >> 32 ^ b ^ first, right & 0xFFFFFFFF, left >> 32 ^ d ^ second, left & 0xFFFFFFFF
    return [a, b, c, d]


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**33 - 2])
def test_philox_by_whole_numbers(seed):
    """The vectorised rounds and Box-Muller are those of a plain computation, for seeds of more than 32 bits too."""
    drawn = seams.philox_normal(seed, 3, 200)
    for element in (0, 1, 199):
        r0, r1, *_ = philox_words(seed, 3, element)
        u, v = (r0 + 0.5) / 2**32, (r1 + 0.5) / 2**32
        expected = (-2 * torch.tensor(u).double().log()).sqrt() * torch.tensor(2 * torch.pi * v).double().sin()
        assert drawn[element].item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("rng", ["cpu", "gpu"])
@pytest.mark.parametrize("delta", [0, 31337, 2**32 - 1])
@pytest.mark.parametrize("sampler", ["Euler a", "DPM++ SDE"])
def test_rng_and_ensd(formula, sampler, delta, rng):
    """Later steps go on with the image's stream, or with that of seed + ENSD, which is not reduced to 32 bits; a
    Brownian tree is the seed's own, its nodes from the same source of noise."""
    stream = kdiffusion.cpu_stream if rng == "cpu" else gpu_stream
    ours = seams.denoise(formula, sampler, 3, [2**32 - 1], rng, delta)
    assert error(ours, kdiffusion.run(sampler, "Uniform", 3, [2**32 - 1], stream=stream, delta=delta)) < 1e-4


@pytest.mark.parametrize("sampler", [*seams.SAMPLERS, "UniPC", "PLMS", "K_EULER_ANCESTRAL"])
def test_an_image_of_a_batch_is_that_of_its_seed_alone(formula, sampler):
    """Bit for bit, for the formula's own arithmetic knows no batch."""
    batch = seams.denoise(formula, sampler, 4, [5, 6, 7])
    assert torch.equal(batch[1:2], seams.denoise(formula, sampler, 4, [6]))
    assert not torch.equal(batch[0], batch[2])


@pytest.mark.parametrize("sampler", seams.SAMPLERS)
def test_a_run_leaves_nothing_to_the_next(formula, sampler):
    """The same job twice gives the same bits, whatever ran between."""
    first = seams.denoise(formula, sampler, 3, [5])
    seams.denoise(formula, "DPM++ SDE Karras", 2, [6, 7], rng="gpu")
    assert torch.equal(seams.denoise(formula, sampler, 3, [5]), first)


def test_noise_is_drawn_ahead_in_one_other_thread():
    """Four steps ahead and no more, in order; a failure there is raised where the noise is taken."""
    drawn = []

    def draw(i: int) -> torch.Tensor:
        drawn.append((i, threading.current_thread()))
        if i == 8:
            raise MemoryError
        return torch.full((2,), float(i))

    taken, wait = seams.drawn_ahead(draw, 10)
    wait()
    assert [i for i, _ in drawn] == [0, 1, 2, 3]
    assert [next(taken).tolist() for _ in range(8)] == [[[i, i]] for i in range(8)]
    wait()
    assert {thread for _, thread in drawn} == {drawn[0][1]} != {threading.current_thread()}
    with pytest.raises(MemoryError):
        next(taken)


def test_latents_are_float32_around_a_float16_unet(pipe, monkeypatch):
    """The UNet is given its own type and what it answers is taken in float32; what float16 costs is its rounding."""
    seen = set()

    def network(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        seen.add(x.dtype)
        return Network()(x.float(), time).half()

    monkeypatch.setattr(type(pipe.unet), "dtype", torch.float16)
    for name in ("DPM++ 2M Karras", "UniPC"):
        with seams.formula_engine(network) as engine:
            half = seams.denoise(engine, name, 12, SEEDS)
        with seams.formula_engine(Network()) as engine:
            assert error(half, seams.denoise(engine, name, 12, SEEDS)) < 2e-3
        assert half.dtype == torch.float32
    assert seen == {torch.float16}


# ---------------------------------------------------------------------------------------------------------------------
# names


@pytest.mark.parametrize(
    ("sampler", "schedule", "name"),
    [
        ("DPM++ 2M Karras", None, "DPM++ 2M Karras"),
        (" dpm++ 2m KARRAS ", None, "DPM++ 2M Karras"),
        ("DPM++ 2M", "Karras", "DPM++ 2M Karras"),
        ("DPM++ 2M Karras", "karras", "DPM++ 2M Karras"),
        ("DPM++ 2M Karras", "Automatic", "DPM++ 2M Karras"),
        ("DPM++ 2M", "Automatic", "DPM++ 2M Karras"),
        ("DPM++ 2M", None, "DPM++ 2M"),
        ("DPM++ 2M", "Uniform", "DPM++ 2M"),
        ("DPM++ 3M SDE", "automatic", "DPM++ 3M SDE Exponential"),
        ("Euler a", "Automatic", "Euler a"),
        ("LCM", "Automatic", "LCM"),
        ("dpmpp_2m", "karras", "DPM++ 2M Karras"),
        ("dpmpp_2m_sde_heun", "sgm_uniform", "DPM++ 2M SDE Heun SGM Uniform"),
        ("dpmpp_2s_ancestral", "normal", "DPM++ 2S a"),
        ("dpmpp_3m_sde_gpu", "exponential", "DPM++ 3M SDE Exponential"),
        ("dpm_2_ancestral", "kl_optimal", "DPM2 a KL Optimal"),
        ("euler_ancestral", "simple", "Euler a Simple"),
        ("euler", "Align Your Steps", "Euler Align Your Steps"),
        ("uni_pc", None, "UniPC"),
        ("UniPC", "Automatic", "UniPC"),
        ("k_euler", None, "K_EULER"),
        ("K_EULER_ANCESTRAL", "Automatic", "K_EULER_ANCESTRAL"),
        ("DDIM", None, "DDIM"),
        ("DDIM", "Uniform", "DDIM Uniform"),
        ("ddim", "karras", "DDIM Karras"),
    ],
)
def test_spellings(sampler, schedule, name):
    """A1111's names joined and apart, ComfyUI's and the official worker's; each name is understood as itself."""
    assert seams.sampling_name(sampler, schedule) == name
    assert seams.sampling_name(name) == name


def test_every_name_is_its_own():
    """No two samplings share a name, whole or in any case."""
    names = [seams.sampling_name(sampler, schedule) for sampler in seams.SAMPLERS for schedule in seams.SCHEDULES]
    names += [*seams.OFFICIAL, "UniPC", "DEIS", "PLMS"]
    assert len({name.lower() for name in names}) == len(names)
    assert [seams.sampling_name(name.upper()) for name in names] == names


@pytest.mark.parametrize(
    ("sampler", "schedule", "nearest"),
    [
        ("DPM++ 2M Kerras", None, "DPM++ 2M Karras"),
        ("DPM++ 2M", "beta", "DPM++ 2M"),
        ("DPM++ 2M Karras", "Exponential", "DPM++ 2M Karras"),
        ("UniPC", "Karras", "UniPC"),
        ("K_EULER", "Karras", "K_EULER"),
        ("KLMS", None, "LMS"),
        ("DPM fast", None, "DPM++ 2M"),
        ("dpm_adaptive", "karras", "DPM++ 2M Karras"),
        ("Restart", None, "Heun Karras"),
        ("", None, "DPM++ 2M Karras"),
        ("x" * 100_000, None, "DPM++ 2M Karras"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(sampler, schedule, nearest):
    """InvalidInput of one short sentence that quotes what was given and names three at most."""
    with pytest.raises(seams.refused()) as caught:
        seams.sampling_name(sampler, schedule)
    message = str(caught.value)
    assert f'"{nearest}"' in message and 1 <= message.split("nearest: ")[1].count('"') / 2 <= 3
    assert len(message) < 250


def test_the_readme_lists_what_there_is():
    """In the table between its <!-- schedulers --> markers every name is understood, and none is missing."""
    section = re.search(r"<!-- schedulers -->(.*?)<!-- /schedulers -->", README.read_text(encoding="utf-8"), re.DOTALL)
    listed = {"DDIM " + schedule for schedule in seams.SCHEDULES}  # which stand in the sentence below the table
    for samplers, schedules in re.findall(r"^\| (`.*) \| (none.*) \|$", section[1], re.MULTILINE):
        for sampler in re.findall(r"`([^`]+)`", samplers):
            listed |= {seams.sampling_name(sampler, schedule) for schedule in re.findall(r"`([^`]+)`", schedules)}
            listed.add(seams.sampling_name(sampler))
    assert sorted(listed) == seams.SAMPLING_NAMES


@pytest.mark.parametrize("given", [5, None, True, ["Euler"], {"a": 1}])
def test_a_name_is_text(given):
    """Anything else is InvalidInput."""
    with pytest.raises(seams.refused(), match="scheduler must be text, got"):
        seams.sampling_name(given)


# ---------------------------------------------------------------------------------------------------------------------
# jobs


def job(**fields):
    """A small job's answer."""
    fields = {"prompt": "a cat", "width": 256, "height": 256, "steps": 2, "seed": 7, **fields}
    return handler.handler({"id": "test", "input": fields})


@pytest.mark.usefixtures("pipe")
@pytest.mark.parametrize("name", [*seams.SAMPLERS, "UniPC", "PNDM", "K_EULER_ANCESTRAL"])
def test_jobs_run_with_every_sampler(name):
    """A picture comes back, under the sampler's name."""
    answer = job(scheduler=name)
    assert len(answer["images"]) == 1 and answer["metadata"]["scheduler"] == name


@pytest.mark.usefixtures("pipe")
def test_jobs_draw_their_noise_as_they_say():
    """rng changes every picture, ENSD those whose later steps draw noise."""
    bare = functools.partial(job, embed_metadata=False)  # the recipe names what was asked for
    plain = {name: bare(scheduler=name)["images"] for name in ("Euler", "Euler a")}
    assert all(bare(scheduler=name, rng="gpu")["images"] != plain[name] for name in plain)
    assert bare(scheduler="Euler", eta_noise_seed_delta=31337)["images"] == plain["Euler"]
    assert bare(scheduler="Euler a", eta_noise_seed_delta=31337)["images"] != plain["Euler a"]
    assert bare(scheduler="Euler a")["images"] == plain["Euler a"]


@pytest.mark.usefixtures("pipe")
@pytest.mark.parametrize(("name", "calls"), [("Euler", 4), ("Heun", 7), ("DPM++ SDE Karras", 7), ("DPM2", 7)])
def test_progress_ends_at_the_steps_asked_for(name, calls):
    """Also where the network is called twice a step."""
    seen = seams.progress(scheduler=name, steps=4)
    assert len(seen) == calls and seen[-1] == (4, 4)
    assert seen == sorted(seen)
