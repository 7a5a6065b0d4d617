"""Flags that are given twice, and what the parser says in one line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from bellbox.cli.output import parse_flags
from bellbox.cli.train import parse
from bellbox.errors import BellboxError


@dataclass(frozen=True)
class Inner:
    names: dict[str, int] = field(default_factory=dict)
    pair: tuple[int, int] = (1, 2)


@dataclass(frozen=True)
class Command:
    inner: Inner = Inner()
    rows: tuple[int, ...] = ()
    seed: int | None = None
    check: bool = True
    file: Path | None = None


def parsed(*words: str) -> Command:
    return parse_flags(Command, list(words), "bellbox test", "A test.")


def test_values_of_a_flag_of_many_add_up_over_its_repetitions() -> None:
    assert parsed("--rows", "1", "2", "--seed", "3", "--rows=4", "--rows", "5").rows == (1, 2, 4, 5)
    given = parsed("--inner.names", "a", "1", "--seed", "3", "--inner.names", "b", "2")
    assert given == Command(inner=Inner({"a": 1, "b": 2}), seed=3)


@pytest.mark.parametrize(
    "words",
    [
        ("--seed", "1", "--seed", "1"),
        ("--seed=1", "--seed", "2"),
        ("--check", "--no-check"),
        ("--inner.pair", "1", "2", "--inner.pair", "3", "4"),
        ("--file", "a", "--file", "b"),
    ],
)
def test_a_flag_of_one_value_is_not_given_twice(words: tuple[str, ...]) -> None:
    with pytest.raises(BellboxError, match=r"is given twice; leave one of them out"):
        parsed(*words)


def test_pairs_of_a_training_run_add_up_and_a_key_is_not_given_twice() -> None:
    words = [
        "--model.overrides",
        "hidden_size=32",
        "--steps",
        "2",
        "--model.overrides",
        "num_hidden_layers=1",
    ]
    assert parse(words)[0].model.overrides == {"hidden_size": 32, "num_hidden_layers": 1}
    for repeated in (["a=1", "a=2"], ["a=1", "--model.overrides", "a=1"]):
        with pytest.raises(BellboxError, match="'a' is given twice"):
            parse(["--model.overrides", *repeated])
    with pytest.raises(BellboxError, match=r"--batch.tokens is given twice"):
        parse(["--batch.tokens", "64", "--batch.tokens", "128"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("plan", "--foo", "3"), r"Unrecognized options: --foo 3"),
        (("plan", "--tokens", "many"), r"Error parsing --tokens: could not convert string to float: 'many'"),
        (("data",), r"Expected one of {prepare, info}"),
        (("data", "prepare"), r"Missing from bellbox data prepare"),
        (("bench", "kernels", "--rows"), r"--rows"),
        (("plan", "--tokens", "1", "--tokens", "2"), "--tokens is given twice"),
        (("tra\nin",), r"no command 'tra\nin'"),
    ],
)
def test_the_parser_says_one_line(refused: Callable[..., str], words: tuple[str, ...], said: str) -> None:
    assert said in refused(*words)
