"""Tasks of the training loop: `LanguageTask` predicts the next token, `VisionTask` names what an image shows."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from bellbox import data
from bellbox.data.shards import TokenDataset
from bellbox.runs.config import ResolvedConfig, TrainConfig
from bellbox.training.distributed.world import World
from bellbox.training.tasks.base import Task
from bellbox.training.tasks.language import LanguageTask

if TYPE_CHECKING:
    from bellbox.data.images import ImageDataset

__all__ = ["LanguageTask", "Task", "data_checksum", "make_task", "open_data"]


def make_task(
    config: ResolvedConfig, dataset: TokenDataset | ImageDataset, world: World | None = None
) -> Task:
    """The task of a configuration on its data.

    Args:
        config: of the run.
        dataset: its data.
        world: the processes that share it; this one alone where None.

    Raises:
        BellboxError: data that are too few for it, or batches that do not divide among processes.
    """
    world = world or World()
    if config.task == "vision":
        from bellbox.training.tasks.vision import VisionTask

        return VisionTask(config, cast("ImageDataset", dataset), world)
    return LanguageTask(config, cast("TokenDataset", dataset), world)


def open_data(config: TrainConfig) -> TokenDataset | ImageDataset:
    """The data of a configuration.

    Raises:
        BellboxError: data that cannot be opened.
    """
    if config.task == "vision":
        from bellbox.data.images import open_images

        return open_images(config.data.source, config.vision.image_size)
    return data.open(config.data.source)


def data_checksum(dataset: TokenDataset | ImageDataset) -> str:
    """Says of two sets of data whether they are equal, wherever they lie."""
    if isinstance(dataset, TokenDataset):
        return dataset.manifest.content_checksum()
    return dataset.checksum
