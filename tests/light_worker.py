"""handler.py without models: a job takes 20 ms a step, and its answer is one image that is none.

    {"steps": 2, "encode_s": 0.0, "decode_s": 0.0}    what such a job may ask for

The file "break" in the working directory says what goes wrong:

    hold       no job ends
    threadless no thread can be started for a job
    escape     the job raises
    mute       the SDK's heartbeat raises
    object, nan, deep, cycle    the answer is nothing that JSON can carry
"""

import asyncio
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import seams

STEP_S = 0.02
GPU = threading.Lock()
CYCLE: list[Any] = []
CYCLE.append(CYCLE)
UNFIT = {"object": object(), "nan": float("nan"), "deep": {1: {2: object()}}, "cycle": CYCLE}


def breakage() -> str:
    file = Path("break")
    return file.read_text() if file.exists() else ""


def run(job: dict[str, Any], observer: Any) -> dict[str, Any]:
    steps = job["input"].get("steps", 2)
    with observer.turn(GPU):
        time.sleep(job["input"].get("encode_s", 0))
        observer.step(0, steps)
        for step in range(1, steps + 1):
            time.sleep(STEP_S)
            observer.step(step, steps)
        time.sleep(job["input"].get("decode_s", 0))
        while breakage() == "hold":
            time.sleep(STEP_S)
    if breakage() == "escape":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return {"images": [UNFIT.get(breakage(), "A")], "seed": 1}


async def to_thread(function: Callable[[], Any]) -> Any:
    if breakage() == "threadless":
        raise RuntimeError("can't start new thread")
    return await to_a_thread(function)


def break_the_heartbeat() -> None:
    from runpod.serverless.modules.rp_ping import Heartbeat

    send_ping = Heartbeat._send_ping

    def send(self: Heartbeat) -> None:
        if breakage() == "mute":
            raise MemoryError
        send_ping(self)

    Heartbeat._send_ping = send


if __name__ == "__main__":
    seams.import_sdk()
    break_the_heartbeat()
    to_a_thread, asyncio.to_thread = asyncio.to_thread, to_thread
    seams.serve_with(run)
