"""Swapping layers: full precision -> fake-quantized (`prepare`) -> packed integers (`convert`)."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import warnings
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from bellbox import coverage
from bellbox.core.hadamard import block_size
from bellbox.coverage import Plain, expert_stacks, kind_of_layer, plain_layers, rule_for_experts
from bellbox.errors import BellboxError
from bellbox.nn import (
    ActivationQuantizer,
    CodedLayer,
    PackedConv1d,
    PackedConv2d,
    PackedExperts,
    PackedGroup,
    PackedLayer,
    PackedLinear,
    PackedTransposed,
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedExpert,
    QuantizedExperts,
    QuantizedLayer,
    QuantizedLinear,
    QuantizedMatrix,
    QuantizedTransposed,
    WeightOnlyLinear,
    WeightOnlyTransposed,
    quantized_inside,
    quantized_layers,
    without_fused_paths,
)
from bellbox.nn.adopted import become
from bellbox.nn.compact import Precision, compact, packed_tables, require_unrounded, tables
from bellbox.nn.experts import sizes as expert_sizes
from bellbox.nn.huge_pages import gather_in_huge_pages
from bellbox.nn.integer_product import coding_of
from bellbox.nn.own_forward import forget_forwards_of
from bellbox.nn.pretrained import have_plain_weights_saved, refuse_plain_saving, stop_saving_plain_weights
from bellbox.nn.quantized import ROTATED
from bellbox.nn.quantized_table import QuantizedTable, quantized_table
from bellbox.nn.state import look_before_loading, look_no_more
from bellbox.past_forward import WHY, read_besides, read_past_forward, tables_read_past_forward
from bellbox.quantizers import METHODS, Quantizer, build_quantizer
from bellbox.recipe import INPUT_GROUPS, QuantizerSpec, Recipe, Rule
from bellbox.structure import ends, widths

Model = TypeVar("Model", bound=nn.Module)
Replacement = QuantizedLayer | QuantizedExperts
logger = logging.getLogger("bellbox")


def prepare(model: Model, recipe: Recipe, example: Any = None) -> Model:
    """Replace linear layers and convolutions by fake-quantized ones, in place, as the recipe says.

    Train the result as usual: weights stay full precision, each forward quantizes them and the inputs. Where the recipe
    has `embedding_bits`, embeddings and heads become fake-quantized ones as well (`bellbox.nn.quantized_table`).

    Args:
        model: any module. `nn.Linear`, `nn.Conv1d` and `nn.Conv2d` layers are considered, transformers' `Conv1D` and
            fused experts, and subclasses that compute as they do; everything else is left, and one line says what (a
            warning where that is much, else the log "bellbox").
            Layers whose weight a hook or a parametrization makes are left too.
        recipe: which layers, and how.
        example: inputs for one forward (a tensor, a tuple of arguments or a mapping of keyword arguments): layers that
            read the very same tensor in it share one activation quantizer. Without it, only those share whose module
            says so in its attribute `input_groups`, as the models of `bellbox.models` do.

    Returns:
        The same model (a new layer where `model` is itself one such layer).

    Raises:
        BellboxError: the model is prepared or packed already, no layer matches a recipe that has rules, a layer or an
            embedding cannot have what the recipe says, or `recipe` is no recipe.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> model = bb.prepare(model, bb.Recipe.bbq(bits=2))
        >>> loss = model(torch.randn(4, 64)).square().mean()
        >>> loss.backward()
        >>> model[0].rotated_weight.grad.shape
        torch.Size([32, 64])
    """
    model = cast(Model, unwrapped(model))
    layers = new_layers(model, recipe, deferred=True, example=example)
    rounded = new_tables(model, recipe)
    _warn_of_idle_rules(model, recipe)
    _say_what_is_left(model, recipe, layers, {id(plain) for plain, _ in rounded})
    _warn_of_what_cannot_be_packed(layers)
    for plain, made in layers:  # only now: a rule that cannot be met leaves the model as it was
        become(plain, made)
        for layer in quantized_inside(cast(Replacement, plain)):
            layer.rotate_stored_weight()
            if layer.weight_quantizer is not None:
                layer.weight_quantizer.initialize(layer.weight_rows().detach())
    for plain, made in rounded:
        become(plain, made)
    without_fused_paths(model)
    look_before_loading(model)
    have_plain_weights_saved(model)
    return model


def new_layers(
    model: nn.Module, recipe: Recipe, deferred: bool = False, example: Any = None
) -> list[tuple[nn.Module, Replacement]]:
    """Each layer, and module of fused experts, that `prepare` would replace, and what by.

    Nothing is changed yet and no scale is set. So it is also the quick way to learn whether a recipe fits a model,
    which may lie on the meta device.

    Args:
        model: not prepared.
        recipe: which layers, and how.
        deferred: weights on the meta device come later: they are rotated in each forward, which gives the same codes.
        example: see `prepare`.

    Raises:
        BellboxError: see `prepare`.
    """
    if not isinstance(recipe, Recipe):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise BellboxError(f"the recipe is {recipe!r}: give a Recipe, such as bb.Recipe.bbq(bits=2)")
    if any(isinstance(module, (QuantizedLayer, CodedLayer, QuantizedTable)) for module in model.modules()):
        raise BellboxError("the model is already prepared or packed; prepare a full-precision model")
    decided = decide(model, recipe)
    experts = _new_experts(model, recipe)
    if recipe.rules and not decided and not experts:
        raise BellboxError(coverage.why_nothing(model, recipe))
    layers: list[tuple[nn.Module, Replacement]] = []
    owners: dict[tuple[str, ...], ActivationQuantizer] = {}
    groups = _input_groups(model, decided, example) if recipe.share_inputs else {}
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    for name, plain, rule in decided:
        # Weights that are still to come cannot be rotated now.
        later = deferred and plain.weight.is_meta
        if rule.weights_rotated and (later or uses[id(plain.weight)] > 1):
            rule = _rotated_in_forward(rule)  # whoever else reads the weight needs it as it is
        group = groups.get(name, (name,))
        shared = owners.get(group)
        where = name or "the layer"
        activation = shared or _activation_quantizer(where, plain, rule, readers=len(group))
        if activation is not None:
            owners[group] = activation
        weight = None if rule.weights is None else _weight_quantizer(where, plain, rule.weights)
        choices = weight, activation, shared is None, rule.weights_rotated
        try:
            layer = _quantized_kind(plain)(plain, *choices)
        except BellboxError as error:
            raise BellboxError(f"{where}: {error}") from None
        layers.append((plain, layer.train(plain.training)))
    inside = [layer for _, made in layers + experts for layer in quantized_inside(made)]
    for layer in inside:
        layer.integer_forward = recipe.integer_forward
    _have_siblings_agree(inside)
    return layers + experts


def _have_siblings_agree(layers: list[QuantizedLayer]) -> None:
    """Layers that share an input train on floats where not all can on integers: it is quantized once, in one form."""
    sharing: dict[int, list[QuantizedLayer]] = {}
    for layer in layers:
        sharing.setdefault(id(layer.activation_quantizer), []).append(layer)
    for siblings in sharing.values():
        weights = [(layer.runs_on_integers, layer.weight_quantizer) for layer in siblings]
        if len({on_grid and weight is not None and coding_of(weight) for on_grid, weight in weights}) > 1:
            for layer in siblings:
                layer.integer_forward = False


def new_tables(model: nn.Module, recipe: Recipe) -> list[tuple[nn.Module, QuantizedTable]]:
    """Each embedding and head that `prepare` would round, and what by; nothing is changed yet.

    A head that a rule of the recipe quantizes is a layer, and none of them. An embedding whose weight the model reads
    past its forward is left, with a warning.

    Raises:
        BellboxError: a table that cannot have the bits or the group of the recipe, or none where bits are asked for.
    """
    bits, group = recipe.embedding_bits, recipe.embedding_group
    of_heads = bits if recipe.head_bits is None else None if recipe.head_bits == 32 else recipe.head_bits
    if bits is None and of_heads is None:
        if group is not None:
            raise BellboxError(
                f"embedding_group is {group}, but there are no embedding_bits that it could be of"
            )
        return []
    taken = {id(layer) for _, layer, _ in decide(model, recipe)}
    every = tables(model, ends(model), bits or of_heads or 8)
    entries = {id(each.weight): name for name, each in every.items() if isinstance(each, nn.Embedding)}
    found: dict[str, tuple[nn.Embedding | nn.Linear, int]] = {}
    for name, each in every.items():
        width = bits if isinstance(each, nn.Embedding) else of_heads
        if width != bits and (other := entries.get(id(each.weight))) is not None:
            raise BellboxError(
                f"{name}: is tied to {other}, so head_bits {recipe.head_bits} cannot differ from embedding_bits; "
                "leave head_bits out"
            )
        if width is not None and id(each) not in taken:
            found[name] = each, width
    past = {name for name in tables_read_past_forward(model) if name in found}
    heads = {id(each.weight) for each, _ in found.values() if isinstance(each, nn.Linear)}
    left = [name for name in past if id(found[name][0].weight) not in heads]
    if left:
        warnings.warn(f"left in full precision: {', '.join(sorted(left))} ({WHY})", stacklevel=3)
    found = {name: each for name, each in found.items() if name not in left}
    if not found:
        asked = f"embedding_bits is {bits}" if bits is not None else f"head_bits is {of_heads}"
        raise BellboxError(f"{asked}, but the model has no embedding that could be rounded; leave it out")
    # A group is of 4 bits: beside those, a table of 8 has none.
    mixed = bits != of_heads and 4 in (bits, of_heads)
    return [
        (each, quantized_table(name, each, width, None if mixed and width == 8 else group))
        for name, (each, width) in found.items()
    ]


def _new_experts(model: nn.Module, recipe: Recipe) -> list[tuple[nn.Module, Replacement]]:
    """Each module of fused experts that is to be quantized, and what by."""
    found: dict[int, tuple[nn.Module, dict[str, list[QuantizedExpert]]]] = {}
    for name, experts, stack in expert_stacks(model):
        rule = rule_for_experts(recipe, name, stack)
        if rule is not None:
            where = f"{name}.{stack}" if name else stack
            layers = _expert_layers(where, experts, stack, rule)
            found.setdefault(id(experts), (experts, {}))[1][stack] = layers
    return [(experts, QuantizedExperts(experts, layers)) for experts, layers in found.values()]


def _expert_layers(where: str, experts: nn.Module, stack: str, rule: Rule) -> list[QuantizedExpert]:
    """A layer for each expert of one projection, whose parameter stays as it is: what is rotated, in each forward."""
    parameter = experts._parameters[stack]
    assert parameter is not None
    inputs, outputs = expert_sizes(experts, parameter)
    rule = _rotated_in_forward(rule) if rule.weights_rotated else rule
    layers: list[QuantizedExpert] = []
    for i in range(len(parameter)):
        weight = rule.weights and build_quantizer(rule.weights, inputs, outputs, name=f"{where}.{i}.weight")
        given = rule.activations and build_quantizer(
            rule.activations, inputs, None, name=f"{where}.{i}.input"
        )
        try:
            made = QuantizedExpert(experts, stack, i, weight, given and ActivationQuantizer(given))
        except BellboxError as error:
            raise BellboxError(f"{where}: {error}") from None
        layers.append(made.to(parameter.device))
    return layers


def _quantized_kind(layer: Plain) -> type[QuantizedLayer]:
    if isinstance(layer, nn.Conv2d):
        return QuantizedConv2d
    if isinstance(layer, nn.Conv1d):
        return QuantizedConv1d
    return QuantizedLinear if isinstance(layer, nn.Linear) else QuantizedTransposed


def _packed_kind(layer: QuantizedLayer) -> type[PackedLayer]:
    if isinstance(layer, QuantizedConv2d):
        return PackedConv2d
    if isinstance(layer, QuantizedConv1d):
        return PackedConv1d
    return PackedTransposed if isinstance(layer, QuantizedTransposed) else PackedLinear


def decide(model: nn.Module, recipe: Recipe) -> list[tuple[str, Plain, Rule]]:
    """The layers that a recipe quantizes: name, layer and the rule that decided."""
    kept = ends(model) if recipe.keep_ends else {}
    found = [
        (name, layer, rule)
        for name, layer in plain_layers(model)
        if (rule := recipe.rule_for(name, kind_of_layer(layer), name in kept))
    ]
    past = read_past_forward(model)
    # Where all are read so, they are prepared, which changes nothing of what is computed; `convert` says why not.
    return [each for each in found if id(each[1]) not in past] or found


def unprepare(model: Model) -> Model:
    """The way back from `prepare`: plain layers that hold the trained weights, in place.

    The quantizers and their scales are dropped; weights that were learned rotated are rotated back. Parameters stay
    the same objects, for an optimizer that knows them.
    A model without quantized layers is left as it is.

    Returns:
        The same model (a new layer where `model` is itself one quantized layer).
    """
    for experts in [module for module in model.modules() if isinstance(module, QuantizedExperts)]:
        become(experts, experts.unquantized())
    for _, layer in list(quantized_layers(model)):
        layer.rotate_stored_weight_back()
        become(layer, layer.unquantized())
    for table in [module for module in model.modules() if isinstance(module, QuantizedTable)]:
        become(table, table.unquantized())
    look_no_more(model)
    stop_saving_plain_weights(model)
    return model


def convert(model: Model, embeddings: Precision = "fp32", nested: bool = True) -> Model:
    """A packed copy of a prepared model: codes instead of weights, ready for `save` and for inference.

    The trained model is left as it is. Nothing but the quantized layers' float weights is left out of the copy. Of a
    nested model, each layer is packed at the width that it is used at (`bb.set_bits`), with the scales of the narrower
    ones, so that `save` writes all of these.

    Args:
        model: what `prepare` gave, trained.
        embeddings: `bf16`, `int8` or `int4` rounds embeddings and heads (`nn.compact`), which makes a small model much
            smaller and quicker and is no longer exactly the trained function; `fp32` leaves them as they were trained,
            rounded ones in their integers.
        nested: of a nested model, whether the narrower widths come along; else each layer has the one that it is used
            at, and `save` writes an ordinary folder.

    Raises:
        BellboxError: nothing to convert, or a layer or table that cannot be packed (by name, with the way out).

    Examples:
        >>> model = bb.prepare(nn.Sequential(nn.Linear(64, 8)), bb.Recipe.of("bbq", 2, keep_ends=False))
        >>> x = torch.randn(4, 64)
        >>> bb.calibrate(model, [x])
        >>> packed = bb.convert(model.eval())
        >>> packed[0].weight_packed.shape, packed[0].weight_packed.dtype  # 64 codes of 2 bits a row
        (torch.Size([8, 16]), torch.uint8)
        >>> torch.equal(packed(x), model(x))
        True
    """
    model = cast(Model, unwrapped(model))
    layers = dict(quantized_layers(model))
    if not layers:
        if any(isinstance(module, CodedLayer) for module in model.modules()):
            raise BellboxError("the model is packed already; save it, or use it as it is")
        raise BellboxError("nothing to convert: the model has no quantized layers; call prepare first")
    require_causal(model, "converting")
    if embeddings != "fp32":
        require_unrounded(model)
    memo: dict[int, Any] = _left_whole(layers)
    layers = {name: layer for name, layer in layers.items() if id(layer) not in memo}
    _warn_of_weights_read_besides(model, layers)
    groups = _hinted_groups(layers)
    _give_scales_to_idle(layers)
    for name, layer in layers.items():
        activation = layer.activation_quantizer
        if _is_weight_only(layer):
            if layer.weight_quantizer is not None and layer.weight_quantizer.widths:
                raise BellboxError(
                    f"{name or 'the layer'} cannot be packed: its weight has nested widths and its input none; "
                    "quantize both"
                )
            kind = WeightOnlyTransposed if isinstance(layer, QuantizedTransposed) else WeightOnlyLinear
            memo[id(layer)] = kind.from_quantized(layer)
            continue
        if layer.weight_quantizer is not None and not layer.weight_quantizer.on_grid:
            raise BellboxError(f"{name or 'the layer'} cannot be packed: {_why_never_packed(layer)}")
        if activation is None or layer.weight_quantizer is None:
            raise BellboxError(f"{name or 'the layer'} cannot be packed: {_why_never_packed(layer)}")
        # Deep copy finds the packed layer in place of the trained one, so float weights are never copied.
        memo[id(layer)] = _packed_kind(layer).from_quantized(layer, groups.get(id(layer)))
    for experts in model.modules():
        if isinstance(experts, QuantizedExperts):
            PackedExperts.from_quantized(experts, memo)
    memo.update(packed_tables(model))
    for layer in layers.values():  # only now: an attribute may lead to any other layer
        if not isinstance(layer, QuantizedExpert):  # whose owner is the module around it
            cast(CodedLayer, memo[id(layer)]).take_over(layer, memo)
    packed = copy.deepcopy(model, memo).requires_grad_(False).eval()
    stale = forget_forwards_of(model, packed)
    if stale:
        warnings.warn(
            f"the forward that was put on {stale[0] or 'the model'} itself calls the trained model: the packed one has "
            "that of its class",
            stacklevel=2,
        )
    stop_saving_plain_weights(packed)
    refuse_plain_saving(packed)
    if not nested:
        for module in packed.modules():
            if isinstance(module, PackedLayer):
                module.forget_narrower()
    compact(packed, embeddings)
    gather_in_huge_pages(packed)
    return packed


def _left_whole(layers: Mapping[str, QuantizedLayer]) -> dict[int, Any]:
    """Plain copies, by the layer's id, of those that never ran while the model read their weight for itself.

    Raises:
        BellboxError: all are such layers.
    """
    some_ran = any(layer.has_run for layer in layers.values())
    names = [
        name
        for name, layer in layers.items()
        if layer.weight_was_read and not layer.has_run and (some_ran or not _is_set(layer))
    ]
    if not names:
        return {}
    some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    if len(names) == len(layers):
        raise BellboxError(
            f"nothing to convert: {some} never ran, and the model reads the weight past the layer's forward; such a "
            "layer stays in full precision"
        )
    warnings.warn(f"left in full precision: {some} ({WHY})", stacklevel=3)
    return {id(layers[name]): _plain_copy(layers[name]) for name in names}


def _warn_of_weights_read_besides(model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> None:
    """Say so where the model computes with a weight for itself too, as a decoder tied to its encoder does.

    It trained with the full weight there, and the packed layer has only the one that its codes stand for.
    """
    shown = read_besides(model)
    names = [
        name
        for name, layer in layers.items()
        if layer.has_run and layer.read_in_forward and (ROTATED in layer._parameters or id(layer) in shown)
    ]
    if names:
        some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        warnings.warn(
            f"{some}: the model reads the weight for itself besides calling the layer. It gets the weight that the "
            "codes stand for now, so its outputs are not those of the trained model; a recipe with keep=(...) leaves "
            "such layers in full precision",
            stacklevel=3,
        )


def _is_set(layer: QuantizedLayer) -> bool:
    """Whether the input's scale needs no data any more."""
    return layer.activation_quantizer is None or layer.activation_quantizer.quantizer.is_set


def _plain_copy(layer: QuantizedLayer) -> nn.Module:
    """The owner's layer with its plain weight, of memory of its own."""
    copied = copy.deepcopy(layer)
    copied.rotate_stored_weight_back()
    become(copied, copied.unquantized())
    return copied


def _give_scales_to_idle(layers: Mapping[str, QuantizedLayer]) -> None:
    """Scales for inputs that no data reached, while others were reached: an expert that was never chosen."""
    inputs = {name: layer.activation_quantizer for name, layer in layers.items()}
    unset = {
        name: each.quantizer
        for name, each in inputs.items()
        if each is not None and not each.quantizer.is_set
    }
    if not unset or len(unset) == sum(each is not None for each in inputs.values()):
        return
    for quantizer in unset.values():
        draw = torch.randn(64, quantizer.features, generator=torch.Generator().manual_seed(0))
        quantizer.initialize(draw.to(next(quantizer.parameters(), draw).device))
    some = ", ".join(list(unset)[:3]) + (", ..." if len(unset) > 3 else "")
    warnings.warn(
        f"no data ever reached {len(unset)} of {len(inputs)} layers ({some}): the scales of their inputs are those of "
        "numbers of size 1",
        stacklevel=3,
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """The module itself within what `torch.compile`, DDP, DataParallel or an average of weights put around it."""
    while True:
        inner = getattr(model, "_orig_mod", None)  # torch.compile
        if not isinstance(inner, nn.Module):
            inner = model._modules.get("module") if len(model._modules) == 1 and _is_wrapper(model) else None
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _is_wrapper(model: nn.Module) -> bool:
    """Whether a module with the one child `module` only calls it: no parameters or buffers of its own but counters."""
    own = [t for t in (*model._parameters.values(), *model._buffers.values()) if t is not None]
    return all(t.numel() == 1 and not t.is_floating_point() for t in own)


def require_causal(model: nn.Module, doing: str) -> None:
    """Refuse a model whose activation granularity looks at other tokens.

    Args:
        model: any module.
        doing: what is refused, for the message ("converting", "generating").

    Raises:
        BellboxError: a layer has granularity 'tensor'.
    """
    for name, layer in quantized_layers(model):
        activation = layer.activation_quantizer
        if activation is not None and activation.quantizer.granularity == "tensor":
            raise BellboxError(
                f"{doing} is refused: layer {name or type(layer).__name__} has granularity='tensor', which looks at "
                "future tokens and at the rest of the batch; train with granularity='token' or 'ema'"
            )


def _warn_of_idle_rules(model: nn.Module, recipe: Recipe) -> None:
    """A pattern with a typing error would quantize what it was to keep: say so."""
    usual = {rule.pattern for rule in Recipe.bbq().rules}
    names = coverage.names_of_weights(model)
    for rule in recipe.rules:
        if rule.pattern not in usual and not any(rule.matches(*each) for each in names):
            warnings.warn(f"the pattern '{rule.pattern}' of the recipe matches no layer", stacklevel=3)


def _say_what_is_left(
    model: nn.Module, recipe: Recipe, layers: list[tuple[nn.Module, Replacement]], rounded: set[int]
) -> None:
    """One line: a warning where much is left with no rule asking for it, else an entry of the log."""
    if recipe.rules:
        line, warn = coverage.say(
            model, recipe, (layer.parameter for layer in _inside(layers) if layer.weight_quantizer), rounded
        )
        if warn:
            warnings.warn(line, stacklevel=3)
        else:
            logger.info(line)


def _inside(layers: list[tuple[nn.Module, Replacement]]) -> list[QuantizedLayer]:
    return [layer for _, made in layers for layer in quantized_inside(made)]


def _warn_of_what_cannot_be_packed(layers: list[tuple[nn.Module, Replacement]]) -> None:
    """Before the training, not after it."""
    for layer in _inside(layers):
        why = _why_never_packed(layer)
        if why is not None:
            quantizer = layer.weight_quantizer or (
                layer.activation_quantizer and layer.activation_quantizer.quantizer
            )
            where = quantizer.name.rpartition(".")[0] if quantizer else "a layer"
            warnings.warn(f"the model can be trained, but not packed: {where}: {why}", stacklevel=3)
            return


def can_be_packed(layer: QuantizedLayer) -> bool:
    """Whether `convert` will take a layer once it is trained."""
    return _why_never_packed(layer) is None


def _is_weight_only(layer: QuantizedLayer) -> bool:
    """Whether a layer is packed with floats as inputs."""
    quantized = layer.weight_quantizer is not None and layer.activation_quantizer is None
    return quantized and isinstance(layer, QuantizedMatrix)


def _why_never_packed(layer: QuantizedLayer) -> str | None:
    """Why `convert` will refuse a layer whatever is trained; None where it will not."""
    if _is_weight_only(layer):
        return None
    activation = layer.activation_quantizer and layer.activation_quantizer.quantizer
    weight = layer.weight_quantizer
    for each in (weight, activation):
        if each is not None and each.on_grid and not each.levels.fits_int8:
            n, zero_point = each.levels.n, each.levels.zero_point
            return f"{n} levels with zero point {zero_point} do not fit int8, but 255 about zero or 128 above it do"
        if each is not None and (not each.on_grid or (each is activation and each.granularity == "tensor")):
            return each.why_not_packed()
    if weight is not None and activation is not None:
        return None
    return (
        f"only its {'inputs' if activation else 'weights'} are quantized, and integers need both; give its rule both "
        "(weight_only='int8' does)"
    )


def _rotated_in_forward(rule: Rule) -> Rule:
    """The rule that gives the same codes from a weight that is not stored rotated."""
    weights, inputs = rule.weights, rule.activations
    if weights is None or inputs is None:  # nothing that is rotated; the layer says what is wrong
        return rule
    signs = {key: value for key, value in inputs.options.items() if key == "signs"}
    weights = dataclasses.replace(weights, block=inputs.block, options={**weights.options, **signs})
    return dataclasses.replace(rule, weights=weights, weights_rotated=False)


def _activation_quantizer(name: str, layer: Plain, rule: Rule, readers: int) -> ActivationQuantizer | None:
    if rule.activations is None:
        return None
    conv = isinstance(layer, nn.Conv1d | nn.Conv2d)
    features = layer.in_channels // layer.groups if conv else _sizes(layer)[0]
    quantizer = build_quantizer(rule.activations, features, None, name=f"{name}.input")
    quantizer.samples = conv
    return ActivationQuantizer(quantizer, readers).to(layer.weight.device).train(layer.training)


def _weight_quantizer(name: str, layer: Plain, spec: QuantizerSpec) -> Quantizer:
    where = f"{name}.weight"
    if not isinstance(layer, nn.Conv1d | nn.Conv2d):
        quantizer = build_quantizer(spec, *_sizes(layer), name=where)
        return quantizer.to(layer.weight.device)
    depth, pixels = layer.in_channels // layer.groups, math.prod(layer.kernel_size)
    # A row is a whole filter, its rotation goes over the channels of a pixel alone.
    block = block_size(depth, METHODS[spec.method].own_block if spec.block is None else spec.block)
    spec = dataclasses.replace(spec, block=block)
    quantizer = build_quantizer(spec, pixels * depth, layer.out_channels, name=where)
    if quantizer.signs is not None:  # those of the input, pixel by pixel
        once = build_quantizer(spec, depth, None, name=where).signs
        assert once is not None
        quantizer.signs = once.repeat(pixels)
    return quantizer.to(layer.weight.device)


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a layer that is known to have them."""
    sizes = widths(layer)
    assert sizes is not None
    return sizes


def rotated_weights(model: nn.Module) -> frozenset[Tensor]:
    """The weights that live in the rotated domain (`Rule.weights_rotated`)."""
    return frozenset(layer.stored_weight for _, layer in quantized_layers(model) if layer.weights_rotated)


def _input_groups(
    model: nn.Module, decided: list[tuple[str, Plain, Rule]], example: Any
) -> dict[str, tuple[str, ...]]:
    """Layer name -> names of all layers (itself included) that are known to read one tensor and quantize it alike.

    Known is what a module says in its attribute `input_groups`, a tuple of tuples of names below it, or what a run
    on the example showed.
    """
    rules = {
        name: (_sizes(layer)[0], rule.activations)
        for name, layer, rule in decided
        if not isinstance(layer, nn.Conv1d | nn.Conv2d) and rule.activations is not None
    }
    candidates: list[tuple[str, ...]] = []
    for parent, module in model.named_modules():
        prefix = f"{parent}." if parent else ""
        candidates += [
            tuple(prefix + name for name in names) for names in getattr(module, "input_groups", ())
        ]
    if example is not None:
        candidates += _seen_together(model, {name: model.get_submodule(name) for name in rules}, example)
    groups: dict[str, tuple[str, ...]] = {}
    for names in candidates:
        present = [name for name in names if name in rules and name not in groups]
        for first in present:
            alike = tuple(name for name in present if rules[name] == rules[first])
            if len(alike) > 1 and first not in groups:
                groups.update(dict.fromkeys(alike, alike))
    return groups


def _seen_together(model: nn.Module, layers: Mapping[str, nn.Module], example: Any) -> list[tuple[str, ...]]:
    """Names of layers that got the very same tensor in every forward of a run on the example."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in layers}  # kept, so that no identity is used twice

    def hook(name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        inputs[name].extend(args[:1])

    handles = [layer.register_forward_pre_hook(partial(hook, name)) for name, layer in layers.items()]
    was_training = model.training
    try:
        with torch.no_grad():
            if isinstance(example, Mapping):
                model.eval()(**example)
            else:
                model.eval()(*(example if isinstance(example, tuple | list) else (example,)))
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    together: dict[tuple[int, ...], list[str]] = {}
    for name, seen in inputs.items():
        if seen:
            together.setdefault(tuple(map(id, seen)), []).append(name)
    return [tuple(names) for names in together.values() if len(names) > 1]


def _hinted_groups(layers: Mapping[str, QuantizedLayer]) -> dict[int, PackedGroup]:
    """Layer id -> the packed group that it may belong to: by a shared quantizer, or by name and equal coding."""
    groups: dict[Any, PackedGroup] = {}
    found: dict[int, PackedGroup] = {}
    for name, layer in layers.items():
        activation = layer.activation_quantizer
        if not isinstance(layer, QuantizedMatrix) or activation is None:
            continue
        key: Any = id(activation)
        if activation.shared.readers == 1:
            parent, _, leaf = name.rpartition(".")
            hint = next((names for names in INPUT_GROUPS if leaf in names), None)
            if hint is not None:
                quantizer = activation.quantizer  # a stored number may have been learned apart
                number = float(quantizer.rstd()) if quantizer.normalise == "static" else None
                numbers = layer.packed_numbers()[3:]
                key = parent, hint, numbers, layer.row_length, activation.levels, quantizer.widths, number
        found[id(layer)] = groups.setdefault(key, PackedGroup())
    return found
