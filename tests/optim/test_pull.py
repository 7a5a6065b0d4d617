"""The pull towards the values of codes, against its formula in float64."""

from __future__ import annotations

import dataclasses
import itertools
from statistics import NormalDist
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bellbox as bb
from bellbox.core.grid import Levels
from bellbox.errors import BellboxError
from bellbox.optim import bin_means, pull_to_codes
from bellbox.runs.config import (
    CewtSection,
    OptimizerSection,
    PullSection,
    QuantizationSection,
    ResolvedConfig,
)
from bellbox.training.schedule import pull_share, rates


@pytest.mark.parametrize("n", [2, 3, 4, 16])
def test_the_value_of_a_code_is_the_mean_of_its_bin(n: int) -> None:
    normal, fine = NormalDist(), 20_000
    for code, mean in enumerate(bin_means(Levels.gaussian(n))):
        within = [normal.inv_cdf((code + (i + 0.5) / fine) / n) for i in range(fine)]
        assert mean == pytest.approx(sum(within) / fine, abs=1e-3)
    assert sum(bin_means(Levels.gaussian(n))) == pytest.approx(0, abs=1e-12)


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "linear":
        return nn.Sequential(nn.Linear(64, 24, bias=False))
    return nn.Sequential(nn.Conv2d(16, 12, 3, bias=False))


def target(layer: Any, quantizer: Any, tensor_sigma: bool) -> Tensor:
    """Q(w) in the domain of the codes, row by row, in float64."""
    rows = layer.rows_of(layer.stored_weight.detach()).double()
    if not layer.weights_rotated:
        rows = layer.rows_of(layer.turned(layer.stored_weight.detach())).double()
    sigma = rows.square().mean(None if tensor_sigma else 1, keepdim=True).sqrt()
    normal = NormalDist()
    n = quantizer.levels.n
    edges = [-float("inf"), *(normal.inv_cdf(i / n) for i in range(1, n)), float("inf")]
    found = torch.zeros_like(rows)
    for low, high in itertools.pairwise(edges):
        inside = (rows / sigma >= low) & (rows / sigma < high)
        mean = n * ((normal.pdf(low) if low > -9 else 0) - (normal.pdf(high) if high < 9 else 0))
        found = torch.where(inside, mean * sigma, found)
    return found


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_a_weight_goes_its_share_of_the_way_in_the_domain_of_its_codes(
    kind: str, rotated: bool, granularity: Any
) -> None:
    recipe = bb.Recipe.of("bbq", 4, weights_rotated=rotated, weight_granularity=granularity, keep=())
    model = bb.prepare(network(kind), recipe)
    layer: Any = model[0]  # pyright: ignore[reportIndexIssue]
    stored = layer.stored_weight
    with torch.no_grad():
        stored.mul_(torch.rand(len(stored), *[1] * (stored.dim() - 1)) + 0.5)

    def coded() -> Tensor:
        now = stored.detach()
        return layer.rows_of(now if rotated else layer.turned(now)).double()

    before, wanted = coded(), target(layer, layer.weight_quantizer, granularity == "tensor")
    codes = layer.weight_codes()
    pull_to_codes(model, 0.3)
    assert torch.equal(coded(), before)  # no gradient, no step
    stored.grad = torch.zeros_like(stored)
    pull_to_codes(model, 0.3)
    torch.testing.assert_close(coded(), before + 0.3 * (wanted - before), rtol=1e-4, atol=1e-5)
    assert (layer.weight_codes() == codes).float().mean() > 0.99
    if rotated and granularity == "row":
        pull_to_codes(model, 1.0)
        assert len(layer.rows_of(stored.detach())[0].unique()) <= 16


def test_other_methods_are_left_alone_and_nested_ones_refused() -> None:
    model = bb.prepare(network("linear"), bb.Recipe.of("lsq", 4, keep=()))
    weight = model[0].stored_weight  # pyright: ignore[reportIndexIssue]
    weight.grad = torch.ones_like(weight)
    before = weight.detach().clone()
    pull_to_codes(model, 0.5)
    assert torch.equal(weight, before)
    nested = bb.prepare(network("linear"), bb.Recipe.bbq(nested=[4, 2], keep=()))
    with pytest.raises(BellboxError, match="is nested"):
        pull_to_codes(nested, 0.5)
    with pytest.raises(BellboxError, match=r"must be in \[0, 1\]"):
        pull_to_codes(model, 1.5)


def run_of(**cewt: Any) -> ResolvedConfig:
    section = CewtSection(**{"lr": 0.02, "every": 16, "pull": PullSection(weight=3.0, last=0.2), **cewt})
    return ResolvedConfig(steps=100, optimizer=OptimizerSection(lr=1e-3, cewt=section))


def test_the_pull_rises_over_the_last_steps_with_the_rate_that_moves_the_weights() -> None:
    config, free = run_of(), run_of(hyperball=False)
    for step in range(100):
        lr, ball = rates(config, step)
        rise = max(0, step + 1 - 80) / 20
        assert pull_share(config, step) == pytest.approx(3.0 * ball * rise)
        assert pull_share(free, step) == pytest.approx(3.0 * lr * rise)
    assert pull_share(run_of(pull=PullSection(weight=1e6)), 99) == 1.0
    assert all(pull_share(run_of(pull=PullSection()), step) == 0 for step in range(100))


@pytest.mark.parametrize(
    ("quantization", "cewt", "message"),
    [
        (QuantizationSection(method="lsq"), {}, "with method lsq: only a code of bbq"),
        (QuantizationSection(method="none"), {}, "with method none"),
        (QuantizationSection(recipe={"rules": []}), {}, "with a recipe"),
        (QuantizationSection(nested=[4, 2]), {}, "with nested"),
        (QuantizationSection(), {"every": 0}, "no weights are constrained"),
        (QuantizationSection(method="bbq_paper"), {"every": None}, "no weights are constrained"),
    ],
)
def test_what_it_does_not_go_with_is_refused(
    quantization: QuantizationSection, cewt: dict[str, Any], message: str
) -> None:
    with pytest.raises(BellboxError, match=message):
        dataclasses.replace(run_of(**cewt), quantization=quantization).check()
    run_of().check()
