from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from bellbox.comparison import summarise
from bellbox.report import comparison_page, comparison_pictures
from bellbox.report.comparison import _looks


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
