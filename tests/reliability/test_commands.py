"""Some of the hostile command lines of `benchmarks/reliability/commands.py`, forked from one process."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bellbox.data.bundled import TOKENIZER
from bellbox.errors import BellboxError

FOLDER = Path(__file__).parents[2] / "benchmarks" / "reliability"
pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork") or sys.platform == "darwin", reason="forks, as Linux can"
)


@pytest.fixture(scope="module")
def commands() -> Iterator[ModuleType]:
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("commands")
    finally:
        sys.path.remove(str(FOLDER))


def test_hostile_commands_end_as_they_should_and_change_nothing(commands: ModuleType) -> None:
    chosen = commands.short()
    assert len(chosen) >= 20
    assert {case.kind for case in chosen} == set(commands.KINDS)
    commands.preload()
    faults: list[str] = []

    def tell(case: Any, outcome: object, fault: str | None) -> None:
        if fault is not None:
            faults.append(f"bellbox {case.command}: {fault}")

    assert commands.try_all(chosen, commands.forked, tell) == len(faults)
    assert not faults, faults


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_flags_are_read_is_no_wrong_flag(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tyro

    from bellbox.cli.main import main

    monkeypatch.setattr(tyro, "cli", lambda *_, **__: os.kill(os.getpid(), number) or time.sleep(5))
    with pytest.raises(SystemExit) as left:
        main(["plan", "--tokens", "1e9", "--preset", "tiny"])
    assert left.value.code == (130 if number == signal.SIGINT else 143)


@pytest.mark.parametrize("error", [BellboxError, SystemError], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_a_library_takes_for_an_error_of_its_own_is_a_signal(
    number: signal.Signals,
    error: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from bellbox.cli import plan
    from bellbox.cli.main import main

    def swallow(_: list[str]) -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        except (KeyboardInterrupt, SystemExit):
            raise error("damaged") from None

    monkeypatch.setattr(plan, "main", swallow)
    with pytest.raises(SystemExit) as left:
        main(["plan"])
    assert left.value.code == 128 + number
    assert capsys.readouterr().err == "bellbox: interrupted\n"


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT])
def test_a_stopped_preparation_leaves_what_it_goes_on_from(tmp_path: Path, number: signal.Signals) -> None:
    """Stopped once its hidden folder is there: while text is encoded."""
    text = tmp_path / "text"
    text.write_text("It was a dark and cold night; nobody knew the way home. " * 200_000)
    words = [
        "data",
        "prepare",
        str(text),
        "--out",
        str(tmp_path / "out" / "set"),
        "--tokenizer",
        str(TOKENIZER),
    ]
    code = "from bellbox.cli.main import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code, *words], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").glob(".set*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    error = process.communicate(timeout=120)[1].decode()
    assert process.returncode == (130 if number == signal.SIGINT else 128 + number), error
    assert "Traceback" not in error
    assert [each.name for each in (tmp_path / "out").iterdir()] == [".set.preparing"]
    subprocess.run([sys.executable, "-c", code, *words], stderr=subprocess.DEVNULL, check=True)
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["set"]
