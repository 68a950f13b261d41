"""Checkpoints of every kind that Civitai has: drawn with as they are meant to be, or refused as what they are."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import seams
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from world import World

import handler

UNET = "model.diffusion_model."
JOB = {"prompt": "a lighthouse", "width": 256, "height": 256, "steps": 2, "seed": 7, "loras": []}
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def draw(world: World, pipe, reload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict]:
    """draw(change, metadata, **fields): the answer of a worker whose checkpoint has these tensors."""
    monkeypatch.setenv("CHECKPOINT_DIR", str(tmp_path))
    monkeypatch.setenv("LORAS", "")

    def answer(change: Callable[[Tensors], Tensors], metadata: dict | None = None, **fields) -> dict:
        tensors = change(load_file(world.checkpoint))
        save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / world.checkpoint.name, metadata)
        seams.serve(None)
        return handler.handler({"id": "test", "input": {**JOB, **fields}})

    return answer


def picture(reply: dict) -> np.ndarray:
    assert "error" not in reply, reply
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(reply["images"][0]))), dtype=int)


def as_type(dtype: torch.dtype) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()}


def without_vae(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("first_stage_model.")}


def scaled_float8(tensors: Tensors) -> Tensors:
    """The UNet's matrices in float8 of their own scale, as ComfyUI's scaled files have them."""
    scaled = dict(tensors)
    for name, tensor in tensors.items():
        if name.startswith(UNET) and name.endswith(".weight") and tensor.ndim == 2:
            scale = tensor.float().abs().amax() / 400
            scaled[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            scaled[name.removesuffix("weight") + "scale_weight"] = scale
    return scaled | {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}


def unscaled(tensors: Tensors) -> Tensors:
    """What scaled_float8 stands for, in float32."""
    scaled = scaled_float8(tensors)
    scales = {name: scaled.pop(name) for name in list(scaled) if name.endswith("scale_weight")}
    del scaled["scaled_fp8"]
    for name, scale in scales.items():
        weight = name.removesuffix("scale_weight") + "weight"
        scaled[weight] = scaled[weight].float() * scale
    return scaled


@pytest.mark.parametrize(
    ("change", "same_as"),
    [
        (as_type(torch.float32), dict),
        (without_vae, dict),
        (as_type(torch.bfloat16), lambda t: as_type(torch.float16)(as_type(torch.bfloat16)(t))),
        (as_type(torch.float8_e4m3fn), lambda t: as_type(torch.float16)(as_type(torch.float8_e4m3fn)(t))),
        (scaled_float8, unscaled),
    ],
    ids=["float32", "without VAE", "bfloat16", "float8", "scaled float8"],
)
def test_types_of_weights(draw, change, same_as):
    """A file of another type draws what a float16 file of the same numbers draws."""
    assert np.array_equal(picture(draw(change)), picture(draw(same_as)))


V_PRED = {"v_pred": torch.zeros(0)}


def test_prediction_type(draw):
    """v-prediction by the tensor or by the metadata draws the same picture, another than eps; with zero terminal SNR
    yet another."""
    eps = picture(draw(dict))
    by_tensor = picture(draw(lambda tensors: tensors | V_PRED))
    assert np.array_equal(picture(draw(dict, {"modelspec.prediction_type": "v"})), by_tensor)
    zero_snr = picture(draw(lambda tensors: tensors | V_PRED | {"ztsnr": torch.zeros(0)}))
    assert np.array_equal(picture(draw(dict, {"modelspec.prediction_type": "epsilon"})), eps)
    assert len({image.tobytes() for image in (eps, by_tensor, zero_snr)}) == 3


def without(start: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.startswith(start)}


def with_channels(count: int) -> Callable[[Tensors], Tensors]:
    first = f"{UNET}input_blocks.0.0.weight"
    return lambda tensors: tensors | {first: torch.zeros(16, count, 3, 3, dtype=torch.float16)}


def with_tensor(name: str, *others: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {key: torch.ones(4, dtype=torch.float16) for key in (name, *others)}


def only(name: str) -> Callable[[Tensors], Tensors]:
    return lambda _: {name: torch.ones(4, 4, dtype=torch.float16)}


def with_number(name: str, number: float) -> Callable[[Tensors], Tensors]:
    """One number of a tensor is this."""

    def change(tensors: Tensors) -> Tensors:
        tensor = tensors[name].clone()
        tensor.view(-1)[-1] = number
        return tensors | {name: tensor}

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (with_tensor("edm_mean", "edm_std"), "Playground 2.5"),
        (with_tensor("edm_vpred.sigma_max", "edm_vpred.sigma_min"), "CosXL"),
        (with_channels(9), "inpainting"),
        (with_channels(8), "8 channels"),
        (with_tensor("conditioner.embedders.0.model.ln_final.weight"), "refiner"),
        (only("cond_stage_model.transformer.text_model.final_layer_norm.weight"), "Stable Diffusion 1.5"),
        (only("cond_stage_model.model.ln_final.weight"), "Stable Diffusion 2"),
        (only(f"{UNET}joint_blocks.0.x_block.attn.proj.weight"), "Stable Diffusion 3"),
        (only("double_blocks.0.img_attn.proj.weight"), "Flux"),
        (only("lora_unet_mid_block.lora_down.weight"), "LoRA"),
        (only("down_blocks.0.resnets.0.conv1.weight"), "diffusers"),
        (without(UNET), "without UNet"),
        (without("conditioner.embedders.0."), "without first text encoder"),
        (without("conditioner.embedders.1."), "without second text encoder"),
        (without("conditioner.embedders.1.model.text_projection"), "missing"),
        (without("conditioner.embedders.1.model.positional_embedding"), "missing"),
        (without(f"{UNET}middle_block.0.in_layers.2.weight"), "missing"),
        (with_number(f"{UNET}out.2.weight", float("nan")), "NaN"),
        (with_number("conditioner.embedders.0.transformer.text_model.final_layer_norm.weight", float("inf")), "NaN"),
    ],
)
def test_what_cannot_be_run_is_named(draw, change, told):
    """Such a checkpoint is SETUP_FAILED with a sentence that says what it is; nothing is called a failed generation."""
    reply = draw(change)
    assert reply["code"] == "SETUP_FAILED" and told in reply["error"], reply
