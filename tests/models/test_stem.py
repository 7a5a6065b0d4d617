"""The ends of a ResNet in full precision: what is summed in one order, and that zeros behind a window add nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bellbox.models import build, image, vision_preset
from bellbox.ops import native
from bellbox.ops.float_linear import float_linear

needs_kernels = pytest.mark.skipif(not native.available(), reason="the compiled kernels are needed")


@needs_kernels
def test_only_stem_and_classifier_go_by_the_kernel_and_the_blocks_by_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows: list[tuple[int, ...]] = []

    def counted(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows.append(tuple(weight.shape))
        return float_linear(x, weight)

    monkeypatch.setattr(image, "float_linear", counted)
    model = build(vision_preset("resnet-small", num_labels=10)).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        pinned = model(images)
    assert rows == [(32, 32), (10, 128)]  # 27 numbers of a window and 5 zeros; the head
    torch.testing.assert_close(pinned, model(images).detach(), rtol=1e-4, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize(("channels", "kernel", "stride"), [(3, 3, 2), (3, 7, 2), (1, 5, 1), (16, 1, 1)])
def test_windows_filled_up_have_the_bits_of_windows_as_they_are(
    channels: int, kernel: int, stride: int
) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, 8, kernel, stride, kernel // 2)
    for x in (torch.randn(2, channels, 15, 17), torch.zeros(2, channels, 15, 17)):
        with torch.no_grad():
            found = image.convolve(layer, x)
            windows = F.unfold(x, (kernel, kernel), padding=kernel // 2, stride=stride).transpose(1, 2)
            rows = float_linear(windows.contiguous(), layer.weight.flatten(1).contiguous()) + layer.bias
        expected = rows.transpose(1, 2).reshape(found.shape)
        assert torch.equal(found.contiguous().view(torch.int32), expected.contiguous().view(torch.int32))
