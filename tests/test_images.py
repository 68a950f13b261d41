"""Image files: the recipe they carry, read back by programs that are not ours, and the size of an answer."""

import base64
import hashlib
import io
import json
import re
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import piexif
import piexif.helper
import pytest
from PIL import Image
from safetensors.numpy import save_file
from sd_parsers import ParserManager
from sd_parsers.data import Generators

import handler

FORMATS = tuple(handler.ENCODINGS)
CHECKPOINT = handler.NamedModel("Jib Mix Realistic", "jib_mix_v2.safetensors", "1590699", "0123456789")
LORAS = [
    handler.NamedModel("Detail Tweaker XL", "detail_tweaker_xl.safetensors", "135867", "a1b2c3d4e5f6", 1.5),
    handler.NamedModel("Hand Detail FLUX & XL", "hand: detail, xl.safetensors", "294259", "", -0.25),
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


def request(**fields) -> handler.JobRequest:
    return handler.parse_request({"prompt": "a cat", "seed": 7, **fields}, handler.Settings.from_environ())


def recipe(loras=LORAS, checkpoint=CHECKPOINT, seed: int = 7, **fields) -> str:
    return handler.a1111_parameters(request(**fields), seed, "sdxl-vae-fp16-fix", checkpoint, loras)


def picture(width: int = 64, height: int = 64, seed: int = 0) -> Image.Image:
    """Noise: what compresses least."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def reopened(file: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(file))
    image.load()
    return image


# the recipe's text


def test_recipe_is_a1111s_text():
    """The whole text, field by field, in A1111's order; what is unknown is left out."""
    assert recipe(negative_prompt="blurry", guidance_scale=7, width=832, height=1216) == (
        "a cat\n"
        "Negative prompt: blurry\n"
        "Steps: 24, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 7, Size: 832x1216, "
        "Model hash: 0123456789, Model: jib_mix_v2, VAE: sdxl-vae-fp16-fix, Clip skip: 2, "
        'Lora hashes: "detail_tweaker_xl: a1b2c3d4e5f6", '
        'Civitai resources: [{"type":"checkpoint","modelVersionId":1590699,"modelName":"Jib Mix Realistic"},'
        '{"type":"lora","weight":1.5,"modelVersionId":135867,"modelName":"Detail Tweaker XL"},'
        '{"type":"lora","weight":-0.25,"modelVersionId":294259,"modelName":"Hand Detail FLUX & XL"}]'
    )


def test_unknown_parts_are_left_out():
    """No negative prompt, hash, version id or LoRA: no line, field or entry of its own."""
    bare = recipe([], handler.NamedModel("mine", "mine.safetensors", "", ""), scheduler="Euler a", clip_skip=1)
    assert bare == (
        "a cat\nSteps: 24, Sampler: Euler a, CFG scale: 4.5, Seed: 7, Size: 1024x1024, "
        "Model: mine, VAE: sdxl-vae-fp16-fix"
    )


@pytest.mark.parametrize("name", handler.SCHEDULERS)
def test_sampler_and_schedule_type_give_the_name_back(name):
    """A1111 keeps the two apart; joined they are the scheduler that was asked for."""
    sampler, schedule = handler.split_schedule(name)
    assert f"{sampler} {schedule}".strip() == name
    assert schedule in ("", "Karras", "Exponential", "SGM Uniform") and not sampler.endswith(("Karras", "Uniform"))


A1111_FIELD = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')  # A1111's own, infotext_utils.py


def test_a1111s_own_expression_reads_every_field():
    """A1111 finds the fields, and its unquoting gives the LoRA hashes back."""
    loras = [LORAS[0], handler.NamedModel("b", "b,:b.safetensors", "", "ffffffffffff", 1.0)]
    fields = dict(A1111_FIELD.findall(recipe(loras).splitlines()[-1]))
    assert fields["Seed"] == "7" and fields["Size"] == "1024x1024" and fields["Clip skip"] == "2"
    assert json.loads(fields["Lora hashes"]) == "detail_tweaker_xl: a1b2c3d4e5f6, bb: ffffffffffff"


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_civitai_finds_its_resources(prompt):
    """Civitai's expression, JSON up to the first "}]" after ", Civitai resources: ", cuts out the whole list."""
    found = re.search(r", Civitai resources:\s*(\[\{.*?\}\])", recipe(prompt=prompt))
    resources = json.loads(found[1])
    assert [entry["modelVersionId"] for entry in resources] == [1590699, 135867, 294259]
    assert [entry.get("weight") for entry in resources] == [None, 1.5, -0.25]


def test_each_image_has_its_own_seed(tmp_path):
    """image_recipes: seed + i, wrapping at 2**32, the stack that was used and the hash of each file."""
    settings = handler.Settings.from_environ()
    name = handler.adapter_names(settings.loras)[0]
    lora = lora_file(tmp_path)
    files = handler.ModelFiles(tmp_path / "none.safetensors", {name: lora}, {})
    job = request(seed=2**32 - 1, num_images=2)
    texts = handler.image_recipes(job, settings, files, [{"name": name, "scale": 0.5}])
    assert [re.search(r"Seed: (\d+)", text)[1] for text in texts] == ["4294967295", "0"]
    for text in texts:
        assert f'Lora hashes: "detail_tweaker_xl: {handler.addnet_hash(lora)}"' in text
        assert '"weight":0.5,"modelVersionId":135867' in text


def test_embed_metadata_false_leaves_the_recipe_out():
    """Nothing of prompt or models is in the file then, in any format."""
    job = request(embed_metadata=False, num_images=2)
    texts = handler.image_recipes(job, handler.Settings.from_environ(), SimpleNamespace(), [])
    assert texts == ["", ""]
    for image_format in FORMATS:
        for file in handler.encode_images([picture(), picture()], texts, image_format):
            image = reopened(file)
            assert "parameters" not in image.info and not image.getexif()


# hashes


def lora_file(folder: Path, metadata: dict[str, str] | None = None) -> Path:
    path = folder / f"lora{len(metadata or ())}.safetensors"
    weights = {"a.lora_up.weight": np.arange(6, dtype=np.float32)}
    save_file(weights, path, metadata=metadata)
    return path


def test_lora_hash_is_a1111s(tmp_path):
    """12 digits of the SHA256 behind the safetensors header: training notes in the header do not change it."""
    one, two = lora_file(tmp_path), lora_file(tmp_path, {"ss_output_name": "x" * 1000})
    assert hashlib.sha256(one.read_bytes()).digest() != hashlib.sha256(two.read_bytes()).digest()
    assert handler.addnet_hash(one) == handler.addnet_hash(two)
    weights = np.arange(6, dtype=np.float32).tobytes()
    assert handler.addnet_hash(one) == hashlib.sha256(weights).hexdigest()[:12]


def test_a_missing_file_has_no_hash(tmp_path):
    """A hash that cannot be had is left out; the job goes on."""
    assert handler.addnet_hash(tmp_path / "gone.safetensors") == ""
    assert handler.checkpoint_hash(tmp_path / "gone.safetensors") == ""


def test_checkpoint_hash_is_a1111s(tmp_path):
    """10 digits of the whole file's SHA256, where the store has recorded it; a file put there by hand has none."""
    fetched, by_hand = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for file in (fetched, by_hand):
        file.write_bytes(b"model")
    handler.write_record(fetched, fetched.stat(), handler.file_sha256(fetched))
    assert handler.checkpoint_hash(fetched) == hashlib.sha256(b"model").hexdigest()[:10]
    assert handler.checkpoint_hash(by_hand) == ""


# the files


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_sd_parsers_reads_the_recipe(image_format, prompt):
    """The package sd-parsers finds prompts, sampler, seed and model, whatever letters the prompts hold."""
    text = recipe(prompt=prompt, negative_prompt=prompt[::-1])
    file = handler.encode_image(picture(), text, image_format)
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
    exif = reopened(handler.encode_image(picture(), text, image_format)).info["exif"]
    assert piexif.helper.UserComment.load(piexif.load(exif)["Exif"][piexif.ExifIFD.UserComment]) == text


def test_png_text_uses_the_chunk_that_its_letters_need():
    """tEXt for what Latin-1 can write, as A1111 does, and iTXt in UTF-8 beyond it; without NUL, which would end it."""
    for prompt, chunk in (("a café", b"tEXt"), ("a 桜", b"iTXt")):
        file = handler.encode_image(picture(), recipe(prompt=prompt), "png")
        assert chunk + b"parameters\0" in file
        assert reopened(file).text["parameters"].startswith(prompt + "\n")
    assert "\0" not in recipe(prompt="a\0b")


@pytest.mark.parametrize("image_format", FORMATS)
def test_files_are_what_they_say(image_format):
    """The format's own magic bytes, the size, RGB; PNG bit for bit, and JPEG without chroma subsampling."""
    image = picture(72, 48)
    file = handler.encode_image(image, recipe(), image_format)
    again = reopened(file)
    assert (again.format, again.size, again.mode) == (image_format.upper(), (72, 48), "RGB")
    if image_format == "png":
        assert again.tobytes() == image.tobytes()
    if image_format == "jpeg":
        assert [layer[1:3] for layer in again.layer] == [(1, 1)] * 3


def test_a_recipe_too_long_for_jpeg_is_left_out(caplog):
    """A JPEG marker holds 64 KB: the image is sent without the recipe rather than lost; WebP takes it whole."""
    text = recipe(prompt="😺" * 9_999, negative_prompt="😺" * 9_999)
    assert not reopened(handler.encode_image(picture(), text, "jpeg")).getexif()
    assert "does not fit into a JPEG" in caplog.text
    assert len(reopened(handler.encode_image(picture(), text, "webp")).info["exif"]) > handler.EXIF_MAX_BYTES


def test_a_batch_keeps_its_order():
    """Side by side in threads, each image keeps its place and its own recipe."""
    images = [picture(seed=i) for i in range(4)]
    files = handler.encode_images(images, [recipe(seed=i) for i in range(4)], "png")
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


def posted(fitted: dict) -> int:
    """The bytes of an answer with its times, as JSON in ASCII, which is the longest form."""
    times = {"timings": dict.fromkeys(("loras", "encode", "denoise", "decode", "images"), 1234.567)}
    metadata = fitted["metadata"] | times | {"processing_time": 1234.567}
    return len(json.dumps({"output": fitted | {"metadata": metadata}}))


def test_an_answer_that_fits_is_left_alone():
    """The images come as asked for, in bare base64, without a warning."""
    fitted = handler.fit_answer(answer(), [picture(), picture()], ["", ""], 9_500_000)
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
    whole = posted(handler.fit_answer(answer(), images, [recipe()] * number, 10**9))
    limit = int(whole * limit)
    fitted = handler.fit_answer(answer(), images, [recipe()] * number, limit)
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
    whole = posted(handler.fit_answer(answer(image_format), [picture(256, 256)], [""], 10**9))
    fitted = handler.fit_answer(answer(image_format), [picture(256, 256)], [""], whole // 2)
    assert fitted["metadata"]["image_format"] == "jpeg" and posted(fitted) <= whole // 2


def test_the_largest_job_of_noise_fits_into_the_default():
    """Four images of 2048x2048 that compress not at all: below 9.5 MB all the same."""
    fitted = handler.fit_answer(answer(), [picture(2048, 2048, seed) for seed in range(4)], [recipe()] * 4, 9_500_000)
    assert posted(fitted) <= 9_500_000 and len(fitted["images"]) == 4


def test_text_counts_as_much_as_images():
    """A long prompt in the metadata, six bytes a letter in JSON, is part of the answer's size."""
    long = "桜" * 10_000
    image = smooth(256, 256)
    whole = posted(handler.fit_answer(answer(), [image], [""], 10**9))
    fitted = handler.fit_answer(answer(prompt=long), [image], [""], whole + 30_000)
    assert fitted["metadata"]["image_format"] != "png" and posted(fitted) <= whole + 30_000


def test_what_cannot_fit_is_a_clear_failure():
    """Where even the smallest JPEG is too large: GENERATION_FAILED with the limit and what to do."""
    with pytest.raises(handler.GenerationFailed, match=r"answer of 0\.01 MB: ask for fewer or smaller"):
        handler.fit_answer(answer(), [picture(512, 512)], [""], 10_000)


def test_png_signature_and_single_stream():
    """Strict decoders: chunks IHDR, text, IDAT, IEND in this order with right lengths."""
    file = handler.encode_image(picture(), recipe(), "png")
    position, chunks = 8, []
    while position < len(file):
        length, kind = struct.unpack(">I4s", file[position : position + 8])
        chunks.append(kind)
        position += length + 12
    assert position == len(file) and chunks[:2] == [b"IHDR", b"tEXt"] and chunks[-1] == b"IEND"
    assert set(chunks[2:-1]) == {b"IDAT"}


# through handler()

SMALL = {"width": 256, "height": 256, "steps": 1, "seed": 2**32 - 1, "num_images": 2}


@pytest.mark.usefixtures("pipe")
@pytest.mark.parametrize("image_format", FORMATS)
def test_a_jobs_images_carry_their_recipe(image_format):
    """From the job to the parser: prompt, seed of each image, hashes and weights of the stack that was used."""
    fields = {**SMALL, "prompt": "a cat, 桜", "negative_prompt": "blurry", "image_format": image_format}
    loras = [{"name": "detail_tweaker_xl", "scale": 0.5}, {"name": "real_skin_slider", "scale": -2}]
    reply = handler.handler({"id": "test", "input": {**fields, "loras": loras}})
    assert reply["metadata"]["image_format"] == image_format
    hashes = [handler.addnet_hash(file) for file in handler.WORKER.ready()[0].model_files.loras.values()]
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
        assert all(digits in hashes for _, digits in found)


@pytest.mark.usefixtures("pipe")
def test_a_job_can_leave_the_recipe_out():
    """embed_metadata false: pixels alone, and the same ones."""
    pixels = []
    for embed in (True, False):
        job = {**SMALL, "prompt": "a secret cat", "embed_metadata": embed}
        data = [base64.b64decode(image) for image in handler.handler({"id": "t", "input": job})["images"]]
        assert all((b"secret" in file) == embed for file in data)
        pixels.append([reopened(file).tobytes() for file in data])
    assert pixels[0] == pixels[1]


@pytest.mark.usefixtures("pipe")
def test_a_job_above_the_limit_is_answered_smaller(monkeypatch):
    """MAX_RESPONSE_MB holds for the whole answer, and what was sent instead is said."""
    monkeypatch.setenv("MAX_RESPONSE_MB", "0.03")
    reply = handler.handler({"id": "test", "input": {**SMALL, "prompt": "a cat"}})
    assert len(json.dumps({"output": reply})) <= 30_000
    assert reply["metadata"]["image_format"] == "jpeg" and "JPEG of quality" in reply["metadata"]["warnings"][-1]
    assert {reopened(base64.b64decode(image)).format for image in reply["images"]} == {"JPEG"}
