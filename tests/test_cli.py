"""The command line, as a user runs it, on the tiny model world: in real processes, and in this one where those would
only import the libraries once more."""

import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import requests
import runpod
import seams
from PIL import Image

ROOT = Path(__file__).parent.parent
SMALL = {"prompt": "a cat", "width": 256, "height": 256, "steps": 2, "seed": 7, "num_images": 2}
BARE = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}  # threads of several tests would wait for each other
# a line of ours, of the SDK, or of what it prints for us
LOG_LINE = re.compile(r"\d\d:\d\d:\d\d (INFO|WARNING|ERROR) ")


@pytest.fixture
def run(world, civitai, tmp_path):
    """Runs `python handler.py` with arguments in an empty folder of its own."""

    def run_handler(*arguments: str, **environ: str) -> subprocess.CompletedProcess:
        env = {"HOME": str(tmp_path), **BARE, **world.environ(civitai.url), **environ}
        command = [sys.executable, str(ROOT / "handler.py"), *arguments]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)

    return run_handler


def printed_metadata(stdout: str) -> dict:
    return json.JSONDecoder().raw_decode(stdout[stdout.index("\n{\n") + 1 :])[0]


def test_job_file(run, tmp_path):
    """`python handler.py job.json` saves the images to OUTPUT_DIR, prints where and the metadata, and is quiet."""
    (tmp_path / "job.json").write_text(json.dumps({"input": SMALL}))
    done = run("job.json", OUTPUT_DIR="pictures")
    assert done.returncode == 0, done.stderr
    files = sorted((tmp_path / "pictures").iterdir())
    assert [Image.open(file).size for file in files] == [(256, 256)] * 2
    assert all(f"pictures/{file.name}" in done.stdout for file in files)
    metadata = printed_metadata(done.stdout)
    assert metadata["seeds"] == [7, 8] and metadata["loras_failed"] == []
    strange = [line for line in done.stderr.splitlines() if not LOG_LINE.match(line)]
    assert strange == []
    assert not re.search("warn", done.stdout.replace('"warnings": []', ""), re.IGNORECASE)


@pytest.fixture
def run_here(world, civitai, tmp_path, monkeypatch, capfd):
    """The same in this process, which has all the imports; returns the exit code and what was printed."""
    monkeypatch.setattr(seams.log, "handlers", [])
    for name, value in (world.environ(civitai.url) | {"RUNPOD_LOG_LEVEL": "INFO", "LORAS": ""}).items():
        monkeypatch.setenv(name, value)

    def run_main(*arguments: str) -> tuple[Any, str]:
        monkeypatch.setattr(sys, "argv", ["handler.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "handler.py"), run_name="__main__")
        return ended.value.code, capfd.readouterr().out

    yield run_main
    runpod.serverless.log.set_level("INFO")


def test_test_input(run_here, tmp_path):
    """--test_input runs a job from the command line; the SDK's other options go on working."""
    job = json.dumps({"input": {**SMALL, "num_images": 1}})
    code, printed = run_here("--rp_log_level", "ERROR", "--test_input", job)
    assert code in (None, 0)
    assert len(list((tmp_path / "output").iterdir())) == 1
    assert "INFO   | " not in printed.replace("INFO   | Log level set to ERROR", "")


def test_failures_exit_with_1_and_a_sentence(run_here, tmp_path, monkeypatch):
    """A refused job and unusable models each end with exit code 1 and a sentence."""
    code, printed = run_here("--test_input", '{"input": {"prompt": "a", "width": 1023}}')
    assert code == 1 and "width must be a multiple of 8, got 1023" in printed
    monkeypatch.setenv("VAE_MODEL", str(tmp_path))
    code, printed = run_here("--test_input", json.dumps({"input": SMALL}))
    assert code == 1 and "check VAE_MODEL" in printed
    assert str(tmp_path) not in printed


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("bad.json",), "bad.json is not valid JSON"),
        (("absent.json",), "absent.json cannot be read"),
        (("--test_input", "[]"), '--test_input must hold {"input"'),
        (("a.json", "b.json"), "usage: python handler.py"),
    ],
)
def test_what_is_no_job(run_here, tmp_path, arguments, sentence):
    """Ends with a sentence, which makes the exit code 1, and no traceback."""
    (tmp_path / "bad.json").write_text('{"input": ')
    code, _ = run_here(*arguments)
    assert sentence in code


def test_local_http_server(world, civitai, tmp_path):
    """--rp_serve_api answers a POST to /runsync with the images, and bad input with its sentence."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {"HOME": str(tmp_path), **BARE, **world.environ(civitai.url), "LORAS": ""}
    command = [sys.executable, str(ROOT / "handler.py"), "--rp_serve_api", "--rp_api_port", str(port)]
    server = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        good = post(port, {"input": SMALL})
        assert good["status"] == "COMPLETED" and len(good["output"]["images"]) == 2
        bad = post(port, {"input": {**SMALL, "stesp": 1}})
        assert bad["status"] == "FAILED" and 'did you mean "steps"' in bad["error"]
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(20)


def post(port: int, job: dict) -> dict:
    """POST /runsync, from the moment that the server listens."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return requests.post(f"http://localhost:{port}/runsync", json=job, timeout=60).json()
        except requests.ConnectionError:
            assert time.monotonic() < deadline, "the server never listened"
            time.sleep(0.2)
