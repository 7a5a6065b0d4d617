"""The folder of a run as training opens it: which checkpoint to go on from, and the files that say what the run is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch

from bellbox.data.images import ImageDataset
from bellbox.data.shards import TokenDataset
from bellbox.errors import BellboxError
from bellbox.runs.checkpoint import Checkpoint, Checkpoints, State
from bellbox.runs.config import ResolvedConfig
from bellbox.runs.config_file import differences, load_config, save_config
from bellbox.runs.environment import describe
from bellbox.runs.metrics import MetricsWriter
from bellbox.runs.open import CONFIG_FILE, TOKENIZER_FILE
from bellbox.training.data_files import DATA_FILE, remember_files
from bellbox.utils.files import write_text


def choose_checkpoint(
    config: ResolvedConfig, checkpoints: Checkpoints, resume: Literal["auto"] | None
) -> tuple[Checkpoint | None, int]:
    """The checkpoint that a run goes on from. What lies after it is set aside.

    Args:
        config: of the run that is to go on.
        checkpoints: of its folder.
        resume: see `Trainer`.

    Returns:
        the last checkpoint, None for a new run; and the steps that the run was begun for.

    Raises:
        BellboxError: the folder holds another run, or one that is not to be gone on with.
    """
    folder = Path(config.folder)
    checkpoints.clean()
    if not checkpoints.steps():
        return None, config.total_steps
    if resume is None:
        raise BellboxError(f"'{folder}' already holds a run; choose another folder, or resume it")
    saved = folder / CONFIG_FILE
    begun = load_config(saved)
    different = differences(begun, config)
    if different:
        raise BellboxError(
            f"'{folder}' holds a run with another configuration: {'; '.join(different[:3])}; "
            f"choose another folder, or go on with --config {saved}"
        )
    checkpoint = checkpoints.last()
    checkpoints.set_aside_after(checkpoint.step if checkpoint else 0)
    return checkpoint, begun.total_steps


def write_what_it_is(
    config: ResolvedConfig,
    dataset: TokenDataset | ImageDataset,
    tokenizer: str | None,
    device: torch.device,
    state: State,
) -> MetricsWriter:
    """Write the files that say what a run is, and open its records where the state stands.

    Args:
        config: of the run.
        dataset: that it reads.
        tokenizer: its tokenizer's file; None of a vision task.
        device: that it computes on.
        state: as it goes on from.
    """
    folder = Path(config.folder)
    save_config(config, folder / CONFIG_FILE)
    write_text(folder / "environment.json", json.dumps(describe(device), indent=1) + "\n")
    remember_files(dataset, folder / DATA_FILE)
    if tokenizer is not None:
        write_text(folder / TOKENIZER_FILE, tokenizer)
    shown = config.tensorboard, config.trackers, config.to_dict()
    return MetricsWriter(folder, state.step, state.evaluated_step, *shown)
