"""Running tasks of lm-eval on a model, and what comes of it as plain values."""

from __future__ import annotations

import importlib.metadata
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from bellbox.errors import BellboxError, require
from bellbox.interop.zero_shot.adapter import BellboxLM, fingerprint

_BOOTSTRAP = 1000
"""Samples for the standard errors that have no formula."""
_SEED = 1234
"""lm-eval's own, for choosing examples."""


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task or group."""

    task: str
    version: str
    shots: int | None
    metric: str
    value: float
    stderr: float | None
    """None where the metric has none."""
    documents: int | None


@dataclass(frozen=True)
class ZeroShot:
    """What was measured, and how."""

    scores: list[TaskScore]
    protocol: str
    """In one line, to be printed beside the numbers."""
    remarks: list[str]
    """What did not fit the model."""
    raw: dict[str, Any]
    """The harness's own results."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "scores": [vars(score) for score in self.scores],
            "protocol": self.protocol,
            "remarks": self.remarks,
            "lm_eval": _plain(self.raw),
        }


def zero_shot(
    lm: BellboxLM,
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    cache: Path | None = None,
    chat: bool = False,
) -> ZeroShot:
    """Score a model on tasks.

    Args:
        lm: the model.
        tasks: names of tasks or groups.
        include: a folder of YAML tasks of the user's own; they go before lm-eval's. Python beside them runs if they
            name it.
        shots: examples before each question, where a task does not forbid it; the task's own number where None.
        limit: questions of each task at most.
        cache: a file name for answers; the model's own fingerprint is added to it.
        chat: put questions as conversations, by the tokenizer's template.

    Raises:
        BellboxError: no such task, data that cannot be had, or what a request of it cannot be answered for.
    """
    if not tasks:
        raise BellboxError("name at least one task: --tasks hellaswag,piqa")
    if chat:
        lm.require_chat_template()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _manager(tasks, include)
    evaluator: Any = require("lm_eval.evaluator", "lm-eval")
    try:
        loaded = manager.load(list(tasks))
        for name, task in loaded["tasks"].items():
            _require_text(name, task)
            _set_shots(task, shots)
        # Not `simple_evaluate`: that asks pip and the system what they are, for seconds, and puts it into the results.
        raw: Any = evaluator.evaluate(
            _with_cache(lm, cache),
            loaded,
            limit=limit,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            log_samples=False,
            bootstrap_iters=_BOOTSTRAP,
        )
    except (ConnectionError, FileNotFoundError) as error:
        raise _no_data(tasks, error) from None
    except Exception as error:  # of `datasets`, whose errors derive from nothing in common
        if type(error).__module__.split(".")[0] in ("datasets", "huggingface_hub", "httpx", "requests"):
            raise _no_data(tasks, error) from None
        raise
    assert raw is not None
    return ZeroShot(_scores(raw), _protocol(lm, shots, limit, chat), _remarks(lm), raw)


def _manager(tasks: Sequence[str], include: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    if include is not None:
        if not include.is_dir():
            raise BellboxError(f"{include}: no such folder of tasks")
        # Those alone, where they are all: reading the fourteen thousand others takes seconds.
        own = TaskManager(include_path=str(include), include_defaults=False)
        if all(task in own.all_tasks for task in tasks):
            return own
    manager = TaskManager(include_path=None if include is None else str(include))
    known = set(manager.all_tasks)
    for task in tasks:
        if task not in known:
            near = [name for name in manager.all_tasks if name.startswith(task[:4])][:8]
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise BellboxError(f"no task {task!r} in lm-eval or --include-path{hint}")
    return manager


def _no_data(tasks: Sequence[str], error: BaseException) -> BellboxError:
    reason = " ".join(str(error).split())[:300]
    return BellboxError(
        f"the data of {', '.join(tasks)} cannot be had ({type(error).__name__}: {reason}); without the network, name "
        "tasks on files of your own by --include-path"
    )


def _require_text(name: str, task: Any) -> None:
    """Refuse what text in and text out cannot answer safely."""
    if getattr(task, "UNSAFE_CODE", False):
        raise BellboxError(f"{name} runs code that the model writes, which Bellbox does not; leave it out")
    if getattr(task, "MULTIMODAL", False):
        raise BellboxError(f"{name} asks with pictures or sounds, and this is a model of text; leave it out")


def _set_shots(task: Any, shots: int | None) -> None:
    """As lm-eval does: a task's own number, 0 where it has none; and a task that says 0 is not overruled."""
    own = task.get_config("num_fewshot")
    if own is None or (shots is not None and own != 0):
        task.set_config(key="num_fewshot", value=shots or 0)
    task.set_fewshot_seed(seed=_SEED)


def _with_cache(lm: BellboxLM, cache: Path | None) -> Any:
    """The model behind a file of answers of its own: lm-eval's key of an answer is the question alone."""
    if cache is None:
        return lm
    if not isinstance(lm.model, nn.Module):
        raise BellboxError("answers are kept for models of torch only; leave out --cache")
    from lm_eval.api.model import CachingLM

    own = cache.with_name(f"{cache.name}-{fingerprint(lm.model, lm.texts, f'{lm.begin} {lm.longest}')}.db")
    return CachingLM(lm, str(own))


def _scores(raw: dict[str, Any]) -> list[TaskScore]:
    found = []
    for section in ("results", "groups"):
        for task, values in (raw.get(section) or {}).items():
            if section == "groups" and task in (raw.get("results") or {}):
                continue
            for key, value in values.items():
                metric, _, by = key.partition(",")
                if metric.endswith("_stderr") or not by or not isinstance(value, int | float):
                    continue
                stderr = values.get(f"{metric}_stderr,{by}")
                known = isinstance(stderr, int | float) and math.isfinite(stderr)
                found.append(
                    TaskScore(
                        task=task,
                        version=str((raw.get("versions") or {}).get(task, "")),
                        shots=(raw.get("n-shot") or {}).get(task),
                        metric=metric if by == "none" else f"{metric} ({by})",
                        value=float(value),
                        stderr=float(stderr) if known else None,
                        documents=((raw.get("n-samples") or {}).get(task) or {}).get("effective"),
                    )
                )
    return found


def _protocol(lm: BellboxLM, shots: int | None, limit: int | None, chat: bool) -> str:
    names = {number: name for name, number in lm.texts.vocab.items()}
    begin = "no beginning token" if lm.begin is None else f"{names[lm.begin]!r} in front of each text, once"
    parts = [
        f"lm-eval {importlib.metadata.version('lm_eval')}",
        "examples as tasks say" if shots is None else f"{shots} examples, where a task does not say 0",
        f"contexts of at most {lm.longest} tokens",
        begin,
        f"what has no context follows {names[lm.prefix_token_id]!r}",
        "documents of perplexity apart, in windows that share one token",
    ]
    parts += [f"the first {limit} questions of each"] if limit is not None else []
    parts += ["as conversations"] if chat else []
    return ", ".join(parts)


def _remarks(lm: BellboxLM) -> list[str]:
    found = []
    if lm.cuts.contexts:
        found.append(
            f"{lm.cuts.contexts:,} contexts did not fit {lm.longest} tokens and lost their beginning"
        )
    if lm.cuts.generations:
        asked, made = max(lm.cuts.generations)
        found.append(
            f"{len(lm.cuts.generations):,} times fewer tokens were made than asked for ({made} for {asked}): the model "
            f"takes {lm.longest}"
        )
    return found


def _plain(value: Any) -> Any:
    """What JSON can hold; functions and the like as text."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
