from __future__ import annotations

import sys

import pytest

from bellbox.training.progress import Progress
from bellbox.utils.progress import clock


def test_a_terminal_gets_a_bar_and_lines_that_stay(monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with Progress(total=10, start=0) as progress:
        progress.step(3, loss=1.5)
        progress.note("a line [with brackets]")
    out = capsys.readouterr().out
    assert "a line [with brackets]" in out
    assert "3/10" in out
    assert "loss 1.500" in out


@pytest.mark.parametrize(("show", "out"), [(True, "a line\n"), (False, "")])
def test_elsewhere_there_are_lines_only(capsys, show, out):
    with Progress(total=10, start=0, show=show) as progress:
        progress.step(3, loss=1.5)
        progress.note("a line")
    assert capsys.readouterr().out == out


def test_time_is_told_in_hours_minutes_and_seconds():
    assert clock(3723.4) == "1:02:03"
