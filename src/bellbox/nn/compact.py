"""Embeddings and heads in bf16, int8 or 4 bits, for inference.

Once its layers are packed, most of a small model is its embedding and its head, and a decode step reads the whole head
for one row. A model that was trained with rounded tables (`Recipe.embedding_bits`, `nn.quantized_table`) gets the very
integers that it was trained with. Rounded after training a table costs accuracy, little but not nothing: that is an
option, never a part of the exact function of the packed layers.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bellbox.core.table import TABLE_GROUPS, TableCodes, TableCoding
from bellbox.errors import BellboxError
from bellbox.nn.quantized_table import QuantizedTable, check_max_norm, table_product
from bellbox.nn.tools import replace_layer
from bellbox.ops.int4_linear import INT4_COLUMNS
from bellbox.ops.int8_linear import INT8_COLUMNS
from bellbox.ops.table_rows import table_rows
from bellbox.recipe import is_head

Precision = Literal["fp32", "bf16", "int8", "int4"]
PRECISIONS = ("fp32", "bf16", "int8", "int4")


class Compact(nn.Module):
    """A table of rows in bf16 (`weight`), int8 (`weight`, `scale`) or 4 bits (`weight`, `multipliers`, `scale`).

    Args:
        rows: of the table.
        columns: likewise.
        coding: how rows are rounded (`core.table`, where the buffers are described); None for bf16.
    """

    weight: Tensor
    multipliers: Tensor | None
    scale: Tensor | None

    def __init__(self, rows: int, columns: int, coding: TableCoding | None) -> None:
        super().__init__()
        self.coding, self.columns = coding, columns
        self.register_buffer("weight", None)
        self.register_buffer("multipliers", None)
        self.register_buffer("scale", None)
        if coding is None:
            self.weight = torch.zeros(rows, columns, dtype=torch.bfloat16)
            return
        self.scale = torch.zeros(rows)
        if coding.group is None:
            self.weight = torch.zeros(rows, columns, dtype=torch.int8)
        else:
            self.weight = torch.zeros(rows, columns // 2, dtype=torch.uint8)
            self.multipliers = torch.zeros(rows, columns // coding.group, dtype=torch.uint8)

    @property
    def rows(self) -> int:
        """Entries of the table."""
        return len(self.weight)

    @property
    def precision(self) -> Precision:
        """`bf16`, `int8` or `int4`."""
        if self.coding is None:
            return "bf16"
        return "int8" if self.coding.bits == 8 else "int4"

    def codes(self) -> TableCodes:
        """The integers of a rounded table; not of bf16."""
        assert self.scale is not None
        return TableCodes(self.weight, self.multipliers, self.scale)

    @torch.no_grad()
    def fill(self, weight: Tensor) -> None:
        """Round a float table `[rows, columns]` into this one.

        Raises:
            BellboxError: it is to be integers and holds NaN or infinity.
        """
        if self.coding is None:
            self.weight = weight.to(torch.bfloat16)
        else:
            self.take(self.coding.round(weight))

    def take(self, codes: TableCodes) -> None:
        """Hold these integers.

        Raises:
            BellboxError: they were made from NaN or infinity.
        """
        if not bool(codes.scale.isfinite().all()):
            raise BellboxError("a table with NaN or infinity cannot be rounded; look at the weights")
        self.weight, self.multipliers, self.scale = codes

    def tie(self, other: Compact) -> None:
        """Use the numbers of another one of the same shape."""
        self.weight, self.multipliers, self.scale = other.weight, other.multipliers, other.scale

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        group = f" by {self.coding.group}" if self.coding is not None and self.coding.group else ""
        return f"{self.rows}, {self.columns}, {self.precision}{group}"


class CompactEmbedding(Compact):
    """`nn.Embedding` of a compact table; gives fp32."""

    def forward(self, ids: Tensor) -> Tensor:
        """int64 `[...]` to fp32 `[..., columns]`."""
        if self.coding is None:
            return F.embedding(ids, self.weight).to(torch.float32)
        return table_rows(ids, self.codes())


class CompactLinear(Compact):
    """`nn.Linear` of a compact matrix; takes and gives fp32, see `ops.int8_linear` and `ops.int4_linear`."""

    bias: Tensor | None

    def __init__(self, rows: int, columns: int, coding: TableCoding | None, bias: bool) -> None:
        super().__init__(rows, columns, coding)
        self.register_buffer("bias", torch.zeros(rows) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., columns]` to fp32 `[..., rows]`."""
        if self.coding is None:
            out = F.linear(x.to(self.weight.dtype), self.weight).to(torch.float32)
        else:
            out = table_product(x.to(torch.float32), self.codes())
        return out if self.bias is None else out + self.bias


def tables(
    model: nn.Module, heads: Collection[str] = (), bits: int = 8
) -> dict[str, nn.Embedding | nn.Linear]:
    """What `compact` works on, by name: embeddings, and heads.

    A head has an output for each entry of an embedding, and a head's name or the embedding's weight: a layer of a
    block that was kept in full precision may be as wide as a table of positions is long.

    Args:
        model: any.
        heads: names of further layers that may be heads, as its structure says (`bellbox.structure.ends`).
        bits: that they shall have; with 4, tables narrower than a group are none: a few numbers for each position.
    """
    narrowest = TABLE_GROUPS[0] if bits == 4 else 1
    embeddings = {
        name: m
        for name, m in model.named_modules()
        if type(m) is nn.Embedding and m.embedding_dim >= narrowest
    }
    entries = {m.num_embeddings for m in embeddings.values()}
    tied = {id(m.weight) for m in embeddings.values()}
    linears = {name: m for name, m in model.named_modules() if type(m) is nn.Linear}
    found = {
        name: m
        for name, m in linears.items()
        if id(m.weight) in tied or (m.out_features in entries and (is_head(name) or name in heads))
    }
    return {**embeddings, **found}


def coding_for(precision: Precision, columns: int) -> TableCoding | None:
    """How a table with so many columns is rounded; None for bf16.

    Raises:
        BellboxError: no group of columns fits.
    """
    return None if precision == "bf16" else TableCoding.of(8 if precision == "int8" else 4, None, columns)


def empty_like(
    table: nn.Embedding | nn.Linear | Compact,
    coding: TableCoding | None,
    device: torch.device | str | None = None,
) -> Compact:
    """The compact module for an embedding or a head, not yet filled; on the table's device where none is named.

    Raises:
        BellboxError: rows that are too long for the sums of a head, a group that does not divide them, or an embedding
            that changes its rows as they are read.
    """
    bits = "bf16" if coding is None else f"int{coding.bits}"
    if isinstance(table, nn.Embedding):
        check_max_norm(table, bits)
    rows = len(table.weight)
    columns = table.columns if isinstance(table, Compact) else table.weight.shape[1]
    if coding is not None and coding.group is not None and columns % coding.group:
        raise BellboxError(f"groups of {coding.group} do not divide its {columns} columns")
    with torch.device(device or table.weight.device):
        if isinstance(table, (nn.Embedding, CompactEmbedding)):
            return CompactEmbedding(rows, columns, coding)
        longest = INT4_COLUMNS if coding is not None and coding.bits == 4 else INT8_COLUMNS
        if coding is not None and columns > longest:
            raise BellboxError(f"an {bits} head takes at most {longest} inputs, not {columns}; use bf16")
        return CompactLinear(rows, columns, coding, table.bias is not None)


def compact(model: nn.Module, precision: Precision) -> nn.Module:
    """Put embeddings and heads into bf16, int8 or 4 bits, in place; tied ones stay tied. `fp32` leaves them alone.

    Args:
        model: for inference: what is replaced can no longer be trained.
        precision: `fp32`, `bf16`, `int8` or `int4` (by groups of 64 columns, or 32 where 64 do not divide).

    Returns:
        The model.

    Raises:
        BellboxError: an unknown precision, nothing to replace, tables that were trained rounded, an embedding with
            `max_norm`, rows that the precision does not take, or NaN or infinity in a table.
    """
    if precision not in PRECISIONS:
        raise BellboxError(f"embeddings can be fp32, bf16, int8 or int4, not {precision!r}")
    if precision == "fp32":
        return model
    require_unrounded(model)
    found = tables(model, bits=4 if precision == "int4" else 8)
    if not found:
        raise BellboxError(
            f"the model has no fp32 embedding that could become {precision}; leave them as they are"
        )
    made: dict[int, Compact] = {}
    empty = [
        (table, empty_like(table, coding_for(precision, table.weight.shape[1]))) for table in found.values()
    ]  # all, before any is replaced
    for table, small in empty:
        _fill(small, table, made)
    for table, small in empty:
        replace_layer(model, table, small.train(table.training))
    return model


def require_unrounded(model: nn.Module) -> None:
    """Refuse a model whose embeddings follow from its training.

    Raises:
        BellboxError: they were trained rounded.
    """
    if any(isinstance(module, QuantizedTable) for module in model.modules()):
        raise BellboxError("the embeddings were trained rounded and are shipped so; leave them as they are")


def _fill(small: Compact, table: nn.Embedding | nn.Linear, made: dict[int, Compact]) -> None:
    """The numbers of a table; those of a tied one that was filled before, by the id of the weight."""
    twin = made.setdefault(id(table.weight), small)
    if twin is not small:
        small.tie(twin)
    elif isinstance(table, QuantizedTable):
        small.take(table.coding.round(table.weight))
    else:
        small.fill(table.weight)
    if isinstance(table, nn.Linear) and isinstance(small, CompactLinear) and small.bias is not None:
        small.bias.copy_(table.bias.detach())


@torch.no_grad()
def packed_tables(model: nn.Module) -> dict[int, Compact]:
    """For each table that was trained rounded, by its id, the compact module with its integers.

    Raises:
        BellboxError: a table holds NaN or infinity, by its name.
    """
    made: dict[int, Compact] = {}
    found: dict[int, Compact] = {}
    for name, table in model.named_modules():
        if not isinstance(table, QuantizedTable):
            continue
        assert isinstance(table, nn.Embedding | nn.Linear)
        small = found[id(table)] = empty_like(table, table.coding)
        try:
            _fill(small, table, made)
        except BellboxError as error:
            raise BellboxError(f"{name or 'the embedding'}: {error}") from None
    return found
