from __future__ import annotations

from pathlib import Path

import pytest

from bellbox.comparison import load_grid
from bellbox.errors import BellboxError
from bellbox.training import load_config
from bellbox.utils.yaml import parse_yaml


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("lr: 1\nlr: 2", "lr", 2),
        ("a: {b: 1, c: {d: 1, d: 2}}", "d", 1),
        ("rows:\n  1: {}\n  '1': {}", "1", 3),
        ("1: a\n1.0: b", "1.0", 2),
        ("- {x: 1, x: 1}", "x", 1),
        ("a: &a {x: 1, x: 2}\nb: {<<: *a}", "x", 1),
        ("a: &a {x: 1}\nb: {<<: *a, <<: *a}", "<<", 2),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_its_line(text: str, key: str, line: int) -> None:
    with pytest.raises(BellboxError, match=f"^here: line {line}: key '{key}' stands twice") as caught:
        parse_yaml(text, "here")
    assert "\n" not in str(caught.value)


def test_anchors_and_merge_keys_are_no_repetition() -> None:
    text = "a: &a {x: 1, y: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *b, y: 3}\nd: *a\n<<: *b"
    assert parse_yaml(text, "") == {
        "a": {"x": 1, "y": 1}, "b": {"x": 2, "y": 1}, "c": {"x": 2, "y": 3}, "d": {"x": 1, "y": 1}, "x": 2, "y": 1,
    }  # fmt: skip


def test_no_objects_are_made() -> None:
    with pytest.raises(BellboxError, match="not YAML"):
        parse_yaml("!!python/object/apply:os.getcwd []", "here")


def test_configurations_and_grids_are_read_strictly(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("optimizer: {lr: 1.0e-3}\noptimizer: {clip: 2.0}\n")
    with pytest.raises(BellboxError, match="key 'optimizer' stands twice"):
        load_config(file)
    file.write_text("lr: [0.1]\nrows:\n  BBQ: {}\n  BBQ: {bits: [1]}\n")
    with pytest.raises(BellboxError, match="line 4: key 'BBQ' stands twice"):
        load_grid(file)


def laughs(first: str, form: str) -> str:
    """Each line nine references to the one before it."""
    pairs = zip("abcdef", "bcdefg", strict=True)
    return f"a: &a {first}\n" + "".join(
        f"{b}: &{b} {form.format(', '.join(['*' + a] * 9))}\n" for a, b in pairs
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (laughs("[x, x]", "[{}]"), "more than 100,000 values"),
        (laughs("{x: 1}", "{{<<: [{}]}}"), "more than 100,000 values"),
        ("a: &a [*a]", "stands inside itself"),
        ("[" * 100 + "]" * 100, "more than 64 levels"),
        ("[" * 3000, "not YAML"),
        ("a: 2023-13-45", "not YAML"),
        ("a: !!timestamp x", "not YAML"),
        ("a: !!int x", "not YAML"),
        ("a: 1" + "0" * 5000, "not YAML"),
        ("a: !!python/name:os.system", "not YAML"),
    ],
)  # fmt: skip
def test_hostile_yaml_is_one_line(text: str, said: str) -> None:
    with pytest.raises(BellboxError, match=f"^here: .*{said}") as caught:
        parse_yaml(text, "here")
    assert "\n" not in str(caught.value)


def test_references_stay_allowed() -> None:
    assert parse_yaml("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}", "here")["c"] == {"x": 1, "y": 2}
