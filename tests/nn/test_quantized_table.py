from __future__ import annotations

import copy
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bellbox as bb
from bellbox.convert import unprepare
from bellbox.core.table import TableCoding
from bellbox.errors import BellboxError
from bellbox.inference.decoding import steps_for
from bellbox.models import build, preset
from bellbox.nn.compact import CompactEmbedding, CompactLinear
from bellbox.nn.quantized_table import QuantizedEmbedding, QuantizedHead, most_of_input
from bellbox.ops import native

CODINGS = [(8, None), (4, 64), (4, 32)]
IDS = torch.arange(40).view(2, 20)


def prepared(bits, group=None, name: str = "tiny", **overrides) -> Any:
    config = preset(name, vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
                    num_attention_heads=2, max_position_embeddings=64, **overrides)  # fmt: skip
    recipe = bb.Recipe.bbq(2, embedding_bits=bits, embedding_group=group)
    return bb.prepare(build(config, seed=0), recipe)


def grad_of(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.grad is not None
    return tensor.grad


class Small(nn.Module):
    """An embedding and a head, whose names and ties are a user's own."""

    def __init__(self, tied: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 64, padding_idx=3)
        self.mixers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
        self.to_logits = nn.Linear(64, 50, bias=bias)
        if tied:
            self.to_logits.weight = self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids)
        for mixer in self.mixers:
            x = mixer(x)
        return self.to_logits(x)


@pytest.mark.parametrize(("bits", "group"), CODINGS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["tiny", "gpt-tiny"])
def test_trained_packed_stored_and_loaded_are_one_function(tmp_path, bits, group, tied, name) -> None:
    model = prepared(bits, group, name, tie_word_embeddings=tied)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten()).backward()
        optimizer.step()
    with torch.no_grad():
        expected = model.eval()(IDS)
        packed = bb.convert(model)
        assert torch.equal(packed(IDS), expected)
        bb.save(packed, tmp_path / "model")
        for loaded in (bb.load(tmp_path / "model"), bb.load(tmp_path / "model", into=build(model.config))):
            assert torch.equal(loaded(IDS), expected)
            heads = [m for m in loaded.modules() if isinstance(m, CompactLinear)]
            tables = [m for m in loaded.modules() if isinstance(m, CompactEmbedding)]
            assert len(heads) == 1
            assert (heads[0].weight is tables[0].weight) == tied
            assert (heads[0].multipliers is tables[0].multipliers) == (tied or bits == 8)
        for isa in [*native.instruction_sets(), "reference"] if native.available() else []:
            if isa != "reference":
                with native.use(isa):
                    assert torch.equal(loaded(IDS), expected)
        cache = loaded.new_cache(2, 20)
        steps = torch.cat([loaded(IDS[:, i : i + 1], cache=cache) for i in range(20)], dim=1)
        assert (
            float((steps - expected).norm() / expected.norm()) < 0.05
        )  # a code near a threshold may be another


@pytest.mark.parametrize("words", [4, 8, None])
@pytest.mark.parametrize("head", [4, 8, 32])
def test_embedding_and_head_may_have_bits_of_their_own(tmp_path, words, head) -> None:
    config = preset("tiny", vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
                    num_attention_heads=2, max_position_embeddings=64)  # fmt: skip
    group = 32 if 4 in (words, head) else None
    recipe = bb.Recipe.bbq(2, embedding_bits=words, head_bits=head, embedding_group=group)
    model: Any = bb.prepare(build(config, seed=0), recipe)
    F.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten()).backward()
    found = [getattr(m, "coding", None) for m in (model.model.embed_tokens, model.lm_head)]
    assert [c and c.bits for c in found] == [words, None if head == 32 else head]
    assert {c.group for c in found if c and c.bits == 4} <= {32}
    with torch.no_grad():
        expected = model.eval()(IDS)
        packed = bb.convert(model)
        assert torch.equal(packed(IDS), expected)
        bb.save(packed, tmp_path / "model")
        loaded: Any = bb.load(tmp_path / "model")
        assert torch.equal(loaded(IDS), expected)
        assert steps_for(loaded, loaded.new_cache(2, 20)) is not None
    kinds = (type(loaded.model.embed_tokens), type(loaded.lm_head))
    assert kinds == (
        CompactEmbedding if words else nn.Embedding,
        nn.Linear if head == 32 else CompactLinear,
    )


@pytest.mark.parametrize(("bits", "group"), CODINGS)
def test_gradients_are_those_of_the_formula_in_float64(bits, group) -> None:
    torch.manual_seed(0)
    coding, most = TableCoding.of(bits, group, 64), most_of_input(bits)
    table, head = nn.Embedding(50, 64), nn.Linear(64, 50)
    x, ids = torch.randn(5, 64, requires_grad=True), torch.tensor([3, 7, 3, 49])
    through, back = torch.randn(4, 64), torch.randn(5, 50)
    embedding, product = QuantizedEmbedding(table, coding), QuantizedHead(head, coding)
    (embedding(ids) * through).sum().backward()
    expected = torch.zeros(50, 64).index_add_(0, ids, through)
    assert torch.equal(grad_of(table.weight), expected)
    for mode in (True, False):  # the gradient of evaluation is that of training
        for each in (head.weight, head.bias, x):
            each.grad = None
        (product.train(mode)(x) * back).sum().backward()
        # Straight through, whole: of F.linear(x_hat, w_hat, b), where x_hat and w_hat are the rounded values.
        weight, inputs, bias = (
            each.detach().double().requires_grad_() for each in (head.weight, x, head.bias)
        )
        unit = inputs.detach().abs().amax(-1, keepdim=True) / most
        x_hat = inputs + ((inputs / unit).round() * unit - inputs).detach()
        w_hat = weight + (coding.fake(head.weight).double() - weight).detach()
        (F.linear(x_hat, w_hat, bias) * back.double()).sum().backward()
        for mine, formula in ((head.weight, weight), (x, inputs), (head.bias, bias)):
            assert torch.allclose(grad_of(mine).double(), grad_of(formula), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_training_follows_the_function_of_evaluation(bits) -> None:
    model = Small()
    made = bb.prepare(model, bb.Recipe(embedding_bits=bits))
    ids = torch.arange(50).view(5, 10)
    with torch.no_grad():
        training, evaluation = made.train()(ids), made.eval()(ids)
    assert float((training - evaluation).norm() / evaluation.norm()) < 1e-5
    assert isinstance(model.words, QuantizedEmbedding)
    assert isinstance(model.words, nn.Embedding)
    assert isinstance(model.to_logits, QuantizedHead)
    assert type(model.mixers[0]) is nn.Linear
    with torch.no_grad():  # a write that no version counts
        model.to_logits.weight.data[:] = model.to_logits.weight.data.flip(0)
        model.to_logits.bias.zero_()
        assert not torch.equal(made(ids), evaluation)
    made.train()(ids).sum().backward()
    assert not grad_of(model.words.weight)[3].any()  # the owner's padding_idx
    assert grad_of(model.words.weight)[4].any()


@pytest.mark.parametrize("tied", [False, True])
def test_states_are_loaded_as_they_were_saved_or_refused(tied) -> None:
    plain = Small(tied)
    made = bb.prepare(Small(tied), bb.Recipe.bbq(2, embedding_bits=4))
    made.load_state_dict(plain.state_dict())
    assert torch.equal(made.words.weight, plain.words.weight)
    assert (made.to_logits.weight is made.words.weight) == tied
    state = made.state_dict()
    again = bb.prepare(Small(tied), bb.Recipe.bbq(2, embedding_bits=4))
    again.load_state_dict(state)
    for name, value in again.state_dict().items():  # NaN: scales that no batch has set
        assert torch.equal(value.nan_to_num(), state[name].nan_to_num())
    for recipe in (
        bb.Recipe.bbq(2, embedding_bits=8),
        bb.Recipe.bbq(2, embedding_bits=4, embedding_group=32),
    ):
        other = bb.prepare(Small(tied), recipe)
        before = other.words.weight.clone()
        with pytest.raises(BellboxError, match="words: the state is of another recipe"):
            other.load_state_dict(state)
        assert torch.equal(other.words.weight, before)
    back = unprepare(made)
    assert type(back.words) is nn.Embedding
    assert type(back.to_logits) is nn.Linear
    assert set(back.state_dict()) == set(plain.state_dict())


def test_copies_and_pickles_compute_the_same() -> None:
    made = bb.prepare(Small(), bb.Recipe(embedding_bits=4)).eval()
    ids = torch.arange(10)
    with torch.no_grad():
        expected = made(ids)
        for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            assert torch.equal(other(ids), expected)
            assert other.to_logits.coding == TableCoding(4, 64)


def test_a_head_with_a_rule_of_its_own_is_a_layer() -> None:
    spec = bb.QuantizerSpec("bbq", 4)
    rule = bb.Rule("to_logits", spec, spec)
    made = bb.prepare(Small(), bb.Recipe.bbq(2, rules=(rule,), embedding_bits=4))
    assert isinstance(made.words, QuantizedEmbedding)
    assert not isinstance(made.to_logits, QuantizedHead)
    assert type(made.to_logits).__name__ == "QuantizedLinear"


class ReadsTable(nn.Module):
    """The embedding is the output layer too, without a layer for it."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, 64), nn.Embedding(16, 64)
        self.mixers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        for mixer in self.mixers:
            x = mixer(x)
        return F.linear(x, self.words.weight)


def test_a_table_whose_weight_is_read_past_its_forward_is_left() -> None:
    with pytest.warns(UserWarning, match="left in full precision: words"):
        made = bb.prepare(ReadsTable(), bb.Recipe.bbq(2, embedding_bits=4))
    assert type(made.words) is nn.Embedding
    assert isinstance(made.places, QuantizedEmbedding)
    ids = torch.arange(32).view(2, 16)
    with torch.no_grad():
        expected = made.eval()(ids)
        assert torch.equal(bb.convert(made)(ids), expected)


def test_what_cannot_be_rounded_is_refused_before_anything_changes() -> None:
    cases: tuple[tuple[nn.Module, dict[str, Any], str], ...] = (
        (Small().bfloat16(), {"embedding_bits": 4}, "words: is torch.bfloat16"),
        (Small(), {"embedding_group": 64}, "there are no embedding_bits"),
        (Small(), {"embedding_bits": 5}, "words: embeddings can have 4 or 8 bits, not 5"),
        (
            nn.Sequential(nn.Embedding(9, 100), nn.Linear(100, 4)),
            {"embedding_bits": 4},
            "0: groups of 32 do not",
        ),
        (
            nn.Sequential(nn.Embedding(9, 64, max_norm=1.0)),
            {"embedding_bits": 4},
            "max_norm 1 cannot be rounded",
        ),
        (nn.Sequential(nn.Linear(64, 64)), {"embedding_bits": 4}, "has no embedding that could be rounded"),
        (nn.Sequential(nn.Linear(64, 64)), {"head_bits": 4}, "head_bits is 4, but the model has no embedding"),
        (Small(tied=True), {"embedding_bits": 8, "head_bits": 4}, "to_logits: is tied to words, so head_bits 4"),
        (Small(tied=True), {"head_bits": 8}, "to_logits: is tied to words, so head_bits 8"),
        (Small(), {"head_bits": 8, "embedding_group": 64}, "leave out the group 64"),
    )  # fmt: skip
    for model, choices, message in cases:
        kinds = [type(module) for module in model.modules()]
        with pytest.raises(BellboxError, match=message):
            bb.prepare(model, bb.Recipe(**choices))
        assert [type(module) for module in model.modules()] == kinds
    made = prepared(4)
    with pytest.raises(BellboxError, match="already prepared"):
        bb.prepare(made, bb.Recipe.bbq(2))
    with pytest.raises(BellboxError, match="were trained rounded"):
        bb.convert(made.eval(), embeddings="int8")
    with torch.no_grad():
        made(IDS)
        dict(made.named_parameters())["lm_head.weight"][5, 5] = math.nan
        assert bool(made.train()(IDS)[..., 5].isnan().all())
    with pytest.raises(BellboxError, match="lm_head: a table with NaN or infinity"):
        bb.convert(made)


@pytest.mark.parametrize("bits", [4, 8])
def test_both_forms_are_exported_with_the_same_bits(bits) -> None:
    model = prepared(bits)
    with torch.no_grad():
        expected = model.eval()(IDS)
        for each in (model, bb.convert(model)):
            program = torch.export.export(each, (IDS,))
            assert torch.equal(program.module()(IDS), expected)
            targets = {str(node.target) for node in program.graph.nodes}
            assert f"bellbox.int{bits}_linear.default" in targets


def test_models_of_transformers_are_found_by_structure(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    size = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 64, "intermediate_size": 128}
    bert = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=128, **size))
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=128, tie_word_embeddings=True, **size)
    )
    for model, tables in ((bert.eval(), 4), (llama.eval(), 2)):
        made = bb.prepare(model, bb.Recipe.bbq(2, embedding_bits=4))
        with torch.no_grad():
            expected = made(input_ids=IDS).logits
            packed = bb.convert(made)
            assert torch.equal(packed(input_ids=IDS).logits, expected)
        assert sum(isinstance(m, CompactEmbedding | CompactLinear) for m in packed.modules()) == tables
        with pytest.raises(TypeError, match="not an instance"):  # it would lose rows
            packed.resize_token_embeddings(100)
        made.save_pretrained(tmp_path / "plain")
        plain = type(made).from_pretrained(tmp_path / "plain")
        assert torch.equal(plain.get_input_embeddings().weight, made.get_input_embeddings().weight)
        with torch.no_grad():
            bb.grow_embeddings(packed, 140)
            assert torch.equal(packed(input_ids=IDS).logits[..., :128], expected)
            assert packed.config.vocab_size == 140


def test_tables_of_a_few_numbers_an_entry_are_no_tables_of_4_bits() -> None:
    """A bias for each distance and head, as T5 has it."""
    for bits, kind in ((4, nn.Embedding), (8, QuantizedEmbedding)):
        model = Small()
        model.bias = nn.Embedding(32, 2)
        assert type(bb.prepare(model, bb.Recipe(embedding_bits=bits)).bias) is kind
        assert type(model.words) is QuantizedEmbedding


@pytest.mark.skipif(not native.available(), reason="the compiled kernels were not built")
@pytest.mark.parametrize(("bits", "group"), CODINGS)
@pytest.mark.parametrize("name", ["tiny", "gpt-tiny"])
def test_the_short_decode_step_gives_the_same_bits(bits, group, name) -> None:
    model = prepared(bits, group, name)
    with torch.no_grad():
        model.eval()(IDS)
        packed = bb.convert(model)
        caches = [packed.new_cache(2, 20) for _ in range(2)]
        for cache in caches:
            packed(IDS[:, :9], cache=cache)
        steps = steps_for(packed, caches[0])
        assert steps is not None
        for i in range(9, 20):
            token = IDS[:, i : i + 1]
            assert torch.equal(steps.step(token), packed(token, cache=caches[1]))


@pytest.mark.parametrize("bits", [pytest.param(4, marks=pytest.mark.slow), 8])
def test_all_forms_compile_without_graph_breaks_to_the_same_bits(bits) -> None:
    model = prepared(bits)
    expected = model.train()(IDS)
    expected.sum().backward()
    gradient = grad_of(model.lm_head.weight).clone()
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(IDS)
    compiled.sum().backward()
    assert torch.equal(compiled, expected)
    assert torch.equal(grad_of(model.lm_head.weight), gradient)
    with torch.no_grad():
        evaluated = model.eval()(IDS)
        for each in (model, bb.convert(model)):
            assert torch.equal(torch.compile(each, fullgraph=True, backend="aot_eager")(IDS), evaluated)


@pytest.mark.parametrize(("bits", "group"), CODINGS)
def test_no_tokens_are_trained_evaluated_and_packed_alike(bits, group) -> None:
    model = bb.prepare(Small(), bb.Recipe.bbq(2, embedding_bits=bits, embedding_group=group))
    model(IDS)
    nothing = torch.empty(2, 0, dtype=torch.long)
    model(nothing).sum().backward()
    assert not grad_of(model.words.weight).any()
    assert model.eval()(nothing).shape == bb.convert(model)(nothing).shape == (2, 0, 50)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_evaluation_gives_fp32_with_gradients_and_without(dtype: torch.dtype) -> None:
    model = bb.prepare(Small(), bb.Recipe.bbq(2, embedding_bits=4)).eval().to(dtype)
    with torch.no_grad():
        expected = model(IDS)
    found = model(IDS)
    assert expected.dtype == found.dtype == torch.float32
    assert torch.equal(found.detach(), expected)
    found.sum().backward()
    assert grad_of(model.words.weight).dtype == dtype


def test_a_table_that_gives_way_to_one_in_full_precision_is_named():
    """As transformers makes one where it resizes an untied head."""
    model = bb.prepare(Small(), bb.Recipe.bbq(2, embedding_bits=8))
    model(IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bb.convert(copy.deepcopy(model).eval())
        model.another = nn.Linear(64, 60)
    with pytest.warns(UserWarning, match="to_logits: a table of 8 bits gives way to one in full precision"):
        model.to_logits = nn.Linear(64, 60)
