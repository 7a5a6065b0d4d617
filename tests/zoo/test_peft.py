"""Adapters of peft: around a prepared model, around a packed one, and merged into weights that are stored rotated."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from zoo_models import DECODER
from zoo_packages import package

import bellbox as bb
from bellbox.nn import PackedConv2d, PackedLinear, quantized_layers

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.arange(2, 34).reshape(2, 16)
TARGETS = ["q_proj", "o_proj", "down_proj"]
RECIPES = {
    "bbq": bb.Recipe.bbq(2),
    "bbq with signs": bb.Recipe.bbq(2, options={"signs": True}),
    "quest": bb.Recipe.of("quest", 4),
    "lsq": bb.Recipe.of("lsq", 4),
    "weights only": bb.Recipe.of("nf", 4, weight_only="float"),
    "8-bit inputs": bb.Recipe.bbq(2, weight_only="int8"),
}


@pytest.fixture
def peft() -> Any:
    found = package("peft") if package("transformers") is not None else None
    if found is None:
        pytest.skip("peft is not installed")
    return found


def llama() -> nn.Module:
    transformers = package("transformers")
    assert transformers is not None
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER)).eval()


def prepared(recipe: bb.Recipe) -> nn.Module:
    model = bb.prepare(llama(), recipe)
    with torch.no_grad():
        model.train()(IDS)
    return model.eval()


def with_adapters(peft: Any, model: nn.Module, **choices: Any) -> Any:
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "target_modules": TARGETS, **choices}))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def train(model: nn.Module, steps: int = 5) -> list[float]:
    """The losses; every adapter has a gradient from the second step on, when its other half is no longer zero."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam(parameters.values(), lr=1e-2)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model.train()(input_ids=IDS, labels=IDS).loss
        loss.backward()
        without = [name for name, p in parameters.items() if p.grad is None or not p.grad.any()]
        assert without == [] or step == 0
        optimizer.step()
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("packed", [False, True])
def test_adapters_train_around_a_frozen_low_bit_model(peft: Any, name: str, packed: bool) -> None:
    base = prepared(RECIPES[name])
    base = bb.convert(base) if packed else base
    before = logits(base)
    model = with_adapters(peft, base)
    assert torch.equal(logits(model), before)  # they begin at zero
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    losses = train(model)
    assert losses[-1] < losses[0]
    with model.disable_adapter():
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", RECIPES)
def test_adapters_around_a_packed_model_are_saved_and_read(peft: Any, name: str, tmp_path: Path) -> None:
    packed = bb.convert(prepared(RECIPES[name]))
    bb.save(packed, tmp_path / "packed")
    model = with_adapters(peft, packed)
    train(model, 2)
    model.save_pretrained(tmp_path / "adapters")
    again = bb.load(tmp_path / "packed", into=llama())
    again = peft.PeftModel.from_pretrained(again, tmp_path / "adapters")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "weights only"])
def test_a_merged_adapter_is_added_to_the_plain_weight(peft: Any, name: str) -> None:
    model = with_adapters(peft, prepared(RECIPES[name]), init_lora_weights=False)
    layer = model.base_model.model.model.layers[0].self_attn.o_proj
    sum_of = layer.base_layer.weight.detach().clone() + layer.get_delta_weight("default").detach()
    merged = model.merge_and_unload()
    weight = merged.model.layers[0].self_attn.o_proj.weight.detach()
    torch.testing.assert_close(weight, sum_of, rtol=0, atol=1e-6)
    assert torch.equal(logits(bb.convert(merged)), logits(merged))


@pytest.mark.parametrize("rotated", [True, False])
def test_merging_changes_the_function_by_rounding_alone(peft: Any, rotated: bool) -> None:
    recipe = bb.Recipe.of("quest", bits=8, weights_rotated=rotated)
    model = bb.prepare(with_adapters(peft, llama(), init_lora_weights=False), recipe)
    before = logits(model)
    merged = model.merge_and_unload().train()
    assert float((logits(merged) - before).norm() / before.norm()) < 0.05


def test_merging_into_codes_is_refused_in_a_line_and_changes_nothing(peft: Any) -> None:
    model = with_adapters(peft, bb.convert(prepared(RECIPES["bbq"])), init_lora_weights=False)
    before = logits(model)
    with pytest.raises(bb.BellboxError, match="leave an adapter beside the layer"):
        model.merge_and_unload()
    assert torch.equal(logits(model), before)


def test_preparing_a_model_with_adapters_leaves_them_whole(peft: Any) -> None:
    model = bb.prepare(with_adapters(peft, llama(), init_lora_weights=False), RECIPES["bbq"])
    names = [name for name, _ in quantized_layers(model)]
    assert any(name.endswith("o_proj.base_layer") for name in names)
    assert not any("lora_" in name for name in names)
    assert "(an adapter)" in bb.summary(model)
    train(model, 2)


def test_a_model_with_adapters_is_packed_saved_and_read_as_it_is(peft: Any, tmp_path: Path) -> None:
    model = with_adapters(peft, prepared(RECIPES["bbq"]), init_lora_weights=False)
    packed = bb.convert(model)
    assert torch.equal(logits(packed), logits(model))
    bb.save(packed, tmp_path / "packed")
    loaded = bb.load(tmp_path / "packed", into=with_adapters(peft, llama()))
    assert torch.equal(logits(loaded), logits(packed))


def test_the_base_of_a_prepared_model_with_adapters_is_saved_as_a_plain_one(
    peft: Any, tmp_path: Path
) -> None:
    model = bb.prepare(with_adapters(peft, llama(), init_lora_weights=False), RECIPES["bbq"])
    weight = model.base_model.model.model.layers[0].self_attn.k_proj.weight.detach().clone()
    model.merge_and_unload().save_pretrained(tmp_path)
    plain = type(llama()).from_pretrained(tmp_path)
    torch.testing.assert_close(plain.model.layers[0].self_attn.k_proj.weight, weight)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["LoHaConfig", "LoKrConfig", "IA3Config", "OFTConfig", "BOFTConfig", "dora"])
def test_other_adapters_begin_as_the_packed_model(peft: Any, kind: str) -> None:
    base = bb.convert(prepared(RECIPES["bbq"]))
    before = logits(base)
    more = {
        "OFTConfig": {"oft_block_size": 8},
        "BOFTConfig": {"boft_block_size": 8},
        "IA3Config": {"feedforward_modules": ["down_proj"]},
    }
    if kind == "dora":
        config = peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True)
    else:
        config = getattr(peft, kind)(target_modules=TARGETS, **more.get(kind, {}))
    model = peft.get_peft_model(base, config)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-6)
    train(model, 1)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.wide, self.grouped = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.grouped(self.wide(self.stem(x)).relu()).relu().mean((2, 3)))


@pytest.mark.parametrize("packed", [False, True])
def test_adapters_of_convolutions(peft: Any, packed: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 12, 12)
    base = bb.prepare(Convolutions(), RECIPES["bbq"])
    base(x)
    base = bb.convert(base) if packed else base.eval()
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=["wide", "grouped"]))
    with torch.no_grad():
        assert torch.equal(model.eval()(x), base(x))
    model.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_class_of_a_low_bit_layer_makes_plain_layers_as_its_owners_does() -> None:
    model = bb.prepare(Convolutions(), RECIPES["bbq"])
    model(torch.randn(2, 3, 12, 12))
    for each in (model, bb.convert(model)):
        made = type(each.wide)(16, 4, (3, 3), (1, 1), padding=1, bias=False)
        assert type(made) is nn.Conv2d
        assert made.weight.shape == (4, 16, 3, 3)
    assert (
        type(bb.prepare(nn.Linear(8, 8), RECIPES["bbq"]).__class__(in_features=8, out_features=2))
        is nn.Linear
    )
    assert type(PackedLinear(8, 2, bias=False)) is nn.Linear  # type: ignore[call-arg]
    assert type(PackedConv2d(8, 2, 3)) is nn.Conv2d  # type: ignore[call-arg]


@pytest.mark.parametrize("name", ["o_proj", "mlp", "layers.0"])
def test_a_copy_of_a_packed_layer_to_be_trained_is_refused(peft: Any, name: str) -> None:
    base = bb.convert(prepared(RECIPES["bbq"]))
    with pytest.raises(
        bb.BellboxError, match=r"nothing to train in a packed layer.*target_modules"
    ) as refused:
        with_adapters(peft, base, target_modules=["q_proj"], modules_to_save=[name])
    assert "\n" not in str(refused.value)


def test_what_is_not_packed_may_be_a_module_to_save(peft: Any) -> None:
    base = bb.convert(prepared(RECIPES["bbq"]))
    model = with_adapters(peft, base, modules_to_save=["lm_head"])
    before = model.base_model.model.lm_head.weight.detach().clone()
    train(model, 1)
    assert not torch.equal(model.base_model.model.lm_head.weight, before)


def test_a_copy_of_a_prepared_layer_is_trained_and_packed(peft: Any) -> None:
    model = with_adapters(
        peft, prepared(RECIPES["bbq"]), target_modules=["q_proj"], modules_to_save=["o_proj"]
    )
    layer = model.base_model.model.model.layers[0].self_attn.o_proj
    before, old = layer.weight.detach().clone(), layer.original_module.weight.detach().clone()
    train(model, 2)
    assert not torch.equal(layer.weight, before)
    assert torch.equal(layer.original_module.weight, old)
    assert torch.equal(logits(bb.convert(model)), logits(model))


@pytest.mark.parametrize("packed", [False, True])
def test_adapters_of_a_gpt2(peft: Any, packed: bool) -> None:
    transformers = package("transformers")
    assert transformers is not None
    sizes = {"vocab_size": 96, "n_positions": 32, "n_embd": 32, "n_layer": 1, "n_head": 4}
    torch.manual_seed(0)
    base = bb.prepare(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)), RECIPES["bbq"])
    with torch.no_grad():
        base.train()(IDS)
    base = bb.convert(base) if packed else base.eval()
    before = logits(base)
    model = with_adapters(peft, base, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    assert torch.equal(logits(model), before)
    train(model, 2)
    if packed:
        return
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    merged_weight = layer.base_layer.weight.detach() + layer.get_delta_weight("default").detach()
    merged = model.merge_and_unload()
    weight = merged.transformer.h[0].attn.c_attn.weight.detach()
    assert weight.shape == (32, 96)
    torch.testing.assert_close(weight, merged_weight, rtol=0, atol=1e-6)
