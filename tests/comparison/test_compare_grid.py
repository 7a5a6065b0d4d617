from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

from bellbox.comparison import load_grid, run_grid
from bellbox.data.prepare import prepare
from bellbox.errors import BellboxError
from bellbox.runs.config import hyperball_rate


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
        ({"rows": {"a": {}, "b": {}}, "against": "c"}, "against names no row 'c'; there are: a, b"),
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
        ({"rows": {"a": {"quantization": 5, "bits": [2]}}}, "row 'a': 'quantization' is 5, must be"),
        (
            {"rows": {"a": {"optimizer": {"lr": 5e-3}}}},
            r"row 'a': optimizer.lr says nothing here, .* write lr: ",
        ),
        ({"rows": {"a": {"seed": 7}}}, r"row 'a': seed says nothing here, .* write seeds: "),
        ({"rows": {"a": {"data": {"seed": 9}}}}, r"row 'a': data.seed says nothing here, .* write seeds: "),
        ({"rows": {"a": {}}, "over": {"seed": 1}}, "base: seed says nothing here"),
        (
            {"rows": {"a": {"quantization": {"method": "none"}, "bits": [2]}}},
            "row 'a' is in full precision, so",
        ),
        ({"rows": {"a": {}}, "base": "nowhere.yaml"}, "cannot be read"),
        ({"rows": {"a": {}}, "base": 3}, "base must be a mapping"),
    ],
)
def test_a_bad_grid_is_one_clear_line(grid, keys: dict, message: str) -> None:
    with pytest.raises(BellboxError, match=message) as caught:
        load_grid(grid(**keys))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "keys",
    [
        {"rows": {"a": {}}, "bits": [2]},
        {"rows": {"a": {"bits": [2]}}},
        {"rows": {"a": {"quantization": {"bits": 2}}}},
    ],
)
def test_levels_of_the_base_do_not_overrule_bits_in_silence(grid, keys: dict) -> None:
    over = {"quantization": {"levels": 3}}
    with pytest.raises(BellboxError, match=r"row 'a': quantization.levels of the base goes before all bits"):
        load_grid(grid(over=over, **keys))
    out = {"rows": {"a": {"quantization": {"levels": None}, "bits": [2]}}}
    assert load_grid(grid(over=over, **out)).cells[0].config(0.1, 0).quantization.bits == 2
    own = {"rows": {"a": {"quantization": {"levels": 5}}}, "bits": [2]}
    assert load_grid(grid(over=over, **own)).cells[0].bits == math.log2(5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"batch": {"tokens": 128}}, "row 'b' has a budget of 512, row 'a' of 256: such rows do not compare"),
        ({"steps": 5}, "row 'b' has a budget of 320, row 'a' of 256"),
        ({"data": {"context": 8}}, "row 'b' has a context of 8, row 'a' of 16"),
        ({"task": "vision", "model": {"preset": "resnet-small", "overrides": {}}}, "row 'b'"),
    ],
)
def test_rows_of_unequal_budget_or_context_are_refused(grid, row: dict, message: str) -> None:
    with pytest.raises(BellboxError, match=message):
        load_grid(grid(rows={"a": {}, "b": row}))


def test_rows_that_are_validated_on_other_images_are_refused(grid) -> None:
    vision = {"task": "vision", "model": {"preset": "resnet-small"}}
    rows = {"a": {}, "b": {"vision": {"valid_images": 5}}}
    with pytest.raises(BellboxError, match=r"row 'b' has a vision.valid_images of 5, row 'a' of None"):
        load_grid(grid(rows=rows, over=vision))


def test_what_is_rounded_up_to_whole_steps_is_no_other_budget(grid) -> None:
    rows = {"a": {}, "b": {"batch": {"tokens": 128}}}
    found = load_grid(grid(rows=rows, over={"steps": None, "tokens": 200}))
    assert [cell.config(0.1, 0).total_steps for cell in found.cells] == [4, 2]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"quantization": {"method": "none"}, "phases": {"quantized": 0.5}},
            "phases: quantization.method is none",
        ),
        (
            {"quantization": {"method": "none"}, "optimizer": {"cewt": {"every": 1}}},
            "optimizer.cewt constrains",
        ),
        ({"phases": {"quantized": 0.01}}, r"phase 2 \(bbq, 2 bits\) gets none of the 4 steps"),
        (
            {"phases": {"bits_before": [4], "shares": [0.2, 0.3, 0.5]}},
            "phases.shares is .* must be 2 numbers",
        ),
        ({"phases": {"bits_before": [8]}, "quantization": {"method": "seq"}}, "seq has 2 to 128 levels"),
        ({"model": {"overrides": {"vocab_size": 7}}}, "model.overrides.vocab_size is 7"),
        ({"distill": {"teacher": "nowhere"}}, "distill.teacher: nowhere: no such folder"),
        ({"mec": {"weight": 1.0, "layer": "nowhere"}}, "mec.layer: "),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_first_run(
    grid, tmp_path: Path, row: dict, message: str
) -> None:
    found = load_grid(grid(rows={"BBQ": {}, "bad": row}))
    with pytest.raises(BellboxError, match="row 'bad': .*" + message) as caught:
        run_grid(found, tmp_path / "out", show=False)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "results.jsonl").exists()
    assert not (tmp_path / "out" / "runs").exists()


def test_rows_over_other_data_are_refused_before_the_first_run(grid, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a b c d e " * 300)
    prepare([str(tmp_path / "text.txt")], tmp_path / "other", vocab_size=270, valid_fraction=0.2)
    found = load_grid(grid(rows={"BBQ": {}, "bad": {"data": {"source": str(tmp_path / "other")}}}))
    with pytest.raises(BellboxError, match="row 'bad' has other data than row 'BBQ'"):
        run_grid(found, tmp_path / "out", show=False)


def test_a_row_that_names_no_rate_of_the_hyperball_has_it_written_out(grid) -> None:
    """So a line of the results keeps what was run, whatever a later version takes where nothing is said."""
    rows = {
        "open": {},
        "said": {"optimizer": {"cewt": {"lr": 0.05}}},
        "published": {"quantization": {"method": "cewt"}},
    }
    found = [cell.config(0.1, 0) for cell in load_grid(grid(rows=rows)).cells]
    assert [config.optimizer.cewt.lr for config in found] == [
        hyperball_rate("ours", found[0].total_steps), 0.05, 0.01,
    ]  # fmt: skip
