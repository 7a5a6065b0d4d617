"""The first program of the README does what stands below it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

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
