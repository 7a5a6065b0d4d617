"""The text and figures of `bellbox train --dry-run`: of one run, or of every row of a grid."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bellbox.benchmark.machine import cpu_name, product_rate
from bellbox.cli.output import require_writable, write_file
from bellbox.errors import BellboxError
from bellbox.runs.build import pick_device
from bellbox.runs.config import TrainConfig
from bellbox.training.dry_run import dry_run
from bellbox.utils.processor import Precision

_GIB = 1 << 30
_LIMITS = ((86400, "days"), (3600, "hours"), (60, "minutes"), (0, "seconds"))


def show_dry_run(config: TrainConfig, to: str | None) -> None:
    """Print what one run would be.

    Args:
        config: as the user gave it.
        to: a file for the numbers as JSON, `-` for standard output in place of the text; None for the text alone.

    Raises:
        BellboxError: what could not be trained.
    """
    found = _figures(config)
    if to != "-":
        print("\n".join(_lines(found)))
    _write(found, to)


def show_dry_runs(rows: Iterable[tuple[str, TrainConfig]], to: str | None) -> None:
    """Print a line for each row of a grid; arguments and errors as of `show_dry_run`."""
    found: dict[str, Any] = {}
    for name, config in rows:
        try:
            found[name] = _figures(config)
        except BellboxError as error:
            raise BellboxError(f"row '{name}': {error}") from None
        if to != "-":
            print(f"{name:<40} {_line(found[name])}", flush=True)
    _write(found, to)


def _write(found: dict[str, Any], to: str | None) -> None:
    if to == "-":
        print(json.dumps(found, indent=1))
    elif to is not None:
        require_writable(Path(to))
        write_file(Path(to), json.dumps(found, indent=1) + "\n")
        print(f"written to {to}")


def _figures(config: TrainConfig) -> dict[str, Any]:
    """Plain values, for JSON and for the text."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    run = dry_run(config)
    device = pick_device(run.config.device)
    rate = _rate(device, run.config.precision, torch.get_num_threads())
    return {
        "config": run.config.to_dict(),
        "parameters": {"all": run.parameters, "quantized": run.quantized, "left_whole": run.left_whole},
        "bits": [{"weights": _bits(weights), "inputs": _bits(inputs)} for weights, inputs in run.levels],
        "steps": run.config.total_steps,
        "unit": "images" if run.config.task == "vision" else "tokens",
        "total": run.config.total_steps * run.config.per_step,
        "a_step": run.config.per_step,
        "passes": run.config.accumulation,
        "phases": run.phases,
        "first_batch": list(run.first_batch),
        "memory_bytes": {**asdict(run.memory), "total": run.memory.total},
        "operations": run.operations,
        "operations_of_attention": run.attention,
        "machine": {
            "operations_a_second": rate,
            "precision": run.config.precision,
            "device": cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(),
            "threads": torch.get_num_threads(),
        },
        "seconds": run.operations / rate,
        "data": run.data.says,
    }


@functools.cache
def _rate(device: torch.device, precision: Precision, threads: int) -> float:  # noqa: ARG001 (another number, another rate)
    """Operations a second, measured once for all rows of a grid."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    return product_rate(device, dtype, 1024 if device.type == "cpu" else 8192)


def _bits(levels: int | None) -> float | None:
    return None if levels is None else math.log2(levels)


def _lines(found: dict[str, Any]) -> list[str]:
    config, counts, memory = found["config"], found["parameters"], found["memory_bytes"]
    parts = ", ".join(f"{name} {_gib(memory[name])}" for name in memory if name != "total")
    machine, attention = found["machine"], found["operations_of_attention"] / found["operations"]
    dtype = "fp32" if config["task"] == "vision" else "int64"
    return [
        "dry run: nothing is trained, fetched or written",
        f"model        {config['model']['preset']}: {counts['all']:,} parameters, {counts['quantized']:,} quantized "
        f"({_quantization(found)}), {counts['left_whole']:,} left whole",
        f"training     {found['steps']:,} steps of {found['a_step']:,} {found['unit']}, {found['total']:,} in all; "
        f"learning rate {config['optimizer']['lr']:g}",
        f"phases       {found['phases']}",
        f"first batch  {found['first_batch']} {dtype}, {found['passes']} such pass(es) a step",
        f"data         {found['data']}",
        f"memory       {_gib(memory['total'])} at the fullest of a step, counted in fp32: {parts}",
        f"time         {_duration(found['seconds'])} for the products alone: {found['operations']:.3g} operations, "
        f"{attention:.0%} of them attention's, at {machine['operations_a_second'] / 1e9:,.0f} G/s",
        f"             (3 times the forward's products; the rate is that of a product of square matrices in "
        f"{machine['precision']}, measured now",
        f"             on {machine['device']}, {machine['threads']} thread(s); quantizers, norms, optimizer and "
        "validation come on top)",
    ]


def _line(found: dict[str, Any]) -> str:
    return (
        f"{found['parameters']['all'] / 1e6:7.1f} M, {found['parameters']['quantized'] / 1e6:7.1f} M quantized "
        f"({_quantization(found)}), lr {found['config']['optimizer']['lr']:g}, {found['total'] / 1e9:.3g}e9 "
        f"{found['unit']}, {_gib(found['memory_bytes']['total'])}, {_duration(found['seconds'])} of products"
    )


def _quantization(found: dict[str, Any]) -> str:
    section = found["config"]["quantization"]
    method = "recipe" if section["recipe"] is not None else section["method"]
    widths = " and ".join(f"W{_width(pair['weights'])}A{_width(pair['inputs'])}" for pair in found["bits"])
    return f"{method}, {widths}" if widths else "full precision"


def _width(bits: float | None) -> str:
    return "32" if bits is None else f"{bits:.3g}"


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f} GiB"


def _duration(seconds: float) -> str:
    limit, unit = next(each for each in _LIMITS if seconds >= 2 * each[0])
    return f"{seconds / (limit or 1):.1f} {unit}"
