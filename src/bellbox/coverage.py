"""Report on what a recipe leaves in full precision.

Two kinds: what somebody asked to leave (a rule, or the ends of the network), and what has weights but is no layer that
Bellbox quantizes. The second is warned of where it is much: a network would be low-bit by name only.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase  # pyright: ignore[reportPrivateUsage]
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from bellbox.nn import CodedLayer, QuantizedExperts, QuantizedLayer, is_fused_experts, is_transposed_linear
from bellbox.nn.experts import ExpertsForward, stack_names
from bellbox.nn.quantized_table import QuantizedTable
from bellbox.nn.tools import stored_weight
from bellbox.nn.transposed import computes_as_transposed_linear
from bellbox.past_forward import WHY, inside_attention, read_past_forward
from bellbox.quantizers import Quantizer
from bellbox.recipe import LayerKind, Recipe, Rule
from bellbox.structure import ends

Plain = nn.Linear | nn.Conv1d | nn.Conv2d
"""Torch's layers that are quantized; transformers' `Conv1D`, which nobody imports for its name, is another."""

MUCH = 0.1
"""Share of the weights, left out with no rule asking for it, above which `prepare` warns."""

_OTHER = "parameters of"
"""Beginning of the reason for what is no layer of a known kind."""
_TABLES = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Left:
    """A module that keeps its weights in full precision."""

    name: str
    """Dotted name of the module."""
    why: str
    """Reason, the same for modules of a kind."""
    asked: bool
    """Whether a rule or the network's ends say so; else it is a kind of layer that is not quantized."""
    weights: tuple[Tensor, ...]
    """Its own parameters of two and more dimensions."""
    made: bool
    """Whether it is a linear layer or a convolution whose weight something else makes."""


def plain_layers(model: nn.Module) -> Iterator[tuple[str, Plain]]:
    """Layers by name that compute as `nn.Linear`, `nn.Conv1d`, `nn.Conv2d` or `Conv1D` do, subclasses too."""
    past = inside_attention(model)
    for name, module in model.named_modules():
        if is_known(module) and id(module) not in past and why_special(cast(Plain, module)) is None:
            yield name, cast(Plain, module)


def is_known(module: nn.Module) -> bool:
    """Whether it is of a class of layers that are quantized, or of a subclass."""
    return isinstance(module, Plain) or is_transposed_linear(module)


def why_special(layer: Plain) -> str | None:
    """Why a linear layer or convolution is not quantized; None where it is one like any other."""
    if isinstance(layer, QuantizedLayer):
        return "it is quantized"
    if is_made(layer):
        return "a hook, a parametrization or other code makes the weight"
    if isinstance(layer.weight, UninitializedParameter):
        return "lazy, and has not seen a batch"
    name = type(layer).__name__
    if isinstance(layer, nn.Linear):
        same, base = type(layer).forward is nn.Linear.forward, "Linear"
    elif isinstance(layer, nn.Conv1d | nn.Conv2d):
        own, torchs = type(layer), nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Conv1d
        same = (own.forward, own._conv_forward) == (torchs.forward, torchs._conv_forward)
        base = torchs.__name__
    else:
        same, base = computes_as_transposed_linear(layer), "Conv1D"
    if same and isinstance(layer, nn.Conv1d) and layer.padding_mode != "zeros":
        return f"{name} padded with {layer.padding_mode}, not zeros"
    return None if same else f"{name}, a subclass of {base} with a forward of its own"


def is_made(layer: nn.Module) -> bool:
    """Whether weight or bias of a linear layer or convolution is no parameter: pruned, normed, parametrized, written.

    Such a layer stays as it is: a quantized one would not follow what makes its weight.
    """
    own = layer._parameters
    if not isinstance(layer, nn.Linear | _ConvNd) and not is_transposed_linear(layer):
        return False
    return is_parametrized(layer) or "weight" not in own or "bias" not in own


def left_out(model: nn.Module, recipe: Recipe | None = None, rounded: Collection[int] = ()) -> list[Left]:
    """Every module that keeps weights of its own in full precision, but for norms and embeddings; each weight once.

    Args:
        model: about to be prepared, prepared or packed.
        recipe: of a model that is about to be prepared: what it quantizes is not listed.
        rounded: ids of embeddings and heads that are about to be rounded, which are not listed either.
    """
    kept = ends(model) if recipe is None or recipe.keep_ends else {}
    plain = {id(layer) for _, layer in plain_layers(model)}
    past, inside = read_past_forward(model), inside_attention(model)
    found: list[Left] = []
    seen = {
        id(stored_weight(module))
        for module in model.modules()
        if isinstance(module, (QuantizedLayer, *_TABLES))
    }
    for name, module in model.named_modules():
        if isinstance(module, (QuantizedLayer, QuantizedTable, CodedLayer, Quantizer, *_TABLES, *_NORMS)):
            continue
        if id(module) in rounded:
            continue
        if isinstance(module, ExpertsForward) or is_fused_experts(module):
            found += _left_of_experts(name, module, recipe)
            continue
        rule = None if recipe is None else recipe.rule_for(name, kind_of_layer(module), name in kept)
        if id(module) in plain and id(module) in past and (rule is not None or recipe is None):
            why, asked = WHY, False
        elif id(module) in plain:
            if rule is not None:
                continue
            why, asked = kept.get(name, "the recipe leaves it"), True
        else:
            asked = name in kept or (recipe is not None and rule is None)
            why = kept.get(name) or _why_no_layer(module, id(module) in inside)
        fresh = [weight for weight in _weights(module) if id(weight) not in seen]
        seen.update(map(id, fresh))
        if fresh:
            found.append(Left(name, why, asked, tuple(fresh), is_made(module)))
    return found


def expert_stacks(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Fused experts in full precision: dotted name, module and the name of each of its two 3-D parameters."""
    for name, module in model.named_modules():
        if is_fused_experts(module) and not isinstance(module, ExpertsForward):
            for stack in stack_names(module):
                yield name, module, stack


def rule_for_experts(recipe: Recipe, name: str, stack: str) -> Rule | None:
    """The rule that decides about a 3-D parameter of fused experts: by its own name or that of the module."""
    return recipe.rule_for(f"{name}.{stack}" if name else stack, within=name)


def _left_of_experts(name: str, experts: nn.Module, recipe: Recipe | None) -> Iterator[Left]:
    """The projections of fused experts that stay in full precision."""
    done: list[str] = []
    if isinstance(experts, QuantizedExperts):
        done = experts.quantized_stacks
    elif recipe is not None:
        done = [stack for stack in stack_names(experts) if rule_for_experts(recipe, name, stack)]
    for stack in stack_names(experts):
        weight = experts._parameters.get(stack)
        if weight is not None and stack not in done:
            where = f"{name}.{stack}" if name else stack
            yield Left(where, "the recipe leaves it", True, (weight,), made=False)


def kind_of_layer(layer: nn.Module) -> LayerKind:
    """What rules call it."""
    return "conv" if isinstance(layer, _ConvNd) else "linear"


def names_of_weights(model: nn.Module) -> list[tuple[str, LayerKind]]:
    """Every module with weights of its own that a pattern may mean, and its kind."""
    modules = model.named_modules()
    found: list[tuple[str, LayerKind]] = [
        (name, kind_of_layer(module)) for name, module in modules if _weights(module)
    ]
    for name, _, stack in expert_stacks(model):
        found.append((f"{name}.{stack}" if name else stack, "linear"))
    return found


def _weights(module: nn.Module) -> list[Tensor]:
    """A module's own parameters of two and more dimensions; where its weight is made elsewhere, of what makes it."""
    own: list[Tensor | None] = list(module._parameters.values())
    if is_parametrized(module):
        own += list(module.parametrizations.parameters())  # type: ignore[union-attr]
    elif is_made(module) and not any(p is not None and p.dim() > 1 for p in own):
        own.append(getattr(module, "weight", None))
    return [p for p in own if p is not None and not isinstance(p, UninitializedParameter) and p.dim() > 1]


def _why_no_layer(module: nn.Module, past: bool) -> str:
    kind = type(module).__name__
    if past or isinstance(module, nn.MultiheadAttention):
        return "MultiheadAttention, which reads its weights past the layers"
    if is_known(module):
        return why_special(cast(Plain, module)) or kind
    if is_parametrized(module):
        return f"parametrized {type(module).__name__.removeprefix('Parametrized')}"
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return f"recurrent layer {kind}"
    if isinstance(module, _ConvNd):
        return kind if not module.transposed else f"transposed convolution {kind}"
    if any(p is not None and p.dim() == 3 and len(p) > 1 for p in module._parameters.values()):
        return f"experts in one tensor ({kind})"
    return f"{_OTHER} {kind}"


def say(
    model: nn.Module, recipe: Recipe, quantized: Iterable[Tensor], rounded: Collection[int] = ()
) -> tuple[str, bool]:
    """One line on what `prepare` quantizes and leaves, and whether it deserves a warning.

    Args:
        model: about to be prepared.
        recipe: what it is prepared by.
        quantized: the weights that will be.
        rounded: see `left_out`.
    """
    inside = {id(weight): weight.numel() for weight in quantized}
    total = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    groups: dict[tuple[bool, str], list[Left]] = defaultdict(list)
    sums: Counter[tuple[bool, str]] = Counter()
    for left in left_out(model, recipe, rounded):
        key = (left.asked, left.why)
        groups[key].append(left)
        sums[key] += sum(weight.numel() for weight in left.weights)
    unasked = sum(
        number
        for key, number in sums.items()
        if not key[0] and not key[1].startswith(_OTHER)  # positions and the like multiply nothing
    )
    much = unasked > MUCH * max(1, unasked + sum(inside.values()))
    made = any(left.made and not left.asked for lefts in groups.values() for left in lefts)
    parts = [
        _part(why, groups[asked, why], number / max(1, total)) for (asked, why), number in sums.most_common()
    ]
    share = sum(inside.values()) / max(1, total)
    line = f"prepared: {share:.0%} of the parameters are quantized, in {len(inside)} layers"
    line += f"; left: {'; '.join(parts)}" if parts else ""
    if made:
        line += (
            ". To quantize a layer whose weight is made elsewhere, make it a parameter first (prune.remove, "
            "remove_weight_norm, remove_spectral_norm, remove_parametrizations)"
        )
    return line, much or made


def _part(why: str, lefts: list[Left], share: float) -> str:
    names = lefts[0].name or "the model"
    more = f" and {len(lefts) - 1} more" if len(lefts) > 1 else ""
    return f"{names}{more} {share:.0%} ({why})"


def why_nothing(model: nn.Module, recipe: Recipe) -> str:
    """The message where a recipe quantizes no layer: what the model has instead."""
    line = "the recipe matches no linear layer or convolution of the model; look at the patterns of its rules"
    reasons: dict[str, Left] = {}
    for left in left_out(model, recipe):
        if not left.asked:
            reasons.setdefault(left.why, left)
    if reasons:
        line += "; not quantized are: " + "; ".join(
            f"{left.name or 'the model'} ({why})" for why, left in reasons.items()
        )
    return line
