"""Hostile command lines: each must end with exit code 2 and one line on standard error, and leave everything as it was.

    python benchmarks/reliability/commands.py                 # each in a process of its own, some ten minutes
    python benchmarks/reliability/commands.py --forked        # forked from one that has imported everything
    python benchmarks/reliability/commands.py --only generate --show

`{packed}` and the like in a command stand for folders and files that are made first (`make_world`).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import fuzz
import torch

SECONDS = 60.0

# fmt: off
COMMANDS: tuple[str, ...] = (
    # commands and flags
    "bogus", "--bogus", "data", "data bogus", "bench", "plan", "train --bogus", "eval", "convert {packed}",
    "generate {packed}", "ptq {hf}", "report", "compare", "data info", "data prepare", "data prepare --out {new}",
    "plan --tokens 1e9 --tokens 2e9 --preset tiny", "train --steps 1 --steps 2",
    "convert {run} --out {new} --check --no-check", "train --model.overrides a=1 a=2", "train --model.overrides a",
    "eval {packed} --json", "plan --tokens", "bench kernels --rows",
    # numbers
    "plan --tokens nan --preset tiny", "plan --tokens inf --parameters 1e6", "plan --tokens -1 --preset tiny",
    "plan --tokens 1e9 --parameters 1e400", "plan --tokens 1e9 --preset nope",
    "plan --tokens 1e9 --preset tiny --bits 0", "train --steps -1", "train --steps 1e3", "train --seed 1e40",
    "train --threads 0", "train --batch.tokens 0", "train --optimizer.lr nan", "train --quantization.bits 99",
    "train --quantization.method nope", "train --model.preset nope", "train --folder {new} --threads 100000",
    "train --folder {new} --seed 99999999999999999999999999",
    "train --folder {new} --model.overrides hidden_size=1000000000",
    "train --folder {new} --model.overrides num_hidden_layers=-1", "train --folder {new} --data.context 0",
    "train --folder {new} --data.context 99999999999",
    "data prepare {text} --out {new} --vocab-size 100000000000000000000",
    "data prepare {text} --out {new} --vocab-size 1e20", "data prepare {text} --out {new} --vocab-size 1",
    "data prepare {text} --out {new} --valid-fraction 2", "data prepare {text} --out {new} --valid-fraction nan",
    "data prepare {text} --out {new} --shard-tokens 0", "generate {packed} --prompt a --max-new-tokens 0",
    "generate {packed} --prompt a --max-new-tokens 99999999999999", "generate {packed} --prompt a --temperature nan",
    "generate {packed} --prompt a --temperature -1", "generate {packed} --prompt a --top-k 0",
    "generate {packed} --prompt a --top-p 2", "generate {packed} --prompt a --seed 99999999999999999999999",
    "generate {packed} --prompt a --seed 1e40", "eval {packed} --context 0", "eval {packed} --context 99999999999",
    "eval {packed} --batch 0", "eval {packed} --stride 0", "eval {packed} --max-tokens -5",
    "eval {packed} --image-size 5", "bench kernels --bits 9", "bench kernels --threads 100000",
    "bench kernels --threads 0", "bench kernels --seconds nan", "bench kernels --shapes 0x0",
    "bench kernels --shapes 4x", "bench kernels --shapes 99999999999x99999999999", "bench model --preset nope",
    "bench model --preset tiny --prompt 99999999", "ptq {hf} --calibration {text} --out {new} --samples 0",
    "ptq {hf} --calibration {text} --out {new} --damping nan",
    "ptq {hf} --calibration {text} --out {new} --samples 99999999999",
    # paths
    "eval {missing}", "eval {text}", "eval {empty}", "eval {tokens}", "eval /dev/null", "eval {fifo}",
    "eval {packed} --data {missing}", "eval {packed} --data {packed}", "generate {hf} --prompt a",
    "generate {missing} --prompt a", "generate {packed} --prompt=", "convert {packed} --out {new}",
    "convert {hf} --out {new}", "convert {run} --out {text}", "convert {run} --out {tokens}",
    "convert {run} --out {new}/model.onnx", "convert {run} --out {new}/model.gguf", "convert {run} --out {fifo}",
    "convert {run} --out /dev/null", "convert {run} --out {link}", "convert {run} --out {text}/x",
    "convert {run} --out /proc/x", "convert {run} --out {new} --checkpoint 77",
    "convert {run} --out {new} --checkpoint nope", "convert {run} --out {new} --no-check --data {tokens}",
    "report {packed}", "report {missing}", "report {run} --out {fifo}", "report {run} --out /dev/null",
    "report {run} --out {empty}", "report {run} --out /proc/x/y", "report {run} --packed {hf}",
    "report {run} --layer nope", "report {run} --prompt=", "eval {packed} --json {fifo}",
    "eval {packed} --json /dev/full", "eval {packed} --json {empty}", "bench kernels --json {fifo}",
    "bench kernels --json /dev/null", "bench kernels --json {dead}", "data prepare {missing} --out {new}",
    "data prepare {fifo} --out {new}", "data prepare /dev/zero --out {new}", "data prepare {empty} --out {new}",
    "data prepare {text} --out {text}", "data prepare {text} --out {fifo}", "data prepare {text} --out {packed}",
    "data prepare {text} --out {link}", "data prepare {text} --out {new}/x.jsonl",
    "data prepare {text} {text} --out {new}", "data prepare {packed}/model.safetensors --out {new}",
    "data prepare {text} --out {new} --tokenizer {text}", "data prepare {text} --out {new} --tokenizer {fifo}",
    "data prepare {text} --out {new} --tokenizer /dev/zero", "data prepare {text} --out {new} --text-field body",
    "data prepare {text} --out {new} --valid {text}", "data prepare {csv} --out {new}",
    "data prepare {pdf} --out {new}", "data info {packed}", "data info {missing}", "data info {fifo}",
    "train --config {missing}", "train --config {fifo}", "train --config /dev/zero", "train --config {empty}",
    "train --config {text}", "train --config {packed}/model.safetensors", "train --folder {text}",
    "train --folder {fifo}", "train --folder {packed}", "train --folder {new} --data.source {missing}",
    "train --folder {new} --task vision --data.source {missing}.npz",
    "train --folder {new} --task vision --data.source {fifonpz}", "train --folder {new} --distill.teacher {missing}",
    "ptq {missing} --calibration {text} --out {new}", "ptq {packed} --calibration {text} --out {new}",
    "ptq {hf} --calibration {fifo} --out {new}", "ptq {hf} --calibration {text} --out {text}",
    "ptq {hf} --calibration {text} --out {new}/a.gguf", "compare {missing} --out {new}", "compare {fifo} --out {new}",
    "compare {empty}", "compare {empty} --tables", "compare {text} --out {new}", "compare /dev/zero --out {new}",
    "compare {grid}", "compare {grid} --out {text}", "compare {grid} --out {new} --jobs 0",
    "compare {names} --tables",
    # text that is no text
    "generate {packed} --prompt {broken}", "generate {packed} --prompt a --stop {broken}", "eval {broken}",
    "data prepare {broken} --out {new}", "data info {broken}", "{broken}",
    "train --data.source {broken} --folder {new}", "generate {packed} --prompt a --stop abcdefghijkl",
    "data prepare {text} --out {new} --text-field {broken}", "train --folder {new} --model.preset {broken}",
)
# fmt: on
SHORT = COMMANDS[3::7]
"""For the tests."""


def make_world(root: Path) -> dict[str, str]:
    """Folders and files that the commands name."""
    for make in (fuzz.make_packed, fuzz.make_run):
        make(root)
    for name in ("hf", "empty", "names"):
        (root / name).mkdir()
    fuzz.make_hf(root / "hf")
    fuzz.make_results(root / "names")
    lines = (root / "names" / "results.jsonl").read_text().replace('"study": "study"', '"study": "../up"')
    (root / "names" / "results.jsonl").write_text(lines)
    (root / "text").write_text(fuzz.TEXT * 100)
    (root / "csv").with_suffix(".csv").write_text("a,b\n1,2\n")
    (root / "pdf").write_text("%PDF-1.4 and more")
    (root / "grid.yaml").write_text("rows: {a: {}}\n")
    for name in ("fifo", "fifo.npz"):
        os.mkfifo(root / name)
    (root / "link").symlink_to("empty")
    (root / "dead").symlink_to("nowhere")
    paths = {
        name: name
        for name in ("packed", "run", "hf", "empty", "names", "text", "pdf", "fifo", "link", "dead")
    }
    paths |= {"tokens": "set", "csv": "csv.csv", "grid": "grid.yaml", "fifonpz": "fifo.npz", "new": "new"}
    return {
        **{key: str(root / name) for key, name in paths.items()},
        "missing": str(root / "no"),
        "broken": "\udcff\udcfe",
    }


def words_of(command: str, world: dict[str, str]) -> list[str]:
    return [word.format(**world) for word in command.split()]


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int | None
    """None where it ran out of time."""
    error: str
    seconds: float

    def fault(self) -> str | None:
        """What is wrong with it; None where nothing is."""
        lines = self.error.splitlines()
        if self.code is None:
            return "no end"
        if "Traceback" in self.error:
            return f"traceback: {lines[-1] if lines else ''}"
        if self.code != 2:
            return f"exit code {self.code}: {lines[-1] if lines else ''}"
        if len(lines) != 1 or not lines[0].startswith("bellbox: error: "):
            return f"{len(lines)} lines: {lines[0] if lines else ''}"
        return None


def in_process(words: list[str], cwd: Path) -> Outcome:
    """Run a command in a process of its own."""
    begun = time.monotonic()
    code = "from bellbox.cli.main import main; main()"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, *words],
            capture_output=True,
            check=False,
            timeout=SECONDS,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return Outcome(None, "", SECONDS)
    return Outcome(done.returncode, done.stderr.decode(errors="replace"), time.monotonic() - begun)


def forked(words: list[str], cwd: Path, limit: float = SECONDS) -> Outcome:
    """Run a command in a fork of this process, which has imported everything already."""
    import bellbox.cli.main

    begun = time.monotonic()
    ours, theirs = socket.socketpair()
    with tempfile.TemporaryFile() as error:
        child = os.fork()
        if not child:
            code = 70
            try:
                os.chdir(cwd)
                null = os.open(os.devnull, os.O_RDWR)
                for number, handle in ((0, null), (1, null), (2, error.fileno())):
                    os.dup2(handle, number)
                sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
                try:
                    bellbox.cli.main.main(words)
                    code = 0
                except SystemExit as exit:
                    code = exit.code if isinstance(exit.code, int) else 0 if exit.code is None else 1
                except BaseException:
                    import traceback

                    traceback.print_exc()
                    code = 1
                sys.stderr.flush()
            finally:
                os._exit(code)
        theirs.close()
        ready, _, _ = select.select([ours], [], [], limit)  # closed when the child ends
        if not ready:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        ours.close()
        error.seek(0)
        text = error.read().decode(errors="replace")
    return Outcome(os.waitstatus_to_exitcode(status) if ready else None, text, time.monotonic() - begun)


def preload() -> None:
    """Import what the commands import, for `forked`."""
    import importlib

    from bellbox.cli import main

    torch.set_num_threads(1)
    for name in main.COMMANDS:
        importlib.import_module(f"bellbox.cli.{name}")


def listing(root: Path) -> dict[str, tuple[int, int]]:
    """Every file with its kind and size, to see that nothing has changed."""
    found = {}
    for path in sorted(root.rglob("*")):
        about = path.lstat()
        found[str(path.relative_to(root))] = (about.st_mode, about.st_size if path.is_file() else 0)
    return found


def try_all(
    commands: tuple[str, ...],
    how: Callable[[list[str], Path], Outcome],
    tell: Callable[[str, Outcome, str | None], None],
) -> int:
    """Run commands; returns how many are at fault."""
    faults = 0
    with tempfile.TemporaryDirectory(prefix="bellbox-commands-") as folder:
        root = Path(folder)
        world = make_world(root)
        for command in commands:
            before = listing(root)
            outcome = how(words_of(command, world), root)
            fault = outcome.fault()
            changed = {
                name for name, about in listing(root).items() if before.pop(name, None) != about
            } | set(before)
            left = sorted(name for name in changed if not name.endswith(".lock"))
            if fault is None and left:
                fault = f"left behind: {', '.join(left[:5])}"
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(root / "new")
            faults += fault is not None
            tell(command, outcome, fault)
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--forked", action="store_true")
    parser.add_argument("--only", default="", help="commands that contain this")
    parser.add_argument("--show", action="store_true", help="the line of each")
    options = parser.parse_args()
    if options.forked:
        preload()
    chosen = tuple(command for command in COMMANDS if options.only in command)

    def tell(command: str, outcome: Outcome, fault: str | None) -> None:
        if fault is not None or options.show:
            said = outcome.error.strip() if fault is None else f"FAULT {fault[:300]}"
            print(f"bellbox {command}\n    {said}   ({outcome.seconds:.1f} s)", flush=True)

    faults = try_all(chosen, forked if options.forked else in_process, tell)
    print(f"{len(chosen)} command lines, {faults} at fault")
    sys.exit(faults > 0)


if __name__ == "__main__":
    main()
