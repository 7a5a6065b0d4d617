from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

from bellbox.comparison import load_grid
from bellbox.errors import BellboxError


def test_rows_are_laid_over_the_base_bits_and_seeds_over_the_rows(grid) -> None:
    rows = {
        "full": {"quantization": {"method": "none"}},
        "BBQ": {"quantization": {"block": 16}},
        "ternary": {"quantization": {"levels": 3}, "lr": 0.5, "seeds": 7},
        "one": {"bits": 1, "lr": "2e-3"},
    }
    found = load_grid(grid(rows=rows, bits=[2, 3], seeds=[0, 1], lr=[1e-3, 2e-3]))
    assert [(cell.row, cell.bits) for cell in found.cells] == [
        ("full", None), ("BBQ", 2), ("BBQ", 3), ("ternary", math.log2(3)), ("one", 1),
    ]  # fmt: skip
    assert found.study == "small"
    assert found.runs == 3 + 3 + 3 + 1 + 2
    config = found.cells[2].config(2e-3, 1)
    assert (config.quantization.bits, config.quantization.block) == (3, 16)
    assert (config.optimizer.lr, config.seed, config.data.seed) == (2e-3, 1, 1)
    assert found.cells[3].lrs == (0.5,)
    assert found.cells[3].seeds == (7,)
    assert found.cells[4].lrs == (2e-3,)


def test_bits_of_the_base_count_where_the_grid_says_none(grid) -> None:
    file = grid(rows={"BBQ": {}, "one": {"bits": 1}})
    data = yaml.safe_load(file.read_text())
    data["base"]["quantization"] = {"bits": 3}
    file.write_text(yaml.safe_dump(data))
    assert [(cell.bits, cell.config(0.1, 0).quantization.bits) for cell in load_grid(file).cells] == [
        (3, 3),
        (1, 1),
    ]


def test_a_base_may_stand_in_a_file_beside_the_grid(grid, tmp_path: Path) -> None:
    file = grid(rows={"BBQ": {}})
    data = yaml.safe_load(file.read_text())
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(data["base"]))
    data["base"] = "base.yaml"
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(data))
    assert load_grid(other).cells[0].values == load_grid(file).cells[0].values


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"row": {}}, "unknown key 'row'"),
        ({"rows": {}}, "rows must map names"),
        ({"rows": {"a": 3}}, "row 'a' must be a mapping"),
        ({"rows": {"a": {"optimizer": {"lrr": 1}}}}, "row 'a': unknown key 'optimizer.lrr'"),
        ({"rows": {"a": {"lr": "fast"}}}, "row 'a': lr must be a list of numbers"),
        ({"rows": {"a": {"lr": -1}}}, "row 'a': optimizer.lr is -1"),
        ({"rows": {"a": {"seeds": [1, 1]}}}, "seeds names a number twice"),
        ({"rows": {"a": {"bits": [2, 4], "quantization": {"bits": 3}}}}, "row 'a' says twice how many bits"),
        (
            {"rows": {"a": {"quantization": {"method": "seq"}}}, "bits": [8]},
            "row 'a': seq has 2 to 128 levels",
        ),
        ({"rows": {"a": {}}, "base": "nowhere.yaml"}, "cannot read"),
        ({"rows": {"a": {}}, "base": 3}, "base must be a mapping"),
    ],
)
def test_a_bad_grid_is_one_clear_line(grid, keys: dict, message: str) -> None:
    with pytest.raises(BellboxError, match=message) as caught:
        load_grid(grid(**keys))
    assert "\n" not in str(caught.value)
