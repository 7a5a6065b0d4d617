"""The one exception for what a user can put right.

A bad file, flag, shape or bit width is answered with one line that names the thing, the limit and the way
out. Library code raises `BellboxError` with that line; the command line prints it and exits with 2. Anything
else that escapes is a defect of Bellbox and keeps its traceback.
"""

from __future__ import annotations

import importlib
from types import ModuleType

_MOST_CHARACTERS = 2000


class BellboxError(ValueError):
    """Something the caller can put right; the message is one clear line.

    It stays one where a name or a value in it, read from somebody's file, holds line breaks, control characters or a
    megabyte.
    """

    speaks: bool | None = None
    """Whether, of several processes that train together, this one reports it; None: the first does, if it can."""

    def __init__(self, message: str) -> None:
        if len(message) > _MOST_CHARACTERS:
            half = _MOST_CHARACTERS // 2
            message = f"{message[:half]} ... {message[-half:]}"
        if not message.isprintable():
            message = "".join(char if char.isprintable() else repr(char)[1:-1] for char in message)
        super().__init__(message)


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or say which extra brings it.

    Args:
        module: dotted name to import.
        extra: the extra of this package that installs it.

    Raises:
        BellboxError: when the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or module.split(".")[0] != error.name.split(".")[0]:
            raise
        raise BellboxError(
            f"{module} is not installed; install it with: pip install 'bellbox[{extra}]'"
        ) from error
