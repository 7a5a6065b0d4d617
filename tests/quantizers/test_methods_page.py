"""docs/methods.md says what is there, and its example runs."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import bellbox as bb
from bellbox.quantizers import METHODS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")


def test_every_method_stands_in_the_table_with_its_block_and_options():
    rows = {row[1]: row for row in re.findall(r"^(\| `(\w+)` \|(?: \d+)? \|.*)$", PAGE, re.MULTILINE)}
    lines = {name: line for name, (line, _) in rows.items()}
    assert set(lines) == {*METHODS, "none"}
    for name, kind in METHODS.items():
        cells = [cell.strip() for cell in lines[name].strip("|").split("|")]
        assert int(cells[1]) == kind.own_block
        assert cells[3].startswith("yes" if kind.on_grid else "no")
        options = [field.name for field in dataclasses.fields(kind.Options)]
        assert re.findall(r"`(\w+)`", cells[4]) == options, name


def test_the_example_trains_packs_and_loads(monkeypatch, tmp_path):
    monkeypatch.setitem(METHODS, "laplace", METHODS["rtn"])  # registers itself; taken out again afterwards
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    scope: dict[str, object] = {}
    exec(compile(code, "docs/methods.md", "exec"), scope)
    recipe = bb.Recipe.of("laplace", bits=2, options={"reach": 2.0})
    model = bb.prepare(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8)), recipe)
    x = torch.randn(16, 64)
    model(x).square().sum().backward()
    packed = bb.convert(model.eval())
    bb.save(packed, tmp_path / "m")
    loaded = bb.load(tmp_path / "m", into=nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8)))
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    uniform = torch.distributions.Laplace(0.0, 1.0).sample((256, 64))
    layer = bb.prepare(nn.Linear(64, 4), recipe)
    codes = layer.activation_quantizer.quantizer.codes(uniform)  # type: ignore[union-attr]
    shares = torch.bincount(codes.flatten().long(), minlength=4) / codes.numel()
    assert shares.tolist() == pytest.approx([0.25] * 4, abs=0.03)
