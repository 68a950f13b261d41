"""LoRA layers of every kind with the weight that they make, computed here in float64 by the letter of the formulas.

`KINDS[name](weight, dice)` draws a layer for a weight: its parts as a file holds them, by the ends of their names, and
the function scale -> new weight. W is the checkpoint's weight, s the scale, c = alpha / rank; W' = W + s · change, and
with DoRA W' = W + s · (m · V / ‖V‖ − W) where V = W + change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Parts = dict[str, torch.Tensor]
Layer = tuple[Parts, Callable[[float], torch.Tensor]]
RANK = 4


def draw(dice: torch.Generator, *shape: int) -> torch.Tensor:
    """float16 numbers, as files have them."""
    return torch.randn(shape, generator=dice).half()


def alpha(value: float) -> Parts:
    """The tensor that scales a layer."""
    return {"alpha": torch.tensor(value, dtype=torch.float16)}


def add(weight: torch.Tensor, change: torch.Tensor) -> Callable[[float], torch.Tensor]:
    """W + s · change; changes come as they are computed, and take the weight's shape row by row."""
    return lambda scale: weight.double() + scale * change.reshape(weight.shape)


def lora(weight: torch.Tensor, dice: torch.Generator, own_alpha: float | None = 3.0) -> Layer:
    """c · up · down, the sum over the rank written out; of a convolution down has the kernel."""
    rows, columns, *kernel = weight.shape
    up, down = draw(dice, rows, RANK, *[1 for _ in kernel]), draw(dice, RANK, columns, *kernel)
    change = sum(torch.outer(up[:, r].double().flatten(), down[r].double().flatten()) for r in range(RANK))
    parts = {"lora_up.weight": up, "lora_down.weight": down} | ({} if own_alpha is None else alpha(own_alpha))
    return parts, add(weight, change * (1 if own_alpha is None else own_alpha / RANK))


def lora_without_alpha(weight: torch.Tensor, dice: torch.Generator) -> Layer:
    """Then c is 1."""
    return lora(weight, dice, None)


def tucker(weight: torch.Tensor, dice: torch.Generator) -> Layer:
    """LoCon with a core: change[o, i, k, l] = c · Σ up[o, m] · mid[m, n, k, l] · down[n, i]."""
    rows, columns, *kernel = weight.shape
    kernel = kernel or [1, 1]
    up, down, mid = draw(dice, rows, RANK, 1, 1), draw(dice, RANK, columns, 1, 1), draw(dice, RANK, RANK, *kernel)
    first = torch.tensordot(up.double().flatten(1), mid.double(), dims=([1], [0]))  # (rows, n, k, l)
    change = torch.tensordot(first, down.double().flatten(1), dims=([1], [0])).permute(0, 3, 1, 2)
    parts = {"lora_up.weight": up, "lora_down.weight": down, "lora_mid.weight": mid} | alpha(2.0)
    return parts, add(weight, change * 2.0 / RANK)


def loha(weight: torch.Tensor, dice: torch.Generator) -> Layer:
    """c · (w1a·w1b)∘(w2a·w2b)."""
    rows, columns = weight.flatten(1).shape
    a1, a2 = draw(dice, rows, RANK), draw(dice, rows, RANK)
    b1, b2 = draw(dice, RANK, columns), draw(dice, RANK, columns)
    change = (a1.double() @ b1.double()) * (a2.double() @ b2.double())
    parts = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2} | alpha(1.0)
    return parts, add(weight, change / RANK)


def rebuilt(core: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """LyCORIS' Tucker form, Σ core[i, j, k, l] · a[i, p] · b[j, r], of shape (p, r, k, l)."""
    first = torch.tensordot(a.double().T, core.double(), dims=([1], [0]))  # (p, j, k, l)
    return torch.tensordot(first, b.double(), dims=([1], [0])).permute(0, 3, 1, 2)


def loha_tucker(weight: torch.Tensor, dice: torch.Generator) -> Layer:
    """Both factors with a core."""
    rows, columns, *kernel = weight.shape
    kernel = kernel or [1, 1]
    a1, a2 = draw(dice, RANK, rows), draw(dice, RANK, rows)
    b1, b2 = draw(dice, RANK, columns), draw(dice, RANK, columns)
    t1, t2 = draw(dice, RANK, RANK, *kernel), draw(dice, RANK, RANK, *kernel)
    parts = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "hada_t1": t1, "hada_t2": t2}
    return parts | alpha(2.0), add(weight, rebuilt(t1, a1, b1) * rebuilt(t2, a2, b2) * 2.0 / RANK)


def kronecker(w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    """Block (i, j) of the result is w1[i, j] · w2; behind two dimensions the kernel is w2's."""
    rows = [torch.cat([number * w2 for number in row], 1) for row in w1]
    return torch.cat(rows, 0)


def lokr(factored1: bool, factored2: bool, core: bool = False) -> Callable[..., Layer]:
    """A maker of LoKr layers whose matrices are whole or factored; c is alpha by the rank of the last factored one."""

    def make(weight: torch.Tensor, dice: torch.Generator) -> Layer:
        rows, columns, *kernel = weight.shape
        kernel = (kernel or [1, 1]) if core else kernel
        parts, (rank1, rank2) = alpha(3.0), (2, 5)
        if factored1:
            parts |= {"lokr_w1_a": draw(dice, 4, rank1), "lokr_w1_b": draw(dice, rank1, 2)}
            w1 = parts["lokr_w1_a"].double() @ parts["lokr_w1_b"].double()
        else:
            parts |= {"lokr_w1": draw(dice, 4, 2)}
            w1 = parts["lokr_w1"].double()
        if core:
            parts |= {"lokr_w2_a": draw(dice, rank2, rows // 4), "lokr_w2_b": draw(dice, rank2, columns // 2)}
            parts |= {"lokr_t2": draw(dice, rank2, rank2, *kernel)}
            w2 = rebuilt(parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"])
        elif factored2:
            size = int(torch.tensor([columns // 2, *kernel]).prod())
            parts |= {"lokr_w2_a": draw(dice, rows // 4, rank2), "lokr_w2_b": draw(dice, rank2, size)}
            w2 = parts["lokr_w2_a"].double() @ parts["lokr_w2_b"].double()
        else:
            parts |= {"lokr_w2": draw(dice, rows // 4, columns // 2, *kernel)}
            w2 = parts["lokr_w2"].double()
        rank = rank2 if factored2 or core else rank1 if factored1 else 3.0  # both whole: alpha counts for nothing
        return parts, add(weight, kronecker(w1, w2) * 3.0 / rank)

    return make


def full(weight: torch.Tensor, dice: torch.Generator) -> Layer:
    """The difference itself; an alpha beside it counts for nothing."""
    change = draw(dice, *weight.shape)
    return {"diff": change} | alpha(1.0), add(weight, change.double())


def dora(inner: Callable[..., Layer], by_column: bool = False) -> Callable[..., Layer]:
    """A maker of DoRA layers around another kind: dora_scale is (rows, 1, …) or (1, columns, …)."""

    def make(weight: torch.Tensor, dice: torch.Generator) -> Layer:
        parts, inner_weight = inner(weight, dice)
        shape = [1 for _ in weight.shape]
        shape[by_column] = weight.shape[by_column]
        magnitude = draw(dice, *shape).abs() * 3
        new = turned(weight, inner_weight(1.0), magnitude.flatten(), by_column)
        return parts | {"dora_scale": magnitude}, new

    return make


def turned(weight: torch.Tensor, v: torch.Tensor, magnitude: torch.Tensor, by_column: bool) -> Callable[..., Any]:
    """s -> W + s · (m · V / ‖V‖ − W), one row or column after the other."""
    made = v.clone()
    for index, length in enumerate(magnitude.double()):
        part = made[:, index] if by_column else made[index]
        part *= length / part.square().sum().sqrt()
    return add(weight, made - weight.double())


def peft_dora(weight: torch.Tensor, dice: torch.Generator) -> Layer:
    """PEFT's: lora_magnitude_vector by row, (rows,), of a convolution (1, rows, 1, 1)."""
    parts, inner_weight = lora(weight, dice)
    magnitude = draw(dice, len(weight)).abs() * 3
    vector = magnitude if weight.ndim == 2 else magnitude.view(1, -1, 1, 1)
    return parts | {"lora_magnitude_vector": vector}, turned(weight, inner_weight(1.0), magnitude, False)


KINDS: dict[str, Callable[[torch.Tensor, torch.Generator], Layer]] = {
    "LoRA, LoCon": lora,
    "without alpha": lora_without_alpha,
    "Tucker": tucker,
    "LoHa": loha,
    "LoHa, Tucker": loha_tucker,
    "LoKr, whole": lokr(False, False),
    "LoKr, second factored": lokr(False, True),
    "LoKr, first factored": lokr(True, False),
    "LoKr, both factored": lokr(True, True),
    "LoKr, Tucker": lokr(False, False, core=True),
    "LoKr, Tucker, first factored": lokr(True, False, core=True),
    "full difference": full,
    "DoRA by row": dora(lora),
    "DoRA by column": dora(lora, by_column=True),
    "DoRA of PEFT": peft_dora,
    "DoRA around Tucker": dora(tucker),
    "DoRA around LoHa": dora(loha),
    "DoRA around LoHa, by column": dora(loha_tucker, by_column=True),
    "DoRA around LoKr": dora(lokr(True, True)),
    "DoRA around LoKr, by column": dora(lokr(False, False), by_column=True),
    "DoRA around a difference": dora(full),
}
