"""handler.py with a real pipeline that fails on demand: the file "break" in the working directory says how.

oom      the UNet runs out of memory
fatal    the UNet meets a CUDA error after which every call fails
slow     the first text encoder takes a second longer
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import handler

load_pipeline = handler.load_pipeline


def breakage() -> str:
    file = Path("break")
    return file.read_text() if file.exists() else ""


def fail(_unet: object, inputs: tuple) -> None:
    import torch

    if inputs[0].shape[-1] == 576 // 8:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if breakage() == "fatal":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def linger(*_: object) -> None:
    if breakage() == "slow":
        time.sleep(1)


def load_breakable() -> object:
    pipe = load_pipeline()
    pipe.unet.register_forward_pre_hook(fail)
    pipe.text_encoder.register_forward_pre_hook(linger)
    return pipe


if __name__ == "__main__":
    handler.load_pipeline = load_breakable
    handler.main()
