"""What lies around a text: the token in front of it, and the template that makes one of a conversation.

Data preparation adds nothing (`tokenizer.plain_ids`), so that models of Bellbox's own runs have none. Checkpoints of
others mostly have one, and what they compute without it, or with two, is not what they were trained for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bellbox.data.tokenizer import Tokenizer, configured_end
from bellbox.errors import BellboxError
from bellbox.utils.files import JSON_LIMIT, read_json, read_text

_USUAL, _CONFIG = "<s>", "tokenizer_config.json"


def tokenizer_of(file: Path) -> Tokenizer:
    """The tokenizer of a file, its end of text as a `tokenizer_config.json` beside it says.

    Raises:
        BellboxError: it cannot be read, or the end is no token of it.
    """
    return Tokenizer.load(file, configured_end(file.parent))


def beginning_token(file: Path, tokenizer: Tokenizer) -> int | None:
    """Id of the token that belongs in front of every text; None where none does.

    A template in `tokenizer.json` says; `add_bos_token` and `bos_token` of a `tokenizer_config.json` beside it come
    first. A sentencepiece `tokenizer.model` stands for LLaMA's own tokenizer, which puts `<s>` in front.

    Args:
        file: `tokenizer.json` or a sentencepiece `.model`.
        tokenizer: of that file.

    Raises:
        BellboxError: a beginning is asked for that is no token of it.
    """
    added, name = _said_beside(file)
    if added is False:
        return None
    if added is True or file.suffix == ".model":
        name = name or _USUAL
        if name not in tokenizer.vocab:
            if added is None:
                return None
            raise BellboxError(
                f"{file.parent / _CONFIG}: add_bos_token is true, but {name!r} is no token of {file.name}"
            )
        return tokenizer.vocab[name]
    return _of_template(tokenizer.backend)


def prefix_token(file: Path, tokenizer: Tokenizer) -> int:
    """Id of the token after which a text without anything before it is scored.

    The beginning token; else the one that is named so and not put in front by itself; else the end of the text before.
    """
    begin = beginning_token(file, tokenizer)
    if begin is not None:
        return begin
    _, name = _said_beside(file)
    return tokenizer.vocab.get(name or "", tokenizer.end_of_text)


def _said_beside(file: Path) -> tuple[bool | None, str | None]:
    """`add_bos_token` and `bos_token` of a `tokenizer_config.json`."""
    config = file.parent / _CONFIG
    said: dict[str, Any] = read_json(config) if config.is_file() else {}
    added, name = said.get("add_bos_token"), said.get("bos_token")
    name = name.get("content") if isinstance(name, dict) else name
    return added if isinstance(added, bool) else None, name if isinstance(name, str) else None


def _of_template(backend: Any) -> int | None:
    """What the post-processor of a `tokenizers.Tokenizer` puts first."""
    plain = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a", add_special_tokens=True).ids
    return whole[0] if whole[: len(plain)] != plain else None


def chat_template(file: Path) -> str | None:
    """The Jinja template of conversations that lies beside a tokenizer; None where there is none.

    Args:
        file: `tokenizer.json` or a sentencepiece `.model`; `chat_template.jinja` or a `tokenizer_config.json` beside it
            holds the template.

    Raises:
        BellboxError: such a file cannot be read.
    """
    beside, config = file.parent / "chat_template.jinja", file.parent / _CONFIG
    if beside.is_file():
        return read_text(beside, JSON_LIMIT)
    found = read_json(config).get("chat_template") if config.is_file() else None
    return found if isinstance(found, str) else None
