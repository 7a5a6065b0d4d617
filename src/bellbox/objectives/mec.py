"""Maximum entropy coding as a training objective: a MEC-style regulariser, *reconstructed from an abstract*.

MEC-Quant (arXiv 2509.15514) trains low-bit networks with one more term, which makes the representation carry as much as
it can. Its full text could not be had. The abstract says: maximise the entropy of the representation, with the least
length of a lossy code as its surrogate, in the form of a mixture of experts, which is fast and handles long tails. What
stands here follows MEC (arXiv 2210.11464), from which the coding length is known; the form of the experts is our own.
So this is no reproduction, and a number measured with it says nothing about the paper's.

m features Z of dimension d, centred over the batch, each row then of length 1, coded with a distortion e^2 a dimension:

    L(Z) = logdet(I + lambda Z^T Z),  lambda = d / (m e^2);  e^2 = 64 as in MEC's code
    loss = -L / (lambda m), from -1 (as spread out as can be) to 0

since logdet(I + A) <= tr A = lambda m. By Sylvester's identity Z Z^T serves as well: the smaller one is taken, and its
determinant by Cholesky in fp32. Three options:

- `taylor` sums the first terms of log(1 + x) = x - x^2/2 + ... in place of the determinant, as MEC does. It is right
  only where lambda times the largest eigenvalue of Z^T Z is below 1, which is checked. Features that are not centred
  break it: 256 random post-ReLU features of dimension 512 have L = 6.6, and four terms give -.7.
- `experts` K splits the channels into K groups of like variance, so that the long tail gets an expert of its own, and
  adds up their lengths. Where d is the smaller side, the time of the determinants falls as 1/K^2 and that of the
  products as 1/K; the rest stays (docs/training.md has measured times). The sum is never less than L (Fischer's
  inequality: a determinant is at most the product of its diagonal blocks'): what correlation between groups costs, it
  does not see.
- `two_view_loss` takes features of the same inputs from two views, or from a teacher.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor

from bellbox.errors import BellboxError

Form = Literal["exact", "taylor"]
DISTORTION = 64.0
"""e^2: MEC's code divides by 64 / d."""
ORDER = 4
"""Terms of the series, as in MEC."""


def normalised(features: Tensor) -> Tensor:
    """Centred over the batch, then every row of length 1; fp32 (fp64 stays) `[m, d]`.

    Args:
        features: float `[m, d]`. A row that equals the mean becomes zero.

    Raises:
        BellboxError: another shape, or fewer than three rows: two centred rows are opposite, whatever they were.
    """
    if features.dim() != 2 or len(features) < 3:
        raise BellboxError(
            f"mec: features of shape {tuple(features.shape)}: needs [m, d] with at least 3 samples in a forward pass"
        )
    wide = features if features.dtype == torch.float64 else features.float()
    centred = wide - wide.mean(0)
    return centred / centred.norm(dim=1, keepdim=True).clamp(min=1e-12)


def spectrum(features: Tensor) -> Tensor:
    """How the features' variance is spread over directions, once they are as the term sees them: `[min(m, d)]`.

    The eigenvalues of Z^T Z, the largest first, over their sum (that of lambda Z^T Z is lambda m). The term is lowest
    where all d are equal; its distance from -1 comes from the large ones.

    Args:
        features: float `[m, d]`, not yet normalised.

    Raises:
        BellboxError: as `normalised`, or features that are not finite.
    """
    z = normalised(features.double())
    if not bool(z.isfinite().all()):
        raise BellboxError("mec: features that are not finite have no spectrum")
    values = torch.linalg.eigvalsh(z.t() @ z if z.shape[1] <= len(z) else z @ z.t()).flip(0).clamp(min=0)
    return values / values.sum().clamp(min=1e-300)


def coding_length(
    z: Tensor,
    distortion: float = DISTORTION,
    *,
    form: Form = "exact",
    order: int = ORDER,
    experts: int = 1,
) -> Tensor:
    """L, or its bound by experts, of features that are used as they are: a scalar, in nats.

    Args:
        z: float `[m, d]`, such as `normalised` gives.
        distortion: e^2.
        form: the determinant itself, or the series.
        order: terms of the series.
        experts: K, from 1 to d.

    Raises:
        BellboxError: an option out of range. (Features that are not finite give NaN.)
    """
    _check(z.shape[1], distortion, form, order, experts)
    with torch.autocast(z.device.type, enabled=False):
        rate = z.shape[1] / (len(z) * distortion)
        groups = [z] if experts == 1 else _by_variance(z, experts)
        lengths = [_length(group, group, rate, form, order) for group in groups]
    return torch.stack(lengths).sum()


def mec_loss(
    features: Tensor,
    distortion: float = DISTORTION,
    *,
    form: Form = "exact",
    order: int = ORDER,
    experts: int = 1,
) -> Tensor:
    """What to add to a loss, times a weight, for features that carry more: a scalar in [-1, 0].

    Args:
        features: float `[m, d]`, not yet normalised; of a distributed batch, `gather_rows` of each process' own.
        distortion: as for `coding_length`, and so are the rest.

    Raises:
        BellboxError: a shape or an option out of range.
    """
    z = normalised(features)
    length = coding_length(z, distortion, form=form, order=order, experts=experts)
    return -length * (distortion / z.shape[1])


def two_view_loss(
    features: Tensor,
    others: Tensor,
    distortion: float = DISTORTION,
    *,
    teacher: bool = False,
    form: Form = "exact",
    order: int = ORDER,
) -> Tensor:
    """MEC's own objective: -log|det(I + lambda Z^T P)| / (lambda m), for features P of the same inputs; a scalar.

    It asks for both at once: features that carry much, and that agree. Z^T P is not symmetric, so the determinant is
    taken by LU; where the views disagree so much that it is not positive, there is no length, and a warning says so.

    Args:
        features: float `[m, d]`.
        others: likewise, of another view of the same inputs, in the same order.
        distortion: e^2.
        teacher: whether `others` are a teacher's, which no gradient reaches.
        form: the determinant itself, or MEC's series.
        order: terms of the series.

    Raises:
        BellboxError: shapes that differ, or an option out of range.
    """
    if features.shape != others.shape:
        raise BellboxError(
            f"the two views have shapes {tuple(features.shape)} and {tuple(others.shape)}, not one"
        )
    z, p = normalised(features), normalised(others.detach() if teacher else others)
    _check(z.shape[1], distortion, form, order, 1)
    rate = z.shape[1] / (len(z) * distortion)
    with torch.autocast(z.device.type, enabled=False):
        return -_length(z, p, rate, form, order) * (distortion / z.shape[1])


def _check(dimension: int, distortion: float, form: str, order: int, experts: int) -> None:
    for name, value, ok, limit in (
        ("distortion", distortion, 0 < distortion < float("inf"), "above 0"),
        ("form", form, form in ("exact", "taylor"), "exact or taylor"),
        ("order", order, order >= 1, "at least 1"),
        ("experts", experts, 1 <= experts <= dimension, f"from 1 to the {dimension} channels"),
    ):
        if not ok:
            raise BellboxError(f"mec: {name} is {value!r}, must be {limit}")


def _by_variance(z: Tensor, experts: int) -> list[Tensor]:
    """The channels in groups of like variance, the largest first; sizes differ by one at most."""
    order = z.detach().var(0, correction=0).argsort(descending=True, stable=True)
    return [z[:, channels] for channels in order.tensor_split(experts)]


def _length(z: Tensor, p: Tensor, rate: float, form: Form, order: int) -> Tensor:
    """log|det(I + rate Z^T P)|, on the smaller side."""
    product = rate * (z.t() @ p if z.shape[1] <= len(z) else z @ p.t())
    if form == "taylor":
        return _series(product, order, symmetric=z is p)
    size = len(product)
    whole = product + torch.eye(size, dtype=product.dtype, device=product.device)
    if z is p:
        factor, failed = torch.linalg.cholesky_ex(whole)
        length = 2 * factor.diagonal().log().sum()
        return torch.where(failed == 0, length, length.new_tensor(float("nan")))
    sign, length = torch.linalg.slogdet(whole)
    if float(sign.detach()) <= 0 and not bool(length.detach().isnan()):
        warnings.warn(
            f"mec: the determinant of the two views is not positive ({float(sign):g}): they disagree too much",
            stacklevel=4,
        )
    return length


def _radius(product: Tensor, symmetric: bool) -> float:
    """The largest |eigenvalue|; NaN where the matrix is not finite."""
    if not bool(product.isfinite().all()):
        return float("nan")
    values = torch.linalg.eigvalsh(product) if symmetric else torch.linalg.eigvals(product)
    return float(values.abs().max())


def _series(product: Tensor, order: int, symmetric: bool) -> Tensor:
    """tr(A - A^2/2 + A^3/3 - ...)."""
    radius = _radius(product.detach(), symmetric)
    if radius >= 1:
        warnings.warn(
            f"mec: the series diverges: its spectral radius is {radius:.3g}, must be below 1; centre the features, "
            "raise the distortion, or use form='exact'",
            stacklevel=5,
        )
    power, total = product, product.diagonal().sum()
    for k in range(2, order + 1):
        power = power @ product
        total = total + (-1) ** (k + 1) / k * power.diagonal().sum()
    return total
