"""The scripts for a GPU, tried without one: parts run at the smallest sizes, kernels compile without spills."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
SCRIPTS = ROOT / "benchmarks" / "gpu"


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "BELLBOX_BACKEND")}
    variables = {**clean, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False, cwd=ROOT)


def test_a_dry_run_does_the_parts_that_are_not_finished(tmp_path: Path) -> None:
    # Those of whole models take the interpreter minutes: they count as finished here.
    parts = {"environment", "codes", "ceilings", "kernels"}
    results = tmp_path / "results.jsonl"
    lines = [{"part": "finished", "name": each} for each in ("sweep", "decode", "training", "prefill")]
    results.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    done = run(SCRIPTS / "run.sh", "--dry", OUT=str(tmp_path), PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert {row["part"] for row in rows} == {*parts, "finished"}
    assert {row["name"] for row in rows if row["part"] == "finished"} > parts
    assert all(row["different"] == 0 for row in rows if row["part"] == "codes")
    tables = (tmp_path / "tables.md").read_text()
    assert all(f"## {part}" in tables for part in parts)


@pytest.mark.slow
def test_a_dry_run_of_whole_models_writes_tables_and_a_picture(tmp_path: Path) -> None:
    parts = ("sweep", "decode", "training", "prefill")
    done = run(SCRIPTS / "run.sh", "--dry", *parts, OUT=str(tmp_path), PYTHON=sys.executable, LIMIT="1800")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {row["name"] for row in rows if row["part"] == "finished"} == set(parts)
    assert {row["how"] for row in rows if row["part"] == "decode"} == {"eager", "graph"}
    assert {row["how"] for row in rows if row["part"] == "training"} == {"eager", "compiled"}
    tables = (tmp_path / "tables.md").read_text()
    assert all(f"## {part}" in tables for part in parts)
    assert (tmp_path / "prefill-none.svg").read_text().startswith("<svg")


def test_an_interrupt_leaves_the_tables_of_what_was_measured(tmp_path: Path) -> None:
    """As the limit of run.sh does: the parts that are done count, the next call goes on with the rest."""
    done = run(SCRIPTS / "run.sh", "--dry", "environment", OUT=str(tmp_path), PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr[-3000:]
    cut = run(SCRIPTS / "run.sh", "--dry", "training", OUT=str(tmp_path), PYTHON=sys.executable, LIMIT="6")
    assert cut.returncode != 0
    assert "## environment" in (tmp_path / "tables.md").read_text()
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {row["name"] for row in rows if row["part"] == "finished"} == {"environment"}


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, in this process."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("tune")


def test_tiles_are_tuned_in_a_dry_run_and_read_back(tune: Any, tmp_path: Path) -> None:
    from bellbox.ops.backends.triton import plan

    table = tmp_path / "tiles.json"
    tune.main(["--dry", "--out", str(table), "--log", str(tmp_path)])
    found = plan.Table.of(json.loads(table.read_text())["sm_80"])
    assert found.measured
    assert {key[:2] for key in found.tiles} == {(4, 1), (4, 40)}
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    asked = {row.get("what") for row in rows}
    assert asked == {None, "e2m1", "decided"}
    assert all(row["same"] for row in rows if row.get("what") == "e2m1")
    assert found.plane_rows in (0, 1, 2)
    assert found.packed_rows in (None, 17, 20)


def test_the_tiles_that_are_shipped_are_those_of_the_rule(tune: Any, tmp_path: Path) -> None:
    """Until somebody measures: then the file says which architecture was."""
    from bellbox.ops.backends.triton import plan

    tune.main(["--reasoned", "--out", str(tmp_path / "tiles.json")])
    again = json.loads((tmp_path / "tiles.json").read_text())
    shipped = json.loads((Path(plan.__file__).parent / "tiles.json").read_text())
    for name, table in shipped.items():
        assert table["measured"] or table == again[name]
        assert plan.Table.of(table).to_dict() == table


def test_kernels_compile_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    table = tmp_path / "table.md"
    done = run(
        sys.executable,
        SCRIPTS / "compile.py",
        "--arch",
        "90",
        "--only",
        "multiply: 64 rows",
        "--markdown",
        table,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    row = next(line for line in table.read_text().splitlines() if line.startswith("| multiply |"))
    _, _, _, architecture, _, registers, spills, _, _, tensor, *_ = (each.strip() for each in row.split("|"))
    assert architecture == "90"
    assert 0 < int(registers) <= 255
    assert int(spills) == 0
    assert int(tensor) > 0


@pytest.mark.parametrize("script", ["run.sh", "train_95m.sh"])
def test_the_shell_can_read_the_scripts(script: str) -> None:
    assert run("bash", "-n", SCRIPTS / script).returncode == 0
    assert os.access(SCRIPTS / script, os.X_OK)


def test_without_a_gpu_the_measurements_say_so(tmp_path: Path) -> None:
    done = run(sys.executable, SCRIPTS / "measure.py", "--out", tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "torch sees no CUDA device" in done.stderr


def test_the_grid_of_the_paper_is_one_that_trains(tmp_path: Path) -> None:
    done = run(
        SCRIPTS / "train_95m.sh", "classics", DRY="1", OUT=str(tmp_path), PYTHON=sys.executable, DEVICE="cpu",
        PRESET="tiny", TOKENS="1000000", VOCAB="null", PYTHONPATH=os.environ.get("PYTHONPATH", ""),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for row in ("full precision", "BBQ", "BBQ, paper", "QuEST", "LSQ"):
        assert row in done.stdout
