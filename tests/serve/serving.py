"""Servers as processes, and plain HTTP, which sends what OpenAI's client would not."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import waiting

Answer = tuple[int, dict[str, str], bytes]


class Server:
    """`bellbox serve`, ready."""

    def __init__(self, model: Path, *flags: str, **environment: str) -> None:
        start = "from bellbox.cli.main import main; main()"
        command = [sys.executable, "-c", start, "serve", str(model), "--port", "0", *flags]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
        assert self.process.stdout is not None
        self.said: list[str] = []
        while not self.said or not self.said[-1].startswith("serving "):
            line = self.process.stdout.readline()
            assert line, f"it ended: {self.process.communicate()[1]}"
            self.said.append(line)
        self.name, _, self.url = self.said[-1].split()[1:]

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Its exit code and what it said in the end."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        _, error = waiting.finish(self.process)
        return self.process.returncode, error


def get(server: Server, path: str, **headers: str) -> Answer:
    connection = http.client.HTTPConnection(*server.address, timeout=60)
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def ask(
    server: Server,
    body: dict[str, Any] | bytes,
    content_type: str = "application/json",
    path: str = "/v1/completions",
    **headers: str,
) -> Answer:
    """One POST."""
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection(*server.address, timeout=60)
    try:
        connection.request("POST", path, sent, {"content-type": content_type, **headers})
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def open_stream(server: Server, body: dict[str, Any], **headers: str) -> socket.socket:
    """A connection on which a streamed request was sent, and nothing read."""
    sent = json.dumps({**body, "stream": True}).encode()
    lines = {
        "host": "localhost",
        "content-type": "application/json",
        "content-length": str(len(sent)),
        **headers,
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    connection = socket.create_connection(server.address, timeout=60)
    connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n".encode() + sent)
    return connection


def read_until(connection: socket.socket, what: bytes) -> bytes:
    """What comes up to and with `what`, or until the server ends it."""
    read = b""
    while what not in read and (more := connection.recv(65536)):
        read += more
    return read


def text_of(stream: bytes) -> str:
    """The text of a stream's events, whatever stands around them."""
    events = [line[6:] for line in stream.split(b"\n") if line.startswith(b"data: {")]
    return "".join(choice["text"] for event in events for choice in json.loads(event).get("choices", []))


def metric(server: Server, name: str, **headers: str) -> float:
    """A number of /metrics."""
    lines = get(server, "/metrics", **headers)[2].decode().splitlines()
    return float(next(line.rpartition(" ")[2] for line in lines if line.startswith(f"{name} ")))
