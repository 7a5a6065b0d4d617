from __future__ import annotations

import math
import os
import time
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bellbox.errors import BellboxError
from bellbox.models import GPTConfig, LlamaConfig, build
from bellbox.objectives import (
    FeatureCollector,
    FeatureHook,
    coding_length,
    gather_rows,
    mec_loss,
    normalised,
    pooled,
    spectrum,
    two_view_loss,
)

SHAPES = [(40, 12), (12, 40), (20, 20), (3, 5)]


def features(m: int, d: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(m, d, generator=generator, dtype=torch.float64) @ mixing + 2


def by_definition(x: torch.Tensor, distortion: float = 64.0, y: torch.Tensor | None = None) -> torch.Tensor:
    """The loss from the d x d matrix itself, in float64."""
    z, p = (normalised(v) for v in (x, x if y is None else y))
    m, d = z.shape
    rate = d / (m * distortion)
    return -torch.linalg.slogdet(torch.eye(d, dtype=torch.float64) + rate * z.T @ p)[1] / (rate * m)


@pytest.mark.parametrize(("m", "d"), SHAPES)
@pytest.mark.parametrize("distortion", [64.0, 0.5])
def test_value_and_gradient_are_those_of_slogdet_in_float64(m, d, distortion):
    x = features(m, d).requires_grad_()
    wanted = by_definition(x, distortion)
    (gradient,) = torch.autograd.grad(wanted, x)
    single = x.detach().float().requires_grad_()
    found = mec_loss(single, distortion)
    (slope,) = torch.autograd.grad(found, single)
    assert found.dtype == torch.float32
    assert -1 <= float(found.detach()) <= 0
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        slope.double(), gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()) + 3e-7
    )


@pytest.mark.parametrize("form", ["exact", "taylor"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("experts", [1, 2])
def test_features_that_are_not_finite_give_nan_for_the_trainer_to_name(form, value, experts):
    x = features(12, 6).float()
    x[3, 2] = value
    assert mec_loss(x, form=form, experts=experts).isnan()
    assert two_view_loss(x, features(12, 6, 1).float(), form=form).isnan()


@pytest.mark.parametrize(("m", "d"), SHAPES)
def test_two_views_and_a_teacher_are_those_of_slogdet_in_float64(m, d):
    x = features(m, d).requires_grad_()
    y = (x.detach() + 0.1 * features(m, d, 1)).requires_grad_()
    wanted = by_definition(x, y=y)
    grads = torch.autograd.grad(wanted, (x, y))
    found = two_view_loss(x, y)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(found, (x, y)), grads, rtol=1e-6, atol=1e-10)
    taught = two_view_loss(x, y, teacher=True)
    assert float(taught.detach()) == float(found.detach())
    assert torch.autograd.grad(taught, y, allow_unused=True, retain_graph=True) == (None,)
    torch.testing.assert_close(torch.autograd.grad(taught, x)[0], grads[0], rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(two_view_loss(x, x), mec_loss(x), rtol=1e-9, atol=1e-12)


def test_views_that_disagree_are_warned_of():
    x = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])  # det(I + lambda Z^T P) = 1 - 4 / (4 x .5) = -1
    with pytest.warns(UserWarning, match="determinant of the two views is not positive"):
        two_view_loss(x, -x, distortion=0.5)


@pytest.mark.parametrize(("m", "d"), SHAPES)
def test_the_series_comes_near_where_it_converges(m, d):
    z = normalised(features(m, d))
    exact = coding_length(z, 64.0 + d)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        series = [coding_length(z, 64.0 + d, form="taylor", order=order) for order in (1, 2, 4, 8, 40)]
    errors = [abs(float(one - exact)) for one in series]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-9


def test_uncentred_features_after_relu_break_the_series_and_the_warning_says_so():
    """256 x 512: exact 6.57 to 6.61 by the draw, four terms -.7; centred, the series is right."""
    raw = torch.randn(256, 512, generator=torch.Generator().manual_seed(0), dtype=torch.float64).relu()
    z = raw / raw.norm(dim=1, keepdim=True)
    assert float(coding_length(z)) == pytest.approx(6.59, abs=0.06)
    with pytest.warns(UserWarning, match=r"diverges: its spectral radius is 2\.5\d.*form='exact'"):
        assert float(coding_length(z, form="taylor")) == pytest.approx(-0.7, abs=0.2)
    centred = normalised(raw)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        near = float(coding_length(centred, form="taylor"))
    assert near == pytest.approx(float(coding_length(centred)), rel=1e-3)


@pytest.mark.parametrize(("m", "d"), [(60, 32), (16, 64), (10, 7)])
def test_experts_bound_the_length_from_above_and_stay_within_the_range(m, d):
    x = features(m, d)
    z = normalised(x)
    lengths = [float(coding_length(z, 1.0, experts=experts)) for experts in range(1, min(d, 8) + 1)]
    assert all(lengths[0] <= length + 1e-12 for length in lengths)
    assert float(coding_length(z, 1.0, experts=2)) <= float(coding_length(z, 1.0, experts=d)) + 1e-12
    assert all(-1 <= float(mec_loss(x, experts=experts)) <= 0 for experts in (1, 3, d))
    rate, gram = d / m, z.T @ z  # one channel each: nothing but the variances is left
    assert float(coding_length(z, 1.0, experts=d)) == pytest.approx(
        float((1 + rate * gram.diagonal()).log().sum())
    )


def test_experts_are_groups_of_like_variance():
    x = features(50, 9)
    z = normalised(x)
    order = z.var(0).argsort(descending=True)
    rate = 9 / 50
    wanted = 0.0
    for channels in (order[:3], order[3:6], order[6:]):
        gram = z[:, channels].T @ z[:, channels]
        wanted += float(torch.logdet(torch.eye(3, dtype=torch.float64) + rate * gram))
    assert float(coding_length(z, 1.0, experts=3)) == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize(("m", "d"), SHAPES)
def test_the_spectrum_says_what_the_term_is(m, d):
    x = features(m, d)
    shares = spectrum(x)
    assert shares.shape == (min(m, d),)
    assert float(shares.sum()) == pytest.approx(1)
    assert torch.equal(shares, shares.sort(descending=True).values)
    torch.testing.assert_close(shares, torch.linalg.svdvals(normalised(x)).square() / m)
    total = d / 64  # lambda m
    assert float(-(1 + total * shares).log().sum() / total) == pytest.approx(float(mec_loss(x)), rel=1e-6)
    with pytest.raises(BellboxError, match="not finite"):
        spectrum(x.clone().fill_(math.nan))


def test_features_of_several_forwards_are_collected_up_to_a_limit():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    collector = FeatureCollector(model, "1", rows=5)
    x = torch.randn(8, 4)
    for part in x.split(2):
        model(part)
    found = collector.take()
    torch.testing.assert_close(found, model[0](x[:5]))
    assert not found.requires_grad
    with pytest.raises(BellboxError, match="'1' has not been called"):
        collector.take()


def test_climbing_the_objective_spreads_collapsed_features():
    x = (torch.randn(64, 4) @ torch.randn(4, 32) + 0.05 * torch.randn(64, 32)).requires_grad_()
    before = torch.linalg.matrix_rank(x.detach(), rtol=0.1)
    optimizer = torch.optim.Adam([x], lr=0.05)
    first = float(mec_loss(x, 1.0).detach())
    for _ in range(100):
        optimizer.zero_grad()
        mec_loss(x, 1.0).backward()
        optimizer.step()
    assert float(mec_loss(x, 1.0).detach()) < first
    assert torch.linalg.matrix_rank(x.detach(), rtol=0.1) > 3 * before


def test_autocast_and_equal_rows_do_no_harm():
    x = torch.randn(16, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert float(mec_loss(x)) == float(mec_loss(x.clone()))
        assert mec_loss(x.bfloat16()).dtype == torch.float32
    assert float(mec_loss(x)) == pytest.approx(float(by_definition(x.double())), rel=1e-5)
    flat = torch.ones(5, 3, requires_grad=True)
    mec_loss(flat).backward()
    assert flat.grad is not None
    assert flat.grad.isfinite().all()


@pytest.mark.parametrize(
    ("shape", "options", "says"),
    [
        ((2, 4), {}, "at least 3"),
        ((4, 3, 2), {}, "shape"),
        ((4, 3), {"experts": 4}, "from 1 to the 3 channels"),
        ((4, 3), {"experts": 0}, "experts is 0"),
        ((4, 3), {"distortion": 0.0}, "distortion"),
        ((4, 3), {"form": "magic"}, "exact or taylor"),
        ((4, 3), {"order": 0}, "order"),
    ],
)
def test_what_has_no_meaning_is_refused(shape, options, says):
    with pytest.raises(BellboxError, match=says):
        mec_loss(torch.randn(shape), **options)
    with pytest.raises(BellboxError, match="not one"):
        two_view_loss(torch.randn(4, 3), torch.randn(4, 2))


def test_features_come_from_any_named_layer():
    model = build(LlamaConfig(31, 16, 24, 2, 2, max_position_embeddings=16), seed=0)
    hook = FeatureHook(model, "lm_head")
    inside = FeatureHook(model, "model.layers.1.mlp", side="output")
    logits = model(torch.arange(30).reshape(3, 10))
    rows = hook.take()
    torch.testing.assert_close(rows @ model.lm_head.weight.T, logits.mean(1))
    assert inside.take().shape == (3, 16)
    mec_loss(rows).backward()
    assert float(model.model.layers[0].mlp.up_proj.weight.grad.abs().sum()) > 0
    with pytest.raises(BellboxError, match="has not been called"):
        hook.take()
    hook.remove()
    model(torch.arange(4)[None])
    with pytest.raises(BellboxError, match="has not been called"):
        hook.take()


def test_a_layer_that_is_not_there_is_named_with_those_near_it():
    model = build(GPTConfig(31, 16, 24, 1, 2, max_position_embeddings=16), seed=0)
    with pytest.raises(BellboxError, match=r"no layer 'lm_hed' .*near it: lm_head"):
        FeatureHook(model, "lm_hed")


def test_pooling_leaves_one_row_a_sample():
    assert pooled(torch.ones(2, 3, 4, 5)).shape == (2, 3)
    assert pooled(torch.ones(2, 7, 3)).shape == (2, 3)
    assert pooled(torch.ones(2, 3)).shape == (2, 3)
    with pytest.raises(BellboxError, match="no known place"):
        pooled(torch.ones(3))


def _one_of_two(rank: int, port: int, out) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    x = features(12, 6)[rank * 6 : (rank + 1) * 6].requires_grad_()
    loss = mec_loss(gather_rows(x), 1.0)
    loss.backward()
    assert x.grad is not None
    torch.save((float(loss.detach()), x.grad / 2), f"{out}/{rank}.pt")  # DistributedDataParallel's average
    dist.destroy_process_group()


def test_gathered_features_give_the_loss_and_the_gradients_of_the_whole_batch(tmp_path):
    assert gather_rows(torch.ones(2, 3)).shape == (2, 3)  # alone
    port = 20_000 + (os.getpid() * 7 + int(time.time())) % 20_000
    mp.spawn(_one_of_two, (port, str(tmp_path)), nprocs=2)
    x = features(12, 6).requires_grad_()
    loss = mec_loss(x, 1.0)
    loss.backward()
    assert x.grad is not None
    for rank in range(2):
        value, gradient = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert math.isclose(value, float(loss.detach()), rel_tol=1e-12)
        torch.testing.assert_close(gradient, x.grad[rank * 6 : (rank + 1) * 6], rtol=1e-9, atol=1e-12)
