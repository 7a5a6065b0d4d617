"""Measurement of a finished run, from its own record and from the trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from bellbox.convert import convert
from bellbox.core.packing import row_bytes
from bellbox.errors import BellboxError
from bellbox.formats import packed as io
from bellbox.nn import QuantizedLayer, nested_widths, quantized_layers, using_bits
from bellbox.recipe import Recipe
from bellbox.report.style import kind_of
from bellbox.runs.metrics import read_records

BINS = 32


def measure(model: nn.Module, folder: Path) -> dict[str, Any]:
    """The fields of a `Result` that a run brings, but for where and when.

    Args:
        model: as it is after training.
        folder: the run's.

    Returns:
        The fields; of a nested model under `widths` those of each width, by its bits.
    """
    records = read_records(folder / "metrics.jsonl")
    widths: dict[str, Any] = {}
    for bits in nested_widths(model):
        with using_bits(model, bits):
            widths[str(bits)] = _measure(model, [_at_width(record, bits) for record in records])
    return {"widths": widths} if widths else _measure(model, records)


def _at_width(record: dict[str, Any], bits: int) -> dict[str, Any]:
    """A record of a nested model as of one that has this width; phases before the nested one have no widths."""
    return {**record, **record.get("widths", {}).get(str(bits), {})}


def _measure(model: nn.Module, records: list[dict[str, Any]]) -> dict[str, Any]:
    evals = [record for record in records if record["kind"] == "eval"]
    last = evals[-1]
    weights = last.get("weight_entropy") or {"mean": None, "layers": {}}
    size, refusal = block_bytes(model)
    return {
        "steps": last["step"],
        "tokens": last["tokens"],
        "loss": last["loss"],
        "perplexity": last.get("perplexity"),
        "accuracy": last.get("accuracy"),
        "weight_entropy": weights["mean"],
        "lowest_weight_entropy": min(weights["layers"].values(), default=None),
        "activation_entropy": _mean(last, "activation_entropy"),
        "step_seconds": _step_seconds(records),
        "block_bytes": size,
        "not_packed": refusal,
        "history": [
            {
                "step": record["step"],
                "tokens": record["tokens"],
                "loss": record["loss"],
                "weight_entropy": _mean(record, "weight_entropy"),
                "activation_entropy": _mean(record, "activation_entropy"),
            }
            for record in evals
        ],
        "feature_spectrum": last.get("feature_spectrum", []),
        "parts": last.get("parts"),
        "gamma": _gamma_histograms(model),
        "seconds": last["seconds"],
    }


def block_bytes(model: nn.Module) -> tuple[int, str | None]:
    """Bytes of the blocks' linear layers and convolutions: codes, scales and constants where quantized, bf16 where not.

    Returns:
        The bytes, and None or why the model cannot be packed; in that case quantized layers count with their codes
        and their fp32 scales.
    """
    layers = dict(quantized_layers(model))
    blocks = Recipe.bbq()
    left = [
        module
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, nn.Conv2d) and blocks.rule_for(name) is not None
    ]
    floats = 2 * sum(p.numel() for module in left for p in module.parameters())
    if not layers:
        return floats, None
    try:
        return floats + io.sizes(convert(model)).packed_bytes, None
    except BellboxError as error:
        return floats + sum(map(_unpacked_bytes, layers.values())), str(error)


def _unpacked_bytes(layer: QuantizedLayer) -> int:
    quantizer = layer.weight_quantizer
    if quantizer is None:
        return 2 * layer.stored_weight.numel()
    row = row_bytes(layer.row_length, quantizer.levels.n)
    return layer.row_count * (row + 4 * quantizer.scales_a_row)


def _mean(record: dict[str, Any], name: str) -> float | None:
    return (record.get(name) or {}).get("mean")


def _step_seconds(records: list[dict[str, Any]]) -> float | None:
    """Of the quickest logged stretch; the first, with its set-up, does not count unless it is all there is."""
    train = [record for record in records if record["kind"] == "train"]
    found: list[float] = []
    for before, record in zip([None, *train], train, strict=False):
        tokens_a_step = record["tokens"] / record["step"]
        if before is not None or len(train) == 1:
            found.append(tokens_a_step / record["tokens_per_s"])
    return min(found, default=None)


def _gamma_histograms(model: nn.Module) -> dict[str, dict[str, Any]]:
    kinds: dict[str, list[torch.Tensor]] = {}
    for name, layer in quantized_layers(model):
        quantizer = layer.weight_quantizer
        gamma = None if quantizer is None else quantizer.learned_scale
        if gamma is not None:
            kinds.setdefault(kind_of(name), []).append(gamma.detach().double().flatten())
    histograms: dict[str, dict[str, Any]] = {}
    for kind, parts in kinds.items():
        values = torch.cat(parts)
        low, high = float(values.min()), float(values.max())
        if low < high:
            counts = torch.histc(values, BINS, low, high).long().tolist()
            histograms[kind] = {"low": low, "high": high, "counts": counts}
    return histograms
