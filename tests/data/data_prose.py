"""Prose for the tests of the data pipeline."""

from __future__ import annotations

WORDS = "the a bell box rings low high code level bit weight and so it goes on café 東京 over under".split()  # noqa: SIM905


def sentences(count: int, seed: int = 0) -> str:
    """Deterministic prose of `count` sentences of different lengths."""
    state, lines = seed * 7919 + 1, []
    for _ in range(count):
        words = []
        for _ in range(4 + state % 9):
            state = (state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
            words.append(WORDS[(state >> 33) % len(WORDS)])
        lines.append(" ".join(words) + ".")
    return "\n".join(lines)
