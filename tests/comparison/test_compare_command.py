"""The whole command, in processes: runs, failures, kills, Ctrl-C."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest

from bellbox.cli.main import main
from bellbox.comparison import Results, load_grid, run_grid
from bellbox.runs.metrics import read_records
from bellbox.training import train
from waiting import finish, wait_for

pytest.importorskip("scipy", reason="scipy, of the extra cli: `bellbox compare` asks for it")


def run_folders(out: Path) -> list[Path]:
    return sorted((out / "runs").glob("*")) if (out / "runs").exists() else []


def metrics_lines(out: Path) -> int:
    return sum(
        len(read_records(one / "metrics.jsonl"))
        for one in run_folders(out)
        if (one / "metrics.jsonl").exists()
    )


def test_a_grid_runs_goes_on_after_a_failing_row_and_then_has_nothing_to_do(
    grid, start, tmp_path: Path
) -> None:
    rows = {
        "full": {"quantization": {"method": "none"}},
        "broken": {"model": {"overrides": {"initializer_range": 1e30}}},
        "BBQ": {"quantization": {"block": 16}},
    }
    file, out = grid(rows=rows), tmp_path / "out"
    running = start(file, "--out", out, "--jobs", 2)
    said, error = finish(running)
    assert running.returncode == 1, error
    assert "broken, 2 bits, lr 0.01, seed 0: FAILED: " in said
    results = Results(out).all
    assert sorted((one.row, one.lr, one.error is None) for one in results) == [
        ("BBQ", 0.01, True), ("broken", 0.01, False), ("full", 0.01, True),
    ]  # fmt: skip
    bbq = next(one for one in results if one.row == "BBQ")
    assert bbq.perplexity is not None
    assert bbq.weight_entropy is not None
    assert 1.5 < bbq.weight_entropy <= 2.0
    assert [point["step"] for point in bbq.history] == [2, 4]
    assert bbq.config["quantization"]["block"] == 16
    assert bbq.parts is not None
    assert bbq.parts["unit"] == "blocks of tokens"
    assert bbq.loss == pytest.approx(np.average(bbq.parts["losses"], weights=bbq.parts["sizes"]), rel=1e-5)
    assert bbq.overrides == {"quantization": {"block": 16, "bits": 2}}
    # q, k, v, o of 32 x 32, gate and up of 64 x 32, down of 32 x 64: 2 bits a code, 4 bytes a row and an input each.
    full = next(one for one in results if one.row == "full")
    assert full.block_bytes == 2 * (4 * 32 * 32 + 3 * 32 * 64)
    assert bbq.block_bytes is not None
    assert 0 < bbq.block_bytes - full.block_bytes // 8 < 4 * (4 * 32 + 64 + 64 + 32 + 14)
    # Finished runs are gone, the failed one keeps its log.
    (left,) = run_folders(out)
    assert "not finite" in (left / "log.txt").read_text()
    for name in ("tables.md", "tables.csv", "tables.tex", "comparison.html"):
        assert "BBQ" in (out / name).read_text()
    assert list((out / "pictures").glob("small-*.svg"))

    # The grid is kept beside the results, so the tables can be drawn without it.
    drawn = (out / "tables.md").read_text()
    assert "No grid is kept" not in drawn
    main(["compare", str(out), "--tables"])
    assert (out / "tables.md").read_text() == drawn

    before = (out / "results.jsonl").read_bytes()
    outcome = run_grid(load_grid(file), out, show=False)
    assert (outcome.done, outcome.total, outcome.failed, outcome.killed) == (3, 3, 1, 0)
    assert (out / "results.jsonl").read_bytes() == before


@pytest.mark.slow
def test_killed_with_its_run_it_goes_on_to_the_same_result(grid, start, tmp_path: Path) -> None:
    file, out = grid(rows={"BBQ": {}}, steps=30), tmp_path / "killed"
    config = load_grid(file).cells[0].config(1e-2, 0)
    whole = train(dataclasses.replace(config, folder=str(tmp_path / "whole")), show=False)
    running = start(file, "--out", out)
    wait_for(lambda: metrics_lines(out) > 4, "some steps", running.pid)
    running.kill()
    running.communicate()
    # Its run sees the pipe close, saves and leaves; a new start need not wait for anything but that.
    folder = run_folders(out)[0]
    wait_for(lambda: _unlocked(folder), "the run to leave")
    assert Results(out).all == []
    again = start(file, "--out", out)
    said, error = finish(again)
    assert again.returncode == 0, said + error
    assert whole.validation is not None
    (result,) = Results(out).all
    assert result.loss == whole.validation["loss"]
    assert result.weight_entropy == whole.validation["weight_entropy"]["mean"]
    assert len(result.history) == 15
    assert run_folders(out) == []


def _unlocked(folder: Path) -> bool:
    from bellbox.errors import BellboxError
    from bellbox.utils.files import lock

    try:
        lock(folder).close()
    except BellboxError:
        return False
    return True


@pytest.mark.slow
def test_ctrl_c_saves_the_run_and_says_how_to_go_on(grid, start, tmp_path: Path) -> None:
    file, out = grid(rows={"BBQ": {}}, steps=100000), tmp_path / "out"
    running = start(file, "--out", out)
    wait_for(lambda: metrics_lines(out) > 4, "some steps", running.pid)
    # As a terminal and `timeout` do. A run with threads of its own would hear it on one of them.
    assert os.getpgid(running.pid) == running.pid
    os.killpg(running.pid, signal.SIGINT)
    said, error = finish(running)
    assert running.returncode == 130, said + error
    assert "0 of 1 runs done; go on with: bellbox compare" in said
    assert "Traceback" not in said + error
    (folder,) = run_folders(out)
    last = read_records(folder / "metrics.jsonl")[-1]["step"]
    assert (folder / "checkpoints" / f"step-{last:08d}").is_dir()


def test_what_cannot_be_compared_is_refused_in_a_line(
    grid, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = grid(rows={"BBQ": {}})
    for arguments, message in (
        ([file], "name a folder: --out"),
        ([tmp_path, "--out", tmp_path / "o"], "is a folder; to draw its tables anew, add --tables"),
        ([tmp_path, "--tables"], "holds no results yet"),
        ([file, "--tables"], "--tables takes the folder"),
        ([tmp_path, "--tables", "--retry"], "--retry does not apply to --tables"),
        ([tmp_path / "none.yaml", "--out", tmp_path / "o"], "cannot be read"),
        ([file, "--out", tmp_path / "o", "--jobs", 0], "jobs is 0"),
        (
            [file, "--out", tmp_path / "o", "--against", "LSQ"],
            "--against 'LSQ': the grid has no such row; there are: BBQ",
        ),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["compare", *map(str, arguments)])
        error = capsys.readouterr().err
        assert caught.value.code == 2
        assert error.startswith("bellbox: error: ")
        assert message in error
        assert error.count("\n") == 1


def test_tables_are_drawn_anew_from_results_alone(
    tmp_path: Path, result, capsys: pytest.CaptureFixture[str]
) -> None:
    results = Results(tmp_path)
    results.add(result())
    results.add(result("LSQ", perplexity=22.5))
    main(["compare", str(tmp_path), "--tables"])
    assert "| LSQ | 2 | 22.50 | - | +2.50§ |" in capsys.readouterr().out
    assert "22.50" in (tmp_path / "tables.md").read_text()
    main(["compare", str(tmp_path), "--tables", "--against", "LSQ"])
    assert "| BBQ | 2 | 20.00 | - | -2.50§ |" in (tmp_path / "tables.md").read_text()


def test_the_help_names_grids_that_there_are() -> None:
    from bellbox.cli import compare

    root = Path(__file__).parents[2]
    named = re.findall(r"benchmarks/\S+\.yaml", compare.__doc__ or "")
    assert named
    assert [name for name in named if not (root / name).is_file()] == []
