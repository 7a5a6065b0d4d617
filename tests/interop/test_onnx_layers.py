"""Packed layers as ONNX: the bits of the packed model from stock onnxruntime, its default optimisations on."""

from __future__ import annotations

import copy
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

import bellbox as bb
from bellbox.core import packing
from bellbox.core.grid import Grid, Levels
from bellbox.errors import BellboxError
from bellbox.interop.onnx import check, export, exporting
from bellbox.models.llama import RMSNorm
from bellbox.nn import PackedLinear, WeightOnlyLinear
from bellbox.nn.binarized_linear import BinarizedLinear
from bellbox.nn.compact import CompactEmbedding, CompactLinear, coding_for
from bellbox.nn.packed import InputCoding
from bellbox.recipe import Recipe

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

RECIPES = {
    **{f"bbq {n} levels": Recipe.bbq(levels=n) for n in (2, 3, 4, 5, 8, 16)},
    "bbq 2 bits by 16 levels": Recipe.bbq(bits=2, activation_levels=16),
    "bbq 4 bits by 4 levels": Recipe.bbq(bits=4, activation_levels=4),
    "bbq static": Recipe.bbq(bits=2, granularity="ema"),
    "bbq without rotation": Recipe.bbq(bits=2, block=1),
    "bbq int8 inputs": Recipe.bbq(bits=4, weight_only="int8"),
    "quest": Recipe.of("quest", 4),
    "quest ternary": Recipe.of("quest", levels=3),
    "lsq": Recipe.of("lsq", 3),
    "pact": Recipe.of("pact", 4),
    "seq": Recipe.of("seq", 2),
    "n2uq": Recipe.of("n2uq", 2),
    "cewt": Recipe.cewt(bits=2),
    "rtn": Recipe.of("rtn", 4),
    "rtn 8 bits": Recipe.of("rtn", levels=255),
    "ternary mass": Recipe.of("ternary_mass", levels=3),
}
WEIGHT_ONLY = {
    "bbq": Recipe.bbq(bits=2, weight_only="float"),
    "nf": Recipe.of("nf", 4, weight_only="float"),
    "kmeans": Recipe.of("kmeans", 3, weight_only="float"),
}


class Beside(nn.Module):
    """Layers that read one tensor, their outputs one after the other."""

    def __init__(self, layers: dict[str, nn.Module], axis: int = -1) -> None:
        super().__init__()
        self.layers, self.axis = nn.ModuleDict(layers), axis

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One after the other along `axis`."""
        return torch.cat([layer(x) for layer in self.layers.values()], self.axis)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def packed(layer: nn.Module, recipe: Recipe, example: torch.Tensor) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a layer without a factor of two
        made = bb.prepare(copy.deepcopy(layer), recipe)
        made(example)
        return bb.convert(made.eval())


def run(path, x: torch.Tensor, optimised: bool = True) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def odd_rows(*shape: int) -> torch.Tensor:
    """Rows with NaN, infinity, zeros, and tiny and huge numbers among usual ones."""
    x = torch.randn(*shape)
    rows = x.view(-1, shape[-1])
    rows[0, 3], rows[1, 5], rows[2] = float("nan"), float("inf"), 0.0
    rows[3] *= 1e-30
    rows[4] *= 1e25
    rows[5] = 1e31
    return x


@pytest.fixture(scope="module")
def all_methods() -> Beside:
    torch.manual_seed(0)
    sizes, example = (40, 7, 1, 17, 64), torch.randn(64, 96)
    return Beside(
        {
            name.replace(" ", "_"): packed(nn.Linear(96, sizes[i % 5], bias=bool(i % 2)), recipe, example)
            for i, (name, recipe) in enumerate(RECIPES.items())
        }
    )


@pytest.fixture(scope="module")
def file_of_all(all_methods, tmp_path_factory):
    path = tmp_path_factory.mktemp("all") / "model.onnx"
    export(all_methods, (torch.randn(2, 6, 96),), path)
    return path


def test_layers_of_every_method_give_their_own_bits(all_methods, file_of_all):
    path, x = file_of_all, odd_rows(4, 6, 96)
    with torch.no_grad():
        for rows in (x, torch.randn(3, 6, 96)):
            expected = all_methods(rows).numpy()
            assert np.array_equal(run(path, rows), expected, equal_nan=True)
    assert np.isnan(all_methods(x).numpy()[0, :2]).all()
    assert np.array_equal(run(path, x, optimised=False), all_methods(x).numpy(), equal_nan=True)


@pytest.mark.parametrize("weights", ["int8"])  # int4: test_onnx_models.py
def test_wider_weights_are_the_same_function(all_methods, weights, tmp_path):
    some = ("bbq_4_levels", "bbq_16_levels", "quest", "ternary_mass")
    model, x = Beside({name: all_methods.layers[name] for name in some}), torch.randn(7, 96)
    export(model, (x,), tmp_path / "model.onnx", weights=weights)
    with torch.no_grad():
        assert np.array_equal(run(tmp_path / "model.onnx", x), model(x).numpy())
    made = onnx.load(tmp_path / "model.onnx")
    assert made.opset_import[0].version == {"int4": 21, "int8": 18}[weights]
    kinds = {each.data_type for each in made.graph.initializer if each.name.endswith("weight")}
    assert kinds == {getattr(onnx.TensorProto, weights.upper())}


def test_weights_lie_in_as_few_bits_as_the_format_has(file_of_all, tmp_path):
    model = onnx.load(file_of_all)
    kinds = {each.name: onnx.TensorProto.DataType.Name(each.data_type) for each in model.graph.initializer}
    for name, kind in (
        ("bbq_2_levels", "INT2"),
        ("bbq_3_levels", "INT2"),
        ("bbq_4_levels", "INT2"),
        ("bbq_8_levels", "INT4"),
        ("bbq_16_levels", "INT4"),
        ("rtn_8_bits", "INT8"),
    ):
        assert kinds[f"layers.{name}.weight"] == kind
    assert {each.domain for each in model.opset_import} == {""}
    assert {node.domain for node in model.graph.node} == {""}
    onnx.checker.check_model(model, full_check=True)
    large = nn.Linear(512, 512)
    export(
        packed(large, Recipe.bbq(bits=2), torch.randn(8, 512)),
        (torch.randn(2, 512),),
        tmp_path / "large.onnx",
    )
    assert (tmp_path / "large.onnx").stat().st_size < 512 * 512 / 4 + 20_000


def test_layers_that_read_one_tensor_alike_code_it_once(tmp_path):
    names = "q_proj", "k_proj", "v_proj"
    model = packed(Beside({name: nn.Linear(64, 8) for name in names}), Recipe.bbq(bits=2), torch.randn(8, 64))
    export(model, (torch.randn(2, 64),), tmp_path / "model.onnx")
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node)
    assert kinds["MatMulInteger"] == 3
    assert (kinds["Split"], kinds["GreaterOrEqual"], kinds["ReduceSumSquare"]) == (6, 3, 1)


def test_odd_grids_and_sums_beyond_16_bits(tmp_path):
    """Zero points that no byte holds, and integers whose pairs of products would saturate without VNNI."""
    layers = {}
    for i, (weights, inputs) in enumerate(
        (
            (Grid(4, -6.0), Grid(4, -5.0)),
            (Grid(256, 0.0), Grid(256, 0.0)),
            (Grid(16, -0.5), Grid(128, -0.5)),
            (Grid(7, 2.5), Grid(3, 10.0)),
        )
    ):
        thresholds = torch.linspace(-2, 2, inputs.n + 1)[1:-1].tolist()
        coding = InputCoding(Levels(inputs.n, inputs.zero_point, tuple(thresholds)), 32, "norm", True, True)
        layer = PackedLinear(96, 9, weights, coding, True)
        layer.fill_from_rows(packing.pack(torch.randint(0, weights.n, (9, 96), dtype=torch.uint8), weights.n))
        layer.weight_scale, layer.bias = torch.rand(9), torch.randn(9)
        layer.act_scale, layer.act_signs = (
            torch.rand(1),
            torch.randint(0, 2, (96,)).mul(2).sub(1).to(torch.int8),
        )
        layers[str(i)] = layer
    model, x = Beside(layers).eval(), odd_rows(9, 96)
    export(model, (x,), tmp_path / "model.onnx")
    with torch.no_grad():
        assert np.array_equal(run(tmp_path / "model.onnx", x), model(x).numpy(), equal_nan=True)


def test_a_distinct_scale_for_each_row_survives_all_optimisations(tmp_path):
    """onnxsim 749: K = 96, N = 40, block 32, where a default fusion miscomputed block-scaled INT4."""
    layer: nn.Module = packed(
        nn.Linear(96, 40, bias=False), Recipe.bbq(bits=4, block=32), torch.randn(64, 96)
    )
    layer.weight_scale = torch.arange(1, 41).float() / 64
    path, x = tmp_path / "model.onnx", torch.randn(5, 96)
    export(layer, (x,), path)
    hadamard = torch.ones(1, 1)
    for _ in range(5):
        hadamard = torch.cat((torch.cat((hadamard, hadamard), 1), torch.cat((hadamard, -hadamard), 1)))
    sigma = x.double().square().mean(1, keepdim=True).sqrt()
    v = (x.view(5, 3, 32).double() @ hadamard.double()).view(5, 96) / sigma / 32**0.5
    levels = (v[..., None] >= layer.act_thresholds).sum(-1).double() - 8
    by_hand = (levels @ (layer.weight_codes().double() - 8).t()) * layer.weight_scale * layer.act_scale
    assert np.abs(run(path, x) - by_hand.numpy()).max() <= 1e-4 * by_hand.abs().max()


CONVOLUTIONS = {
    "plain": nn.Conv2d(16, 8, 3, padding=1),
    "grouped": nn.Conv2d(16, 8, 3, padding=1, groups=2, bias=False),
    "dilated": nn.Conv2d(16, 8, 3, padding=2, dilation=2),
    "depthwise": nn.Conv2d(16, 16, (1, 5), padding=(0, 2), groups=16),
    "uneven": nn.Conv2d(16, 8, (4, 1), padding="same"),
}


@pytest.mark.parametrize("bits", [2, 3])
def test_convolutions_give_their_own_bits(bits, tmp_path):
    x = torch.randn(5, 16, 9, 7)
    layers = {
        name: packed(layer, Recipe.bbq(bits=bits, activation_levels=16 if bits == 3 else None), x)
        for name, layer in CONVOLUTIONS.items()
    }
    model = Beside(layers, axis=1).eval()
    path = tmp_path / "model.onnx"
    auto = torch.export.Dim.AUTO
    export(model, (x,), path, dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    given = torch.randn(3, 16, 11, 12)
    given[0, 2, 3, 4], given[1] = float("nan"), 0.0
    with torch.no_grad():
        for images in (x, given):
            assert np.array_equal(run(path, images), model(images).numpy(), equal_nan=True)


def test_fused_convolutions_strides_and_lines(tmp_path):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(16, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
            self.short = nn.Conv2d(16, 16, 1, 2, bias=False)
            self.line = nn.Conv1d(16, 8, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.line(torch.relu(self.norm(self.conv(x)) + self.short(x)).flatten(2))

    x = torch.randn(4, 16, 8, 8)
    model = packed(Net(), Recipe.bbq(bits=2), x)
    model = bb.fuse_convolutions(bb.fold_batch_norms(model))
    export(model, (x,), tmp_path / "model.onnx")
    with torch.no_grad():
        expected = model(x)
    got = torch.from_numpy(run(tmp_path / "model.onnx", x))
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


class Tables(nn.Module):
    """Rows of embeddings, a norm, and heads, of every precision."""

    def __init__(self, rows: int = 21, columns: int = 64) -> None:
        super().__init__()
        table = torch.randn(rows, columns)
        self.embeddings, self.heads = nn.ModuleList(), nn.ModuleList()
        for precision in ("bf16", "int8", "int4"):
            coding = coding_for(precision, columns)
            embedding, head = (
                CompactEmbedding(rows, columns, coding),
                CompactLinear(rows, columns, coding, True),
            )
            embedding.fill(table)
            head.tie(embedding)
            head.bias = torch.randn(rows)
            self.embeddings.append(embedding)
            self.heads.append(head)
        self.norm = RMSNorm(columns, 1e-6)

    def forward(self, ids: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
        return [
            *(embedding(ids) for embedding in self.embeddings),
            *(head(x) for head in self.heads),
            self.norm(x),
        ]


def test_embeddings_heads_and_norms(tmp_path):
    model, path = Tables(), tmp_path / "model.onnx"
    nn.init.normal_(model.norm.weight)
    ids, x = torch.randint(0, 21, (3, 5)), odd_rows(3, 4, 64)
    x.view(-1, 64)[4:6] = torch.randn(2, 64)
    export(model, (ids, x), path)
    session = onnxruntime.InferenceSession(path)
    got = session.run(None, {"ids": ids.numpy(), "x": x.numpy()})
    with torch.no_grad():
        expected = [each.numpy() for each in model(ids, x)]
    for i, (one, other) in enumerate(zip(got, expected, strict=True)):
        if i == 3:  # bf16: nothing is pinned there
            np.testing.assert_allclose(one[1:], other[1:], rtol=2**-7, atol=0.05)
        else:
            assert np.array_equal(one, other, equal_nan=True), i


def test_weight_only_layers_multiply_floats(tmp_path):
    example = torch.randn(16, 64)
    layers = {
        name: packed(nn.Linear(64, 9, bias=i < 2), recipe, example)
        for i, (name, recipe) in enumerate(WEIGHT_ONLY.items())
    }
    assert all(isinstance(layer, WeightOnlyLinear) for layer in layers.values())
    model, path = Beside(layers), tmp_path / "model.onnx"
    export(model, (example,), path)
    with torch.no_grad():
        expected = model(example).numpy()
    np.testing.assert_allclose(run(path, example), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    kinds = {each.name: each.data_type for each in onnx.load(path).graph.initializer}
    assert kinds["layers.bbq.weight"] == onnx.TensorProto.UINT2
    assert kinds["layers.nf.weight"] == onnx.TensorProto.UINT4


def test_a_prepared_model_is_converted_and_stays_the_user_s(tmp_path):
    model = bb.prepare(
        nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)), Recipe.bbq(bits=2, keep_ends=False)
    )
    x = torch.randn(16, 64)
    model(x)
    own = model[0].forward
    export(model, (x,), tmp_path / "model.onnx", input_names=["v1"], output_names=["made"])
    assert model.training
    assert model[0].forward == own
    assert "forward" not in model[0].__dict__
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    got = session.run(["made"], {"v1": x[:3].numpy()})[0]
    with torch.no_grad():
        assert np.array_equal(got, bb.convert(model.eval())(x[:3]).numpy())


def layer() -> nn.Module:
    return packed(nn.Linear(64, 8), Recipe.bbq(bits=2), torch.randn(8, 64))


class Branches(nn.Module):
    """What no tracer follows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = layer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) if float(x.sum()) > 0 else x


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (
            layer,
            {"opset": 21},
            "opset 21 has no INT2 tensors for the weights: take opset 25, or int4 weights",
        ),
        (layer, {"opset": 18, "weights": "int4"}, "opset 18 has no INT4 tensors"),
        (layer, {"opset": 13, "weights": "int8"}, "opset 13: exports have one from 18 to 25"),
        (layer, {"weights": "int1"}, "weights can be int2, int4, int8, not 'int1'"),
        (lambda: BinarizedLinear(64, 8, True, 3, True, 8), {}, "binarized layers cannot be exported"),
        (Branches, {}, "the model cannot be exported to ONNX: "),
        (
            lambda: nn.Sequential(layer()).bfloat16(),
            {},
            "the model cannot be exported|does not compute in fp32",
        ),
    ],
)
def test_refusals_are_one_line_and_write_nothing(make, options, said, tmp_path):
    (tmp_path / "model.onnx").write_text("before")
    model, x = make(), torch.randn(2, 64, dtype=torch.bfloat16 if "fp32" in said else torch.float32)
    with pytest.raises(BellboxError, match=said) as caught:
        export(model, (x,), tmp_path / "model.onnx", **options)
    assert "\n" not in str(caught.value)
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "before"


def test_a_missing_extra_is_named(monkeypatch, tmp_path):
    import importlib

    found = importlib.import_module

    def without(name: str, *args):
        if name.startswith("onnxscript"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return found(name, *args)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(BellboxError, match=r"onnxscript is not installed; .*bellbox\[onnx\]"):
        export(layer(), (torch.randn(2, 64),), tmp_path / "model.onnx")


def test_constants_beyond_one_file_lie_in_a_second_one(monkeypatch, tmp_path):
    monkeypatch.setattr(exporting, "_ONE_FILE", 1000)
    x = torch.randn(3, 64)
    model = packed(nn.Linear(64, 64), Recipe.bbq(bits=2), x)
    export(model, (x,), tmp_path / "model.onnx")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    with torch.no_grad():
        assert np.array_equal(run(tmp_path / "model.onnx", x), model(x).numpy())
    found = check.agreement(model, tmp_path / "model.onnx", [x])
    assert found.holds
    assert found.codes == x.numel()


def test_what_cannot_be_written_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "no folder" / "model.onnx"):
        with pytest.raises(BellboxError, match=r"is a folder|cannot be written"):
            export(layer(), (torch.randn(2, 64),), path)
