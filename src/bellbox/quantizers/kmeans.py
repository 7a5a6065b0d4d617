"""K-means codebooks, "1-Bit Wonder" (arXiv 2602.15563): the n best levels for one weight, fitted now and then.

Weights only. Each group of 64 entries along in_features is divided by its own scale s (mean|w| up to 4 levels, max|w|
above); n centroids c of the whole tensor then stand for w/s. They are fitted by Lloyd's iteration when the layer is
prepared, and again every `refit_every` steps (`bellbox.optim.refit_codebooks`). The paper trains in full precision
first and fits then: in a run, `phases.quantized` below 1.

What a fit minimises over c, nearest(v) being the centroid next to v:

    sum_i (w_i/s_i - nearest(w_i/s_i))^2                 as published
    sum_i F_i (w_i - s_i nearest(w_i/s_i))^2             `fisher`: F_i is the mean squared gradient of w_i

The second is what the loss would rise by to second order, with the diagonal of the empirical Fisher information for its
curvature; in units of the scales, a weight of F_i s_i^2 on each value. It is ours, the gradient stays the same.

The fit is exact and repeatable: values are sorted once, an iteration is n sums of sorted runs, in fp64 on the CPU, from
a start at equal shares. So ranks that hold the same weight find the same centroids without talking.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bellbox.core.grid import Levels
from bellbox.errors import BellboxError
from bellbox.ops.learned_thresholds import learned_encode
from bellbox.quantizers.codebook import Codebook, levels_between
from bellbox.quantizers.learned import LearnedQuantizer, unset
from bellbox.quantizers.spec import Granularity, QuantizerSpec

GROUP = 64
ITERATIONS = 200


@dataclass(frozen=True)
class KMeansOptions:
    """When codebooks are fitted again, and what an error counts."""

    refit_every: int = 0
    """Training steps between fits; 0: once, when the layer is prepared."""
    fisher: bool = False
    """Whether later fits weigh squared errors by the squared gradients that the optimizer has seen."""

    def __post_init__(self) -> None:
        if self.refit_every < 0:
            raise BellboxError(f"refit_every {self.refit_every}: must be 0 or a number of steps, such as 100")


def lloyd_max(values: Tensor, n: int, weights: Tensor | None = None) -> Tensor:
    """The n centroids to which Lloyd's iteration on all `values` converges (or stops at 200).

    Args:
        values: any shape, finite.
        n: how many centroids.
        weights: what the squared error of each value counts, at least 0, the shape of `values`; alike where None or
            where all are 0.

    Returns:
        fp64 `[n]`, rising, on the CPU.
    """
    runs = _Runs(values, weights)
    ends = runs.equal_shares(n)
    centroids = torch.zeros(n, dtype=torch.float64)
    for _ in range(ITERATIONS):
        centroids = runs.means(ends, centroids).sort().values
        cuts = torch.searchsorted(runs.ordered, (centroids[:-1] + centroids[1:]) / 2)
        new = torch.cat((ends[:1], cuts, ends[-1:]))
        if torch.equal(new, ends):
            break
        ends = new
    return centroids


class _Runs:
    """Sorted values, and the means of runs of them."""

    def __init__(self, values: Tensor, weights: Tensor | None) -> None:
        self.ordered, order = values.detach().to("cpu", torch.float64).flatten().sort()
        mass = None if weights is None else weights.detach().to("cpu", torch.float64).flatten()[order]
        self.masses = None if mass is None or not bool(mass.any()) else _running(mass)
        self.sums = _running(self.ordered if self.masses is None or mass is None else self.ordered * mass)

    def equal_shares(self, n: int) -> Tensor:
        """Ends of n runs of equal mass: places among the sorted values, `[n + 1]`."""
        count = len(self.ordered)
        if self.masses is None:
            return torch.linspace(0, count, n + 1, dtype=torch.float64).round().long()
        total = float(self.masses[-1])
        inner = torch.searchsorted(self.masses, torch.linspace(0, total, n + 1, dtype=torch.float64)[1:-1])
        return torch.cat((torch.tensor([0]), inner, torch.tensor([count])))

    def means(self, ends: Tensor, otherwise: Tensor) -> Tensor:
        """Of each run; an empty one, or one that counts nothing, keeps what it had."""
        totals = self.sums[ends].diff()
        if self.masses is None:
            sizes = ends.diff()
            return torch.where(sizes > 0, totals / sizes.clamp(min=1), otherwise)
        sizes = self.masses[ends].diff()
        found = totals / torch.where(sizes > 0, sizes, 1.0)
        # Of a run with next to no mass the difference of large sums is noise: its mean lies within it all the same.
        last = len(self.ordered) - 1
        low, high = self.ordered[ends[:-1].clamp(max=last)], self.ordered[(ends[1:] - 1).clamp(min=0)]
        return torch.where((sizes > 0) & (ends.diff() > 0), found.clamp(low, high), otherwise)


def _running(values: Tensor) -> Tensor:
    """Sums of the first 0, 1, ... values."""
    return torch.cat((torch.zeros(1, dtype=torch.float64), values.cumsum(0)))


class KMeans(Codebook, LearnedQuantizer):
    """K-means codebook of one weight; see `Quantizer` for the arguments."""

    method = "kmeans"
    Options = KMeansOptions
    training_options = frozenset({"refit_every", "fisher"})
    activation_granularities: ClassVar[tuple[Granularity, ...]] = ()
    refits: ClassVar[bool] = True

    options: KMeansOptions
    centroids: Tensor

    def __init__(self, features: int, spec: QuantizerSpec, rows: int | None = None) -> None:
        super().__init__(features, spec, rows)
        self.register_buffer("centroids", unset(spec.levels))
        self._known_centroids: list[float] = []
        self.refit_every, self.by_squared_gradients = self.options.refit_every, self.options.fisher

    def make_levels(self, n: int, zero_point: float | None) -> Levels:
        """Thresholds halfway between centroids; of evenly spaced ones until they are fitted."""
        self.group = math.gcd(self.features, GROUP)
        if self.block != 1:
            raise BellboxError("kmeans fits its levels to the weight as it is, without a rotation: block=1")
        if zero_point is not None:
            raise BellboxError("kmeans has no zero point to choose: its levels are fitted")
        return levels_between(torch.linspace(-1, 1, n).tolist())

    def measure(self, rows: Tensor) -> Tensor:
        """mean|w| of each group up to 4 levels, max|w| above, fp64."""
        size = rows.abs().to(torch.float64)
        return size.mean(-1, keepdim=True) if self.levels.n <= 4 else size.amax(-1, keepdim=True)

    def set_from(self, x: Tensor) -> None:
        """Fit the centroids, values counting alike."""
        self._fit(x)

    @torch.no_grad()
    def refit(self, x: Tensor, squared_gradients: Tensor | None = None) -> None:
        """Fit the centroids to the weight, entries weighed by their squared gradients where these are given."""
        self._fit(x.detach().to(torch.float64), squared_gradients)

    def _fit(self, x: Tensor, squared_gradients: Tensor | None = None) -> None:
        groups = x.reshape(-1, self.group)
        scale, weights = self.measure(groups).clamp(min=1e-8), None
        if squared_gradients is not None:
            weights = squared_gradients.to(torch.float64).reshape(groups.shape) * scale.square()
        self.centroids.copy_(lloyd_max(groups / scale, self.levels.n, weights))

    @property
    def levels(self) -> Levels:
        """With the thresholds between the centroids of now. (A compiled graph cannot know them: see `codes_of`.)"""
        if not torch.compiler.is_compiling() and self.is_set:
            # By value: a buffer may be changed past its version counter, as through `.data`.
            known = self.centroids.tolist()
            if known != self._known_centroids:
                self._levels, self._known_centroids = levels_between(known), known
        return self._levels

    def codes_of(self, rows: Tensor, r: Tensor) -> Tensor:
        """uint8 codes of `[rows, features]`; the thresholds are a tensor, which a compiled graph follows."""
        centroids = self.centroids.double()
        return learned_encode(rows, r, (centroids[:-1] + centroids[1:]) / 2)

    def table(self) -> Tensor:
        """Values of the codes, rising, `[n]`, in units of the scale."""
        return self.centroids
