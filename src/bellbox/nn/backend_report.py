"""Backend report: who runs each packed layer of a model, and why not another."""

from __future__ import annotations

from typing import Any

from torch import nn

from bellbox.nn.packed import PackedLayer


def backend_report(model: nn.Module) -> str:
    """A line for each packed layer: its name, its operation, the backend that takes it, and why others do not.

    A model that transformers loaded has one more line, `generate`: whether its decode step is fused, or why not.

    Args:
        model: what `convert` or `load` gave.

    Returns:
        The lines in one text. Where there is no packed layer, one line says so.

    Raises:
        BellboxError: `BELLBOX_BACKEND` names a backend that does not take a layer.

    Examples:
        >>> model = bb.prepare(nn.Sequential(nn.Linear(64, 8)), bb.Recipe.of("bbq", 2, keep_ends=False))
        >>> bb.calibrate(model, [torch.randn(4, 64)])
        >>> print(bb.backend_report(bb.convert(model.eval())))  # doctest: +ELLIPSIS
        0  packed_linear: ...
    """
    found = {
        name or "(model)": layer for name, layer in model.named_modules() if isinstance(layer, PackedLayer)
    }
    if not found:
        return "no packed layer: convert the model first"
    width = max(map(len, found))
    lines = [f"{name:<{width}}  {layer.explain()}" for name, layer in found.items()]
    about: Any = getattr(model, "generation_report", None)
    if about is not None and (said := about()) is not None:
        lines.append(f"{'generate':<{width}}  {said}")
    return "\n".join(lines)
