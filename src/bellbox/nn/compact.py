"""Embeddings and heads in bf16 or int8, for inference.

Once its layers are packed, most of a small model is its embedding and its head, and a decode step reads the whole head
for one row. In int8 every row of the table has its own scale, its largest magnitude over 127. This costs accuracy,
little but not nothing: it is an option, never a part of the exact function of the packed layers.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bellbox.errors import BellboxError
from bellbox.nn.tools import replace_layer
from bellbox.ops.int8_linear import INT8_COLUMNS, int8_linear
from bellbox.recipe import is_head

Precision = Literal["fp32", "bf16", "int8"]


class Compact(nn.Module):
    """A table of rows in bf16 (`weight`), or int8 (`weight` and, fp32, a `scale` for each row)."""

    weight: Tensor
    scale: Tensor | None

    def __init__(self, rows: int, columns: int, precision: Precision) -> None:
        super().__init__()
        self.precision = precision
        whole = precision == "int8"
        self.register_buffer(
            "weight", torch.zeros(rows, columns, dtype=torch.int8 if whole else torch.bfloat16)
        )
        self.register_buffer("scale", torch.zeros(rows) if whole else None)

    @torch.no_grad()
    def fill(self, weight: Tensor) -> None:
        """Round a float table `[rows, columns]` into this one."""
        if self.scale is None:
            self.weight = weight.to(torch.bfloat16)
            return
        weight = weight.to(torch.float32)
        largest = weight.abs().amax(dim=1)
        self.scale = largest / 127
        self.weight = (weight / self.scale.clamp(min=1e-30)[:, None]).round().clamp(-127, 127).to(torch.int8)

    def tie(self, other: Compact) -> None:
        """Use the numbers of another one of the same shape."""
        self.weight, self.scale = other.weight, other.scale

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}, {self.precision}"


class CompactEmbedding(Compact):
    """`nn.Embedding` of a bf16 or int8 table; gives fp32."""

    def forward(self, ids: Tensor) -> Tensor:
        """int64 `[...]` to fp32 `[..., columns]`."""
        rows = F.embedding(ids, self.weight).to(torch.float32)
        return rows if self.scale is None else rows * self.scale[ids].unsqueeze(-1)


class CompactLinear(Compact):
    """`nn.Linear` of a bf16 or int8 matrix; takes and gives fp32, see `ops.int8_linear`."""

    bias: Tensor | None

    def __init__(self, rows: int, columns: int, precision: Precision, bias: bool) -> None:
        super().__init__(rows, columns, precision)
        self.register_buffer("bias", torch.zeros(rows) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., columns]` to fp32 `[..., rows]`."""
        if self.scale is None:
            out = F.linear(x.to(self.weight.dtype), self.weight).to(torch.float32)
        else:
            out = int8_linear(x.to(torch.float32), self.weight, self.scale)
        return out if self.bias is None else out + self.bias


def tables(model: nn.Module) -> dict[str, nn.Embedding | nn.Linear]:
    """What `compact` works on, by name: embeddings, and heads.

    A head has an output for each entry of an embedding, and a head's name or the embedding's weight: a layer of a
    block that was kept in full precision may be as wide as a table of positions is long.
    """
    embeddings = {name: m for name, m in model.named_modules() if type(m) is nn.Embedding}
    entries = {m.num_embeddings for m in embeddings.values()}
    tied = {id(m.weight) for m in embeddings.values()}
    linears = {name: m for name, m in model.named_modules() if type(m) is nn.Linear}
    heads = {
        name: m
        for name, m in linears.items()
        if id(m.weight) in tied or (m.out_features in entries and is_head(name))
    }
    return {**embeddings, **heads}


def empty_like(
    table: nn.Embedding | nn.Linear | Compact, precision: Precision, device: torch.device | str | None = None
) -> Compact:
    """The compact module for an embedding or a head, not yet filled; on the table's device where none is named.

    Raises:
        BellboxError: rows that are too long for the sums of an int8 head, or that an embedding changes as it is read.
    """
    if isinstance(table, nn.Embedding) and table.max_norm is not None:
        raise BellboxError(
            f"an embedding with max_norm {table.max_norm:g} cannot be {precision}: it shortens its rows as they are "
            "read; leave the embeddings as they are"
        )
    rows, columns = table.weight.shape
    with torch.device(device or table.weight.device):
        if isinstance(table, (nn.Embedding, CompactEmbedding)):
            return CompactEmbedding(rows, columns, precision)
        if precision == "int8" and columns > INT8_COLUMNS:
            raise BellboxError(f"an int8 head takes at most {INT8_COLUMNS} inputs, not {columns}; use bf16")
        return CompactLinear(rows, columns, precision, table.bias is not None)


def compact(model: nn.Module, precision: Precision) -> nn.Module:
    """Put embeddings and heads into bf16 or int8, in place; tied ones stay tied. `fp32` leaves them as they are.

    Args:
        model: for inference: what is replaced can no longer be trained.
        precision: `fp32`, `bf16` or `int8`.

    Returns:
        The model.

    Raises:
        BellboxError: an unknown precision, nothing to replace, an embedding with `max_norm`, or an int8 head with
            rows too long.
    """
    if precision not in ("fp32", "bf16", "int8"):
        raise BellboxError(f"embeddings can be fp32, bf16 or int8, not {precision!r}")
    if precision == "fp32":
        return model
    found = tables(model)
    if not found:
        raise BellboxError(
            f"the model has no fp32 embedding that could become {precision}; leave them as they are"
        )
    made: dict[int, Compact] = {}
    empty = [(table, empty_like(table, precision)) for table in found.values()]  # all, before any is replaced
    for table, small in empty:
        twin = made.setdefault(id(table.weight), small)
        if twin is small:
            small.fill(table.weight)
        else:
            small.tie(twin)
        if isinstance(table, nn.Linear) and isinstance(small, CompactLinear) and small.bias is not None:
            small.bias.copy_(table.bias.detach())
        replace_layer(model, table, small.train(table.training))
    return model
