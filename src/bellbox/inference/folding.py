"""Batch norms folded into the packed convolutions before them: one pass over the activations less, for inference.

In evaluation a batch norm is `alpha x + beta`, one pair a channel, and a packed convolution ends in
`scale * sum + bias`: both are one such step with other numbers. Equal on paper; in fp32 the product of two factors
rounds differently from one after the other, so results differ in their last bits, and a code of a later layer where its
value lies that close to a threshold (at most one in 100,000, `tests/test_folding.py`). Hence it is nothing that
`convert` does by itself or that a file holds, but a step of those who run a model and want the speed.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, TypeVar

import torch
from torch import nn

from bellbox.inference.fusing import trace
from bellbox.nn import PackedConv2d

Model = TypeVar("Model", bound=nn.Module)


def fold_batch_norms(model: Model) -> Model:
    """Fold each batch norm whose input is a packed convolution's output and nothing else's, in place.

    A norm that follows the batch (without running statistics, or itself in training mode) stays.

    Args:
        model: packed, in evaluation mode. It must be traceable by `torch.fx`: no branches on values.

    Returns:
        The same model, with `nn.Identity` in place of the norms. It can no longer be saved.

    Raises:
        BellboxError: the model is in training mode, or cannot be traced.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        >>> model = bb.prepare(model, bb.Recipe.of("bbq", 2, keep_ends=False))
        >>> x = torch.randn(4, 8, 6, 6)
        >>> _ = model(x)  # sets scales and the norm's statistics
        >>> packed = bb.convert(model.eval())

        >>> folded = bb.fold_batch_norms(packed)
        >>> type(folded[1]).__name__
        'Identity'
        >>> torch.allclose(folded(x), model(x), atol=1e-5)
        True
    """
    from torch import fx

    nodes = list(trace(model).graph.nodes)
    modules = dict(model.named_modules())
    calls = Counter(id(modules[str(node.target)]) for node in nodes if node.op == "call_module")
    for node in nodes:
        source: Any = node.args[0] if node.args else None
        if node.op != "call_module" or not isinstance(source, fx.Node) or source.op != "call_module":
            continue
        conv, norm = modules[str(source.target)], modules[str(node.target)]
        # A convolution of `fuse_convolutions` may do more than multiply before the norm.
        plain = len(source.args) == 1 and not source.kwargs
        alone = plain and len(source.users) == calls[id(conv)] == calls[id(norm)] == 1
        if isinstance(conv, PackedConv2d) and isinstance(norm, nn.BatchNorm2d) and alone and _is_fixed(norm):
            _fold(conv, norm)
            parent, _, leaf = str(node.target).rpartition(".")
            setattr(model.get_submodule(parent), leaf, nn.Identity())
    return model


def _is_fixed(norm: nn.BatchNorm2d) -> bool:
    """Whether it is one `alpha x + beta`; without running statistics it follows the batch in evaluation too."""
    return not norm.training and norm.running_mean is not None and norm.running_var is not None


@torch.no_grad()
def _fold(conv: PackedConv2d, norm: nn.BatchNorm2d) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    alpha = 1 / torch.sqrt(variance + norm.eps)
    alpha = alpha if norm.weight is None else alpha * norm.weight.double()
    bias = torch.zeros_like(mean) if conv.bias is None else conv.bias.double()
    bias = (bias - mean) * alpha
    bias = bias if norm.bias is None else bias + norm.bias.double()
    conv.weight_scale = (conv.weight_scale.double() * alpha).float()
    conv.bias = bias.float()
    conv.folded = True
