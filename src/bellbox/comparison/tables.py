"""A study as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable

from bellbox.comparison.grid import bits_text
from bellbox.comparison.summary import Study, Summary

_NONE = "-"


def _number(value: float | None, form: str) -> str:
    return _NONE if value is None else format(value, form)


def _perplexity(summary: Summary, plus_minus: str = "±") -> str:
    if summary.mean is None:
        return "failed"
    deviation = summary.deviation
    return f"{summary.mean:.2f}" + ("" if deviation is None else f" {plus_minus} {deviation:.2f}")


def _lr(summary: Summary) -> str:
    return _NONE if summary.lr is None else f"{summary.lr:g}" + ("*" if summary.at_edge else "")


def _size(summary: Summary) -> str:
    if summary.block_bytes is None:
        return _NONE
    return f"{summary.block_bytes:,}" + ("†" if summary.not_packed is not None else "")


COLUMNS: tuple[tuple[str, Callable[[Summary], str]], ...] = (
    ("method", lambda s: s.row),
    ("bits", lambda s: _NONE if s.bits is None else bits_text(s.bits)),
    ("perplexity", _perplexity),
    ("of full precision", lambda s: _number(s.ratio, ".3f")),
    ("weight entropy", lambda s: _number(s.weight_entropy, ".3f")),
    ("input entropy", lambda s: _number(s.activation_entropy, ".3f")),
    ("step, ms", lambda s: _NONE if s.step_seconds is None else f"{1e3 * s.step_seconds:.0f}"),
    ("block bytes", _size),
    ("best lr", _lr),
    ("seeds", lambda s: str(len(s.perplexities))),
)


def cells(study: Study) -> list[list[str]]:
    """The table's rows as text, under the headings of `COLUMNS`."""
    return [[text(summary) for _, text in COLUMNS] for summary in study.summaries]


def notes(study: Study) -> list[str]:
    """What one must know to read the table, a sentence each."""
    found = [
        f"{study.tokens:,} training tokens a run, context {study.context}; perplexity on the whole validation"
        " split, mean and standard deviation over seeds at the learning rate that was best on the first seed."
        " Entropy in bits per code, mean of the layers. Step: the quickest logged stretch of a run."
        " Block bytes: the blocks' linear layers, packed (bf16 where not quantized).",
        f"Measured {' and '.join(study.dates)} on {'; '.join(study.machines)}; Bellbox {'; '.join(study.versions)}.",
    ]
    if any(summary.at_edge for summary in study.summaries):
        found.append("* The best rate is at the end of those tried: a better one may lie beyond.")
    reasons = {s.row: s.not_packed for s in study.summaries if s.not_packed is not None}
    if reasons:
        why = "; ".join(f"{row}: {reason}" for row, reason in reasons.items())
        found.append(f"† Cannot be packed into integers; bytes of its codes and scales. {why}")
    found += [
        f"Failed: {_label(summary)}, {error}" for summary in study.summaries for error in summary.errors
    ]
    if study.left_out:
        found.append(
            f"{study.left_out} older runs with other data, another budget or another definition of their row"
            " are left out."
        )
    return found


def rates(study: Study) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the table of learning rates: perplexity of each on the first seed."""
    tried = sorted({lr for summary in study.summaries for lr in summary.tried})
    body = []
    for summary in study.summaries:
        row = [_label(summary)]
        for lr in tried:
            value = _number(summary.tried[lr], ".2f") if lr in summary.tried else ""
            row.append("failed" if value == _NONE else value)
        body.append(row)
    return ["", *(f"{lr:g}" for lr in tried)], body


def markdown(studies: list[Study]) -> str:
    """All studies, each with its table, its notes and its learning rates."""
    parts = []
    for study in studies:
        parts.append(f"## {study.name}\n\n" + _markdown_table([name for name, _ in COLUMNS], cells(study)))
        parts.append("\n".join(f"- {note}" for note in notes(study)) + "\n")
        if any(len(summary.tried) > 1 for summary in study.summaries):
            parts.append(
                "Perplexity on the first seed, by learning rate:\n\n" + _markdown_table(*rates(study))
            )
    return "\n".join(parts)


def _markdown_table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def comma_separated(studies: list[Study]) -> str:
    """One line a row and study, numbers in full."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        ["study", "method", "bits", "perplexity", "deviation", "ratio", "weight_entropy",
         "lowest_weight_entropy", "activation_entropy", "step_seconds", "block_bytes", "packable", "lr",
         "lr_at_edge", "seeds", "tokens", "failed"]
    )  # fmt: skip
    for study in studies:
        for s in study.summaries:
            writer.writerow(
                [study.name, s.row, s.bits, s.mean, s.deviation, s.ratio, s.weight_entropy,
                 s.lowest_weight_entropy, s.activation_entropy, s.step_seconds, s.block_bytes,
                 s.not_packed is None, s.lr, s.at_edge, len(s.perplexities), study.tokens, len(s.errors)]
            )  # fmt: skip
    return buffer.getvalue()


def latex(studies: list[Study]) -> str:
    """A `tabular` a study, for a paper (booktabs)."""
    parts = []
    for study in studies:
        body = [[_escape(cell) for cell in line] for line in cells(study)]
        lines = [
            f"% study {study.name}",
            *(f"% {note}" for note in notes(study)),
            f"\\begin{{tabular}}{{l{'r' * (len(COLUMNS) - 1)}}}",
            "\\toprule",
            " & ".join(_escape(name) for name, _ in COLUMNS) + r" \\",
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
}  # fmt: skip


def _escape(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def _label(summary: Summary) -> str:
    return summary.row if summary.bits is None else f"{summary.row}, {bits_text(summary.bits)} bits"
