"""GPUs and how they are joined, by their data sheets: none of these numbers was measured here."""

from __future__ import annotations

from dataclasses import dataclass

from bellbox.errors import BellboxError


@dataclass(frozen=True)
class Gpu:
    """Rates of one GPU, as its maker states them."""

    products: float
    """bf16 operations a second of the tensor cores, without sparsity."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes a second of its memory."""
    link: float
    """Bytes a second, each way, to the other GPUs of its node."""
    network: float
    """Bytes a second, each way, to other nodes; of the maker's own servers."""


GPUS = {
    # NVIDIA's data sheets: A100 80GB SXM, H100 SXM, H200 SXM; DGX A100, H100 and H200 for the network.
    "a100": Gpu(312e12, 80e9, 2.039e12, 300e9, 25e9),
    "h100": Gpu(989e12, 80e9, 3.35e12, 450e9, 50e9),
    "h200": Gpu(989e12, 141e9, 4.8e12, 450e9, 50e9),
}
GPUS_A_NODE = 8
LATENCY = 10e-6
"""Seconds of one hop of a collective operation."""


@dataclass(frozen=True)
class Cluster:
    """Equal GPUs in nodes."""

    gpu: Gpu
    gpus: int
    a_node: int = GPUS_A_NODE

    def __post_init__(self) -> None:
        if not 1 <= self.gpus <= 1 << 20:
            raise BellboxError(f"{self.gpus} GPUs: must be from 1 to {1 << 20:,}")
        if self.a_node < 1:
            raise BellboxError(f"{self.a_node} GPUs a node: must be at least 1")
        if self.gpus > self.a_node and self.gpus % self.a_node:
            raise BellboxError(
                f"{self.gpus} GPUs are no whole number of nodes of {self.a_node}; take a multiple of {self.a_node}"
            )

    @property
    def nodes(self) -> int:
        """How many there are."""
        return max(1, self.gpus // self.a_node)

    def gather(self, size: float, ranks: int | None = None) -> float:
        """Seconds of an all-gather or reduce-scatter of so many bytes in a ring of ranks (all where None).

        Each rank sends (n - 1)/n of the bytes, at the speed of the slowest link of the ring.
        """
        n = self.gpus if ranks is None else ranks
        if n < 2:
            return 0.0
        speed = self.gpu.link if n <= self.a_node else min(self.gpu.link, self.gpu.network)
        return size * (n - 1) / n / speed + (n - 1) * LATENCY

    def reduce(self, size: float) -> float:
        """Seconds of an all-reduce: within nodes, over nodes by all GPUs at once, within nodes."""
        if self.nodes == 1:
            return 2 * self.gather(size)
        n = self.nodes
        across = 2 * (n - 1) / n * (size / self.a_node) / self.gpu.network + 2 * (n - 1) * LATENCY
        return 2 * self.gather(size, self.a_node) + across
