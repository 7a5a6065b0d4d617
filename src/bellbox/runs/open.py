"""Opening a run folder: the trained model, ready to evaluate, convert or generate with."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from bellbox.errors import BellboxError
from bellbox.runs.average import COUNT, PREFIX, averaged_tensors, settled
from bellbox.runs.binding import refuse_changed, refuse_other_tokenizer
from bellbox.runs.build import load_model_tensors, make_model
from bellbox.runs.checkpoint import MODEL, OPTIMIZER, Checkpoint, Checkpoints
from bellbox.runs.config import ResolvedConfig
from bellbox.runs.phases import Phase, phase_after, phases_of
from bellbox.runs.resolve import load_resolved

CONFIG_FILE = "config.yaml"
TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class LoadedRun:
    """A run's model and what belongs to it."""

    folder: Path
    """The run folder."""
    model: nn.Module
    """Prepared as in the checkpoint's phase, with its weights (averaged ones where the run averages), in evaluation
    mode, on the CPU in fp32."""
    config: ResolvedConfig
    """Of the run."""
    phase: Phase
    """The phase that the checkpoint was made in: what `model` is prepared with."""
    step: int
    """Optimizer steps done at this checkpoint."""
    tokens: int
    """Training tokens (images of a vision task) seen at this checkpoint."""
    tokenizer: Path | None
    """The run's own copy of its tokenizer file; None of a vision task."""


def is_run(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder looks like a run: a configuration and a folder of checkpoints."""
    return (Path(folder) / CONFIG_FILE).is_file() and (Path(folder) / "checkpoints").is_dir()


def load_run(folder: str | os.PathLike[str], checkpoint: str | int = "last") -> LoadedRun:
    """Rebuild the model of a run and load one of its checkpoints.

    Args:
        folder: the run folder.
        checkpoint: `last`, `best` (lowest validation loss), or a step.

    Raises:
        BellboxError: no run there, no such checkpoint, or one that is damaged or was made with another configuration
            or tokenizer than lie there now.
    """
    root = Path(folder)
    if not (root / CONFIG_FILE).is_file():
        raise BellboxError(f"'{folder}' is no run folder: it has no {CONFIG_FILE}")
    config = load_resolved(root / CONFIG_FILE)
    found = _find(Checkpoints(root / "checkpoints"), checkpoint)
    refuse_changed(found, config, root / CONFIG_FILE)
    if config.task == "language":
        refuse_other_tokenizer(found, root / TOKENIZER_FILE)
    phase = phase_after(phases_of(config), found.step)
    model = make_model(config, phase.quantization)
    if found.layout is not None:
        # Here, as it brings torch.distributed.tensor: half a second, which only this kind of checkpoint needs.
        from bellbox.runs.sharded_state import load_model_shards

        load_model_shards(model, found, MODEL)
        if OPTIMIZER + COUNT in found.layout:
            with settled(model, config.optimizer.cewt):
                load_model_shards(model, found, OPTIMIZER + PREFIX, leave_out=(OPTIMIZER + COUNT,))
    else:
        load_model_tensors(model, found.model_tensors(), str(found.path))
        tensors = averaged_tensors(found.optimizer_tensors()) if config.averaging is not None else {}
        if tensors:
            with settled(model, config.optimizer.cewt):
                load_model_tensors(model, tensors, str(found.path))
    return LoadedRun(
        folder=root,
        model=model.eval(),
        config=config,
        phase=phase,
        step=found.step,
        tokens=found.state.tokens,
        tokenizer=root / TOKENIZER_FILE if config.task == "language" else None,
    )


def _find(checkpoints: Checkpoints, which: str | int) -> Checkpoint:
    if which in ("last", "best"):
        found = checkpoints.last() if which == "last" else checkpoints.best()
        if found is None:
            raise BellboxError(f"{checkpoints.folder}: no checkpoint that can be read; train the run first")
        return found
    try:
        step = int(which)
    except ValueError:
        raise BellboxError(f"checkpoint is '{which}', must be last, best or a step") from None
    return checkpoints.at(step)
