"""Strings that end a text, found wherever tokens cut them, and never given out: not even their beginning."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text on until one of some strings is complete in it.

    Which one ends the text, and where, does not depend on how the text comes in pieces: the one that is complete first,
    and of several that end at the same character the one that begins first.

    Args:
        stops: none of them empty.

    Attributes:
        found: whether the text has ended.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The part of what has come so far that no stop string can reach any more."""
        if self.found or not self._stops:
            return "" if self.found else text
        self._held += text
        ends = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self.found = True
            out, self._held = self._held[: min(ends)[1]], ""
            return out
        kept = max(map(self._begun, self._stops))
        out, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return out

    def flush(self) -> str:
        """What is held back, once no more text will come."""
        out, self._held = self._held, ""
        return out

    def _begun(self, stop: str) -> int:
        """How many characters of a stop string stand at the end of what is held."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
