"""Settings and the model table."""

import dataclasses
import re
from pathlib import Path

import pytest
import seams

import handler


def settings(monkeypatch, **environ):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    return seams.settings()


def test_table():
    """The model table is the contract's: version ids, scales, file names, and the queries of the URLs."""
    assert handler.CHECKPOINT_CONFIG["url"] == (
        "https://civitai.com/api/download/models/1590699?type=Model&format=SafeTensor&size=pruned&fp=fp16"
    )
    urls = [
        re.fullmatch(r"https://civitai\.com/api/download/models/(\d+)\?type=Model&format=SafeTensor", config["url"])
        for config in handler.LORA_CONFIGS
    ]
    rows = [(url[1], c["scale"], c["filename"]) for url, c in zip(urls, handler.LORA_CONFIGS, strict=True)]
    assert rows == [
        ("135867", 1.5, "detail_tweaker_xl.safetensors"),
        ("294259", 1.0, "hand_detail_flux_xl.safetensors"),
        ("348625", 0.3, "boring_reality_v3.safetensors"),
        ("348837", 0.4, "boring_reality_v4.safetensors"),
        ("1051156", 1.0, "epicrealism_xl_kiss.safetensors"),
        ("1242203", 1.0, "dramatic_lighting_slider.safetensors"),
        ("1253021", 3.0, "pony_realism_slider.safetensors"),
        ("1594293", 1.0, "amateur_style_slider.safetensors"),
        ("1681921", 1.0, "real_skin_slider.safetensors"),
    ]


@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        *[
            ("Hand Detail FLUX & XL", "hand_detail_flux_xl"),
            ("Amateur style - slider (Pony)", "amateur_style_slider_pony"),
        ],
        *[("Boring Reality primaryV3.0", "boring_reality_primaryv3_0"), ("", "adapter"), ("é日本", "adapter")],
        *[("__A..b__", "a_b"), ("a\nb", "a_b"), ("²", "adapter")],
    ],
)
def test_sanitize_name(name, adapter):
    """An adapter name holds [0-9a-z] and single underscores, none at its ends, and is never empty."""
    assert handler.sanitize_name(name) == adapter


def test_adapter_names_are_unique(monkeypatch):
    """A name taken in the stack gets _2, _3."""
    configs = [handler.LORA_CONFIGS[0] | {"name": name} for name in ("A", "a!", "(a)", "A 2", "")]
    seams.set(monkeypatch, LORA_CONFIGS=configs)
    assert list(settings(monkeypatch).stack) == ["a", "a_2", "a_3", "a_2_2", "adapter"]


def test_defaults(monkeypatch, tmp_path):
    """Nothing set: Civitai, ./models, two jobs in flight, 9.5 MB, no bucket, CPU allowed outside RunPod."""
    seams.set_volume(monkeypatch, tmp_path / "no volume")
    found = settings(monkeypatch)
    assert found.civitai_base_url == "https://civitai.com"
    assert found.checkpoint_dir == Path("models/checkpoints") and found.lora_dir == Path("models/loras")
    assert (found.jobs_in_flight, found.max_response_bytes, found.bucket) == (2, 9_500_000, None)
    assert found.allow_cpu and not settings(monkeypatch, RUNPOD_WEBHOOK_GET_JOB="http://127.0.0.1/x").allow_cpu


def test_the_store_is_on_the_volume(monkeypatch, tmp_path):
    """Where a volume is mounted, its folder models holds the store; MODEL_CACHE_DIR comes first."""
    volume = tmp_path / "volume"
    volume.mkdir()
    seams.set_volume(monkeypatch, volume)
    assert settings(monkeypatch).lora_dir == volume / "models" / "loras"
    assert settings(monkeypatch, MODEL_CACHE_DIR="elsewhere").lora_dir == Path("elsewhere/loras")


@pytest.mark.parametrize("place", ["a file in the way", "/proc"])
def test_a_volume_that_cannot_be_written_to(monkeypatch, tmp_path, caplog, place):
    """Its folder can be there without a volume (RunPod's model cache lies below it): the store is ./models then, and a
    line says so. Nobody, root neither, can make a folder in /proc or where a file is."""
    volume = tmp_path / "volume" if place != "/proc" else Path(place)
    if place != "/proc":
        volume.mkdir()
        (volume / "models").write_text("")
    seams.set_volume(monkeypatch, volume)
    assert settings(monkeypatch).checkpoint_dir == Path("models/checkpoints")
    assert f"{volume} cannot be written to" in caplog.text and "./models" in caplog.text


def test_stack_settings(monkeypatch):
    """CHECKPOINT and LORAS take version ids: known ones keep their names, an empty LORAS is no stack."""
    found = settings(monkeypatch, CHECKPOINT="77", LORAS="135867@1.5, 294259,88@-.5")
    assert (found.checkpoint["name"], found.checkpoint["filename"]) == ("civitai_77", "civitai_77.safetensors")
    assert found.checkpoint["url"].startswith("https://civitai.com/api/download/models/77?")
    assert [(c["name"], c["scale"]) for c in found.loras] == [
        *[("Detail Tweaker XL", 1.5), ("Hand Detail FLUX & XL", 1.0), ("civitai_88", -0.5)]
    ]
    assert settings(monkeypatch, LORAS=" ").loras == []
    assert settings(monkeypatch, LORAS="1253021").loras[0]["scale"] == 1.0
    assert settings(monkeypatch, CHECKPOINT="1590699").checkpoint == handler.CHECKPOINT_CONFIG


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("CHECKPOINT", "jib mix", "CHECKPOINT must be a Civitai model version id such as 1590699, got 'jib mix'"),
        ("LORAS", "135867@big", "got '135867@big'"),
        ("LORAS", "0", "got '0'"),
        ("CHECKPOINT", "0a1b2c3d4e5f60718293a4b5c6d7e8f9", "got an address, a key or another long text"),
        ("LORAS", "135867@11", "scale from -10 to 10"),
        ("LORAS", "135867@nan", "got '135867@nan'"),
        ("MAX_RESPONSE_MB", "nan", "MAX_RESPONSE_MB must be a number from 0.01 to 1000, got 'nan'"),
        ("JOBS_IN_FLIGHT", "0", "JOBS_IN_FLIGHT must be a whole number from 1 to 16, got '0'"),
        ("JOBS_IN_FLIGHT", "1.5", "got '1.5'"),
        ("ALLOW_CPU", "maybe", "ALLOW_CPU must be 1 or 0, got 'maybe'"),
        ("CIVITAI_BASE_URL", "civitai.com", "CIVITAI_BASE_URL must be an address such as https://civitai.com"),
        ("CIVITAI_API_KEY", "two words", "CIVITAI_API_KEY must be one word"),
        ("BUCKET_ENDPOINT_URL", "http://x", "missing: BUCKET_ACCESS_KEY_ID, BUCKET_SECRET_ACCESS_KEY"),
    ],
)
def test_wrong_settings(monkeypatch, name, value, rule):
    """A wrong setting is every job's SETUP_FAILED with its name, its rule and its value, and ends the worker."""
    monkeypatch.setenv(name, value)
    answer = handler.handler({"input": {"prompt": "a cat"}})
    assert (answer["code"], answer["refresh_worker"]) == ("SETUP_FAILED", True)
    assert rule in answer["error"]


def test_secrets_stay_out_of_reprs(monkeypatch):
    """Neither the Civitai key nor the bucket's secrets show in the settings' repr."""
    bucket = {
        "BUCKET_ENDPOINT_URL": "http://x",
        "BUCKET_ACCESS_KEY_ID": "canary1",
        "BUCKET_SECRET_ACCESS_KEY": "canary2",
    }
    found = settings(monkeypatch, CIVITAI_API_KEY="canary0", **bucket)
    assert (found.civitai_api_key, found.bucket.secret_access_key) == ("canary0", "canary2")
    assert "canary" not in repr(found) and "canary" not in repr(dataclasses.replace(found, torch_compile=True))
