"""Mutated files of every format that Bellbox reads, each given to its real reader: what becomes of them.

    python benchmarks/reliability/fuzz.py --count 100000 --seed 1          # all formats, an hour or two
    python benchmarks/reliability/fuzz.py --formats packed npz --count 2000
    python benchmarks/reliability/fuzz.py --formats yaml --replay 417      # one mutation again, with its traceback

A mutation is a function of (format, seed, number). It knows the file's structure: it changes values of JSON, headers of
safetensors, NumPy and IDX, lines of JSON lines, YAML as text and as values, and bytes anywhere; where a format has
checksums, half of the mutated files are sealed anew, so that what lies behind the checksums is reached as well. Now and
then a pipe, a folder, a link or nothing stands where the file was.

Readers run in a forked worker with a limit of time and of memory. Verdicts:

    refused      one line of BellboxError
    same         read as what it was before
    read         read as something else, where the format has no checksum or was sealed anew
    another      read as something else although its checksums do not match: a failure, as are all that follow
    traceback    another exception than BellboxError, or a message of several lines
    noise        something was printed past the message (a panic of Rust's)
    memory       more than twice what the unchanged file takes, and 256 MiB
    hang         more than 10 seconds of the processor, or of waiting for what does not come
    crash        the process died
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import torch
from mutations import Random, mutation_of
from specimens import FORMATS, Format

from bellbox.errors import BellboxError

SECONDS = 10.0
MEMORY = 256 << 20
"""Beyond twice the honest amount."""
ADDRESSES = 6 << 30
"""Bytes of address space that a worker may ask for beyond what it begins with."""
SCRATCH = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Where the files lie: in memory, so that the disk is not waited for."""
ROUND = 2000
"""Mutations, after which it is said how far it has come."""
GOOD = ("refused", "same", "read")
BAD = ("another", "traceback", "noise", "memory", "hang", "crash")


def _replace(file: Path, draw: Random) -> None:
    """Have something else than a file stand in its place, or nothing."""
    file.unlink()
    kind = draw.randrange(7)
    if kind == 0:
        os.mkfifo(file)
    elif kind == 1:
        file.mkdir()
    elif kind == 2:
        file.touch()
    elif kind < 6:
        file.symlink_to(("nowhere", "/dev/zero", file.name)[kind - 3])


def mutate(kind: Format, good: Path, folder: Path, draw: Random) -> bool:
    """Copy a good folder and mutate a file of it; returns whether another content is then allowed: nothing vouches for
    it, or its checksums were made to match again."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    files = sorted(file for pattern in kind.files for file in folder.glob(pattern) if file.is_file())
    file = draw.choice(files)
    if draw.randrange(25) == 0:
        _replace(file, draw)
    else:
        file.write_bytes(mutation_of(file.name)(file.read_bytes(), draw))
    if any(fnmatch(str(file.relative_to(folder)), pattern) for pattern in kind.bound):
        return False
    if kind.seal is None:
        return True
    if not file.is_file() or draw.randrange(2):  # whoever seals would wait for a pipe
        return False
    try:
        kind.seal(folder)
    except Exception:  # there is no longer anything to seal
        return False
    return True


# --- the worker ---


@dataclass
class Verdicts:
    """What became of a format's mutations."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Failures by what they say, and the numbers of the mutations."""

    def add(self, more: Verdicts) -> None:
        """Those of further mutations."""
        self.counts += more.counts
        for said, numbers in more.examples.items():
            self.examples.setdefault(said, []).extend(numbers)

    @property
    def total(self) -> int:
        """How many there are."""
        return sum(self.counts.values())

    @property
    def failures(self) -> int:
        return sum(self.counts[name] for name in BAD)


def _peak() -> int:
    """Bytes in memory at most since the last `_forget_peak`."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def _forget_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def judge(kind: Format, good: Path, folder: Path, seed: str, noise: int) -> tuple[str, str]:
    """The verdict on one mutation, in the process that asks, and what there is to say of it."""
    sealed = mutate(kind, good, folder, Random(seed))
    os.ftruncate(noise, 0)
    os.lseek(noise, 0, os.SEEK_SET)
    _forget_peak()
    before = _peak()
    try:
        content = repr(kind.read(folder))
        verdict = "same" if content == kind.content else "read" if sealed else "another"
        said = ""
    except BellboxError as error:
        verdict, said = ("refused" if "\n" not in str(error) else "traceback"), str(error)
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        ours = [one for one in traceback.extract_tb(error.__traceback__) if "/bellbox/" in one.filename] or [
            last
        ]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
        verdict, said = (
            "traceback",
            f"{type(error).__name__} at {where}: {' '.join(str(error).split())[:150]}",
        )
    if _peak() - before > 2 * kind.honest + MEMORY:
        verdict, said = "memory", f"{(_peak() - before) >> 20} MiB; {verdict} {said}"
    elif verdict in GOOD and os.fstat(noise).st_size:
        verdict, said = "noise", os.pread(noise, 200, 0).decode(errors="replace")
    return verdict, said


def _work(name: str, good: Path, seed: int, numbers: list[int], out: int) -> None:
    """Judge mutations one after another; a line before and one after each."""
    kind = FORMATS[name]
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESSES, resource.RLIM_INFINITY))
    warnings.simplefilter("ignore")  # meant for the user, and no line of an error
    noise = os.memfd_create("noise")
    os.dup2(noise, 2)
    folder = good.with_name(f"{name}-mutated-{os.getpid()}")
    for number in numbers:
        os.write(out, f"{number}\n".encode())
        found = judge(kind, good, folder, f"{name} {seed} {number}", noise)
        os.write(out, (json.dumps([number, *found]) + "\n").encode())
    shutil.rmtree(folder, ignore_errors=True)


class _Watch:
    """Says when a worker has worked on one mutation, or waited, for too long; other processes may take its time."""

    def __init__(self, child: int, limit: float) -> None:
        self._stat, self._limit, self._unit = Path(f"/proc/{child}/stat"), limit, os.sysconf("SC_CLK_TCK")
        self.begin()

    def begin(self) -> None:
        """The next mutation."""
        self._begun = self._last = self._used()
        self._moved = time.monotonic()

    def _used(self) -> float:
        fields = self._stat.read_text().rpartition(")")[2].split()
        self._runs = fields[0] in "RD"
        return (int(fields[11]) + int(fields[12])) / self._unit

    def is_over(self) -> bool:
        """Whether that time has come."""
        used, now = self._used(), time.monotonic()
        if used != self._last or self._runs:
            self._last, self._moved = used, now
        return used - self._begun > self._limit or now - self._moved > self._limit


def run_format(name: str, good: Path, seed: int, numbers: list[int], limit: float = SECONDS) -> Verdicts:
    """Judge mutations in forked workers; a new one is started where one dies or hangs."""
    found = Verdicts()
    waiting = list(numbers)

    def note(number: int, verdict: str, said: str) -> None:
        found.counts[verdict] += 1
        if verdict in BAD:
            found.examples.setdefault(f"{verdict}: {said}", []).append(number)

    while waiting:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            code = 1
            try:
                os.close(reading)
                _work(name, good, seed, waiting, writing)
                code = 0
            finally:
                os._exit(code)
        os.close(writing)
        current, buffer, ended, watch = waiting[0], b"", False, _Watch(child, limit)
        while not ended:
            ready, _, _ = select.select([reading], [], [], 0.5)
            if not ready and not watch.is_over():
                continue
            data = os.read(reading, 1 << 16) if ready else b""
            if not data:
                os.kill(child, signal.SIGKILL) if not ready else None
                _, status = os.waitpid(child, 0)
                if current in waiting:
                    how = "hang" if not ready else "crash"
                    note(current, how, f"signal {os.WTERMSIG(status)}" if ready else f"{limit:g} s")
                    waiting.remove(current)
                ended = True
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                value = json.loads(line)
                if isinstance(value, int):
                    current = value
                    watch.begin() if not ended else None
                else:
                    note(*value)
                    waiting.remove(value[0])
        os.close(reading)
    return found


def prepare_format(name: str, root: Path) -> Path:
    """A good folder of a format, and what reading it gives and takes."""
    good = root / name
    good.mkdir(parents=True)
    kind = FORMATS[name]
    kind.make(good)
    kind.content = repr(kind.read(good))
    _forget_peak()
    before = _peak()
    assert repr(kind.read(good)) == kind.content, f"{name}: reading it twice gives two contents"
    kind.honest = _peak() - before
    return good


def run(
    formats: list[str],
    count: int,
    seed: int,
    first: int = 0,
    limit: float = SECONDS,
    tell: Callable[[dict[str, Verdicts]], None] = lambda _: None,
) -> dict[str, Verdicts]:
    """Judge some `count` mutations, spread over the formats by their shares, in rounds: `tell` is called after each.

    Ctrl-C ends it early.
    """
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    shares = sum(FORMATS[name].share for name in formats)
    found = {name: Verdicts() for name in formats}
    with (
        tempfile.TemporaryDirectory(prefix="bellbox-fuzz-", dir=SCRATCH) as root,
        suppress(KeyboardInterrupt),
    ):
        good = {name: prepare_format(name, Path(root)) for name in formats}
        for begin in range(0, count, ROUND):
            for name in formats:
                ends = [
                    math.ceil(n * FORMATS[name].share / shares) for n in (begin, min(count, begin + ROUND))
                ]
                numbers = range(first + ends[0], first + ends[1])
                found[name].add(run_format(name, good[name], seed, list(numbers), limit))
            tell(found)
    return found


def replay(name: str, seed: int, number: int) -> None:
    """One mutation in this process, with the traceback that it may end in."""
    with tempfile.TemporaryDirectory() as root:
        good = prepare_format(name, Path(root))
        folder = Path(root) / "mutated"
        sealed = mutate(FORMATS[name], good, folder, Random(f"{name} {seed} {number}"))
        print("checksums match" if sealed else "checksums as they were")
        for file in sorted(one for one in folder.rglob("*") if one.is_file()):
            old = good / file.relative_to(folder)
            if not old.is_file() or old.read_bytes() != file.read_bytes():
                print(f"{file.relative_to(folder)}: {file.read_bytes()[:600]!r}")
        content = repr(FORMATS[name].read(folder))
        print("the same" if content == FORMATS[name].content else f"read: {content[:600]}")


def show(name: str, verdicts: Verdicts) -> None:
    """A format's line, and what failed."""
    print(name.ljust(14) + "".join(f"{verdicts.counts[each]:10,}" for each in (*GOOD, *BAD)), flush=True)
    for said, numbers in sorted(verdicts.examples.items(), key=lambda item: -len(item[1])):
        print(f"    {len(numbers):5,} x {said[:240]}   (--formats {name} --replay {numbers[0]})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--count", type=int, default=1200, help="mutations in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutation of each format")
    parser.add_argument("--replay", type=int, help="a mutation of the one format that is named")
    command = parser.parse_args()
    if command.replay is not None:
        replay(command.formats[0], command.seed, command.replay)
        return
    begun = time.monotonic()

    def tell(found: dict[str, Verdicts]) -> None:
        total, failed = (
            sum(each.total for each in found.values()),
            sum(each.failures for each in found.values()),
        )
        print(
            f"{total:,} mutations, {failed} failures, {time.monotonic() - begun:.0f} s",
            file=sys.stderr,
            flush=True,
        )

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    found = run(command.formats, command.count, command.seed, command.first, tell=tell)
    print("format".ljust(14) + "".join(each.rjust(10) for each in (*GOOD, *BAD)))
    for name, verdicts in found.items():
        show(name, verdicts)
    total = Counter[str]()
    for verdicts in found.values():
        total += verdicts.counts
    show("all", Verdicts(total))
    print(f"{total.total():,} mutations, seed {command.seed}, {time.monotonic() - begun:.0f} s")
    sys.exit(any(each.failures for each in found.values()))


if __name__ == "__main__":
    main()
