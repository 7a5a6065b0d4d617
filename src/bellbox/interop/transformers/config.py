"""What `quantization_config` is to transformers: a recipe to prepare a model with, or what a folder of ours says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from bellbox.errors import BellboxError
from bellbox.formats.description import QUANT_METHOD
from bellbox.recipe import Recipe, recipe_from_dict

PREPARED = "prepared"
"""Key of a section of a model in training form; its value is the version of that form."""
PREPARED_VERSION = 1


class BellboxConfig(QuantizationConfigMixin):
    """How a model is made low-bit as it is loaded; also what the section of a folder's `config.json` becomes.

    Args:
        bits: of weights and activations, 1 to 8 (2 where nothing is said).
        method: one of `bellbox.quantizers.METHODS`.
        recipe: in place of all others: which layers, and how.
        choices: as `Recipe.of` (of `bbq`, `Recipe.bbq`) takes them: `levels`, `keep`, `embedding_bits` and so on.

    Raises:
        BellboxError: a recipe together with other choices, or what the recipe refuses.
    """

    quant_method: Any

    def __init__(
        self,
        bits: int | None = None,
        *,
        method: str = "bbq",
        recipe: Recipe | Mapping[str, Any] | None = None,
        **choices: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD
        self.section: dict[str, Any] | None = None
        """Of a folder of packed layers or of a prepared model, as it was read; None where a model is to be prepared."""
        if recipe is None:
            makers = {"bbq": Recipe.bbq, "bbq_paper": Recipe.bbq_paper, "cewt": Recipe.cewt}
            try:
                if method in makers:
                    self.recipe: Recipe | None = makers[method](bits, **choices)
                else:
                    self.recipe = Recipe.of(method, bits, **choices)
            except TypeError as error:
                raise BellboxError(f"BellboxConfig: {error}") from None
        elif bits is not None or choices:
            raise BellboxError("BellboxConfig: give a recipe, or bits and other choices, not both")
        else:
            self.recipe = recipe if isinstance(recipe, Recipe) else recipe_from_dict(recipe)

    @property
    def is_packed(self) -> bool:
        """Whether it is of a folder with packed layers."""
        return self.section is not None and "layers" in self.section

    @classmethod
    def from_dict(cls, config_dict: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From the section of a `config.json`, or from what `to_dict` gives.

        Raises:
            BellboxError: a section that describes neither packed layers nor a recipe.
        """
        values = {key: value for key, value in config_dict.items() if key != "quant_method"}
        if "layers" in values:
            made = cls()
            made.recipe, made.section = None, dict(config_dict)
        elif PREPARED in values:
            if values[PREPARED] != PREPARED_VERSION:
                raise BellboxError(
                    f"a prepared model of version {values[PREPARED]!r}; this Bellbox reads {PREPARED_VERSION}"
                )
            if not isinstance(values.get("recipe"), Mapping):
                raise BellboxError("quantization_config of a prepared model has no recipe")
            made = cls(recipe=values["recipe"])
            made.section = dict(config_dict)
        elif values.keys() & {"version", "files", "sha256"}:
            raise BellboxError(
                "quantization_config of config.json describes neither packed layers nor a prepared model; save it again"
            )
        else:
            made = cls(**values)
        return (made, kwargs) if return_unused_kwargs else made

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the section as it was read, or the recipe."""
        if self.section is not None:
            return dict(self.section)
        assert self.recipe is not None
        return {"quant_method": QUANT_METHOD, "recipe": self.recipe.to_dict()}
