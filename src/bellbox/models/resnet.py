"""A ResNet of basic blocks, written plainly (He et al. 2015, arXiv 1512.03385): for small images (section 4.2), or with
the stem of ResNet-18, for those of ImageNet (section 3.3).

Every convolution inside the blocks is a plain `nn.Conv2d` that a recipe may swap, the 1 x 1 ones of the shortcuts
too. Stem (`stem`), norms and classifier (`head`) keep their precision by the recipe's own defaults.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bellbox.models.config import ResNetConfig
from bellbox.models.image import DropPath, Normalise, classify, convolve, mean_of, rising


class ConvNorm(nn.Module):
    """A convolution without bias and its batch norm."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, inputs, height, width]` to `[batch, outputs, height / stride, width / stride]`."""
        return self.norm(self.conv(x))


class Stem(ConvNorm):
    """The first of them, which stays in full precision: in evaluation its sums run in one order."""

    def forward(self, x: Tensor) -> Tensor:
        """See `ConvNorm.forward`."""
        return self.norm(convolve(self.conv, x))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions, added to the input or to its 1 x 1 projection."""

    def __init__(self, inputs: int, outputs: int, stride: int, drop_path: float) -> None:
        super().__init__()
        self.first = ConvNorm(inputs, outputs, 3, stride)
        self.second = ConvNorm(outputs, outputs, 3, 1)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else ConvNorm(inputs, outputs, 1, stride)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """See `ConvNorm.forward`."""
        inner = self.second(F.relu(self.first(x), inplace=True))
        return F.relu(self.drop_path(inner) + self.shortcut(x), inplace=True)


class ResNet(nn.Module):
    """Images in [0, 1], `[batch, channels, height, width]`, to logits `[batch, labels]`.

    Attributes:
        config: its shape.
    """

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.config = config
        self.normalise = Normalise(config.num_channels)
        self.stem = Stem(config.num_channels, config.width, config.stem_kernel, config.stem_stride)
        chances = iter(rising(config.drop_path, config.stages * config.blocks))
        stages, inputs = [], config.width
        for stage in range(config.stages):
            outputs, blocks = config.width * 2**stage, []
            for block in range(config.blocks):
                stride = 2 if stage and not block else 1
                blocks.append(BasicBlock(inputs, outputs, stride, next(chances)))
                inputs = outputs
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(inputs, config.num_labels)

    def features(self, x: Tensor) -> Tensor:
        """What the classifier sees: `[batch, width of the last stage]`."""
        x = self.normalise(x).contiguous(
            memory_format=torch.channels_last
        )  # the layout that convolutions want
        x = F.relu(self.stem(x), inplace=True)
        if self.config.max_pool:
            x = F.max_pool2d(x, 3, 2, 1)
        return mean_of(self.stages(x), (2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return classify(self.head, self.features(x))
