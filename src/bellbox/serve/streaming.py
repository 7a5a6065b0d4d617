"""From the engine's thread to a client, piece by piece, as long as the client is there and reads."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import suppress
from typing import Any

from bellbox.inference.batching import Continuation
from bellbox.serve.engine import Engine, Piece

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
PATIENCE = 30.0
"""Seconds that a client may take to accept a piece, or to send its body."""


class GoneError(Exception):
    """The client has left."""


class Pieces:
    """The pieces of a request's texts, in the order in which they are made.

    Closing it cancels what is not finished.

    Args:
        engine: it is submitted to here.
        continuations: of one request.
        stops: of it.

    Raises:
        BellboxError, BusyError, ClosedError: as `Engine.submit`.
    """

    def __init__(self, engine: Engine, continuations: Sequence[Continuation], stops: Sequence[str]) -> None:
        loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._left = len(continuations)
        self._engine = engine

        def deliver(index: int, piece: Piece) -> None:
            loop.call_soon_threadsafe(self._queue.put_nowait, (index, piece))

        self._tickets = engine.submit(continuations, stops, deliver)

    def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        return self

    async def __anext__(self) -> tuple[int, Piece]:
        if not self._left:
            raise StopAsyncIteration
        index, piece = await self._queue.get()
        self._left -= piece.finish is not None
        return index, piece

    def close(self) -> None:
        """Nobody wants the rest."""
        if self._left:
            self._engine.cancel(self._tickets)


async def until_gone(receive: Receive) -> None:
    """Returns when the client has left; only after the whole body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def beside(work: Awaitable[Any], receive: Receive) -> Any:
    """The result of `work`, which is given up when the client leaves.

    Raises:
        GoneError: it left.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(until_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise GoneError
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await each


class EventStream:
    """An answer of server-sent events, as an ASGI application.

    Args:
        events: JSON objects; a last event `[DONE]` follows them.
        close: called in the end, whether all was sent or not.
    """

    def __init__(self, events: AsyncIterator[Any], close: Callable[[], None]) -> None:
        self._events, self._close = events, close

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Send them; stops without a word when the client leaves, or reads nothing for `PATIENCE` seconds."""
        del scope
        try:
            with suppress(GoneError, TimeoutError, OSError):
                await beside(self._send(send), receive)
        finally:
            self._close()

    async def _send(self, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),
        ]
        await _within(send({"type": "http.response.start", "status": 200, "headers": headers}))
        async for event in self._events:
            await _within(send({"type": "http.response.body", "body": sse(event), "more_body": True}))
        await _within(send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False}))


def sse(event: Any) -> bytes:
    """One event."""
    return b"data: " + json.dumps(event, ensure_ascii=True, separators=(",", ":")).encode() + b"\n\n"


async def _within(sending: Awaitable[None]) -> None:
    async with asyncio.timeout(PATIENCE):
        await sending


async def read_body(receive: Receive, most: int) -> bytes | None:
    """A request's body; None where it is longer than `most`.

    Raises:
        GoneError: the client left.
        TimeoutError: it took longer than `PATIENCE`.
    """
    body = bytearray()
    async with asyncio.timeout(PATIENCE):
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise GoneError
            body += message.get("body", b"")
            if len(body) > most:
                return None
            if not message.get("more_body", False):
                return bytes(body)
