"""Tensors of a sharded checkpoint read into a model or an optimizer that may be sharded otherwise, or not at all.

They are read in place, piece by piece: besides the model's own memory it takes a slab of a file.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bellbox.errors import BellboxError
from bellbox.nn.quantized import EXTRA_STATE
from bellbox.nn.tools import unique_tensors
from bellbox.quantizers.learned import LearnedQuantizer
from bellbox.runs.build import fitted
from bellbox.runs.checkpoint import OPTIMIZER, Checkpoint
from bellbox.runs.distributed_checkpoint import load_pieces
from bellbox.runs.shards import read_whole


def load_model_shards(
    model: nn.Module,
    checkpoint: Checkpoint,
    prefix: str,
    group: dist.ProcessGroup | None = None,
    leave_out: Collection[str] = (),
) -> None:
    """Read a model's state. Called by all ranks.

    Args:
        model: as it was when it was saved; its parameters may be DTensors.
        checkpoint: a sharded one.
        prefix: of the model's names in it, such as `MODEL`.
        group: whose ranks come together; the default one where None.
        leave_out: names with that prefix that are none of the model's.

    Raises:
        BellboxError: a tensor is missing, unknown, or has another shape or recipe; nothing was copied then. Or a file
            is damaged.
    """
    layout = checkpoint.layout or {}
    stored = {
        name.removeprefix(prefix): each
        for name, each in layout.items()
        if name.startswith(prefix) and name not in leave_out
    }
    # Shapes without memory, and the small records, by which other recipes are told apart.
    records = [name for name in stored if name.rpartition(".")[2] == EXTRA_STATE]
    whole = read_whole(checkpoint.path, layout, [prefix + name for name in records])
    described: dict[str, Tensor] = {
        name: torch.empty(each.shape, dtype=each.dtype, device="meta") for name, each in stored.items()
    }
    described |= {name: whole[prefix + name] for name in records}
    state = fitted(model, described, str(checkpoint.path))
    targets = {name: value.detach() for name, value in unique_tensors(model).items() if name not in records}
    turned = [name for name in targets if state[name] is not described.get(name)]
    if turned:
        raise BellboxError(
            f"{checkpoint.path}: tensor '{turned[0]}' is stored in another form than the model's"
        )
    load_pieces(checkpoint.path, layout, {prefix + name: value for name, value in targets.items()}, group)
    for module in model.modules():
        if isinstance(module, LearnedQuantizer):
            module.load_state_dict(module.state_dict())  # it has to look anew at what it is


def optimizer_shards(
    model: nn.Module, checkpoint: Checkpoint, group: dist.ProcessGroup | None = None
) -> dict[str, Tensor]:
    """The optimizer's state, sharded as the model is. Called by all ranks.

    Args:
        model: whose parameters the names begin with.
        checkpoint: a sharded one.
        group: whose ranks come together; the default one where None.

    Raises:
        BellboxError: a file is damaged.
    """
    layout, parameters = checkpoint.layout or {}, dict(model.named_parameters())
    targets: dict[str, Tensor] = {}
    for name, stored in layout.items():
        if not name.startswith(OPTIMIZER):
            continue
        like = parameters.get(name.removeprefix(OPTIMIZER).rpartition("/")[0])
        if isinstance(like, DTensor) and stored.shape == tuple(like.shape):
            targets[name] = torch.zeros_like(like, dtype=stored.dtype, requires_grad=False)
        else:
            targets[name] = torch.empty(stored.shape, dtype=stored.dtype)
    load_pieces(checkpoint.path, layout, targets, group)
    return {name.removeprefix(OPTIMIZER): value for name, value in targets.items()}
