"""Request for a quantizer: a method by name, and numbers. Plain data, from a recipe or a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast, get_args

from bellbox.core.grid import check_levels, check_zero_point
from bellbox.core.hadamard import block_size
from bellbox.errors import BellboxError
from bellbox.quantizers.registry import check_method

Granularity = Literal["row", "tensor", "ema", "token", "learned"]
"""How sigma is taken. Weights: `row`, `tensor`. Activations: `token` (each row), `ema`, `tensor`. Or `learned`."""


FORMER_NAMES = {"statistic": "granularity", "weight_statistic": "weight_granularity"}
"""Keys that earlier files use, and what they are called now."""


def with_present_names(data: Any) -> Any:
    """Plain data with former keys under their present names, at every depth."""
    if isinstance(data, Mapping):
        items = cast("Mapping[Any, Any]", data)
        return {
            (FORMER_NAMES[key] if FORMER_NAMES.get(key, key) not in items else key): with_present_names(value)
            for key, value in items.items()
        }
    if isinstance(data, list):
        return [with_present_names(each) for each in cast("list[Any]", data)]
    return data


@dataclass(frozen=True)
class QuantizerSpec:
    """One quantizer, by name and numbers; what is None is the method's own choice for a weight or an activation.

    Examples:
        >>> bb.QuantizerSpec("quest", levels=16).options
        {}
        >>> bb.QuantizerSpec("bbq", options={"gamma": "frozen"}).levels
        4
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    method: str = "bbq"
    """The quantization method, one of `bellbox.quantizers.METHODS`."""
    levels: int = 4
    """Number of levels n: 2**bits, or 3 for ternary."""
    zero_point: float | None = None
    """Shift of the integer grid, a multiple of 1/2."""
    granularity: Granularity | None = None
    """How sigma is taken: `row` for weights; `token`, `ema` or `tensor` for activations; `learned`."""
    block: int | None = None
    """Largest Hadamard block, a power of two; 1 for no rotation."""
    options: dict[str, bool | float | str] = field(default_factory=dict[str, bool | float | str])
    """Options of the method by name."""

    def __post_init__(self) -> None:
        check_method(self.method, self.options)
        check_levels(self.levels)
        if self.granularity is not None and self.granularity not in get_args(Granularity):
            known = ", ".join(get_args(Granularity))
            raise BellboxError(f"no granularity {self.granularity!r}; there are: {known}")
        if self.zero_point is not None:
            check_zero_point(self.zero_point)
        if self.block is not None:
            block_size(1 << 30, self.block)
