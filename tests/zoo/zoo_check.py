"""What holds for every model of the zoo: prepare, steps, convert, save, load into another; the very same outputs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from zoo_models import Model

import bellbox as bb
from bellbox.coverage import is_known, plain_layers
from bellbox.nn import is_fused_experts, quantized_layers
from bellbox.optim import parameter_groups


def tensors(outputs: Any) -> Iterator[Tensor]:
    """The floating tensors in what a model returns, in order."""
    if isinstance(outputs, Tensor):
        if outputs.is_floating_point():
            yield outputs
    elif isinstance(outputs, dict):
        for value in outputs.values():
            yield from tensors(value)
    elif isinstance(outputs, (list, tuple)):
        for value in outputs:
            yield from tensors(value)


def run(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The outputs for positional or named inputs."""
    return list(tensors(model(**inputs) if isinstance(inputs, dict) else model(inputs)))


def left(model: nn.Module) -> set[str]:
    """The linear layers and convolutions of a prepared model that are not quantized."""
    return {name for name, _ in plain_layers(model)}


STEPS = 2


def prepared(about: Model) -> nn.Module:
    """The model, made low-bit; what is left are the layers that the zoo names, no more and no less."""
    model = about.build()
    names = [name for name, module in model.named_modules() if is_known(module)]
    unmatched = [pattern for pattern in about.kept if not any(fnmatchcase(name, pattern) for name in names)]
    assert not unmatched, f"the model has no layers {sorted(unmatched)}"
    kept = {name for name, _ in plain_layers(model) if about.is_kept(name)}
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # experts in one tensor and the like, which are not what is tested here
        bb.prepare(model, bb.Recipe.bbq(2, granularity="token"))
    assert left(model) == kept, f"left are {sorted(left(model))}"
    assert any(quantized_layers(model))
    assert not any(map(is_fused_experts, model.modules())), "experts are left"
    return model


def train(model: nn.Module, inputs: Any) -> None:
    """A few steps on one batch."""
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-4, weight_decay=0.1))
    for _ in range(STEPS):
        optimizer.zero_grad()
        sum(each.float().square().mean() for each in run(model.train(), inputs)).backward()  # type: ignore[union-attr]
        optimizer.step()


def check(about: Model, folder: Path) -> None:
    """Raise AssertionError, naming what differs, where a promise does not hold for a model of the zoo.

    Args:
        about: the model.
        folder: an empty one, for what is saved.
    """
    inputs = about.inputs()
    model = prepared(about)
    train(model, inputs)
    packed = bb.convert(model)
    bb.save(packed, folder / "packed")
    loaded = bb.load(folder / "packed", into=about.build())
    with torch.no_grad():
        expected = run(model.eval(), inputs)
        same_outputs(run(packed, inputs), expected, about.exact)
        same_outputs(run(loaded, inputs), run(packed, inputs), exact=True)


def same_outputs(ours: list[Tensor], theirs: list[Tensor], exact: bool) -> None:
    """Raise AssertionError where outputs are not finite, or not equal: to the last bit, or but for rounding."""
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert torch.isfinite(other).all()
        same = torch.equal(one, other) if exact else torch.allclose(one, other, rtol=1e-5, atol=1e-6)
        assert same, f"outputs differ by {(one - other).abs().max()}"
