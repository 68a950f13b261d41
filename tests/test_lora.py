"""The LoRA stack: no cost in a job, every kind of file right, free to change, honest about what it cannot use."""

from __future__ import annotations

import copy
import functools
import logging
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import lycoris
import numpy as np
import peft
import pytest
import torch
from lora_kinds import KINDS
from lora_kinds import draw as numbers
from safetensors.torch import load_file, save_file
from seams import COMPILED_BLOCKS, LoraStack, adapter_names, changed_tensors, compile_unet, load_engine, merge_into
from seams import LORA_COMPONENTS as PARTS
from torch.utils._python_dispatch import TorchDispatchMode
from world import (
    BAD_LORAS,
    Lora,
    Noise,
    Weight,
    World,
    kohya_module,
    lora_keys,
    lora_tensors,
    weights,
    write_bad_lora,
    write_lora,
    write_tensors,
)

import handler

SCALES = {
    name: config["scale"]
    for name, config in zip(adapter_names(handler.LORA_CONFIGS), handler.LORA_CONFIGS, strict=True)
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


@pytest.fixture(scope="module")
def shared(loaded: Any) -> Any:
    """A pipeline of the bare checkpoint for tests that leave it as it was."""
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


VIEWS = ("view", "slice", "split", "split_with_sizes", "detach", "alias", "unsqueeze", "expand", "permute", "t")


def test_a_change_of_the_stack_takes_ten_kernels_a_weight(loaded, files) -> None:
    """Of nine LoRAs or some of them, as of one: their factors are joined to one product."""
    half = copy_of(loaded, torch.float16)
    stack = LoraStack(half, files)
    stack.apply(SCALES)
    for scales in (dict.fromkeys(SCALES, 0.7), dict.fromkeys(list(SCALES)[2:], 0.5)):
        with Operations() as operations:
            stack.apply(scales)
        started = sum(n for name, n in operations.counts.items() if name.split(".")[1].strip("_") not in VIEWS)
        assert started <= 10 * len(changed_tensors(stack)), operations.counts


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


VARIANTS = {
    "old diffusers names": ("diffusers", Lora(4, 4.0), old_diffusers_names),
    "kohya with diffusers blocks": ("kohya", Lora(4, 2.0), diffusers_blocks),
    "kohya with two ranks": ("kohya", Lora(4, 2.0, PARTS, "linear"), two_ranks),
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
    """The tensors of a LoRA as world.write_lora writes them; the dict is the caller's, the arrays are all callers'."""
    return dict(drawn_tensors(lora, style))


@functools.cache
def drawn_tensors(lora: Lora, style: str) -> dict[str, np.ndarray]:
    """The same, drawn once."""
    return lora_tensors(lora, style, "tiny", 0.3, Noise(0, "tiny"), "one")


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
# every kind


def named_weights(*names: str) -> dict[str, Weight]:
    """The world's description of tensors of the pipeline, "unet.conv_in.weight"."""
    return {f"{w.component}.{w.name}": w for w in weights("tiny") if f"{w.component}.{w.name}" in names}


SOME = named_weights(  # linear layers and convolutions in every part, with the time, label, in and out layers
    "unet.conv_in.weight",
    "unet.conv_out.weight",
    "unet.time_embedding.linear_1.weight",
    "unet.add_embedding.linear_2.weight",
    "unet.down_blocks.0.downsamplers.0.conv.weight",
    "unet.down_blocks.1.resnets.0.conv_shortcut.weight",
    "unet.up_blocks.0.upsamplers.0.conv.weight",
    "unet.mid_block.resnets.1.time_emb_proj.weight",
    "unet.mid_block.attentions.0.transformer_blocks.1.attn2.to_k.weight",
    "unet.up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_out.0.weight",
    "text_encoder.text_model.encoder.layers.3.mlp.fc1.weight",
    "text_encoder_2.text_model.encoder.layers.13.self_attn.out_proj.weight",
)


def kohya_name(weight: Weight) -> str:
    """ "lora_unet_input_blocks_4_1_proj_in"."""
    return lora_keys(weight, "kohya")[0].removesuffix(".lora_down.weight")


def tensor_of(pipe: Any, name: str) -> torch.Tensor:
    """The tensor of a name such as "unet.conv_in.weight"."""
    part, _, rest = name.partition(".")
    return getattr(pipe, part).get_parameter(rest)


def write_layers(path: Path, layers: dict[str, dict[str, torch.Tensor]], **metadata: str) -> Path:
    """A file of layers, by their names in it, with their parts."""
    tensors = {f"{layer}.{part}": tensor for layer, parts in layers.items() for part, tensor in parts.items()}
    save_file(tensors, path, metadata or None)
    return path


def draw_layers(pipe: Any, kind: str, seed: int = 0) -> dict[str, tuple[Any, Any]]:
    """A layer of this kind for each of SOME: its parts, and the function scale -> weight in float64."""
    dice = torch.Generator().manual_seed(seed)
    return {name: KINDS[kind](tensor_of(pipe, name).detach(), dice) for name in SOME}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_merged_as_its_formula_says(loaded, shared, tmp_path: Path, kind: str) -> None:
    """Against float64, in linear layers and convolutions, at two scales; then every weight is restored."""
    layers = draw_layers(loaded, kind)
    file = write_layers(tmp_path / "one.safetensors", {kohya_name(SOME[n]): parts for n, (parts, _) in layers.items()})
    stack = LoraStack(shared, {"one": file})
    assert not stack.failed and not stack.loras["one"].warnings
    assert changed_tensors(stack) == SOME.keys()
    for scale in (0.8, -1.5):
        stack.apply({"one": scale})
        for name, (_, new_weight) in layers.items():
            assert distance(tensor_of(shared, name), new_weight(scale)) < 2e-6, name
    stack.apply({})
    assert_same(weights_of(shared), weights_of(loaded))


def test_kinds_add_up_and_are_rounded_once(loaded, tmp_path: Path) -> None:
    """Four files of different kinds over the same layers, in float16: each change is computed from the checkpoint's own
    weights, and their sum is the float16 number next to the truth."""
    scales = {"LoRA, LoCon": 0.1, "DoRA by column": 0.3, "LoKr, both factored": -0.2, "without alpha": 0.05}
    layers = {kind: draw_layers(loaded, kind, seed) for seed, kind in enumerate(scales)}
    files = {
        kind: write_layers(
            tmp_path / f"{n}.safetensors", {kohya_name(SOME[name]): parts for name, (parts, _) in layers[kind].items()}
        )
        for n, kind in enumerate(layers)
    }
    half = copy_of(loaded, torch.float16)
    LoraStack(half, files).apply(scales)
    for name in SOME:
        original = tensor_of(loaded, name).detach().double()
        truth = original + sum(layers[kind][name][1](scale) - original for kind, scale in scales.items())
        found, error = tensor_of(half, name), (tensor_of(half, name).double() - truth).abs()
        step = (torch.nextafter(found.abs(), torch.tensor(torch.inf).half()) - found.abs()).double()
        assert (error <= step / 2 + 1e-5 * truth.abs().max()).all(), name


def test_the_order_of_a_stack_does_not_matter(loaded, shared, tmp_path: Path) -> None:
    """Files and scales in either order make the same weights, with DoRA among them."""
    kinds = ("DoRA by row", "LoHa", "LoRA, LoCon", "full difference", "DoRA around LoKr")
    files = {
        kind: write_layers(
            tmp_path / f"{n}.safetensors",
            {kohya_name(SOME[name]): parts for name, (parts, _) in draw_layers(loaded, kind, n).items()},
        )
        for n, kind in enumerate(kinds)
    }
    found = []
    for order in (kinds, kinds[::-1]):
        stack = LoraStack(shared, {kind: files[kind] for kind in order})
        stack.apply(dict.fromkeys(order, 0.3))
        found.append({name: tensor_of(shared, name).clone() for name in SOME})
        stack.apply({})
    assert all(distance(found[0][name], found[1][name]) < 1e-6 for name in SOME)


def test_norms_and_biases_are_changed_and_restored(loaded, shared, tmp_path: Path) -> None:
    """w_norm and b_norm, diff and diff_b, of GroupNorm, LayerNorm, a convolution and the text encoder."""
    names = named_weights(
        "unet.down_blocks.0.resnets.0.norm1.weight",
        "unet.conv_norm_out.weight",
        "unet.mid_block.attentions.0.transformer_blocks.0.norm2.weight",
        "unet.mid_block.resnets.0.conv1.weight",
        "text_encoder_2.text_model.encoder.layers.0.layer_norm1.weight",
        "text_encoder.text_model.embeddings.position_embedding.weight",
    )
    dice, layers, truth = torch.Generator().manual_seed(0), {}, {}
    for name, weight in names.items():
        ends = ("w_norm", "b_norm") if "norm" in name else ("diff", "diff_b")
        layers[kohya_name(weight)] = {}
        for end, part in zip(("weight", "bias"), ends, strict=True):
            if "embedding" in name and end == "bias":
                continue
            tensor = tensor_of(loaded, name.replace(".weight", f".{end}")).detach()
            layers[kohya_name(weight)][part] = numbers(dice, *tensor.shape)
            truth[name.replace(".weight", f".{end}")] = (
                tensor.double() - 0.7 * layers[kohya_name(weight)][part].double()
            )
    stack = LoraStack(shared, {"one": write_layers(tmp_path / "one.safetensors", layers)})
    stack.apply({"one": -0.7})
    assert changed_tensors(stack) == truth.keys() and len(truth) == 11
    assert all(distance(tensor_of(shared, name), expected) < 1e-6 for name, expected in truth.items())
    stack.apply({})
    assert_same(weights_of(shared), weights_of(loaded))


LYCORIS = {
    "LoCon": {"algo": "locon"},
    "LoCon, Tucker, DoRA": {"algo": "locon", "use_tucker": True, "dora_wd": True},
    "LoHa": {"algo": "loha"},
    "LoHa, Tucker, DoRA by column": {"algo": "loha", "use_tucker": True, "dora_wd": True, "wd_on_output": False},
    "LoKr": {"algo": "lokr", "factor": 4},
    "LoKr, both factored, DoRA": {"algo": "lokr", "factor": 4, "decompose_both": True, "dora_wd": True},
    "LoKr, Tucker": {"algo": "lokr", "factor": 2, "use_tucker": True},
    "LoKr, whole": {"algo": "lokr", "factor": 4, "full_matrix": True},
    "full": {"algo": "full"},
    "norms": {"algo": "locon", "train_norm": True},
}


@pytest.mark.parametrize("kind", LYCORIS)
def test_files_that_lycoris_wrote_do_what_they_do_there(loaded, shared, tmp_path: Path, kind: str) -> None:
    """lycoris-lora 3.2 puts a network of random numbers around the mid block and saves it: the merged block answers as
    the one with the network."""
    block = copy.deepcopy(loaded.unet.mid_block)
    options = {"linear_dim": 2, "linear_alpha": 1, "conv_dim": 2, "conv_alpha": 1.5, "preset": "full"}
    network = lycoris.create_lycoris(block, 1.0, **options, **LYCORIS[kind])
    network.apply_to()
    torch.manual_seed(0)
    for parameter in network.parameters():
        parameter.data += torch.randn(parameter.shape) * 0.1
    tensors = network.state_dict()
    names = {name: name.replace("lycoris_", "lycoris_mid_block_", 1) for name in tensors}
    save_file({names[name]: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "one.safetensors")
    stack = LoraStack(shared, {"one": tmp_path / "one.safetensors"})
    assert not stack.failed and not stack.loras["one"].warnings
    inputs = torch.randn(2, 64, 6, 6), torch.randn(2, 64), torch.randn(2, 9, 96)
    with torch.no_grad():
        stack.apply({"one": 1.0})
        found, expected, before = (
            mid(inputs[0], inputs[1], encoder_hidden_states=inputs[2])
            for mid in (shared.unet.mid_block, block, loaded.unet.mid_block)
        )
    stack.apply({})
    assert distance(found, expected) < 1e-5 < 1e-2 < distance(before, expected)


# ---------------------------------------------------------------------------------------------------------------------
# every name


def original_name(weight: Weight) -> str:
    """LDM's name of a UNet's layer, "input_blocks.4.1.proj_in"."""
    return weight.original.removeprefix("model.diffusion_model.").removesuffix(".weight")


def own_name(weight: Weight) -> str:
    """diffusers' name of a layer."""
    return weight.name.removesuffix(".weight")


NAMINGS: dict[str, tuple[str, Callable[[Weight], str]]] = {  # how it names a layer -> component, the name
    **{
        f"{prefix}… as {who} writes it, with {dot}": (
            "unet",
            lambda w, p=prefix, n=name, d=dot: p + n(w).replace(".", d),
        )
        for who, name in (("LDM", original_name), ("diffusers", own_name))
        for prefix, dot in (
            *(("lora_unet_", "_"), ("lycoris_", "_"), ("unet.", "."), ("diffusion_model.", "."), ("", ".")),
            *(("base_model.model.", "."), ("base_model.model.unet.", ".")),
        )
    },
    **{
        f"{prefix}… with {dot}": (part, lambda w, p=prefix, d=dot: p + own_name(w).replace(".", d))
        for part, prefix, dot in (
            *(("text_encoder", "lora_te1_", "_"), ("text_encoder", "lora_te_", "_")),
            *(("text_encoder", "text_encoder.", "."), ("text_encoder_2", "text_encoder_2.", ".")),
            ("text_encoder_2", "lora_te2_", "_"),
        )
    },
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_layer_is_found_under_every_name(loaded, shared, tmp_path: Path, naming: str) -> None:
    """A number of its own for each matrix, convolution and norm of the component reaches its place, and no other."""
    part, name_of = NAMINGS[naming]
    layers, truth = {}, {}
    for weight in weights("tiny"):
        if weight.component == part and weight.name.endswith(".weight"):
            number = 1 + len(layers) / 64
            layers[name_of(weight)] = {"diff": torch.full(weight.shape, number).half()}
            truth[f"{part}.{weight.name}"] = tensor_of(loaded, f"{part}.{weight.name}").detach() + number
    stack = LoraStack(shared, {"one": write_layers(tmp_path / "one.safetensors", layers)})
    assert not stack.failed and not stack.loras["one"].warnings
    stack.apply({"one": 1.0})
    assert changed_tensors(stack) == truth.keys()
    assert_same({name: tensor_of(shared, name) for name in truth}, truth)
    stack.apply({})


ENDINGS = {  # how the two halves of a layer are called
    "lora_up and lora_down": ("{}.lora_up.weight", "{}.lora_down.weight"),
    "PEFT": ("{}.lora_B.weight", "{}.lora_A.weight"),
    "PEFT with the adapter's name": ("{}.lora_B.default.weight", "{}.lora_A.default.weight"),
    "diffusers": ("{}.lora.up.weight", "{}.lora.down.weight"),
    "diffusers, text encoders": ("{}.lora_linear_layer.up.weight", "{}.lora_linear_layer.down.weight"),
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("has_alpha", [True, False])
def test_both_halves_are_found_under_every_name(loaded, shared, tmp_path: Path, ending: str, has_alpha: bool) -> None:
    """With an alpha of its own in each layer too, which diffusers drops for PEFT's names."""
    dice, tensors, truth = torch.Generator().manual_seed(0), {}, {}
    for n, (name, weight) in enumerate(SOME.items()):
        rank = 1 + n % 3
        rows, columns = weight.shape[0], int(np.prod(weight.shape[1:]))
        up, down = numbers(dice, rows, rank), numbers(dice, rank, columns)
        layer = name.removesuffix(".weight")
        tensors |= dict(zip((end.format(layer) for end in ENDINGS[ending]), (up, down), strict=True))
        if has_alpha:
            tensors[f"{layer}.alpha"] = torch.tensor(n / 2)
        change = (up.double() @ down.double()).reshape(weight.shape) * (n / 2 / rank if has_alpha else 1)
        truth[name] = tensor_of(loaded, name).detach().double() + change
    save_file(tensors, tmp_path / "one.safetensors")
    stack = LoraStack(shared, {"one": tmp_path / "one.safetensors"})
    stack.apply({"one": 1.0})
    assert not stack.failed and not stack.loras["one"].warnings
    assert all(distance(tensor_of(shared, name), expected) < 1e-6 for name, expected in truth.items())
    stack.apply({})


def test_two_namings_in_one_file(loaded, shared, tmp_path: Path) -> None:
    """Every second layer by LDM's name, the others by diffusers'; one layer under both is refused."""
    layers = draw_layers(loaded, "LoRA, LoCon")
    unet = [name for name in SOME if name.startswith("unet.")]
    named = {
        kohya_name(SOME[name]) if n % 2 else "lora_unet_" + own_name(SOME[name]).replace(".", "_"): layers[name][0]
        for n, name in enumerate(unet)
    }
    stack = LoraStack(shared, {"one": write_layers(tmp_path / "one.safetensors", named)})
    stack.apply({"one": 1.0})
    assert all(distance(tensor_of(shared, name), layers[name][1](1.0)) < 2e-6 for name in unet)
    stack.apply({})
    twice = named | {kohya_name(SOME[unet[0]]): {part: tensor.clone() for part, tensor in layers[unet[0]][0].items()}}
    stack = LoraStack(shared, {"one": write_layers(tmp_path / "two.safetensors", twice)})
    assert "twice" in stack.failed["one"]


def test_float8_files_are_converted(loaded, shared, tmp_path: Path) -> None:
    """Both float8 types hold the same numbers in float16."""
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        layers = {
            name: {part: tensor.to(dtype) for part, tensor in parts.items()}
            for name, (parts, _) in draw_layers(loaded, "LoRA, LoCon").items()
        }
        stack = LoraStack(
            shared,
            {
                "eight": write_layers(tmp_path / "8.safetensors", {kohya_name(SOME[n]): p for n, p in layers.items()}),
                "sixteen": write_layers(
                    tmp_path / "16.safetensors",
                    {kohya_name(SOME[n]): {k: v.half() for k, v in p.items()} for n, p in layers.items()},
                ),
            },
        )
        assert not stack.failed
        found = []
        for name in ("eight", "sixteen", None):
            stack.apply({name: 1.0} if name else {})
            found.append(weights_of(shared))
        assert_same(found[0], found[1])
        assert any(not torch.equal(found[0][name], found[2][name]) for name in SOME)


# ---------------------------------------------------------------------------------------------------------------------
# what does not fit


def test_layers_that_sdxl_lacks_are_left_out_with_a_warning(loaded, shared, tmp_path: Path) -> None:
    """The warning counts them and names one; the others count as ever. A bias where SDXL has none is such a layer, but
    for one of zeros, which changes nothing."""
    layers = draw_layers(loaded, "LoRA, LoCon")
    named = {kohya_name(SOME[name]): parts for name, (parts, _) in layers.items()}
    extra = {
        "lora_unet_middle_block_9_proj_in": {"diff": torch.ones(4, 4)},
        "lora_te3_layers_0": {"diff": torch.ones(2, 2)},
    }
    biases = {"lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q": {"diff_b": torch.zeros(64)}}
    biases |= {"lora_unet_middle_block_1_transformer_blocks_0_attn1_to_k": {"diff_b": torch.ones(64)}}
    stack = LoraStack(shared, {"one": write_layers(tmp_path / "one.safetensors", named | extra | biases)})
    stack.apply({"one": 1.0})
    assert all(distance(tensor_of(shared, name), layers[name][1](1.0)) < 2e-6 for name in SOME)
    assert changed_tensors(stack) == SOME.keys()
    [warning] = stack.loras["one"].warnings
    assert warning == "3 of its layers and biases are not in SDXL and are left out, such as 'lora_te3_layers_0'"
    stack.apply({})


def test_rank_zero_changes_nothing(loaded, shared, tmp_path: Path) -> None:
    """Resizing scripts write layers of rank 0."""
    weight = next(iter(SOME.values()))
    rows, columns, *kernel = weight.shape
    nothing = {"lora_up.weight": torch.ones(rows, 0, 1, 1), "lora_down.weight": torch.ones(0, columns, *kernel)}
    layers = {kohya_name(weight): nothing | {"alpha": torch.tensor(1.0)}}
    stack = LoraStack(shared, {"one": write_layers(tmp_path / "one.safetensors", layers)})
    assert not stack.failed and not stack.loras["one"].warnings and not changed_tensors(stack)
    assert stack.apply({"one": 1.0}) is True
    assert_same(weights_of(shared), weights_of(loaded))


def test_a_bundled_embedding_is_handed_on(shared, tmp_path: Path) -> None:
    """By the file's adapter and its own name; the LoRA beside it is read as ever."""
    vectors = {"clip_l": torch.randn(3, 32).half(), "clip_g": torch.randn(3, 64).half()}
    good = load_file(write_lora(tmp_path / "one.safetensors"))
    save_file(good | {f"bundle_emb.my style.{k}": v for k, v in vectors.items()}, tmp_path / "one.safetensors")
    stack = LoraStack(shared, {"one": tmp_path / "one.safetensors"})
    assert not stack.failed and not stack.loras["one"].warnings
    assert stack.loras["one"].embeddings.keys() == {"my style"}
    found = stack.loras["one"].embeddings["my style"]
    assert_same({"clip_l": found.clip_l.half(), "clip_g": found.clip_g.half()}, vectors)


CONFIGS = {
    "ranks and alphas by pattern": {
        "rank_pattern": {"attn1.to_q": 2},
        "alpha_pattern": {"attn1.*to_q": 5, "proj_in": 3},
    },
    "rslora": {"use_rslora": True, "alpha_pattern": {"proj_in": 3}},
    "dora": {"use_dora": True},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_pefts_own_configuration_counts(loaded, bare, tmp_path: Path, kind: str) -> None:
    """A file saved by diffusers 0.34 carries it in its header; the layers answer as PEFT's own."""
    layers = ["to_q", "proj_in", "conv1"]
    config = peft.LoraConfig(r=4, target_modules=layers, lora_alpha=6, init_lora_weights=False, **CONFIGS[kind])
    torch.manual_seed(0)
    unet = copy.deepcopy(loaded.unet)
    unet.add_adapter(config)
    diffusers.StableDiffusionXLPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=peft.get_peft_model_state_dict(unet),
        weight_name="one.safetensors",
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )
    stack = LoraStack(bare, {"one": tmp_path / "one.safetensors"})
    stack.apply({"one": 1.0})
    assert not stack.failed and not stack.loras["one"].warnings
    with torch.no_grad():
        for name, layer in unet.named_modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                x, merged = layer_input(layer.base_layer), bare.unet.get_submodule(name)
                assert distance(merged(x), layer(x)) < 1e-5, name


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
def test_many_changes_leave_nothing_behind(loaded, files, kind: str) -> None:
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
    for _ in range(20):
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
        with pytest.raises(torch.OutOfMemoryError), Operations(fail_at=("aten.addmm.default", 50)):
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


def kohya_shapes(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    """One module of a Kohya file."""
    return {name: tensor.shape for name, tensor in kohya_module(name, rows, columns).items()}


ONE = {"unet.mid_block.attentions.0.proj_in": {"lora_A.weight": torch.ones(2, 64), "lora_B.weight": torch.ones(64, 2)}}
BROKEN = {"lora_adapter_metadata": "{"}
CONFIGURATIONS = {  # of PEFT, which cannot be used
    "list of alphas": '{"unet.alpha_pattern": [1]}',
    "alpha pattern": '{"unet.alpha_pattern": {"(": 4}}',
    "alpha in words": '{"unet.lora_alpha": "eight"}',
    "infinite alpha": '{"unet.lora_alpha": Infinity}',
    "huge alpha": f'{{"unet.lora_alpha": {10**400}}}',
    "patterns that close each other": '{"unet.alpha_pattern": {"(a": 4, "b)": 4}}',
}
DORA = {"lora_adapter_metadata": '{"unet.r": 2, "unet.use_dora": true}'}


def written(name: str, tensors: dict[str, tuple[int, ...]]) -> tuple[str, Any]:
    """A kind of bad file of ones in these shapes."""
    ones = {key: np.ones(shape, np.float16) for key, shape in tensors.items()}
    return name, lambda path: write_tensors(path, ones)


def without(ending: str) -> Callable[[dict[str, np.ndarray]], Any]:
    """The first layer loses a part."""
    return lambda t: {name: tensor for name, tensor in t.items() if name != f"{first_layer(t)}.{ending}"}


PROJ_IN = "lora_unet_middle_block_1_proj_in"  # 64 x 64
MORE = dict(
    [
        ("missing", lambda path: path),
        ("integers", lambda path: save_file({f"{PROJ_IN}.diff": torch.ones(64, 64, dtype=torch.int8)}, path)),
        ("peft configuration", lambda path: write_layers(path, {PROJ_IN: {"diff": torch.ones(64, 64)}}, **BROKEN)),
        *(
            (f"peft configuration, {what}", lambda path, text=text: write_layers(path, ONE, lora_adapter_metadata=text))
            for what, text in CONFIGURATIONS.items()
        ),
        ("dora without magnitude", lambda path: write_layers(path, ONE, **DORA)),
        spoiled("nan alpha", lambda t: t | {f"{first_layer(t)}.alpha": np.float16("nan")}),
        spoiled("two alphas", lambda t: t | {f"{first_layer(t)}.alpha": np.ones(2, np.float16)}),
        spoiled("alphas only", lambda t: {name: v for name, v in t.items() if name.endswith(".alpha")}),
        spoiled("no tensors", lambda _: {}),
        spoiled("up alone", without("lora_down.weight")),
        spoiled("peft half", without("lora_B.weight"), "peft"),
        spoiled(
            "unknown component", lambda t: {n.replace("unet.", "transformer."): t[n] for n in t if "unet." in n}, "peft"
        ),
        spoiled("bias of up", lambda t: t | {f"{first_layer(t)}.lora_B.bias": np.ones(4, np.float16)}, "peft"),
        spoiled("two kinds", lambda t: t | {f"{first_layer(t)}.diff": np.ones((4, 4), np.float16)}),
        spoiled("other ranks", lambda t: t | {f"{first_layer(t)}.lora_down.weight": np.ones((3, 32), np.float16)}),
        spoiled("one dimension", lambda t: t | {f"{first_layer(t)}.lora_up.weight": np.ones(128, np.float16)}),
        spoiled("dora of another shape", lambda t: t | {f"{first_layer(t)}.dora_scale": np.ones((7, 1), np.float16)}),
        written("loha half", {f"{PROJ_IN}.hada_w1_a": (64, 4), f"{PROJ_IN}.hada_w1_b": (4, 64)}),
        written("lokr half", {f"{PROJ_IN}.lokr_w1": (4, 4), f"{PROJ_IN}.lokr_w2_a": (16, 4)}),
        written("loha of another shape", {f"{PROJ_IN}.hada_w{n}": (4, 4) for n in ("1_a", "1_b", "2_a", "2_b")}),
        written("lokr of another shape", {f"{PROJ_IN}.lokr_w1": (4, 4), f"{PROJ_IN}.lokr_w2": (4, 4)}),
        written("turned difference", {"lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k.diff": (96, 64)}),
        written("dora alone", {f"{PROJ_IN}.dora_scale": (64, 1)}),
        written("OFT", {f"{PROJ_IN}.oft_blocks": (4, 16, 16), f"{PROJ_IN}.alpha": ()}),
        written("OFT of PEFT", {"base_model.model.mid_block.attentions.0.proj_in.oft_R.weight": (4, 120)}),
        written("BOFT", {f"{PROJ_IN}.oft_blocks": (2, 4, 16, 16), f"{PROJ_IN}.alpha": ()}),
        written("GLoRA", {f"{PROJ_IN}.{n}.weight": (64, 64) for n in ("a1", "a2", "b1", "b2")}),
        written("IA³", {f"{PROJ_IN}.weight": (64,), f"{PROJ_IN}.on_input": ()}),
        written("control-LoRA", {"lora_controlnet": (), "input_blocks.1.0.in_layers.2.up": (16, 4, 1, 1)}),
        written("embedding", {"clip_l": (2, 768), "clip_g": (2, 1280)}),
        written("SD 1 embedding", {"emb_params": (2, 768)}),
        written(
            "checkpoint", {"first_stage_model.decoder.conv_in.bias": (4,), "model.diffusion_model.out.2.bias": (4,)}
        ),
        written("SD 1 by LDM", {"lora_unet_input_blocks_1_1_proj_in.diff": (4, 4), f"{PROJ_IN}.diff": (4, 4)}),
        written("SD 1", kohya_shapes("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k", 1280, 768)),
        written("SD 2", kohya_shapes("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k", 1280, 1024)),
        written("flux of diffusers", kohya_shapes("transformer.single_transformer_blocks.0.attn.to_q", 3072, 3072)),
        written("SD 3", kohya_shapes("lora_unet_joint_blocks_0_x_block_attn_qkv", 1536, 1536)),
        written("PixArt", kohya_shapes("transformer.transformer_blocks.0.attn1.to_q", 1152, 1152)),
        written("Wan", kohya_shapes("diffusion_model.blocks.0.self_attn.q", 1536, 1536)),
    ]
)
REASONS = {
    "sd15": "a LoRA for Stable Diffusion 1",
    "flux": "a LoRA for Flux",
    "half": "lacks the part 'up'",
    "nan": "NaN",
    "inf": "infinite",
    "nan alpha": "NaN",
    "two alphas": "does not fit",
    "no_keys": "no LoRA weights",
    "no tensors": "no LoRA weights",
    "empty": "not a safetensors file",
    "html": "not a safetensors file",
    "truncated": "damaged",
    "missing": "damaged or not",
    "integers": "type int8",
    "peft configuration": "PEFT configuration cannot be read",
    **{f"peft configuration, {what}": "PEFT configuration cannot be read" for what in CONFIGURATIONS},
    "dora without magnitude": "lacks the part 'magnitude_vector'",
    "alphas only": "lacks the part 'up'",
    "up alone": "lacks the part 'down'",
    "peft half": "lacks the part 'up'",
    "unknown component": "none of its .* layers is in SDXL",
    "bias of up": "unknown kind, such as .*lora_B.bias",
    "two kinds": "several kinds",
    "other ranks": "does not fit SDXL's",
    "one dimension": "does not fit SDXL's",
    "dora of another shape": "does not fit SDXL's",
    "loha half": "lacks the part 'hada_w2_a'",
    "lokr half": "lacks the part 'lokr_w2_b'",
    "loha of another shape": r"does not fit SDXL's, which is \(64, 64\)",
    "lokr of another shape": "does not fit SDXL's",
    "turned difference": "does not fit SDXL's",
    "dora alone": "lacks the part 'up'",
    "OFT": "an OFT network",
    "OFT of PEFT": "an OFT network",
    "BOFT": "a BOFT network",
    "GLoRA": "a GLoRA network",
    "IA³": "an IA³ network",
    "control-LoRA": "control-LoRA",
    "embedding": "a textual-inversion embedding",
    "SD 1 embedding": "a textual-inversion embedding",
    "checkpoint": "a checkpoint",
    "SD 1 by LDM": "a LoRA for Stable Diffusion 1 or 2",
    "SD 1": "a LoRA for Stable Diffusion 1:",
    "SD 2": "a LoRA for Stable Diffusion 2:",
    "flux of diffusers": "a LoRA for Flux",
    "SD 3": "a LoRA for Stable Diffusion 3",
    "PixArt": "none of its 1 layers is in SDXL",
    "Wan": "a LoRA of a transformer",
}


@pytest.fixture(scope="module")
def good(shared: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A good file, and every weight with it."""
    file = write_lora(tmp_path_factory.mktemp("good") / "good.safetensors")
    stack = LoraStack(shared, {"good": file})
    stack.apply({"good": 1.0})
    expected = weights_of(shared)
    stack.apply({})
    return file, expected


@pytest.mark.parametrize("kind", [*BAD_LORAS, *MORE])
def test_a_bad_file_is_named_and_leaves_no_trace(shared, good, tmp_path: Path, kind: str, caplog, recwarn) -> None:
    """The others apply as if it were not there; the reason is in plain words and names no path. The libraries have
    nothing to complain of."""
    bad = tmp_path / "bad.safetensors"
    MORE[kind](bad) if kind in MORE else write_bad_lora(bad, kind)
    stack = LoraStack(shared, {"bad": bad, "good": good[0]})
    assert stack.failed.keys() == {"bad"}
    assert re.search(REASONS[kind], stack.failed["bad"])
    assert str(tmp_path) not in stack.failed["bad"] and len(stack.failed["bad"]) < 200
    stack.apply({"bad": 1.0, "good": 1.0})
    assert stack.applied == {"good": 1.0}
    assert_same(weights_of(shared), good[1])
    stack.apply({})
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
    """Loads the worker's engine with the given settings from a copy of the world's files."""
    shutil.copytree(world.store, tmp_path / "store")

    def load(**settings: str) -> Any:
        for name, value in (world.environ(store=tmp_path / "store") | settings).items():
            monkeypatch.setenv(name, value)
        return load_engine()

    return load


def test_another_stack_is_a_setting(start, loaded, tmp_path: Path) -> None:
    """LORAS names version ids with scales; one that the table does not know is civitai_<id>."""
    write_lora(tmp_path / "store" / "loras" / "civitai_999.safetensors")
    stack = start(LORAS="135867@0.5, 999@-2,1253021").stack
    assert stack.applied == {"detail_tweaker_xl": 0.5, "civitai_999": -2.0, "pony_realism_slider": 1.0}
    assert stack.failed == {}


def test_an_empty_stack_is_the_bare_checkpoint(start, loaded) -> None:
    """LORAS="" changes no weight."""
    engine = start(LORAS="")
    assert engine.stack.applied == {}
    assert_same(weights_of(engine.pipe), weights_of(loaded))


def test_another_checkpoint_is_a_setting(start, world, loaded, tmp_path: Path) -> None:
    """CHECKPOINT=<version id> runs another model of Civitai's, with the same stack."""
    tensors = load_file(world.checkpoint)
    save_file({k: v * 0.5 for k, v in tensors.items()}, tmp_path / "store" / "checkpoints" / "civitai_42.safetensors")
    engine = start(CHECKPOINT="42")
    assert engine.stack.applied == SCALES
    engine.stack.apply({})
    assert torch.equal(engine.pipe.unet.conv_in.weight, loaded.unet.conv_in.weight * 0.5)


def test_a_bad_file_in_the_store_does_not_stop_a_start(start, tmp_path: Path) -> None:
    """The other LoRAs are in force, the bad one is named."""
    write_bad_lora(tmp_path / "store" / "loras" / handler.LORA_CONFIGS[0]["filename"], "half")
    stack = start().stack
    assert stack.applied == {name: scale for name, scale in SCALES.items() if name != "detail_tweaker_xl"}
    assert "lacks the part" in stack.failed["detail_tweaker_xl"]
