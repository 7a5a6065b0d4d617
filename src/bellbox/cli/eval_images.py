"""`bellbox eval` of a vision model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bellbox.data.images.batches import chosen
from bellbox.evaluation.accuracy import AccuracyResult, accuracy
from bellbox.evaluation.codes import CodeUse, code_use
from bellbox.formats.auto import OpenedModel, open_images_for

_COUNTED_IMAGES = 64


@dataclass(frozen=True)
class ImageEvaluation:
    """What was measured."""

    opened: OpenedModel
    data: str
    note: str
    """What one must know of the images."""
    result: AccuracyResult
    codes: CodeUse | None
    """None where the model has no low-bit layer."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "model": str(self.opened.path),
            "kind": self.opened.kind,
            "step": None if self.opened.run is None else self.opened.run.step,
            "data": self.data,
            "note": self.note,
            **asdict(self.result),
            "weight_entropy": None,
            "activation_entropy": None,
            **({} if self.codes is None else self.codes.to_dict()),
        }


def evaluate_images(
    opened: OpenedModel,
    source: str | None,
    batch: int,
    size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ImageEvaluation:
    """Accuracy on all validation images, and the use of codes over some of them.

    Args:
        opened: the model.
        source: as `open_images_for`, and so is `size`.
        batch: images at once.
        size: see there.
        progress: told how many of how many are done.

    Raises:
        BellboxError: as `open_images_for`.
    """
    dataset = open_images_for(opened, source, size)
    result = accuracy(opened.model, dataset.valid, batch_size=batch, progress=progress)
    some = dataset.valid.read(chosen(len(dataset.valid), min(_COUNTED_IMAGES, len(dataset.valid))))
    codes = code_use(opened.model, torch.div(some, 255))
    return ImageEvaluation(opened, dataset.source, dataset.note, result, codes)


def show_images(found: ImageEvaluation) -> None:
    """Print an evaluation."""
    result = found.result
    note = f" ({found.note})" if found.note else ""
    print(f"{found.opened.description}\n\ndata      {found.data}: {result.images:,} validation images{note}")
    print(f"accuracy  {100 * result.accuracy:.2f} %\nloss      {result.loss:.4f} nats per image")
    if found.codes is not None:
        for kind, use, limit in (
            ("weights", found.codes.weight, found.codes.weight_limit),
            ("inputs", found.codes.activation, found.codes.activation_limit),
        ):
            values = list(use.values())
            if values:
                print(
                    f"entropy   {kind}: mean {sum(values) / len(values):.3f}, lowest {min(values):.3f} bits per code,"
                    f" of at most {max(limit.values()):.4g}"
                )
