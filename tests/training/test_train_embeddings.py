"""Embeddings and head rounded by a run: phases, resuming, and what is refused before the first step."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import text_of
from torch import nn

import bellbox as bb
from bellbox.core.table import TableCoding
from bellbox.errors import BellboxError
from bellbox.evaluation.codes import agreement
from bellbox.nn import quantized_layers
from bellbox.nn.quantized_table import QuantizedEmbedding, QuantizedHead
from bellbox.runs.build import check_quantization
from bellbox.runs.config import PhasesSection, QuantizationSection
from bellbox.runs.config_file import config_from_dict, load_config
from bellbox.runs.phases import phases_of
from bellbox.runs.resolve import resolve
from bellbox.training import TrainConfig, load_run, train
from bellbox.training.arithmetic import with_embeddings

Tiny = Callable[..., TrainConfig]
FOUR = QuantizationSection(embedding_bits=4)


def test_a_run_trains_what_it_ships(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny(quantization=FOUR), show=False)
    model: Any = load_run(tmp_path / "run").model
    assert isinstance(model.model.embed_tokens, QuantizedEmbedding)
    assert isinstance(model.lm_head, QuantizedHead)
    assert model.lm_head.coding == TableCoding(4, 32)  # 64 does not divide the width of 32
    found = agreement(model, bb.convert(model), [torch.arange(16)[None]])
    assert (found.mismatches, found.logit_difference) == (0, 0.0)
    plain = sum(layer.weight_codes().numel() for _, layer in quantized_layers(model))
    # Bytes of two tables and their multipliers are compared too, and the head's input.
    rows = model.config.vocab_size
    assert found.weight_codes == plain + 2 * rows * (16 + 1)


def test_a_run_goes_on_to_the_same_bits(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(quantization=FOUR)
    train(config, show=False)
    last = tmp_path / "run" / "checkpoints" / "step-00000004"
    expected = (last / "model.safetensors").read_bytes()
    shutil.rmtree(last)
    train(config, show=False)
    assert (last / "model.safetensors").read_bytes() == expected


def test_phases_in_full_precision_do_not_round(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(quantization=FOUR, phases=PhasesSection(quantized=0.5))
    first, last = phases_of(resolve(config, text_of(270)))
    assert (first.quantization.embedding_bits, last.quantization.embedding_bits) == (None, 4)
    train(config, show=False)
    models: list[Any] = [load_run(tmp_path / "run", step).model for step in (2, "last")]
    before, after = models
    assert type(before.model.embed_tokens) is nn.Embedding
    assert isinstance(after.model.embed_tokens, QuantizedEmbedding)


def test_what_does_not_fit_is_refused_before_the_first_step(tiny: Tiny) -> None:
    def check(**choices: Any) -> None:
        section = dataclasses.replace(QuantizationSection(), **choices)
        config = tiny(quantization=section)
        check_quantization(resolve(config, text_of(270)), section)

    check(embedding_bits=8)
    check(embedding_bits=4, embedding_group=32)
    check(embedding_bits=8, head_bits=4, embedding_group=32)
    check(head_bits=4)
    with pytest.raises(BellboxError, match="groups of 64 do not divide the 32 columns"):
        check(embedding_bits=4, embedding_group=64)
    with pytest.raises(BellboxError, match="leave out the group 64"):
        check(embedding_bits=8, embedding_group=64)
    with pytest.raises(BellboxError, match="there are no embedding_bits"):
        check(embedding_group=64)
    for key, value in (
        ("embedding_bits", 3),
        ("embedding_group", 16),
        ("embedding_bits", "4"),
        ("head_bits", 2),
    ):
        with pytest.raises(BellboxError, match=f"quantization.{key}"):
            config_from_dict({"quantization": {key: value}})


@pytest.mark.parametrize(
    ("choices", "bits"),
    [
        ({}, 8),
        ({"method": "lsq"}, 8),
        ({"embedding_bits": 4}, 4),
        ({"embedding_bits": 32}, 32),
        ({"embedding_group": 32}, None),  # refused later: of 4 bits alone
        ({"method": "none"}, 32),
        ({"method": "bbq_paper"}, 32),
        ({"method": "cewt"}, 32),
        ({"method": "nf", "weight_only": "float"}, 32),
    ],
)
def test_a_new_run_rounds_where_nothing_is_said(
    tiny: Tiny, choices: dict[str, Any], bits: int | None
) -> None:
    config = with_embeddings(tiny(quantization=QuantizationSection(**choices)))
    assert config.quantization.embedding_bits == bits


def test_a_run_that_began_without_rounding_goes_on_so(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(quantization=QuantizationSection())
    train(config, show=False)
    begun = load_config(tmp_path / "run" / "config.yaml").quantization.embedding_bits
    assert begun is None
    again = with_embeddings(config)
    assert again.quantization.embedding_bits == 32
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    train(again, show=False)  # no difference between the two
    assert type(load_run(tmp_path / "run").model.model.embed_tokens) is nn.Embedding
    new = with_embeddings(tiny("new", quantization=QuantizationSection()))
    assert new == tiny("new", quantization=QuantizationSection(embedding_bits=8))
