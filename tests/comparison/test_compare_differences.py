"""Differences between methods: the interval against other computations, its coverage, what pairing brings."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import sys
from collections.abc import Callable

import numpy as np
import pytest

from bellbox.comparison import Result, differences, summarise, tables
from bellbox.comparison.differences import difference
from bellbox.errors import BellboxError
from bellbox.report import comparison_page

stats = pytest.importorskip("scipy.stats", reason="scipy, of the extra cli")

Made = Callable[..., Result]
Losses = np.ndarray


def runs(
    result: Made, losses: Losses, sizes: np.ndarray | None = None, row: str = "BBQ", **more
) -> dict[int, Result]:
    """Seed -> a run with these losses `[seeds, parts]`; its perplexity follows."""
    sizes = np.full(losses.shape[1], 100) if sizes is None else sizes
    found, one = {}, result(row, **more)
    for seed, mine in enumerate(losses):
        mean = float((mine * sizes).sum() / sizes.sum())
        parts = {"unit": "documents", "sizes": sizes.tolist(), "losses": mine.tolist()}
        values = {"seed": seed, "loss": mean, "perplexity": math.exp(mean), "parts": parts}
        found[seed] = dataclasses.replace(one, **values)
    return found


def without_parts(result: Made, values: list[float], row: str = "BBQ") -> dict[int, Result]:
    return {seed: result(row, seed=seed, perplexity=value) for seed, value in enumerate(values)}


def test_over_seeds_alone_it_is_the_paired_t_interval(result) -> None:
    ours, theirs = [20.0, 24.5, 25.0, 21.0], [18.0, 21.0, 22.5, 20.5]
    found = difference(without_parts(result, ours), without_parts(result, theirs))
    known = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert found is not None
    assert found.value == pytest.approx(np.mean(ours) - np.mean(theirs))
    assert (found.seeds, found.parts, found.unit) == (4, 0, None)
    assert (found.low, found.high) == pytest.approx(tuple(known), abs=0.02 * (known.high - known.low))


def test_over_documents_alone_it_is_the_delta_methods_interval(result) -> None:
    """One seed: the variance of a difference of perplexities by linearising it, documents of unequal sizes."""
    generator = np.random.default_rng(1)
    sizes = generator.integers(20, 400, 120)
    hard = generator.normal(3.0, 0.6, 120)
    ours, theirs = (hard + generator.normal(mean, 0.05, (1, 120)) for mean in (0.0, 0.02))
    found = difference(runs(result, ours, sizes), runs(result, theirs, sizes))
    share = sizes / sizes.sum()
    influence = np.zeros(120)
    for losses, sign in ((ours[0], 1), (theirs[0], -1)):
        mean = (losses * share).sum()
        influence += sign * math.exp(mean) * share * (losses - mean) * 120
    error = influence.std(ddof=1) / math.sqrt(120)
    assert found is not None
    assert (found.seeds, found.parts, found.unit) == (1, 120, "documents")
    assert found.high - found.low == pytest.approx(2 * stats.t.ppf(0.975, 119) * error, rel=0.04)


def test_images_are_resampled_by_how_many_are_right(result) -> None:
    """Against the binomial's variance of a difference between shares, independent images in equal parts."""
    generator = np.random.default_rng(2)
    right = generator.binomial(40, [[0.6], [0.5]], (2, 200))
    made = []
    for hits in right:
        one = result(accuracy=hits.sum() / 8000, perplexity=None, parts={
            "unit": "images", "sizes": [40] * 200, "losses": [1.0] * 200, "right": hits.tolist()})  # fmt: skip
        one.config["task"] = "vision"
        made.append({0: one})
    found = difference(*made)
    error = math.sqrt((0.6 * 0.4 + 0.5 * 0.5) / 8000)
    assert found is not None
    assert found.unit == "images"
    assert found.high - found.low == pytest.approx(2 * 1.972 * error, rel=0.12)


def test_the_interval_covers_as_often_as_it_says(result, monkeypatch: pytest.MonkeyPatch) -> None:
    """Differences made of effects of seeds, of documents, and of both together, in several mixtures."""
    monkeypatch.setattr(differences, "RESAMPLES", 200)
    generator = np.random.default_rng(3)
    covered, one = [], result()
    one.config["task"] = "vision"
    for number in range(210):
        seed_effect, document_effect = ((0.02, 0.002), (0.02, 0.1), (0.002, 0.1))[number % 3]
        hard = generator.normal(3.0, 0.5, 40)
        theirs = hard + generator.normal(0, 0.03, (3, 1)) + generator.normal(0, 0.05, (3, 40))
        apart = 0.05 + generator.normal(0, seed_effect, (3, 1)) + generator.normal(0, document_effect, 40)
        apart = apart + generator.normal(0, 0.02, (3, 40))
        found = difference(*(_judged_by_loss(runs(lambda *_: one, x)) for x in (theirs + apart, theirs)))
        assert found is not None
        covered.append(found.low <= 0.05 <= found.high)
    assert 0.94 <= np.mean(covered) <= 0.99


def _judged_by_loss(made: dict[int, Result]) -> dict[int, Result]:
    """In the shape of an accuracy, which is a mean as it stands: the truth is then known without another formula."""
    found = {}
    for seed, run in made.items():
        assert run.parts is not None
        right = [loss * size for loss, size in zip(run.parts["losses"], run.parts["sizes"], strict=True)]
        found[seed] = dataclasses.replace(run, accuracy=run.loss, parts={**run.parts, "right": right})
    return found


def test_percentiles_of_three_seeds_would_cover_three_times_in_four() -> None:
    """Why the interval is not made of them."""
    generator = np.random.default_rng(4)
    seeds = generator.normal(0, 1, (4000, 3))
    assert np.mean((seeds.min(1) <= 0) & (seeds.max(1) >= 0)) == pytest.approx(0.75, abs=0.02)


def test_pairing_sees_what_unpaired_runs_would_not(result) -> None:
    """Seeds move both methods by 2.5, and the methods are 0.5 apart."""
    theirs = [150.0, 153.0, 148.0]
    ours = [150.6, 153.5, 148.4]
    paired = difference(without_parts(result, ours), without_parts(result, theirs))
    unpaired = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    assert paired is not None
    assert not paired.holds_zero
    assert 0 < paired.low < 0.5 < paired.high
    assert unpaired.low < -3 < 3 < unpaired.high
    # The same runs with their seeds mixed up say nothing.
    mixed = difference(without_parts(result, ours[1:] + ours[:1]), without_parts(result, theirs))
    assert mixed is not None
    assert mixed.holds_zero


def test_pairing_of_documents_sees_what_other_documents_would_not(result) -> None:
    generator = np.random.default_rng(5)
    hard = generator.normal(3.0, 0.8, 100)
    theirs = hard[None] + generator.normal(0, 0.01, (1, 100))
    ours = theirs + 0.02 + generator.normal(0, 0.01, (1, 100))
    paired = difference(runs(result, ours), runs(result, theirs))
    assert paired is not None
    assert paired.low > 0
    apart = difference(runs(result, ours), runs(result, generator.permutation(theirs, axis=1)))
    assert apart is not None
    assert apart.holds_zero


def test_documents_count_where_all_runs_have_the_same_ones(result) -> None:
    losses = np.random.default_rng(6).normal(3.0, 0.1, (2, 30))
    whole = runs(result, losses)
    assert (difference(whole, runs(result, losses + 0.1)) or whole).parts == 30
    others = {
        "other sizes": runs(result, losses + 0.1, np.full(30, 99)),
        "none": without_parts(result, [20.0, 21.0]),
        "one has none": {0: whole[0], 1: result(seed=1, perplexity=21.0)},
        "few": runs(result, losses[:, :4]),
    }
    for name, theirs in others.items():
        found = difference(whole, theirs)
        assert found is not None, name
        assert (found.parts, found.seeds) == (0, 2), name
    assert difference(whole, {7: whole[0]}) is None
    assert difference(whole, {0: result(loss=None, perplexity=None)}) is None


def lines(result: Made) -> list[Result]:
    """A baseline of two seeds, a row that is apart, one that is not, and single seeds near and far."""
    made = without_parts(result, [100.0, 104.0], "A"), without_parts(result, [90.0, 94.02], "apart")
    near = without_parts(result, [101.0, 103.0], "near")
    return [run for row in (*made, near) for run in row.values()] + [
        result("one near", perplexity=100.5),
        result("one far", perplexity=150.0),
    ]


def test_a_table_marks_what_its_seeds_cannot_tell(result) -> None:
    (study,) = summarise(lines(result))
    assert study.baseline == "A"
    shown = {line[0]: line[4] for line in tables.cells(study)}
    assert shown["A"] == "-"
    assert shown["apart"] == "-9.99 [-10.12, -9.86]"
    assert shown["near"].startswith("+0.00¶ [-12.")
    assert shown["one near"] == "+0.50§¶"
    assert shown["one far"] == "+50.00§"
    notes = "\n".join(tables.notes(study))
    assert "row less A, over the seeds that both have" in notes
    assert "95% for other seeds (bootstrap" in notes
    assert "no losses per document: an interval is over seeds alone" in notes
    # Deviations .014 and 1.41, a degree of freedom each.
    said = "§ One seed: another may change it; a seed moves the differences of the rows that have several by 1.00"
    assert said in notes
    assert "¶ Not told apart: zero lies in the interval" in notes
    page = comparison_page([(study, [])])
    assert "<td>+0.50§¶</td>" in page
    assert "¶ Not told apart: zero lies in the interval" in page
    latex = tables.latex([study])
    assert r"+0.50$^\S$$^\P$" in latex
    row = list(csv.DictReader(io.StringIO(tables.comma_separated([study]))))[1]
    assert float(row["difference"]) == pytest.approx(-9.99)
    assert float(row["difference_low"]) < -10 < float(row["difference_high"])
    assert (row["baseline"], row["difference_seeds"], row["difference_parts"]) == ("A", "2", "0")


def test_documents_stand_in_the_table_and_its_notes(result) -> None:
    losses = np.random.default_rng(7).normal(3.0, 0.1, (1, 30))
    made = [*runs(result, losses, row="A").values(), *runs(result, losses + 0.1, row="B").values()]
    (study,) = summarise(made)
    value, low, high = (f"{x:+.2f}" for x in _of(study.summaries[1].difference))
    assert tables.cells(study)[1][4] == f"{value}§ [{low}, {high}]"
    notes = "\n".join(tables.notes(study))
    assert "95% for other documents (bootstrap" in notes
    assert "no losses per document" not in notes
    (mixed,) = summarise([*made, result("old")])
    assert "Some of these results have no losses per document" in "\n".join(tables.notes(mixed))


def _of(found: differences.Difference | None) -> tuple[float, float, float]:
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    return found.value, found.low, found.high


def test_a_row_may_be_named_that_differences_are_to(result) -> None:
    made = [
        result(row, bits, perplexity=value)
        for row, bits, value in (
            ("full", None, 10.0), ("A", 1.0, 30.0), ("A", 2.0, 20.0), ("B", 1.0, 31.0), ("B", 2.0, 22.0),
            ("C", 3.0, 1.0),
        )
    ]  # fmt: skip
    (study,) = summarise(made)
    assert study.baseline == "full"
    (study,) = summarise(made, against="A")
    found = [None if s.difference is None else s.difference.value for s in study.summaries]
    assert found == [None, None, None, 1.0, 2.0, None]
    (study,) = summarise(made, against="full")
    assert [s.difference and s.difference.value for s in study.summaries] == [
        None,
        20.0,
        10.0,
        21.0,
        12.0,
        -9.0,
    ]
    with pytest.raises(BellboxError, match="against 'D': no row has this name; there are: full, A, B, C"):
        summarise(made, against="D")


def test_rounded_embeddings_are_no_full_precision(result) -> None:
    made = [result("rounded", None, perplexity=11.0), result("full", None, perplexity=10.0)]
    made[0].config["quantization"]["embedding_bits"] = 4
    (study,) = summarise(made)
    assert study.baseline == "full"
    assert [each.full_precision for each in study.summaries] == [False, True]


def test_losses_beyond_floating_point_do_not_count(result) -> None:
    losses = np.full((1, 20), 800.0)
    huge = {0: dataclasses.replace(runs(lambda *_: result(), np.full((1, 20), 3.0))[0], parts={
        "unit": "documents", "sizes": [5] * 20, "losses": losses[0].tolist()})}  # fmt: skip
    found = difference(huge, huge)
    assert found is not None
    assert (found.value, found.low, found.parts) == (0.0, None, 0)


def test_without_scipy_the_extra_is_named(result, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    ours, theirs = without_parts(result, [20.0, 21.0]), without_parts(result, [18.0, 18.5])
    with pytest.raises(
        BellboxError, match=r"scipy.stats is not installed; install it with: pip install 'bellbox\[cli\]'"
    ):
        difference(ours, theirs)
    single = difference({0: ours[0]}, {0: theirs[0]})  # a single seed without documents needs none
    assert single is not None
    assert single.value == 2.0
