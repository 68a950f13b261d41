"""What tests need of handler.py's inside beyond its contract. Only this file names it."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import pytest

import handler

# --- store

Settings, fetch_models, recorded_sha256 = handler.Settings, handler.fetch_models, handler.recorded_sha256
log, in_background = handler.log, handler.in_background
machine, pick_sha256, origin = handler.machine, handler.pick_sha256, handler.origin
QUICK = {"FIRST_BACKOFF_S": 0.01, "LAST_BACKOFF_S": 0.05, "STALL_S": 1.5, "SEGMENT": 256 * 1024, "BLOCK": 64 * 1024}
QUICK_LOCKS = {"LOCK_POLL_S": 0.02, "LOCK_BEAT_S": 0.05, "LOCK_DEAD_S": 1.0}


def tune(monkeypatch: pytest.MonkeyPatch, **constants: float) -> None:
    """Sets constants of the store for one test."""
    for name, value in constants.items():
        monkeypatch.setattr(handler, name, value)


def constant(name: str) -> float:
    """A constant of the store."""
    return getattr(handler, name)


def model_address(config: dict, folder: Path) -> tuple[str, str]:
    """The address that is asked for a config's file, and its version id at Civitai, "" for one from elsewhere."""
    download = handler.Download(handler.Store(handler.Settings.from_environ()), config, folder)
    return download.url, download.version


def record_of(path: Path) -> Path:
    """Where the store notes what it knows of a file."""
    return handler.record_file(path)


def write_record(path: Path, sha256: str | None) -> None:
    """Notes a file's stamp and hash, as after a download."""
    handler.write_record(path, path.stat(), sha256)


def sweep() -> None:
    """What every start does with leftovers of downloads."""
    handler.Store(handler.Settings.from_environ()).sweep()


def dead_owner() -> str:
    """The owner of leftovers whose process has ended on this machine."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return f"{handler.machine()}-{child}-{secrets.token_hex(4)}"


def read_ahead() -> handler.ReadAhead:
    """.add(path) brings a file into the page cache; .readers and .todo are what is at work and waiting."""
    return handler.ReadAhead()
