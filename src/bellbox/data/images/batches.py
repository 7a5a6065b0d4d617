"""Batches of images, and how they are changed: a function of (seed, step), so resuming needs no state.

An epoch visits every image once, in a pseudo-random order of its own; the end of an epoch flows into the next one
within a batch. All draws of a step's augmentation come from a generator of that step.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bellbox.data.batches import Permutation, key_of
from bellbox.data.images.augment import Augmentation
from bellbox.data.images.base import ImageSplit
from bellbox.errors import BellboxError


class ImageBatches:
    """The batches of a training run over one split.

    Args:
        split: images to draw from.
        batch: images a step.
        seed: any integer; another one gives another order and other draws.
        augmentation: what is done to them.
        classes: how many there are.
        images: use so many images of the split only, an even choice that is the same for every seed; all where None.

    Raises:
        BellboxError: a batch without images, or more images than there are.
    """

    def __init__(
        self,
        split: ImageSplit,
        batch: int,
        seed: int,
        augmentation: Augmentation,
        classes: int,
        images: int | None = None,
    ) -> None:
        count = len(split) if images is None else images
        if not 1 <= count <= len(split):
            raise BellboxError(f"{count} images are asked for, {split.where} has {len(split)}")
        if not 1 <= batch <= count:
            raise BellboxError(f"a batch of {batch} images cannot be made of {count}; take a smaller batch")
        self.split, self.batch, self.seed, self.augmentation = split, batch, seed, augmentation
        self.classes, self.count = classes, count
        self._chosen = chosen(len(split), count)

    def indices(self, step: int) -> np.ndarray:
        """The images of a step, by their numbers in the split."""
        places = np.arange(step * self.batch, (step + 1) * self.batch)
        epochs, positions = np.divmod(places, self.count)
        found = np.empty(self.batch, dtype=np.int64)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            found[inside] = Permutation(self.count, self.seed, int(epoch), 2)(positions[inside])
        return self._chosen[found]

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Images, fp32 in [0, 1], `[batch, channels, height, width]`, and targets as `Augmentation` gives them."""
        indices = self.indices(step)
        images = self.split.read(indices).float().div_(255)
        labels = torch.from_numpy(self.split.labels[indices])
        draw = torch.Generator().manual_seed(key_of(self.seed, step, 3) >> 1)
        return self.augmentation(images, labels, self.classes, draw)


def chosen(size: int, count: int) -> np.ndarray:
    """`count` of the numbers below `size`: all in order, or a pseudo-random choice."""
    return np.arange(size) if count == size else np.sort(Permutation(size, 0, 0, 4)(np.arange(count)))
