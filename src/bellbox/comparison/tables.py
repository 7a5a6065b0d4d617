"""A study as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable

from bellbox.comparison.differences import CONFIDENCE, Difference
from bellbox.comparison.grid import bits_text
from bellbox.comparison.summary import Study, Summary

_NONE = "-"


def _number(value: float | None, form: str) -> str:
    return _NONE if value is None else format(value, form)


def _judged(summary: Summary, factor: float) -> str:
    if summary.mean is None:
        return "failed"
    deviation = summary.deviation
    return f"{factor * summary.mean:.2f}" + ("" if deviation is None else f" ± {factor * deviation:.2f}")


def _difference(study: Study, found: Difference | None) -> str:
    if found is None:
        return _NONE
    factor = factor_of(study)
    text = f"{factor * found.value:+.2f}" + ("§" if found.seeds == 1 else "")
    text += "¶" if study.is_open(found) else ""
    if found.low is None or found.high is None:
        return text
    return f"{text} [{factor * found.low:+.2f}, {factor * found.high:+.2f}]"


def factor_of(study: Study) -> float:
    """What `Study.metric` is multiplied with to be shown: accuracy is shown in percent."""
    return 100.0 if study.metric == "accuracy" else 1.0


def title_of(study: Study) -> str:
    """How `Study.metric` is called where it is shown."""
    return "accuracy, %" if study.metric == "accuracy" else study.metric


def _lr(summary: Summary) -> str:
    row_scale = "*" if summary.at_edge else "‡" if summary.untuned else ""
    return _NONE if summary.lr is None else f"{summary.lr:g}{row_scale}"


def _size(summary: Summary) -> str:
    if summary.block_bytes is None:
        return _NONE
    return f"{summary.block_bytes:,}" + ("†" if summary.not_packed is not None else "")


def _bits(summary: Summary) -> str:
    if summary.bits is None:
        return _NONE
    inputs = summary.weight_only
    if inputs is None and summary.activation_bits not in (None, summary.bits):
        inputs = bits_text(summary.activation_bits)
    return bits_text(summary.bits) + ("" if inputs is None else f", inputs {inputs}")


def _columns(study: Study) -> tuple[tuple[str, Callable[[Summary], str]], ...]:
    return (
        ("method", lambda s: s.row),
        ("bits", _bits),
        (title_of(study), lambda s: _judged(s, factor_of(study))),
        ("of full precision", lambda s: _number(s.ratio, ".3f")),
        ("difference", lambda s: _difference(study, s.difference)),
        ("weight entropy", lambda s: _number(s.weight_entropy, ".3f")),
        ("input entropy", lambda s: _number(s.activation_entropy, ".3f")),
        ("step, ms", lambda s: _NONE if s.step_seconds is None else f"{1e3 * s.step_seconds:.0f}"),
        ("block bytes", _size),
        ("best lr", _lr),
        ("seeds", lambda s: str(len(s.values))),
    )


def headings(study: Study) -> list[str]:
    """Of the table's columns."""
    return [name for name, _ in _columns(study)]


def cells(study: Study) -> list[list[str]]:
    """The table's rows as text, under `headings`."""
    return [[text(summary) for _, text in _columns(study)] for summary in study.summaries]


def notes(study: Study) -> list[str]:
    """What one must know to read the table, a sentence each."""
    if study.metric == "accuracy":
        budget, layers = (
            f"{study.tokens:,} training images a run; accuracy on the",
            "convolutions and linear layers",
        )
    else:
        budget = f"{study.tokens:,} training tokens a run, context {study.context}; perplexity on the whole"
        layers = "linear layers"
    found = [
        f"{budget} validation split, mean and standard deviation over seeds at the learning rate that was best on the"
        " first seed."
        " Entropy in bits per code, mean of the layers. Step: the quickest logged stretch of a run."
        f" Block bytes: the blocks' {layers}, packed (bf16 where not quantized).",
    ]
    if study.dates:
        found.append(
            f"Measured {' and '.join(study.dates)} on {'; '.join(study.machines)}; Bellbox {'; '.join(study.versions)}."
        )
    found += _notes_on_differences(study)
    if any(summary.at_edge for summary in study.summaries):
        found.append("* The best rate is at the end of those tried: a better one may lie beyond.")
    if any(summary.untuned for summary in study.summaries):
        found.append("‡ The only rate that was tried in this study: not tuned here.")
    reasons = {s.row: s.not_packed for s in study.summaries if s.not_packed is not None}
    if reasons:
        why = "; ".join(f"{row}: {reason}" for row, reason in reasons.items())
        found.append(f"† Cannot be packed into integers; bytes of its codes and scales. {why}")
    found += [
        f"Failed: {_label(summary)}, {error}" for summary in study.summaries for error in summary.errors
    ]
    if study.missing is None:
        found.append(
            "No grid is kept beside these results: each row is taken as it was defined last, with all its rates and"
            " seeds."
        )
    elif study.missing:
        found.append(f"Not finished: {study.missing} of the runs that the grid asks for are still to come.")
    if study.left_out:
        found.append(
            f"{study.left_out} older results are left out: other data, another budget, or a row, definition, rate or"
            " seed that is not asked for any more."
        )
    return found


def _notes_on_differences(study: Study) -> list[str]:
    differences = study.differences
    if not differences:
        return []
    unit = "points, " if study.metric == "accuracy" else ""
    found = [
        f"Difference: {unit}row less {study.baseline}, over the seeds that both have. A seed gives both the same"
        " initial weights and the same order of the data." + _what_is_in_brackets(differences)
    ]
    if all(not one.parts for one in differences):
        found.append(
            "These results have no losses per document: an interval is over seeds alone, and one seed has none."
        )
    elif any(not one.parts for one in differences):
        found.append(
            "Some of these results have no losses per document: their intervals are over seeds alone."
        )
    if any(one.seeds == 1 for one in differences):
        found.append(f"§ One seed: another may change it{_what_a_seed_does(study)}.")
    if any(study.is_open(one) for one in differences):
        found.append(
            "¶ Not told apart: zero lies in the interval, or within what a seed does to the other rows."
        )
    return found


def _what_is_in_brackets(differences: list[Difference]) -> str:
    if all(one.low is None for one in differences):
        return ""
    over = ["seeds"] if any(one.seeds > 1 for one in differences) else []
    over += dict.fromkeys(one.unit for one in differences if one.unit is not None)
    return f" In brackets {CONFIDENCE:.0%} for other {' and '.join(over)} (bootstrap, paired; Student's t)."


def _what_a_seed_does(study: Study) -> str:
    pooled = study.seed_deviation
    if pooled is None:
        return ", by how much no difference in this study says"
    return (
        f"; a seed moves the differences of the rows that have several by {factor_of(study) * pooled[0]:.2f} (standard"
        " deviation, pooled)"
    )


def rates(study: Study) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the table of learning rates: `Study.metric` of each on the first seed."""
    tried = sorted({lr for summary in study.summaries for lr in summary.tried})
    body = []
    for summary in study.summaries:
        row = [_label(summary)]
        for lr in tried:
            found = summary.tried.get(lr)
            value = "" if lr not in summary.tried else _number(found and factor_of(study) * found, ".2f")
            row.append("failed" if value == _NONE else value)
        body.append(row)
    return ["", *(f"{lr:g}" for lr in tried)], body


def rates_title(study: Study) -> str:
    """Of the table of learning rates."""
    return f"{title_of(study).capitalize()} on the first seed, by learning rate"


def markdown(studies: list[Study]) -> str:
    """All studies, each with its table, its notes and its learning rates."""
    parts = []
    for study in studies:
        parts.append(f"## {study.name}\n\n" + markdown_table(headings(study), cells(study)))
        parts.append("\n".join(f"- {note}" for note in notes(study)) + "\n")
        if any(len(summary.tried) > 1 for summary in study.summaries):
            parts.append(f"{rates_title(study)}:\n\n" + markdown_table(*rates(study)))
    return "\n".join(parts)


def markdown_table(headings: list[str], rows: list[list[str]]) -> str:
    """A table of Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def comma_separated(studies: list[Study]) -> str:
    """One line a row and study, numbers in full."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    metrics = sorted({study.metric for study in studies}, reverse=True)  # perplexity, then accuracy
    writer.writerow(
        ["study", "method", "bits", *metrics, "deviation", "ratio", "baseline", "difference",
         "difference_low", "difference_high", "difference_seeds", "difference_parts", "weight_entropy",
         "lowest_weight_entropy", "activation_entropy", "step_seconds", "block_bytes", "packable", "lr",
         "lr_at_edge", "rates", "seeds", "tokens", "failed"]
    )  # fmt: skip
    for study in studies:
        for s in study.summaries:
            values = [s.mean if study.metric == metric else None for metric in metrics]
            writer.writerow(
                [study.name, s.row, s.bits, *values, s.deviation, s.ratio,
                 *_difference_fields(study, s.difference), s.weight_entropy,
                 s.lowest_weight_entropy, s.activation_entropy, s.step_seconds, s.block_bytes,
                 s.not_packed is None, s.lr, s.at_edge, len(s.tried), len(s.values), study.tokens, len(s.errors)]
            )  # fmt: skip
    return buffer.getvalue()


def _difference_fields(study: Study, found: Difference | None) -> list[object]:
    if found is None:
        return [None] * 6
    low, high = (None if end is None else float(f"{end:.6g}") for end in (found.low, found.high))
    return [study.baseline, found.value, low, high, found.seeds, found.parts]


def latex(studies: list[Study]) -> str:
    """A `tabular` a study, for a paper (booktabs)."""
    parts = []
    for study in studies:
        body = [[_escape(cell) for cell in line] for line in cells(study)]
        lines = [
            f"% study {study.name}",
            *(f"% {note}" for note in notes(study)),
            f"\\begin{{tabular}}{{l{'r' * (len(headings(study)) - 1)}}}",
            "\\toprule",
            " & ".join(map(_escape, headings(study))) + r" \\",
            "\\midrule",
            *(" & ".join(line) + r" \\" for line in body),
            "\\bottomrule",
            "\\end{tabular}",
        ]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "†": r"$^\dagger$",
    "‡": r"$^\ddagger$", "§": r"$^\S$", "¶": r"$^\P$",
}  # fmt: skip


def _escape(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def _label(summary: Summary) -> str:
    return summary.row if summary.bits is None else f"{summary.row}, {bits_text(summary.bits)} bits"
