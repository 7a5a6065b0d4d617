"""Tensors that several processes hold together (torch's `DTensor`): the whole of one, and this process' part of it.

A statistic of a weight is one of the whole matrix. Whoever computes one asks for the `whole`, which is the same in all
processes, and writes back the part that is this one's. Plain tensors are their own whole, at no cost.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a part of a larger one; shapes and element counts are then those of the whole."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """The memory of this process: a view, in which writing is seen."""
    return cast(Any, tensor).to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it, in every process; a copy where it is sharded. All the processes that hold parts call it together."""
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


def part_like(like: Tensor, value: Tensor) -> Tensor:
    """A whole tensor that every process has, sharded as another one of its shape is; itself where that is not sharded.

    Nothing is sent.
    """
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    sharded = cast(Any, like)
    return distribute_tensor(
        value.to(like.device), sharded.device_mesh, sharded.placements, src_data_rank=None
    )


def write_whole(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole tensor that every process has into one that may be sharded; nothing is sent."""
    local(tensor).copy_(local(part_like(tensor, value)))
