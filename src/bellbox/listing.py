"""A prepared or packed model as a table, for people."""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from bellbox import coverage
from bellbox.core.grid import Grid
from bellbox.nn import CodedLayer, PackedLayer, QuantizedLayer, WeightOnlyMatrix
from bellbox.nn.compact import Compact
from bellbox.nn.quantized_table import QuantizedTable


def _label(levels: Grid, widths: tuple[int, ...] = ()) -> str:
    """Bits; where there are several widths, the one that is used of all."""
    used = f"{levels.bits:.4g}"
    return f"{used} of {','.join(map(str, widths))}" if widths else used


def summary(model: nn.Module) -> str:
    """A table of the quantized layers, what is left and why, and how many parameters are quantized and how many not.

    Equal layers of repeated blocks are listed once, with their number; a weight that several layers share counts once.

    Args:
        model: prepared, packed or neither.

    Returns:
        A text of several lines. A row is a kind of layer with its shape, rows by columns of the weight. The parameters
        that are quantized and those that are not come last.

    Examples:
        >>> model = bb.prepare(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8)), bb.Recipe.bbq(bits=2))
        >>> print(bb.summary(model).splitlines()[-1])
        parameters: 2,304 quantized, 82 not
    """
    rows: dict[tuple[str, ...], list[str]] = {}
    inside: dict[int, int] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLayer):
            weight, activation = layer.weight_quantizer, layer.activation_quantizer
            if weight is not None:
                inside[id(layer.parameter)] = layer.parameter.numel()
            shape = layer.row_count, layer.row_length
            cells = (
                _label(weight.levels, weight.widths) if weight else "float",
                _label(activation.levels, activation.quantizer.widths) if activation else "float",
                activation.quantizer.granularity if activation else "-",
                str((activation.quantizer if activation else weight).block),  # type: ignore[union-attr]
                "shared" if activation is not None and activation.shared.readers > 1 else "own",
            )
        elif isinstance(layer, WeightOnlyMatrix):
            inside[id(layer)] = layer.row_length * layer.row_count
            shape = layer.row_count, layer.row_length
            cells = _label(layer.weight_levels), "float", "-", str(layer.block), "own"
        elif isinstance(layer, PackedLayer):
            inside[id(layer)] = layer.row_length * layer.row_count
            shape = layer.row_count, layer.row_length
            coding = layer.coding
            sharing = "shared" if len(layer.group.layers) > 1 else "own"
            inputs = layer.widths if layer.nested_inputs else ()
            cells = (
                _label(layer.weight_levels, layer.widths),
                _label(coding.levels, inputs),
                coding.normalise,
                str(coding.block),
                sharing,
            )
        else:
            continue
        pattern = _pattern(name) or "(the model)"
        key = (pattern, f"{shape[0]} x {shape[1]}", *cells)
        rows.setdefault(key, []).append(name or "(the model)")
    header = ("layer", "out x in", "weight bits", "input bits", "granularity", "block", "input", "count")
    named = {key: key[0] if len(names) > 1 else names[0] for key, names in rows.items()}
    table = [header, *((named[key], *key[1:], str(len(names))) for key, names in rows.items())]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    lines += [
        f"left: {each.name or 'the model'}, {sum(weight.numel() for weight in each.weights):,} weights ({each.why})"
        for each in _grouped(coverage.left_out(model))
    ]
    tables, lines_of_tables = _rounded_tables(model)
    inside |= tables
    lines += lines_of_tables
    floats: dict[int, Tensor] = {id(p): p for p in model.parameters()}
    for module in model.modules():  # what is a parameter before packing counts as one after it
        if isinstance(module, CodedLayer) and isinstance(module.bias, Tensor):
            floats[id(module.bias)] = module.bias
    rest = sum(p.numel() for key, p in floats.items() if key not in inside)
    left = sorted({type(m).__name__ for m in model.modules() if isinstance(m, nn.MultiheadAttention)})
    lines.append(
        f"parameters: {sum(inside.values()):,} quantized, {rest:,} not"
        + (f" (left whole: {left[0]})" if left else "")
    )
    return "\n".join(lines)


def _rounded_tables(model: nn.Module) -> tuple[dict[int, int], list[str]]:
    """Parameters of embeddings and heads that are integers, by the id of the weight, and a line for each kind."""
    inside: dict[int, int] = {}
    names: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedTable | Compact) and module.coding is not None:
            columns = module.columns if isinstance(module, Compact) else module.weight.shape[1]
            inside[id(module.weight)] = len(module.weight) * columns
            names.setdefault(str(module.coding), []).append(name or "(the model)")
    return inside, [f"rounded: {', '.join(found)} ({coding})" for coding, found in names.items()]


def _grouped(left: list[coverage.Left]) -> list[coverage.Left]:
    """What is left in repeated blocks for one reason, as one."""
    groups: dict[tuple[str, str], list[coverage.Left]] = {}
    for each in left:
        groups.setdefault((_pattern(each.name), each.why), []).append(each)
    return [
        each[0]
        if len(each) == 1
        else dataclasses.replace(
            each[0], name=f"{name} ({len(each)})", weights=tuple(w for one in each for w in one.weights)
        )
        for (name, _), each in groups.items()
    ]


def _pattern(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
