"""Takes what training wrote into weights/: what the project keeps of it, in float16.

python tests/drawing/export.py --out FOLDER       the folder that train.py wrote
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

from drawing import drawing_world, model, train  # noqa: E402


def main() -> None:
    """Write weights/*.safetensors and say how large they are."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stage", default=train.STAGES[-1].name, help="whose weights to take")
    options = parser.parse_args()
    drawer = model.load_drawer(options.out / f"{options.stage}.pt")
    drawing_world.WEIGHTS.mkdir(exist_ok=True)
    drawing_world.save_weights(drawer, torch.load(options.out / "decoder.pt"))
    if (options.out / "outlines.safetensors").exists():
        shutil.copyfile(options.out / "outlines.safetensors", drawing_world.WEIGHTS / "outlines.safetensors")
    for path in sorted(drawing_world.WEIGHTS.glob("*.safetensors")):
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
