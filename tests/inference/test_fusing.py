"""Sums and ReLUs in the calls of the convolutions before them: the same bits, and only where nothing else reads."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bellbox as bb
from bellbox.errors import BellboxError
from bellbox.models import ResNet, ResNetConfig
from bellbox.nn import PackedConv2d
from bellbox.ops import native


class Convolutions(nn.Module):
    """Two convolutions and how they are used."""

    def __init__(self, use: Callable[[nn.Module, nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.first, self.second, x)


def packed_of(model: nn.Module, x: Tensor) -> nn.Module:
    model = bb.prepare(model, bb.Recipe.bbq(bits=2))
    for part in model.children() if isinstance(model, Convolutions) else [model]:
        part(x)
    return bb.convert(model.eval())


def steps(model: nn.Module) -> list[str]:
    """Calls of a graph that are no packed convolution, by name."""
    nodes = model.graph.nodes  # type: ignore[union-attr]
    calls = [n for n in nodes if n.op in ("call_function", "call_method", "call_module")]
    modules = dict(model.named_modules())
    others = [n for n in calls if not isinstance(modules.get(str(n.target)), PackedConv2d)]
    return [n.target if isinstance(n.target, str) else n.target.__name__ for n in others]


def added_in_place(first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
    y = second(first(x))
    y += x
    return y.relu_()


FUSED = {
    "relu": lambda a, b, x: F.relu(b(F.relu(a(x)))),
    "shortcut": lambda a, b, x: torch.relu(b(a(x).relu()) + x),
    "projection": lambda a, b, x: F.relu(a(x) + b(x), inplace=True),
    "sum alone": lambda a, b, x: x + b(a(x)),
    "in place": added_in_place,
}


def two_sums(first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
    shortcut, other = x + 1, 2 * x
    return second(first(x)) + shortcut + other


def read_too_early(first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
    shortcut = x + 1
    y = second(first(x))
    torch.mul(x, 3, out=shortcut)
    return y + shortcut


@pytest.mark.parametrize("use", [two_sums, read_too_early])
def test_what_a_call_cannot_do_besides_stays_a_step_of_its_own(use: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 16, 5, 6)
    packed = packed_of(Convolutions(use), x)
    fused = bb.fuse_convolutions(packed)
    assert len(steps(fused)) >= 3
    again = bb.fuse_convolutions(fused)
    with torch.no_grad():
        assert torch.equal(fused(x), packed(x))
        assert torch.equal(again(x), packed(x))


def test_norms_are_not_folded_into_what_a_fused_convolution_does_besides() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 16, 5, 6)
    convolutions = Convolutions(lambda a, b, x: F.relu(b(a(x)) + x))
    model = nn.Sequential(convolutions, nn.BatchNorm2d(16))
    model[1].running_mean.fill_(0.5)
    packed_of(convolutions, x)
    packed = bb.convert(model.eval())
    with torch.no_grad():
        expected = packed(x)
        folded = bb.fold_batch_norms(bb.fuse_convolutions(packed))
        assert torch.equal(folded(x), expected)


def test_a_gradient_still_passes_through_a_shortcut() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 16, 5, 6)
    packed = packed_of(Convolutions(lambda a, b, x: b(a(x)) + x), x)
    gradients = []
    for model in (packed, bb.fuse_convolutions(packed)):
        given = x.clone().requires_grad_()
        model(given).sum().backward()
        gradients.append(given.grad)
    assert torch.equal(*gradients)  # type: ignore[arg-type]
    # the shortcut's, and what comes through the convolutions
    assert gradients[0].ne(1).any()  # type: ignore[union-attr]
    through = x.clone().requires_grad_()
    packed.second(packed.first(through)).sum().backward()  # type: ignore[operator]
    torch.testing.assert_close(gradients[0], through.grad + 1)  # type: ignore[operator]


@pytest.mark.parametrize("path", ["reference", *native.instruction_sets()])
@pytest.mark.parametrize("use", FUSED)
def test_sums_and_relus_go_into_the_convolutions_without_a_bit_changed(
    use: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 16, 9, 8)
    packed = packed_of(Convolutions(FUSED[use]), x)
    fused = bb.fuse_convolutions(packed)
    assert steps(fused) == []
    if path == "reference":
        monkeypatch.setenv("BELLBOX_BACKEND", "reference")
    for given in (x, x.bfloat16(), torch.where(x > 3, torch.nan, x)):
        with torch.no_grad(), nullcontext() if path == "reference" else native.use(path):
            expected = packed(given)
            torch.testing.assert_close(fused(given), expected, rtol=0, atol=0, equal_nan=True)


def first_twice(first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
    y = first(x)
    return F.relu(y) + y


def written_between(first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
    x = x * 2
    y = first(x)
    x.mul_(3)
    return y + x


def written_to(first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
    x = x * 1
    z = x.add_(first(x))
    return x * z


KEPT = {
    "read twice": (first_twice, ["relu", "add"]),
    "relu before the sum": (lambda a, b, x: x + F.relu(a(x)), ["add"]),
    "written in place between": (written_between, ["mul", "mul_", "add"]),
    "in place on what others read": (written_to, ["mul", "add_", "mul"]),
    "a factor": (lambda a, b, x: torch.add(x, a(x), alpha=2), ["add"]),
    "a number": (lambda a, b, x: a(x) + 1, ["add"]),
}


@pytest.mark.parametrize("use", KEPT)
def test_what_would_change_the_result_stays(use: str) -> None:
    function, left = KEPT[use]
    x = torch.randn(2, 16, 8, 8)
    packed = packed_of(Convolutions(function), x)
    fused = bb.fuse_convolutions(packed)
    assert steps(fused) == left
    with torch.no_grad():
        assert torch.equal(fused(x), packed(x))


def test_a_sum_of_other_shapes_is_made_after_the_call() -> None:
    x, wide = torch.randn(2, 16, 8, 8), torch.randn(2, 1, 1, 8)
    model = nn.ModuleDict({"conv": nn.Conv2d(16, 16, 3, padding=1)})
    conv = packed_of(model["conv"], x)
    with torch.no_grad():
        assert torch.equal(conv(x, wide, True), F.relu(conv(x) + wide))
        assert torch.equal(conv(x, wide.double()), conv(x) + wide.double())


def test_a_fused_resnet_has_one_call_a_convolution_and_the_same_outputs() -> None:
    torch.manual_seed(0)
    x = torch.rand(4, 3, 16, 16)
    packed = bb.fold_batch_norms(packed_of(ResNet(ResNetConfig(width=16, stages=2)), x))
    fused = bb.fuse_convolutions(copy.deepcopy(packed))
    left = steps(fused)
    assert left.count("relu") == 1  # behind the stem
    assert "add" not in left
    with torch.no_grad():
        assert torch.equal(fused(x), packed(x))


def test_a_model_in_training_mode_or_with_branches_is_refused() -> None:
    x = torch.randn(2, 16, 8, 8)
    packed = packed_of(Convolutions(lambda a, b, x: a(x) if x.sum() > 0 else b(x)), x)
    with pytest.raises(BellboxError, match="cannot be traced"):
        bb.fuse_convolutions(packed)
    with pytest.raises(BellboxError, match=r"call model\.eval"):
        bb.fuse_convolutions(packed.train())
