"""The command that CI runs: README's own test command, then ruff, and the exit status of whatever fails."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (
    "# A project\n\n<!-- demo -->\n```bash\nexit 9\n```\n\n<!-- tests -->\n```bash\n{}\n```\n\n```bash\nexit 8\n```\n"
)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small checkout: this repository's .ci/run and ruff settings, a clean Python file, and ruff in .venv."""
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/ruff").symlink_to(Path(sys.executable).parent / "ruff")
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci/run")
    shutil.copy(ROOT / ".ruff.toml", tmp_path)
    (tmp_path / "clean.py").write_text('"""Nothing."""\n')
    return tmp_path


def ci(checkout: Path, command: str) -> subprocess.CompletedProcess[str]:
    """.ci/run, started from elsewhere, in a checkout whose README has this test command."""
    (checkout / "README.md").write_text(README.format(command))
    return subprocess.run([checkout / ".ci/run"], cwd="/", capture_output=True, text=True, timeout=60)


def test_runs_the_marked_command_then_ruff(checkout):
    """The block below <!-- tests --> runs in the checkout, alone, and ruff after it."""
    done = ci(checkout, "pwd > ran")
    assert done.returncode == 0, done.stderr
    assert (checkout / "ran").read_text().strip() == str(checkout)
    assert "All checks passed!" in done.stdout


@pytest.mark.parametrize("command", ["false && true", "exit 3", "false | true", "false\ntrue"])
def test_fails_with_the_tests(checkout, command):
    """A failing test command fails CI, wherever in the command the failure is, and ruff does not hide it."""
    assert ci(checkout, command).returncode != 0


@pytest.mark.parametrize("source", ["import os\n", "x = {'a':1}\n"])
def test_fails_with_ruff(checkout, source):
    """A finding of ruff fails CI, and so does code that it would format in another way."""
    (checkout / "faulty.py").write_text(source)
    assert ci(checkout, "true").returncode != 0


def test_fails_without_a_marked_command(checkout):
    """A README without the marker is an error, not a CI run without tests."""
    (checkout / "README.md").write_text("# Nothing marked\n```bash\ntrue\n```\n")
    done = subprocess.run([checkout / ".ci/run"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "<!-- tests -->" in done.stderr


def test_readme_has_both_one_liners():
    """README's demo and test commands are one line each, set up all they need, and differ in their last step alone."""
    text = (ROOT / "README.md").read_text()
    commands = {}
    for name in ("demo", "tests"):
        assert text.count(f"<!-- {name} -->") == 1
        commands[name] = text.split(f"<!-- {name} -->\n```bash\n")[1].split("\n```")[0]
        assert "\n" not in commands[name]
    setup, demo = commands["demo"].rsplit(" && ", 1)
    assert demo == ".venv/bin/python tests/demo.py"
    assert commands["tests"] == f"{setup} && .venv/bin/python -m pytest tests"
