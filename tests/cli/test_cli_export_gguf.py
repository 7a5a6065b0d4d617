"""The command `bellbox export gguf`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import bellbox as bb
from bellbox.cli.main import main
from bellbox.core.entropy import code_counts, entropy_bits
from bellbox.formats import packed as io
from bellbox.models import LlamaConfig, ResNetConfig, build
from bellbox.nn import CodedLayer

gguf = pytest.importorskip("gguf")

from bellbox.interop.gguf import WEIGHTS_ONLY  # noqa: E402

CONFIG = LlamaConfig(320, 64, 128, 1, 2, max_position_embeddings=32)


def packed_folder(folder: Path, tokenizer: Path | None, **more: object) -> Path:
    model = bb.prepare(build(CONFIG, seed=0), bb.Recipe.of("bbq", 2, **{"block": 1, **more})).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        model(torch.arange(8)[None])
    io.save(bb.convert(model), folder, tokenizer=tokenizer)
    return folder


def test_it_says_what_was_written_and_that_it_is_weights_only(
    tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = packed_folder(tmp_path / "packed", tokens / "tokenizer.json")
    out = tmp_path / "model.gguf"
    main(["export", "gguf", str(folder), str(out)])
    said = capsys.readouterr().out
    for text in (
        f"{out.stat().st_size:,} bytes, architecture llama",
        "low-bit, codes exact",
        "7 tensors are Q4_0 where Q2_K would do: avoided, or blocks of Q2_K do not divide their rows",
        "scales    rounded to fp16",
        "tokenizer written",
        "Weights only",
        "weight_only: float and block: 1",
    ):
        assert text in said, text
    fields = gguf.GGUFReader(out).fields
    assert fields["general.name"].contents() == "packed"
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"


def test_a_card_beside_it_counts_every_byte(
    tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = packed_folder(tmp_path / "packed", tokens / "tokenizer.json")
    out = tmp_path / "model.gguf"
    main(["export", "gguf", str(folder), str(out)])
    assert "model.gguf.md says what it is" in capsys.readouterr().out
    card = (tmp_path / "model.gguf.md").read_text()
    assert WEIGHTS_ONLY in card
    rows = [line.strip("| ").split(" | ") for line in card.splitlines() if line.count("|") == 4]
    sizes = [
        (int(row[1].strip("* ").replace(",", "")), int(row[2].strip("* ").replace(",", "")))
        for row in rows[2:]
    ]
    *parts, whole = sizes
    assert whole == (sum(weights for weights, _ in parts), out.stat().st_size)
    assert sum(size for _, size in parts) == whole[1]
    assert whole[0] == sum(parameter.numel() for parameter in build(CONFIG).parameters())
    layers = [m for m in bb.load(folder).modules() if isinstance(m, CodedLayer)]
    counts = sum(code_counts(layer.weight_codes(), 4) * 1.0 for layer in layers)
    said = float(re.search(r"codes of 4 levels \| (\S+) of 2.000 bits", card)[1])  # type: ignore[index]
    assert said <= round(entropy_bits(counts), 3)  # a mean of entropies is at most that of all
    assert said > 1.5
    bits = float(re.search(r"whole file \| (\S+) \|", card)[1])  # type: ignore[index]
    assert bits == pytest.approx(8 * whole[1] / whole[0], abs=1e-3)
    main(["export", "gguf", str(folder), str(out), "--floats", "f16"])
    assert "F16, rounded floats" in (tmp_path / "model.gguf.md").read_text()


def test_a_run_with_a_rotation_is_refused_with_the_way_out(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["export", "gguf", str(run), str(tmp_path / "m.gguf")])
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert len(error.splitlines()) == 1
    assert "rotated in blocks of" in error
    assert "quantization.block: 1" in error
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_language_model_or_no_place_for_a_file(
    hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vision = tmp_path / "vision"
    model = bb.prepare(build(ResNetConfig(width=32), seed=0), bb.Recipe.bbq(2)).eval()
    with torch.no_grad():
        model(torch.rand(1, 3, 32, 32))
    io.save(bb.convert(model), vision)
    for arguments, message in (
        ([vision, tmp_path / "m.gguf"], "a ResNet is not written to GGUF"),
        ([hf, tmp_path], "is a folder"),
        ([hf, tmp_path / "m.gguf", "--avoid", "Q3"], "no type 'Q3' to avoid"),
        ([hf, tmp_path / "m.gguf", "--checkpoint", "best"], "only a run has checkpoints"),
        ([hf], "required"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["export", "gguf", *map(str, arguments)])
        assert caught.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "m.gguf").exists()


def test_without_the_package_the_extra_is_named(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SystemExit):
        main(["export", "gguf", str(hf), str(tmp_path / "m.gguf")])
    assert "pip install 'bellbox[gguf]'" in capsys.readouterr().err
