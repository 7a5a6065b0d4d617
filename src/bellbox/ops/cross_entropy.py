"""The loss of next tokens, from logits as they come: bf16 ones are never copied to fp32.

Of a small model with a vocabulary of thousands, torch's chain (a copy to fp32, its logarithms of shares, their
gradient, a copy back) was a third of a training step on a CPU. Here a forward reads the logits and keeps a number a
row; the backward reads them again. Each step is one rounding in a fixed order, so every kernel path has one result:
exponentials of `ops.activate`, summed by sixteen lanes over 256 numbers in fp32, beyond in fp64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bellbox.errors import BellboxError
from bellbox.ops.activate import exponential
from bellbox.ops.dispatch import Operation, is_unwatched
from bellbox.ops.transforms import refuse_second_derivative

_LANES, _STEPS = 16, 16
_DTYPES = (torch.float32, torch.bfloat16)


def check(logits: Tensor, targets: Tensor) -> None:
    """Refuse logits and targets that do not belong together.

    Raises:
        BellboxError: other shapes or dtypes, or a target that is no class.
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1] or targets.dtype != torch.int64:
        raise BellboxError(
            f"cross_entropy of logits {tuple(logits.shape)} and targets {targets.dtype} {tuple(targets.shape)}: "
            "they must be [rows, classes] and int64 [rows]"
        )
    if logits.dtype not in _DTYPES:
        raise BellboxError(f"cross_entropy of {logits.dtype}: logits must be float32 or bfloat16")
    if targets.numel() and not (int(targets.min()) >= 0 and int(targets.max()) < logits.shape[1]):
        raise BellboxError(f"a target is none of the {logits.shape[1]} classes")


def check_backward(logits: Tensor, targets: Tensor, log_sums: Tensor, grads: Tensor) -> None:
    """Likewise of the backward.

    Raises:
        BellboxError: as `check`, or numbers of rows that are not fp32, one a row.
    """
    check(logits, targets)
    for each in (log_sums, grads):
        if each.shape != targets.shape or each.dtype != torch.float32:
            raise BellboxError(f"cross_entropy: {each.dtype} {tuple(each.shape)} is no fp32 number a row")


def _reference(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and logarithms of the sums of exponentials, fp32 `[rows]` each."""
    check(logits, targets)
    x = logits.detach().float()
    largest = x.amax(-1, keepdim=True) if x.numel() else x.new_empty(len(x), 1)
    e = exponential(x - largest)
    e = F.pad(e, (0, -e.shape[1] % (_STEPS * _LANES))).unflatten(1, (-1, _STEPS, _LANES))
    sums = torch.zeros_like(e[:, :, 0])
    for step in e.unbind(2):
        sums = sums + step
    wide = sums.double().cumsum(1)[:, -1]  # one after the other
    while wide.shape[1] > 1:
        wide = wide[:, : wide.shape[1] // 2] + wide[:, wide.shape[1] // 2 :]
    log_sums = wide[:, 0].log() + largest[:, 0].double()
    losses = log_sums - x.gather(1, targets[:, None])[:, 0].double()
    return losses.float(), log_sums.float()


def _fake(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    made = logits.new_empty(targets.shape, dtype=torch.float32)
    return made, torch.empty_like(made)


def _reference_backward(logits: Tensor, targets: Tensor, log_sums: Tensor, grads: Tensor) -> Tensor:
    """The gradient of the logits, in their dtype."""
    check_backward(logits, targets, log_sums, grads)
    shares = exponential(logits.detach().float() - log_sums[:, None])
    shares[torch.arange(len(targets)), targets] -= 1.0
    return (shares * grads[:, None]).to(logits.dtype)


def _fake_backward(logits: Tensor, targets: Tensor, log_sums: Tensor, grads: Tensor) -> Tensor:
    del targets, log_sums, grads
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


forward = Operation("cross_entropy(Tensor logits, Tensor targets) -> (Tensor, Tensor)", _reference, _fake)
"""See `_reference`."""
backward = Operation(
    "cross_entropy_backward(Tensor logits, Tensor targets, Tensor log_sums, Tensor grads) -> Tensor",
    _reference_backward,
    _fake_backward,
)
"""See `_reference_backward`."""


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        losses, log_sums = forward.direct(logits.detach(), targets)
        ctx.save_for_backward(logits, targets, log_sums)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_second_derivative()
        logits, targets, log_sums = ctx.saved_tensors
        return backward.direct(logits.detach(), targets, log_sums, grads[0].contiguous()), None


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of `-log softmax(logits)[target]` over rows, in fp32; on a CPU by one read of the logits, see the module.

    Elsewhere, for other dtypes, and where a compiler, a tracer or a transform looks on, it is torch's.

    Args:
        logits: `[rows, classes]`.
        targets: int64 `[rows]`, each a class.

    Returns:
        fp32 `[]` in nats (fp64 for fp64); NaN without rows.

    Raises:
        BellboxError: see `check`; a second derivative is asked for.

    Examples:
        >>> from bellbox.ops.cross_entropy import cross_entropy
        >>> cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor(1.3863)
    """
    if logits.is_cpu and logits.dtype in _DTYPES and is_unwatched(logits):
        return _CrossEntropy.apply(logits, targets).mean()  # type: ignore[union-attr]
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), targets)
