"""More tokens: an embedding and its head grow by rows, in full precision, in training form or packed.

A table is often longer than the tokenizer needs, since lengths that are multiples of 64 or 128 are quick. So adding
tokens never makes a table shorter: rows that were trained would be lost.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from bellbox.core.table import TableCodes, table_values
from bellbox.errors import BellboxError
from bellbox.nn.coded import CodedLayer
from bellbox.nn.compact import Compact, CompactEmbedding, CompactLinear
from bellbox.nn.quantized import QuantizedLayer
from bellbox.nn.quantized_table import QuantizedHead
from bellbox.recipe import is_head

_MOST = 1 << 24


@torch.no_grad()
def grow_embeddings(model: nn.Module, tokens: int) -> nn.Module:
    """Have a language model's embedding and head take at least so many tokens, in place.

    New rows are the mean of the others, rounded as the table is; the others keep every bit. A tied head grows with its
    embedding. One that is not tied is known by a head's name or by being rounded. A table that is long enough already
    stays as it is, a longer one too. Weights become other parameters:
    make the optimizer afterwards.

    Args:
        model: plain, prepared or packed, with an embedding of tokens. `model.config.vocab_size` follows.
        tokens: entries of the tokenizer, 1 to 2^24.

    Returns:
        The model.

    Raises:
        BellboxError: no embedding, a head of another length or of low bits, or tokens out of range.

    Examples:
        >>> model = nn.ModuleDict({"embed": nn.Embedding(10, 4), "lm_head": nn.Linear(4, 10, bias=False)})
        >>> model = bb.grow_embeddings(model, 12)
        >>> model["embed"].weight.shape, model["lm_head"].weight.shape
        (torch.Size([12, 4]), torch.Size([12, 4]))
    """
    if not 1 <= tokens <= _MOST:
        raise BellboxError(f"a vocabulary of {tokens} tokens: must be from 1 to {_MOST}")
    embedding = _embedding(model)
    rows = _rows(embedding)
    heads: list[nn.Module] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | CompactLinear):
            continue
        tied = (
            module._parameters.get("weight") is embedding.weight
            or module._buffers.get("weight") is embedding.weight
        )
        # A rounded one was found by the model's structure, whatever its name.
        known = isinstance(module, QuantizedHead | CompactLinear) and _rows(module) == rows
        if not tied and not known and not is_head(name):
            continue
        if isinstance(module, QuantizedLayer | CodedLayer):
            raise BellboxError(f"{name} is a low-bit layer, whose outputs are fixed: add tokens before")
        heads.append(module)
    for head in heads:
        if _rows(head) != rows:
            raise BellboxError(
                f"the head has {_rows(head)} outputs, the embedding {rows} entries: make them equal"
            )
    if tokens <= rows:
        return model
    grown: dict[int, Any] = {}
    for table in (embedding, *heads):
        _grow(table, tokens - rows, grown)
    _tell_config(model, tokens)
    return model


def _embedding(model: nn.Module) -> Any:
    """The embedding of tokens: what transformers' models name so, else the first."""
    named = getattr(model, "get_input_embeddings", None)
    found = named() if callable(named) else None
    if not isinstance(found, nn.Embedding | CompactEmbedding):
        found = next((m for m in model.modules() if isinstance(m, nn.Embedding | CompactEmbedding)), None)
    if found is None:
        raise BellboxError("the model has no embedding that tokens could be added to")
    return found


def _rows(table: nn.Module) -> int:
    weight = table.weight
    assert isinstance(weight, Tensor)
    return len(weight)


def _grow(table: Any, more: int, grown: dict[int, Any]) -> None:
    """Add rows to a table; one that is tied to one before takes that one's."""
    key = id(table.weight)
    if isinstance(table, Compact):
        done = grown.setdefault(key, table)
        table.tie(done) if done is not table else _grow_compact(table, more)
    else:
        if key not in grown:
            weight = _with_rows(table.weight.detach(), more)
            grown[key] = nn.Parameter(weight, requires_grad=table.weight.requires_grad)
        table.weight = grown[key]
        count = "num_embeddings" if isinstance(table, nn.Embedding) else "out_features"
        setattr(table, count, len(table.weight))
    bias = getattr(table, "bias", None)
    if isinstance(bias, Tensor):
        longer = _with_rows(bias.detach(), more)
        is_parameter = isinstance(bias, nn.Parameter)
        table.bias = nn.Parameter(longer, requires_grad=bias.requires_grad) if is_parameter else longer


def _with_rows(values: Tensor, more: int) -> Tensor:
    mean = values.to(torch.float64).mean(0, keepdim=True).to(values.dtype)
    return torch.cat((values, mean.expand(more, *values.shape[1:])))


def _grow_compact(table: Compact, more: int) -> None:
    if table.coding is None:
        table.weight = _with_rows(table.weight, more)
        return
    codes = table.codes()
    mean = table_values(codes).to(torch.float64).mean(0, keepdim=True).to(torch.float32)
    new = table.coding.round(mean)
    joined = [
        None if old is None or one is None else torch.cat((old, one.expand(more, *one.shape[1:])))
        for old, one in zip(codes, new, strict=True)
    ]
    weight, multipliers, scale = joined
    assert weight is not None
    assert scale is not None
    table.take(TableCodes(weight, multipliers, scale))


def _tell_config(model: nn.Module, tokens: int) -> None:
    config: Any = getattr(model, "config", None)
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        model.config = dataclasses.replace(config, vocab_size=tokens)  # pyright: ignore
    elif hasattr(config, "vocab_size"):
        config.vocab_size = tokens  # pyright: ignore
