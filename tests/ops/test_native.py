"""The compiled kernels against the torch reference, on every instruction set that this processor has."""

from __future__ import annotations

import dataclasses
import gc
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bellbox as bb
from bellbox.core.grid import Levels
from bellbox.core.hadamard import block_size, butterfly
from bellbox.nn import PackedLinear
from bellbox.ops import fake_quantize as bbq
from bellbox.ops import native
from bellbox.ops.encode import encode, normaliser, row_scale, row_sigma, static_normaliser
from bellbox.ops.rotate import reference_rotate, rotate

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="the compiled kernels were not built"),
    pytest.mark.filterwarnings("ignore:.*no factor of two"),
]
ISAS = native.instruction_sets() if native.available() else []


def test_loading_the_module_runs_no_code_of_an_instruction_set() -> None:
    objects = list(Path(__file__).parents[2].glob("build/*/CMakeFiles/bellbox_*.dir/native/kernels/*/*.o"))
    if not objects:
        pytest.skip("the object files were not kept")
    # The section of what runs before anything can ask which instructions there are.
    assert [path.name for path in objects if b".init_array" in path.read_bytes()] == []


@pytest.fixture(params=ISAS)
def isa(request):
    with native.use(request.param):
        yield request.param


def reference_codes(x, levels, block, normalise, rstd=0.0, rescale=False):
    rows = x.reshape(-1, x.shape[-1])
    sigma = rows.double().abs().amax(-1, keepdim=True) if normalise == "absmax" else row_sigma(rows)
    r = (
        static_normaliser(torch.tensor(rstd), rows, block)
        if normalise == "static"
        else normaliser(sigma, block)
    )
    r = r.float()
    row_scales = row_scale(r, len(rows)).clone()
    if rescale:
        row_scales *= sigma.clamp(min=1e-8).float()
    return encode(rows, r, levels.thresholds, block), row_scales


def same(a, b):
    """Equal bits, NaN included."""
    return torch.equal(torch.nan_to_num(a, 7.25), torch.nan_to_num(b, 7.25)) and torch.equal(
        a.isnan(), b.isnan()
    )


def packed_layer(inputs, outputs, weight_levels, activation_levels, granularity, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    linear = torch.nn.Linear(inputs, outputs, bias=bias)
    linear.weight.data.normal_(generator=generator)
    recipe = bb.Recipe.bbq(
        weight_levels=weight_levels, activation_levels=activation_levels, granularity=granularity
    )
    model = bb.prepare(linear, recipe)
    model(torch.randn(5, inputs, generator=generator))
    model.eval()
    return model, bb.convert(model)


@settings(max_examples=120, deadline=None)
@given(
    rows=st.integers(1, 9),
    features=st.integers(1, 300),
    n=st.integers(2, 16),
    largest=st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128]),
    rule=st.sampled_from(
        [
            ("rms", 0.0, False),
            ("rms", 0.0, True),
            ("absmax", 0.0, False),
            ("absmax", 0.0, True),
            ("static", 0.5, False),
            ("static", 3.0, False),
        ]
    ),
    size=st.sampled_from([1.0, 1e-9, 1e20]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_codes_and_marks_are_those_of_the_reference(rows, features, n, largest, rule, size, dtype, seed):
    x = torch.randn(rows, features, generator=torch.Generator().manual_seed(seed)).mul_(size).to(dtype)
    levels, block = Levels.gaussian(n), 1 if rule[0] == "absmax" else block_size(features, largest)
    codes, row_scales = reference_codes(x, levels, block, *rule)
    for name in ISAS:
        with native.use(name):
            integers, sums, native_marks = native.encode(x, levels, block, *rule)
        assert torch.equal(integers, levels.decode_int8(codes)), name
        assert torch.equal(sums, integers.sum(-1, dtype=torch.int32)), name
        assert same(native_marks, row_scales.reshape(-1)), name


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 11, 16])
def test_a_value_on_a_threshold_goes_up(isa, n):
    levels = Levels.gaussian(n)
    below = [float(torch.nextafter(torch.tensor(t), torch.tensor(-9.0))) for t in levels.thresholds]
    x = torch.tensor([[*levels.thresholds, *below]])
    integers, _, _ = native.encode(x, levels, 1, "static", 1.0)
    expected = [*range(1, n), *range(n - 1)]
    assert integers.tolist() == [[levels.integers[code] for code in expected]]


def test_zeros_denormals_and_huge_values_are_coded_as_the_reference_does(isa):
    x = torch.zeros(5, 256)
    x[1], x[2], x[3] = 1e-42, 1e30, -1e-9
    x[4, 7] = -0.0
    for n in (2, 4, 8, 16):
        levels = Levels.gaussian(n)
        for block, normalise in ((128, "rms"), (1, "absmax")):
            codes, row_scales = reference_codes(x, levels, block, normalise, rescale=True)
            integers, _, native_marks = native.encode(x, levels, block, normalise, rescale=True)
            assert torch.equal(integers, levels.decode_int8(codes))
            assert same(native_marks, row_scales.reshape(-1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rule", [("rms", 0.0, True), ("absmax", 0.0, True), ("static", 1.0, False)])
@pytest.mark.parametrize("place", [0, 17, 191])
def test_the_mark_of_a_row_that_is_not_finite_is_nan(isa, bad, rule, place):
    x = torch.randn(4, 192)
    x[1, place], x[3, :] = bad, 3e38
    row_scales = native.encode(x, Levels.gaussian(8), 1, *rule)[2]
    assert row_scales.isnan().tolist() == [False, True, False, True]


def test_rules_that_contradict_themselves_are_refused():
    with pytest.raises(bb.BellboxError, match=r"absmax.*block=1"):
        native.Coding(Levels.gaussian(4), 128, "absmax")
    with pytest.raises(bb.BellboxError, match=r"static.*rescale"):
        native.Coding(Levels.gaussian(4), 128, "static", 1.0, rescale=True)
    with pytest.raises(bb.BellboxError, match="at most 16 levels"):
        native.Coding(Levels.gaussian(17), 128, "rms")


@settings(max_examples=60, deadline=None)
@given(
    leading=st.sampled_from([(), (1,), (7,), (2, 3), (0,)]),
    blocks=st.integers(1, 9),
    block=st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128, 256, 1024]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    out=st.sampled_from([torch.float32, torch.bfloat16]),
    factor=st.sampled_from([1.0, -0.3, 128**-0.5]),
)
def test_rotation_gives_the_bits_of_the_butterfly(leading, blocks, block, dtype, out, factor):
    x = torch.randn(*leading, blocks * block, generator=torch.Generator().manual_seed(blocks)).to(dtype)
    expected = (butterfly(x.float(), block) * factor).to(out)
    assert torch.equal(reference_rotate(x, factor, block, out), expected)
    for name in ISAS:
        with native.use(name):
            assert torch.equal(rotate(x, factor, block, out), expected), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("granularity", ["token", "ema"])
def test_a_row_that_is_not_finite_comes_out_as_nan_and_no_other_row_does(isa, bad, granularity):
    model, packed = packed_layer(192, 21, 4, 4, granularity)
    x = torch.randn(6, 192)
    x[2, 191] = bad
    y = packed(x)
    assert y[2].isnan().all()
    assert y[[0, 1, 3, 4, 5]].isfinite().all()
    with torch.no_grad():
        assert same(y, model(x))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 2, 3, 5, 8, 9, 17, 70, 200]),
    inputs=st.integers(1, 400),
    outputs=st.integers(1, 150),
    weight_levels=st.integers(2, 16),
    activation_levels=st.integers(2, 16),
    granularity=st.sampled_from(["token", "ema"]),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_a_packed_layer_gives_the_bits_of_the_reference(
    rows, inputs, outputs, weight_levels, activation_levels, granularity, bias, dtype, seed
):
    model, packed = packed_layer(inputs, outputs, weight_levels, activation_levels, granularity, bias, seed)
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    with torch.no_grad():
        expected = model(x)
    assert isinstance(packed, PackedLinear)
    for name in ISAS:
        with native.use(name):
            assert same(packed(x), expected), name


@pytest.mark.parametrize("rows", [1, 2, 5, 9, 63, 300])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (64, 64), (130, 33), (600, 100)])
@pytest.mark.parametrize(("weight", "activation"), [(2, 2), (4, 4), (3, 3), (4, 2), (3, 4)])
def test_very_few_levels_on_both_sides_give_the_bits_of_the_reference(
    isa, rows, inputs, outputs, weight, activation
):
    model, packed = packed_layer(inputs, outputs, weight, activation, "token")
    x = torch.randn(rows, inputs)
    with torch.no_grad():
        assert same(packed(x), model(x))


def test_siblings_of_different_widths_share_one_call_on_two_threads(isa):
    levels = Levels.gaussian(4)
    coding = native.Coding(levels, 64, "rms")
    codes = [torch.randint(0, 4, (n, 192), dtype=torch.uint8) for n in (700, 5, 330)]
    weights = [native.Weights([c], c.shape[1], levels, torch.ones(len(c)), None) for c in codes]
    siblings = native.Siblings(coding, weights, [1.0, 1.0, 1.0])
    for rows in (1, 3, 60, 127, 128, 301):
        x = torch.randn(rows, 192)
        integers = native.encode(x, levels, 64, "rms")[0].float()
        for c, y in zip(codes, siblings.call(x, torch.float32, 2), strict=True):
            assert torch.equal(y, integers @ levels.decode_int8(c).float().t())
    del weights, coding  # what they were made of is kept by them
    gc.collect()
    assert torch.equal(siblings.call(x, torch.float32, 1)[2], y)


def test_inputs_that_do_not_fit_are_refused_before_memory_is_touched():
    levels = Levels.gaussian(4)
    weights = native.Weights([torch.zeros(5, 64, dtype=torch.uint8)], 64, levels, torch.ones(5), None)
    call = native.Siblings(native.Coding(levels, 64, "rms"), [weights], [1.0]).call
    for x in (torch.ones(3, 63), torch.tensor(1.0), torch.ones(2, 64, 1)):
        with pytest.raises(ValueError, match="last dimension"):
            call(x, torch.float32, 1)
    for dtype, wanted in ((torch.float64, torch.float32), (torch.float32, torch.float16)):
        with pytest.raises(ValueError, match="float32 and bfloat16"):
            call(torch.ones(3, 64, dtype=dtype), wanted, 1)
    assert call(torch.ones(0, 2, 64), torch.bfloat16, 1)[0].shape == (0, 2, 5)


def test_matrices_may_share_one_piece_of_memory_which_outlives_its_maker():
    levels, shapes = Levels.gaussian(4), [(33, 130), (1, 130), (700, 130)]
    codes = [torch.randint(0, 4, shape, dtype=torch.uint8) for shape in shapes]
    arena = native.Arena(sum(native.packed_size(levels.grid, *shape) for shape in shapes))
    weights = [native.Weights([c], 130, levels, torch.ones(len(c)), None, arena) for c in codes]
    with pytest.raises(MemoryError):
        native.Weights([codes[1]], 130, levels, torch.ones(1), None, arena)
    del arena
    x = torch.randn(3, 130)
    coding = native.Coding(levels, 2, "rms")
    integers = native.encode(x, levels, 2, "rms")[0].float()
    outs = native.Siblings(coding, weights, [1.0, 1.0, 1.0]).call(x, torch.float32, 1)
    for c, y in zip(codes, outs, strict=True):
        assert torch.equal(y, integers @ levels.decode_int8(c).float().t())


def test_small_matrices_share_pages_and_none_notices_that_others_go():
    levels = Levels.gaussian(4)
    coding, x = native.Coding(levels, 64, "rms"), torch.randn(2, 512)
    integers = native.encode(x, levels, 64, "rms")[0].float()
    kept = []
    for i in range(60):  # of 64 KB: several pieces of 2 MB
        codes = torch.randint(0, 4, (500 + i % 12, 512), dtype=torch.uint8)
        weights = native.Weights([codes], 512, levels, torch.ones(len(codes)), None)
        if i % 7 == 0:
            kept.append((native.Siblings(coding, [weights], [1.0]), codes))
    del weights
    gc.collect()
    for siblings, codes in kept:
        (y,) = siblings.call(x, torch.float32, 1)
        assert torch.equal(y, integers @ levels.decode_int8(codes).float().t())


def test_kernels_of_another_source_are_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr(native, "_source", lambda: "of tomorrow")
    with pytest.raises(bb.BellboxError, match=r"rebuild them with `pip install"):
        native._module.__wrapped__()


@pytest.mark.parametrize("zero_point", [-30.5, -10.5, -2.5, 1, 7.5, 26])
@pytest.mark.parametrize("n", [2, 3, 4, 8, 16])
def test_a_shifted_grid_gives_the_bits_of_the_reference(isa, n, zero_point):
    spec = bb.QuantizerSpec(levels=n, zero_point=zero_point)
    rule = bb.Rule("*", dataclasses.replace(spec, granularity="row"), spec)
    model = bb.prepare(torch.nn.Linear(512, 40), bb.Recipe((rule,)))
    x = torch.randn(9, 512)
    model(x)
    with torch.no_grad():
        assert torch.equal(bb.convert(model)(x), model.eval()(x))


def test_long_rows_and_extreme_levels_do_not_overflow(isa):
    levels = Levels.gaussian(16)
    inputs = 40000
    codes = torch.full((3, inputs), 15, dtype=torch.uint8)
    weights = native.Weights([codes], codes.shape[1], levels, torch.ones(3), None)
    x = torch.full((2, inputs), 9.0)
    coding = native.Coding(levels, 1, "static", 1.0)
    (y,) = native.Siblings(coding, [weights], [1.0]).call(x, torch.float32, 1)
    assert y.tolist() == [[float(7 * 7 * inputs)] * 3] * 2
    low = native.Weights([torch.zeros_like(codes)], codes.shape[1], levels, torch.ones(3), None)
    (y,) = native.Siblings(coding, [low], [1.0]).call(-x, torch.float32, 1)
    assert y.tolist() == [[float(8 * 8 * inputs)] * 3] * 2


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 12),
    features=st.integers(1, 300),
    n=st.integers(2, 16),
    largest=st.sampled_from([1, 4, 32, 128]),
    wide=st.sampled_from([torch.float32, torch.bfloat16]),
    out=st.sampled_from([torch.float32, torch.bfloat16]),
    common=st.booleans(),
    seed=st.integers(0, 999),
)
def test_fake_quantization_forward_is_the_reference_and_backward_agrees(
    rows, features, n, largest, wide, out, common, seed
):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=generator).to(wide)
    block, levels = block_size(features, largest), Levels.gaussian(n)
    r = normaliser(row_sigma(x), block).float()
    gamma = torch.rand(1 if common else rows, 1, generator=generator) + 0.1
    free = (torch.rand(rows, 1, generator=generator) > 0.3).float()
    grad = torch.randn(rows, features, generator=generator).to(out)
    args = x, r, gamma / (n / 2), levels.thresholds, levels.offset, block, out
    x_hat, v = bbq.reference_forward(*args)
    doubles = [tensor.double() for tensor in (grad, v, x_hat, r, gamma, free)]
    exact, exact_dots = bbq.reference_backward(*doubles, block, False)
    for name in ISAS:
        with native.use(name):
            mine, kept = native.bbq_forward(*args)
            grad_x, dots = native.bbq_backward(grad, v, x_hat, r, gamma, free, block)
        assert torch.equal(mine, x_hat), name
        assert torch.equal(kept, v), name
        # Against the size of what is subtracted: with one feature the exact gradient is zero.
        error = (grad_x.double() - exact).norm() / (block**0.5 * gamma * r * grad.float()).double().norm()
        products = (grad * x_hat).float().norm(dim=-1, keepdim=True) * features**0.5
        assert ((dots.double() - exact_dots).abs() <= 1e-6 * products + 1e-30).all(), name
        assert error < (1e-6 if out == torch.float32 else 4e-3), (name, float(error))


def test_four_threads_with_shapes_of_their_own_do_not_disturb_each_other(isa):
    layers = [
        packed_layer(inputs, outputs, n, n, "token", seed=n)[1]
        for inputs, outputs, n in ((256, 96, 4), (640, 33, 16), (130, 257, 3), (64, 64, 2))
    ]
    inputs = [
        torch.randn(rows, layer.in_features) for layer, rows in zip(layers, (1, 7, 40, 130), strict=True)
    ]
    expected = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
    wrong = []

    def work(index):
        for turn in range(150):
            i = (index + turn) % 4
            if not torch.equal(layers[i](inputs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_unknown_instruction_set_is_refused_by_name():
    refusal = pytest.raises(bb.BellboxError, match=r"=sse9: unknown; this processor runs: .*portable")
    with refusal, native.use("sse9"):
        pass
