from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import bellbox as bb
from bellbox.errors import BellboxError
from bellbox.formats.packed import sizes
from bellbox.models import Llama, build, preset
from bellbox.nn.compact import Compact, CompactEmbedding, CompactLinear, compact


def trained(**overrides) -> nn.Module:
    config = preset("tiny", vocab_size=96, hidden_size=64, intermediate_size=128, **overrides)
    model = bb.prepare(build(config, seed=0), bb.Recipe.bbq(2))
    with torch.no_grad():
        model.eval()(torch.randint(0, 96, (2, 16)))
    return model


IDS = torch.arange(40).view(2, 20)


@pytest.mark.parametrize(("precision", "error"), [("bf16", 0.05), ("int8", 0.05)])
@pytest.mark.parametrize("tied", [False, True])
def test_rounded_embeddings_change_logits_little_and_survive_the_file(
    tmp_path: Path, precision, error, tied
) -> None:
    model = trained(tie_word_embeddings=tied, num_hidden_layers=1)
    with torch.no_grad():
        whole = bb.convert(model)
        small = bb.convert(model, embeddings=precision)
        head = nn.functional.linear(torch.ones(1, 64), whole.lm_head.weight)
        found = small.lm_head(torch.ones(1, 64))
        assert float((found - head).norm() / head.norm()) < error
        rows = small.model.embed_tokens(IDS) - whole.model.embed_tokens(IDS)
        assert float(rows.abs().max()) < float(whole.model.embed_tokens.weight.abs().max()) / 100
        bb.save(small, tmp_path / "small")
        loaded = bb.load(tmp_path / "small")
        assert torch.equal(loaded(IDS), small(IDS))
        again = bb.load(tmp_path / "small", into=build(model.config))
        assert torch.equal(again(IDS), small(IDS))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert sizes(small).other_bytes < 0.6 * sizes(whole).other_bytes
    assert sizes(small).other_parameters == sizes(whole).other_parameters
    assert isinstance(loaded, Llama)
    assert isinstance(loaded.lm_head, CompactLinear)
    assert isinstance(loaded.model.embed_tokens, CompactEmbedding)


def test_rounding_at_load_is_rounding_at_conversion(tmp_path: Path) -> None:
    model = trained()
    bb.save(bb.convert(model), tmp_path / "whole")
    with torch.no_grad():
        late = bb.load(tmp_path / "whole", embeddings="int8")
        assert torch.equal(late(IDS), bb.convert(model, embeddings="int8")(IDS))
    with pytest.raises(BellboxError, match="leave them as they are"):
        compact(late, "bf16")


def test_int8_entries_are_within_half_a_step_and_zero_rows_stay_zero() -> None:
    embedding = nn.Embedding(50, 32)
    with torch.no_grad():
        embedding.weight[7] = 0.0
    small = compact(nn.Sequential(embedding), "int8")
    weight = embedding.weight.detach()
    step = weight.abs().amax(1, keepdim=True) / 127
    assert bool(((small(torch.arange(50)) - weight).abs() <= step * 0.5001).all())
    assert not small(torch.tensor([7])).any()


def test_a_decode_step_takes_rounded_embeddings(tmp_path: Path) -> None:
    small = bb.convert(trained(), embeddings="int8")
    with torch.no_grad():
        whole = small(IDS)
        cache = small.new_cache(2, 20)
        steps = [small(IDS[:, i : i + 1], cache=cache) for i in range(20)]
    assert float((torch.cat(steps, dim=1) - whole).norm() / whole.norm()) < 0.05


def test_a_layer_that_was_kept_is_not_taken_for_a_head() -> None:
    config = preset("gpt-95M", vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
                    num_attention_heads=2, max_position_embeddings=64)  # fmt: skip
    model = bb.prepare(build(config, seed=0), bb.Recipe.bbq(2, keep=("*.q_proj",)))
    with torch.no_grad():
        model.eval()(IDS)
    small = bb.convert(model, embeddings="int8")
    names = [name for name, module in small.named_modules() if isinstance(module, Compact)]
    assert names == ["transformer.wte", "transformer.wpe", "lm_head"]


def test_what_cannot_be_rounded_is_refused() -> None:
    with pytest.raises(BellboxError, match="not 'int3'"):
        compact(trained(), "int3")
    wide = nn.ModuleDict({"embed": nn.Embedding(4, 9000), "head": nn.Linear(9000, 4)})
    with pytest.raises(BellboxError, match="use bf16"):
        compact(wide, "int8")
    assert [type(module) for module in wide.children()] == [nn.Embedding, nn.Linear]  # nothing is half done
    for precision in ("bf16", "int8"):
        with pytest.raises(BellboxError, match=f"with max_norm 1 cannot be {precision}"):
            compact(nn.Sequential(nn.Embedding(4, 8, max_norm=1.0)), precision)
    with pytest.raises(BellboxError, match="no fp32 embedding"):
        compact(nn.Linear(4, 4), "int8")


def test_a_folder_whose_table_is_not_in_the_model_is_refused(tmp_path: Path) -> None:
    model = trained()
    bb.save(bb.convert(model, embeddings="int8"), tmp_path / "small")
    other = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(BellboxError, match="neither an embedding nor a head"):
        bb.load(tmp_path / "small", into=other)
