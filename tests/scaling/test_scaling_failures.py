"""Formulas of checkpoint intervals against a simulation that draws the failures."""

from __future__ import annotations

import math

import pytest

from bellbox.errors import BellboxError
from bellbox.scaling.failures import best_simulated, daly, expected, simulated, young

DAY = 86400.0


@pytest.mark.parametrize(("cost", "between"), [(30.0, 6 * 3600.0), (120.0, 3600.0), (60.0, 2 * DAY)])
def test_the_formula_of_the_expected_time_is_the_simulated_one(cost: float, between: float) -> None:
    work, interval, restart = 10 * between, young(cost, between), 200.0
    drawn = simulated(work, interval, cost, restart, between, runs=600, seed=1)
    assert drawn == pytest.approx(expected(work, interval, cost, restart, between), rel=0.03)


def test_dalys_interval_is_the_best_one() -> None:
    cost, between, restart = 120.0, 3600.0, 60.0
    best = daly(cost, between)
    times = {k: expected(DAY, best * k, cost, restart, between) for k in (0.5, 0.9, 1.0, 1.1, 2.0)}
    assert min(times, key=lambda k: times[k]) == 1.0
    # And better than Young's, where failures are frequent.
    assert times[1.0] < expected(DAY, young(cost, between), cost, restart, between)


def test_the_simulation_finds_it_too() -> None:
    cost, between = 60.0, 2 * 3600.0
    found = best_simulated(2 * DAY, cost, 100.0, between, runs=60, seed=2)
    # The valley is flat: what counts is that nothing is lost at Daly's interval.
    least = simulated(2 * DAY, found, cost, 100.0, between, 400, seed=3)
    assert simulated(2 * DAY, daly(cost, between), cost, 100.0, between, 400, seed=3) < 1.02 * least
    assert 0.3 < found / daly(cost, between) < 3


def test_without_failures_only_checkpoints_cost() -> None:
    assert simulated(1000.0, 100.0, 5.0, 50.0, 1e12, runs=2) == pytest.approx(1050.0)
    assert expected(1000.0, 100.0, 5.0, 50.0, 1e9) == pytest.approx(1050.0, rel=1e-5)


def test_ends_of_the_range() -> None:
    assert daly(10.0, 4.0) == 4.0
    assert expected(1e6, 1e9, 1.0, 1.0, 1.0) == math.inf
    with pytest.raises(BellboxError, match=r"seconds between failures: 0\.0, must be above 0"):
        young(1.0, 0.0)
