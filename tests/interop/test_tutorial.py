"""docs/tutorials/distill.md: its script, run briefly, and the lines that it quotes."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("BELLBOX_SHARED_DATA") or ROOT.parent / "shared" / "data")
STORIES = SHARED / "models" / "stories260K_hf"
SCRIPT, PAGE = ROOT / "examples" / "distill_stories.py", ROOT / "docs" / "tutorials" / "distill.md"


@pytest.fixture(scope="module")
def script() -> Any:
    pytest.importorskip("transformers")
    specification = importlib.util.spec_from_file_location("distill_stories", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore")
def test_a_real_model_goes_on_at_two_bits_with_a_teacher(script: Any, tmp_path: Path) -> None:
    if not STORIES.is_dir():
        pytest.skip(f"{STORIES} is not there")
    short = ["--steps", "16", "--stories", "8", "--length", "96", "--batch", "4"]
    found = script.main([str(STORIES), "--out", str(tmp_path / "packed"), *short])
    assert found["teacher"] < 8 < found["after"] < 0.2 * found["before"]
    assert found["packed"] == found["after"]
    assert found["bytes"]["after"] < 0.25 * found["bytes"]["before"]
    assert len(found["story"].split()) > 5


def test_the_page_quotes_the_script_as_it_is() -> None:
    """Every line of a Python block of the page stands in the script."""
    lines = {line.strip() for line in SCRIPT.read_text(encoding="utf-8").splitlines()}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert len(blocks) >= 3
    quoted = [line.strip() for block in blocks for line in block.splitlines() if line.strip()]
    assert [line for line in quoted if line not in lines] == []
