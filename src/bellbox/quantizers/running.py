"""Running scales (`granularity='ema'`) that move once an optimizer step, by all of its micro-batches and processes.

By itself a running scale moves with every forward. In a step of several micro-batches it would then depend on how the
batch is split, and, where a block runs again for its backward, move twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from bellbox.quantizers.bbq import BBQ
from bellbox.quantizers.learned import processes


@contextmanager
def running_scales_once(model: nn.Module) -> Iterator[None]:
    """Within it, forwards in training leave running scales as they are; at the end, each moves once.

    It moves by the mean square of all inputs that came, in all processes: one exchange for the whole model. After an
    exception none moves.

    Args:
        model: prepared; all processes enter it with the same one.
    """
    found = [module for module in model.modules() if isinstance(module, BBQ) and module.granularity == "ema"]
    for quantizer in found:
        quantizer.waiting = []
    try:
        yield
        if found:
            _move(found)
    finally:
        for quantizer in found:
            quantizer.waiting = None


@torch.no_grad()
def _move(quantizers: list[BBQ]) -> None:
    device = quantizers[0].r_ema.device
    sums = torch.zeros(len(quantizers), 2, dtype=torch.float64, device=device)
    for i, quantizer in enumerate(quantizers):
        for inverse in quantizer.waiting or ():
            square = inverse.reshape(()).to(torch.float64).square().reciprocal()
            # A batch that is not finite says nothing.
            sums[i] += torch.where(square.isfinite(), torch.stack((square, torch.ones_like(square))), 0.0)
    if processes() > 1:
        torch.distributed.all_reduce(sums)
    for quantizer, (square, count) in zip(quantizers, sums, strict=True):
        if float(count) > 0:
            quantizer.move((square / count).rsqrt())
