"""Ways to bring a long prompt's chunks to the UNet, tried on the model that draws.

    python tests/drawing/blends.py --count 40                    the table: rule x where the words that count stand
    python tests/drawing/blends.py --count 40 --rules "likeness;concat"

A prompt has two or three chunks; the words that say what to draw stand in one of them (or the background in the first
and the object in the second), all else is decoration that the model was trained to ignore. Each cell is the share of
pictures in which background / colour / shape are right. Chunks are cut and encoded by the worker's own code.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import seams  # noqa: E402

import handler  # noqa: E402
from drawing import model, scenes, scoring  # noqa: E402
from drawing.drawing_world import build_drawing_world  # noqa: E402

STEPS, GUIDANCE, BATCH = 10, 4.5, 8

# ---------------------------------------------------------------------------------------------------------------------
# rules: chunk states (n, 77, D), their token counts, pooled vectors (n, P) -> (1, length, D), (1, P)

Rule = Callable[[torch.Tensor, list[int], torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def by_position(chunks: torch.Tensor, counts: list[int], pooled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of the real states at each position: the worker's blend until November 2026."""
    real = torch.arange(77) <= torch.tensor(counts)[:, None]
    real = (real | ~real.any(0))[..., None]
    blended = torch.where(real, chunks, 0).sum(0) / real.sum(0)
    blended[0] = chunks[0, 0]
    return blended[None], pooled.mean(0, keepdim=True)


def likeness(
    share: float = 0.25,
    sizes: bool = True,
    eos: str = "each",
    padding: bool = False,
    every_bos: bool = False,
    columns: slice = slice(None),
    cosine: bool = True,
    pool: str = "mean",
) -> Rule:
    """Merging by likeness, and what it could do otherwise.

    share: of the pairs that are each other's most alike, how many are merged a round. sizes: means weighted by how
    many states each stands for. eos: "each" chunk's takes part; "shared": the mean of all in place of each; "none"; or
    one that stands behind the others and is never merged: the "first" chunk's, the "last" one's, the "mean" of all.
    padding, every_bos: which other states take part beside the tokens' own. columns: what of a state is compared.
    cosine: else the dot product. pool: of the pooled vectors, "mean", "first", "tokens" (a mean weighted by token
    counts) or "last".
    """

    def rule(chunks: torch.Tensor, counts: list[int], pooled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ends = chunks[range(len(chunks)), [count + 1 for count in counts]]
        if eos == "shared":
            chunks = chunks.clone()
            chunks[range(len(chunks)), [count + 1 for count in counts]] = ends.mean(0)
        states = []
        for i, (chunk, count) in enumerate(zip(chunks, counts, strict=True)):
            end = 77 if padding else count + 1 + (eos in ("each", "shared"))
            states.append(chunk[0 if every_bos and i else 1 : end])
        apart = {"first": ends[:1], "last": ends[-1:], "mean": ends.mean(0, keepdim=True)}.get(eos, ends[:0])
        most = 76 - len(apart)
        left = torch.cat(states)
        weight = torch.ones(len(left))
        while len(left) > most:
            compared = left[:, columns]
            alike = torch.nn.functional.normalize(compared) if cosine else compared
            table = (alike @ alike.T).fill_diagonal_(-torch.inf)
            best, partner = table.max(1)
            index = torch.arange(len(left))
            first = index[(partner[partner] == index) & (index < partner)]
            first = first[best[first].argsort(descending=True, stable=True)]
            first = first[: min(max(int(len(first) * share), 1), len(left) - most)]
            second = partner[first]
            a, b = (weight[first], weight[second]) if sizes else (torch.ones(len(first)),) * 2
            left[first] = (left[first] * a[:, None] + left[second] * b[:, None]) / (a + b)[:, None]
            weight[first] += weight[second]
            kept = torch.ones(len(left), dtype=torch.bool).index_fill_(0, second, False)
            left, weight = left[kept], weight[kept]
        spare = torch.cat([chunk[count + 2 :] for chunk, count in zip(chunks, counts, strict=True)])
        embeds = torch.cat([chunks[0, :1], left, apart, spare[: most - len(left)]])[None]
        shares = torch.tensor(counts, dtype=torch.float)[:, None]
        vectors = {
            "mean": pooled.mean(0, keepdim=True),
            "first": pooled[:1],
            "last": pooled[-1:],
            "tokens": (pooled * shares).sum(0, keepdim=True) / shares.sum(),
        }
        return embeds, vectors[pool]

    return rule


def concatenated(pool: str = "first") -> Rule:
    """All chunks behind each other, 77 positions each, as A1111 does."""

    def rule(chunks: torch.Tensor, _counts: list[int], pooled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return chunks.flatten(0, 1)[None], pooled[:1] if pool == "first" else pooled.mean(0, keepdim=True)

    return rule


def workers_own(chunks: torch.Tensor, counts: list[int], pooled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What handler.py does."""
    return seams.blended_chunks(chunks, counts, pooled)


RULES: dict[str, Rule] = {
    "the worker's blend": workers_own,
    "mean by position": by_position,
    "concat": concatenated(),
    "concat, pooled mean": concatenated("mean"),
    "truncate": lambda chunks, _counts, pooled: (chunks[:1], pooled[:1]),
    "likeness": likeness(),
    "likeness, all pairs a round": likeness(share=1.0),
    "likeness, half the pairs": likeness(share=0.5),
    "likeness, one pair a round": likeness(share=0.0),
    "likeness, sizes not weighed": likeness(sizes=False),
    "likeness, no EOS": likeness(eos="none"),
    "likeness, first EOS alone": likeness(eos="first"),
    "likeness, last EOS alone": likeness(eos="last"),
    "likeness, one mean EOS": likeness(eos="mean"),
    "likeness, each EOS the mean": likeness(eos="shared"),
    "likeness, padding too": likeness(padding=True),
    "likeness, each BOS": likeness(every_bos=True),
    "likeness, dot product": likeness(cosine=False),
    "likeness, first encoder's": likeness(columns=slice(0, 64)),
    "likeness, second encoder's": likeness(columns=slice(64, None)),
    "likeness, first pooled": likeness(pool="first"),
    "likeness, pooled by tokens": likeness(pool="tokens"),
}

# ---------------------------------------------------------------------------------------------------------------------
# prompts

PLACES = ("1 of 2", "2 of 2", "3 of 3", "background 1, object 2", "the same, short")
"""Which chunk holds the words that count; the short chunks fit into one window together."""


def decoration(rng: random.Random, tokens: int) -> str:
    """Phrases that change nothing, about so many tokens."""
    text = ""
    while len(model.token_ids(text)) < tokens:
        text += scenes.filler(rng, model.random_words()) + ", "
    return text


def long_prompt(rng: random.Random, scene: scenes.Scene, place: str) -> list[str]:
    """The chunks' texts."""
    thing, background = scene.things[0], f"{scene.background or 'white'} background"
    said = f"a {thing.colour} {thing.shape}"
    if place in PLACES[3:]:
        first, second = (60, 30) if place == PLACES[3] else (10, 10)
        return [f"{background}, " + decoration(rng, first), f"{said}, " + decoration(rng, second)]
    which, count = int(place[0]), int(place[-1])
    texts = [decoration(rng, 62 if i < count - 1 else 30) for i in range(count)]
    texts[which - 1] = f"{said} on a {background}, " + decoration(rng, 45)
    return texts


# ---------------------------------------------------------------------------------------------------------------------
# pictures


@torch.inference_mode()
def drawn(pipe: Any, conditions: list[tuple[torch.Tensor, torch.Tensor]], seeds: list[int]) -> list[np.ndarray]:
    """A 256² picture for each condition."""
    embeds, pooled = (torch.cat(part) for part in zip(*conditions, strict=True))
    pictures = pipe(
        prompt_embeds=embeds,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=torch.zeros_like(embeds),
        negative_pooled_prompt_embeds=torch.zeros_like(pooled),
        width=256,
        height=256,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="np",
    ).images
    return list((pictures * 255).round().astype(np.uint8))


def main() -> None:
    """Draw, score, print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--rules", help="names from RULES, with semicolons")
    parser.add_argument("--places", default=";".join(PLACES), help="some of PLACES, with semicolons")
    options = parser.parse_args()
    names = options.rules.split(";") if options.rules else list(RULES)
    places = options.places.split(";")
    torch.set_num_threads(1)
    os.environ |= build_drawing_world(TESTS / ".cache").environ() | {"LORAS": ""}
    pipe = handler.load_pipeline()
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    pipe.set_progress_bar_config(disable=True)
    started = time.monotonic()
    print("| rule | " + " | ".join(places) + " |\n|---|" + "---|" * len(places), flush=True)
    for name in names:
        cells = []
        for place in places:
            rng, scores = random.Random(place), []
            wanted = [scenes.random_scene(rng, 0, 0) for _ in range(options.count)]
            wanted = [
                scenes.Scene((scenes.Thing(s.things[0].colour, s.things[0].shape),), s.background) for s in wanted
            ]
            texts = [long_prompt(rng, scene, place) for scene in wanted]
            for at in range(0, len(wanted), BATCH):
                conditions = []
                for chunks in texts[at : at + BATCH]:
                    states, counts, pooled = seams.encoded_chunks(pipe, chunks)
                    conditions.append(RULES[name](states, counts, pooled))
                pictures = drawn(pipe, conditions, list(range(at, at + len(conditions))))
                scores += [scoring.score(p, s) for p, s in zip(pictures, wanted[at : at + BATCH], strict=True)]
            right = [(s.background, s.things[0].colour, s.things[0].shape) for s in scores]
            cells.append(" / ".join(f"{share:.0%}" for share in np.mean(right, 0)).replace("%", "") + " %")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    print(f"n = {options.count} a cell; {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
