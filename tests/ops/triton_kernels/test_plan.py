"""Sizes fit the machine that they are for, whatever the shape."""

from __future__ import annotations

import pytest

from bellbox.ops.backends.triton import plan
from bellbox.ops.backends.triton.plan import Gpu

GPUS = [
    Gpu((8, 0), 108),
    Gpu((8, 9), 128),
    Gpu((9, 0), 132),
    Gpu((10, 0), 148),
    Gpu((12, 0), 170),
    plan.INTERPRETED,
]


@pytest.mark.parametrize("on", GPUS, ids=str)
def test_tiles_fit_shared_memory_and_the_shape(on: Gpu) -> None:
    for bits in (1, 2, 3, 4):
        for rows in (1, 3, 17, 64, 65, 500, 100_000):
            for outputs, columns in ((1, 1), (640, 640), (4096, 11008), (32_000, 4096), (20, 100_000)):
                tiles = plan.tiles(rows, outputs, columns, bits, on)
                steps = -(-columns // (64 * plan.group(bits)))
                assert 1 <= tiles.splits <= max(16, steps)
                assert tiles.outputs % 16 == 0
                assert tiles.stages >= 2
                assert tiles.stages * plan.stage_bytes(tiles, bits) <= on.shared
                assert tiles.rows <= max(64, plan.power_of_two(rows))


def test_the_table_serves_shapes_near_its_own_and_the_rule_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    on, odd = Gpu((9, 0), 132), plan.Tiles(128, 64, 1, 4, 2)
    monkeypatch.setattr(plan, "table", lambda on: plan.Table(True, 4, None, {(4, 2048, 4096, 4096): odd}))
    plan.tiles.cache_clear()
    try:
        assert plan.tiles(4096, 4096, 5120, 4, on) == odd
        assert plan.tiles(1000, 4096, 4096, 4, on) == odd
        assert plan.tiles(200, 4096, 4096, 4, on) != odd  # other rows
        assert plan.tiles(2048, 512, 512, 4, on) == plan.by_rule(2048, 512, 512, 4, on) != odd  # far away
        assert plan.tiles(2048, 4096, 4096, 2, on) == plan.by_rule(2048, 4096, 4096, 2, on)
    finally:
        plan.tiles.cache_clear()


def test_many_rows_take_the_tiles_of_least_foreseen_cycles() -> None:
    on = Gpu((9, 0), 132)
    tiles = plan.by_rule(32_768, 8192, 8192, 4, on)
    assert tiles.rows == 256
    small = plan.by_rule(64, 512, 512, 4, on)
    assert small.rows * small.outputs < tiles.rows * tiles.outputs


@pytest.mark.parametrize(("rows", "each"), [(1, 1), (528, 1), (2048, 4), (4224, 8), (32_768, 8), (5000, 5)])
def test_rows_that_share_a_program_fill_waves(rows: int, each: int) -> None:
    assert plan.rows_each(rows, 4, 132) == each
