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

Of several processes, each writes a shard of its own, and training goes on meanwhile (`bellbox.runs.saver`):

```
checkpoints/step-00000100/
  shard-00000-of-00002.safetensors   pieces of `model/...` and `optimizer/...` (`bellbox.runs.shards`)
  shard-00001-of-00002.safetensors
  state.json
  manifest.json           format version 2; where each piece belongs, as well, and a SHA-256 of its own
```

Which checkpoint is the last and which the best is not written anywhere: it is found by looking, so it cannot
be wrong. The last two are kept, and the best. There is no pickle in any of it. What is no damage, such as the format
of a newer version, is never passed over: going on from an earlier checkpoint would train over it.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from bellbox.errors import BellboxError
from bellbox.runs.shards import Layout, ShardFile, layout_to_json, parse_layout, read_whole, shard_name
from bellbox.utils.files import checksum, describe_file, named, read_json, read_tensors, sha256_file, sync

WHOLE, SHARDED = 1, 2
"""Format versions: two files of tensors, or a shard a rank."""
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
MANIFEST = "manifest.json"
MODEL, OPTIMIZER = "model/", "optimizer/"
STATE = "state.json"
_MANIFEST_LIMIT = 1 << 30
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
    skipped: int = 0
    """Steps that were left out because their loss or gradient was not finite."""
    random: dict[str, Any] = field(default_factory=dict)
    """States of the random generators, as `random_state.capture` gives them."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk that has passed its checks."""

    path: Path
    state: State
    run: dict[str, Any] = field(default_factory=dict)
    """What it belongs to: `config` and `tokenizer` of `save`; empty in those of earlier versions."""
    layout: Layout | None = None
    """Of a sharded one: where each tensor lies. The model's names begin with `MODEL`, others with `OPTIMIZER`."""
    ranks: int = 1
    """Processes that wrote it."""

    @property
    def step(self) -> int:
        """Optimizer steps done when it was written."""
        return self.state.step

    def model_tensors(self) -> dict[str, Tensor]:
        """The model's state dict, on the CPU."""
        if self.layout is not None:
            return self._whole(MODEL)
        return read_tensors(self.path / "model.safetensors")

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizer's state under the names of `optimizer.optimizer_tensors`, on the CPU."""
        if self.layout is not None:
            return self._whole(OPTIMIZER)
        return read_tensors(self.path / "optimizer.safetensors")

    def random_of(self, rank: int) -> dict[str, Any]:
        """The random state that a rank goes on with: its own, or the first one's where there was no such rank.

        Raises:
            BellboxError: it cannot be read.
        """
        if rank == 0 or rank >= self.ranks:
            return self.state.random
        with ShardFile(self.path / shard_name(rank, self.ranks)) as shard:
            try:
                found = json.loads(shard.about["random"])
            except (KeyError, TypeError, ValueError, RecursionError):
                found = None
        if not isinstance(found, dict):
            raise BellboxError(f"{shard.path}: damaged, holds no random state")
        return found

    def _whole(self, prefix: str) -> dict[str, Tensor]:
        layout = self.layout or {}
        found = read_whole(self.path, layout, [name for name in layout if name.startswith(prefix)])
        return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


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

    def at(self, step: int, verified: bool = False) -> Checkpoint:
        """The checkpoint of one step.

        Args:
            step: its number.
            verified: another process has just read all of its files, and found them as they were written.

        Raises:
            BellboxError: there is none, or it is damaged.
        """
        if step not in self.steps():
            have = ", ".join(map(str, self.steps())) or "none"
            raise BellboxError(f"{self.folder}: no checkpoint of step {step}; there are: {have}")
        return open_checkpoint(self.path(step), verified)

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
            self.forget(state.step)
            raise named(error, self.path(state.step)) from None

    def _save(
        self,
        state: State,
        model: dict[str, Tensor],
        optimizer: dict[str, Tensor],
        run: dict[str, Any],
    ) -> Path:
        from safetensors.torch import save_file

        saving = self.begin(state.step)
        save_file(_contiguous(model), saving / FILES[0])
        save_file(_contiguous(optimizer), saving / FILES[1])
        for name in FILES[:2]:
            (saving / name).chmod(0o644)  # safetensors writes for the owner alone
            sync(saving / name)
        files = {name: describe_file(saving / name) for name in FILES[:2]}
        return self.commit(state, {"format_version": WHOLE, "files": files, "run": run})

    def begin(self, step: int) -> Path:
        """A new folder to write the checkpoint of a step into; what a failed save left there is gone."""
        self.folder.mkdir(parents=True, exist_ok=True)
        saving = self.saving(step)
        shutil.rmtree(saving, ignore_errors=True)
        saving.mkdir()
        return saving

    def saving(self, step: int) -> Path:
        """Where the checkpoint of a step is while it is being written."""
        return self.folder / (_SAVING + self.path(step).name)

    def commit_shards(self, state: State, files: dict[str, Any], layout: Layout, run: dict[str, Any]) -> Path:
        """`commit`, of a checkpoint in shards, which are on the disk.

        Args:
            state: of the first rank.
            files: `bytes` and `sha256` of each shard.
            layout: where each tensor lies in them.
            run: as of `save`.
        """
        shards = sorted(files)
        manifest = {
            "format_version": SHARDED,
            "files": {name: files[name] for name in shards},
            "tensors": layout_to_json(layout, shards),
            "run": run,
        }
        return self.commit(state, manifest, signed=True)

    def commit(self, state: State, manifest: dict[str, Any], signed: bool = False) -> Path:
        """Have the checkpoint that lies in `saving`, and whose tensors are on the disk, take its place.

        Only when it is there for good are those dropped that are no longer wanted.

        Args:
            state: is written beside the tensors.
            manifest: the file of that name, with all other files in it already.
            signed: whether it gets a checksum of its own.
        """
        target, saving = self.path(state.step), self.saving(state.step)
        values = {**vars(state)}
        if not state.skipped:
            del values["skipped"]  # versions before there was a choice read it too
        (saving / STATE).write_text(json.dumps(values, indent=1), encoding="utf-8")
        manifest["files"][STATE] = describe_file(saving / STATE)
        if signed:
            manifest["sha256"] = checksum(manifest)
        indent = None if "tensors" in manifest else 1
        (saving / MANIFEST).write_text(json.dumps(manifest, indent=indent), encoding="utf-8")
        for name in (STATE, MANIFEST):
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

    def forget(self, step: int) -> None:
        """Remove what a failed save of a step has left."""
        shutil.rmtree(self.saving(step), ignore_errors=True)

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


def open_checkpoint(path: Path, verified: bool = False) -> Checkpoint:
    """Check a checkpoint folder against its manifest.

    Args:
        path: of the folder.
        verified: whether the files' checksums have been compared already.

    Raises:
        CheckpointRefusedError: a newer format, or the folder's name is another step's.
        BellboxError: a file is missing, has other bytes than were written, or an unknown format.
    """
    manifest = read_json(path / MANIFEST, _MANIFEST_LIMIT)
    version = manifest.get("format_version")
    if isinstance(version, int) and version > SHARDED:
        raise CheckpointRefusedError(
            f"{path}: checkpoint format {version} is of a newer bellbox, this one reads up to {SHARDED}; "
            "install that version, or choose another checkpoint or folder"
        )
    if version not in (WHOLE, SHARDED) or isinstance(version, bool):
        raise BellboxError(
            f"{path}: checkpoint format {version!r}, this version of bellbox reads {WHOLE} and {SHARDED}"
        )
    files = manifest.get("files")
    wanted = list(FILES) if version == WHOLE else _names_of_shards(files)
    if not isinstance(files, dict) or sorted(files) != sorted(wanted):
        raise BellboxError(f"{path / MANIFEST}: must list exactly {', '.join(wanted)}")
    if version == SHARDED and checksum(manifest) != manifest.get("sha256"):
        raise BellboxError(f"{path / MANIFEST}: damaged, its SHA-256 is not the one in it")
    for name in files:
        _check_file(path / name, files[name], verified)
    layout = None
    if version == SHARDED:
        shards = sorted(set(files) - {STATE})
        layout = parse_layout(manifest.get("tensors"), shards, path / MANIFEST)
        _refuse_more_than_there_is(layout, shards, path)
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
    return Checkpoint(path, state, run, layout, len(files) - 1 if layout is not None else 1)


def _names_of_shards(files: object) -> list[str]:
    """What a checkpoint in as many shards as are listed must list."""
    ranks = max(1, len(files) - 1) if isinstance(files, dict) else 1
    return [*(shard_name(rank, ranks) for rank in range(ranks)), STATE]


def _check_file(file: Path, stated: object, verified: bool) -> None:
    if not file.is_file():
        raise BellboxError(f"{file}: missing from the checkpoint")
    if not isinstance(stated, dict) or not (verified or sha256_file(file) == stated.get("sha256")):
        raise BellboxError(f"{file}: damaged, its SHA-256 is not the one in {MANIFEST}")


def _refuse_more_than_there_is(layout: Layout, shards: list[str], path: Path) -> None:
    """No memory is asked for that the files cannot fill."""
    stated = sum(tensor.dtype.itemsize * math.prod(tensor.shape) for tensor in layout.values())
    if stated > sum((path / name).stat().st_size for name in shards):
        raise BellboxError(f"{path / MANIFEST}: damaged, describes more than its files hold")


def _step_of(folder: Path) -> int | None:
    """The step that a folder is named for; None for any other folder."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match and folder.name == f"step-{int(match[1]):08d}" else None


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
