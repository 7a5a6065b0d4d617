"""Docstrings of public names: an example that runs, and arguments, results and errors that are said."""

from __future__ import annotations

import doctest
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bellbox as bb
import bellbox.optim
from bellbox import recipe
from bellbox.core import grid
from bellbox.ops import dispatch
from bellbox.quantizers import Quantizer, base, build_quantizer, check_method, straight_through

PUBLIC: dict[str, Any] = {
    **{f"bellbox.{name}": getattr(bb, name) for name in bb.__all__ if name != "__version__"},
    **{f"bellbox.optim.{name}": getattr(bellbox.optim, name) for name in bellbox.optim.__all__},
    **{f"Recipe.{name}": getattr(bb.Recipe, name) for name in ("of", "bbq", "rule_for")},
    "recipe_from_dict": recipe.recipe_from_dict,
    "Quantizer": Quantizer,
    "build_quantizer": build_quantizer,
    "check_method": check_method,
    "set_debug": base.set_debug,
    "Grid": grid.Grid,
    "Levels": grid.Levels,
    "Levels.gaussian": grid.Levels.gaussian,
    "Levels.uniform": grid.Levels.uniform,
    "ClipRange": straight_through.ClipRange,
    "Backend": dispatch.Backend,
}
"""Everything that a program of somebody else's is meant to name."""


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    before = dict(base.METHODS)
    torch.manual_seed(0)
    yield
    base.METHODS.clear()
    base.METHODS.update(before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PUBLIC)
def test_its_example_runs(name: str) -> None:
    text = inspect.getdoc(PUBLIC[name]) or ""
    scope = {"bb": bb, "torch": torch, "nn": nn}
    example = doctest.DocTestParser().get_doctest(text, scope, name, None, None)
    assert example.examples, f"{name} has no example"
    said: list[str] = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    runner.run(example, out=said.append)
    assert runner.failures == 0, "".join(said)


def functions() -> list[str]:
    return [name for name, each in PUBLIC.items() if inspect.isroutine(each)]


@pytest.mark.parametrize("name", functions())
def test_it_says_what_it_takes(name: str) -> None:
    """Each argument by name, where there are two or more; a result, where there is one."""
    text = inspect.getdoc(PUBLIC[name]) or ""
    asked = [
        each for each in inspect.signature(PUBLIC[name]).parameters if each not in ("self", "optimizers")
    ]
    if len(asked) > 1:
        missing = [each for each in asked if f"\n    {each}: " not in text]
        assert missing == [], f"{name} does not say what they are: {', '.join(missing)}"


def test_words_that_say_nothing_are_not_there() -> None:
    for name, each in PUBLIC.items():
        text = inspect.getdoc(each) or ""
        first = text.splitlines()[0]
        assert len(first.split()) > 3, f"{name}: {first!r}"
        assert not first.lower().startswith("see "), name
