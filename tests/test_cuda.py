"""A job on the GPU, at full size and in float16, on a pretended device (fakecuda.py): what meets has one device and one
type, memory stays below ceilings, and the host does not wait in the middle of a run."""

from __future__ import annotations

import base64
import contextlib
import gc
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fakecuda
import pytest
import seams
import torch
from fakecuda import GIB, FakeCuda
from PIL import Image
from world import PREFIXES, World, lora_keys, lora_targets, write_safetensors

import handler

pytestmark = [
    pytest.mark.timeout(300),  # for slow machines
    pytest.mark.skipif(shutil.which("g++") is None, reason="the pretended device's guard is compiled with g++"),
]
ONE, TWO = "135867@1.5", "135867@1.5,294259"  # nine take four times the time, and hardly more kernels
LONG = "a red fox in the snow, " * 20  # 2 chunks: no more states than the pretended device gives numbers to
PROMPT = {"prompt": "a cat", "seed": 1, "steps": 1}


@pytest.fixture(scope="module")
def lora_folder(tmp_path_factory) -> Any:
    """Two LoRAs' files, of rank 1 and of zeros, each on all 986 layers that LoRAs are trained on."""
    folder = tmp_path_factory.mktemp("loras")
    shapes: dict[str, tuple[int, ...]] = {}
    for target in lora_targets("full", PREFIXES, "linear"):
        down, up, _ = lora_keys(target, "kohya")
        shapes |= {down: (1, *target.shape[1:]), up: (target.shape[0], 1)}
    first, *others = [folder / config["filename"] for config in handler.LORA_CONFIGS[:2]]
    write_safetensors(first, shapes, lambda _, shape: fakecuda.zeros(shape, torch.float16).numpy())
    for other in others:
        other.hardlink_to(first)
    return folder


@contextlib.contextmanager
def started(world: World, folder: Path, total_gib: float, loras: str, check: bool = False) -> Iterator[FakeCuda]:
    """A card of this size, on which a worker has started."""
    fakecuda.load_guard()
    before = seams.serve(None)
    with pytest.MonkeyPatch.context() as patch, fakecuda.pretended(total_gib) as device:
        for name, value in (world.environ() | {"LORA_DIR": str(folder), "LORAS": loras}).items():
            patch.setenv(name, value)
        seams.start_from(patch, lambda: fakecuda.full_size_pipeline(world.config), check)
        try:
            seams.engine()
            yield device
        finally:
            seams.serve(before)
            gc.collect()  # tensors tell the device when they end


def run(card: FakeCuda, **fields: Any) -> list[str]:
    """Where the host waited for the device while it launched the job's steps."""
    waited: list[int] = []
    answer = seams.run_watched({"id": "cuda", "input": PROMPT | fields}, lambda: waited.append(len(card.syncs)))
    assert "error" not in answer, answer
    assert answer["metadata"]["warnings"] == []
    return card.syncs[waited[0] : waited[-1]]


def picture(mode: str, side: int) -> str:
    """A grey picture in base64."""
    file = io.BytesIO()
    Image.new(mode, (side, side), 128 if mode == "L" else (128, 128, 128)).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


def above_weights(card: FakeCuda) -> float:
    """GiB at the peak, above what stays when a job has ended."""
    return (card.peak - card.used) / GIB


def test_originals_in_host_memory(world, lora_folder):
    """On a card of 16 GiB a change of the stack uploads each original once, and nothing comes back."""
    with started(world, lora_folder, 16, ONE) as card:
        card.reset()
        stack = seams.engine().stack
        assert stack.apply(dict.fromkeys(stack.applied, 0.5))
        assert 5.4 * GIB < card.uploaded < 5.6 * GIB
        assert card.downloaded == 0
        assert above_weights(card) < 0.5


def test_a_small_card(world, lora_folder):
    """On a card of 8 GiB each model is on the GPU only while it works, and its weights are not copied back."""
    with started(world, lora_folder, 8, "") as card:
        assert card.used < 0.1 * GIB
        card.reset()
        run(card, negative_prompt="a dog")
        assert card.peak < 6.5 * GIB
        assert card.used < 0.1 * GIB
        assert card.uploaded < 6.6 * GIB and card.downloaded < 1e7


def test_a_card_of_12_gib(world, lora_folder):
    """It holds all and draws 1024 x 1024; a job that cannot fit is told so, with what would, and takes nothing."""
    with started(world, lora_folder, 12, "") as card:
        assert card.used > 6.4 * GIB
        card.reset()
        run(card)
        assert card.peak < 8.1 * GIB
        card.reset()
        job = {"width": 2048, "height": 2048, "num_images": 4, "hires": {"scale": 2}}
        answer = handler.handler({"id": "cuda", "input": PROMPT | job})
        assert answer["code"] == "OUT_OF_MEMORY" and "at most 1 image" in answer["error"]
        assert above_weights(card) < 0.01


# one card for all that follows, and no other beside it


@pytest.fixture(scope="module")
def gpu(world, lora_folder) -> Iterator[FakeCuda]:
    """A card of 24 GiB with two LoRAs in its weights."""
    with started(world, lora_folder, 24, TWO, check=True) as device:
        yield device


@pytest.fixture
def card(gpu) -> FakeCuda:
    """The card, its counts at nought."""
    gpu.reset()
    return gpu


@pytest.mark.parametrize(
    ("fields", "gib"),
    [
        ({"scheduler": "Euler"}, 1.6),
        ({"scheduler": "DPM++ 2M Karras", "prompt": LONG, "negative_prompt": "a dog", "num_images": 4}, 1.7),
        ({"scheduler": "Euler a", "prompt": LONG, "negative_prompt": LONG * 2, "long_prompt": "concat"}, 1.8),
        ({"scheduler": "DPM++ SDE", "prompt": LONG, "long_prompt": "truncate", "guidance_scale": 1}, 1.6),
    ],
    ids=lambda value: value["scheduler"] if isinstance(value, dict) else "",
)
def test_jobs(card, fields, gib):
    """Samplers, prompt modes and batches: no device or type disagrees, memory stays below a ceiling, nothing is left
    behind, the weights stay where they are, and the host waits for the device before and after the steps alone."""
    used = card.used
    assert run(card, steps=2, **fields) == []
    assert above_weights(card) < gib
    assert card.used - used < 1e6
    assert card.uploaded < 1e7


def test_from_pictures(card):
    """Image to image with a mask, from an encoded picture to one blended with it."""
    run(card, image=picture("RGB", 1024), mask=picture("L", 1024), negative_prompt="a dog")
    assert above_weights(card) < 1.7


def test_float32_where_float16_overflows(card, monkeypatch):
    """Hires by way of pixels, the first of them black: converted again in float32, and the VAE is float16 again."""
    seams.come_out_black(monkeypatch)
    run(card, width=512, height=512, hires={"scale": 2, "upscaler": "lanczos"})
    assert all("get_aug_embed" in where for where in card.mixed)  # diffusers joins the size, in float32, to the text
    assert {weight.dtype for weight in seams.engine().pipe.vae.parameters()} == {torch.float16}


def test_the_largest_job(card):
    """On a card of 24 GiB four pictures of 2048 x 2048 fit beside the LoRAs' originals, each decoded whole."""
    run(card, width=2048, height=2048, num_images=4)
    assert 6 < above_weights(card) < 6.2


def test_stack_change_on_the_gpu(card):
    """With the originals on the GPU a change of the stack uploads no weights, waits for nothing, and is ten kernels a
    tensor at the most."""
    assert card.used > (6.4 + 5.4) * GIB
    stack = seams.engine().stack
    assert stack.apply(dict.fromkeys(stack.applied, 0.5))
    assert card.uploaded < 1e6
    assert card.syncs == []
    assert sum(card.kernels.values()) <= 10 * len(seams.changed_tensors(stack)), card.kernels
    assert above_weights(card) < 0.5


def test_a_tensor_on_the_cpu_is_found(card, monkeypatch):
    """A weight that was left in host memory fails the job here, as on a real device."""
    layer = seams.engine().pipe.unet.conv_in
    monkeypatch.setitem(layer._parameters, "weight", torch.nn.Parameter(torch.zeros(layer.weight.shape).half()))
    assert handler.handler({"id": "cuda", "input": PROMPT})["code"] == "GENERATION_FAILED"


def test_a_float32_weight_is_found(card, monkeypatch):
    """So does a weight of another type."""
    layer = seams.engine().pipe.unet.conv_in
    monkeypatch.setitem(layer._parameters, "weight", torch.nn.Parameter(layer.weight.float()))
    assert handler.handler({"id": "cuda", "input": PROMPT})["code"] == "GENERATION_FAILED"


def test_a_wait_in_a_step_is_found(card):
    """diffusers' UniPC has the host wait in each step, which the count above would tell."""
    assert run(card, scheduler="UniPC") != []
