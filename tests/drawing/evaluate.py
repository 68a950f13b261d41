"""How often the worker, with the model that draws, draws what the prompt says.

    python tests/drawing/evaluate.py --count 100 --size 256x256

Scenes and captions are random from a seed, with one object each (--pairs: two) and no decoration; each goes through
handler.handler() as a job of its own. Writes the pictures to --sheet, if it is given, as one large picture.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import random
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

from drawing import scenes, scoring  # noqa: E402
from drawing.drawing_world import OUTLINES, build_drawing_world  # noqa: E402


def drawn(prompt: str, width: int, height: int, seed: int, outlines: bool) -> np.ndarray:
    """What the worker answers to a prompt, (height, width, 3) uint8."""
    import handler

    job = {"prompt": prompt, "width": width, "height": height, "seed": seed, "steps": 20, "guidance_scale": 4.5}
    job["loras"] = [{"name": OUTLINES}] if outlines else []
    answer = handler.handler({"id": f"picture-{seed}", "input": job})
    if "error" in answer:
        raise RuntimeError(answer["error"])
    image = answer["images"][0]
    data = image if isinstance(image, str) else image["image"]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data.split(",")[-1]))).convert("RGB"))


def sheet(pictures: list[np.ndarray], columns: int = 10) -> Image.Image:
    """All pictures in rows."""
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    rows[-1] = rows[-1] + [np.zeros_like(pictures[0])] * (columns - len(rows[-1]))
    return Image.fromarray(np.concatenate([np.concatenate(row, 1) for row in rows]))


def main() -> None:
    """Draw, score, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--size", default="256x256", help="width x height")
    parser.add_argument("--pairs", action="store_true", help="two objects")
    parser.add_argument("--outlines", action="store_true", help="with the LoRA; the shapes' scores then mean nothing")
    parser.add_argument("--sheet", type=Path)
    options = parser.parse_args()
    width, height = map(int, options.size.split("x"))
    os.environ |= build_drawing_world(TESTS / ".cache").environ()
    rng = random.Random(options.size)
    wanted = [scenes.random_scene(rng, pair_share=float(options.pairs), night_share=0) for _ in range(options.count)]
    started, pictures, scores = time.monotonic(), [], []
    for seed, scene in enumerate(wanted):
        pictures.append(drawn(scenes.caption(rng, scene, []), width, height, seed, options.outlines))
        scores.append(scoring.score(pictures[-1], scene))
    print(f"{options.size}, {time.monotonic() - started:.0f} s: {scoring.summary(scores)}")
    by_shape = defaultdict(list)
    for scene, found in zip(wanted, scores, strict=True):
        for thing, right in zip(scene.things, found.things, strict=True):
            by_shape[thing.shape].append(right.shape)
    print("shapes:", ", ".join(f"{shape} {np.mean(by_shape[shape]):.0%}" for shape in scenes.SHAPES if by_shape[shape]))
    if options.sheet:
        sheet(pictures).save(options.sheet)


if __name__ == "__main__":
    main()
