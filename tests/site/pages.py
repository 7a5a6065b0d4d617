"""A page of docs/ as a program: its blocks run in order, and what they print is what stands beneath them.

- ```python blocks share one scope. A block whose first line is `# file: NAME` is written to NAME instead of being run;
  so are ```yaml blocks.
- ```bash blocks are scripts that stop at the first failure.
- A ```text block right after one of them is what it prints: each line is somewhere in the output, in this order.
  Words are equal, or numbers within a tenth of each other (training sums differ between processors); `...` is anything.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NAMED = re.compile(r"# file: (\S+)\n")
CLOSE = 0.1
"""How far a number of the page may be from that which is printed, relative."""


@dataclass(frozen=True)
class Block:
    """Of a page: its language, its text, what it shall print."""

    language: str
    text: str
    printed: str | None


def blocks_of(page: Path) -> list[Block]:
    """What a page shows, each with the output that follows it at once."""
    text = page.read_text(encoding="utf-8")
    found = list(BLOCK.finditer(text))
    blocks = []
    for match, after in zip(found, [*found[1:], None], strict=True):
        follows = after is not None and after[1] == "text" and not text[match.end() : after.start()].strip()
        if match[1] != "text":
            blocks.append(Block(match[1], match[2], after[2] if follows and after else None))
    return blocks


def same_word(said: str, printed: str) -> bool:
    """Whether a word of the page is one of the output."""
    if said == printed:
        return True
    try:
        one, other = (float(each.strip("(),%").replace(",", "")) for each in (said, printed))
    except ValueError:
        return False
    return abs(one - other) <= CLOSE * max(abs(one), abs(other))


def same_line(said: str, printed: str) -> bool:
    """Whether a line of the page is one of the output; `...` at its end is any rest."""
    words, theirs = said.split(), printed.split()
    if words and words[-1] == "...":
        words = words[:-1]
        theirs = theirs[: len(words)]
    return len(words) == len(theirs) and all(map(same_word, words, theirs))


def check_printed(said: str, printed: str) -> None:
    """Every line that the page shows is in the output, in order."""
    rest = iter(printed.splitlines())
    for line in filter(str.strip, said.splitlines()):
        assert any(same_line(line, each) for each in rest), f"not printed: {line!r}\n\n{printed}"


def run_page(page: Path, folder: Path) -> dict[str, Any]:
    """Run every block of a page in a folder, and hold the output against the page.

    Returns:
        The scope that its Python blocks leave.
    """
    scope: dict[str, Any] = {"__name__": "__main__"}
    with contextlib.chdir(folder), own_path(folder):
        for block in blocks_of(page):
            named = NAMED.match(block.text)
            if named:
                Path(named[1]).write_text(block.text[named.end() :], encoding="utf-8")
                continue
            if block.language == "python":
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    exec(compile(block.text, str(page), "exec"), scope)
                printed = out.getvalue()
            elif block.language == "bash":
                printed = run_script(block.text, folder)
            else:
                continue
            if block.printed is not None:
                check_printed(block.printed, printed)
    return scope


@contextlib.contextmanager
def own_path(folder: Path) -> Iterator[None]:
    """Modules of a folder can be imported, as in a program that runs there."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def run_script(text: str, folder: Path) -> str:
    """A script in a folder, with our programs on the path; what it printed."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "EXAMPLES": str(ROOT / "examples"),
        "COLUMNS": "120",
    }
    ran = subprocess.run(
        ["bash", "-e", "-c", text], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, f"{text}\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout
