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

VALUES = [
    Binarized(torch.ones(1, 1), None, None, torch.ones(1, 2)),
    ClipRange(-1.0, 1.0),
    ConvGeometry((1, 1)),
    Grid(4, 0.0),
    Learned(1.0),
    Levels.gaussian(4),
    QuantizerSpec(),
    *(method.Options() for method in METHODS.values()),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__qualname__)
def test_a_value_is_frozen(value):
    for field in dataclasses.fields(value):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field.name, None)
