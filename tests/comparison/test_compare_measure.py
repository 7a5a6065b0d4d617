from __future__ import annotations

import pytest
from torch import nn

import bellbox as bb
from bellbox.comparison.measure import block_bytes

CODES = 32 * 128 // 4


@pytest.mark.parametrize(
    ("recipe", "bytes_", "packs"),
    [
        (bb.Recipe.none(), 2 * 32 * 128, True),
        (bb.Recipe.of("rtn", 2), CODES + 4 * 32 + 4, True),
        (bb.Recipe.of("nf", 2), CODES + 4 * 32, False),
        (bb.Recipe.of("nf", 2, options={"group": 64}), CODES + 4 * 32 * 2, False),
        (bb.Recipe.of("kmeans", 2, weight_only="float"), CODES + 4 * (32 * 2 + 4), True),
    ],
)
def test_every_scale_counts_packed_or_not(recipe: bb.Recipe, bytes_: int, packs: bool) -> None:
    model = bb.prepare(nn.Sequential(nn.Linear(128, 32, bias=False)), recipe)
    found, refusal = block_bytes(model)
    assert found == bytes_
    assert (refusal is None) == packs
