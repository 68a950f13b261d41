"""The Dockerfile, without a Docker engine: its rules, its dependency resolution, and its commands where they run here.

The resolution is proved with uv against two local folders that imitate the real indexes in what matters: the public one
has torch without a CUDA label and the packages of today, PyTorch's has the CUDA 11.8 build beside old copies of common
packages and a markupsafe for another Python.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import seams

import handler

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
CU118_INDEX = "https://download.pytorch.org/whl/cu118"

PUBLIC_INDEX = {
    "accelerate": ["1.9.0"],
    "diffusers": ["0.34.0", "0.35.0"],
    "hf-transfer": ["0.1.9"],
    "markupsafe": ["3.0.2"],
    "numpy": ["2.3.0"],
    "peft": ["0.17.1"],
    "pillow": ["11.3.0"],
    "requests": ["2.32.4"],
    "runpod": ["1.7.13"],
    "safetensors": ["0.5.3"],
    "torch": ["2.6.0", "2.7.1"],
    "transformers": ["4.54.1"],
}
PYTORCH_INDEX = {
    "markupsafe": ["2.1.5"],
    "numpy": ["1.26.3"],
    "pillow": ["9.3.0"],
    "requests": ["2.28.1"],
    "torch": ["2.0.1+cu118", "2.6.0+cu118", "2.7.1+cu118"],
}
REQUIRES = {"torch": ["markupsafe>=2.0"]}
TAGS = {"markupsafe 2.1.5": "cp313-cp313-any"}


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions in order: ("RUN", "uv pip install ..."), continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]


def bodies(kind: str) -> list[str]:
    return [body for instruction, body in instructions() if instruction == kind]


def only(found: list[str]) -> str:
    assert len(found) == 1, found
    return found[0]


def run_with(text: str) -> str:
    """The one RUN instruction that holds the text."""
    return only([body for body in bodies("RUN") if text in body])


def environment() -> dict[str, str]:
    """Every variable that an ENV instruction sets, in whichever stage."""
    return dict(pair.split("=", 1) for body in bodies("ENV") for pair in shlex.split(body))


def test_hadolint_finds_nothing():
    """The Dockerfile parses and breaks none of hadolint's rules."""
    done = subprocess.run([BIN / "hadolint", "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.stdout + done.stderr == ""
    assert done.returncode == 0


def test_hadolint_would_find_a_fault(tmp_path):
    """The linter is not blind: a CMD that is no list and a missing tag are reported."""
    broken = tmp_path / "Dockerfile"
    broken.write_text("FROM runpod/base\nCMD python handler.py\n")
    done = subprocess.run([BIN / "hadolint", "--no-color", broken], capture_output=True, text=True)
    assert done.returncode == 1
    assert "DL3006" in done.stdout
    assert "DL3025" in done.stdout


def write_index(folder: Path, packages: dict[str, list[str]]) -> str:
    """A package index of empty wheels, laid out as PEP 503 says; returns its address."""
    for name, versions in packages.items():
        (folder / name).mkdir(parents=True)
        links = []
        for version in versions:
            stem = f"{name.replace('-', '_')}-{version}"
            wheel = folder / name / f"{stem}-{TAGS.get(f'{name} {version}', 'py3-none-any')}.whl"
            metadata = [f"Name: {name}", f"Version: {version}"]
            metadata += [f"Requires-Dist: {requirement}" for requirement in REQUIRES.get(name, [])]
            with zipfile.ZipFile(wheel, "w") as file:
                file.writestr(f"{stem}.dist-info/METADATA", "\n".join(["Metadata-Version: 2.1", *metadata, ""]))
                file.writestr(
                    f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
                )
                file.writestr(f"{stem}.dist-info/RECORD", "")
            links.append(f'<a href="{wheel.name.replace("+", "%2B")}">{wheel.name}</a>')
        (folder / name / "index.html").write_text("<!DOCTYPE html>" + "".join(links))
    return folder.as_uri()


@pytest.fixture
def resolve(tmp_path):
    """Runs the Dockerfile's `uv pip install`, with these flags left out, against the two local indexes."""
    public = write_index(tmp_path / "public", PUBLIC_INDEX)
    pytorch = write_index(tmp_path / "pytorch", PYTORCH_INDEX)

    def run(*left_out: str) -> tuple[int, dict[str, str], str]:
        words = shlex.split(run_with("uv pip install").split("&&")[0])
        assert CU118_INDEX in words
        assert set(left_out) <= set(words)
        words = [pytorch if word == CU118_INDEX else word for word in words if word not in left_out]
        target = ["--target", str(tmp_path / "installed"), "--python", sys.executable, "--dry-run"]
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("UV_", "PIP_"))}
        done = subprocess.run(
            [BIN / "uv", *words[1:], *target, "--default-index", public, "--no-config"],
            cwd=ROOT,
            env=clean,
            capture_output=True,
            text=True,
        )
        chosen = dict(re.findall(r"^ \+ (\S+)==(\S+)$", done.stderr, flags=re.MULTILINE))
        return done.returncode, chosen, done.stderr

    return run


def test_resolution_takes_the_cuda_11_8_torch_and_the_packages_of_today(resolve):
    """requirements.txt resolves to 2.6.0+cu118 with the newest requests, pillow and markupsafe."""
    returncode, chosen, said = resolve()
    assert returncode == 0, said
    assert chosen["torch"] == "2.6.0+cu118"
    assert {name: chosen[name] for name in PUBLIC_INDEX if name not in ("torch", "diffusers")} == {
        name: versions[-1] for name, versions in PUBLIC_INDEX.items() if name not in ("torch", "diffusers")
    }
    assert chosen["diffusers"] == "0.34.0"


def test_resolution_needs_unsafe_best_match(resolve):
    """Without the strategy uv sees only PyTorch's old requests and gives up."""
    returncode, _, said = resolve("--index-strategy", "unsafe-best-match")
    assert returncode != 0
    assert "requests" in said or "pillow" in said


def test_resolution_without_the_index_is_not_the_cuda_11_8_torch(resolve):
    """Without PyTorch's index the plain build is chosen: the address in the Dockerfile is what brings CUDA 11.8."""
    returncode, chosen, said = resolve("--extra-index-url", CU118_INDEX)
    assert returncode == 0, said
    assert chosen["torch"] == "2.6.0"


def test_modules_are_compiled_in_the_build(tmp_path):
    """The Dockerfile's flag leaves compiled modules behind, which uv without it does not."""
    wheel = tmp_path / "sample-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("sample.py", "x = 1\n")
        file.writestr("sample-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: sample\nVersion: 1.0\n")
        file.writestr("sample-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("sample-1.0.dist-info/RECORD", "")
    flags = {"--compile-bytecode"} & set(shlex.split(run_with("uv pip install")))
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("UV_", "PIP_"))}
    for folder, chosen in (("with", flags), ("without", set())):
        target = ["--target", str(tmp_path / folder), "--python", sys.executable, "--offline", "--no-config"]
        subprocess.run([BIN / "uv", "pip", "install", *chosen, *target, wheel], env=clean, check=True)
        assert bool(list((tmp_path / folder).rglob("*.pyc"))) == (folder == "with")


def test_build_fails_with_another_torch():
    """The build's own check ends with an error on the torch of this machine, which is not the CUDA 11.8 build."""
    check = shlex.split(run_with("torch.version.cuda").split("&&")[1])
    assert check[0] == "python"
    done = subprocess.run([sys.executable, *check[1:]], capture_output=True, text=True)
    assert done.returncode != 0
    assert "not the CUDA 11.8 build: 2.6." in done.stderr


def test_base_image_and_python():
    """The image stands on RunPod's CUDA 11.8 base and calls its Python 3.11 `python`."""
    assert bodies("FROM")[0] == "runpod/base:0.6.3-cuda11.8.0 AS worker"
    assert "ln -sf /usr/bin/python3.11 /usr/local/bin/python " in run_with("ln -sf")


def test_dependencies_come_before_the_code():
    """A change of the code rebuilds neither the dependency layer nor the hub files."""
    steps = [f"{kind} {body}" for kind, body in instructions()]
    order = ["COPY requirements.txt", "RUN uv pip install", "RUN hf download", "COPY handler.py"]
    positions = [next(i for i, step in enumerate(steps) if step.startswith(start)) for start in order]
    assert positions == sorted(positions)
    assert not any("handler.py" in step for step in steps[: positions[2]])


def test_nothing_is_built_below_the_volume():
    """No path of the image lies below /runpod-volume, where the network volume would hide it."""
    hidden = [f"{kind} {body}" for kind, body in instructions() if "/runpod-volume" in body]
    assert hidden == []
    assert environment()["HF_HOME"].startswith("/opt/")
    assert environment()["HUGGINGFACE_HUB_CACHE"].startswith("/opt/")
    assert only(bodies("WORKDIR")) == "/worker"


def test_settings_point_at_the_folders_that_were_downloaded():
    """SDXL_CONFIG and VAE_MODEL are the folders that `hf download` fills, from pinned revisions."""
    downloads = [shlex.split(part) for part in run_with("hf download").split("&&") if "hf download" in part]
    folders = {words[2]: words[words.index("--local-dir") + 1] for words in downloads}
    assert environment()["SDXL_CONFIG"] == folders["stabilityai/stable-diffusion-xl-base-1.0"]
    assert environment()["VAE_MODEL"] == folders["madebyollin/sdxl-vae-fp16-fix"]
    for words in downloads:
        assert re.fullmatch(r"[0-9a-f]{40}", words[words.index("--revision") + 1])


HUB = {
    "stabilityai/stable-diffusion-xl-base-1.0": [
        "model_index.json",
        "tokenizer/merges.txt",
        "tokenizer_2/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "sd_xl_base_1.0.safetensors",
    ],
    "madebyollin/sdxl-vae-fp16-fix": [
        "README.md",
        "config.json",
        "diffusion_pytorch_model.bin",
        "diffusion_pytorch_model.safetensors",
        "sdxl_vae.safetensors",
    ],
}


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the Hugging Face hub that `hf download` talks to; a file's content is its own name."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        repo = next(name for name in HUB if name in self.path)
        revision = re.search("[0-9a-f]{40}", self.path)[0]
        if self.path.startswith("/api/"):
            siblings = [{"rfilename": name} for name in HUB[repo]]
            body = json.dumps({"id": repo, "sha": revision, "siblings": siblings}).encode()
        else:
            body = self.path.split(f"{revision}/")[1].encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", revision)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_hub_step_fetches_configuration_tokenizers_and_vae(tmp_path):
    """The step's own command, run against a hub on loopback, fetches the texts and the VAE, and no weights of SDXL."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    command = run_with("hf download").replace("/opt/", f"{tmp_path}/opt/")
    variables = {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "HF_HOME": f"{tmp_path}/opt/huggingface",
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_ENABLE_HF_TRANSFER": "1",  # as in the base image
    }
    try:
        done = subprocess.run(["bash", "-o", "pipefail", "-c", command], env=variables, capture_output=True, text=True)
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    fetched = {str(file.relative_to(tmp_path / "opt")) for file in (tmp_path / "opt").rglob("*") if file.is_file()}
    assert {file for file in fetched if "/.cache/" not in file} == {
        "stable-diffusion-xl-base-1.0/model_index.json",
        "stable-diffusion-xl-base-1.0/tokenizer/merges.txt",
        "stable-diffusion-xl-base-1.0/tokenizer_2/vocab.json",
        "stable-diffusion-xl-base-1.0/unet/config.json",
        "sdxl-vae-fp16-fix/config.json",
        "sdxl-vae-fp16-fix/diffusion_pytorch_model.safetensors",
    }


def test_process_one_is_python():
    """The command is a list, so no shell stands between RunPod's SIGTERM and the SDK."""
    command = json.loads(only(bodies("CMD")))
    assert command == ["python", "-u", "/worker/handler.py"]
    assert bodies("ENTRYPOINT") == []


def test_key_is_in_no_layer():
    """The key is a secret mount of the one step that downloads: no ARG, ENV or COPY could keep it."""
    step = run_with("CIVITAI_API_KEY")
    assert "--mount=type=secret,id=civitai,required=true" in step
    for kind, body in instructions():
        if kind in ("ARG", "ENV", "COPY", "ADD", "LABEL"):
            assert not re.search("civitai|key|secret|token", body, flags=re.IGNORECASE), body


def test_bake_step_leaves_a_store_that_needs_no_check(tmp_path, civitai, monkeypatch):
    """The step's own command fetches all ten models with the secret key; the copies that go into the image, whose times
    a layer can keep, count as untouched, so that a start in a container hashes nothing and asks nobody."""
    command = run_with("CIVITAI_API_KEY").split("target=/cache ")[1]
    for folder in ("/cache", "/models", "/run/secrets"):
        (tmp_path / folder[1:]).mkdir(parents=True)
        command = re.sub(rf"(?<=[=\s]){folder}(?=[\s/])", f"{tmp_path}{folder}", command)
    (tmp_path / "models").rmdir()
    (tmp_path / "run/secrets/civitai").write_text(civitai.key)
    variables = {"PATH": f"{BIN}:{os.environ['PATH']}", "CIVITAI_BASE_URL": civitai.url}
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert civitai.key not in done.stdout + done.stderr
    baked = [file for file in (tmp_path / "models").rglob("*") if file.is_file()]
    assert not any(civitai.key.encode() in file.read_bytes() for file in baked)
    models = [file for file in baked if file.suffix == ".safetensors"]
    assert len(models) == 1 + len(handler.LORA_CONFIGS)
    assert all(file.stat().st_mtime_ns % 10**9 == 0 and seams.recorded_hash(file) for file in models)
    monkeypatch.setenv("MODEL_CACHE_DIR", str(tmp_path / "models"))
    monkeypatch.setenv("CIVITAI_BASE_URL", "http://127.0.0.1:9")
    checkpoint, loras = handler.setup_models()
    assert {checkpoint, *loras.values()} == set(models)


def test_models_are_baked_on_demand_alone():
    """The final stage is chosen by BAKE_MODELS, 0 unless given, and only the stage for 1 copies the models."""
    assert "BAKE_MODELS=0" in bodies("ARG")
    assert bodies("FROM")[-1] == "worker-${BAKE_MODELS}"
    stages, name = {}, ""
    for kind, body in instructions():
        if kind == "FROM":
            name = body.split()[-1]
            stages[name] = []
        stages.get(name, []).append((kind, body))
    assert ("COPY", "--from=models /models /models") in stages["worker-1"]
    assert ("ENV", "MODEL_CACHE_DIR=/models") in stages["worker-1"]
    assert stages["worker-0"] == [("FROM", "worker AS worker-0")]


def test_build_context_is_what_the_dockerfile_copies():
    """.dockerignore lets through the copied files and nothing else."""
    allowed = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    copied = {source for body in bodies("COPY") if "--from" not in body for source in body.split()[:-1]}
    assert allowed[0] == "*"
    assert {line.removeprefix("!") for line in allowed[1:]} == copied
    assert all((ROOT / source).is_file() for source in copied)
