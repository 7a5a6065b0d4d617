"""Packed convolutions on disk: exact bytes, load back, refused where something does not fit."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_packed import rewrite, section_of
from torch import nn

import bellbox as bb
from bellbox.core.geometry import ConvGeometry
from bellbox.core.grid import Grid, Levels
from bellbox.core.packing import pack
from bellbox.errors import BellboxError
from bellbox.models import ResNet, ResNetConfig, ViT, ViTConfig
from bellbox.nn import InputCoding, PackedConv2d

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
CONV = "stages.0.0.first.conv"


def packed(model: nn.Module, **choices: Any) -> nn.Module:
    model = bb.prepare(model, bb.Recipe.bbq(**choices))
    model(IMAGES)
    return bb.convert(model.eval())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    bb.save(packed(ResNet(ResNetConfig(width=8, stages=2)), bits=2), tmp_path / "m")
    return tmp_path / "m"


def test_exact_bytes_of_the_tensors(tmp_path: Path) -> None:
    geometry = ConvGeometry((1, 2), (1, 2), (1, 1, 0, 0), (1, 1), 2)
    coding = InputCoding(Levels.gaussian(4), 2, signs=True)
    layer = PackedConv2d(4, 2, geometry, Grid(4, -0.5), coding, True)
    layer.fill_from_rows(pack(torch.tensor([[0, 1, 2, 3], [3, 3, 0, 1]], dtype=torch.uint8), 4))
    layer.weight_scale.copy_(torch.tensor([1.0, 2.0]))
    layer.act_signs.copy_(torch.tensor([1, -1]))  # type: ignore[union-attr]
    bb.save(nn.ModuleDict({"c": layer}), tmp_path / "m")
    data = (tmp_path / "m" / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    expected = {
        "c.weight_packed": ("U8", [2, 1], bytes([0b11_10_01_00, 0b01_00_11_11])),
        "c.weight_scale": ("F32", [2], struct.pack("<2f", 1, 2)),
        "c.act_scale": ("F32", [1], struct.pack("<f", 0)),
        "c.act_signs": ("I8", [2], struct.pack("<2b", 1, -1)),
        "c.bias": ("F32", [2], struct.pack("<2f", 0, 0)),
    }
    assert set(header) == set(expected)
    for name, (dtype, shape, content) in expected.items():
        start, end = header[name]["data_offsets"]
        assert (header[name]["dtype"], header[name]["shape"], body[start:end]) == (dtype, shape, content), (
            name
        )
    entry = section_of(tmp_path / "m")["layers"]["c"]
    assert entry["function"] == "packed_conv2d"
    assert entry["in_features"] == 4
    assert entry["convolution"] == {
        "channels": 4, "groups": 2, "kernel": [1, 2], "stride": [1, 2], "padding": [1, 1, 0, 0], "dilation": [1, 1],
    }  # fmt: skip


@pytest.mark.parametrize(
    "choices",
    [
        {"bits": 1},
        {"bits": 2},
        {"levels": 3},
        {"bits": 3},
        {"bits": 4},
        {"bits": 2, "options": {"zeta": 2.45}},
    ],
)
@pytest.mark.parametrize(
    "make",
    [
        lambda: ResNet(ResNetConfig(width=8, stages=2)),
        lambda: ResNet(ResNetConfig(width=8, stages=2, stem_kernel=7, stem_stride=2, max_pool=True)),
        lambda: ViT(ViTConfig(image_size=16, hidden_size=16)),
        lambda: ViT(ViTConfig(image_size=16, hidden_size=16, class_token=True, fused_qkv=True)),
    ],
)
def test_a_loaded_model_is_the_saved_one(
    make: Callable[[], nn.Module], choices: dict[str, Any], tmp_path: Path
) -> None:
    model = packed(make(), **choices)
    bb.save(model, tmp_path / "m")
    assert section_of(tmp_path / "m")["version"] == 4
    with torch.no_grad():
        expected = model(IMAGES)
        assert torch.equal(bb.load(tmp_path / "m")(IMAGES), expected)
        assert torch.equal(bb.load(tmp_path / "m", into=make())(IMAGES), expected)
    bb.save(bb.load(tmp_path / "m"), tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "m" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], None]:
    return lambda config: change(config["layers"][CONV]) and None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(version=8), "format version 8; this Bellbox reads 2, 3, 4, 5, 6 and 7"),
        (edit(lambda e: e["convolution"].update(groups=3)), "3 groups do not divide 8 and 8 channels"),
        (edit(lambda e: e["convolution"].update(kernel=[3, 2])), "in_features is 72, which is not kernel"),
        (edit(lambda e: e["convolution"].update(stride=[0, 1])), "stride is"),
        (edit(lambda e: e["convolution"].update(padding=[1, 1, 1])), "convolution.padding"),
        (edit(lambda e: e["convolution"].update(surprise=1)), "surprise"),
        (edit(lambda e: e["convolution"].update(stride=[2, 1])), "in the file and .* in the model"),
        (edit(lambda e: e.update(hadamard_block=16)), "must be a power of two that divides 8"),
        (edit(lambda e: e.pop("convolution")), "convolution"),
        (
            edit(lambda e: (e.pop("convolution"), e.update(function="packed_linear", input=CONV))),
            "is Conv2d in the model, not a linear layer",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(
    folder: Path, change: Callable[[dict[str, Any]], object], says: str
) -> None:
    rewrite(folder, change)
    with pytest.raises(BellboxError, match=says) as caught:
        bb.load(folder)
    assert "\n" not in str(caught.value)


def test_an_image_of_another_shape_is_refused_in_one_line(folder: Path) -> None:
    with pytest.raises(BellboxError, match="a packed convolution of 8 channels got shape"):
        bb.load(folder).stages(torch.rand(1, 7, 8, 8))  # type: ignore[operator]
