"""Hostile command lines (`command_lines.py`): each must end as its kind says, in bounded time and memory.

python benchmarks/reliability/commands.py                 # each in a process of its own, some twenty minutes
python benchmarks/reliability/commands.py --forked        # forked from one that has imported everything
python benchmarks/reliability/commands.py --only generate --show
python benchmarks/reliability/commands.py --kinds full stopped
"""

from __future__ import annotations

import argparse
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import command_lines
import torch
import world

SECONDS, WAITING = 60, 300.0
"""Of the processor that a command may take, and of the clock: other processes may take its time."""
MEMORY = 3 << 30
"""Bytes that a command may have in memory at most; Python, torch and what they import take a sixth of it."""
FILE_BYTES = 500
"""What a file may grow to on the full disk."""


@dataclass(frozen=True)
class Case:
    """A command line, and how it is run."""

    command: str
    kind: str
    """One of `KINDS`."""
    signal: int = 0
    """Sent after `delay` seconds."""
    delay: float = 0.0


def cases() -> Iterator[Case]:
    """All of them."""
    for kind in ("refused", "taken", "cut", "full"):
        for command in getattr(command_lines, kind.upper()):
            yield Case(command, kind)
    for number, command in enumerate(command_lines.STOPPED):
        for which in (signal.SIGTERM, signal.SIGINT):
            for delay in (0.1, 0.3 + number % 3, 4.0):
                yield Case(command, "stopped", which, delay)


KINDS = ("refused", "taken", "cut", "full", "stopped")


def short() -> list[Case]:
    """Some of each kind, for the tests: those that take no long."""
    everything = [
        case for case in cases() if case.delay < 1 and not case.command.startswith(("demo", "bench"))
    ]
    steps = {"refused": 24, "taken": 7, "cut": 6, "full": 4, "stopped": 13}
    return [one for kind, step in steps.items() for one in [c for c in everything if c.kind == kind][3::step]]


def words_of(command: str, names: dict[str, str]) -> list[str]:
    """The arguments that a line stands for."""
    words = command.split()
    macros = {"@train": (command_lines.TRAIN, "--folder"), "@ptq": (command_lines.PTQ, "--out")}
    if words[0] in macros:
        line, place = macros[words[0]]
        words = [*line.split(), *([] if place in words else [place, "{new}"]), *words[1:]]
    return [word.format(**names) for word in words]


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int | None
    """None where it ran out of time."""
    error: str
    seconds: float
    memory: int
    """Bytes at most."""

    def fault(self, case: Case) -> str | None:
        """What is wrong with it; None where nothing is."""
        lines = self.error.splitlines()
        last = lines[-1] if lines else ""
        if self.code is None:
            return "no end"
        if "Traceback" in self.error or "Exception ignored" in self.error:
            return f"traceback: {last}"
        if self.memory > MEMORY:
            return f"{self.memory >> 20} MiB"
        if self.code not in _codes(case):
            return f"exit code {self.code}: {last}"
        said = [line for line in lines if line.startswith("bellbox: error: ")]
        if self.code == 2 and (
            len(said) != 1 or said[0] != last or (case.kind == "refused" and len(lines) > 1)
        ):
            return f"{len(lines)} lines: {lines[0] if lines else ''}"
        return None


def _codes(case: Case) -> tuple[int, ...]:
    """Exit codes that a case may end with."""
    if case.kind == "stopped":
        return 0, 128 + case.signal
    return {"refused": (2,), "taken": (0,), "cut": (0, 2, 141), "full": (2,)}[case.kind]


def _limits(case: Case) -> None:
    """In the process of the command, before it begins."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell has what runs in the background ignore it
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    if case.kind == "full":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))


def _output(case: Case) -> int:
    """A handle for standard output: nobody reads of it where it is cut."""
    if case.kind != "cut":
        return os.open(os.devnull, os.O_WRONLY)
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def _ended(child: int, case: Case, begun: float) -> tuple[int | None, int]:
    """Wait for a process; its exit code and the memory that it took. It is ended where it takes too long."""
    handle = os.pidfd_open(child)
    wait = select.poll()
    wait.register(handle, select.POLLIN)
    if case.signal and not wait.poll(1000 * case.delay):
        os.kill(child, case.signal)
    ready = wait.poll(1000 * max(0, WAITING - time.monotonic() + begun))
    os.close(handle)
    if not ready:
        os.kill(child, signal.SIGKILL)
    _, status, used = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return None if not ready or code in (-signal.SIGXCPU, -signal.SIGKILL) else code, used.ru_maxrss * 1024


def in_process(case: Case, words: list[str], cwd: Path) -> Outcome:
    """Run a command in a process of its own."""
    begun, output = time.monotonic(), _output(case)
    code = "from bellbox.cli.main import main; main()"
    with tempfile.TemporaryFile() as error:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=error,
            cwd=cwd,
            preexec_fn=lambda: _limits(case),
        )
        os.close(output)
        ended, memory = _ended(process.pid, case, begun)
        process.returncode = -1 if ended is None else ended  # else it would be waited for again
        error.seek(0)
        text = error.read().decode(errors="replace")
    return Outcome(ended, text, time.monotonic() - begun, memory)


def forked(case: Case, words: list[str], cwd: Path) -> Outcome:
    """Run a command in a fork of this process, which has imported everything already."""
    begun, output = time.monotonic(), _output(case)
    with tempfile.TemporaryFile() as error:
        child = os.fork()
        if not child:
            _in_fork(case, words, cwd, output, error.fileno())
        os.close(output)
        ended, memory = _ended(child, case, begun)
        error.seek(0)
        text = error.read().decode(errors="replace")
    return Outcome(ended, text, time.monotonic() - begun, memory)


def _in_fork(case: Case, words: list[str], cwd: Path, output: int, error: int) -> None:
    """Be the command; does not return."""
    import bellbox.cli.main

    code = 70
    try:
        os.chdir(cwd)
        for number, handle in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, error)):
            os.dup2(handle, number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        _limits(case)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            bellbox.cli.main.main(words)
            code = 0
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else 0 if exit.code is None else 1
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stderr.flush()
    finally:
        os._exit(code)


def preload() -> None:
    """Import what the commands import, for `forked`."""
    import importlib

    from bellbox.cli import main

    torch.set_num_threads(1)
    for name in main.COMMANDS:
        importlib.import_module(f"bellbox.cli.{name}")


def listing(root: Path) -> dict[str, tuple[int, int, int]]:
    """Every file with its kind, size and time, to see that nothing has changed."""
    found = {}
    for path in sorted(root.rglob("*")):
        about = path.lstat()
        is_file = path.is_file() and not path.is_symlink()
        found[str(path.relative_to(root))] = (
            about.st_mode,
            *((about.st_size, about.st_mtime_ns) if is_file else (0, 0)),
        )
    return found


def _left(case: Case, changed: Iterable[str]) -> list[str]:
    """Of the files that changed, those that should not have."""
    changed = sorted(name for name in changed if not name.endswith(".lock"))
    if case.kind == "refused":
        return changed
    hidden = [name for name in changed if any(part.startswith(".") for part in Path(name).parts)]
    ours = {"taken": ("new", "markupnames", "run"), "cut": ("new", "markupnames"), "stopped": ("new",)}
    places = ours.get(case.kind, ("new",))
    return hidden or [name for name in changed if not name.startswith(places)]


def try_all(
    chosen: Iterable[Case],
    how: Callable[[Case, list[str], Path], Outcome],
    tell: Callable[[Case, Outcome, str | None], None],
) -> int:
    """Run commands; returns how many are at fault."""
    faults = 0
    with tempfile.TemporaryDirectory(prefix="bellbox-commands-") as folder:
        root = Path(folder)
        names = world.make_world(root)
        with world.small_disks(root) as mounted:
            for case in chosen:
                if not mounted and any(place in case.command for place in ("{full}", "{readonly}")):
                    continue
                before = listing(root)
                outcome = how(case, words_of(case.command, names), root)
                after = listing(root)
                fault = outcome.fault(case)
                changed = {
                    name for name in before.keys() | after.keys() if before.get(name) != after.get(name)
                }
                if fault is None and (left := _left(case, changed)):
                    fault = f"left behind: {', '.join(left[:5])}"
                for name in {name.split("/")[0] for name in changed}:
                    if name.startswith("new"):
                        shutil.rmtree(root / name)
                faults += fault is not None
                tell(case, outcome, fault)
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--forked", action="store_true")
    parser.add_argument("--only", nargs="+", default=[""], help="commands that contain one of these")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--show", action="store_true", help="the line of each")
    options = parser.parse_args()
    if options.forked:
        preload()
    chosen = [
        case
        for case in cases()
        if case.kind in options.kinds and any(part in case.command for part in options.only)
    ]
    tried: list[Case] = []

    def tell(case: Case, outcome: Outcome, fault: str | None) -> None:
        tried.append(case)
        if fault is not None or options.show:
            said = outcome.error.strip() if fault is None else f"FAULT {fault[:300]}"
            how = f"{case.kind} {signal.Signals(case.signal).name}" if case.signal else case.kind
            print(f"[{how}] bellbox {case.command}\n    {said}   ({outcome.seconds:.1f} s)", flush=True)

    faults = try_all(chosen, forked if options.forked else in_process, tell)
    print(", ".join(f"{sum(case.kind == kind for case in tried)} {kind}" for kind in KINDS))
    print(f"{len(tried)} command lines, {faults} at fault")
    sys.exit(faults > 0)


if __name__ == "__main__":
    main()
