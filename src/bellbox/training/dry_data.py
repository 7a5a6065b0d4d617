"""The data that a run would read: looked at where they lie on this machine, told from the configuration where not.

The Hugging Face hub is never asked. So a vocabulary is the one that would be trained, classes are those of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bellbox.data import shards, sources
from bellbox.data.images import ImageDataset, required_size
from bellbox.data.images.base import ArraySplit
from bellbox.data.prepare import size_to_train
from bellbox.data.shards import TokenDataset
from bellbox.data.tokenizer import Tokenizer
from bellbox.models import vision_preset
from bellbox.runs.config import TrainConfig
from bellbox.training.tasks import open_data
from bellbox.training.text_source import FOLDER, is_text, with_prepared_text


class Vocabulary(NamedTuple):
    """Of text that is not tokenized yet."""

    vocab_size: int


@dataclass(frozen=True)
class DataOutlook:
    """The data of a run, as far as they are known without fetching or writing anything."""

    data: TokenDataset | ImageDataset | Vocabulary
    """What a configuration is resolved with. Images of the hub are a set without any."""
    is_here: bool
    """Whether the data can be read as they are."""
    says: str
    """Where they come from, and what would be streamed or prepared first."""


def look_at_data(config: TrainConfig) -> DataOutlook:
    """What a run would read.

    Raises:
        BellboxError: data that are not there, or options that do not go with them.
    """
    if config.task == "vision" and config.data.source.startswith("hf:"):
        return _hub_images(config)
    prepared = (Path(config.folder) / FOLDER / shards.MANIFEST).is_file()
    if is_text(config) and not prepared:
        return _text(config)
    ready = with_prepared_text(config, show=False)
    opened = open_data(ready)
    if isinstance(opened, TokenDataset):
        says = (
            f"{ready.data.name}: {len(opened.train):,} training and {len(opened.valid):,} validation tokens, "
            f"vocabulary {opened.vocab_size:,}"
        )
    else:
        says = (
            f"{ready.data.source}: {len(opened.train):,} training and {len(opened.valid):,} validation images, "
            f"{len(opened.classes)} classes"
        )
    return DataOutlook(opened, True, says)


def _text(config: TrainConfig) -> DataOutlook:
    section = config.data
    found = sources.resolve([section.source, *section.valid])
    size = size_to_train(section.tokenizer, section.vocab_size)
    tokenizer = f"with a tokenizer of {size:,} entries that is trained on it"
    if section.tokenizer is not None:
        size = Tokenizer.load(section.tokenizer).vocab_size
        tokenizer = f"with the {size:,} entries of {section.tokenizer}"
    remote = [source.name for source in found if source.path is None]
    local = [source.size or 0 for source in found if source.path is not None]
    where = [f"{name}, streamed from the Hugging Face hub" for name in remote]
    where += [f"{section.source}, {len(local)} file(s) of {sum(local):,} bytes"] if local else []
    says = (
        f"{'; '.join(where)}; tokenized into {Path(config.folder) / FOLDER} {tokenizer}, "
        f"until there are {config.total_steps * config.per_step:,} training tokens"
    )
    return DataOutlook(Vocabulary(size), False, says)


def _hub_images(config: TrainConfig) -> DataOutlook:
    source = config.data.source
    size = required_size(source, config.vision.image_size)
    model = vision_preset(config.model.preset, **config.model.overrides)
    none = ArraySplit(source, np.empty(0, np.int64), np.empty((0, size, size, 3), np.uint8))
    classes = tuple(map(str, range(model.num_labels)))
    says = f"{source}, fetched from the Hugging Face hub; taken to have {model.num_labels} classes, as the model has"
    return DataOutlook(ImageDataset(source, none, none, classes, ""), False, says)
