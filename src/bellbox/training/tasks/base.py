"""The contract of a task: where batches come from, what the loss is, how the model is judged.

The loop knows nothing else of text or images.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn

from bellbox.runs.config import ResolvedConfig


class Task(ABC):
    """What is trained on, in a resolved configuration."""

    unit: ClassVar[str]
    """What a run counts: tokens, or images."""
    config: ResolvedConfig
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

    def batch_checksum(self, step: int) -> str | None:  # noqa: ARG002
        """SHA-256 of what all ranks together read at a step; None where a task has none."""
        return None

    def fields(self, loss: float) -> dict[str, Any]:  # noqa: ARG002
        """Further fields of a training record."""
        return {}
