"""Text for a terminal of any encoding, and words that are no text."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bellbox.cli.main import main


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_what_a_terminal_cannot_show_is_replaced(
    packed: Path, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding=encoding))
    main(["generate", str(packed), "--prompt", "5 € 東 café", "--max-new-tokens", "2", "--seed", "0"])
    shown = out.getvalue().decode(encoding)
    assert shown.startswith("5 € 東 café".encode(encoding, "replace").decode(encoding))


@pytest.mark.parametrize("flag", ["--prompt", "--stop"])
def test_broken_utf8_is_refused(packed: Path, refused: Callable[..., str], flag: str) -> None:
    words = {"--prompt": "It", "--stop": "\n"} | {flag: "a\udcff"}
    said = refused("generate", packed, *(word for pair in words.items() for word in pair))
    assert "'a\\udcff' is not text in UTF-8" in said


@pytest.mark.parametrize("name", ["small.onnx", "small.gguf", "small.safetensors"])
def test_a_folder_is_not_called_like_a_file(
    run: Path, tmp_path: Path, refused: Callable[..., str], name: str
) -> None:
    assert "a folder is made" in refused("convert", run, "--out", tmp_path / name)
    assert not list(tmp_path.iterdir())
