"""Features from any layer of a model, by its name."""

from __future__ import annotations

import difflib
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bellbox.errors import BellboxError

Side = Literal["input", "output"]


class FeatureHook:
    """Keeps what a layer reads or gives in the last forward.

    Args:
        model: any module.
        layer: the name of a layer in it, such as `lm_head` or `model.layers.3.mlp`.
        side: `input`, or `output`.

    Raises:
        BellboxError: no such layer.
    """

    def __init__(self, model: nn.Module, layer: str, side: Side = "input") -> None:
        places = dict(model.named_modules())
        if layer not in places or not layer:
            near = difflib.get_close_matches(layer, places, n=3, cutoff=0.3)
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise BellboxError(f"no layer {layer!r} to take features from{hint}")
        self.layer, self.side = layer, side
        self._kept: Tensor | None = None
        self._handle = places[layer].register_forward_hook(self._keep)

    def _keep(self, _: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._kept = self._found(inputs, output)

    def _found(self, inputs: tuple[Any, ...], output: Any) -> Tensor:
        found = inputs[0] if self.side == "input" else output
        if isinstance(found, tuple):
            found = found[0]
        if not isinstance(found, Tensor):
            raise BellboxError(
                f"the {self.side} of layer {self.layer!r} is {type(found).__name__}, not a tensor"
            )
        return found

    def take(self) -> Tensor:
        """The features of the last forward, one row a sample (see `pooled`), once.

        Raises:
            BellboxError: the layer has not been called since.
        """
        kept, self._kept = self._kept, None
        if kept is None:
            raise BellboxError(f"layer {self.layer!r} has not been called since its features were taken")
        return pooled(kept)

    def forget(self) -> None:
        """Let go of the features of the last forward."""
        self._kept = None

    def remove(self) -> None:
        """Let go of the layer."""
        self._handle.remove()


class FeatureCollector(FeatureHook):
    """Gathers what a layer reads or gives over several forwards, without gradients.

    Args:
        model: as for `FeatureHook`, and so are the rest.
        rows: samples at most; what comes after them is not kept.
    """

    def __init__(self, model: nn.Module, layer: str, side: Side = "input", rows: int = 2048) -> None:
        super().__init__(model, layer, side)
        self._parts: list[Tensor] = []
        self._room = rows

    def _keep(self, _: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if self._room > 0:
            self._parts.append(pooled(self._found(inputs, output).detach())[: self._room].clone())
            self._room -= len(self._parts[-1])

    def take(self) -> Tensor:
        """All of them, `[samples, d]`, once.

        Raises:
            BellboxError: the layer has not been called.
        """
        parts, self._parts = self._parts, []
        self._kept = torch.cat(parts) if parts else None
        return super().take()


def pooled(features: Tensor) -> Tensor:
    """One row a sample: images `[m, d, height, width]` and sequences `[m, tokens, d]` become means, `[m, d]` stays.

    Raises:
        BellboxError: another number of dimensions.
    """
    if features.dim() == 4:
        return features.mean((2, 3))
    if features.dim() == 3:
        return features.mean(1)
    if features.dim() == 2:
        return features
    raise BellboxError(f"features of shape {tuple(features.shape)} have no known place for samples")
