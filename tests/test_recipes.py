"""Recipes, read: generation data of others, field by field, and this worker's own, which give the same picture again.

python tests/test_recipes.py --recipes 10000      the long form of the fuzzing; pytest reads a few hundred
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import hashlib
import io
import json
import os
import random
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import seams  # noqa: E402
from sd_parsers import ParserManager  # noqa: E402
from world import build_world  # noqa: E402

import handler  # noqa: E402

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def here(world, monkeypatch) -> None:
    """The settings of a worker that has every file in place."""
    for name, value in world.environ().items():
        monkeypatch.setenv(name, value)


def read(text: str, **fields: Any) -> Any:
    """A job that is nothing but a recipe, and what is given beside it, as the worker reads it."""
    return seams.parse({"parameters": text, **fields})


def refusal(text: str, **fields: Any) -> str:
    """Why such a job is refused."""
    answer = handler.handler({"input": {"parameters": text, **fields}})
    assert answer.get("code") == "INVALID_INPUT", answer
    return answer["error"]


# ---------------------------------------------------------------------------------------------------------------------
# other people's

ADD_DETAIL = "<lora:add-detail-xl:0.8>"  # not its name in the stack
RECIPES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "A1111 before 1.9": (
        "a fox in the snow, (sharp:1.2)\nNegative prompt: blurry, lowres\n"
        "Steps: 28, Sampler: DPM++ 2M Karras, CFG scale: 6.5, Seed: 3021544, Size: 832x1216, Model hash: 31e35c80fc, "
        "Model: sd_xl_base_1.0, Clip skip: 2, Version: v1.6.0",
        {
            "prompt": "a fox in the snow, (sharp:1.2)",
            "negative_prompt": "blurry, lowres",
            "steps": 28,
            "scheduler": "DPM++ 2M Karras",
            "guidance_scale": 6.5,
            "seed": 3021544,
            "width": 832,
            "height": 1216,
            "clip_skip": 2,
            "rng": "gpu",
            "emphasis": "original",
            "long_prompt": "concat",
            "loras": {},
            "eta_noise_seed_delta": 0,
            "num_images": 1,
        },
        ["does not have: checkpoint 'sd_xl_base_1.0' (here it is Jib Mix Illustrious Realistic)"],
    ),
    "A1111 1.10": (
        "portrait\nSteps: 20, Sampler: Euler a, Schedule type: Automatic, CFG scale: 7, Seed: 1, Size: 512x512, "
        "Model hash: aaaaaaaaaa, Model: jib_mix_illustrious_realistic_v2, VAE hash: 235745af8d, "
        "VAE: sdxl_vae.safetensors, Clip skip: 3, ENSD: 31337, RNG: CPU, Emphasis: No norm, Version: v1.10.1",
        {
            "prompt": "portrait",
            "negative_prompt": "",
            "scheduler": "Euler a",
            "eta_noise_seed_delta": 31337,
            "rng": "cpu",
            "emphasis": "no norm",
            "clip_skip": 2,
            "width": 512,
            "height": 512,
        },
        [],
    ),
    "hires fix, in three lines of prompt and Windows line ends": (
        "one,\r\ntwo\r\n\r\nthree\r\nNegative prompt: bad,\r\nworse\r\n"
        "Steps: 30, Sampler: DPM++ SDE, Schedule type: SGM Uniform, CFG scale: 5, Seed: 4294967295, Size: 1024x1024, "
        "Denoising strength: 0.4, Hires upscale: 1.5, Hires steps: 10, Hires upscaler: 4x-UltraSharp, RNG: NV\r\n",
        {
            "prompt": "one,\ntwo\n\nthree",
            "negative_prompt": "bad,\nworse",
            "rng": "gpu",
            "seed": 2**32 - 1,
            "scheduler": "DPM++ SDE SGM Uniform",
        },
        ["the recipe's Hires upscaler '4x-UltraSharp' is not here: lanczos was taken"],
    ),
    "ADetailer, ControlNet and quoted values": (
        "a cat\nSteps: 20, Sampler: DDIM, CFG scale: 7, Seed: 5, Size: 768x768, "
        'ADetailer model: face_yolov8n.pt, ADetailer prompt: "smile, \\"open: mouth\\", Seed: 9", '
        'ControlNet 0: "Module: canny, Model: xl_canny [d14c016b], Weight: 1", Variation seed: 7, '
        "Variation seed strength: 0.25, Version: v1.9.4",
        {"seed": 5, "scheduler": "DDIM Uniform", "width": 768, "prompt": "a cat"},
        [
            "ADetailer model 'face_yolov8n.pt', ADetailer prompt 'smile, \"open: mouth\", Seed: 9', "
            "ControlNet 0 'Module: canny, Model: xl_canny [d14c016b], Weight: 1', Variation seed '7', "
            "Variation seed strength '0.25'"
        ],
    ),
    "Forge": (
        "a castle\nSteps: 8, Sampler: Euler, Schedule type: Simple, CFG scale: 1, Distilled CFG Scale: 3.5, Seed: 42, "
        "Size: 896x1152, Model: fluxDev, Module 1: ae, Module 2: clip_l, Version: f2.0.1v1.10.1-previous-659",
        {"scheduler": "Euler Simple", "guidance_scale": 1.0, "width": 896, "height": 1152},
        ["checkpoint 'fluxDev'", "leaves out: Distilled CFG Scale '3.5', Module 1 'ae', Module 2 'clip_l'"],
    ),
    "Civitai's own generator": (
        "score_9, a cat\nNegative prompt: score_4\n"
        "Steps: 25, CFG scale: 7, Sampler: Euler a, Seed: 99, Clip skip: 2, Created Date: 2024-09-10T1212:12.34Z, "
        'Civitai resources: [{"type":"checkpoint","modelVersionId":290640,"modelName":"Pony","modelVersionName":'
        '"V6 [{x}] (start with this one), Steps: 3"},{"type":"lora","weight":0.8,"modelVersionId":135867,"modelName":'
        '"Detail Tweaker XL"},{"type":"lora","weight":null,"modelVersionId":"1681921"},'
        '{"type":"lora","weight":1,"modelVersionId":7,"modelName":"Other"},'
        '{"type":"embed","modelVersionId":8,"modelName":"Bad Hands"},"odd"], Civitai metadata: {"remixOfId":5}',
        {
            "prompt": "score_9, a cat",
            "steps": 25,
            "width": 1024,
            "height": 1024,
            "loras": {"detail_tweaker_xl": 0.8, "real_skin_slider": 1.0, "civitai_7": 1.0},
        },
        ["names no Size", "does not have: 'odd', checkpoint 'Pony' (here it is"],
    ),
    "this checkpoint by version id": (
        "a\nSteps: 1, Sampler: LCM, CFG scale: 1.5, Seed: 0, Size: 256x256, Model: renamed, "
        'Civitai resources: [{"type":"checkpoint","modelVersionId":1590699,"modelName":"Jib"}]',
        {"scheduler": "LCM"},
        [],
    ),
    "ComfyUI, exported": (
        "a\nNegative prompt: b\nSteps: 20, Sampler: dpmpp_2m_sde_karras, CFG scale: 8.0, Seed: 156680208, "
        'Size: 1024x1024, Hashes: {"model":"31e35c80fc","lora:gone":"ffffffffff","embed:bad":"0000000000","vae":"11"}, '
        "Version: ComfyUI",
        {"scheduler": "DPM++ 2M SDE Karras", "guidance_scale": 8.0, "negative_prompt": "b"},
        ["does not have: LoRA 'gone', which the prompt does not use, embedding 'bad', checkpoint '31e35c80fc'"],
    ),
    "ComfyUI's image saver": (
        "a cat\nNegative prompt: b\nSteps: 20, Sampler: DPM++ 2M, Scheduler: sgm_uniform, CFG Scale: 8.0, Seed: 3, "
        'Size: 512x512, Hashes: {"LORA:gone":"ffffffffff"}, Civitai resources: [{"modelName":"Detail","weight":0.7,'
        '"air":"urn:air:sdxl:lora:civitai:122359@135867"},{"air":"urn:air:sdxl:checkpoint:civitai:1@77"}]',
        {"scheduler": "DPM++ 2M SGM Uniform", "guidance_scale": 8.0, "loras": {"detail_tweaker_xl": 0.7}},
        ["does not have: LoRA 'gone', which the prompt does not use, checkpoint '77' (here it is"],
    ),
    "a LoRA of the stack by id, and by a tag with another name": (
        "a cat <lora:real_skin_slider:0.7> <lora:add-detail:0.7> <lora:gone:0.7>\n"
        "Steps: 4, Sampler: Heun, CFG scale: 3, Seed: 3, Size: 512x768, "
        'Civitai resources: [{"type":"lora","modelVersionId":135867,"weight":0.7}]',
        {"loras": {"detail_tweaker_xl": 0.7, "real_skin_slider": 0.7}},
        ["<lora:gone> was left out"],
    ),
    "LoRAs and embeddings by hash": (
        f"a cat {ADD_DETAIL} <lora:real_skin_slider:0.5> <lora:gone:1>\nSteps: 4, Sampler: Heun, CFG scale: 3, "
        'Seed: 3, Size: 512x768, Lora hashes: "add-detail-xl: DETAIL, gone: ffffffffffff, real_skin_slider: 0", '
        'TI hashes: "EasyNegative: c74b4e810b03", Version: v1.7.0',
        {
            "prompt": "a cat <lora:detail_tweaker_xl:0.8> <lora:real_skin_slider:0.5> <lora:gone:1>",
            "loras": {"detail_tweaker_xl": 0.8, "real_skin_slider": 0.5},
        },
        ["does not have: embedding 'EasyNegative'", "<lora:gone> was left out"],
    ),
    "Dynamic Prompts, with its templates below": (
        "a red cat\nNegative prompt: dog\nSteps: 9, Sampler: UniPC, CFG scale: 7, Seed: 8, Size: 512x512\n"
        "Template: a {red|blue}\ncat\nNegative Template: dog",
        {"prompt": "a red cat", "negative_prompt": "dog", "scheduler": "UniPC"},
        [],
    ),
    "Dynamic Prompts, with its templates as keys": (
        'a red cat\nSteps: 9, Sampler: LMS Karras, CFG scale: 7, Seed: 8, Size: 512x512, Template: "a {red|blue}, cat"',
        {"prompt": "a red cat", "scheduler": "LMS Karras"},
        [],
    ),
    "a schedule and an emphasis that are not here, and no key": (
        "a\nSteps: 9, Sampler: DPM++ 3M SDE, Schedule type: Turbo, CFG scale: 7, Seed: 8, Size: 512x512, "
        "Emphasis: Ignore, Cache FP16 weight for LoRA, Tiling: True, Seed: 77",
        {"scheduler": "DPM++ 3M SDE", "emphasis": "original", "seed": 8},
        [
            "Emphasis 'ignore' is not here: original was taken",
            "Schedule type 'Turbo' is not here for 'DPM++ 3M SDE'",
            "leaves out: 'Cache FP16 weight for LoRA', Tiling 'True', Seed again '77'",
        ],
    ),
    "hardly anything": (
        "a\nSteps: 9, Sampler: Euler, Model: x",
        {"scheduler": "Euler", "guidance_scale": 4.5, "width": 1024},
        ["names no CFG scale, Seed, Size", "checkpoint 'x'"],
    ),
}


def fields_of(request: Any) -> dict[str, Any]:
    """All fields of a job, the scheduler by its name."""
    return dataclasses.asdict(request) | {"scheduler": str(request.scheduler)}


@pytest.mark.parametrize(("text", "fields", "warnings"), RECIPES.values(), ids=RECIPES)
def test_recipes_of_others(text, fields, warnings, world):
    """Each recipe is read field by field, and what cannot be honoured is named: exactly these warnings, in order."""
    file = world.loras[0].read_bytes()
    detail = hashlib.sha256(file[8 + int.from_bytes(file[:8], "little") :]).hexdigest()[:12]
    request = read(text.replace("DETAIL", detail))
    assert {name: fields_of(request)[name] for name in fields} == fields
    assert len(request.warnings) == len(warnings), request.warnings
    for said, expected in zip(request.warnings, warnings, strict=True):
        assert expected in said


def test_a_job_may_be_a_recipe_alone(pipe):
    """Through handler(): the answer repeats what the recipe says, and the image is drawn from its seed."""
    text = "a cat\nNegative prompt: dog\nSteps: 2, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 256x320"
    answer = handler.handler({"input": {"parameters": text}})
    metadata = answer["metadata"]
    assert answer["seed"] == 5 and metadata["seeds"] == [5] and metadata["warnings"] == [] and metadata["loras"] == []
    assert (metadata["prompt"], metadata["negative_prompt"]) == ("a cat", "dog")
    assert (metadata["width"], metadata["height"], metadata["steps"], metadata["scheduler"]) == (256, 320, 2, "Euler a")
    assert (metadata["guidance_scale"], metadata["rng"], metadata["emphasis"]) == (7, "gpu", "original")


def test_another_checkpoint_is_named(monkeypatch):
    """This worker's own recipe on a worker whose CHECKPOINT is another, and LORAS too, says so; LoRAs it can fetch."""
    text = seams.recipe_of(seams.parse({"prompt": "a", "seed": 1, "loras": [{"name": "real_skin_slider"}]}))
    assert read(text).warnings == ()
    monkeypatch.setenv("CHECKPOINT", "12345")
    monkeypatch.setenv("LORAS", "")
    again = read(text)
    (warning,) = again.warnings
    assert again.loras == {"civitai_1681921": 1.0}  # which is fetched
    assert "checkpoint 'jib_mix_illustrious_realistic_v2' (here it is civitai_12345)" in warning


# ---------------------------------------------------------------------------------------------------------------------
# what comes first, what is refused

SIMPLE = "a cat\nNegative prompt: dog\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 512x640"


@pytest.mark.parametrize(
    ("given", "read_as"),
    [
        *[({"prompt": "x"}, {"prompt": "x"}), ({"negative_prompt": ""}, {"negative_prompt": ""})],
        *[({"cfg_scale": 3}, {"guidance_scale": 3.0}), ({"num_inference_steps": 4}, {"steps": 4})],
        *[({"sampler": "Heun"}, {"scheduler": "Heun"}), ({"seed": 9}, {"seed": 9}), ({"rng": "cpu"}, {"rng": "cpu"})],
        *[({"sampler_name": "LMS", "scheduler": "karras"}, {"scheduler": "LMS Karras"}), ({"clip_skip": 4}, {})],
        *[({"width": 256}, {"width": 256, "height": 640}), ({"batch_size": 2}, {"num_images": 2})],
        *[({"emphasis": "no norm"}, {}), ({"long_prompt": "blend"}, {}), ({"eta_noise_seed_delta": 1}, {})],
        ({"loras": [{"name": "real_skin_slider", "scale": 2}]}, {"loras": {"real_skin_slider": 2.0}}),
    ],
)
def test_fields_beside_it_come_first(given, read_as):
    """A field beside the recipe, under any of its names, overrules the recipe's; all others stay the recipe's."""
    alone, both = fields_of(read(SIMPLE)), fields_of(read(SIMPLE, **given))
    for fields in (alone, both):
        del fields["optional"]
    assert both == alone | (read_as or given)


def test_a_field_beside_it_saves_a_bad_value():
    """What is overruled is not checked: a sampler, size or step count that is not here can be replaced."""
    bad = "a\nSteps: 400, Sampler: DPM adaptive, CFG scale: high, Seed: 99999999999, Size: big"
    request = read(bad, steps=3, scheduler="Euler", guidance_scale=2, seed=1, width=512, height=512)
    assert (request.steps, str(request.scheduler), request.seed, request.height) == (3, "Euler", 1, 512)


def test_three_names_of_one_field_are_refused():
    """sampler_name with scheduler are A1111's pair; a third name beside them is one too many."""
    three = {"sampler_name": "Euler", "scheduler": "karras", "sampler": "Heun"}
    assert "are the same field: give one of them" in refusal(SIMPLE, **three)


@pytest.mark.parametrize(
    "text", ["a cat", "a cat\nSteps: 20", "Steps: one, then two, then three", "a\nSeed: 1, Steps: 2, Size: 8x8", "\n"]
)
def test_text_that_is_no_recipe(text):
    """At least three pairs, "Steps" first; the error says so, with an example."""
    assert 'at least three "key: value" pairs, such as "Steps: 20, ' in refusal(text)


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("Steps: 20", "Steps: 151", "parameters: Steps must be from 1 to 150, got 151"),
        ("Steps: 20", "Steps: 20.5", "parameters: Steps must be a whole number, got 20.5"),
        ("Steps: 20", "Steps: many", "parameters: Steps must be a whole number, got 'many'"),
        ("Steps: 20", "Steps: " + "9" * 5000, "parameters: Steps must be a whole number, got inf"),
        ("CFG scale: 7", "CFG scale: nan", "parameters: CFG scale must be from 1 to 30, got nan"),
        ("CFG scale: 7", "CFG scale: 0.5", "parameters: CFG scale must be from 1 to 30, got 0.5"),
        ("Seed: 5", "Seed: 4294967296", "parameters: Seed must be from 0 to 4294967295, got 4294967296"),
        ("512x640", "500x640", "parameters: Size's width must be a multiple of 8, got 500"),
        ("512x640", "512x4096", "parameters: Size's height must be from 256 to 2048, got 4096"),
        ("512x640", "512 by 640", "parameters: Size's width must be a whole number, got '512 by 640'"),
        ("Euler a", "Eular", "parameters: Sampler must be a sampler of this worker, got 'Eular'; nearest: \"Euler"),
        ("Euler a", "DPM adaptive", 'nearest: "DPM++ 2M Karras"'),
        ("Euler a", "[1]", "parameters: Sampler must be a sampler of this worker, got '[1]'"),
        ("Seed: 5", "Seed: 5, RNG: TPU", "parameters: RNG must be one of cpu, gpu; got 'TPU'"),
        ("Seed: 5", "Seed: 5, ENSD: x", "parameters: ENSD must be a whole number, got 'x'"),
        ("Seed: 5", "Seed: 5, Long prompt: x", "parameters: Long prompt must be one of blend, concat, truncate; got"),
        ("Seed: 5", "Seed: 5, Version: sdxl-worker, Clip skip: 0", "parameters: Clip skip must be from 1 to 12, got 0"),
        (
            "Seed: 5",
            'Seed: 5, Civitai resources: [{"weight":"x","modelVersionId":135867}]',
            "parameters: Civitai resources[0].scale must be a number, got 'x'",
        ),
        ("a cat", "", "parameters: prompt must have 1 to 10,000 characters, got 0"),
        ("a cat", "a (cat:1000)", "a weight must be from -100 to 100, got '1000'"),
    ],
)
def test_values_out_of_limits_are_refused(old, new, error):
    """What a recipe's value must be is said with its key and the value."""
    assert error in refusal(SIMPLE.replace(old, new, 1))


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\nTemplate: {a|b}"])
def test_a_prompt_that_is_a_recipe_is_refused(field, end):
    """Pasted into the wrong field: refused, with the hint; one that only speaks of steps is a prompt."""
    answer = handler.handler({"input": {"prompt": "a", field: SIMPLE + end}})
    assert answer["code"] == "INVALID_INPUT"
    assert answer["error"] == f"{field} holds a picture's generation data: give that text, once, as parameters"
    assert getattr(seams.parse({"prompt": "a", field: "Steps: up, down: no"}), field) == "Steps: up, down: no"


def test_too_long_a_text():
    """30,000 characters are the limit."""
    assert read("a\n" + SIMPLE.splitlines()[-1] + ", Note: " + "x" * 20_000).warnings
    assert "parameters must have 1 to 30,000 characters, got 30,001" in refusal("x" * 30_001)


EDITING = ["[cat:dog:0.5]", "[cat:10]", "[cat::.5]", "[cat | dog]", "a AND b", "[ 1girl : 5 ]", "[(a:1.2) b|c]"]
PLAIN = [
    *["at 12:30", "[12:30]", "16:9", "(16:9)", "[16:9]", "[16:9 ratio]", "[fog]", "((a:1.2))", "[a (b:1.3)]", "(a|b)"],
    *[r"\[a|b\]", "a smile :]", ":[ and :3", "[:", "[a :]", "band, sand and", "BRAND", "a | b", "[_|_]", "[a], b:1]"],
]


@pytest.mark.parametrize("text", EDITING)
def test_prompt_editing_is_named(text):
    """Prompt editing, alternation and AND are read as text, in either prompt, with a warning that quotes it."""
    for field in ("prompt", "negative_prompt"):
        (warning,) = seams.parse({"prompt": "a", field: f"x, {text}, y"}).warnings
        assert warning.startswith(f"{field}: prompt editing and AND are read as text here, such as ")
        assert text in warning or "'AND'" in warning


@pytest.mark.parametrize("text", PLAIN)
def test_plain_brackets_are_not_prompt_editing(text):
    """Ordinary brackets, times, ratios and smileys give no warning."""
    assert seams.parse({"prompt": f"x, {text}, y"}).warnings == ()


# ---------------------------------------------------------------------------------------------------------------------
# round trip

PIECES = (
    *(
        "a cat",
        "red fox, ",
        "(sharp:1.3)",
        "[fog]",
        " BREAK ",
        "桜の木",
        "😺",
        "é",
        "\\(x\\)",
        '"',
        "\\",
        "{}",
        "}]",
        ":",
    ),
    *("<lora:real_skin_slider:0.5>", "<lora:Boring Reality primaryV3.0:-1>", "<lyco:pony_realism_slider:2>"),
    *("<lora:boring_reality_v4>", "<lora:gone:1>", "[a|b]", "x AND y", ", Hashes: {bad}", "Civitai resources: [{}]"),
    *("\nNegative prompt: z", "Negative prompt:", "\nSteps: 3, Sampler: x", "Steps: 9", "\rSteps: 1", "\u2028Steps: 2"),
    *("\nTemplate: q", "\x85Steps: 4", "Exact prompt: y", "Version: 1"),
    *(
        "\n",
        "\n\n",
        "\r\n",
        "\r",
        " ",
        "\t",
        "\0",
        "\x01",
        "\x1c",
        "\x7f",
        "\x85",
        "\xa0",
        "\u2028",
        "\u200b",
        "\ufeff",
    ),
)
SAMPLERS = ("Euler", "Euler a", "Heun", "LMS", "DPM2", "DPM2 a", "DPM++ 2S a", "DPM++ 2M", "DPM++ SDE", "DPM++ 2M SDE")
SAMPLERS += ("DPM++ 2M SDE Heun", "DPM++ 3M SDE", "DDIM", "LCM")
SCHEDULES = ("", "Uniform", "Karras", "Exponential", "SGM Uniform", "Simple", "Align Your Steps", "KL Optimal")
SCHEDULES += ("Polyexponential", "Automatic")
OTHERS = ("UniPC", "DEIS", "PLMS", "PNDM", "DDIM", "K_EULER", "K_EULER_ANCESTRAL", "DPMSolverMultistep")


def any_text(dice: random.Random, most: int = 12) -> str:
    return "".join(dice.choice(PIECES) for _ in range(dice.randint(1, most)))


def any_job(dice: random.Random, sides: tuple[int, ...] = (256, 264, 1024, 2048), steps: int = 150) -> dict[str, Any]:
    """A good job, mostly with fields that differ from the defaults."""
    names = [config["name"] for config in handler.LORA_CONFIGS]
    fields = {
        "negative_prompt": any_text(dice, 6),
        "width": dice.choice(sides),
        "height": dice.choice(sides),
        "guidance_scale": dice.choice((1, 1.0, 7, 4.5, 30.0, dice.uniform(1, 30))),
        "scheduler": dice.choice((f"{dice.choice(SAMPLERS)} {dice.choice(SCHEDULES)}".strip(), dice.choice(OTHERS))),
        "clip_skip": dice.randint(1, 12),
        "rng": dice.choice(("cpu", "gpu")),
        "emphasis": dice.choice(("no norm", "original")),
        "eta_noise_seed_delta": dice.choice((0, 31337, 2**32 - 1)),
        "long_prompt": dice.choice(("blend", "concat", "truncate")),
        "loras": [
            {"name": n, "scale": dice.choice((0, 1, -2, 0.3, dice.uniform(-10, 10)))} for n in dice.sample(names, 3)
        ],
    }
    chosen = {name: value for name, value in fields.items() if dice.random() < 0.8}
    small = {"width": 256, "height": 256} if 1024 not in sides else {}
    return small | {"prompt": any_text(dice), "seed": dice.randrange(2**32), "steps": dice.randint(1, steps)} | chosen


def good_jobs(count: int, seed: int, **limits: Any) -> list[tuple[dict[str, Any], Any]]:
    """Random jobs that are not refused (a prompt may end in a recipe's line, a tag's scale be too large)."""
    dice, jobs = random.Random(seed), []
    while len(jobs) < count:
        job = any_job(dice, **limits)
        try:
            jobs.append((job, seams.parse(job)))
        except seams.refused():
            continue
    return jobs


def differing(request: Any) -> dict[str, Any]:
    """What a picture depends on: LoRAs of scale 0, the warnings and what may be left out are not."""
    fields = fields_of(request)
    del fields["warnings"], fields["optional"]
    return fields | {"loras": {name: scale for name, scale in request.loras.items() if scale}}


def test_own_recipes_are_read_to_the_letter():
    """Of 300 random jobs every field comes back from the recipe, and the recipe of that job is the same text."""
    for job, request in good_jobs(300, seed=1):
        text = seams.recipe_of(request)
        again = read(text)
        assert differing(again) == differing(request), job
        assert seams.recipe_of(again) == text, job
        assert not any("recipe" in warning for warning in again.warnings), (job, again.warnings)


def recipe_in(file: bytes) -> tuple[str, bytes]:
    """The recipe that an image file carries (PNG text, or UTF-16 in EXIF's UserComment), and its pixels."""
    image = Image.open(io.BytesIO(file))
    if "parameters" in image.info:
        return image.info["parameters"], image.tobytes()
    comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"UNICODE\0"
    return comment[8:].decode("utf-16-be"), image.tobytes()


def draw(job: dict[str, Any]) -> list[tuple[str, bytes]]:
    """Recipe and pixels of each image of a job."""
    answer = handler.handler({"input": job})
    assert "images" in answer, (job, answer)
    return [recipe_in(base64.b64decode(image)) for image in answer["images"]]


@pytest.mark.parametrize("image_format", ["png", "webp", "jpeg"])
def test_own_recipes_give_the_same_pixels(pipe, image_format):
    """Random jobs through handler(): the recipe out of the file, posted back, gives every pixel and itself again."""
    for job, _ in good_jobs(4, seed=len(image_format), sides=(256, 264), steps=3):
        ((text, pixels),) = draw({**job, "image_format": image_format})
        ((text_again, again),) = draw({"parameters": text, "image_format": image_format})
        assert again == pixels, (job, text)
        assert text_again == text


def test_recipes_of_a_batch(pipe):
    """Each image of a batch has a recipe of its own, which gives that image alone, to rounding."""
    job = {"prompt": "a\r\n b ", "width": 256, "height": 256, "steps": 2, "seed": 2**32 - 1, "scheduler": "Euler a"}
    for text, pixels in draw({**job, "num_images": 3}):
        ((_, alone),) = draw({"parameters": text})
        difference = np.frombuffer(alone, np.uint8).astype(int) - np.frombuffer(pixels, np.uint8)
        assert abs(difference).max() <= 2


# ---------------------------------------------------------------------------------------------------------------------
# read by others

A1111_FIELD = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')  # A1111's own, infotext_utils.py


def as_a1111(text: str) -> dict[str, str]:
    """The last line's fields by A1111's expression; a quoted value is JSON."""
    found = A1111_FIELD.findall(text.strip().split("\n")[-1])
    return {key: json.loads(value) if value[:1] == value[-1:] == '"' else value for key, value in found}


def as_civitai(text: str) -> dict[str, Any]:
    """The fields as Civitai's site reads them: the first line that begins with "Steps: " (a line ends at \\n alone, in
    JavaScript too), cut at every colon, a value up to its last comma; "Hashes" and "Civitai resources" before."""
    line = next(line for line in text.split("\n") if line.startswith("Steps: "))
    fields: dict[str, Any] = {}
    for key, pattern in (("Hashes", r", Hashes:\s*({[^}]+})"), ("resources", r", Civitai resources:\s*(\[\{.*?\}\])")):
        if found := re.search(pattern, line):
            fields[key] = json.loads(found[1])
            line = line.replace(found[0], "")
    key, *parts = line.split(":")
    for part in parts[:-1]:
        value, _, following = part.rpartition(",")
        fields[key], key = value.strip(), following.strip()
    return fields | {key: parts[-1].strip()}


def test_other_readers_find_the_images_own_line():
    """Whatever lines the prompts hold, A1111's expressions, Civitai's and sd-parsers read the image's own values."""
    for job, request in good_jobs(300, seed=2):
        text = seams.recipe_of(request)
        for fields in (as_a1111(text), as_civitai(text)):
            assert fields["Seed"] == str(job["seed"]) and fields["Steps"] == str(job["steps"]), (job, text)
            assert fields["Size"] == f"{request.width}x{request.height}" and fields["Model hash"] == "0123456789"
            assert fields["Clip skip"] == str(request.clip_skip)
        assert "Hashes" not in as_civitai(text)
        versions = [resource["modelVersionId"] for resource in as_civitai(text)["resources"]]
        assert versions[0] == 1590699 and len(versions) == 1 + sum(map(bool, request.loras.values()))
        lines = re.split("[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]", text)
        assert [line for line in lines if line.startswith("Steps:")] == [text.split("\n")[-1]]


def test_sd_parsers_reads_recipes_of_odd_prompts(pipe):
    """The package sd-parsers finds prompts and seed in the file where the prompts hold lines of their own."""
    for prompt in ("a\nSteps: 3, Sampler: x", "b\n\nTemplate: c", "d, Hashes: {e} \n f"):
        job = {"prompt": prompt + " g", "width": 256, "height": 256, "steps": 1, "seed": 77}
        file = base64.b64decode(handler.handler({"input": job})["images"][0])
        (sampler,) = ParserManager().parse(io.BytesIO(file)).samplers
        assert sampler.parameters["seed"] == "77"
        assert sampler.prompts[0].value.replace("Steps :", "Steps:").split() == job["prompt"].split()


# ---------------------------------------------------------------------------------------------------------------------
# any text

KEYS = ("Steps", "Sampler", "Schedule type", "CFG scale", "Seed", "Size", "Model", "Model hash", "VAE", "Clip skip")
KEYS += ("ENSD", "RNG", "Emphasis", "Long prompt", "Version", "Civitai resources", "Hashes", "Lora hashes", "TI hashes")
KEYS += ("Exact prompt", "Exact negative prompt", "User", "ControlNet 0", "Batch size", "é", "a-b/c")
VALUES = (
    *("20", "7.5", "-1", "0", "1e999", "nan", "9" * 5000, "1024x1024", "8x8", "x", "0x0", "1_0", "Euler a", "DDIM", ""),
    *('"', '""', '"a, b: c"', '"\\u0000"', '"\\ud800"', "[]", "{}", "[[", '[{"modelVersionId":135867,"weight":1e999}]'),
    *("[" * 3000, "[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900, '[{"type":[],"modelVersionId":{}}]', "[1]"),
    *('[{"type":"checkpoint","modelVersionId":' + "9" * 5000 + "}]", '{"model":[],"lora:x":{},"embed":1,"":""}', "CPU"),
    *("a: , : ,b", ":,:,:", "sdxl-worker", "Original", "cpu", "concat", ",,,", "\\", "\t", "\x1c", "NaN", "[NaN]"),
    *('[{"modelVersionId":135867},{"modelVersionId":"135867","weight":null}]', "null", "true", '"x" y', "[1] y"),
)


def any_recipe(dice: random.Random) -> str:
    """Mostly something that has the form of a recipe."""
    pairs = [f"{dice.choice(KEYS)}: {dice.choice(VALUES)}" for _ in range(dice.randint(0, 9))]
    line = ", ".join(["Steps: 5", "Sampler: Euler", "Size: 512x512"][: dice.choice((3, 3, 3, 1, 0))] + pairs)
    text = any_text(dice, 8) + "\n" + line + dice.choice(("", "", "\n", "\r\n", "\nTemplate: x"))
    if dice.random() < 0.3:  # torn
        at = dice.randrange(len(text))
        text = text[:at] + dice.choice((*PIECES, "\ud800", ",", '"')) + text[at + dice.randint(0, 3) :]
    return text[: dice.choice((30_000, 30_000, len(text) * 2 // 3))]


def fuzz(count: int, seed: int = 0) -> tuple[int, int, float]:
    """Reads random recipes: how many were taken, how many refused, the longest time of one in seconds."""
    dice, refused, longest = random.Random(seed), 0, 0.0
    for _ in range(count):
        text, started = any_recipe(dice), time.thread_time()
        try:
            seams.parse({"parameters": text})
        except seams.refused():
            refused += 1
        longest = max(longest, time.thread_time() - started)
    return count - refused, refused, longest


def test_any_text_is_read_or_refused():
    """Random recipes raise nothing but INVALID_INPUT."""
    taken, refused, _ = fuzz(600)
    assert taken > 60 and refused > 60


LONG = {
    "keys": "ab: 1, " * 4200,
    "different keys": ", ".join(f"k{i}: 1" for i in range(2800)),
    "no keys": "x," * 14_000,
    "words": "a " * 14_000,
    "a word": "a" * 29_000,
    "colons": ":" * 29_000,
    "spaces": " " * 29_000 + "x",
    "quotes": '"' * 29_000,
    "open quotes": 'ab:"x,' * 4800,
    "arrays": "ab:[1," * 4800,
    "deep": "ab:" + "[" * 29_000,
    "deep again": ("ab:" + "[" * 900 + "x,") * 30,
    "objects": 'ab:{"a":' * 3600,
    "hashes": 'Lora hashes: "' + "a" * 29_000 + '"',
    "many hashes": 'Lora hashes: "' + ", ".join(f"a{i}: ffffffffff" for i in range(1500)) + '"',
    "resources": "Civitai resources: [" + ",".join(['{"modelVersionId":1}'] * 1300) + "]",
    "size": "Size: " + "x" * 29_000,
    "sampler": "Sampler: " + "Euler " * 4800,
    "schedule": "Sampler: Euler, Schedule type: " + "a" * 28_000,
}


@pytest.mark.parametrize("line", LONG.values(), ids=LONG)
def test_long_texts_are_read_at_once(line):
    """No text of 30,000 characters takes half a second: nothing is quadratic."""
    read("a\nSteps: 5, Sampler: Euler, Size: 512x512, Seed: 1, CFG scale: 7, Model: x")  # imports and caches
    started = time.thread_time()
    try:
        read(f"a\nSteps: 5, CFG scale: 7, Seed: 1, {line}"[:30_000])
    except seams.refused():
        pass
    assert time.thread_time() - started < 0.5


@pytest.mark.parametrize(
    "prompt",
    ["[a" + "|" * 9990, "[a:" + "1" * 9990, "[a" + ":1" * 4990, "[a:1" * 2500, "(a:" + "1" * 9990, "<lora:a:1" * 1100,
     "<lora:" * 1600, ":" + " " * 9990, "(a:" + " " * 9000 + "x"],
    ids=lambda prompt: prompt[:12],
)  # fmt: skip
def test_prompts_are_searched_at_once(prompt):
    """Nor is what is looked for in prompts: editing, weights, LoRA tags."""
    for search in seams.quick_searches:
        search("warm")
        started = time.thread_time()
        search(prompt)
        assert time.thread_time() - started < 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ |= build_world(TESTS / ".cache").environ()
    taken, refused, longest = fuzz(options.recipes, options.seed)
    print(f"{taken} recipes read, {refused} refused, none raised anything else; the slowest took {longest:.3f} s")


if __name__ == "__main__":
    main()
