"""Mutated packed folders into the C++ reader under sanitizers: none may crash it or load as another one.

    cmake -S . -B build/checks/fuzz -DBELLBOX_FUZZ=ON && cmake --build build/checks/fuzz
    python benchmarks/reliability/hostile_folders.py --count 20000

A mutation is a function of (seed, number). It knows the structure of the files (`mutations.py`). Three of four folders
get checksums that match again, so that what lies behind the checksums is reached. One process opens thousands of them,
and uses what opens: a prompt, a token, a text, or an image.

    refused      one line, status 2
    used         opened and used, or opened and refused in use; nothing vouches for what it says, or it says the same
    alone        likewise, but Python's reader refuses the folder: no failure, but listed
    another      opened as something else although its checksums do not match: a failure, as are all that follow
    failed       status 3: a fault, or no memory
    crash        the process ended, by a sanitizer's report or a signal
    hang         more than 60 seconds
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import select
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from mutations import Random, mutation_of

import bellbox as bb
from bellbox.data.tokenizer import Tokenizer
from bellbox.errors import BellboxError
from bellbox.models import GPTConfig, LlamaConfig, ResNetConfig, ViTConfig, build
from bellbox.utils.files import canonical_sha256

SCRATCH = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
SECONDS = 60
BAD = ("another", "failed", "crash", "hang")
TEXT = "It was a dark and cold night; the sea was far away, and nobody knew the way home. "


def _language(folder: Path, config: LlamaConfig | GPTConfig, recipe: bb.Recipe, tokenizer: Path) -> None:
    model = bb.prepare(build(config, seed=0), recipe).eval()
    with torch.no_grad():
        model(torch.arange(16)[None])
    bb.save(bb.convert(model), folder, tokenizer=str(tokenizer))


def _vision(folder: Path, config: ResNetConfig | ViTConfig, recipe: bb.Recipe) -> None:
    model = bb.prepare(build(config, seed=0), recipe).eval()
    with torch.no_grad():
        model(torch.rand(1, config.num_channels, 8, 8))
    bb.save(bb.convert(model), folder)


def specimens(room: Path) -> list[Path]:
    """Good folders of every kind that the runtime takes."""
    tokenizer = room / "tokenizer.json"
    words = Tokenizer.train([TEXT * 20], 300)
    words.save(tokenizer)
    llama = LlamaConfig(words.vocab_size, 32, 64, 1, 2, num_key_value_heads=1, max_position_embeddings=64)
    gpt = GPTConfig(words.vocab_size, 32, 64, 1, 2, max_position_embeddings=64, activation="gelu_erf")
    vit = ViTConfig(4, image_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    made: list[Callable[[Path], None]] = [
        lambda to: _language(to, llama, bb.Recipe.bbq(2, embedding_bits=4), tokenizer),
        lambda to: _language(to, llama, bb.Recipe.bbq(levels=3, embedding_bits=8), tokenizer),
        lambda to: _language(to, gpt, bb.Recipe.bbq(1), tokenizer),
        lambda to: _language(to, gpt, bb.Recipe.of("lsq", 3), tokenizer),
        lambda to: _vision(to, ResNetConfig(4, width=8, stages=2, max_pool=True), bb.Recipe.bbq(2)),
        lambda to: _vision(to, vit, bb.Recipe.bbq(4)),
        lambda to: _language(to, llama, bb.Recipe.bbq(nested=(4, 3, 1), embedding_bits=8), tokenizer),
        lambda to: _language(to, gpt, bb.Recipe.bbq(nested=(2, 1), activation_levels=4), tokenizer),
    ]  # fmt: skip
    for number, make in enumerate(made):
        make(room / f"good-{number}")
    return sorted(room.glob("good-*"))


def seal(folder: Path) -> bool:
    """Make the checksums of a folder match again; False where there is nothing left to seal."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        section = config["quantization_config"]
        for name, entry in section["files"].items():
            content = (folder / name).read_bytes()
            entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        section.pop("sha256", None)
        section["sha256"] = canonical_sha256(config)
        (folder / "config.json").write_text(json.dumps(config))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
    return True


def _replace(file: Path, draw: Random) -> None:
    file.unlink()
    kind = draw.randrange(6)
    if kind == 0:
        os.mkfifo(file)
    elif kind == 1:
        file.mkdir()
    elif kind < 5:
        file.symlink_to(("nowhere", "/dev/zero", file.name)[kind - 2])


def mutate(good: list[Path], folder: Path, draw: Random) -> bool:
    """A mutated copy; returns whether it may open as something else: its checksums match."""
    shutil.copytree(draw.choice(good), folder)
    files = sorted(folder.iterdir())
    for _ in range(draw.choice((1, 1, 1, 2))):
        file = draw.choice(files)
        if draw.randrange(50) == 0:
            _replace(file, draw)
            return False
        with suppress(
            ValueError, KeyError, IndexError, TypeError, RecursionError
        ):  # what was mutated before may have no structure left
            file.write_bytes(mutation_of(file.name)(file.read_bytes(), draw))
    return draw.randrange(4) > 0 and seal(folder)


def says_the_same(folder: Path, good: list[Path]) -> bool:
    """Whether a folder without matching checksums says what a good one says."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        names = config["quantization_config"]["files"]
        read = [(folder / name).read_bytes() for name in names]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
    for each in good:
        if json.loads((each / "config.json").read_bytes()) == config:
            return read == [(each / name).read_bytes() for name in names]
    return False


def python_refuses(folder: Path) -> bool:
    try:
        bb.load(folder)
    except BellboxError:
        return True
    return False


@dataclass
class Reader:
    """The program, started again where it ended."""

    program: Path
    process: subprocess.Popen[str] | None = None
    starts: int = 0

    def ask(self, folder: Path) -> tuple[str, str]:
        """Its verdict on a folder, and what it said."""
        if self.process is None or self.process.poll() is not None:
            self.starts += 1
            self.process = subprocess.Popen(
                [self.program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{folder}\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], SECONDS)[0]:
            self.process.kill()
            self.process.wait()
            return "hang", ""
        line = self.process.stdout.readline()
        if not line:
            _, said = self.process.communicate()
            found = [each for each in said.splitlines() if "ERROR" in each or "error" in each]
            return "crash", (found or [f"ended with {self.process.returncode}"])[0]
        opened, status, *words = line.rstrip("\n").split(" ", 2)
        if int(status) not in (0, 2):
            return "failed", line
        return opened, words[0] if words else ""


@dataclass
class Findings:
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, verdict: str, number: int, said: str) -> None:
        self.counts[verdict] += 1
        if verdict in (*BAD, "alone") and len(self.examples.setdefault(verdict, [])) < 20:
            self.examples[verdict].append(f"{number}: {said.strip()}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutation")
    parser.add_argument("--program", type=Path, default=Path("build/checks/fuzz/fuzz-folders"))
    parser.add_argument("--keep", type=Path, help="leave the last folder here")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    findings, reader = Findings(), Reader(asked.program)
    with tempfile.TemporaryDirectory(dir=SCRATCH) as made:
        room = Path(made)
        good = specimens(room)
        for each in good:
            verdict, said = reader.ask(each)
            if verdict != "opened" or said:
                print(f"{each.name}: {verdict} {said}")
                return 1
        for number in range(asked.first, asked.first + asked.count):
            folder = room / "mutated"
            shutil.rmtree(folder, ignore_errors=True)
            free = mutate(good, folder, random.Random(asked.seed * 1_000_003 + number))
            verdict, said = reader.ask(folder)
            if verdict == "opened":
                verdict = "used"
                if not free and not says_the_same(folder, good):
                    verdict = "another"
                elif python_refuses(folder):
                    verdict = "alone"
            findings.add(verdict, number, said)
            if (number + 1) % 1000 == 0:
                print(number + 1, dict(findings.counts), flush=True)
        if asked.keep is not None:
            shutil.copytree(room / "mutated", asked.keep)
    print(f"{asked.count} folders, {reader.starts} processes: {dict(findings.counts)}")
    for verdict, examples in findings.examples.items():
        print(verdict, *examples, sep="\n  ")
    return int(any(findings.counts[verdict] for verdict in BAD))


if __name__ == "__main__":
    sys.exit(main())
