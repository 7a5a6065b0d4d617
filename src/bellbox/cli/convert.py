"""Pack a trained run into integers, and prove that nothing changed.

bellbox convert runs/small --out small-packed
bellbox convert runs/small --out small-packed --checkpoint best
bellbox convert runs/small --out small-packed --embeddings int8
bellbox convert runs/small --out small-packed --no-check
bellbox convert runs/nested --out nested-packed                # of several widths: one folder for all of them
bellbox convert runs/nested --out fitted --plan plan.json      # or one width a layer, as bellbox plan bits says
bellbox convert runs/mine --out mine-packed --import mine      # a method of your own, from mine.py
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import nn

from bellbox.cli.eval import first_sequences
from bellbox.cli.output import parse_flags, refuse_file_name, refuse_flags
from bellbox.cli.plan_bits import read_plan
from bellbox.convert import convert
from bellbox.data.images.batches import chosen
from bellbox.errors import BellboxError, require
from bellbox.evaluation.codes import Agreement, agreement
from bellbox.formats import packed as io
from bellbox.formats.auto import OpenedModel, open_data_for, open_images_for, open_model
from bellbox.formats.companions import TOKENIZER_FILES, copy_companions
from bellbox.formats.packed import Sizes
from bellbox.nn import set_bits, using_bits
from bellbox.nn.compact import Precision, compact

require("tyro", "cli")

import tyro  # noqa: E402  (named before, so that its absence is one line; this file is imported by its command only)

if TYPE_CHECKING:
    from collections.abc import Iterable

_CHECKED_SEQUENCES = 16
_CHECKED_IMAGES = 512


@dataclass(frozen=True)
class Convert:
    """Pack a trained run into integers, and prove that nothing changed."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run folder of a low-bit model."""
    out: Path
    """The packed folder to make; an earlier packed model there is replaced."""
    checkpoint: str = "last"
    """last, best, or a step."""
    bits: int | None = None
    """Of a model of several widths (docs/nested.md): the widest to pack; all of them where not given."""
    plan: Path | None = None
    """Of a model of several widths: pack each layer at the one width that this file of `bellbox plan bits` says."""
    embeddings: Literal["fp32", "bf16", "int8", "int4"] = "fp32"
    """Round embeddings and head of a model that was trained without: smaller, quicker, and no longer exactly the
    trained function (`bellbox eval` on the packed folder shows what it costs). What was trained rounded stays so."""
    check: bool = True
    """Load the packed model back and compare every code and logit with the trained model (embeddings rounded alike), on
    validation text."""
    data: str | None = None
    """Text or images for the check, as `bellbox train` takes them; the run's own data where not given."""


def main(argv: list[str]) -> None:
    """Run `bellbox convert` with the arguments after that.

    Raises:
        BellboxError: what the user can put right.
        SystemExit: 1 where the packed model is not the trained one.
    """
    command = parse_flags(Convert, argv, "bellbox convert", __doc__)
    if not command.check:
        refuse_flags(command, ("data",), "--no-check")
    refuse_file_name(command.out)
    if command.plan is not None:
        refuse_flags(command, ("bits",), "--plan")
    planned = None if command.plan is None else read_plan(command.plan)
    opened = open_model(command.run, command.checkpoint, bits=command.bits)
    if opened.run is None:
        raise BellboxError(f"{opened.path}: is a {opened.kind} model; convert takes a run folder")
    batches = check_batches(opened, command.data) if command.check else None  # before anything is written
    if planned is not None:
        try:
            set_bits(opened.model, planned)
        except BellboxError as error:
            raise BellboxError(f"{command.plan}: {error}") from None
    sizes = pack(opened, command.out, command.embeddings, nested=planned is None)
    print(f"{opened.description}\npacked into {command.out}\n")
    show_sizes(sizes, command.out)
    if batches is None:
        return
    trained = compact(
        opened.model, command.embeddings
    )  # rounded alike: then all codes must still be the same
    unit = "validation images" if opened.is_vision else "tokens of validation text"
    widths = () if planned is not None else opened.widths
    for bits in [each for each in widths if each <= (opened.bits or 0)] or [None]:
        if bits is not None:
            print(f"\nat {bits} bits, {io.file_bytes(command.out, bits):,} bytes read:")
        with using_bits(trained, bits):
            found = agreement(trained, io.load(command.out, bits=bits), batches)
        print(describe(found, unit))
        if not found.holds:
            print(
                f"bellbox: {command.out} is not the model that was trained: do not use it; this is a defect of Bellbox",
                file=sys.stderr,
            )
            raise SystemExit(1)


def pack(opened: OpenedModel, out: Path, embeddings: Precision = "fp32", nested: bool = True) -> Sizes:
    """Convert an opened run and save it with its tokenizer, and the chat template of what it began with.

    Args:
        opened: a run.
        out: the folder.
        embeddings: as `convert`.
        nested: likewise.

    Raises:
        BellboxError: nothing low-bit in it, a layer that cannot be packed, or `out` cannot be written.
    """
    packed = convert(opened.model, embeddings, nested)
    io.save(packed, out, tokenizer=opened.tokenizer)
    for source in opened.companions:
        copy_companions(source, out, but=TOKENIZER_FILES)
    return io.sizes(packed)


def check_batches(opened: OpenedModel, source: str | None = None) -> Iterable[torch.Tensor]:
    """Validation text for `agreement`, a few thousand tokens, or a few hundred images; in batches.

    Raises:
        BellboxError: as `open_data_for` and `open_images_for`.
    """
    try:
        if opened.is_vision:
            valid = open_images_for(opened, source).valid
            places = chosen(len(valid), min(_CHECKED_IMAGES, len(valid)))
            return torch.div(valid.read(places), 255).split(64)
        dataset, _ = open_data_for(opened, source)
    except BellboxError as error:
        raise BellboxError(f"{error}; or leave the check out with --no-check") from None
    split = dataset.splits.get("valid") or dataset.train
    return first_sequences(split, opened.context, _CHECKED_SEQUENCES).split(4)


def describe(found: Agreement, unit: str = "tokens of validation text") -> str:
    """The outcome of `agreement` in words."""
    verdict = "the same function" if found.holds else "NOT the same function"
    exact = " (equal to the last bit)" if found.logit_difference == 0 else ""
    return (
        f"packed model loaded back from disk against the trained one, {found.tokens:,} {unit},"
        f" all {found.layers} low-bit layers:\n"
        f"  codes compared          {found.codes:,} ({found.weight_codes:,} of weights, {found.input_codes:,} of"
        f" layer inputs)\n"
        f"  codes that differ       {found.mismatches:,}\n"
        f"  logits compared         {found.logits:,}\n"
        f"  largest logit difference {found.logit_difference:.3g} relative{exact}\n"
        f"  => {verdict}"
    )


def size_rows(sizes: Sizes) -> list[tuple[str, int, int, int, int]]:
    """(part, parameters, bytes in fp32, bytes in bf16, bytes packed) of the blocks, the rest, the whole."""
    blocks, rest = sizes.quantized_parameters, sizes.other_parameters
    return [
        ("low-bit layers", blocks, 4 * blocks, 2 * blocks, sizes.packed_bytes),
        ("the rest", rest, 4 * rest, 2 * rest, sizes.other_bytes),
        (
            "whole model",
            blocks + rest,
            4 * (blocks + rest),
            2 * (blocks + rest),
            sizes.packed_bytes + sizes.other_bytes,
        ),
    ]


def show_sizes(sizes: Sizes, folder: Path) -> None:
    """Print the size table and what lies on the disk."""
    console: Any = require("rich.console", "cli").Console()
    table: Any = require("rich.table", "cli").Table(
        box=require("rich.box", "cli").SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("part, bytes", no_wrap=True)
    for heading in ("parameters", "fp32", "bf16", "packed", "of bf16"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, parameters, fp32, bf16, packed in size_rows(sizes):
        cells = [f"{value:,}" for value in (parameters, fp32, bf16, packed)]
        table.add_row(name, *cells, f"1/{bf16 / packed:.2f}" if packed else "-")
    console.print(table)
    on_disk = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    rest = "the rest (embeddings, head, norms) stays in fp32"
    if sizes.embeddings:
        rest = f"embeddings and head are in {' and '.join(sizes.embeddings)}, norms stay in fp32"
    whole = io.file_bytes(folder)
    print(
        f"{rest}; the whole model is {whole:,} bytes on disk, {8 * whole / sizes.parameters:.2f} bits a parameter; the "
        f"folder has {on_disk:,} bytes\n"
    )


def packed_sizes(model: nn.Module) -> Sizes:
    """The sizes that a trained model has when it is packed."""
    return io.sizes(convert(model))
