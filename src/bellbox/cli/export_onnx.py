"""Write a model as ONNX of standard operators, which stock onnxruntime runs, and prove that nothing changed.

bellbox export onnx small-packed small-onnx
bellbox export onnx runs/small small-onnx --weights int8         # for runtimes without INT2 tensors
bellbox export onnx small-packed small-onnx --embeddings int4 --no-check

The folder gets model.onnx and, of a language model, tokenizer.json. examples/onnx_generate.py generates with it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch

from bellbox.cli.output import parse_flags, refuse_file_name, refuse_flags
from bellbox.convert import convert
from bellbox.errors import BellboxError, require
from bellbox.formats.auto import OpenedModel, open_model
from bellbox.nn import CodedLayer
from bellbox.nn.compact import compact
from bellbox.utils.files import new_folder

require("tyro", "cli")

import tyro  # noqa: E402  (named before, so that its absence is one line; this file is imported by its command only)

if TYPE_CHECKING:
    from bellbox.interop.onnx.check import Agreement

FILE = "model.onnx"
_CHECKED_SEQUENCES, _CHECKED_TOKENS, _CHECKED_IMAGES = 8, 128, 32


@dataclass(frozen=True)
class ExportOnnx:
    """Write a model as ONNX of standard operators."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A packed folder, or a run of a low-bit model."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The folder to make; an earlier export there is replaced."""
    weights: Literal["int2", "int4", "int8"] = "int2"
    """The narrowest type of stored weights: int2 needs opset 25, int4 opset 21; the function is the same."""
    opset: int | None = None
    """Of the operators; the oldest that has --weights where not given."""
    embeddings: Literal["bf16", "int8", "int4"] | None = None
    """Round fp32 embeddings and head: smaller, and no longer exactly the trained function."""
    exact_attention: bool = False
    """Attention and activations in float64, as the proofs of Bellbox have them: slower, and codes hardly ever move."""
    checkpoint: str = "last"
    """Of a run: last, best, or a step."""
    bits: int | None = None
    """Of a model of several widths (docs/nested.md): the one to use; its widest where not given."""
    custom_op: Path | None = None
    """The library of native/onnx: packed linear layers become its operator, which is faster, and which every session
    then has to register."""
    check: bool = True
    """Run the file in onnxruntime beside the packed model and compare every code and logit."""
    data: str | None = None
    """Text or images for the check; the run's own where not given, or random tokens or images of a packed folder."""


def main(argv: list[str]) -> None:
    """Run `bellbox export onnx` with the arguments after that.

    Raises:
        BellboxError: what the user can put right.
        SystemExit: 1 where the file is not the packed model.
    """
    command: ExportOnnx = parse_flags(ExportOnnx, argv, "bellbox export onnx", __doc__)
    if not command.check:
        refuse_flags(command, ("data",), "--no-check")
    refuse_file_name(command.out)
    for module in ("onnx", "onnxscript", "onnxruntime"):  # before anything is opened
        require(module, "onnx")
    from bellbox.interop.onnx import check, export_model
    from bellbox.interop.onnx.card import write_card

    if command.custom_op is not None and not command.custom_op.is_file():
        raise BellboxError(
            f"{command.custom_op}: no such file; build it with cmake -DBELLBOX_ONNX=ON (docs/interop.md)"
        )
    opened = open_model(
        command.model,
        command.checkpoint,
        command.embeddings if _is_packed(command) else None,
        command.bits,
    )
    model: Any = _packed(opened, command)
    batches, of_what = _batches(opened, command) if command.check else ((), "")
    if command.exact_attention:
        if opened.is_vision:
            raise BellboxError("--exact-attention is for language models; leave it out")
        model.exact_attention = True
    found: Agreement | None = None
    with new_folder(command.out, FILE) as folder:
        tokenizer = None if opened.is_vision or opened.tokenizer is None else opened.load_tokenizer()
        facts = {} if tokenizer is None else {"bellbox.end_of_text": str(tokenizer.end_of_text)}
        if not opened.is_vision:
            facts["bellbox.context"] = str(model.config.max_position_embeddings)
        export_model(
            model,
            folder / FILE,
            weights=command.weights,
            opset=command.opset,
            metadata=facts,
            custom_op=command.custom_op is not None,
        )
        if tokenizer is not None:
            tokenizer.backend.save(os.fspath(folder / "tokenizer.json"))
        if command.check:
            found = check.agreement(model, folder / FILE, batches, command.custom_op)
        told = None if found is None else describe(found, of_what)
        write_card(folder, FILE, model, custom_op=command.custom_op is not None, checked=told)
    size = sum(file.stat().st_size for file in command.out.glob(f"{FILE}*"))
    print(f"{opened.description}\nwritten to {command.out / FILE}, {size:,} bytes\n")
    if found is None:
        return
    print(describe(found, of_what))
    if not found.holds:
        print(
            f"bellbox: {command.out} is not the packed model: do not use it; this is a defect of Bellbox",
            file=sys.stderr,
        )
        raise SystemExit(1)


def _is_packed(command: ExportOnnx) -> bool:
    from bellbox.formats.auto import kind_of

    return kind_of(command.model) in ("packed", "binarized")


def _packed(opened: OpenedModel, command: ExportOnnx) -> torch.nn.Module:
    if opened.kind == "binarized":
        raise BellboxError(
            f"{opened.path}: binarized layers cannot be exported to ONNX; use the model with Bellbox"
        )
    if opened.kind == "huggingface":
        raise BellboxError(
            f"{opened.path}: is a full-precision model; train it low-bit first, or use an exporter of its own"
        )
    model = opened.model
    if opened.kind == "run":
        model = convert(model)
        model = model if command.embeddings is None else compact(model, command.embeddings)
    if not any(isinstance(module, CodedLayer) for module in model.modules()):
        raise BellboxError(f"{opened.path}: has no low-bit layer; use an exporter of its own")
    return model


def _batches(opened: OpenedModel, command: ExportOnnx) -> tuple[Iterable[torch.Tensor], str]:
    """Inputs for the check, and what they are."""
    if command.data is not None or opened.run is not None:
        from bellbox.cli.convert import check_batches

        # The first ones: a runtime that hands out every code is slow.
        batches = list(check_batches(opened, command.data))
        some = [batch if opened.is_vision else batch[:, :_CHECKED_TOKENS] for batch in batches[:2]]
        return some, "validation images" if opened.is_vision else "sequences of validation text"
    generator = torch.Generator().manual_seed(0)
    config: Any = opened.model.config
    if opened.is_vision:
        size = config.image_size or 32
        shape = _CHECKED_IMAGES, config.num_channels, size, size
        return torch.rand(*shape, generator=generator).split(16), "random images"
    shape = _CHECKED_SEQUENCES, min(_CHECKED_TOKENS, config.max_position_embeddings)
    return torch.randint(config.vocab_size, shape, generator=generator).split(4), "sequences of random tokens"


def describe(found: Agreement, of_what: str) -> str:
    """The outcome of `check.agreement` in words."""
    verdict = "the same function" if found.holds else "NOT the same function"
    moved = ""
    if found.samples_moved:
        moved = (
            f"\n  codes that moved           {found.moved:,}, in {found.samples_moved:,} of them: norms and attention "
            f"round otherwise there,\n                             and a value within {found.farthest:.1g} of a "
            f"threshold got the next code; outputs then differ by up to {found.difference_moved:.3g}"
        )
    return (
        f"onnxruntime against the packed model, {found.samples:,} {of_what}, all {found.layers} coded inputs:\n"
        f"  codes compared             {found.codes:,}\n"
        f"  differ for the same input  {found.wrong:,} (and {found.ties:,} within 1e-6 of a threshold)"
        f"{moved}\n"
        f"  largest output difference  {found.difference:.3g} relative"
        f"{', where no code moved' if moved else ''}\n"
        f"  => {verdict}"
    )
