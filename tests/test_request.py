"""A job's input: what is taken, what is refused, and how the refusal reads."""

import json
import math

import pytest
import seams

import handler


def parse(**fields):
    return seams.parse({"prompt": "a cat", **fields})


def answer(given) -> dict:
    """What the worker answers to an input that it refuses."""
    reply = handler.handler({"input": given})
    assert set(reply) == {"error", "code"} and reply["code"] == "INVALID_INPUT"
    return reply


def refusal(**fields) -> str:
    return answer({"prompt": "a cat", **fields})["error"]


def test_defaults():
    """A prompt alone gives the contract's defaults and the configured stack; a recipe that is null is none."""
    request = parse(parameters=None)
    assert (request.negative_prompt, request.width, request.height, request.steps) == ("", 1024, 1024, 24)
    assert (request.guidance_scale, request.num_images, request.clip_skip, request.long_prompt) == (4.5, 1, 2, "blend")
    assert (str(request.scheduler), request.image_format, request.embed_metadata) == ("DPM++ 2M Karras", "png", True)
    assert request.emphasis == "no norm"
    assert request.loras["detail_tweaker_xl"] == 1.5 and len(request.loras) == 9


@pytest.mark.parametrize(
    ("field", "good"),
    [
        *[
            ("width", 256),
            ("height", 2048),
            ("steps", 1),
            ("steps", 150),
            ("guidance_scale", 1),
            ("guidance_scale", 30.0),
        ],
        *[("seed", 0), ("seed", 2**32 - 1), ("num_images", 4), ("clip_skip", 12), ("prompt", "x" * 10_000)],
        *[("negative_prompt", ""), ("long_prompt", "concat"), ("image_format", "webp"), ("embed_metadata", False)],
        *[("emphasis", "original"), ("prompt", "(a:100)"), ("prompt", "((a:-50):2)"), ("prompt", "(" * 48 + "a")],
    ],
)
def test_the_limits_themselves_are_taken(field, good):
    """Each limit belongs to the allowed range."""
    assert getattr(parse(**{field: good}), field) == good


@pytest.mark.parametrize(
    ("field", "bad", "rule"),
    [
        ("width", 255, "width must be from 256 to 2048, got 255"),
        ("width", 1023, "width must be a multiple of 8, got 1023"),
        ("height", 2056, "height must be from 256 to 2048, got 2056"),
        ("width", 1024.0, "width must be a whole number, got 1024.0"),
        ("width", True, "width must be a whole number, got true"),
        ("width", "1024", "width must be a whole number, got '1024'"),
        ("width", None, "width must be a whole number, got null"),
        pytest.param("width", 10**5000, "width must be from 256 to 2048, got a huge integer", id="huge"),
        ("steps", 0, "steps must be from 1 to 150, got 0"),
        ("guidance_scale", 0.5, "guidance_scale must be from 1 to 30, got 0.5"),
        ("guidance_scale", math.nan, "guidance_scale must be from 1 to 30, got nan"),
        ("guidance_scale", math.inf, "guidance_scale must be from 1 to 30, got inf"),
        ("guidance_scale", 10**400, "guidance_scale must be from 1 to 30, got a huge integer"),
        ("guidance_scale", True, "guidance_scale must be a number, got true"),
        ("seed", -2, "seed must be from 0 to 4294967295, got -2"),
        ("seed", 2**32, "seed must be from 0 to 4294967295, got 4294967296"),
        ("seed", -1.0, "seed must be a whole number, got -1.0"),
        ("seed", False, "seed must be a whole number, got false"),
        ("num_images", 5, "num_images must be from 1 to 4, got 5"),
        ("clip_skip", 13, "clip_skip must be from 1 to 12, got 13"),
        ("prompt", "", "prompt must have 1 to 10,000 characters, got 0"),
        ("prompt", "x" * 10_001, "prompt must have 1 to 10,000 characters, got 10,001"),
        ("prompt", ["a"], "prompt must be text, got ['a']"),
        ("negative_prompt", None, "negative_prompt must be text, got null"),
        ("embed_metadata", 1, "embed_metadata must be true or false, got 1"),
        ("emphasis", "No norm", "emphasis must be one of no norm, original; got 'No norm'; did you mean \"no norm\"?"),
        ("prompt", "a (cat:100.5)", "prompt: a weight must be from -100 to 100, got '100.5'"),
        ("prompt", "a (cat:-101)", "prompt: a weight must be from -100 to 100, got '-101'"),
        ("negative_prompt", "(a:1000)", "negative_prompt: a weight must be from -100 to 100, got '1000'"),
        *(
            ("prompt", f"a (cat:{weight})", f"prompt: a weight must be from -100 to 100, got '{weight}'")
            for weight in ("nan", "inf", "-Infinity", "1e400", "1e3")
        ),
        ("prompt", "a cat\nSteps: 2, Sampler: Euler a, Seed: 1\nand more", "prompt holds a picture's generation data"),
        ("strength", 1.01, "strength must be above 0, up to 1, got 1.01"),
        ("loras", "x", 'loras must be a list such as [{"civitai": 135867, "scale": 0.8}]'),
        ("embeddings", [{"civitai": 5}, {"civitai": 5}], "embeddings[1]: Civitai model version 5 is given twice"),
        (
            "embeddings",
            [{"civitai": 5, "name": "a"}, {"civitai": 6, "name": "A"}],
            "embeddings[1]: the name A is given twice",
        ),
        pytest.param("prompt", f"(a:{'9' * 400})", "prompt: a weight must be from -100 to 100", id="400 digits"),
        ("prompt", "((a:50):3)", "prompt: weights of nested brackets must multiply to at most 100, got 150"),
        ("prompt", "((a:-50):3)", "multiply to at most 100, got 150"),
        ("negative_prompt", "(" * 60 + "a", "multiply to at most 100, got 304.5"),
        (
            "long_prompt",
            "blnd",
            "long_prompt must be one of blend, concat, truncate; got 'blnd'; did you mean \"blend\"?",
        ),
        ("image_format", {}, "image_format must be one of png, jpeg, webp; got {}"),
        ("loras", "detail", "loras must be a list such as"),
        ("loras", [{"name": "detail_tweaker_xl", "scale": 10.5}], "loras[0].scale must be from -10 to 10, got 10.5"),
        ("loras", [{"name": "nothing like it"}], "is not in the stack: detail_tweaker_xl, "),
        ("loras", [{"nam": "detail_tweaker_xl"}], "loras[0] must be an object such as"),
        ("loras", [{"name": "real_skin_slider", "scal": 1}], "loras[0]: unknown field 'scal'; did you mean \"scale\"?"),
        ("loras", [{"name": "Real Skin Slider"}, {"name": "real_skin_slider"}], "'real_skin_slider' is given twice"),
    ],
)
def test_refusals_name_field_rule_and_value(field, bad, rule):
    """What is refused is refused with the field, the rule and the value."""
    assert rule in refusal(**{field: bad})


def test_unknown_field_suggests_the_nearest():
    """A misspelt field is named, with the nearest field; one like none is named alone."""
    assert refusal(heigth=512) == "unknown field 'heigth'; did you mean \"height\"?"
    assert refusal(Steps=5) == "unknown field 'Steps'; did you mean \"steps\"?"
    assert refusal(cfg=5) == "unknown field 'cfg'; did you mean \"cfg_scale\"?"
    assert refusal(zzzzzz=5) == "unknown field 'zzzzzz'"


@pytest.mark.parametrize(
    ("name", "also"),
    [
        *[("steps", "num_inference_steps"), ("guidance_scale", "cfg_scale"), ("num_images", "batch_size")],
        *[("scheduler", "sampler"), ("scheduler", "sampler_name")],
    ],
)
def test_other_names(name, also):
    """A field is taken under its other name, refused under both, and named as the caller named it."""
    value = "Euler a" if name == "scheduler" else 2
    found = getattr(parse(**{also: value}), name)
    assert (str(found) if name == "scheduler" else found) == value
    if also != "sampler_name":  # beside scheduler it is A1111's pair: see test_migration
        assert refusal(**{name: value, also: value}) == f"{name} and {also} are the same field: give one of them"
    assert refusal(**{also: []}).startswith(f"{also} must be")


@pytest.mark.parametrize("raw", [None, [], "a cat", 5, True])
def test_input_must_be_an_object(raw):
    """Anything but an object is refused as input, and so is a missing prompt."""
    assert answer(raw)["error"].startswith("a job must be")
    assert answer({})["error"].startswith("prompt is required")


def test_random_seed():
    """null and -1 draw seeds over the whole range; the images of a batch count on from the seed, modulo 2**32."""
    seeds = {parse(seed=seed).seed for seed in [None, -1] * 50}
    assert len(seeds) > 90 and max(seeds) > 2**31 and all(0 <= seed < 2**32 for seed in seeds)
    assert parse(seed=2**32 - 2, num_images=4).seeds == [2**32 - 2, 2**32 - 1, 0, 1]


def test_lone_surrogates():
    """A lone surrogate becomes U+FFFD with a warning, in both prompts; the rest of the text stays."""
    request = parse(prompt="a \ud800cat \U0001f600", negative_prompt="\udfff")
    assert (request.prompt, request.negative_prompt) == ("a \ufffdcat \U0001f600", "\ufffd")
    assert len(request.warnings) == 2 and "negative_prompt" in request.warnings[1]
    assert json.dumps(refusal(scheduler="\ud800"), ensure_ascii=False).encode()


def test_loras():
    """`loras` replaces the stack; table names, adapter names and file names mean the same LoRA; [] is none."""
    assert parse(loras=[]).loras == {}
    names = ["Detail Tweaker XL", "detail_tweaker_xl", "DETAIL TWEAKER XL"]
    assert all(parse(loras=[{"name": name, "scale": -2}]).loras == {"detail_tweaker_xl": -2.0} for name in names)
    assert parse(loras=[{"name": "boring_reality_v3"}]).loras == {"boring_reality_primaryv3_0": 0.3}


def test_lora_tags():
    """A tag of the prompt sets its LoRA on top of the stack; an unknown one is left out with the names there are."""
    request = parse(prompt="a cat <lora:real_skin_slider:0.25> <lora:gone:1>", loras=[{"name": "Detail Tweaker XL"}])
    assert request.loras == {"detail_tweaker_xl": 1.5, "real_skin_slider": 0.25}
    assert len(request.warnings) == 1 and "<lora:gone>" in request.warnings[0]
    assert "detail_tweaker_xl" in request.warnings[0]
    assert "scale of <lora:real_skin_slider>" in refusal(prompt="a <lora:real_skin_slider:11>")
    assert parse(negative_prompt="<lora:real_skin_slider:0.25>").loras["real_skin_slider"] == 1.0
