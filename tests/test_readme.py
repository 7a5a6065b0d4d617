"""The first program of the README does what stands below it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from bellbox.quantizers import METHODS

ROOT = Path(__file__).parents[1]


def test_the_first_program_prints_what_stands_below_it(tmp_path: Path) -> None:
    blocks = re.findall(r"```(\w*)\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    place = next(i for i, (language, _) in enumerate(blocks) if language == "python")
    program, printed = blocks[place][1], blocks[place + 1][1]
    one = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads that spin take minutes on a busy machine
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, env=one
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == printed


def test_its_links_lead_somewhere_and_its_lines_are_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [line for line in text.splitlines() if len(line) > 120]
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_every_method_stands_in_the_matrix_and_packs_as_it_says() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    matrix = text[text.index("| method | bits |") :].split("\n\n")[0]
    rows = {
        name: [cell.strip() for cell in row.strip("|").split("|")]
        for row in matrix.splitlines()
        for name in re.findall(r"`(\w+)`", row)
    }
    assert set(METHODS) <= set(rows)
    for name, kind in METHODS.items():
        assert (rows[name][3] == "integers") == kind.on_grid, name
        assert ("1-4" in rows[name][1]) == (not name.startswith("ternary_")), name


def test_the_beginning_is_short() -> None:
    """What it is, for whom, a picture, how to install, a program with its output, two commands: forty lines."""
    beginning = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:40])
    for part in (
        "For whoever",
        "![",
        "pip install",
        "```python",
        "equal to the trained model: True",
        "make demo",
    ):
        assert part in beginning, part
