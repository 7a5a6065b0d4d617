"""Evaluate a model: perplexity and bits per byte, accuracy, or zero-shot tasks; entropy of its codes.

bellbox eval runs/small
bellbox eval runs/small --checkpoint best --stride 64
bellbox eval small-packed --data data/books --json -
bellbox eval some-hf-folder --data data/books --context 128
bellbox eval small-packed --tasks hellaswag,piqa,arc_easy --limit 200
bellbox eval runs/mine --import mine           # a run with a method of your own, from mine.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch

from bellbox.cli.eval_images import ImageEvaluation, evaluate_images, show_images
from bellbox.cli.eval_tasks import TaskEvaluation, evaluate_tasks, show_tasks
from bellbox.cli.output import parse_flags, refuse_flags, require_writable, write_file
from bellbox.errors import BellboxError, require
from bellbox.evaluation import PerplexityResult, UnigramResult, perplexity, unigram
from bellbox.evaluation.codes import CodeUse, code_use
from bellbox.formats import packed as io
from bellbox.formats.auto import OpenedModel, open_data_for, open_model
from bellbox.models import GPT, Llama
from bellbox.ops.cache_codes import CachePrecision

require("tyro", "cli")

import tyro  # noqa: E402  (named before, so that its absence is one line; this file is imported by its command only)

if TYPE_CHECKING:
    from bellbox.data import TokenSplit

_COUNTED_SEQUENCES = 8
_WINDOWS, _IMAGES = 8, 128
_OF_TASKS = ("include_path", "num_fewshot", "limit", "cache", "chat")
_NOT_OF_TASKS = ("data", "split", "stride", "max_tokens", "image_size", "kv_cache")


@dataclass(frozen=True)
class Eval:
    """Evaluate a model: perplexity, bits per byte, entropy of its codes."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run folder, a packed folder, or a Hugging Face folder."""
    data: str | None = None
    """A dataset folder, or `classics`; images of a vision model. A run's own, else the classics, where not given."""
    split: str = "valid"
    """The split to score."""
    context: int | None = None
    """Tokens a window; what the run was trained with, else the longest the model takes, where not given."""
    stride: int | None = None
    """Tokens between windows; the context where not given. Less costs more and gives each token more context."""
    max_tokens: int | None = None
    """Score at most so many tokens; the whole split where not given."""
    batch: Annotated[int | None, tyro.conf.arg(aliases=["--batch-size"])] = None
    """Windows, requests or images at once; 8 of text, 128 images where not given."""
    image_size: int | None = None
    """Of a vision model, height and width that pictures in a folder are scaled to; what it was trained with, where not
    given."""
    checkpoint: str = "last"
    """Of a run: last, best, or a step."""
    bits: int | None = None
    """Of a model of several widths (docs/nested.md): the one to use; its widest where not given."""
    embeddings: Literal["bf16", "int8", "int4"] | None = None
    """Of a packed model: round its embeddings and head while loading, to see what it costs."""
    kv_cache: Literal["fp32", "int8", "int4"] = "fp32"
    """Of the library's own models: round keys and values, to see what it costs."""
    json: Annotated[str | None, tyro.conf.arg(aliases=["--out"])] = None
    """Write the result as JSON to this file, or to standard output with `-`."""
    tasks: str | None = None
    """Zero-shot tasks of lm-eval in place of a perplexity, with commas between: hellaswag,piqa,arc_easy."""
    include_path: Path | None = None
    """With --tasks: a folder of YAML tasks of your own."""
    num_fewshot: int | None = None
    """With --tasks: examples before each question, where the task does not forbid it."""
    limit: int | None = None
    """With --tasks: questions of each task at most, to try it."""
    cache: Path | None = None
    """With --tasks: keep answers in files of this name; each model has its own."""
    chat: bool = False
    """With --tasks: put questions as conversations, by the tokenizer's template."""


@dataclass(frozen=True)
class Evaluation:
    """What `bellbox eval` measured."""

    opened: OpenedModel
    data: str
    split: str
    result: PerplexityResult
    floor: UnigramResult | None
    """The unigram model on the same split; None where only a part of it was scored."""
    codes: CodeUse | None
    """None where the model has no low-bit layer."""
    remark: str | None
    """What could not be checked."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        run = self.opened.run
        return {
            "model": str(self.opened.path),
            "kind": self.opened.kind,
            "step": None if run is None else run.step,
            **({"bits": self.opened.bits, "widths": list(self.opened.widths)} if self.opened.widths else {}),
            "data": self.data,
            "split": self.split,
            **size_of(self.opened),
            **asdict(self.result),
            "unigram": None if self.floor is None else asdict(self.floor),
            "weight_entropy": None,
            "activation_entropy": None,
            **({} if self.codes is None else self.codes.to_dict()),
            "remark": self.remark,
        }


def size_of(opened: OpenedModel) -> dict[str, float]:
    """Bytes on disk and bits a parameter of a whole packed model; nothing of others."""
    if opened.kind != "packed":
        return {}
    whole = io.file_bytes(opened.path, opened.bits)
    return {"file_bytes": whole, "bits_per_parameter": 8 * whole / io.sizes(opened.model).parameters}


def main(argv: list[str]) -> None:
    """Run `bellbox eval` with the arguments after that.

    Raises:
        BellboxError: what the user can put right.
    """
    command = parse_flags(Eval, argv, "bellbox eval", __doc__)
    if command.json not in (None, "-"):
        require_writable(Path(command.json))
    if command.batch is not None and command.batch < 1:
        raise BellboxError(f"--batch is {command.batch}, must be at least 1")
    if command.image_size is not None and not 1 <= command.image_size <= 4096:
        raise BellboxError(f"--image-size is {command.image_size}, must be from 1 to 4096")
    opened = open_model(command.model, command.checkpoint, command.embeddings, command.bits)
    with _Bar() as bar:
        if command.tasks is None:
            refuse_flags(command, _OF_TASKS, "an evaluation without --tasks")
        if opened.is_vision:
            refuse_flags(command, ("tasks",), "a vision model")
            refuse_flags(command, ("split", "context", "stride", "max_tokens", "kv_cache"), "a vision model")
            found = evaluate_images(
                opened, command.data, command.batch or _IMAGES, command.image_size, bar.update
            )
        elif command.tasks is not None:
            refuse_flags(command, _NOT_OF_TASKS, "zero-shot tasks")
            found = evaluate_tasks(
                opened,
                command.tasks,
                batch=command.batch or _WINDOWS,
                context=command.context,
                include=command.include_path,
                shots=command.num_fewshot,
                limit=command.limit,
                cache=command.cache,
                chat=command.chat,
            )
        else:
            refuse_flags(command, ("image_size",), "a language model")
            found = _evaluate_text(opened, command, bar)
    if command.json == "-":
        print(json.dumps(found.to_dict(), indent=1))
        return
    if isinstance(found, ImageEvaluation):
        show_images(found)
    elif isinstance(found, TaskEvaluation):
        show_tasks(found)
    else:
        show(found)
    if command.json is not None:
        write_file(Path(command.json), json.dumps(found.to_dict(), indent=1) + "\n")
        print(f"written to {command.json}")


def _evaluate_text(opened: OpenedModel, command: Eval, bar: _Bar) -> Evaluation:
    return evaluate(
        opened,
        command.data,
        command.split,
        context=command.context,
        stride=command.stride,
        max_tokens=command.max_tokens,
        batch=command.batch or _WINDOWS,
        progress=bar.update,
        kv_cache=command.kv_cache,
    )


def evaluate(
    opened: OpenedModel,
    source: str | None = None,
    split: str = "valid",
    *,
    context: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    batch: int = _WINDOWS,
    progress: Callable[[int, int], None] | None = None,
    kv_cache: CachePrecision = "fp32",
) -> Evaluation:
    """Perplexity with its floor, and the use of codes over the first few sequences.

    Args:
        opened: the model.
        source: as `open_data_for`.
        split: of the data.
        context: as the command's flags, and so are the rest.

    Raises:
        BellboxError: data of another tokenizer, no such split, a context that the model cannot take.
    """
    dataset, remark = open_data_for(opened, source)
    scored = dataset.split(split)
    context = min(opened.context, max(1, len(scored) - 1)) if context is None else context
    longest: int = opened.model.config.max_position_embeddings  # pyright: ignore[reportAttributeAccessIssue, reportAssignmentType]
    if context > longest:
        raise BellboxError(f"--context {context}: {opened.path} takes at most {longest} tokens")
    if kv_cache != "fp32" and not isinstance(opened.model, Llama | GPT):
        raise BellboxError(f"--kv-cache {kv_cache}: {opened.path} is no LLaMA or GPT of Bellbox's own")
    result = perplexity(
        opened.model,
        scored,
        context,
        stride=stride,
        batch_size=batch,
        max_tokens=max_tokens,
        progress=progress,
        kv_cache=kv_cache,
    )
    whole = result.tokens == len(scored) - 1 and "train" in dataset.splits
    return Evaluation(
        opened=opened,
        data=str(dataset.path),
        split=split,
        result=result,
        floor=unigram(dataset, valid=split) if whole else None,
        codes=code_use(opened.model, first_sequences(scored, context, _COUNTED_SEQUENCES)),
        remark=remark,
    )


def first_sequences(split: TokenSplit, context: int, count: int) -> torch.Tensor:
    """The beginning of a split as int64 `[up to count, up to context]`."""
    context = min(context, len(split))
    rows = max(1, min(count, len(split) // context))
    return torch.from_numpy(split.read(0, rows * context).reshape(rows, context))


def show(found: Evaluation) -> None:
    """Print an evaluation as tables."""
    console: Any = require("rich.console", "cli").Console()
    table: Any = require("rich.table", "cli").Table
    result = found.result
    # Not through the console, which would break lines: the protocol belongs to the numbers, to be copied whole.
    print(f"{found.opened.description}\n")
    print(f"data      {found.data}, split {found.split}")
    print(f"protocol  {result.protocol}")
    if size := size_of(found.opened):
        print(
            f"size      {size['file_bytes']:,} bytes on disk, {size['bits_per_parameter']:.2f} bits a parameter"
        )
    print()
    if found.remark:
        print(f"note      {found.remark}\n")
    numbers = table(box=require("rich.box", "cli").SIMPLE_HEAD, pad_edge=False)
    numbers.add_column("measure")
    numbers.add_column("this model", justify="right")
    numbers.add_column("unigram floor", justify="right")
    floor = found.floor
    for label, own, low, digits in (
        ("loss, nats per token", result.loss, floor and floor.loss, 4),
        ("perplexity", result.perplexity, floor and floor.perplexity, 3),
        ("bits per byte", result.bits_per_byte, floor and floor.bits_per_byte, 4),
    ):
        numbers.add_row(label, _number(own, digits), _number(low, digits))
    console.print(numbers)
    if found.codes is not None:
        _show_codes(console, table, found.codes)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _show_codes(console: Any, table: Any, codes: CodeUse) -> None:
    most = max([*codes.weight_limit.values(), *codes.activation_limit.values()])
    layers = table(
        title=f"entropy of the codes, bits per code (at most {most:.4g})",
        title_justify="left",
        box=require("rich.box", "cli").SIMPLE_HEAD,
        pad_edge=False,
    )
    layers.add_column("layer", no_wrap=True)
    layers.add_column("weight", justify="right")
    layers.add_column("input", justify="right")
    for name in codes.weight | codes.activation:
        shared = "as above" if name not in codes.activation else f"{codes.activation[name]:.3f}"
        own = f"{codes.weight[name]:.3f}" if name in codes.weight else "-"
        layers.add_row(name, own, shared)
    layers.add_section()
    for label, pick in (("mean", lambda values: sum(values) / len(values)), ("lowest", min)):
        cells = [f"{pick(list(x.values())):.3f}" if x else "-" for x in (codes.weight, codes.activation)]
        layers.add_row(label, *cells)
    console.print(layers)


class _Bar:
    """A bar on standard error, where that is a terminal, once there is something to show."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, total: int) -> None:
        """So many tokens are scored."""
        if not sys.stderr.isatty():
            return
        if self._bar is None:
            progress: Any = require("rich.progress", "cli")
            console = require("rich.console", "cli").Console(stderr=True)
            self._bar = progress.Progress(console=console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task("scoring", total=total)
        self._bar.update(self._task, completed=done)
