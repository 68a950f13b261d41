"""The LoRA stack: no cost in a job, every kind of file right, free to change, honest about what it cannot use."""

from __future__ import annotations

import copy
import logging
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import peft
import pytest
import torch
from lora_kinds import KINDS, draw as numbers
from safetensors.torch import load_file, save_file
from seams import COMPILED_BLOCKS, LORA_COMPONENTS as PARTS, LoraStack, changed_tensors, compile_unet, merge_into
from torch.utils._python_dispatch import TorchDispatchMode
from world import BAD_LORAS, Lora, Noise, World, lora_tensors, write_bad_lora, write_lora, write_tensors

import handler

SCALES = {
    name: config["scale"]
    for name, config in zip(handler.adapter_names(handler.LORA_CONFIGS), handler.LORA_CONFIGS, strict=True)
}


@pytest.fixture(scope="module")
def loaded(world: World) -> Any:
    """The bare checkpoint in float32."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    vae = diffusers.AutoencoderKL.from_pretrained(world.vae)
    pipe = diffusers.StableDiffusionXLPipeline.from_single_file(
        str(world.checkpoint), config=str(world.config), vae=vae, torch_dtype=torch.float32, add_watermarker=False
    )
    for part in PARTS:
        getattr(pipe, part).requires_grad_(False)
    return pipe


@pytest.fixture
def bare(loaded: Any) -> Any:
    """A pipeline of the bare checkpoint that a test may change."""
    return copy_of(loaded)


def copy_of(pipe: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A pipeline with weights of its own; tokenizers and VAE are shared."""
    parts = {name: copy.deepcopy(getattr(pipe, name)).to(dtype) for name in PARTS}
    result = diffusers.StableDiffusionXLPipeline(**{**pipe.components, **parts}, add_watermarker=False)
    result.set_progress_bar_config(disable=True)
    return result


@pytest.fixture(scope="module")
def files(world: World) -> dict[str, Path]:
    """The nine LoRAs of the world, adapter name -> file."""
    return dict(zip(SCALES, world.loras, strict=True))


@pytest.fixture(scope="module")
def adapted(loaded: Any, files: dict[str, Path]) -> Any:
    """The nine LoRAs as diffusers' own adapters, in float32."""
    return load_plain(copy_of(loaded), files, SCALES)


def weights_of(pipe: Any) -> dict[str, torch.Tensor]:
    """A copy of every tensor that a LoRA could reach, and of all others of the three components."""
    return {f"{part}.{k}": v.clone() for part in PARTS for k, v in getattr(pipe, part).state_dict().items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    assert [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])] == []


def load_plain(pipe: Any, files: dict[str, Path], scales: dict[str, float]) -> Any:
    """The same LoRAs the way diffusers does it: adapters beside the layers."""
    for name, file in files.items():
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
    pipe.set_adapters(list(scales), list(scales.values()))
    return pipe


def layers_of(pipe: Any) -> dict[str, torch.nn.Module]:
    """Linear layers and convolutions by name, "unet.mid_block.attentions.0.proj_in"."""
    return {
        f"{part}.{name}": module
        for part in PARTS
        for name, module in getattr(pipe, part).named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }


def adapted_layers(pipe: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    """The layers that diffusers put adapters on, by the names that they have in a bare pipeline."""
    for part in PARTS:
        for name, module in getattr(pipe, part).named_modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                yield f"{part}.{name}", module


def layer_input(layer: torch.nn.Module, seed: int = 0) -> torch.Tensor:
    """Random activations for a linear layer or a convolution, in float32."""
    shape = (5, layer.in_features) if hasattr(layer, "in_features") else (2, layer.in_channels, 5, 5)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to the size of what was expected, computed in float64."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def run_encoders(pipe: Any) -> list[torch.Tensor]:
    """Hidden states of both text encoders for fixed ids."""
    ids = torch.arange(77)[None] * 601 % 49408
    with torch.no_grad():
        return [getattr(pipe, part)(ids, output_hidden_states=True).hidden_states[-2] for part in PARTS[1:]]


def run_unet(pipe: Any, batch: int = 2, size: tuple[int, int] = (16, 16), tokens: int = 77) -> torch.Tensor:
    """One denoising step on fixed latents and embeddings."""
    draw = torch.Generator().manual_seed(0)
    dims = pipe.unet.config
    pooled = dims.projection_class_embeddings_input_dim - 6 * dims.addition_time_embed_dim
    added = {"text_embeds": torch.randn(batch, pooled, generator=draw), "time_ids": torch.full((batch, 6), 64.0)}
    shapes = (batch, 4, *size), (batch, tokens, dims.cross_attention_dim)
    latents, text = (torch.randn(shape, generator=draw) for shape in shapes)
    added = {name: tensor.to(pipe.unet.dtype) for name, tensor in added.items()}
    with torch.no_grad():
        inputs = latents.to(pipe.unet.dtype), 500, text.to(pipe.unet.dtype)
        return pipe.unet(*inputs, added_cond_kwargs=added, return_dict=False)[0]


def draw(pipe: Any) -> np.ndarray:
    """The latents of a small image for a fixed seed."""
    dice = torch.Generator().manual_seed(0)
    options = {"height": 64, "width": 64, "num_inference_steps": 2, "generator": dice, "output_type": "latent"}
    return pipe("a cat", **options).images.float().numpy()


class Operations(TorchDispatchMode):
    """Counts what reaches the kernels; may fail at a given one, as memory does."""

    def __init__(self, fail_at: tuple[str, int] | None = None) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.fail_at = fail_at

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        if self.fail_at and self.fail_at == (str(func), self.counts[str(func)]):
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return func(*args, **(kwargs or {}))


def count_operations(pipe: Any) -> Counter[str]:
    """Operations of one UNet step and of both text encoders."""
    with Operations() as operations:
        run_unet(pipe)
        run_encoders(pipe)
    return operations.counts


# ---------------------------------------------------------------------------------------------------------------------
# no tax


def test_a_job_runs_exactly_the_operations_of_the_bare_checkpoint(loaded, bare, adapted, files) -> None:
    """Ratio 1.00, operation by operation, where diffusers' adapters multiply them."""
    plain = count_operations(loaded)
    LoraStack(bare, files).apply(SCALES)
    assert count_operations(bare) == plain
    assert count_operations(adapted).total() > 5 * plain.total()


def test_the_stack_in_force_costs_no_operation(bare, files) -> None:
    """The same scales again, in any order and with zeros, touch no tensor."""
    stack = LoraStack(bare, files)
    some = dict(list(SCALES.items())[:4])
    assert stack.apply(some) is True
    with Operations() as operations:
        assert stack.apply(some) is False
        assert stack.apply(dict(reversed(some.items())) | {"real_skin_slider": 0.0}) is False
    assert not operations.counts
    assert stack.applied == some


# ---------------------------------------------------------------------------------------------------------------------
# right

STYLES = {
    "kohya": ("kohya", Lora(4, 2.0)),
    "kohya, all linear layers and both encoders": ("kohya", Lora(8, 1.0, PARTS, "linear")),
    "kohya, LoCon": ("kohya", Lora(4, 3.0, ("unet",), "conv")),
    "kohya, encoders only": ("kohya", Lora(4, 4.0, PARTS[1:], "linear")),
    "peft": ("peft", Lora(4, 4.0, PARTS, "linear")),
    "peft, convolutions": ("peft", Lora(4, 4.0, ("unet",), "conv")),
    "diffusers": ("diffusers", Lora(4, 4.0, PARTS, "linear")),
    "diffusers, convolutions": ("diffusers", Lora(4, 4.0, ("unet",), "conv")),
}


@pytest.mark.parametrize("style", STYLES)
def test_every_layer_answers_as_with_diffusers_adapters(loaded, bare, tmp_path: Path, style: str) -> None:
    """Layer by layer in float32, for each way of writing a LoRA."""
    file = write_lora(tmp_path / "one.safetensors", *STYLES[style])
    check_against_diffusers(loaded, bare, {"one": file}, {"one": -1.7})


def check_against_diffusers(loaded: Any, bare: Any, files: dict[str, Path], scales: dict[str, float]) -> None:
    """Layers answer alike, and no other layer has changed."""
    stack = LoraStack(bare, files)
    assert not stack.failed
    stack.apply(scales)
    merged = layers_of(bare)
    expected = dict(adapted_layers(load_plain(copy_of(loaded), files, scales)))
    assert {f"{name}.weight" for name in expected} == changed_tensors(stack)
    with torch.no_grad():
        for name, layer in expected.items():
            x = layer_input(merged[name])
            assert distance(merged[name](x), layer(x)) < 1e-4, name
    before, after = weights_of(loaded), weights_of(bare)
    changed = {name.removesuffix(".weight") for name in before if not torch.equal(before[name], after[name])}
    assert changed == expected.keys()


def test_nine_loras_together_answer_as_nine_adapters(loaded, bare, adapted, files) -> None:
    """UNet and text encoders as a whole, in float32."""
    LoraStack(bare, files).apply(SCALES)
    assert distance(run_unet(bare), run_unet(adapted)) < 1e-4 < 0.05 < distance(run_unet(bare), run_unet(loaded))
    for found, expected, before in zip(*map(run_encoders, (bare, adapted, loaded)), strict=True):
        assert distance(found, expected) < 1e-4 < 0.05 < distance(found, before)


def old_diffusers_names(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As diffusers before 0.21 wrote them: "attn1.processor.to_q_lora.down.weight"."""
    pattern = re.compile(r"(attn\d)\.to_(q|k|v|out)(\.0)?\.lora\.")
    return {pattern.sub(r"\1.processor.to_\2_lora.", name): tensor for name, tensor in tensors.items()}


def diffusers_blocks(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Kohya's format with the block names of diffusers instead of the original layout's."""
    names = {"input_blocks_4_1": "down_blocks_1_attentions_0", "middle_block_1": "mid_block_attentions_0"}
    pattern = re.compile("|".join(names))
    return {pattern.sub(lambda m: names[m[0]], k): v for k, v in tensors.items() if pattern.search(k)}


def two_ranks(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Half the rank in every second layer, one alpha for all."""
    matrices = sorted(name for name, tensor in tensors.items() if tensor.ndim > 1)  # down and up side by side
    for name in matrices[2::4] + matrices[3::4]:
        is_down = "lora_down" in name or "lora_A" in name
        tensors[name] = (tensors[name][:2] if is_down else tensors[name][:, :2]).copy()
    return tensors


def without_alpha(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Alpha is optional; the rank stands in."""
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(".alpha")}


def own_alpha_for_convolutions(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """LyCORIS' conv_alpha."""
    convolutions = [name.partition(".")[0] for name, tensor in tensors.items() if tensor.ndim == 4]
    return tensors | {f"{name}.alpha": np.float16(1.0) for name in convolutions}


def own_alpha_for_each(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As resized LoRAs have it; diffusers 0.34 finds some of these alphas, and takes the commonest for other layers."""
    alphas = sorted(name for name in tensors if name.endswith(".alpha"))
    return tensors | {name: np.float16(1 + n % 3) for n, name in enumerate(alphas)}


VARIANTS = {
    "old diffusers names": ("diffusers", Lora(4, 4.0), old_diffusers_names),
    "kohya with diffusers blocks": ("kohya", Lora(4, 2.0), diffusers_blocks),
    "kohya with two ranks": ("kohya", Lora(4, 2.0, PARTS, "linear"), two_ranks),
    "peft with two ranks": ("peft", Lora(4, 4.0, PARTS, "linear"), two_ranks),
    "kohya with many alphas": ("kohya", Lora(4, 2.0, PARTS, "linear"), own_alpha_for_each),
    "kohya without alpha": ("kohya", Lora(4, 4.0, PARTS, "linear"), without_alpha),
    "kohya with conv_alpha": ("kohya", Lora(4, 2.0, ("unet",), "conv"), own_alpha_for_convolutions),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_files_differ_in_is_read_as_diffusers_reads_it(loaded, bare, tmp_path: Path, variant: str) -> None:
    """Names of older and other trainers, mixed ranks, alphas that are missing or differ."""
    style, lora, change = VARIANTS[variant]
    file = write_tensors(tmp_path / "one.safetensors", change(world_tensors(lora, style)))
    check_against_diffusers(loaded, bare, {"one": file}, {"one": 0.8})


def world_tensors(lora: Lora, style: str) -> dict[str, np.ndarray]:
    """The tensors of a LoRA as world.write_lora writes them."""
    return lora_tensors(lora, style, "tiny", 0.3, Noise(0, "tiny"), "one")


def test_pefts_own_configuration_counts(loaded, bare, tmp_path: Path) -> None:
    """A file saved by diffusers 0.34 carries alpha and alpha_pattern in its header."""
    config = peft.LoraConfig(
        r=4,
        target_modules=["to_q", "proj_in"],
        lora_alpha=6,
        alpha_pattern={"proj_in": 3},
        init_lora_weights=False,
    )
    unet = copy.deepcopy(loaded.unet)
    unet.add_adapter(config)
    layers = peft.get_peft_model_state_dict(unet)
    metadata = unet.peft_config["default"].to_dict()
    diffusers.StableDiffusionXLPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=layers, weight_name="one.safetensors", unet_lora_adapter_metadata=metadata
    )
    check_against_diffusers(loaded, bare, {"one": tmp_path / "one.safetensors"}, {"one": 1.3})


def test_float16_is_no_farther_from_the_truth_than_adapters(loaded, adapted, files) -> None:
    """The distance from a float64 reference, over all layers of the nine-LoRA stack."""
    truth, plain, half = (
        copy_of(pipe, dtype)
        for pipe, dtype in ((adapted, torch.float64), (adapted, torch.float16), (loaded, torch.float16))
    )
    unfused = dict(adapted_layers(plain))
    LoraStack(half, files).apply(SCALES)
    merged = layers_of(half)
    ours, theirs = [], []
    with torch.no_grad():
        for name, layer in adapted_layers(truth):
            x = layer_input(merged[name]).half()
            expected = layer(x.double())
            ours.append(distance(merged[name](x), expected))
            theirs.append(distance(unfused[name](x), expected))
    assert np.mean(ours) <= np.mean(theirs) < 0.01


def test_a_full_size_layer_in_float16_too(tmp_path: Path) -> None:
    """SDXL's largest linear layer with nine LoRAs of rank 32, in float32 and in float16."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(1280, 10240).half().requires_grad_(False)
    shares = {f"lora_{n}": random_factors(layer, 32) for n in range(9)}
    scales = dict.fromkeys(shares, 0.5)
    x = layer_input(layer)
    for dtype, limit in ((torch.float32, 1e-4), (torch.float16, 1e-2)):
        merged = copy.deepcopy(layer).to(dtype)
        merge_into(merged, shares, scales)
        adapters = with_adapters(copy.deepcopy(layer).to(dtype), shares, scales)
        truth = with_adapters(copy.deepcopy(layer).double(), shares, scales).double()(x.to(dtype).double())
        ours, theirs = (distance(model(x.to(dtype)), truth) for model in (merged, adapters))
        assert ours < limit
        assert ours <= theirs or dtype == torch.float32


def random_factors(layer: torch.nn.Linear, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A LoRA that changes the layer by about a tenth of its weight: up, down, alpha / rank."""
    up, down = torch.randn(layer.out_features, rank) / 300, torch.randn(rank, layer.in_features) / 36
    return up.half(), down.half(), 0.5


def with_adapters(layer: torch.nn.Linear, shares: dict[str, tuple], scales: dict[str, float]) -> Any:
    """The layer with PEFT's adapters beside it."""
    wrapped = peft.tuners.lora.Linear(layer, "unused", r=1)
    for name, (up, down, scaling) in shares.items():
        wrapped.update_layer(name, len(down), scaling * len(down), 0.0, False, False)
        wrapped.lora_A[name].weight.data = down.to(layer.weight.dtype)
        wrapped.lora_B[name].weight.data = up.to(layer.weight.dtype)
        wrapped.set_scale(name, scales[name])
    wrapped.set_adapter(list(shares))
    return wrapped.requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# free to change


def converted(dtype: torch.dtype, factor: float = 1.0) -> Callable[[Any], Any]:
    """A pipeline in another precision, or with weights that float16 cannot hold."""

    def convert(loaded: Any) -> Any:
        pipe = copy_of(loaded, dtype)
        with torch.no_grad():
            for part in PARTS:
                for parameter in getattr(pipe, part).parameters():
                    parameter.mul_(factor)
        return pipe

    return convert


PIPELINES = {
    "float32 from a float16 file": converted(torch.float32),
    "float32": converted(torch.float32, 1.001),
    "float16": converted(torch.float16),
}


@pytest.mark.parametrize("kind", PIPELINES)
def test_a_hundred_changes_leave_nothing_behind(loaded, files, kind: str) -> None:
    """Then the default stack again: every weight and the image are the first ones bit for bit; without LoRAs it is the
    bare checkpoint. The parameters stay the same objects at the same addresses."""
    pipe = PIPELINES[kind](loaded)
    bare, image = weights_of(pipe), draw(pipe)
    stack = LoraStack(pipe, files)
    stack.apply(SCALES)
    places = [(p, p.data_ptr()) for part in PARTS for p in getattr(pipe, part).parameters()]
    default, styled = weights_of(pipe), draw(pipe)
    assert abs(styled - image).mean() > 0.05
    dice = random.Random(0)
    for _ in range(100):
        some = dice.sample(list(SCALES), dice.randint(0, 9))
        scales = {name: round(dice.uniform(-10, 10), 2) for name in some}
        stack.apply(scales)
        assert stack.applied == scales
    stack.apply(SCALES)
    assert_same(weights_of(pipe), default)
    assert np.array_equal(draw(pipe), styled)
    stack.apply({})
    assert_same(weights_of(pipe), bare)
    assert np.array_equal(draw(pipe), image)
    now = [p for part in PARTS for p in getattr(pipe, part).parameters()]
    assert all(p is q and p.data_ptr() == place for p, (q, place) in zip(now, places, strict=True))


def test_a_change_within_a_job_leaves_ordinary_parameters(bare, files) -> None:
    """Jobs run under inference_mode, whose tensors could not be changed by anything outside of it."""
    stack = LoraStack(bare, files)
    with torch.inference_mode():
        stack.apply(SCALES)
    assert not any(p.is_inference() for part in PARTS for p in getattr(bare, part).parameters())
    stack.apply({})


def test_scales_are_linear_and_may_be_negative(loaded, bare, files) -> None:
    """Scale -2 takes away twice what scale 1 adds."""
    stack = LoraStack(bare, files)
    weights = [layers_of(pipe)["unet.mid_block.attentions.0.proj_in"].weight for pipe in (loaded, bare)]
    changes = []
    for scale in (1.0, -2.0):
        stack.apply({"detail_tweaker_xl": scale})
        changes.append(weights[1] - weights[0])
    assert distance(changes[1], -2 * changes[0]) < 1e-5


def test_a_change_that_fails_half_way_is_made_good_by_the_next(bare, files) -> None:
    """Out of memory in the middle of the merge: whatever comes next, no half-changed weight is left."""
    before = weights_of(bare)
    stack = LoraStack(bare, files)
    stack.apply(SCALES)
    default = weights_of(bare)
    for wanted, expected in ((SCALES, default), ({}, before)):
        with pytest.raises(torch.OutOfMemoryError), Operations(fail_at=("aten.mm.default", 50)):
            stack.apply({"detail_tweaker_xl": 3.0, "boring_reality_primaryv3_0": -1.0})
        assert stack.apply(wanted) is True
        assert_same(weights_of(bare), expected)
        assert stack.applied == wanted


def test_a_name_that_is_not_in_the_stack_is_an_error(bare, files) -> None:
    """Nothing changes."""
    before = weights_of(bare)
    stack = LoraStack(bare, files)
    with pytest.raises(KeyError, match="unheard_of"):
        stack.apply(SCALES | {"unheard_of": 1.0})
    assert stack.applied == {}
    assert_same(weights_of(bare), before)


# ---------------------------------------------------------------------------------------------------------------------
# honest


def spoiled(name: str, change: Callable[[dict[str, np.ndarray]], Any], style: str = "kohya") -> tuple[str, Any]:
    """A kind of bad file beyond world.BAD_LORAS: what it does to a good file's tensors."""
    return name, lambda path: write_tensors(path, change(world_tensors(Lora(4, 2.0, PARTS, "linear"), style)))


def first_layer(tensors: dict[str, np.ndarray]) -> str:
    """The name of a layer of the file."""
    return next(name.partition(".lora_")[0] for name in tensors if ".lora_" in name)


def eight_bits(tensors: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The matrices in a type that torch can hardly compute with."""
    halves = {name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()}
    return {name: half.to(torch.float8_e4m3fn) if half.ndim else half for name, half in halves.items()}


MORE = dict(
    [
        ("missing", lambda path: path),
        ("eight bits", lambda path: save_file(eight_bits(world_tensors(Lora(4, 2.0), "kohya")), path)),
        spoiled("nan alpha", lambda t: t | {f"{first_layer(t)}.alpha": np.float16("nan")}),
        spoiled("alphas only", lambda t: {name: v for name, v in t.items() if name.endswith(".alpha")}),
        spoiled("no tensors", lambda _: {}),
        spoiled("up alone", lambda t: {n: v for n, v in t.items() if n != f"{first_layer(t)}.lora_down.weight"}),
        spoiled("peft half", lambda t: {n: v for n, v in t.items() if n != f"{first_layer(t)}.lora_B.weight"}, "peft"),
        spoiled("unknown layer", lambda t: {n.replace("mid_block", "mid_blocks"): v for n, v in t.items()}, "peft"),
        spoiled("unknown component", lambda t: {n.replace("unet.", "transformer."): v for n, v in t.items()}, "peft"),
        spoiled("bias", lambda t: t | {f"{first_layer(t)}.lora_B.bias": np.ones(4, np.float16)}, "peft"),
        spoiled("full difference", lambda t: t | {f"{first_layer(t)}.diff": np.ones((4, 4), np.float16)}),
        spoiled("peft dora", lambda t: t | {f"{first_layer(t)}.lora_magnitude_vector": np.ones(4, np.float16)}, "peft"),
        spoiled("embedding", lambda t: t | {"bundle_emb.style.string_to_param.*": np.ones((2, 4), np.float16)}),
        spoiled("other ranks", lambda t: t | {f"{first_layer(t)}.lora_down.weight": np.ones((3, 32), np.float16)}),
        spoiled("one dimension", lambda t: t | {f"{first_layer(t)}.lora_up.weight": np.ones(128, np.float16)}),
    ]
)
REASONS = {
    "loha": "LoHa",
    "lokr": "LoKr",
    "mid": "lora_mid",
    "dora": "DoRA",
    "peft dora": "DoRA",
    "bias": "bias",
    "sd15": "another base model",
    "flux": "another base model",
    "half": "one half of 1 of its",
    "nan": "NaN",
    "inf": "infinite",
    "nan alpha": "alpha",
    "no_keys": "no LoRA weights",
    "no tensors": "no LoRA weights",
    "empty": "not a safetensors file",
    "html": "not a safetensors file",
    "truncated": "damaged",
    "missing": "damaged or not",
    "alphas only": "no LoRA weights",
    "up alone": "one half",
    "peft half": "one half",
    "unknown layer": "are not in SDXL",
    "unknown component": "are not in SDXL",
    "full difference": "full-diff",
    "embedding": "bundle_emb",
    "other ranks": "in SDXL",
    "one dimension": "in SDXL",
    "eight bits": "float8",
}


@pytest.mark.parametrize("kind", [*BAD_LORAS, *MORE])
def test_a_bad_file_is_named_and_leaves_no_trace(bare, tmp_path: Path, kind: str, caplog, recwarn) -> None:
    """The others apply as if it were not there; the reason is in plain words and names no path. The libraries have
    nothing to complain of."""
    good, bad = write_lora(tmp_path / "good.safetensors"), tmp_path / "bad.safetensors"
    MORE[kind](bad) if kind in MORE else write_bad_lora(bad, kind)
    alone = LoraStack(bare, {"good": good})
    alone.apply({"good": 1.0})
    expected = weights_of(bare)
    alone.apply({})
    stack = LoraStack(bare, {"bad": bad, "good": good})
    assert stack.failed.keys() == {"bad"}
    assert re.search(REASONS[kind], stack.failed["bad"])
    assert str(tmp_path) not in stack.failed["bad"] and len(stack.failed["bad"]) < 200
    stack.apply({"bad": 1.0, "good": 1.0})
    assert stack.applied == {"good": 1.0}
    assert_same(weights_of(bare), expected)
    assert not [record for record in caplog.records if record.name != "worker"] and not recwarn.list


def test_good_files_make_no_noise(bare, files, caplog, recwarn) -> None:
    """Neither "No LoRA keys associated to CLIPTextModel found" nor "Already found a `peft_config` attribute"."""
    caplog.set_level(logging.WARNING)
    logging.getLogger("diffusers").setLevel(logging.WARNING)
    LoraStack(bare, files).apply(SCALES)
    assert not caplog.records and not recwarn.list


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile


@pytest.fixture
def compiler() -> Iterator[Counter[str]]:
    """torch.compile's own counts, from zero."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()


def test_compiled_blocks_serve_every_length_size_batch_and_stack(loaded, bare, files, compiler) -> None:
    """What start-up compiled, one graph a shape of block, is all that jobs need. Graphs are run by torch itself here:
    what counts is what is compiled, and when."""
    stack = LoraStack(bare, files)
    stack.apply(SCALES)
    compile_unet(bare, backend="eager")
    compiled = compiler["unique_graphs"]
    blocks = [module for module in bare.unet.modules() if type(module).__name__ in COMPILED_BLOCKS]
    assert 0 < compiled < len(blocks)
    with torch.inference_mode():
        for batch, size, tokens in ((2, (16, 16), 77), (2, (24, 16), 154), (8, (16, 40), 231)):
            run_unet(bare, batch, size, tokens)
        stack.apply({"detail_tweaker_xl": -2.0})
        styled = run_unet(bare)
        stack.apply({})
        assert distance(run_unet(bare), run_unet(loaded)) < 1e-5 < 1e-2 < distance(styled, run_unet(loaded))
    assert compiler["unique_graphs"] == compiled


# ---------------------------------------------------------------------------------------------------------------------
# settings


@pytest.fixture
def start(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Loads the worker's pipeline with the given settings from a copy of the world's files."""
    shutil.copytree(world.store, tmp_path / "store")

    def load(**settings: str) -> Any:
        for name, value in (world.environ(store=tmp_path / "store") | settings).items():
            monkeypatch.setenv(name, value)
        return handler.load_pipeline()

    return load


def test_another_stack_is_a_setting(start, loaded, tmp_path: Path) -> None:
    """LORAS names version ids with scales; one that the table does not know is civitai_<id>."""
    write_lora(tmp_path / "store" / "loras" / "civitai_999.safetensors")
    stack = start(LORAS="135867@0.5, 999@-2,1253021").lora_stack
    assert stack.applied == {"detail_tweaker_xl": 0.5, "civitai_999": -2.0, "pony_realism_slider": 1.0}
    assert stack.failed == {}


def test_an_empty_stack_is_the_bare_checkpoint(start, loaded) -> None:
    """LORAS="" changes no weight."""
    pipe = start(LORAS="")
    assert pipe.lora_stack.applied == {}
    assert_same(weights_of(pipe), weights_of(loaded))


def test_another_checkpoint_is_a_setting(start, world, loaded, tmp_path: Path) -> None:
    """CHECKPOINT=<version id> runs another model of Civitai's, with the same stack."""
    tensors = load_file(world.checkpoint)
    save_file({k: v * 0.5 for k, v in tensors.items()}, tmp_path / "store" / "checkpoints" / "civitai_42.safetensors")
    pipe = start(CHECKPOINT="42")
    assert pipe.lora_stack.applied == SCALES
    pipe.lora_stack.apply({})
    assert torch.equal(pipe.unet.conv_in.weight, loaded.unet.conv_in.weight * 0.5)


def test_a_bad_file_in_the_store_does_not_stop_a_start(start, tmp_path: Path) -> None:
    """The other LoRAs are in force, the bad one is named."""
    write_bad_lora(tmp_path / "store" / "loras" / handler.LORA_CONFIGS[0]["filename"], "loha")
    stack = start().lora_stack
    assert stack.applied == {name: scale for name, scale in SCALES.items() if name != "detail_tweaker_xl"}
    assert "LoHa" in stack.failed["detail_tweaker_xl"]


# ---------------------------------------------------------------------------------------------------------------------
# benchmarks


@pytest.mark.timeout(300)
def test_the_gpu_benchmark_runs_without_a_gpu() -> None:
    """Small, on this machine: four ways, each with its row."""
    script = Path(__file__).parent / "benchmarks" / "gpu.py"
    run = subprocess.run([sys.executable, script, "--small"], capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr
    rows = re.findall(r"^\| (\w.*?) \| 1 \| \d+\.\d\d \(", run.stdout, re.MULTILINE)
    assert rows == ["bare checkpoint", "2 unfused adapters", "worker", "worker, compiled"]
    assert "is not GPU work" in run.stdout
