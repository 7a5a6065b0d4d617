"""Which layers get which quantizer: a recipe is data, not code.

A recipe is a list of rules, each a name pattern and what to do with the layers that it matches; the first
match decides. It reads from YAML or JSON through `recipe_from_dict`, which refuses what it does not know.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

from bellbox.errors import BellboxError
from bellbox.hadamard import DEFAULT_BLOCK, block_size
from bellbox.levels import check_levels, check_zero_point, levels_from_bits

Method = Literal["bbq"]

HEADS = (
    *("lm_head", "embed_out", "output_projection", "classifier", "score", "head"),
    *("lm_head.decoder", "predictions.decoder", "vocab_projector"),
)
"""Last parts of the names under which models keep their output layer; left in full precision by default."""

SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("to_q", "to_k", "to_v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
"""Names of layers that, under one parent, read the same tensor. Sharing is checked at run time by identity."""


@dataclass(frozen=True)
class QuantizerSpec:
    """One quantizer, by name and numbers."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    method: Method = "bbq"
    """The quantization method."""
    levels: int = 4
    """Number of levels n: 2**bits, or 3 for ternary."""
    zero_point: float | None = None
    """Shift of the integer grid, a multiple of 1/2; the method's own where None."""
    statistic: Literal["row", "token", "ema", "tensor"] = "token"
    """How sigma is taken: `row` for weights; `token`, `ema` or `tensor` for activations."""
    block: int = DEFAULT_BLOCK
    """Largest Hadamard block, a power of two; 1 for no rotation."""
    gamma_init: float = 1.694
    """Initial scale in units of the RMS of the whole tensor."""

    def __post_init__(self) -> None:
        check_levels(self.levels)
        if self.zero_point is not None:
            check_zero_point(self.zero_point)
        block_size(1 << 30, self.block)
        if not 0 < self.gamma_init < math.inf:
            raise BellboxError(
                f"gamma_init {self.gamma_init}: must be a finite number above 0, such as 1.694"
            )


@dataclass(frozen=True)
class Rule:
    """What happens to the layers whose dotted name matches a pattern."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    pattern: str
    """Shell-style pattern on the dotted name: `*` any text, `?` one character, `[ab]` one of these."""
    weights: QuantizerSpec | None = None
    """Quantizer of the weight; None together with `activations` None leaves the layer as it is."""
    activations: QuantizerSpec | None = None
    """Quantizer of the input."""

    def matches(self, name: str) -> bool:
        """Whether the dotted name of a layer fits the pattern."""
        return fnmatchcase(name, self.pattern)


@dataclass(frozen=True)
class Recipe:
    """Rules, first match first; layers that none matches are left as they are."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    rules: tuple[Rule, ...] = ()
    """Rules in order of precedence."""
    share_inputs: bool = True
    """Whether siblings that read the same tensor (q, k, v; gate, up) share one activation quantizer."""

    @classmethod
    def bbq(
        cls,
        bits: int | None = None,
        *,
        levels: int | None = None,
        weight_levels: int | None = None,
        activation_levels: int | None = None,
        statistic: Literal["token", "ema", "tensor"] = "token",
        block: int = DEFAULT_BLOCK,
        gamma_init: float = 1.694,
        share_inputs: bool = True,
        keep: tuple[str, ...] = (),
        rules: tuple[Rule, ...] = (),
    ) -> Recipe:
        """Bell Box Quantization of every linear layer but the output head.

        Args:
            bits: of weights and activations, 1 to 8 (2 where nothing is said).
            levels: number of levels instead of bits; 3 is ternary.
            weight_levels: levels of the weights alone, where they differ.
            activation_levels: levels of the activations alone.
            statistic: of the activations.
            block: largest Hadamard block.
            gamma_init: initial scale in units of the RMS of the whole tensor.
            share_inputs: see `Recipe.share_inputs`.
            keep: name patterns of further layers to leave in full precision.
            rules: rules that go before all others.

        Raises:
            BellboxError: both `bits` and `levels`, or a value out of range.
        """
        if bits is not None and levels is not None:
            raise BellboxError("give bits or levels, not both (ternary is levels=3)")
        common = levels if levels is not None else levels_from_bits(2 if bits is None else bits)

        def spec(n: int | None, statistic: Literal["row", "token", "ema", "tensor"]) -> QuantizerSpec:
            n = common if n is None else n
            return QuantizerSpec("bbq", n, None, statistic, block, gamma_init)

        left = tuple(Rule(pattern) for head in HEADS for pattern in (head, f"*.{head}"))
        everything = Rule("*", spec(weight_levels, "row"), spec(activation_levels, statistic))
        return cls((*rules, *map(Rule, keep), *left, everything), share_inputs)

    @classmethod
    def none(cls) -> Recipe:
        """Leave every layer as it is: the full-precision baseline."""
        return cls()

    def rule_for(self, name: str) -> Rule | None:
        """The rule that decides about a layer, or None where it is left as it is."""
        for rule in self.rules:
            if rule.matches(name):
                return rule if rule.weights or rule.activations else None
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON or YAML; `recipe_from_dict` gives the equal recipe."""
        return dataclasses.asdict(self)


def recipe_from_dict(data: Mapping[str, Any]) -> Recipe:
    """Read a recipe from plain data.

    Raises:
        BellboxError: an unknown key, a wrong type or a value out of range, by name.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(Recipe).validate_python(dict(data))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BellboxError(f"recipe: {where}: {first['msg']}") from None
