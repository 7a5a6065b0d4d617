"""Predicting the next token: the task of language models."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from bellbox import data
from bellbox.data.prefetch import Prefetched
from bellbox.data.shards import TokenDataset
from bellbox.evaluation import perplexity
from bellbox.evaluation.parts import TokenParts
from bellbox.ops.cross_entropy import cross_entropy
from bellbox.runs.config import ResolvedConfig
from bellbox.runs.metrics import perplexity_of
from bellbox.training.distributed.world import World
from bellbox.training.tasks.base import Task
from bellbox.utils.files import TOKENIZER_LIMIT, read_text

# Sequences of the validation split whose activation codes are counted.
_COUNTED_SEQUENCES = 8


class LanguageTask(Task):
    """The next token of every token.

    Args:
        config: of the run.
        dataset: its data.
        world: the processes that share it.

    Raises:
        BellboxError: fewer tokens than one sequence, or batches that do not divide among processes.
    """

    unit, samples = "tokens", "sequences"

    def __init__(self, config: ResolvedConfig, dataset: TokenDataset, world: World) -> None:
        self.config, self.dataset, self.world = config, dataset, world
        self._micro = self.micro_size(config.sequences_per_step, config.batch.micro_sequences)
        self.checksum = self.dataset.checksum()
        self.tokenizer = read_text(self.dataset.path / "tokenizer.json", TOKENIZER_LIMIT)
        self.batches = data.batches_of(
            self.dataset,
            context=config.data.context,
            sequences_per_step=config.sequences_per_step,
            seed=config.data.seed,
            rank=world.rank,
            world_size=world.size,
        )
        self._prefetched = Prefetched(self.batches.at)

    def micro_batches(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """See `Task`; int64 `[sequences, context]` each."""
        inputs, targets = self._prefetched.at(step)
        return list(zip(inputs.split(self._micro), targets.split(self._micro), strict=True))

    def first_inputs(self, step: int) -> Tensor:
        """See `Task`."""
        config = self.config
        whole = data.batches_of(
            self.dataset,
            context=config.data.context,
            sequences_per_step=config.sequences_per_step,
            seed=config.data.seed,
        )
        return whole.at(step)[0][: config.batch.micro_sequences]

    @property
    def share(self) -> float:
        """See `Task`."""
        return self._micro / self.config.batch.micro_sequences

    @property
    def passes(self) -> int:
        """See `Task`."""
        return self.config.sequences_per_step // self.world.size // self._micro

    def batch_checksum(self, step: int) -> str:
        """See `Task`."""
        return self.batches.checksum(step)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """See `Task`."""
        return cross_entropy(logits.flatten(0, 1), targets.flatten())

    def evaluate(self, model: nn.Module) -> dict[str, Any]:
        """See `Task`."""
        parts = self.parts.losses()
        world = self.world
        result = perplexity(
            model,
            self.dataset.valid,
            context=self.config.data.context,
            each=parts.add,
            share=(world.rank, world.size),
            add_up=world.add_up,
        )
        parts.add_up(world.add_up)
        return {
            "loss": result.loss,
            "perplexity": result.perplexity,
            "bits_per_byte": result.bits_per_byte,
            "parts": parts.record(),
        }

    @functools.cached_property
    def parts(self) -> TokenParts:
        """Of the validation split."""
        return TokenParts(self.dataset.valid)

    def counted_inputs(self) -> Tensor | None:
        """See `Task`."""
        context, split = self.config.data.context, self.dataset.valid
        rows = min(_COUNTED_SEQUENCES, len(split) // context)
        return torch.from_numpy(split.read(0, rows * context).reshape(rows, context)) if rows else None

    def fields(self, loss: float) -> dict[str, Any]:
        """Perplexity."""
        return {"perplexity": perplexity_of(loss)}
