"""Fake-quantized embeddings and heads: trained with the integers that `nn.compact` ships.

Each forward rounds the rows that it reads (`core.table`), and a head its input too; the gradient passes straight
through, whole, since nothing is clipped. In evaluation a head runs the operation of the packed one on the same codes.
The parameter `weight` stays in full precision under its own name, tied or not.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_module_registration_hook

from bellbox.core.table import TableCodes, TableCoding
from bellbox.errors import BellboxError
from bellbox.nn.adopted import twin
from bellbox.nn.record import Record, Side
from bellbox.ops import native
from bellbox.ops.dispatch import is_unwatched
from bellbox.ops.int4_linear import INPUT_MOST as INT4_MOST
from bellbox.ops.int4_linear import INT4_COLUMNS, int4_linear
from bellbox.ops.int8_linear import INPUT_MOST as INT8_MOST
from bellbox.ops.int8_linear import INT8_COLUMNS, int8_linear, round_input
from bellbox.ops.transforms import TransformableFunction, apply


class _StraightThrough(TransformableFunction):
    """Another value with the gradient of the first."""

    @staticmethod
    def forward(x: Tensor, value: Tensor) -> Tensor:  # noqa: ARG004
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grads[0].to(ctx.dtype), None


def _rounded(x: Tensor, value: Tensor) -> Tensor:
    return apply(_StraightThrough, x, value) if torch.is_grad_enabled() and x.requires_grad else value


class QuantizedTable(nn.Module):
    """An embedding or a head whose rows are rounded; another class of the owner's module, see `become`.

    Args:
        table: to take everything from; shared with it, not copied.
        coding: how its rows are rounded.
    """

    weight: Tensor
    coding: TableCoding
    _kept: tuple[Any, TableCodes] | None
    """The codes of the last evaluation, and the fingerprint of the weight that they were made from."""

    def __new__(cls, table: Any = None, *rest: Any, **named: Any) -> Any:
        """An object with all that `table` has; arguments of torch's own class make one of that."""
        if table is None and not named:
            return super().__new__(cls)
        if not isinstance(table, nn.Module):
            return _PLAIN[cls](table, *rest, **named)
        return twin(table, cls)

    def __init__(self, table: nn.Module, coding: TableCoding) -> None:
        self.coding, self._kept = coding, None
        self.train(table.training)

    def __getstate__(self) -> dict[str, Any]:
        """Copies remember nothing of forwards."""
        return {**self.__dict__, "_kept": None}

    @torch.no_grad()
    def codes(self) -> TableCodes:
        """The rounded table, made from the weight as it is now."""
        weight = self.weight.detach()
        if not is_unwatched(weight):
            return self.coding.round(weight)
        key = native.fingerprint([weight])
        if self._kept is None or key is None or self._kept[0] != key:
            self._kept = (key, self.coding.round(weight))
        found = self._kept[1]
        if key is None:
            self._kept = None
        return found

    def unquantized(self) -> nn.Module:
        """The owner's module again, with the same weight."""
        plain = twin(self, _PLAIN[type(self)])
        del plain.__dict__["coding"], plain.__dict__["_kept"]
        return plain

    def record(self) -> Record:
        """What the state belongs to."""
        coding = self.coding
        weight = Side(f"int{coding.bits}", 2 * coding.most + 1, 0, coding.group or 0, False, "row", 0)
        return Record(weight, None, False)

    def get_extra_state(self) -> Tensor:
        """`record`, uint8 `[128]`."""
        return self.record().pack()

    def set_extra_state(self, state: Any) -> None:
        """Nothing: the record was compared before anything was copied (`nn.state`)."""

    def train(self, mode: bool = True) -> Self:
        """Training needs no codes."""
        if mode:
            self._kept = None
        return super().train(mode)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{super().extra_repr()}, {self.coding}"


class QuantizedEmbedding(QuantizedTable, nn.Embedding):
    """`nn.Embedding` whose rows are rounded as they are read."""

    def forward(self, ids: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """int64 `[...]` to `[..., columns]`."""
        rows = F.embedding(
            ids, self.weight, self.padding_idx, None, 2.0, self.scale_grad_by_freq, self.sparse
        )
        with torch.no_grad():
            flat = rows.detach().reshape(-1, rows.shape[-1])
            values = self.coding.fake(flat).reshape(rows.shape).to(rows.dtype)
        return _rounded(rows, values)


class QuantizedHead(QuantizedTable, nn.Linear):
    """`nn.Linear` of a rounded weight and a rounded input, as heads of `nn.compact` compute."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`[..., columns]` to `[..., rows]`."""
        if self.training:
            return self._dequantized(x)
        exact = self._integer(x)
        if not torch.is_grad_enabled():
            return exact
        # Values of the integer path, gradient of the other: lin - lin is exactly zero.
        smooth = self._dequantized(x)
        return exact.detach() + (smooth - smooth.detach()).to(exact.dtype)

    def _dequantized(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            integers, worth = round_input(x.detach().to(torch.float32), self.input_most)
            inputs, values = (
                (integers * worth).to(x.dtype),
                self.coding.fake(self.weight).to(self.weight.dtype),
            )
        return F.linear(_rounded(x, inputs), _rounded(self.weight, values), self.bias)

    def _integer(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            out = table_product(x.detach().to(torch.float32), self.codes())
            return out if self.bias is None else out + self.bias.to(torch.float32)

    @property
    def input_most(self) -> int:
        """What the largest magnitude of a row of the input becomes."""
        return most_of_input(self.coding.bits)


_PLAIN: dict[type, type[nn.Module]] = {QuantizedEmbedding: nn.Embedding, QuantizedHead: nn.Linear}


def most_of_input(bits: int) -> int:
    """What the largest magnitude of a row of a head's input becomes: 12 bits with 8 of the table, 8 with 4."""
    return INT8_MOST if bits == 8 else INT4_MOST


def table_input_codes(x: Tensor, coding: TableCoding) -> Tensor:
    """The integers, as fp32, that a head of this coding rounds its input to."""
    return round_input(x.detach().to(torch.float32), most_of_input(coding.bits))[0]


def table_product(x: Tensor, codes: TableCodes) -> Tensor:
    """A head's product on codes: fp32 `[..., columns]` to fp32 `[..., rows]`, without the bias."""
    if codes.multipliers is None:
        return int8_linear(x, codes.weight, codes.scale)
    return int4_linear(x, codes.weight, codes.multipliers, codes.scale)


def quantized_table(
    name: str, table: nn.Embedding | nn.Linear, bits: int, group: int | None
) -> QuantizedTable:
    """The fake-quantized module for an embedding or a head, which stays as it is.

    Args:
        name: for messages.
        table: the owner's.
        bits: 4 or 8.
        group: 32 or 64 columns with 4 bits; None for 64, or 32 where 64 do not divide.

    Raises:
        BellboxError: bits or a group that the table cannot have, weights that are not fp32, `max_norm`, or rows that
            are too long for the sums of a head.
    """
    _heed_replacements()
    columns = table.weight.shape[1]
    try:
        coding = TableCoding.of(bits, group, columns)
    except BellboxError as error:
        raise BellboxError(f"{name}: {error}") from None
    if table.weight.dtype != torch.float32:
        raise BellboxError(
            f"{name}: is {table.weight.dtype}; embeddings are rounded from fp32: use model.float()"
        )
    if isinstance(table, nn.Embedding):
        check_max_norm(table, f"rounded to {bits} bits")
        return cast(QuantizedTable, QuantizedEmbedding(table, coding))
    if columns > (longest := INT8_COLUMNS if bits == 8 else INT4_COLUMNS):
        raise BellboxError(f"{name}: a head of {bits} bits takes at most {longest} inputs, not {columns}")
    return cast(QuantizedTable, QuantizedHead(table, coding))


@cache
def _heed_replacements() -> None:
    """Tell, from the first call on, where a rounded table is replaced by one in full precision."""
    register_module_module_registration_hook(_say_what_is_lost)


def _say_what_is_lost(holder: nn.Module, name: str, module: nn.Module | None) -> None:
    """The hook: transformers makes a new head where an untied one is resized, which is not rounded."""
    old = holder._modules.get(name)
    if isinstance(old, QuantizedTable) and type(module) in _PLAIN.values():
        warnings.warn(
            f"{name}: a table of {old.coding.bits} bits gives way to one in full precision (resizing makes such a "
            "head); resize before prepare",
            stacklevel=4,
        )


def check_max_norm(table: nn.Embedding, what: str) -> None:
    """Refuse an embedding that changes its rows as they are read.

    Raises:
        BellboxError: it has `max_norm`.
    """
    if table.max_norm is not None:
        raise BellboxError(
            f"an embedding with max_norm {table.max_norm:g} cannot be {what}: it shortens its rows as they are "
            "read; leave the embeddings as they are"
        )
