"""What stands between packed layers: the same bits on every path, in every company, and near the formula."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bellbox.ops import native
from bellbox.ops.activate import ACTIVATIONS, activate, exponential, operation
from bellbox.ops.attend import CacheLayer, attend
from bellbox.ops.layer_norm import layer_norm
from bellbox.ops.layer_norm import operation as norm_operation
from bellbox.ops.rotary import _turn, rotary_tables

SETS = native.instruction_sets()
needs_kernels = pytest.mark.skipif(not SETS, reason="the compiled kernels were not built")


def formula(kind: str, x: torch.Tensor) -> torch.Tensor:
    x = x.double()
    if kind == "silu":
        return x / (1 + (-x).exp())
    if kind == "gelu":
        return x / (1 + (-math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)).exp())
    return 0.5 * x * torch.erfc(-x / math.sqrt(2))


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_an_activation_is_its_formula_and_has_one_value_on_every_path(kind):
    x = torch.cat((torch.linspace(-30, 30, 5003), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e25, -1e25])))
    times = torch.randn(len(x), generator=torch.Generator().manual_seed(0))
    expected = operation.reference(x, None, kind)
    torch.testing.assert_close(expected.double(), formula(kind, x), atol=1e-9, rtol=4e-6)
    for isa in SETS:
        with native.use(isa):
            assert torch.equal(activate(x, kind), expected)
            assert torch.equal(activate(x[1:38].clone(), kind), expected[1:38])
            assert torch.equal(activate(x, kind, times), expected * times)
            for bad in (math.inf, math.nan):
                assert not activate(torch.tensor([bad, -bad]), kind)[0].isfinite()


def test_the_exponential_is_that_of_float64():
    x = -torch.logspace(-8, math.log10(80), 3001)
    torch.testing.assert_close(exponential(x).double(), x.double().exp(), atol=0, rtol=4e-7)


@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 100, 640])
@pytest.mark.parametrize("biased", [True, False])
def test_a_layer_norm_is_its_formula_and_has_one_value_on_every_path(width, biased):
    draw = torch.Generator().manual_seed(width)
    x = torch.randn(3, 4, width, generator=draw) * 3 + 1
    x[0, 0] = 2.5  # a row without variance
    weight, bias = torch.randn(2, width, generator=draw).unbind()
    given = bias if biased else None
    expected = norm_operation.reference(x, weight, given, 1e-5)
    wide = torch.nn.functional.layer_norm(
        x.double(), (width,), weight.double(), None if given is None else given.double(), 1e-5
    )
    torch.testing.assert_close(expected.double(), wide, atol=1e-6, rtol=2e-7)
    for isa in SETS:
        with native.use(isa):
            assert torch.equal(layer_norm(x, weight, given, 1e-5), expected)
            assert torch.equal(layer_norm(x[1, 2], weight, given, 1e-5), expected[1, 2])


def test_a_sum_over_a_normed_row_is_the_same_zero_on_every_path():
    """Without gains it is zero but for rounding, and zero is a threshold: one order of sums decides."""
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    expected = norm_operation.reference(x, torch.ones(96), torch.zeros(96), 1e-5)
    for isa in SETS:
        with native.use(isa):
            assert torch.equal(layer_norm(x, torch.ones(96), torch.zeros(96), 1e-5), expected)


@pytest.mark.parametrize(("theta", "head"), [(1e4, 64), (5e5, 128), (1e6, 96), (100.0, 6)])
def test_rotary_positions_are_those_of_float64_and_the_same_in_torch(monkeypatch, theta, head):
    cosines, sines = rotary_tables(theta, head, 3000)
    exponents = torch.arange(0, head, 2, dtype=torch.float32) / head
    frequencies = 1.0 / (theta ** exponents.double()).float()
    angles = (torch.arange(3000.0)[:, None] * frequencies).double()
    assert float((cosines != angles.cos().float()).float().mean()) < 1e-5
    assert float((sines != angles.sin().float()).float().mean()) < 1e-5
    monkeypatch.setattr(native, "available", lambda: False)
    assert all(map(torch.equal, rotary_tables(theta, head, 3000), (cosines, sines)))
    far = torch.tensor([2.0**20 - 1, 1e6, math.pi / 2, math.pi])
    assert torch.equal(
        torch.stack(_turn(far.double())), torch.stack((far.double().cos(), far.double().sin())).float()
    )


def are_equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


@settings(max_examples=40, deadline=None)
@given(
    coded=st.sampled_from(["fp32", "int8", "int4"]),
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    half=st.integers(1, 40) | st.sampled_from([32, 48, 64]),
    start=st.integers(0, 70),
    tokens=st.integers(2, 70),
    rotary=st.booleans(),
    seed=st.integers(0, 99),
)
@needs_kernels
def test_tokens_together_attend_as_one_by_one(
    coded, batch, kv_heads, groups, half, start, tokens, rotary, seed
):
    from bellbox.models.cache import KVCache

    draw = torch.Generator().manual_seed(seed)
    size, room = 2 * half, start + tokens + 2

    def floats(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    query = floats(batch, tokens, kv_heads * groups * size)
    key, value = floats(2, batch, tokens, kv_heads * size).unbind()
    tables = (floats(room, half), floats(room, half)) if rotary else None
    before = floats(2, batch, kv_heads, start, size)
    expected, held = None, None
    for isa in SETS:
        caches = [KVCache(1, batch, kv_heads, room, size, precision=coded) for _ in range(3)]
        for cache in caches:
            cache.append(0, *before)
        with native.use(isa):
            layers = [cache.layer(0) for cache in caches]
            whole = attend(query, key, value, tables, layers[0], start, size)
            singly = torch.cat(
                [
                    attend(
                        query[:, i : i + 1],
                        key[:, i : i + 1],
                        value[:, i : i + 1],
                        tables,
                        layers[1],
                        start + i,
                        size,
                    )
                    for i in range(tokens)
                ],
                dim=1,
            )
            cut = tokens // 2
            pieces = [
                attend(query[:, a:b], key[:, a:b], value[:, a:b], tables, layers[2], start + a, size)
                for a, b in ((0, cut), (cut, tokens))
                if a < b
            ]
        end = start + tokens
        now = [None if t is None else t[:, :, :end] for t in layers[0][:4]]
        for layer in layers[1:]:
            found = [None if t is None else t[:, :, :end] for t in layer[:4]]
            assert all(map(are_equal, now, found))
        expected, held = (whole, now) if expected is None else (expected, held)
        assert torch.equal(whole, expected)
        assert torch.equal(singly, expected)
        assert torch.equal(torch.cat(pieces, dim=1), expected)
        assert held is not None
        assert all(map(are_equal, now, held))


@pytest.mark.parametrize("causal", [True, False])
@needs_kernels
def test_attention_without_a_cache_is_that_of_float64(causal):
    query, key, value = torch.randn(3, 2, 67, 4 * 32, generator=torch.Generator().manual_seed(0)).unbind()
    q, k, v = (x.view(2, 67, 4, 32).transpose(1, 2).double() for x in (query, key, value))
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    found = attend(query, key, value, None, None, 0, 32, causal)
    torch.testing.assert_close(found.double(), wanted.transpose(1, 2).flatten(2), atol=2e-6, rtol=1e-5)
    keys, values = torch.empty(2, 2, 4, 90, 32).unbind()
    room = CacheLayer(keys, values)
    assert torch.equal(attend(query, key, value, None, room, 0, 32, causal), found)
