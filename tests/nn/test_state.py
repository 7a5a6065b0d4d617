"""The state of a prepared layer in another recipe, and the weight of a layer that stores it rotated."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

import bellbox as bb
from bellbox.errors import BellboxError
from bellbox.nn import QuantizedLinear
from bellbox.recipe import Recipe

RECORD = "_extra_state"


def plain(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 16, bias=False))


def an_input() -> Tensor:
    return torch.randn(5, 32, generator=torch.Generator().manual_seed(7))


def made(seed: int = 0, rotated: bool = True, method: str = "lsq", **changes: Any) -> nn.Module:
    """A prepared model whose scales are set."""
    recipe = Recipe.of(
        method, **{"levels": 4, "block": 8, **changes}, weights_rotated=rotated, keep_ends=False
    )
    model = bb.prepare(plain(seed), recipe)
    model(an_input() * (1 + seed))
    return model


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert tensor.equal(theirs[name]), name


def through_torch_save(state: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    torch.save(state, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


def through_safetensors(state: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    save_file(state, folder / "state.safetensors")
    return load_file(folder / "state.safetensors")


def through_a_distributed_checkpoint(state: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    from torch.distributed import checkpoint

    checkpoint.save(state, checkpoint_id=folder / "dcp", no_dist=True)
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    checkpoint.load(target, checkpoint_id=folder / "dcp", no_dist=True)
    return target


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize(
    "through",
    [through_torch_save, through_safetensors, through_a_distributed_checkpoint],
    ids=lambda f: f.__name__,
)
def test_a_state_of_the_same_recipe_is_copied_bit_for_bit(
    through: Callable[..., dict[str, Tensor]], rotated: bool, tmp_path: Path
) -> None:
    first, second = made(0, rotated), made(1, rotated)
    state = snapshot(first)
    second.load_state_dict(through(state, tmp_path))
    assert_equal(snapshot(second), state)
    assert second.eval()(an_input()).equal(first.eval()(an_input()))


@pytest.mark.parametrize("rotated", [False, True])
def test_copies_and_averages_keep_the_state(rotated: bool) -> None:
    model = made(0, rotated)
    averaged = AveragedModel(copy.deepcopy(model))
    averaged.update_parameters(model)
    assert_equal(snapshot(averaged.module), snapshot(model))
    other = AveragedModel(made(1, rotated))
    other.load_state_dict(averaged.state_dict())
    assert_equal(snapshot(other.module), snapshot(model))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("there", "here", "says"),
    [
        ({}, {"method": "quest"}, "method lsq there, quest here"),
        ({}, {"levels": 3}, "levels 4 there, 3 here"),
        ({}, {"zero_point": 0.0}, "zero point -0.5 there, 0.0 here"),
        ({"method": "bbq"}, {"method": "bbq", "granularity": "ema"}, "granularity token there, ema here"),
        ({"method": "bbq"}, {"method": "bbq", "options": {"rms": False}}, "other options"),
        ({}, {"block": 4}, "block 8 there, 4 here"),
        ({}, {"weight_only": "float"}, "lsq there"),
    ],
)
def test_a_state_of_another_function_is_refused_by_name_and_nothing_is_copied(
    there: dict[str, Any], here: dict[str, Any], says: str, strict: bool
) -> None:
    source, target = made(0, False, **there), made(1, False, **here)
    state, before = snapshot(source), snapshot(target)
    state["0.bias"] = state["0.bias"] + 1
    with pytest.raises(BellboxError, match=says) as error:
        target.load_state_dict(state, strict=strict)
    assert str(error.value).startswith("0: the state is of another recipe")
    assert_equal(snapshot(target), before)


def test_nothing_is_copied_where_the_last_layer_is_of_another_function() -> None:
    source, target = made(0), made(1)
    state, before = snapshot(source), snapshot(target)
    state[f"2.{RECORD}"] = made(0, levels=3).state_dict()[f"2.{RECORD}"]
    with pytest.raises(BellboxError, match=r"^2: the state is of another recipe"):
        target.load_state_dict(state)
    assert_equal(snapshot(target), before)


@pytest.mark.parametrize("rotated", [False, True])
def test_a_weight_is_converted_between_rotated_and_unrotated(rotated: bool) -> None:
    source, target = made(0, rotated), made(1, not rotated)
    target.load_state_dict(snapshot(source))
    name = "rotated_weight" if not rotated else "weight"
    for at in (0, 2):
        assert f"{at}.{name}" in dict(target.named_parameters())
        torch.testing.assert_close(target[at].weight.clone(), source[at].weight.clone(), rtol=0, atol=1e-6)
    torch.testing.assert_close(target(an_input()), source(an_input()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rotated", [False, True])
def test_a_plain_state_is_taken_and_the_scales_are_set_anew(rotated: bool) -> None:
    target, original = made(1, rotated), plain(0)
    target.load_state_dict(original.state_dict())
    for at in (0, 2):
        torch.testing.assert_close(target[at].weight.clone(), original[at].weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(target(an_input()), made(0, rotated)(an_input()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rotated", [False, True])
def test_a_state_without_records_is_that_of_the_same_recipe(rotated: bool) -> None:
    source, target = made(0, rotated), made(1, rotated)
    old = {
        name.replace("rotated_weight", "weight"): tensor
        for name, tensor in snapshot(source).items()
        if not name.endswith(RECORD)
    }
    target.load_state_dict(old)
    assert_equal(snapshot(target), snapshot(source))


@pytest.mark.parametrize("rotated", [False, True])
def test_a_model_without_memory_takes_the_tensors_of_a_state(rotated: bool) -> None:
    """`load_state_dict(assign=True)`, as large models are opened: nothing of it may stay on the meta device."""
    source = made(1, rotated).eval()
    for inside in (False, True):
        with torch.device("meta"):
            empty = plain()
            if inside:
                bb.prepare(
                    empty, Recipe.of("lsq", levels=4, block=8, weights_rotated=rotated, keep_ends=False)
                )
        if not inside:
            bb.prepare(empty, Recipe.of("lsq", levels=4, block=8, weights_rotated=rotated, keep_ends=False))
        empty.load_state_dict(snapshot(source), assign=True)
        assert not any(t.is_meta for t in (*empty.parameters(), *empty.buffers()))
        torch.testing.assert_close(empty.eval()(an_input()), source(an_input()))
        empty.train()(an_input()).sum().backward()


def test_a_weight_assigned_from_another_layer_is_tied_to_it() -> None:
    model = bb.prepare(
        nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)), Recipe.bbq(2, keep_ends=False)
    )
    first, last = model[0], model[2]
    last.weight = first.weight
    assert last.stored_weight is first.stored_weight
    assert len(list(model.parameters())) == len({id(p) for p in model.parameters()})
    model(an_input()).square().sum().backward()
    model.eval()
    with torch.no_grad():
        assert torch.equal(bb.convert(model)(an_input()), model(an_input()))
    other = bb.prepare(nn.Linear(32, 32), Recipe.bbq(2, keep_ends=False, block=8))
    with pytest.raises(BellboxError, match="another shape or rotation; tie them before prepare"):
        other.weight = first.weight


def test_a_plain_model_does_not_take_a_rotated_weight_for_its_own() -> None:
    with pytest.raises(RuntimeError, match=r"0\.rotated_weight"):
        plain().load_state_dict(made().state_dict())


# --- the weight ---


def rotated_layer() -> tuple[QuantizedLinear, Tensor]:
    layer = made(0)[0]
    assert isinstance(layer, QuantizedLinear)
    return layer, layer.weight.detach().clone()


def through_data(layer: nn.Linear) -> None:
    layer.weight.data += 0.5


def through_a_parameter(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight.detach().clone() + 0.5)


def through_a_slice(layer: nn.Linear) -> None:
    with torch.no_grad():
        layer.weight[2:5, ::3] = 0.25


def through_a_slice_of_data(layer: nn.Linear) -> None:
    layer.weight.data[1] = 0.25


def through_copy(layer: nn.Linear) -> None:
    with torch.no_grad():
        layer.weight.copy_(torch.full((24, 32), 0.125))


def through_initialisation(kind: Callable[..., Any]) -> Callable[[nn.Linear], None]:
    def write(layer: nn.Linear) -> None:
        torch.manual_seed(3)
        kind(layer.weight)

    return write


def through_a_detached_one(layer: nn.Linear) -> None:
    layer.weight.detach().mul_(2)


def through_several_at_once(layer: nn.Linear) -> None:
    others = [torch.ones(3), layer.weight.data]
    torch._foreach_mul_(others, 0.5)
    assert torch.equal(others[0], torch.full((3,), 0.5))


def through_an_optimizer(layer: nn.Linear) -> None:
    for foreach in (False, True):
        optimizer = torch.optim.SGD([layer.weight], 0.5, foreach=foreach)
        (layer.weight * torch.linspace(-0.5, 0.5, 32)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


WRITES = [
    through_a_detached_one, through_several_at_once, through_an_optimizer,
    through_data, through_a_parameter, through_a_slice, through_a_slice_of_data, through_copy,
    *map(through_initialisation, (
        nn.init.normal_, nn.init.xavier_uniform_, nn.init.kaiming_normal_, nn.init.orthogonal_, nn.init.zeros_,
    )),
]  # fmt: skip


@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_is_what_a_plain_layer_would_hold(write: Callable[[nn.Linear], None]) -> None:
    layer, weight = rotated_layer()
    twin = nn.Linear(32, 24)
    twin.weight.data.copy_(weight)
    write(layer)
    write(twin)
    assert not torch.allclose(twin.weight, weight, atol=1e-3)
    torch.testing.assert_close(layer.weight.clone(), twin.weight, rtol=0, atol=1e-6)
    assert list(dict(layer.named_parameters(recurse=False))) == ["rotated_weight", "bias"]


def test_functional_use_has_the_gradients_of_a_plain_layer() -> None:
    layer, weight = rotated_layer()
    twin = nn.Linear(32, 24)
    twin.weight.data.copy_(weight)
    x = an_input()
    for each in (layer, twin):
        each.zero_grad()
        (F.linear(x, each.weight) + each.weight.sum(1)).square().mean().backward()
    assert layer.stored_weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, twin.weight.grad, rtol=0, atol=4e-6)


def test_a_compiler_reads_the_weight_in_one_graph() -> None:
    torch._dynamo.reset()
    layer, weight = rotated_layer()

    def read(x: Tensor) -> Tensor:
        return F.linear(x, layer.weight)

    compiled = torch.compile(read, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(an_input()), F.linear(an_input(), weight), rtol=0, atol=4e-6)
