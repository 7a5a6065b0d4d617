"""Tokens are added to a table: nothing that was trained is lost, whatever form the table has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bellbox as bb
from bellbox.core.table import table_values
from bellbox.errors import BellboxError
from bellbox.models import build, preset
from bellbox.nn.compact import Compact
from bellbox.nn.quantized_table import QuantizedEmbedding, QuantizedHead

IDS = torch.arange(40).view(2, 20)


def model_of(form: str, tied: bool, name: str = "tiny") -> Any:
    """A model whose table has 128 rows, for a tokenizer of 100."""
    config = preset(name, vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
                    num_attention_heads=2, tie_word_embeddings=tied)  # fmt: skip
    model = build(config, seed=0).eval()
    if form == "plain":
        return model
    bb.prepare(model, bb.Recipe.bbq(2, embedding_bits=None if form == "int8" else 4))
    with torch.no_grad():
        model(IDS)
    if form == "prepared":
        return model
    return bb.convert(model, embeddings="int8" if form == "int8" else "fp32")


def tensors(table: nn.Module) -> list[torch.Tensor]:
    return [*table.parameters(), *table.buffers()]


@pytest.mark.parametrize("form", ["plain", "prepared", "packed", "int8"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["tiny", "gpt-tiny"])
def test_few_tokens_change_nothing_and_many_add_rows(
    form: str, tied: bool, name: str, tmp_path: Path
) -> None:
    model = model_of(form, tied, name)
    embedding = model.model.embed_tokens if name == "tiny" else model.transformer.wte
    kinds = type(embedding), type(model.lm_head)
    before = [t.clone() for t in tensors(embedding)]
    with torch.no_grad():
        expected = model(IDS)
        assert bb.grow_embeddings(model, 105) is model
        assert all(torch.equal(old, new) for old, new in zip(before, tensors(embedding), strict=True))
        assert model.config.vocab_size == 128
        bb.grow_embeddings(model, 140)
        assert model.config.vocab_size == 140
        assert (type(embedding), type(model.lm_head)) == kinds
        for table in (embedding, model.lm_head):
            assert len(table.weight) == 140
        assert (model.lm_head.weight is embedding.weight) == tied
        for old, new in zip(before, tensors(embedding), strict=True):
            assert torch.equal(old.view(torch.uint8), new[:128].view(torch.uint8))
        found = model(IDS)
        assert torch.equal(found[..., :128], expected)
        assert model(torch.tensor([[139, 3]])).shape == (1, 2, 140)
        if isinstance(embedding, Compact):
            values = table_values(embedding.codes())
            mean = values[:128].mean(0)
            assert float((values[139] - mean).abs().max()) <= float(values[:128].abs().max()) / 14
            bb.save(model, tmp_path / "m")
            assert torch.equal(bb.load(tmp_path / "m")(IDS), found)
        elif isinstance(embedding, QuantizedEmbedding):
            assert isinstance(model.lm_head, QuantizedHead)
            assert torch.equal(bb.convert(model)(IDS), found)


class Named(nn.Module):
    """A head of its own, with a user's name."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 64)
        self.mixers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
        self.to_logits = nn.Linear(64, 50)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids)
        for mixer in self.mixers:
            x = mixer(x)
        return self.to_logits(x)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_rounded_head_grows_whatever_its_name(bits: Any) -> None:
    model = bb.prepare(Named(), bb.Recipe.bbq(2, embedding_bits=bits)).eval()
    with torch.no_grad():
        expected = model(IDS)
        bb.grow_embeddings(model, 60)
        assert torch.equal(model(IDS)[..., :50], expected)
        packed = bb.convert(model)
        assert packed(torch.tensor([[59]])).shape == (1, 1, 60)
        bb.grow_embeddings(packed, 70)
        assert torch.equal(packed(IDS)[..., :50], expected)
        assert packed(torch.tensor([[69]])).shape == (1, 1, 70)


def test_what_cannot_grow_is_refused() -> None:
    with pytest.raises(BellboxError, match="no embedding that tokens could be added to"):
        bb.grow_embeddings(nn.Linear(4, 4), 10)
    for tokens in (0, -3, 1 << 40):
        with pytest.raises(BellboxError, match="must be from 1 to"):
            bb.grow_embeddings(model_of("plain", False), tokens)
    spec = bb.QuantizerSpec("bbq", 2)
    coded = bb.prepare(model_of("plain", False), bb.Recipe.bbq(2, rules=(bb.Rule("lm_head", spec, spec),)))
    with pytest.raises(BellboxError, match="lm_head is a low-bit layer"):
        bb.grow_embeddings(coded, 140)
    uneven = nn.ModuleDict({"words": nn.Embedding(20, 64), "head": nn.Linear(64, 24)})
    with pytest.raises(BellboxError, match="the head has 24 outputs, the embedding 20 entries"):
        bb.grow_embeddings(uneven, 40)
