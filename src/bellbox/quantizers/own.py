"""Methods of one's own on the command line: modules that a user names are imported, and their names kept.

A class registers itself when its module is imported, so all that a process needs is that import: `--import MODULE`, or
an entry point of the group `bellbox.quantizers` in an installed package (`registry.py`). No file of a model or a run
has anything imported: a run only writes down which modules its methods came from, to name them where they are missing.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Iterable

from bellbox.errors import BellboxError
from bellbox.quantizers.registry import METHODS


def import_modules(names: Iterable[str]) -> None:
    """Import modules by dotted name, as `python -m` finds them: on the Python path, or in the current folder.

    Raises:
        BellboxError: no such module, the name of a file, or one whose code fails.
    """
    for name in names:
        if name.endswith(".py") or os.sep in name or not all(part.isidentifier() for part in name.split(".")):
            stem = os.path.basename(name).removesuffix(".py")
            raise BellboxError(
                f"--import {name}: takes the name of a module, not of a file: --import {stem or 'MODULE'}, from its "
                "folder or with that on PYTHONPATH"
            )
        if "" not in sys.path and os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # last, so that nothing there takes the place of another module
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise BellboxError(
                    f"--import {name}: it imports {error.name}, which is not installed"
                ) from None
            raise BellboxError(
                f"--import {name}: no module of that name in {os.getcwd()} or on the Python path"
            ) from None
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            raise BellboxError(
                f"--import {name}: {type(error).__name__}: {error} ({last.filename}, line {last.lineno})"
            ) from error


def modules_of(methods: Iterable[str]) -> list[str]:
    """The modules outside of Bellbox that methods come from, in order of their names."""
    found = {METHODS[method].__module__ for method in methods if method in METHODS}
    return sorted(name for name in found if name.split(".")[0] != "bellbox")
