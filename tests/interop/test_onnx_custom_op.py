"""The operator of native/onnx in onnxruntime: the bits of the packed model, in one node a layer."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import bellbox as bb
from bellbox.core import packing
from bellbox.core.grid import Grid, Levels
from bellbox.interop.onnx import export
from bellbox.nn import PackedLinear
from bellbox.nn.packed import InputCoding

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = Path(os.environ.get("BELLBOX_ONNX_LIBRARY") or ROOT / "build" / "onnx" / "libbellbox_onnx.so")
pytestmark = pytest.mark.skipif(not LIBRARY.is_file(), reason=f"no {LIBRARY}: make onnx")


class Beside(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(x) for layer in self.layers], -1)


def layer(
    weights: Grid, inputs: Grid, normalise: str, rescale: bool, bias: bool, signs: bool
) -> PackedLinear:
    thresholds = tuple(torch.linspace(-2, 2, inputs.n + 1)[1:-1].tolist())
    levels = Levels(inputs.n, inputs.zero_point, thresholds)
    coding = InputCoding(levels, 1 if normalise == "absmax" else 32, normalise, rescale, signs)
    made = PackedLinear(96, 23, weights, coding, bias)
    made.fill_from_rows(packing.pack(torch.randint(0, weights.n, (23, 96), dtype=torch.uint8), weights.n))
    made.weight_scale, made.act_scale = torch.rand(23), torch.rand(1)
    if bias:
        made.bias = torch.randn(23)
    if signs:
        made.act_signs = torch.randint(0, 2, (96,)).mul(2).sub(1).to(torch.int8)
    if normalise == "static":
        made.act_rstd = torch.rand(1)
    return made


@pytest.fixture(scope="module")
def model() -> Beside:
    torch.manual_seed(0)
    kinds = ("rms", "absmax", "static")
    grids = [(2, 2), (3, 4), (4, 16), (8, 8), (16, 5), (16, 16)]
    made: list[nn.Module] = [
        layer(Grid(w, -0.5), Grid(a, 0.0 if a > 4 else -0.5), kinds[i % 3], i % 3 == 0, bool(i % 2), i == 3)
        for i, (w, a) in enumerate(grids)
    ]
    # What the operator does not compute stays standard operators.
    made.append(layer(Grid(200, -28.0), Grid(4, -0.5), "rms", False, True, False))
    made.append(layer(Grid(4, -0.5), Grid(4, -0.5), "norm", True, True, False))
    return Beside(made).eval()


def session(path: Path):
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(LIBRARY))
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def test_every_kind_of_layer_gives_its_own_bits(model, tmp_path):
    path, x = tmp_path / "model.onnx", torch.randn(4, 5, 96)
    x[0, 0, 3], x[1, 1, 7], x[2], x[3] = float("nan"), float("inf"), 0.0, 1e31
    export(model, (x,), path, custom_op=True)
    kinds = Counter(node.op_type for node in onnx.load(path).graph.node)
    assert (kinds["PackedLinear"], kinds["MatMulInteger"]) == (6, 2)
    runs = session(path)
    for rows in (x, torch.randn(1, 5, 96), torch.randn(70, 5, 96)):
        with torch.no_grad():
            expected = model(rows).numpy()
        assert np.array_equal(runs.run(None, {"x": rows.numpy()})[0], expected, equal_nan=True)


def test_without_the_library_and_with_damaged_constants_it_is_an_error(model, tmp_path):
    path = tmp_path / "model.onnx"
    export(Beside([model.layers[0]]), (torch.randn(2, 96),), path, custom_op=True)
    with pytest.raises(Exception, match="PackedLinear"):
        onnxruntime.InferenceSession(path)
    proto = onnx.load(path)
    packed = next(each for each in proto.graph.initializer if each.name.endswith("packed"))
    packed.CopyFrom(onnx.numpy_helper.from_array(np.zeros(64, np.uint8), packed.name))
    onnx.save(proto, path)
    with pytest.raises(Exception, match="packed has too few bytes"):
        session(path).run(None, {"x": np.zeros((1, 96), np.float32)})
    node = next(node for node in proto.graph.node if node.op_type == "PackedLinear")
    next(each for each in node.attribute if each.name == "block").i = 7
    onnx.save(proto, path)
    with pytest.raises(Exception, match="the block does not divide in_features"):
        session(path)


def test_a_trained_model_through_the_check(tmp_path):
    from bellbox.interop.onnx.check import agreement

    torch.manual_seed(0)
    x = torch.randn(32, 64)
    trained = bb.prepare(
        nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 8)), bb.Recipe.bbq(keep_ends=False)
    )
    trained(x)
    packed = bb.convert(trained.eval())
    export(packed, (x,), tmp_path / "model.onnx", custom_op=True)
    found = agreement(packed, tmp_path / "model.onnx", [x], LIBRARY)
    assert found.holds
    assert found.difference == 0.0
    assert found.codes == 32 * (64 + 48)
    packed[0].weight_scale[3] *= 1.01  # what the file does not know of
    assert agreement(packed, tmp_path / "model.onnx", [x], LIBRARY).wrong >= 20  # all but sums of 0
