"""Values of the numerical core cannot be changed after they were checked."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bellbox.core.binarize import Binarized
from bellbox.core.geometry import ConvGeometry
from bellbox.core.grid import Grid, Levels
from bellbox.quantizers import METHODS
from bellbox.quantizers.spec import QuantizerSpec
from bellbox.quantizers.straight_through import ClipRange, Learned

OURS = {name: kind for name, kind in METHODS.items() if kind.__module__.startswith("bellbox.")}
VALUES = [
    Binarized(torch.ones(1, 1), None, None, torch.ones(1, 2)),
    ClipRange(-1.0, 1.0),
    ConvGeometry((1, 1)),
    Grid(4, 0.0),
    Learned(1.0),
    Levels.gaussian(4),
    QuantizerSpec(),
    *(method.Options() for method in OURS.values()),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__qualname__)
def test_a_value_is_frozen(value):
    for field in dataclasses.fields(value):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field.name, None)


# As published, but for BBQ's statistics of a token (docs/methods.md): what a recipe without options means, and what
# files that name none were written with.
DEFAULTS: dict[str, dict[str, object]] = {
    "bbq": {
        "gamma_init": 1.694, "gamma": "learned", "gamma_lr": 1.0, "rms": True, "zeta": None, "signs": False,
        "nested": "",
    },
    "cewt": {},
    "kmeans": {"refit_every": 0, "fisher": False},
    "lsq": {"classic": False, "unsigned": False, "decay_scale": False},
    "n2uq": {"released_gradient": True, "masked": False},
    "nf": {"group": 0},
    "pact": {"signed": False, "decay_alpha": True},
    "quest": {"rule": "trust"},
    "rtn": {},
    "seq": {"rule": "stretched"},
    "ternary_mass": {},
    "ternary_support": {},
}  # fmt: skip


def test_what_is_not_said_is_as_it_always_was():
    found = {name: dataclasses.asdict(method.Options()) for name, method in OURS.items()}
    assert found == DEFAULTS
    assert QuantizerSpec() == QuantizerSpec("bbq", 4, None, None, None, {})
    assert ConvGeometry((3, 2)) == ConvGeometry((3, 2), (1, 1), (0, 0, 0, 0), (1, 1), 1)
    assert {name for name, method in OURS.items() if method.own_block != 1} == {"bbq", "cewt", "quest"}
    assert {name for name, method in OURS.items() if not method.on_grid} == {"kmeans", "nf"}
    levels = {name: method.own_levels for name, method in OURS.items()}
    assert levels == {name: 3 if name.startswith("ternary") else 4 for name in OURS}
