"""Files beside a model that come along when it is written anew: tokenizer, chat template, generation configuration."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt")
"""The vocabulary itself, in its forms."""
COMPANIONS = (
    "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", *TOKENIZER_FILES, "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
"""All of them, copied as they are."""


def copy_companions(source: Path, target: Path, *, but: Collection[str] = ()) -> list[str]:
    """Copy what lies beside one model to another.

    Args:
        source: a folder.
        target: a folder; what is there already stays.
        but: names that are left.

    Returns:
        The names that were copied.
    """
    copied: list[str] = []
    for name in COMPANIONS:
        if name not in but and (source / name).is_file() and not (target / name).exists():
            shutil.copyfile(source / name, target / name)
            copied.append(name)
    return copied
