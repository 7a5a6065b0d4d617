from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path

import pytest

from bellbox.comparison import Results, load_grid, summarise, tables
from bellbox.comparison.plan import Plan
from bellbox.comparison.results import Result, identity
from bellbox.errors import BellboxError
from bellbox.runs.config import CewtSection, OptimizerSection, QuantizationSection
from bellbox.training import TrainConfig, arithmetic
from bellbox.utils import processor


def test_what_is_added_is_read_again_and_half_a_line_is_cut_away(tmp_path: Path, result) -> None:
    results = Results(tmp_path)
    results.add(result(seed=0))
    with results.path.open("a") as file:
        file.write('{"study": "cut sho')
    again = Results(tmp_path)
    assert again.all == results.all
    again.add(result(seed=1))
    assert [one.seed for one in Results(tmp_path).all] == [0, 1]


def test_a_line_that_is_no_result_is_refused_by_number(tmp_path: Path, result) -> None:
    results = Results(tmp_path)
    results.add(result())
    with results.path.open("a") as file:
        file.write('{"study": 3}\n')
    with pytest.raises(BellboxError, match="line 2 is not a result"):
        Results(tmp_path)


def test_identity_ignores_how_a_run_is_watched_and_heeds_what_it_computes() -> None:
    config = TrainConfig().to_dict()
    key = identity(config, "d")
    assert identity({**config, "folder": "elsewhere", "eval_every": 7, "threads": 3}, "d") == key
    assert identity({**config, "data": {**config["data"], "source": "moved"}}, "d") == key
    # A line written before a key existed counts as having its default.
    older = json.loads(json.dumps(config))
    del older["optimizer"]["eps"], older["compile"]
    assert identity(older, "d") == key
    # A budget in tokens is that in steps.
    assert identity({**config, "steps": 10}, "d") == identity({**config, "tokens": 10 * 8192 - 5}, "d") != key
    assert identity(config, "other") != key
    full = {**config, "quantization": {**config["quantization"], "method": "none"}}
    assert (
        identity({**full, "quantization": {**full["quantization"], "bits": 3}}, "d")
        == identity(full, "d")
        != key
    )
    rounded = [
        identity({**full, "quantization": {**full["quantization"], "embedding_bits": b}}, "d") for b in (4, 8)
    ]
    assert len({identity(full, "d"), *rounded}) == 3  # layers in full precision, embeddings not
    assert identity({**config, "seed": 1}, "d") != key


def test_the_rates_come_first_then_the_other_seeds_at_the_best_one(grid, tmp_path: Path, finished) -> None:
    file = grid(rows={"a": {}, "b": {"lr": [0.1]}}, bits=[2], seeds=[0, 1, 2], lr=[0.01, 0.02])
    results = Results(tmp_path)
    plan = Plan(load_grid(file), results)
    losses = {0.01: 3.0, 0.02: 2.5, 0.1: None}
    order = []
    while missing := plan.missing():
        run = missing[0]
        order.append((run.cell.row, run.lr, run.seed))
        results.add(finished(run, losses[run.lr]))
    # Row b diverged at its only rate, so its other seeds are not tried.
    assert order == [("a", 0.01, 0), ("a", 0.02, 0), ("b", 0.1, 0), ("a", 0.02, 1), ("a", 0.02, 2)]
    assert [plan.is_hopeless(cell) for cell in plan.grid.cells] == [False, True]


def test_auto_is_one_precision_for_a_study_wherever_it_goes_on(
    grid, tmp_path: Path, finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BELLBOX_ISA", raising=False)
    monkeypatch.setattr(processor, "_features", lambda: frozenset())
    file = grid(rows={"a": {}, "b": {"precision": "bf16"}}, over={"precision": "auto"}, seeds=[0, 1])
    results = Results(tmp_path)
    first, pinned = Plan(load_grid(file), results).missing()
    assert (first.config.precision, pinned.config.precision) == ("fp32", "bf16")
    # What was recorded before there was a choice says bf16, as its own key or not at all.
    config = {**first.config.to_dict(), "precision": "bf16"}
    recorded = identity(config, first.data)
    del config["precision"]
    assert identity(config, first.data) == recorded != first.key
    earlier = dataclasses.replace(finished(first, 2.0), config={**config, "precision": "bf16"})
    results.add(earlier)
    again = Plan(load_grid(file), results)
    assert [(run.cell.row, run.seed) for run in again.missing()] == [("b", 0), ("a", 1)]
    assert again.missing()[1].config.precision == "bf16"


def test_training_on_integers_is_one_choice_for_a_study_wherever_it_goes_on(
    grid, tmp_path: Path, finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {
        "a": {},
        "b": {"quantization": {"method": "lsq"}},
        "c": {"quantization": {"integer_forward": True}},
    }
    file, results = load_grid(grid(rows=rows, seeds=[0, 1])), Results(tmp_path)

    def chosen() -> dict[str, bool | None]:
        wanted = {cell.row: Plan(file, results).wanted(cell, cell.lrs[0], 0) for cell in file.cells}
        return {row: run.config.quantization.integer_forward for row, run in wanted.items()}

    for there in (True, False):
        monkeypatch.setattr(arithmetic, "on_kernels", lambda device, there=there: there)
        assert chosen() == {"a": there, "b": False, "c": True}
    # A line of before there was a choice was trained on floats, and the study goes on so.
    first = Plan(file, results).missing()[0]
    config = first.config.to_dict()
    del config["quantization"]["integer_forward"]
    assert identity(config, first.data) == first.key
    results.add(dataclasses.replace(finished(first, 2.0), config=config))
    monkeypatch.setattr(arithmetic, "on_kernels", lambda device: True)
    assert chosen() == {"a": False, "b": False, "c": True}


def test_a_run_known_from_another_study_is_found_and_a_failed_one_is_not(
    grid, tmp_path: Path, finished
) -> None:
    results = Results(tmp_path)
    run = Plan(load_grid(grid(rows={"a": {}})), results).missing()[0]
    other = Plan(load_grid(grid("second", rows={"renamed": {}})), results)
    results.add(finished(run, None, error="out of luck"))
    assert other.elsewhere(other.missing()[0]) is None
    assert results.drop_failed({run.key}) == 1
    results.add(finished(run, 2.0))
    found = other.elsewhere(other.missing()[0])
    assert found is not None
    assert found.row == "a"
    assert Results(tmp_path).all == results.all


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"study": "../../up"}, "study '../../up' is no name"),
        ({"study": "a\nb"}, "is no name"),
        ({"study": ".hidden"}, "is no name"),
        ({"row": "x" * 300}, "is no name"),
        ({"row": "a\u2028\\input{b}"}, "is no name"),
        ({"lr": "1e-3"}, "lr: "),
        ({"seed": 1.5}, "seed: "),
        ({"config": {"steps": "many"}}, "steps"),
        ({"config": [1]}, "config: "),
        ({"history": [{"step": 1}]}, "0.tokens"),
        ({"gamma": {"up": {"low": 0.0, "high": 1.0, "counts": [0] * 20_000}}}, "up.counts"),
        ({"loss": float("nan")}, "NaN is no number"),
        ({"extra": 1}, "unknown key 'extra'"),
        ({"parts": {"unit": "pages", "sizes": [1], "losses": [1.0]}}, "unit"),
        ({"parts": {"unit": "images", "sizes": [1, 2], "losses": [1.0]}}, "different lengths"),
        ({"parts": {"unit": "images", "sizes": [1], "losses": [1.0], "right": []}}, "different lengths"),
        ({"parts": {"unit": "documents", "sizes": [0], "losses": [1.0]}}, "sizes.0"),
        ({"parts": {"unit": "documents", "sizes": [10**400], "losses": [1.0]}}, "sizes.0"),
        ({"parts": {"unit": "documents", "sizes": [1] * 2000, "losses": [1.0] * 2000}}, "sizes"),
    ],
)
def test_what_a_line_says_is_no_path_and_no_markup(
    tmp_path: Path, change: dict[str, object], said: str
) -> None:
    good = Result("study", "BBQ", 2, 1e-3, 0, {}, {"steps": 2}, "data")
    (tmp_path / "results.jsonl").write_text(json.dumps(vars(good)) + "\n")
    assert Results(tmp_path).all == [good]
    (tmp_path / "results.jsonl").write_text(json.dumps(vars(good) | change) + "\n")
    with pytest.raises(BellboxError, match="line 1 is not a result") as caught:
        Results(tmp_path)
    assert said in str(caught.value)


def test_a_full_disk_names_the_file_and_half_a_line_is_no_result(tmp_path: Path, result, monkeypatch) -> None:
    results = Results(tmp_path)
    results.add(result())

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device") as caught:
            results.add(result(seed=1))
    assert caught.value.filename == str(results.path)
    assert results.all == [result()]


def test_a_hyperballs_rate_that_an_old_line_leaves_open_is_the_run_of_its_number() -> None:
    for method, rate in (("bbq", 0.02), ("cewt", 0.01)):
        open_, said, other = (
            TrainConfig(
                quantization=QuantizationSection(method=method),
                optimizer=OptimizerSection(cewt=CewtSection(lr=lr)),
            ).to_dict()
            for lr in (None, rate, 0.03)
        )
        assert identity(open_, "") == identity(said, "") != identity(other, "")


@pytest.mark.parametrize(
    "section", ["steps", "tokens", "batch", "data", "quantization", "vision", "optimizer"]
)
def test_a_line_without_a_section_counts_as_having_its_defaults(tmp_path: Path, result, section: str) -> None:
    whole = result(config=TrainConfig(precision="bf16").to_dict())
    lines = [json.loads(json.dumps(dataclasses.asdict(whole))) for _ in range(2)]
    del lines[1]["config"][section]
    told = []
    for number, line in enumerate(lines):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "results.jsonl").write_text(json.dumps(line) + "\n")
        told.append(tables.markdown(summarise(Results(folder).all)))
    assert told[0] == told[1]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_results_are_read_from_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "results.jsonl")
    with pytest.raises(BellboxError, match="is a pipe, not a regular file"):
        Results(tmp_path)
