"""A row of nested widths: one run, a result and a line of the table for each width."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bellbox.comparison import Results, load_grid, run_grid, summarise
from bellbox.comparison.plan import Plan
from bellbox.comparison.selection import kept
from bellbox.errors import BellboxError

NESTED = {"quantization": {"nested": [4, 1], "nested_schedule": "sum"}}


@pytest.mark.slow
def test_one_run_brings_a_row_for_each_width(grid, tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="scipy, of the extra cli: `bellbox compare` asks for it")
    file, out = grid(rows={"nested": NESTED}, steps=2, bits=[2]), tmp_path / "out"
    cells = load_grid(file).cells
    assert [(cell.label, cell.is_nested) for cell in cells] == [
        ("nested, 4 bits", True),
        ("nested, 1 bits", True),
    ]
    outcome = run_grid(load_grid(file), out, show=False, keep_runs=True)
    assert (outcome.done, outcome.failed) == (2, 0)
    assert len(list((out / "runs").iterdir())) == 1
    wide, narrow = Results(out).all
    assert (wide.bits, narrow.bits) == (4.0, 1.0)
    record = [
        json.loads(line) for line in next((out / "runs").glob("*/metrics.jsonl")).read_text().splitlines()
    ][-1]
    for result, bits in ((wide, "4"), (narrow, "1")):
        assert result.loss == record["widths"][bits]["loss"]
        assert result.parts == record["widths"][bits]["parts"]
        assert result.history[-1]["loss"] == result.loss
        assert result.weight_entropy == pytest.approx(int(bits), abs=0.2)
    assert wide.config == narrow.config
    assert wide.block_bytes is not None
    assert narrow.block_bytes is not None
    assert wide.block_bytes - narrow.block_bytes >= 3 * (4 * 32 * 32 + 3 * 32 * 64) // 8
    assert wide.gamma != narrow.gamma
    # The table has both, and nothing is missing or taken for the other width.
    (study,) = summarise(Results(out).all, kept(out))
    assert [(s.row, s.bits, s.activation_bits) for s in study.summaries] == [
        ("nested", 4.0, 4.0),
        ("nested", 1.0, 1.0),
    ]
    assert study.missing == 0
    again = run_grid(load_grid(file), out, show=False)
    assert (again.done, len(Results(out).all)) == (2, 2)
    # Another study of the folder takes each width over as that width.
    other = load_grid(grid("other", rows={"same": NESTED}, steps=2))
    plan = Plan(other, Results(out))
    for cell, result in zip(other.cells, (wide, narrow), strict=True):
        found = plan.elsewhere(plan.wanted(cell, cell.lrs[0], 0))
        assert found is not None
        assert found.loss == result.loss


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({**NESTED, "lr": [1e-2, 2e-2]}, "which one run trains at one learning rate"),
        ({**NESTED, "bits": [4]}, "says twice how many bits"),
        ({"quantization": {"nested": [1, 4]}}, "the widest first"),
    ],
)
def test_a_row_that_no_run_could_be_is_refused(grid, row: dict, said: str) -> None:
    with pytest.raises(BellboxError, match=said):
        load_grid(grid(rows={"nested": row}))
