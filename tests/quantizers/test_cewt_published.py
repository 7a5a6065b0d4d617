"""CEWT as published: layers, gradients and weights against the authors' formulas, in float64 under autograd."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import bellbox as bb
from bellbox.core.grid import Levels
from bellbox.errors import BellboxError
from bellbox.ops.packed_linear import Bound
from bellbox.quantizers import build_quantizer
from bellbox.recipe import QuantizerSpec, Recipe

ZETA = 1.694


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hadamard(x: Tensor, block: int) -> Tensor:
    """The orthonormal Sylvester matrix on blocks of the last dimension."""
    matrix = torch.ones(1, 1, dtype=x.dtype)
    while len(matrix) < block:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return (x.reshape(-1, block) @ matrix / math.sqrt(block)).reshape(x.shape)


def soft_levels(v: Tensor, n: int) -> Tensor:
    """Half-integers, straight-through, their zero point -1/2."""
    box = n / 2 * (1 + torch.erf(v / math.sqrt(2))) - 0.5
    hard = torch.round(box.detach()).clamp(0, n - 1)
    return hard + box - box.detach() - (n / 2 - 0.5)


def published_input(x: Tensor, n: int, block: int) -> Tensor:
    turned = hadamard(x, block)
    rms = turned.square().mean(-1, keepdim=True).sqrt() + 1e-8
    out = soft_levels(turned / rms, n) * (ZETA * rms / (n / 2))
    return out * (x.norm(dim=-1, keepdim=True) / (out.norm(dim=-1, keepdim=True) + 1e-8))


def published_weight(w: Tensor, n: int) -> Tensor:
    rms, each = w.square().mean().sqrt(), w.square().mean(-1, keepdim=True).sqrt()
    out = soft_levels(w / rms, n) * (ZETA * each / (n / 2))
    return out * (w.norm() / (out.norm() + 1e-8))


def prepared(bits: int, inputs: int, outputs: int, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A layer of `Recipe.cewt` in fp64, and its weight as it is stored: rows of different size."""
    layer = nn.Linear(inputs, outputs)
    model = bb.prepare(nn.Sequential(layer).double(), Recipe.cewt(bits, keep_ends=False))
    weight = numbers(outputs, inputs, seed=seed) * torch.linspace(0.5, 2, outputs).double()[:, None]
    with torch.no_grad():
        model[0].stored_weight.copy_(weight)
    return model, weight


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@settings(max_examples=8, deadline=None)
@given(
    tokens=st.integers(1, 6), inputs=st.integers(1, 6), outputs=st.integers(1, 9), seed=st.integers(0, 10**6)
)
def test_a_layer_and_its_gradients_are_the_authors(bits, tokens, inputs, outputs, seed):
    model, weight = prepared(bits, 24 * inputs, outputs, seed)
    layer = model[0]
    block = layer.activation_quantizer.quantizer.block  # type: ignore[union-attr]
    x, g = numbers(tokens, 24 * inputs, seed=seed + 1), numbers(tokens, outputs, seed=seed + 2)
    leaves = [x.clone().requires_grad_(), layer.stored_weight, layer.bias]
    out = model(leaves[0])
    ours = torch.autograd.grad(out, leaves, g)  # type: ignore[arg-type]
    wide = [x.clone().requires_grad_(), weight.clone().requires_grad_(), layer.bias]
    wanted = F.linear(published_input(wide[0], 2**bits, block), published_weight(wide[1], 2**bits), wide[2])  # type: ignore[arg-type]
    theirs = torch.autograd.grad(wanted, wide, g)  # type: ignore[arg-type]
    for mine, other in ((out, wanted), *zip(ours, theirs, strict=True)):
        torch.testing.assert_close(mine.detach(), other.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_tokens_keep_their_norm_and_weights_theirs_where_ours_do_not(bits):
    x, w = numbers(7, 128).float(), numbers(9, 128, seed=1).float()
    inputs, weights = (build_quantizer(QuantizerSpec("cewt", 2**bits), 128, rows, "") for rows in (None, 9))
    assert inputs.levels.zero_point == weights.levels.zero_point == -0.5
    torch.testing.assert_close(inputs(x).norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(weights(w).norm(), w.norm())
    sizes = w.norm(dim=-1) / w.norm()
    levels = weights.levels.decode(weights.codes(w))
    shares = weights(w).norm(dim=-1) / levels.norm(dim=-1)  # a row's scale follows its size
    torch.testing.assert_close(shares / shares.norm(), sizes)
    ours = build_quantizer(QuantizerSpec("bbq", 2**bits), 128, None, "")
    assert float((ours(x).detach().norm(dim=-1) / x.norm(dim=-1) - 1).abs().max()) > 0.03


def test_what_is_zero_stays_zero_and_has_gradients():
    for rows in (None, 4):
        q = build_quantizer(QuantizerSpec("cewt", 3), 64, rows, "")
        x = torch.zeros(4, 64, requires_grad=True)
        q(x).sum().backward()
        assert x.grad is not None
        assert bool(x.grad.isfinite().all())
        assert torch.equal(q(x), torch.zeros(4, 64))
        assert q.encode(x)[1].tolist() == [[0.0]] * 4


def test_the_recipe_says_the_grid_the_domain_and_nothing_else():
    rule = Recipe.cewt(3).rules[-1]
    assert rule.weights == QuantizerSpec("cewt", 8, block=1)
    assert rule.activations == QuantizerSpec("cewt", 8)
    assert rule.weights_rotated
    model, _ = prepared(3, 128, 4)
    assert model[0].weight_quantizer.levels == Levels.gaussian(8, -0.5)  # type: ignore[union-attr]
    assert not list(model[0].weight_quantizer.parameters())  # type: ignore[union-attr]
    assert not list(model[0].activation_quantizer.parameters())  # type: ignore[union-attr]
    assert not Recipe.cewt(2, weight_only="float").rules[-1].weights_rotated


class Small(nn.Module):
    """A linear layer and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(16, 24, 3, padding=1), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize("levels", [2, 3, 4, 16])
def test_what_is_packed_and_stored_is_the_trained_function(levels, tmp_path):
    torch.manual_seed(0)
    model = bb.prepare(Small(), Recipe.cewt(levels=levels, keep_ends=False)).eval()
    x = numbers(3, 16, 5, 5).float()
    packed = bb.convert(model)
    with torch.no_grad():
        wanted = model(x)
        assert torch.equal(packed(x), wanted)
        bb.save(packed, tmp_path / "m")
        assert torch.equal(bb.load(tmp_path / "m", into=Small())(x), wanted)
        close = model.train()(x)
    torch.testing.assert_close(close, wanted, rtol=1e-4, atol=1e-5)


def test_a_stored_layer_that_keeps_norms_without_a_scale_is_refused(tmp_path):
    packed = bb.convert(bb.prepare(Small(), Recipe.cewt(2, keep_ends=False)).eval())
    packed.linear.coding = dataclasses.replace(packed.linear.coding, rescale=False)
    with pytest.raises(BellboxError, match="norm needs rescale"):
        packed.linear(torch.ones(2, 24))
    bb.save(packed, tmp_path / "m")
    with pytest.raises(BellboxError, match="normalise 'norm' keeps the norm by a scale"):
        bb.load(tmp_path / "m", into=Small())


def test_the_gradient_in_front_of_a_packed_layer_is_scaled_as_its_output():
    packed = bb.convert(bb.prepare(nn.Sequential(nn.Linear(64, 8)), Recipe.cewt(2, keep_ends=False)).eval())
    call = Bound(dict(packed[0]._buffers), packed[0].numbers)  # type: ignore[arg-type]
    *others, _, _ = call.numbers
    beside = Bound(call.buffers, (*others, "rms", True))
    x, g = numbers(5, 64).float(), numbers(5, 8, seed=1).float()
    found = []
    for each in (call, beside):
        leaf = x.clone().requires_grad_()
        found.append(torch.autograd.grad(each(leaf, torch.float32), leaf, g)[0])
    sigma = x.double().square().mean(-1, keepdim=True).sqrt()
    codes = packed[0].input_codes(x)  # type: ignore[operator]
    levels = packed[0].coding.levels.decode(codes, torch.float64)  # type: ignore[union-attr]
    kept = x.double().norm(dim=-1, keepdim=True) / levels.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(found[0].double(), found[1].double() * kept / sigma, rtol=1e-5, atol=1e-6)
    assert bool((found[0] != 0).any())
