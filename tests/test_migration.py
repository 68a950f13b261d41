"""Jobs as users of other workers send them: what README says about moving from worker-sdxl and from A1111."""

from __future__ import annotations

from typing import Any

import pytest
import seams

import handler

# the example of github.com/runpod-workers/worker-sdxl
OFFICIAL = {
    "prompt": "A majestic steampunk dragon soaring through a cloudy sky, intricate clockwork details",
    "negative_prompt": "blurry, low quality, deformed, ugly, text, watermark, signature",
    "height": 1024,
    "width": 1024,
    "num_inference_steps": 25,
    "refiner_inference_steps": 50,
    "guidance_scale": 7.5,
    "strength": 0.3,
    "high_noise_frac": 0.8,
    "seed": 42,
    "scheduler": "K_EULER",
    "num_images": 1,
    "image_url": None,
}
NOT_HERE = ["refiner_inference_steps", "high_noise_frac"]
OFFICIAL_SCHEDULERS = ["PNDM", "DDIM", "K_EULER", "K_EULER_ANCESTRAL", "DPMSolverMultistep", "DPMSolverSinglestep"]


def refusal(job: dict[str, Any]) -> str:
    answer = handler.handler({"input": job})
    assert answer["code"] == "INVALID_INPUT"
    return answer["error"]


def test_official_job_without_the_refiner_runs_unchanged():
    """The official worker's example is accepted once the refiner's and img2img's fields are gone."""
    gone = (*NOT_HERE, "image_url", "strength")  # the last two go with a picture
    request = seams.parse({name: value for name, value in OFFICIAL.items() if name not in gone})
    assert (request.steps, request.guidance_scale, request.seeds) == (25, 7.5, [42])
    assert str(request.scheduler) == "K_EULER"


@pytest.mark.parametrize("name", NOT_HERE)
def test_official_fields_without_a_counterpart_are_refused_by_name(name):
    """What this worker cannot do is refused, never dropped silently."""
    assert name in refusal({"prompt": OFFICIAL["prompt"], name: OFFICIAL[name]})


@pytest.mark.parametrize("name", OFFICIAL_SCHEDULERS)
def test_official_schedulers_are_known(name):
    """The official worker's scheduler names are accepted as they are."""
    assert str(seams.parse({"prompt": "a", "scheduler": name}).scheduler) == name


def test_klms_is_refused_with_the_nearest():
    """The official worker's KLMS is not a name here: the refusal names LMS."""
    error = refusal({"prompt": "a", "scheduler": "KLMS"})
    assert "scheduler must be a sampler of this worker, got 'KLMS'" in error and '"LMS"' in error


def test_null_negative_prompt_is_refused_with_the_rule():
    """The official worker's null is not text here; the sentence says what is wanted."""
    assert "negative_prompt must be text, got null" in refusal({"prompt": "a", "negative_prompt": None})


def test_a1111_names_are_accepted():
    """cfg_scale, sampler_name, batch_size and seed -1 mean here what they mean in txt2img."""
    job = {"prompt": "a (cat:1.2)", "cfg_scale": 7, "sampler_name": "DPM++ 2M Karras", "batch_size": 2, "seed": -1}
    request = seams.parse({**job, "width": 832, "height": 1216, "steps": 30})
    assert (request.guidance_scale, str(request.scheduler), request.num_images) == (7.0, "DPM++ 2M Karras", 2)
    assert request.seeds[1] == (request.seeds[0] + 1) % 2**32


@pytest.mark.parametrize("field", [{"n_iter": 2}, {"enable_hr": True}, {"override_settings": {}}, {"styles": []}])
def test_a1111_fields_without_a_counterpart_are_refused_by_name(field):
    """txt2img's fields that this worker has not are refused, never dropped silently."""
    assert next(iter(field)) in refusal({"prompt": "a", **field})


@pytest.mark.parametrize(
    ("sampler", "schedule", "name"),
    [
        *(("DPM++ 2M", "Karras", "DPM++ 2M Karras"), ("DPM++ SDE", "karras", "DPM++ SDE Karras")),
        *(("DPM++ 2M", "automatic", "DPM++ 2M Karras"), ("Euler a", "Automatic", "Euler a")),
        ("DPM++ 2M Karras", "Automatic", "DPM++ 2M Karras"),
    ],
)
def test_a1111_pair_of_sampler_and_schedule(sampler, schedule, name):
    """A1111 1.9's two fields are one here; its Automatic is the sampler's own schedule, Karras for DPM++ 2M."""
    assert str(seams.parse({"prompt": "a", "sampler_name": sampler, "scheduler": schedule}).scheduler) == name
