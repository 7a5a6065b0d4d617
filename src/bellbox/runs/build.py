"""From a configuration to what it describes; trainer and `load_run` build the same model through here."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bellbox.convert import new_layers, prepare
from bellbox.core.grid import levels_from_bits
from bellbox.errors import BellboxError
from bellbox.models import ViTConfig, build, preset, vision_preset
from bellbox.nn.tools import unique_tensors
from bellbox.recipe import Recipe, recipe_from_dict
from bellbox.runs.config import PAPER, CewtSection, QuantizationSection, TrainConfig
from bellbox.runs.planner import quantized_fraction
from bellbox.utils.processor import choose_precision

BBQ_EVERY = 16
"""Steps between projections with BBQ: often enough that its codes stay equally used, seldom enough to cost nothing."""

if TYPE_CHECKING:
    from bellbox.data.images import ImageDataset


def resolve(config: TrainConfig, vocab_size: int) -> TrainConfig:
    """A copy with everything filled in that depends on the data or on defaults, as it is saved with the run.

    Args:
        config: as the user gave it.
        vocab_size: of the data's tokenizer.

    Raises:
        BellboxError: the model's vocabulary or context is too small for the data.
    """
    config = copy.deepcopy(config.check())
    overrides = config.model.overrides
    asked = overrides.setdefault("vocab_size", vocab_size)
    if isinstance(asked, int) and asked < vocab_size:
        raise BellboxError(
            f"model.overrides.vocab_size is {asked}, the tokenizer of data.source '{config.data.source}' "
            f"has {vocab_size} entries; leave it out"
        )
    context = config.data.context
    if "max_position_embeddings" not in overrides:
        largest = preset(config.model.preset, **overrides).max_position_embeddings
        overrides["max_position_embeddings"] = max(context, largest)
    positions = overrides["max_position_embeddings"]
    if isinstance(positions, int) and positions < context:
        raise BellboxError(
            f"data.context is {context}, model.overrides.max_position_embeddings only {positions}; raise that"
        )
    return _resolve_rest(config)


def resolve_vision(config: TrainConfig, dataset: ImageDataset) -> TrainConfig:
    """`resolve` of a vision task: classes, channels and image size follow the data.

    Raises:
        BellboxError: a preset or a size that does not fit the images.
    """
    config = copy.deepcopy(config.check())
    overrides, (channels, height, width) = config.model.overrides, dataset.train.shape
    asked = overrides.setdefault("num_labels", len(dataset.classes))
    if isinstance(asked, int) and asked < len(dataset.classes):
        raise BellboxError(
            f"model.overrides.num_labels is {asked}, data.source '{config.data.source}' has {len(dataset.classes)} "
            "classes; leave it out"
        )
    facts = {"num_channels": channels}
    if isinstance(vision_preset(config.model.preset), ViTConfig):
        if height != width:
            raise BellboxError(f"{config.model.preset} takes square images, these are {height} x {width}")
        facts["image_size"] = height
    elif config.vision.image_size is not None:  # what the model says of itself wherever it goes
        facts["image_size"] = config.vision.image_size
    for name, value in facts.items():
        if overrides.setdefault(name, value) != value:
            raise BellboxError(
                f"model.overrides.{name} is {overrides[name]}, that of data.source '{config.data.source}' is {value}; "
                "leave it out"
            )
    vision_preset(config.model.preset, **overrides)
    return _resolve_rest(config)


def _resolve_rest(config: TrainConfig) -> TrainConfig:
    config.steps, config.tokens = config.total_steps, None
    if config.precision == "auto":
        config.precision, _ = choose_precision(pick_device(config.device))
    _resolve_cewt(config.optimizer.cewt, config.quantization)
    if config.phases.quantized == "optimal":
        config.phases.quantized = _optimal_fraction(config)
    return config


def _resolve_cewt(cewt: CewtSection, section: QuantizationSection) -> None:
    """Write out what is left open: BBQ learns rotated weights on the hyperball, other methods neither."""
    own = section.recipe is None and section.method == "bbq" and section.weight_only is None
    if cewt.every is None:
        cewt.every = BBQ_EVERY if own and section.weights_rotated is not False else 0
    if cewt.every == 0 or section.recipe is not None:
        return
    if section.method == "none":
        raise BellboxError(
            "optimizer.cewt constrains quantized weights, but quantization.method is none; leave it out"
        )
    # A weight whose input is not quantized has nothing that would rotate the input.
    if section.weights_rotated is None and section.weight_only != "float":
        section.weights_rotated = True


def _optimal_fraction(config: TrainConfig) -> float:
    section = config.quantization
    if section.recipe is not None or section.method == "none":
        raise BellboxError(
            "phases.quantized: optimal follows from quantization.bits or levels, which this run does not have; "
            "give a number"
        )
    parameters = sum(p.numel() for p in skeleton(config).parameters())
    weights = make_recipe(section).rules[-1].weights
    assert weights is not None  # of a method that is not none
    try:
        tokens = config.total_steps * config.per_step
        return quantized_fraction(tokens, parameters, math.log2(weights.levels))
    except BellboxError as error:
        raise BellboxError(f"phases.quantized: optimal: {error}") from None


def skeleton(config: TrainConfig) -> nn.Module:
    """The model of a configuration without memory for its weights, unprepared."""
    with torch.device("meta"):
        return _network(config)


def _network(config: TrainConfig, seed: int | None = None) -> nn.Module:
    name, overrides = config.model.preset, config.model.overrides
    if config.task == "vision":
        return build(vision_preset(name, **overrides), seed)
    return build(preset(name, **overrides), seed)


def check_quantization(config: TrainConfig, section: QuantizationSection) -> None:
    """Whether the layers of the model can be what a quantization section says, in no time and memory.

    Raises:
        BellboxError: they cannot; as `make_model` would.
    """
    new_layers(skeleton(config), make_recipe(section))


def make_recipe(section: QuantizationSection) -> Recipe:
    """The recipe that a quantization section describes.

    Raises:
        BellboxError: bits, levels or block out of range, or a recipe that cannot be read.
    """
    if section.recipe is not None:
        return recipe_from_dict(section.recipe)
    activation_bits = section.activation_bits
    choices: dict[str, Any] = {
        "bits": section.bits if section.levels is None else None,
        "levels": section.levels,
        "activation_levels": None if activation_bits is None else levels_from_bits(activation_bits),
        "zero_point": section.zero_point,
        "granularity": section.granularity,
        "weight_granularity": section.weight_granularity,
        "block": section.block,
        "options": section.options,
        "weight_only": section.weight_only,
        "share_inputs": section.share,
    }
    if section.method == "bbq":
        return Recipe.bbq(weights_rotated=section.weights_rotated, **choices)
    rotated = bool(section.weights_rotated)
    if section.method == PAPER:
        return Recipe.bbq_paper(weights_rotated=rotated, **choices)
    return Recipe.of(section.method, weights_rotated=rotated, **choices)


def make_model(config: TrainConfig, quantization: QuantizationSection | None = None) -> nn.Module:
    """Build and prepare the model of a resolved configuration, on the CPU; weights follow `seed`.

    Args:
        config: the configuration.
        quantization: that of the phase; the final one where None.
    """
    return prepare(_network(config, config.seed), make_recipe(quantization or config.quantization))


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


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with each tensor once: what siblings share goes under the first of its names."""
    return {name: value.detach() for name, value in unique_tensors(model).items()}


def load_model_tensors(model: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """The inverse of `model_tensors`.

    Raises:
        BellboxError: a tensor is missing, unknown, or has another shape.
    """
    names: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    full = {name: tensors.get(names.setdefault(id(value), name)) for name, value in state.items()}
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
    model.load_state_dict(full)
