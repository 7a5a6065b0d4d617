"""Naming what an image shows: the task of vision networks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bellbox.data.images import Augmentation, ImageBatches, ImageDataset
from bellbox.errors import BellboxError
from bellbox.evaluation.accuracy import accuracy
from bellbox.evaluation.parts import image_losses
from bellbox.models.image import Normalise
from bellbox.runs.config import ResolvedConfig
from bellbox.training.distributed.world import World
from bellbox.training.tasks.base import Task

# Images of the validation split whose activation codes are counted.
_COUNTED_IMAGES = 64


class VisionTask(Task):
    """One class an image.

    Args:
        config: of the run.
        dataset: its data.
        world: the processes that share it.

    Raises:
        BellboxError: fewer images than are asked for, or batches that do not divide among processes.
    """

    unit = samples = "images"

    def __init__(self, config: ResolvedConfig, dataset: ImageDataset, world: World) -> None:
        self.config, self.dataset, self.world = config, dataset, world
        self.checksum = self.dataset.checksum
        section, there = config.vision, len(self.dataset.valid)
        self._micro = self.micro_size(section.batch, section.micro_batch or section.batch)
        if section.valid_images is not None and section.valid_images > there:
            raise BellboxError(
                f"vision.valid_images is {section.valid_images}, data.source '{config.data.source}' has {there} "
                "validation images; leave it out for all"
            )
        self.batches = ImageBatches(
            self.dataset.train,
            batch=section.batch,
            seed=config.data.seed,
            augmentation=Augmentation(section.crop, section.flip, section.mixup, section.cutmix),
            classes=len(self.dataset.classes),
            images=section.train_images,
        )

    def start(self, model: nn.Module) -> None:
        """The channels' mean and deviation."""
        for module in model.modules():
            if isinstance(module, Normalise):
                module.set(*self.dataset.statistics())

    def micro_batches(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """See `Task`; images `[batch, channels, height, width]` in [0, 1], classes or their shares."""
        # What augmentation draws is drawn for the whole batch, so that it does not depend on the processes.
        images, targets = (each.chunk(self.world.size)[self.world.rank] for each in self.batches.at(step))
        return list(zip(images.split(self._micro), targets.split(self._micro), strict=True))

    def first_inputs(self, step: int) -> Tensor:
        """See `Task`."""
        return self.batches.at(step)[0][: self.config.vision.micro_batch]

    @property
    def share(self) -> float:
        """See `Task`."""
        return self._micro / (self.config.vision.micro_batch or self.config.vision.batch)

    @property
    def passes(self) -> int:
        """See `Task`."""
        return self.config.vision.batch // self.world.size // self._micro

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """See `Task`."""
        if targets.is_floating_point() and logits.shape[1] > targets.shape[1]:
            targets = F.pad(targets, (0, logits.shape[1] - targets.shape[1]))
        smoothing = self.config.vision.label_smoothing
        return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)

    def evaluate(self, model: nn.Module) -> dict[str, Any]:
        """See `Task`."""
        images = self.config.vision.valid_images
        parts = image_losses(len(self.dataset.valid) if images is None else images)
        world = self.world
        share = world.rank, world.size
        result = accuracy(
            model, self.dataset.valid, images=images, each=parts.add, share=share, add_up=world.add_up
        )
        parts.judge()
        parts.add_up(world.add_up)
        return {"loss": result.loss, "accuracy": result.accuracy, "parts": parts.record()}

    def counted_inputs(self) -> Tensor | None:
        """See `Task`."""
        split = self.dataset.valid
        count = min(_COUNTED_IMAGES, len(split))
        places = np.linspace(0, len(split) - 1, count).astype(np.int64)
        return torch.div(split.read(places), 255)
