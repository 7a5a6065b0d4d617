from __future__ import annotations

from typing import Any

import pytest
import torch

from bellbox.errors import BellboxError
from bellbox.runs.config import CewtSection, OptimizerSection, ResolvedConfig, ScheduleSection
from bellbox.training.schedule import one_cycle, projects, rates


@pytest.mark.parametrize(("total", "warmup"), [(100, 0.1), (37, 0.3), (1000, 0.01), (10, 0.2), (15, 0.5)])
def test_equals_pytorchs_one_cycle_in_every_step(total: int, warmup: float) -> None:
    peak, start, end = 1.2e-3, 0.01, 0.1
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=peak,
        total_steps=total,
        pct_start=warmup,
        div_factor=1 / start,
        final_div_factor=start / end,
        anneal_strategy="cos",
        cycle_momentum=False,
    )
    for step in range(total):
        ours = one_cycle(step, total, peak, warmup=warmup, start_factor=start, end_factor=end)
        assert ours == pytest.approx(reference.get_last_lr()[0], abs=1e-12, rel=1e-12)
        optimizer.step()
        if step + 1 < total:
            reference.step()


def test_begins_at_a_hundredth_peaks_and_ends_at_a_tenth() -> None:
    rates = [one_cycle(step, 1000, 1.0) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) == 99
    assert rates[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("total", [1, 2, 3])
def test_the_shortest_runs_get_sensible_rates(total: int) -> None:
    rates = [one_cycle(step, total, 1.0) for step in range(total)]
    assert rates[0] == 1.0
    assert all(0.1 <= rate <= 1.0 for rate in rates)


def test_no_warmup_begins_at_the_peak() -> None:
    assert one_cycle(0, 10, 1.0, warmup=0.0) == 1.0
    assert one_cycle(9, 10, 1.0, warmup=0.0) == pytest.approx(0.1)


def run_of(schedule: dict[str, Any] | None = None, **cewt: Any) -> ResolvedConfig:
    optimizer = OptimizerSection(lr=1e-3, cewt=CewtSection(lr=0.02, every=16, **cewt))
    return ResolvedConfig(steps=100, optimizer=optimizer, schedule=ScheduleSection(**(schedule or {})))


def test_the_hyperballs_rate_follows_the_others() -> None:
    config = run_of({"end_factor": 0.2})
    for step in range(100):
        lr, ball = rates(config, step)
        assert lr == one_cycle(step, 100, 1e-3, end_factor=0.2)
        assert ball == pytest.approx(20 * lr, rel=1e-12)


def test_the_hyperball_may_end_and_rise_by_itself() -> None:
    config = run_of(end_factor=0.0, warmup=0.3)
    found = [rates(config, step) for step in range(100)]
    assert [lr for lr, _ in found] == [one_cycle(step, 100, 1e-3) for step in range(100)]
    balls = [ball for _, ball in found]
    assert balls[-1] == pytest.approx(0, abs=1e-12)
    assert balls.index(max(balls)) == 29
    assert max(balls) == pytest.approx(0.02)
    assert rates(run_of(end_factor=0.0), 9)[1] == pytest.approx(0.02)  # rises with the others


def test_projections_come_every_so_often_and_at_the_end_of_a_phase_until_they_stop() -> None:
    def steps(**changes: Any) -> list[int]:
        section = CewtSection(**{"every": 16, **changes})
        return [done for done in range(1, 101) if projects(section, done, 50 if done <= 50 else 100, 100)]

    assert steps() == [16, 32, 48, 50, 64, 80, 96, 100]
    assert steps(until=0.9) == [16, 32, 48, 50, 64, 80]
    assert steps(until=0.01) == []
    assert steps(every=1, until=0.03) == [1, 2, 3]
    assert steps(every=0) == []


@pytest.mark.parametrize("key", ["end_factor", "warmup"])
def test_a_rate_of_its_own_needs_a_hyperball(key: str) -> None:
    with pytest.raises(BellboxError, match=rf"optimizer\.cewt\.{key} is 0\.1, but hyperball is False"):
        run_of(hyperball=False, **{key: 0.1}).check()
