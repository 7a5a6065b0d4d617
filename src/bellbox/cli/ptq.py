"""Binarize a trained language model without training: about one bit a weight, plus what one bit really costs.

bellbox ptq some-hf-folder --calibration text.txt --out one-bit
bellbox ptq some-hf-folder --calibration text.txt --out one-bit-a8 --method dbellquant --activations 8
bellbox ptq some-hf-folder --calibration text.txt --out floor --method rtn --samples 16 --context 512

Killed, it goes on with the same command from the last block that was done.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from bellbox.cli.output import parse_flags, refuse_file_name, refuse_flags
from bellbox.errors import BellboxError, require
from bellbox.ptq import Job, Settings, binarize_folder, load, stored_size
from bellbox.utils.memory import peak_in_words

require("tyro", "cli")

import tyro  # noqa: E402  (named before, so that its absence is one line; this file is imported by its command only)


@dataclass(frozen=True)
class Ptq:
    """Binarize a trained language model without training."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A Hugging Face folder with a LLaMA, GPT-2 or OPT and its tokenizer."""
    calibration: Path
    """Text to fit on: a file (plain, .gz, .xz, .zst), JSON lines, or a folder of them."""
    out: Path
    """The folder to make; an earlier binarized model there is replaced."""
    method: Literal["dbellquant", "billm", "rtn"] = "dbellquant"
    """DBellQuant, BiLLM, or rounding to nearest, which is the floor."""
    activations: Literal[16, 8, 6] = 16
    """Bits of the layers' inputs, each token with its own scale; 16 for no rounding."""
    samples: int = 128
    """Calibration sequences."""
    context: int = 2048
    """Tokens of each; no more than the model's context."""
    batch: int = 4
    """Sequences in one forward."""
    variant: Literal["clean", "released"] = "clean"
    """As cleaned up here, or as the authors' code does it (docs/ptq.md says what differs)."""
    power: Literal[1, 2] = 2
    """Of the loss that LTDB learns by; 2 as released."""
    exponent: float | None = None
    """Of LTDB's start: how far outliers of the activations go into the weights; .5, or .85 with --variant released."""
    damping: float = 0.01
    """Added to the Hessian's diagonal, in units of its mean."""


def main(argv: list[str]) -> None:
    """Run `bellbox ptq` with the arguments after that.

    Raises:
        BellboxError: what the user can put right.
    """
    command = parse_flags(Ptq, argv, "bellbox ptq", __doc__)
    refuse_file_name(command.out)
    for name, value in (("samples", command.samples), ("context", command.context), ("batch", command.batch)):
        if value < 1:
            raise BellboxError(f"--{name} is {value}, must be at least 1")
    if command.method == "rtn":
        refuse_flags(command, ("power", "exponent", "damping"), "--method rtn")
    if command.method == "billm":
        refuse_flags(command, ("power", "exponent"), "--method billm")
    settings = Settings(
        method=command.method,
        variant=command.variant,
        power=command.power,
        exponent=command.exponent,
        damping=command.damping,
        activation_bits=command.activations,
    ).check()
    job = Job(
        command.model,
        command.out,
        command.calibration,
        settings,
        command.samples,
        command.context,
        command.batch,
    )
    binarize_folder(job)
    size = stored_size(load(command.out))
    on_disk = sum(file.stat().st_size for file in command.out.iterdir() if file.is_file())
    print(
        f"{command.out}: {size.weights:,} weights in {size.bits_per_weight:.3f} bits each, scales and all "
        f"(bf16: 16), the rest in {size.other_bytes:,} bytes; the folder has {on_disk:,} bytes"
        + peak_in_words("; ")
        + f"\nbellbox eval {command.out} --data DATA; bellbox report {command.out}"
    )
