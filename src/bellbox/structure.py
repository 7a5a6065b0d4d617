"""The ends of a network, read off its structure: what reads the input, what gives the outputs, routers, tied weights.

Low-bit networks keep these few layers in full precision, whatever they are called. Nothing is run. Sources, the surest
first: what the model says of itself (transformers' `get_output_embeddings`, timm's `classifier` and `first_conv`),
parameters that are one and the same, the place of a layer among the others with its widths, and words in names.

The *body* is what repeats: alike children of one parent, such as blocks. A layer after the body gives an output where
no later layer takes in as many features as it gives.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, cast

from torch import nn
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]

from bellbox.nn import PackedExperts, is_transposed_linear
from bellbox.nn.transposed import transposed_sizes

IMAGE_CHANNELS = (1, 3, 4)
"""Channels of pictures and sounds as networks read them."""

FEW = 3
"""With fewer layers nothing but a name tells the ends of a network from the rest."""

_HEAD_WORD = re.compile(
    r"(.*_)?(heads?|classifiers?|aux|auxlogits|auxiliary|predictors?|predictions?|logits|score|(class|bbox)_embed)\d*",
    re.IGNORECASE,
)
_LAST_WORD = re.compile(
    r"fc\d*|out(put)?|(proj|conv)_out|to_(logits|out)|out(put)?_(conv|layer|projection)|final\w*"
)
_OUTPUT_PROJECTION = re.compile(r"(visual|vision|text|image|audio)_projection")
_STEM_WORD = re.compile(r"patch_?(embed|proj)\w*")
_EMBED_WORD = re.compile(r"(\w*_)?embed(s|dings?|der)?")
_ROUTER_WORD = re.compile(r"(moe_|w_?|\w*experts?_)?gate|(\w+_)?router(_proj)?|gating(_network)?|switch|wg")
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts", "n_experts")


class _Layer(NamedTuple):
    """A layer that multiplies by a weight, and how many features go in and out."""

    name: str
    module: nn.Module
    inputs: int
    outputs: int
    body: bool

    @property
    def words(self) -> list[str]:
        return self.name.split(".")

    @property
    def conv(self) -> bool:
        return isinstance(self.module, _ConvNd)


def ends(model: nn.Module) -> dict[str, str]:
    """The layers that stay in full precision by default: the ends, and convolutions over lines that must be causal.

    Args:
        model: plain, prepared or packed; on any device, the meta device too.

    Returns:
        dotted name -> reason. Names of layers that do not multiply by a weight of their own are not among them, and
        where every layer would be, none is.
    """
    adapters, layers = _apart_from_adapters(model)
    found: dict[str, str] = {}
    for source in (_tied, _declared_outputs, _outputs, _declared_inputs, _inputs, _routers, _causal_lines):
        for name, reason in source(model, layers):
            found.setdefault(name, reason)
    known = {layer.name for layer in layers}
    kept = {} if known <= set(found) else {name: found[name] for name in found if name in known}
    return {**kept, **adapters}


def outputs(model: nn.Module) -> dict[str, str]:
    """The layers that give the outputs, tied ones included: dotted name -> reason, as in `ends`."""
    _, layers = _apart_from_adapters(model)
    return {
        name: reason for source in (_outputs, _declared_outputs) for name, reason in source(model, layers)
    }


def embedding_weights(model: nn.Module) -> dict[int, str]:
    """Id of each embedding's weight -> dotted name of the embedding: a layer whose weight is among them is tied."""
    return {
        id(module.weight): name for name, module in model.named_modules() if isinstance(module, nn.Embedding)
    }


# The parts of a network


def widths(module: nn.Module) -> tuple[int, int] | None:
    """Features that go into a layer and come out, or None where it is no linear layer or convolution."""
    if isinstance(module, _ConvNd):
        return module.in_channels, module.out_channels
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if is_transposed_linear(module):
        return transposed_sizes(module)
    return None


def _apart_from_adapters(model: nn.Module) -> tuple[dict[str, str], list[_Layer]]:
    """Adapters with their reason, and the other layers."""
    adapters = dict(_adapters(model))
    return adapters, [layer for layer in _layers(model) if layer.name not in adapters]


def _layers(model: nn.Module) -> list[_Layer]:
    body = _body(model)
    return [
        _Layer(name, module, *wide, id(module) in body)
        for name, module in model.named_modules()
        if (wide := widths(module)) is not None
    ]


def _body(model: nn.Module) -> set[int]:
    """Ids of the layers inside blocks that repeat: two or more children of one parent that are built alike."""
    found: set[int] = set()
    shapes: dict[int, Any] = {}
    for name, parent in model.named_modules():
        alike: dict[Any, list[nn.Module]] = defaultdict(list)
        for leaf, child in parent.named_children():
            path = f"{name}.{leaf}".split(".")
            # Several heads are alike as well, and no body.
            if widths(child) is None and not any(map(_HEAD_WORD.fullmatch, path)):
                alike[_shape(child, shapes)].append(child)
        for shape, children in alike.items():
            if shape is not None and len(children) > 1:
                found.update(id(module) for child in children for module in child.modules())
    return found


def _shape(module: nn.Module, known: dict[int, Any]) -> Any:
    """What two modules share that are built alike: their class, of containers their contents; None without a layer."""
    if id(module) not in known:
        inside = [_shape(child, known) for child in module.children()]
        if widths(module) is not None:
            shape: Any = type(module)
        elif all(each is None for each in inside):
            shape = None
        elif isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict) and type(
            module
        ).__module__.startswith("torch."):
            shape = tuple(each for each in inside if each is not None)
        else:
            shape = type(module)
        known[id(module)] = shape
    return known[id(module)]


def _is_stack(layers: list[_Layer]) -> bool:
    """Whether the layers have numbers for names, and nothing says that it is a whole network: each counts the same."""
    nameless = all(layer.name.replace(".", "").isdigit() or not layer.name for layer in layers)
    return nameless and (len(layers) < FEW or not _reads_pictures(layers[0]))


# What the model says of itself


def _tied(model: nn.Module, layers: list[_Layer]) -> Iterator[tuple[str, str]]:
    tables = embedding_weights(model)
    for layer in layers:
        weight = layer.module._parameters.get("weight")
        if id(weight) in tables:
            yield layer.name, f"tied to the embedding {tables[id(weight)]}"


def _declared_outputs(model: nn.Module, layers: list[_Layer]) -> Iterator[tuple[str, str]]:
    """transformers' output embeddings and timm's classifier."""
    head = _called(model, "get_output_embeddings")
    for each in _inside(model, layers, head):
        yield each.name, "gives the logits (get_output_embeddings)"
    for path in _timm(model, "classifier"):
        for each in _last_inside(layers, path):
            yield each.name, "gives the logits (timm's classifier)"


def _declared_inputs(model: nn.Module, layers: list[_Layer]) -> Iterator[tuple[str, str]]:
    """timm's first convolution; a layer in place of transformers' input embeddings."""
    for path in _timm(model, "first_conv"):
        inside = [each for each in layers if _is_in(each.name, path)]
        for each in inside[:1]:
            yield each.name, "reads the input (timm's first_conv)"
    for each in _inside(model, layers, _called(model, "get_input_embeddings"))[:1]:
        if not each.body:
            yield each.name, "reads the input (get_input_embeddings)"


def _called(model: nn.Module, method: str) -> Any:
    """What a method of transformers' models gives; None where there is none or the model does not implement it."""
    if not callable(getattr(model, method, None)):
        return None
    try:
        return getattr(model, method)()
    except (NotImplementedError, AttributeError, TypeError):  # as many models without such a layer answer
        return None


def _timm(model: nn.Module, key: str) -> list[str]:
    """Module names under a key of timm's description of a model."""
    about = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    value = about.get(key) if isinstance(about, dict) else getattr(about, key, None)
    values = (value,) if isinstance(value, str) else value if isinstance(value, tuple | list) else ()
    return [name for name in cast("Iterable[Any]", values) if isinstance(name, str)]


def _is_in(name: str, path: str) -> bool:
    return name == path or name.startswith(f"{path}.")


def _inside(model: nn.Module, layers: list[_Layer], module: Any) -> list[_Layer]:
    if not isinstance(module, nn.Module) or module is model:
        return []
    within = set(map(id, module.modules()))
    return [layer for layer in layers if id(layer.module) in within]


def _last_inside(layers: list[_Layer], path: str) -> list[_Layer]:
    return [layer for layer in layers if _is_in(layer.name, path)][-1:]


# The place of a layer among the others


def _outputs(model: nn.Module, layers: list[_Layer]) -> Iterator[tuple[str, str]]:
    if _is_stack(layers) or not layers:
        return
    if any(_last_inside(layers, path) for path in _timm(model, "classifier")):
        return  # the model has said
    last_of_body = max((i for i, layer in enumerate(layers) if layer.body), default=len(layers) - 1)
    declared = _inside(model, layers, _called(model, "get_output_embeddings"))
    # A model that names its logits has other outputs only beside its base, not in it.
    base = set(map(id, _inside(model, layers, getattr(model, "base_model", None)))) if declared else ()
    candidates = [
        layer
        for i, layer in enumerate(layers)
        if not layer.body
        and id(layer) not in base
        and (i > last_of_body or _head_of(layer) or _is_apart(layer, layers))
    ]
    if (
        not any(layer.body for layer in layers)
        and layers[-1] not in candidates
        and _is_new(layers[-1], layers)
    ):
        candidates.append(layers[-1])
    last = {
        id(layer)
        for i, layer in enumerate(candidates)
        if not any(_takes(later, layer) for later in candidates[i + 1 :])
    }
    for layer in candidates:
        head = _head_of(layer)
        # In one head the layer that ends it may be registered before those that feed it.
        final = [each for each in candidates if head and _head_of(each) == head and id(each) in last]
        fed = id(layer) not in last or any(_takes(each, layer) for each in final if each is not layer)
        if not fed or ("." not in layer.name and _OUTPUT_PROJECTION.fullmatch(layer.name)):
            yield layer.name, "gives the outputs"


def _head_of(layer: _Layer) -> str:
    """The name up to the first word that says head; empty without one."""
    for i, word in enumerate(layer.words):
        if _HEAD_WORD.fullmatch(word):
            return ".".join(layer.words[: i + 1])
    return ""


def _is_apart(layer: _Layer, layers: list[_Layer]) -> bool:
    """Whether a layer beside the body, wherever it is registered, gives what no layer takes."""
    bodied = "." not in layer.name and any(each.body for each in layers)
    return bodied and all(each.inputs != layer.outputs or _reads_pictures(each) for each in layers)


def _is_new(last: _Layer, layers: list[_Layer]) -> bool:
    """Whether the last layer of a network without a body gives what no other takes: logits, not features."""
    others = [each for each in layers if each is not last]
    if last.name == "fc":
        return True
    if len(layers) < FEW and not _LAST_WORD.fullmatch(last.words[-1]):
        return False
    fed = bool(others) and _takes(last, others[-1])
    return fed and all(each.inputs != last.outputs or _reads_pictures(each) for each in others)


def _takes(later: _Layer, layer: _Layer) -> bool:
    """Whether a layer may read what an earlier one gives, flattened where a linear layer follows a convolution."""
    if later.inputs == layer.outputs:
        return True
    pixels, rest = divmod(later.inputs, layer.outputs)
    return (
        layer.conv
        and not later.conv
        and layer.outputs >= 8
        and rest == 0
        and math.isqrt(pixels) ** 2 == pixels
    )


def _inputs(model: nn.Module, layers: list[_Layer]) -> Iterator[tuple[str, str]]:
    if _is_stack(layers):
        return
    convolutions = [layer for layer in layers if layer.conv and not _is_depthwise(layer)]
    declared = _declared_channels(model)
    first = convolutions[0] if convolutions else None
    for layer in convolutions:
        same = first is not None and layer.inputs == first.inputs and (layer is first or not layer.body)
        if layer.inputs == 3 or (layer.inputs in (*IMAGE_CHANNELS, *declared) and same):
            yield layer.name, f"reads the input ({layer.inputs} channels)"
    for layer in layers:
        if not layer.conv and not layer.body and any(map(_STEM_WORD.fullmatch, layer.words)):
            yield layer.name, "reads the input (patches)"
    yield from _first_of_all(model, layers)


def _first_of_all(model: nn.Module, layers: list[_Layer]) -> Iterator[tuple[str, str]]:
    """The first layer, where a body follows and nothing before it could have made what it reads."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            return  # tokens come first
        if widths(module) is not None:
            break
    bodied = any(layer.body for layer in layers)
    for layer in layers[:1] if bodied else []:
        made = any(each.outputs == layer.inputs for each in layers)
        named = any(map(_EMBED_WORD.fullmatch, layer.words))
        if not layer.body and (named or not made) and not _is_depthwise(layer):
            yield layer.name, "reads the input (the first layer)"


def _reads_pictures(layer: _Layer) -> bool:
    return layer.conv and layer.inputs in IMAGE_CHANNELS


def _is_depthwise(layer: _Layer) -> bool:
    return layer.inputs > 1 and getattr(layer.module, "groups", 1) == layer.inputs


def _declared_channels(model: nn.Module) -> tuple[int, ...]:
    """Channels of the input in a configuration of transformers' kind."""
    config = getattr(model, "config", None)
    holders = (config, getattr(config, "vision_config", None), getattr(config, "backbone_config", None))
    keys = ("num_channels", "in_channels", "in_chans", "num_mel_bins")
    values = (getattr(holder, key, None) for holder, key in itertools.product(holders, keys))
    return tuple({value for value in values if isinstance(value, int)})


# Convolutions over tokens


def _causal_lines(model: nn.Module, layers: list[_Layer]) -> Iterator[tuple[str, str]]:
    """Convolutions over lines that must not look ahead: one scale for the whole line would."""
    generates = _called(model, "can_generate") is True
    both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    encoder = {id(each) for each in _inside(model, layers, _called(model, "get_encoder") if both else None)}
    for layer in layers:
        conv = layer.module
        if not isinstance(conv, nn.Conv1d):
            continue
        reach = conv.dilation[0] * (conv.kernel_size[0] - 1)
        padded = not isinstance(conv.padding, str) and conv.padding[0] >= reach > 0  # and cut off at the end
        if padded or (generates and id(layer) not in encoder):
            yield layer.name, "its tokens would see each other in one scale"


# Adapters


def _adapters(model: nn.Module) -> Iterator[tuple[str, str]]:
    """What a layer of peft trains beside its `base_layer`, by the names that it gives."""
    for name, holder in model.named_modules():
        names = getattr(holder, "adapter_layer_names", ())
        if not isinstance(names, tuple) or "base_layer" not in holder._modules:
            continue
        for leaf in names:
            child = holder._modules.get(leaf)
            for inner, module in () if child is None else child.named_modules(prefix=leaf):
                if widths(module) is not None:
                    yield (f"{name}.{inner}" if name else inner), "an adapter"


# Mixtures of experts


def _routers(model: nn.Module, layers: list[_Layer]) -> Iterator[tuple[str, str]]:
    by_module = {id(layer.module): layer for layer in layers}
    for parent in model.modules():
        children = dict(parent.named_children())
        counts = _numbers_of_experts(parent)
        for leaf, child in children.items():
            layer = by_module.get(id(child))
            if layer is not None and _is_router(layer, counts):
                yield layer.name, f"routes to {layer.outputs} experts"
            elif layer is None and any("expert" in other for other in children) and "expert" not in leaf:
                for inner in child.modules():
                    layer = by_module.get(id(inner))
                    if layer is not None and _is_router(layer, counts):
                        yield layer.name, f"routes to {layer.outputs} experts"
        for leaf, child in children.items():
            layer = by_module.get(id(child))
            if (
                layer is not None
                and not layer.conv
                and _ROUTER_WORD.fullmatch(leaf)
                and _chooses(layer, children)
            ):
                yield layer.name, f"routes, as its name says ({layer.outputs} outputs)"


def _is_router(layer: _Layer, experts: set[int]) -> bool:
    return not layer.conv and layer.outputs in experts and layer.outputs < layer.inputs


def _numbers_of_experts(parent: nn.Module) -> set[int]:
    """How many experts may lie beside a router that is a child of this module."""
    counts = {getattr(parent, key, None) for key in _EXPERT_COUNTS}
    for module in (parent, *parent.children()):
        if isinstance(module, PackedExperts):
            counts.add(getattr(module, "num_experts", None))
        if widths(module) is None:
            counts.update(len(p) for p in module._parameters.values() if p is not None and p.dim() == 3)
        if isinstance(module, nn.ModuleList | nn.ModuleDict) and len(module) > 1 and module is not parent:
            kinds = {_shape(child, {}) for child in module.children()}
            if len(kinds) == 1 and None not in kinds:
                counts.add(len(module))
    return {count for count in counts if isinstance(count, int) and count > 1}


def _chooses(layer: _Layer, siblings: dict[str, nn.Module]) -> bool:
    """Whether a layer named like a router has few outputs, and no sibling of its shape, as the gate of a GLU has."""
    twins = [widths(each) for each in siblings.values() if each is not layer.module]
    return layer.outputs < layer.inputs and (layer.inputs, layer.outputs) not in twins
