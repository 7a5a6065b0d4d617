"""What the loop trains for: where batches come from, what the loss is, how the model is judged.

The loop knows nothing else of text or images. `LanguageTask` predicts the next token, `VisionTask` (in `vision.py`)
names what an image shows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bellbox import data
from bellbox.data.shards import TokenDataset
from bellbox.evaluation import perplexity
from bellbox.training.assemble import resolve
from bellbox.training.config import TrainConfig
from bellbox.training.metrics import perplexity_of

if TYPE_CHECKING:
    from bellbox.data.images import ImageDataset

# Sequences of the validation split whose activation codes are counted.
_COUNTED_SEQUENCES = 8


class Task(ABC):
    """What is trained on, in a resolved configuration."""

    unit: ClassVar[str]
    """What a run counts: tokens, or images."""
    config: TrainConfig
    """Resolved."""
    checksum: str
    """Of the data: a run goes on with what it began with."""
    tokenizer: str | None = None
    """The tokenizer's file, to be kept with the run."""

    @abstractmethod
    def micro_batches(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """Inputs and targets of each forward pass of a step, on the CPU; a pure function of the step."""

    @abstractmethod
    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean loss in nats, `[]`, of what `micro_batches` and the model gave."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> dict[str, Any]:
        """Fields of an evaluation record over the whole validation split, `loss` first."""

    @abstractmethod
    def counted_inputs(self) -> Tensor | None:
        """Inputs of the validation split whose activation codes are counted, on the CPU."""

    def start(self, model: nn.Module) -> None:  # noqa: B027 (most have nothing to say)
        """Give a new model what it needs to know of the data."""

    def fields(self, loss: float) -> dict[str, Any]:  # noqa: ARG002
        """Further fields of a training record."""
        return {}


class LanguageTask(Task):
    """The next token of every token.

    Args:
        config: as the user gave it.
        dataset: its data, where they are open already.

    Raises:
        BellboxError: data that cannot be opened, or a configuration that does not fit it.
    """

    unit = "tokens"

    def __init__(self, config: TrainConfig, dataset: TokenDataset | None = None) -> None:
        self.dataset = data.open(config.data.source) if dataset is None else dataset
        self.config = config = resolve(config, self.dataset.vocab_size)
        self.checksum = self.dataset.manifest.checksum()
        self.tokenizer = (self.dataset.path / "tokenizer.json").read_text(encoding="utf-8")
        self.batches = data.Batches(
            self.dataset.train,
            context=config.data.context,
            sequences_per_step=config.sequences_per_step,
            seed=config.data.seed,
        )

    def micro_batches(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """See `Task`; int64 `[sequences, context]` each."""
        size = self.config.batch.micro_sequences
        inputs, targets = self.batches.at(step)
        return list(zip(inputs.split(size), targets.split(size), strict=True))

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """See `Task`."""
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def evaluate(self, model: nn.Module) -> dict[str, Any]:
        """See `Task`."""
        result = perplexity(model, self.dataset.valid, context=self.config.data.context)
        return {
            "loss": result.loss,
            "perplexity": result.perplexity,
            "bits_per_byte": result.bits_per_byte,
        }

    def counted_inputs(self) -> Tensor | None:
        """See `Task`."""
        context, split = self.config.data.context, self.dataset.valid
        rows = min(_COUNTED_SEQUENCES, len(split) // context)
        return torch.from_numpy(split.read(0, rows * context).reshape(rows, context)) if rows else None

    def fields(self, loss: float) -> dict[str, Any]:
        """Perplexity."""
        return {"perplexity": perplexity_of(loss)}


def make_task(config: TrainConfig, dataset: TokenDataset | ImageDataset | None = None) -> Task:
    """The task of a configuration; its `config` is the resolved one.

    Args:
        config: as the user gave it.
        dataset: its data, where they are open already.

    Raises:
        BellboxError: data that cannot be opened, or a configuration that does not fit it.
    """
    if config.task == "vision":
        from bellbox.training.vision import VisionTask

        return VisionTask(config, cast("ImageDataset | None", dataset))
    return LanguageTask(config, cast("TokenDataset | None", dataset))


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
