from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bellbox.cli import convert as command
from bellbox.cli.main import main
from bellbox.evaluation.codes import agreement, low_bit_layers
from bellbox.formats import packed as io
from bellbox.formats.auto import open_model
from bellbox.nn import PackedLayer


def test_it_packs_prints_sizes_and_compares_every_code(
    run: Path, tmp_path: Path, bellbox_process: Callable
) -> None:
    done = bellbox_process("convert", run, "--out", "packed")
    assert done.returncode == 0, done.stderr
    for text in ("fp32", "bf16", "packed", "low-bit layers", "whole model", "all 7 low-bit layers"):
        assert text in done.stdout
    assert re.search(r"codes that differ +0\n", done.stdout)
    assert "equal to the last bit" in done.stdout
    weights = 4 * 64 * 64 + 3 * 64 * 128
    inputs = 16 * 32 * (6 * 64 + 128)
    assert f"{weights + inputs:,} ({weights:,} of weights, {inputs:,} of layer inputs)" in done.stdout
    model = io.load(tmp_path / "packed")
    assert len(low_bit_layers(model)) == 7
    assert io.tokenizer_path(tmp_path / "packed") is not None


def test_the_size_table_adds_up(run: Path) -> None:
    sizes = command.packed_sizes(open_model(run).model)
    blocks, rest, whole = command.size_rows(sizes)
    assert whole[1:] == tuple(a + b for a, b in zip(blocks[1:], rest[1:], strict=True))
    assert blocks[1:4] == (40960, 4 * 40960, 2 * 40960)
    rows = 4 * 64 + 2 * 128 + 64
    assert blocks[4] == 40960 // 4 + 4 * rows + 4 * 7  # codes, a scale a row, a scale an input
    assert rest[4] == rest[2]


def turn_over(layer: torch.nn.Module, row: int, byte: int, bits: int) -> None:
    """Change bits of one byte of a packed layer's codes, as files hold them."""
    assert isinstance(layer, PackedLayer)
    rows = layer.weight_packed
    rows[row, byte] ^= bits
    layer.fill_from_rows(rows)


def test_a_spoilt_code_is_found_and_exits_with_1(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = io.load

    def spoilt(folder: Path, bits: int | None = None) -> torch.nn.Module:
        model = whole(folder, bits=bits)
        turn_over(next(iter(low_bit_layers(model).values())), 0, 0, 1)
        return model

    monkeypatch.setattr(io, "load", spoilt)
    with pytest.raises(SystemExit) as caught:
        main(["convert", str(run), "--out", str(tmp_path / "p")])
    out, error = capsys.readouterr()
    assert caught.value.code == 1
    assert "NOT the same function" in out
    assert not re.search(r"codes that differ +0\n", out)
    assert "do not use it" in error


def test_agreement_counts_single_differences(run: Path, packed: Path) -> None:
    trained, small = open_model(run).model, open_model(packed).model
    ids = torch.arange(32).reshape(1, 32)
    equal = agreement(trained, small, [ids])
    assert (equal.mismatches, equal.logit_difference, equal.holds) == (0, 0.0, True)
    layer = low_bit_layers(small)["model.layers.0.mlp.down_proj"]  # the last one: no later input changes
    turn_over(layer, 5, 3, 0b11)  # one code of four in the byte
    differing = agreement(trained, small, [ids])
    assert differing.mismatches == 1
    assert differing.logit_difference > 0
    assert not differing.holds


def test_an_earlier_packed_model_is_replaced_and_no_check_is_silent(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["convert", str(run), "--out", str(tmp_path / "p"), "--no-check"]
    main([*arguments, "--checkpoint", "20"])
    first = (tmp_path / "p" / "model.safetensors").read_bytes()
    main(arguments)
    assert (tmp_path / "p" / "model.safetensors").read_bytes() != first
    assert "codes compared" not in capsys.readouterr().out


def test_what_cannot_be_converted_is_refused_and_nothing_is_left(
    run: Path, tensor_run: Path, packed: Path, hf: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    out = tmp_path / "out"
    assert "granularity='tensor'" in refused("convert", tensor_run, "--out", out)
    assert "convert takes a run folder" in refused("convert", packed, "--out", out)
    assert "convert takes a run folder" in refused("convert", hf, "--out", out)
    assert "--no-check" in refused("convert", run, "--out", out, "--data", tmp_path / "missing")
    unused = refused("convert", run, "--out", out, "--no-check", "--data", tmp_path)
    assert "--data does not apply to --no-check" in unused
    assert not out.exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    assert "holds something else" in refused("convert", run, "--out", tmp_path / "full")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"
    assert "cannot be written" in refused("convert", run, "--out", "/proc/none/packed")


def test_the_chat_template_of_what_a_run_began_with_comes_along(run: Path, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    texts = {"chat_template.jinja": "{{ messages }}", "generation_config.json": "{}", "vocab.json": "{}"}
    for name, text in texts.items():
        (begun / name).write_text(text)
    opened = open_model(run)
    assert opened.run is not None
    section = dataclasses.replace(opened.run.config.model, pretrained=str(begun))
    config = dataclasses.replace(opened.run.config, model=section)
    opened = dataclasses.replace(opened, run=dataclasses.replace(opened.run, config=config))
    command.pack(opened, tmp_path / "packed")
    assert (tmp_path / "packed" / "chat_template.jinja").read_text() == "{{ messages }}"
    names = {path.name for path in (tmp_path / "packed").iterdir()}
    assert names & texts.keys() == texts.keys() - {"vocab.json"}  # the vocabulary is the run's own
    io.load(tmp_path / "packed")
