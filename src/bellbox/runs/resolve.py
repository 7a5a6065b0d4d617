"""From what somebody asks for to what a run is: the one place where a `TrainConfig` is checked and filled in.

```python
config = resolve(TrainConfig(steps=200), bellbox.data.open("classics"))
```

What comes out is frozen, and is what config.yaml in the run's folder holds: so a run goes on as it was begun, on any
machine.
"""

from __future__ import annotations

import dataclasses
import math
import os
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from bellbox.errors import BellboxError
from bellbox.models import ViTConfig, preset, vision_preset
from bellbox.quantizers.own import modules_of
from bellbox.runs.build import make_recipe, pick_device, skeleton
from bellbox.runs.config import (
    CewtSection,
    QuantizationSection,
    ResolvedConfig,
    TrainConfig,
    hyperball_rate,
    methods_named,
    rule_of,
)
from bellbox.runs.config_file import load_config
from bellbox.runs.open_phases import with_phases
from bellbox.runs.planner import quantized_fraction
from bellbox.utils.processor import choose_precision

if TYPE_CHECKING:
    from bellbox.data.images import ImageDataset

BBQ_EVERY = 16
"""Steps between projections with BBQ: often enough that its codes stay equally used, seldom enough to cost nothing."""


class Text(Protocol):
    """What matters of a dataset of tokens."""

    @property
    def vocab_size(self) -> int:
        """Entries of its tokenizer."""
        ...


def resolve(raw: TrainConfig, data: Text | ImageDataset) -> ResolvedConfig:
    """Check a configuration, and fill in everything that depends on the data, the machine or the method.

    Args:
        raw: as the user gave it.
        data: those of `data.source`: images for a vision task, else tokens.

    Raises:
        BellboxError: a value out of range, or a model that does not fit the data.
    """
    raw = with_phases(raw.check())
    overrides = (
        _vision_overrides(raw, cast("ImageDataset", data))
        if raw.task == "vision"
        else _text_overrides(raw, cast("Text", data).vocab_size)
    )
    model = dataclasses.replace(raw.model, overrides=overrides)
    cewt, quantization = _resolve_cewt(raw.optimizer.cewt, raw.quantization, raw.total_steps)
    changes: dict[str, Any] = {
        "model": model,
        "optimizer": dataclasses.replace(raw.optimizer, cewt=cewt),
        "quantization": quantization,
        "steps": raw.total_steps,
        "tokens": None,
        "precision": _precision(raw),
        "methods_from": modules_of(methods_named(quantization)),
    }
    if raw.phases.quantized == "optimal":
        known = dataclasses.replace(raw, model=model, quantization=quantization)
        changes["phases"] = dataclasses.replace(raw.phases, quantized=_optimal_fraction(known))
    return _as_resolved(raw, **changes)


def load_resolved(path: str | os.PathLike[str]) -> ResolvedConfig:
    """The configuration that a run has saved.

    Raises:
        BellboxError: it cannot be read, or leaves open what no run leaves open.
    """
    config = load_config(path)
    for key, value, is_open in (
        ("steps", config.steps, config.steps is None),
        ("phases.quantized", config.phases.quantized, isinstance(config.phases.quantized, str)),
        ("precision", config.precision, config.precision == "auto"),
    ):
        if is_open:
            raise BellboxError(
                f"{path}: {key} is {value}, which the configuration of a run never leaves open: it was edited, or no "
                f"run has begun here; begin it with bellbox train --config {path}"
            )
    # Null is of a run of before there was a choice.
    phases = dataclasses.replace(config.phases, bits_before=config.phases.bits_before or [])
    return _as_resolved(config, phases=phases)


def _as_resolved(config: TrainConfig, **changes: Any) -> ResolvedConfig:
    values = {entry.name: getattr(config, entry.name) for entry in dataclasses.fields(TrainConfig)}
    return ResolvedConfig(**{**values, **changes})


def _precision(raw: TrainConfig) -> Literal["bf16", "fp32"]:
    if raw.precision == "auto":
        return choose_precision(pick_device(raw.device))[0]
    return raw.precision


def _text_overrides(raw: TrainConfig, vocab_size: int) -> dict[str, Any]:
    overrides = dict(raw.model.overrides)
    asked = overrides.setdefault("vocab_size", vocab_size)
    if isinstance(asked, int) and asked < vocab_size:
        raise BellboxError(
            f"model.overrides.vocab_size is {asked}, the tokenizer of data.source '{raw.data.source}' "
            f"has {vocab_size} entries; leave it out"
        )
    context = raw.data.context
    if "max_position_embeddings" not in overrides:
        largest = preset(raw.model.preset, **overrides).max_position_embeddings
        overrides["max_position_embeddings"] = max(context, largest)
    positions = overrides["max_position_embeddings"]
    if isinstance(positions, int) and positions < context:
        raise BellboxError(
            f"data.context is {context}, model.overrides.max_position_embeddings only {positions}; raise that"
        )
    return overrides


def _vision_overrides(raw: TrainConfig, images: ImageDataset) -> dict[str, Any]:
    overrides, (channels, height, width) = dict(raw.model.overrides), images.train.shape
    asked = overrides.setdefault("num_labels", len(images.classes))
    if isinstance(asked, int) and asked < len(images.classes):
        raise BellboxError(
            f"model.overrides.num_labels is {asked}, data.source '{raw.data.source}' has {len(images.classes)} "
            "classes; leave it out"
        )
    facts = {"num_channels": channels}
    if isinstance(vision_preset(raw.model.preset), ViTConfig):
        if height != width:
            raise BellboxError(f"{raw.model.preset} takes square images, these are {height} x {width}")
        facts["image_size"] = height
    elif raw.vision.image_size is not None:  # what the model says of itself wherever it goes
        facts["image_size"] = raw.vision.image_size
    for name, value in facts.items():
        if overrides.setdefault(name, value) != value:
            raise BellboxError(
                f"model.overrides.{name} is {overrides[name]}, that of data.source '{raw.data.source}' is {value}; "
                "leave it out"
            )
    vision_preset(raw.model.preset, **overrides)
    return overrides


def _resolve_cewt(
    cewt: CewtSection, section: QuantizationSection, steps: int
) -> tuple[CewtSection, QuantizationSection]:
    """Write out what is left open: BBQ learns rotated weights on the hyperball, other methods neither."""
    own = section.recipe is None and section.method == "bbq" and section.weight_only is None
    cewt = dataclasses.replace(cewt, rule=rule_of(cewt.rule, section.method, section.recipe))
    every = cewt.every
    if every is None and cewt.rule == "published":
        every = 1
    elif every is None:
        every = BBQ_EVERY if own and section.weights_rotated is not False else 0
    lr = hyperball_rate(cewt.rule, steps) if cewt.lr is None else cewt.lr
    cewt = dataclasses.replace(cewt, every=every, lr=lr)
    if cewt.every == 0 or section.recipe is not None:
        return cewt, section
    if section.method == "none":
        raise BellboxError(
            "optimizer.cewt constrains quantized weights, but quantization.method is none; leave it out"
        )
    # A weight whose input is not quantized has nothing that would rotate the input.
    if section.weights_rotated is None and section.weight_only != "float":
        section = dataclasses.replace(section, weights_rotated=True)
    return cewt, section


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
