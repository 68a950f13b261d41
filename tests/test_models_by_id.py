"""Jobs that name LoRAs and embeddings by Civitai's version ids: pictures, answers, recipes, refusals."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import seams
from civitai_server import CivitaiServer, Fault
from PIL import Image
from world import API_KEY, World, write_bad_lora, write_lora, write_tensors

import handler

SMALL = {"prompt": "a lighthouse", "width": 256, "height": 256, "steps": 2, "seed": 7, "loras": []}
FILM, TILT, WORDY, COPY, UNUSED, MOOD, BROKEN, GONE = 1001, 1002, 1003, 1004, 1005, 2001, 3001, 4001
STRIPES = {"civitai": FILM, "scale": 0.8}


def vectors(count: int, seed: int) -> dict[str, np.ndarray]:
    """An embedding for the tiny encoders."""
    random = np.random.default_rng(seed)
    widths = {"clip_l": 32, "clip_g": 64}
    return {part: random.standard_normal((count, width)).astype(np.float16) for part, width in widths.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Version id -> file, of models that the worker does not have."""
    origin = tmp_path_factory.mktemp("origin")
    files = {
        FILM: write_lora(origin / "film.safetensors", strength=0.5),
        TILT: write_lora(origin / "tilt.safetensors", style="peft", strength=0.5, seed=2),
        UNUSED: write_lora(origin / "unused.safetensors", seed=3),
        MOOD: write_tensors(origin / "badMood.safetensors", vectors(3, seed=1)),
        BROKEN: write_bad_lora(origin / "broken.safetensors", "sd15"),
    }
    bundled = {f"bundle_emb.wordy.{part}": tensor for part, tensor in vectors(2, seed=4).items()}
    weak = {f"lora_unet_out_2.lora_{way}.weight": np.zeros(shape, np.float16) for way, shape in WEAK.items()}
    return files | {WORDY: write_tensors(origin / "wordy.safetensors", weak | bundled)}


@pytest.fixture
def server(
    world: World, pipe, models: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[CivitaiServer]:
    """Civitai with these models; jobs bring them into a store of their own."""
    kinds = {FILM: "LORA", TILT: "LORA", WORDY: "LORA", BROKEN: "LORA", MOOD: "TextualInversion"}
    with CivitaiServer(dict(models), key=API_KEY) as server:
        server.kinds.update(kinds)
        for name, folder in (("LORA_DIR", "loras"), ("MODEL_CACHE_DIR", "store")):
            monkeypatch.setenv(name, str(tmp_path / folder))
        monkeypatch.setenv("CIVITAI_BASE_URL", server.url)
        with seams.engine_with_settings():
            yield server


WEAK = {"down": (1, 16, 3, 3), "up": (4, 1, 1, 1)}


def answer(**fields) -> dict:
    return handler.handler({"id": "test", "input": {**SMALL, **fields}})


def picture(reply: dict) -> np.ndarray:
    assert "error" not in reply, reply
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(reply["images"][0]))), dtype=int)


def recipe(reply: dict) -> str:
    return Image.open(io.BytesIO(base64.b64decode(reply["images"][0]))).text["parameters"]


def test_a_lora_by_id_is_fetched_and_drawn_with(server):
    """The picture changes by the scale; the answer and the recipe name the LoRA; nothing of it is left in the next."""
    plain = picture(answer())
    reply = answer(loras=[STRIPES])
    assert reply["metadata"]["loras"] == [{"name": f"civitai_{FILM}", "scale": 0.8}]
    assert reply["metadata"]["warnings"] == [] and reply["metadata"]["timings"]["models"] >= 0
    with_lora = picture(reply)
    assert np.abs(with_lora - plain).mean() > 1
    assert np.abs(picture(answer(loras=[STRIPES | {"scale": -0.8}])) - with_lora).mean() > 1
    assert np.array_equal(picture(answer()), plain)
    assert f'"modelVersionId":{FILM}' in recipe(reply) and f'Lora hashes: "civitai_{FILM}: ' in recipe(reply)


def test_a_configured_file_and_one_by_id_draw_the_same(server, world, monkeypatch):
    """What a job names by id is what the same file does in the stack, by its name there too."""
    name = "pony_realism_slider"
    in_stack = picture(answer(loras=[{"name": name, "scale": 2}]))
    server.files[COPY] = world.files[1253021]
    assert np.abs(picture(answer(loras=[{"civitai": COPY, "scale": 2}])) - in_stack).max() <= 2
    server.clear()
    by_id = answer(loras=[{"civitai": 1253021, "scale": 2}])
    assert by_id["metadata"]["loras"] == [{"name": name, "scale": 2.0}] and server.requests == []
    assert np.array_equal(picture(by_id), in_stack)


def test_a_stack_of_names_and_ids(server):
    """Names, ids, AIRs and tags go together, in any order."""
    air = {"air": f"urn:air:sdxl:lora:civitai:77@{TILT}", "scale": 0.5}
    given = [{"name": "real_skin_slider"}, STRIPES, air]
    first, second = answer(loras=given), answer(loras=given[::-1])
    names = {"real_skin_slider": 1.0, f"civitai_{FILM}": 0.8, f"civitai_{TILT}": 0.5}
    assert {item["name"]: item["scale"] for item in first["metadata"]["loras"]} == names
    assert np.abs(picture(first) - picture(second)).max() <= 1
    tagged = answer(loras=[STRIPES], prompt=f"a lighthouse <lora:civitai_{FILM}:0.3>")
    assert tagged["metadata"]["loras"] == [{"name": f"civitai_{FILM}", "scale": 0.3}]


def test_an_embedding_by_id(server):
    """A prompt uses it by the name that the job gives, else by its file's; without it the words are words again."""
    words = picture(answer(prompt="a lighthouse, badMood"))
    reply = answer(prompt="a lighthouse, badMood", embeddings=[{"civitai": MOOD}])
    assert reply["metadata"]["embeddings"] == [{"name": "badMood", "civitai": MOOD}]
    used = picture(reply)
    assert not np.array_equal(used, words)
    named = answer(prompt="a lighthouse, embedding:gloom", embeddings=[{"civitai": MOOD, "name": "Gloom"}])
    assert np.array_equal(picture(named), used)
    assert np.array_equal(picture(answer(prompt="a lighthouse, badMood")), words)
    assert 'TI hashes: "badMood: ' in recipe(reply) and f'"modelVersionId":{MOOD}' in recipe(reply)


def test_names_of_embeddings_in_recipes(server):
    """A title is a name where the prompt has it as a whole word, whatever its case, and for one embedding alone."""
    embed = '{"type":"embed","modelVersionId":%d,"modelName":"%s"}'
    for prompt, titles, names in (
        ("a badMood_XL", ["badMood"], [None]),
        ("a (BADMOOD:1.2)", ["badMood"], ["badMood"]),
        ("a zneg", ["zneg", "zneg"], ["zneg", None]),
    ):
        resources = ",".join(embed % (i + 1, title) for i, title in enumerate(titles))
        text = f"{prompt}\nSteps: 2, Sampler: Euler, Size: 256x256, Civitai resources: [{resources}]"
        assert [item.name for item in seams.parse({"parameters": text}).embeddings] == names


def test_the_case_of_an_embeddings_name_does_not_count(server):
    """In another case the vectors are used too, and the recipe draws the same picture."""
    first = answer(prompt="a GLOOM", embeddings=[{"civitai": MOOD, "name": "gloom"}])
    again = handler.handler({"id": "test", "input": {"parameters": recipe(first)}})
    assert np.array_equal(picture(again), picture(first))
    assert not np.array_equal(picture(answer(prompt="a GLOOM")), picture(first))


def test_loras_of_scale_0_are_not_kept(server):
    """A LoRA that a job switches off is not taken into the stack."""
    reply = answer(loras=[{"civitai": UNUSED, "scale": 0}])
    assert reply["metadata"]["loras"] == [] and f"civitai_{UNUSED}" not in seams.engine().stack.loras


def test_an_embedding_that_a_lora_brings_along(server):
    """Its name is a word where the LoRA is not in the job, and an embedding where it is."""
    words = picture(answer(prompt="wordy"))
    used = answer(prompt="wordy", loras=[{"civitai": WORDY, "scale": 1}])
    assert used["metadata"]["warnings"] == [] and not np.array_equal(picture(used), words)
    assert np.array_equal(picture(answer(prompt="wordy")), words)


def test_recipes_with_models_by_id_draw_the_same_picture(server):
    """A picture's recipe, posted back alone, fetches what it names and gives the same pixels."""
    embeddings = [{"civitai": MOOD, "name": "gloom"}]
    first = answer(prompt="(gloom:1.2) over the sea", loras=[STRIPES], embeddings=embeddings)
    second = handler.handler({"id": "test", "input": {"parameters": recipe(first)}})
    assert second["metadata"]["warnings"] == [] and np.array_equal(picture(second), picture(first))
    assert recipe(second) == recipe(first)


def test_what_a_recipe_names_and_cannot_be_had_is_left_out(server):
    """A recipe's model that is gone, or is no LoRA, is a warning; a job that names it itself fails by its code."""
    resources = (
        f'[{{"type":"lora","weight":0.8,"modelVersionId":{FILM}}},{{"type":"lora","weight":1,"modelVersionId":{GONE}}},'
        f'{{"type":"embed","modelVersionId":{BROKEN}}}]'
    )
    text = (
        f"a lighthouse\nSteps: 2, Sampler: Euler, CFG scale: 4, Seed: 7, Size: 256x256, Civitai resources: {resources}"
    )
    reply = handler.handler({"id": "test", "input": {"parameters": text}})
    assert reply["metadata"]["loras"] == [{"name": f"civitai_{FILM}", "scale": 0.8}]
    gone, broken = reply["metadata"]["warnings"]
    assert str(GONE) in gone and "left out" in gone and str(BROKEN) in broken and "left out" in broken
    for fields, code, told in (
        ({"loras": [{"civitai": GONE}]}, "DOWNLOAD_FAILED", "404"),
        ({"loras": [{"civitai": BROKEN}]}, "INVALID_INPUT", "Stable Diffusion 1"),
        ({"embeddings": [{"civitai": FILM}]}, "INVALID_INPUT", "LORA"),
        ({"loras": [{"civitai": MOOD}]}, "INVALID_INPUT", "TextualInversion"),
    ):
        failure = answer(**fields)
        assert (failure["code"], "refresh_worker" in failure) == (code, False)
        assert told in failure["error"] and str(next(iter(fields.values()))[0]["civitai"]) in failure["error"]
    assert "error" not in answer()


def test_models_are_fetched_while_another_job_has_the_gpu(server):
    """The download does not wait for the job's turn."""
    answer()
    done = threading.Event()
    with seams.gpu():
        thread = threading.Thread(target=lambda: (answer(loras=[STRIPES]), done.set()))
        thread.start()
        while not server.requests_of("cdn", FILM) or not all(request.done for request in server.requests):
            assert not done.wait(0.01)
        assert not done.is_set()
    thread.join()
    assert done.is_set()


def test_host_memory_for_jobs_loras_is_bounded(server, monkeypatch):
    """What does not fit is forgotten, the least recently used first, and read again from its file for the next job."""
    seams.set(monkeypatch, JOB_LORAS_BYTES=1)
    first = picture(answer(loras=[STRIPES]))
    picture(answer(loras=[{"civitai": TILT}]))
    held = seams.engine().stack.loras
    assert f"civitai_{FILM}" not in held and f"civitai_{TILT}" in held
    server.clear()
    assert np.array_equal(picture(answer(loras=[STRIPES])), first) and server.requests == []


def test_a_stopped_job_does_not_wait_for_its_models(server):
    """A job that is stopped while it fetches ends at once; the next job finds all in order."""
    answer()
    server.faults[TILT] = [Fault("cdn", delay_s=20)]
    started = time.monotonic()
    reply = seams.run_and_stop({"id": "test", "input": SMALL | {"loras": [{"civitai": TILT}]}}, after_s=0.5)
    assert reply["code"] == "STOPPED" and time.monotonic() - started < 15
    assert "error" not in answer()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"loras": [{"civitai": 0}]}, ["loras[0].civitai", "from 1"]),
        ({"loras": [{"civitai": "../x"}]}, ["loras[0].civitai", "whole number"]),
        ({"loras": [{"civitai": 1.5}]}, ["loras[0].civitai", "whole number"]),
        ({"loras": [{"civitai": True}]}, ["loras[0].civitai", "whole number"]),
        ({"loras": [{"civitai": 10**12}]}, ["loras[0].civitai", "9999999999"]),
        ({"loras": [{"civitai": 5, "name": "a"}]}, ["one of name and civitai"]),
        ({"loras": [{"name": None}]}, ["loras[0].name", "text"]),
        ({"embeddings": [{"civitai": 5, "name": "a"}, {"civitai": 6, "name": "A"}]}, ["twice"]),
        ({"loras": [{"civitai": 5}, {"civitai": "5"}]}, ["version 5", "twice"]),
        ({"loras": [{"civitai": 5, "scale": 11}]}, ["loras[0].scale", "-10 to 10"]),
        ({"loras": [{"civitai": 5, "weight": 1}]}, ["loras[0]", "unknown field", "weight"]),
        ({"loras": [{"air": "urn:air:sd1:lora:civitai:1@2"}]}, ["loras[0].air", "SDXL"]),
        ({"loras": [{"air": "urn:air:sdxl:checkpoint:civitai:1@2"}]}, ["loras[0].air", "urn:air:sdxl:lora"]),
        ({"loras": [{"air": "urn:air:sdxl:lora:elsewhere:1@2"}]}, ["loras[0].air"]),
        ({"loras": [{"air": 5}]}, ["loras[0].air"]),
        ({"loras": [{"civitai": i + 1} for i in range(65)]}, ["at most 64", "65"]),
        ({"embeddings": {"civitai": 5}}, ["embeddings", "list"]),
        ({"embeddings": [{"name": "a"}]}, ["embeddings[0]", "civitai"]),
        ({"embeddings": [{"civitai": 5, "name": "two words"}]}, ["embeddings[0].name", "one word"]),
        ({"embeddings": [{"civitai": 5, "scale": 1}]}, ["embeddings[0]", "scale"]),
        ({"embeddings": [{"air": "urn:air:sdxl:lora:civitai:1@2"}]}, ["embeddings[0].air", "embedding"]),
        ({"embeddings": [{"civitai": 5}, {"civitai": 5}]}, ["version 5", "twice"]),
    ],
)
def test_refusals(pipe, fields, told):
    """An entry that cannot be meant is refused before anything is asked of Civitai, with its place and the rule."""
    reply = answer(**fields)
    assert reply["code"] == "INVALID_INPUT"
    assert all(word in reply["error"] for word in told), reply["error"]


def test_switched_off(pipe, monkeypatch):
    """JOB_MODELS_GB=0: a job may name none by id, but for those of the stack, and a recipe's are a warning."""
    monkeypatch.setenv("JOB_MODELS_GB", "0")
    for fields in ({"loras": [STRIPES]}, {"embeddings": [{"civitai": MOOD}]}):
        reply = answer(**fields)
        assert reply["code"] == "INVALID_INPUT" and "JOB_MODELS_GB" in reply["error"]
    assert seams.parse(SMALL | {"loras": [{"civitai": 135867}]}).loras == {"detail_tweaker_xl": 1.5}
    text = 'a\nSteps: 2, Sampler: Euler, Size: 256x256, Civitai resources: [{"type":"lora","modelVersionId":9}]'
    assert any("'lora' 9" in warning for warning in seams.parse({"parameters": text}).warnings)
