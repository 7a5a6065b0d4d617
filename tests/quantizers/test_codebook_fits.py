"""Fits of k-means codebooks: what they minimise, in float64 under autograd; when they are due; what they need."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bellbox as bb
from bellbox.errors import BellboxError
from bellbox.nn import quantized_layers
from bellbox.nn.record import Side
from bellbox.optim import add_squared_gradients, parameter_groups, refit_codebooks, second_moments
from bellbox.quantizers import build_quantizer
from bellbox.quantizers.kmeans import KMeans, lloyd_max
from bellbox.recipe import QuantizerSpec


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(x: Tensor, centroids: Tensor, fisher: Tensor | None) -> Tensor:
    """What a fit minimises, by the definition: each value with its nearest centroid, groups of 64 with their scale."""
    groups = x.reshape(-1, 64)
    few = len(centroids) <= 4
    scale = groups.abs().mean(-1, keepdim=True) if few else groups.abs().amax(-1, keepdim=True)
    nearest = ((groups / scale)[..., None] - centroids.detach()).abs().argmin(-1)
    if fisher is None:
        return (groups / scale - centroids[nearest]).square().sum()
    return (fisher.reshape(groups.shape) * (groups - scale * centroids[nearest]).square()).sum()


def fitted(x: Tensor, n: int, fisher: Tensor | None = None, **options: bool | float | str) -> KMeans:
    q = build_quantizer(QuantizerSpec("kmeans", n, options=options), x.shape[1], len(x), "here").double()
    assert isinstance(q, KMeans)
    q.initialize(x)
    if fisher is not None:
        q.refit(x, fisher)
    return q


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@settings(max_examples=6, deadline=None)
@given(rows=st.integers(1, 6), groups=st.integers(1, 3), seed=st.integers(0, 10**6))
def test_a_fit_is_where_the_error_is_stationary(bits, weighted, rows, groups, seed):
    x = numbers(rows, 64 * groups, seed=seed)
    fisher = numbers(rows, 64 * groups, seed=seed + 1).pow(4) if weighted else None
    centroids = fitted(x, 2**bits, fisher).centroids.detach().double().requires_grad_()
    assert torch.equal(centroids, centroids.sort().values)
    total = error(x, centroids, fisher)
    (gradient,) = torch.autograd.grad(total, centroids)
    assert float(gradient.abs().max()) <= 1e-5 * float(total.detach()) + 1e-5


@pytest.mark.parametrize("n", [2, 4, 8, 16])
def test_a_fit_by_squared_gradients_has_the_smaller_weighted_error_and_the_plain_one_the_plain(n):
    x, fisher = numbers(16, 256), numbers(16, 256, seed=1).pow(6)
    plain, weighted = (fitted(x, n, each).centroids.double() for each in (None, fisher))
    assert float(error(x, weighted, fisher)) < 0.999 * float(error(x, plain, fisher))
    assert float(error(x, plain, None)) < 0.999 * float(error(x, weighted, None))


def test_only_the_proportions_of_squared_gradients_count_and_none_at_all_count_alike():
    x, fisher = numbers(4, 128), numbers(4, 128, seed=1).square()
    assert torch.equal(fitted(x, 4, fisher).centroids, fitted(x, 4, fisher * 2.0**-60).centroids)
    assert torch.equal(fitted(x, 4, torch.zeros_like(x)).centroids, fitted(x, 4).centroids)
    only = torch.zeros_like(x)
    only[1, 5] = 1.0  # one value counts: some centroid is that value
    value = x[1, 5] / x[1, :64].abs().mean()
    assert float((fitted(x, 4, only).centroids - value).abs().min()) < 1e-12


def test_runs_of_next_to_no_weight_stay_within_their_values():
    values, weights = torch.linspace(-3, 3, 601, dtype=torch.float64), torch.ones(601, dtype=torch.float64)
    weights[400:] = 1e-30  # lost in the sums that differences are taken of
    centroids = lloyd_max(values, 8, weights)
    assert bool((centroids.diff() >= 0).all())
    assert -3 <= float(centroids[0]) <= float(centroids[-1]) <= 3


def test_options_that_say_when_and_by_what_are_of_training_alone():
    spec = QuantizerSpec("kmeans", 4, options={"fisher": True, "refit_every": 10})
    assert Side.of(build_quantizer(spec, 64, 2, "")) == Side.of(
        build_quantizer(QuantizerSpec("kmeans", 4), 64, 2, "")
    )
    with pytest.raises(BellboxError, match="refit_every -1: must be 0 or a number of steps"):
        build_quantizer(QuantizerSpec("kmeans", 4, options={"refit_every": -1}), 64, 2, "")


def network(**options: bool | float | str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Conv2d(64, 8, 3), nn.Linear(64, 16))
    return bb.prepare(model, bb.Recipe.of("kmeans", 2, weight_only="float", options=options, keep_ends=False))


def backward(model: nn.Module, seed: int) -> None:
    x = numbers(5, 64, seed=seed).float()
    images = x.reshape(5, 64, 1, 1).expand(5, 64, 4, 4)
    (model[0](x).square().sum() + model[1](images).square().sum() + model[2](x).sum()).backward()  # type: ignore[operator]


def centroids_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items() if name.endswith("centroids")}


def test_codebooks_follow_the_moments_of_adam_or_sums_of_ones_own():
    model, twin = network(fisher=True), network(fisher=True)
    adam = torch.optim.AdamW(parameter_groups(model, lr=1e-2), betas=(0.9, 0.5))
    sums: dict[Tensor, Tensor] = {}
    squares: dict[Tensor, Tensor] = {}
    with pytest.raises(
        BellboxError, match="0: fisher=true weighs errors by squared gradients, and there are"
    ):
        refit_codebooks(model, second_moments(adam))
    for seed in (0, 1):
        for each in (model, twin):
            each.zero_grad()
            backward(each, seed)
        adam.step()
        add_squared_gradients(twin, sums)
        for _, layer in quantized_layers(twin):
            weight = layer.stored_weight
            assert weight.grad is not None
            squares[weight] = squares.get(weight, 0) + weight.grad**2
        twin.load_state_dict(model.state_dict())
    before = centroids_of(model)
    assert refit_codebooks(model, second_moments(adam)) == ["0", "1", "2"]
    after = centroids_of(model)
    assert not any(torch.equal(before[name], after[name]) for name in before)
    for name, layer in quantized_layers(model):
        own = copy.deepcopy(layer.weight_quantizer)
        assert own is not None
        own.refit(layer.weight_rows().detach(), layer.rows_of(adam.state[layer.stored_weight]["exp_avg_sq"]))
        assert torch.equal(own.state_dict()["centroids"], after[f"{name}.weight_quantizer.centroids"])
    assert set(sums) == {layer.stored_weight for _, layer in quantized_layers(twin)}
    for weight, total in sums.items():
        torch.testing.assert_close(total, squares[weight])
    refit_codebooks(twin, sums)  # they count steps alike, where the moment forgets
    name = "0.weight_quantizer.centroids"
    assert not torch.equal(centroids_of(twin)[name], after[name])


def test_a_fit_is_due_every_so_many_steps_and_others_are_left():
    model = bb.prepare(network_plain(), mixed())
    with torch.no_grad():
        for _, layer in quantized_layers(model):
            layer.stored_weight.pow_(3)
    before = centroids_of(model)
    assert refit_codebooks(model, step=0) == []
    assert refit_codebooks(model, step=4) == []
    assert all(torch.equal(before[name], now) for name, now in centroids_of(model).items())
    assert refit_codebooks(model, step=6) == ["0"]
    assert refit_codebooks(model) == ["0", "1"]


def network_plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8), nn.Linear(8, 8))


def mixed() -> bb.Recipe:
    """Layer 0 fitted every 3 steps, layer 1 never, layer 2 of another method."""
    every = QuantizerSpec("kmeans", 4, options={"refit_every": 3.0})
    return bb.Recipe(
        (
            bb.Rule("0", every),
            bb.Rule("1", QuantizerSpec("kmeans", 4)),
            bb.Rule("2", QuantizerSpec("quest", 4)),
        )
    )


@pytest.mark.parametrize("n", [2, 3, 4, 16])
def test_levels_lie_between_the_centroids_of_now(n):
    q = fitted(numbers(8, 64), n).float()

    def halfway() -> list[float]:
        table = q.centroids.double()
        return ((table[1:] + table[:-1]) / 2).float().tolist()

    assert list(q.levels.thresholds) == halfway()
    q.refit(numbers(8, 64, seed=1) * 2 + 0.3)
    assert list(q.levels.thresholds) == halfway()
    q.centroids.data.mul_(1.5)  # past its version counter
    assert list(q.levels.thresholds) == halfway()
    x = numbers(8, 64, seed=2).float()
    groups = x / (x.abs().mean(-1, keepdim=True) if n <= 4 else x.abs().amax(-1, keepdim=True))
    nearest = (groups[..., None] - q.centroids).abs().argmin(-1)
    assert torch.equal(q.codes(x).long(), nearest)


def test_only_weights_that_are_fitted_by_squares_are_summed():
    fisher = QuantizerSpec("kmeans", 4, options={"fisher": True})
    rules = (
        bb.Rule("0", fisher),
        bb.Rule("1", QuantizerSpec("kmeans", 4)),
        bb.Rule("2", None, QuantizerSpec("quest", 4)),
    )
    model = bb.prepare(network_plain(), bb.Recipe(rules))
    sums: dict[Tensor, Tensor] = {}
    add_squared_gradients(model, sums)
    assert sums == {}  # before any backward there is nothing to add
    for _ in range(2):
        model.zero_grad()
        model(numbers(5, 64).float()).square().sum().backward()
        add_squared_gradients(model, sums)
    (layer,) = (layer for name, layer in quantized_layers(model) if name == "0")
    (weight,) = sums
    assert weight is layer.stored_weight
    assert weight.grad is not None
    torch.testing.assert_close(sums[weight], 2 * weight.grad.square())
    assert refit_codebooks(model, sums) == ["0", "1"]


def test_groups_take_their_numbers_by_name():
    model = nn.Linear(4, 4)
    (weights, biases) = parameter_groups(model=model, lr=0.5, weight_decay=0.25)
    assert (weights["lr"], weights["weight_decay"]) == (0.5, 0.25)
    assert (biases["lr"], biases["weight_decay"]) == (0.5, 0.0)
    with pytest.raises(TypeError):
        parameter_groups(model, 0.5)  # type: ignore[misc]
