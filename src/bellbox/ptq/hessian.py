"""Hessian of a layer's inputs on the calibration text: their second moments, and the largest of each.

The error of a layer's output that a change D of its weights makes is tr(D H D^T), with H = 2/N sum x x^T (GPTQ, arXiv
2210.17323). What error feedback needs of H is the upper Cholesky factor U of its inverse, H^-1 = U^T U.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bellbox.errors import BellboxError


class InputStatistics:
    """Sums over the inputs that a layer has seen.

    Args:
        features: length of an input.
    """

    def __init__(self, features: int) -> None:
        self.rows = 0
        self.largest = torch.zeros(features)
        """Largest magnitude of each input feature, fp32 `[features]`."""
        self._sum = torch.zeros(features, features)

    def add(self, x: Tensor) -> None:
        """Take in inputs `[..., features]`."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        self.rows += len(rows)
        torch.maximum(self.largest, rows.abs().amax(0), out=self.largest)
        self._sum.addmm_(rows.t(), rows)

    def hessian(self) -> Tensor:
        """H, fp32 `[features, features]`; the sums are given up for it."""
        total, self._sum = self._sum, torch.zeros(0)
        return total.mul_(2 / max(self.rows, 1))


def inverse_factor(hessian: Tensor, damping: float, name: str) -> Tensor:
    """U of the damped Hessian, `[features, features]` in its dtype.

    Features that are always zero get a one on the diagonal; `damping` times the mean of the diagonal is added to it.

    Args:
        hessian: H; left as it is.
        damping: at least 0; .01 in GPTQ and BiLLM.
        name: of the layer, for the message.

    Raises:
        BellboxError: it cannot be inverted, or is not finite.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise BellboxError(
            f"{name}: its inputs on the calibration text are not finite; look at the model's weights"
        )
    damped = hessian.clone()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damping * diagonal.mean()
    lower, broken = torch.linalg.cholesky_ex(damped)
    if int(broken) == 0:
        upper, broken = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if int(broken) == 0:
            return upper
    raise BellboxError(
        f"{name}: its Hessian is singular with damping {damping:g}: give more calibration text than its "
        f"{len(hessian):,} inputs, or a larger damping (.01 is usual)"
    )
