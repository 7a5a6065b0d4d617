"""A row of the table: how a package makes its model from the checkpoint, and how it opens it again."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bellbox.comparison.baselines.job import Job
from bellbox.errors import BellboxError, require

EXTRA = "baselines"


@dataclass(frozen=True)
class Baseline:
    """One row of the table."""

    name: str
    """What `--rows` calls it."""
    title: str
    """What the table calls it."""
    make: Callable[[Job, Path], None]
    """Write the model, as its package saves one, into an empty folder."""
    load: Callable[[Path, Job], nn.Module]
    """Open that folder as its package does: tokens `[B, T]` to logits, or to an object that has them; it computes in
    fp32 but for what the package's own layers do inside."""
    bits: float | None = None
    """Of a code of the blocks' linear layers; None in full precision."""
    module: str | None = None
    """What is imported of its package; None for Bellbox itself."""
    package: str = "bellbox"
    """What the package is called where it is installed from."""
    extra: str = EXTRA
    """The extra of Bellbox that brings it."""
    install: str | None = None
    """How it is installed, where the extra does not bring it."""
    made: Path | None = None
    """Where the model lies already; then `make` is not called."""

    @property
    def version(self) -> str | None:
        """Of the installed package; None where it is not."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def absent(self) -> str | None:
        """Why the row cannot run here, as far as that can be said without importing anything; None where it can."""
        if self.module is None or importlib.util.find_spec(self.module) is not None:
            return None
        way = self.install or f"pip install 'bellbox[{self.extra}]'"
        return f"{self.module} is not installed; install it with: {way}"


def refused(what: str) -> Callable[[Job, Path], None]:
    """For models that lie there already: nothing makes them."""

    def make(job: Job, folder: Path) -> None:  # noqa: ARG001
        raise BellboxError(f"{what}: is not made here, it is given")

    return make


def plain_transformer(folder: Path, dtype: torch.dtype) -> Any:
    """The checkpoint in full precision, through transformers, on the CPU."""
    transformers = require("transformers", "transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True
    ).eval()


def dtype_of(job: Job) -> torch.dtype:
    """What the checkpoint is stored in."""
    return getattr(torch, job.dtype)
