"""Binding of a run's files: a checkpoint knows the configuration and the tokenizer that it was made with.

Without this, a number changed in config.yaml would make another function of the same tensors, and nobody would know.
Checkpoints of earlier versions say nothing of either, and are taken as they are.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from bellbox.errors import BellboxError
from bellbox.runs.checkpoint import MANIFEST, Checkpoint
from bellbox.runs.config import ResolvedConfig
from bellbox.runs.config_file import config_from_dict, differences
from bellbox.utils.files import TOKENIZER_LIMIT, read_bytes


def binding(config: ResolvedConfig, tokenizer: str | None) -> dict[str, Any]:
    """What a checkpoint keeps of its run.

    Args:
        config: of the run.
        tokenizer: text of its tokenizer's file; None of a vision task.
    """
    kept = config.to_dict()
    kept.pop("folder")
    return {"config": kept, "tokenizer": None if tokenizer is None else _digest(tokenizer.encode())}


def refuse_changed(checkpoint: Checkpoint, config: ResolvedConfig, place: Path) -> None:
    """Hold a run's configuration against that of its checkpoint.

    Args:
        checkpoint: of the run.
        config: as it is now.
        place: where it was read from, for the message.

    Raises:
        BellboxError: a key that decides the run's numbers was changed, by its name.
    """
    kept = checkpoint.run.get("config")
    if kept is None:
        return
    changed = differences(config_from_dict(kept, str(checkpoint.path / MANIFEST)), config)
    if changed:
        raise BellboxError(
            f"{place}: is not what {checkpoint.path} was made with: {'; '.join(changed[:3])}; change it back, or begin "
            "another run"
        )


def refuse_other_tokenizer(checkpoint: Checkpoint, tokenizer: Path) -> None:
    """Hold a run's tokenizer against that of its checkpoint.

    Raises:
        BellboxError: it is another one, or gone.
    """
    kept = checkpoint.run.get("tokenizer")
    if kept is None:
        return
    there = _digest(read_bytes(tokenizer, TOKENIZER_LIMIT))
    if there != kept:
        raise BellboxError(
            f"{tokenizer}: is not the tokenizer that {checkpoint.path} was trained with (sha256 {there[:12]}, not "
            f"{kept[:12]}); put that one back, it lies with the data"
        )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
