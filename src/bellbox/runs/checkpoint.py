"""Checkpoints that survive a kill at any moment.

A checkpoint is a folder that is either whole or not there: it is written under another name, every file and
the folder are fsynced, and only then is it renamed. A manifest with the SHA-256 of each file lets a later run
tell a damaged checkpoint (a bad disk, a truncated copy) from a good one and fall back to the one before it.

```
checkpoints/step-00000100/
  model.safetensors       the model's state dict, each shared tensor once
  optimizer.safetensors   the optimizers' moments, `<parameter>/exp_avg` and so on; the norms that CEWT keeps
  state.json              step, tokens, best, random states
  manifest.json           format version, bytes and SHA-256 of the other three; configuration and tokenizer of the run
```

Which checkpoint is the last and which the best is not written anywhere: it is found by looking, so it cannot
be wrong. The last two are kept, and the best. There is no pickle in any of it. What is no damage, such as the format
of a newer version, is never passed over: going on from an earlier checkpoint would train over it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from bellbox.errors import BellboxError
from bellbox.utils.files import named, read_json, read_tensors, sha256_file, sync

FORMAT_VERSION = 1
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
MANIFEST = "manifest.json"
_STEP = re.compile(r"step-(\d{8,})")
_SAVING, _OLD, _DAMAGED = ".saving-", ".old-", ".damaged-"


class CheckpointWarning(UserWarning):
    """A checkpoint had to be passed over."""


class CheckpointRefusedError(BellboxError):
    """A checkpoint that is whole, but not one to be taken for what its place says."""


@dataclass
class State:
    """What a run is, besides its tensors."""

    step: int
    """Optimizer steps done."""
    tokens: int
    """Training tokens seen."""
    seconds: float
    """Wall-clock time of the run so far; differs between equal runs."""
    evaluated_step: int = 0
    """The last step that was validated."""
    loss: float | None = None
    """Validation loss of exactly this step in nats per token, where it was validated."""
    best_loss: float | None = None
    """Lowest validation loss of the phase so far."""
    phase: int = 0
    """Number of the phase that the model is in; losses of different phases are not compared."""
    data: str = ""
    """Checksum of the dataset's manifest."""
    teacher: str = ""
    """Checksum of the teacher, where there is one."""
    random: dict[str, Any] = field(default_factory=dict)
    """States of the random generators, as `random_state.capture` gives them."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk that has passed its checks."""

    path: Path
    state: State
    run: dict[str, Any] = field(default_factory=dict)
    """What it belongs to: `config` and `tokenizer` of `save`; empty in those of earlier versions."""

    @property
    def step(self) -> int:
        """Optimizer steps done when it was written."""
        return self.state.step

    def model_tensors(self) -> dict[str, Tensor]:
        """The model's state dict, on the CPU."""
        return _load_tensors(self.path / "model.safetensors")

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizer's state under the names of `optimizer.optimizer_tensors`, on the CPU."""
        return _load_tensors(self.path / "optimizer.safetensors")


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: `RUN/checkpoints`; made by the first save.
        keep: how many of the newest to keep, besides the best.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 2):
        self.folder = Path(folder)
        self.keep = keep

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies, or would."""
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps that have a folder, ascending; nothing is said about the folders' health."""
        if not self.folder.is_dir():
            return []
        found = (_step_of(entry) for entry in self.folder.iterdir() if entry.is_dir())
        return sorted(step for step in found if step is not None)

    def last(self) -> Checkpoint | None:
        """The newest sound checkpoint; damaged ones are passed over with a `CheckpointWarning`."""
        return self._first_sound(reversed(self.steps()))

    def best(self) -> Checkpoint | None:
        """The sound checkpoint of the latest phase with the lowest validation loss; the newest, where none was
        validated."""
        scored = self._scored(self.steps())
        return self._first_sound(step for _, step in scored) if scored else self.last()

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of one step.

        Raises:
            BellboxError: there is none, or it is damaged.
        """
        if step not in self.steps():
            have = ", ".join(map(str, self.steps())) or "none"
            raise BellboxError(f"{self.folder}: no checkpoint of step {step}; there are: {have}")
        return open_checkpoint(self.path(step))

    def save(
        self,
        state: State,
        model: dict[str, Tensor],
        optimizer: dict[str, Tensor],
        run: dict[str, Any] | None = None,
    ) -> Path:
        """Write a checkpoint, then drop those that are no longer wanted.

        Args:
            state: its `step` names the folder. An older folder of the same step is replaced.
            model: tensors that share no memory with each other.
            optimizer: likewise.
            run: what binds it to its run, see `bellbox.runs.binding`.

        Raises:
            OSError: it cannot be written, such as on a full disk; the checkpoints before it stay as they are.
        """
        from safetensors import SafetensorError

        try:
            return self._save(state, model, optimizer, run or {})
        except (OSError, SafetensorError) as error:
            shutil.rmtree(self.folder / (_SAVING + self.path(state.step).name), ignore_errors=True)
            raise named(error, self.path(state.step)) from None

    def _save(
        self,
        state: State,
        model: dict[str, Tensor],
        optimizer: dict[str, Tensor],
        run: dict[str, Any],
    ) -> Path:
        from safetensors.torch import save_file

        target = self.path(state.step)
        self.folder.mkdir(parents=True, exist_ok=True)
        saving = self.folder / (_SAVING + target.name)
        shutil.rmtree(saving, ignore_errors=True)
        saving.mkdir()
        save_file(_contiguous(model), saving / FILES[0])
        save_file(_contiguous(optimizer), saving / FILES[1])
        (saving / FILES[2]).write_text(json.dumps(vars(state), indent=1), encoding="utf-8")
        manifest = {
            "format_version": FORMAT_VERSION,
            "files": {
                name: {"bytes": (saving / name).stat().st_size, "sha256": sha256_file(saving / name)}
                for name in FILES
            },
            "run": run,
        }
        (saving / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for name in (*FILES, MANIFEST):
            (saving / name).chmod(0o644)  # safetensors writes for the owner alone
            sync(saving / name)
        sync(saving)
        old = self.folder / (_OLD + target.name)
        if target.exists():
            target.rename(old)
        saving.rename(target)
        sync(self.folder)
        shutil.rmtree(old, ignore_errors=True)
        self._drop_unwanted()
        return target

    def clean(self) -> None:
        """Clear what a killed save left behind. To be called once, before the run goes on."""
        if not self.folder.is_dir():
            return
        for entry in list(self.folder.iterdir()):
            if entry.name.startswith(_OLD):
                target = self.folder / entry.name.removeprefix(_OLD)
                # Killed between the two renames of a replacement: the old one is still the good one.
                if not target.exists():
                    entry.rename(target)
                    continue
            if entry.name.startswith((_OLD, _SAVING)):
                shutil.rmtree(entry)

    def set_aside_after(self, step: int) -> None:
        """Rename the checkpoints after `step`, which were found damaged, so that they never count again."""
        for later in [s for s in self.steps() if s > step]:
            aside = self.folder / (_DAMAGED + self.path(later).name)
            shutil.rmtree(aside, ignore_errors=True)
            self.path(later).rename(aside)

    def _first_sound(self, steps: Any) -> Checkpoint | None:
        damaged: list[str] = []
        found: Checkpoint | None = None
        for step in steps:
            try:
                found = open_checkpoint(self.path(step))
                break
            except CheckpointRefusedError:
                raise
            except BellboxError as error:
                damaged.append(str(error))
        if damaged:
            taken = "no other one can be read" if found is None else f"{found.path} is taken in its place"
            warnings.warn(f"passed over: {'; '.join(damaged)}; {taken}", CheckpointWarning, stacklevel=4)
        return found

    def _scored(self, steps: list[int]) -> list[tuple[tuple[int, float], int]]:
        """Validated steps with what to sort them by, the best first: the latest phase, then the lowest loss."""
        scored = [(score, step) for step in steps if (score := self._score(step)) is not None]
        return sorted(scored)

    def _score(self, step: int) -> tuple[int, float] | None:
        try:
            state = read_json(self.path(step) / "state.json")
            loss, phase = state["loss"], state.get("phase", 0)
        except (BellboxError, KeyError):
            return None
        return (-phase, loss) if isinstance(loss, float) and isinstance(phase, int) else None

    def _drop_unwanted(self) -> None:
        steps = self.steps()
        wanted = {*steps[-self.keep :], *(step for _, step in self._scored(steps)[:1])}
        for step in steps:
            if step not in wanted:
                # Renamed first: a kill in the middle of the removal must not leave half a checkpoint.
                doomed = self.folder / (_SAVING + self.path(step).name)
                self.path(step).rename(doomed)
                shutil.rmtree(doomed)


def open_checkpoint(path: Path) -> Checkpoint:
    """Check a checkpoint folder against its manifest.

    Raises:
        CheckpointRefusedError: a newer format, or the folder's name is another step's.
        BellboxError: a file is missing, has other bytes than were written, or an unknown format.
    """
    manifest = read_json(path / MANIFEST)
    version = manifest.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointRefusedError(
            f"{path}: checkpoint format {version} is of a newer bellbox, this one reads up to {FORMAT_VERSION}; "
            "install that version, or choose another checkpoint or folder"
        )
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise BellboxError(
            f"{path}: checkpoint format {version!r}, this version of bellbox reads {FORMAT_VERSION}"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or sorted(files) != sorted(FILES):
        raise BellboxError(f"{path / MANIFEST}: must list exactly {', '.join(FILES)}")
    for name in FILES:
        file, entry = path / name, files[name]
        if not file.is_file():
            raise BellboxError(f"{file}: missing from the checkpoint")
        if not isinstance(entry, dict) or sha256_file(file) != entry.get("sha256"):
            raise BellboxError(f"{file}: damaged, its SHA-256 is not the one in {MANIFEST}")
    values = read_json(path / "state.json")
    try:
        state = State(**values)
    except TypeError:
        raise BellboxError(f"{path / 'state.json'}: must hold {', '.join(State.__annotations__)}") from None
    run = manifest.get("run", {})
    if not isinstance(run, dict):
        raise BellboxError(f"{path / MANIFEST}: 'run' must be an object")
    named = _step_of(path)
    if named is not None and state.step != named:
        raise CheckpointRefusedError(
            f"{path}: holds the checkpoint of step {state.step}, not of the step that the folder is named for; give it "
            "its name back"
        )
    return Checkpoint(path, state, run)


def _step_of(folder: Path) -> int | None:
    """The step that a folder is named for; None for any other folder."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match and folder.name == f"step-{int(match[1]):08d}" else None


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _load_tensors(path: Path) -> dict[str, Tensor]:
    return read_tensors(path)
