from __future__ import annotations

import copy
import types
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import bellbox as bb
from bellbox.convert import prepare, require_causal, unprepare
from bellbox.errors import BellboxError
from bellbox.nn import PackedLinear, QuantizedLinear, quantized_layers
from bellbox.recipe import QuantizerSpec, Recipe, Rule


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 16)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(16),
                    "fc": nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)),
                }
            )
            for _ in range(2)
        )
        self.lm_head = nn.Linear(16, 11, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for block in self.blocks:
            x = x + block["fc"](block["norm"](x))  # type: ignore[index]
        return self.lm_head(x)


IDS = torch.arange(10).view(2, 5)


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in quantized_layers(model)]


def trained(model: nn.Module, *inputs: Tensor, **options) -> nn.Module:
    model = bb.prepare(model, Recipe.bbq(2, **options))
    model(*inputs)
    return model


def test_any_module_is_prepared_in_place():
    model = Nested()
    weight = model.blocks[0]["fc"][0].weight
    assert bb.prepare(model, Recipe.bbq(2)) is model
    assert names(model) == [f"blocks.{i}.fc.{j}" for i in (0, 1) for j in (0, 2)]
    assert model.blocks[0]["fc"][0].stored_weight is weight
    assert type(model.lm_head) is nn.Linear
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(IDS).flatten(0, 1), (IDS.flatten() + 1) % 11)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    packed = bb.convert(model)
    with torch.no_grad():
        assert torch.equal(packed(IDS), model.eval()(IDS))


def test_a_single_layer_and_a_sequential():
    layer = bb.prepare(nn.Linear(8, 8), Recipe.bbq(2))
    assert isinstance(layer, QuantizedLinear)
    x = torch.randn(3, 8)
    layer(x)
    assert isinstance(bb.convert(layer), PackedLinear)
    model = bb.prepare(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), Recipe.bbq(2))
    assert names(model) == ["0", "1"]
    assert torch.equal(
        bb.convert(trained(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), x))(x) < 0, torch.zeros(3, 8) > 0
    )


def test_a_layer_used_under_two_names_is_replaced_in_both_places():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    x = torch.randn(3, 8)
    trained(model, x)
    assert isinstance(model[0], QuantizedLinear)
    assert model[0] is model[2]
    packed = bb.convert(model)
    assert isinstance(packed[0], PackedLinear)
    assert packed[0] is packed[2]
    with torch.no_grad():
        assert torch.equal(packed(x), model.eval()(x))


def test_subclasses_are_quantized_unless_they_compute_otherwise():
    class Special(nn.Linear):
        pass

    class Other(nn.Linear):
        def forward(self, input):
            return input @ self.weight.T

    class Standardized(nn.Conv2d):
        def _conv_forward(self, input, weight, bias):
            return super()._conv_forward(input, weight - weight.mean(), bias)

    with pytest.warns(UserWarning, match=r"1 79% \(Other, a subclass of Linear with a forward of its own\)"):
        model = bb.prepare(nn.Sequential(Special(8, 8), Other(8, 64)), Recipe.bbq(2))
    assert names(model) == ["0"]
    with pytest.raises(BellboxError, match=r"not quantized are: 0 \(Standardized, a subclass of Conv2d"):
        bb.prepare(nn.Sequential(Standardized(8, 8, 1)), Recipe.bbq(2))


def test_rules_choose_layers_and_numbers():
    model = bb.prepare(
        Nested(),
        Recipe.bbq(
            2,
            keep=("*.1.fc.*",),
            rules=(
                Rule("blocks.0.fc.2", QuantizerSpec(levels=3, granularity="row"), QuantizerSpec(levels=16)),
            ),
        ),
    )
    layers = dict(quantized_layers(model))
    assert set(layers) == {"blocks.0.fc.0", "blocks.0.fc.2"}
    assert layers["blocks.0.fc.2"].weight_quantizer.levels.n == 3
    assert layers["blocks.0.fc.2"].activation_quantizer.levels.n == 16
    assert layers["blocks.0.fc.0"].weight_quantizer.levels.n == 4


def test_siblings_that_differ_do_not_share():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(16, 4)

        input_groups = (("q_proj", "k_proj", "v_proj"),)

    spec = QuantizerSpec(granularity="row")
    everything = Rule("*", spec, QuantizerSpec())
    model = bb.prepare(Attention(), Recipe((everything,)))
    assert model.q_proj.activation_quantizer is model.k_proj.activation_quantizer
    assert model.q_proj.activation_quantizer is not model.v_proj.activation_quantizer
    assert model.q_proj.activation_quantizer.shared.readers == 2
    assert model.v_proj.activation_quantizer.shared.readers == 1
    model = bb.prepare(Attention(), Recipe((Rule("k_proj", spec, QuantizerSpec(levels=16)), everything)))
    assert model.q_proj.activation_quantizer is not model.k_proj.activation_quantizer
    model = bb.prepare(Attention(), Recipe((everything,), share_inputs=False))
    assert model.q_proj.activation_quantizer is not model.k_proj.activation_quantizer


def test_preparing_twice_or_for_nothing_is_refused():
    model = bb.prepare(Nested(), Recipe.bbq(2))
    with pytest.raises(BellboxError, match="already"):
        bb.prepare(model, Recipe.bbq(2))
    model(IDS)
    with pytest.raises(BellboxError, match="already"):
        bb.prepare(bb.convert(model), Recipe.bbq(2))
    with pytest.raises(BellboxError, match="matches no linear layer"):
        bb.prepare(Nested(), Recipe((Rule("nothing.*", QuantizerSpec(granularity="row"), QuantizerSpec()),)))
    assert names(bb.prepare(Nested(), Recipe.none())) == []
    with pytest.raises(BellboxError, match="call prepare first"):
        bb.convert(Nested())


def test_a_rule_that_cannot_be_met_leaves_the_model_as_it_was():
    model = Nested()
    good = Rule("blocks.0.*", QuantizerSpec(granularity="row"), QuantizerSpec())
    with pytest.raises(BellboxError, match=r"blocks\.1\.fc\.0: .*rotated alike"):
        bb.prepare(model, Recipe((good, Rule("*", QuantizerSpec(block=1), QuantizerSpec()))))
    assert names(model) == []
    assert names(bb.prepare(model, Recipe((good,)))) == ["blocks.0.fc.0", "blocks.0.fc.2"]


def test_converting_leaves_the_trained_model_usable():
    model = trained(Nested(), IDS)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    packed = bb.convert(model)
    assert model.training
    assert not packed.training
    assert all(not p.requires_grad for p in packed.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {id(p) for p in model.parameters()}.isdisjoint({id(p) for p in packed.parameters()})
    with torch.no_grad():
        packed.lm_head.weight.zero_()
    model(IDS).sum().backward()
    assert model.lm_head.weight.abs().sum() > 0
    assert model.blocks[0]["fc"][0].weight.grad is not None
    assert names(model) == [f"blocks.{i}.fc.{j}" for i in (0, 1) for j in (0, 2)]


def test_what_cannot_be_packed_says_why_and_names_the_layer():
    with pytest.raises(BellboxError, match=r"converting is refused: layer blocks\.0\.fc\.0 "):
        bb.convert(trained(Nested(), IDS, granularity="tensor"))
    with pytest.raises(BellboxError, match="generating is refused: layer blocks"):
        require_causal(trained(Nested(), IDS, granularity="tensor"), "generating")
    with pytest.raises(BellboxError, match=r"blocks\.0\.fc\.0\.input.*run one batch"):
        bb.convert(bb.prepare(Nested(), Recipe.bbq(2)))
    inputs_only = bb.prepare(Nested(), Recipe((Rule("*.fc.*", None, QuantizerSpec()),)))
    inputs_only(IDS)
    with pytest.raises(BellboxError, match=r"blocks\.0\.fc\.0 cannot be packed: only its inputs"):
        bb.convert(inputs_only)
    wide = Rule("*.fc.*", QuantizerSpec(levels=256, granularity="row", zero_point=-0.5), QuantizerSpec())
    with pytest.warns(
        UserWarning, match=r"trained, but not packed: blocks\.0\.fc\.0: 256 levels.* do not fit int8"
    ):
        model = bb.prepare(Nested(), Recipe((wide,)))
    model(IDS)
    with pytest.raises(BellboxError, match="do not fit int8"):
        bb.convert(model)


def test_summary_counts_every_parameter_once():
    model = Nested()
    total = sum(p.numel() for p in model.parameters())
    quantized = 4 * 16 * 32
    trained(model, IDS)
    lines = bb.summary(model).splitlines()
    assert lines[0].split() == [
        "layer",
        "out",
        "x",
        "in",
        "weight",
        "bits",
        "input",
        "bits",
        "granularity",
        "block",
        "input",
        "count",
    ]
    assert (
        lines[2].split() == ["blocks.*.fc.0", "32", "x", "16", "2", "2", "token", "16", "own", "2"]
        or "blocks.*.fc.*" in lines[2]
    )
    scales = 2 * (32 + 16) + 4
    assert lines[-1] == f"parameters: {quantized:,} quantized, {total - quantized + scales:,} not"
    assert (
        bb.summary(bb.convert(model)).splitlines()[-1]
        == f"parameters: {quantized:,} quantized, {total - quantized:,} not"
    )
    assert "(the model)" in bb.summary(bb.prepare(nn.Linear(8, 4), Recipe.bbq(levels=3)))
    assert "1.585" in bb.summary(bb.prepare(nn.Linear(8, 4), Recipe.bbq(levels=3)))


def test_copies_and_checkpoints_carry_everything():
    model = trained(Nested(), IDS)
    clone = copy.deepcopy(model)
    other = bb.prepare(Nested(), Recipe.bbq(2))
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = model.eval()(IDS)
        assert torch.equal(clone.eval()(IDS), expected)
        assert torch.equal(other.eval()(IDS), expected)
        clone.blocks[0]["fc"][0].weight.neg_()
        assert torch.equal(model(IDS), expected)
        assert not torch.equal(clone(IDS), expected)
        assert torch.equal(bb.convert(other)(IDS), expected)


def test_multihead_attention_is_left_whole_and_the_rest_of_the_layer_is_quantized():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2)
    plain = copy.deepcopy(encoder)
    x = torch.randn(3, 5, 16)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    trained(encoder, x)
    assert names(encoder) == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    assert "left whole: MultiheadAttention" in bb.summary(encoder)
    packed = bb.convert(encoder)
    with torch.no_grad():
        for options in ({}, {"src_key_padding_mask": padding}):
            training = encoder.train()(x, **options)[~padding]
            evaluation = encoder.eval()(x, **options)[~padding]
            assert (evaluation - training).norm() < 0.3 * training.norm()  # a last bit may move a code
            assert (packed(x, **options)[~padding] - evaluation).norm() < 0.3 * training.norm()
            # Not the float function, which torch's fused path would silently give.
            assert (evaluation - plain.eval()(x, **options)[~padding]).abs().max() > 0.05
        for ours, theirs in zip(packed.layers, encoder.layers, strict=True):
            assert torch.equal(
                ours.linear1(x), theirs.linear1(x)
            )  # attention in floats varies in its last bit
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    with pytest.raises(BellboxError, match="matches no linear layer"):
        bb.prepare(attention, Recipe.bbq(2))


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def test_a_hugging_face_llama(transformers):
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    head = model.lm_head.weight
    ids = torch.randint(0, 64, (2, 7))
    bb.prepare(model, Recipe.bbq(2), example={"input_ids": ids})
    assert len(names(model)) == 14
    assert model.lm_head.weight is head
    assert type(model.lm_head) is nn.Linear
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.activation_quantizer is attention.v_proj.activation_quantizer
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters())
    packed = bb.convert(model)
    with torch.no_grad():
        assert torch.equal(packed(ids).logits, model.eval()(ids).logits)
    made = packed.generate(ids[:1], max_new_tokens=3, do_sample=False)
    assert torch.equal(made, model.generate(ids[:1], max_new_tokens=3, do_sample=False))


def test_a_gpt2_of_transformers_generates_packed_as_prepared(transformers):
    config = transformers.GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        attn_pdrop=0,
        resid_pdrop=0,
    )
    torch.manual_seed(0)
    model = bb.prepare(transformers.GPT2LMHeadModel(config), Recipe.bbq(2))
    assert len(names(model)) == 8
    ids = torch.arange(1, 9)[None]
    model(ids, labels=ids).loss.backward()
    packed = bb.convert(model.eval())
    made = packed.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(made, model.generate(ids, max_new_tokens=4, do_sample=False))


def test_a_hugging_face_bert_with_a_tied_head(transformers, tmp_path):
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(config)
    fresh = copy.deepcopy(model)
    bb.prepare(model, Recipe.bbq(2, granularity="ema"), example=torch.randint(0, 64, (2, 7)))
    assert type(model.cls.predictions.decoder) is nn.Linear
    attention = model.bert.encoder.layer[0].attention.self
    assert attention.query.activation_quantizer is attention.key.activation_quantizer
    ids = torch.randint(0, 64, (2, 7))
    model(ids, labels=ids).loss.backward()
    packed = bb.convert(model)
    with torch.no_grad():
        expected = model.eval()(ids).logits
        assert torch.equal(packed(ids).logits, expected)
        bb.save(packed, tmp_path / "bert")
        loaded = bb.load(tmp_path / "bert", into=fresh)
        assert loaded is fresh
        assert torch.equal(loaded(ids).logits, expected)
    assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight


@pytest.mark.parametrize("rotated", [False, True])
def test_unprepare_gives_the_plain_layers_back_with_the_same_parameters(rotated: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2, bias=False))
    x, weights = torch.randn(3, 8), list(model.parameters())
    before, structure = model(x), str(model)
    prepare(model, Recipe.bbq(bits=2, weights_rotated=rotated))
    assert not torch.allclose(model(x), before, atol=1e-3)
    assert unprepare(model) is model
    assert str(model) == structure
    assert all(left is right for left, right in zip(model.parameters(), weights, strict=True))
    assert torch.allclose(model(x), before, rtol=0, atol=1e-6 if rotated else 0)
    assert str(unprepare(model)) == structure  # nothing to do
    alone = unprepare(prepare(nn.Linear(8, 4).eval(), Recipe.bbq(bits=2)))
    assert type(alone) is nn.Linear
    assert not alone.training


@pytest.mark.parametrize("options", [{}, {"signs": True}])
def test_rotated_weights_are_the_same_function_and_come_back(options: dict[str, bool]) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 16), torch.randn(32, 64)
    weight = linear.weight.detach().clone()
    plain = prepare(copy.deepcopy(linear), Recipe.of("bbq", bits=4, options=options)).eval()
    rotated = prepare(linear, Recipe.bbq(bits=4, options=options, weights_rotated=True)).eval()
    assert rotated.weights_rotated
    assert rotated.weight_quantizer is not None
    assert rotated.weight_quantizer.block == 1
    codes, expected = rotated.weight_codes(), plain.weight_codes()
    assert (codes != expected).float().mean() < 1e-3  # the rotation is rounded once more
    assert torch.allclose(rotated(x), plain(x), atol=0.05)
    packed = bb.convert(rotated)
    assert torch.equal(packed(x), rotated(x))
    restored = unprepare(rotated)
    assert type(restored) is nn.Linear
    assert torch.allclose(restored.weight, weight, atol=1e-6)


def test_rotated_weights_need_a_quantized_input_and_an_unrotated_quantizer() -> None:
    weights, inputs = QuantizerSpec("bbq", 4, block=1), QuantizerSpec("bbq", 4)
    with pytest.raises(BellboxError, match="needs both weight and input quantized"):
        prepare(nn.Linear(8, 4), Recipe((Rule("*", weights, None, weights_rotated=True),)))
    with pytest.raises(BellboxError, match="must have block=1"):
        prepare(nn.Linear(8, 4), Recipe((Rule("*", inputs, inputs, weights_rotated=True),)))


def test_what_is_no_recipe_is_refused_in_one_line() -> None:
    with pytest.raises(BellboxError, match=r"'bbq': give a Recipe, such as bb\.Recipe\.bbq"):
        prepare(nn.Linear(8, 4), "bbq")  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"signs": True}])
def test_a_tied_weight_is_not_rotated_under_the_other_layer(options: dict[str, bool]) -> None:
    model = nn.ModuleDict({"one": nn.Linear(16, 16), "two": nn.Linear(16, 16)})
    model["two"].weight = model["one"].weight
    same = copy.deepcopy(model)
    before, x = model["one"].weight.detach().clone(), torch.randn(5, 16)
    bb.prepare(model, Recipe.bbq(2, options=options))
    assert torch.equal(model["one"].weight, before)
    assert model["two"].weight is model["one"].weight
    bb.prepare(same, Recipe.of("bbq", 2, options=options))
    assert torch.equal(model["two"](x), same["two"](x))


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        (Recipe.bbq_paper(2), "granularity='tensor' looks at future tokens"),
        (Recipe.of("nf", 4), "not evenly spaced"),
        (Recipe((Rule("*", None, QuantizerSpec()),)), "only its inputs are quantized"),
        (Recipe.of("pact", 8), "but 255 about zero or 128 above it do"),
    ],
)
def test_what_will_never_be_packed_is_said_before_the_training(recipe: Recipe, why: str) -> None:
    with pytest.warns(UserWarning, match=f"trained, but not packed: 0: .*{why}"):
        bb.prepare(nn.Sequential(nn.Linear(64, 8)), recipe)


def made_by_a_parametrization(layer: nn.Linear) -> None:
    nn.utils.parametrizations.weight_norm(layer)


def made_elsewhere(layer: nn.Linear) -> None:
    weight = layer.weight.detach()
    del layer.weight
    layer.weight = weight  # type: ignore[assignment]


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: prune.l1_unstructured(layer, "bias", 0.5),
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        made_by_a_parametrization,
        made_elsewhere,
    ],
)
@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_a_layer_whose_weight_something_else_makes_is_left_and_named(change) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 8))
    change(model[0])
    before = {name: value.clone() for name, value in model.named_parameters() if name.startswith("0.")}
    x = torch.randn(4, 16)
    expected = model[0](x)
    with pytest.warns(
        UserWarning, match=r"a hook, a parametrization or other code makes the weight.*prune\.remove"
    ):
        bb.prepare(model, Recipe.bbq(2))
    assert names(model) == ["2"]
    if change is not nn.utils.spectral_norm:  # which iterates in every forward
        assert torch.equal(model[0](x), expected)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    after = dict(model.named_parameters())
    assert set(before) <= set(after)
    assert all(
        not torch.equal(after[name], value) for name, value in before.items() if after[name].grad is not None
    )
    bb.prepare(
        nn.Sequential(prune.identity(nn.Linear(8, 8), "weight"), nn.Linear(8, 8)), Recipe.bbq(2, keep=("0",))
    )


def test_much_that_is_left_is_warned_of_and_little_is_logged(caplog) -> None:
    class Mixed(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.conv, self.up = nn.Conv3d(32, width, (1, 1, 3)), nn.ConvTranspose2d(2, 2, 2)
            self.rnn = nn.LSTM(2, 2)
            self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(32, 32)}) for _ in range(2))
            self.experts = nn.Parameter(torch.zeros(2, 2, 2))

    with pytest.warns(UserWarning, match="conv .*Conv3d") as heard:
        model = bb.prepare(Mixed(32), Recipe.bbq(2))
    assert len(heard) == 1
    line = str(heard[0].message)
    assert "\n" not in line
    for kind in (
        "transposed convolution ConvTranspose2d",
        "recurrent layer LSTM",
        "experts in one tensor (Mixed)",
    ):
        assert kind in line
        assert kind in bb.summary(model)
    with warnings.catch_warnings(), caplog.at_level("INFO", "bellbox"):
        warnings.simplefilter("error")
        bb.prepare(Mixed(4), Recipe.bbq(2))
        bb.prepare(Mixed(32), Recipe.bbq(2, keep=("conv",)))
    assert [record.getMessage()[:12] for record in caplog.records] == ["prepared: 80", "prepared: 39"]


def test_a_summary_counts_a_shared_weight_once_and_says_what_is_left() -> None:
    one, two = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
    two.weight = one.weight
    shared = bb.prepare(nn.Sequential(one, nn.ReLU(), two), Recipe.bbq(2))
    assert "parameters: 4,096 quantized" in bb.summary(shared)
    model = bb.prepare(Nested(), Recipe.bbq(2, keep=("*.0.fc.0",)))
    lines = bb.summary(model).splitlines()
    assert "left: blocks.0.fc.0, 512 weights (the recipe leaves it)" in lines
    assert [line for line in lines if line.startswith("left: lm_head, ") and "gives the outputs" in line]


def test_a_forward_that_a_trainer_put_on_the_model_does_not_run_the_trained_one_from_the_packed():
    layers = [nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)]
    model = bb.prepare(nn.Sequential(*layers), bb.Recipe.bbq(2, keep_ends=False))
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    expected = model.train()(x).detach(), model.eval()(x).detach()
    assert not torch.equal(*expected)
    first, calls = model.forward, []

    def fused(self, *args):
        calls.append(self)
        return first(*args)

    model.forward = types.MethodType(fused, model)
    with pytest.warns(UserWarning, match="put on the model itself calls the trained model"):
        packed = bb.convert(model.train())
    assert torch.equal(packed(x), expected[1])
    assert calls == []
    assert torch.equal(model(x), expected[0])
    model.forward = types.MethodType(lambda self, y: 2 * type(self).forward(self, y), model)  # leads nowhere
    assert torch.equal(bb.convert(model)(x), 2 * expected[1])
