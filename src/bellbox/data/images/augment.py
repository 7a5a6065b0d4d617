"""Augmentation as plain tensor operations on a whole batch, every draw from one given generator.

Crop and flip as for CIFAR (He et al. 2015, arXiv 1512.03385); mixup (Zhang et al. 2017, arXiv 1710.09412); cutmix (Yun
et al. 2019, arXiv 1905.04899). The two mix a batch with itself in another order; where both are on, each batch gets
one of them, half of the time each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images."""

    crop: int = 4
    """Pixels of padding on each side, of which an image of the old size is cut at random; 0 for none."""
    flip: bool = True
    """Mirror left and right, half of the time."""
    mixup: float = 0.0
    """Both numbers of the Beta distribution that mixing shares are drawn from; 0 for none."""
    cutmix: float = 0.0
    """Likewise, the share being an area."""

    def __call__(
        self, images: Tensor, labels: Tensor, classes: int, draw: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Change a batch.

        Args:
            images: float `[batch, channels, height, width]`.
            labels: int64 `[batch]`.
            classes: how many there are.
            draw: where random numbers come from.

        Returns:
            Images, and targets: the labels, or fp32 `[batch, classes]` shares where images are mixed.
        """
        if self.crop:
            images = crop(images, self.crop, draw)
        if self.flip:
            images = flip(images, draw)
        if not (self.mixup or self.cutmix):
            return images, labels
        both = self.mixup > 0 and self.cutmix > 0
        cut = self.cutmix > 0 and (not both or bool(torch.rand((), generator=draw) < 0.5))
        share = beta(self.cutmix if cut else self.mixup, draw)
        order = torch.randperm(len(images), generator=draw)
        if cut:
            images, share = paste(images, order, share, draw)
        else:
            images = share * images + (1 - share) * images[order]
        targets = F.one_hot(labels, classes).float()
        return images, share * targets + (1 - share) * targets[order]


def crop(images: Tensor, padding: int, draw: torch.Generator) -> Tensor:
    """Each image moved by up to `padding` pixels each way; what comes in is 0."""
    batch, _, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    top, left = torch.randint(2 * padding + 1, (2, batch), generator=draw)
    rows = (top[:, None] + torch.arange(height))[:, None, :, None]
    columns = (left[:, None] + torch.arange(width))[:, None, None, :]
    return padded[
        torch.arange(batch)[:, None, None, None], torch.arange(images.shape[1])[:, None, None], rows, columns
    ]


def flip(images: Tensor, draw: torch.Generator) -> Tensor:
    """Each image mirrored, or not, with even chances."""
    mirrored = torch.rand(len(images), generator=draw) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


def paste(images: Tensor, order: Tensor, share: float, draw: torch.Generator) -> tuple[Tensor, float]:
    """A rectangle of about `1 - share` of the area from `images[order]`; and the share that really stayed."""
    height, width = images.shape[2:]
    side = (1 - share) ** 0.5
    middle = [int(torch.randint(size, (), generator=draw)) for size in (height, width)]
    half = [round(side * size / 2) for size in (height, width)]
    top, bottom = (max(0, middle[0] - half[0]), min(height, middle[0] + half[0]))
    left, right = (max(0, middle[1] - half[1]), min(width, middle[1] + half[1]))
    images = images.clone()
    images[:, :, top:bottom, left:right] = images[order, :, top:bottom, left:right]
    return images, 1 - (bottom - top) * (right - left) / (height * width)


def beta(concentration: float, draw: torch.Generator) -> float:
    """A draw from Beta(c, c)."""
    seed = int(torch.randint(1 << 62, (), generator=draw))
    return float(np.random.default_rng(seed).beta(concentration, concentration))
