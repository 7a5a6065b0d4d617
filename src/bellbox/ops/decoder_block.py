"""A decoder's block for one new token of each sequence, in two or three calls, where a backend has them.

Not operations of torch: `generate` binds them once for each generation (`inference.decoding`), with the layers as
they are then. The same kernels in the same order as the layers called one by one, hence the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from bellbox.core.table import TableCodes
from bellbox.ops.dispatch import bind
from bellbox.ops.packed_linear import Bound

Layers = Sequence[Sequence[Bound]]
"""Of a block, the layers that read the same input: q, k and v; output; the MLP's first; the MLP's last."""


def llama_block(layers: Layers, head_dim: int, norms: Sequence[Tensor], eps: float) -> Any:
    """A block of a LLaMA, or None where no backend has one.

    It has three methods, all tensors contiguous and, but for the cache (an `attend.CacheLayer`), fp32:
    `attend_and_widen(x, batch, cosines, sines, *cache, room, start, gate, up, threads)` adds attention of the norm of
    `x` `[batch, 1, hidden]` to it, puts keys and values of position `start` (or `[batch, 2]` of slots
    and positions, see `attend.attend`) into the cache, and fills `gate` and `up`
    `[batch, 1, inner]`; `narrow(x, gate, up, batch, threads)` multiplies `gate` by `up` and adds the MLP's last
    layer on the product, `narrow_gated` takes the SiLU of `gate` before.

    Args:
        layers: packed.
        head_dim: of attention.
        norms: gains `[hidden]` before attention and before the MLP.
        eps: of the norms.
    """
    first, second = norms
    numbers = {"layers": _described(layers), "head_dim": head_dim, "eps": eps}
    return bind("llama_block", {"first_norm": first, "second_norm": second}, numbers)


def gpt_block(layers: Layers, head_dim: int) -> Any:
    """A block of a GPT, or None: its methods are `attention(x, normed, batch, *cache, room, start, threads)`,
    `widen(normed, batch, out, threads)` and `narrow(x, active, batch, threads)`, see `llama_block`."""
    return bind("gpt_block", {}, {"layers": _described(layers), "head_dim": head_dim})


def last_norm(weight: Tensor, eps: float) -> Any:
    """`rms_norm` of fp32 `[..., hidden]` with these gains, bound; None where no backend has one."""
    return bind("rms_norm", {"weight": weight}, {"eps": eps})


def head(codes: TableCodes) -> Any:
    """The product of fp32 `[..., columns]` with a rounded head, likewise."""
    tensors = {"weight": codes.weight, "multipliers": codes.multipliers, "scale": codes.scale}
    return bind("int8_linear" if codes.multipliers is None else "int4_linear", tensors, {})


def _described(layers: Layers) -> list[list[tuple[Any, Any]]]:
    return [[(layer.buffers, layer.numbers) for layer in group] for group in layers]
