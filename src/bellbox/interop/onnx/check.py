"""Whether an ONNX file computes what the packed model does: onnxruntime beside torch, code by code.

Two questions are asked. Given the very input that a layer has in onnxruntime, are its codes those of the packed layer?
They have to be. And how far are the outputs of the whole: norms and attention round otherwise in another runtime, so
that an input within its rounding of a threshold may get the next code, which the logits then show.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bellbox.core.hadamard import butterfly
from bellbox.errors import BellboxError, require
from bellbox.interop.onnx.exporting import CODED
from bellbox.models import GPT, Llama
from bellbox.nn import PackedConv, PackedLayer
from bellbox.nn.compact import CompactLinear
from bellbox.nn.quantized_table import most_of_input, table_input_codes
from bellbox.utils.files import one_line

NEAR = 1e-6
"""What counts as on a threshold: this share of it, or of 1 where it is smaller."""
ROUNDING = 1e-4
"""How far inputs and outputs may differ, over the largest one, where no code has moved."""


@dataclass
class Agreement:
    """How far a file is the function of a packed model, on some inputs."""

    layers: int
    """Coded inputs compared; layers that share one count once."""
    codes: int = 0
    """Codes compared, of each of them."""
    wrong: int = 0
    """Of the same input, codes that differ and are not within 1e-6 of a threshold; outputs of a custom operator."""
    ties: int = 0
    """Of the same input, codes that differ within 1e-6 of a threshold."""
    moved: int = 0
    """Codes that differ because the input does."""
    samples: int = 0
    """Sequences or images."""
    samples_moved: int = 0
    """Those in which a code moved."""
    farthest: float = 0.0
    """Of the codes that moved first in their sample: the largest distance from a threshold."""
    unexplained: int = 0
    """Samples in which a layer's input differs by more than rounding and no code before it does."""
    difference: float = 0.0
    """Of samples in which no code moved: largest difference of two outputs over the largest magnitude of an output."""
    difference_moved: float = 0.0
    """The same of samples in which one did."""

    @property
    def holds(self) -> bool:
        """Whether every layer is the same function, and outputs agree to 1e-4 wherever no code moved."""
        return self.wrong == 0 and self.unexplained == 0 and self.difference <= ROUNDING


@torch.no_grad()
def agreement(
    model: nn.Module,
    path: str | os.PathLike[str],
    batches: Iterable[Tensor],
    library: str | os.PathLike[str] | None = None,
) -> Agreement:
    """Run a packed model and its file on the same inputs.

    Args:
        model: packed, in evaluation mode.
        path: what `export` or `export_model` made of it.
        batches: int64 `[batch, T]` of LLaMA and GPT; else the one argument of a forward.
        library: of the custom operator. Of layers that are one node the outputs are compared, bit for bit.

    Raises:
        BellboxError: no onnxruntime, a file that it cannot run, or one of another model.
    """
    session, where = _session(path, library)
    is_language = isinstance(model, Llama | GPT)
    named, layers = dict(model.named_modules()), dict[str, PackedLayer | CompactLinear]()
    for name in where:
        layer = named.get(name.removeprefix("model.") if is_language else name)
        if not isinstance(layer, PackedLayer | CompactLinear):
            raise BellboxError(f"{os.fspath(path)}: is of another model: this one has no packed layer {name}")
        layers[name] = layer
    found = Agreement(len(layers))
    for batch in batches:
        kept: dict[str, Tensor] = {}
        handles = [
            layer.register_forward_pre_hook(partial(_keep, kept, name)) for name, layer in layers.items()
        ]
        try:
            expected = model(batch)
        finally:
            for handle in handles:
                handle.remove()
        feeds = (
            _language_feeds(session, batch) if is_language else {session.get_inputs()[0].name: batch.numpy()}
        )
        coded = {
            each for named_so in where.values() for each in named_so[:2]
        }  # of which some may be inputs of the graph
        wanted = [session.get_outputs()[0].name, *sorted(coded - {*feeds})]
        got = {name: torch.from_numpy(each) for name, each in feeds.items()}
        got |= dict(zip(wanted, map(torch.from_numpy, session.run(wanted, feeds)), strict=True))
        moved = torch.zeros(len(batch), dtype=torch.bool)
        for name, layer in layers.items():
            given, seen, kind = where[name]
            _compare(found, layer, got[given], got[seen], kind, kept[name], moved)
        off = (got[wanted[0]] - expected).abs().flatten(1).amax(1).nan_to_num(torch.inf)
        off = off / expected.abs().max().clamp(min=1e-30)
        found.difference = max(found.difference, *off[~moved].tolist(), 0.0)
        found.difference_moved = max(found.difference_moved, *off[moved].tolist(), 0.0)
        found.samples, found.samples_moved = (
            found.samples + len(batch),
            found.samples_moved + int(moved.sum()),
        )
    return found


def _keep(kept: dict[str, Tensor], name: str, _layer: nn.Module, args: tuple[Tensor, ...]) -> None:
    kept[name] = args[0]


def _codes(layer: PackedLayer | CompactLinear, x: Tensor) -> Tensor:
    """Codes of an input, or the integers that a head rounds it to; one-dimensional."""
    if isinstance(layer, PackedLayer):
        return layer.input_codes(x).reshape(-1)
    assert layer.coding is not None
    return table_input_codes(x, layer.coding).reshape(-1).to(torch.int16)


def _compare(
    found: Agreement,
    layer: PackedLayer | CompactLinear,
    given: Tensor,
    seen: Tensor,
    kind: str,
    own: Tensor,
    moved: Tensor,
) -> None:
    """Compare a layer's codes.

    Args:
        found: takes the counts.
        layer: the packed one.
        given: its input in onnxruntime.
        seen: the codes that this has there, or the layer's output.
        kind: which of the two.
        own: its input in torch.
        moved: bool, one a sample: whether a code before differs. Is brought up to date.
    """
    if isinstance(layer, PackedConv):
        given = given.permute(0, 3, 1, 2)
        own = own if own.dim() == 4 else own.unsqueeze(2)
    here, there = _codes(layer, given), _codes(layer, own)
    if kind == "output":
        expected = layer(given)
        same = (seen == expected) | (seen.isnan() & expected.isnan())
        found.wrong += int((~same).sum())
        differs = torch.zeros(0, dtype=torch.int64)
    else:
        differs = (here != seen.reshape(-1).to(here.dtype)).nonzero().flatten()
    near = int((_distance(layer, given, differs) <= NEAR).sum())
    found.codes += here.numel()
    found.ties += near
    found.wrong += len(differs) - near
    # Where the input moves a code: per sample, where the layer still sees samples one by one.
    samples = len(moved) if len(own) == len(moved) else 1
    off = (given - own).abs().reshape(samples, -1).amax(1)
    beyond = off > ROUNDING * own.abs().reshape(samples, -1).amax(1)
    before = moved if samples > 1 else moved.any().expand(1)
    changed = (here != there).reshape(samples, -1)
    found.moved += int(changed.sum())
    found.unexplained += int((beyond & ~before).sum())
    first = (changed & ~before[:, None]).reshape(-1).nonzero().flatten()
    found.farthest = max(found.farthest, *_distance(layer, given, first).tolist(), 0.0)
    moved |= changed.any(1)


def _distance(layer: PackedLayer | CompactLinear, given: Tensor, places: Tensor) -> Tensor:
    """How far these entries of an input lie from the nearest threshold, over it or over 1 where it is smaller."""
    if not len(places):
        return torch.zeros(0)
    if isinstance(layer, CompactLinear):
        assert layer.coding is not None
        largest = given.double().abs().amax(-1, keepdim=True)
        v = (given.double() / largest * most_of_input(layer.coding.bits)).reshape(-1)[places].abs()
        return (v - v.floor() - 0.5).abs() / v.clamp(min=1.0)
    coding, thresholds = layer.coding, layer.act_thresholds.double()
    conv = isinstance(layer, PackedConv)
    rows = given.permute(0, 2, 3, 1).flatten(1) if conv else given.reshape(-1, layer.row_length)
    if layer.act_signs is not None:
        rows = rows * layer.act_signs.repeat(rows.shape[1] // len(layer.act_signs))
    wide = rows.double()
    sigma = (
        wide.abs().amax(1, keepdim=True)
        if coding.normalise == "absmax"
        else wide.square().mean(1, True).sqrt()
    )
    r = 1 / sigma if layer.act_rstd is None else layer.act_rstd.double().reshape(1, 1)
    v = (butterfly(rows, coding.block).double() * r * coding.block**-0.5).reshape(-1)[places]
    return ((v[:, None] - thresholds).abs() / thresholds.abs().clamp(min=1.0)).amin(1)


def _session(
    path: str | os.PathLike[str], library: str | os.PathLike[str] | None
) -> tuple[Any, dict[str, list[str]]]:
    """A session whose outputs are those of the file and all coded inputs with their codes."""
    onnx, runtime = require("onnx", "onnx"), require("onnxruntime", "onnx")
    try:
        proto = onnx.load(os.fspath(path), load_external_data=False)
    except Exception as error:  # those of protocol buffers and of the system
        raise BellboxError(f"{os.fspath(path)}: is no ONNX file: {one_line(error)}") from None
    stated = {each.key: each.value for each in proto.metadata_props}
    if CODED not in stated:
        raise BellboxError(f"{os.fspath(path)}: was not written by bellbox export onnx")
    where: dict[str, list[str]] = json.loads(stated[CODED])
    known = {each.name for each in (*proto.graph.output, *proto.graph.input)}
    for each in {name for named in where.values() for name in named[:2]} - known:
        proto.graph.output.add(name=each)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        if library is not None:
            options.register_custom_ops_library(os.fspath(library))
        # Beside the file, where constants of their own file are found.
        with tempfile.NamedTemporaryFile(dir=Path(path).parent, prefix=".check.", suffix=".onnx") as beside:
            beside.write(proto.SerializeToString())
            beside.flush()
            session = runtime.InferenceSession(beside.name, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has an exception for each of its error codes
        raise BellboxError(f"{os.fspath(path)}: onnxruntime cannot run it: {one_line(error)}") from None
    return session, where


def _language_feeds(session: Any, ids: Tensor) -> dict[str, np.ndarray]:
    """All tokens at once, none before them."""
    batch, tokens = ids.shape
    feeds = {
        "input_ids": ids.numpy(),
        "attention_mask": np.ones((batch, tokens), np.int64),
        "position_ids": np.arange(tokens)[None].repeat(batch, 0),
    }
    for each in session.get_inputs()[3:]:
        feeds[each.name] = np.zeros((batch, each.shape[1], 0, each.shape[3]), np.float32)
    return feeds
