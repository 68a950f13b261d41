"""The benchmarks run: small, on whatever machine the tests are on."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(300)
def test_the_gpu_benchmark_runs_without_a_gpu() -> None:
    """Small, on this machine: each way with its row; what compiling does, test_lora.py knows."""
    script = Path(__file__).parent / "benchmarks" / "gpu.py"
    run = subprocess.run(
        [sys.executable, script, "--small", "--no-compile"], capture_output=True, text=True, timeout=280
    )
    assert run.returncode == 0, run.stderr
    rows = re.findall(r"^\| (\w.*?) \| 1 \| \d+\.\d\d \(", run.stdout, re.MULTILINE)
    assert rows == ["bare checkpoint", "2 unfused adapters", "worker"]
    assert all(told in run.stdout for told in ("hires by 1.5", "whole stack", "differ by 0 of 255", "is not GPU work"))
