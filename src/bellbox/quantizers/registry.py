"""Methods by name: each class names itself as it is defined, a stranger's too.

An installed package may bring one by an entry point of the group `bellbox.quantizers`; it is imported when somebody
asks for the method.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from typing import Any

from bellbox.errors import BellboxError

ENTRY_POINTS = "bellbox.quantizers"
"""Group of the entry points that bring methods: `name = "package.module:Class"`."""
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


@functools.cache
def _installed() -> dict[str, Any]:
    """Method name -> entry point of an installed package, which says where its class is."""
    from importlib.metadata import entry_points

    return {each.name: each for each in entry_points(group=ENTRY_POINTS)}


def is_known(method: str) -> bool:
    """Whether there is a method of this name; one that an installed package brings is imported.

    Raises:
        BellboxError: the package has no such method after all.
    """
    if method not in METHODS and method in _installed():
        entry = _installed()[method]
        try:
            entry.load()
        except Exception as error:
            raise BellboxError(
                f"the entry point {method} = {entry.value} of {ENTRY_POINTS} cannot be loaded: "
                f"{type(error).__name__}: {error}"
            ) from error
        if method not in METHODS:
            raise BellboxError(
                f"the entry point {method} = {entry.value} of {ENTRY_POINTS} brings no method called {method}; its "
                "name must be the `method` of a class there"
            )
    return method in METHODS


def check_method(method: str, options: dict[str, bool | float | str]) -> type[Any]:
    """The class of a method, its options read for a trial.

    Args:
        method: its name, one of `METHODS` or of an installed package.
        options: of the method, by name.

    Raises:
        BellboxError: an unknown method or option, or an option of the wrong type.

    Examples:
        >>> from bellbox.quantizers import check_method
        >>> check_method("bbq", {"gamma": "frozen"}).__name__
        'BBQ'
    """
    if not is_known(method):
        known = ", ".join(dict.fromkeys([*METHODS, *_installed()]))
        raise BellboxError(
            f"no quantization method {method!r}; there are: {known}; one of your own must be imported first "
            "(--import MODULE)"
        )
    read_options(method, METHODS[method].Options, options)
    return METHODS[method]
