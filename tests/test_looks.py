"""Pictures that are looked at: the worker draws with the model that draws (tests/drawing), and a scorer says what is on
them. Seeds are fixed; thresholds leave room for kernels that round differently."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import seams
from drawing import blends, scenes, scoring
from drawing.drawing_world import OUTLINES, build_drawing_world
from PIL import Image

import handler

CACHE = seams.TESTS / ".cache"
JOB = {"width": 256, "height": 256, "steps": 10, "guidance_scale": 4.5, "loras": []}


@pytest.fixture(scope="module", autouse=True)
def drawing() -> Iterator[None]:
    """The model that draws serves the jobs of this file."""
    before = seams.serve(None)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in build_drawing_world(CACHE).environ().items():
            patch.setenv(name, value)
        yield
    seams.serve(before)


def draw(prompt: str, **fields: Any) -> list[np.ndarray]:
    """The pictures of a job, each (h, w, 3) uint8."""
    answer = handler.handler({"id": "looks", "input": {**JOB, "prompt": prompt, **fields}})
    assert "error" not in answer, answer
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(image)))) for image in answer["images"]]


def scene(colour: str, shape: str, background: str, place: str = "center") -> scenes.Scene:
    """One object on a background."""
    return scenes.Scene((scenes.Thing(colour, shape, place),), background)


def shares(pictures: list[np.ndarray], wanted: list[scenes.Scene]) -> dict[str, float]:
    """Of the pictures, how many have the right background, colour, shape and place."""
    scores = [scoring.score(picture, scene) for picture, scene in zip(pictures, wanted, strict=True)]
    things = [score.things[0] for score in scores]
    found = {part: np.mean([getattr(thing, part) for thing in things]) for part in ("colour", "shape", "place")}
    return found | {"background": np.mean([score.background for score in scores])}


def share_of(picture: np.ndarray, colour: str) -> float:
    """How much of a picture is of a colour."""
    return float((scoring.colour_map(picture, night=False) == list(scenes.COLOURS).index(colour)).mean())


def random_scenes(count: int, seed: int) -> list[scenes.Scene]:
    """Scenes with one object in the middle, by day."""
    rng = random.Random(seed)
    found = [scenes.random_scene(rng, 0, 0) for _ in range(count)]
    return [scene(s.things[0].colour, s.things[0].shape, s.background or "white") for s in found]


@pytest.mark.parametrize(("size", "count"), [((256, 256), 8), ((320, 256), 4)])
def test_short_prompts(size, count):
    """A short prompt's picture shows what it says: background, colour, shape and place."""
    wanted = random_scenes(count, seed=sum(size))
    said = [f"a {s.things[0].colour} {s.things[0].shape} on a {s.background} background" for s in wanted]
    pictures = [draw(text, width=size[0], height=size[1], seed=i)[0] for i, text in enumerate(said)]
    found = shares(pictures, wanted)
    assert found["background"] >= 0.85 and found["colour"] >= 0.85 and found["shape"] >= 0.6, found


def long_pictures(place: str, mode: str, count: int = 5) -> dict[str, float]:
    """Shares of what is right where the words that count stand in one of several chunks."""
    rng, wanted = random.Random(place), random_scenes(count, seed=11)
    texts = [" BREAK ".join(blends.long_prompt(rng, s, place)) for s in wanted]
    return shares([draw(text, long_prompt=mode, seed=i)[0] for i, text in enumerate(texts)], wanted)


@pytest.mark.parametrize("place", blends.PLACES)
def test_words_of_any_chunk_are_drawn(place):
    """Blended, the words of the first chunk, of the second and of the third of three are seen, and where one chunk
    names the background and the other the object, both are."""
    found = long_pictures(place, "blend")
    assert found["colour"] >= 0.8 and found["background"] >= 0.8, found


def test_words_behind_the_first_chunk_are_lost_where_it_is_truncated():
    """Truncated, what stands behind 75 tokens is not seen: so the pictures above come of the blend."""
    rng, wanted = random.Random(0), random_scenes(4, seed=11)
    things = [f"a {s.things[0].colour} {s.things[0].shape} on a {s.background} background" for s in wanted]
    texts = [blends.decoration(rng, 80) + thing for thing in things]
    found = shares([draw(text, long_prompt="truncate", seed=i)[0] for i, text in enumerate(texts)], wanted)
    assert found["shape"] <= 0.25 and found["background"] <= 0.5, found


def test_concatenated_prompts_show_their_objects():
    """Concatenated, the object of the second chunk is seen."""
    assert long_pictures("2 of 2", "concat")["colour"] >= 0.8


def test_negative_prompt():
    """A negative prompt takes its colour away: of a circle that is red and green, red is left."""
    said = "a red and green circle on a white background"
    plain = [share_of(draw(said, seed=seed)[0], "green") for seed in range(3)]
    without = [share_of(draw(said, negative_prompt="a green circle", seed=seed)[0], "green") for seed in range(3)]
    assert np.mean(plain) > 0.04 and np.mean(without) < 0.01, (plain, without)


def test_weights():
    """A weight of zero takes a word's colour away."""
    said = "a red circle on a {} background"
    plain = [share_of(draw(said.format("green"), seed=seed)[0], "green") for seed in range(3)]
    weighed = [share_of(draw(said.format("(green:0)"), seed=seed)[0], "green") for seed in range(3)]
    assert min(plain) > 0.5 and np.mean(weighed) < np.mean(plain) / 2, (plain, weighed)


def test_lora_at_several_scales():
    """The LoRA draws outlines at 1, and what it draws grows with its scale; the same seed without it is filled."""
    said, filled = "a black square on a yellow background", {}
    for scale in (-1, 0, 1):
        pictures = [draw(said, loras=[{"name": OUTLINES, "scale": scale}], seed=seed)[0] for seed in range(3)]
        filled[scale] = np.mean([share_of(picture, "black") for picture in pictures])
    assert filled[1] < 0.75 * filled[0] and filled[-1] > filled[1], filled


def test_a_jobs_stack_is_its_own():
    """A job's own stack is seen in its picture, and nothing of it in the next job's."""
    said = "a blue heart on a white background"
    first, outlined, again = (draw(said, loras=stack, seed=3)[0] for stack in ([], None, []))
    assert np.array_equal(first, again)
    assert share_of(outlined, "blue") < 0.75 * share_of(first, "blue")


def test_seeds_of_a_batch():
    """Image i of a batch is what its seed draws alone."""
    together = draw("a purple star on a white background", num_images=2, seed=40)
    for i, picture in enumerate(together):
        (alone,) = draw("a purple star on a white background", seed=40 + i)
        assert np.abs(picture.astype(int) - alone).mean() < 1
    assert np.abs(together[0].astype(int) - together[1]).mean() > 1
