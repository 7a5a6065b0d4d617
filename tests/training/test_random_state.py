from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from bellbox.errors import BellboxError
from bellbox.training import random_state


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_what_is_drawn_after_a_restore_is_what_was_drawn_after_the_capture() -> None:
    random_state.seed_all(3)
    state = json.loads(json.dumps(random_state.capture()))
    first = drawn()
    assert drawn() != first
    random_state.restore(state)
    assert drawn() == first


@pytest.mark.parametrize("part", ["python", "numpy", "torch"])
def test_values_that_are_no_state_are_refused_in_one_line(part: str) -> None:
    state = random_state.capture()
    if part == "torch":
        state[part] = "AAAA"
    else:
        state[part][1][5] = 0.5 if part == "python" else "x"
    with pytest.raises(BellboxError, match=r"^no state of random generators: [^\n]+$"):
        random_state.restore(state)
