"""Measure speed on this machine: single layers against torch, or a whole model in prefill and decode.

bellbox bench kernels
bellbox bench kernels --rows 1 16 --shapes 4096x4096 --bits 2 --threads 1 --json kernels.json
bellbox bench model --preset 95M
bellbox bench model --preset 300M --bits 2 --threads 2 --json model.json
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from bellbox.benchmark import Machine, bench_kernels, bench_model, measure_machine
from bellbox.benchmark.kernels import ROWS, SHAPES
from bellbox.cli.output import parse_flags, require_writable, write_file
from bellbox.errors import BellboxError, require
from bellbox.models import preset

require("tyro", "cli")

import tyro  # noqa: E402  (named before, so that its absence is one line; this file is imported by its command only)


@dataclass(frozen=True)
class Common:
    """What both benchmarks take."""

    bits: tuple[int, ...] = (4, 3, 2, 1)
    """Bits of weights and activations."""
    threads: int = field(default_factory=torch.get_num_threads)
    """Threads of torch and of the kernels."""
    json: Path | None = None
    """Write the figures to this file too."""


@dataclass(frozen=True)
class Kernels(Common):
    """Single layers: rotation, codes, product and scales, against torch's layers."""

    shapes: tuple[str, ...] = tuple(f"{outputs}x{inputs}" for outputs, inputs in SHAPES)
    """Outputs x inputs of the layers."""
    rows: tuple[int, ...] = ROWS
    """Rows of the input: 1 is a decode step, many are a prompt."""
    hot: bool = False
    """One weight, in the caches, instead of copies in rotation."""
    seconds: float = 2.0
    """For each shape and number of rows."""


@dataclass(frozen=True)
class Model(Common):
    """A model of random weights: prompts and single tokens, against fp32 and bf16."""

    preset: str = "95M"
    """A named size (`bellbox train --help` lists them)."""
    prompt: int = 256
    """Tokens of the prompt."""
    embeddings: tuple[Literal["fp32", "bf16", "int8"], ...] = ("fp32", "int8")
    """What the packed models' embeddings and heads are in."""
    seconds: float = 10.0
    """For prompts and for single tokens, all models together."""


def main(argv: list[str]) -> None:
    """Run `bellbox bench` with the arguments after that.

    Raises:
        BellboxError: what the user can put right.
    """
    kinds: Any = (
        Annotated[Kernels, tyro.conf.subcommand("kernels")] | Annotated[Model, tyro.conf.subcommand("model")]
    )
    command = parse_flags(kinds, argv, "bellbox bench", __doc__)
    wrong = [b for b in command.bits if not 1 <= b <= 4]
    if wrong or command.threads < 1 or command.seconds <= 0:
        raise BellboxError("bits are 1 to 4, threads at least 1, seconds above 0")
    if isinstance(command, Kernels) and min(command.rows, default=0) < 1:
        raise BellboxError("--rows takes numbers of at least 1")
    if command.json is not None:
        require_writable(command.json)
    torch.set_num_threads(command.threads)
    machine = measure_machine()
    print(machine)
    results = _kernels(command, machine) if isinstance(command, Kernels) else _model(command)
    if command.json is not None:
        figures = {"machine": machine.to_dict(), "results": results}
        write_file(command.json, json.dumps(figures, indent=1) + "\n")


def _kernels(command: Kernels, machine: Machine) -> list[dict[str, Any]]:
    rows = []
    for outputs, inputs in map(_shape, command.shapes):
        for m in command.rows:
            found = bench_kernels(
                machine, outputs, inputs, m, command.bits, hot=command.hot, seconds=command.seconds
            )
            wide, base = (
                next(each for each in found if each.name == f"torch {dtype}").seconds.median
                for dtype in ("fp32", "bf16")
            )
            where = "hot" if command.hot else "in rotation"
            print(f"\n{outputs} x {inputs}, {m} row{'s' if m > 1 else ''}, weights {where}")
            for each in found:
                s = each.seconds
                line = (
                    f"  {each.name:30}{s.median * 1e6:11,.1f} us ({s.low * 1e6:,.1f} to {s.high * 1e6:,.1f})"
                )
                line += f"{base / s.median:7.2f} x bf16,{wide / s.median:7.2f} x fp32"
                line += f", {each.read_fraction:4.0%} of the read bandwidth"
                if each.integer_fraction is not None:
                    line += f", {each.integer_fraction:4.0%} of the integer rate"
                print(line)
            rows += [each.to_dict() for each in found]
    return rows


def _shape(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None or 0 in (shape := (int(match[1]), int(match[2]))):
        raise BellboxError(f"--shapes {text!r}: write OUTPUTSxINPUTS, such as 4096x4096")
    return shape


def _model(command: Model) -> list[dict[str, Any]]:
    config = preset(command.preset)
    if not 1 <= command.prompt < config.max_position_embeddings:
        raise BellboxError(
            f"--prompt {command.prompt}: the model takes {config.max_position_embeddings} tokens, one of them new"
        )
    found = bench_model(
        config,
        command.bits,
        prompt=command.prompt,
        embeddings=command.embeddings,
        seconds=command.seconds,
        progress=lambda line: print(f"  ... {line}", file=sys.stderr),
    )
    base = next(each for each in found if each.name == "bf16")
    print(f"\n{command.preset}, prompt of {command.prompt} tokens; tokens/s by the median, quartiles behind")
    for each in found:
        p, d = each.prefill, each.decode
        print(
            f"  {each.name:26} prefill {each.prefill_tokens_per_second:9,.0f} ({each.prompt / p.high:,.0f} to "
            f"{each.prompt / p.low:,.0f}) {base.prefill.median / p.median:5.2f} x bf16   decode "
            f"{each.decode_tokens_per_second:7,.1f} ({1 / d.high:,.1f} to {1 / d.low:,.1f}) "
            f"{base.decode.median / d.median:5.2f} x bf16"
        )
    peak = found[-1].peak_memory
    if peak is not None:
        print(f"peak memory of all models together {peak / 2**20:,.0f} MiB")
    return [each.to_dict() for each in found]
