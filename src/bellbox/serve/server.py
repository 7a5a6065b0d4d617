"""The process: a socket, uvicorn on it, and an end in which running texts are finished first."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
import socket
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from bellbox.errors import BellboxError, require
from bellbox.serve.app import Service, build_app
from bellbox.serve.streaming import PATIENCE

_CONNECTIONS = 1024
"""At once; further ones are answered with 503."""
_QUEUE = 256
"""Connections that the system holds before they are taken."""


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own, which nobody else reaches."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound, so that a port that is taken is told before a model is loaded.

    Raises:
        BellboxError: it cannot be had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(_QUEUE)
    except (OSError, OverflowError, UnicodeError) as error:
        raise BellboxError(
            f"cannot listen at {host} port {port}: {getattr(error, 'strerror', None) or error}; name another --port"
        ) from None
    return sock


def address_of(sock: socket.socket) -> str:
    """The URL of a bound socket."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a line of asyncio's says more than that a client went away while it was written to."""
    return record.getMessage() != "socket.send() raised exception."


def run(service: Service, sock: socket.socket, grace: float, ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT; then let running texts end, for `grace` seconds, and return.

    A second signal ends them at once.

    Args:
        service: whose engine is started and closed here.
        sock: from `listen`.
        grace: seconds.
        ready: called when requests are answered.

    Raises:
        BellboxError: uvicorn is not installed.
    """
    uvicorn = require("uvicorn", "serve")
    logging.getLogger("asyncio").addFilter(_is_news)
    config: Any = uvicorn.Config(
        build_app(service),
        http=_protocol(),
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=_CONNECTIONS,
        timeout_graceful_shutdown=int(max(1.0, grace)) + 1,
    )

    class Server(uvicorn.Server):
        def capture_signals(self) -> Any:
            return nullcontext()  # ours, below: the engine has to know

    server: Any = Server(config)

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        signals = 0

        def stop() -> None:
            nonlocal signals
            signals += 1
            service.engine.close(abort=signals > 1)
            server.should_exit = True
            if signals == 1:
                loop.call_later(grace, service.engine.close, True)

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop)
        service.engine.start()
        serving = asyncio.ensure_future(server.serve([sock]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        ready()
        await serving

    try:
        asyncio.run(serve())
    finally:
        service.engine.close(abort=True)
        service.engine.join(5.0)
        sock.close()


def _protocol() -> Any:
    """uvicorn's HTTP by h11, which leaves a client that does not get its request said within `PATIENCE` seconds."""
    base: Any = require("uvicorn.protocols.http.h11_impl", "serve").H11Protocol

    class Patient(base):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._timer = self.loop.call_later(PATIENCE, self._leave)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            waiting = self.cycle is None or self.cycle.response_complete
            if not waiting and self._timer is not None:
                self._timer.cancel()
                self._timer = None
            elif waiting and self._timer is None:
                self._timer = self.loop.call_later(PATIENCE, self._leave)

        def connection_lost(self, exc: Exception | None) -> None:
            if self._timer is not None:
                self._timer.cancel()
            super().connection_lost(exc)

        def _leave(self) -> None:
            self._timer = None
            if not self.transport.is_closing():
                self.transport.close()

    return Patient
