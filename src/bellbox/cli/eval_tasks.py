"""The half of `bellbox eval` that runs zero-shot tasks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bellbox.errors import BellboxError, require
from bellbox.formats.auto import OpenedModel

if TYPE_CHECKING:
    from bellbox.interop.zero_shot import ZeroShot


@dataclass(frozen=True)
class TaskEvaluation:
    """What `bellbox eval --tasks` measured."""

    opened: OpenedModel
    found: ZeroShot

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        run = self.opened.run
        head = {
            "model": str(self.opened.path),
            "kind": self.opened.kind,
            "step": None if run is None else run.step,
        }
        return {**head, **self.found.to_dict()}


def evaluate_tasks(
    opened: OpenedModel,
    tasks: str,
    *,
    batch: int,
    context: int | None = None,
    include: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    cache: Path | None = None,
    chat: bool = False,
) -> TaskEvaluation:
    """Zero-shot tasks on a model; arguments as the command's flags.

    Raises:
        BellboxError: no tokenizer, a context that the model cannot take, or what `zero_shot` refuses.
    """
    require("lm_eval", "lm-eval")
    from bellbox.interop.zero_shot import BellboxLM, zero_shot

    if opened.tokenizer is None:
        raise BellboxError(f"{opened.path}: no tokenizer lies with the model; put tokenizer.json there")
    longest: int = opened.model.config.max_position_embeddings  # pyright: ignore[reportAttributeAccessIssue, reportAssignmentType]
    if context is not None and not 2 <= context <= longest:
        raise BellboxError(f"--context {context}: {opened.path} takes 2 to {longest} tokens")
    for flag, value, least in (("--limit", limit, 1), ("--num-fewshot", shots, 0)):
        if value is not None and value < least:
            raise BellboxError(f"{flag} is {value}, must be at least {least}")
    info = {"model": str(opened.path), "model_kind": opened.kind, "description": opened.description}
    lm = BellboxLM(opened.model, opened.tokenizer, context or opened.context, batch, info)
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    found = zero_shot(lm, names, include=include, shots=shots, limit=limit, cache=cache, chat=chat)
    return TaskEvaluation(opened, found)


def show_tasks(evaluation: TaskEvaluation) -> None:
    """Print the scores as a table."""
    found = evaluation.found
    print(f"{evaluation.opened.description}\n\nprotocol  {found.protocol}")
    for remark in found.remarks:
        print(f"note      {remark}")
    rows: list[tuple[str, ...]] = [("task", "metric", "version", "shots", "questions", "value", "std. error")]
    for score in found.scores:
        counts = ("-" if each is None else str(each) for each in (score.shots, score.documents))
        error = "-" if score.stderr is None else f"{score.stderr:.4f}"
        rows.append((score.task, score.metric, score.version, *counts, f"{score.value:,.4f}", error))
    # Not through a console, which cuts numbers where a line is short.
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print()
    for row in rows:
        cells = [
            f"{cell:<{w}}" if n < 2 else f"{cell:>{w}}"
            for n, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
