"""The head for the next token of each sequence: in fp32 a row's logits are its own, whoever is decoded beside it.

A library's product of one row and of sixteen sums in different orders. Logits then differ in their last bits, and a
sampled text may depend on its neighbours. Prompts and training, where rows of one text come together, keep torch's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bellbox.ops import native
from bellbox.ops.dispatch import is_direct
from bellbox.ops.float_linear import float_linear


def has_rows_of_its_own(head: nn.Module) -> bool:
    """Whether `next_logits` of this head sums row by row: fp32 on the CPU, where the kernels are, watched by nobody."""
    return (
        type(head) is nn.Linear
        and native.available()
        and head.weight.is_cpu
        and head.weight.dtype == torch.float32
        and head.weight.is_contiguous()
        and not (head._forward_hooks or head._forward_pre_hooks)
    )


def next_logits(head: nn.Module, x: Tensor) -> Tensor:
    """Logits `[B, T, vocab_size]` of normalised states `[B, T, hidden]`; row by row where T is 1 and it can be."""
    if (
        x.shape[1] == 1
        and x.dtype == torch.float32
        and not torch.is_grad_enabled()
        and is_direct(x)
        and not torch.is_autocast_enabled("cpu")
        and has_rows_of_its_own(head)
    ):
        assert isinstance(head, nn.Linear)
        out = float_linear(x, head.weight)
        return out if head.bias is None else out + head.bias
    return head(x)
