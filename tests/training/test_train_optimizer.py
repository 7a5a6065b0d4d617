from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from bellbox.convert import prepare
from bellbox.errors import BellboxError
from bellbox.models import build, preset
from bellbox.nn import quantized_layers
from bellbox.optim import parameter_groups
from bellbox.recipe import Recipe
from bellbox.runs.config import CewtSection, OptimizerSection, hyperball_rate
from bellbox.training.optim.groups import ModelOptimizer


def small(name: str = "tiny", **changes: object) -> nn.Module:
    shape = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    return build(preset(name, vocab_size=50, **{**shape, **changes}), seed=0)


def names_in(model: nn.Module, group: dict[str, list[nn.Parameter]]) -> set[str]:
    ids = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in ids}


@pytest.mark.parametrize("name", ["tiny", "gpt-tiny"])
@pytest.mark.parametrize("recipe", [Recipe.none(), Recipe.bbq(bits=2)])
def test_only_the_matrices_of_linear_layers_decay(name: str, recipe: Recipe) -> None:
    model = prepare(small(name), recipe)
    decay, *others = parameter_groups(model, lr=1e-3, weight_decay=0.1)
    assert [decay["weight_decay"], *(group["weight_decay"] for group in others)] == [0.1] + [0.0] * len(
        others
    )
    decayed, kept = names_in(model, decay), set[str]().union(*(names_in(model, group) for group in others))
    assert decayed | kept == {name for name, _ in model.named_parameters()}
    assert not decayed & kept
    assert all(name.endswith((".weight", ".rotated_weight")) for name in decayed)
    words = ("norm", "ln_", "embed", "wte", "wpe", "gamma", "bias")
    assert not [name for name in decayed if any(word in name for word in words)]
    assert any("head" in name for name in decayed)
    if recipe.rules:
        assert any("gamma" in name for name in kept)


def test_the_head_may_be_left_out_of_decay() -> None:
    model = small()
    decay, *others = parameter_groups(model, lr=1e-3, weight_decay=0.1, decay_head=False)
    assert "lm_head.weight" in set[str]().union(*(names_in(model, group) for group in others))
    assert any("q_proj" in name for name in names_in(model, decay))


def test_a_head_that_is_tied_to_the_embedding_does_not_decay() -> None:
    model = small("tiny", tie_word_embeddings=True)
    decay, plain = parameter_groups(model, lr=1e-3, weight_decay=0.1)
    assert not [name for name in names_in(model, decay) if "embed" in name or "head" in name]
    assert any("embed" in name for name in names_in(model, plain))


def test_a_quantizer_may_have_parameters_that_decay_or_learn_at_another_rate() -> None:
    for decays in (False, True):
        model = prepare(small(), Recipe.of("lsq", options={"decay_scale": decays}))
        decay, _ = parameter_groups(model, lr=1e-3, weight_decay=0.1)
        scales = {name for name, _ in model.named_parameters() if name.endswith("quantizer.a")}
        assert len(scales) == 11  # seven weights, four inputs: siblings share
        assert scales & names_in(model, decay) == (scales if decays else set())
    model = prepare(small(), Recipe.bbq(gamma_lr=10.0))
    *_, fast = parameter_groups(model, lr=1e-3, weight_decay=0.1)
    assert fast["lr_scale"] == 10.0
    assert fast["weight_decay"] == 0.0
    assert names_in(model, fast) == {name for name, _ in model.named_parameters() if "gamma" in name}
    optimizer = ModelOptimizer(model, OptimizerSection())
    optimizer.step(1e-3)
    assert sorted(group["lr"] for group in optimizer.param_groups) == pytest.approx([1e-3, 1e-3, 1e-2])


@pytest.mark.parametrize(
    ("options", "decays"), [({}, True), ({"decay_alpha": True}, True), ({"decay_alpha": False}, False)]
)
def test_weight_decay_pulls_pacts_alpha_down_unless_it_is_told_not_to(
    options: dict[str, bool], decays: bool
) -> None:
    model = prepare(nn.Sequential(nn.Linear(16, 16)), Recipe.of("pact", 4, options=options))
    model(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)))
    (alpha,) = (p for name, p in model.named_parameters() if name.endswith("alpha"))
    before = alpha.item()
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=0.1, weight_decay=0.5), lr=0.1)
    alpha.grad = torch.zeros_like(alpha)
    optimizer.step()
    assert alpha.item() == pytest.approx(before * (0.95 if decays else 1.0))


def test_the_hyperball_moves_a_weight_by_the_rate_that_it_is_given() -> None:
    torch.manual_seed(0)
    model = prepare(nn.Sequential(nn.Linear(64, 64)), Recipe.bbq(bits=2))
    optimizer = ModelOptimizer(model, OptimizerSection(lr=1e-3, cewt=CewtSection(every=16, lr=0.02)))
    weight = model[0].rotated_weight  # pyright: ignore[reportIndexIssue]
    for rate in (0.02, 0.005, 0.0):
        before = weight.detach().clone()
        weight.grad = torch.randn(64, 64)
        optimizer.step(1e-3, rate, project=False)
        moved = float((weight.detach() - before).norm() / before.norm())
        assert moved == pytest.approx(rate, rel=0.02, abs=1e-6)


def test_any_optimizer_and_scheduler_takes_the_groups_with_their_rates() -> None:
    model = prepare(nn.Sequential(nn.Linear(64, 64)), Recipe.bbq(bits=2))
    optimizer = torch.optim.SGD(parameter_groups(model, lr=1e-3, weight_decay=0.1), lr=5.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    groups = {tuple(sorted(names_in(model, group))): group for group in optimizer.param_groups}
    gammas = next(group for names, group in groups.items() if all("gamma" in name for name in names))
    weight, bias = groups["0.rotated_weight",], groups["0.bias",]
    assert [each["weight_decay"] for each in (weight, bias, gammas)] == [0.1, 0.0, 0.0]
    assert [each["lr"] for each in (weight, bias, gammas)] == pytest.approx([1e-3, 1e-3, 1e-4])
    model(torch.randn(2, 64)).sum().backward()
    optimizer.step()
    scheduler.step()
    assert [each["lr"] for each in (weight, bias, gammas)] == pytest.approx([5e-4, 5e-4, 5e-5])
    (only,) = parameter_groups(nn.LayerNorm(4), lr=1.0)
    assert only["weight_decay"] == 0.0


def test_groups_come_without_the_training_loop() -> None:
    code = "import sys, bellbox.optim; print([m for m in sys.modules if m.startswith('bellbox.training')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_frozen_parameter_is_in_no_group() -> None:
    model = small()
    next(model.parameters()).requires_grad_(False)
    groups = parameter_groups(model, lr=1e-3, weight_decay=0.1)
    total = sum(len(group["params"]) for group in groups)
    assert total == len(list(model.parameters())) - 1


@pytest.mark.parametrize("section", [OptimizerSection(), OptimizerSection(kind="muon")])
def test_the_optimizers_state_goes_out_and_back_bit_for_bit(section: OptimizerSection) -> None:
    def step(model: nn.Module, optimizer: ModelOptimizer) -> None:
        optimizer.zero_grad()
        model(torch.arange(8).reshape(1, 8)).square().mean().backward()
        optimizer.step(1e-2)

    first, second = small(), small()
    optimizer = ModelOptimizer(first, section)
    for _ in range(3):
        step(first, optimizer)
    tensors = {name: value.clone() for name, value in optimizer.tensors(first.named_parameters()).items()}
    second.load_state_dict(first.state_dict())
    resumed = ModelOptimizer(second, section)
    resumed.restore(second.named_parameters(), tensors)
    step(first, optimizer)
    step(second, resumed)
    for (name, left), (_, right) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(left, right), name


def test_a_moment_of_another_shape_is_refused() -> None:
    model = nn.Linear(3, 2)
    optimizer = ModelOptimizer(model, OptimizerSection())
    with pytest.raises(ValueError, match=r"weight/exp_avg has shape \(3, 3\)"):
        optimizer.restore(model.named_parameters(), {"weight/exp_avg": torch.zeros(3, 3)})


@pytest.mark.parametrize("name", ["tiny", "gpt-tiny"])
def test_muon_gets_the_matrices_of_the_blocks_and_adamw_all_else(name: str) -> None:
    model = prepare(small(name), Recipe.bbq(bits=2))
    muon, adamw = ModelOptimizer(model, OptimizerSection(kind="muon")).parts
    assert isinstance(muon, torch.optim.Muon)
    assert isinstance(adamw, torch.optim.AdamW)
    (group,) = muon.param_groups
    matrices = names_in(model, group)
    rest = set().union(*(names_in(model, part) for part in adamw.param_groups))
    assert matrices == {f"{layer}.rotated_weight" for layer, _ in quantized_layers(model)}
    assert matrices | rest == {name for name, _ in model.named_parameters()}
    assert not matrices & rest
    assert any("head" in name for name in rest)
    assert (group["weight_decay"], group["momentum"]) == (0.1, 0.95)


def test_muon_without_a_matrix_to_train_is_refused() -> None:
    with pytest.raises(BellboxError, match=r"optimizer.kind is muon.*use adamw"):
        ModelOptimizer(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), OptimizerSection(kind="muon"))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_what_was_remembered_before_a_restore_is_forgotten(kind) -> None:
    model = small()
    optimizer = ModelOptimizer(model, OptimizerSection(kind=kind))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(1e-3)
    first = optimizer.tensors(model.named_parameters())
    assert {name.rpartition("/")[0] for name in first} == {name for name, _ in model.named_parameters()}
    some = {name: value.clone() for name, value in first.items() if name.startswith("lm_head")}
    optimizer.restore(model.named_parameters(), some)
    found = optimizer.tensors(model.named_parameters())
    assert found.keys() == some.keys()
    assert all(torch.equal(found[name], value) for name, value in some.items())
    optimizer.restore(model.named_parameters(), {})
    assert optimizer.tensors(model.named_parameters()) == {}


def test_the_hyperballs_rate_follows_from_the_steps() -> None:
    assert hyperball_rate("ours", 512) == 0.0225
    assert hyperball_rate("ours", 2048) == 0.01417
    assert hyperball_rate("ours", 20) == hyperball_rate("ours", 216) == 0.03
    assert hyperball_rate("published", 512) == hyperball_rate("published", 50_000) == 0.01
