"""Runs of several processes are the run of one: the same losses, the same state, the same codes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
import worker
from conftest import Ranks
from safetensors.torch import load_file

import bellbox as bb
from bellbox.evaluation.codes import compare_codes
from bellbox.nn import quantized_layers
from bellbox.runs.config import (
    BatchSection,
    DistributedSection,
    MecSection,
    OptimizerSection,
    PhasesSection,
    QuantizationSection,
    TrainConfig,
)
from bellbox.runs.metrics import read_records
from bellbox.runs.open import load_run
from bellbox.training import train

STEPS = 3
METHODS: dict[str, dict[str, Any]] = {
    "bbq": {},
    "paper": {"quantization": QuantizationSection(method="bbq_paper")},
    "ema": {"quantization": QuantizationSection(granularity="ema")},
    "quest": {"quantization": QuantizationSection(method="quest")},
    "lsq": {"quantization": QuantizationSection(method="lsq")},
    "kmeans": {
        "quantization": QuantizationSection(
            method="kmeans", weight_only="int8", options={"refit_every": 2, "fisher": True}
        )
    },
    "cewt": {"quantization": QuantizationSection(method="cewt")},
    "muon": {"optimizer": OptimizerSection(kind="muon", muon_dtype="fp32")},
}


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def config(tokens: Path, folder: Path, mode: str = "none", **changes: Any) -> TrainConfig:
    section = DistributedSection(mode=mode, **changes.pop("distributed", {}))  # pyright: ignore[reportArgumentType]
    base = dataclasses.replace(
        tiny_run.config(tokens, folder), batch=BatchSection(8 * tiny_run.CONTEXT, 2), steps=STEPS,
        eval_every=STEPS, checkpoint_every=STEPS, distributed=section,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


@pytest.fixture(scope="session")
def alone(tokens: Path, runs: Path) -> Any:
    """`alone("bbq")`: the folder of the run of one process, made once."""

    def make(name: str, **changes: Any) -> Path:
        folder = runs / f"{name}-alone"
        if not folder.exists():
            train(config(tokens, folder, **{**METHODS.get(name, {}), **changes}), show=False)
        return folder

    return make


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_records(folder / "metrics.jsonl")]


def tensors(folder: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    at = folder / "checkpoints" / f"step-{step:08d}"
    return {**load_file(at / "model.safetensors"), **load_file(at / "optimizer.safetensors")}


def assert_same_run(ours: Path, theirs: Path) -> None:
    assert losses(ours) == pytest.approx(losses(theirs), rel=0, abs=1e-5)
    mine, other = tensors(ours), tensors(theirs)
    assert mine.keys() == other.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", METHODS)
def test_two_and_four_processes_are_one(
    ranks: Ranks, tokens: Path, runs: Path, alone: Any, method: str, mode: str
) -> None:
    reference = alone(method)
    for size in (2, 4):
        folder = runs / f"{method}-{mode}-{size}"
        found = ranks.do(size, "train", config=config(tokens, folder, mode, **METHODS[method]).to_dict())
        assert [one["step"] for one in found] == [STEPS] * size
        assert max(one["synchronised"] for one in found) == 0.0
        assert_same_run(folder, reference)
        here, there = (quantized_layers(load_run(each).model) for each in (folder, reference))
        for (name, layer), (_, other) in zip(here, there, strict=True):
            assert torch.equal(layer.weight_codes(), other.weight_codes()), name


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_one_process_under_a_launcher_is_one(
    ranks: Ranks, tokens: Path, runs: Path, alone: Any, mode: str
) -> None:
    folder = runs / f"bbq-{mode}-1"
    ranks.do(1, "train", config=config(tokens, folder, mode).to_dict())
    assert_same_run(folder, alone("bbq"))


def test_the_packed_model_of_a_sharded_run_has_the_codes_of_one_process(
    ranks: Ranks, tokens: Path, runs: Path, alone: Any
) -> None:
    folder = runs / "packed"
    ranks.do(4, "train", config=config(tokens, folder, "fsdp").to_dict())
    ours, theirs = (load_run(each).model for each in (folder, alone("bbq")))
    packed, other = bb.convert(ours), bb.convert(theirs)
    inputs = torch.arange(16)[None]
    assert compare_codes(ours.eval(), packed, inputs).all_equal  # pyright: ignore[reportAttributeAccessIssue]
    for (name, value), (_, wanted) in zip(packed.named_buffers(), other.named_buffers(), strict=True):
        if name.endswith("packed"):
            assert torch.equal(value, wanted), name
