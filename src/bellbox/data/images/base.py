"""Interface of every source of images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bellbox.errors import BellboxError

_COUNTED = 1024
MOST_CLASSES = 1 << 17


class ImageSplit(ABC):
    """Labelled images of one shape, decoded when they are asked for.

    Args:
        where: file or folder, for messages.
        labels: int64 `[count]`.
        shape: channels, height and width.
    """

    def __init__(self, where: str, labels: np.ndarray, shape: tuple[int, int, int]) -> None:
        self.where, self.labels, self.shape = where, labels, shape

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def image(self, index: int) -> np.ndarray:
        """One image, uint8 `[height, width, channels]`.

        Raises:
            BellboxError: it cannot be decoded.
        """

    def read(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """uint8 `[len(indices), channels, height, width]`, laid out channels last."""
        channels, height, width = self.shape
        out = np.empty((len(indices), height, width, channels), dtype=np.uint8)
        for place, index in enumerate(indices):
            out[place] = self.image(int(index))
        return torch.from_numpy(out).permute(0, 3, 1, 2)


class ArraySplit(ImageSplit):
    """Images that lie in memory, uint8 `[count, height, width, channels]`."""

    def __init__(self, where: str, labels: np.ndarray, images: np.ndarray) -> None:
        _, height, width, channels = images.shape
        super().__init__(where, labels, (channels, height, width))
        self.images = images

    def image(self, index: int) -> np.ndarray:
        """See `ImageSplit.image`."""
        return self.images[index]

    def read(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """See `ImageSplit.read`."""
        return torch.from_numpy(self.images[np.asarray(indices)]).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class ImageDataset:
    """A training and a validation split over the same classes."""

    source: str
    train: ImageSplit
    valid: ImageSplit
    classes: tuple[str, ...]
    """Names, in the order of the labels."""
    checksum: str
    """Says whether two data sets are the same."""
    note: str = ""
    """What one must know of the numbers that come out of it."""
    files: dict[str, Path] = field(default_factory=dict, repr=False)
    """What it was read from, by names that stay when it is moved; empty where that is another library's to know."""

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel over at most 1,024 training images, scaled to [0, 1]."""
        count = min(_COUNTED, len(self.train))
        images = self.train.read(np.linspace(0, len(self.train) - 1, count).astype(np.int64)).double() / 255
        deviation = images.std((0, 2, 3), correction=0).clamp(min=1e-3)
        return images.mean((0, 2, 3)).tolist(), deviation.tolist()


def numbered_classes(split: ImageSplit) -> list[str]:
    """A name for each label of a set that names none: its number.

    Raises:
        BellboxError: labels beyond any number of classes, for each of which there would be a name.
    """
    largest = int(split.labels.max(initial=0))
    if largest >= MOST_CLASSES:
        raise BellboxError(f"{split.where}: label {largest}; labels are from 0 to at most {MOST_CLASSES - 1}")
    return [str(number) for number in range(largest + 1)]


def checked_dataset(
    source: str,
    train: ImageSplit,
    valid: ImageSplit,
    classes: Sequence[str],
    checksum: str,
    note: str = "",
    files: dict[str, Path] | None = None,
) -> ImageDataset:
    """A data set whose splits fit each other.

    Raises:
        BellboxError: no images, two shapes, or labels that no class has.
    """
    for split in (train, valid):
        if not len(split):
            raise BellboxError(f"{split.where}: holds no images")
        if 0 in split.shape:
            raise BellboxError(f"{split.where}: holds no images, shape {split.shape} is empty")
        if len(classes) > MOST_CLASSES:
            raise BellboxError(
                f"{source}: {len(classes)} classes, more than the {MOST_CLASSES} that are read"
            )
        if split.labels.min() < 0 or split.labels.max() >= len(classes):
            raise BellboxError(
                f"{split.where}: labels from {split.labels.min()} to {split.labels.max()}, but {len(classes)} classes"
            )
    if train.shape != valid.shape:
        raise BellboxError(f"{source}: training images are {train.shape}, the others {valid.shape}")
    return ImageDataset(source, train, valid, tuple(map(str, classes)), checksum, note, files or {})
