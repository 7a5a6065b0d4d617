"""Rules of `torch.func.vmap` for operations on rows: samples are further rows, or go through one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def _front(value: Any, dim: int | None, count: int) -> Any:
    """An argument with the batch in front; one that all samples share is expanded."""
    if not isinstance(value, Tensor):
        return value
    return value.expand(count, *value.shape) if dim is None else value.movedim(dim, 0)


def rows_rule(operation: Any, by_row: Sequence[int]) -> Callable[..., tuple[Any, Any]]:
    """The rule of an operation each of whose rows is computed by itself.

    Args:
        operation: a custom operation; each of its results has rows in front.
        by_row: places of arguments that are `[rows, ...]`, or `[1, ...]` for all rows alike. The first decides how
            many rows a sample has.
    """

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        batched = [i for i, dim in enumerate(in_dims) if isinstance(dim, int)]  # lists have lists
        if any(i not in by_row for i in batched):
            return _one_by_one(operation, info.batch_size, in_dims, args)
        values = list(args)
        rows = _front(args[by_row[0]], in_dims[by_row[0]], info.batch_size).shape[1]
        for i in by_row:
            if args[i] is not None:
                value = _front(args[i], in_dims[i], info.batch_size)
                values[i] = value.expand(-1, rows, *value.shape[2:]).flatten(0, 1).contiguous()
        result = operation(*values)
        if isinstance(result, Tensor):
            return result.unflatten(0, (info.batch_size, rows)), 0
        parts = tuple(
            part.unflatten(0, (info.batch_size, rows)) if part.dim() > 1 else part for part in result
        )
        return parts, tuple(0 if part.dim() > 1 else None for part in result)

    return rule


def samples_rule(operation: Any) -> Callable[..., tuple[Any, Any]]:
    """The rule of an operation that looks at all rows together: samples go through it by themselves."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return _one_by_one(operation, info.batch_size, in_dims, args)

    return rule


def rows_together(operation: Any, by_row: Sequence[int]) -> None:
    """Register `rows_rule`."""
    operation.register_vmap(rows_rule(operation, by_row))


def one_by_one(operation: Any) -> None:
    """Register `samples_rule`."""
    operation.register_vmap(samples_rule(operation))


def _one_by_one(
    operation: Callable[..., Any], count: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...]
) -> tuple[Any, Any]:
    results = [
        operation(*(v.select(d, i) if isinstance(d, int) else v for v, d in zip(args, in_dims, strict=True)))
        for i in range(count)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])
