"""What tests need of handler.py's inside beyond its contract. Only this file names it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

import handler

# --- LoRAs

LoraStack = handler.LoraStack  # LoraStack(pipe, files).apply(scales); failed, warnings, embeddings, applied
LORA_COMPONENTS = tuple(handler.LORA_COMPONENTS)


def changed_tensors(stack: handler.LoraStack) -> set[str]:
    """The tensors that the stack's LoRAs change, "unet.conv_in.weight"."""
    return set(stack.targets)


def merge_into(layer: Any, shares: Mapping[str, tuple[Any, Any, float]], scales: Mapping[str, float]) -> None:
    """Merges plain LoRAs, adapter name -> (up, down, alpha / rank), into the weight of a single layer."""
    target = handler.Target(layer, "weight", layer.weight.detach().clone())
    for name, (up, down, scaling) in shares.items():
        target.shares[name] = handler.Share(handler.low_rank, {"up": up, "down": down}, scaling, None)
    with torch.no_grad():
        target.settle(on_gpu=False)
        [rank_scales] = handler.scale_ranks([target], scales, "cpu")
        target.merge(scales, rank_scales, "cpu")


# --- pipeline

compile_unet = handler.compile_unet  # compile_unet(pipe, backend)
COMPILED_BLOCKS = handler.COMPILED_BLOCKS


def load_engine() -> handler.Engine:
    """What a start makes of the environment: the pipeline and all that belongs to it."""
    return handler.Engine.load(handler.Settings.from_environ())
