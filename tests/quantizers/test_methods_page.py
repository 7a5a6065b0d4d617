"""docs/methods.md says what is there, and its example runs."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import bellbox as bb
from bellbox.quantizers import METHODS

PAGE_FOLDER = Path(__file__).resolve().parents[2] / "docs"
PAGE = (PAGE_FOLDER / "methods.md").read_text(encoding="utf-8")


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


def test_every_method_says_where_it_differs_and_names_each_of_its_options():
    part = PAGE[PAGE.index("## Where each differs") : PAGE.index("How each codes Gaussian")]
    cells = {
        row[0]: row[1:] for row in re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \| (.*) \|$", part, re.MULTILINE)
    }
    assert set(cells) == set(METHODS)
    for name, (options, authors, why) in cells.items():
        asked = {field.name: field.default for field in dataclasses.fields(METHODS[name].Options)}
        sentences = [part for part in options.split(". ") if part != "none"]
        assert [re.match(r"`(\w+)`", each)[1] for each in sentences] == list(asked), name  # type: ignore[index]
        for each in sentences:
            said = re.match(r"`(\w+)`: `?([\w.]+)", each)
            if said:  # the default comes first
                assert str(asked[said[1]]).lower() == said[2], each
        assert authors
        assert why


def test_the_numbers_of_gaussian_weights_are_those_of_the_command():
    sys.path.insert(0, str(PAGE_FOLDER.parent / "benchmarks"))
    import gaussian

    part = PAGE[PAGE.index("How each codes Gaussian") :]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", part, re.MULTILINE))
    assert set(rows) == set(METHODS)
    weight = torch.randn(2048, 1024, generator=torch.Generator().manual_seed(0))
    for name, n in (("cewt", 4), ("ternary_mass", 3), ("quest", 2)):
        assert rows[name].split(" | ")[gaussian.COUNTS.index(n)] == gaussian.cell(name, n, weight)


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
