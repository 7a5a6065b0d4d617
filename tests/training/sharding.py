"""Checkpoints in shards as several ranks would have written them, made by one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bellbox.runs.binding import binding
from bellbox.runs.build import make_model, model_tensors
from bellbox.runs.checkpoint import MODEL, OPTIMIZER, Checkpoints, State
from bellbox.runs.config import ModelSection
from bellbox.runs.config_file import save_config
from bellbox.runs.open import CONFIG_FILE, TOKENIZER_FILE
from bellbox.runs.resolve import resolve
from bellbox.runs.shards import Chunk, StoredTensor, key_of, shard_name, write_shard
from bellbox.training import TrainConfig
from bellbox.training.tasks import open_data


def save_in_shards(
    checkpoints: Checkpoints, state: State, tensors: Mapping[str, Tensor], ranks: int, run: dict[str, Any]
) -> None:
    """Tensors cut along their rows, as FSDP2 cuts them; scalars by rank 0.

    Args:
        checkpoints: of the run.
        state: of the run.
        tensors: by their names in the checkpoint.
        ranks: how many shards.
        run: what binds it.
    """
    folder = checkpoints.begin(state.step)
    names = [shard_name(rank, ranks) for rank in range(ranks)]
    pieces: list[list[tuple[str, Tensor]]] = [[] for _ in names]
    layout: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        parts = tensor.detach().chunk(ranks) if tensor.dim() else (tensor.detach(),)
        begin, chunks = 0, []
        for rank, part in enumerate(parts):
            offsets = (begin,) + (0,) * (part.dim() - 1) if part.dim() else ()
            chunks.append(Chunk(names[rank], offsets, tuple(part.shape)))
            pieces[rank].append((key_of(name, offsets), part.contiguous()))
            begin += part.shape[0] if part.dim() else 0
        layout[name] = StoredTensor(tensor.dtype, tuple(tensor.shape), tuple(chunks))
    files = {
        name: write_shard(folder / name, mine, {"random": f'{{"rank": {rank}}}'})
        for rank, (name, mine) in enumerate(zip(names, pieces, strict=True))
    }
    checkpoints.commit_shards(state, files, layout, run)


def write_run(config: TrainConfig, width: int) -> int:
    """A run folder with a checkpoint of step 1 in three shards, moments as large as the weights; bytes of weights."""
    overrides = {"num_hidden_layers": 6, "hidden_size": width, "intermediate_size": 4 * width}
    model_section = ModelSection("tiny", {**config.model.overrides, **overrides})
    dataset = open_data(config := dataclasses.replace(config, model=model_section))
    resolved = resolve(config, dataset)
    model, folder = make_model(resolved), Path(resolved.folder)
    model.train()(torch.randint(0, 256, (1, 16)))  # sets the scales
    tokenizer = (Path(config.data.source) / TOKENIZER_FILE).read_text(encoding="utf-8")
    folder.mkdir()
    save_config(resolved, folder / CONFIG_FILE)
    (folder / TOKENIZER_FILE).write_text(tokenizer, encoding="utf-8")
    weights = {MODEL + name: value for name, value in model_tensors(model).items()}
    moments = {
        f"{OPTIMIZER}{name}/{key}": torch.zeros_like(value)
        for name, value in model.named_parameters()
        for key in ("exp_avg", "exp_avg_sq")
    }
    run = binding(resolved, tokenizer)
    save_in_shards(Checkpoints(folder / "checkpoints"), State(1, 64, 0.0), {**weights, **moments}, 3, run)
    return sum(value.nbytes for value in weights.values())
