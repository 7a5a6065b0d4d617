"""The page: headline numbers, pictures with captions that say what to see, tables, the configuration.

One string of HTML. It loads nothing: the style is inside, pictures are inline SVG, there is no script. It
follows the reader's light or dark setting, and prints on white.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from bellbox.report import bell_box, curves, layers, spectrum, widths
from bellbox.report.content import ReportInput, SizeRow
from bellbox.report.html import (
    agreement,
    caption,
    cards,
    details,
    document,
    facts,
    figure_with_caption,
    header,
    joined,
    preformatted,
    sample,
    section,
    sizes,
)

_LANGUAGE_CAPTION = (
    "Left: the loss in nats per token (perplexity is its exponential, scale on the right); the thin line is"
    " single training batches, the points are the whole validation split. Right: the same validation loss"
    " per byte of text, which compares across tokenizers. Both should fall to the end and lie well under the"
    " dashed line, a full-precision model that knows only how often each token occurs."
)


def render(content: ReportInput) -> str:
    """The whole page.

    Args:
        content: what is known; parts that are absent are left out of the page.
    """
    title = f"{content.title or content.record.name}: Bellbox report"
    sections = [
        _headline(content),
        _training(content),
        _widths(content),
        _method(content),
        _entropy(content),
        _scales(content),
        _features(content),
        _sizes(content),
        _sample(content),
        _configuration(content),
    ]
    return document(title, joined(sections))


def _headline(content: ReportInput) -> str:
    about = [part for part in (content.model, _when(content)) if part]
    title = content.title or content.record.name
    return header("Bellbox report", title, about) + cards(_cards(content))


def _when(content: ReportInput) -> str:
    train = content.record.train
    if not train:
        return ""
    last = train[-1]
    minutes = last["seconds"] / 60
    budget = f"{last['step']:,} steps, {last['tokens']:,} {content.record.unit}"
    return f"{budget}, {minutes:.1f} minutes of training and validation"


def _cards(content: ReportInput) -> Iterable[tuple[str, str, str]]:
    last = content.record.at(content.step)
    if last is not None:
        loss = f"loss {_number(last['loss'], 4)}"
        if content.record.is_vision:
            yield "validation accuracy", f"{100 * last['accuracy']:.2f} %", loss
        else:
            yield "validation perplexity", _number(last["perplexity"], 2), loss
        if last.get("bits_per_byte") is not None:
            floor = content.unigram_bits_per_byte
            note = "" if floor is None else f"unigram model: {floor:.3f}"
            yield "bits per byte", f"{last['bits_per_byte']:.3f}", note
        if content.levels and (last.get("weight_entropy") or {}).get("layers"):
            values = last["weight_entropy"]["layers"].values()
            yield (
                "lowest weight entropy",
                f"{min(values):.3f}",
                f"bits per code, of at most {math.log2(content.levels):.4g}; mean {sum(values) / len(values):.3f}",
            )
    if content.sizes:
        row = content.sizes[0]
        yield "low-bit layers", f"1/{row.bf16 / row.packed:.2f}", "of their size in bf16"
    if content.verification is not None:
        found = content.verification
        yield (
            "codes that differ",
            f"{found.mismatches:,}",
            f"of {found.codes:,}, packed against trained",
        )


def _training(content: ReportInput) -> str:
    if content.record.is_vision:
        words = (
            "Left: the loss in nats per image; the thin line is single training batches (with whatever augmentation"
            " and mixing there is), the points are the validation split. Right: how many validation images get their"
            " own class."
        )
    else:
        words = _LANGUAGE_CAPTION
    body = figure_with_caption(curves.loss_and_bits(content), words)
    if content.record.train:
        body += figure_with_caption(
            curves.learning_rate_and_gradient(content),
            "Left: the learning rate's one cycle. Right: the gradient's norm before clipping; it should stay"
            " bounded, without spikes that grow.",
        )
    return section("Training", body)


def _widths(content: ReportInput) -> str:
    record = content.record
    if not widths.widths_of(record):
        return ""
    return section(
        "Its widths",
        figure_with_caption(
            widths.loss_by_width(record),
            "One model, validated at each of its widths; the numbers at the top of this page are those of the widest."
            " Left: all should fall to the end. Right: what fewer bits cost; the codes of a width are the upper bits of"
            " the wider ones'.",
        )
        + widths.table_of(record),
    )


def _method(content: ReportInput) -> str:
    if content.layer is None:
        return ""
    layer = content.layer
    n = len(layer.integers)
    return section(
        "Bell, box, codes",
        figure_with_caption(
            bell_box.bell_box_codes(layer),
            f"The trained weights of {layer.name} ({layer.codes.size:,} values). 1: rotation and normalisation"
            f" make a bell; it should follow N(0, 1), and the dashed thresholds cut it into {n} equal areas. 2: its"
            f" own distribution function makes the bell a box; it should be flat. 3: the codes that are stored; each"
            f" should be used {100 / n:.3g}% of the time. What is missing to"
            f" {math.log2(n):.4g} bits is the information lost. Small peaks at the thresholds are weights that training"
            " pushes across and back: the straight-through gradient turns its sign there.",
        ),
    )


def _entropy(content: ReportInput) -> str:
    measured = [record for record in content.record.evals if record.get("weight_entropy")]
    if not content.levels or not measured:
        return ""
    most = math.log2(content.levels)
    return section(
        "How well the codes are used",
        figure_with_caption(
            layers.entropy_over_time(content),
            f"Entropy of the codes at each validation. A code can carry at most log2({content.levels}) = {most:.4g}"
            " bits, and does when all codes occur equally often. The lines should stay close under the maximum;"
            " a falling line is a layer whose weights leave the bell shape.",
        )
        + figure_with_caption(
            layers.entropy_by_layer(content),
            "The same at the checkpoint, layer by layer. Layers that read the same tensor share one input and"
            " show it once, at the first of them.",
        )
        + figure_with_caption(
            layers.saturation(content),
            f"Share of codes that are the first or the last. Equal use puts {2 / content.levels:.3g} of them there;"
            " more means that values pile up at the ends, less that the ends are wasted.",
        ),
    )


def _scales(content: ReportInput) -> str:
    if not content.weight_gamma:
        return ""
    return section(
        "Learned scales",
        figure_with_caption(
            layers.gammas(content),
            "What the model learned its codes to be worth: gamma of each weight row by kind of layer, all blocks"
            " together (the line is the mean), and gamma of each layer input. A kind's rows should form one hill. A"
            " negative gamma only turns the sign of its row; a narrow peak at zero would be rows that the model"
            " has switched off.",
        ),
    )


def _features(content: ReportInput) -> str:
    found = spectrum.spectra_of(content.record)
    if not found:
        return ""
    return section(
        "Features",
        figure_with_caption(
            spectrum.features_over_time(content.record),
            "What the output layer reads (or the layer of the run's MEC term), of the validation split, pooled to one"
            " row a sample. Left: the share of the variance in each direction, the largest first, logarithmic; the"
            " dashed line is an even spread. Right: in how many directions it effectively lies, the exponential of the"
            " shares' entropy. A MEC term raises it.",
        ),
    )


def _sizes(content: ReportInput) -> str:
    if not content.sizes:
        return ""
    largest = max(max(row.bf16, row.packed) for row in content.sizes)
    body = sizes(_size_row(row, largest) for row in content.sizes) + caption(
        "Low-bit layers hold codes, one scale a row and the constants of their input; the rest"
        " (embeddings, head, norms) is stored as trained, in fp32 where the run did not round it. Of a packed folder"
        " the whole model is the bytes of its files."
    )
    found = content.verification
    if found is not None:
        exact = found.logit_difference == 0
        body += agreement(
            tokens=f"{found.tokens:,}",
            what="validation images" if content.record.is_vision else "tokens of validation text",
            codes=f"{found.codes:,}",
            mismatches=f"{found.mismatches:,}",
            difference=f"{found.logit_difference:.3g}",
            meaning="equal to the last bit" if exact else "the largest difference relative to them",
        )
    return section("Size", body)


def _size_row(row: SizeRow, largest: int) -> tuple[str, list[str], str, str]:
    ratio = f"1/{row.bf16 / row.packed:.2f}" if row.packed < row.bf16 else f"{row.packed / row.bf16:.2f}"
    cells = [f"{value:,}" for value in (row.parameters, row.fp32, row.bf16, row.packed)]
    before, after = (f"{max(0.5, 100 * value / largest):.1f}" for value in (row.bf16, row.packed))
    return row.part, [*cells, ratio], before, after


def _sample(content: ReportInput) -> str:
    if content.sample is None:
        return ""
    found = content.sample
    return section(
        "What it writes",
        sample(found.prompt, found.continuation) + caption(f"Prompt in bold. {found.settings}"),
    )


def _configuration(content: ReportInput) -> str:
    environment = facts((key, _plain(value)) for key, value in content.record.environment.items())
    return section(
        "Configuration and environment",
        details("Environment", environment) + details("config.yaml", preformatted(content.record.config)),
    )


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(entry)}" for key, entry in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _number(value: float | None, digits: int) -> str:
    return "not finite" if value is None else f"{value:,.{digits}f}"
