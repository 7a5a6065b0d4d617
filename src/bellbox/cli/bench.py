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
from bellbox.utils.processor import MAX_THREADS

require("tyro", "cli")

import tyro  # noqa: E402  (named before, so that its absence is one line; this file is imported by its command only)

_PROMPT, _MAX_SECONDS = 256, 86_400


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
    """A model of random weights: prompts and single tokens, against fp32 (and bf16, where the processor has it)."""

    preset: str = "95M"
    """A named size (`bellbox train --help` lists them)."""
    prompt: int | None = None
    """Tokens of the prompt; 256, or as many as the model takes before one more, where not given."""
    embeddings: tuple[Literal["fp32", "bf16", "int8", "int4"], ...] = ("fp32", "int8", "int4")
    """What the packed models' embeddings and heads are in."""
    kv_cache: tuple[Literal["fp32", "int8", "int4"], ...] = ("fp32",)
    """What the packed models' keys and values are kept in."""
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
    if wrong or not 1 <= command.threads <= MAX_THREADS or not 0 < command.seconds <= _MAX_SECONDS:
        raise BellboxError(
            f"bits are 1 to 4, threads 1 to {MAX_THREADS}, seconds above 0 and at most {_MAX_SECONDS:,}"
        )
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
            bases = {
                dtype: each.seconds.median
                for dtype in ("bf16", "fp32")
                for each in found
                if each.name == f"torch {dtype}"
            }
            where = "hot" if command.hot else "in rotation"
            print(f"\n{outputs} x {inputs}, {m} row{'s' if m > 1 else ''}, weights {where}")
            for each in found:
                s = each.seconds
                line = (
                    f"  {each.name:30}{s.median * 1e6:11,.1f} us ({s.low * 1e6:,.1f} to {s.high * 1e6:,.1f})"
                )
                line += ",".join(f"{base / s.median:7.2f} x {dtype}" for dtype, base in bases.items())
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


_VOCABULARY = 32_000
"""Of the models that are timed, whatever the preset's is: that of LLaMA's tokenizer."""


def _model(command: Model) -> list[dict[str, Any]]:
    config = preset(command.preset, vocab_size=_VOCABULARY)
    longest = config.max_position_embeddings - 1
    prompt = min(_PROMPT, longest) if command.prompt is None else command.prompt
    if not 1 <= prompt <= longest:
        raise BellboxError(f"--prompt {prompt}: the model takes {longest + 1} tokens, one of them new")
    found = bench_model(
        config,
        command.bits,
        prompt=prompt,
        embeddings=command.embeddings,
        kv_cache=command.kv_cache,
        seconds=command.seconds,
        progress=lambda line: print(f"  ... {line}", file=sys.stderr),
    )
    against = "bf16" if any(each.name == "bf16" for each in found) else "fp32"
    base = next(each for each in found if each.name == against)
    print(f"\n{command.preset}, prompt of {prompt} tokens; tokens/s by the median, quartiles behind")
    for each in found:
        p, d = each.prefill, each.decode
        print(
            f"  {each.name:26} prefill {each.prefill_tokens_per_second:9,.0f} ({each.prompt / p.high:,.0f} to "
            f"{each.prompt / p.low:,.0f}) {base.prefill.median / p.median:5.2f} x {against}   decode "
            f"{each.decode_tokens_per_second:7,.1f} ({1 / d.high:,.1f} to {1 / d.low:,.1f}) "
            f"{base.decode.median / d.median:5.2f} x {against}"
        )
    peak = found[-1].peak_memory
    if peak is not None:
        print(f"peak memory of all models together {peak / 2**20:,.0f} MiB")
    return [each.to_dict() for each in found]
