"""What encoding a prompt of 1, 3 and 10 chunks costs, in one batch, against one encode_prompt call a chunk.

    python tests/benchmarks/encode.py                 the tiny world, where the tokenizers are most of it
    python tests/benchmarks/encode.py --size full     SDXL's own text encoders with random weights (3.3 GB in float32)

Prints medians in milliseconds and their ratio, then what chunks cost to blend, and a 10,000-character word to tokenize.
It runs on the GPU where there is one, in float16.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import seams  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from diffusers import StableDiffusionXLPipeline  # noqa: E402
from world import build_world, configs  # noqa: E402

import handler  # noqa: E402


def build_pipe(size: str) -> Any:
    """A pipeline that can encode prompts and nothing else."""
    cuda = torch.cuda.is_available()
    config = build_world(TESTS / ".cache").config
    models = {}
    with torch.device("cuda" if cuda else "cpu"):
        for name, kind in (("text_encoder", "CLIPTextModel"), ("text_encoder_2", "CLIPTextModelWithProjection")):
            model = getattr(transformers, kind)(transformers.CLIPTextConfig(**configs(size)[name]))
            models[name] = model.to(torch.float16 if cuda else torch.float32).eval()
    for name in ("tokenizer", "tokenizer_2"):
        models[name] = transformers.CLIPTokenizer.from_pretrained(config / name)
    return StableDiffusionXLPipeline(vae=None, unet=None, scheduler=None, **models)


def median_ms(run: Callable[[], object], repeats: int) -> float:
    """The median time of a call, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times[1:])


def measure(pipe: Any, chunks: int, repeats: int) -> tuple[float, float, float]:
    """Milliseconds for a prompt and a negative prompt of so many chunks: in one batch, in one encode_prompt call for
    each pair of chunks, and in one batch once more when they were seen before."""
    words = ["house", "tree", "river", "cloud", "stone", "light", "gold", "rain", "night", "street"]
    prompt, negative = ([" ".join(random.choices(words, k=75)) for _ in range(chunks)] for _ in range(2))
    request = seams.parse({"prompt": " ".join(prompt), "negative_prompt": " ".join(negative)})

    def one_batch(encoder: Any = None) -> None:
        conditioning = (encoder or seams.PromptEncoder(pipe)).encode(request, (), {})
        assert (conditioning.prompt.chunks, conditioning.negative.chunks) == (chunks, chunks)

    def one_by_one() -> None:
        encoded = [pipe.encode_prompt(p, negative_prompt=n) for p, n in zip(prompt, negative, strict=True)]
        for side in (0, 1):
            handler.build_77_token_tensor([e[side] for e in encoded], [75] * chunks)

    seen = seams.PromptEncoder(pipe)
    return tuple(median_ms(run, repeats) for run in (one_batch, one_by_one, lambda: one_batch(seen)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "full"), default="tiny")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    pipe = build_pipe(options.size)
    print(f"{options.size} text encoders on {pipe.device}: medians of {options.repeats}, in milliseconds")
    print("chunks each   one batch   encode_prompt a chunk   ratio   seen before")
    with torch.inference_mode():
        for chunks in (1, 3, 10):
            batch, single, seen = measure(pipe, chunks, options.repeats)
            print(f"{chunks:11}   {batch:9.1f}   {single:21.1f}   {batch / single:5.2f}   {seen:11.2f}")
    torch.set_num_threads(1)
    for chunks in (2, 10, 34, 400):  # 34: 10,000 letters; 400: 10,000 Chinese signs
        states = list(torch.randn(chunks, 1, 77, 2048))
        ms = median_ms(lambda states=states: handler.build_77_token_tensor(states), 3)
        print(f"blending {chunks} chunks on one core: {ms:.0f} ms")
    for name, word in {
        "unspaced letters": "".join(random.choices("abcdefgh", k=10_000)),
        "emoji": "🎉😂" * 5_000,
    }.items():
        ms = median_ms(lambda word=word: handler.tokenize_chunks(pipe.tokenizer, word), options.repeats)
        print(f"tokenize_chunks, a word of 10,000 {name}: {ms:.0f} ms")


if __name__ == "__main__":
    random.seed(0)
    main()
