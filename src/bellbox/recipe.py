"""Recipe: which layers get which quantizer, as data, not code.

A recipe is a list of rules, each a name pattern and what to do with the layers that it matches; the first
match decides. It reads from YAML or JSON through `recipe_from_dict`, which refuses what it does not know.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

from bellbox.core.grid import levels_from_bits
from bellbox.core.planes import check_widths
from bellbox.errors import BellboxError
from bellbox.quantizers import METHODS, check_method
from bellbox.quantizers.nested import option_of
from bellbox.quantizers.spec import Granularity, QuantizerSpec, with_present_names

HEADS = (
    *("lm_head", "embed_out", "output_projection", "classifier", "score", "head"),
    *("lm_head.decoder", "predictions.decoder", "vocab_projector"),
)
"""Last parts of the names under which models keep their output layer: a hint beside their structure (`keep_ends`)."""

STEMS = (
    *("stem", "stem.*", "conv_stem", "conv1", "patch_embed*"),
    *("*.stem.*", "*.embedder.embedder.*", "*.patch_embeddings.projection"),
)
"""Patterns of the names under which vision models keep the layer that reads the image: a hint as well."""

EVERYTHING = "*"
"""The pattern that says nothing about a layer: such rules are the ones that `Recipe.keep_ends` holds back."""

LayerKind = Literal["linear", "conv"]
"""What a rule may confine itself to."""

GAMMA_LR = 0.1
"""Learning rate of BBQ's gamma in `Recipe.bbq`, in units of the others'."""

INPUT_GROUPS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("to_q", "to_k", "to_v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
"""Names of layers that, under one parent, usually read the same tensor: a hint for packed layers, which look at run
time whether they do. (In cross-attention they do not, so that no learned scale is shared by name.)"""


def is_head(name: str) -> bool:
    """Whether the dotted name of a layer is one of an output layer."""
    return f".{name}".endswith(tuple(f".{head}" for head in HEADS))


@dataclass(frozen=True)
class Rule:
    """What happens to the layers whose dotted name matches a pattern.

    Examples:
        >>> rule = bb.Rule("*.mlp.*", bb.QuantizerSpec("bbq", 16), bb.QuantizerSpec("bbq", 16))
        >>> rule.matches("layers.0.mlp.up_proj"), rule.matches("layers.0.self_attn.q_proj")
        (True, False)
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    pattern: str
    """Shell-style pattern on the dotted name: `*` any text, `?` one character, `[ab]` one of these."""
    weights: QuantizerSpec | None = None
    """Quantizer of the weight; None together with `activations` None leaves the layer as it is."""
    activations: QuantizerSpec | None = None
    """Quantizer of the input."""
    weights_rotated: bool = False
    """Whether the stored weight lives in the domain that the input is rotated into, and is not rotated again.

    The weight's own block is then 1."""
    kind: LayerKind | None = None
    """Only layers of this kind: `linear` or `conv`; any where None."""

    def matches(self, name: str, kind: LayerKind = "linear") -> bool:
        """Whether the dotted name of a layer fits the pattern, and its kind."""
        return self.kind in (None, kind) and fnmatchcase(name, self.pattern)


@dataclass(frozen=True)
class Recipe:
    """Rules, first match first; layers that none matches are left as they are.

    Examples:
        >>> recipe = bb.Recipe.bbq(bits=2, keep=("0",))
        >>> model = bb.prepare(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)), recipe)
        >>> [type(layer).__name__ for layer in model]
        ['Linear', 'QuantizedLinear', 'QuantizedLinear']
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    rules: tuple[Rule, ...] = ()
    """Rules in order of precedence."""
    share_inputs: bool = True
    """Whether layers that read the same tensor (q, k, v; gate, up) share one activation quantizer."""
    keep_ends: bool = False
    """Whether rules with the pattern `*` pass over the ends of the network (`bellbox.structure.ends`): the layers that
    read the input or give the outputs, routers of experts, weights tied to an embedding. Other patterns reach them.

    `Recipe.of` and its kind say yes; a recipe of earlier files, which does not say, means no."""
    integer_forward: bool | None = None
    """Whether linear layers multiply integers in training too, see docs/training.md.

    The forward is then the packed layer's to the last bit, and a byte an input is kept for the backward, whose
    gradients differ by half a percent. None: with BBQ in bf16 on a CPU with the compiled kernels, where it is
    faster."""
    embedding_bits: Literal[4, 8] | None = None
    """Bits that embeddings and heads are rounded to while training (`bellbox.nn.quantized_table`); None: fp32."""
    embedding_group: Literal[32, 64] | None = None
    """Columns that share a scale with 4 bits; where None 64, or 32 where 64 do not divide."""
    head_bits: Literal[4, 8, 32] | None = None
    """Bits of heads where they are not those of embeddings; 32: fp32. A head that is tied to an embedding has its."""

    @classmethod
    def of(
        cls,
        method: str,
        bits: int | None = None,
        *,
        levels: int | None = None,
        weight_levels: int | None = None,
        activation_levels: int | None = None,
        zero_point: float | None = None,
        granularity: Granularity | None = None,
        weight_granularity: Granularity | None = None,
        block: int | None = None,
        options: Mapping[str, bool | float | str] | None = None,
        weight_only: Literal["float", "int8"] | None = None,
        weights_rotated: bool = False,
        share_inputs: bool = True,
        keep_ends: bool = True,
        integer_forward: bool | None = None,
        keep: tuple[str, ...] = (),
        rules: tuple[Rule, ...] = (),
        embedding_bits: Literal[4, 8] | None = None,
        embedding_group: Literal[32, 64] | None = None,
        head_bits: Literal[4, 8, 32] | None = None,
        statistic: Granularity | None = None,
        weight_statistic: Granularity | None = None,
    ) -> Recipe:
        """A method on every linear layer and convolution but the ends of the network.

        What is not said is the method's own choice.

        Args:
            method: one of `bellbox.quantizers.METHODS`, or `none` for full precision.
            bits: of weights and activations, 1 to 8; where nothing is said the method's own choice, mostly 2. At
                8 bits, methods with levels on both sides of zero take 255, which fit int8.
            levels: number of levels instead of bits; 3 is ternary.
            weight_levels: levels of the weights alone, where they differ.
            activation_levels: levels of the activations alone.
            zero_point: shift of the integer grid, of both.
            granularity: of the activations.
            weight_granularity: of the weights.
            block: largest Hadamard block, of both.
            options: of the method.
            weight_only: quantize weights only, and leave activations in `float` or round them to 8 bits (`int8`).
            weights_rotated: learn the weights in the rotated domain; needs quantized activations. A weight that stands
                elsewhere in the model too stays as it is, and is rotated in every forward.
            share_inputs: see `Recipe.share_inputs`.
            keep_ends: see `Recipe.keep_ends`; where False, only layers with the usual names of heads and stems are
                left.
            integer_forward: see `Recipe.integer_forward`.
            keep: name patterns of further layers to leave in full precision.
            rules: rules that go before all others.
            embedding_bits: see `Recipe.embedding_bits`.
            embedding_group: see `Recipe.embedding_group`.
            head_bits: see `Recipe.head_bits`.
            statistic: the former name of `granularity`.
            weight_statistic: the former name of `weight_granularity`.

        Raises:
            BellboxError: both `bits` and `levels`, `weight_only` together with a choice for activations, an unknown
                method, or a value out of range.

        Examples:
            >>> spec = bb.Recipe.of("lsq", bits=4, weight_levels=4).rules[-1]
            >>> spec.weights.levels, spec.activations.levels
            (4, 16)
        """
        granularity = granularity or statistic
        weight_granularity = weight_granularity or weight_statistic
        if method == "none":
            # Without rules there is nothing to keep.
            kept = keep_ends and bool(rules)
            return cls(rules, share_inputs, kept, integer_forward, embedding_bits, embedding_group, head_bits)
        if bits is not None and levels is not None:
            raise BellboxError("give bits or levels, not both (ternary is levels=3)")
        common = levels if bits is None else levels_from_bits(bits)
        if common is None:
            common = check_method(method, {}).own_levels
        number: int = common

        if (
            bits == 8
            and not _fits_int8(method, number, zero_point, options)
            and _fits_int8(method, number - 1, zero_point, options)
        ):
            number -= 1
            warnings.warn(
                f"{method} at 8 bits takes 255 levels, -127..127: its 256 do not fit int8 and could not be packed",
                stacklevel=2,
            )

        def spec(n: int | None, granularity: Granularity | None) -> QuantizerSpec:
            n = number if n is None else n
            return QuantizerSpec(method, n, zero_point, granularity, block, dict(options or {}))

        weights = spec(weight_levels, weight_granularity)
        if weight_only is not None and (granularity, activation_levels) != (None, None):
            raise BellboxError(
                f"weight_only={weight_only!r} leaves no activations for granularity and activation_levels"
            )
        if weight_only is None:
            activations = spec(activation_levels, granularity)
        else:
            activations = None if weight_only == "float" else _int8_beside(weights)
        if weights_rotated:
            weights = dataclasses.replace(weights, block=1, options=_without_signs(weights.options))
        heads = tuple(pattern for head in HEADS for pattern in (head, f"*.{head}"))
        left = tuple(map(Rule, (*heads, *STEMS)))
        everything = Rule(EVERYTHING, weights, activations, weights_rotated)
        every = (*rules, *map(Rule, keep), *left, everything)
        return cls(
            every, share_inputs, keep_ends, integer_forward, embedding_bits, embedding_group, head_bits
        )

    @classmethod
    def bbq(
        cls,
        bits: int | None = None,
        *,
        gamma_init: float | Literal["optimal", "one"] | None = None,
        gamma_lr: float = GAMMA_LR,
        weights_rotated: bool | None = None,
        nested: Sequence[int] | None = None,
        **choices: Any,
    ) -> Recipe:
        """Bell Box Quantization as Bellbox does it, with what our studies found to be better (docs/studies.md).

        Causal (the granularity `token`); weights are learned in the rotated domain, where their codes stay equally used
        and no step has to rotate them; and gamma learns at a tenth of the learning rate. `bellbox train` adds the
        hyperball step (`bellbox.optim.cewt`), which a loop of your own may as well.

        Args:
            bits: of weights and activations, 1 to 8 (2 where nothing is said).
            gamma_init: initial scale in units of the RMS of the whole tensor (or `optimal`, `one`, see
                `BBQOptions`); the paper's 1.694 where None.
            gamma_lr: what the learning rate is multiplied with for gamma, as an optimizer over
                `bellbox.optim.parameter_groups` does; the paper's is 1.
            weights_rotated: see `Recipe.of`. Where None, yes if activations are quantized.
            nested: in place of bits, several widths of one model, the widest first: (4, 3, 2, 1). `bb.set_bits` says
                which one is used, for weights and inputs alike; with `activation_levels` inputs keep theirs.
            choices: as in `Recipe.of`.

        Raises:
            BellboxError: both `bits` and `levels`, or a value out of range.

        Examples:
            >>> rule = bb.Recipe.bbq(levels=3).rules[-1]  # ternary
            >>> rule.weights.levels, rule.weights_rotated
            (3, True)
        """
        if nested is not None:
            bits = _refuse_beside_nested(bits, nested, choices)
        options: dict[str, bool | float | str] = {"gamma_lr": gamma_lr}
        if gamma_init is not None:
            options["gamma_init"] = gamma_init
        choices["options"] = {**options, **(choices.get("options") or {})}
        rotated = choices.get("weight_only") != "float" if weights_rotated is None else weights_rotated
        made = cls.of("bbq", bits, weights_rotated=rotated, **choices)
        return made if nested is None else _with_nested(made, option_of(nested), choices)

    @classmethod
    def bbq_paper(cls, bits: int | None = None, **choices: Any) -> Recipe:
        """Bell Box Quantization as in the paper (arXiv 2603.01599): the granularity `tensor`, which is not causal,
        weights rotated in every step, and gamma learned like everything else."""
        choices["granularity"] = choices.get("granularity") or choices.pop("statistic", None) or "tensor"
        return cls.of("bbq", bits, **choices)

    @classmethod
    def cewt(cls, bits: int | None = None, *, weights_rotated: bool | None = None, **choices: Any) -> Recipe:
        """CEWT as published (arXiv 2609.32659): scales that keep each token's norm and each weight's, a half-integer
        grid at every width, taken over the whole weight; weights learned in the rotated domain.

        Initialisation and optimizer belong to it: `bellbox train` adds them with `method: cewt`; in a loop of your own,
        `bellbox.models.lecun_` and `bellbox.optim.cewt`. Ours is `Recipe.bbq` with the latter.

        Args:
            bits: of weights and activations, 1 to 8 (2 where nothing is said).
            weights_rotated: see `Recipe.of`. Where None, yes if activations are quantized.
            choices: as in `Recipe.of`.

        Raises:
            BellboxError: both `bits` and `levels`, or a value out of range.
        """
        rotated = choices.get("weight_only") != "float" if weights_rotated is None else weights_rotated
        return cls.of("cewt", bits, weights_rotated=rotated, **choices)

    @classmethod
    def bbq_vision(cls, bits: int | None = None, *, zeta: float | None = 2.45, **choices: Any) -> Recipe:
        """BBQ-Vision: blocks of 64 channels in convolutions and of 32 in linear layers, and no learned gamma.

        Args:
            bits: of weights and activations.
            zeta: x_hat follows zeta times each sample's (each token's) sigma; 2.45 as released for vision, 1.694 in
                the authors' later code; None for a learned gamma.
            choices: as in `Recipe.of`; a `block` is that of convolutions too.

        Raises:
            BellboxError: both `bits` and `levels`, or a value out of range.
        """
        if zeta is not None:
            choices["options"] = {**(choices.get("options") or {}), "zeta": zeta}
        given = choices.pop("block", None)
        if given is not None:
            return cls.of("bbq", bits, block=given, **choices)
        linear, conv = (cls.of("bbq", bits, block=block, **choices) for block in (32, 64))
        convolutions = dataclasses.replace(conv.rules[-1], kind="conv")
        return dataclasses.replace(linear, rules=(*linear.rules[:-1], convolutions, linear.rules[-1]))

    @classmethod
    def none(cls) -> Recipe:
        """Leave every layer as it is: the full-precision baseline."""
        return cls()

    def rule_for(
        self, name: str, kind: LayerKind = "linear", end: bool = False, within: str = ""
    ) -> Rule | None:
        """The rule that decides about a layer, or None where it is left as it is.

        Args:
            name: dotted.
            kind: of the layer.
            end: whether it is one of the network's ends (`bellbox.structure.ends`).
            within: dotted name of the module that it is a parameter of, which a pattern may mean as well.

        Examples:
            >>> bb.Recipe.bbq(2).rule_for("lm_head") is None
            True
            >>> bb.Recipe.bbq(2).rule_for("layers.0.q_proj").weights.method
            'bbq'
        """
        for rule in self.rules:
            if end and self.keep_ends and rule.pattern == EVERYTHING:
                continue
            if rule.matches(name, kind) or (within and rule.matches(within, kind)):
                return rule if rule.weights or rule.activations else None
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON or YAML; `recipe_from_dict` gives the equal recipe."""
        return dataclasses.asdict(self)


def _refuse_beside_nested(bits: int | None, nested: Sequence[int], choices: Mapping[str, Any]) -> int:
    """The bits of the widest of nested widths, where nothing is said that they go against."""
    check_widths(nested)
    for name, value in (("bits", bits), *((name, choices.get(name)) for name in ("levels", "weight_levels"))):
        if value is not None:
            raise BellboxError(
                f"{name} is {value} and nested is given, which says the widths; leave one of them out"
            )
    if choices.get("weight_only") is not None:
        raise BellboxError("nested widths are for weights and inputs together; leave weight_only out")
    return nested[0]


def _with_nested(recipe: Recipe, option: str, choices: Mapping[str, Any]) -> Recipe:
    """The recipe with several widths in its last rule; inputs of levels of their own keep those."""
    last = recipe.rules[-1]
    sides = {}
    for side, spec in (("weights", last.weights), ("activations", last.activations)):
        assert spec is not None
        own = side == "activations" and choices.get("activation_levels") is not None
        sides[side] = spec if own else dataclasses.replace(spec, options={**spec.options, "nested": option})
    return dataclasses.replace(recipe, rules=(*recipe.rules[:-1], dataclasses.replace(last, **sides)))


def _fits_int8(
    method: str, levels: int, zero_point: float | None, options: Mapping[str, bool | float | str] | None
) -> bool:
    """Whether the levels of a method's weights and activations fit int8, as packing needs; without a grid, yes."""
    spec = QuantizerSpec(method, levels, zero_point, options=dict(options or {}))
    kind = METHODS[method]
    rows = [8, None] if kind.activation_granularities else [8]
    try:
        return not kind.on_grid or all(kind(64, spec, each).levels.fits_int8 for each in rows)
    except BellboxError:
        return True  # a number that the method does not have, which is refused where it is used


def _without_signs(options: Mapping[str, bool | float | str]) -> dict[str, bool | float | str]:
    """Random signs belong to the rotation, which rotated weights have behind them."""
    return {name: value for name, value in options.items() if name != "signs"}


def _int8_beside(weights: QuantizerSpec) -> QuantizerSpec:
    """8-bit activations for a weight: 255 levels, -127..127, so that integers fit int8.

    Where weights are rotated, activations are too, and being bells then they are clipped (QuEST's rule); else the
    largest magnitude of a token is the last level.
    """
    block = METHODS[weights.method].own_block if weights.block is None else weights.block
    return QuantizerSpec("rtn", 255) if block == 1 else QuantizerSpec("quest", 255, None, None, block)


def recipe_from_dict(data: Mapping[str, Any]) -> Recipe:
    """Read a recipe from plain data.

    Raises:
        BellboxError: an unknown key, a wrong type or a value out of range, by name.

    Examples:
        >>> from bellbox.recipe import recipe_from_dict
        >>> recipe = bb.Recipe.bbq(2)
        >>> recipe_from_dict(recipe.to_dict()) == recipe
        True
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(Recipe).validate_python(with_present_names(data))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BellboxError(f"recipe: {where}: {first['msg']}") from None
