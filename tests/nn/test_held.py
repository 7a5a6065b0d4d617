from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import bellbox as bb
from bellbox.nn import QuantizedLinear, quantized_layers, weights_quantized_once
from bellbox.quantizers import METHODS
from bellbox.recipe import Recipe

WIDTH = 64


def network(recipe: Recipe) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 32))
    model = bb.prepare(model, recipe)
    model(torch.randn(16, WIDTH))  # sets the scales of the activations
    return model


def accumulate(model: nn.Module, batches: list[Tensor], once: bool, bf16: bool = False) -> list[Tensor]:
    """The outputs, and then the gradients of all parameters."""
    outputs: list[Tensor] = []
    with weights_quantized_once(model) if once else nullcontext():
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                y = model(batch)
            y.float().square().mean().backward()
            outputs.append(y.detach())
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) >= 4
    return outputs + gradients


def batches(count: int = 3) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(16, WIDTH, generator=draw) for _ in range(count)]


@pytest.mark.parametrize("method", [name for name, kind in METHODS.items() if kind.activation_granularities])
def test_outputs_are_the_same_bits_and_gradients_the_same_up_to_summation(method: str) -> None:
    model = network(Recipe.of(method, levels=3 if method.startswith("ternary") else 4))
    each = accumulate(copy.deepcopy(model), batches(), once=False)
    once = accumulate(copy.deepcopy(model), batches(), once=True)
    assert all(torch.equal(left, right) for left, right in zip(once[:3], each[:3], strict=True))
    for left, right in zip(once[3:], each[3:], strict=True):
        assert torch.allclose(left, right, rtol=1e-4, atol=1e-6 * float(right.abs().max()))


def test_under_autocast_the_outputs_are_the_same_bits_and_the_gradients_as_close_as_bf16_is() -> None:
    model = network(Recipe.bbq(bits=2))
    each = accumulate(copy.deepcopy(model), batches(), once=False, bf16=True)
    once = accumulate(copy.deepcopy(model), batches(), once=True, bf16=True)
    assert all(torch.equal(left, right) for left, right in zip(once[:3], each[:3], strict=True))
    for left, right in zip(once[3:], each[3:], strict=True):
        assert float((left - right).norm() / right.norm()) < 0.01


def test_gradients_of_micro_batches_are_summed_in_fp32_under_autocast() -> None:
    def gradients(some: list[Tensor]) -> list[Tensor]:
        copied = copy.deepcopy(model)
        with torch.autocast("cpu", torch.bfloat16), weights_quantized_once(copied):
            held = copied[0].held_weight
            assert (held if isinstance(held, Tensor) else held.coded.value).dtype == torch.float32
            for batch in some:
                copied(batch).float().square().mean().backward()
        return [layer.stored_weight.grad.double() for _, layer in quantized_layers(copied)]

    model, many = network(Recipe.bbq(bits=2)), batches(24)
    alone = [gradients([batch]) for batch in many]
    for found, *parts in zip(gradients(many), *alone, strict=True):
        wanted = torch.stack(parts).sum(0)
        assert float((found - wanted).norm() / wanted.norm()) < 1e-5


def test_each_weight_is_quantized_once_and_goes_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(Recipe.bbq(bits=2))
    calls: Counter[str] = Counter()

    def counted(name: str, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def call(weight: Tensor) -> Tensor:
            calls[f"{name} forward"] += 1
            quantized = forward(weight)
            quantized.register_hook(lambda _: calls.update([f"{name} backward"]))
            return quantized

        return call

    for name, layer in quantized_layers(model):
        assert layer.weight_quantizer is not None
        monkeypatch.setattr(layer.weight_quantizer, "forward", counted(name, layer.weight_quantizer.forward))
    accumulate(model, batches(4), once=True)
    assert calls == {f"{name} {way}": 1 for name in ("0", "2") for way in ("forward", "backward")}


def test_afterwards_and_after_an_exception_layers_quantize_by_themselves() -> None:
    model = network(Recipe.bbq(bits=2))
    layer = model[0]  # pyright: ignore[reportIndexIssue]
    assert isinstance(layer, QuantizedLinear)
    model[2].register_forward_hook(lambda *_: {}["stop"])  # pyright: ignore[reportIndexIssue]
    with pytest.raises(KeyError, match="stop"), weights_quantized_once(model):
        model(batches()[0])
    model[2]._forward_hooks.clear()  # pyright: ignore[reportIndexIssue]
    assert layer.held_weight is None
    assert layer.weight.grad is None
    with weights_quantized_once(model):
        assert layer.held_weight is not None
    assert layer.held_weight is None
    before = model(batches()[0])
    with torch.no_grad():
        layer.weight.neg_()
    assert not torch.equal(model(batches()[0]), before)


def test_a_frozen_weight_gets_no_gradient_and_a_layer_that_nobody_calls_does_no_harm() -> None:
    model = network(Recipe.bbq(bits=2, options={"gamma": "frozen"}))
    model[0].weight.requires_grad_(False)  # pyright: ignore[reportIndexIssue]
    with weights_quantized_once(model):
        model[0](batches()[0]).sum().backward()  # pyright: ignore[reportIndexIssue]
    assert all(p.grad is None for name, p in model.named_parameters() if "weight" in name)
    assert all(p.grad is not None for name, p in model.named_parameters() if name == "0.bias")


def test_a_compiled_model_takes_the_held_weights() -> None:
    model = network(Recipe.bbq(bits=2))
    eager = accumulate(copy.deepcopy(model), batches(), once=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):  # the second step has other tensors in the same places
        model.zero_grad(set_to_none=True)
        with weights_quantized_once(model):
            for batch in batches():
                compiled(batch).square().mean().backward()
        found = [p.grad for p in model.parameters() if p.grad is not None]
        for left, right in zip(found, eager[3:], strict=True):
            assert torch.allclose(left, right, rtol=1e-3, atol=1e-4 * float(right.abs().max()))
