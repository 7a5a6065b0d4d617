"""Numbers against sources that share nothing with ours: 50-digit arithmetic, a published table, other packages.

brevitas and torchao are no dependencies of the tests; where they can be imported, they are compared with:
`pip install --no-deps torchao brevitas dependencies unfoldNd`.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from mpmath import mp

from bellbox.core.grid import Levels
from bellbox.optim.cewt import normal_scores
from bellbox.quantizers import build_quantizer
from bellbox.quantizers.nf import normal_float
from bellbox.quantizers.quest import CLIPS, gaussian_clip, gaussian_error
from bellbox.recipe import QuantizerSpec

# bitsandbytes 0.41 to 0.48, `get_4bit_type("nf4")`; appendix E of QLoRA (arXiv 2305.14314) prints the same 16 numbers.
BITSANDBYTES_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)


@pytest.fixture(autouse=True)
def _fifty_digits():
    with mp.workdps(50):
        yield


def quantile(p):
    """Of the standard normal distribution."""
    return mp.sqrt(2) * mp.erfinv(2 * mp.mpf(p) - 1)


def cdf(x):
    return (1 + mp.erf(x / mp.sqrt(2))) / 2


def density(x):
    return mp.exp(-x * x / 2) / mp.sqrt(2 * mp.pi)


def fp32(number) -> float:
    """The nearest fp32 number of one with 50 digits; by way of fp64, which a tie within 1e-16 alone could spoil."""
    return float(torch.tensor(float(number), dtype=torch.float64).float())


@pytest.mark.parametrize("n", [*range(2, 18), 31, 32, 64, 100, 128, 255, 256])
def test_thresholds_are_the_fp32_numbers_nearest_to_gaussian_quantiles(n):
    assert Levels.gaussian(n).thresholds == tuple(fp32(quantile(mp.mpf(i) / n)) for i in range(1, n))


def test_nf4_is_the_table_of_bitsandbytes():
    assert normal_float(16) == pytest.approx(BITSANDBYTES_NF4, abs=5e-7)  # its offset is rounded to 7 digits


@pytest.mark.parametrize("n", [4, 8, 16])
def test_normal_float_is_its_definition_in_50_digits(n):
    half, delta = n // 2, (mp.mpf(1) / (2 * n) + mp.mpf(1) / (2 * n - 2)) / 2
    below = [delta + (mp.mpf(1) / 2 - delta) * i / (half - 1) for i in range(half)]
    above = [mp.mpf(1) / 2 + (mp.mpf(1) / 2 - delta) * i / half for i in range(1, half + 1)]
    values = [quantile(p) for p in (*below, *above)]
    assert normal_float(n) == pytest.approx([float(v / -values[0]) for v in values], rel=1e-14, abs=1e-15)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 7, 8, 9, 15, 16, 31, 32, 64])
def test_gaussian_clips_are_where_the_squared_error_is_stationary(n):
    """d/dc of the error of n levels from -c to c is zero: sum over the cells of u (q P - E[v; cell]), q = c u."""

    def slope(clip):
        step = 2 * clip / (n - 1)
        edges = [-mp.inf, *((i - mp.mpf(n) / 2) * step for i in range(1, n)), mp.inf]
        total = mp.mpf(0)
        for code, (low, high) in enumerate(itertools.pairwise(edges)):
            u = mp.mpf(2 * code - (n - 1)) / (n - 1)
            total += u * (clip * u * (cdf(high) - cdf(low)) - (density(low) - density(high)))
        return total

    known = gaussian_clip(n)
    best = mp.findroot(slope, mp.mpf(known))
    # QuEST's authors publish what a search of theirs found; what they did not publish is computed here.
    assert known == pytest.approx(float(best), abs=2e-3 if n in CLIPS else 1e-6)
    assert gaussian_error(n, known) == pytest.approx(gaussian_error(n, float(best)), rel=1e-5)


def test_the_outer_level_of_equal_mass_is_the_mean_of_an_outer_third():
    q = build_quantizer(QuantizerSpec("ternary_mass", 3), 8, 4, "")
    assert float(q.scale()) == pytest.approx(float(3 * density(quantile(mp.mpf(2) / 3))), rel=1e-7)


@pytest.mark.parametrize("count", [2, 3, 64, 501])
def test_scores_of_cewt_are_quantiles_of_unit_size(count):
    scores = [quantile((r + mp.mpf(1) / 2) / count) for r in range(count)]
    size = mp.sqrt(sum(s * s for s in scores) / count)
    wanted = [fp32(s / size) for s in scores]
    assert normal_scores(count, torch.device("cpu")).tolist() == pytest.approx(wanted, rel=1.2e-7, abs=1e-30)


def some_rows(seed: int = 0) -> torch.Tensor:
    return torch.randn(8, 96, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("unsigned", [False, True])
def test_classic_lsq_is_that_of_brevitas(bits, unsigned):
    pytest.importorskip("brevitas", exc_type=ImportError, reason="brevitas is not installed")
    from brevitas.core.function_wrapper import Identity
    from brevitas.core.quant import IntQuant
    from brevitas.core.scaling import ParameterScaling

    n = 2**bits
    options = {"classic": True, "unsigned": unsigned}
    ours = build_quantizer(QuantizerSpec("lsq", n, options=options), 96, None, "").double()
    x = some_rows().abs() if unsigned else some_rows()
    ours.initialize(x)
    with torch.no_grad():
        ours.a.mul_(0.3)  # so that some are clipped
    step = ours.a.item() + 1e-8
    theirs, scaling = IntQuant(False, not unsigned, Identity()), ParameterScaling(step, dtype=torch.float64)
    # Half a level beyond the outermost one brevitas passes gradients, since it rounds before it clips; LSQ clips first.
    top = n - 1 if unsigned else n // 2 - 1
    between = (x / step > top) & (x / step < top + 0.5)
    between |= (x / step < top + 1 - n) & (x / step > top + 0.5 - n)
    g = torch.where(between, 0, some_rows(1))
    results = []
    for quantize, scale in (
        (ours, ours.a),
        (lambda leaf: theirs(scaling(leaf), torch.zeros(()), torch.tensor(float(bits)), leaf), scaling.value),
    ):
        leaf = x.clone().requires_grad_()
        out = quantize(leaf)
        out.backward(g)
        results.append((out.detach(), leaf.grad, scale.grad.reshape(())))
    (out, g_x, g_a), (other, other_x, other_a) = results
    assert len((out / step).round().unique()) > n // 2
    torch.testing.assert_close(out, other, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(g_x, other_x, rtol=1e-12, atol=0)
    assert bool((g_x == 0)[~between].any())  # some are clipped
    torch.testing.assert_close(g_a * math.sqrt(x.numel() * max(1, top)), other_a, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_round_to_nearest_is_torchaos_fake_quantizer(bits):
    qat = pytest.importorskip(
        "torchao.quantization.qat", exc_type=ImportError, reason="torchao is not installed"
    )
    kinds = {2: torch.int2, 3: torch.int3, 4: torch.int4, 8: torch.int8}
    theirs = qat.IntxFakeQuantizer(qat.IntxFakeQuantizeConfig(kinds[bits], "per_channel", is_symmetric=True))
    ours = build_quantizer(QuantizerSpec("rtn", 2**bits, 0.0), 96, 8, "")
    x, g = some_rows().float(), some_rows(1).float()
    results = []
    for quantizer in (ours, theirs):
        leaf = x.clone().requires_grad_()
        out = quantizer(leaf)
        out.backward(g)
        results.append((out.detach(), leaf.grad))
    (out, g_x), (other, other_x) = results
    # The largest magnitude lies in the middle between two levels, where ours goes up and theirs to the even one; and
    # where that is beyond the top level, only ours lets the gradient pass.
    largest = x.abs() == x.abs().amax(1, keepdim=True)
    assert int(largest.sum()) == 8
    torch.testing.assert_close(out[~largest], other[~largest], rtol=1e-5, atol=1e-6)
    assert torch.equal(g_x, g)
    torch.testing.assert_close(g_x[~largest], other_x[~largest], rtol=1e-6, atol=0)
