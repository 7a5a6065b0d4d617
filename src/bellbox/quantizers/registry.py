"""Methods by name: each class names itself as it is defined, a stranger's too."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from typing import Any

from bellbox.errors import BellboxError

METHODS: dict[str, type[Any]] = {}
"""Method name -> class of `bellbox.quantizers.base.Quantizer`. A subclass with a `method` of its own adds itself."""


@dataclass(frozen=True)
class NoOptions:
    """Of a method that has none. Each method names its own in such a class, with types and defaults."""


@functools.cache
def _reader(options: type) -> Any:
    from pydantic import ConfigDict, TypeAdapter, with_config

    return TypeAdapter(with_config(ConfigDict(extra="forbid"))(options))


def read_options(method: str, kind: type, values: dict[str, Any]) -> Any:
    """A method's options from plain data.

    Raises:
        BellboxError: an unknown option or a value of the wrong type, by name.
    """
    from pydantic import ValidationError

    try:
        return _reader(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        known = ", ".join(each.name for each in fields(kind)) or "none"
        raise BellboxError(f"option {where!r} of {method}: {first['msg']} (options: {known})") from None


def check_method(method: str, options: dict[str, bool | float | str]) -> type[Any]:
    """The class of a method, its options read for a trial.

    Raises:
        BellboxError: an unknown method or option, or an option of the wrong type.
    """
    if method not in METHODS:
        raise BellboxError(f"no quantization method {method!r}; there are: {', '.join(METHODS)}")
    read_options(method, METHODS[method].Options, options)
    return METHODS[method]
