"""Stop strings are found wherever tokens cut them and never given out."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bellbox.inference.stopping import StopStrings


def run(pieces: list[str], stops: list[str]) -> tuple[list[str], bool]:
    stopping = StopStrings(stops)
    given_out = [stopping.push(piece) for piece in pieces]
    return [*given_out, "" if stopping.found else stopping.flush()], stopping.found


def test_a_stop_string_across_tokens_is_not_leaked() -> None:
    out, found = run(["al", "pha be", "ta gam", "ma delta"], ["beta gamma"])
    assert found
    assert out == ["al", "pha ", "", "", ""]


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("abcd", ["abcd", "bc"], "a"),  # the one that is complete first
        ("aab", ["aab", "ab"], ""),  # of two that end together the one that begins first
        ("ababac", ["abac"], "ab"),
        ("abab", ["abac"], "abab"),
        ("no stop", [], "no stop"),
        ("x", ["x"], ""),
    ],
)
def test_by_characters_and_at_once(text: str, stops: list[str], expected: str) -> None:
    out, found = run(list(text), stops)
    assert "".join(out) == expected
    assert found == (expected != text)


@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=8),
)
def test_how_the_text_is_cut_changes_nothing(text: str, stops: list[str], cuts: list[int]) -> None:
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    out, found = run([text[a:b] for a, b in pairwise(places)], stops)
    ends = [(end, at) for end in range(len(text) + 1) for at in range(end) if text[at:end] in stops]
    assert found == bool(ends)
    assert "".join(out) == (text[: min(ends)[1]] if ends else text)
