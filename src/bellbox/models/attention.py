"""The arithmetic that both models share: causal attention, fast or exact, and activations likewise.

Evaluation in fp32 on the CPU goes by the compiled kernels (`ops/attend.py`, `ops/activate.py`), where a token has the
same bits in every company. What follows is of torch's functions, which run elsewhere: in training, on a GPU, compiled.

Why there is an exact way. `F.scaled_dot_product_attention` sums in blocks whose size depends on the number of
keys and of sequences; a vectorised SiLU or tanh computes the last few elements of a buffer with another
routine than the rest. So the fp32 result of one token can differ in its last bit with the length of the text
or with the batch. A float model does not care. A low-bit one may: an activation that sits on a threshold
moves by a whole level, and the logits of a prefix then visibly depend on what follows it. The exact way
computes scores, softmax, weighted sum and activation function in float64 and rounds once to the input's
dtype: the order of summation now moves bits some 2^-29 below fp32's last, and a result changes only where it
falls that close to the middle between two fp32 numbers. It is for proofs and comparisons; it costs time and
eight bytes per score.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bellbox.ops.activate import activate, is_pinned
from bellbox.ops.encode import result_dtype


def _causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """`[queries, keys]`, true where a query, one of the last positions, may look: at itself and before."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, *, exact: bool) -> Tensor:
    """Softmax attention in which no token sees a later one.

    Args:
        query: `[B, heads, T, head_dim]`, the last T of S positions.
        key: `[B, key-value heads, S, head_dim]`; each one serves heads / (key-value heads) consecutive
            queries.
        value: as `key`.
        exact: float64 inside (see the module's docstring); otherwise PyTorch's fused attention.

    Returns:
        `[B, heads, T, head_dim]`; dtype of the query, or autocast's where that is on and `exact` is not.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
    queries, keys = query.shape[2], key.shape[2]
    if exact:
        scores = (query.double() @ key.double().transpose(-1, -2)) * query.shape[-1] ** -0.5
        if queries > 1:
            scores = scores.masked_fill(~_causal_mask(queries, keys, query.device), float("-inf"))
        return (scores.softmax(dim=-1) @ value.double()).to(query.dtype)
    if queries == keys:
        if queries > 1:  # a branch, so that a compiler that keeps the number open settles it here
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return F.scaled_dot_product_attention(query, key, value)
    # One query sees every key, so it needs no mask; a block of them after a cached prefix does.
    mask = _causal_mask(queries, keys, query.device) if queries > 1 else None
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def gated(gate: Tensor, up: Tensor, *, exact: bool) -> Tensor:
    """SiLU of `gate` times `up`, in their dtype; the SiLU in float64 where `exact`."""
    if exact:
        return F.silu(gate.double()).to(gate.dtype) * up
    if is_pinned(gate) and up.dtype == gate.dtype:
        return activate(gate, "silu", up)
    return F.silu(gate) * up


def tanh_gelu(x: Tensor, *, exact: bool) -> Tensor:
    """GPT-2's GELU, x (1 + tanh(u)) / 2 with u = sqrt(2/pi) (x + 0.044715 x^3), in the dtype of `x`.

    Where `exact`, in float64 as x times the sigmoid of 2u, the same function: 1 + tanh(u) cancels for
    negative u, which brings float64's own last bit up to where fp32 sees it.
    """
    if not exact:
        return activate(x, "gelu") if is_pinned(x) else F.gelu(x, approximate="tanh")
    wide = x.double()
    return (wide * torch.sigmoid(math.sqrt(8 / math.pi) * (wide + 0.044715 * wide**3))).to(x.dtype)


def erf_gelu(x: Tensor, *, exact: bool) -> Tensor:
    """The GELU itself, x Phi(x), in the dtype of `x`; where `exact`, in float64, by erfc, which does not cancel."""
    if not exact:
        return activate(x, "gelu_erf") if is_pinned(x) else F.gelu(x)
    wide = x.double()
    return (0.5 * wide * torch.erfc(-wide / math.sqrt(2))).to(x.dtype)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a norm returns: autocast's where it is on (it leaves float64 alone), else that of `x`.

    The linears after a norm would cast to it anyway; rounding in the norm keeps one small copy instead of
    two.
    """
    return x.dtype if x.dtype == torch.float64 else result_dtype(x)
