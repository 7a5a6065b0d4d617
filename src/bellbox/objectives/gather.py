"""Features of all processes as one batch, with gradients back to each."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class _GatherRows(torch.autograd.Function):
    """All processes' rows in the order of their ranks; the gradient of one's rows is the sum over all processes."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor) -> Tensor:  # noqa: ARG004
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:  # noqa: ARG004
        (whole,) = grads
        whole = whole.contiguous().clone()
        dist.all_reduce(whole)
        return whole.chunk(dist.get_world_size())[dist.get_rank()]


def gather_rows(rows: Tensor) -> Tensor:
    """`[m, d]` of each process to `[processes x m, d]`; `rows` itself where there is one process.

    Every process then computes the same loss, and each row gets its gradient from all of them: the processes' number
    times the gradient of one. Averaging parameters' gradients over the processes, as DistributedDataParallel does,
    makes that exactly the gradient of the loss of the whole batch.

    Args:
        rows: of the same shape in every process.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    return _GatherRows.apply(rows)  # pyright: ignore[reportReturnType]
