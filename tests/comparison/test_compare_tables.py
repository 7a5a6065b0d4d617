from __future__ import annotations

import csv
import io
import math

import pytest

from bellbox.comparison import summarise, tables

pytest.importorskip("scipy", reason="scipy, of the extra cli: intervals of several seeds")


def lines(result) -> list:
    return [
        result("FP", None, 1e-3, 0, loss=2.9, perplexity=18.0, block_bytes=1000),
        result("FP", None, 2e-3, 0, loss=2.8, perplexity=16.0, block_bytes=1000),
        result("BBQ_x & co", 2.0, 1e-3, 0, loss=3.0, perplexity=20.0, weight_entropy=1.98, block_bytes=130),
        result("BBQ_x & co", 2.0, 2e-3, 0, loss=3.1, perplexity=22.0, weight_entropy=1.90, block_bytes=130),
        result("wild", 2.0, 1e-3, 0, loss=None, perplexity=None),
        result("broken", 2.0, 1e-3, 0, loss=None, perplexity=None, error="no such thing"),
        result("FP", None, 2e-3, 1, loss=2.9, perplexity=18.0, block_bytes=1000),
        result("BBQ_x & co", 2.0, 1e-3, 1, loss=3.0, perplexity=24.0, weight_entropy=1.96, block_bytes=130),
        result("BBQ_x & co", 2.0, 1e-3, 2, loss=3.0, perplexity=25.0, weight_entropy=1.97, block_bytes=130),
    ]


def test_means_are_taken_at_the_rate_that_was_best_on_the_first_seed(result) -> None:
    (study,) = summarise(lines(result))
    full, bbq, wild, broken = study.summaries
    assert (full.lr, bbq.lr, wild.lr, broken.lr) == (2e-3, 1e-3, None, None)
    assert bbq.values == {0: 20.0, 1: 24.0, 2: 25.0}
    assert bbq.mean == pytest.approx(23.0)
    assert bbq.deviation == pytest.approx(math.sqrt(7.0))
    # The ratio compares the seeds that both have: (20 + 24) / (16 + 18).
    assert bbq.ratio == pytest.approx(44 / 34)
    assert bbq.weight_entropy == pytest.approx(1.97)
    assert bbq.at_edge
    assert bbq.tried == {1e-3: 20.0, 2e-3: 22.0}
    assert wild.errors == ("lr 0.001, seed 0: the loss is not finite",)
    assert broken.errors == ("lr 0.001, seed 0: no such thing",)


def test_older_definitions_and_budgets_do_not_mix_in(result) -> None:
    old = result(perplexity=1.0)
    old.config["quantization"]["block"] = 64
    short = result("other", perplexity=1.0)
    short.config["steps"] = 5
    (study,) = summarise([old, short, result(seed=3, perplexity=9.0)])
    assert [summary.values for summary in study.summaries] == [{3: 9.0}]
    assert study.left_out == 2


def test_lines_from_before_a_key_existed_belong_to_the_same_row(result) -> None:
    older = result(seed=0)
    del older.config["compile"], older.config["optimizer"]["eps"]
    (study,) = summarise([older, result(seed=1)])
    assert list(study.summaries[0].values) == [0, 1]
    assert study.left_out == 0


def test_inputs_with_bits_of_their_own_are_named(result) -> None:
    mixed = result("W2A4")
    mixed.config["quantization"]["activation_bits"] = 4
    (study,) = summarise([result("W2A2"), mixed, result("full", None)])
    assert [line[:2] for line in tables.cells(study)] == [
        ["W2A2", "2"],
        ["W2A4", "2, inputs 4"],
        ["full", "-"],
    ]


def test_inputs_beside_weights_that_are_quantized_alone_are_named(result) -> None:
    made = [result("both"), result("float"), result("int8")]
    made[1].config["quantization"]["weight_only"] = "float"
    made[2].config["quantization"]["weight_only"] = "int8"
    (study,) = summarise(made)
    assert [line[1] for line in tables.cells(study)] == ["2", "2, inputs float", "2, inputs int8"]
    assert [summary.activation_bits for summary in study.summaries] == [2.0, None, 8.0]


def test_a_rate_that_had_no_rival_is_marked(result) -> None:
    made = [
        result("one", lr=1e-3),
        *(result("three", lr=lr, loss=abs(lr - 2e-3)) for lr in (1e-3, 2e-3, 4e-3)),
    ]
    (study,) = summarise(made)
    assert [line[-2] for line in tables.cells(study)] == ["0.001‡", "0.002"]
    assert any(note.startswith("‡ The only rate that was tried") for note in tables.notes(study))
    (tuned,) = summarise(made[1:])
    assert not any(note.startswith("‡") for note in tables.notes(tuned))
    assert r"0.001$^\ddagger$" in tables.latex([study])
    rows = csv.DictReader(io.StringIO(tables.comma_separated([study])))
    assert [row["rates"] for row in rows] == ["1", "3"]


def test_the_table_is_markdown_csv_and_latex(result) -> None:
    studies = summarise(lines(result))
    text = tables.markdown(studies)
    # Seeds 0 and 1 are 4 and 6 above: 5 ± 12.7 of one degree of freedom.
    assert "| BBQ_x & co | 2 | 23.00 ± 2.65 | 1.294 | +5.00¶ [-7." in text
    assert "] | 1.970 | - | - | 130 | 0.001* | 3 |" in text
    assert "| FP | - | 17.00 ± 1.41 | 1.000 | - | - | - | - | 1,000 | 0.002* | 2 |" in text
    assert "Failed: broken, 2 bits, lr 0.001, seed 0: no such thing" in text
    assert "| BBQ_x & co, 2 bits | 20.00 | 22.00 |" in text
    assert "| wild, 2 bits | failed |  |" in text
    rows = list(csv.DictReader(io.StringIO(tables.comma_separated(studies))))
    assert [row["method"] for row in rows] == ["FP", "BBQ_x & co", "wild", "broken"]
    assert float(rows[1]["perplexity"]) == 23.0
    assert rows[2]["perplexity"] == ""
    assert rows[2]["failed"] == "1"
    assert r"BBQ\_x \& co & 2 & 23.00 $\pm$ 2.65 & 1.294" in tables.latex(studies)
