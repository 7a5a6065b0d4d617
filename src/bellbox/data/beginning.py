"""The token that a tokenizer puts in front of a text, where it does.

Data preparation adds nothing (`tokenizer.plain_ids`), so that models of Bellbox's own runs have none. Checkpoints of
others mostly have one, and what they compute without it, or with two, is not what they were trained for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bellbox.errors import BellboxError
from bellbox.utils.files import read_json

_USUAL = "<s>"


def beginning_token(file: Path) -> int | None:
    """Id of the token that belongs in front of every text; None where none does.

    A template in `tokenizer.json` says; `add_bos_token` and `bos_token` of a `tokenizer_config.json` beside it come
    first. A sentencepiece `tokenizer.model` stands for LLaMA's own tokenizer, which puts `<s>` in front.

    Args:
        file: `tokenizer.json` or a sentencepiece `.model`.

    Raises:
        BellboxError: it cannot be read, or a beginning is asked for that is no token of it.
    """
    from bellbox.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(file)
    config = file.parent / "tokenizer_config.json"
    said: dict[str, Any] = read_json(config) if config.is_file() else {}
    added, name = said.get("add_bos_token"), said.get("bos_token")
    name = name.get("content") if isinstance(name, dict) else name
    if added is False:
        return None
    if added is True or file.suffix == ".model":
        name = name if isinstance(name, str) else _USUAL
        if name not in tokenizer.vocab:
            if added is None:
                return None
            raise BellboxError(f"{config}: add_bos_token is true, but {name!r} is no token of {file.name}")
        return tokenizer.vocab[name]
    return _of_template(tokenizer.backend)


def _of_template(backend: Any) -> int | None:
    """What the post-processor of a `tokenizers.Tokenizer` puts first."""
    plain = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a", add_special_tokens=True).ids
    return whole[0] if whole[: len(plain)] != plain else None
