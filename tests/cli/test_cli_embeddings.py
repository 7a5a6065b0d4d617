"""A run whose embeddings are rounded, through every command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bellbox.cli.main import main
from bellbox.formats.auto import open_model
from bellbox.formats.packed import sizes


@pytest.fixture(scope="module")
def run(rounded_run: Path) -> Path:
    return rounded_run


@pytest.fixture(scope="module")
def folder(run: Path) -> Path:
    main(["convert", str(run), "--out", str(run.parent / "packed"), "--no-check"])
    return run.parent / "packed"


def test_the_packed_model_is_the_trained_one(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["convert", str(run), "--out", str(tmp_path / "packed")])
    out = capsys.readouterr().out
    assert "=> the same function" in out
    assert "equal to the last bit" in out
    assert "embeddings and head are in int4, norms stay in fp32" in out
    whole = sum((tmp_path / "packed" / name).stat().st_size for name in ("config.json", "model.safetensors"))
    bits = 8 * whole / sizes(open_model(tmp_path / "packed").model).parameters
    assert f"the whole model is {whole:,} bytes on disk, {bits:.2f} bits a parameter" in out


def test_eval_scores_both_alike_and_says_the_size(
    run: Path, folder: Path, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for model in (run, folder):
        main(
            [
                "eval",
                str(model),
                "--data",
                str(tokens),
                "--context",
                "32",
                "--max-tokens",
                "300",
                "--json",
                str(tmp_path / "e.json"),
            ]
        )
        found.append(json.loads((tmp_path / "e.json").read_text()))
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-6)
    assert "file_bytes" not in found[0]
    assert found[1]["file_bytes"] == sum(
        (folder / name).stat().st_size for name in ("config.json", "model.safetensors")
    )
    assert f"size      {found[1]['file_bytes']:,} bytes on disk" in capsys.readouterr().out


def test_it_writes_and_is_reported(run: Path, folder: Path, tmp_path: Path) -> None:
    for model in (run, folder):
        main(["generate", str(model), "--prompt", "It was", "--max-new-tokens", "5"])
    main(["report", str(run), "--out", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").stat().st_size > 10_000


def test_what_was_trained_rounded_is_not_rounded_again(
    run: Path, folder: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    out = tmp_path / "out"
    assert "were trained rounded" in refused("convert", run, "--out", out, "--embeddings", "int8")
    assert not out.exists()
    assert "leave them as they are" in refused("eval", folder, "--embeddings", "bf16")
