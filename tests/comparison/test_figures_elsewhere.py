"""Figures that other documents quote from the studies, held as test_figures_of_studies.py holds those of its own."""

from __future__ import annotations

import pytest
import torch
from figures import (
    FULL,
    MEC,
    Held,
    apart,
    at,
    deviation,
    dimension,
    filled,
    interval,
    mean,
    mec,
    mec_pooled,
    minutes,
    said,
)

from bellbox.models import build, preset
from bellbox.runs.planner import quantized_fraction

pytest.importorskip("scipy", reason="scipy, of the extra cli: intervals of several seeds")


def training() -> list[Held]:
    """Of docs/training.md."""
    low, lsq, bbq = mec_pooled("LSQ", "PACT", "BBQ"), mec_pooled("LSQ"), mec_pooled("BBQ")
    rows = [FULL, *(f"{method}, {bits}" for method, bits in MEC)]
    apart_from_chance = {name for name in rows if not mec(name).holds_zero}
    assert apart_from_chance == {"PACT, W4A4", "BBQ, W4A4"}
    assert {best_weight(method) for method in ("LSQ", "PACT", "BBQ")} == {1.0}
    return [
        *(
            (
                f"| {name} | {{:.1f}} ± {{:.1f}} | {{:.1f}} ± {{:.1f}} | {{:+.1f}} [{{:+.1f}}, {{:+.1f}}] |",
                (
                    mean("mec", name),
                    deviation("mec", name),
                    mean("mec", f"{name}, MEC"),
                    deviation("mec", f"{name}, MEC"),
                    *interval(mec(name), 100),
                ),
            )
            for name in rows
        ),
        (
            "Over all 27 pairs of low-bit runs the gain is {:.1f} points, with a standard error of {:.1f}.",
            low,
        ),
        ("there it is {:.1f} ± {:.1f}.", lsq),
        ("It is largest with BBQ ({:.1f} ± {:.1f}).", bbq),
        ("Full precision gains {:.1f},", (100 * mec(FULL).value,)),
        (
            "effective dimension doubles, from {:.0f} to {:.0f} with BBQ at W2A4",
            (dimension("BBQ, W2A4"), dimension("BBQ, W2A4, MEC")),
        ),
        ("1.8M tokens on 3.6M parameters give {:.4f}.", (quantized_fraction(1_800_000, 3_600_000, 2),)),
        (
            "3e9 tokens on the preset `95M` give {:.3f} with its own vocabulary of 50,304 ({:.1f}M parameters),",
            share(50304),
        ),
        ("and {:.3f} with one of 32,000 ({:.1f}M).", share(32000)),
    ]


def best_weight(method: str) -> float:
    """The weight of the entropy term that was best in `mec-tune`."""
    accuracies = {
        weight: mean("mec-tune", f"{method}, W2A4, MEC {weight:g}") for weight in (0.01, 0.1, 1.0, 10.0)
    }
    return max(accuracies, key=lambda weight: accuracies[weight])


def share(vocabulary: int) -> tuple[float, float]:
    """The best quantized fraction for 3e9 tokens of the preset 95M at 2 bits, and its parameters in millions."""
    with torch.device("meta"):
        model = build(preset("95M", vocab_size=vocabulary))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return quantized_fraction(3_000_000_000, parameters, 2), parameters / 1e6


def vision() -> list[Held]:
    """Of docs/vision.md."""
    names = ("BBQ", "QuEST", "LSQ")
    pairs = [("BBQ", "QuEST"), ("BBQ", "LSQ"), ("QuEST", "LSQ")]
    assert all(apart("vision", (a, 4), (b, 4)).holds_zero for a, b in pairs)
    gains = [100 * apart("vision", ("BBQ", bits), ("QuEST", bits)).value for bits in (1, 2)]
    assert round(gains[0]) == round(gains[1])
    return [
        ("A run is 69,632 images and {:.1f} minutes of one core", (minutes("vision"),)),
        ("full precision {:.1f} ± {:.1f}:", (mean("vision", FULL), deviation("vision", FULL))),
        *(
            (
                "| {} | {:.1f} ± {:.1f} | {:.1f} ± {:.1f} | {:.1f} ± {:.1f} | {:+.1f} [{:+.1f}, {:+.1f}] |",
                (
                    bits,
                    *(find("vision", name, bits) for name in names for find in (mean, deviation)),
                    *interval(apart("vision", ("BBQ", bits), ("QuEST", bits)), 100),
                ),
            )
            for bits in (1, 2, 4)
        ),
        ("BBQ is above QuEST by {:.0f} points at 1 and 2 bits.", (gains[0],)),
    ]


def times() -> list[Held]:
    """Of benchmarks/studies/README.md."""
    return [
        ("1.05M tokens: {:.1f} minutes", (minutes("methods-2bit", "methods-bits"),)),
        ("four times the tokens | {:.1f} minutes", (minutes("long"),)),
        ("on four blocks | the same tokens: {:.1f} minutes", (minutes("ends"),)),
        ("3.0M parameters, 4.2M tokens: {:.1f} minutes", (minutes("confirm"),)),
        ("28,672 images: {:.1f} minutes", (minutes("mec", "mec-tune"),)),
        ("69,632 images: {:.1f} minutes", (minutes("vision"),)),
    ]


DOCUMENTS = {
    "docs/training.md": training,
    "docs/vision.md": vision,
    "benchmarks/studies/README.md": times,
}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_figures_are_those_of_the_kept_results(document: str) -> None:
    texts = filled(DOCUMENTS[document]())
    assert texts
    whole = said(document)
    assert [text for text in texts if text not in whole] == []


def test_what_was_not_found_is_named() -> None:
    with pytest.raises(LookupError, match=r"no perplexity, heart, no rotation, None, 7\.5"):
        at("heart", "no rotation", 7.5)
