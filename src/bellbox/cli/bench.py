"""Measure speed on this machine: single layers against torch, a whole model in prefill and decode, or its parts.

bellbox bench kernels
bellbox bench kernels --rows 1 16 --shapes 4096x4096 --bits 2 --threads 1 --json kernels.json
bellbox bench model --preset 95M
bellbox bench model --preset 300M --bits 2 --threads 2 --json model.json
bellbox bench profile 95M --rows 8x128 --picture profile.svg
bellbox bench profile runs/mine-2bit --device cuda
bellbox bench profile resnet-18 --rows 4x224
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from bellbox.benchmark import Machine, bench_kernels, bench_model, measure_machine
from bellbox.benchmark.kernels import ROWS, SHAPES
from bellbox.benchmark.model import images_of, random_model
from bellbox.benchmark.profile import CLASSES, Profile, profile
from bellbox.cli.output import parse_flags, require_writable, write_file
from bellbox.errors import BellboxError, require
from bellbox.formats.auto import open_model
from bellbox.models import (
    PRESETS,
    VISION_PRESETS,
    AnyConfig,
    ResNetConfig,
    ViTConfig,
    build,
    preset,
    vision_preset,
)
from bellbox.report.profile import profile_picture
from bellbox.report.sheet import standalone
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


@dataclass(frozen=True)
class Parts(Common):
    """Where the time of a forward goes: products, quantization, element-wise operations, the rest."""

    model: tyro.conf.Positional[str] = "95M"
    """A named size, with random weights, or the folder of a model."""
    rows: str | None = None
    """Sequences x tokens of the forward, 1x256 where not given; of a vision model images x their side, 4 of its own."""
    device: str = "cpu"
    """Where: cpu or cuda."""
    picture: Path | None = None
    """Write a picture of stacked bars to this file (SVG)."""
    seconds: float = 2.0
    """For each part of each model, at least."""


def main(argv: list[str]) -> None:
    """Run `bellbox bench` with the arguments after that.

    Raises:
        BellboxError: what the user can put right.
    """
    kinds: Any = (
        Annotated[Kernels, tyro.conf.subcommand("kernels")]
        | Annotated[Model, tyro.conf.subcommand("model")]
        | Annotated[Parts, tyro.conf.subcommand("profile")]
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
    if isinstance(command, Parts) and command.picture is not None:
        require_writable(command.picture)
    torch.set_num_threads(command.threads)
    models = _models_of(command) if isinstance(command, Parts) else {}
    machine = measure_machine()
    print(machine)
    if isinstance(command, Kernels):
        results = _kernels(command, machine)
    elif isinstance(command, Model):
        results = _model(command)
    else:
        results = _parts(command, models)
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


def _shape(
    text: str, flag: str = "--shapes", what: str = "OUTPUTSxINPUTS, such as 4096x4096"
) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None or 0 in (shape := (int(match[1]), int(match[2]))):
        raise BellboxError(f"{flag} {text!r}: write {what}")
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


def _models_of(command: Parts) -> dict[str, Callable[[], nn.Module]]:
    """What makes each model, by name: that of a folder, or a named size in floats and in each width."""
    if command.rows is not None:
        _shape(command.rows, "--rows", "SEQUENCESxTOKENS, such as 1x256")
    if command.device.partition(":")[0] not in ("cpu", "cuda"):
        raise BellboxError(f"--device {command.device!r}: cpu or cuda")
    if command.device != "cpu" and not torch.cuda.is_available():
        raise BellboxError(f"--device {command.device}: torch sees no CUDA device here; use cpu")
    if Path(command.model).is_dir():
        opened = open_model(command.model)
        return {Path(command.model).name: lambda: opened.model}
    if command.model in VISION_PRESETS:
        config: AnyConfig = vision_preset(command.model)
    elif command.model in PRESETS:
        config = preset(command.model, vocab_size=_VOCABULARY)
    else:
        sizes = ", ".join(sorted((*PRESETS, *VISION_PRESETS)))
        raise BellboxError(f"{command.model}: neither a folder nor a named size; sizes are {sizes}")
    floats = "fp32" if command.device == "cpu" else "bf16"
    dtype = torch.float32 if command.device == "cpu" else torch.bfloat16
    made: dict[str, Callable[[], nn.Module]] = {floats: lambda: build(config, seed=0).to(dtype)}
    for bits in command.bits:
        made[f"{bits} bit{'s' if bits > 1 else ''}"] = lambda bits=bits: random_model(config, bits)
    return made


def _given(model: nn.Module, rows: str | None) -> tuple[Tensor, str]:
    """Random tokens or images for a model, and what they are in words."""
    config: Any = model.config
    if isinstance(config, ResNetConfig | ViTConfig):
        images, side = (4, None) if rows is None else _shape(rows, "--rows")
        shape = images_of(config, images, side)
        if isinstance(config, ViTConfig) and shape[-1] != config.image_size:
            raise BellboxError(
                f"--rows {rows}: the model takes images of {config.image_size} x {config.image_size}"
            )
        dtype = next((each.dtype for each in model.parameters()), torch.float32)
        return torch.randn(shape, dtype=dtype), f"{images} images of {shape[-1]} x {shape[-1]}"
    batch, length = (
        (1, min(_PROMPT, config.max_position_embeddings)) if rows is None else _shape(rows, "--rows")
    )
    if length > config.max_position_embeddings:
        raise BellboxError(f"--rows {rows}: the model takes {config.max_position_embeddings} tokens")
    return torch.randint(0, config.vocab_size, (batch, length)), f"{batch} x {length} tokens"


def _parts(command: Parts, models: dict[str, Callable[[], nn.Module]]) -> list[dict[str, Any]]:
    found, called = list[Profile](), ""
    for name, make in models.items():
        model = make().eval().to(command.device)
        given, called = _given(model, command.rows)
        print(f"  ... {name}", file=sys.stderr)
        found.append(profile(name, model, given.to(command.device), command.seconds))
        del model
    width = max(len(each.name) for each in found)
    print(f"\n{command.model}, {called} on {command.device}; milliseconds of a forward")
    print(f"  {'':{width}} {'all':>10}" + "".join(f"{kind:>16}" for kind in CLASSES))
    for each in found:
        parts = "".join(f"{1e3 * s:9,.2f} ({s / each.total:4.0%})" for s in each.seconds)
        print(f"  {each.name:{width}} {1e3 * each.total:10,.2f}{parts}")
    if command.picture is not None:
        bars = {each.name: [1e3 * s for s in each.seconds] for each in found}
        title = f"{Path(command.model).name}, {called} on {command.device}"
        write_file(command.picture, standalone(profile_picture(bars, CLASSES, title)))
    return [each.to_dict() for each in found]
