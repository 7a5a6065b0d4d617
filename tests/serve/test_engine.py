"""The engine with scripted tokens: stop strings, characters of several bytes, cancelling, failing."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import waiting
from bellbox.data.tokenizer import Tokenizer
from bellbox.inference.batching import Continuation
from bellbox.inference.sampling import Sampling
from bellbox.serve.engine import BusyError, ClosedError, Engine, Piece, Ticket
from bellbox.serve.streaming import sse


class Script:
    """In place of a decoder: after a prompt `[i]` come the tokens of script i. Steps wait for `permits`, if any."""

    def __init__(self, scripts: Sequence[Sequence[int]], slots: int = 4, vocabulary: int = 400) -> None:
        self.model, self.max_length = nn.Identity(), 1000
        self.free = list(range(slots))
        self._scripts, self._vocabulary = scripts, vocabulary
        self._at: dict[int, tuple[int, int]] = {}
        self.permits: threading.Semaphore | None = None
        self.broken = False

    def _next(self, slot: int) -> Tensor:
        script, place = self._at[slot]
        self._at[slot] = script, place + 1
        logits = torch.zeros(1, self._vocabulary)
        logits[0, self._scripts[script][place]] = 1.0
        return logits

    def prefill(self, slot: int, piece: Tensor) -> Tensor:
        self._at[slot] = int(piece[0, 0]), 0
        return self._next(slot)

    def step(self, slots: Sequence[int], tokens: Sequence[int]) -> Tensor:
        if self.permits is not None:
            self.permits.acquire()
        if self.broken:
            raise RuntimeError("no memory")
        assert [self._scripts[self._at[s][0]][self._at[s][1] - 1] for s in slots] == list(tokens)
        return torch.cat([self._next(slot) for slot in slots])

    def release(self, slot: int) -> None:
        del self._at[slot]
        self.free.append(slot)


class Words:
    """A tokenizer whose tokens are whatever pieces of text."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = words

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(self.words[one] if one < len(self.words) else "" for one in ids)


class Client:
    """Collects what the engine delivers."""

    def __init__(
        self, engine: Engine, prompts: Sequence[int], most: int, stops: Sequence[str] = (), **more: Any
    ) -> None:
        self.pieces: list[list[Piece]] = [[] for _ in prompts]
        self._queue: queue.Queue[tuple[int, Piece]] = queue.Queue()
        made = [Continuation([each], Sampling(most, 0.0, **more)) for each in prompts]
        self.tickets: list[Ticket] = engine.submit(made, stops, lambda i, piece: self._queue.put((i, piece)))

    def wait(self) -> list[str]:
        """All texts."""
        while not all(each and each[-1].finish for each in self.pieces):
            index, piece = self._queue.get(timeout=60)
            self.pieces[index].append(piece)
        return ["".join(piece.text for piece in each) for each in self.pieces]


@pytest.fixture
def started() -> Iterator[Any]:
    engines: list[Engine] = []

    def start(decoder: Any, tokenizer: Any, room: int = 8) -> Engine:
        engines.append(Engine(decoder, tokenizer, room))
        engines[-1].start()
        return engines[-1]

    yield start
    for each in engines:
        each.close(abort=True)
        assert each.join(60)


def test_a_stop_string_across_tokens_is_never_leaked(started: Any) -> None:
    words = Words(["", "al", "pha be", "ta gam", "ma delta", " on"])
    engine = started(Script([[1, 2, 3, 4, 5, 5]]), words)
    client = Client(engine, [0], 6, ["beta gamma"])
    assert client.wait() == ["alpha "]
    assert [each.text for each in client.pieces[0]] == ["al", "pha ", ""]
    assert client.pieces[0][-1].finish == "stop"
    assert client.pieces[0][-1].tokens == 4
    # What looked like its beginning comes out where no more follows.
    client = Client(engine, [0], 3, ["beta gamma"])
    assert client.wait() == ["alpha beta gam"]
    assert client.pieces[0][-1].finish == "length"


def test_a_stop_token_ends_it_and_is_not_counted(started: Any) -> None:
    engine = started(Script([[1, 2, 0, 3]]), Words(["<end>", "a", "b", "c"]))
    client = Client(engine, [0], 4, stop_token=0)
    assert client.wait() == ["ab"]
    assert (client.pieces[0][-1].finish, client.pieces[0][-1].tokens) == ("stop", 2)


def test_characters_of_several_bytes_come_out_whole(started: Any) -> None:
    """Byte tokens of accented, CJK and emoji text; a limit at every byte."""
    tokenizer = Tokenizer.train(["x"], 257)
    text = "né 日本 👩‍🚀🔔!"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    engine = started(Script([ids + [0] * 9]), tokenizer.backend)
    for most in range(1, len(ids) + 1):
        client = Client(engine, [0], most)
        (found,) = client.wait()
        assert found == text.encode()[:most].decode(errors="replace") or found == tokenizer.decode(ids[:most])
        for piece in client.pieces[0][:-1]:
            assert "\N{REPLACEMENT CHARACTER}" not in piece.text
        for piece in client.pieces[0]:
            assert json.loads(sse({"text": piece.text})[6:])["text"] == piece.text
    assert found == text


def test_requests_join_and_leave(started: Any) -> None:
    scripts = [[1 + (i + j) % 3 for j in range(50)] for i in range(9)]
    engine = started(Script(scripts, slots=3), Words(["", "a", "b", "c"]))
    clients = [Client(engine, [i], 5 + 4 * i) for i in range(9)]
    for i, client in enumerate(clients):
        assert client.wait() == ["".join("abc"[n - 1] for n in scripts[i][: 5 + 4 * i])]
    waiting.wait_for(lambda: engine.running == 0, "the slots to be free")
    assert engine.counts.tokens == sum(5 + 4 * i for i in range(9))
    assert engine.counts.prompt_tokens == 9


def test_a_full_queue_refuses_all_of_a_request_and_a_cancelled_one_makes_room(started: Any) -> None:
    script = Script([[1] * 500] * 9, slots=2)
    script.permits = threading.Semaphore(0)
    engine = started(script, Words(["", "a"]), room=1)
    first = Client(engine, [0, 1], 400)
    waiting.wait_for(lambda: engine.running == 2, "both slots to be taken")
    with pytest.raises(BusyError):
        Client(engine, [2, 3], 5)
    second = Client(engine, [2], 3)
    with pytest.raises(BusyError):
        Client(engine, [3], 5)
    assert (engine.waiting, engine.counts.rejected) == (1, 2)
    engine.cancel(first.tickets[:1])
    for _ in range(8):
        script.permits.release()
    assert second.wait() == ["aaa"]  # long before the first would have ended
    assert engine.counts.cancelled == 1
    engine.cancel(first.tickets)
    script.permits.release(500)
    waiting.wait_for(lambda: engine.running == 0, "the slots to be free")
    assert sorted(script.free) == [0, 1]


def test_a_failing_step_ends_those_who_run_and_no_more(started: Any) -> None:
    script = Script([[1] * 50] * 3, slots=1)
    script.permits = threading.Semaphore(0)
    engine = started(script, Words(["", "a"]))
    first, second = Client(engine, [0], 5), Client(engine, [1], 5)
    waiting.wait_for(lambda: engine.running == 1 and engine.waiting == 1, "one to run and one to wait")
    script.broken = True
    script.permits.release()
    first.wait()
    assert first.pieces[0][-1].finish == "failed"
    assert first.pieces[0][-1].error == "decoding failed: RuntimeError"
    script.broken = False
    script.permits.release(50)
    assert second.wait() == ["aaaaa"]


def test_a_tokenizer_that_fails_ends_that_text_alone(started: Any) -> None:
    class Fragile(Words):
        def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
            assert 2 not in ids
            return super().decode(ids)

    engine = started(Script([[1, 1, 2, 1], [1, 1, 1, 1]]), Fragile(["", "a", "b"]))
    bad, good = Client(engine, [0], 4), Client(engine, [1], 4)
    bad.wait()
    assert bad.pieces[0][-1].error == "no text could be made: AssertionError"
    assert good.wait() == ["aaaa"]


def test_the_end(started: Any) -> None:
    script = Script([[1] * 50] * 3, slots=1)
    script.permits = threading.Semaphore(0)
    engine = started(script, Words(["", "a"]))
    running = Client(engine, [0], 5)
    waiting.wait_for(lambda: engine.running == 1, "it to run")
    engine.close()
    with pytest.raises(ClosedError):
        Client(engine, [1], 5)
    assert not engine.is_alive
    script.permits.release(50)
    assert running.wait() == ["aaaaa"]
    assert engine.join(60)


def test_a_callback_that_fails_cancels_its_request(started: Any) -> None:
    engine = started(Script([[1] * 50], slots=1), Words(["", "a"]))

    def gone(index: int, piece: Piece) -> None:
        raise RuntimeError("the loop is closed")

    engine.submit([Continuation([0], Sampling(40, 0.0))], [], gone)
    waiting.wait_for(lambda: engine.counts.cancelled == 1, "it to be cancelled")
    assert Client(engine, [0], 3).wait() == ["aaa"]
