from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bellbox.cli.main import main
from bellbox.cli.report import collect
from bellbox.core.grid import Levels
from bellbox.formats.auto import open_model


def test_it_writes_a_page_with_everything(
    run: Path, packed: Path, tmp_path: Path, bellbox_process: Callable
) -> None:
    done = bellbox_process("report", run, "--out", "pages/small.html", "--packed", packed)
    assert done.returncode == 0, done.stderr
    assert "report written to pages/small.html" in done.stdout
    page = (tmp_path / "pages" / "small.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 8
    assert "http" not in page
    assert "From the packed model" in page
    for heading in ("Training", "Bell, box, codes", "How well the codes are used", "Learned scales", "Size"):
        assert f"<h2>{heading}</h2>" in page


def test_without_out_the_page_lies_in_the_run(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "copy")
    main(["report", str(tmp_path / "copy"), "--checkpoint", "20"])
    page = (tmp_path / "copy" / "report.html").read_text(encoding="utf-8")
    assert "at step 20" in page
    assert "From the trained model" in page
    assert "1/" in page  # the size that it would have, without a packed folder


def test_the_values_shown_are_those_that_make_the_codes(run: Path) -> None:
    layer = collect(open_model(run)).layer
    assert layer is not None
    assert layer.name == "model.layers.0.mlp.gate_proj"
    assert layer.integers == (-3, -1, 1, 3)
    import torch

    codes = Levels.gaussian(4).encode(torch.from_numpy(layer.normalised))
    assert (codes.numpy() == layer.codes).all()


def test_a_full_precision_run_and_one_that_cannot_generate_get_a_page_too(
    tensor_run: Path, tmp_path: Path
) -> None:
    main(["report", str(tensor_run), "--out", str(tmp_path / "tensor.html")])
    page = (tmp_path / "tensor.html").read_text(encoding="utf-8")
    assert "What it writes" not in page
    assert "<h2>Size</h2>" not in page
    assert "Bell, box, codes" in page


def test_lost_data_costs_only_the_unigram_line(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(run, folder)
    config = folder / "config.yaml"
    source = next(line for line in config.read_text().splitlines() if "source:" in line)
    config.write_text(config.read_text().replace(source, "  source: /nowhere"))
    content = collect(open_model(folder))
    assert content.unigram_bits_per_byte is None
    assert collect(open_model(run)).unigram_bits_per_byte is not None


def test_what_cannot_be_reported_is_refused(
    run: Path, tensor_run: Path, packed: Path, hf: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    for message, arguments in (
        (
            "was not packed from this checkpoint",
            [tensor_run, "--packed", packed, "--out", tmp_path / "r.html"],
        ),
        ("was not packed", [run, "--checkpoint", "20", "--packed", packed, "--out", tmp_path / "r.html"]),
        ("report takes a run folder", [packed]),
        ("report takes a run folder", [hf]),
        ("no such BBQ layer", [run, "--layer", "lm_head", "--out", tmp_path / "r.html"]),
        ("is no packed model", [run, "--packed", hf, "--out", tmp_path / "r.html"]),
        ("is a folder", [run, "--out", tmp_path]),
        ("cannot be written", [run, "--out", "/proc/none/r.html"]),
        ("the prompt is empty", [run, "--prompt", "", "--out", tmp_path / "r.html"]),
    ):
        assert message in refused("report", *arguments)
    assert not list(tmp_path.iterdir())


def test_a_damaged_record_is_refused(run: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    shutil.copytree(run, tmp_path / "copy")
    (tmp_path / "copy" / "metrics.jsonl").write_text(json.dumps([1]) + "\n")
    assert "line 1 is not a record" in refused("report", tmp_path / "copy")
    (tmp_path / "copy" / "metrics.jsonl").write_text("")
    assert "nothing is recorded yet" in refused("report", tmp_path / "copy")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)
