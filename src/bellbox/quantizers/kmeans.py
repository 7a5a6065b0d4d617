"""K-means codebooks, "1-Bit Wonder" (arXiv 2602.15563): the n best levels for one weight, found once.

Weights only. Each group of 64 entries along in_features is divided by its own scale s (mean|w| up to 4 levels, max|w|
above); n centroids of the whole tensor then stand for w/s. They are fitted by Lloyd's iteration when the layer is
prepared, and again by whoever calls `initialize` later: the paper trains in full precision first and fits then.

The fit is exact and repeatable: values are sorted once, an iteration is n sums of sorted runs, in fp64 on the CPU, from
a start at equal shares. So ranks that hold the same weight find the same centroids without talking.
"""

from __future__ import annotations

import math
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


def lloyd_max(values: Tensor, n: int) -> Tensor:
    """The n centroids, fp64 and rising, to which Lloyd's iteration on all `values` converges (or stops at 200)."""
    ordered = values.detach().to("cpu", torch.float64).flatten().sort().values
    sums = torch.cat((torch.zeros(1, dtype=torch.float64), ordered.cumsum(0)))
    ends = torch.linspace(0, len(ordered), n + 1, dtype=torch.float64).round().long()
    centroids = torch.zeros(n, dtype=torch.float64)
    for _ in range(ITERATIONS):
        sizes = ends.diff()
        means = sums[ends].diff() / sizes.clamp(min=1)
        centroids = torch.where(sizes > 0, means, centroids).sort().values  # an empty run keeps its centroid
        cuts = torch.searchsorted(ordered, (centroids[:-1] + centroids[1:]) / 2)
        new = torch.cat((ends[:1], cuts, ends[-1:]))
        if torch.equal(new, ends):
            break
        ends = new
    return centroids


class KMeans(Codebook, LearnedQuantizer):
    """K-means codebook of one weight; see `Quantizer` for the arguments."""

    method = "kmeans"
    activation_granularities: ClassVar[tuple[Granularity, ...]] = ()

    centroids: Tensor

    def __init__(self, features: int, spec: QuantizerSpec, rows: int | None = None) -> None:
        super().__init__(features, spec, rows)
        self.register_buffer("centroids", unset(spec.levels))
        self._known_centroids: list[float] = []

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
        """Fit the centroids."""
        groups = x.reshape(-1, self.group)
        self.centroids.copy_(lloyd_max(groups / self.measure(groups).clamp(min=1e-8), self.levels.n))

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
        """See `Quantizer.codes_of`; the thresholds are a tensor, which a compiled graph follows."""
        centroids = self.centroids.double()
        return learned_encode(rows, r, (centroids[:-1] + centroids[1:]) / 2)

    def table(self) -> Tensor:
        """See `Codebook.table`."""
        return self.centroids
