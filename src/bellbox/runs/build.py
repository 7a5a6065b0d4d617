"""From a configuration to what it describes; trainer and `load_run` build the same model through here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bellbox.convert import new_layers, new_tables, prepare
from bellbox.core.grid import levels_from_bits
from bellbox.core.sharded import part_like, whole
from bellbox.errors import BellboxError
from bellbox.models import build, lecun_, preset, vision_preset
from bellbox.nn import quantized_inside
from bellbox.nn.state import adopt_all
from bellbox.nn.tools import unique_tensors
from bellbox.quantizers.learned import LearnedQuantizer
from bellbox.recipe import Recipe, recipe_from_dict
from bellbox.runs.config import CEWT, PAPER, QuantizationSection, ResolvedConfig, TrainConfig
from bellbox.utils.skeleton import on_meta


def skeleton(config: TrainConfig) -> nn.Module:
    """The model of a configuration without memory for its weights, unprepared."""
    with on_meta():
        return _network(config)


def _network(config: TrainConfig, seed: int | None = None) -> nn.Module:
    name, overrides = config.model.preset, config.model.overrides
    if config.task == "vision":
        return build(vision_preset(name, **overrides), seed)
    return build(preset(name, **overrides), seed)


def check_quantization(config: TrainConfig, section: QuantizationSection) -> None:
    """Whether the layers of the model can be what a quantization section says, in no time and memory.

    Raises:
        BellboxError: they cannot; as `make_model` would, or the first fit of a codebook.
    """
    model, recipe = skeleton(config), make_recipe(section)
    new_tables(model, recipe)
    made = [each for _, each in new_layers(model, recipe)]
    for layer in (inside for each in made for inside in quantized_inside(each)):
        quantizer = layer.weight_quantizer
        wants = quantizer is not None and quantizer.by_squared_gradients and quantizer.refit_every > 0
        if wants and config.optimizer.kind != "adamw" and layer.stored_weight.dim() == 2:
            raise BellboxError(
                f"optimizer.kind is {config.optimizer.kind}, which keeps no squared gradients of matrices, as "
                f"fisher=true of {section.method} needs them; use adamw, or fisher=false"
            )


def make_recipe(section: QuantizationSection) -> Recipe:
    """The recipe that a quantization section describes.

    Raises:
        BellboxError: bits, levels or block out of range, or a recipe that cannot be read.
    """
    if section.recipe is not None:
        return recipe_from_dict(section.recipe)
    activation_bits = section.activation_bits
    fixed = section.levels is not None or bool(section.nested)
    choices: dict[str, Any] = {
        "bits": None if fixed else section.bits,
        "levels": section.levels,
        "activation_levels": None if activation_bits is None else levels_from_bits(activation_bits),
        "zero_point": section.zero_point,
        "granularity": section.granularity,
        "weight_granularity": section.weight_granularity,
        "block": section.block,
        "options": section.options,
        "weight_only": section.weight_only,
        "share_inputs": section.share,
        "integer_forward": section.integer_forward,
        "embedding_bits": None if section.embedding_bits == 32 else section.embedding_bits,
        "embedding_group": section.embedding_group,
        "head_bits": section.head_bits,
    }
    if section.method == "bbq":
        nested = section.nested or None
        return Recipe.bbq(weights_rotated=section.weights_rotated, nested=nested, **choices)
    if section.method == CEWT:
        return Recipe.cewt(weights_rotated=section.weights_rotated, **choices)
    rotated = bool(section.weights_rotated)
    if section.method == PAPER:
        return Recipe.bbq_paper(weights_rotated=rotated, **choices)
    return Recipe.of(section.method, weights_rotated=rotated, **choices)


def make_model(
    config: ResolvedConfig,
    quantization: QuantizationSection | None = None,
    load: Callable[[nn.Module], object] | None = None,
) -> nn.Module:
    """Build and prepare the model of a resolved configuration, on the CPU; weights follow `seed`.

    Under the published rule of CEWT linear layers begin as LeCun's.

    Args:
        config: the configuration.
        quantization: that of the phase; the final one where None.
        load: puts other weights than random ones into the model before it is prepared.
    """
    model = _network(config, config.seed)
    if load is not None:
        load(model)
    elif config.optimizer.cewt.every and config.optimizer.cewt.rule == "published":
        lecun_(model, config.seed)
    return prepare(model, make_recipe(quantization or config.quantization))


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one.

    Raises:
        BellboxError: `cuda` is asked for and not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise BellboxError("device is cuda, but PyTorch sees no GPU here; use device: cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def held_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with each tensor once, as far as this process holds it."""
    return {name: value.detach() for name, value in unique_tensors(model).items()}


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with each tensor once, whole: what layers share goes under the first of its names.

    Of a sharded model every process calls it.
    """
    return {name: whole(value) for name, value in held_tensors(model).items()}


def load_model_tensors(model: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """The inverse of `model_tensors`.

    Raises:
        BellboxError: a tensor is missing, unknown, or has another shape.
    """
    full, state = fitted(model, tensors, where), model.state_dict(keep_vars=True)
    model.load_state_dict({name: part_like(value, full[name]) for name, value in state.items()})


def fitted(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """A whole state dict for a model, of one in which each tensor stands once; nothing is copied.

    Raises:
        BellboxError: a tensor is missing, unknown, or has another shape.
    """
    tensors = dict(tensors)
    names: dict[int, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, LearnedQuantizer):
            module.adopt(tensors, f"{name}." if name else "")
    try:
        adopt_all(model, tensors)
    except BellboxError as error:
        raise BellboxError(f"{where}: {error}") from None
    state = model.state_dict(keep_vars=True)
    full: dict[str, Any] = {
        name: tensors.get(names.setdefault(id(value), name)) for name, value in state.items()
    }
    for name, value in state.items():
        given = full[name]
        if given is None:
            raise BellboxError(f"{where}: tensor '{name}' is missing; was config.yaml changed?")
        if given.shape != value.shape or given.dtype != value.dtype:
            raise BellboxError(
                f"{where}: tensor '{name}' is {given.dtype} {tuple(given.shape)}, config.yaml's model has "
                f"{value.dtype} {tuple(value.shape)}"
            )
    unknown = sorted(set(tensors) - set(state))
    if unknown:
        raise BellboxError(f"{where}: tensor '{unknown[0]}' is not in the model of config.yaml")
    return {name: value for name, value in full.items() if value is not None}
