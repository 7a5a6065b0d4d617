"""A conversation as a prompt: the chat template that lies with the tokenizer, in jinja's sandbox.

What a user writes stays text: where a message holds the name of a special token, that name is encoded by itself as
ordinary characters, so that nobody can end their turn and speak for another.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from bellbox.data.tokenizer import Tokenizer
from bellbox.errors import BellboxError, require
from bellbox.utils.files import read_json, read_text

TEMPLATE_LIMIT = 1 << 20
_FIRST = 0xF0000
"""Of the private characters that stand for what must not be read as a special token."""


class ChatTemplate:
    """Messages to token ids.

    Args:
        source: the template, in jinja.
        tokenizer: whose ids come out.
        names: what the template may ask for beside the messages, such as `bos_token`.

    Raises:
        BellboxError: the template cannot be read.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, names: dict[str, Any]) -> None:
        jinja2, sandbox = require("jinja2", "serve"), require("jinja2.sandbox", "serve")
        tokenizers = require("tokenizers", "cli")
        environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        self._wrong: type[Exception] = jinja2.TemplateError
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise BellboxError(f"the chat template cannot be read: {error}") from None
        self._names = names
        # A backend of its own: here the template's special tokens are read as such.
        self._backend: Any = tokenizers.Tokenizer.from_str(tokenizer.text)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = False
        self._plain = tokenizer
        added = self._backend.get_added_tokens_decoder().values()
        self._special = sorted((one.content for one in added if one.content), key=len, reverse=True)

    def encode(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, up to where the answer begins.

        Args:
            messages: each with `role` and `content`.

        Raises:
            BellboxError: the template refuses them, or they are no text.
        """
        kept: list[str] = []
        turns = [{**each, "content": self._guard(each["content"], kept)} for each in messages]
        try:
            text = self._template.render(messages=turns, add_generation_prompt=True, **self._names)
        except self._wrong as error:
            raise BellboxError(f"the chat template refuses these messages: {error}") from None
        except (
            Exception
        ) as error:  # whatever a template's own code raises on messages that it does not foresee
            raise BellboxError(
                f"the chat template fails on these messages ({type(error).__name__}: {error})"
            ) from None
        ids: list[int] = []
        last = chr(_FIRST + len(kept) - 1)
        for part in re.split(f"([{chr(_FIRST)}-{last}])", text) if kept else [text]:
            guarded = kept and len(part) == 1 and chr(_FIRST) <= part <= last
            ids += self._plain.encode(kept[ord(part) - _FIRST]) if guarded else self._special_ids(part)
        return ids

    def _guard(self, text: str, kept: list[str]) -> str:
        """The text with names of special tokens, and private characters, replaced by private characters."""
        text = "".join(_stand_in(char, kept) if ord(char) >= _FIRST else char for char in text)
        for name in self._special:
            if name in text:
                text = text.replace(name, _stand_in(name, kept))
        return text

    def _special_ids(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BellboxError("the messages are not text in UTF-8") from None
        return list(self._backend.encode(text, add_special_tokens=False).ids)


def _stand_in(text: str, kept: list[str]) -> str:
    if text not in kept:
        kept.append(text)
    if len(kept) > 0xFFFD:
        raise BellboxError("the messages have too many different private characters")
    return chr(_FIRST + kept.index(text))


def _refuse(message: object) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(str(message))


def _tojson(value: Any, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def load_template(folder: Path, tokenizer: Tokenizer, given: Path | None = None) -> ChatTemplate | None:
    """The chat template of a model's folder; None where there is none.

    Args:
        folder: may hold `chat_template.jinja`, or `tokenizer_config.json` with a `chat_template`.
        tokenizer: the model's.
        given: a file with another template.

    Raises:
        BellboxError: it cannot be read.
    """
    config: dict[str, Any] = {}
    if (folder / "tokenizer_config.json").is_file():
        config = read_json(folder / "tokenizer_config.json")
    names = {
        name: text for name in ("bos_token", "eos_token", "unk_token") if (text := _token(config.get(name)))
    }
    beside = folder / "chat_template.jinja"
    if given is not None or beside.is_file():
        return ChatTemplate(read_text(given or beside, TEMPLATE_LIMIT), tokenizer, names)
    source = config.get("chat_template")
    if isinstance(source, list):  # several by name
        named = {one.get("name"): one.get("template") for one in source if isinstance(one, dict)}
        source = named.get("default")
    if source is None:
        return None
    if not isinstance(source, str):
        raise BellboxError(f"{folder / 'tokenizer_config.json'}: chat_template is no text")
    return ChatTemplate(source, tokenizer, names)


def _token(value: object) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
