"""The thread that decodes for everybody, and the bounded queue before it.

A request waits until a slot is free, then its text is made beside the others' (`inference.batching`). What it gets are
pieces of text, handed to a callback as they are made; a reader that is slow holds up nobody, since its pieces wait with
it. A cancelled request's slot is free before the next step.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from bellbox.inference.batching import Batcher, Continuation, check_continuation
from bellbox.inference.generation import TextStream
from bellbox.inference.slots import SlotDecoder
from bellbox.inference.stopping import StopStrings

Finish = Literal["stop", "length", "failed"]
_log = logging.getLogger("bellbox.serve")


class BusyError(Exception):
    """The queue is full; a later try may find room."""


class ClosedError(Exception):
    """The engine takes no more requests."""


@dataclass(frozen=True)
class Piece:
    """What has come of a request since the last one."""

    text: str
    tokens: int
    """New tokens so far, the stop token not counted."""
    finish: Finish | None = None
    """Set on the last piece: why the text ends."""
    error: str = ""
    """Of a failed one."""


@dataclass(eq=False)
class Ticket:
    """A request in the engine."""

    continuation: Continuation
    deliver: Callable[[Piece], None]
    """Called in the engine's thread, the last time with a finish; must return at once."""
    stream: TextStream
    stops: StopStrings
    cancelled: bool = False
    submitted: float = field(default_factory=time.monotonic)


@dataclass
class Counts:
    """What metrics are made of; written by the engine's thread alone, but for `rejected`."""

    tokens: int = 0
    prompt_tokens: int = 0
    steps: int = 0
    rejected: int = 0
    cancelled: int = 0
    failed: int = 0


class Engine:
    """Decodes requests in a thread of its own; `start` it, `close` it.

    Args:
        decoder: the model in its slots.
        tokenizer: a `tokenizers.Tokenizer`.
        queue: requests that may wait for a slot.
        first_token: called with the seconds from a request to its first token.
    """

    def __init__(
        self,
        decoder: SlotDecoder,
        tokenizer: Any,
        queue: int,
        first_token: Callable[[float], object] = float,
    ) -> None:
        self._decoder, self._tokenizer, self._queue = decoder, tokenizer, queue
        self._slots = len(decoder.free)
        self._batcher = Batcher(decoder)
        self._first_token = first_token
        self._tickets: dict[Continuation, Ticket] = {}
        self._waiting: deque[Ticket] = deque()
        self._changed = threading.Condition()
        self._closing = self._aborting = False
        self._thread = threading.Thread(target=self._run, name="bellbox-engine", daemon=True)
        self.counts = Counts()

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return len(self._tickets)

    @property
    def waiting(self) -> int:
        """Requests that have none yet."""
        return len(self._waiting)

    @property
    def max_length(self) -> int:
        """Tokens of a request, prompt and new ones."""
        return self._decoder.max_length

    @property
    def is_joint(self) -> bool:
        """Whether all texts are decoded in one step, or one after the other."""
        return self._decoder.is_joint

    @property
    def is_alive(self) -> bool:
        """Whether it decodes and takes requests."""
        return self._thread.is_alive() and not self._closing

    def start(self) -> None:
        """Begin to decode."""
        self._thread.start()

    def submit(
        self,
        continuations: Sequence[Continuation],
        stops: Sequence[str],
        deliver: Callable[[int, Piece], None],
    ) -> list[Ticket]:
        """Take requests, all or none.

        Args:
            continuations: new ones.
            stops: strings that end a text and are left out of it.
            deliver: called in the engine's thread with the index of a continuation and each piece of its text; must
                return at once.

        Raises:
            BellboxError: one is longer than a slot, or has tokens that the model does not know.
            BusyError: so many do not fit into the queue now.
            ClosedError: after `close`.
        """
        for each in continuations:
            check_continuation(self._decoder, each)

        def deliver_of(index: int) -> Callable[[Piece], None]:
            return lambda piece: deliver(index, piece)

        tickets = [
            Ticket(each, deliver_of(i), TextStream(self._tokenizer, each.prompt_ids), StopStrings(stops))
            for i, each in enumerate(continuations)
        ]
        with self._changed:
            if not self.is_alive:
                raise ClosedError
            # A slot that is free will be taken from the queue at once, so it counts as room in it.
            if len(self._waiting) + len(tickets) > self._queue + max(0, self._slots - self.running):
                self.counts.rejected += 1
                raise BusyError
            self._waiting.extend(tickets)
            self._changed.notify()
        return tickets

    def cancel(self, tickets: Sequence[Ticket]) -> None:
        """Nobody wants these any longer; finished ones are left alone."""
        with self._changed:
            for ticket in tickets:
                ticket.cancelled = True
            self._changed.notify()

    def close(self, abort: bool = False) -> None:
        """Take no more requests and end when those at hand are done; at once where `abort`."""
        with self._changed:
            self._closing, self._aborting = True, self._aborting or abort
            self._changed.notify()

    def join(self, seconds: float | None = None) -> bool:
        """Wait for the end after `close`; whether it came."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._tickets or self._closing):
                    self._changed.wait()
                self._drop_cancelled()
                if self._aborting:
                    self._end_all("the server is stopping")
                if self._closing and not self._waiting and not self._tickets:
                    return
                admitted = self._admit()
            for ticket in admitted:
                self.counts.prompt_tokens += len(ticket.continuation.prompt_ids)
            try:
                changed = self._batcher.advance()
            except Exception as error:  # a defect or no memory: these requests fail, later ones may not
                _log.exception("decoding failed")
                with self._changed:
                    self._end_all(f"decoding failed: {type(error).__name__}", waiting=False)
                continue
            self.counts.steps += bool(changed)
            for ticket in [self._tickets[each] for each in changed]:
                try:
                    self._tell(ticket)
                except Exception as error:  # of the tokenizer: this text fails, others do not
                    _log.exception("no text could be made of a token")
                    self._forget(ticket)
                    self._end(ticket, "failed", "", f"no text could be made: {type(error).__name__}")

    def _admit(self) -> list[Ticket]:
        admitted: list[Ticket] = []
        while self._waiting and self._batcher.room:
            ticket = self._waiting.popleft()
            self._batcher.add(ticket.continuation)
            self._tickets[ticket.continuation] = ticket
            admitted.append(ticket)
        return admitted

    def _drop_cancelled(self) -> None:
        for ticket in [t for t in (*self._waiting, *self._tickets.values()) if t.cancelled]:
            self.counts.cancelled += 1
            self._forget(ticket)

    def _end_all(self, why: str, waiting: bool = True) -> None:
        for ticket in (*self._tickets.values(), *(self._waiting if waiting else ())):
            self._forget(ticket)
            self._end(ticket, "failed", "", why)

    def _forget(self, ticket: Ticket) -> None:
        self._batcher.remove(ticket.continuation)
        if self._tickets.pop(ticket.continuation, None) is None and ticket in self._waiting:
            self._waiting.remove(ticket)

    def _tell(self, ticket: Ticket) -> None:
        """Turn a continuation's newest token into text and give it out."""
        each, stops = ticket.continuation, ticket.stops
        if each.error is not None:
            self._forget(ticket)
            self._end(ticket, "failed", "", str(each.error))
            return
        if len(each.new_ids) == 1:
            self._first_token(time.monotonic() - ticket.submitted)
        self.counts.tokens += not each.stopped
        text = "" if each.stopped else stops.push(ticket.stream.push(each.new_ids[-1]))
        if each.finished and not stops.found:
            text += stops.push(ticket.stream.flush())
            if not stops.found:
                text += stops.flush()
        if each.finished or stops.found:
            self._forget(ticket)
            self._end(ticket, "stop" if each.stopped or stops.found else "length", text)
        elif text:
            self._give(ticket, Piece(text, len(each.new_ids)))

    def _end(self, ticket: Ticket, finish: Finish, text: str, error: str = "") -> None:
        self.counts.failed += finish == "failed"
        each = ticket.continuation
        self._give(ticket, Piece(text, len(each.new_ids) - each.stopped, finish, error))

    def _give(self, ticket: Ticket, piece: Piece) -> None:
        try:
            ticket.deliver(piece)
        except Exception:  # whoever waited is gone
            ticket.cancelled = True
