"""Muon whose orthogonalisation is that of whole matrices, wherever their parts lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bellbox.core.sharded import is_sharded, local, part_like, whole


class WholeMuon(torch.optim.Muon):
    """`torch.optim.Muon`, which orthogonalises a matrix. Of a sharded one (FSDP2) the update is gathered for it.

    Momentum and weights stay sharded, like those of other optimizers; every process makes the whole update, and takes
    its part. Matrices that are not sharded are left to torch.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """See `torch.optim.Optimizer.step`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        held: list[tuple[Tensor, Tensor]] = []
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None and is_sharded(weight):
                    self._step_sharded(weight, group)
                    held.append((weight, weight.grad))
                    weight.grad = None  # torch's own step passes over it
        try:
            super().step()
        finally:
            for weight, grad in held:
                weight.grad = grad
        return loss

    def _step_sharded(self, weight: Tensor, group: dict[str, Any]) -> None:
        state, mix = self.state[weight], group["momentum"]
        grad = weight.grad
        assert grad is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        momentum = local(state["momentum_buffer"]).lerp_(local(grad), 1 - mix)
        own = local(grad).lerp(momentum, mix) if group["nesterov"] else momentum
        combined = torch.zeros_like(grad)
        local(combined).copy_(own)
        # Of one step from zero without momentum and decay, what is left there is the update alone.
        full = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device).requires_grad_()
        full.grad = whole(combined)
        options = {name: group[name] for name in ("lr", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")}
        torch.optim.Muon([full], momentum=0.0, nesterov=False, weight_decay=0.0, **options).step()
        values = local(weight)
        values.mul_(1 - group["lr"] * group["weight_decay"]).add_(local(part_like(weight, full.detach())))
