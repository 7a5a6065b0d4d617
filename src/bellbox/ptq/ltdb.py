"""LTDB, the learnable transformation of DBellQuant (arXiv 2507.01027): from a single bell to a double one.

Weights have one bell: most lie near zero, where two levels fit worst. A scale s for each input channel, W' = W diag(s),
moves them; its inverse goes into the norm before the layer, so the function stays and costs nothing. s is learned so
that each row's weights gather around two centres, in every block of columns:

    a = mean W',  d = mean |W' - a|,  t+ = a + d,  t- = a - d
    loss      100 mean(|w' - t|^p / |t|^p), t the nearer centre         (DTNP; p = 2 as released, p = 1 an option)
    distance  mean(min(|w' - t+|, |w' - t-|))                           (DTMD; where it rises first, learning stops)

Each block of columns learns by itself: both are means over its weights, and it stops by itself. The start takes
outliers of the activations into the weights: s_j = max|X_j|^e / (max_r |W_rj|)^(1-e). Layers that read the same norm
must share one s. `released` learns one for each, from e = .85, and takes, for each channel, that of the largest
magnitude; `clean` learns one for all their rows together, from e = .5 (docs/ptq.md says why).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bellbox.core.binarize import BLOCK, Variant
from bellbox.errors import BellboxError

FLOOR = 1e-5
"""Least magnitude of a scale."""
START: dict[Variant, float] = {"released": 0.85, "clean": 0.5}
"""Exponent e of the start."""
_ROWS = 128


@dataclass(frozen=True)
class Learned:
    """Scales for the layers behind one norm, and how learning went."""

    scale: Tensor
    """fp32 `[in]`; none is zero."""
    steps: float
    """Steps taken, mean over the blocks of columns."""
    loss: tuple[float, float]
    """DTNP at the start and at the kept scale, mean over the weights."""


def start_scale(largest: Tensor, weight: Tensor, exponent: float) -> Tensor:
    """Where learning begins, fp32 `[in]`.

    Args:
        largest: `[in]`, largest magnitude of each input channel.
        weight: `[out, in]`.
        exponent: e.
    """
    weights = weight.abs().amax(0).clamp(min=FLOOR)
    return (largest.clamp(min=FLOOR) ** exponent / weights ** (1 - exponent)).clamp(min=FLOOR)


def double_bell(weight: Tensor, power: int = 2, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """DTNP and DTMD of a weight matrix, scalars; gradients reach the weight also through the centres.

    Args:
        weight: float `[out, in]`.
        power: p, 1 or 2.
        block: columns of a block.
    """
    loss, distance = weight.new_zeros(()), weight.new_zeros(())
    for w in _blocks(weight, block):
        mean = w.mean(-1, keepdim=True)
        apart = (w - mean).abs().mean(-1, keepdim=True)
        low, high = mean - apart, mean + apart
        centre = torch.where(w >= mean, high, low)
        miss = (w - centre).abs()
        ratio = miss / centre.abs().clamp(min=1e-8)
        loss = loss + (ratio if power == 1 else ratio.square()).sum()
        distance = distance + miss.detach().sum()
    return 100 * loss / weight.numel(), distance / weight.numel()


def _blocks(weight: Tensor, block: int) -> list[Tensor]:
    """`[out, blocks, columns]`: all whole blocks, and what is left of the columns."""
    rows, columns = weight.shape
    whole = columns // block * block
    parts = [weight[:, :whole].reshape(rows, -1, block), weight[:, whole:].unsqueeze(1)]
    return [part for part in parts if part.numel()]


def learn_scale(
    weights: Sequence[Tensor],
    largest: Tensor,
    *,
    variant: Variant = "clean",
    exponent: float | None = None,
    power: int = 2,
    block: int = BLOCK,
    lr: float = 0.01,
    most_steps: int = 200,
) -> Learned:
    """Learn the scale of the layers that read one norm.

    Args:
        weights: of these layers, each fp32 `[out, in]`.
        largest: `[in]`, largest magnitude of each input channel on the calibration text.
        variant: how several layers come to one scale.
        exponent: e of the start; None for the variant's own.
        power: p of the loss, 1 or 2.
        block: columns of a block.
        lr: of plain SGD.
        most_steps: at most, in each block.
    """
    weights = [weight.detach() for weight in weights]
    exponent = START[variant] if exponent is None else exponent
    groups = [torch.cat(weights)] if variant == "clean" else weights
    scales: list[Tensor] = []
    found: list[Learned] = []
    for weight in groups:
        start = start_scale(largest, weight, exponent)
        parts = zip(weight.split(block, 1), start.split(block), strict=True)
        blocks = [_descend(w.contiguous(), s, power, lr, most_steps) for w, s in parts]
        scales.append(torch.cat([one.scale for one in blocks]))
        found += blocks
    stacked = torch.stack(scales)
    merged = stacked.gather(0, stacked.abs().argmax(0, keepdim=True))[0]
    columns = sum(len(one.scale) for one in found)
    first, last = (sum(one.loss[at] * len(one.scale) for one in found) / columns for at in (0, 1))
    return Learned(merged, sum(one.steps for one in found) / len(found), (first, last))


@torch.no_grad()
def _descend(weight: Tensor, start: Tensor, power: int, lr: float, most_steps: int) -> Learned:
    """SGD on one block of columns until DTMD rises for the first time; the scale of the lowest loss is kept."""
    scale = start.clone()
    best, best_loss, first_loss = scale.clone(), float("inf"), float("inf")
    before, steps = float("inf"), 0
    for step in range(most_steps + 1):
        loss, distance, gradient = slope(weight, scale, power)
        first_loss = loss if step == 0 else first_loss
        if loss < best_loss:
            best, best_loss = scale.clone(), loss
        if distance > before or step == most_steps:
            break
        before, steps = distance, step + 1
        scale -= lr * gradient
        scale = torch.where(scale.abs() < FLOOR, FLOOR, scale)
    return Learned(best, steps, (first_loss, best_loss))


def slope(weight: Tensor, scale: Tensor, power: int = 2) -> tuple[float, float, Tensor]:
    """DTNP and DTMD of `weight * scale`, and the gradient of DTNP with respect to the scale, in closed form.

    With r = w'/t - 1 and f = |r|^p, df/dw' = p |r|^(p-1) sign(r) / t and df/dt = -df/dw' w'/t reach t = a +- d, and
    from there all weights of the row's block. Some rows at a time, which stay in the cache: a third of autograd's time.

    Args:
        weight: float `[out, in]`, one block of columns.
        scale: `[in]`.
        power: p, 1 or 2.
    """
    gradient = torch.zeros_like(scale)
    loss = distance = 0.0
    for rows in weight.split(_ROWS):
        w = rows * scale
        mean = w.mean(1, keepdim=True)
        side = (w - mean).sign_()
        side[side == 0] = 1
        apart = (w - mean).abs_().mean(1, keepdim=True)
        centre = torch.addcmul(mean, side, apart)
        centre = torch.where(centre.abs() < 1e-8, 1e-8 * side, centre)
        distance += float((w - centre).abs_().sum())
        share = w / centre
        off = share - 1
        loss += float(off.abs().sum() if power == 1 else off.square().sum())
        near = (off.sign() if power == 1 else 2 * off) / centre
        to_centre = -near * share
        to_apart = (to_centre * side).sum(1, keepdim=True)
        to_mean = to_centre.sum(1, keepdim=True) - to_apart * side.mean(1, keepdim=True)
        near += (to_apart * side + to_mean) / w.shape[1]
        gradient += (near * rows).sum(0)
    return 100 * loss / weight.numel(), distance / weight.numel(), gradient * (100 / weight.numel())


@torch.no_grad()
def fold(norm: nn.Module, layers: Sequence[nn.Linear], scale: Tensor, name: str = "the norm") -> None:
    """Scale the layers' input channels, and the norm before them by the inverse: the same function.

    Args:
        norm: with a `weight` of one number a channel, and perhaps a `bias` (LayerNorm).
        layers: all that read the norm's output; nothing else may.
        scale: `[in]`, none zero.
        name: of the norm, for the message.

    Raises:
        BellboxError: the norm has no weight of that size to fold into.
    """
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if not isinstance(weight, Tensor) or weight.shape != scale.shape:
        raise BellboxError(
            f"{name}: {type(norm).__name__} has no weight of {len(scale)} numbers, and DBellQuant folds its scale into "
            "the norm before a layer; use method billm"
        )
    weight /= scale
    if isinstance(bias, Tensor):
        bias /= scale
    for layer in layers:
        layer.weight *= scale


def bells(weight: Tensor, block: int = BLOCK, reach: float = 4.0, bins: int = 80) -> list[int]:
    """How the weights lie around their row's and block's centres: a histogram of (w - a) / d, for a picture.

    Two bells stand near -1 and +1, one at 0.

    Args:
        weight: `[out, in]`.
        block: columns of a block.
        reach: the outermost bins hold what lies further out, too.
        bins: equal ones from -reach to reach.
    """
    counts = torch.zeros(bins, dtype=torch.float64)
    for w in _blocks(weight.detach(), block):
        centred = w - w.mean(-1, keepdim=True)
        apart = centred.abs().mean(-1, keepdim=True).clamp(min=1e-30)
        inside = (centred / apart).clamp(-reach, reach)
        counts += torch.histc(inside, bins, -reach, reach).double()
    return [int(count) for count in counts]
