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
from processes import Ranks
from safetensors.torch import load_file

import bellbox as bb
from bellbox.evaluation.codes import agreement
from bellbox.nn import quantized_layers
from bellbox.runs.config import (
    AverageSection,
    BatchSection,
    CheckpointSection,
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
    "drawn": {"quantization": QuantizationSection(nested=[4, 3, 1], nested_schedule="draw")},
    "summed": {"quantization": QuantizationSection(nested=[3, 1], nested_schedule="sum")},
}

SELDOM = ("summed", "lsq", "kmeans", "cewt", "quest", "ema")
"""Methods that take their turn in `make test-slow`: the ways of the processes are those of the others."""


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def config(tokens: Path, folder: Path, mode: str = "none", **changes: Any) -> TrainConfig:
    section = DistributedSection(mode=mode, **changes.pop("distributed", {}))  # pyright: ignore[reportArgumentType]
    base = dataclasses.replace(
        tiny_run.config(tokens, folder), batch=BatchSection(8 * tiny_run.CONTEXT, 2), steps=STEPS,
        eval_every=STEPS, checkpoint_every=STEPS, distributed=section,
        checkpoint=CheckpointSection(kind="whole"),
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


def assert_same_run(ours: Path, theirs: Path, flips: bool = False) -> None:
    """`flips`: torch sums another number of rows in another order on some processors, which moves LSQ's learned scales
    by a last bit, and with a scale its thresholds: a code flips now and then, and moves the loss by some 1e-4."""
    assert losses(ours)[0] == pytest.approx(losses(theirs)[0], rel=0, abs=1e-5)
    assert losses(ours) == pytest.approx(losses(theirs), rel=0, abs=1e-3 if flips else 1e-5)
    mine, other = tensors(ours), tensors(theirs)
    assert mine.keys() == other.keys()
    for name, value in mine.items():
        difference = (value.double() - other[name].double()).abs()
        # AdamW divides by the root of the second moment: where a gradient is next to nothing, its last bit is not.
        far = difference > 1e-5 + 1e-4 * other[name].double().abs()
        assert flips or far.double().mean() <= 0.005, name
        assert difference.max() <= (1e-2 if flips else 1e-4), name


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    "method",
    [pytest.param(name, marks=[pytest.mark.slow] if name in SELDOM else []) for name in METHODS],
)
def test_two_and_four_processes_are_one(
    ranks: Ranks, tokens: Path, runs: Path, alone: Any, method: str, mode: str
) -> None:
    reference = alone(method)
    for size in (2, 4):
        folder = runs / f"{method}-{mode}-{size}"
        found = ranks.do(size, "train", config=config(tokens, folder, mode, **METHODS[method]).to_dict())
        assert [one["step"] for one in found] == [STEPS] * size
        assert max(one["synchronised"] for one in found) == 0.0
        assert_same_run(folder, reference, flips=method == "lsq")
        here, there = (quantized_layers(load_run(each).model) for each in (folder, reference))
        for (name, layer), (_, other) in zip(here, there, strict=True):
            differ = (layer.weight_codes() != other.weight_codes()).double().mean()
            assert differ <= (1e-2 if method == "lsq" else 0), name


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
    assert agreement(ours, packed, [inputs]).holds
    for (name, value), (_, wanted) in zip(packed.named_buffers(), other.named_buffers(), strict=True):
        if name.endswith("packed"):
            assert torch.equal(value, wanted), name


def test_the_batch_of_a_step_does_not_depend_on_the_number_of_processes(
    ranks: Ranks, tokens: Path, tmp_path: Path
) -> None:
    """One process of micro-batches of 8 becomes four of 2: the same global batch, in the same order."""
    section = BatchSection(8 * tiny_run.CONTEXT, 8)
    found = {}
    for size in (1, 2, 4):
        wanted = config(tokens, tmp_path / "run", "ddp", batch=section).to_dict()
        shares = ranks.do(size, "same_batch", config=wanted)
        found[size] = [[token for share in shares for token in share[step]] for step in range(3)]
    assert found[1] == found[2] == found[4]
    assert len(found[1][0]) == 8 * tiny_run.CONTEXT


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_smaller_micro_batches_of_more_processes_change_nothing(
    ranks: Ranks, tokens: Path, runs: Path, alone: Any, mode: str
) -> None:
    """A gradient that is divided by the size of its micro-batch is divided as one process would."""
    section = {"batch": BatchSection(8 * tiny_run.CONTEXT, 8)}
    folder = runs / f"micro-{mode}"
    ranks.do(4, "train", config=config(tokens, folder, mode, **section).to_dict())
    assert_same_run(folder, alone("micro", **section))


def test_hybrid_sharding_and_activations_that_are_computed_again_change_nothing(
    ranks: Ranks, tokens: Path, runs: Path, alone: Any
) -> None:
    """Two machines of two processes each; running scales would move twice where a block runs twice."""
    folder = runs / "hybrid"
    section = {"shard": "node", "checkpoint_activations": True}
    wanted = config(tokens, folder, "fsdp", distributed=section, **METHODS["ema"])
    ranks.do(4, "train", config=wanted.to_dict(), per_node=2)
    assert_same_run(folder, alone("ema"))


def test_a_process_of_fsdp_holds_a_part(ranks: Ranks, tokens: Path, runs: Path) -> None:
    """Weights, gradients and moments: counted byte by byte."""
    held = {}
    for mode in ("ddp", "fsdp"):
        wanted = config(tokens, runs / f"bytes-{mode}", mode, steps=1, eval_every=1, checkpoint_every=1)
        held[mode] = ranks.do(2, "train", config=wanted.to_dict())
    for rank in range(2):
        assert held["fsdp"][rank]["bytes"] <= 0.6 * held["ddp"][rank]["bytes"]


@pytest.mark.parametrize(("first", "then"), [(("fsdp", 4), ("ddp", 2)), (("ddp", 2), ("fsdp", 4))])
def test_a_run_goes_on_with_other_processes(
    ranks: Ranks, tokens: Path, runs: Path, alone: Any, first: tuple[str, int], then: tuple[str, int]
) -> None:
    folder = runs / f"on-{first[0]}"
    changes = {**METHODS["muon"], "eval_every": 2, "checkpoint_every": 2}
    ranks.do(first[1], "train", config=config(tokens, folder, first[0], **changes).to_dict(), crash_after=2)
    assert not (folder / "checkpoints" / f"step-{STEPS:08d}").exists()
    ranks.do(then[1], "train", config=config(tokens, folder, then[0], **changes).to_dict())
    reference = alone("muon-often", **changes)
    assert_same_run(folder, reference)


PHASES = {
    "full precision first": PhasesSection(quantized=2 / 3),
    "4 bits first": PhasesSection(bits_before=[4], shares=[1 / 3, 2 / 3]),
}


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("full precision first", "ddp"),
        ("4 bits first", "fsdp"),
        pytest.param("full precision first", "fsdp", marks=pytest.mark.slow),
        pytest.param("4 bits first", "ddp", marks=pytest.mark.slow),
    ],
)
def test_phases_go_on(ranks: Ranks, tokens: Path, runs: Path, alone: Any, name: str, mode: str) -> None:
    """Weights come together, get other quantizers, are shared out again; and a run cut after that goes on."""
    changes = {"phases": PHASES[name], "mec": MecSection(weight=0.0), "checkpoint_every": 2}
    folder = runs / f"{name}-{mode}"
    wanted = config(tokens, folder, mode, **changes).to_dict()
    ranks.do(2, "train", config=wanted, crash_after=2)
    assert not (folder / "checkpoints" / f"step-{STEPS:08d}").exists()
    ranks.do(2, "train", config=wanted)
    assert_same_run(folder, alone(name, **changes))


@pytest.mark.parametrize(
    ("size", "changes", "expected"),
    [
        (
            3,
            {"distributed": DistributedSection(mode="ddp")},
            "8 sequences a step do not divide among 3 processes",
        ),
        (
            4,
            {"distributed": DistributedSection(mode="fsdp", shard=3)},
            "groups of 3 processes do not divide 4",
        ),
        (2, {"distributed": DistributedSection(mode="none")}, "distributed.mode is none, but 2 processes"),
        (
            2,
            {"distributed": DistributedSection(mode="fsdp"), "average": AverageSection(last=0.5)},
            "average.last keeps a second model whole",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_all(
    ranks: Ranks, tokens: Path, tmp_path: Path, size: int, changes: dict[str, Any], expected: str
) -> None:
    wanted = dataclasses.replace(config(tokens, tmp_path / "run"), **changes)
    with pytest.raises(RuntimeError, match=f"BellboxError .*{expected}"):
        ranks.do(size, "train", config=wanted.to_dict())
    assert not (tmp_path / "run" / "checkpoints").exists()
    # and the processes are there for the next job
    assert ranks.do(2, "own_ddp", calibrated=True)[1]["synchronised"] == 0.0


def test_scales_of_a_loop_of_ones_own_never_differ_between_processes(ranks: Ranks) -> None:
    with pytest.raises(RuntimeError, match=r"call bb\.calibrate"):
        ranks.do(2, "own_ddp", calibrated=False)
    assert [one["synchronised"] for one in ranks.do(2, "own_ddp", calibrated=True)] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("method", "options", "ball"),
    [
        ("bbq", {"weight_granularity": "row", "weights_rotated": False}, False),
        ("bbq", {"weight_granularity": "tensor", "weights_rotated": False}, True),
        ("lsq", {}, False),
        ("kmeans", {"weight_only": "float"}, False),
    ],
    ids=["row", "tensor", "learned", "group"],
)
def test_ten_rows_on_three_processes(ranks: Ranks, method: str, options: dict[str, Any], ball: bool) -> None:
    """Rows that do not divide: scales a row, a tensor and a group are those of whole weights."""
    model, data = worker.small(method, options)
    bb.calibrate(model, [data])
    worker.run(model, data, ball)
    wanted = worker.codes_of(model)
    for found in ranks.do(3, "own_fsdp", method=method, options=options, ball=ball):
        assert found["synchronised"] == 0.0
        assert found["codes"] == wanted
    assert json.dumps(wanted).count(",") > 300
