"""A table is made of what the grid asks for, whatever else ever ran."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bellbox.comparison import Results, load_grid, summarise, tables
from bellbox.comparison.plan import Plan
from bellbox.comparison.selection import keep, kept
from bellbox.comparison.summary import Study
from bellbox.errors import BellboxError

Run = Callable[..., Study]


@pytest.fixture
def run(grid, finished, tmp_path: Path) -> Run:
    """`run(rows={...}, loss=lambda run: ...)`: run a grid into one folder, as it were; the table that follows."""

    def go(loss: Callable[[Any], float | None], *, until: int = 100, **keys: Any) -> Study:
        results = Results(tmp_path)
        plan = Plan(load_grid(grid(**keys)), results)
        keep(tmp_path, plan)
        while (missing := plan.missing()) and until:
            value = loss(missing[0])
            results.add(finished(missing[0], value, perplexity=value))
            until -= 1
        (study,) = summarise(Results(tmp_path).all, kept(tmp_path))
        for cell, summary in zip(plan.grid.cells, study.summaries, strict=False):
            rate = plan._best(cell)
            assert rate is None or rate == summary.lr
        assert study.missing is not None
        assert (study.missing == 0) == (not plan.missing())
        return study

    return go


def block_of(run: Any) -> float:
    return float(run.config.quantization.block)


def test_a_row_that_is_edited_and_reverted_shows_its_own_results(run: Run) -> None:
    for block in (64, 32, 64):
        study = run(block_of, rows={"BBQ": {"quantization": {"block": block}}})
        assert [summary.values for summary in study.summaries] == [{0: block}]
    assert study.left_out == 1


def test_rates_that_are_not_asked_for_any_more_do_not_win(run: Run) -> None:
    losses = {1e-3: 3.0, 2e-3: 2.0, 4e-3: 1.0}
    wide = run(lambda one: losses[one.lr], rows={"a": {}}, lr=[1e-3, 2e-3, 4e-3], seeds=[0])
    assert wide.summaries[0].lr == 4e-3
    study = run(lambda one: losses[one.lr] + one.seed, rows={"a": {}}, lr=[1e-3, 2e-3], seeds=[0, 1, 2])
    (summary,) = study.summaries
    assert summary.lr == 2e-3
    assert summary.values == {0: 2.0, 1: 3.0, 2: 4.0}
    assert list(summary.tried) == [1e-3, 2e-3]


def test_the_first_seed_that_is_asked_for_chooses_the_rate(run: Run) -> None:
    losses = {(1e-3, 0): 1.0, (2e-3, 0): 2.0, (1e-3, 5): 4.0, (2e-3, 5): 3.0, (2e-3, 6): 3.5}
    run(lambda one: losses[one.lr, one.seed], rows={"a": {}}, lr=[1e-3, 2e-3], seeds=[0])
    study = run(lambda one: losses[one.lr, one.seed], rows={"a": {}}, lr=[1e-3, 2e-3], seeds=[5, 6])
    (summary,) = study.summaries
    assert (summary.lr, summary.values) == (2e-3, {5: 3.0, 6: 3.5})


def test_rows_come_in_the_grids_order_and_removed_ones_are_gone(run: Run) -> None:
    run(lambda _: 1.0, rows={"a": {}, "b": {}})
    study = run(lambda _: 1.0, rows={"full": {"quantization": {"method": "none"}}, "b": {}})
    assert [summary.row for summary in study.summaries] == ["full", "b"]
    assert study.left_out == 1
    assert "1 older results are left out" in tables.markdown([study])


def test_another_budget_starts_the_table_anew_though_its_rows_are_not_there_yet(run: Run) -> None:
    run(lambda _: 1.0, rows={"a": {}, "b": {}}, steps=4)
    study = run(lambda _: 2.0, rows={"a": {}, "b": {}}, steps=5, until=1)
    assert [(summary.row, summary.values) for summary in study.summaries] == [("a", {0: 2.0})]
    assert "Not finished: 1 of the runs" in tables.markdown([study])


def test_a_grid_without_any_run_yet_is_an_empty_table(run: Run) -> None:
    run(lambda _: 1.0, rows={"a": {}}, steps=4)
    study = run(lambda _: 1.0, rows={"a": {}}, steps=5, until=0)
    assert study.summaries == ()
    assert "Measured" not in tables.markdown([study])


def test_runs_of_unequal_batches_stand_in_one_table(run: Run) -> None:
    rows = {"a": {}, "b": {"batch": {"tokens": 128}}}
    study = run(lambda _: 1.0, rows=rows, over={"steps": None, "tokens": 200})
    assert [summary.row for summary in study.summaries] == ["a", "b"]
    assert study.left_out == 0


def test_where_all_rates_failed_nothing_more_is_to_come(run: Run) -> None:
    study = run(lambda _: None, rows={"a": {}}, lr=[1e-3, 2e-3], seeds=[0, 1])
    assert study.missing == 0
    assert len(study.summaries[0].errors) == 2


def test_studies_without_a_kept_grid_are_taken_from_their_last_results(result) -> None:
    (study,) = summarise([result()])
    assert study.missing is None
    assert "No grid is kept beside these results" in tables.markdown([study])


def test_a_grid_may_name_the_row_that_differences_are_to(run: Run, tmp_path: Path) -> None:
    rows = {
        "full": {"quantization": {"method": "none"}},
        "BBQ": {},
        "LSQ": {"quantization": {"method": "lsq"}},
    }
    losses = {"full": 1.0, "BBQ": 2.0, "LSQ": 4.0}

    def differences(study: Study) -> list[float | None]:
        return [s.difference and s.difference.value for s in study.summaries]

    study = run(lambda one: losses[one.cell.row], rows=rows, against="BBQ")
    assert study.baseline == "BBQ"
    assert differences(study) == [-1.0, None, 2.0]
    (study,) = summarise(Results(tmp_path).all, kept(tmp_path), against="LSQ")  # which goes before the grid's
    assert differences(study) == [-3.0, -2.0, None]
    study = run(lambda one: losses[one.cell.row], rows=rows)
    assert study.baseline == "full"


@pytest.mark.parametrize(
    "text", ['{"cells": [3]}', '{"cells": []}', "{}", '{"cells": [{"lrs": [1], "seeds": [0]}]}']
)
def test_a_damaged_grid_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "grids").mkdir()
    (tmp_path / "grids" / "small.json").write_text(text)
    with pytest.raises(BellboxError, match=r"small.json: damaged; remove it, or run its grid again"):
        kept(tmp_path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda cell: cell.update(lrs="fast"),
        lambda cell: cell.update(lrs=[]),
        lambda cell: cell.update(seeds=[0.5]),
        lambda cell: cell.update(config={"steps": "many"}),
        lambda cell: cell.update(config=3),
        lambda cell: cell.pop("row"),
    ],
)
def test_a_kept_grid_that_is_damaged_is_refused_by_name(
    run: Run, tmp_path: Path, spoil: Callable[..., Any]
) -> None:
    run(lambda _: 2.0, rows={"BBQ": {}})
    (file,) = (tmp_path / "grids").glob("*.json")
    content = json.loads(file.read_text())
    spoil(content["cells"][0])
    file.write_text(json.dumps(content))
    with pytest.raises(BellboxError, match=rf"{file.name}: damaged; remove it, or run its grid again"):
        kept(tmp_path)


def test_a_kept_grid_whose_row_to_compare_with_is_none_of_its_rows_is_refused(
    run: Run, tmp_path: Path
) -> None:
    run(lambda _: 2.0, rows={"BBQ": {}}, against="BBQ")
    (file,) = (tmp_path / "grids").glob("*.json")
    content = json.loads(file.read_text())
    for wrong in ("LSQ", 3, ["BBQ"]):
        file.write_text(json.dumps({**content, "against": wrong}))
        with pytest.raises(BellboxError, match=r"damaged; remove it, or run its grid again"):
            kept(tmp_path)
