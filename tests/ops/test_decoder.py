from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import bellbox as bb
from bellbox.core.table import TableCodes, table_values
from bellbox.errors import BellboxError
from bellbox.models import KVCache, build, preset
from bellbox.ops import native
from bellbox.ops.attend import CacheLayer, attend
from bellbox.ops.float_linear import float_linear
from bellbox.ops.float_linear import operation as float_operation
from bellbox.ops.int4_linear import INT4_COLUMNS, int4_linear
from bellbox.ops.int4_linear import operation as int4_operation
from bellbox.ops.int8_linear import INT8_COLUMNS, int8_linear
from bellbox.ops.int8_linear import operation as int8_operation
from bellbox.ops.rms_norm import rms_norm

SETS = native.instruction_sets()
needs_kernels = pytest.mark.skipif(not SETS, reason="the compiled kernels were not built")


@pytest.fixture(params=SETS or ["none"])
def isa(request):
    if not SETS:
        pytest.skip("the compiled kernels were not built")
    with native.use(request.param):
        yield request.param


@pytest.mark.parametrize(("rows", "features"), [(1, 1), (1, 15), (3, 640), (40, 333)])
def test_norm_has_the_bits_of_the_reference_on_every_path(isa, rows, features):
    x = torch.randn(rows, features) * torch.logspace(-3, 3, rows)[:, None]
    weight = torch.randn(features)
    mean = x.double().square().mean(-1, keepdim=True)
    expected = x * (1 / (mean + 1e-5).sqrt()).float() * weight
    assert torch.equal(rms_norm(x, weight, 1e-5), expected)


def test_norm_of_what_is_not_finite_or_zero(isa):
    x = torch.tensor([[0.0, 0.0], [1.0, float("nan")], [1.0, float("inf")], [1e-30, 0.0], [3e38, 3e38]])
    y = rms_norm(x, torch.ones(2), 1e-5)
    assert y[0].tolist() == [0.0, 0.0]
    assert bool(y[1].isnan().all())
    assert y[4].tolist() == pytest.approx([1.0, 1.0])


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    half=st.integers(1, 40),
    start=st.integers(0, 70),
    rotary=st.booleans(),
)
@needs_kernels
def test_attention_of_one_token_is_that_of_float64(batch, kv_heads, groups, half, start, rotary):
    heads, size, room = kv_heads * groups, 2 * half, start + 3
    query, key = torch.randn(batch, 1, heads * size), torch.randn(batch, 1, kv_heads * size)
    value = torch.randn(batch, 1, kv_heads * size)
    keys, values = torch.randn(2, batch, kv_heads, room, size)
    before = keys.clone()
    angle = torch.rand(room, half) * 6
    tables = (angle.cos(), angle.sin()) if rotary else None

    def turn(x):
        x = x.view(batch, -1, size)
        if not rotary:
            return x
        first, second = x.chunk(2, dim=-1)
        cos, sin = angle[start].cos(), angle[start].sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    results = []
    for isa in SETS:
        with native.use(isa):
            results.append(attend(query, key, value, tables, CacheLayer(keys, values), start, size))
    assert all(torch.equal(each, results[0]) for each in results)
    assert torch.equal(keys[:, :, start], turn(key))
    assert torch.equal(values[:, :, start], value.view(batch, kv_heads, size))
    assert torch.equal(keys[:, :, :start], before[:, :, :start])
    assert torch.equal(keys[:, :, start + 1 :], before[:, :, start + 1 :])
    seen = keys[:, :, : start + 1].double().repeat_interleave(groups, dim=1)
    weights = (seen @ turn(query).double()[..., None] * size**-0.5).softmax(dim=2)
    mixed = (weights * values[:, :, : start + 1].double().repeat_interleave(groups, dim=1)).sum(2)
    assert torch.allclose(results[0].double(), mixed.view(batch, 1, -1), rtol=1e-5, atol=2e-6)


@settings(max_examples=40, deadline=None)
@given(
    precision=st.sampled_from(["int8", "int4"]),
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    size=st.integers(1, 80) | st.sampled_from([64, 96, 128]),
    start=st.integers(0, 70),
    rotary=st.booleans(),
    scale=st.sampled_from([1e-3, 1.0, 300.0]),
    seed=st.integers(0, 99),
)
@needs_kernels
def test_attention_over_codes_is_that_of_what_they_stand_for(
    precision, batch, kv_heads, groups, size, start, rotary, scale, seed
):
    torch.manual_seed(seed)
    rotary = rotary and size % 2 == 0
    heads, room = kv_heads * groups, start + 3
    query, key = torch.randn(batch, 1, heads * size) / scale, torch.randn(batch, 1, kv_heads * size) * scale
    value = torch.randn(batch, 1, kv_heads * size) * scale
    key[:, :, :size] *= torch.tensor([0.0, 1.0, 1e-40])[seed % 3]
    angle = torch.rand(room, size // 2) * 6
    tables = (angle.cos(), angle.sin()) if rotary else None

    def turn(x):
        x = x.view(batch, -1, 1, size)
        if not rotary:
            return x
        first, second = x.chunk(2, dim=-1)
        cos, sin = angle[start].cos(), angle[start].sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    caches = [KVCache(1, batch, kv_heads, room, size, precision=precision) for _ in range(1 + len(SETS))]
    before = torch.randn(2, batch, kv_heads, start, size) * scale
    for cache in caches:
        cache.append(0, *before)
        cache.advance(start)
    keys, values = caches[0].append(0, turn(key), value.view(batch, kv_heads, 1, size))
    results = []
    for isa, cache in zip(SETS, caches[1:], strict=True):
        with native.use(isa):
            results.append(attend(query, key, value, tables, cache.layer(0), start, size))
        for held, expected in zip(cache.layer(0)[:4], caches[0].layer(0)[:4], strict=True):
            assert torch.equal(held[:, :, : start + 1], expected[:, :, : start + 1])
    assert all(torch.equal(each, results[0]) for each in results)
    seen = keys.double().repeat_interleave(groups, dim=1)
    weights = (seen @ turn(query).double().transpose(-1, -2) * size**-0.5).softmax(dim=2)
    mixed = (weights * values.double().repeat_interleave(groups, dim=1)).sum(2)
    assert torch.allclose(results[0].double(), mixed.view(batch, 1, -1), rtol=2e-5, atol=4e-6 * scale)


@settings(max_examples=30, deadline=None)
@given(
    coded=st.sampled_from([None, torch.int8, torch.uint8]),
    rows=st.integers(1, 6),
    kv_heads=st.integers(1, 2),
    half=st.sampled_from([1, 3, 8, 32]),
    rotary=st.booleans(),
    seed=st.integers(0, 99),
)
@needs_kernels
def test_sequences_in_slots_attend_as_each_alone(coded, rows, kv_heads, half, rotary, seed):
    """Slots in any order, lengths of their own: results and caches have the bits of one call each."""
    generator = torch.Generator().manual_seed(seed)
    size, room, slots = 2 * half, 40, rows + 2
    width = half if coded == torch.uint8 else size

    def floats(*shape):
        return torch.randn(*shape, generator=generator)

    keys, values = floats(2, slots, kv_heads, room, width)
    scales: list = [None, None]
    if coded is not None:
        keys, values = (torch.randint(0, 100, (2, *keys.shape), generator=generator)).to(coded).unbind()
        scales = list(floats(2, slots, kv_heads, room).abs())
    layer = CacheLayer(keys.clone(), values.clone(), *(None if s is None else s.clone() for s in scales))
    query, key, value = (floats(rows, 1, heads * size) for heads in (2 * kv_heads, kv_heads, kv_heads))
    tables = (floats(room, half), floats(room, half)) if rotary else None
    order = torch.randperm(slots, generator=generator)[:rows]
    starts = torch.randint(0, room, (rows,), generator=generator)
    for isa in SETS:
        with native.use(isa):
            found = attend(query, key, value, tables, layer, torch.stack((order, starts), dim=1), size)
            for i, (slot, start) in enumerate(zip(order.tolist(), starts.tolist(), strict=True)):
                here = slice(slot, slot + 1)
                one = CacheLayer(keys[here], values[here], *(None if s is None else s[here] for s in scales))
                part = slice(i, i + 1)
                alone = attend(query[part], key[part], value[part], tables, one, start, size)
                assert torch.equal(found[part], alone)
    for a, b in zip(layer[:4], (keys, values, *scales), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)  # slots that nobody has included


def test_a_row_of_the_float_product_is_its_own_on_every_path(isa):
    for rows, columns, outputs in (
        (1, 640, 100),
        (7, 333, 33),
        (16, 48, 5),
        (5, 1, 1),
        (4, 15, 4),
        (9, 100, 4100),
    ):
        x, weight = torch.randn(rows, columns) * 10, torch.randn(outputs, columns)
        found = float_linear(x, weight)
        assert torch.equal(found, float_operation.reference(x, weight))
        assert torch.equal(found, torch.cat([float_linear(row, weight) for row in x.split(1)]))
        exact = x.double() @ weight.double().t()
        bound = 1e-6 * (x.double().abs() @ weight.double().abs().t())
        assert bool(((found - exact).abs() <= bound).all())
    assert float_linear(torch.zeros(0, 4), torch.ones(3, 4)).shape == (0, 3)
    x[2, 7] = float("nan")
    y = float_linear(x, weight)
    assert bool(y[2].isnan().all())
    assert bool(y[[0, 1, 3]].isfinite().all())
    with pytest.raises(BellboxError, match="a product in fp32 of 4 inputs got shape"):
        float_linear(torch.ones(2, 5), torch.ones(3, 4))


def test_int8_product_is_exact_and_equal_on_every_path(isa):
    for rows, columns, outputs in ((1, 640, 100), (7, 333, 33), (4, INT8_COLUMNS, 5), (1, 1, 1)):
        x = torch.randn(rows, columns) * 10
        weight = torch.randint(-127, 128, (outputs, columns), dtype=torch.int8)
        scale = torch.rand(outputs) + 0.01
        found = int8_linear(x, weight, scale)
        assert torch.equal(found, int8_operation.reference(x, weight, scale))
        wide = weight.double() * scale[:, None].double()
        exact = x.double() @ wide.t()
        # Inputs are rounded to 2047ths of the largest of their row: half a step each at worst, then fp32.
        half_step = x.abs().amax(-1, keepdim=True).double() / 2047 / 2
        bound = half_step * wide.abs().sum(-1) * (1 + 1e-6) + 1e-6 * exact.abs()
        assert bool(((found - exact).abs() <= bound).all())


def test_int8_product_at_the_largest_sum_and_with_rows_that_are_not_finite(isa):
    weight = torch.full((2, INT8_COLUMNS), -127, dtype=torch.int8)
    x = torch.full((5, INT8_COLUMNS), 3.0)
    x[1] = 0.0
    x[2, 7], x[3, 7] = float("nan"), -float("inf")
    x[4] = 1e-38
    y = int8_linear(x, weight, torch.ones(2))
    assert y[0].tolist() == pytest.approx([-127.0 * 3 * INT8_COLUMNS] * 2)
    assert y[1].tolist() == [0.0, 0.0]
    assert bool(y[2:4].isnan().all())
    assert y[4].tolist() == [0.0, 0.0]


def int4_table(rows: int, columns: int, group: int) -> TableCodes:
    return TableCodes(
        torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8),
        torch.randint(0, 256, (rows, columns // group), dtype=torch.uint8),
        torch.rand(rows) + 0.01,
    )


@pytest.mark.parametrize("group", [32, 64])
def test_int4_product_is_exact_and_equal_on_every_path(isa, group):
    for rows, blocks, outputs in (
        (1, 10, 100),
        (1, 1, 1),
        (19, 7, 33),
        (3, 3, 5),
        (8, INT4_COLUMNS // group, 2),
    ):
        x = torch.randn(rows, group * blocks) * 10
        codes = int4_table(outputs, group * blocks, group)
        found = int4_linear(x, *codes)
        assert torch.equal(found, int4_operation.reference(x, *codes))
        wide = table_values(codes).double()
        exact = x.double() @ wide.t()
        # Inputs are rounded to 127ths of the largest of their row: half a step each at worst, then fp32.
        half_step = x.abs().amax(-1, keepdim=True).double() / 127 / 2
        bound = half_step * wide.abs().sum(-1) * (1 + 1e-5) + 1e-5 * exact.abs()
        assert bool(((found - exact).abs() <= bound).all())


def test_int4_product_at_the_largest_sum_and_with_rows_that_are_not_finite(isa):
    weight = torch.zeros(2, INT4_COLUMNS // 2, dtype=torch.uint8)  # -8, which none of ours writes
    multipliers = torch.full((2, INT4_COLUMNS // 32), 255, dtype=torch.uint8)
    x = torch.full((5, INT4_COLUMNS), -127.0)
    x[1] = 0.0
    x[2, 7], x[3, 7] = float("nan"), -float("inf")
    x[4] = 1e-38
    y = int4_linear(x, weight, multipliers, torch.ones(2))
    assert y[0].tolist() == [float(8 * 255 * 127 * INT4_COLUMNS)] * 2
    assert y[1].tolist() == [0.0, 0.0]
    assert bool(y[2:4].isnan().all())
    assert y[4].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", ["tiny", "gpt-tiny"])
def test_a_decode_step_gives_the_logits_of_the_full_forward(name):
    model = build(preset(name, vocab_size=64, num_hidden_layers=2), seed=0).eval()
    ids = torch.randint(0, 64, (2, 20))
    with torch.no_grad():
        whole = model(ids)
        cache = model.new_cache(2, 20)
        steps = [model(ids[:, :9], cache=cache)]
        steps += [model(ids[:, i : i + 1], cache=cache) for i in range(9, 20)]
    assert torch.allclose(torch.cat(steps, dim=1), whole, atol=1e-5)


@pytest.mark.parametrize("name", ["tiny", "gpt-tiny"])
def test_a_packed_model_compiles_without_graph_breaks_to_the_same_bits(name):
    config = preset(name, vocab_size=64, num_hidden_layers=2, hidden_size=64, intermediate_size=128)
    model = bb.prepare(build(config, seed=0), bb.Recipe.bbq(2))
    ids = torch.randint(0, 64, (2, 12))
    with torch.no_grad():
        model.eval()(ids)
        packed = bb.convert(model)
        compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(ids), packed(ids))


def test_inputs_of_another_width_are_one_line():
    weight, scale = torch.zeros(5, 8, dtype=torch.int8), torch.ones(5)
    for width in (4, 16):
        x = torch.ones(2, width)
        with pytest.raises(BellboxError, match=r"an int8 layer of 8 inputs got shape \(2, "):
            int8_linear(x, weight, scale)
        with pytest.raises(BellboxError, match=r"a 4-bit layer of 32 inputs got shape \(2, "):
            int4_linear(x, *int4_table(5, 32, 32))
        with pytest.raises(BellboxError, match=r"a norm of 8 inputs got shape \(2, "):
            rms_norm(x, torch.ones(8), 1e-5)


def test_nothing_in_nothing_out():
    assert rms_norm(torch.ones(3, 0), torch.ones(0), 1e-5).shape == (3, 0)
    empty = int8_linear(torch.ones(0, 8), torch.zeros(5, 8, dtype=torch.int8), torch.ones(5))
    assert empty.shape == (0, 5)
    assert int4_linear(torch.ones(0, 32), *int4_table(5, 32, 32)).shape == (0, 5)


def test_tables_that_do_not_fit_together_are_one_line():
    weight, multipliers, scale = int4_table(5, 64, 32)
    for args, message in (
        ((weight, multipliers[:4], scale), r"multipliers \(4, 2\)"),
        ((weight, multipliers, scale[:4]), r"scales \(4,\)"),
        ((weight, multipliers[:, :0], scale), "not 0 of 64"),
        ((weight[:, :24], multipliers, scale), "not 2 of 48"),
        ((weight.repeat(1, 256), multipliers.repeat(1, 256), scale), "not 512 of 16384"),
    ):
        with pytest.raises(BellboxError, match=message):
            int4_linear(torch.ones(2, 64), *args)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_modes_traces_and_transforms_see_operations():
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    norm, weight = torch.rand(8), torch.randint(-127, 128, (5, 8), dtype=torch.int8)
    scale = torch.rand(5)
    table = int4_table(5, 32, 32)
    for call in (
        lambda x: rms_norm(x, norm, 1e-5),
        lambda x: int8_linear(x, weight, scale),
        lambda x: int4_linear(x.repeat(1, 4), *table),
    ):
        expected = call(x)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert call(mode.from_tensor(x)).shape == expected.shape
        assert torch.equal(torch.jit.trace(call, x, check_trace=False)(2 * x), call(2 * x))
        assert torch.equal(torch.vmap(call)(torch.stack((x, -x))), torch.stack((expected, call(-x))))
        with torch.device("meta"):
            assert torch.equal(call(x), expected)
