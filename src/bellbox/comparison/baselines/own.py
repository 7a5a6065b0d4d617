"""Bellbox's own rows: full precision in both libraries, weights rounded to 4 bits, post-training binarization."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bellbox.comparison.baselines.baseline import Baseline, plain_transformer, refused
from bellbox.comparison.baselines.job import Job
from bellbox.convert import convert, prepare
from bellbox.errors import BellboxError
from bellbox.formats import packed
from bellbox.formats.auto import kind_of, open_model
from bellbox.models import build, load_hf
from bellbox.models.blocks import layer_names
from bellbox.models.hf_config import read_config
from bellbox.nn import replace_layer
from bellbox.nn.compact import Compact, CompactEmbedding
from bellbox.ptq import Job as Binarization
from bellbox.ptq import Settings, binarize_folder
from bellbox.quantizers.spec import QuantizerSpec
from bellbox.recipe import Recipe, Rule
from bellbox.utils.skeleton import on_meta


def _round_weights(
    job: Job, folder: Path, method: str, options: dict[str, Any], rules: tuple[Rule, ...] = ()
) -> None:
    recipe = Recipe.of(method, 4, weight_only="float", options=options, rules=rules)
    model = prepare(load_hf(job.checkpoint), recipe)
    # Of a checkpoint in bf16, embeddings in bf16 are exact.
    packed.save(convert(model, "bf16" if job.dtype == "bfloat16" else "fp32"), folder)


def _binarize(job: Job, folder: Path, settings: Settings) -> None:
    made = folder / "model"
    context = int(job.tensors()["calibration"].shape[1])
    binarize_folder(
        Binarization(job.checkpoint, made, Path(job.calibration), settings, job.samples, context), show=False
    )
    for file in made.iterdir():
        file.rename(folder / file.name)
    made.rmdir()


def _open(folder: Path, job: Job) -> nn.Module:  # noqa: ARG001
    return open_model(folder).model


def _open_wide(folder: Path, job: Job) -> nn.Module:
    """Embeddings and head that are stored in bf16 compute in fp32, as those of the packages' models do."""
    model = _open(folder, job)
    for table in [each for each in model.modules() if isinstance(each, Compact)]:
        replace_layer(model, table, _widened_table(table))
    return model.eval()


def _widened_table(table: Compact) -> nn.Module:
    rows, columns = table.weight.shape
    kind = (
        nn.Embedding(rows, columns)
        if isinstance(table, CompactEmbedding)
        else nn.Linear(columns, rows, bias=False)
    )
    kind.weight = nn.Parameter(table.weight.float(), requires_grad=False)
    return kind


def _nf(job: Job, folder: Path) -> None:
    """Groups of columns; a scale for the whole row in layers that they do not divide."""
    odd = tuple(Rule(name, QuantizerSpec("nf", 16)) for name, columns in _columns(job) if columns % job.group)
    _round_weights(job, folder, "nf", {"group": job.group}, odd)


def _columns(job: Job) -> Iterator[tuple[str, int]]:
    """The blocks' linear layers with their inputs."""
    with on_meta():
        model = build(read_config(job.checkpoint / "config.json")[0])
    for name in layer_names(model.config):
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        yield name, layer.in_features


FULL = Baseline(
    "full", "full precision", refused("the checkpoint"), lambda folder, _: plain_transformer(folder, torch.float32),
    module="transformers", package="transformers", extra="transformers",
)  # fmt: skip
FULL_BELLBOX = Baseline(
    "full-bellbox", "full precision", refused("the checkpoint"), lambda folder, _: load_hf(folder)
)

OWN = (
    FULL,
    FULL_BELLBOX,
    Baseline("rtn", "round to nearest", partial(_round_weights, method="rtn", options={}), _open_wide, 4),
    Baseline("nf4", "NF4", _nf, _open_wide, 4),
    Baseline(
        "rtn-1bit", "round to nearest, ptq", partial(_binarize, settings=Settings(method="rtn")), _open, 1
    ),
    Baseline("billm", "BiLLM", partial(_binarize, settings=Settings(method="billm")), _open, 1),
    Baseline(
        "dbellquant", "DBellQuant", partial(_binarize, settings=Settings(method="dbellquant")), _open, 1
    ),
)


def given(folder: Path, job: Job) -> Baseline:
    """The row of a packed or binarized model that the user names.

    Raises:
        BellboxError: it is something else, or has another tokenizer than the checkpoint.
    """
    if kind_of(folder) not in ("packed", "binarized"):
        raise BellboxError(f"{folder}: --packed takes packed or binarized models; convert it first")
    opened = open_model(folder)
    if opened.tokenizer is None or opened.load_tokenizer().sha256 != _tokenizer_of(job):
        raise BellboxError(
            f"{folder}: has no tokenizer or another one than {job.model}, so their perplexities do not compare"
        )
    name = folder.resolve().name
    return Baseline(f"packed:{name}", name, refused(str(folder)), _open, made=folder.resolve())


def _tokenizer_of(job: Job) -> str:
    from bellbox.data.tokenizer import Tokenizer

    return Tokenizer.load(job.checkpoint).sha256
