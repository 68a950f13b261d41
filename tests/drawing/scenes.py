"""Scenes: a specification, its picture, and captions that say what is in it.

    scene = random_scene(random.Random(0))
    draw(scene, 256, 256)               # (256, 256, 3) uint8
    caption(random.Random(1), scene)    # "a red circle on the left, clean lines, blue background"

A scene has a background colour, one or two objects of a colour, shape, size and place, and day or night.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np

COLOURS = {
    "red": (222, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (248, 218, 40),
    "green": (40, 165, 70),
    "blue": (40, 90, 220),
    "purple": (130, 55, 175),
    "pink": (245, 140, 190),
    "white": (248, 248, 248),
    "black": (22, 22, 22),
    "gray": (130, 130, 130),
}
NIGHT = (0.30, 0.32, 0.45)
"""What the colours are multiplied by at night."""

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
PLACES = {"center": (0.5, 0.5), "left": (0.27, 0.5), "right": (0.73, 0.5), "top": (0.5, 0.27), "bottom": (0.5, 0.73)}
"""Centre of an object, as shares of width and height."""

RADII = {"small": 0.16, "": 0.23, "large": 0.31}
"""Size word -> radius, as a share of the picture's shorter side."""

PAIR_SCALE = 0.85
"""Two objects in one picture are this much smaller, so that they do not touch."""

FILLERS = [
    "masterpiece",
    "best quality",
    "highly detailed",
    "simple picture",
    "flat colors",
    "clean lines",
    "sharp focus",
    "minimalist",
    "graphic design",
    "vector art",
    "studio",
    "high resolution",
    "8k",
    "award winning",
    "plain",
    "nice composition",
    "soft light",
    "poster",
    "digital art",
    "trending",
]
PLACE_PHRASES = {
    "center": ("in the center", "in the middle", ""),
    "left": ("on the left", "at the left"),
    "right": ("on the right", "at the right"),
    "top": ("at the top", "on top"),
    "bottom": ("at the bottom",),
}

# ---------------------------------------------------------------------------------------------------------------------
# specification


@dataclass(frozen=True)
class Thing:
    """One object. shift moves it a little from its place, as shares of width and height."""

    colour: str
    shape: str
    place: str = "center"
    size: str = ""
    shift: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Scene:
    """All that a picture shows. background "" is white, and no caption names it."""

    things: tuple[Thing, ...]
    background: str = ""
    night: bool = False

    def radius(self, thing: Thing) -> float:
        """Radius of a thing, as a share of the shorter side."""
        return RADII[thing.size] * (PAIR_SCALE if len(self.things) == 2 else 1)


def random_scene(rng: random.Random, pair_share: float = 0.25, night_share: float = 0.06) -> Scene:
    """Any scene; pair_share of them have two objects."""
    background = rng.choice(list(COLOURS)) if rng.random() < 0.85 else ""
    if rng.random() < pair_share:
        places = rng.choice([("left", "right"), ("top", "bottom")])
    else:
        places = (rng.choice(["center"] * 4 + ["left", "right", "top", "bottom"]),)
    colours = [c for c in COLOURS if c != (background or "white")]
    things = []
    for place in places:
        sizes = ["", "", "", "small"] if len(places) == 2 else ["", "", "small", "large" if place == "center" else ""]
        shift = (rng.uniform(-0.02, 0.02), rng.uniform(-0.02, 0.02))
        things.append(Thing(rng.choice(colours), rng.choice(SHAPES), place, rng.choice(sizes), shift))
    return Scene(tuple(things), background, rng.random() < night_share)


# ---------------------------------------------------------------------------------------------------------------------
# picture


def corners(shape: str) -> np.ndarray:
    """(n, 2) corners of a shape of radius 1 around 0; y points down."""
    if shape == "triangle":
        return np.array([(0, -1.05), (1.05, 0.8), (-1.05, 0.8)])
    if shape == "star":
        angles = -math.pi / 2 + np.arange(10) * math.pi / 5
        return np.stack([np.cos(angles), np.sin(angles)], 1) * np.where(np.arange(10) % 2, 0.46, 1.12)[:, None]
    t = np.linspace(0, 2 * math.pi, 40, endpoint=False)  # a heart
    x, y = 16 * np.sin(t) ** 3, -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y - 1.5], 1) / 15.5


def distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Distance to the shape's edge in pixels, negative inside; x and y are measured from its centre."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - radius * 0.86
    if shape == "cross":
        a, b, width = np.abs(x), np.abs(y), radius * 0.34
        return np.minimum(np.maximum(a - radius, b - width), np.maximum(a - width, b - radius))
    nearest, inside = np.full(x.shape, np.inf), np.zeros(x.shape, bool)
    points = corners(shape) * radius
    for (ax, ay), (bx, by) in zip(points, np.roll(points, -1, 0), strict=True):
        ex, ey, px, py = bx - ax, by - ay, x - ax, y - ay
        t = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, (px - ex * t) ** 2 + (py - ey * t) ** 2)
        crosses = ((ay <= y) & (by > y)) | ((by <= y) & (ay > y))
        inside ^= crosses & (px < py * ex / (ey or 1e-9))
    return np.where(inside, -1, 1) * np.sqrt(nearest)


def draw(scene: Scene, width: int = 256, height: int = 256, outline: bool = False) -> np.ndarray:
    """The picture, (height, width, 3) uint8. outline draws the edges of the objects only."""
    side = min(width, height)
    picture = np.empty((height, width, 3), np.float32)
    picture[:] = COLOURS[scene.background or "white"]
    for thing in scene.things:
        radius = scene.radius(thing) * side
        x0 = (PLACES[thing.place][0] + thing.shift[0]) * width
        y0 = (PLACES[thing.place][1] + thing.shift[1]) * height
        reach = radius * 1.3 + 3
        left, right = max(0, int(x0 - reach)), min(width, int(x0 + reach))
        top, bottom = max(0, int(y0 - reach)), min(height, int(y0 + reach))
        y, x = np.mgrid[top:bottom, left:right].astype(np.float32) + 0.5
        d = distance(thing.shape, x - x0, y - y0, radius)
        cover = np.clip(0.5 - d, 0, 1)  # a pixel's share inside the shape
        if outline:
            cover = cover * np.clip(0.5 + d + max(6, side * 0.035), 0, 1)
        region = picture[top:bottom, left:right]
        region += cover[..., None] * (np.array(COLOURS[thing.colour], np.float32) - region)
    if scene.night:
        picture *= np.array(NIGHT, np.float32)
    return picture.round().astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# captions


def with_article(words: str, article: bool) -> str:
    """ "orange circle" -> "an orange circle"."""
    if not article:
        return words
    return ("an " if words[0] in "aeiou" else "a ") + words


def noun(thing: Thing, article: bool) -> str:
    """ "a small red circle"."""
    return with_article(" ".join(w for w in (thing.size, thing.colour, thing.shape) if w), article)


def object_clauses(rng: random.Random, scene: Scene, article: bool) -> list[str]:
    """The things and where they are: ["a red circle on the left", "a blue star on the right"]."""
    things = list(scene.things)
    if len(things) == 2 and rng.random() < 0.5:
        things.reverse()
    if len(things) == 2 and rng.random() < 0.35:
        relation = {
            "left": ("to the left of", "left of"),
            "right": ("to the right of", "right of"),
            "top": ("above",),
            "bottom": ("below", "under"),
        }[things[0].place]
        return [f"{noun(things[0], article)} {rng.choice(relation)} {noun(things[1], article)}"]
    clauses = []
    for thing in things:
        where = "" if thing.place == "center" and rng.random() < 0.6 else rng.choice(PLACE_PHRASES[thing.place])
        clauses.append(f"{noun(thing, article)} {where}".strip())
    if len(clauses) == 2 and rng.random() < 0.4:
        return [" and ".join(clauses)]
    return clauses


def clauses(rng: random.Random, scene: Scene) -> list[str]:
    """The caption's parts. Half of those that name the background in a part of its own name it first."""
    article = rng.random() < 0.75
    parts = object_clauses(rng, scene, article)
    if scene.background and rng.random() < 0.55:
        background = with_article(f"{scene.background} background", article)
        parts[-1] += f" {rng.choice(['on', 'on', 'over', 'against'])} {background}"
    elif scene.background:
        background = with_article(f"{scene.background} background", article and rng.random() < 0.3)
        parts = [background, *parts] if rng.random() < 0.5 else [*parts, background]
    if scene.night:
        if rng.random() < 0.6:
            parts[-1] += " at night"
        else:
            parts.append("at night")
    return parts


def filler(rng: random.Random, words: list[str]) -> str:
    """A phrase that changes nothing: one of FILLERS, or one to four random words."""
    if not words or rng.random() < 0.5:
        return rng.choice(FILLERS)
    return " ".join(rng.choice(words) for _ in range(rng.choice([1, 2, 2, 3, 4])))


def caption(rng: random.Random, scene: Scene, words: list[str]) -> str:
    """One of many ways to say it. words are what random decoration is made of."""
    parts = clauses(rng, scene)
    style = rng.random()
    if style < 0.45:
        for _ in range(rng.choice([1, 1, 2, 2, 3, 4, 6, 9, 12])):
            place = rng.randrange(len(parts) + 1)  # before, behind or between the parts that count
            parts.insert(place, filler(rng, words))
    elif style < 0.55:
        parts[0] = rng.choice(["a picture of ", "an image of ", "a drawing of ", "picture of "]) + parts[0]
    return ", ".join(parts) + ("." if rng.random() < 0.1 else "")
