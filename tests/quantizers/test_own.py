"""Modules that a user names: which names are taken, where they are looked for, what is said of those that fail."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from bellbox.errors import BellboxError
from bellbox.quantizers.own import import_modules, modules_of
from bellbox.quantizers.registry import METHODS


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in, out of Python's path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    return tmp_path


def refusal(name: str) -> str:
    with pytest.raises(BellboxError) as caught:
        import_modules([name])
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("mine.py", "--import mine,"),
        ("folder/mine", "--import mine,"),
        ("a b", "--import a b,"),
        ("", "--import MODULE,"),
    ],
)
def test_a_file_is_no_module(here: Path, name: str, way: str) -> None:
    told = refusal(name)
    assert "takes the name of a module, not of a file" in told
    assert way in told


def test_modules_of_the_current_folder_are_found_last_and_once(here: Path) -> None:
    for name in ("found_here_a", "found_here_b"):
        (here / f"{name}.py").write_text("")
    (here / "json.py").write_text("raise RuntimeError('not this one')")
    import_modules(["found_here_a", "found_here_b", "json"])
    assert {"found_here_a", "found_here_b"} <= set(sys.modules)
    assert sys.path[-1] == str(here)
    assert sys.path.count(str(here)) == 1


def test_what_is_missing_is_named(here: Path) -> None:
    assert f"no module of that name in {here} or on the Python path" in refusal("nowhere_at_all")
    assert "no module of that name" in refusal("nowhere_at_all.inside")
    (here / "wants_more.py").write_text("import what_is_not_installed")
    assert (
        refusal("wants_more")
        == "--import wants_more: it imports what_is_not_installed, which is not installed"
    )


def test_code_that_fails_is_named_with_its_line(here: Path) -> None:
    (here / "breaks.py").write_text("def f():\n    raise RuntimeError('broken on purpose')\nf()\n")
    told = refusal("breaks")
    assert re.fullmatch(r"--import breaks: RuntimeError: broken on purpose \(.*breaks\.py, line 2\)", told)


def test_only_modules_outside_of_the_package_are_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {
        name: type(name, (), {"__module__": module})
        for name, module in (("x", "b.mine"), ("y", "a"), ("z", "b.mine"))
    }
    monkeypatch.setattr("bellbox.quantizers.own.METHODS", {**METHODS, **made})
    assert modules_of(["bbq", "x", "y", "z", "unknown"]) == ["a", "b.mine"]
