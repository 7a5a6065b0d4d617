"""The entropy term of a run: the features of one layer in each forward pass, and what they add to the objective."""

from __future__ import annotations

from torch import Tensor, nn

from bellbox.errors import BellboxError
from bellbox.objectives import FeatureHook, gather_rows, mec_loss
from bellbox.recipe import is_head
from bellbox.training.config import MecSection


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

    def remove(self) -> None:
        """Let go of the model."""
        self._features.remove()


def _head(model: nn.Module) -> str:
    heads = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and is_head(name)
    ]
    if not heads:
        raise BellboxError("the model has no output layer of a usual name; name a layer")
    return heads[-1]
