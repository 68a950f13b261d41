"""handler(job) on the tiny model world: answers, pictures, failures."""

import base64
import copy
import io
import json
import logging
import threading
import time
import weakref

import diffusers
import numpy as np
import pytest
import seams
import torch
from PIL import Image

import handler

SMALL = {"prompt": "a lighthouse at dusk", "width": 256, "height": 256, "steps": 2, "seed": 7}
ANSWER = {"images", "seed", "metadata"}
METADATA = {
    *("prompt", "negative_prompt", "width", "height", "steps", "guidance_scale", "seeds", "scheduler", "clip_skip"),
    *(
        "rng",
        "emphasis",
        "long_prompt",
        "prompt_chunks",
        "negative_prompt_chunks",
        "image_format",
        "model",
        "vae",
        "loras",
    ),
    *("loras_failed", "warnings", "processing_time", "timings", "model_version"),
}


def answer(**fields) -> dict:
    """The worker's answer to SMALL with other fields; strict JSON, or the test fails here."""
    reply = handler.handler({"id": "test", "input": {**SMALL, **fields}})
    return json.loads(json.dumps(reply, allow_nan=False))


def pictures(**fields) -> list[np.ndarray]:
    reply = answer(**fields)
    assert "error" not in reply, reply
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(image))), dtype=int) for image in reply["images"]]


@pytest.fixture
def broken(pipe):
    """Breaks a module of the pipeline for one test: broken(pipe.unet, error) raises it at every forward."""
    hooks = []

    def break_module(module: torch.nn.Module, error: BaseException) -> None:
        def fail(*_args):
            raise error

        hooks.append(module.register_forward_pre_hook(fail))

    yield break_module
    for hook in hooks:
        hook.remove()


@pytest.fixture
def forwards(pipe):
    """Counts the forwards of the UNet and the text encoders."""
    counts = {"unet": 0, "text_encoder": 0, "text_encoder_2": 0}

    def count(name):
        def hook(*_args):
            counts[name] += 1

        return hook

    hooks = [getattr(pipe, name).register_forward_pre_hook(count(name)) for name in counts]
    yield counts
    for hook in hooks:
        hook.remove()


def test_answer(pipe):
    """The answer holds the contract's keys, no others, and a PNG of the size asked for, without a data: prefix."""
    reply = answer(width=320)
    assert set(reply) == ANSWER and set(reply["metadata"]) == METADATA
    image = Image.open(io.BytesIO(base64.b64decode(reply["images"][0], validate=True)))
    assert (image.format, image.size, image.mode) == ("PNG", (320, 256), "RGB")
    metadata = reply["metadata"]
    assert reply["seed"] == 7 and metadata["seeds"] == [7] and metadata["model_version"] == "1590699"
    assert [(lora["name"], lora["scale"]) for lora in metadata["loras"]] == [
        (handler.sanitize_name(config["name"]), config["scale"]) for config in handler.LORA_CONFIGS
    ]
    assert set(metadata["timings"]) == {"encode", "denoise", "decode", "images"}
    assert metadata["loras_failed"] == metadata["warnings"] == []


def test_seeds(pipe):
    """The same seed gives the same bytes, another seed another picture; image i of a batch is seed + i made alone."""
    first, again, other = answer()["images"], answer()["images"], answer(seed=8)["images"]
    assert first == again and first != other
    for batched, seed in zip(pictures(num_images=3, seed=2**32 - 2), (2**32 - 2, 2**32 - 1, 0), strict=True):
        assert np.abs(batched - pictures(seed=seed)[0]).max() <= 2  # batching changes the last bits, FACTS.md


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_last_word_counts(pipe, field):
    """A word in the last chunk of a prompt of over 150 tokens changes the picture, in both prompts."""
    long = "red brick house by the sea, " * 30
    there, gone = pictures(**{field: long + "lightning"})[0], pictures(**{field: long + "kitten"})[0]
    assert np.abs(there - gone).max() > 0


def test_fields_that_change_the_picture(pipe):
    """Prompt, negative prompt, guidance, steps, scheduler, clip_skip and stack each change the picture."""
    plain = answer()["images"]
    for field in (
        *({"prompt": "a cat"}, {"negative_prompt": "fog"}, {"guidance_scale": 9}, {"steps": 3}),
        *({"scheduler": "Euler a"}, {"clip_skip": 3}, {"loras": []}),
    ):
        assert answer(**field)["images"] != plain, field
    assert answer()["images"] == plain


@pytest.mark.parametrize(
    "job",
    [
        *(None, [], "x", {}, {"input": None}, {"input": {}}, {"input": {**SMALL, "width": 1023}}),
        {"input": {**SMALL, "loras": [{"name": "x"}]}},
    ],
)
def test_bad_input_runs_nothing(pipe, forwards, job):
    """Bad input is INVALID_INPUT with a sentence, before any encoder or UNet forward."""
    reply = handler.handler(job)
    assert set(reply) == {"error", "code"} and reply["code"] == "INVALID_INPUT" and len(reply["error"]) > 10
    assert not any(forwards.values())


def test_guidance_of_1_skips_the_negative_prompt(pipe, forwards):
    """With guidance_scale 1 the UNet sees a batch of one; more guidance doubles it."""
    sizes = []
    hook = pipe.unet.register_forward_pre_hook(lambda _module, args: sizes.append(len(args[0])))
    pictures(guidance_scale=1)
    pictures(guidance_scale=2)
    hook.remove()
    assert sizes == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("error", "code", "refresh"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "OUT_OF_MEMORY", False),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
            "OUT_OF_MEMORY",
            False,
        ),
        (MemoryError(), "OUT_OF_MEMORY", False),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
            "OUT_OF_MEMORY",
            False,
        ),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "GENERATION_FAILED", True),
        (RuntimeError("no such thing at /root/secret/place.py"), "GENERATION_FAILED", False),
        (KeyError("x"), "GENERATION_FAILED", False),
    ],
)
def test_failures_are_answered(pipe, broken, error, code, refresh):
    """Whatever the UNet raises becomes the right code, without path or traceback; the next job works."""
    broken(pipe.unet, error)
    reply = answer()
    assert reply["code"] == code and reply.get("refresh_worker", False) is refresh
    assert "/root" not in json.dumps(reply) and "Traceback" not in json.dumps(reply)
    for hook in list(pipe.unet._forward_pre_hooks):
        pipe.unet._forward_pre_hooks.pop(hook)
    assert len(pictures()) == 1


def test_failure_frees_memory(pipe, monkeypatch):
    """After a failed job nothing holds its tensors any more."""
    monkeypatch.setattr(
        logging.getLogger("worker"), "propagate", False
    )  # pytest keeps every log record, with its traceback

    class Probe(RuntimeError):
        pass

    born = []

    def remember(_module, args):
        born.append(weakref.ref(args[0]))
        raise Probe("in the middle of a job")

    hook = pipe.unet.register_forward_pre_hook(remember)
    assert answer()["code"] == "GENERATION_FAILED"
    hook.remove()
    assert born and born[0]() is None


def test_black_and_nan_images(pipe):
    """An image with NaN, or nothing but black, is GENERATION_FAILED, never an answer; the next job works."""
    bias = pipe.vae.decoder.conv_out.bias
    good = bias.detach().clone()
    for poison in (float("nan"), -1e6, float("inf")):
        with torch.no_grad():
            bias.fill_(poison)
        reply = answer()
        assert reply["code"] == "GENERATION_FAILED" and "black" in reply["error"]
        with torch.no_grad():
            bias.copy_(good)
    assert len(pictures()) == 1


@pytest.fixture
def half_vae(pipe):
    """A VAE in float16 that overflows on every picture, as a GPU's may; yields what it draws in float32."""
    vae = pipe.vae
    pipe.vae = copy.deepcopy(vae)
    with torch.no_grad():
        pipe.vae.post_quant_conv.weight.mul_(3e4)
    expected = pictures()
    pipe.vae.half()
    yield expected
    pipe.vae = vae


def test_overflow_in_half_precision_is_decoded_again(pipe, half_vae, caplog):
    """Latents on which the VAE overflows in float16 are decoded again in float32, to the picture float32 gives."""
    for expected, found in zip(half_vae, pictures(), strict=True):
        assert np.abs(expected - found).max() <= 3
    assert "1 of 1 images came out black: decoding again in float32" in caplog.text
    assert {parameter.dtype for parameter in pipe.vae.parameters()} == {torch.float16}


def test_a_vae_that_does_not_fit_in_float32_stays_whole(pipe, half_vae):
    """Where the memory runs out while the VAE is converted, that job is OUT_OF_MEMORY, and the VAE is of one type
    again: the next job works."""
    block, failures = pipe.vae.decoder.mid_block, [torch.OutOfMemoryError("CUDA out of memory")]
    convert = block._apply

    def convert_once(*args, **kwargs):
        if failures:
            raise failures.pop()
        return convert(*args, **kwargs)

    block._apply = convert_once
    assert answer()["code"] == "OUT_OF_MEMORY"
    assert not failures and {parameter.dtype for parameter in pipe.vae.parameters()} == {torch.float16}
    assert np.abs(half_vae[0] - pictures()[0]).max() <= 3


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (diffusers.StableDiffusionXLPipeline, "from_single_file"),
        (diffusers.AutoencoderKL, "from_pretrained"),
        (diffusers.DiffusionPipeline, "to"),
    ],
)
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB"), MemoryError()]
)
def test_models_that_do_not_fit_are_a_failed_setup(reload, monkeypatch, kind, name, error):
    """Out of memory while the models are read or moved to the GPU is SETUP_FAILED, and says what to choose instead."""

    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(kind, name, fail)
    reply = answer()
    assert (reply["code"], reply["refresh_worker"]) == ("SETUP_FAILED", True)
    assert "choose a GPU with at least 16 GB" in reply["error"] and "LORAS" in reply["error"]


def test_gpu_work_is_one_after_the_other(pipe):
    """Two jobs at once never interleave their UNet forwards."""
    order = []
    hook = pipe.unet.register_forward_pre_hook(lambda _module, _args: order.append(threading.get_ident()))
    threads = [threading.Thread(target=answer, kwargs={"seed": seed, "steps": 4}) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    hook.remove()
    assert len(order) == 8 and len(set(order[:4])) == len(set(order[4:])) == 1


def test_tiling_and_slicing(pipe):
    """The VAE tiles above 1.5 megapixels and slices batches, and only then."""
    answer(width=1232, height=1224, steps=1)
    assert pipe.vae.use_tiling and not pipe.vae.use_slicing
    answer(num_images=2, steps=1)
    assert not pipe.vae.use_tiling and pipe.vae.use_slicing


def test_a_failed_job_frees_its_memory_within_its_turn(pipe, monkeypatch):
    """A failed job's tensors are gone before the next job's turn on the GPU begins."""
    monkeypatch.setattr(logging.getLogger("worker"), "propagate", False)
    born, alive = [], []

    def fail(_module, args):
        born.append(weakref.ref(args[0]))
        raise RuntimeError("in the middle of a job")

    def next_job():
        with seams.gpu():
            alive.append(born[0]() is not None)

    hook = pipe.unet.register_forward_pre_hook(fail)
    with seams.gpu():
        first = threading.Thread(target=answer)
        first.start()
        time.sleep(0.2)  # let it wait at the lock; the claim holds in any order
    while not born:
        time.sleep(0.01)
    second = threading.Thread(target=next_job)
    second.start()
    first.join()
    second.join()
    hook.remove()
    assert alive == [False]
