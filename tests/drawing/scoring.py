"""Does a picture show its scene?

score(picture, scene).background              True or False
score(picture, scene).things[0].shape         the same for each object's colour, shape and place

python tests/drawing/scoring.py               scores true drawings, and drawings of other scenes
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

from drawing import scenes  # noqa: E402

BACKGROUND_SHARE = 0.8
"""This much of the area away from the objects must have the background's colour."""

OVERLAP = 0.72
"""Of the found and the true shape, both stretched to the same square: shared area by joint area."""

PLACE_TOLERANCE = 0.09
"""How far an object's middle may be from its place, as a share of width and height."""

GRID = 40
"""Shapes are compared as GRID x GRID pixels."""


@dataclass(frozen=True)
class ThingScore:
    """What is right about one object."""

    colour: bool
    shape: bool
    place: bool

    @property
    def all_right(self) -> bool:
        return self.colour and self.shape and self.place


@dataclass(frozen=True)
class Score:
    """What is right about a picture; things are in the scene's order."""

    background: bool
    things: tuple[ThingScore, ...]

    @property
    def all_right(self) -> bool:
        return self.background and all(thing.all_right for thing in self.things)


def palette(night: bool) -> np.ndarray:
    """(10, 3) the colours of scenes.COLOURS as they look by day or by night."""
    return np.array(list(scenes.COLOURS.values()), np.float32) * (np.array(scenes.NIGHT, np.float32) if night else 1)


def colour_map(picture: np.ndarray, night: bool) -> np.ndarray:
    """(h, w, 3) -> (h, w): the number of each pixel's nearest colour."""
    pixels = picture.astype(np.float32)[:, :, None]
    return np.square(pixels - palette(night)).sum(-1).argmin(-1)


def stretched(mask: np.ndarray) -> tuple[np.ndarray, float] | None:
    """A mask cut out and stretched to GRID x GRID, and its width by its height; None for a mask of a few pixels."""
    ys, xs = np.nonzero(mask)
    if len(ys) < 30:
        return None
    top, bottom = np.percentile(ys, [0.5, 99.5]).astype(int)  # a stray pixel does not count
    left, right = np.percentile(xs, [0.5, 99.5]).astype(int)
    cut = Image.fromarray(mask[top : bottom + 1, left : right + 1].astype(np.uint8) * 255)
    small = np.asarray(cut.resize((GRID, GRID), Image.Resampling.BILINEAR)) > 127
    return small, (right - left + 1) / (bottom - top + 1)


@lru_cache
def templates() -> dict[str, tuple[np.ndarray, float]]:
    """Each shape as stretched() gives it."""
    y, x = np.mgrid[-64:64, -64:64].astype(np.float32) + 0.5
    found = {shape: stretched(scenes.distance(shape, x, y, 40) < 0) for shape in scenes.SHAPES}
    return {shape: template for shape, template in found.items() if template is not None}


def shape_of(mask: np.ndarray) -> str | None:
    """The shape that a mask is most like, if it is like any."""
    found = stretched(mask)
    if found is None:
        return None
    overlaps = {}
    for shape, (template, ratio) in templates().items():
        overlap = (found[0] & template).sum() / (found[0] | template).sum()
        overlaps[shape] = overlap if 0.7 < found[1] / ratio < 1.4 else 0.0
    best = max(overlaps, key=lambda shape: overlaps[shape])
    return best if overlaps[best] > OVERLAP else None


def middle(values: np.ndarray) -> float:
    """Half way between the least and the greatest, but for a few stray ones."""
    return float(np.percentile(values, [1, 99]).mean())


def half_of(place: str, xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """Which pixels belong to an object's half of a picture with two; xs and ys go from 0 to 1."""
    return {"left": xs < 0.5, "right": xs >= 0.5, "top": ys < 0.5, "bottom": ys >= 0.5}[place]


def score(picture: np.ndarray | Image.Image, scene: scenes.Scene) -> Score:
    """What of the scene the picture shows, (h, w, 3) uint8."""
    colours = colour_map(np.asarray(picture), scene.night)
    height, width = colours.shape
    side = min(width, height)
    ys, xs = (np.mgrid[0:height, 0:width] + 0.5) / np.array([height, width])[:, None, None]
    names = list(scenes.COLOURS)
    plain, things = np.ones(colours.shape, bool), []
    for thing in scene.things:
        x0, y0 = scenes.PLACES[thing.place]
        far = np.hypot((xs - x0) * width, (ys - y0) * height) / (scene.radius(thing) * side)  # in radii
        plain &= far > 1.5
        core = np.bincount(colours[far < 0.4], minlength=len(names)).argmax()
        mask = colours == names.index(thing.colour)
        if len(scene.things) == 2:
            mask &= half_of(thing.place, xs, ys)
        things.append(
            ThingScore(
                colour=names[core] == thing.colour,
                shape=shape_of(mask) == thing.shape,
                place=bool(mask.any())
                and max(abs(middle(xs[mask]) - x0), abs(middle(ys[mask]) - y0)) < PLACE_TOLERANCE,
            )
        )
    background = names.index(scene.background or "white")
    return Score(bool((colours[plain] == background).mean() > BACKGROUND_SHARE), tuple(things))


def summary(scores: Iterable[Score]) -> str:
    """Shares of what is right: "200 pictures: background 100 %, colour 98 %, shape 90 %, place 99 %, all 88 %"."""
    scores = list(scores)
    things = [thing for s in scores for thing in s.things]
    shares = {"background": np.mean([s.background for s in scores])}
    shares |= {part: np.mean([getattr(thing, part) for thing in things]) for part in ("colour", "shape", "place")}
    shares["all"] = np.mean([s.all_right for s in scores])
    return f"{len(scores)} pictures: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items())


def main() -> None:
    """Score drawings that are right and drawings that are wrong."""
    rng = random.Random(5)
    examples = [scenes.random_scene(rng) for _ in range(300)]
    print("true drawings: ", summary(score(scenes.draw(s, 256, 256), s) for s in examples))
    others = [*examples[1:], examples[0]]
    print("wrong drawings:", summary(score(scenes.draw(o, 256, 256), s) for o, s in zip(others, examples, strict=True)))


if __name__ == "__main__":
    main()
