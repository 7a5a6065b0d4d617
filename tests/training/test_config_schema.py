"""The JSON schema for editors, and the configuration itself, let the same numbers and keys pass."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from bellbox.errors import BellboxError
from bellbox.runs.config import TrainConfig
from bellbox.runs.config_file import config_from_dict, read_layers
from bellbox.runs.schema import config_schema

jsonschema = pytest.importorskip("jsonschema", reason="jsonschema, of the extra dev: what editors check with")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def schema() -> Any:
    found = config_schema()
    jsonschema.Draft202012Validator.check_schema(found)
    return jsonschema.Draft202012Validator(found)


def test_the_defaults_and_the_papers_configurations_pass(schema: Any) -> None:
    schema.validate(TrainConfig().to_dict() | {"quantization": {}})
    schema.validate(json.loads(json.dumps(TrainConfig().to_dict())))
    read = 0
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        if "rows" in yaml.safe_load(path.read_text()):
            continue  # a grid of `bellbox compare`
        schema.validate(yaml.safe_load(path.read_text()))
        config_from_dict(read_layers(path))
        read += 1
    assert read >= 10


@pytest.mark.parametrize(
    "data",
    [
        {"steps": 0},
        {"log_every": 10**12 + 1},
        {"threads": 0},
        {"seed": 2**63},
        {"data": {"seed": -1}},
        {"data": {"context": 0}},
        {"phases": {"quantized": 0}},
        {"phases": {"quantized": "best"}},
        {"phases": {"bits_before": [4, 9]}},
        {"phases": {"shares": [0.5, 1.0]}},
        {"optimizer": {"lr": 0}},
        {"optimizer": {"betas": [0.9, 1.0]}},
        {"optimizer": {"cewt": {"lr": 1}}},
        {"optimizer": {"kind": "sgd"}},
        {"optimizer": {"learning_rate": 1e-3}},
        {"mec": {"experts": 0}},
        {"schedule": {"end_factor": 1.5}},
        {"distill": {"teacher": "runs/full", "weight": 0}},
        {"task": "vision", "vision": {"batch": 1}},
        {"task": "vision", "vision": {"crop": 257}},
        {"model": {"preset": 3}},
        {"modle": {"preset": "tiny"}},
    ],
)
def test_what_one_refuses_the_other_refuses(schema: Any, data: dict[str, Any]) -> None:
    assert not schema.is_valid(data)
    with pytest.raises(BellboxError):
        config_from_dict(data)


def test_the_ends_of_the_limits_belong_to_both(schema: Any) -> None:
    for data in (
        {"phases": {"quantized": 1}, "optimizer": {"weight_decay": 0, "clip": 0}, "log_every": 10**12},
        {"phases": {"quantized": "optimal", "bits_before": [8, 1]}, "schedule": {"end_factor": 1}},
        {"model": {"from": "folder"}, "seed": -(2**63)},
        {"task": "vision", "model": {"preset": "resnet-small"}, "vision": {"crop": 256, "batch": 2}},
    ):
        schema.validate(data)
        config_from_dict(data)


def test_every_number_of_the_configuration_is_finite() -> None:
    for section, key in (("optimizer", "eps"), ("mec", "weight"), ("vision", "cutmix")):
        for value in (float("inf"), float("nan")):
            with pytest.raises(BellboxError, match=f"{section}.{key} is {value}, must be .* and finite"):
                config_from_dict(
                    {"task": "vision", "model": {"preset": "resnet-small"}, section: {key: value}}
                )


def test_every_key_says_what_it_is(schema: Any) -> None:
    sections = {"TrainConfig": schema.schema, **schema.schema["$defs"]}
    for name, section in sections.items():
        for key, described in section["properties"].items():
            assert described.get("description") or "$ref" in described, f"{name}.{key}"


def test_the_command_prints_it_or_writes_it(tmp_path: Path) -> None:
    run = [sys.executable, "-m", "bellbox", "schema"]
    printed = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert json.loads(printed) == config_schema()
    subprocess.run([*run, "--out", str(tmp_path / "s.json")], check=True)
    assert (tmp_path / "s.json").read_text() == printed
