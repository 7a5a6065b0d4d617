"""Scaled rotary positions in the words of a GGUF file.

Bellbox's own LLaMA has plain ones and refuses others; a prepared LLaMA of transformers may have any. Configurations
call them `rope_scaling` (transformers 4) or `rope_parameters` (5); both are read, and a kind that is not known here is
refused: dropped, the file would hold another model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bellbox.errors import BellboxError


@dataclass(frozen=True)
class Rope:
    """Rotary positions as a file says them."""

    theta: float
    kind: str | None = None
    """`linear` or `longrope`; None of plain ones and of LLaMA 3's, which are factors alone."""
    numbers: dict[str, float] = field(default_factory=dict)
    """Keys under `ARCHITECTURE.rope.scaling.`; whole numbers as int."""
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    """fp32 `[head_dim / 2]` by name."""


def read_rope(config: dict[str, Any], head_dim: int, context: int) -> Rope:
    """The rotary positions of a configuration.

    Args:
        config: with `rope_parameters`, `rope_scaling` and `rope_theta`, as far as it has them.
        head_dim: width of a head.
        context: the longest sequence.

    Raises:
        BellboxError: another kind, two that differ, or numbers that are missing or cannot be.
    """
    theta, found = config.get("rope_theta"), None
    for key in ("rope_parameters", "rope_scaling"):
        values = config.get(key)
        if values is None:
            continue
        if not isinstance(values, dict):
            raise BellboxError(f"{key} is {values!r}, not an object")
        values = {**values, "rope_type": values.get("rope_type", values.get("type", "default"))}
        values.pop("type", None)
        theta = values.pop("rope_theta", theta)
        if found is not None and found[1] != values:
            raise BellboxError(
                f"{found[0]} and {key} are of different rotary positions; leave one of them out"
            )
        found = key, values
    theta = 10000.0 if theta is None else theta
    key, rope = found or ("rope_parameters", {"rope_type": "default"})
    _require(key, rope, rope.get("partial_rotary_factor", 1.0) in (1, 1.0, None), "turn a part of each head")
    kind = rope["rope_type"]
    if kind == "default":
        return Rope(float(theta))
    if kind == "linear":
        return Rope(float(theta), "linear", {"factor": _number(key, rope, "factor")})
    if kind == "llama3":
        return Rope(float(theta), tensors={"rope_freqs.weight": _llama3(key, rope, float(theta), head_dim)})
    if kind in ("longrope", "su"):
        return _longrope(key, rope, float(theta), head_dim, context, config)
    raise BellboxError(
        f"{key}: rotary positions of the kind {kind!r} are not written to GGUF; default, linear, llama3, longrope are"
    )


def _require(key: str, rope: dict[str, Any], holds: bool, what: str) -> None:
    if not holds:
        raise BellboxError(f"{key} {rope!r}: rotary positions that {what} are not written to GGUF")


def _number(key: str, rope: dict[str, Any], name: str) -> float:
    value = rope.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise BellboxError(f"{key}: {name} is {value!r}; {rope['rope_type']} needs a finite number above 0")
    return float(value)


def _llama3(key: str, rope: dict[str, Any], theta: float, head_dim: int) -> np.ndarray:
    """What each frequency is divided by: long waves by the factor, short ones by 1, smoothly between.

    Source: Grattafiori et al. 2024, "The Llama 3 Herd of Models", as transformers computes it.
    """
    factor, low, high, before = (
        _number(key, rope, name)
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    if low == high:
        raise BellboxError(f"{key}: low_freq_factor and high_freq_factor are both {low:g}; they must differ")
    frequency = 1.0 / (theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim))
    waves = before * frequency / (2 * math.pi)  # that fit the former context
    smooth = (waves - low) / (high - low)
    between = 1.0 / ((1 - smooth) / factor + smooth)
    return np.where(waves > high, 1.0, np.where(waves < low, factor, between)).astype(np.float32)


def _longrope(
    key: str, rope: dict[str, Any], theta: float, head_dim: int, context: int, config: dict[str, Any]
) -> Rope:
    """A list of divisors for short and one for long texts, and a factor for attention (arXiv 2402.13753)."""
    before = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    before = _number(
        key, {**rope, "original_max_position_embeddings": before}, "original_max_position_embeddings"
    )
    tensors: dict[str, np.ndarray] = {}
    for length in ("short", "long"):
        values = rope.get(f"{length}_factor")
        if not isinstance(values, list) or len(values) != head_dim // 2:
            raise BellboxError(f"{key}: {length}_factor must be a list of {head_dim // 2} numbers")
        numbers = [_number(key, {**rope, "of": value}, "of") for value in values]
        tensors[f"rope_factors_{length}.weight"] = np.array(numbers, dtype=np.float32)
    longer = rope.get("factor") or context / before
    usual = math.sqrt(1 + math.log(longer) / math.log(before)) if longer > 1 else 1.0
    asked = rope.get("attention_factor")
    attention = usual if asked is None else _number(key, rope, "attention_factor")
    numbers = {"original_context_length": int(before), "attn_factor": attention}
    return Rope(theta, "longrope", numbers, tensors)


def write_rope(writer: Any, rope: Rope) -> None:
    """Put it into a `gguf.GGUFWriter`."""
    writer.add_rope_freq_base(rope.theta)
    if rope.kind is not None:
        writer.add_string(f"{writer.arch}.rope.scaling.type", rope.kind)
    for name, value in rope.numbers.items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        add(f"{writer.arch}.rope.scaling.{name}", value)
    for name, values in rope.tensors.items():
        writer.add_tensor(name, values)
