"""A Hugging Face model binarized block by block, in the memory of one block and the calibration's hidden states.

For each block: read its weights, run the calibration text through it while summing what its layers read, transform and
binarize its layers, run the text through what it has become, write it, forget it. So a later block learns on what the
earlier ones will really give it (their inputs not yet rounded: one set of weights serves every width of activations).

The work stands in `NAME.unfinished` beside the folder to be. A block counts as done when its file lies there and, by
one rename after it, the hidden states that follow it, with the checksums of all that is done. A kill at any moment
costs the block that was in work.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from bellbox.data.tokenizer import Tokenizer
from bellbox.errors import BellboxError
from bellbox.formats.binarized import (
    CONFIG,
    RECORD,
    REST,
    TOKENIZER,
    block_file,
    is_binarized,
    narrowed,
    write_config,
)
from bellbox.models.blocks import Runner, block_name, embed, filled_block, groups_of
from bellbox.models.hf import HFFolder
from bellbox.nn import replace_layer
from bellbox.ptq.calibration import calibration_tokens
from bellbox.ptq.group import Settings, binarize_group
from bellbox.ptq.hessian import InputStatistics
from bellbox.ptq.memory import working_memory
from bellbox.ptq.progress import BlockProgress
from bellbox.utils.files import (
    describe_file,
    lock,
    put_in_place,
    read_json,
    refuse_foreign,
    sha256_file,
    write_tensors,
    write_text,
)

_HIDDEN, _SETTINGS = "hidden.safetensors", "settings.json"


@dataclass(frozen=True)
class Job:
    """What to binarize, and how."""

    model: Path
    """A Hugging Face folder."""
    out: Path
    """The folder to make; an earlier binarized model there is replaced at the end."""
    calibration: Path
    """Text to fit on."""
    settings: Settings
    """How."""
    samples: int = 128
    """Calibration sequences."""
    context: int = 2048
    """Tokens of each; the model's own context where that is shorter."""
    batch: int = 4
    """Sequences in one forward."""


def binarize_folder(job: Job, show: bool = True) -> dict[str, Any]:
    """Binarize a model; goes on where an earlier start of the same job was stopped.

    Args:
        job: what to do.
        show: whether to print progress.

    Returns:
        the record that also lies in the folder as `ptq.json`: settings, and of each block errors, steps and seconds.

    Raises:
        BellboxError: no such model, too little calibration text, a singular Hessian, a folder that holds something
            else or cannot be written, or an unfinished one that was begun with other settings or another model.
    """
    refuse_foreign(job.out, replaces=CONFIG)
    if (job.out / CONFIG).is_file() and not is_binarized(job.out):
        raise BellboxError(f"{job.out}: the folder holds something else; name a new or empty folder")
    source = HFFolder(job.model)
    context = min(job.context, source.config.max_position_embeddings)
    tokenizer = _tokenizer(job.model)
    tokens = calibration_tokens(tokenizer, job.calibration, job.samples, context)
    if int(tokens.max()) >= source.config.vocab_size:
        raise BellboxError(
            f"{job.model}: its tokenizer has more entries than its vocabulary of {source.config.vocab_size}"
        )
    work = job.out.absolute().with_name(job.out.name + ".unfinished")
    with _claimed(work):
        described = _described(job, context, tokens, tokenizer)
        _same_job(work, described)
        _write_json(work / _SETTINGS, described)
        run = _Run(job, source, work, tokens)
        with BlockProgress(source.config.num_hidden_layers, run.done, show) as progress:
            estimate = working_memory(source.config, job.samples, context, job.batch)
            progress.note(
                f"{'going on' if run.done else 'binarizing'} {job.model}: {job.settings.method} "
                f"({job.settings.variant}), {job.samples} samples of {context} tokens, about "
                f"{estimate / 2**30:.2f} GiB beside Python and torch"
            )
            for number in range(run.done, source.config.num_hidden_layers):
                progress.done(run.block(number, progress))
        return _finish(job, source, work, described, tokenizer)


def _claimed(work: Path) -> ExitStack:
    """Make the folder, and keep others out of it."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        return lock(work, "binarizing into")
    except OSError as error:
        raise BellboxError(f"{work}: cannot be written ({error.strerror})") from None


class _Run:
    """The hidden states between the blocks, and what is done to the next block."""

    def __init__(self, job: Job, source: HFFolder, work: Path, tokens: Tensor) -> None:
        self.job, self.source, self.work = job, source, work
        self.run = Runner(source.config)
        self.done, hidden, self.files = _restored(work)
        if hidden is None:
            rest = source.rest()
            hidden = embed(source.config, rest, tokens)
            write_tensors(work / REST, {name: narrowed(value) for name, value in rest.items()})
            self.files = {REST: describe_file(work / REST)}
        self.hidden = hidden

    def block(self, number: int, progress: BlockProgress) -> dict[str, Any]:
        """Binarize one block, and have it on the disk."""
        begun, config, settings = time.monotonic(), self.source.config, self.job.settings
        name = block_name(config, number)
        block = filled_block(config, number, self.source.block(number))
        groups = groups_of(config)
        progress.now("reading the inputs")
        seen = self._inputs_of(block, [group.layers[0] for group in groups])
        record: dict[str, Any] = {"block": number, "layers": {}, "groups": []}
        for group in groups:
            progress.now(group.layers[0])
            made, learned = binarize_group(block, group, seen.pop(group.layers[0]), settings, name)
            for layer, (new, error) in made.items():
                replace_layer(block, block.get_submodule(layer), new)
                record["layers"][layer] = {"error": error}
            record["groups"] += [] if learned is None else [learned]
        progress.now("running it")
        for part in self._parts():
            part.copy_(self.run(block, part))
        if not bool(torch.isfinite(self.hidden).all()):
            raise BellboxError(
                f"{name}: its outputs on the calibration text are not finite; look at the model's weights"
            )
        record["seconds"] = time.monotonic() - begun
        tensors = {f"{name}.{key}": value for key, value in block.state_dict().items()}
        write_tensors(self.work / block_file(number), {key: _stored(value) for key, value in tensors.items()})
        _write_json(self.work / _record_file(number), record)
        for file in (block_file(number), _record_file(number)):
            self.files[file] = describe_file(self.work / file)
        done = {"done": str(number + 1), "files": json.dumps(self.files), "sha256": _digest(self.hidden)}
        write_tensors(self.work / _HIDDEN, {"hidden": self.hidden}, done)
        return record

    def _parts(self) -> tuple[Tensor, ...]:
        return self.hidden.split(self.job.batch)

    def _inputs_of(self, block: nn.Module, layers: list[str]) -> dict[str, InputStatistics]:
        seen: dict[str, InputStatistics] = {}
        hooks = []
        for layer in layers:
            module = block.get_submodule(layer)
            assert isinstance(module, nn.Linear)
            statistics = seen[layer] = InputStatistics(module.in_features)
            hooks.append(module.register_forward_pre_hook(_adding_to(statistics)))
        for part in self._parts():
            self.run(block, part)
        for hook in hooks:
            hook.remove()
        return seen


def _adding_to(statistics: InputStatistics) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda _, inputs: statistics.add(inputs[0])


def _restored(work: Path) -> tuple[int, Tensor | None, dict[str, Any]]:
    """Blocks done, the hidden states after them (None where none is), and the files that were written for them."""
    path = work / _HIDDEN
    if not path.is_file():
        return 0, None, {}
    try:
        with safe_open(path, framework="pt") as file:
            said, hidden = file.metadata(), file.get_tensor("hidden").clone()
        done, files = int(said["done"]), dict(json.loads(said["files"]))
        sound = said["sha256"] == _digest(hidden) and 0 <= done <= len(files)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise BellboxError(f"{path}: damaged ({error}); delete {work} and begin again") from None
    expected = {
        REST,
        *(
            file
            for number in range(done if sound else 0)
            for file in (block_file(number), _record_file(number))
        ),
    }
    changed = [work / name for name in sorted(expected) if not _is_as_written(work / name, files.get(name))]
    if changed or not sound:
        raise BellboxError(
            f"{[*changed, path][0]}: was changed since it was written; delete {work} and begin again"
        )
    return done, hidden, files


def _is_as_written(path: Path, described: object) -> bool:
    return path.is_file() and describe_file(path) == described


def _digest(values: Tensor) -> str:
    return hashlib.sha256(values.contiguous().view(torch.uint8).numpy().data).hexdigest()


def _described(job: Job, context: int, tokens: Tensor, tokenizer: Tokenizer) -> dict[str, Any]:
    """What decides the result."""
    return {
        **asdict(job.settings),
        "samples": job.samples,
        "context": context,
        "batch": job.batch,
        "model": sha256_file(job.model / CONFIG),
        "tokenizer": tokenizer.sha256,
        "tokens": int((tokens.double() * torch.arange(1, tokens.numel() + 1).view_as(tokens)).sum()),
        **{path.name: _size_and_time(path) for path in sorted(job.model.glob("*.safetensors"))},
    }


def _size_and_time(path: Path) -> list[int]:
    """Bytes and nanoseconds: what tells a file of weights from another one, where a checksum would read it all."""
    about = path.stat()
    return [about.st_size, about.st_mtime_ns]


def _same_job(work: Path, described: dict[str, Any]) -> None:
    path = work / _SETTINGS
    if not (path.is_file() and (work / _HIDDEN).is_file()):
        return  # no block is done
    before = read_json(path)
    for key in dict.fromkeys([*described, *before]):
        old, new = before.get(key), described.get(key)
        if old != new:
            raise BellboxError(
                f"{work} was begun with another {key} ({old!r}, now {new!r}): give the same again, or "
                "delete the folder"
            )


def _finish(
    job: Job, source: HFFolder, work: Path, described: dict[str, Any], tokenizer: Tokenizer
) -> dict[str, Any]:
    blocks = [read_json(work / _record_file(number)) for number in range(source.config.num_hidden_layers)]
    record = {"settings": described, "blocks": blocks}
    _write_json(work / RECORD, record)
    tokenizer.save(work / TOKENIZER)
    write_config(work, source.config, job.settings.quantization)
    try:
        put_in_place(work, job.out.absolute(), replaces=CONFIG)
    except OSError as error:
        raise BellboxError(f"{job.out}: cannot be written ({error.strerror})") from None
    # Only now: whatever stops us before, the next start has nothing but the swap to do.
    for name in (_HIDDEN, _SETTINGS, ".lock", *(_record_file(number) for number in range(len(blocks)))):
        (job.out / name).unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)  # what stood at `out` before
    return record


def _tokenizer(model: Path) -> Tokenizer:
    try:
        return Tokenizer.load(model)
    except BellboxError as error:
        raise BellboxError(f"the calibration text needs the model's tokenizer: {error}") from None


def _record_file(number: int) -> str:
    return f"block-{number:04d}.json"


def _stored(value: Tensor) -> Tensor:
    return narrowed(value).contiguous() if value.dtype == torch.float32 else value


def _write_json(path: Path, values: dict[str, Any]) -> None:
    try:
        write_text(path, json.dumps(values, indent=1) + "\n")
    except OSError as error:
        raise BellboxError(f"{path}: cannot be written ({error.strerror})") from None
