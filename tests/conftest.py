"""Fixtures that all tests share: the model world, a Civitai-like server, and an environment that nothing leaks into."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parent
CACHE = TESTS / ".cache"
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
SETTINGS = re.compile(
    r"(CIVITAI|HF|HUGGINGFACE|RUNPOD|BUCKET|AWS|SDXL|VAE|CHECKPOINT|LORA|TORCH_COMPILE|OUTPUT|MODEL)_?.*"
    r"|LORAS|EMBEDDINGS|JOB_MODEL\w*|MAX_RESPONSE_MB|JOBS_IN_FLIGHT|ALLOW_CPU|.*_proxy|.*_PROXY"
)
for name in filter(SETTINGS.fullmatch, list(os.environ)):
    del os.environ[name]
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


# where most of the time goes: these files begin, so that no process is left alone with one of them at the end
LONGEST = ("runpod", "lora", "looks", "cuda", "world", "prompts", "cli", "benchmarks", "store", "downloads", "recipes")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest go first; each file's tests stay in their order."""
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each test starts in an empty folder of its own; what it sets is undone."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def world() -> World:  # noqa: F821
    """The tiny model world, written once and cached below tests/.cache."""
    import torch
    from world import build_world

    torch.set_num_threads(1)
    return build_world(CACHE)


@pytest.fixture
def civitai(world: World) -> Iterator[CivitaiServer]:  # noqa: F821
    """A server with the world's files, without faults and with no requests seen."""
    from civitai_server import CivitaiServer
    from world import API_KEY

    with CivitaiServer(world.files, key=API_KEY) as server:
        yield server


@pytest.fixture
def pipe(world: World, monkeypatch: pytest.MonkeyPatch) -> Any:  # noqa: F821
    """The worker's pipeline on the tiny world, loaded once a session, as handler() uses it; no Civitai is there."""
    import seams

    for name, value in world.environ("http://127.0.0.1:9").items():
        monkeypatch.setenv(name, value)
    return seams.engine().pipe


@pytest.fixture
def reload(pipe: Any) -> Iterator[None]:
    """The next job loads a pipeline of its own; the session's comes back afterwards."""
    import seams

    engine = seams.serve(None)
    yield
    seams.serve(engine)
