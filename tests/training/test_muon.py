"""Muon on whole matrices: the bits of torch's own in bf16, and a smooth update in fp32."""

from __future__ import annotations

import pytest
import torch

from bellbox.training.optim.muon import WholeMuon, orthogonalised


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)])
def test_what_is_done_for_sharded_matrices_has_the_bits_of_torch(shape: tuple[int, int]) -> None:
    ours, theirs = (torch.nn.Parameter(torch.ones(shape).cumsum(0).cumsum(1) / 50) for _ in range(2))
    mine = WholeMuon([ours], 1e-2, 0.95, torch.bfloat16)
    other = torch.optim.Muon([theirs], lr=1e-2, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for seed in range(3):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        with torch.no_grad():
            mine._step(ours, mine.param_groups[0])
        other.step()
        assert torch.equal(ours, theirs)


def test_in_fp32_a_last_bit_stays_one() -> None:
    moved = []
    for change in (0.0, 1e-7):
        weight = torch.nn.Parameter(torch.zeros(12, 20))
        weight.grad = torch.randn(12, 20, generator=torch.Generator().manual_seed(0)) * (1 + change)
        optimizer = WholeMuon([weight], 1.0, 0.95, torch.float32)
        optimizer.step()
        assert weight.grad is not None
        moved.append(weight.detach().clone())
    assert (moved[0] - moved[1]).abs().max() < 1e-5
    assert 0.1 < float(moved[0].square().mean().sqrt()) < 0.4


def test_singular_values_come_near_to_one() -> None:
    matrix = torch.randn(16, 24, generator=torch.Generator().manual_seed(1))
    found = torch.linalg.svdvals(orthogonalised(matrix, (3.4445, -4.775, 2.0315), 5, 1e-7))
    assert float(found.min()) > 0.6
    assert float(found.max()) < 1.3
