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
