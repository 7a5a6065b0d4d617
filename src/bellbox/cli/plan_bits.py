"""Choose a width for each layer of a nested run, so that the packed model fits a budget of bytes.

bellbox plan bits runs/nested --bytes 1500000
bellbox plan bits runs/nested --bytes 1500000 --out plan.json
bellbox convert runs/nested --out packed --plan plan.json           # the folder that the plan is of
bellbox plan bits runs/nested --bytes 1500000 --recipe fitted.yaml
bellbox train --config fitted.yaml --folder runs/fitted             # a model trained at these widths from the start
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn

from bellbox.cli.eval import first_sequences
from bellbox.cli.output import parse_flags, require_writable, write_file
from bellbox.convert import convert
from bellbox.errors import BellboxError, require
from bellbox.evaluation import perplexity
from bellbox.evaluation.widths import Plan, groups_of, plan_widths
from bellbox.formats import packed as io
from bellbox.formats.auto import OpenedModel, open_data_for, open_model
from bellbox.nn import using_bits
from bellbox.recipe import Recipe
from bellbox.runs.build import make_recipe
from bellbox.runs.config import PhasesSection, QuantizationSection, TrainConfig
from bellbox.runs.config_file import save_config
from bellbox.utils.files import read_json

require("tyro", "cli")

import tyro  # noqa: E402  (named before, so that its absence is one line; this file is imported by its command only)


@dataclass(frozen=True)
class PlanBits:
    """Choose a width for each layer of a nested run under a budget of bytes."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run folder of a language model of several widths (docs/nested.md)."""
    bytes: int
    """Of the whole packed model: codes, scales, embeddings, norms; file headers come on top."""
    data: str | None = None
    """A dataset folder, or `classics`; the run's own where not given."""
    split: str = "train"
    """The split to measure on: not the one that the plan is judged on later."""
    sequences: int = 16
    """Sequences that each width of each layer is measured on."""
    checkpoint: str = "last"
    """last, best, or a step."""
    out: Path | None = None
    """Write the plan here, for `bellbox convert --plan`."""
    recipe: Path | None = None
    """Write the run's configuration here with these widths for the layers, for `bellbox train --config`."""


def main(argv: list[str]) -> None:
    """Run `bellbox plan bits` with the arguments after that.

    Raises:
        BellboxError: what the user can put right.
    """
    command = parse_flags(PlanBits, argv, "bellbox plan bits", __doc__)
    for name, value in (("bytes", command.bytes), ("sequences", command.sequences)):
        if not 1 <= value <= 1 << 50:
            raise BellboxError(f"--{name} is {value}, must be at least 1")
    for path in filter(None, (command.out, command.recipe)):
        require_writable(path)
    opened = open_model(command.run, command.checkpoint)
    if opened.run is None or opened.is_vision:
        raise BellboxError(f"{opened.path}: plan bits takes a run folder of a language model")
    if not opened.widths:
        raise BellboxError(f"{opened.path}: has one width; train several: quantization.nested: [4, 3, 2, 1]")
    dataset, _ = open_data_for(opened, command.data)
    tokens = first_sequences(dataset.split(command.split), opened.context, command.sequences)

    def loss() -> float:
        return perplexity(opened.model, tokens.flatten(), opened.context).loss

    found = plan_widths(opened.model, loss, command.bytes, rest=_rest(opened.model, opened.widths[0]))
    show(found, opened, tokens)
    if command.out is not None:
        said = {"run": str(opened.path), "tokens": tokens.numel(), **asdict(found)}
        write_file(command.out, json.dumps(said, indent=1) + "\n")
        print(f"\nwritten to {command.out}: bellbox convert {opened.path} --out PACKED --plan {command.out}")
    if command.recipe is not None:
        save_config(fitted(opened.run.config, found.chosen.bits), command.recipe)
        print(f"\nwritten to {command.recipe}: bellbox train --config {command.recipe} --folder RUN")


def fitted(config: TrainConfig, bits: Mapping[str, int]) -> TrainConfig:
    """The configuration of a nested run with a width for each layer in its place.

    The width that most layers have is that of the pattern `*`; each other layer has a rule of its own.

    Args:
        config: of the run.
        bits: layer -> bits.
    """

    def recipe(width: int) -> Recipe:
        return make_recipe(replace(config.quantization, nested=[], levels=None, bits=width))

    ((common, _),) = Counter(bits.values()).most_common(1)
    others = [(name, width) for name, width in bits.items() if width != common]
    rules = [replace(recipe(width).rules[-1], pattern=name) for name, width in others]
    whole = replace(recipe(common), rules=(*rules, *recipe(common).rules))
    section = QuantizationSection(recipe=whole.to_dict())
    folder = TrainConfig().folder
    return replace(config, folder=folder, quantization=section, phases=PhasesSection())


def _rest(model: nn.Module, widest: int) -> int:
    """Bytes of the packed model that no width changes."""
    with using_bits(model, widest):
        sizes = io.sizes(convert(model, nested=False))
    return (
        sizes.packed_bytes
        + sizes.other_bytes
        - sum(group.size[group.widths[0]] for group in groups_of(model))
    )


def show(found: Plan, opened: OpenedModel, tokens: torch.Tensor) -> None:
    """Print a plan: the width of each layer with what others would cost, and both models beside each other."""
    console: Any = require("rich.console", "cli").Console()
    table: Any = require("rich.table", "cli").Table(
        box=require("rich.box", "cli").SIMPLE_HEAD, pad_edge=False
    )
    print(
        f"{opened.description}\n{tokens.numel():,} tokens; loss of the layer at each width, the others at ",
        end="",
    )
    print(f"{found.uniform_bits} bits\n")
    table.add_column("layer", no_wrap=True)
    table.add_column("bits", justify="right")
    for bits in opened.widths:
        table.add_column(f"at {bits}", justify="right")
    groups = {group.layers[0]: group for group in groups_of(opened.model)}
    for first, losses in found.sensitivity.items():
        more = len(groups[first].layers) - 1
        cells = [f"{losses[bits]:.4f}" if bits in losses else "-" for bits in opened.widths]
        table.add_row(first + (f" and {more} more" if more else ""), str(found.chosen.bits[first]), *cells)
    console.print(table)
    print(f"budget              {found.budget:,} bytes")
    for label, each in (("this plan", found.chosen), (f"all at {found.uniform_bits} bits", found.uniform)):
        print(f"{label:<19} {each.bytes:,} bytes, loss {each.loss:.4f}")


def read_plan(path: Path) -> dict[str, int]:
    """Layer -> bits, of a file that `bellbox plan bits` wrote.

    Raises:
        BellboxError: it is none.
    """
    said = read_json(path).get("chosen")
    bits = said.get("bits") if isinstance(said, dict) else None
    if not isinstance(bits, dict) or not bits or not all(type(each) is int for each in bits.values()):
        raise BellboxError(
            f"{path}: no plan of widths; write one with: bellbox plan bits RUN --bytes N --out {path}"
        )
    return bits
