"""The worker for hours in minutes: many different jobs through the queue, failures mixed in.

    python tests/soak.py --jobs 2000
    python tests/soak.py --jobs 0 --stops 500
    python tests/soak.py --jobs 0 --stops 500 --light       without models, so that it is quick

Every job must be answered exactly once and as its kind asks, a fixed control job every hundred must give the same
image, and the worker's memory must stay where it was after the first hundred. A third of the jobs name models by
Civitai's ids, which come and go: the store keeps half of them. Prints a line per hundred jobs.

--stops stops jobs at random moments, from before they are taken to their answer's post: none of them may be posted
afterwards, every other job must be answered once, and the control job must give the same image.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import numpy as np  # noqa: E402
import seams  # noqa: E402
from civitai_server import CivitaiServer, Fault  # noqa: E402
from runpod_server import RunPodServer, Worker  # noqa: E402
from world import API_KEY, World, build_world, write_bad_lora, write_lora, write_tensors  # noqa: E402

CONTROL = {"prompt": "a lighthouse at dusk", "width": 256, "height": 320, "steps": 3, "seed": 7, "num_images": 2}
WORDS = ("red", "brick", "house", "by", "the", "sea", "violet", "(otters:1.3)", "and", "[ships]", "BREAK")
EMBEDDING_WIDTHS = {"clip_l": 32, "clip_g": 64}
SIDES = (256, 288, 320)  # few: on a CPU, oneDNN keeps compiled code for every shape it has met
STOP_S = 1.0  # until a stopped job's open posts are closed
OUT_OF_MEMORY_WIDTH = 576  # breakable_worker.py's UNet fails at it


def random_job(
    dice: random.Random, loras: list[str], ids: Sequence[tuple[str, int, str]] = ()
) -> tuple[dict[str, Any], str]:
    """A job's input, and the code of its answer: "" for a good one. ids: field, version id and code of models at
    Civitai."""
    job: dict[str, Any] = {
        "prompt": " ".join(dice.choices(WORDS, k=dice.choice((1, 5, 20, 120)))),
        "negative_prompt": " ".join(dice.choices(WORDS, k=dice.choice((0, 0, 10, 100)))),
        "width": dice.choice(SIDES),
        "height": dice.choice(SIDES),
        "steps": dice.randint(1, 3),
        "seed": dice.randrange(2**32),
        "guidance_scale": dice.choice((1, 4.5, 7.0)),
        "scheduler": dice.choice(seams.SAMPLING_NAMES),
        "clip_skip": dice.choice((1, 2, 2, 4)),
        "long_prompt": dice.choice(("blend", "concat", "truncate")),
        "num_images": dice.choice((1, 1, 1, 2)),
        "image_format": dice.choice(("png", "png", "jpeg", "webp")),
    }
    if dice.random() < 0.5:
        chosen = dice.sample(loras, dice.randint(0, len(loras)))
        job["loras"] = [{"name": name, "scale": dice.choice((0.3, 1.0, -2.0))} for name in chosen]
    kind = dice.random()
    if kind < 0.05:
        return {**job, "width": OUT_OF_MEMORY_WIDTH}, "OUT_OF_MEMORY"
    if kind < 0.10:
        return {**job, **dice.choice(({"steps": 0}, {"promt": "x"}, {"width": 1023}, {"seed": 1e400}))}, "INVALID_INPUT"
    code = ""
    if ids and dice.random() < 0.3:
        *_, code = last = dice.choice(ids)
        for field, version, _ in [*dice.sample([one for one in ids if not one[2]], 2), last]:
            entries = [entry for entry in job.get(field, []) if entry.get("civitai") != version]
            job[field] = [*entries, {"civitai": version}]
            job["prompt"] += " mood" * (field == "embeddings")
    return job, code


class Shop:
    """Civitai with models that jobs name by id, of which the worker may keep half; some cannot be had or used."""

    def __init__(self, world: World, folder: Path) -> None:
        files = dict(world.files)
        for version in range(1001, 1009):
            files[version] = write_lora(folder / f"{version}.safetensors", strength=0.2, seed=version)
        for version in range(2001, 2004):
            tensors = {
                part: np.full((2, width), version / 9999, np.float16) for part, width in EMBEDDING_WIDTHS.items()
            }
            files[version] = write_tensors(folder / f"mood{version}.safetensors", tensors)
        files[3001] = write_bad_lora(folder / "3001.safetensors", "sd15")
        self.server, self.store = CivitaiServer(files, key=API_KEY), folder / "store"
        self.room = sum(files[version].stat().st_size for version in range(1001, 1009)) // 2
        self.ids = [("loras", version, "") for version in range(1001, 1009)]
        self.ids += [("embeddings", version, "") for version in range(2001, 2004)]
        self.ids += [("loras", 3001, "INVALID_INPUT"), ("loras", 4001, "DOWNLOAD_FAILED")]

    def environ(self, world: World) -> dict[str, str]:
        """A worker's settings, with a store of its own but for the checkpoint."""
        places = {"CHECKPOINT_DIR": str(world.checkpoint.parent), "MODEL_CACHE_DIR": str(self.store)}
        return world.environ(self.server.url) | places | {"JOB_MODELS_GB": f"{self.room / 1e9:.6f}"}

    def disturb(self, dice: random.Random) -> None:
        """What a few of the next downloads meet."""
        for version in dice.sample(range(1001, 1009), 3):
            faults = [Fault("cdn", status=503), Fault("cdn", cut_after=900, reset=True), Fault("info", status=451)]
            self.server.faults[version] = dice.sample(faults, 1)

    def check(self) -> None:
        """Raises AssertionError where jobs' files take more than their room, but for one that is coming."""
        files = [*self.store.glob("*/civitai_*.safetensors")]
        assert sum(file.stat().st_size for file in files) <= self.room, files


def resident_mb(worker: Worker) -> float:
    """The worker's memory in megabytes."""
    status = Path(f"/proc/{worker.process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1000


def soak(
    server: RunPodServer, worker: Worker, loras: list[str], jobs: int, every: int = 100, shop: Shop | None = None
) -> list[float]:
    """Serves the jobs, `every` of them queued at a time; returns the memory after each lot. Raises AssertionError."""
    dice, memory, controls = random.Random(0), [], []
    for _ in range(jobs // every):
        started = time.monotonic()
        wanted: dict[str, str] = {}
        for _ in range(every - 1):
            job, code = random_job(dice, loras, shop.ids if shop else ())
            job_id = server.submit(job)
            wanted[job_id] = code
            if dice.random() < 0.05:
                server.inject("job-done", [dice.choice(("reset", 429, 500))], job_id)
        server.inject("job-take", [dice.choice((None, None, None, 204, 503, "reset")) for _ in range(every // 10)])
        for job_id, code in wanted.items():
            result = server.result(job_id, timeout=600)
            assert result["output"].get("code", "") == code, (result.get("error"), server.jobs[job_id].envelope)
        if shop:
            shop.check()
            shop.disturb(dice)
        controls.append(server.result(server.submit(CONTROL), timeout=600)["output"]["images"])
        memory.append(resident_mb(worker))
        print(f"{len(server.jobs)} jobs, {time.monotonic() - started:.0f} s, {memory[-1]:.0f} MB", flush=True)
    assert all(images == controls[0] for images in controls), "a job changed the one after it"
    assert [job.id for job in server.jobs.values() if len(job.results) != 1] == []
    assert server.violations == []
    return memory


def light_job(dice: random.Random) -> dict[str, Any]:
    """The input of a job of light_worker.py."""
    return {"steps": dice.randint(1, 60), "encode_s": dice.choice((0, 0.5)), "decode_s": dice.choice((0, 0.5))}


def soak_stops(
    server: RunPodServer,
    worker: Worker,
    make: Callable[[random.Random], dict[str, Any]],
    stops: int,
    every: int = 50,
) -> Counter[str]:
    """Stops three jobs of four, about `every` at a time; returns how many of them were how far, as the queue saw it.
    Raises AssertionError."""
    dice, moments = random.Random(0), Counter()
    first = server.result(server.submit(CONTROL), timeout=600)["output"]["images"]
    while sum(moments.values()) < stops:
        wanted = [(server.submit(make(dice)), dice.random() < 0.75) for _ in range(every * 4 // 3)]
        for job_id, _ in wanted:  # some answers are long on their way
            server.inject("job-done", [dice.choice((None, None, 0.5, 2.0, 429))], job_id)
        for job_id, doomed in wanted:
            job = server.jobs[job_id]
            if doomed:
                server.wait_for(lambda job=job: job.taken, timeout=600)
                time.sleep(dice.choice((0, dice.random(), 2 * dice.random())))
                moment = "being posted" if job.attempts else "denoised" if job.progress else "taken"
                moments[moment if not job.results else "answered"] += 1
                server.stop(job_id)
            else:
                server.result(job_id, timeout=600)
        assert server.result(server.submit(CONTROL), timeout=600)["output"]["images"] == first, "a stop left something"
        print(f"{sum(moments.values())} stops: {dict(moments)}, {resident_mb(worker):.0f} MB", flush=True)
        doomed = [server.jobs[job_id] for job_id, doomed in wanted if doomed]
        assert all(len(job.results) <= 1 for job in doomed), "a stopped job was answered twice"
        for job in doomed:
            posts = [*job.progress, *job.attempts]
            assert not job.stopped or all(post.arrived < job.stopped + STOP_S for post in posts), (
                job,
                "posted after a stop",
            )
        assert all(len(server.jobs[job_id].results) == 1 for job_id, doomed in wanted if not doomed)
    assert server.violations == []
    return moments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--stops", type=int, default=0)
    parser.add_argument("--light", action="store_true", help="stops alone")
    options = parser.parse_args()
    loras = ["Detail Tweaker XL", "hand_detail_flux_xl", "boring_reality_v3"]
    with contextlib.ExitStack() as stack:
        folder, server = Path(stack.enter_context(tempfile.TemporaryDirectory())), stack.enter_context(RunPodServer())
        environ, script, shop = {}, "light_worker.py", None
        if not options.light:
            world = build_world(TESTS / ".cache")
            shop = Shop(world, folder)
            stack.enter_context(shop.server)
            environ = shop.environ(world) | {"LORAS": "135867@1.5,294259,348625@0.3", "OMP_NUM_THREADS": "1"}
            script = "breakable_worker.py"
        worker = stack.enter_context(Worker(server, folder, environ, str(TESTS / script)))
        worker.ready(300)
        make = light_job if options.light else lambda dice: random_job(dice, loras)[0]
        print(soak_stops(server, worker, make, options.stops))
        if not options.jobs:
            return
        memory = soak(server, worker, loras, options.jobs, shop=shop)
        print(f"{len(server.jobs)} jobs answered once each; memory {memory[0]:.0f} -> {memory[-1]:.0f} MB")
        assert max(memory[1:], default=0) < 1.05 * memory[0], "memory grows"


if __name__ == "__main__":
    main()
