"""OpenAI's answers: of a completion and of a chat, whole and in pieces."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from bellbox.serve.engine import Piece
from bellbox.serve.protocol import RefusedError
from bellbox.serve.streaming import Pieces


class Answer:
    """One request's answer.

    Args:
        chat: the form of a chat's, else of a completion's.
        model: its name.
        pieces: of the texts.
        choices: how many texts.
        prompt_tokens: of all prompts.
    """

    def __init__(self, chat: bool, model: str, pieces: Pieces, choices: int, prompt_tokens: int) -> None:
        self._chat, self._model, self._pieces = chat, model, pieces
        self._id = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex
        self._created = int(time.time())
        self._texts: list[list[str]] = [[] for _ in range(choices)]
        self._last: dict[int, Piece] = {}
        self._prompt_tokens = prompt_tokens

    async def whole(self) -> dict[str, Any]:
        """All texts.

        Raises:
            RefusedError: one failed; status 500.
        """
        async for index, piece in self._pieces:
            self._texts[index].append(piece.text)
            if piece.finish is not None:
                self._last[index] = piece
            if piece.finish == "failed":
                raise RefusedError(500, piece.error, "server_error")
        choices = [
            self._choice(index, "".join(parts), self._last[index].finish)
            for index, parts in enumerate(self._texts)
        ]
        return {**self._head(whole=True), "choices": choices, "usage": self._usage()}

    async def events(self, with_usage: bool) -> AsyncIterator[dict[str, Any]]:
        """The same in pieces; one that failed is an event with an error, the last."""
        more = {"usage": None} if with_usage else {}
        if self._chat:
            for index in range(len(self._texts)):
                opening = {
                    "index": index,
                    "delta": {"role": "assistant", "content": ""},
                    "finish_reason": None,
                }
                yield {**self._head(), "choices": [{**opening, "logprobs": None}], **more}
        async for index, piece in self._pieces:
            if piece.finish == "failed":
                yield RefusedError(500, piece.error, "server_error").body()
                return
            if piece.text or not self._chat:
                finish = None if self._chat else piece.finish
                yield {**self._head(), "choices": [self._part(index, piece.text, finish)], **more}
            if piece.finish is not None:
                self._last[index] = piece
                if self._chat:
                    yield {**self._head(), "choices": [self._part(index, None, piece.finish)], **more}
        if with_usage:
            yield {**self._head(), "choices": [], "usage": self._usage()}

    def _head(self, whole: bool = False) -> dict[str, Any]:
        kind = "text_completion"
        if self._chat:
            kind = "chat.completion" if whole else "chat.completion.chunk"
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _choice(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        return {"index": index, **said, "logprobs": None, "finish_reason": finish}

    def _part(self, index: int, text: str | None, finish: str | None) -> dict[str, Any]:
        if not self._chat:
            return self._choice(index, text or "", finish)
        delta = {} if text is None else {"content": text}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}

    def _usage(self) -> dict[str, int]:
        made = sum(piece.tokens for piece in self._last.values())
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self._prompt_tokens + made,
        }
