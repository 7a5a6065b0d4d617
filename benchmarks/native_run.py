"""One run of bellbox-run with `--bench`: a process of its own, its figures as a dictionary."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).parents[1] / "build" / "runtime" / "bellbox-run"


def bench(
    folder: Path,
    prompt: str,
    new_tokens: int,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    threads: int = 1,
    kernels: str = "",
    program: Path = PROGRAM,
) -> dict[str, Any]:
    """What the program writes: seconds of loading and to the first token, tokens a second, megabytes.

    Args:
        folder: a packed folder with a tokenizer.
        prompt: text.
        new_tokens: at most so many.
        temperature: 0 for the likeliest tokens.
        seed: of the text.
        threads: of the program.
        kernels: a value of `BELLBOX_ISA`; none takes the processor's best.
        program: where `make runtime` put it.

    Raises:
        SystemExit: the program is not there, or refuses, with its line.
    """
    if not program.is_file():
        raise SystemExit(f"no {program}: make runtime")
    command = [program, folder, "--prompt", prompt, "--bench"]
    flags = {"max-new-tokens": new_tokens, "temperature": temperature, "seed": seed, "threads": threads}
    command += [each for name, value in flags.items() for each in (f"--{name}", str(value))]
    environment = {**os.environ, "BELLBOX_ISA": kernels} if kernels else None
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{program.name}: {done.stderr.strip()}")
    return json.loads(done.stdout)
