"""Trains the model that draws, from fixed seeds, on two CPU cores: 48 minutes of CPU time in each of two processes,
and some five more for decoder and LoRA.

    python tests/drawing/train.py --out FOLDER                  all stages, one after the other
    python tests/drawing/train.py --out FOLDER --stage shapes   one stage; it begins with what the stage before it wrote

decoder     the VAE's decoder
words       text encoders and UNet, small pictures: what the words mean
shapes      larger pictures: shapes, and two objects in a picture
sizes       the sizes that the worker draws
finish      the same, with a learning rate that falls to nothing
outlines    a LoRA on the finished model

Two processes with one thread each share every step and average their gradients: on two cores that is faster than one
process with two threads. No prompt in training is longer than CLIP's window, none is blended or concatenated.

The committed weights are from these stages, run once from start to end. Another machine rounds otherwise, so that its
weights are as good but not the same to the bit.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

from drawing import decoder, diffusion, lora, model  # noqa: E402
from drawing.muon import Muon  # noqa: E402

PROCESSES = 2


@dataclass(frozen=True)
class Stage:
    """One part of the training. The learning rate goes in a line from lr[0] to lr[1]; batch is per process."""

    name: str
    before: str | None
    steps: int
    batch: int
    sizes: tuple[tuple[int, int], ...]
    lr: tuple[float, float]
    pair_share: float

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, after 40 steps of warming up."""
        first, last = self.lr
        return (first + (last - first) * step / self.steps) * min(1.0, (step + 1) / 40)


SIZES = ((256, 256), (256, 256), (256, 256), (320, 256), (256, 320))
STAGES = (
    Stage("words", None, 621, 32, ((128, 128),), (3e-3, 2.31e-3), 0.15),
    Stage("shapes", "words", 241, 16, ((192, 192),), (2.3e-3, 2.139e-3), 0.5),
    Stage("sizes", "shapes", 301, 16, SIZES, (1.6e-3, 1.48e-3), 0.35),
    Stage("finish", "sizes", 360, 16, SIZES, (1.4e-3, 0.0), 0.35),
)

# ---------------------------------------------------------------------------------------------------------------------
# steps


def is_matrix(name: str, parameter: torch.nn.Parameter) -> bool:
    """Whether Muon trains it; Adam trains vectors, rows of embeddings, and what touches the latents."""
    return parameter.ndim >= 2 and not name.startswith(("unet.conv_in", "unet.conv_out")) and "embeddings" not in name


def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Give all processes the mean gradient, of norm 1 at most."""
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters])
    dist.all_reduce(flat)
    flat /= PROCESSES
    flat *= min(1.0, 1.0 / (flat.norm().item() + 1e-6))
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = grad.view_as(p)


# ---------------------------------------------------------------------------------------------------------------------
# stages


def losses(drawer: model.Drawer, stage: Stage, rank: int) -> Iterator[torch.Tensor]:
    """The loss of each step of a stage, on new scenes each time."""
    seed = 1000 * [s.name for s in STAGES].index(stage.name) + rank
    torch.manual_seed(seed)
    rng, shared = random.Random(seed), random.Random(7)  # shared: both processes take the same size
    pools = {}
    for i, size in enumerate(sorted(set(stage.sizes))):
        pools[size] = diffusion.Pool(*size, stage.pair_share, seed + 10 * i)
        pools[size].grow(256)
    for _ in range(stage.steps):
        pool = pools[shared.choice(stage.sizes)]
        pool.grow(6)
        batch, latents = pool.batch(stage.batch)
        prompts = [diffusion.prompt_ids(rng, scene) for scene in batch]
        yield diffusion.diffusion_loss(drawer.unet, latents, *drawer.encode(prompts))


def train_stage(rank: int, stage: Stage, out: Path, rendezvous: str) -> None:
    """One process of one stage. Writes {stage}.pt: the moving average of the weights."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=PROCESSES)
    torch.manual_seed(0)
    drawer = model.load_drawer(out / f"{stage.before}.pt") if stage.before else model.Drawer()
    named = list(drawer.named_parameters())
    muon = Muon([p for name, p in named if is_matrix(name, p)])
    adam = torch.optim.AdamW([p for name, p in named if not is_matrix(name, p)], betas=(0.9, 0.98), weight_decay=0.0)
    average = {name: value.clone() for name, value in drawer.state_dict().items()}
    started, recent = time.monotonic(), []
    for step, loss in enumerate(losses(drawer, stage, rank)):
        loss.backward()
        average_gradients([p for _, p in named])
        lr = adam.param_groups[0]["lr"] = stage.lr_at(step)
        muon.step(lr)
        adam.step()
        drawer.zero_grad()
        follow(average, drawer, min(0.995, (step + 1) / (step + 10)))
        recent = [*recent[-49:], loss.item()]
        if rank == 0 and (step % 20 == 0 or step + 1 == stage.steps):
            done = f"{stage.name} {step + 1}/{stage.steps}: loss {sum(recent) / len(recent):.4f}"
            print(f"{done}, {time.monotonic() - started:.0f} s, {time.process_time():.0f} s CPU", flush=True)
            torch.save(average, out / f"{stage.name}.pt")
    dist.destroy_process_group()


@torch.no_grad()
def follow(average: dict[str, torch.Tensor], drawer: model.Drawer, keep: float) -> None:
    """Move the average of the weights a little towards the weights of now."""
    for name, value in drawer.state_dict().items():
        average[name].lerp_(value, 1 - keep)


def train_model(stage: Stage, out: Path) -> None:
    """A stage of text encoders and UNet, in processes that find each other through a file."""
    meeting = out / f".{stage.name}-{time.time_ns()}"
    mp.spawn(train_stage, (stage, out, meeting.resolve().as_uri()), nprocs=PROCESSES)
    meeting.unlink(missing_ok=True)


def main() -> None:
    """Run all stages, or one."""
    names = ["decoder", *(stage.name for stage in STAGES), "outlines"]
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stage", choices=names)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    wanted = [options.stage] if options.stage else names
    if "decoder" in wanted:
        decoder.train(options.out)
    for stage in STAGES:
        if stage.name in wanted:
            train_model(stage, options.out)
    if "outlines" in wanted:
        lora.train_outlines(model.load_drawer(options.out / f"{STAGES[-1].name}.pt"), options.out)


if __name__ == "__main__":
    main()
