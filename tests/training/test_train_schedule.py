from __future__ import annotations

import pytest
import torch

from bellbox.training.schedule import one_cycle


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
