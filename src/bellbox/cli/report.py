"""Write an HTML page with pictures of a run or of a binarized model: one file, to be opened in any browser.

bellbox report runs/small
bellbox report runs/small --out small.html --packed small-packed
bellbox report one-bit
bellbox report runs/small --layer model.layers.1.mlp.up_proj --prompt "Alice"
bellbox report runs/mine --import mine         # a run with a method of your own, from mine.py
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn

from bellbox import data, ptq
from bellbox.cli.convert import packed_sizes, size_rows
from bellbox.cli.generate import continue_text, speed_of
from bellbox.cli.output import parse_flags, refuse_flags, require_writable, write_file
from bellbox.convert import can_be_packed
from bellbox.errors import BellboxError, require
from bellbox.evaluation import unigram
from bellbox.evaluation.codes import Agreement
from bellbox.formats import packed as io
from bellbox.formats.auto import OpenedModel, open_model
from bellbox.nn import CodedLayer, QuantizedLayer, quantized_layers
from bellbox.ops.encode import normaliser, rotate_normalise, row_sigma
from bellbox.quantizers.bbq import BBQ
from bellbox.report import (
    LayerValues,
    ReportInput,
    Sample,
    SizeRow,
    Verification,
    binarized_page,
    read_record,
    render,
)
from bellbox.runs.config import DataSection

require("tyro", "cli")

import tyro  # noqa: E402  (named before, so that its absence is one line; this file is imported by its command only)


@dataclass(frozen=True)
class Report:
    """Write an HTML page with pictures of a run."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run folder, or a binarized model."""
    out: Path | None = None
    """The file to write; report.html in that folder where not given."""
    packed: Path | None = None
    """The run's packed model: its size is shown, and the sample comes from it."""
    checkpoint: str = "last"
    """last, best, or a step."""
    layer: str | None = None
    """The layer whose weights are shown on their way to codes; the largest one where not given."""
    prompt: str = "It was"
    """Beginning of the sample."""
    seed: int = 0
    """Of the sample."""


def main(argv: list[str]) -> None:
    """Run `bellbox report` with the arguments after that.

    Raises:
        BellboxError: what the user can put right.
    """
    command = parse_flags(Report, argv, "bellbox report", __doc__)
    if ptq.is_binarized(command.run):
        refuse_flags(command, ("packed", "checkpoint", "layer", "prompt", "seed"), "a binarized model")
        _write_binarized(Path(command.run), command.out)
        return
    opened = open_model(command.run, command.checkpoint)
    if opened.run is None:
        raise BellboxError(
            f"{opened.path}: is a {opened.kind} model; report takes a run folder or a binarized model"
        )
    out = opened.path / "report.html" if command.out is None else command.out
    require_writable(out)
    if opened.is_vision:
        refuse_flags(command, ("prompt", "seed"), "a vision model")
    packed = None if command.packed is None else _open_packed(command.packed, opened)
    sample = write_sample(packed or opened, command.prompt, command.seed)
    page = collect(opened, packed=packed, layer=command.layer, sample=sample)
    write_file(out, render(page))
    print(f"report written to {out} ({out.stat().st_size / 1024:,.0f} KiB)")


def _write_binarized(folder: Path, out: Path | None) -> None:
    out = folder / "report.html" if out is None else out
    require_writable(out)
    record, size = ptq.read_record(folder), ptq.stored_size(ptq.load(folder))
    write_file(out, binarized_page(folder.name, record, size.bits_per_weight, size.weights))
    print(f"report written to {out} ({out.stat().st_size / 1024:,.0f} KiB)")


def _open_packed(folder: Path, run: OpenedModel) -> OpenedModel:
    packed = open_model(folder)
    if packed.kind != "packed":
        raise BellboxError(f"{folder}: is no packed model; make one with bellbox convert")
    trained = dict(quantized_layers(run.model))
    modules = {
        name: module for name, module in packed.model.named_modules() if isinstance(module, CodedLayer)
    }
    if trained.keys() != modules.keys() or not all(
        torch.equal(trained[name].weight_codes().flatten(), module.weight_codes().flatten())
        for name, module in modules.items()
    ):
        raise BellboxError(
            f"{folder}: was not packed from this checkpoint of {run.path}; pack it with bellbox convert"
        )
    return packed


def collect(
    opened: OpenedModel,
    *,
    packed: OpenedModel | None = None,
    layer: str | None = None,
    sample: Sample | None = None,
    checked: Agreement | None = None,
) -> ReportInput:
    """Everything that the page of a run shows.

    Args:
        opened: the run.
        packed: its packed form.
        layer: the layer to look into; the largest where None.
        sample: a generated text.
        checked: how packed and trained model compare.

    Raises:
        BellboxError: nothing recorded, no such layer.
    """
    run = opened.run
    assert run is not None
    quantized = dict(quantized_layers(opened.model))
    weights = [layer.weight_quantizer for layer in quantized.values() if layer.weight_quantizer is not None]
    floor = None if opened.is_vision else _unigram(run.config.data)
    return ReportInput(
        record=read_record(opened.path),
        step=run.step,
        model=opened.description,
        unigram_bits_per_byte=None if floor is None else floor.bits_per_byte,
        unigram_loss=None if floor is None else floor.loss,
        levels=max((quantizer.levels.n for quantizer in weights), default=None),
        layer=_layer_values(quantized, layer),
        weight_gamma=_weight_gamma(quantized),
        activation_gamma=_activation_gamma(quantized),
        sizes=_sizes(opened.model, packed),
        verification=None
        if checked is None
        else Verification(checked.codes, checked.mismatches, checked.tokens, checked.logit_difference),
        sample=sample,
    )


def write_sample(
    opened: OpenedModel, prompt: str, seed: int = 0, temperature: float = 0.8, top_k: int = 40
) -> Sample | None:
    """A text by the model; None of a vision model, and where its granularity makes generating impossible.

    Raises:
        BellboxError: a prompt that is empty or too long.
    """
    if opened.is_vision or not _is_causal(opened.model):
        return None
    stream = continue_text(opened, prompt, temperature=temperature, top_k=top_k, seed=seed)
    text = "".join(stream)
    what = "the packed model" if opened.kind == "packed" else "the trained model"
    settings = f"From {what}, temperature {temperature:g}, top-k {top_k}, seed {seed}; {speed_of(stream)}."
    return Sample(prompt, text, settings)


def _is_causal(model: nn.Module) -> bool:
    layers = (layer.activation_quantizer for _, layer in quantized_layers(model))
    return all(layer is None or layer.quantizer.granularity != "tensor" for layer in layers)


def _unigram(section: DataSection) -> Any:
    """The floor on the run's data; None where the data is no longer there: the rest of the page stands alone."""
    try:
        mixture = section.mixture
        return unigram(data.open_mixture(mixture) if mixture else data.open(section.source))
    except BellboxError:
        return None


@torch.no_grad()
def _layer_values(layers: dict[str, QuantizedLayer], asked: str | None) -> LayerValues | None:
    suited = {name: layer for name, layer in layers.items() if isinstance(layer.weight_quantizer, BBQ)}
    if asked is not None and asked not in suited:
        raise BellboxError(f"--layer '{asked}': no such BBQ layer; there are: {', '.join(suited) or 'none'}")
    if not suited:
        return None
    name = asked or max(suited, key=lambda one: suited[one].stored_weight.numel())
    layer = suited[name]
    quantizer = layer.weight_quantizer
    assert isinstance(quantizer, BBQ)
    weight = layer.weight_rows().detach().float()
    r = normaliser(row_sigma(weight), quantizer.block).float()
    return LayerValues(
        name=name,
        normalised=rotate_normalise(weight, r, quantizer.block).numpy(),
        codes=layer.weight_codes().numpy(),
        thresholds=quantizer.levels.thresholds,
        integers=quantizer.levels.integers,
    )


def _weight_gamma(layers: dict[str, QuantizedLayer]) -> dict[str, Any]:
    found = {name: getattr(layer.weight_quantizer, "gamma", None) for name, layer in layers.items()}
    return {
        name: gamma.detach().float().numpy().reshape(-1) for name, gamma in found.items() if gamma is not None
    }


def _activation_gamma(layers: dict[str, QuantizedLayer]) -> dict[str, float]:
    seen: dict[int, str] = {}
    for name, layer in layers.items():
        seen.setdefault(id(layer.activation_quantizer), name)
    quantizers = {name: layers[name].activation_quantizer for name in seen.values()}
    return {
        name: quantizer.gamma.item()
        for name, quantizer in quantizers.items()
        if quantizer is not None and quantizer.gamma is not None
    }


def _sizes(model: nn.Module, packed: OpenedModel | None) -> list[SizeRow]:
    if packed is not None:
        sizes = io.sizes(packed.model)
    else:
        layers = [layer for _, layer in quantized_layers(model)]
        if not layers or not _is_causal(model) or not all(map(can_be_packed, layers)):
            return []
        sizes = packed_sizes(model)
    *parts, whole = [SizeRow(*row) for row in size_rows(sizes)]
    if packed is not None:
        whole = replace(whole, packed=io.file_bytes(packed.path))
    return [*parts, whole]
