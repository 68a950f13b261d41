"""Pictures to start from: image to image, inpainting, hires; pictures and addresses as users send them.

What the passes do is measured against k-diffusion (kdiffusion.py) on a network that is a formula; the addresses are
those of a TLS server of this test, reached in the place of public ones by the connect call alone.
"""

import base64
import contextlib
import datetime
import hashlib
import io
import ipaddress
import itertools
import re
import socket
import ssl
import struct
import threading
import time
import zlib

import kdiffusion
import numpy as np
import pytest
import requests
import seams
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from kdiffusion import Network, error
from PIL import Image, ImageCms

import handler

SEEDS = [7, 8]


@pytest.fixture(autouse=True)
def no_start(monkeypatch):
    """What is not refused fails at once, where no test asks for a pipeline: no model is fetched."""
    monkeypatch.setenv("ALLOW_CPU", "0")
    monkeypatch.setenv("CIVITAI_BASE_URL", "http://127.0.0.1:9")


SECRET = "c2VjcmV0"  # begins every picture that is none: it must stand in no error and no log line


def scene(width: int = 96, height: int = 80) -> Image.Image:
    """A picture without symmetry."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], -1).astype(np.uint8))


def text_of(image: Image.Image, image_format: str = "PNG", **options) -> str:
    """A picture as a job takes it."""
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return base64.b64encode(buffer.getvalue()).decode()


def read(text: str, **fields) -> np.ndarray:
    """A picture's pixels in the job's size."""
    fields = {"width": 256, "height": 256} | fields
    return np.asarray(seams.parse({"prompt": "x", "image": text, **fields}).image).astype(int)


def refusal(**fields) -> str:
    """The sentence of a job that is refused as INVALID_INPUT."""
    answer = handler.handler({"input": {"prompt": "x", **fields}})
    assert answer.get("code") == "INVALID_INPUT", answer
    return answer["error"]


def images_of(answer: dict) -> list[Image.Image]:
    assert "error" not in answer, answer
    return [Image.open(io.BytesIO(base64.b64decode(text))) for text in answer["images"]]


# ---------------------------------------------------------------------------------------------------------------------
# pictures as users send them


def test_base64_with_breaks_prefix_and_without_padding_is_one_picture():
    """Line breaks, spaces, a data: prefix in any case and missing "=" change nothing."""
    plain = text_of(scene())
    lines = re.sub("(.{76})", "\\1\r\n ", plain)
    expected = read(plain)
    for text in (lines, f"data:image/png;base64,{plain}", f"\n DATA:image/PNG;charset=x;BASE64, {lines}\n"):
        assert (read(text) == expected).all()
    assert (read(plain.rstrip("=")) == expected).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_a_picture(orientation):
    """Every orientation of a JPEG, of a PNG and of a WebP looks as a viewer shows it."""
    turns = [None, None, *(Image.Transpose(i) for i in (0, 3, 1, 5, 4, 6, 2))]  # undoing is what a viewer does
    image = scene(256, 320)
    turned = image if orientation == 1 else image.transpose(turns[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    for image_format, options in (("JPEG", {"quality": 100}), ("PNG", {}), ("WEBP", {"lossless": True})):
        request = seams.parse({"prompt": "x", "image": text_of(image, image_format, exif=exif, **options)})
        assert (request.width, request.height) == turned.size
        assert np.abs(np.asarray(request.image).astype(int) - np.asarray(turned)).mean() < 2


def test_grey_palette_16_bit_and_cmyk_are_their_colours():
    """Each kind gives the colours that the RGB picture has; 16 bits are scaled, not cut off at white."""
    image = scene(256, 256)
    grey = np.asarray(image.convert("L"))
    expected = np.repeat(grey[..., None], 3, -1).astype(int)
    deep = grey.astype(np.uint16) * 257
    for other in (Image.fromarray(grey), Image.fromarray(deep), Image.fromarray(grey > 127)):
        found = read(text_of(other))
        assert np.abs(found - (expected if other.mode != "1" else (expected > 127) * 255)).max() <= 1, other.mode
    palette = image.quantize(200)
    assert (read(text_of(palette)) == np.asarray(palette.convert("RGB"))).all()
    cmyk = read(text_of(image.convert("CMYK"), "JPEG", quality=100, subsampling=0))
    assert np.abs(cmyk - np.asarray(image)).mean() < 4
    assert np.abs(read(text_of(image, "WEBP", quality=95)) - np.asarray(image)).mean() < 8


def test_what_is_transparent_is_white():
    """Alpha, half of it, a palette's and a grey's, and a colour that stands for nothing."""
    image = Image.new("RGBA", (256, 256), (200, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 128, 256))
    image.paste((0, 0, 0, 128), (0, 0, 64, 256))
    found = read(text_of(image))[0]
    assert found[100].tolist() == [255] * 3 and found[200].tolist() == [200, 0, 0]
    assert found[10].tolist() == [127] * 3
    palette = Image.new("P", (256, 256))
    palette.putpalette([1, 2, 3, 200, 0, 0])
    palette.paste(1, (128, 0, 256, 256))
    assert read(text_of(palette, transparency=0))[0, [0, 200]].tolist() == [[255] * 3, [200, 0, 0]]
    assert read(text_of(image.convert("LA")))[0, 100].tolist() == [255] * 3
    keyed = Image.new("RGB", (256, 256), (9, 9, 9))
    assert read(text_of(keyed, transparency=(9, 9, 9)))[0, 0].tolist() == [255] * 3


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((640, 512), (640, 512)),
        ((643, 509), (640, 512)),
        ((64, 64), (256, 256)),
        ((100, 300), (256, 768)),
        ((4000, 3000), (2048, 1536)),
        ((64, 512), (256, 2048)),
        ((5000, 640), (2048, 264)),
    ],
)
def test_a_jobs_size_is_by_default_the_pictures(size, expected):
    """Scaled to fit 256 to 2048 in its shape, then to the nearest multiple of 8; width and height given come first."""
    request = seams.parse({"prompt": "x", "image": text_of(Image.new("RGB", size))})
    assert (request.width, request.height) == request.image.size == expected
    request = seams.parse({"prompt": "x", "image": text_of(Image.new("RGB", size)), "width": 320, "height": 256})
    assert (request.width, request.height) == request.image.size == (320, 256)


def test_a_picture_in_the_jobs_size_is_taken_as_it_is_and_others_by_lanczos():
    """Bit for bit; and Pillow's Lanczos."""
    image = scene(256, 320)
    assert (read(text_of(image), width=256, height=320) == np.asarray(image)).all()
    smaller = image.resize((256, 256), Image.Resampling.LANCZOS)
    assert (read(text_of(image), width=256, height=256) == np.asarray(smaller)).all()


def png(width: int, height: int, data: bytes = b"", extra: bytes = b"") -> str:
    """A PNG that says that it is so large, whatever it holds."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    file = b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return base64.b64encode(file).decode()


TEXT = base64.b64encode(b"secret, and no picture" * 9).decode()
WHOLE = text_of(scene(), "PNG")
GIF = text_of(scene(), "GIF")
BAD_PICTURES = {
    "a number": (5, "must be text"),
    "a list": ([SECRET], "must be text"),
    "an object": ({"url": SECRET}, "must be text"),
    "empty": ("", "PNG, JPEG or WebP"),
    "no base64": (f"{SECRET}?!", "base64"),
    "base64 of the wrong length": (f"{SECRET}c", "base64"),
    "a surrogate": (f"{SECRET}\ud800", "base64"),
    "a data: URI without base64": (f"data:image/svg+xml,<svg>{SECRET}</svg>", "base64"),
    "http": (f"http://example.com/{SECRET}.png", "https address"),
    "a file": (f"file:///{SECRET}", "https address"),
    "a text": (TEXT, "PNG, JPEG or WebP"),
    "a GIF": (GIF, "PNG, JPEG or WebP"),
    "a PNG cut off": (WHOLE[: len(WHOLE) // 2 // 4 * 4], "cut off"),
    "a JPEG cut off": (text_of(scene(), "JPEG")[:800], "cut off"),
    "a WebP cut off": (text_of(scene(), "WEBP", quality=100)[:400], "cut off"),
    "a bomb": (png(50_000, 50_000), "at most 32 million pixels"),
    "a bomb that Pillow only warns of": (png(10_000, 9_000), "at most 32 million pixels"),
    "one pixel too many": (png(8_000, 4_001), "at most 32 million pixels"),
    "no data": (png(100, 100), "damaged"),
    "too small": (text_of(Image.new("RGB", (64, 63))), "at least 64"),
    "too many bytes": (base64.b64encode(bytes(20_000_001)).decode(), "at most 20 MB"),
    "too long": (text_of(Image.new("RGB", (64, 520))), "give width and height"),
}


@pytest.mark.parametrize("field", ["image", "mask"])
@pytest.mark.parametrize("kind", list(BAD_PICTURES))
def test_a_bad_picture_is_refused_by_a_sentence(kind, field, caplog):
    """INVALID_INPUT with the field's name, before a model is loaded, and nothing of the picture in answer or log."""
    text, rule = BAD_PICTURES[kind]
    fields = {field: text} if field == "image" else {"image": WHOLE, "mask": text}
    if (kind, field) == ("too long", "mask"):
        rule = "size"
    sentence = refusal(**fields)
    assert sentence.startswith((field, "an image")) and rule in sentence
    assert SECRET not in sentence + caplog.text and (len(sentence) < 250)


def test_a_bomb_is_told_by_its_header():
    """A PNG of 30,000 x 30,000 pixels that holds 3 GB of them costs no memory and no time."""
    started = time.process_time()
    refusal(image=png(30_000, 30_000, bytes(10**7)))
    assert time.process_time() - started < 1


def test_broken_files_of_all_kinds_are_refused_or_read():
    """Bytes flipped anywhere in pictures of every format end in a picture or in INVALID_INPUT, never in a failure."""
    random = np.random.default_rng(0)
    for image_format, options in (("PNG", {}), ("JPEG", {"exif": bytes(Image.Exif())}), ("WEBP", {})):
        file = base64.b64decode(text_of(scene(64, 64), image_format, **options))
        for _ in range(60):
            broken = bytearray(file)
            for place in random.integers(0, min(len(file), 700), 3):
                broken[place] = random.integers(0, 256)
            with contextlib.suppress(seams.refused()):
                read(base64.b64encode(broken).decode())


# ---------------------------------------------------------------------------------------------------------------------
# fields that do not go together


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"strength": 0.5}, ["strength", "image"]),
        ({"denoising_strength": 0.5}, ["denoising_strength", "image"]),
        ({"mask": WHOLE}, ["mask", "image"]),
        ({"image": None, "mask_image": WHOLE}, ["mask_image", "image"]),
        ({"image": WHOLE, "hires": {"scale": 2}}, ["hires", "image"]),
        ({"image": WHOLE, "strength": 0}, ["strength", "above 0"]),
        ({"image": WHOLE, "strength": 1.01}, ["strength", "to 1"]),
        ({"image": WHOLE, "strength": True}, ["strength", "number"]),
        ({"image": WHOLE, "init_image": WHOLE}, ["image", "init_image"]),
        ({"image": WHOLE, "mask": text_of(scene(80, 96))}, ["mask", "96x80", "80x96"]),
        ({"image": WHOLE, "mask": WHOLE, "mask_blur": 65}, ["mask_blur", "64"]),
        ({"image": WHOLE, "mask": WHOLE, "mask_blur": 1.5}, ["mask_blur", "whole"]),
        ({"hires": 2}, ["hires", "object"]),
        ({"hires": {}}, ["hires.scale", "required"]),
        ({"hires": {"scale": 2, "scle": 1}}, ["hires", "scle", '"scale"']),
        ({"hires": {"scale": 0.9}}, ["hires.scale", "1 to 4"]),
        ({"hires": {"scale": float("nan")}}, ["hires.scale", "1 to 4"]),
        ({"hires": {"scale": 2, "strength": 0}}, ["hires.strength", "above 0"]),
        ({"hires": {"scale": 2, "steps": 151}}, ["hires.steps", "150"]),
        ({"hires": {"scale": 2, "upscaler": "Lanczos"}}, ["hires.upscaler", '"lanczos"']),
        ({"hires": {"scale": 4}, "width": 1032}, ["hires.scale", "4,096", "4128x4096"]),
        ({"hires": {"scale": 2, "strength": 0.01}}, ["hires.strength", "999"]),
        ({"hires": {"scale": 2, "strength": 1e-310}}, ["hires.strength", "999"]),
    ],
)
def test_what_does_not_go_together_is_refused(fields, names):
    """By a sentence with the names that the job used, the rule and what to do."""
    sentence = refusal(**fields)
    assert all(name in sentence for name in names), sentence


@pytest.mark.parametrize("fields", [{"image": WHOLE}, {"hires": {"scale": 2}}])
def test_samplers_that_begin_with_noise_alone_are_refused(fields):
    """UniPC, DEIS, PLMS and the official worker's names, and the nearest is one that is taken."""
    for name in (*seams.OFFICIAL, "UniPC", "DEIS", "PLMS"):
        sentence = refusal(scheduler=name, **fields)
        instead = re.search('nearest: "(.*)"', sentence)[1]
        assert name in sentence
        seams.parse({"prompt": "x", "scheduler": instead, **fields})
    seams.parse({"prompt": "x", "scheduler": "DDIM Karras", **fields})


def test_null_is_no_picture():
    """As the official worker's jobs have it: "image_url": null."""
    request = seams.parse({"prompt": "x", "image_url": None, "mask": None, "hires": None, "strength": None})
    assert (request.image, request.mask, request.hires, request.strength) == (None,) * 4


# ---------------------------------------------------------------------------------------------------------------------
# passes


def test_a_jobs_passes_are_a1111s():
    """Sizes and steps of setup_img2img_steps, for every strength; hires runs exactly its steps."""
    for steps, strength in itertools.product((1, 2, 20, 24, 150), (0.001, 0.3, 0.5, 0.75, 0.999, 1)):
        expected = int(min(strength, 0.999) * steps) + 1
        assert seams.passes(image=text_of(scene(256, 320)), steps=steps, strength=strength) == [
            (256, 320, steps, expected)
        ]
    assert seams.passes(steps=24) == [(1024, 1024, 24, 24)]
    for steps, given, strength, scale in itertools.product((1, 20, 150), (0, 7), (0.2, 0.5, 1), (1, 1.3, 2)):
        first, second = seams.passes(
            steps=steps, width=832, hires={"scale": scale, "steps": given, "strength": strength}
        )
        run = given or steps
        size = int(832 * scale) // 8 * 8, int(1024 * scale) // 8 * 8
        assert (first, second) == ((832, 1024, steps, steps), (*size, int(run / min(strength, 0.999)), run))


def from_latents(sampler: str, schedule: str, steps: int, run: int, start: torch.Tensor, mask=None) -> torch.Tensor:
    """A1111's sample_img2img on k-diffusion: latents + noise · σ, then the schedule's last steps; with a mask every
    denoised is the start outside it."""
    denoiser = kdiffusion.external.DiscreteEpsDDPMDenoiser(Network(), Network().alphas, quantize=False)

    def model(x, sigma, **_):
        denoised = denoiser(x, sigma)
        return denoised if mask is None else denoised * mask + start * (1 - mask)

    discard = sampler in kdiffusion.DISCARD
    whole = kdiffusion.sigmas_of(schedule, steps + discard, denoiser)
    whole = torch.cat([whole[:-2], whole[-1:]]) if discard else whole
    sigmas = whole[steps - run :]
    streams = [kdiffusion.cpu_stream(seed, kdiffusion.SHAPE) for seed in SEEDS]
    x = start + torch.stack([draw() for draw in streams]) * sigmas[0]
    function, options = kdiffusion.FUNCTIONS[sampler]
    if sampler in kdiffusion.SDE:
        noise = kdiffusion.brownian_noise(x, (whole[whole > 0].min(), whole.max()), SEEDS, kdiffusion.cpu_stream)
        options = options | {"noise_sampler": noise}
    elif sampler in kdiffusion.ANCESTRAL:
        options = options | {"noise_sampler": lambda *_: torch.stack([draw() for draw in streams])}
    return function(model, x, sigmas, disable=True, **options)


@pytest.mark.parametrize("sampler", kdiffusion.FUNCTIONS)
def test_every_sampler_starts_from_latents_as_k_diffusions(pipe, sampler):
    """In mid-schedule, with and without a mask, from one picture and from two; the noise's stream goes on from the
    first draw. The Brownian tree is the whole schedule's."""
    start = torch.randn(2, *kdiffusion.SHAPE, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(8, 8)
    mask[2:5, 1:7] = 1
    schedule = "Exponential" if sampler in kdiffusion.SDE else "Karras"
    limit = 1e-3 if sampler in kdiffusion.SDE else 1e-4
    with seams.formula_engine(Network()) as engine:
        for latents, where in ((start, None), (start[:1], mask)):
            ours = seams.denoise(
                engine,
                f"{sampler} {schedule}",
                8,
                SEEDS,
                run=4,
                latents=latents,
                mask=None if where is None else where.bool(),
            )
            assert error(ours, from_latents(sampler, schedule, 8, 4, latents, where)) < limit
            if where is not None:
                assert torch.equal(ours[:, :, where == 0], latents.expand_as(ours)[:, :, where == 0])


def test_a_pass_calls_the_network_as_often_as_its_steps_say(pipe):
    """One call a step, Heun's two but for the last step."""
    calls = []

    def counted(x, time):
        calls.append(float(torch.as_tensor(time).flatten()[0]))
        return Network()(x, time)

    with seams.formula_engine(counted) as engine:
        for sampler, run, expected in (("Euler", 3, 3), ("Heun", 3, 5), ("DPM2", 3, 5), ("LCM", 2, 2)):
            calls.clear()
            seams.denoise(engine, sampler, 8, SEEDS[:1], run=run, latents=torch.zeros(1, *kdiffusion.SHAPE))
            assert len(calls) == expected, sampler


def kernel(name: str, distance: np.ndarray) -> np.ndarray:
    """The weight of a pixel so far away: a tent, or Keys' cubic with torch's a, or Pillow's where it smooths."""
    x, a = np.abs(distance), -0.5 if "antialiased" in name else -0.75
    if "bicubic" not in name:
        return np.clip(1 - x, 0, None)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    return np.where(x <= 1, near, np.where(x < 2, a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a, 0))


def weights(name: str, size: int, wanted: int) -> np.ndarray:
    """(wanted, size): how a row is made longer, the slow way."""
    table = np.zeros((wanted, size))
    for i in range(wanted):
        centre = (i + 0.5) * size / wanted - 0.5
        if "nearest" in name:
            table[i, int(i * size / wanted if "exact" not in name else (i + 0.5) * size / wanted)] = 1
            continue
        for j in range(int(centre) - 3, int(centre) + 5):
            inside = min(max(j, 0), size - 1)
            if j == inside or "antialiased" not in name:  # at the edge: its pixel again, or none
                table[i, inside] += kernel(name, np.array(j - centre))
    return table / table.sum(1, keepdims=True)


@pytest.mark.parametrize("upscaler", [name for name in seams.UPSCALERS if name != "lanczos"])
def test_upscalers_of_latents_do_what_they_are_named(upscaler):
    """Against the sums written out; every size, up to 8 · latents of it."""
    latents = torch.randn(2, 4, 8, 9, generator=torch.Generator().manual_seed(1))
    for height, width in ((8, 9), (11, 12), (16, 18), (30, 36)):
        found = seams.enlarge(latents, width * 8, height * 8, upscaler)
        rows, columns = weights(upscaler, 8, height), weights(upscaler, 9, width)
        expected = np.einsum("ai,bj,ncij->ncab", rows, columns, latents.double().numpy())
        assert np.abs(found.numpy() - expected).max() < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# jobs on the tiny world

SMALL = {"prompt": "a cat", "steps": 2, "seed": 7, "loras": [], "guidance_scale": 1}


def job(**fields) -> dict:
    return handler.handler({"input": {**SMALL, **fields}})


def calls_of(pipe, monkeypatch) -> list[tuple[int, ...]]:
    """The shapes that the UNet is called with from now on."""
    calls, forward = [], pipe.unet.forward
    monkeypatch.setattr(
        pipe.unet, "forward", lambda x, *args, **kw: (calls.append(tuple(x.shape)), forward(x, *args, **kw))[1]
    )
    return calls


def test_inpainting_leaves_what_is_outside_bit_for_bit(pipe):
    """Where the blurred mask is 0 the PNG's pixels are the resized picture's; inside they are drawn anew, and every
    image of a batch is its own. The recipe gives the same pixels with the same files beside it."""
    image, mask = scene(250, 260), Image.new("L", (250, 260))
    mask.paste(255, (0, 0, 100, 260))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    pictured = text_of(image, icc_profile=profile)
    fields = {"image": pictured, "mask": text_of(mask), "mask_blur": 2, "strength": 0.9}
    answer = job(**fields, num_images=2)
    first, second = images_of(answer)
    assert answer["metadata"]["strength"] == 0.9
    original, drawn = np.asarray(image.resize((256, 264), Image.Resampling.LANCZOS)), np.asarray(first)
    assert first.size == (256, 264) and set(first.info) == {"parameters"}  # nothing of the picture's own
    assert (drawn[:, 112:] == original[:, 112:]).all()
    assert (drawn[:, :95] != original[:, :95]).any(-1).mean() > 0.9
    assert (drawn[:, :95] != np.asarray(second)[:, :95]).any(-1).mean() > 0.5
    recipe = second.info["parameters"]
    for key, file in (("Image", fields["image"]), ("Mask", fields["mask"])):
        assert f"{key} SHA256: {hashlib.sha256(base64.b64decode(file)).hexdigest()}" in recipe
    assert "Denoising strength: 0.9" in recipe and "Mask blur: 2" in recipe
    given = {"parameters": recipe, "image": fields["image"], "mask": fields["mask"]}
    request = seams.parse(given)
    assert (request.strength, request.mask_blur, request.seed, request.warnings) == (0.9, 2, 8, ())


def test_hires_runs_a_second_pass_in_the_new_size(pipe, monkeypatch):
    """Its steps exactly, by latents and by pixels; progress counts both; the recipe alone gives the same pixels."""
    calls = calls_of(pipe, monkeypatch)
    for upscaler in ("latent (nearest-exact)", "lanczos"):
        calls.clear()
        hires = {"scale": 1.27, "steps": 3, "strength": 0.4, "upscaler": upscaler}
        answer = job(width=256, height=256, hires=hires, scheduler="Euler a")
        (image,) = images_of(answer)
        assert image.size == (320, 320)
        assert calls == [(1, 4, 32, 32)] * 2 + [(1, 4, 40, 40)] * 3
        assert answer["metadata"]["hires"] == hires
        assert (answer["metadata"]["width"], answer["metadata"]["height"]) == (256, 256)
    recipe = image.info["parameters"]
    words = "Denoising strength: 0.4, Hires upscale: 1.27, Hires steps: 3, Hires upscaler: Lanczos"
    assert words in recipe
    again = images_of(handler.handler({"input": {"parameters": recipe, "loras": []}}))[0]
    assert (np.asarray(again) == np.asarray(image)).all()
    steps = seams.progress(**{**SMALL, "hires": {"scale": 1, "steps": 1}})
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_a_strength_of_nearly_nothing_leaves_the_picture_nearly_as_it_is(pipe):
    """One step from the lowest σ: what the VAE gives back of the picture, whatever the prompt."""
    image = text_of(scene(256, 256))
    one, other = (images_of(job(image=image, strength=0.001, steps=10, prompt=prompt))[0] for prompt in ("a cat", "x"))
    assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).mean() < 6


def test_the_picture_is_encoded_once_and_by_the_posteriors_mode(pipe, monkeypatch):
    """For a batch too; a NaN of the VAE is cured by a second try in float32."""
    calls, encode = [], pipe.vae.encode

    def broken(pixels, *args, **kw):
        calls.append(len(pixels))
        posterior = encode(pixels, *args, **kw)
        if len(calls) == 1:
            posterior.latent_dist.mean = posterior.latent_dist.mean * float("nan")
        return posterior

    fields = {"image": text_of(scene(256, 256)), "strength": 0.3, "num_images": 2}
    expected = images_of(job(**fields))
    monkeypatch.setattr(pipe.vae, "encode", broken)
    found = images_of(job(**fields))
    assert calls == [1, 1]
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(found, expected, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# recipes


def recipe_of(**keys) -> str:
    """Generation data with further keys."""
    line = {"Steps": 20, "Sampler": "Euler a", "CFG scale": 7, "Seed": 1, "Size": "512x768", **keys}
    return "a cat\n" + ", ".join(f"{key.replace('_', ' ')}: {value}" for key, value in line.items())


@pytest.mark.parametrize("upscaler", seams.UPSCALERS)
def test_hires_keys_of_recipes_are_honoured(upscaler):
    """A1111's words for each upscaler; without Hires steps as many as the first pass."""
    name = upscaler.replace("latent", "Latent").replace("lanczos", "Lanczos")
    keys = {"Denoising strength": 0.45, "Hires upscale": 1.5, "Hires upscaler": name}
    request = seams.parse({"parameters": recipe_of(**keys)})
    assert vars(request.hires) == {"scale": 1.5, "strength": 0.45, "steps": 0, "upscaler": upscaler}
    assert not request.warnings
    assert seams.parse({"parameters": recipe_of(**keys, **{"Hires steps": 9})}).hires.steps == 9


def test_hires_resize():
    """A1111's other way to say the second pass's size, exactly; where it would crop it is left out and named."""
    for size, resize, sides in (
        ("512x768", "1024x1536", (1024, 1536)),
        ("512x768", "0x1536", (1024, 1536)),
        ("832x1216", "1920x0", (1920, 2800)),
        ("832x1216", "1248x1824", (1248, 1824)),
        *(("512x768", text, None) for text in ("1024x1400", "1024x1528", "-1024x0", "0x0", "big", f"{10**400}x0")),
    ):
        words = {"Denoising strength": 0.45, "Size": size, "Hires resize": resize}
        request = seams.parse({"parameters": recipe_of(**words)})
        if sides:
            assert request.hires.strength == 0.45 and not request.warnings
            assert seams.passes(width=request.width, height=request.height, hires=vars(request.hires))[1][:2] == sides
        else:
            assert request.hires is None and any("Hires resize" in warning for warning in request.warnings)


def test_an_upscaler_that_is_not_here_is_lanczos_with_a_warning():
    """ESRGAN kinds by name; "None" is Lanczos in A1111 too."""
    for name, warned in (("4x-UltraSharp", True), ("R-ESRGAN 4x+", True), ("Nearest", True), ("None", False)):
        request = seams.parse({"parameters": recipe_of(**{"Hires upscale": 2, "Hires upscaler": name})})
        assert request.hires.upscaler == "lanczos"
        assert any(name in warning for warning in request.warnings) == warned


def test_what_a_recipe_says_of_pictures_that_are_not_there_is_a_warning():
    """Denoising strength without hires and image; hires where there is an image; another image than the recipe's."""
    request = seams.parse({"parameters": recipe_of(**{"Denoising strength": 0.4, "Mask blur": 4})})
    assert request.strength is None
    assert ["Denoising strength" in text or "Mask blur" in text for text in request.warnings] == [True, True]
    request = seams.parse({"parameters": recipe_of(**{"Denoising strength": 0.4}), "image": WHOLE})
    assert request.strength == 0.4 and not request.warnings
    assert request.image.size == (512, 768)
    request = seams.parse({"parameters": recipe_of(**{"Hires upscale": 2, "Image SHA256": "12ab"}), "image": WHOLE})
    assert request.hires is None and request.strength == 0.75
    assert "Hires" in request.warnings[0] and "12ab" in request.warnings[1]
    request = seams.parse({"parameters": recipe_of(**{"Hires upscale": 2}), "hires": None})
    assert request.hires is None and not request.warnings


# ---------------------------------------------------------------------------------------------------------------------
# addresses

PUBLIC, HOST = "93.184.215.14", "pictures.example"


@pytest.mark.parametrize(
    ("address", "public"),
    [
        *((address, True) for address in ("93.184.215.14", "1.1.1.1", "2606:4700::1111", "2a00:1450:4001:81b::200e")),
        *((address, False) for address in ("127.0.0.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1")),
        *((address, False) for address in ("169.254.169.254", "100.64.0.1", "100.100.100.200", "192.0.0.192")),
        *((address, False) for address in ("224.0.0.1", "239.255.255.250", "255.255.255.255", "240.0.0.1")),
        *((address, False) for address in ("198.18.0.1", "203.0.113.1", "::", "::1", "::ffff:127.0.0.1", "fe80::1")),
        *((address, False) for address in ("fe80::1%eth0", "fd00:ec2::254", "fec0::1", "::127.0.0.1", "ff02::1")),
        *((address, False) for address in ("64:ff9b::7f00:1", "64:ff9b:1::1", "2002:7f00:1::", "2001::1")),
        *((address, False) for address in ("2001:db8::1", "::ffff:93.184.215.14", "100::1")),
    ],
)
def test_public_addresses_are_told_from_others(address, public):
    """Private networks, this machine, metadata services, multicast, and tunnels that lead to them."""
    assert seams.is_public(address) == public


class Internet:
    """Names that resolve as the test says, and connections to public addresses that end at a server of this test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, port: int = 0) -> None:
        self.names: dict[str, list[list[str]]] = {}  # each look-up takes the next answer, the last stays
        self.connected: list[tuple] = []
        look_up, connect = socket.getaddrinfo, socket.socket.connect

        def getaddrinfo(host, *args, **kw):
            answers = self.names.get(host)
            if answers is None:
                return look_up(host, *args, **kw | {"flags": socket.AI_NUMERICHOST})
            found = answers.pop(0) if len(answers) > 1 else answers[0]
            return [
                entry
                for address in found
                for entry in look_up(address, args[0] if args else 0, type=socket.SOCK_STREAM)
            ]

        def connect_here(sock, address):
            self.connected.append(address[:2])
            return connect(sock, ("127.0.0.1", port))

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        monkeypatch.setattr(socket.socket, "connect", connect_here)


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1/x.png",
        "https://localhost.example/x.png",
        "https://2130706433/x.png",
        "https://0x7f.1/x.png",
        "https://127.1/x.png",
        "https://0177.0.0.1/",
        "https://①②⑦.⓪.⓪.①/",
        "https://１２７.0.0.1/",
        "https://[::1]/x.png",
        "https://[::ffff:169.254.169.254]/latest/meta-data",
        "https://[fd00:ec2::254]/",
        "https://[64:ff9b::7f00:1]/",
        "https://169.254.169.254/latest/meta-data",
        "https://metadata.example/",
        "https://both.example/",
        "https://user:password@pictures.example/",
        "https://pictures.example:99999/",
        "https:///x.png",
        "https:x.png",
        "https://",
        "https://a..example/",
        f"https://{'a' * 70}.example/",
        " HTTPS://127.0.0.1/x.png",
        "http://pictures.example/x.png",
        "ftp://pictures.example/x.png",
    ],
)
def test_nothing_is_asked_of_addresses_that_are_not_public(monkeypatch, url):
    """In every spelling, and where one of a name's addresses is not public: refused without a connection."""
    internet = Internet(monkeypatch)
    internet.names = {
        HOST: [[PUBLIC]],
        "localhost.example": [["127.0.0.1"]],
        "metadata.example": [["169.254.169.254"]],
        "both.example": [[PUBLIC, "10.0.0.1"]],
        **{name: [["127.0.0.1"]] for name in ("2130706433", "0x7f.1", "127.1", "0177.0.0.1")},
    }
    answer = handler.handler({"input": {"prompt": "x", "image": url}})
    assert answer["code"] == "INVALID_INPUT", answer
    assert internet.connected == []
    assert "example" not in answer["error"] and "169" not in answer["error"]


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """A certificate authority's file, and a TLS context with a certificate of pictures.example."""
    folder, now = tmp_path_factory.mktemp("tls"), datetime.datetime.now(datetime.UTC)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]) for name in ("test authority", HOST)]
    for i in (0, 1):
        builder = (
            x509.CertificateBuilder().issuer_name(names[0]).subject_name(names[i]).public_key(keys[i].public_key())
        )
        builder = builder.serial_number(i + 1).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
        builder = builder.add_extension(x509.BasicConstraints(ca=i == 0, path_length=None), critical=True)
        if i:
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
        certificate = builder.sign(keys[0], hashes.SHA256())
        (folder / f"{i}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    pem = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(keys[1].private_bytes(*pem))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "1.pem", folder / "key.pem")
    return str(folder / "0.pem"), context


@pytest.fixture
def server(authority, monkeypatch):
    """A TLS server behind pictures.example: answers is path -> the bytes of a whole answer, or a function that sends
    them; requests is what came."""
    ca_file, context = authority
    monkeypatch.setattr(requests.certs, "where", lambda: ca_file)
    listener = socket.create_server(("127.0.0.1", 0))
    internet = Internet(monkeypatch, listener.getsockname()[1])
    internet.names = {HOST: [[PUBLIC]], "other.example": [[PUBLIC]], "inside.example": [["10.0.0.1"]]}
    internet.answers, internet.requests = {}, []

    def serve(raw: socket.socket) -> None:
        with contextlib.suppress(OSError), context.wrap_socket(raw, server_side=True) as sock:
            request = b""
            while b"\r\n\r\n" not in request:
                request += sock.recv(65536)
            internet.requests.append(request.decode())
            answer = internet.answers[request.split()[1].decode()]
            answer(sock) if callable(answer) else sock.sendall(answer)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield internet
    listener.close()


def whole(body: bytes, status: str = "200 OK", **headers: str) -> bytes:
    """An HTTP answer."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *(f"{k}: {v}" for k, v in headers.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def moved(place: str) -> bytes:
    return whole(b"", "302 Found", Location=place)


def asked(url: str) -> dict:
    """What a job with this address is answered, where its picture is too long to be used: INVALID_INPUT that says so
    means that it was fetched."""
    return handler.handler({"input": {"prompt": "x", "image_url": url}})


LONG = base64.b64decode(BAD_PICTURES["too long"][0])


def test_a_picture_is_fetched_from_the_checked_address_by_its_name(server):
    """One look-up, then the connection goes to what was checked; certificate and Host go by name; no proxy, no key."""
    server.names[HOST] = [[PUBLIC], ["127.0.0.1"]]  # a name that changes between check and use
    server.answers["/a%20b.png?x=1"] = whole(LONG)
    answer = asked(f"https://{HOST.upper()}/a b.png?x=1#y")
    assert "give width and height" in answer["error"]
    assert server.connected == [(PUBLIC, 443)]
    assert f"\r\nHost: {HOST}\r\n" in server.requests[0] and "uthorization" not in server.requests[0]
    server.names[HOST] = [[PUBLIC]]
    request = seams.parse({"prompt": "x", "width": 256, "height": 256, "image": f"https://{HOST}:8443/a%20b.png?x=1"})
    assert request.image.info["sha256"] == hashlib.sha256(LONG).hexdigest()
    assert server.connected[-1] == (PUBLIC, 8443) and f"\r\nHost: {HOST}:8443\r\n" in server.requests[1]


def test_redirects_are_checked_as_the_first_address(server):
    """Three are followed; a fourth, one to another scheme and one inside are refused, and nothing is asked there."""
    server.answers |= {f"/{i}": moved(f"/{i - 1}") for i in (1, 2, 3, 4)} | {"/0": whole(LONG)}
    assert "give width and height" in asked(f"https://{HOST}/3")["error"]
    assert "3 times" in asked(f"https://{HOST}/4")["error"]
    for place in ("http://pictures.example/0", "https://inside.example/", "https://127.0.0.1/", "//169.254.169.254/"):
        server.answers["/x"], server.connected[:] = moved(place), []
        assert asked(f"https://{HOST}/x")["code"] == "INVALID_INPUT"
        assert server.connected == [(PUBLIC, 443)], place


def test_an_address_that_fails_is_a_failed_download(server, caplog):
    """DOWNLOAD_FAILED, the worker stays usable, and the address stands in neither answer nor log."""
    server.answers |= {
        "/secret": whole(b"gone", "404 Not Found"),
        "/secret-short": whole(LONG)[:-20],
        "/secret-nothing": b"",
        "/secret-garbage": b"\x00\x01garbage\r\n\r\n",
        "/secret-lost": whole(b"", "302 Found"),
    }
    names = [f"{HOST}{path}" for path in server.answers]
    for place in (*names, "other.example/secret-certificate", "nowhere.example/secret"):
        answer = asked(f"https://{place}")
        assert answer["code"] == "DOWNLOAD_FAILED" and "refresh_worker" not in answer, (place, answer)
        assert answer["error"].startswith("image_url") and "secret" not in answer["error"]
    assert "secret" not in caplog.text and "example" not in caplog.text


def test_too_many_bytes_are_not_fetched(server):
    """A body without end is left after 20 MB; a page is no picture."""

    def endless(sock):
        sock.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            sock.sendall(bytes(1_000_000))

    server.answers |= {"/endless": endless, "/page": whole(b"<html>" * 99)}
    assert "at most 20 MB" in asked(f"https://{HOST}/endless")["error"]
    assert "PNG, JPEG or WebP" in asked(f"https://{HOST}/page")["error"]


@pytest.mark.parametrize("part", ["headers", "body", "nothing", "look-up"])
def test_an_address_has_ten_seconds_for_everything(server, monkeypatch, part):
    """However slowly it drips: headers, body, a connection that says nothing, a name that is looked up for ever. Here
    ten seconds are one; and the connection is shut."""
    seams.set(monkeypatch, PICTURE_S=1)
    ended = threading.Event()

    def drip(sock):
        with contextlib.suppress(OSError):
            sock.sendall(b"HTTP/1.1 200 OK\r\n" + b"\r\n" * (part == "body"))
            while part != "nothing":
                sock.sendall(b"a" if part == "body" else b"x: y\r\n")
                time.sleep(0.05)
            sock.recv(1)
        ended.set()

    server.answers["/slow"] = drip
    if part == "look-up":
        wake = threading.Event()
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: wake.wait(20))
    started = time.monotonic()
    answer = asked(f"https://{HOST}/slow")
    assert (answer["code"], "1 s" in answer["error"]) == ("DOWNLOAD_FAILED", True)
    assert time.monotonic() - started < 8
    assert part == "look-up" or ended.wait(20)
    if part == "look-up":
        wake.set()


def test_literal_addresses_are_asked_by_their_certificate(server):
    """A public IP address is connected to, and refused for a certificate that does not name it."""
    assert asked(f"https://{PUBLIC}/")["code"] == "DOWNLOAD_FAILED"
    assert server.connected == [(PUBLIC, 443)]
    assert ipaddress.ip_address(PUBLIC).is_global
