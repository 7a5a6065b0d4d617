"""The entropy term of a run: the features of one layer in each forward pass, and what they add to the objective.

Their spectrum is measured at every validation, with the term or without it, so that runs can be compared.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bellbox.errors import BellboxError
from bellbox.objectives import FeatureCollector, FeatureHook, gather_rows, mec_loss, spectrum
from bellbox.recipe import is_head
from bellbox.runs.config import MecSection
from bellbox.training.distributed.world import World

SPECTRUM_ROWS = 2048
"""Samples of the validation split whose features' spectrum is measured."""


class EntropyTerm:
    """`mec` of a configuration, on a model.

    Args:
        model: the network; its layers must stay the ones that they are.
        section: with a weight above 0.

    Raises:
        BellboxError: no such layer, or no head to take the input of.
    """

    def __init__(self, model: nn.Module, section: MecSection) -> None:
        self._section = section
        try:
            self._features = FeatureHook(model, section.layer or _head(model), section.side)
        except BellboxError as error:
            raise BellboxError(f"mec.layer: {error}") from None

    def value(self) -> Tensor:
        """The term of the last forward pass, in [-1, 0], not yet weighted: a scalar."""
        section = self._section
        return mec_loss(
            gather_rows(self._features.take()),
            section.distortion,
            form=section.form,
            order=section.order,
            experts=section.experts,
        )

    def forget(self) -> None:
        """Let go of the features of the last forward pass."""
        self._features.forget()

    def remove(self) -> None:
        """Let go of the model."""
        self._features.remove()


class SpectrumMeter:
    """The spectrum of the features that a term sees, or would see, over the forward passes while it is entered.

    Args:
        model: the network.
        section: says which features. Without a weight, and without a head of a usual name, nothing is measured.
        world: the processes that share the forward passes.
    """

    def __init__(self, model: nn.Module, section: MecSection, world: World) -> None:
        self._world = world
        try:
            layer = section.layer or _head(model)
            rows = -(-SPECTRUM_ROWS // world.size)
            self._features = FeatureCollector(model, layer, section.side, rows)
        except BellboxError:
            if section.weight:
                raise
            self._features = None

    def __enter__(self) -> SpectrumMeter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._features is not None:
            self._features.remove()

    def fields(self) -> dict[str, Any]:
        """`feature_spectrum` of an evaluation record; empty where there is none, as of features that are not finite."""
        if self._features is None:
            return {}
        try:
            own = self._features.take()
        except BellboxError:  # none came here
            own = None
        rows = self._world.gather_rows(own)
        try:
            shares = [] if rows is None else spectrum(rows).tolist()
        except BellboxError:
            return {}
        # Four digits are more than a picture shows.
        return {"feature_spectrum": [float(f"{share:.4g}") for share in shares]} if shares else {}


def _head(model: nn.Module) -> str:
    heads = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and is_head(name)
    ]
    if not heads:
        raise BellboxError("the model has no output layer of a usual name; name a layer")
    return heads[-1]
