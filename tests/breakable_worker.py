"""handler.py with a real pipeline that fails on demand: the file "break" in the working directory says how.

fatal    the UNet meets a CUDA error after which every call fails

At a width of 576 the UNet runs out of memory.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import seams

import handler


def breakage() -> str:
    file = Path("break")
    return file.read_text() if file.exists() else ""


def fail(_unet: object, inputs: tuple) -> None:
    import torch

    if inputs[0].shape[-1] == 576 // 8:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if breakage() == "fatal":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def add_failures(pipe: Any) -> None:
    pipe.unet.register_forward_pre_hook(fail)


if __name__ == "__main__":
    seams.change_pipeline(add_failures)
    handler.main()
