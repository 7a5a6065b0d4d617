"""The worked examples of docs/format.md, read from the page itself."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import bellbox as bb
from bellbox.core.geometry import ConvGeometry
from bellbox.core.grid import Grid, Levels
from bellbox.core.hadamard import butterfly
from bellbox.core.packing import pack, unpack
from bellbox.core.planes import planes_of
from bellbox.core.table import TableCoding, table_integers, table_values
from bellbox.formats.description import VERSIONS, WITH_EXPERTS, WITH_INT4, WITH_WIDTHS
from bellbox.formats.schema import stored_buffers
from bellbox.nn import InputCoding, PackedConv2d, PackedLinear, WeightOnlyLinear
from bellbox.nn.compact import CompactLinear
from bellbox.ops.encode import normaliser, row_sigma
from bellbox.ops.int8_linear import round_input

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "format.md").read_text(encoding="utf-8")


def table(header: str) -> list[list[str]]:
    """Cells of the rows below a header line."""
    lines = PAGE[PAGE.index(header) :].splitlines()[2:]
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    assert rows
    return rows


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.replace(",", " ").split()]


def fill(layer: PackedLinear, words: re.Match[str]) -> None:
    """Give a layer the bytes and scales that the page names."""
    layer.fill_from_rows(torch.tensor([list(bytes.fromhex(words[1]))], dtype=torch.uint8))
    layer.weight_scale.fill_(float(words[2]))
    layer.act_scale.fill_(float(words[3]))


def example_layer() -> nn.Module:
    levels = Levels.gaussian(4)
    layer = PackedLinear(8, 1, levels, InputCoding(levels, 4), True)
    words = re.search(
        r"bytes `([0-9a-f ]+)` .*`weight_scale` ([\d.]+), `act_scale` ([\d.]+), `bias` ([\d.]+):", PAGE
    )
    assert words
    fill(layer, words)
    layer.bias.fill_(float(words[4]))  # type: ignore[union-attr]
    layer.quantization_method = "bbq"
    return nn.ModuleDict({"fc": layer})


def test_bytes_of_rows():
    rows = table("| n | codes of a row |")
    assert [int(row[0]) for row in rows] == [2, 4, 8, 16, 3]
    for n, codes, stored in rows:
        tensor = torch.tensor([[int(code) for code in codes.split()]], dtype=torch.uint8)
        assert bytes(pack(tensor, int(n))[0].tolist()) == bytes.fromhex(stored)


def test_thresholds():
    for n, zero_point, upper in table("| n | zero_point |"):
        levels = Levels.gaussian(int(n))
        assert levels.zero_point == float(zero_point)
        assert [t for t in levels.thresholds if t >= 0] == numbers(upper)


def entries() -> list[Any]:
    """What the page shows in JSON."""
    return [json.loads(text) for text in re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)]


def test_configuration(tmp_path):
    bb.save(example_layer(), tmp_path / "m")
    shown, written = entries()[0], json.loads((tmp_path / "m" / "config.json").read_text())
    ours, theirs = shown["quantization_config"], written["quantization_config"]
    ours["sha256"] = theirs["sha256"]
    assert set(ours["files"]["model.safetensors"]) == {"bytes", "sha256"}
    assert ours["files"]["model.safetensors"]["bytes"] == theirs["files"]["model.safetensors"]["bytes"]
    ours["files"] = theirs["files"]
    assert shown == written
    assert (2, 3, ours["version"], WITH_EXPERTS, WITH_INT4, WITH_WIDTHS) == VERSIONS


def test_the_worked_function():
    steps = {row[0]: numbers(row[1]) for row in table("| step | numbers |")}
    layer = example_layer().fc
    assert isinstance(layer, PackedLinear)
    x = torch.tensor([steps["input"]])
    assert butterfly(x, 4).tolist() == [steps["rotated"]]
    sigma, r = steps["sigma, r"]
    assert float(row_sigma(x)) == pytest.approx(sigma, rel=1e-13)
    assert float(normaliser(row_sigma(x), 4).float()) == r
    codes = layer.input_codes(x)
    assert codes.tolist() == [steps["codes"]]
    assert layer.coding.levels.decode_int8(codes).tolist() == [steps["integers"]]
    weights = layer.weight_levels.decode_int8(unpack(layer.weight_packed, 8, 4))
    assert weights.tolist() == [steps["weight integers"]]
    assert (
        sum(a * b for a, b in zip(steps["integers"], steps["weight integers"], strict=True))
        == steps["sum"][0]
    )
    assert layer(x).tolist() == [steps["output"]]


def test_every_stored_field_is_explained(tmp_path):
    bb.save(example_layer(), tmp_path / "m")
    section = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    layer = section["layers"]["fc"]
    for name in (
        *section,
        *layer,
        *layer["weight"],
        *layer["activation"],
        *stored_buffers(
            PackedLinear(8, 1, Grid(4, -0.5), InputCoding(Levels.gaussian(4), 1, "static", signs=True), True)
        ),
        *stored_buffers(WeightOnlyLinear(8, 1, Grid(4, -0.5), True, table=True)),
        *stored_buffers(CompactLinear(1, 32, TableCoding(4, 32), False)),
    ):
        assert re.search(rf"[`.]{name}[`.]", PAGE), name


def example_convolution() -> PackedConv2d:
    levels = Levels.gaussian(4)
    window = ConvGeometry((1, 2), padding=(1, 0, 0, 0))
    layer = PackedConv2d(2, 1, window, Grid(4, -0.5), InputCoding(levels, 2), False)
    words = re.search(
        r"bytes `([0-9a-f ]+)` .*`weight_scale` ([\d.]+), `act_scale` ([\d.]+), on a sample", PAGE
    )
    assert words
    fill(layer, words)
    return layer


def test_the_entry_of_a_convolution(tmp_path):
    bb.save(nn.ModuleDict({"conv": example_convolution()}), tmp_path / "m")
    written = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    shown = entries()[1]
    assert shown == written["layers"]["conv"]
    for name in shown["convolution"]:
        assert re.search(rf"`{name}`", PAGE), name


def test_the_worked_convolution():
    steps = {row[0]: numbers(row[1]) for row in table("| step | numbers |\n|---|---|\n| sample |")}
    layer, x = example_convolution(), torch.tensor([steps["sample"]])
    assert butterfly(x, 2).tolist() == [steps["sample rotated"]]
    sigma, r = steps["sample's sigma, r"]
    assert float(row_sigma(x)) == sigma
    assert float(normaliser(row_sigma(x), 2).float()) == r
    codes = layer.input_codes(x.view(1, 1, 2, 2).permute(0, 3, 1, 2))
    assert codes.tolist() == [steps["sample's codes"]]
    integers = layer.coding.levels.decode_int8(codes)[0].tolist()
    assert integers == steps["sample's integers"]
    weights = layer.weight_levels.decode_int8(layer.weight_codes())[0].tolist()
    assert weights == steps["filter's integers"]
    alone = sum(a * b for a, b in zip(integers[:2], weights[2:], strict=True))
    both = sum(a * b for a, b in zip(integers, weights, strict=True))
    assert [alone, both] == steps["sums"]
    out = layer(x.view(1, 1, 2, 2).permute(0, 3, 1, 2))
    assert out.flatten().tolist() == steps["outputs"]


def example_weight_only() -> WeightOnlyLinear:
    layer = WeightOnlyLinear(4, 1, Grid(4, -0.5), True, group=2, table=True, block=2)
    words = re.search(
        r"bytes `([0-9a-f ]+)` .*`weight_table` ([-\d. ]+), `weight_scale` ([\d. ]+), `bias` ([\d.]+):", PAGE
    )
    assert words
    layer.fill_from_rows(torch.tensor([list(bytes.fromhex(words[1]))], dtype=torch.uint8))
    layer.weight_table.copy_(torch.tensor(numbers(words[2])))  # type: ignore[union-attr]
    layer.weight_scale.copy_(torch.tensor([numbers(words[3])]))
    layer.bias.fill_(float(words[4]))
    layer.quantization_method = "nf"
    return layer


def test_the_worked_weight_only_layer(tmp_path):
    layer = example_weight_only()
    bb.save(nn.ModuleDict({"only": layer}), tmp_path / "m")
    written = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert entries()[2] == written["layers"]["only"]
    steps = {row[0]: numbers(row[1]) for row in table("| step | numbers |\n|---|---|\n| features |")}
    x = torch.tensor([steps["features"]])
    assert butterfly(x, 2).tolist() == [steps["features rotated, times sqrt(2)"]]
    assert layer.decoded_rows().tolist() == [steps["decoded row"]]
    assert layer(x).item() == pytest.approx(steps["result"][0], rel=1e-6)


def test_the_worked_head_of_4_bits():
    words = re.search(
        r"group (\d+), bytes `([0-9a-f ]+)` and (\d+) times `(\w+)`, `multipliers` (\d+), `scale` ([\d.]+), on",
        PAGE,
    )
    assert words
    group = int(words[1])
    head = CompactLinear(1, group, TableCoding(4, group), False)
    head.weight = torch.tensor([list(bytes.fromhex(words[2] + int(words[3]) * words[4]))], dtype=torch.uint8)
    head.multipliers = torch.tensor([[int(words[5])]], dtype=torch.uint8)
    head.scale = torch.tensor([float(words[6])])
    steps = {row[0]: numbers(row[1]) for row in table("| step | numbers |\n|---|---|\n| first columns |")}
    first = steps["first columns"]
    x = torch.tensor([first + [0.0] * (group - len(first))])
    integers, worth = round_input(x, 127)
    assert integers[0, : len(first)].tolist() == steps["their integers"]
    own = table_integers(head.codes())[0]
    assert (own / int(words[5]))[: len(first)].tolist() == steps["integers of the table"]
    assert not own[len(first) :].any()
    assert float(integers[0] @ own) == steps["sum with the multiplier"][0]
    assert table_values(head.codes())[0, : len(first)].tolist() == steps["values of the table"]
    assert head(x).item() == pytest.approx(steps["output of the head"][0], rel=1e-15)
    assert head(x).item() == float(torch.tensor(54400.0) * (head.scale * worth)[0, 0])


def canonical(value: object) -> str:
    """The checksum's text, by the page's own words, without Python's json."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{canonical(k)}:{canonical(value[k])}" for k in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(canonical, value)) + "]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, str):
        short = dict(zip('"\\\b\t\n\f\r', '"\\btnfr', strict=True))
        units = value.encode("utf-16-be")
        pairs = [int.from_bytes(units[i : i + 2]) for i in range(0, len(units), 2)]
        plain = [
            f"\\{short[c]}" if (c := chr(u)) in short else c if 32 <= u < 127 else f"\\u{u:04x}"
            for u in pairs
        ]
        return '"' + "".join(plain) + '"'
    return repr(value)


def test_the_checksum_of_the_configuration_can_be_computed_from_the_page(tmp_path):
    import hashlib

    levels = Levels(3, -0.5, (-1e-5, 0.1))
    layer = PackedLinear(8, 1, levels, InputCoding(levels, 4), False)
    bb.save(nn.ModuleDict({'größe_\U0001d54f "\\ \t\n\x7f\x01/': layer}), tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    stated = config["quantization_config"].pop("sha256")
    assert hashlib.sha256(canonical(config).encode("ascii")).hexdigest() == stated
    assert {"1e-05": 1e-5, "0.0": 0.0, "1e+16": 1e16}.items() == {
        repr(v): v for v in (1e-5, 0.0, 1e16)
    }.items()


def test_the_planes_of_a_row():
    ((codes, *planes),) = table("| codes of a row, 3 bits |")
    row = torch.tensor([numbers(codes)], dtype=torch.uint8)
    found = planes_of(pack(row, 8), row.shape[1], 3)
    assert [bytes(plane[0].tolist()).hex(" ") for plane in found] == planes


def test_the_files_of_widths(tmp_path):
    """Names, dtypes and shapes of every tensor, and the field `nested`, of a layer of the page's widths."""
    shown = next(entry for entry in entries() if "widths" in entry)
    layer = bb.prepare(
        nn.ModuleDict({"fc": nn.Linear(12, 5)}), bb.Recipe.bbq(nested=shown["widths"], keep_ends=False)
    )
    layer.fc(torch.randn(2, 12))  # type: ignore[operator]
    bb.save(bb.convert(layer), tmp_path / "m")
    section = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert section["layers"]["fc"]["nested"] == shown
    assert section["version"] == VERSIONS[-1]
    plane, scale = (torch.uint8, (5, 2)), (torch.float32, (5,))
    assert {
        name: {key: (value.dtype, tuple(value.shape)) for key, value in load_file(tmp_path / "m" / name).items()}
        for name in section["files"]
    } == {
        "model.safetensors": {"fc.bias": scale},
        "bits-1.safetensors": {
            "fc.weight_plane_1": plane, "fc.weight_scale_1": scale, "fc.act_scale_1": (torch.float32, (1,)),
        },
        "bits-3.safetensors": {
            "fc.weight_plane_2": plane, "fc.weight_plane_3": plane, "fc.weight_scale_3": scale,
            "fc.act_scale_3": (torch.float32, (1,)),
        },
    }  # fmt: skip
