from __future__ import annotations

import pytest
import torch
from torch import nn

from bellbox.models import build, preset
from bellbox.recipe import Recipe
from bellbox.surgery import prepare
from bellbox.training.optimizer import (
    make_adamw,
    optimizer_tensors,
    parameter_groups,
    restore_optimizer,
)


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
    decay, plain = parameter_groups(model, 0.1)
    assert (decay["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    decayed, kept = names_in(model, decay), names_in(model, plain)
    assert decayed | kept == {name for name, _ in model.named_parameters()}
    assert not decayed & kept
    assert all(name.endswith(("proj.weight", "fc.weight", "lm_head.weight", ".weight")) for name in decayed)
    words = ("norm", "ln_", "embed", "wte", "wpe", "gamma", "bias")
    assert not [name for name in decayed if any(word in name for word in words)]
    assert any("head" in name for name in decayed)
    if recipe.rules:
        assert any("gamma" in name for name in kept)


def test_a_head_that_is_tied_to_the_embedding_does_not_decay() -> None:
    model = small("tiny", tie_word_embeddings=True)
    decay, plain = parameter_groups(model, 0.1)
    assert not [name for name in names_in(model, decay) if "embed" in name or "head" in name]
    assert any("embed" in name for name in names_in(model, plain))


def test_a_frozen_parameter_is_in_no_group() -> None:
    model = small()
    next(model.parameters()).requires_grad_(False)
    groups = parameter_groups(model, 0.1)
    total = sum(len(group["params"]) for group in groups)
    assert total == len(list(model.parameters())) - 1


def test_the_optimizers_state_goes_out_and_back_bit_for_bit() -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.arange(8).reshape(1, 8)).square().mean().backward()
        optimizer.step()

    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    first, second = small(), small()
    optimizer = make_adamw(first, **settings)
    for _ in range(3):
        step(first, optimizer)
    tensors = {
        name: value.clone() for name, value in optimizer_tensors(optimizer, first.named_parameters()).items()
    }
    second.load_state_dict(first.state_dict())
    resumed = make_adamw(second, **settings)
    restore_optimizer(resumed, second.named_parameters(), tensors)
    step(first, optimizer)
    step(second, resumed)
    for (name, left), (_, right) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(left, right), name


def test_a_moment_of_another_shape_is_refused() -> None:
    model = nn.Linear(3, 2)
    optimizer = make_adamw(model, lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    with pytest.raises(ValueError, match=r"weight/exp_avg has shape \(3, 3\)"):
        restore_optimizer(optimizer, model.named_parameters(), {"weight/exp_avg": torch.zeros(3, 3)})
