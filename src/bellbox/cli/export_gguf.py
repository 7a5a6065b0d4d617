"""Write a model's weights as a GGUF file, for llama.cpp. Weights only: activations are not quantized there.

bellbox export gguf runs/small small.gguf
bellbox export gguf small-packed small.gguf --floats f16
bellbox export gguf runs/one-bit one-bit.gguf --avoid Q1_0       # for programs that do not know that type
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from bellbox.cli.output import parse_flags, require_writable
from bellbox.errors import require
from bellbox.formats.auto import open_model

require("tyro", "cli")

import tyro  # noqa: E402  (named before, so that its absence is one line; this file is imported by its command only)


@dataclass(frozen=True)
class ExportGGUF:
    """Write a model's weights as a GGUF file. Weights only: activations are not quantized there."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run, packed or Hugging Face folder of a LLaMA or GPT whose weights are not rotated (block: 1)."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The file to write; an earlier one is replaced."""
    checkpoint: str = "last"
    """Of a run: last, best, or a step."""
    bits: int | None = None
    """Of a model of several widths (docs/nested.md): the one to use; its widest where not given."""
    floats: Literal["f32", "f16", "bf16", "q8_0"] = "f32"
    """What embeddings, head and other matrices in full precision become; f32 leaves them as they are."""
    avoid: tuple[str, ...] = ()
    """GGUF types not to use; the next wider one that is exact is taken."""


def main(argv: list[str]) -> None:
    """Run `bellbox export gguf` with the arguments after that.

    Raises:
        BellboxError: what the user can put right.
    """
    command = parse_flags(ExportGGUF, argv, "bellbox export gguf", __doc__)
    require("gguf", "gguf")
    from bellbox.interop.gguf import WEIGHTS_ONLY, GGUFFile, card_path, export_gguf, write_card

    require_writable(command.out)
    require_writable(card_path(command.out))
    opened = open_model(command.model, command.checkpoint, bits=command.bits)
    made: GGUFFile = export_gguf(
        opened.model,
        command.out,
        tokenizer=opened.tokenizer,
        name=opened.path.resolve().name,
        floats=command.floats,
        avoid=command.avoid,
    )
    told = write_card(made)
    print(
        f"{opened.description}\nwritten to {made.path}: {made.bytes:,} bytes, architecture {made.architecture}; "
        f"{told.name} says what it is\n"
    )
    for (kind, integers), count in sorted(Counter((t.type, t.of_integers) for t in made.tensors).items()):
        chosen = [t for t in made.tensors if (t.type, t.of_integers) == (kind, integers)]
        weights = sum(_numbers(t.shape) for t in chosen)
        size = sum(t.bytes for t in chosen)
        what = "low-bit, codes exact" if integers else "as it is" if kind == "F32" else "rounded"
        print(
            f"  {kind:<6} {count:>4} tensors {weights:>14,} weights {8 * size / weights:>7.3f} bits each   {what}"
        )
    print(f"\nscales    rounded to fp16, by at most {made.scale_change:.2g} of themselves")
    if made.small_scales:
        print(f"          {made.small_scales:,} below 6.1e-5 are kept to 6e-8 only")
    for kind in made.unchecked:
        print(f"note      the installed gguf package cannot decode {kind}: its blocks were not compared")
    wider = Counter((t.natural, t.type) for t in made.tensors if t.natural)
    for (natural, kind), count in wider.items():
        why = f"avoided, or blocks of {natural} do not divide their rows"
        print(f"note      {count} tensors are {kind} where {natural} would do: {why}")
    said = (
        "written" if made.vocabulary else f"left out, so that the model takes token ids only: {made.remark}"
    )
    print(f"tokenizer {said}")
    print(f"\n{made.description}")
    if made.description == WEIGHTS_ONLY:
        print(
            "What codes activations also scales them (bbq divides each input by its own size): perplexity can be\n"
            "far from the trained one there. For llama.cpp train with quantization.weight_only: float and block: 1."
        )


def _numbers(shape: tuple[int, ...]) -> int:
    total = 1
    for each in shape:
        total *= each
    return total
