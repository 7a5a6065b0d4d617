"""Clients that do not read, do not send, or leave, without a server process."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from bellbox.serve import server as serving_process
from bellbox.serve import streaming
from bellbox.serve.streaming import EventStream, GoneError, beside, read_body

uvicorn: Any = pytest.importorskip("uvicorn", reason="uvicorn is not installed")


class Connection:
    """Both ends of an ASGI connection."""

    def __init__(self, received: list[Any], stuck_after: int | None = None) -> None:
        self._received, self._stuck_after = received, stuck_after
        self.sent: list[Any] = []
        self.gone = asyncio.Event()

    async def receive(self) -> Any:
        if self._received:
            return self._received.pop(0)
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if len(self.sent) == self._stuck_after:
            await asyncio.Event().wait()
        self.sent.append(message)


async def numbers(most: int) -> AsyncIterator[int]:
    for each in range(most):
        yield each


async def forever() -> AsyncIterator[int]:
    yield 1
    await asyncio.Event().wait()


def test_events_and_the_end() -> None:
    async def run() -> None:
        connection, closed = Connection([]), []
        await EventStream(numbers(2), lambda: closed.append(1))({}, connection.receive, connection.send)
        bodies = [each["body"] for each in connection.sent[1:]]
        assert bodies == [b"data: 0\n\n", b"data: 1\n\n", b"data: [DONE]\n\n"]
        assert [each["more_body"] for each in connection.sent[1:]] == [True, True, False]
        assert closed == [1]

    asyncio.run(run())


def test_a_client_that_reads_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "PATIENCE", 0.05)

    async def run() -> None:
        connection, closed = Connection([], stuck_after=2), []
        await EventStream(numbers(100), lambda: closed.append(1))({}, connection.receive, connection.send)
        assert (len(connection.sent), closed) == (2, [1])

    asyncio.run(run())


def test_a_client_that_leaves_ends_the_work() -> None:
    async def run() -> None:
        connection, closed = Connection([]), []
        stream = EventStream(forever(), lambda: closed.append(1))
        task = asyncio.ensure_future(stream({}, connection.receive, connection.send))
        while len(connection.sent) < 2:
            await asyncio.sleep(0)
        assert not closed
        connection.gone.set()
        await task
        assert closed == [1]
        with pytest.raises(GoneError):
            await beside(asyncio.Event().wait(), connection.receive)

    asyncio.run(run())


def test_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "PATIENCE", 0.05)

    def parts(*bodies: bytes, more: bool = False) -> list[Any]:
        last = len(bodies) - 1
        return [
            {"type": "http.request", "body": body, "more_body": more or i < last}
            for i, body in enumerate(bodies)
        ]

    async def run() -> None:
        assert await read_body(Connection(parts(b"ab", b"", b"c")).receive, 3) == b"abc"
        assert await read_body(Connection(parts(b"ab", b"cd")).receive, 3) is None
        with pytest.raises(TimeoutError):
            await read_body(Connection(parts(b"ab", more=True)).receive, 3)
        left = Connection(parts(b"ab", more=True))
        left.gone.set()
        with pytest.raises(GoneError):
            await read_body(left.receive, 3)

    asyncio.run(run())


def test_a_connection_that_says_no_request_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_process, "PATIENCE", 0.1)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    config = uvicorn.Config(
        app,
        http=serving_process._protocol(),
        ws="none",
        lifespan="off",
        log_level="warning",
        timeout_keep_alive=1,
    )
    server = uvicorn.Server(config)
    sock = serving_process.listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([sock],))
    thread.start()
    try:
        for sent in (b"", b"GET / HTTP/1.1\r\nhost: a\r\n", b"GET / HTTP/1.1\r\nhost: a\r\n\r\nGET"):
            with socket.create_connection(sock.getsockname(), timeout=60) as client:
                client.sendall(sent)
                said = b""
                while more := client.recv(1000):  # until the server closes it
                    said += more
                assert said.endswith(b"ok") == sent.endswith(b"GET")
    finally:
        server.should_exit = True
        thread.join(60)
        sock.close()


def test_which_addresses_are_this_machines() -> None:
    for host in ("127.0.0.1", "127.9.9.9", "localhost", "::1"):
        assert serving_process.is_loopback(host)
    for host in ("0.0.0.0", "::", "192.168.0.1", "example.org", "", "127.0.0.1.evil.example"):
        assert not serving_process.is_loopback(host)


def test_a_defect_is_answered_in_json() -> None:
    """By the application itself, without a server."""
    from bellbox.serve.app import Service, build_app

    class Broken:
        is_alive = True

        def text(self) -> bytes:
            raise ZeroDivisionError

        class requests:  # noqa: N801
            @staticmethod
            def labels(*_: str) -> Any:
                return type("Count", (), {"inc": lambda self: None})()

    service: Any = Service("small", Broken(), None, None, Broken(), key="a-long-secret")  # pyright: ignore
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/metrics",
        "raw_path": b"/metrics",
        "query_string": b"",
    }
    headers = [(b"host", b"a"), (b"authorization", b"Bearer a-long-secret")]
    scope |= {
        "headers": headers,
        "scheme": "http",
        "server": ("a", 1),
        "root_path": "",
        "http_version": "1.1",
    }

    async def run() -> None:
        connection = Connection([{"type": "http.request", "body": b"", "more_body": False}])
        with pytest.raises(ZeroDivisionError):  # for the log
            await build_app(service)(scope, connection.receive, connection.send)
        assert connection.sent[0]["status"] == 500
        assert b'"ZeroDivisionError in the server"' in connection.sent[1]["body"]

    asyncio.run(run())
