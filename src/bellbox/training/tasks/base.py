"""The contract of a task: where batches come from, what the loss is, how the model is judged.

The loop knows nothing else of text or images.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn

from bellbox.errors import BellboxError
from bellbox.runs.config import ResolvedConfig
from bellbox.training.distributed.world import World


class Task(ABC):
    """What is trained on, in a resolved configuration."""

    unit: ClassVar[str]
    """What a run counts: tokens, or images."""
    samples: ClassVar[str]
    """What a batch is made of: sequences, or images."""
    config: ResolvedConfig
    checksum: str
    """Of the data: a run goes on with what it began with."""
    tokenizer: str | None = None
    """The tokenizer's file, to be kept with the run."""
    world: World = World()
    """The processes that share its batches and its validation split."""

    @abstractmethod
    def micro_batches(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """Inputs and targets of each forward pass of a step in this process, on the CPU; a pure function of the step.

        All processes together have the batch that one would have alone.
        """

    @abstractmethod
    def first_inputs(self, step: int) -> Tensor:
        """Inputs of the first forward pass of a step, as one process alone would have them, on the CPU."""

    @abstractmethod
    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean loss in nats, `[]`, of what `micro_batches` and the model gave."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> dict[str, Any]:
        """Fields of an evaluation record over the whole validation split, `loss` first."""

    @abstractmethod
    def counted_inputs(self) -> Tensor | None:
        """Inputs of the validation split whose activation codes are counted, on the CPU."""

    def micro_size(self, step: int, micro: int) -> int:
        """Samples of one forward pass in this process.

        Args:
            step: samples of a step over all processes.
            micro: samples of a forward pass at most.

        Raises:
            BellboxError: sizes that do not divide.
        """
        size, unit = self.world.size, self.samples
        if step % size:
            near = max(1, round(step / size)) * size
            raise BellboxError(
                f"{step} {unit} a step do not divide among {size} processes; {near} would, or another number of "
                "processes"
            )
        share = step // size
        micro = min(micro, share)
        if share % micro:
            raise BellboxError(
                f"{share} {unit} a step in each of {size} processes do not divide into forward passes of {micro}; "
                "choose a divisor"
            )
        return micro

    @property
    @abstractmethod
    def share(self) -> float:
        """Samples of a forward pass in this process, over those of one where it is alone."""

    @property
    @abstractmethod
    def passes(self) -> int:
        """Forward passes of one step in this process."""

    def start(self, model: nn.Module) -> None:  # noqa: B027 (most have nothing to say)
        """Give a new model what it needs to know of the data."""

    def fields(self, loss: float) -> dict[str, Any]:  # noqa: ARG002
        """Further fields of a training record."""
        return {}
