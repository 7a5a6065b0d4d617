"""Two processes of one thread against one process of two threads: tokens a second of the same run, in turns.

    python benchmarks/ranks.py                          # preset tiny, 3 turns of 12 steps
    python benchmarks/ranks.py --turns 5 --mode fsdp

Each turn is a run of its own in a folder that goes away, and its first steps do not count. The rate is the median of
the training records. To be taken on a machine with nothing else to do.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

WARM = 2


def rate(folder: Path, processes: int, mode: str, flags: list[str]) -> float:
    """Tokens a second of one run."""
    threads = str(max(1, 2 // processes))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "bellbox", "train",
               "--folder", str(folder), "--threads", threads, "--log-every", "1", "--no-tensorboard",
               "--eval-every", "1000000", *flags]  # fmt: skip
    if processes > 1:
        command += ["--distributed.mode", mode]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": threads}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(r["tokens_per_s"] for r in records if r["kind"] == "train" and r["step"] > WARM)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--turns", type=int, default=3)
    flags.add_argument("--steps", type=int, default=12)
    flags.add_argument("--mode", choices=["ddp", "fsdp"], default="ddp")
    flags.add_argument("--preset", default="tiny")
    options = flags.parse_args()
    run = ["--steps", str(options.steps), "--model.preset", options.preset, "--checkpoint-every", "1000000"]
    found: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.turns):
            for processes in (1, 2):
                found[processes].append(
                    rate(Path(folder) / f"{turn}-{processes}", processes, options.mode, run)
                )
                print(
                    f"turn {turn + 1}: {processes} processes {found[processes][-1]:,.0f} tokens/s", flush=True
                )
    one, two = (statistics.median(found[processes]) for processes in (1, 2))
    print(f"one process of two threads {one:,.0f}, two of one {two:,.0f} ({options.mode}): {two / one:.2f}")


if __name__ == "__main__":
    main()
