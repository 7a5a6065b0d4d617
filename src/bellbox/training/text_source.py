"""Text as `data.source`: prepared into the run's folder before the run begins, once."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from bellbox.data import shards
from bellbox.data.prepare import Progress, prepare
from bellbox.errors import BellboxError
from bellbox.runs.config import DataSection, TrainConfig

FOLDER = "data"
"""Within the run's folder."""


def is_text(config: TrainConfig) -> bool:
    """Whether the source is text that has to become tokens first, in place of a dataset."""
    source = config.data.source
    if config.task != "language" or source == "classics":
        return False
    if source.startswith("hf:"):
        return True
    path = Path(source)
    if (path / shards.MANIFEST).is_file():  # most runs
        return False
    if path.is_dir():  # an empty one, or half of a dataset, is for the reader of datasets to refuse
        files = [each for each in path.rglob("*") if each.is_file()]
        return bool(files) and not any(
            each.name == shards.MANIFEST or each.suffix == ".bin" for each in files
        )
    return path.is_file() and path.name != shards.MANIFEST


def with_prepared_text(config: TrainConfig, show: bool) -> TrainConfig:
    """A configuration whose source is a dataset: text is prepared into the run's folder where that is not done yet.

    Args:
        config: as the user gave it, checked.
        show: whether to print where it stands.

    Raises:
        BellboxError: text that cannot be prepared, or options for it beside data that are prepared already.
    """
    section = config.data
    out = Path(config.folder) / FOLDER
    if section.source == str(out):  # as the run's own configuration says
        return config
    if not is_text(config):
        usual = DataSection()
        for name in ("valid", "tokenizer", "vocab_size"):
            if getattr(section, name) != getattr(usual, name):
                raise BellboxError(
                    f"data.{name} is for text that is prepared first, but {section.described} is tokens "
                    "already; leave it out"
                )
        return config
    if not (out / shards.MANIFEST).is_file():
        prepare(
            [section.source],
            out,
            tokenizer=section.tokenizer,
            vocab_size=section.vocab_size,
            valid=section.valid,
            max_tokens=config.total_steps * config.per_step,
            progress=_Lines(out) if show else None,
        )
    used = DataSection(source=str(out), context=section.context, seed=section.seed)
    return dataclasses.replace(config, data=used)


class _Lines:
    """A line when a phase begins, and every ten seconds."""

    def __init__(self, out: Path) -> None:
        self._out, self._phase, self._next = out, "", 0.0

    def __call__(self, state: Progress) -> None:
        now = time.monotonic()
        if state.phase == self._phase and now < self._next:
            return
        self._phase, self._next = state.phase, now + 10
        share = f" of {state.bytes_total:,}" if state.bytes_total else ""
        print(
            f"preparing {self._out}: {state.phase}, {state.bytes_read:,}{share} bytes read, {state.tokens:,} tokens",
            flush=True,
        )
