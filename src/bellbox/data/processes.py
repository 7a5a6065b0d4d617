"""Units of a corpus made into parts by several processes, which speak lines of JSON: no pickles, no shared state.

A process is told numbers of units on its standard input, and says on its standard output what it has done. It ends with
its input, hence with the process that started it.
"""

from __future__ import annotations

import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from bellbox.data.tokenizer import Tokenizer
from bellbox.data.units import Job, encode_unit, load_tokenizer
from bellbox.errors import BellboxError
from bellbox.utils.processor import usable_cores

_PR_SET_PDEATHSIG = 1


class UnfinishedError(BellboxError):
    """A unit could not be made; what was made before stays good."""


def encode_here(
    job: Job, work: Path, tokenizer: Tokenizer, units: Iterator[int]
) -> Generator[dict[str, Any]]:
    """Make units one after the other in this process.

    Yields:
        What `encode_unit` says, with the unit's number as `unit`; or with it an `error`, why it could not be made.
    """
    for unit in units:
        try:
            for said in encode_unit(job, unit, work / "parts", tokenizer):
                yield {"unit": unit, **said}
        except BellboxError as error:
            yield {"unit": unit, "error": str(error)}


def encode_apart(
    job: Job, work: Path, end_of_text: int, units: Iterator[int], processes: int
) -> Generator[dict[str, Any]]:
    """Likewise in several processes at once; the units are begun in their order.

    Raises:
        UnfinishedError: a process was killed.
        OSError: a part could not be written, such as on a full disk.
    """
    job.save(work)
    said: queue.Queue[tuple[int, dict[str, Any] | None]] = queue.Queue()
    cores = max(1, usable_cores() // processes)
    workers = [_Worker(number, work, end_of_text, cores, said) for number in range(processes)]
    try:
        busy = sum(worker.give(next(units, None)) for worker in workers)
        while busy:
            number, message = said.get()
            worker = workers[number]
            if message is None:
                raise worker.ended()
            if "refused" in message:
                raise OSError(*message["refused"])
            if "done" in message:
                busy -= not worker.give(next(units, None))
            else:
                yield message
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    def __init__(self, number: int, work: Path, end_of_text: int, cores: int, said: queue.Queue[Any]) -> None:
        threads = {"RAYON_NUM_THREADS": str(cores), "OMP_NUM_THREADS": "1"}
        self._unit: int | None = None
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bellbox.data.processes", str(work), str(end_of_text)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **threads, "TOKENIZERS_PARALLELISM": "true" if cores > 1 else "false"},
            start_new_session=True,  # Ctrl-C is for the process that leads
        )
        threading.Thread(target=self._listen, args=(number, said), daemon=True).start()

    def _listen(self, number: int, said: queue.Queue[Any]) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said.put((number, json.loads(line)))
        said.put((number, None))

    def give(self, unit: int | None) -> bool:
        """Have a unit made; False where there is none."""
        self._unit = unit
        if unit is None:
            return False
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, as its output will say
            self._process.stdin.write(f"{unit}\n")
            self._process.stdin.flush()
        return True

    def ended(self) -> Exception:
        """Why it did, while there was work."""
        status = self._process.wait()
        if status < 0:
            return UnfinishedError(
                f"a process that encoded text was killed by signal {-status}, for want of memory perhaps; take fewer "
                "--processes"
            )
        return RuntimeError(f"a process that encoded text has failed (status {status}), see above")

    def stop(self) -> None:
        """End it, whatever it is doing: a part that is not finished is none."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()


def _end_with_the_leader() -> None:
    """Have the system end this process with the one that started it: what it writes would be nobody's any more."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _main(work: Path, end_of_text: int) -> None:
    _end_with_the_leader()
    # Libraries may print; the lines of JSON go out by a way of their own.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(**message: Any) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    try:
        job, tokenizer = Job.load(work), load_tokenizer(work, end_of_text)
        for line in sys.stdin:
            for said in encode_here(job, work, tokenizer, iter([int(line)])):
                tell(**said)
            tell(done=int(line))
    except BrokenPipeError:
        return  # nobody listens any more
    except OSError as error:
        with suppress(BrokenPipeError):
            tell(refused=[error.errno, error.strerror, str(error.filename or work)])


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]))
