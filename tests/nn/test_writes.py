"""Whoever writes into a weight, by whatever way, is seen by the next evaluation and by packed layers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import bellbox as bb
from bellbox.nn import PackedLinear
from bellbox.nn.packed import PackedLayer
from bellbox.ops.weight_layout import prepack


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(16, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x).mean((2, 3)))


def prepared(method: str) -> nn.Module:
    torch.manual_seed(0)
    model = bb.prepare(Net(), bb.Recipe.of(method, bits=2))
    model(torch.randn(4, 16, 6, 5))
    return model.eval()


X = torch.linspace(-1, 1, 3 * 16 * 30).reshape(3, 16, 6, 5).sin()


def by_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(0.5).add_(torch.randn(parameter.shape), alpha=0.5)


def by_vector(model: nn.Module) -> None:
    vector_to_parameters(parameters_to_vector(model.parameters()).roll(1), model.parameters())


def by_numpy(model: nn.Module) -> None:
    for parameter in model.parameters():
        view = parameter.detach().numpy()
        view[...] = view[..., ::-1] * 0.7


def by_one_byte(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("weight"):
            parameter.detach().numpy().reshape(-1)[-1] *= -3


def by_new_memory(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.flip(-1) * 0.8


def by_inference_mode(model: nn.Module) -> None:
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.mul_(torch.randn(parameter.shape))


def by_fused_adamw(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.3, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape)
    optimizer.step()


def by_another_process(model: nn.Module) -> None:
    import multiprocessing

    model.share_memory()
    with torch.no_grad():
        model(X)  # what is derived is of the shared memory now
    child = multiprocessing.get_context("fork").Process(target=by_numpy, args=(model,))
    child.start()
    child.join(60)
    assert child.exitcode == 0


WRITES: list[Callable[[nn.Module], None]] = [
    by_data, by_vector, by_numpy, by_one_byte, by_new_memory, by_inference_mode, by_fused_adamw, by_another_process,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("write", WRITES, ids=lambda each: each.__name__)
@pytest.mark.parametrize("method", ["bbq", "quest", "lsq"])
def test_evaluation_sees_every_write(method, write):
    model = prepared(method)
    with torch.no_grad():
        before = model(X)
        assert torch.equal(model(X), before)
    write(model)
    with torch.no_grad():
        seen = model(X)
        fresh = copy.deepcopy(model).train().eval()(X)
        packed = bb.convert(model)(X)
    assert not torch.equal(seen, before)
    assert torch.equal(seen, fresh)
    assert torch.equal(seen, packed)


def other(layer: PackedLayer, name: str) -> Tensor:
    """What is written: other codes, or other numbers."""
    if name == "packed":
        return prepack(3 - layer.weight_codes(), 4, layer.places)
    return getattr(layer, name) * 1.5


PACKED_WRITES: dict[str, Callable[[PackedLayer, str], object]] = {
    "data": lambda layer, name: getattr(layer, name).data.copy_(other(layer, name)),
    "numpy": lambda layer, name: getattr(layer, name).numpy().__setitem__(..., other(layer, name).numpy()),
    "new memory": lambda layer, name: setattr(getattr(layer, name), "data", other(layer, name)),
    "new tensor": lambda layer, name: setattr(layer, name, other(layer, name)),
    "set_": lambda layer, name: getattr(layer, name).set_(other(layer, name)),
}


@pytest.mark.parametrize("write", PACKED_WRITES)
@pytest.mark.parametrize("name", ["packed", "weight_scale", "act_scale", "act_thresholds", "bias"])
def test_packed_layers_see_every_write(name, write, monkeypatch):
    model = bb.convert(prepared("bbq"))
    layers = [layer for layer in model.modules() if isinstance(layer, PackedLayer)]
    assert len(layers) == 2
    for layer in layers:
        x = torch.randn(3, 8) if isinstance(layer, PackedLinear) else X
        with torch.no_grad():
            before = layer(x)
            PACKED_WRITES[write](layer, name)
            seen = layer(x)
            monkeypatch.setenv("BELLBOX_BACKEND", "reference")
            expected = copy.deepcopy(layer)(x)
            monkeypatch.delenv("BELLBOX_BACKEND")
        assert not torch.equal(seen, before)
        assert torch.equal(seen, expected)


def test_packed_layers_in_shared_memory_see_what_another_process_writes():
    import multiprocessing

    model = bb.convert(prepared("bbq"))
    model.share_memory()
    with torch.no_grad():
        before = model(X)

        def write() -> None:
            for layer in model.modules():
                if isinstance(layer, PackedLayer):
                    layer.packed.numpy()[: layer.packed.numel() // 2] ^= 255
                    layer.weight_scale.numpy()[:] *= 2

        child = multiprocessing.get_context("fork").Process(target=write)
        child.start()
        child.join(60)
        assert child.exitcode == 0
        seen = model(X)
        assert not torch.equal(seen, before)
        assert torch.equal(copy.deepcopy(model)(X), seen)
