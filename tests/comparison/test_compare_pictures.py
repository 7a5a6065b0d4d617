from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from bellbox.comparison import summarise
from bellbox.report import comparison_page, comparison_pictures
from bellbox.report.comparison import _looks

pytest.importorskip("scipy", reason="scipy, of the extra cli: intervals of several seeds")


def studied(result, widths: tuple[float, ...]):
    history = [
        {"step": step, "tokens": 100 * step, "loss": 3.0, "weight_entropy": 1.9, "activation_entropy": 1.8}
        for step in (10, 20)
    ]
    gamma = {"mlp.down": {"low": 0.1, "high": 0.2, "counts": [1, 5, 2]}}
    lines = [result("full <b>", None, block_bytes=4000)]
    for row in ("BBQ", "QuEST"):
        for bits in widths:
            for seed in (0, 1):
                made = {
                    "history": history,
                    "gamma": gamma if row == "BBQ" else {},
                    "block_bytes": int(500 * bits),
                }
                lines.append(result(row, bits, seed=seed, perplexity=30.0 / bits + seed, **made))
    return summarise(lines)


def test_every_picture_that_the_results_can_fill_is_drawn(result) -> None:
    (study,) = studied(result, (1.0, 2.0, 4.0))
    pictures = comparison_pictures(study)
    assert [picture.name for picture in pictures] == [
        "perplexity-by-bits", "perplexity-by-row", "perplexity-by-bytes", "entropy-by-step", "gamma",
    ]  # fmt: skip
    for picture in pictures:
        root = ElementTree.fromstring(picture.standalone)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        words = "".join(root.itertext())
        assert "QuEST" in words or picture.name == "gamma"


def test_pictures_say_what_inputs_have_where_only_weights_are_quantized(result) -> None:
    history = [
        {"step": s, "tokens": s, "loss": 3.0, "weight_entropy": 1.9, "activation_entropy": None}
        for s in (1, 2)
    ]
    lines = [result("W", bits, history=history) for bits in (2.0, 4.0)]
    for line in lines:
        line.config["quantization"] |= {"bits": int(line.bits), "weight_only": "float"}
    (study,) = summarise(lines)
    by_bits, entropy = (
        next(picture for picture in comparison_pictures(study) if picture.name == name)
        for name in ("perplexity-by-bits", "entropy-by-step")
    )
    assert "bits of weights" in words_of(by_bits)
    assert "bits of weights and inputs" not in words_of(by_bits)
    assert "inputs in float" in words_of(entropy)
    assert "bits, inputs" not in words_of(entropy)


def seen(result, row: str, bits: float | None, shares: list[float], weight: float = 0.0, **changes):
    made = result(row, bits, feature_spectrum=shares, **changes)
    made.config["mec"]["weight"] = weight
    return made


def words_of(picture) -> str:
    return " ".join(ElementTree.fromstring(picture.standalone).itertext())


def test_spectra_with_and_without_mec_lie_over_each_other_a_panel_a_method(result) -> None:
    steep, flat = [0.9, 0.1], [0.5, 0.5]
    lines = [seen(result, "FP", None, steep), seen(result, "FP, MEC", None, flat, 0.1)]
    for seed in (0, 1):
        lines.append(seen(result, "BBQ", 2.0, steep, seed=seed))
        lines.append(seen(result, "BBQ, MEC", 2.0, flat if seed else steep, 0.5, seed=seed))
    lines.append(seen(result, "alone", 4.0, flat))
    (study,) = summarise(lines)
    words = words_of(comparison_pictures(study)[-1])
    assert "FP" in words
    assert "BBQ, 2 bits" in words
    assert "alone" not in words
    assert words.count("without: 1.4") == 2  # exp of the entropy of .9 and .1
    assert "MEC 0.1: 2.0" in words
    assert "MEC 0.5: 1.8" in words  # of the mean over seeds, .7 and .3


def test_spectra_without_any_mec_are_compared_at_each_width(result) -> None:
    lines = [seen(result, row, bits, [0.6, 0.4]) for row in ("BBQ", "LSQ") for bits in (1.0, 2.0)]
    (study,) = summarise([*lines, result("older", 2.0)])
    picture = comparison_pictures(study)[-1]
    assert picture.name == "feature-spectrum"
    for text in ("1 bits", "2 bits", "BBQ: 2.0", "LSQ: 2.0"):
        assert text in words_of(picture)
    assert "older" not in words_of(picture)


def test_accuracy_is_drawn_by_bits_in_percent(result) -> None:
    lines = [
        result("full", None, accuracy=0.8),
        *(result("BBQ", b, accuracy=0.5 + b / 10) for b in (1.0, 2.0)),
    ]
    for line in lines:
        line.config["task"] = "vision"
    (study,) = summarise(lines)
    picture = comparison_pictures(study)[0]
    assert picture.name == "accuracy-by-bits"
    assert "higher is better" in picture.caption
    assert "validation accuracy, %" in words_of(picture)
    ticks = [float(word) for word in words_of(picture).split() if word.replace(".", "", 1).isdigit()]
    assert max(ticks) == pytest.approx(80, abs=3)


def test_a_single_bit_width_and_few_facts_leave_pictures_out(result) -> None:
    (study,) = summarise([result(), result(seed=1)])
    assert [picture.name for picture in comparison_pictures(study)] == ["perplexity-by-row"]


def test_more_rows_than_colours_and_lines_still_look_different(result) -> None:
    (study,) = summarise([result(f"row {i}") for i in range(30)])
    looks = {row: tuple(map(str, look.values())) for row, look in _looks(study).items()}
    assert len(looks) == len(set(looks.values())) == 30


def test_the_page_stands_alone(result) -> None:
    studies = studied(result, (2.0,))
    page = comparison_page([(study, comparison_pictures(study)) for study in studies])
    assert "full &lt;b&gt;" in page
    assert "<b>" not in page
    assert page.count("<figure>") == len(comparison_pictures(studies[0]))
    for outside in ("http://", "https://", "src=", "<script"):
        assert outside not in page.replace("http://www.w3.org", "")
