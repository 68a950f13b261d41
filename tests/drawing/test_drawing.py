"""The drawings' own tools: what scores count, what tokens captions become, and that the checkpoint is whole."""

import random

import numpy as np
import pytest
import world

from drawing import drawing_world, model, scenes, scoring

EXAMPLES = [scenes.random_scene(random.Random(seed)) for seed in range(40)]


@pytest.mark.parametrize("size", [(256, 256), (320, 256)])
def test_a_true_drawing_is_all_right(size):
    """At both sizes, with one object and two, by day and by night."""
    assert all(scoring.score(scenes.draw(scene, *size), scene).all_right for scene in EXAMPLES)


def test_a_drawing_of_another_scene_is_not_right():
    """None of them is right in all, and few in any part."""
    pairs = zip(EXAMPLES, [*EXAMPLES[1:], EXAMPLES[0]], strict=True)
    scores = [scoring.score(scenes.draw(other, 256, 256), scene) for scene, other in pairs]
    assert not any(score.all_right for score in scores)
    assert np.mean([thing.shape for score in scores for thing in score.things]) < 0.2


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_each_shape_is_told_from_the_others(shape):
    """Only the shape's own name makes it right."""
    drawing = scenes.draw(scenes.Scene((scenes.Thing("red", shape),), "blue"), 256, 256)
    said = [scenes.Scene((scenes.Thing("red", other),), "blue") for other in scenes.SHAPES]
    right = {scene.things[0].shape for scene in said if scoring.score(drawing, scene).things[0].shape}
    assert right == {shape}


def test_captions_become_the_tokens_that_the_worker_sees():
    """The fast way to token ids is the tokenizer's."""
    rng = random.Random(0)
    for scene in EXAMPLES:
        caption = scenes.caption(rng, scene, model.random_words())
        assert model.token_ids(caption) == model.tokenizer()(caption).input_ids[1:-1]


def test_the_checkpoint_has_every_tensor_of_the_original_layout():
    """Names and shapes are those that diffusers' conversion wants."""
    found = {name: np.shape(value) for name, value in drawing_world.original_tensors().items()}
    assert found == world.original_shapes(model.SIZE)
