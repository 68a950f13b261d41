"""Image files: the recipe they carry, read back by programs that are not ours, and the size of an answer."""

import base64
import hashlib
import io
import json
import re
import struct
from pathlib import Path

import numpy as np
import piexif
import piexif.helper
import pytest
import seams
from PIL import Image
from sd_parsers import ParserManager
from sd_parsers.data import Generators

import handler

FORMATS = ("png", "jpeg", "webp")
CHECKPOINT = seams.UsedModel("checkpoint", "Jib Mix Realistic", "jib_mix_v2", "1590699", "0123456789")
LORAS = [
    seams.UsedModel("lora", "Detail Tweaker XL", "detail_tweaker_xl", "135867", "a1b2c3d4e5f6", 1.5),
    seams.UsedModel("lora", "Hand Detail FLUX & XL", "hand: detail, xl", "294259", "", -0.25),
]
PROMPTS = {
    "plain": "a photo of a cat",
    "commas and colons": "cat, (dog:1.3), [bird], a:b, <lora:detail_tweaker_xl:1.5>",
    "quotes": "a sign that says \"hello, world: now\" and 'then' \\ some",
    "lines": "a cat\nsecond line\n\nBREAK\nfourth",
    "latin": "café à la crème, naïve, 50 £",
    "cjk": "桜の木の下で微笑む女性、高品質",
    "emoji": "a cat 😺 with 👩‍👩‍👧 and ❤️",
    "long": ", ".join(f"word{i}" for i in range(1000)),
}


def recipe(loras=LORAS, checkpoint=CHECKPOINT, seed: int = 7, **fields) -> str:
    request = seams.parse({"prompt": "a cat", "seed": 7, **fields})
    return seams.write_recipe(request, seed, "sdxl-vae-fp16-fix", [checkpoint, *loras])


def encode(image: Image.Image, text: str, image_format: str) -> bytes:
    return seams.encode_images([image], [text], image_format)[0]


def picture(width: int = 64, height: int = 64, seed: int = 0) -> Image.Image:
    """Noise: what compresses least."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def reopened(file: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(file))
    image.load()
    return image


# the recipe's text


A1111_FIELD = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')  # A1111's own, infotext_utils.py


def test_recipe_is_a1111s_text():
    """Prompts in their lines, then the fields in A1111's order, which A1111's own expression reads; Civitai's list is
    last."""
    text = recipe(negative_prompt="blurry", guidance_scale=7, width=832, height=1216)
    prompt, negative, line = text.split("\n")
    assert (prompt, negative) == ("a cat", "Negative prompt: blurry")
    line, resources = line.split(", Civitai resources: ")
    expected = {
        "Steps": "24",
        "Sampler": "DPM++ 2M",
        "Schedule type": "Karras",
        "CFG scale": "7",
        "Seed": "7",
        "Size": "832x1216",
        "Model hash": "0123456789",
        "Model": "jib_mix_v2",
        "VAE": "sdxl-vae-fp16-fix",
        "Clip skip": "2",
        "Lora hashes": '"detail_tweaker_xl: a1b2c3d4e5f6"',
    }
    found = A1111_FIELD.findall(line)
    assert [(name, value) for name, value in found if name in expected] == list(expected.items())
    assert resources == (
        '[{"type":"checkpoint","modelVersionId":1590699,"modelName":"Jib Mix Realistic"},'
        '{"type":"lora","weight":1.5,"modelVersionId":135867,"modelName":"Detail Tweaker XL"},'
        '{"type":"lora","weight":-0.25,"modelVersionId":294259,"modelName":"Hand Detail FLUX & XL"}]'
    )


def test_unknown_parts_are_left_out():
    """No negative prompt, hash, version id or LoRA: no line, field or entry of its own."""
    bare = recipe([], seams.UsedModel("checkpoint", "mine", "mine", "", ""), scheduler="Euler a")
    assert bare.startswith("a cat\nSteps: 24, Sampler: Euler a, CFG scale: 4.5, Seed: 7, Size: 1024x1024, Model: mine")
    for name in ("Negative prompt", "hash", "Civitai resources"):
        assert name not in bare


@pytest.mark.parametrize(
    "name", ["DPM++ 2M Karras", "DPM++ 2M", "DPM++ SDE Karras", "Euler a", "DPM2 a Karras", "K_EULER"]
)
def test_sampler_and_schedule_type_give_the_name_back(name):
    """A1111 keeps the two apart; joined they are the scheduler that was asked for."""
    fields = dict(A1111_FIELD.findall(recipe(scheduler=name).splitlines()[-1]))
    assert f"{fields['Sampler']} {fields.get('Schedule type', '')}".strip() == name
    assert not fields["Sampler"].endswith("Karras")


def test_lora_hashes_are_quoted_as_a1111_reads_them():
    """Unquoted by A1111's rule they are names and hashes, without the commas and colons of a file's name."""
    loras = [LORAS[0], seams.UsedModel("lora", "b", "b,:b", "", "ffffffffffff", 1.0)]
    fields = dict(A1111_FIELD.findall(recipe(loras).splitlines()[-1]))
    assert json.loads(fields["Lora hashes"]) == "detail_tweaker_xl: a1b2c3d4e5f6, bb: ffffffffffff"


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_civitai_finds_its_resources(prompt):
    """Civitai's expression, JSON up to the first "}]" after ", Civitai resources: ", cuts out the whole list."""
    found = re.search(r", Civitai resources:\s*(\[\{.*?\}\])", recipe(prompt=prompt))
    resources = json.loads(found[1])
    assert [entry["modelVersionId"] for entry in resources] == [1590699, 135867, 294259]
    assert [entry.get("weight") for entry in resources] == [None, 1.5, -0.25]


def test_checkpoint_hash_is_a1111s(civitai, tmp_path, monkeypatch):
    """10 digits of the whole file's SHA256, where the worker has fetched it; a file put there by hand has none, and
    one that is gone neither."""
    monkeypatch.setenv("CIVITAI_BASE_URL", civitai.url)
    monkeypatch.setenv("CIVITAI_API_KEY", civitai.key)
    source, fetched, by_hand = civitai.files[135867], tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    handler.download_file(handler.LORA_CONFIGS[0]["url"], fetched)
    by_hand.write_bytes(fetched.read_bytes())
    assert seams.recorded_hash(fetched) == hashlib.sha256(source.read_bytes()).hexdigest()[:10]
    assert seams.recorded_hash(by_hand) == seams.recorded_hash(tmp_path / "gone.safetensors") == ""


# the files


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_sd_parsers_reads_the_recipe(image_format, prompt):
    """The package sd-parsers finds prompts, sampler, seed and model, whatever letters the prompts hold."""
    text = recipe(prompt=prompt, negative_prompt=prompt[::-1])
    file = encode(picture(), text, image_format)
    info = ParserManager().parse(io.BytesIO(file))
    assert info.generator == Generators.AUTOMATIC1111
    (sampler,) = info.samplers
    assert [p.value for p in sampler.prompts] == [prompt.strip()]
    assert [p.value for p in sampler.negative_prompts] == [prompt[::-1].strip()]
    assert sampler.name == "DPM++ 2M" and sampler.model.hash == "0123456789" and sampler.model.name == "jib_mix_v2"
    assert sampler.parameters["seed"] == "7" and sampler.parameters["scheduler"] == "Karras"
    assert info.metadata["Size"] == "1024x1024" and info.metadata["Clip skip"] == "2"


@pytest.mark.parametrize("image_format", ["jpeg", "webp"])
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_piexif_reads_the_user_comment(image_format, prompt):
    """piexif, by which A1111 itself reads and writes EXIF, gives the very text back."""
    text = recipe(prompt=prompt)
    exif = reopened(encode(picture(), text, image_format)).info["exif"]
    assert piexif.helper.UserComment.load(piexif.load(exif)["Exif"][piexif.ExifIFD.UserComment]) == text


def test_png_text_uses_the_chunk_that_its_letters_need():
    """tEXt for what Latin-1 can write, as A1111 does, and iTXt in UTF-8 beyond it; without NUL, which would end it."""
    for prompt, chunk in (("a café", b"tEXt"), ("a 桜", b"iTXt")):
        file = encode(picture(), recipe(prompt=prompt), "png")
        assert chunk + b"parameters\0" in file
        assert reopened(file).text["parameters"].startswith(prompt + "\n")
    assert "\0" not in recipe(prompt="a\0b")


@pytest.mark.parametrize("image_format", FORMATS)
def test_files_are_what_they_say(image_format):
    """The format's own magic bytes, the size, RGB; PNG bit for bit, and JPEG without chroma subsampling."""
    image = picture(72, 48)
    file = encode(image, recipe(), image_format)
    again = reopened(file)
    assert (again.format, again.size, again.mode) == (image_format.upper(), (72, 48), "RGB")
    if image_format == "png":
        assert again.tobytes() == image.tobytes()
    if image_format == "jpeg":
        assert [layer[1:3] for layer in again.layer] == [(1, 1)] * 3


def test_a_recipe_too_long_for_jpeg_is_left_out(caplog):
    """A JPEG marker holds 64 KB: the image is sent without the recipe rather than lost; WebP takes it whole."""
    text = recipe(prompt="😺" * 9_999, negative_prompt="😺" * 9_999)
    assert not reopened(encode(picture(), text, "jpeg")).getexif()
    assert "does not fit into a JPEG" in caplog.text
    assert len(reopened(encode(picture(), text, "webp")).info["exif"]) > 65_533


def test_a_batch_keeps_its_order():
    """Side by side in threads, each image keeps its place and its own recipe."""
    images = [picture(seed=i) for i in range(4)]
    files = seams.encode_images(images, [recipe(seed=i) for i in range(4)], "png")
    for i, (image, file) in enumerate(zip(images, files, strict=True)):
        again = reopened(file)
        assert again.tobytes() == image.tobytes() and f"Seed: {i}," in again.text["parameters"]


# the answer's size


def answer(image_format: str = "png", **metadata) -> dict:
    return {
        "images": [],
        "seed": 7,
        "metadata": {"prompt": "a cat", "image_format": image_format, "warnings": ["an earlier one"], **metadata},
    }


def fit(answer: dict, images: list, recipes: list[str], max_bytes: int) -> dict:
    return seams.deliver(answer, images, recipes, None, max_bytes, "job")


def posted(fitted: dict) -> int:
    """The bytes of an answer with its times, as JSON in ASCII, which is the longest form."""
    times = {"timings": dict.fromkeys(("loras", "encode", "denoise", "decode", "images"), 1234.567)}
    metadata = fitted["metadata"] | times | {"processing_time": 1234.567}
    return len(json.dumps({"output": fitted | {"metadata": metadata}}))


def test_an_answer_that_fits_is_left_alone():
    """The images come as asked for, in bare base64, without a warning."""
    fitted = fit(answer(), [picture(), picture()], ["", ""], 9_500_000)
    assert fitted["metadata"] == answer()["metadata"]
    assert [reopened(base64.b64decode(image, validate=True)).format for image in fitted["images"]] == ["PNG"] * 2


@pytest.mark.parametrize(
    ("limit", "sent"),
    [(0.96, "webp"), (0.6, "jpeg"), (0.3, "jpeg"), (0.1, "jpeg"), (0.05, "jpeg")],
)
@pytest.mark.parametrize("number", [1, 3])
def test_a_larger_answer_is_made_smaller_step_by_step(limit, sent, number):
    """Lossless WebP where that is enough, then JPEG, never above the limit; metadata and the files say which."""
    images = [smooth(384, 384, seed) for seed in range(number)]
    whole = posted(fit(answer(), images, [recipe()] * number, 10**9))
    limit = int(whole * limit)
    fitted = fit(answer(), images, [recipe()] * number, limit)
    assert posted(fitted) <= limit
    assert fitted["metadata"]["image_format"] == sent and len(fitted["images"]) == number
    earlier, note = fitted["metadata"]["warnings"]
    assert earlier == "an earlier one" and ("lossless WebP" if sent == "webp" else "JPEG of quality") in note
    for image, data in zip(images, fitted["images"], strict=True):
        again = reopened(base64.b64decode(data))
        assert again.format == sent.upper() and again.size == image.size
        assert (again.tobytes() == image.tobytes()) == (sent == "webp")
        comment = again.getexif().get_ifd(0x8769)[0x9286]
        assert comment[8:].decode("utf-16-be") == recipe()


def smooth(width: int, height: int, seed: int = 0) -> Image.Image:
    """What a VAE gives: soft shapes under a little grain."""
    draw = np.random.default_rng(seed)
    shapes = Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    grain = draw.normal(0, 1, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(shapes) + grain, 0, 255).astype(np.uint8))


@pytest.mark.parametrize("image_format", ["jpeg", "webp"])
def test_lossy_formats_fall_to_smaller_jpegs(image_format):
    """A JPEG or WebP that is too large is never answered with a lossless file, which would be larger still."""
    whole = posted(fit(answer(image_format), [picture(256, 256)], [""], 10**9))
    fitted = fit(answer(image_format), [picture(256, 256)], [""], whole // 2)
    assert fitted["metadata"]["image_format"] == "jpeg" and posted(fitted) <= whole // 2


def test_the_largest_job_of_noise_fits_into_the_default():
    """Four images of 2048x2048 that compress not at all: below 9.5 MB all the same."""
    fitted = fit(answer(), [picture(2048, 2048, seed) for seed in range(4)], [recipe()] * 4, 9_500_000)
    assert posted(fitted) <= 9_500_000 and len(fitted["images"]) == 4


def test_text_counts_as_much_as_images():
    """A long prompt in the metadata, six bytes a letter in JSON, is part of the answer's size."""
    long = "桜" * 10_000
    image = smooth(256, 256)
    whole = posted(fit(answer(), [image], [""], 10**9))
    fitted = fit(answer(prompt=long), [image], [""], whole + 30_000)
    assert fitted["metadata"]["image_format"] != "png" and posted(fitted) <= whole + 30_000


@pytest.mark.usefixtures("pipe")
def test_what_cannot_fit_is_a_clear_failure(monkeypatch):
    """Where even the smallest JPEG is too large: GENERATION_FAILED with the limit and what to do."""
    monkeypatch.setenv("MAX_RESPONSE_MB", "0.01")
    job = {**SMALL, "prompt": "x" * 9_000, "long_prompt": "truncate", "num_images": 1}
    reply = handler.handler({"input": job})
    assert reply["code"] == "GENERATION_FAILED"
    assert "an answer of 0.01 MB: ask for fewer or smaller ones, or set a bucket" in reply["error"]


@pytest.mark.usefixtures("pipe")
@pytest.mark.parametrize("image_format", FORMATS)
def test_no_encoding_is_tried_twice(monkeypatch, image_format):
    """Until an answer fits, each of its images is written once in each way: a JPEG of quality 95 is not made again."""
    monkeypatch.setenv("MAX_RESPONSE_MB", "0.03")
    save, saved = Image.Image.save, []

    def count(image, file, format=None, **options):
        saved.append((format, options.get("quality", ENCODED_AS[format]), options.get("lossless", format == "png")))
        save(image, file, format, **options)

    monkeypatch.setattr(Image.Image, "save", count)
    reply = handler.handler({"input": {**SMALL, "prompt": "a cat", "image_format": image_format}})
    assert reply["metadata"]["image_format"] == "jpeg" and len(saved) > 2 * len(reply["images"])
    assert {saved.count(way) for way in saved} == {len(reply["images"])}
    assert saved[0][0] == image_format


def test_png_signature_and_single_stream():
    """Strict decoders: chunks IHDR, text, IDAT, IEND in this order with right lengths."""
    file = encode(picture(), recipe(), "png")
    position, chunks = 8, []
    while position < len(file):
        length, kind = struct.unpack(">I4s", file[position : position + 8])
        chunks.append(kind)
        position += length + 12
    assert position == len(file) and chunks[:2] == [b"IHDR", b"tEXt"] and chunks[-1] == b"IEND"
    assert set(chunks[2:-1]) == {b"IDAT"}


# through handler()

ENCODED_AS = {"png": None, "jpeg": 95, "webp": 95}
SMALL = {"width": 256, "height": 256, "steps": 1, "seed": 2**32 - 1, "num_images": 2}


def addnet_hash(file: Path) -> str:
    """A1111's of a LoRA: of what follows the safetensors header, so that training notes in it change nothing."""
    data = file.read_bytes()
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()[:12]


@pytest.mark.usefixtures("pipe")
@pytest.mark.parametrize("image_format", FORMATS)
def test_a_jobs_images_carry_their_recipe(world, image_format):
    """From the job to the parser: prompt, seed of each image, hashes and weights of the stack that was used."""
    fields = {**SMALL, "prompt": "a cat, 桜", "negative_prompt": "blurry", "image_format": image_format}
    loras = [{"name": "detail_tweaker_xl", "scale": 0.5}, {"name": "real_skin_slider", "scale": -2}]
    reply = handler.handler({"id": "test", "input": {**fields, "loras": loras}})
    assert reply["metadata"]["image_format"] == image_format
    hashes = [addnet_hash(file) for file in world.loras]
    for data, seed in zip(reply["images"], ("4294967295", "0"), strict=True):
        info = ParserManager().parse(io.BytesIO(base64.b64decode(data, validate=True)))
        (sampler,) = info.samplers
        assert sampler.prompts[0].value == "a cat, 桜" and sampler.negative_prompts[0].value == "blurry"
        assert sampler.parameters["seed"] == seed and info.metadata["Size"] == "256x256"
        (text,) = info.raw_parameters.values() if image_format != "png" else [info.raw_parameters["parameters"]]
        listed = json.loads(re.search(r", Civitai resources:\s*(\[\{.*?\}\])", text)[1])
        assert [(entry.get("weight"), entry["modelVersionId"]) for entry in listed] == [
            (None, 1590699),
            (0.5, 135867),
            (-2, 1681921),
        ]
        found = re.findall(r"(\w+): ([0-9a-f]{12})", re.search(r'Lora hashes: "([^"]*)"', text)[1])
        assert [name for name, _ in found] == ["detail_tweaker_xl", "real_skin_slider"]
        assert [digits for _, digits in found] == [hashes[0], hashes[8]]


@pytest.mark.usefixtures("pipe")
@pytest.mark.parametrize("image_format", FORMATS)
def test_a_job_can_leave_the_recipe_out(image_format):
    """embed_metadata false: the same pixels, and nothing of prompt or models in the file."""
    pixels = []
    for embed in (True, False):
        job = {**SMALL, "prompt": "a secret cat", "embed_metadata": embed, "image_format": image_format}
        images = [reopened(base64.b64decode(image)) for image in handler.handler({"id": "t", "input": job})["images"]]
        for image in images:
            assert bool("parameters" in image.info or image.getexif()) == embed
        pixels.append([image.tobytes() for image in images])
    assert pixels[0] == pixels[1]


@pytest.mark.usefixtures("pipe")
def test_a_job_above_the_limit_is_answered_smaller(monkeypatch):
    """MAX_RESPONSE_MB holds for the whole answer, and what was sent instead is said."""
    monkeypatch.setenv("MAX_RESPONSE_MB", "0.03")
    reply = handler.handler({"id": "test", "input": {**SMALL, "prompt": "a cat"}})
    assert len(json.dumps({"output": reply})) <= 30_000
    assert reply["metadata"]["image_format"] == "jpeg" and "JPEG of quality" in reply["metadata"]["warnings"][-1]
    assert {reopened(base64.b64decode(image)).format for image in reply["images"]} == {"JPEG"}
