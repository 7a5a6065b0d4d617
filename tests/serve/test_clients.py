"""A hundred clients at once: good ones, slow ones, some that leave and some that mean no good."""

from __future__ import annotations

import json
import random
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from serving import Server, ask, get, metric, open_stream, read_until, text_of

import waiting
from bellbox.formats.auto import open_model
from bellbox.inference.batching import generate_batch

GOOD, SLOW, LEAVING, HOSTILE = 50, 10, 25, 15
PROMPTS = ["Once upon a time", "a bell", "hello world! " * 20, "日本語", "x"]


def asked(number: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[number % len(PROMPTS)], "max_tokens": 5 + number % 30, "seed": number}


def good(server: Server, number: int) -> str:
    """A text, streamed by every second one."""
    if number % 2:
        stream = open_stream(server, asked(number))
        try:
            return text_of(read_until(stream, b"[DONE]"))
        finally:
            stream.close()
    status, _, body = ask(server, asked(number))
    assert status == 200
    return json.loads(body)["choices"][0]["text"]


def slow(server: Server, number: int) -> str:
    """A byte or two at a time, on a connection that holds next to nothing."""
    stream = open_stream(server, asked(number))
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    read = b""
    while b"[DONE]" not in read and (more := stream.recv(97)):
        read += more
    stream.close()
    return text_of(read)


def leave(server: Server, number: int) -> None:
    """Asks for a long text, and is gone: at once, or after some of it."""
    stream = open_stream(server, {**asked(number), "max_tokens": 400})
    if number % 3:
        read_until(stream, b"data: " if number % 3 == 1 else b"\n\ndata: ")
    if number % 2:  # by a reset
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    stream.close()


def hostile(server: Server, number: int) -> None:
    """No HTTP, half a request, lengths that lie, a path that climbs."""
    chance = random.Random(number)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    sent = (
        chance.randbytes(2000),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + chance.randbytes(200),
        head + b"content-length: 100000\r\n\r\n{",
        head + b"content-length: -5\r\n\r\n{}",
        head + b"content-length: 99999999999999999999\r\n\r\n{}",
        head + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}a",
        head + b"transfer-encoding: chunked\r\n\r\nFFFFFFFFFFFF\r\n{}",
        head + b"transfer-encoding: chunked\r\ncontent-length: 2\r\n\r\n{}",
        head + b"x: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET /../../etc/passwd HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET /%00%ff HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
        b"POST /v1/completions HTTP/9.9\r\n\r\n",
        head + b"expect: 100-continue\r\ncontent-length: 2000000\r\n\r\n",
        b"G" * 70_000,
    )[number % 15]
    with socket.create_connection(server.address, timeout=60) as connection:
        try:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
        except OSError:  # it has closed, which is an answer
            pass


@pytest.mark.slow
def test_a_hundred_clients(server: Server, folder: Path) -> None:
    opened = open_model(folder)
    tokenizer = opened.load_tokenizer()
    expected = {}
    for number in [*range(GOOD), *range(100, 100 + SLOW)]:
        one = asked(number)
        (ids,) = generate_batch(
            opened.model,
            [tokenizer.encode(one["prompt"])],
            one["max_tokens"],
            seeds=[number],
            stop_token=tokenizer.end_of_text,
        )
        expected[number] = tokenizer.decode(ids[:-1] if ids[-1] == tokenizer.end_of_text else ids)
    work = [(good, number) for number in range(GOOD)]
    work += [(slow, number) for number in range(100, 100 + SLOW)]
    work += [(leave, number) for number in range(200, 200 + LEAVING)]
    work += [(hostile, number) for number in range(300, 300 + HOSTILE)]
    random.Random(0).shuffle(work)
    with ThreadPoolExecutor(len(work)) as pool:
        for (what, number), found in zip(
            work, pool.map(lambda job: job[0](server, job[1]), work), strict=True
        ):
            if what in (good, slow):
                assert found == expected[number], number
    pid = server.process.pid
    waiting.wait_for(lambda: metric(server, "bellbox_running") == 0, "the slots to be free", pid)
    assert metric(server, "bellbox_waiting") == 0
    assert metric(server, "bellbox_failed_total") == 0
    assert metric(server, "bellbox_cancelled_total") > 0
    assert get(server, "/health")[0] == 200
    assert server.process.poll() is None


def test_a_client_that_never_reads_holds_up_nobody(server: Server) -> None:
    """Its text is made and waits; others get theirs."""
    stuck = [open_stream(server, {**asked(i), "max_tokens": 450}) for i in range(8)]
    assert ask(server, asked(1))[0] == 200
    for each in stuck:
        each.close()
    pid = server.process.pid
    waiting.wait_for(lambda: metric(server, "bellbox_running") == 0, "the slots to be free", pid)
