from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bellbox.cli import demo
from bellbox.cli.demo import judge
from bellbox.cli.eval import evaluate
from bellbox.cli.main import main
from bellbox.evaluation.codes import Agreement
from bellbox.formats import packed as io
from bellbox.formats.auto import open_model
from bellbox.formats.packed import Sizes


def test_a_short_demo_runs_end_to_end(tmp_path: Path, bellbox_process: Callable) -> None:
    done = bellbox_process("demo", "--steps", "2", "--no-bars", "--precision", "fp32", "--out", "d")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "d"
    result = json.loads((folder / "demo.json").read_text())
    assert result["finished"]
    assert result["agreement"]["mismatches"] == 0
    tables = 2 * 2048 * 256  # embedding and output layer, rounded as they are shipped
    assert result["agreement"]["weight_codes"] == result["sizes"]["quantized_parameters"] + tables
    assert result["sizes"]["embeddings"] == ["int8"]
    assert result["sizes"]["ratio"] >= 7.5
    assert result["evaluation"]["weight_entropy"]["min"] >= 1.95
    assert io.is_packed(folder / "packed")
    assert "<svg" in (folder / "report.html").read_text(encoding="utf-8")
    for text in ("=== 6/6", "reached", "MISSED", "codes that differ", "next:", "bellbox generate d/packed"):
        assert text in done.stdout


def test_a_missed_bar_exits_with_1_and_an_earlier_demo_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[list[str]] = []
    asked: list[tuple[int, str]] = []

    def missed(out: Path, steps: int, precision: str, begun: float) -> list[demo.Bar]:
        asked.append((steps, precision))
        seen.append(sorted(entry.name for entry in out.iterdir() if not entry.name.startswith(".")))
        (out / "run").mkdir()
        (out / "report.html").write_text("old")
        return [demo.Bar("pigs fly", False), demo.Bar("water is wet", True)]

    monkeypatch.setattr(demo, "run_demo", missed)
    monkeypatch.setattr(demo, "_seconds_per_step", {"fp32": 0.3, "bf16": 0.2}.__getitem__)
    monkeypatch.setattr(demo, "choose_precision", lambda device: ("bf16", "it has the units"))
    with pytest.raises(SystemExit) as caught:
        main(["demo", "--out", str(tmp_path / "d")])
    assert caught.value.code == 1
    out, error = capsys.readouterr()
    assert error == "bellbox: the demo did not reach its bar: pigs fly\n"
    assert "precision bf16: it has the units; 0.20 s a step" in out
    (tmp_path / "d" / "notes.txt").write_text("mine")
    main(["demo", "--out", str(tmp_path / "d"), "--no-bars", "--minutes", "2", "--precision", "fp32"])
    assert seen == [["demo.json"], ["demo.json", "notes.txt"]]
    assert asked == [(demo.STEPS, "bf16"), (400, "fp32")]


def test_a_foreign_folder_is_refused_and_kept(tmp_path: Path, refused: Callable[..., str]) -> None:
    foreign = tmp_path / "work"
    (foreign / "run").mkdir(parents=True)
    (foreign / "run" / "precious").write_text("mine")
    assert "holds something else than a demo" in refused("demo", "--out", foreign)
    (foreign / "demo.json").write_text('{"made_by": "somebody else"}')
    assert "holds something else than a demo" in refused("demo", "--out", foreign)
    assert (foreign / "run" / "precious").read_text() == "mine"
    (tmp_path / "file").write_text("")
    assert "is a file" in refused("demo", "--out", tmp_path / "file")


def test_lengths_that_make_no_sense_are_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "give one of them" in refused("demo", "--steps", "3", "--minutes", "1", "--out", tmp_path / "d")
    assert "at least 1" in refused("demo", "--steps", "0", "--out", tmp_path / "d")
    assert "must be above 0" in refused("demo", "--minutes", "-1", "--out", tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_a_folder_that_cannot_be_written_is_refused(refused: Callable[..., str]) -> None:
    assert "cannot be written" in refused("demo", "--out", f"/proc/{os.getpid()}/none")


def test_each_bar_is_missed_for_its_own_reason(run: Path) -> None:
    found = evaluate(open_model(run))
    assert found.floor is not None
    assert found.codes is not None
    good = replace(found, result=replace(found.result, bits_per_byte=0.5 * found.floor.bits_per_byte))
    sizes = Sizes(800, 200, 10, 40)
    checked = Agreement(7, 32, 800, 100, 0, 1000, 0.0)
    history = [3.0, 2.5, 2.4]

    def reached(*args: object) -> list[bool]:
        return [bar.reached for bar in judge(*args)]  # type: ignore[arg-type]

    assert reached(good, sizes, checked, history) == [True] * 5
    low = replace(found.codes, weight={**found.codes.weight, "some.layer": 1.9})
    assert reached(replace(good, codes=low), sizes, checked, history) == [False, True, True, True, True]
    poor = replace(good, result=replace(found.result, bits_per_byte=0.9 * found.floor.bits_per_byte))
    assert reached(poor, sizes, checked, history) == [True, False, True, True, True]
    assert reached(good, sizes, checked, [3.0, 2.4, 2.5]) == [True, True, False, True, True]
    assert reached(good, Sizes(800, 220, 10, 40), checked, history) == [True, True, True, False, True]
    assert reached(good, sizes, replace(checked, mismatches=1), history) == [True] * 4 + [False]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)
