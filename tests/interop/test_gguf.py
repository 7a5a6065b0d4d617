"""GGUF files, read by others: the gguf package's decoder and reader, and transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bellbox as bb
from bellbox.core.grid import Grid
from bellbox.models import GPTConfig, LlamaConfig, build

gguf = pytest.importorskip("gguf")

from bellbox.interop.gguf import WEIGHTS_ONLY, export_gguf  # noqa: E402
from bellbox.interop.gguf.block_types import BLOCK_TYPES, natural_type  # noqa: E402
from bellbox.interop.gguf.weights import Coded, encode  # noqa: E402

LLAMA = LlamaConfig(320, 256, 512, 2, 4, num_key_value_heads=2, max_position_embeddings=64)
GPT = GPTConfig(320, 256, 512, 1, 4, max_position_embeddings=64)
NATURAL = {1: "Q1_0", 2: "Q2_K", 3: "Q3_K", 4: "Q4_0"}


def low_bit(config: Any, method: str = "bbq", bits: int | None = 2, **more: Any) -> torch.nn.Module:
    recipe = bb.Recipe.of(method, bits, **{"block": 1, **more})
    model = bb.prepare(build(config, seed=0), recipe).eval()
    with torch.no_grad():
        model(torch.arange(8)[None])  # sets the scales of inputs
    return model


def blocks(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def rows_of(layer: Any) -> torch.Tensor:
    """The fake-quantized weight."""
    return layer._quantized_rows().detach()


def values(tensor: Any) -> np.ndarray:
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda kind: kind.name)
def test_every_grid_that_a_type_takes_comes_back_exactly(kind: Any) -> None:
    random = np.random.default_rng(0)
    tried = 0
    for n in (2, 3, 4, 5, 6, 7, 8, 15, 16, 31, 32, 33, 64, 127, 255, 256):
        for zero_point in (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0):
            grid = Grid(n, zero_point)
            if (fit := kind.fit(grid)) is None:
                continue
            tried += 1
            codes = random.integers(0, n, (3, 512)).astype(np.uint8)
            d = (random.random((3, 512 // kind.block)) * 0.02 - 0.005).astype(np.float16)
            data = kind.encode(codes * np.uint8(fit.step) + np.uint8(fit.first), d, fit)
            assert data.shape == (3, 512 // kind.block * kind.size)
            if kind.name == "Q1_0":
                continue  # the package has no decoder: the next test
            levels = np.array(grid.integers, dtype=np.float32)[codes] / grid.multiplier
            worth = np.repeat(d.astype(np.float32) * fit.divisor, kind.block, axis=1)
            got = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind.name])
            assert np.array_equal(got, levels * worth)
    assert tried > 0
    assert (kind.block, kind.size) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.name]]


def test_the_bytes_of_one_bit() -> None:
    """As ggml's `dequantize_row_q1_0` reads them: d, then bit j of byte i is the sign of weight 8 i + j."""
    codes = np.zeros((1, 128), dtype=np.uint8)
    codes[0, [0, 9, 127]] = 1
    made = encode("w", [Coded(codes, Grid(2, -0.5), np.array([[3.0]], dtype=np.float32))])
    assert made.type == "Q1_0"
    assert made.data.tobytes() == np.float16(1.5).tobytes() + bytes([1, 2, *[0] * 13, 128])


@pytest.mark.parametrize(
    ("grid", "name"),
    [
        (Grid(16, 0.0), "Q4_0"), (Grid(8, 0.0), "Q3_K"), (Grid(4, -0.5), "Q2_K"), (Grid(3, -0.5), "TQ2_0"),
        (Grid(2, -0.5), "Q1_0"), (Grid(16, -0.5), "Q4_K"), (Grid(8, -0.5), "Q4_0"), (Grid(255, -0.5), "Q8_0"),
        (Grid(256, -0.5), None), (Grid(256, 1.0), None),
    ],
)  # fmt: skip
def test_the_narrowest_type_of_a_grid(grid: Grid, name: str | None) -> None:
    found = natural_type(grid)
    assert (found and found.name) == name


# llama.cpp issue 24603: scales were estimated anew, and the trained grid was lost.
@pytest.mark.parametrize("config", [LLAMA, GPT], ids=["llama", "gpt"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_no_code_differs_and_scales_to_one_unit_of_fp16(config: Any, bits: int, tmp_path: Path) -> None:
    model = low_bit(config, bits=bits)
    made = export_gguf(model, tmp_path / "m.gguf")
    assert {t.type for t in made.tensors if t.of_integers} == {NATURAL[bits]}
    assert made.scale_change <= 2**-11
    found = blocks(made.path)
    down = found["blk.0.ffn_down.weight"]
    name = "model.layers.0.mlp.down_proj" if config is LLAMA else "transformer.h.0.mlp.c_proj"
    layer: Any = model.get_submodule(name)
    codes = layer.weight_codes().numpy()
    scale = layer.packed_buffers()["weight_scale"].numpy()
    grid = layer.weight_quantizer.levels.grid
    if bits == 1:
        d = down.data[:, :2].copy().view(np.float16)[:, 0].astype(np.float32)
        bits_of = down.data.reshape(len(codes), -1, 18)[:, :, 2:].reshape(len(codes), -1)
        got = np.unpackbits(bits_of, axis=1, bitorder="little")
        assert np.array_equal(got, codes)
        assert np.abs(2 * d / scale - 1).max() <= 2**-11
        return
    got = values(down)
    assert np.array_equal(np.rint(got / scale[:, None] + grid.offset), codes)
    levels = codes - np.float32(grid.offset)
    assert np.abs(got - levels * scale[:, None]).max() <= (np.abs(levels) * scale[:, None] * 2**-11).max()


@pytest.mark.parametrize("packed", [False, True], ids=["prepared", "packed"])
def test_transformers_reads_the_same_weights(packed: bool, tmp_path: Path) -> None:
    """An independent reader, which undoes the order of rows of q and k on its own."""
    transformers = pytest.importorskip("transformers")
    prepared = low_bit(LLAMA, bits=3)
    made = export_gguf(bb.convert(prepared) if packed else prepared, tmp_path / "m.gguf")
    other = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    )
    theirs = other.state_dict()
    assert other.config.num_key_value_heads == 2
    seen = 0
    for name, layer in prepared.named_modules():
        if isinstance(layer, bb.nn.QuantizedLinear):
            ours = rows_of(layer)
            difference = (theirs[f"{name}.weight"] - ours).abs().max()
            assert difference <= ours.abs().max() * 2**-11, name
            seen += 1
    assert seen == 14
    assert torch.equal(theirs["model.embed_tokens.weight"], prepared.model.embed_tokens.weight)
    assert made.description == WEIGHTS_ONLY


def test_transformers_reads_a_gpt2(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = GPTConfig(320, 256, 1024, 1, 4, max_position_embeddings=64, bias=False)
    model = low_bit(config, bits=4)
    export_gguf(model, tmp_path / "m.gguf")
    # It takes the context and the vocabulary of such a file from nowhere but GPT-2's own: so they are said.
    size = {"n_embd": 256, "n_inner": 1024, "n_layer": 1, "n_head": 4, "n_positions": 64, "vocab_size": 320}
    other = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path,
        gguf_file="m.gguf",
        dtype=torch.float32,
        config=transformers.GPT2Config(**size, tie_word_embeddings=False),
    )
    theirs = other.state_dict()
    fused = torch.cat([rows_of(model.get_submodule(f"transformer.h.0.attn.{part}_proj")) for part in "qkv"])
    difference = (theirs["transformer.h.0.attn.c_attn.weight"].T - fused).abs().max()
    assert difference <= fused.abs().max() * 2**-11
    assert theirs["transformer.h.0.attn.c_attn.bias"].abs().max() == 0


def test_a_file_says_that_it_is_weights_only(tmp_path: Path) -> None:
    def said(model: torch.nn.Module) -> tuple[str, bool]:
        fields = gguf.GGUFReader(export_gguf(model, tmp_path / "m.gguf").path).fields
        return fields["general.description"].contents(), fields["bellbox.weights_only"].contents()

    assert said(low_bit(LLAMA)) == (WEIGHTS_ONLY, True)
    assert said(bb.convert(low_bit(LLAMA))) == (WEIGHTS_ONLY, True)
    assert said(low_bit(LLAMA, "rtn", 4, weight_only="float"))[1] is False
    assert "full precision" in said(build(LLAMA, seed=0))[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bb.prepare(build(LLAMA, seed=0), bb.Recipe.bbq(2)), r"rotated in blocks of \d+.*block: 1"),
        (lambda: bb.convert(low_bit(LLAMA, block=32)), "rotated in blocks of"),
        (lambda: low_bit(LLAMA, "kmeans", 2, weight_only="float"), "table of values.*block: 1"),
        (lambda: low_bit(LLAMA, "nf", 4, weight_only="float"), "table of values"),
        (lambda: low_bit(LlamaConfig(320, 40, 80, 1, 2)), "no block of a type .* divides"),
        (lambda: build(GPTConfig(320, 64, 64, 1, 2, activation="relu"), seed=0), "tanh GELU"),
        (lambda: torch.nn.Linear(4, 4), "a Linear is not written to GGUF"),
    ],
)  # fmt: skip
def test_what_gguf_cannot_hold_is_refused_and_nothing_is_written(
    make: Any, message: str, tmp_path: Path
) -> None:
    target = tmp_path / "m.gguf"
    target.write_bytes(b"before")
    with pytest.raises(bb.BellboxError, match=message):
        export_gguf(make(), target)
    assert target.read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_an_adapter_is_refused_since_it_would_be_lost(tmp_path: Path) -> None:
    class Adapter(torch.nn.Module):
        def __init__(self, base: torch.nn.Module) -> None:
            super().__init__()
            self.base_layer = base

        @property
        def weight(self) -> Any:
            return self.base_layer.weight

    class Louder(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    for wrap in (Adapter, lambda layer: Louder(*reversed(layer.weight.shape), bias=False)):
        model = build(LLAMA, seed=0)
        mlp = model.model.layers[0].mlp
        mlp.up_proj = wrap(mlp.up_proj)
        with pytest.raises(bb.BellboxError, match="more than its weight may count"):
            export_gguf(model, tmp_path / "m.gguf")


@pytest.mark.parametrize("name", ["model.norm", "model.layers.1.mlp.up_proj", "lm_head"])
@pytest.mark.parametrize("bits", [None, 8])
def test_nan_is_refused_by_name(name: str, bits: Any, tmp_path: Path) -> None:
    model = low_bit(LLAMA, embedding_bits=bits)
    with torch.no_grad():
        model.get_submodule(name).weight.view(-1)[3] = float("nan")  # type: ignore[operator, union-attr]
    with pytest.raises(bb.BellboxError, match=r"(NaN|nan)"):
        export_gguf(model, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_binarized_weights_are_refused(tmp_path: Path) -> None:
    from bellbox.nn.binarized_linear import BinarizedLinear

    model = build(LLAMA, seed=0)
    model.model.layers[0].mlp.up_proj = BinarizedLinear(256, 512, False, 128, True)
    with pytest.raises(bb.BellboxError, match=r"up_proj: binarized weights have several scales"):
        export_gguf(model, tmp_path / "m.gguf")


def test_a_head_and_single_layers_of_other_methods(tmp_path: Path) -> None:
    """Each tensor has a type of its own; q, k and v of a GPT must share one."""
    recipe = bb.Recipe.of("bbq", 2, block=1)
    rule = bb.Recipe.of("bbq", 4, block=1).rules[-1]
    import dataclasses

    def mixed(pattern: str) -> bb.Recipe:
        return dataclasses.replace(recipe, rules=(dataclasses.replace(rule, pattern=pattern), *recipe.rules))

    llama = bb.prepare(build(LLAMA, seed=0), mixed("*.v_proj")).eval()
    types = {t.name: t.type for t in export_gguf(llama, tmp_path / "l.gguf").tensors}
    assert (types["blk.0.attn_v.weight"], types["blk.0.attn_q.weight"]) == ("Q4_0", "Q2_K")
    gpt = bb.prepare(build(GPT, seed=0), mixed("*.attn.v_proj")).eval()
    made = export_gguf(gpt, tmp_path / "g.gguf")
    fused = next(t for t in made.tensors if t.name == "blk.0.attn_qkv.weight")
    assert fused.type == "Q4_0"
    got = values(blocks(made.path)["blk.0.attn_qkv.weight"])
    ours = torch.cat(
        [rows_of(gpt.get_submodule(f"transformer.h.0.attn.{part}_proj")) for part in "qkv"]
    ).numpy()
    assert np.abs(got - ours).max() <= np.abs(ours).max() * 2**-11
    half = bb.prepare(build(GPT, seed=0), bb.Recipe.of("bbq", 2, block=1, keep=("*.attn.k_proj",))).eval()
    with pytest.raises(bb.BellboxError, match="some of q, k and v are quantized and some are not"):
        export_gguf(half, tmp_path / "h.gguf")


def test_a_grid_that_no_type_holds_is_refused() -> None:
    part = Coded(np.zeros((1, 256), dtype=np.uint8), Grid(256, 1.0), np.ones((1, 1), dtype=np.float32))
    with pytest.raises(bb.BellboxError, match="no GGUF type holds 256 levels from -129 to 126"):
        encode("w", [part])


def test_rows_that_blocks_of_256_do_not_divide_get_a_wider_type_that_is_exact(tmp_path: Path) -> None:
    model = low_bit(LlamaConfig(320, 64, 160, 1, 2))
    made = export_gguf(model, tmp_path / "m.gguf")
    wide = {(t.type, t.natural) for t in made.tensors if t.of_integers}
    assert wide == {("Q4_0", "Q2_K")}
    layer: Any = model.get_submodule("model.layers.0.mlp.down_proj")
    got, ours = values(blocks(made.path)["blk.0.ffn_down.weight"]), rows_of(layer).numpy()
    assert np.abs(got - ours).max() <= np.abs(ours).max() * 2**-11


def test_an_avoided_type_gives_way_to_the_next(tmp_path: Path) -> None:
    made = export_gguf(low_bit(LLAMA, bits=1), tmp_path / "m.gguf", avoid=["Q1_0"])
    assert {(t.type, t.natural) for t in made.tensors if t.of_integers} == {("TQ2_0", "Q1_0")}
    with pytest.raises(bb.BellboxError, match="no type 'Q1' to avoid"):
        export_gguf(low_bit(LLAMA, bits=1), tmp_path / "m.gguf", avoid=["Q1"])


def test_scales_by_groups() -> None:
    """As files of `weight_only_linear` may have them: blocks must divide the groups."""
    random = np.random.default_rng(0)
    codes = random.integers(0, 16, (2, 192)).astype(np.uint8)
    scales = random.random((2, 6)).astype(np.float16).astype(np.float32)
    made = encode("w", [Coded(codes, Grid(16, 0.0), scales)])
    assert made.type == "Q4_0"
    expected = (codes.astype(np.float32) - 8) * np.repeat(scales, 32, axis=1)
    assert np.array_equal(gguf.quants.dequantize(made.data, gguf.GGMLQuantizationType.Q4_0), expected)
    with pytest.raises(bb.BellboxError, match="16 weights have a scale of their own, and no block"):
        encode("w", [Coded(codes, Grid(16, 0.0), np.ones((2, 12), dtype=np.float32))])


def test_scales_at_the_ends_of_fp16() -> None:
    codes = np.arange(32, dtype=np.uint8)[None] % 16

    def one(scale: float) -> Any:
        return encode("w", [Coded(codes, Grid(16, 0.0), np.array([[scale]], dtype=np.float32))])

    assert one(65504.0).scale_change == 0
    with pytest.raises(bb.BellboxError, match=r"scale is 70000.*end at 65504"):
        one(70000.0)
    tiny = one(1e-9)  # dead rows keep their codes
    assert tiny.small_scales == 1
    got = gguf.quants.dequantize(tiny.data, gguf.GGMLQuantizationType.Q4_0)
    assert np.array_equal(np.rint(got / 2.0**-24) + 8, codes)
    nothing = gguf.quants.dequantize(one(0.0).data, gguf.GGMLQuantizationType.Q4_0)
    assert np.abs(nothing).max() == 0


@pytest.mark.parametrize("bits", [8, 4])
def test_embeddings_that_were_trained_rounded_stay_their_integers(bits: Any, tmp_path: Path) -> None:
    model = low_bit(LLAMA, embedding_bits=bits)
    for one in (model, bb.convert(model)):
        made = export_gguf(one, tmp_path / "m.gguf")
        assert {t.type for t in made.tensors if "blk" not in t.name} == {
            "Q8_0" if bits == 8 else "Q4_0",
            "F32",
        }
        table: Any = model.get_submodule("lm_head")
        ours = table.coding.fake(table.weight.detach()).numpy()
        assert np.abs(values(blocks(made.path)["output.weight"]) - ours).max() <= np.abs(ours).max() * 2**-11


@pytest.mark.parametrize(("floats", "bound"), [("f32", 0), ("f16", 2**-10), ("bf16", 2**-8), ("q8_0", 2**-6)])
def test_matrices_in_full_precision(floats: str, bound: float, tmp_path: Path) -> None:
    model = build(LLAMA, seed=0)
    made = export_gguf(model, tmp_path / "m.gguf", floats=floats)
    found = blocks(made.path)
    ours = model.lm_head.weight.detach().numpy()
    assert found["output.weight"].tensor_type.name == floats.upper()
    assert np.abs(values(found["output.weight"]) - ours).max() <= bound * np.abs(ours).max()
    assert found["output_norm.weight"].tensor_type.name == "F32"
