"""Faults of jobs of several processes: what is killed, stopped or cut off goes on, and ends with the same bits.

    python benchmarks/reliability/jobs.py                  every fault, twenty times (docs/reliability.md)
    python benchmarks/reliability/jobs.py --count 3 --only killed stopped

Each fault is put upon a run that saves after every step and keeps one checkpoint. It must end with a line and an exit
code, leave a checkpoint that can be read, and go on from there. At the end model, optimizer and records are held
against those of a run that nothing happened to: bytes that differ are lost.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from fleet import PATIENCE, Fleet, Job

from bellbox.runs.checkpoint import Checkpoint, Checkpoints
from bellbox.runs.config import BatchSection, CheckpointSection, DistributedSection, TrainConfig
from bellbox.runs.config_file import save_config
from bellbox.runs.metrics import WALL_CLOCK, read_records

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "training"))
import tiny_run

TIMEOUT = 12.0
"""Seconds that a process waits for one that hangs."""
GRACE = 40.0
"""In which a job is over after that, whoever hangs: ten to find out who speaks, and a loaded machine."""


@dataclasses.dataclass
class Bench:
    """A folder with the data, a run that nothing happened to, and the means to start others."""

    folder: Path
    fleet: Fleet
    mode: str = "ddp"
    steps: int = 12
    lost: int = 0
    injected: int = 0
    survived: int = 0

    def __post_init__(self) -> None:
        tokens = self.folder / "tokens"
        if not tokens.exists():
            tiny_run.write_tokens(tokens)
        config = dataclasses.replace(
            tiny_run.config(tokens, self.folder / "none"),
            steps=self.steps,
            checkpoint_every=1,
            eval_every=max(2, self.steps // 3),
            batch=BatchSection(tokens=4 * tiny_run.CONTEXT, micro_sequences=1),
            distributed=DistributedSection(mode=self.mode, timeout=PATIENCE / 2),  # pyright: ignore[reportArgumentType]
            checkpoint=CheckpointSection(keep=1),
            threads=1,
        )
        self.config: TrainConfig = config
        save_config(config, self.folder / "config.yaml")
        reference = self.start("whole")
        assert reference.wait() == [0, 0], reference.said()

    def run(self, name: str) -> Path:
        """The folder of a run."""
        return self.folder / name

    def start(self, name: str, size: int = 2, *flags: str) -> Job:
        """Begin a run, or go on with it."""
        config = str(self.folder / "config.yaml")
        return self.fleet.start(["train", "--config", config, "--folder", str(self.run(name)), *flags], size)

    def checkpoints(self, name: str) -> Checkpoints:
        """Of a run."""
        return Checkpoints(self.run(name) / "checkpoints", 1)

    def steps_of(self, name: str) -> set[int]:
        """Steps that have a checkpoint."""
        return set(self.checkpoints(name).steps())

    def count(self, job: Job, ok: bool) -> None:
        """One fault, and whether what came of it is right; what is not is said."""
        self.injected += 1
        self.survived += ok
        if not ok:
            print("NOT SURVIVED:", job.said(), [log.read_text()[-2000:] for log in job.logs], flush=True)

    def finish(self, name: str, size: int = 2) -> Job:
        """Let a run go on to its end, and count the bytes in which it differs from the undisturbed one."""
        job = self.start(name, size)
        codes = job.wait()
        if codes != [0] * size:
            self.count(job, ok=False)
            return job
        ours, theirs = self.checkpoints(name).last(), self.checkpoints("whole").last()
        assert ours is not None
        assert theirs is not None
        self.lost += differing(ours, theirs) + (records(self.run(name)) != records(self.run("whole")))
        return job


def differing(one: Checkpoint, other: Checkpoint) -> int:
    """Bytes of model and optimizer that differ, those of missing tensors included."""
    found = 0
    for a, b in (
        (one.model_tensors(), other.model_tensors()),
        (one.optimizer_tensors(), other.optimizer_tensors()),
    ):
        for name in a.keys() | b.keys():
            if name not in a or name not in b or a[name].shape != b[name].shape:
                found += max(t[name].nbytes for t in (a, b) if name in t)
                continue
            left, right = (t[name].reshape(-1).view(torch.uint8) for t in (a, b))
            found += int((left != right).sum())
    return found


def records(run: Path) -> list[dict[str, object]]:
    """What a run measured, without the clock."""
    found = read_records(run / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key not in WALL_CLOCK} for record in found]


def one_line(job: Job, *words: str) -> bool:
    """Whether the ranks have said one line together, with these words in it."""
    said = job.said()
    return len(said) == 1 and all(word in said[0] for word in words)


# --- the faults ---


def _after_a_checkpoint(bench: Bench, job: Job, name: str, draw: random.Random) -> bool:
    """Wait until the run has saved anew, then for a random moment; False where it is over."""
    before = bench.steps_of(name)
    alive = job.until(lambda: bool(bench.steps_of(name) - before))
    time.sleep(draw.uniform(0, 0.2))
    return alive


def _in_a_save(bench: Bench, job: Job, name: str) -> bool:
    """Stop all ranks in the middle of a save."""
    folder = bench.run(name) / "checkpoints"

    def caught() -> bool:
        job.send(signal.SIGSTOP)
        if any(folder.glob(".saving-*")):
            return True
        job.send(signal.SIGCONT)
        return False

    return job.until(caught, pause=5e-3)


def killed(bench: Bench, count: int, draw: random.Random) -> None:
    """SIGKILL of all ranks: at random moments, and in the middle of a save."""
    for number in range(count):
        name = f"killed-{number // 4}"
        job = bench.start(name)
        alive = _in_a_save(bench, job, name) if number % 2 else _after_a_checkpoint(bench, job, name, draw)
        job.send(signal.SIGKILL)
        codes = job.wait()
        readable = bench.checkpoints(name).last() is not None
        bench.count(job, (readable and codes == [-9, -9]) or not alive)
        if number % 4 == 3 or number == count - 1:
            bench.finish(name)


def one_killed(bench: Bench, count: int, draw: random.Random) -> None:
    """SIGKILL of one rank: the other ends with a line."""
    for number in range(count):
        name, victim = f"one-{number // 4}", number % 2
        job = bench.start(name)
        alive = _after_a_checkpoint(bench, job, name, draw)
        begun = time.monotonic()
        job.send(signal.SIGKILL, [victim])
        codes = job.wait()
        if alive and codes[victim] == -9:
            in_time = time.monotonic() - begun < GRACE
            bench.count(job, codes[1 - victim] == 2 and in_time and one_line(job, "is gone"))
        if number % 4 == 3 or number == count - 1:
            bench.finish(name)


def stopped(bench: Bench, count: int, draw: random.Random) -> None:
    """SIGSTOP of one rank, which hangs for ever: the other ends when its patience does."""
    for number in range(count):
        name, victim = f"stopped-{number}", number % 2
        job = bench.start(name, 2, "--distributed.timeout", str(TIMEOUT))
        _after_a_checkpoint(bench, job, name, draw)
        begun = time.monotonic()
        job.send(signal.SIGSTOP, [victim])
        over = job.until(lambda job=job, other=1 - victim: job.ended(other))
        in_time = over and time.monotonic() - begun < TIMEOUT + GRACE
        job.send(signal.SIGKILL, [victim])
        codes = job.wait()
        bench.count(job, in_time and codes[1 - victim] == 2 and one_line(job, "does not answer"))
        bench.finish(name)


def terminated(bench: Bench, count: int, draw: random.Random) -> None:
    """SIGTERM, twice, as a scheduler and a launcher send it: to all, or to one; saved, and left in time."""
    for number in range(count):
        name = f"terminated-{number}"
        job = bench.start(name)
        alive = _after_a_checkpoint(bench, job, name, draw)
        begun = time.monotonic()
        job.send(signal.SIGTERM, [number % 2] if number % 3 == 2 else None)
        job.send(signal.SIGTERM, [number % 2])
        codes = job.wait()
        saved = bench.checkpoints(name).last()
        step = max((r["step"] for r in records(bench.run(name)) if isinstance(r["step"], int)), default=0)
        took = time.monotonic() - begun
        ok = saved is not None and saved.step == step and took < 30
        survived = (ok and codes == [143, 143]) or (not alive or codes == [0, 0])
        if not survived:
            at = None if saved is None else saved.step
            print(f"codes {codes}, saved at {at} of {step}, {took:.0f} s after the signal", file=sys.stderr)
        bench.count(job, survived)
        bench.finish(name)


def cut_off(bench: Bench, count: int, draw: random.Random) -> None:
    """A file-size limit that one rank meets while it saves: all end with its line."""
    for number in range(count):
        name, victim = f"cut-{number}", number % 2
        job = bench.start(name)
        alive = _after_a_checkpoint(bench, job, name, draw)
        if not job.ended(victim):
            resource.prlimit(job.pids[victim], resource.RLIMIT_FSIZE, (4096, 4096))
        codes = job.wait()
        left = list((bench.run(name) / "checkpoints").glob(".saving-*"))
        ok = codes == [2, 2] and one_line(job, "File too large") and not left
        bench.count(job, (ok and bench.checkpoints(name).last() is not None) or not alive or codes == [0, 0])
        bench.finish(name)


def full_or_read_only(bench: Bench, count: int, draw: random.Random) -> None:
    """A disk that is full, or turns read-only, while the job saves (a small tmpfs, where one may be mounted)."""
    for number in range(count):
        name = f"disk-{number}"
        place = bench.run(name) / "checkpoints"
        place.mkdir(parents=True)
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=3m", "none", place], capture_output=True
        ).returncode:
            print("no file system can be mounted here: not tried")
            return
        try:
            job = bench.start(name)
            alive = _after_a_checkpoint(bench, job, name, draw)
            words = "No space left"
            if number % 2:
                words = "Read-only file system"
                remounted = subprocess.run(["mount", "-o", "remount,ro", place], capture_output=True)
                while remounted.returncode and not job.ended(0):  # busy while a file is being written
                    remounted = subprocess.run(["mount", "-o", "remount,ro", place], capture_output=True)
            else:
                with open(place / "filler", "wb", buffering=0) as filler, suppress(OSError):
                    while True:
                        filler.write(b"\0" * 4096)
            codes = job.wait()
            readable = bench.checkpoints(name).last() is not None
            bench.count(
                job, (readable and codes == [2, 2] and one_line(job, words)) or not alive or codes == [0, 0]
            )
            subprocess.run(["mount", "-o", "remount,rw", place], check=True)
            (place / "filler").unlink(missing_ok=True)
            bench.finish(name)
        finally:
            subprocess.run(["umount", "-l", place], check=False)


def damaged(bench: Bench, count: int, draw: random.Random) -> None:
    """A shard of the last checkpoint is gone, cut or changed: the one before is taken, and the run says so."""
    for number in range(count):
        name = f"damaged-{number}"
        job = bench.start(name, 2, "--checkpoint.keep", "2")
        job.until(lambda name=name: len(bench.steps_of(name)) > 1 and max(bench.steps_of(name)) > 3)
        job.send(signal.SIGKILL)
        job.wait()
        steps = sorted(bench.steps_of(name))
        if len(steps) < 2:  # killed between the two
            continue
        victim = draw.choice(sorted(bench.checkpoints(name).path(steps[-1]).glob("shard-*")))
        content = bytearray(victim.read_bytes())
        if number % 3 == 0:
            victim.unlink()
        elif number % 3 == 1:
            victim.write_bytes(content[: draw.randrange(len(content))])
        else:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            victim.write_bytes(content)
        finished = bench.finish(name)
        bench.count(finished, one_line(finished, "passed over", victim.name, "is taken in its place"))


def clock_back(bench: Bench, count: int, draw: random.Random) -> None:
    """All that was written so far has times in the future, as after a clock was set back."""
    for number in range(count):
        name = f"clock-{number}"
        job = bench.start(name)
        _after_a_checkpoint(bench, job, name, draw)
        job.send(signal.SIGKILL)
        job.wait()
        for path in sorted(bench.run(name).rglob("*")):
            then = time.time() + draw.uniform(1, 10) * 86400
            os.utime(path, (then, then))
        bench.count(job, not bench.finish(name).said())


def two_jobs(bench: Bench, count: int, draw: random.Random) -> None:
    """A second job in the folder of a first one is refused with a line, and the first goes on."""
    for number in range(count):
        name = f"two-{number}"
        job = bench.start(name)
        alive = _after_a_checkpoint(bench, job, name, draw)
        job.send(signal.SIGSTOP)  # so that it is still there
        other = bench.start(name)
        codes = other.wait()
        job.send(signal.SIGCONT)
        over = job.wait()
        bench.count(
            other, (codes == [2, 2] and one_line(other, "another process is training in")) or not alive
        )
        if over != [0, 0]:  # the first waited in vain for a stopped one
            bench.count(job, ok=False)
        bench.finish(name)


FAULTS: dict[str, Callable[[Bench, int, random.Random], None]] = {
    "killed": killed,
    "one killed": one_killed,
    "stopped": stopped,
    "terminated": terminated,
    "cut off": cut_off,
    "full or read-only": full_or_read_only,
    "damaged": damaged,
    "clock back": clock_back,
    "two jobs": two_jobs,
}


def main() -> None:
    """Run the campaign and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=20, help="of each fault")
    parser.add_argument("--mode", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--only", nargs="*", choices=list(FAULTS), default=list(FAULTS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bellbox-ranks-"))
    fleet = Fleet(folder / "said")
    print("| fault | injected | survived | bytes lost | s |\n|---|---|---|---|---|", flush=True)
    bad = 0
    try:
        bench = Bench(folder, fleet, arguments.mode)
        for name in arguments.only:
            bench.injected = bench.survived = bench.lost = 0
            begun = time.monotonic()
            FAULTS[name](bench, arguments.count, random.Random(arguments.seed))
            bad += bench.injected - bench.survived + bench.lost
            took = time.monotonic() - begun
            print(f"| {name} | {bench.injected} | {bench.survived} | {bench.lost} | {took:.0f} |", flush=True)
    finally:
        fleet.close()
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
