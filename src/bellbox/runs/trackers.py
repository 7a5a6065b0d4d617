"""Curves where people look: TensorBoard, Weights & Biases, MLflow, Aim behind one interface.

`metrics.jsonl` is the record of a run; a tracker shows the same numbers elsewhere. So a tracker may fail, at any moment
and for whatever reason: one line says so, and the run goes on without it. What is asked for and not installed is
refused before the run begins. Trackers are rank 0's alone.

Each goes where it is configured to by its own environment (WANDB_MODE, MLFLOW_TRACKING_URI, AIM_REPO). Without that,
MLflow and Aim write into the run's folder, and W&B does what `wandb login` says. A run that goes on appears as the same
run there: `trackers.json` in its folder keeps the names that they gave it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from bellbox.errors import BellboxError, require
from bellbox.utils.files import one_line, read_json, write_text

PROJECT = "bellbox"
NAMES_FILE = "trackers.json"


class Tracker(ABC):
    """Shows the numbers of one run."""

    name: ClassVar[str]

    @abstractmethod
    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of one step, all finite."""

    def flush(self) -> None:  # noqa: B027 (most have nothing to hold back)
        """Have them on the disk."""

    @abstractmethod
    def close(self) -> None:
        """The run has ended or was stopped."""


class TensorBoard(Tracker):
    """Event files under `tensorboard/`."""

    name = "tensorboard"

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Event files of a killed run stay; purge_step tells TensorBoard to forget what they hold from there on.
        self._writer = SummaryWriter(
            str(folder / "tensorboard"), purge_step=step + 1 if step else None, flush_secs=30
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """See `Tracker`."""
        self._writer.flush()

    def close(self) -> None:
        """See `Tracker`."""
        self._writer.close()


class WandB(Tracker):
    """A run of Weights & Biases."""

    name = "wandb"

    def __init__(self, folder: Path, names: dict[str, str], config: Mapping[str, Any]) -> None:
        wandb = require("wandb", "wandb")
        settings = wandb.Settings(silent=True, console="off")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.name,
            id=names.get(self.name),
            resume="allow",
            dir=str(folder),
            config=dict(config),
            settings=settings,
        )
        names[self.name] = self._run.id
        # Steps of ours in place of its count of calls, which may not go back when a run does.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        self._run.log({**values, "step": step})

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()


class MLflow(Tracker):
    """A run of MLflow, in a database in the run's folder where no server is named."""

    name = "mlflow"
    _MOST = 500
    """Metrics that a server takes at once; it refuses 1,001."""

    def __init__(self, folder: Path, names: dict[str, str], config: Mapping[str, Any]) -> None:
        self._metric: Any = require("mlflow.entities", "mlflow").Metric
        place = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.absolute() / 'mlflow.db'}"
        self._client: Any = require("mlflow.tracking", "mlflow").MlflowClient(place)
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(experiment)
        number = self._client.create_experiment(experiment) if found is None else found.experiment_id
        if self.name not in names:
            names[self.name] = self._client.create_run(number, run_name=folder.name).info.run_id
            for key, value in _flat(config).items():
                self._client.log_param(names[self.name], key, str(value)[:500])
        self._id = names[self.name]

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        now = int(time.time() * 1000)
        metrics = [self._metric(name, value, now, step) for name, value in values.items()]
        for first in range(0, len(metrics), self._MOST):
            self._client.log_batch(self._id, metrics=metrics[first : first + self._MOST])

    def close(self) -> None:
        """See `Tracker`."""
        self._client.set_terminated(self._id)


class Aim(Tracker):
    """A run of Aim, in the repository of AIM_REPO or one in the run's folder."""

    name = "aim"

    def __init__(self, folder: Path, names: dict[str, str], config: Mapping[str, Any]) -> None:
        aim = require("aim", "aim")
        options = {
            "repo": os.environ.get("AIM_REPO") or str(folder),
            "experiment": PROJECT,
            "system_tracking_interval": None,
            "capture_terminal_logs": False,
        }
        self._run = aim.Run(names.get(self.name), **options)
        self._run.name = folder.name
        self._run["config"] = json.loads(json.dumps(config))
        names[self.name] = self._run.hash

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        for name, value in values.items():
            self._run.track(value, name=name, step=step)

    def close(self) -> None:
        """See `Tracker`."""
        self._run.close()


_OTHERS: dict[str, type[WandB] | type[MLflow] | type[Aim]] = {
    each.name: each for each in (WandB, MLflow, Aim)
}
KNOWN = tuple(_OTHERS)


def check_installed(names: Sequence[str]) -> None:
    """Refuse trackers whose library is missing.

    Raises:
        BellboxError: one is, or is none of Bellbox's.
    """
    for name in names:
        if name not in _OTHERS:
            raise BellboxError(f"trackers: no tracker {name!r}; there are: {', '.join(KNOWN)}")
        require(name, name)


def is_first_rank() -> bool:
    """Whether this process is rank 0, or the only one."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


class Trackers:
    """All trackers of a run. Nothing that they do wrong is the run's.

    Args:
        folder: of the run.
        step: that it goes on from.
        tensorboard: whether to write event files.
        names: further trackers.
        config: of the run, for those that show it.

    Raises:
        BellboxError: one of them is not installed.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        tensorboard: bool,
        names: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._active: list[Tracker] = []
        if not is_first_rank():
            return
        check_installed(names)
        if tensorboard:
            try:
                import tensorboard as _  # noqa: F401 (torch's own message would not say how to go on without)
            except ImportError:
                raise BellboxError(
                    "tensorboard is not installed; pip install 'bellbox[cli]', or turn it off with --no-tensorboard"
                ) from None
            self._open("tensorboard", lambda: TensorBoard(folder, step))
        given: dict[str, str] = {}
        with suppress(BellboxError):  # damaged: they get a new run, and ours goes on
            if (folder / NAMES_FILE).is_file():
                given = {key: str(value) for key, value in read_json(folder / NAMES_FILE).items()}
        before = dict(given)
        for name in names:
            kind = _OTHERS[name]
            self._open(name, lambda kind=kind: kind(folder, given, config or {}))
        if given != before:
            write_text(folder / NAMES_FILE, json.dumps(given) + "\n")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Show the numbers of one step."""
        self._each(lambda tracker: tracker.log(values, step))

    def flush(self) -> None:
        """Before a checkpoint."""
        self._each(lambda tracker: tracker.flush())

    def close(self) -> None:
        """The run has ended or was stopped."""
        self._each(lambda tracker: tracker.close())
        self._active = []

    def _open(self, name: str, make: Callable[[], Tracker]) -> None:
        try:
            self._active.append(make())
        except Exception as error:
            _say(name, error)

    def _each(self, do: Callable[[Tracker], None]) -> None:
        for tracker in list(self._active):
            try:
                do(tracker)
            except Exception as error:
                self._active.remove(tracker)
                _say(tracker.name, error)


def _say(name: str, error: Exception) -> None:
    print(
        f"bellbox: warning: {name} failed and is left out from here on; the run and metrics.jsonl go on: "
        f"{type(error).__name__}: {one_line(error)}",
        file=sys.stderr,
        flush=True,
    )


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
