"""Write a packed model as a program of ExecuTorch, PyTorch's own runtime for devices.

bellbox export executorch small-packed small-executorch
bellbox export executorch small-packed small-executorch --kernels build/executorch/libbellbox_executorch.so

The folder gets model.pte and, of a language model, tokenizer.json. Whatever runs it needs the kernels of
native/executorch (make executorch); with --kernels the program is run here, beside the packed model.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from bellbox.cli.output import parse_flags, refuse_file_name
from bellbox.convert import convert
from bellbox.errors import BellboxError, require
from bellbox.formats.auto import open_model
from bellbox.utils.files import new_folder

require("tyro", "cli")

import tyro  # noqa: E402  (named before, so that its absence is one line; this file is imported by its command only)

FILE = "model.pte"
_SAMPLES, _TOKENS = 8, 64


@dataclass(frozen=True)
class ExportExecutorch:
    """Write a packed model as a program of ExecuTorch."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run of a low-bit model, or a packed folder: LLaMA, GPT, ResNet or ViT."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The folder to make; an earlier export there is replaced."""
    kernels: Path | None = None
    """The library of native/executorch: run the program with it and compare its logits with the packed model's."""
    cache: bool = False
    """Of a language model: the program keeps keys and values; it takes new tokens and the place of the first one."""
    checkpoint: str = "last"
    """Of a run: last, best, or a step."""
    embeddings: Literal["fp32", "bf16", "int8", "int4"] = "fp32"
    """Round embeddings and head of a model that was trained without: no longer exactly the trained function."""


def main(argv: list[str]) -> None:
    """Run `bellbox export executorch` with the arguments after that.

    Raises:
        BellboxError: what the user can put right.
        SystemExit: 1 where the program is not the packed model.
    """
    command = parse_flags(ExportExecutorch, argv, "bellbox export executorch", __doc__)
    refuse_file_name(command.out)
    require("executorch.exir", "executorch")
    from bellbox.interop.executorch import agreement, export_executorch

    if command.kernels is not None and not command.kernels.is_file():
        raise BellboxError(f"{command.kernels}: no such file; build it with make executorch (docs/device.md)")
    rounded = None if command.embeddings == "fp32" else command.embeddings
    is_run = (Path(command.model) / "config.yaml").is_file()
    opened = open_model(command.model, command.checkpoint, None if is_run else rounded)
    if opened.kind not in ("run", "packed"):
        raise BellboxError(f"{opened.path}: export executorch takes a run or a packed folder")
    model: Any = opened.model if opened.kind == "packed" else convert(opened.model, command.embeddings)
    found = None
    with new_folder(command.out, FILE) as folder:
        lowered = export_executorch(model, folder / FILE, cache=command.cache)
        if not opened.is_vision and opened.tokenizer is not None:
            opened.load_tokenizer().backend.save(os.fspath(folder / "tokenizer.json"))
        if command.kernels is not None:
            samples = _samples(model.config, opened.is_vision)
            kernels = command.kernels
            found = agreement(model, folder / FILE, lowered.operators, kernels, samples, cache=command.cache)
    ours = ", ".join(name for name in lowered.operators if name.startswith("bellbox::"))
    print(
        f"{opened.description}\nwritten to {command.out / FILE}, {lowered.bytes:,} bytes\n"
        f"  of ExecuTorch  {sum(not name.startswith('bellbox::') for name in lowered.operators)} operators\n"
        f"  of Bellbox     {ours}"
    )
    if found is None:
        print("not run: give --kernels (make executorch) to compare it with the packed model")
        return
    kind = "random images" if opened.is_vision else "sequences of random tokens"
    choice = (
        "the likeliest class is the same for" if opened.is_vision else "the likeliest token is the same at"
    )
    print(
        f"ExecuTorch's runtime against the packed model, {found.samples} {kind}:\n"
        f"  {found.near} of them within 1e-5 of the largest logit (at most {found.difference:.2g})\n"
        f"  {choice} {found.same_choice:.2%} of {'them' if opened.is_vision else 'positions'}"
    )
    if not found.holds:
        print(f"bellbox: {command.out} is not the packed model: do not use it", file=sys.stderr)
        raise SystemExit(1)


def _samples(config: Any, is_vision: bool) -> Tensor:
    """Random inputs of a program, one after the other."""
    generator = torch.Generator().manual_seed(0)
    if is_vision:
        from bellbox.interop.executorch import image_shape

        return torch.rand(_SAMPLES, *image_shape(config), generator=generator)
    length = min(_TOKENS, config.max_position_embeddings)
    return torch.randint(config.vocab_size, (_SAMPLES, 1, length), generator=generator)
