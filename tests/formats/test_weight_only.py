"""Layers whose weight alone is quantized: the prepared function, exact bytes, load back, refusals."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_packed import rewrite, section_of, with_tensors
from torch import nn

import bellbox as bb
from bellbox import Recipe
from bellbox.core.grid import Grid
from bellbox.core.packing import pack
from bellbox.errors import BellboxError
from bellbox.evaluation.codes import agreement, code_use
from bellbox.formats.packed import sizes
from bellbox.models import LlamaConfig, build
from bellbox.nn import WeightOnlyLinear
from bellbox.quantizers import METHODS

CASES = {
    "bbq 2": Recipe.of("bbq", 2, weight_only="float", keep_ends=False),
    "bbq 3 tensor": Recipe.of("bbq", 3, weight_granularity="tensor", weight_only="float", keep_ends=False),
    "bbq signs": Recipe.of("bbq", 1, weight_only="float", options={"signs": True}, keep_ends=False),
    "rtn 255": Recipe.of("rtn", levels=255, weight_only="float", keep_ends=False),
    "rtn 256": Recipe.of("rtn", levels=256, weight_only="float", keep_ends=False),
    "quest 4": Recipe.of("quest", 4, weight_only="float", keep_ends=False),
    "ternary": Recipe.of("bbq", levels=3, weight_only="float", keep_ends=False),
    "nf 4": Recipe.of("nf", 4, weight_only="float", keep_ends=False),
    "nf 3 groups": Recipe.of("nf", 3, weight_only="float", options={"group": 32}, keep_ends=False),
    "kmeans 2": Recipe.of("kmeans", 2, weight_only="float", keep_ends=False),
    "kmeans 5 levels": Recipe.of("kmeans", levels=5, weight_only="float", keep_ends=False),
}


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(128, 96), nn.GELU(), nn.Linear(96, 8, bias=False))


def prepared(recipe: Recipe) -> nn.Sequential:
    torch.manual_seed(0)
    return bb.prepare(plain(), recipe).eval()


@pytest.mark.parametrize("recipe", CASES.values(), ids=CASES)
def test_the_packed_model_is_the_prepared_one(recipe: Recipe, tmp_path: Path) -> None:
    model, x = prepared(recipe), torch.randn(5, 128)
    packed = bb.convert(model)
    assert isinstance(packed[0], WeightOnlyLinear)
    assert isinstance(packed[0], nn.Linear)
    bb.save(packed, tmp_path / "m")
    loaded = bb.load(tmp_path / "m", into=plain())
    expected = model(x)
    for each in (packed, loaded, copy.deepcopy(packed)):
        assert (each(x) - expected).norm() <= 1e-6 * expected.norm()
        assert torch.equal(each(x), packed(x))
        for layer, other in zip(model[::2], each[::2], strict=True):
            assert torch.equal(layer.weight_codes(), other.weight_codes())  # type: ignore[operator]
            there = layer.turned(layer.weight_quantizer(layer.weight_rows()), back=True)  # type: ignore[operator]
            torch.testing.assert_close(other.weight + 0, there, rtol=1e-5, atol=1e-6)
    bb.save(loaded, tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "m" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    state = packed.state_dict()
    empty = bb.convert(prepared(recipe))
    for value in empty.state_dict().values():
        value.zero_()
    empty.load_state_dict(state)
    assert torch.equal(empty(x), packed(x))


@pytest.mark.parametrize("recipe", [CASES["bbq signs"], CASES["nf 3 groups"]], ids=["signs", "groups"])
def test_gradients_flow_to_the_input_and_autocast_is_followed(recipe: Recipe) -> None:
    model = prepared(recipe)
    packed, x = bb.convert(model), torch.randn(3, 128)
    grads = []
    for each in (model, packed):
        leaf = x.clone().requires_grad_()
        each(leaf).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        out = packed[0](x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), packed[0](x), rtol=0.05, atol=0.05)
    half = copy.deepcopy(packed).bfloat16()
    assert half[0].weight_scale.dtype == torch.float32
    assert half(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(BellboxError, match=r"weight-only layer of 128 inputs got shape \(3, 5\)"):
        packed(torch.randn(3, 5))
    with pytest.raises(BellboxError, match="cannot be written"):
        packed[0].weight = torch.zeros(96, 128)


def test_exact_bytes_and_configuration(tmp_path: Path) -> None:
    even = WeightOnlyLinear(4, 2, Grid(4, -0.5), True, block=2, signs=True)
    even.fill_from_rows(pack(torch.tensor([[0, 1, 2, 3], [3, 3, 0, 1]], dtype=torch.uint8), 4))
    even.weight_scale.copy_(torch.tensor([1.0, 2.0]))
    even.bias.copy_(torch.tensor([0.5, -0.5]))
    even.act_signs.copy_(torch.tensor([1, -1, 1, 1]))  # type: ignore[union-attr]
    even.quantization_method = "bbq"
    table = WeightOnlyLinear(4, 1, Grid(2, -0.5), False, group=2, table=True)
    table.fill_from_rows(torch.tensor([[0b0110]], dtype=torch.uint8))
    table.weight_scale.copy_(torch.tensor([[0.5, 3.0]]))
    table.weight_table.copy_(torch.tensor([-1.0, 0.25]))  # type: ignore[union-attr]
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert table(x).tolist() == [[-0.5 + 0.25 + 2.25 - 12.0]]
    rotated = (1 - 2, 1 + 2, 3 + 4, 3 - 4)  # the signs, then blocks of two, times sqrt(2)
    sums = sum(q * v for q, v in zip((-1.5, -0.5, 0.5, 1.5), rotated, strict=True))
    assert even(x)[0, 0].item() == pytest.approx(0.5 + 0.5**0.5 * sums, rel=1e-6)
    bb.save(nn.Sequential(even, table), tmp_path / "m")
    data = (tmp_path / "m" / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    expected = {
        "0.weight_packed": ("U8", [2, 1], bytes([0b11_10_01_00, 0b01_00_11_11])),
        "0.weight_scale": ("F32", [2], struct.pack("<2f", 1, 2)),
        "0.act_signs": ("I8", [4], struct.pack("<4b", 1, -1, 1, 1)),
        "0.bias": ("F32", [2], struct.pack("<2f", 0.5, -0.5)),
        "1.weight_packed": ("U8", [1, 1], bytes([0b0110])),
        "1.weight_scale": ("F32", [1, 2], struct.pack("<2f", 0.5, 3)),
        "1.weight_table": ("F32", [2], struct.pack("<2f", -1, 0.25)),
    }
    assert set(header) == set(expected)
    for name, (dtype, shape, content) in expected.items():
        start, end = header[name]["data_offsets"]
        assert (header[name]["dtype"], header[name]["shape"], body[start:end]) == (dtype, shape, content), (
            name
        )
    assert section_of(tmp_path / "m")["layers"] == {
        "0": {
            "function": "weight_only_linear", "method": "bbq", "in_features": 4, "out_features": 2, "bias": True,
            "hadamard_block": 2, "signs": True, "weight": {"levels": 4, "zero_point": -0.5, "group": None},
        },
        "1": {
            "function": "weight_only_linear", "method": "", "in_features": 4, "out_features": 1, "bias": False,
            "hadamard_block": 1, "signs": False, "weight": {"levels": 2, "zero_point": None, "group": 2},
        },
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    bb.save(bb.convert(prepared(CASES["nf 3 groups"])), tmp_path / "m")
    return tmp_path / "m"


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], None]:
    return lambda section: change(section["layers"]["0"]) and None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            edit(lambda e: e["weight"].update(group=48)),
            "layer '0': group 48: must divide the 128 in_features",
        ),
        (edit(lambda e: e["weight"].update(group=0)), "group"),
        (edit(lambda e: e["weight"].update(group=64)), "weight_scale"),
        (edit(lambda e: e["weight"].update(group=None)), "weight_scale"),
        (edit(lambda e: e["weight"].pop("group")), "group"),
        (edit(lambda e: e["weight"].update(zero_point=-0.5)), "weight_table"),
        (edit(lambda e: e["weight"].update(levels=4)), "weight_packed"),
        (edit(lambda e: e.update(hadamard_block=3)), "must be a power of two that divides 128"),
        (edit(lambda e: e.update(signs=True)), "act_signs"),
        (edit(lambda e: e.update(normalise="rms")), "normalise"),
        (edit(lambda e: e.update(activation=None)), "activation"),
        (edit(lambda e: e.update(function="packed_linear")), "packed_linear"),
        (edit(lambda e: e.update(out_features=95)), "in the file and .* in the model"),
        (edit(lambda e: e.update(method="m" * 33)), "method"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    folder: Path, change: Callable[[dict[str, Any]], object], says: str
) -> None:
    rewrite(folder, change)
    with pytest.raises(BellboxError, match=says) as caught:
        bb.load(folder, into=plain())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t["0.weight_table"].copy_(t["0.weight_table"].flip(0)), "'0.weight_table' does not rise"),
        (lambda t: t["0.weight_table"][0].fill_(float("-inf")), "'0.weight_table' holds NaN or infinity"),
        (lambda t: t["2.weight_scale"][0, 0].fill_(float("nan")), "'2.weight_scale' holds NaN or infinity"),
        (lambda t: t.update({"0.weight_table": t["0.weight_table"][1:].clone()}), "0.weight_table"),
        (lambda t: t.pop("0.weight_table"), "'0.weight_table' is missing"),
        (lambda t: t.update({"0.act_scale": torch.ones(1)}), "'0.act_scale' is not in the model"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object], says: str
) -> None:
    with_tensors(folder, change)
    with pytest.raises(BellboxError, match=says):
        bb.load(folder, into=plain())


def test_codes_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    bb.save(bb.convert(prepared(CASES["kmeans 5 levels"])), tmp_path / "m")
    with_tensors(tmp_path / "m", lambda t: t["0.weight_packed"][0].fill_(255))
    with pytest.raises(BellboxError, match="codes above 4"):
        bb.load(tmp_path / "m", into=plain())


def test_a_packed_layer_does_not_share_the_input_of_a_weight_only_one(tmp_path: Path) -> None:
    rest = bb.prepare(nn.Linear(64, 64), Recipe.bbq(2, keep_ends=False))
    rest(torch.randn(2, 64))
    alone = bb.convert(bb.prepare(nn.Linear(64, 64), CASES["nf 4"]))
    bb.save(nn.Sequential(alone, bb.convert(rest)), tmp_path / "m")
    rewrite(tmp_path / "m", lambda section: section["layers"]["1"].update(input="0"))
    with pytest.raises(
        BellboxError, match="layer '1': its input is that of layer '0', which is a weight_only"
    ):
        bb.load(tmp_path / "m", into=nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))


def test_a_language_model_with_all_that_looks_at_its_layers(tmp_path: Path) -> None:
    config = LlamaConfig(13, 32, 64, 1, 2, 1, max_position_embeddings=8)
    ids = torch.arange(7)[None]
    model = bb.prepare(build(config, seed=0), Recipe.of("nf", 4, weight_only="float")).eval()
    packed = bb.convert(model, embeddings="int8")
    bb.save(packed, tmp_path / "m")
    loaded = bb.load(tmp_path / "m")
    assert torch.equal(loaded(ids), packed(ids))
    counted = sizes(loaded)
    data = (tmp_path / "m" / "model.safetensors").read_bytes()
    assert counted.packed_bytes + counted.other_bytes == len(data) - 8 - int.from_bytes(data[:8], "little")
    assert counted.quantized_parameters == 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64
    assert counted.packed_bytes == counted.quantized_parameters // 2 + 4 * (32 * 3 + 16 * 2 + 64 * 2) + 7 * 64
    found = agreement(model, bb.convert(model), [ids])
    assert found.holds
    assert found.input_codes == 0
    use = code_use(loaded, ids)
    assert use is not None
    assert len(use.weight) == 7
    assert use.activation == {}
    table = bb.summary(loaded)
    assert "float" in table
    rounded = 2 * 13 * 32  # embedding and head
    assert f"{counted.quantized_parameters + rounded:,} quantized" in table
    with pytest.raises(BellboxError, match="already prepared or packed"):
        bb.prepare(loaded, Recipe.bbq(2))


@pytest.mark.parametrize("method", ["bbq", "kmeans"])
def test_convolutions_are_refused_by_name(method: str) -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3))
    with pytest.warns(UserWarning, match="trained, but not packed: 0"):
        bb.prepare(model, Recipe.of(method, 2, weight_only="float", keep_ends=False))
    with pytest.raises(BellboxError, match="0 cannot be packed"):
        bb.convert(model)


def test_a_weight_that_is_nan_is_refused_by_name() -> None:
    model = prepared(CASES["nf 4"])
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")  # type: ignore[index]
    with pytest.raises(BellboxError, match=r"2\.weight holds NaN"):
        bb.convert(model)


def test_a_method_whose_name_no_file_can_hold_is_refused(tmp_path: Path) -> None:
    packed = bb.convert(prepared(CASES["nf 4"]))
    packed[0].quantization_method = "é"
    with pytest.raises(BellboxError, match="layer '0': a method called 'é' cannot be stored"):
        bb.save(packed, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].on_grid])
def test_every_method_packs_weights_alone(method: str) -> None:
    model = prepared(Recipe.of(method, weight_only="float", keep_ends=False))
    packed, x = bb.convert(model), torch.randn(2, 128)
    assert packed[0].quantization_method == method
    assert (packed(x) - model(x)).norm() <= 1e-6 * model(x).norm()
