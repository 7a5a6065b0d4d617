"""The decode step with fixed shapes, recorded once as a CUDA graph and replayed: not tried on a GPU yet.

At one token a step a GPU waits for Python. A graph has no Python, but it replays the same addresses and shapes. So
token and position lie in tensors that are written before each replay (`fixed.py`). The step itself (`StaticSteps`) runs
anywhere; recording it (`GraphSteps`) takes CUDA. `generate` takes this way when asked (`fixed_shapes`), not by itself
before somebody has seen it run; benchmarks/gpu does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bellbox.errors import BellboxError
from bellbox.inference.fixed import forward_at
from bellbox.models import KVCache, Llama


class StaticSteps:
    """Steps of one token a sequence whose shapes do not depend on how many came before.

    Args:
        model: a LLaMA in evaluation, of floats or packed, with q, k and v as three layers.
        cache: made by the model, its prompt already in; fp32 or the model's dtype, not coded.

    Raises:
        BellboxError: another model, or a coded cache.
    """

    def __init__(self, model: Llama, cache: KVCache) -> None:
        if not isinstance(model, Llama) or model.config.fused_qkv:
            raise BellboxError("steps of fixed shapes are for a LLaMA with q, k and v as three layers")
        if cache.precision != "fp32":
            raise BellboxError(
                f"steps of fixed shapes read no {cache.precision} cache: make it with precision fp32"
            )
        self._model, self._cache = model, cache
        device = cache.keys[0].device
        self._token = torch.zeros((cache.batch, 1), dtype=torch.int64, device=device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)

    def _forget_what_follows(self) -> None:
        """Attention multiplies what the mask hides by zero, and a NaN left there would stay one."""
        for held in (*self._cache.keys, *self._cache.values):
            held[:, :, self._cache.length :] = 0

    @torch.no_grad()
    def step(self, input_ids: Tensor) -> Tensor:
        """Logits `[B, 1, vocab_size]` after one more token of each sequence, `[B, 1]` int64; good until the next step.

        Raises:
            BellboxError: the cache is full or for another batch.
        """
        self._cache.check_room(*input_ids.shape)
        if self._fresh():
            self._forget_what_follows()
        self._token.copy_(input_ids)
        self._position.fill_(self._cache.length)
        logits = self._run()
        self._cache.advance(1)
        self._expected = self._cache.length
        return logits

    _expected = -1

    def _fresh(self) -> bool:
        """Whether the cache was moved by somebody else since the last step: by a prompt, a reset."""
        return self._cache.length != self._expected

    def _run(self) -> Tensor:
        return self._forward()

    def _forward(self) -> Tensor:
        cache = self._cache
        return forward_at(self._model, self._token, self._position, cache.keys, cache.values)


class GraphSteps(StaticSteps):
    """`StaticSteps` as a CUDA graph, recorded at the first step. Not tried on a GPU yet.

    Weights and cache must stay where they are: a graph knows addresses.

    Raises:
        BellboxError: as `StaticSteps`, or a cache that is not on CUDA.
    """

    _WARM_UPS = 3

    def __init__(self, model: Llama, cache: KVCache) -> None:
        super().__init__(model, cache)
        if not cache.keys[0].is_cuda:
            raise BellboxError(f"a CUDA graph needs a model on CUDA; the cache is on {cache.keys[0].device}")
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits = torch.empty(0)

    def _run(self) -> Tensor:
        if self._graph is None:
            # Kernels are compiled and tables made before anything is recorded. Running twice writes the same keys.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(self._WARM_UPS):
                    self._forward()
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._logits = self._forward()
        self._graph.replay()
        return self._logits


def fixed_steps(model: nn.Module, cache: object) -> StaticSteps:
    """Steps of fixed shapes: recorded as a graph on CUDA, run as they are elsewhere.

    Raises:
        BellboxError: as `StaticSteps`.
    """
    if not isinstance(model, Llama) or not isinstance(cache, KVCache):
        raise BellboxError("steps of fixed shapes are for a LLaMA with q, k and v as three layers")
    return (GraphSteps if cache.keys[0].is_cuda else StaticSteps)(model, cache)
