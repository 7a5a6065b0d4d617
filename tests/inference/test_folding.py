"""Batch norms folded into packed convolutions: equal but for rounding, and only where nothing else reads them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import bellbox as bb
from bellbox.errors import BellboxError
from bellbox.evaluation.codes import agreement
from bellbox.models import ResNet, ResNetConfig
from bellbox.nn import PackedConv2d


def trained_resnet() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = bb.prepare(ResNet(ResNetConfig(width=16, stages=2)), bb.Recipe.bbq(bits=2))
    x = torch.rand(8, 3, 16, 16)
    for _ in range(3):
        model(x)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model.eval(), x


def test_a_folded_resnet_has_no_norms_behind_its_convolutions_and_the_same_outputs_but_for_rounding() -> None:
    model, x = trained_resnet()
    packed = bb.convert(model)
    folded = bb.fold_batch_norms(copy.deepcopy(packed))
    norms = [name for name, module in folded.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms == ["stem.norm"]  # the stem is not packed
    with torch.no_grad():
        expected, found = packed(x), folded(x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    compared = agreement(model, folded, [x])
    assert compared.mismatches <= max(1, compared.input_codes // 10**5)
    assert agreement(model, packed, [x]).mismatches == 0


class Shared(nn.Module):
    """A convolution whose output is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else x


def packed_of(model: nn.Module) -> nn.Module:
    model = bb.prepare(model, bb.Recipe.bbq(bits=2))
    model(torch.rand(2, 16, 8, 8))
    return bb.convert(model.eval())


def test_a_norm_is_left_where_something_else_reads_what_it_reads() -> None:
    model, x = packed_of(Shared()), torch.rand(2, 16, 8, 8)
    with torch.no_grad():
        before = model(x)
        assert torch.equal(bb.fold_batch_norms(model)(x), before)
    assert isinstance(model.norm, nn.BatchNorm2d)


@pytest.mark.parametrize("tracked", [False, True])
def test_a_norm_that_follows_the_batch_stays(tracked: bool) -> None:
    packed = packed_of(nn.Sequential(nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8, track_running_stats=tracked)))
    packed.get_submodule("1").train(tracked)
    x = torch.rand(2, 16, 8, 8)
    with torch.no_grad():
        before = packed(x)
        assert torch.equal(bb.fold_batch_norms(packed)(x), before)
    assert isinstance(packed.get_submodule("1"), nn.BatchNorm2d)


def test_bias_and_scale_take_the_norm_in() -> None:
    sequence = nn.Sequential(nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8, affine=False))
    packed = packed_of(sequence)
    conv, norm = packed[0], packed[1]  # type: ignore[index]
    assert isinstance(conv, PackedConv2d)
    assert conv.bias is not None
    alpha = 1 / torch.sqrt(norm.running_var + norm.eps)
    scale, bias = conv.weight_scale * alpha, (conv.bias - norm.running_mean) * alpha
    bb.fold_batch_norms(packed)
    torch.testing.assert_close(conv.weight_scale, scale)
    torch.testing.assert_close(conv.bias, bias)


def test_what_cannot_be_folded_or_saved_is_refused(tmp_path) -> None:
    model, _ = trained_resnet()
    packed = bb.convert(model)
    with pytest.raises(BellboxError, match=r"call model\.eval"):
        bb.fold_batch_norms(packed.train())
    with pytest.raises(BellboxError, match="cannot be traced"):
        bb.fold_batch_norms(packed_of(Branching()))
    with pytest.raises(BellboxError, match="save it before fold_batch_norms"):
        bb.save(bb.fold_batch_norms(packed.eval()), tmp_path / "m")
