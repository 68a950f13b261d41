"""How fast, and how large, the worker's image files are at 1024x1024, beside Pillow's defaults.

    python tests/benchmarks/png.py [--size 1024] [--rounds 11]

The pictures are soft shapes under a little grain, as a VAE gives them: more grain, less to compress. Medians; the
encodings take turns, so that a busy machine slows all of them. Ends with 1 where PNG takes over half of Pillow's time.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
import seams  # noqa: E402


def picture(size: int, grain: float, seed: int = 0) -> Image.Image:
    """Eight octaves of soft shapes with Gaussian grain."""
    draw = np.random.default_rng(seed)
    pixels = draw.normal(128, grain, (size, size, 3))
    for octave in range(1, 9):
        for channel in range(3):
            shapes = Image.fromarray(draw.standard_normal((2**octave, 2**octave)).astype(np.float32))
            pixels[..., channel] += np.asarray(shapes.resize((size, size), Image.BICUBIC)) * 60 / octave**1.5
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def saved(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def ours(image: Image.Image, image_format: str, **options: object) -> bytes:
    return seams.encode_images([image], [""], image_format, **options)[0]


def measure(encodings: dict[str, Callable[[], bytes]], rounds: int) -> dict[str, tuple[float, int]]:
    """Median seconds and bytes of each."""
    times: dict[str, list[float]] = {name: [] for name in encodings}
    sizes = {}
    for _ in range(rounds):
        for name, encode in encodings.items():
            started = time.perf_counter()
            sizes[name] = len(encode())
            times[name].append(time.perf_counter() - started)
    return {name: (statistics.median(times[name]), sizes[name]) for name in encodings}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    worst = 0.0
    for grain in (0, 1, 2, 4):
        image = picture(options.size, grain)
        found = measure(
            {
                "PNG, Pillow's default": lambda image=image: saved(image, format="PNG"),
                "PNG, compress_level 1": lambda image=image: saved(image, format="PNG", compress_level=1),
                "PNG, ours": lambda image=image: ours(image, "png"),
                "lossless WebP, ours": lambda image=image: ours(image, "webp", **seams.LOSSLESS_WEBP),
                "JPEG, ours": lambda image=image: ours(image, "jpeg"),
                "WebP, ours": lambda image=image: ours(image, "webp"),
            },
            options.rounds,
        )
        seconds, size = found["PNG, Pillow's default"]
        worst = max(worst, found["PNG, ours"][0] / seconds)
        print(f"{options.size}x{options.size}, grain {grain}")
        for name, (s, n) in found.items():
            print(f"  {name:24s}{s * 1000:7.0f} ms{s / seconds:7.2f}{n / 1e6:8.2f} MB{n / size:7.2f}")
    print(f"PNG takes at most {worst:.2f} of Pillow's default time")
    sys.exit(worst > 0.5)


if __name__ == "__main__":
    main()
