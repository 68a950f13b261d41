"""What tests need of handler.py beyond its contract, in one place: tests import it from here and touch nothing else.

A redesign of handler.py then has this file to mend, not the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import handler

# --- queue


def serve_with(run: Callable[[dict[str, Any], Any], dict[str, Any]]) -> None:
    """The worker of RunPod's queue with another job function and no models: what is measured is the queue alone."""
    handler.configure_logging()
    handler.run_job, handler.warm_up = run, lambda: handler.Settings.from_environ().jobs_in_flight
    handler.serve_queue()


def change_pipeline(change: Callable[[Any], None]) -> None:
    """Has every pipeline changed once it is built: a worker's process cannot be reached in any other way."""
    build = handler.build_pipeline

    def build_changed(*arguments: Any) -> Any:
        pipe = build(*arguments)
        change(pipe)
        return pipe

    handler.build_pipeline = build_changed


def import_sdk() -> None:
    """Imports runpod as the worker does."""
    handler.import_sdk()


def scheduler_names() -> list[str]:
    """All samplers that a job may ask for."""
    return list(dict.fromkeys([*handler.SAMPLERS, *handler.DIFFUSERS_SAMPLERS]))
