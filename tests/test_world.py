"""The tests' own ground: the model world is SDXL in all but its weights, the server is Civitai in all that matters."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import numpy as np
import pytest
import requests
import torch
from civitai_server import CivitaiServer, Fault
from safetensors.torch import load_file
from transformers import CLIPTokenizer
from world import (
    API_KEY,
    LORAS,
    PREFIXES,
    Weight,
    World,
    build_world,
    lora_targets,
    original_shapes,
    weights,
    write_lora,
)

import handler

KEYED = {"Authorization": f"Bearer {API_KEY}", "User-Agent": "sdxl-worker/1.0"}


@pytest.fixture(scope="module")
def pipe(world: World) -> diffusers.StableDiffusionXLPipeline:
    """The world's pipeline as diffusers loads it."""
    pipe = diffusers.StableDiffusionXLPipeline.from_single_file(
        str(world.checkpoint), config=str(world.config), torch_dtype=torch.float32, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: diffusers.StableDiffusionXLPipeline, prompt: str, seed: int = 0) -> np.ndarray:
    """An image as signed integers, for differences."""
    options = {"width": 128, "height": 128, "num_inference_steps": 2, "guidance_scale": 4.5}
    image = pipe(prompt, generator=torch.Generator().manual_seed(seed), **options).images[0]
    return np.asarray(image).astype(int)


@pytest.fixture(scope="module")
def plain(pipe) -> np.ndarray:
    """An image without LoRAs."""
    return draw(pipe, "a cat")


def written(checkpoint: dict[str, torch.Tensor], weight: Weight) -> torch.Tensor:
    """The part of the single file that this weight of the pipeline must be equal to."""
    tensor = checkpoint[weight.original]
    if ".in_proj_" in weight.original:
        tensor = tensor.chunk(3)["qkv".index(weight.name.split("self_attn.")[1][0])]
    if weight.original.endswith("text_projection"):
        tensor = tensor.T
    return tensor.reshape(weight.shape).float()


def test_every_weight_of_the_loaded_pipeline_is_the_one_written(world: World, pipe) -> None:
    """from_single_file finds each of the tensors under its original name, whole and in its place."""
    checkpoint = load_file(world.checkpoint)
    loaded = {c: getattr(pipe, c).state_dict() for c in ("unet", "vae", "text_encoder", "text_encoder_2")}
    for w in weights("tiny"):
        assert torch.equal(loaded[w.component].pop(w.name), written(checkpoint, w)), w
    assert not any(loaded.values())


def test_full_size_has_the_keys_and_bytes_of_a_real_checkpoint() -> None:
    """2,514 tensors, 6.94 GB in float16, and the 986 linear modules that Kohya's LoRAs reach."""
    shapes = original_shapes("full")
    assert len(shapes) == 2514
    assert round(sum(2 * int(np.prod(s)) for s in shapes.values()) / 1e9, 2) == 6.94
    assert [len(lora_targets("full", [part], "linear")) for part in PREFIXES] == [722, 72, 192]


def test_a_world_follows_from_its_seed(world: World, tmp_path: Path) -> None:
    """Built again it has the same bytes; another seed gives other weights; a draft that was left behind is ignored."""
    (tmp_path / ".tiny-0-draft" / "store").mkdir(parents=True)
    again, other = build_world(tmp_path), build_world(tmp_path, seed=1)
    assert again.folder.name == world.folder.name
    for path in again.files.values():
        assert path.read_bytes() == (world.folder / path.relative_to(again.folder)).read_bytes()
    assert again.checkpoint.read_bytes() != other.checkpoint.read_bytes()


def test_tokenizers_give_clips_own_ids(world: World) -> None:
    """The vocabulary is the real one; tokenizer_2 pads with "!", which makes each "!" a token of its own there."""
    one, two = (CLIPTokenizer.from_pretrained(world.config / name) for name in ("tokenizer", "tokenizer_2"))
    assert one("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert one("a photo of a cat").input_ids == two("a photo of a cat").input_ids
    assert one("a", padding="max_length").input_ids[3:] == [49407] * 74
    assert two("a", padding="max_length").input_ids[3:] == [0] * 74
    assert (one("wow!!!").input_ids[1:-1], two("wow!!!").input_ids[1:-1]) == ([2781, 995], [2781, 0, 0, 0])
    assert len(one) == 49408


def test_images_depend_on_prompt_and_seed(pipe) -> None:
    """A tiny random model still answers to its last word and to its seed, and is neither black nor flat."""
    cat = draw(pipe, "a photo of a cat")
    assert cat.std() > 20
    assert abs(cat - draw(pipe, "a photo of a dog")).max() > 8
    assert abs(cat - draw(pipe, "a photo of a cat", seed=1)).mean() > 8
    assert np.array_equal(cat, draw(pipe, "a photo of a cat"))


@pytest.mark.parametrize("index", range(len(LORAS)), ids=lambda i: handler.LORA_CONFIGS[i]["filename"])
def test_each_lora_changes_the_image_at_its_table_scale(world: World, pipe, plain, index: int) -> None:
    """diffusers loads every one of the nine, all its modules find a place, and the image shows it."""
    path, lora = world.loras[index], LORAS[index]
    pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="one")
    try:
        pipe.set_adapters("one", handler.LORA_CONFIGS[index]["scale"])
        placed = sum(name.endswith("lora_A.one.weight") for name, _ in all_parameters(pipe))
        assert placed == len(lora_targets("tiny", lora.parts, lora.modules))
        assert abs(plain - draw(pipe, "a cat")).mean() > 2
    finally:
        pipe.unload_lora_weights()
    assert np.array_equal(plain, draw(pipe, "a cat"))


def all_parameters(pipe) -> list[tuple[str, torch.nn.Parameter]]:
    """Parameters of the components that LoRAs change."""
    return [pair for part in PREFIXES for pair in getattr(pipe, part).named_parameters()]


def test_the_three_ways_of_writing_a_lora_mean_the_same(pipe, tmp_path: Path) -> None:
    """Kohya, PEFT and diffusers names reach the same modules."""
    names = []
    for style in ("kohya", "peft", "diffusers"):
        write_lora(tmp_path / f"{style}.safetensors", style)
        pipe.load_lora_weights(str(tmp_path), weight_name=f"{style}.safetensors", adapter_name="one")
        names.append([name for name, _ in all_parameters(pipe) if "lora_" in name])
        pipe.unload_lora_weights()
    assert names[0] and names[0] == names[1] == names[2]


# ---------------------------------------------------------------------------------------------------------------------
# the server


@pytest.fixture
def served(tmp_path: Path):
    """A server with one file of 100,000 bytes, version 7."""
    (tmp_path / "model.safetensors").write_bytes(np.random.default_rng(0).bytes(100_000))
    with CivitaiServer({7: tmp_path / "model.safetensors"}, key=API_KEY) as server:
        yield server


def get(server: CivitaiServer, path: str = "/api/download/models/7", **headers: str) -> requests.Response:
    """A keyed GET that follows redirects as requests does."""
    return requests.get(server.url + path, headers=KEYED | headers, timeout=10)


def test_download_goes_through_a_redirect_that_drops_the_key(served: CivitaiServer) -> None:
    """307 to another host name, where the file comes back whole; the key went to the first host only."""
    answer = get(served)
    assert answer.content == served.files[7].read_bytes()
    assert [r.status_code for r in answer.history] == [307]
    assert served.requests_of("api")[0].authorization == KEYED["Authorization"]
    assert served.requests_of("cdn")[0].authorization == ""
    assert served.bytes_sent("cdn") == 100_000


def test_the_signed_host_refuses_a_key_and_old_links(served: CivitaiServer) -> None:
    """400 with an Authorization header, 403 with a wrong signature or when the link has expired."""
    assert requests.get(served.signed_url(7), headers=KEYED, timeout=10).status_code == 400
    assert requests.get(served.signed_url(7) + "x", timeout=10).status_code == 403
    served.link_s = -1
    assert requests.get(served.signed_url(7), timeout=10).status_code == 403


@pytest.mark.parametrize(
    ("agent", "status", "kind"), [("sdxl-worker/1.0", 401, "application/json"), ("Mozilla/5.0", 200, "text/html")]
)
def test_without_a_key_browsers_get_a_page_and_others_an_error(served, agent: str, status: int, kind: str) -> None:
    """The trap that saves HTML as a model."""
    answer = get(served, **{"Authorization": "Bearer wrong", "User-Agent": agent})
    assert (answer.status_code, answer.headers["Content-Type"]) == (status, kind)


def test_ranges_come_as_partial_content(served: CivitaiServer) -> None:
    """206 with Content-Range; 416 behind the end; the whole file when If-Range names another ETag; HEAD is refused."""
    part = get(served, Range="bytes=10-19")
    assert part.status_code == 206 and part.content == served.files[7].read_bytes()[10:20]
    assert part.headers["Content-Range"] == "bytes 10-19/100000"
    assert get(served, Range="bytes=99990-").content == served.files[7].read_bytes()[-10:]
    assert get(served, Range="bytes=100000-").status_code == 416
    assert get(served, **{"Range": "bytes=10-19", "If-Range": part.headers["ETag"]}).status_code == 206
    assert get(served, **{"Range": "bytes=10-19", "If-Range": '"old"'}).status_code == 200
    assert requests.head(served.url + "/api/download/models/7", timeout=10).status_code == 405


def test_the_version_page_names_hash_and_size(served: CivitaiServer) -> None:
    """The primary file is not the first of the list; the hash is upper case."""
    files = get(served, "/api/v1/model-versions/7").json()["files"]
    (primary,) = [file for file in files if file["primary"]]
    assert files[0] is not primary
    assert primary["hashes"]["SHA256"] == hashlib.sha256(served.files[7].read_bytes()).hexdigest().upper()
    assert primary["sizeKB"] == 100_000 / 1024


def test_faults_happen_in_turn_and_wear_off(served: CivitaiServer) -> None:
    """A cut connection, a reset, a 503 with a header, a flipped byte and a login page; then all is well."""
    served.faults[7] = [
        Fault(cut_after=5000),
        Fault(cut_after=5000, reset=True),
        Fault(status=503, headers={"Retry-After": "1"}),
        Fault(flip_at=7),
        Fault(html=True),
        Fault(ignore_range=True),
        Fault(short_range=4),
    ]
    for _ in range(2):
        with pytest.raises(requests.RequestException):
            get(served)
    assert get(served).headers["Retry-After"] == "1"
    good = served.files[7].read_bytes()
    assert [i for i, (a, b) in enumerate(zip(get(served).content, good, strict=True)) if a != b] == [7]
    assert get(served).text.startswith("<!DOCTYPE html>")
    assert get(served, Range="bytes=0-9").content == good
    assert get(served, Range="bytes=0-9").content == good[:6]
    assert get(served, Range="bytes=0-9").content == good[:10]


def test_rate_limits_one_connection(served: CivitaiServer) -> None:
    """100,000 bytes at 500,000 a second take a fifth of a second."""
    served.rate = 500_000
    start = time.monotonic()
    get(served)
    assert time.monotonic() - start >= 0.19


def test_importing_handler_is_cheap() -> None:
    """The world may import handler.py for its tables: that brings no torch."""
    code = "import handler, sys; sys.exit('torch' in sys.modules)"
    root = Path(handler.__file__).parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
