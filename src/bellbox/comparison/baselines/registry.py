"""The rows by name, in the order of the table."""

from __future__ import annotations

from pathlib import Path

from bellbox.comparison.baselines import autoround, bitsandbytes, gptq, hqq, torchao
from bellbox.comparison.baselines.baseline import Baseline
from bellbox.comparison.baselines.job import Job
from bellbox.comparison.baselines.own import OWN, given
from bellbox.errors import BellboxError

_PACKAGES = (gptq, autoround, hqq, bitsandbytes, torchao)
BASELINES: dict[str, Baseline] = {
    each.name: each for each in (*OWN, *(module.BASELINE for module in _PACKAGES))
}
_GIVEN = "packed:"


def names() -> tuple[str, ...]:
    """Of all rows that need no model of the user's."""
    return tuple(BASELINES)


def baseline_of(name: str, job: Job) -> Baseline:
    """A row by its name; `packed:FOLDER` is a packed or binarized model of the user's.

    Raises:
        BellboxError: there is none, or the folder is no such model.
    """
    if name.startswith(_GIVEN):
        return given(Path(name.removeprefix(_GIVEN)), job)
    if name not in BASELINES:
        raise BellboxError(f"no row '{name}'; there are: {', '.join(BASELINES)}")
    return BASELINES[name]
