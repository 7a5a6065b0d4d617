"""SOAP of pytorch-optimizer in a run: its update under the hyperball, and its state in checkpoints."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pieces import Cut, records
from torch import nn

from bellbox.errors import BellboxError
from bellbox.optim.cewt import CEWT
from bellbox.runs.config import (
    CewtSection,
    CheckpointSection,
    OptimizerSection,
    PhasesSection,
    QuantizationSection,
)
from bellbox.training import TrainConfig, Trainer, load_run, train
from bellbox.training.check import refuse_unsharded
from bellbox.training.optim.soap import flat, put, soap

package = pytest.importorskip("pytorch_optimizer")
Tiny = Callable[..., TrainConfig]


def section(**cewt: Any) -> OptimizerSection:
    return OptimizerSection(kind="soap", lr=1e-2, cewt=CewtSection(**{"every": 2, **cewt}))


def test_under_the_hyperball_a_weight_goes_where_the_packages_update_points() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(12, 8))
    lone = nn.Parameter(torch.zeros(12, 8))
    ours = soap([{"params": [weight], "weight_decay": 0.0}], section())
    theirs = package.SOAP([lone], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    cewt = CEWT([ours], [weight])
    norm = cewt.norms[weight]
    for number in range(14):  # past a new eigenbasis, the tenth
        before, lone.data = weight.detach().double().clone(), torch.zeros(12, 8)
        weight.grad = torch.randn(12, 8)
        lone.grad = weight.grad.clone()
        cewt.step(lr=0.05, project=False)
        theirs.step()
        update = lone.detach().double()
        assert bool(update.any()) == (number > 0)  # the first step looks only
        moved = before + (0.05 * norm * update / update.norm() if number else 0)
        torch.testing.assert_close(
            weight.detach().double(), moved * norm / moved.norm(), rtol=1e-5, atol=1e-6
        )


def test_its_state_goes_out_and_back_bit_for_bit() -> None:
    torch.manual_seed(0)
    first, second = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.zeros(6, 4))
    one, other = (soap([{"params": [p]}], section()) for p in (first, second))
    assert flat(one, first) == {}
    gradients = torch.randn(24, 6, 4)
    for gradient in gradients[:12]:
        first.grad = gradient.clone()
        one.step()
    state = {name: value.clone() for name, value in flat(one, first).items()}
    assert set(state) == {"exp_avg", "exp_avg_sq", "GG.0", "GG.1", "Q.0", "Q.1", "step"}
    assert [tuple(state[name].shape) for name in ("GG.0", "GG.1")] == [(6, 6), (4, 4)]
    put(other, second, state)
    second.data = first.detach().clone()
    for gradient in gradients[12:]:
        for parameter, optimizer in ((first, one), (second, other)):
            parameter.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(first, second)


@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_a_run_in_pieces_equals_a_run_in_one(tiny: Tiny, kind: Any) -> None:
    settings = {
        "steps": 14,
        "eval_every": 7,
        "optimizer": section(),
        "phases": PhasesSection(bits_before=[3], shares=[0.3, 0.7]),
        "checkpoint": CheckpointSection(kind=kind),
    }
    whole, pieces = tiny("whole", **settings), tiny("pieces", **settings)
    train(whole, show=False)
    while not Cut(pieces, show=False).run().finished:
        pass
    assert records(whole) == records(pieces)
    ours, theirs = load_run(whole.folder).model.state_dict(), load_run(pieces.folder).model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_sharded_model_is_refused_and_so_is_a_machine_without_the_package(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(optimizer=section())
    trainer = Trainer(config, show=False)
    with pytest.raises(BellboxError, match=r"optimizer\.kind soap needs whole gradients; take ddp, or muon"):
        refuse_unsharded(trainer.config)

    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(BellboxError, match=r"pip install 'bellbox\[soap\]'"):
        Trainer(config, show=False)


def test_codebooks_by_squared_gradients_are_refused(tiny: Tiny) -> None:
    kmeans = QuantizationSection(
        method="kmeans", weight_only="float", options={"refit_every": 2, "fisher": True}
    )
    with pytest.raises(BellboxError, match=r"optimizer\.kind is soap, which keeps no squared gradients"):
        Trainer(tiny(quantization=kmeans, optimizer=section(every=0)), show=False)
