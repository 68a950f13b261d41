"""handler.py with a real pipeline that fails on demand: the file "break" in the working directory says how.

fatal      the UNet meets a CUDA error after which every call fails
slow       the first text encoder takes a second longer
unlisted   the SDK cannot note down the job that was taken
object, nan, deep, cycle    the answer is nothing that JSON can carry
escape     a failure that no job catches

At a width of 576 the UNet runs out of memory.
"""

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import seams
from runpod.serverless.modules.worker_state import JobsProgress

import handler

note_down = JobsProgress.add
CYCLE: list[Any] = []
CYCLE.append(CYCLE)
UNFIT = {"object": object(), "nan": float("nan"), "deep": {1: {2: object()}}, "cycle": CYCLE}


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


def add_hooks(pipe: Any) -> None:
    pipe.unet.register_forward_pre_hook(fail)
    pipe.text_encoder.register_forward_pre_hook(linger)


def spoil(answer: dict[str, Any]) -> dict[str, Any]:
    if breakage() == "escape":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return {"images": UNFIT[breakage()]} if breakage() in UNFIT else answer


def add_unless_broken(self: JobsProgress, element: object) -> None:
    if breakage() == "unlisted":
        raise OSError(28, "No space left on device")
    note_down(self, element)


if __name__ == "__main__":
    JobsProgress.add = add_unless_broken
    seams.change_pipeline(add_hooks)
    seams.change_answers(spoil)
    handler.main()
