"""Epilogue of packed convolutions: a sum with a tensor that is there already, and ReLU, in the same call.

Nothing is computed differently: the same operations in the same order on every number, so the results are the same
bits; only the passes over memory between them are saved, and the calls of the modules that are left out.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from bellbox.errors import BellboxError
from bellbox.nn import CodedLayer, PackedConv2d

if TYPE_CHECKING:
    from torch import fx

_SUMS: tuple[Any, ...] = (operator.add, torch.add, "add", "add_")
_RELUS: tuple[Any, ...] = (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")


def trace(model: nn.Module) -> fx.GraphModule:
    """The model as a graph in which packed layers are single nodes.

    Raises:
        BellboxError: the model is in training mode, or cannot be traced by `torch.fx`: it branches on values.
    """
    from torch import fx

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            # Packed layers are looked at from outside.
            return isinstance(m, CodedLayer) or super().is_leaf_module(m, module_qualified_name)

    if model.training:
        raise BellboxError(
            "a packed model is for evaluation, where norms do not follow the batch: call model.eval()"
        )
    try:
        return fx.GraphModule(model, Tracer().trace(model))
    except Exception as error:  # whatever the model's own code raises on a traced value
        raise BellboxError(f"the model cannot be traced, so it stays as it is ({error})") from None


def fuse_convolutions(model: nn.Module) -> nn.Module:
    """Let packed convolutions add what is added to their output, and apply the ReLU behind it.

    Best after `fold_batch_norms`, which leaves nothing between a convolution and these.

    Args:
        model: packed, in evaluation mode, traceable by `torch.fx`, to which `y += x` is `y = y + x`: a model that
            reads the former `y` by another name does not survive it. It is not changed.

    Returns:
        A `torch.fx.GraphModule` of the same function, with the same packed layers inside. It is for running: save the
        model, not the graph.

    Raises:
        BellboxError: the model is in training mode, or cannot be traced.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        >>> model = bb.prepare(model, bb.Recipe.of("bbq", 2, keep_ends=False))
        >>> x = torch.randn(4, 8, 6, 6)
        >>> _ = model(x)  # sets scales and the norm's statistics
        >>> packed = bb.convert(model.eval())

        >>> fused = bb.fuse_convolutions(bb.fold_batch_norms(packed))
        >>> torch.allclose(fused(x), model(x), atol=1e-5)
        True
    """
    traced = trace(model)
    modules: dict[str, nn.Module] = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        if node.op == "call_module" and isinstance(modules[node.target], nn.Identity):
            (given,) = node.args or node.kwargs.values()
            node.replace_all_uses_with(given)
            traced.graph.erase_node(node)
    order = {node: i for i, node in enumerate(traced.graph.nodes)}
    for node in list(traced.graph.nodes):
        if not _is_call(node, _SUMS) or len(node.args) != 2 or node.kwargs:
            continue
        # The later one has the other to add; of two convolutions that is the second.
        first, *last = sorted((a for a in node.args if a in order), key=order.__getitem__)
        kept = node.target == "add_" and node.args[0] is first  # what others read is written to
        if not last or last[0] is first or kept or "add" in last[0].kwargs:
            continue
        if _may_end_with(last[0], node, modules):
            _absorb(last[0], node, add=first)
    for node in list(traced.graph.nodes):
        is_module = node.op == "call_module" and isinstance(modules[node.target], nn.ReLU)
        if not (is_module or _is_call(node, _RELUS)) or not node.args:
            continue
        if _may_end_with(node.args[0], node, modules):
            _absorb(node.args[0], node, relu=True)
    traced.graph.lint()
    traced.recompile()
    return traced


def _is_call(node: fx.Node, targets: tuple[Any, ...]) -> bool:
    return node.op in ("call_function", "call_method") and node.target in targets


def _may_end_with(conv: fx.Node, last: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether nothing but `last` reads what `conv` returns, and nothing between them writes in place."""
    if conv.op != "call_module" or not isinstance(modules[str(conv.target)], PackedConv2d):
        return False
    if len(conv.users) != 1 or len(conv.args) != 1 or conv.kwargs.get("relu"):
        return False
    between = conv.next
    while between is not last:
        if _writes_in_place(between, modules):
            return False
        between = between.next
    return True


def _writes_in_place(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    given = bool(node.kwargs.get("inplace")) or "out" in node.kwargs
    return in_place or given or (name.startswith("i") and hasattr(operator, name))


def _absorb(conv: fx.Node, node: fx.Node, **what: Any) -> None:
    conv.kwargs = {**conv.kwargs, **what}
    node.replace_all_uses_with(conv)
    node.graph.erase_node(node)
