"""A width for each layer of a nested model under a budget of bytes: bits where they count.

Nested codes make it cheap to ask: a layer loses a plane by a switch, without training and without coding anew. The
widest uniform width that fits the budget is where the search begins. Each group of layers is tried there at each of its
widths, all others staying as they are, and the loss on a few batches says what the width is worth to it. From then on
losses are taken to add up. Planes are exchanged one by one: dropped where a byte costs least, added where it brings
most. What comes out is measured as a whole; where it is no better than the uniform width, that one stays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

from bellbox.core.packing import row_bytes
from bellbox.errors import BellboxError
from bellbox.nn import QuantizedLayer, nested_widths, quantized_layers, set_bits
from bellbox.nn.widths import width_at


@dataclass(frozen=True, eq=False)
class Group:
    """Layers that have one width, since they share an input; most are alone."""

    layers: tuple[str, ...]
    """Their dotted names."""
    size: Mapping[int, int]
    """Width in bits -> bytes of their codes and scales; the widest first."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits, the widest first."""
        return tuple(self.size)


@dataclass(frozen=True)
class Widths:
    """A width for each layer, and what the model takes and loses with it."""

    bits: dict[str, int]
    """Layer -> bits."""
    bytes: int
    """Of all codes and scales of the nested layers, and of what has one width."""
    loss: float
    """Nats per token or image, on the batches that were looked at."""


@dataclass(frozen=True)
class Plan:
    """Widths under a budget, beside the uniform one."""

    budget: int
    chosen: Widths
    uniform: Widths
    """Of the widest uniform width that fits."""
    uniform_bits: int
    sensitivity: dict[str, dict[int, float]] = field(default_factory=dict)
    """First layer of a group -> width -> loss with this group at that width and all others at the uniform one."""


def groups_of(model: nn.Module) -> list[Group]:
    """The groups of layers whose width can be chosen, in the model's order.

    Raises:
        BellboxError: a model of one width.
    """
    members: dict[int, list[tuple[str, QuantizedLayer]]] = {}
    for name, layer in quantized_layers(model):
        if layer.weight_quantizer is not None and layer.weight_quantizer.widths:
            inputs = layer.activation_quantizer
            together = inputs is not None and bool(inputs.quantizer.widths)
            members.setdefault(id(inputs) if together else id(layer), []).append((name, layer))
    if not members:
        raise BellboxError(
            "the model has one width; train one with several: quantization.nested: [4, 3, 2, 1]"
        )
    found: list[Group] = []
    for each in members.values():
        widths = each[0][1].weight_quantizer.widths  # type: ignore[union-attr]
        size = {bits: sum(_layer_bytes(layer, bits) for _, layer in each) for bits in widths}
        found.append(Group(tuple(name for name, _ in each), size))
    return found


def _layer_bytes(layer: QuantizedLayer, bits: int) -> int:
    """Codes, a scale a row, and that of the input, as a folder of one width has them."""
    return layer.row_count * (row_bytes(layer.row_length, 2**bits) + 4) + 4


def plan_widths(
    model: nn.Module,
    loss: Callable[[], float],
    budget: int,
    rest: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Choose a width for each layer. The model ends at the widths that were chosen.

    Args:
        model: prepared and trained at several widths.
        loss: runs the model over a few batches, always the same ones.
        budget: bytes that the whole model may take.
        rest: bytes of it that no width changes.
        progress: called with (runs done, runs in all).

    Raises:
        BellboxError: a model of one width, or a budget below what its narrowest one takes.
    """
    groups = groups_of(model)
    uniform_bits, at = _widest_that_fits(model, groups, budget - rest, budget)
    runs = 2 + sum(len(group.widths) - 1 for group in groups)
    done = 0

    def measured(chosen: dict[Group, int]) -> float:
        nonlocal done
        set_bits(model, _by_layer(chosen))
        value = loss()
        done += 1
        if progress is not None:
            progress(done, runs)
        return value

    base = measured(at)
    lost: dict[Group, dict[int, float]] = {}
    for group in groups:
        others = (bits for bits in group.widths if bits != at[group])
        lost[group] = {at[group]: base} | {bits: measured({**at, group: bits}) for bits in others}
    chosen = _exchanged(at, lost, budget - rest)
    found = Widths(_by_layer(chosen), rest + _bytes(chosen), measured(chosen))
    uniform = Widths(_by_layer(at), rest + _bytes(at), base)
    best = found if found.loss < uniform.loss else uniform
    set_bits(model, best.bits)
    sensitivity = {group.layers[0]: dict(sorted(each.items(), reverse=True)) for group, each in lost.items()}
    return Plan(budget, best, uniform, uniform_bits, sensitivity)


def _widest_that_fits(
    model: nn.Module, groups: list[Group], room: int, budget: int
) -> tuple[int, dict[Group, int]]:
    narrowest = 0
    for bits in nested_widths(model):
        try:
            at = {group: width_at(group.layers[0], group.widths, bits) for group in groups}
        except BellboxError:  # a group that has no width as narrow
            break
        narrowest = _bytes(at)
        if narrowest <= room:
            return bits, at
    raise BellboxError(
        f"a budget of {budget:,} bytes: the model takes {narrowest + budget - room:,} at its narrowest uniform width; "
        "raise it"
    )


def _bytes(chosen: Mapping[Group, int]) -> int:
    return sum(group.size[bits] for group, bits in chosen.items())


def _by_layer(chosen: Mapping[Group, int]) -> dict[str, int]:
    return {name: bits for group, bits in chosen.items() for name in group.layers}


def _exchanged(
    at: dict[Group, int], lost: Mapping[Group, Mapping[int, float]], room: int
) -> dict[Group, int]:
    """Begin with every group at its widest and drop planes where a byte costs least, until all fit.

    Losses are taken to add up. At the end what room is left is filled where a step up still brings something.
    """
    chosen = {group: group.widths[0] for group in at}
    while _bytes(chosen) > room:
        steps = [(_price(group, bits, narrower, lost), place, group, narrower)
                 for place, (group, bits) in enumerate(chosen.items())
                 for narrower in group.widths if narrower < bits]  # fmt: skip
        _, _, group, narrower = min(steps, key=lambda step: step[:2])
        chosen[group] = narrower
    while True:
        spare = room - _bytes(chosen)
        steps = [(-_price(group, wider, bits, lost), place, group, wider)
                 for place, (group, bits) in enumerate(chosen.items())
                 for wider in group.widths
                 if wider > bits and group.size[wider] - group.size[bits] <= spare
                 and lost[group][wider] < lost[group][bits]]  # fmt: skip
        if not steps:
            return chosen
        _, _, group, wider = min(steps, key=lambda step: step[:2])
        chosen[group] = wider


def _price(group: Group, wide: int, narrow: int, lost: Mapping[Group, Mapping[int, float]]) -> float:
    """Loss a byte of going from a width to a narrower one."""
    return (lost[group][narrow] - lost[group][wide]) / (group.size[wide] - group.size[narrow])
