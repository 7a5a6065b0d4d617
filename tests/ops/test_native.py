"""The compiled kernels against the torch reference, on every instruction set that this processor has."""

from __future__ import annotations

import dataclasses
import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bellbox as bb
from bellbox.core.grid import Grid, Levels
from bellbox.core.hadamard import block_size, butterfly
from bellbox.nn import PackedLinear
from bellbox.ops import fake_quantize as bbq
from bellbox.ops import native, packed_linear
from bellbox.ops.encode import encode, normaliser, row_scale, row_sigma, static_normaliser
from bellbox.ops.rotate import reference_rotate, rotate
from bellbox.ops.weight_layout import packed_size, prepack

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


PLAIN = Grid(2, -1.0)
"""Its integers are its codes, 0 and 1."""


def coded(x, levels, block, normalise, rstd=0.0, rescale=False):
    """Integers of rows as a packed layer codes them, and their sum, times the row's scale: `[rows, features + 1]`.

    The weights are the identity and a row of ones, and everything else is worth 1.
    """
    features = x.shape[-1]
    weight = torch.cat((torch.eye(features), torch.ones(1, features))).to(torch.uint8)
    act_rstd = torch.tensor([rstd]) if normalise == "static" else None
    tensors = (
        prepack(weight, 2),
        torch.ones(features + 1),
        None,
        torch.ones(1),
        torch.tensor(levels.thresholds),
    )
    numbers = features, 2, PLAIN.zero_point, levels.zero_point, block, normalise, rescale
    return packed_linear.operation(x, *tensors, act_rstd, None, *numbers, torch.float32)


def expected_of(x, levels, block, *rule, **options):
    """What `coded` has to give."""
    codes, row_scales = reference_codes(x, levels, block, *rule, **options)
    integers = levels.decode(codes).to(torch.float32)
    return torch.cat((integers, integers.sum(-1, keepdim=True)), -1) * row_scales


def buffers_of(codes, levels, inputs, bias=None) -> dict[str, Any]:
    """Buffers of a packed layer whose scales are 1."""
    return {
        "packed": prepack(codes, levels.n),
        "weight_scale": torch.ones(len(codes)),
        "bias": bias,
        "act_scale": torch.ones(1),
        "act_thresholds": torch.tensor(inputs.thresholds),
        "act_rstd": None,
        "act_signs": None,
    }


def plan_of(codes, levels, block, packed=None):
    """A plan whose weights and inputs have the same levels."""
    module, buffers = native.compiled(), buffers_of(codes, levels, levels)
    assert module is not None
    if packed is not None:
        buffers["packed"] = packed
    numbers = codes.shape[1], levels.n, levels.zero_point, levels.zero_point, block, "rms", False
    return module.Plan(buffers, *numbers)


def product_of(x, codes, levels, block):
    """Of integers: exact in fp32 here."""
    integers = levels.decode(reference_codes(x, levels, block, "rms")[0])
    return integers @ levels.decode(codes).t()


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
    expected = expected_of(x, levels, block, *rule)
    for name in ISAS:
        with native.use(name):
            assert same(coded(x, levels, block, *rule), expected), name
            assert same(coded(x[:1], levels, block, *rule), expected[:1]), name


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 11, 16])
def test_a_value_on_a_threshold_goes_up(isa, n):
    levels = Levels.gaussian(n)
    below = [float(torch.nextafter(torch.tensor(t), torch.tensor(-9.0))) for t in levels.thresholds]
    x = torch.tensor([[*levels.thresholds, *below]])
    expected = [*range(1, n), *range(n - 1)]
    assert native.encode(x, torch.ones(1, 1), levels.thresholds, 1).tolist() == [expected]
    levels_of = levels.decode(torch.tensor(expected))
    assert torch.equal(coded(x, levels, 1, "static", 1.0)[0, :-1], levels_of)


def test_zeros_denormals_and_huge_values_are_coded_as_the_reference_does(isa):
    x = torch.zeros(5, 256)
    x[1], x[2], x[3] = 1e-42, 1e30, -1e-9
    x[4, 7] = -0.0
    for n in (2, 4, 8, 16):
        levels = Levels.gaussian(n)
        for block, normalise in ((128, "rms"), (1, "absmax")):
            expected = expected_of(x, levels, block, normalise, rescale=True)
            assert same(coded(x, levels, block, normalise, rescale=True), expected)
            assert same(coded(x[4:], levels, block, normalise, rescale=True), expected[4:])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rule", [("rms", 0.0, True), ("absmax", 0.0, True), ("static", 1.0, False)])
@pytest.mark.parametrize("place", [0, 17, 191])
def test_the_mark_of_a_row_that_is_not_finite_is_nan(isa, bad, rule, place):
    x = torch.randn(4, 192)
    x[1, place], x[3, :] = bad, 3e38
    found = coded(x, Levels.gaussian(8), 1, *rule)
    assert found.isnan().tolist() == [[row in (1, 3)] * 193 for row in range(4)]


def test_rules_that_contradict_themselves_are_refused(monkeypatch):
    x, levels = torch.ones(2, 128), Levels.gaussian(4)
    for backend in ("", "reference"):
        monkeypatch.setenv("BELLBOX_BACKEND", backend)
        with pytest.raises(bb.BellboxError, match=r"absmax.*block"):
            coded(x, levels, 128, "absmax")
        with pytest.raises(bb.BellboxError, match=r"static.*rescale"):
            coded(x, levels, 128, "static", 1.0, rescale=True)
    with pytest.raises(ValueError, match="2 to 16 levels"):
        plan_of(torch.zeros(2, 128, dtype=torch.uint8), Levels.gaussian(17), 128)


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
    levels, module = Levels.gaussian(4), native.compiled()
    codes = [torch.randint(0, 4, (n, 192), dtype=torch.uint8) for n in (700, 5, 330)]
    plans = [plan_of(each, levels, 64) for each in codes]
    group = module.GroupPlan(plans)
    for rows in (1, 3, 60, 127, 128, 301):
        x = torch.randn(rows, 192)
        for c, y in zip(codes, group(x, torch.float32, 2), strict=True):
            assert torch.equal(y, product_of(x, c, levels, 64))
    del plans  # what it was made of is kept by it
    gc.collect()
    assert torch.equal(group(x, torch.float32, 1)[2], y)


def test_inputs_that_do_not_fit_are_refused_before_memory_is_touched():
    plan = plan_of(torch.zeros(5, 64, dtype=torch.uint8), Levels.gaussian(4), 64)
    for call in (plan, native.compiled().GroupPlan([plan])):
        for x in (torch.ones(3, 63), torch.tensor(1.0), torch.ones(2, 64, 1)):
            with pytest.raises(ValueError, match="last dimension"):
                call(x, torch.float32, 1)
        for dtype, wanted in ((torch.float64, torch.float32), (torch.float32, torch.float16)):
            with pytest.raises(ValueError, match="float32 and bfloat16"):
                call(torch.ones(3, 64, dtype=dtype), wanted, 1)
    assert plan(torch.ones(0, 2, 64), torch.bfloat16, 1).shape == (0, 2, 5)


def test_matrices_may_share_one_piece_of_memory_which_outlives_its_maker():
    levels, module = Levels.gaussian(4), native.compiled()
    codes = [torch.randint(0, 4, shape, dtype=torch.uint8) for shape in [(33, 130), (1, 130), (700, 130)]]
    whole = torch.cat([prepack(each, 4) for each in codes])
    parts = whole.split([packed_size(*each.shape, 4) for each in codes])
    group = module.GroupPlan([plan_of(c, levels, 2, p) for c, p in zip(codes, parts, strict=True)])
    with pytest.raises(ValueError, match=r"packed has .* numbers"):
        plan_of(codes[1], levels, 2, parts[1][4:])
    x = torch.randn(3, 130)
    for c, y in zip(codes, group(x, torch.float32, 1), strict=True):
        assert torch.equal(y, product_of(x, c, levels, 2))
    whole.zero_()  # nothing was copied: who writes into the memory is seen
    for c, y in zip(codes, group(x, torch.float32, 1), strict=True):
        assert not torch.equal(y, product_of(x, c, levels, 2))
    whole.copy_(torch.cat([prepack(each, 4) for each in codes]))
    del whole, parts
    gc.collect()
    for c, y in zip(codes, group(x, torch.float32, 1), strict=True):
        assert torch.equal(y, product_of(x, c, levels, 2))


@pytest.mark.parametrize("offset", [1, 2, 3, 4])
def test_weights_may_begin_anywhere_in_memory(isa, offset):
    levels = Levels.gaussian(4)
    codes = torch.randint(0, 4, (33, 130), dtype=torch.uint8)
    packed = prepack(codes, 4)
    shifted = torch.empty(len(packed) + 8, dtype=torch.uint8)[offset : offset + len(packed)].copy_(packed)
    buffers = {**buffers_of(codes, levels, levels), "packed": shifted}
    numbers = 130, 4, levels.zero_point, levels.zero_point, 2, "rms", False
    x = torch.randn(3, 130)
    assert torch.equal(
        packed_linear.Bound(buffers, numbers)(x, torch.float32), product_of(x, codes, levels, 2)
    )


def test_small_matrices_are_kept_by_their_plans_when_others_go():
    levels, x, kept = Levels.gaussian(4), torch.randn(2, 512), []
    for i in range(60):
        codes = torch.randint(0, 4, (500 + i % 12, 512), dtype=torch.uint8)
        plan = plan_of(codes, levels, 64)
        if i % 7 == 0:
            kept.append((plan, codes))
    del plan
    gc.collect()
    for plan, codes in kept:
        assert torch.equal(plan(x, torch.float32, 1), product_of(x, codes, levels, 64))


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
    levels, inputs = Levels.gaussian(16), 40000
    for code, sign, largest in ((15, 1, 7), (0, -1, 8)):
        codes = torch.full((3, inputs), code, dtype=torch.uint8)
        buffers = {**buffers_of(codes, levels, levels), "act_rstd": torch.ones(1)}
        numbers = inputs, 16, levels.zero_point, levels.zero_point, 1, "static", False
        for rows in (1, 2, 40):
            y = packed_linear.Bound(buffers, numbers)(torch.full((rows, inputs), 9.0 * sign), torch.float32)
            assert y.tolist() == [[float(largest * largest * inputs)] * 3] * rows


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
