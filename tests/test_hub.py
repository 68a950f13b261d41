"""The RunPod Hub listing: .runpod/hub.json and .runpod/tests.json against the guide that RunPod publishes.

The field lists below are those of https://docs.runpod.io/hub/publishing-guide (and its GPU pools, at
https://docs.runpod.io/references/gpu-types#gpu-pools), as read in November 2026.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import seams

RUNPOD = Path(__file__).parent.parent / ".runpod"

# field -> (type, required for a GPU listing)
METADATA = {
    "title": (str, True),
    "description": (str, True),
    "type": (str, True),
    "category": (str, True),
    "iconUrl": (str, False),
    "config": (dict, True),
}
CONFIG = {
    "runsOn": (str, True),
    "containerDiskInGb": (int, True),
    "gpuCount": (int, True),
    "gpuIds": (str, True),
    "allowedCudaVersions": (list, False),
    "env": (list, False),
    "presets": (list, False),
}
CATEGORIES = {"audio", "embedding", "language", "video", "image"}
INPUT_TYPES = {"string": str, "number": (int, float), "boolean": bool, "huggingface": str}
INPUT_FIELDS = {"name", "type", "description", "default", "advanced"}
EXTRA_INPUT_FIELDS = {"string": {"options"}, "number": {"min", "max"}, "boolean": {"trueValue", "falseValue"}}
TEST = {"name": (str, True), "input": (dict, True), "timeout": (int, False)}
TEST_CONFIG = {
    "gpuTypeId": (str, True),
    "gpuCount": (int, True),
    "env": (list, False),
    "allowedCudaVersions": (list, False),
}
# pool -> the compute capabilities of its GPUs; ADA_32_PRO is the RTX 5090, which is Blackwell
POOLS = {
    "AMPERE_16": {8.6, 8.9},
    "AMPERE_24": {8.6, 8.9},
    "ADA_24": {8.9},
    "ADA_32_PRO": {12.0},
    "AMPERE_48": {8.6},
    "ADA_48_PRO": {8.9},
    "AMPERE_80": {8.0},
    "ADA_80_PRO": {9.0},
    "HOPPER_141": {9.0},
}
CUDA_VERSIONS = ["13.0", *(f"12.{minor}" for minor in range(9, -1, -1)), "11.8"]
TORCH_CU118_CAPABILITIES = {5.0, 6.0, 7.0, 7.5, 8.0, 8.6, 8.9, 9.0}  # 8.9 runs the kernels of 8.6


def load(name: str) -> dict[str, Any]:
    return json.loads((RUNPOD / name).read_text())


def check_fields(given: dict[str, Any], published: dict[str, tuple[type, bool]]) -> None:
    assert given.keys() <= published.keys()
    assert given.keys() >= {field for field, (_, required) in published.items() if required}
    for field, value in given.items():
        assert type(value) is published[field][0], field


@pytest.fixture
def hub() -> dict[str, Any]:
    return load("hub.json")


@pytest.fixture
def inputs(hub) -> dict[str, dict[str, Any]]:
    return {entry["key"]: entry["input"] for entry in hub["config"]["env"] if "input" in entry}


@pytest.fixture
def settings_of(monkeypatch) -> Callable[[dict[str, str]], Any]:
    """The settings of a worker that is started with these variables and no others."""

    def read(variables: dict[str, str]) -> Any:
        with monkeypatch.context() as environment:
            for name, value in variables.items():
                environment.setenv(name, value)
            return seams.settings()

    return read


def test_metadata_has_the_published_fields(hub):
    """hub.json describes a serverless image worker, with the published fields and no others."""
    check_fields(hub, METADATA)
    assert hub["type"] == "serverless"
    assert hub["category"] in CATEGORIES
    assert hub["category"] == "image"


def test_config_has_the_published_fields(hub):
    """The machine is described for a GPU with the published fields and no others."""
    check_fields(hub["config"], CONFIG)
    assert hub["config"]["runsOn"] == "GPU"
    assert hub["config"]["gpuCount"] == 1


def test_machines_can_run_torch_for_cuda_11_8(hub):
    """Every GPU pool has kernels in torch 2.6/cu118 (no Blackwell), and any driver from CUDA 11.8 on is allowed."""
    pools = hub["config"]["gpuIds"].split(",")
    assert pools
    for pool in pools:
        assert POOLS[pool] <= TORCH_CU118_CAPABILITIES, pool
    assert hub["config"]["allowedCudaVersions"] == CUDA_VERSIONS
    assert load("tests.json")["config"]["allowedCudaVersions"] == CUDA_VERSIONS


def test_environment_entries_have_a_published_form(hub, inputs):
    """Each variable is a static value or an input of a published type, with a default of that type."""
    for entry in hub["config"]["env"]:
        assert entry.keys() in ({"key", "value"}, {"key", "input"})
        assert re.fullmatch(r"[A-Z][A-Z0-9_]*", entry["key"])
    for key, field in inputs.items():
        assert field.keys() <= INPUT_FIELDS | EXTRA_INPUT_FIELDS.get(field["type"], set()), key
        assert field["name"] and field["description"], key
        assert isinstance(field["default"], INPUT_TYPES[field["type"]]), key


def test_inputs_cover_what_a_deployment_needs(inputs):
    """Key, checkpoint, LoRAs and bucket can be set from the deployment form."""
    bucket = {"BUCKET_ENDPOINT_URL", "BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY"}
    assert {"CIVITAI_API_KEY", "CHECKPOINT", "LORAS", *bucket} <= inputs.keys()


def form_values(inputs: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The environment of a worker whose owner pressed Deploy without touching the form."""
    booleans = {True: "trueValue", False: "falseValue"}
    return {
        key: field[booleans[field["default"]]] if field["type"] == "boolean" else str(field["default"])
        for key, field in inputs.items()
    }


def test_untouched_form_is_the_default_worker(inputs, settings_of):
    """A form sends its defaults as texts, and LORAS="" means no LoRAs: the form's defaults are the worker's."""
    deployed = settings_of(form_values(inputs))
    assert deployed == settings_of({})
    assert len(deployed.loras) == 9


def test_presets_are_valid_settings(hub, inputs, settings_of):
    """Every preset has a name and sets form inputs to values that the worker accepts."""
    for preset in hub["config"]["presets"]:
        assert preset.keys() == {"name", "defaults"}
        assert preset["defaults"].keys() <= inputs.keys()
        settings_of({**form_values(inputs), **preset["defaults"]})


def test_tests_have_the_published_fields():
    """tests.json has test cases and a machine, with the published fields and no others."""
    tests = load("tests.json")
    assert tests.keys() == {"tests", "config"}
    assert tests["tests"]
    for case in tests["tests"]:
        check_fields(case, TEST)
    check_fields(tests["config"], TEST_CONFIG)
    assert all(entry.keys() == {"key", "value"} for entry in tests["config"]["env"])


def test_jobs_of_the_listing_are_jobs_of_the_worker(settings_of):
    """The worker accepts every test case as it stands, under the test machine's settings.

    RunPod fills {{ RUNPOD_SECRET_name }} in: https://docs.runpod.io/pods/templates/environment-variables
    """
    tests = load("tests.json")
    variables = {entry["key"]: entry["value"] for entry in tests["config"]["env"]}
    assert variables["CIVITAI_API_KEY"] == "{{ RUNPOD_SECRET_CIVITAI_API_KEY }}"
    settings = settings_of({**variables, "CIVITAI_API_KEY": "0123456789abcdef"})
    for case in tests["tests"]:
        assert seams.parse(case["input"], settings).prompt == case["input"]["prompt"]
