"""Finding of layers whose weight a model reads past the layer's forward, as functional attention does.

Such a layer never sees its input, so it cannot be quantized: what the model computes with is the weight itself. It is
read off the source of the module that holds the layer: a method names `self.layer.weight`, and none names `self.layer`
for itself, to call it or to hand it on. Where there is no source, `convert` finds out, after a batch.

A convolution over a line is left for the first alone: state-space models call it in training, and read its weight for a
step of decoding, which would then be another function.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator

from torch import nn

from bellbox.nn import is_transposed_linear

WHY = "its weight is read past its forward"
"""The reason that users are told."""

_ABOUT = frozenset({"data", "device", "dtype", "is_meta", "ndim", "numel", "requires_grad", "shape", "size"})
"""What a model may ask of a weight without computing with it."""
_SET_UP = ("__init__", "_init", "init_", "reset_parameters", "extra_repr")
"""Beginnings of the names of methods that are no forward."""


def read_past_forward(model: nn.Module) -> set[int]:
    """Ids of linear layers and convolutions that nn.MultiheadAttention, or a module's own code, reads so."""
    found = inside_attention(model)
    for layers, read, used in _readings(model):
        lines = {name for name, child in layers.items() if isinstance(child, nn.Conv1d)}
        found.update(id(layers[name]) for name in ((read - used) | (read & lines)) & set(layers))
    return found


def read_besides(model: nn.Module) -> set[int]:
    """Ids of layers that a module's own code calls and whose weight it reads too, as far as its source shows."""
    return {id(layers[name]) for layers, read, used in _readings(model) for name in read & used & set(layers)}


def _readings(model: nn.Module) -> Iterator[tuple[dict[str, nn.Module], frozenset[str], frozenset[str]]]:
    """The layers of each module, and the attributes that its code reads the weight of, and uses otherwise."""
    for holder in model.modules():
        layers = {
            name: child
            for name, child in holder.named_children()
            if isinstance(child, nn.Linear | nn.Conv1d | nn.Conv2d) or is_transposed_linear(child)
        }
        if layers and not type(holder).__module__.startswith("torch.nn."):
            yield layers, *_names_read(type(holder))


def tables_read_past_forward(model: nn.Module) -> set[str]:
    """Dotted names of embeddings whose weight a module's own code reads, as where it is the output layer too."""
    return {
        f"{path}.{name}" if path else name
        for path, holder in model.named_modules()
        if not type(holder).__module__.startswith("torch.nn.")
        for name, child in holder.named_children()
        if isinstance(child, nn.Embedding) and name in _names_read(type(holder))[0]
    }


def inside_attention(model: nn.Module) -> set[int]:
    """Ids of what nn.MultiheadAttention holds and reads past the layers' forward."""
    holders = (module for module in model.modules() if isinstance(module, nn.MultiheadAttention))
    return {id(inner) for holder in holders for inner in holder.modules()}


@functools.cache
def _names_read(kind: type) -> tuple[frozenset[str], frozenset[str]]:
    """Attributes whose weight the methods of a class read, and those that they use for anything else."""
    read: set[str] = set()
    used: set[str] = set()
    for each in kind.__mro__:
        if each is nn.Module:
            break
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(each)))
        except (OSError, TypeError, SyntaxError, ValueError):
            return frozenset(), frozenset()  # nothing is known of what else it does
        _look(tree, read, used)
    return frozenset(read), frozenset(used)


def _look(tree: ast.AST, read: set[str], used: set[str]) -> None:
    """Sort the uses of `self.NAME` into readings of its weight and others."""
    for method in ast.walk(tree):
        if not isinstance(method, ast.FunctionDef) or method.name.startswith(_SET_UP):
            continue
        above = {child: node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
        for node in above:
            if not (isinstance(node, ast.Attribute) and _is_self(node.value)):
                continue
            outer = above.get(node)
            if not isinstance(outer, ast.Attribute):
                used.add(node.attr)
            elif outer.attr == "weight":
                further = above.get(outer)
                if not (isinstance(further, ast.Attribute) and further.attr in _ABOUT):
                    read.add(node.attr)


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"
