"""Swapping layers: full precision -> fake-quantized (`prepare`) -> packed integers (`convert`)."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from bellbox.errors import BellboxError
from bellbox.hadamard import hadamard
from bellbox.levels import Grid
from bellbox.nn import (
    ActivationQuantizer,
    PackedLinear,
    QuantizedLinear,
    SharedInput,
    quantized_layers,
    replace_layer,
    without_fused_paths,
)
from bellbox.nn.compact import Precision, compact
from bellbox.quantizers import build_quantizer
from bellbox.recipe import SIBLINGS, Recipe, Rule

Model = TypeVar("Model", bound=nn.Module)


def prepare(model: Model, recipe: Recipe) -> Model:
    """Replace linear layers by fake-quantized ones, in place, as the recipe says.

    Train the result as usual: weights stay full precision, each forward quantizes them and the inputs.

    Args:
        model: any module. Exact `nn.Linear` layers are considered; everything else is left.
        recipe: which layers, and how.

    Returns:
        The same model (a new layer where `model` is itself one `nn.Linear`).

    Raises:
        BellboxError: the model is prepared or packed already, no layer matches a recipe that has rules, a layer
            cannot have the quantizers of its rule, or `recipe` is no recipe.
    """
    layers = new_layers(model, recipe)
    _warn_of_idle_rules(model, recipe)
    for linear, layer in layers:
        weight, activation = layer.weight_quantizer, layer.activation_quantizer
        if weight is not None:
            weight.initialize(_rotated(linear, activation) if layer.weights_rotated else linear.weight)
    result: nn.Module = model
    for linear, layer in layers:  # only now: a rule that cannot be met leaves the model as it was
        if layer.weights_rotated:
            with torch.no_grad():
                linear.weight.copy_(_rotated(linear, layer.activation_quantizer))
        result = replace_layer(result, linear, layer)
    without_fused_paths(result)
    return cast(Model, result)


def new_layers(model: nn.Module, recipe: Recipe) -> list[tuple[nn.Linear, QuantizedLinear]]:
    """Each layer that `prepare` would replace, and what by; nothing is changed yet and no scale is set.

    So it is also the quick way to learn whether a recipe fits a model, which may lie on the meta device.

    Raises:
        BellboxError: see `prepare`.
    """
    if not isinstance(recipe, Recipe):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise BellboxError(f"the recipe is {recipe!r}: give a Recipe, such as bb.Recipe.bbq(bits=2)")
    if any(isinstance(module, (QuantizedLinear, PackedLinear)) for module in model.modules()):
        raise BellboxError("the model is already prepared or packed; prepare a full-precision model")
    decided = [(name, layer, rule) for name, layer in _linears(model) if (rule := recipe.rule_for(name))]
    if recipe.rules and not decided:
        raise BellboxError(_why_no_layer(model))
    layers: list[tuple[nn.Linear, QuantizedLinear]] = []
    owners: dict[tuple[str, ...], ActivationQuantizer] = {}
    groups = _sibling_groups(decided) if recipe.share_inputs else {}
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    for name, linear, rule in decided:
        if rule.weights_rotated and uses[id(linear.weight)] > 1:
            raise BellboxError(
                f"{name}: its weight stands elsewhere in the model too, where a rotated one would be wrong; give it a "
                "rule without weights_rotated"
            )
        group = groups.get(name, (name,))
        shared = owners.get(group)
        activation = shared or _activation_quantizer(name, linear, rule, readers=len(group))
        if activation is not None:
            owners[group] = activation
        weight = None
        if rule.weights is not None:
            where = f"{name or 'the layer'}.weight"
            weight = build_quantizer(rule.weights, linear.in_features, linear.out_features, name=where)
            weight.to(linear.weight.device)
        owned, rotated = shared is None, rule.weights_rotated
        try:
            layer = QuantizedLinear(linear, weight, activation, owned, rotated)
        except BellboxError as error:
            raise BellboxError(f"{name or 'the layer'}: {error}") from None
        layers.append((linear, layer.train(linear.training)))
    return layers


def unprepare(model: Model) -> Model:
    """The way back from `prepare`: plain linear layers that hold the trained weights, in place.

    The quantizers and their scales are dropped; weights that were learned rotated are rotated back. Parameters stay
    the same objects, for an optimizer that knows them.
    A model without quantized layers is left as it is.

    Returns:
        The same model (a new layer where `model` is itself one quantized layer).
    """
    result: nn.Module = model
    for _, layer in list(quantized_layers(model)):
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        linear.weight, linear.bias = layer.weight, layer.bias
        if layer.weights_rotated:
            with torch.no_grad():
                linear.weight.copy_(_rotated_back(layer))
        result = replace_layer(result, layer, linear.train(layer.training))
    return cast(Model, result)


def convert(model: Model, embeddings: Precision = "fp32") -> Model:
    """A packed copy of a prepared model: codes instead of weights, ready for `save` and for inference.

    The trained model is left as it is. Nothing but the quantized layers' float weights is left out of the copy.

    Args:
        model: what `prepare` gave, trained.
        embeddings: `bf16` or `int8` rounds embeddings and heads (`nn.compact`), which makes a small model much smaller
            and quicker and is no longer exactly the trained function; `fp32` leaves them.

    Raises:
        BellboxError: nothing to convert, or a layer that cannot be packed (by name, with the way out).
    """
    layers = dict(quantized_layers(model))
    if not layers:
        if any(isinstance(module, PackedLinear) for module in model.modules()):
            raise BellboxError("the model is packed already; save it, or use it as it is")
        raise BellboxError("nothing to convert: the model has no quantized layers; call prepare first")
    require_causal(model, "converting")
    shared: dict[int, SharedInput] = {}
    memo: dict[int, object] = {}
    for name, layer in layers.items():
        activation = layer.activation_quantizer
        if layer.weight_quantizer is not None and not layer.weight_quantizer.on_grid:
            raise BellboxError(
                f"{name or 'the layer'} cannot be packed: {layer.weight_quantizer.why_not_packed()}"
            )
        if activation is None or layer.weight_quantizer is None:
            raise BellboxError(
                f"{name or 'the layer'} cannot be packed: only its {'inputs' if activation else 'weights'} are "
                "quantized, and integers need both; give its rule both (weight_only='int8' does)"
            )
        shared.setdefault(id(activation), SharedInput(activation.shared.readers))
        # Deep copy finds the packed layer in place of the trained one, so float weights are never copied.
        memo[id(layer)] = PackedLinear.from_quantized(layer, shared.get(id(activation)))
    packed = copy.deepcopy(model, memo).requires_grad_(False).eval()
    compact(packed, embeddings)
    return packed


def require_causal(model: nn.Module, doing: str) -> None:
    """Refuse a model whose activation statistic looks at other tokens.

    Args:
        model: any module.
        doing: what is refused, for the message ("converting", "generating").

    Raises:
        BellboxError: a layer has statistic 'tensor'.
    """
    for name, layer in quantized_layers(model):
        activation = layer.activation_quantizer
        if activation is not None and activation.quantizer.statistic == "tensor":
            raise BellboxError(
                f"{doing} is refused: layer {name or type(layer).__name__} has statistic='tensor', which looks at "
                "future tokens and at the rest of the batch; train with statistic='token' or 'ema'"
            )


def _why_no_layer(model: nn.Module) -> str:
    # GPT-2 of transformers keeps its matrices, transposed, in a class of its own.
    if any(type(module).__name__ == "Conv1D" for module in model.modules()):
        return (
            "the recipe matches no nn.Linear layer: this model keeps its matrices in Conv1D; load a GPT-2 with "
            "bellbox.models.load_hf(folder), which has linear layers"
        )
    return "the recipe matches no linear layer of the model; look at the patterns of its rules"


def _warn_of_idle_rules(model: nn.Module, recipe: Recipe) -> None:
    """A pattern with a typing error would quantize what it was to keep: say so."""
    usual = {rule.pattern for rule in Recipe.bbq().rules}
    names = [name for name, _ in _linears(model)]
    for rule in recipe.rules:
        if rule.pattern not in usual and not any(map(rule.matches, names)):
            warnings.warn(f"the pattern '{rule.pattern}' of the recipe matches no linear layer", stacklevel=3)


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Exact `nn.Linear` layers by name. Those inside nn.MultiheadAttention are read past their forward: skipped."""
    skip = {
        id(inner)
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
        for inner in module.modules()
    }
    for name, module in model.named_modules():
        if type(module) is nn.Linear and id(module) not in skip:
            yield name, module


def _activation_quantizer(
    name: str, linear: nn.Linear, rule: Rule, readers: int
) -> ActivationQuantizer | None:
    if rule.activations is None:
        return None
    quantizer = build_quantizer(
        rule.activations, linear.in_features, None, name=f"{name or 'the layer'}.input"
    )
    return ActivationQuantizer(quantizer, readers).to(linear.weight.device).train(linear.training)


def rotated_weights(model: nn.Module) -> frozenset[Tensor]:
    """The weights that live in the rotated domain (`Rule.weights_rotated`)."""
    return frozenset(layer.weight for _, layer in quantized_layers(model) if layer.weights_rotated)


def _rotated(linear: nn.Linear, activation: ActivationQuantizer | None) -> Tensor:
    """The weight in the domain that the input is rotated into."""
    return linear.weight if activation is None else activation.quantizer.rotate(linear.weight.detach())


def _rotated_back(layer: QuantizedLinear) -> Tensor:
    """The inverse of `_rotated`, up to rounding: the rotation is its own inverse, and signs come before it."""
    assert layer.activation_quantizer is not None
    quantizer = layer.activation_quantizer.quantizer
    weight = hadamard(layer.weight.detach(), quantizer.block)
    return weight if quantizer.signs is None else weight * quantizer.signs


def _sibling_groups(decided: list[tuple[str, nn.Linear, Rule]]) -> dict[str, tuple[str, ...]]:
    """Layer name -> names of all siblings (itself included) that share its activation quantizer."""
    rules = {name: (layer.in_features, rule.activations) for name, layer, rule in decided}
    groups: dict[str, tuple[str, ...]] = {}
    for name in rules:
        parent, _, leaf = name.rpartition(".")
        for names in SIBLINGS:
            if leaf == names[0]:
                full = tuple(f"{parent}.{other}" if parent else other for other in names)
                alike = tuple(other for other in full if rules.get(other) == rules[name])
                if len(alike) > 1 and rules[name][1] is not None:
                    groups.update(dict.fromkeys(alike, alike))
    return groups


def _label(levels: Grid) -> str:
    return f"{levels.bits:.4g}"


def summary(model: nn.Module) -> str:
    """A table of the quantized layers, and how many parameters are quantized and how many are not.

    Equal layers of repeated blocks are listed once, with their number.
    """
    rows: dict[tuple[str, ...], list[str]] = {}
    quantized = 0
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            weight, activation = layer.weight_quantizer, layer.activation_quantizer
            quantized += layer.weight.numel() if weight is not None else 0
            cells = (
                _label(weight.levels) if weight else "float",
                _label(activation.levels) if activation else "float",
                activation.quantizer.statistic if activation else "-",
                str((activation.quantizer if activation else weight).block),  # type: ignore[union-attr]
                "shared" if activation is not None and activation.shared.readers > 1 else "own",
            )
        elif isinstance(layer, PackedLinear):
            quantized += layer.in_features * layer.out_features
            coding = layer.coding
            sharing = "shared" if layer.shared.readers > 1 else "own"
            cells = (
                _label(layer.weight_levels),
                _label(coding.levels),
                coding.normalise,
                str(coding.block),
                sharing,
            )
        else:
            continue
        pattern = ".".join("*" if part.isdigit() else part for part in name.split(".")) or "(the model)"
        key = (pattern, f"{layer.out_features} x {layer.in_features}", *cells)
        rows.setdefault(key, []).append(name or "(the model)")
    header = ("layer", "out x in", "weight bits", "input bits", "statistic", "block", "input", "count")
    named = {key: key[0] if len(names) > 1 else names[0] for key, names in rows.items()}
    table = [header, *((named[key], *key[1:], str(len(names))) for key, names in rows.items())]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    floats: dict[int, Tensor] = {id(p): p for p in model.parameters()}
    for module in model.modules():  # what is a parameter before packing counts as one after it
        if isinstance(module, PackedLinear) and module.bias is not None:
            floats[id(module.bias)] = module.bias
    inside = {id(layer.weight) for _, layer in quantized_layers(model) if layer.weight_quantizer is not None}
    rest = sum(p.numel() for key, p in floats.items() if key not in inside)
    left = sorted({type(m).__name__ for m in model.modules() if isinstance(m, nn.MultiheadAttention)})
    lines.append(
        f"parameters: {quantized:,} quantized, {rest:,} not" + (f" (left whole: {left[0]})" if left else "")
    )
    return "\n".join(lines)
