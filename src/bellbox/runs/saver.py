"""Saving while training goes on: tensors are copied, and a thread writes the copies as a sharded checkpoint.

Each rank has one. One checkpoint is written at a time; a next one waits for it. What goes wrong in the thread is raised
by the next call, on every rank. Between the ranks' threads runs a process group of their own: collectives of training
and of saving must not meet.
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from bellbox.errors import BellboxError
from bellbox.runs.checkpoint import MODEL, OPTIMIZER, Checkpoints, State
from bellbox.runs.distributed_checkpoint import Piece, Staging, save_pieces
from bellbox.utils.files import named


class Saver:
    """Writes the sharded checkpoints of one run. Made by all ranks at the same point.

    Args:
        checkpoints: where they go.
        background: whether `save` returns while the checkpoint is written.
        patience: seconds to wait for a rank that does not answer, or whose disk is slow.
    """

    def __init__(self, checkpoints: Checkpoints, background: bool = True, patience: float = 600.0) -> None:
        self.checkpoints, self.background = checkpoints, background
        together = dist.is_available() and dist.is_initialized()
        # No longer than training waits: in `wait` it is training that waits.
        wait = timedelta(seconds=patience)
        self._group: Any = dist.new_group(backend="gloo", timeout=wait) if together else None
        self._first = not together or dist.get_rank() == 0
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._step = 0
        self.durable: int | None = None
        """Step of the last checkpoint that this saver has seen on the disk."""

    def save(
        self,
        state: State,
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        run: dict[str, Any],
        before: Callable[[], object] | None = None,
    ) -> None:
        """Begin a checkpoint, when the one before is on the disk. Called by all ranks at the same step.

        Args:
            state: `random` is this rank's own; all else is equal on all ranks.
            model: what this rank holds, as plain tensors or DTensors.
            optimizer: likewise.
            run: what binds it to its run.
            before: called on the first rank, in the thread, before the checkpoint counts.

        Raises:
            OSError: this or the one before cannot be written.
        """
        self.wait()
        tensors = {
            **{MODEL + name: value for name, value in model.items()},
            **{OPTIMIZER + name: value for name, value in optimizer.items()},
        }
        pieces, state = self._staging.copy(tensors), copy.deepcopy(state)
        self._step = state.step
        if not self.background:
            self._write(state, pieces, run, before)
            self._raise()
            return
        # A daemon: a process that has to end must not wait for ranks that do not answer.
        self._thread = threading.Thread(
            target=self._write, args=(state, pieces, run, before), name="bellbox-saver", daemon=True
        )
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether `wait` would raise, as far as is known now."""
        return self._error is not None

    def wait(self) -> None:
        """Until the checkpoint that was begun is on the disk.

        Raises:
            OSError: it could not be written, with the file that it was about; those before it stand.
        """
        if self._thread is not None:
            # In pieces, so that signals of the main thread are heard meanwhile.
            while self._thread.is_alive():
                self._thread.join(0.1)
            self._thread = None
        self._raise()

    def _raise(self) -> None:
        error, self._error = self._error, None
        if isinstance(error, OSError):
            raise error if error.filename else named(error, self.checkpoints.path(self._step))
        if error is not None:
            raise error

    def _write(
        self,
        state: State,
        pieces: Mapping[str, Piece],
        run: dict[str, Any],
        before: Callable[[], object] | None,
    ) -> None:
        checkpoints = self.checkpoints

        def commit(files: dict[str, Any], layout: Any) -> None:
            if before is not None:
                before()
            checkpoints.commit_shards(state, files, layout, run)

        try:
            save_pieces(
                checkpoints.saving(state.step),
                pieces,
                {"format": "pt", "random": json.dumps(state.random)},
                begin=lambda: checkpoints.begin(state.step),
                commit=commit,
                group=self._group,
            )
            self.durable = state.step
        except (OSError, BellboxError, RuntimeError) as error:
            if self._first:
                checkpoints.forget(state.step)
            self._error = error
