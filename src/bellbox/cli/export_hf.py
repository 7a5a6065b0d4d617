"""Write a folder that transformers loads, packed layers inside: `AutoModelForCausalLM.from_pretrained(OUT)`.

bellbox export hf runs/small OUT
bellbox export hf runs/small OUT --checkpoint best --embeddings int8
bellbox export hf small-packed OUT

OUT has a model card with an honest count of its bytes. Whoever loads it needs Bellbox: `import
bellbox.interop.transformers`, or `trust_remote_code=True`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from bellbox.cli.output import parse_flags, refuse_file_name, refuse_same_folder
from bellbox.convert import convert
from bellbox.errors import BellboxError, require
from bellbox.formats.auto import open_model

require("tyro", "cli")

import tyro  # noqa: E402  (named before, so that its absence is one line; this file is imported by its command only)


@dataclass(frozen=True)
class ExportHf:
    """Write a folder that transformers loads, packed layers inside."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run folder of a low-bit LLaMA or GPT, or a packed folder."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The folder to make; an earlier packed model there is replaced."""
    checkpoint: str = "last"
    """Of a run: last, best, or a step."""
    bits: int | None = None
    """Of a model of several widths (docs/nested.md): the one to use; its widest where not given."""
    embeddings: Literal["fp32", "bf16", "int8", "int4"] = "fp32"
    """Round embeddings and head of a model that was trained without: no longer exactly the trained function."""


def main(argv: list[str]) -> None:
    """Run `bellbox export hf` with the arguments after that.

    Raises:
        BellboxError: what the user can put right.
    """
    command = parse_flags(ExportHf, argv, "bellbox export hf", __doc__)
    refuse_file_name(command.out)
    refuse_same_folder(command.model, command.out)
    require("transformers", "transformers")
    from bellbox.interop.transformers.export import export_packed

    rounded = None if command.embeddings == "fp32" else command.embeddings
    is_run = (Path(command.model) / "config.yaml").is_file()
    opened = open_model(command.model, command.checkpoint, None if is_run else rounded, command.bits)
    if opened.kind not in ("run", "packed"):
        raise BellboxError(
            f"{opened.path}: is a {opened.kind} model; export hf takes a run of a low-bit model or a packed folder"
        )
    if opened.is_vision:
        raise BellboxError(f"{opened.path}: is a vision model; export hf writes LLaMA and GPT models")
    packed = opened.model if opened.kind == "packed" else convert(opened.model, command.embeddings)
    tokenizer = None if opened.tokenizer is None else opened.load_tokenizer()
    end = None if tokenizer is None else tokenizer.end_of_text
    export_packed(
        packed,
        command.out,
        tokenizer=None if tokenizer is None else tokenizer.text,
        end_of_text=end,
        end_token=None if tokenizer is None or end is None else tokenizer.backend.id_to_token(end),
        companions=opened.companions,
    )
    size = sum(file.stat().st_size for file in command.out.iterdir() if file.is_file())
    print(
        f"{opened.description}\nwritten to {command.out}, {size:,} bytes; its README.md says how to load it"
    )
