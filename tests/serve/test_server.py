"""A guarded server of one slot: the key, the full queue, a model without a template, and the end."""

from __future__ import annotations

import json
import logging
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import Server, ask, get, metric, open_stream, read_until, text_of

import waiting
from bellbox.cli import serve as command
from bellbox.data.tokenizer import Tokenizer
from bellbox.errors import BellboxError
from bellbox.formats.auto import open_model
from bellbox.inference.generation import generate

KEY = {"authorization": "Bearer a-long-secret"}
LONG: dict[str, Any] = {"prompt": "Once", "max_tokens": 200, "seed": 1}


@pytest.fixture(scope="module")
def guarded(serve: Callable[..., Server], floats: Path) -> Server:
    return serve(floats, "--slots", "1", "--queue", "1", BELLBOX_API_KEY="a-long-secret")


@pytest.fixture(scope="module")
def expected(floats: Path) -> str:
    """What LONG gives."""
    opened, tokenizer = open_model(floats), Tokenizer.load(floats)
    ids = torch.tensor([tokenizer.encode("Once")])
    stop = tokenizer.end_of_text
    made = [int(t) for t in generate(opened.model, ids, 200, seed=1, stop_token=stop)]
    return tokenizer.decode(made[:-1] if made[-1] == stop else made)


def test_a_model_that_decodes_one_by_one(guarded: Server, expected: str) -> None:
    assert guarded.said[1].endswith("decoded one after the other\n")
    status, _, body = ask(guarded, LONG, **KEY)
    assert status == 200
    assert json.loads(body)["choices"][0]["text"] == expected


def test_a_key_is_needed(guarded: Server) -> None:
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Basic a-long-secret"},
        {"authorization": "Bearer é"},
    ):
        for answer in (
            ask(guarded, LONG, **headers),
            get(guarded, "/v1/models", **headers),
            get(guarded, "/metrics", **headers),
        ):
            assert answer[0] == 401
            assert json.loads(answer[2])["error"]["code"] == "invalid_api_key"
    assert get(guarded, "/health")[0] == 200
    assert get(guarded, "/")[0] == 200
    assert get(guarded, "/v1/models", **KEY)[0] == 200
    assert get(guarded, "/v1/models", host="elsewhere.example", **KEY)[0] == 200


def test_without_a_key_another_host_is_refused(server: Server) -> None:
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", ""):
        assert get(server, "/v1/models", host=host)[0] == 403
    for host in ("localhost", "localhost:1", "127.0.0.1:99", "[::1]", "[::1]:8000", "LOCALHOST"):
        assert get(server, "/v1/models", host=host)[0] == 200


def test_without_a_template_a_chat_is_refused(guarded: Server) -> None:
    asked = {"messages": [{"role": "user", "content": "a"}]}
    status, _, body = ask(guarded, asked, path="/v1/chat/completions", **KEY)
    assert status == 400
    assert "no chat template" in json.loads(body)["error"]["message"]


def test_a_full_queue_and_a_client_that_leaves(guarded: Server) -> None:
    """One slot and one place to wait: the third is told to come later, until the first two have left."""
    pid = guarded.process.pid
    busy: list[socket.socket] = []
    # Fast texts end before the next one comes, so all are asked for until one is refused.
    for _ in range(400):
        busy.append(open_stream(guarded, LONG, **KEY))
        if len(busy) < 8:
            continue
        status, headers, body = ask(guarded, LONG, **KEY)
        if status == 429:
            break
    assert status == 429
    assert headers["retry-after"] == "1"
    assert json.loads(body)["error"]["code"] == "busy"
    for each in busy:
        each.close()
    waiting.wait_for(lambda: metric(guarded, "bellbox_running", **KEY) == 0, "the slot to be free", pid)
    waiting.wait_for(lambda: metric(guarded, "bellbox_waiting", **KEY) == 0, "the queue to be empty", pid)
    assert metric(guarded, "bellbox_cancelled_total", **KEY) >= 1
    assert metric(guarded, "bellbox_rejected_total", **KEY) >= 1
    assert ask(guarded, LONG, **KEY)[0] == 200


def test_it_ends_when_running_texts_are_done(guarded: Server, expected: str) -> None:
    stream = open_stream(guarded, LONG, **KEY)
    begun = read_until(stream, b"data: ")
    guarded.process.send_signal(signal.SIGTERM)
    rest = read_until(stream, b"[DONE]")
    assert text_of(begun + rest) == expected
    stream.close()
    code, error = guarded.stop()
    assert (code, error) == (0, "stopped\n")
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(guarded.address, timeout=10)


def test_a_server_for_others_needs_a_key(folder: Path) -> None:
    for flags, message in (
        (["--host", "0.0.0.0"], "can be reached by others, so a key is needed"),
        (["--host", "nowhere.invalid.", "--api-key-file", "KEYFILE"], "cannot listen at"),
        (["--api-key-file", "SHORT"], "at least 8 printable characters"),
        (["--slots", "0"], "--slots is 0; it must be 1 to 256"),
        (["--port", "70000"], "--port is 70000"),
        (["--context", "100000", "--port", "0"], "exceed the model's context of 512"),
        (["--chat-template", "BROKEN", "--port", "0"], "the chat template cannot be read"),
    ):
        for name, text in (("KEYFILE", "a-long-secret"), ("SHORT", "abc"), ("BROKEN", "{% if %}")):
            (folder.parent / name).write_text(text)
        given = [str(folder.parent / each) if each.isupper() else each for each in flags]
        with pytest.raises(BellboxError, match=message):
            command.main([str(folder), *given])


def test_a_port_that_is_taken(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(BellboxError, match="in use"):
        command.main([str(folder), "--port", str(taken.getsockname()[1])])


def test_without_its_packages_it_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(
        BellboxError, match=r"uvicorn is not installed; install it with: pip install 'bellbox\[serve\]'"
    ):
        command.main([str(folder)])


def test_a_folder_that_is_no_language_model(tmp_path: Path) -> None:
    with pytest.raises(BellboxError, match="no model here"):
        command.main([str(tmp_path), "--port", "0"])
    with pytest.raises(BellboxError, match="no such folder"):
        command.main([str(tmp_path / "absent"), "--port", "0"])


def test_a_client_that_went_away_is_no_news():
    from bellbox.serve.server import _is_news

    told = [
        logging.LogRecord("asyncio", 30, "", 0, text, None, None)
        for text in ("socket.send() raised exception.", "something else")
    ]
    assert [_is_news(each) for each in told] == [False, True]
