"""What full-size SDXL in float16 takes on a GPU, counted on a pretended one (fakecuda.py), not measured.

    python tests/memory.py [--quick]

Prints a table of the memory above the weights: live tensors alone, without the roughly 1 GiB of CUDA's context, its
workspaces and fragmentation. --quick leaves out the parts that run in many tiles. Takes some minutes on one core and
1 GB of memory.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
JOBS: list[tuple[str, dict[str, Any]]] = [
    *((f"{side}² x {n}", {"width": side, "height": side, "num_images": n}) for side, n in [(1024, 1), (1024, 4)]),
    *((f"{side}² x {n}", {"width": side, "height": side, "num_images": n}) for side, n in [(1536, 4), (2048, 4)]),
    ("hires 1024² to 2048²", {"hires": {"scale": 2, "steps": 1}}),
    ("1024² x 1, concat", {"prompt": "a red fox in the snow, " * 400, "long_prompt": "concat"}),
]


def main() -> None:
    """Builds the pipeline on the pretended device and prints row after row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()

    import seams
    import torch
    from fakecuda import GIB, full_size_pipeline, load_guard, pretended
    from world import PREFIXES, build_world, lora_targets

    import handler

    torch.set_num_threads(1)
    load_guard()
    os.environ["HF_HUB_OFFLINE"] = "1"
    world = build_world(TESTS / ".cache")
    os.environ |= world.environ()
    print("| counted, not measured | GiB | bytes a pixel |\n|---|---|---|")

    def row(what: str, size: int, pixels: int = 0) -> None:
        print(f"| {what} | {size / GIB:.2f} | {f'{size / pixels:.0f}' if pixels else ''} |", flush=True)

    with pretended(total_gib=200) as gpu, torch.inference_mode():
        pipe = full_size_pipeline(world.config, "cuda")
        row("weights of the UNet, both text encoders and the VAE", gpu.used)
        targets = lora_targets("full", PREFIXES, "linear")
        row(f"originals of the {len(targets)} tensors of LoRAs", sum(2 * math.prod(target.shape) for target in targets))

        def peak_of(run: Callable[[], Any]) -> int:
            gpu.reset()
            before = gpu.used
            run()
            return gpu.peak - before

        def tensor(*shape: int, dtype: Any = torch.float16) -> Any:
            return torch.empty(shape, dtype=dtype, device="cuda")

        for side, rows, chunks in UNET:
            text = {"text_embeds": tensor(rows, 1280), "time_ids": tensor(rows, 6)}
            call = (tensor(rows, 4, side // 8, side // 8), tensor(1), tensor(rows, 77 * chunks, 2048))
            size = peak_of(lambda call=call, text=text: pipe.unet(*call, added_cond_kwargs=text))
            row(f"UNet, {side}² x {rows}, text {77 * chunks}", size, side**2 * rows)
        for dtype in (torch.float16, torch.float32):
            pipe.vae.to(dtype)
            for side, tiled in VAE:
                if options.quick and tiled and side > 1024:
                    continue
                pipe.vae.enable_tiling(tiled)
                how = f"{'tiled' if tiled else 'whole'}, {str(dtype).removeprefix('torch.')}, {side}²"
                latents, pixels = tensor(1, 4, side // 8, side // 8, dtype=dtype), tensor(1, 3, side, side, dtype=dtype)
                row(f"decoding {how}", peak_of(lambda latents=latents: pipe.vae.decode(latents)), side**2)
                row(f"encoding {how}", peak_of(lambda pixels=pixels: pipe.vae.encode(pixels)), side**2)
        pipe.vae.to(torch.float16)
        seams.serve(seams.engine_around(pipe, {}))
        for what, fields in JOBS:
            gpu.reset()
            answer = handler.handler({"id": "memory", "input": {"prompt": "a cat", "steps": 1, "loras": [], **fields}})
            assert "error" not in answer, answer
            *_, denoise, decode = gpu.peaks  # of the phases of a job
            row(f"job {what}: denoising", denoise - gpu.used)
            row(f"job {what}: decoding", decode - gpu.used)


UNET = [(1024, 1, 1), (1024, 2, 1), (1024, 8, 1), (2048, 2, 1), (2048, 8, 1), (4096, 8, 1), (1024, 2, 34)]
UNET += [(1024, 8, 34), (512, 2, 1)]  # side, prompts and images in one batch, chunks
VAE = [(1024, False), (2048, False), (1024, True), (2048, True), (4096, True)]  # side, tiled

if __name__ == "__main__":
    main()
