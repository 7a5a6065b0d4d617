"""Muon whose orthogonalisation is that of whole matrices, wherever their parts lie, in bf16 or fp32."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from bellbox.core.sharded import is_sharded, local, part_like, whole

_RMS = 0.2
"""Root mean square of an update, about that of AdamW's (arXiv 2502.16982)."""


class WholeMuon(torch.optim.Muon):
    """`torch.optim.Muon` in the scale of AdamW, which orthogonalises matrices: of a sharded one the update is gathered.

    Momentum and weights stay sharded, like those of other optimizers; every process makes the whole update, and takes
    its part of it. Matrices that are not sharded are torch's own, but in fp32, which torch does not have: there an
    update follows the gradient smoothly, where bf16 rounds what differs in the last bit only to something else.

    Args:
        matrices: 2-D parameters, or groups of them.
        lr: that of AdamW.
        momentum: decay of the running gradient.
        dtype: that is multiplied in.
    """

    def __init__(self, matrices: Iterable[Any], lr: float, momentum: float, dtype: torch.dtype) -> None:
        super().__init__(matrices, lr=lr, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """See `torch.optim.Optimizer.step`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        done: list[tuple[Tensor, Tensor]] = []
        try:
            for group in self.param_groups:
                for weight in group["params"]:
                    ours = is_sharded(weight) or self.dtype != torch.bfloat16
                    if weight.grad is not None and ours:
                        self._step(weight, group)
                        done.append((weight, weight.grad))
                        weight.grad = None  # torch's own step passes over it
            super().step()
        finally:
            for weight, grad in done:
                weight.grad = grad
        return loss

    def _step(self, weight: Tensor, group: dict[str, Any]) -> None:
        state, mix = self.state[weight], group["momentum"]
        grad = weight.grad
        assert grad is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        momentum = local(state["momentum_buffer"]).lerp_(local(grad), 1 - mix)
        combined = torch.empty_like(grad)
        local(combined).copy_(local(grad).lerp(momentum, mix) if group["nesterov"] else momentum)
        update = orthogonalised(
            whole(combined).to(self.dtype), group["ns_coefficients"], group["ns_steps"], group["eps"]
        )
        rate = group["lr"] * _RMS * math.sqrt(max(weight.shape))
        own = local(weight).mul_(1 - group["lr"] * group["weight_decay"])
        own.add_(local(part_like(weight, update)), alpha=-rate)


def orthogonalised(
    matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """The nearest matrix with orthonormal rows or columns, about: Newton-Schulz iterations on the singular values.

    Args:
        matrix: `[rows, columns]`, of the dtype that is computed in.
        coefficients: of x, x^3 and x^5.
        steps: iterations.
        eps: least norm that is divided by.
    """
    a, b, c = coefficients
    wide = len(matrix) <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T
