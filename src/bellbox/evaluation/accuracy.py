"""Accuracy: how often a vision model names the right class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from bellbox.data.images import ImageSplit
from bellbox.data.images.batches import chosen
from bellbox.errors import BellboxError
from bellbox.evaluation.perplexity import evaluating, logits_of


@dataclass(frozen=True)
class AccuracyResult:
    """What was measured."""

    loss: float
    """Mean cross entropy, nats per image."""
    accuracy: float
    """Share of the images whose largest logit is that of their class."""
    images: int


def accuracy(
    model: nn.Module,
    split: ImageSplit,
    *,
    images: int | None = None,
    batch_size: int = 128,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
    each: Callable[[int, np.ndarray, np.ndarray], None] | None = None,
    share: tuple[int, int] = (0, 1),
    add_up: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> AccuracyResult:
    """Loss and top-1 accuracy; the model's train/eval modes are restored.

    Args:
        model: maps images in [0, 1], `[batch, channels, height, width]`, to logits (or to an object with `.logits`).
        split: labelled images.
        images: use so many of them, an even choice that is always the same; all where None.
        batch_size: images at once.
        device: where to compute; where the model's first parameter lies if None.
        progress: called with (images done, images in all) after every batch.
        each: called with the number of an image among those used, the losses from there on, nats, float64 `[n]`, and
            whether each is named rightly, bool `[n]`.
        share: rank and number of processes that evaluate together, each a share of the images.
        add_up: the sum of a tensor over them, in all of them; needed where there are several.

    Raises:
        BellboxError: more images than there are, or logits that are NaN.
    """
    total = len(split) if images is None else images
    if not 1 <= total <= len(split):
        raise BellboxError(f"{total} images are asked for, {split.where} has {len(split)}")
    if device is None:
        device = next((one.device for one in model.parameters()), torch.device("cpu"))
    places, loss, right = chosen(len(split), total), 0.0, 0
    with evaluating(model), torch.no_grad():
        for start in range(share[0] * batch_size, total, share[1] * batch_size):
            some = places[start : start + batch_size]
            labels = torch.from_numpy(split.labels[some]).to(device)
            logits = logits_of(model(split.read(some).to(device).float().div_(255))).float()
            part = float(F.cross_entropy(logits.double(), labels, reduction="sum"))
            if part != part and share[1] == 1:
                raise BellboxError(f"{split.where}: the model's logits are NaN among images {start} and on")
            hits = logits.argmax(-1) == labels
            loss, right = loss + part, right + int(hits.sum())
            if each is not None:
                nats = F.cross_entropy(logits.double(), labels, reduction="none")
                each(start, nats.cpu().numpy(), hits.cpu().numpy())
            if progress is not None:
                progress(start + len(some), total)
    if add_up is not None:
        loss, right = add_up(torch.tensor([loss, right], dtype=torch.float64)).tolist()
        if loss != loss:
            raise BellboxError(f"{split.where}: the model's logits are NaN in one of the processes")
    return AccuracyResult(loss / total, right / total, total)
