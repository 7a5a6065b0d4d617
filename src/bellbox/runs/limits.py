"""From where to where a number of a configuration may go: said once, at its field.

`refuse_beyond` holds a configuration to it, whoever made it, and the JSON schema for editors says it
(`bellbox schema`). Pydantic reads the values and leaves the limits alone: what it would say of them is
not what a library caller is told.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

from bellbox.errors import BellboxError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """The metadata of an annotated field. A float is finite besides."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    says: str | None = None
    """What a message calls it, where that is not built from the numbers."""

    def hold(self, value: float) -> bool:
        """Whether a value lies within; NaN never does."""
        return (
            (not isinstance(value, float) or math.isfinite(value))
            and (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    def describe(self, value: object) -> str:
        """What must be, such as "in (0, 1]", for a message about this value."""
        if self.says is not None:
            return self.says
        low, high = (self.ge if self.gt is None else self.gt), (self.le if self.lt is None else self.lt)
        if high is None:
            least = f"at least {low}" if self.gt is None else f"above {low}"
            return f"{least} and finite" if isinstance(value, float) else least
        if self.gt is None and self.lt is None:
            return f"from {low} to {high}"
        if self.gt is not None and self.lt is not None:
            return f"between {low} and {high}"
        return f"in {'[' if self.gt is None else '('}{low}, {high}{']' if self.lt is None else ')'}"

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        schema = handler(core)
        words = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
        limits = {word: getattr(self, name) for name, word in words.items()}
        return {**schema, **{word: value for word, value in limits.items() if value is not None}}


def refuse_beyond(config: Any) -> None:
    """Refuse a number of a configuration, or of one of its sections, that is beyond its limits.

    Args:
        config: a dataclass whose fields are annotated with `Limits`.

    Raises:
        BellboxError: naming the key, its value and the limit.
    """
    for name, value, limits in _limited(config, ""):
        numbers = value if isinstance(value, list | tuple) else (value,)
        if not all(limits.hold(each) for each in numbers if isinstance(each, int | float)):
            raise BellboxError(f"{name} is {value}, must be {limits.describe(numbers[0])}")


def _limited(section: Any, prefix: str) -> Iterator[tuple[str, Any, Limits]]:
    for name, limits in _limits_by_field(type(section)).items():
        value = getattr(section, name)
        if dataclasses.is_dataclass(value):
            yield from _limited(value, f"{prefix}{name}.")
        else:
            yield from ((prefix + name, value, each) for each in limits)


@functools.cache
def _limits_by_field(section: type) -> dict[str, list[Limits]]:
    hints = get_type_hints(section, include_extras=True)
    return {entry.name: _limits_of(hints[entry.name]) for entry in dataclasses.fields(section)}


def _limits_of(hint: Any) -> list[Limits]:
    """Those of a type, or of what it is a union or a list of; the same one only once."""
    found = [each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Limits)]
    return list(dict.fromkeys(found + [each for part in get_args(hint) for each in _limits_of(part)]))
