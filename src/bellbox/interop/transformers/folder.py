"""Whole folders: a model of transformers that Bellbox packed, with its tokenizer and its card."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from bellbox.convert import convert, unwrapped
from bellbox.errors import BellboxError
from bellbox.formats import description
from bellbox.formats.companions import copy_companions
from bellbox.formats.description import CONFIG
from bellbox.formats.packed import is_packed
from bellbox.interop.transformers.card import write_card
from bellbox.interop.transformers.classes import adopt
from bellbox.interop.transformers.config import BellboxConfig
from bellbox.interop.transformers.quantizer import BellboxHfQuantizer
from bellbox.interop.transformers.remote_code import auto_classes_of
from bellbox.interop.transformers.saving import coded_layers, state_to_save
from bellbox.nn.compact import Compact
from bellbox.nn.quantized import QuantizedLayer
from bellbox.utils.files import new_folder


def save_transformers(model: nn.Module, folder: str | os.PathLike[str], *, tokenizer: Any = None) -> None:
    """Write a folder that `from_pretrained` loads with packed layers; whole or not at all.

    Args:
        model: of transformers, prepared (it is converted, and stays as it is) or packed.
        folder: new, empty, or an earlier packed model, which is replaced.
        tokenizer: an object with `save_pretrained` (a tokenizer, a processor), or a folder whose tokenizer, chat
            template and generation configuration come along.

    Raises:
        BellboxError: no model of transformers, nothing low-bit in it, a layer that cannot be packed, or the folder
            cannot be used.
    """
    inner = unwrapped(model)
    if not isinstance(inner, PreTrainedModel):
        raise BellboxError(
            f"save_transformers writes models of transformers, not {type(inner).__name__}; "
            "bellbox export hf writes those of bellbox.models, and bellbox.save any other"
        )
    if any(isinstance(module, QuantizedLayer) for module in inner.modules()):
        inner = convert(inner)
    as_packed(inner)
    target = Path(folder)
    with new_packed_folder(target) as writing:
        inner.save_pretrained(writing)
        if isinstance(tokenizer, (str, os.PathLike)):
            copy_companions(Path(tokenizer), writing)
        elif tokenizer is not None:
            tokenizer.save_pretrained(writing)
        tables = {
            name: each.rows * each.columns
            for name, each in inner.named_modules()
            if isinstance(each, Compact)
        }
        write_card(writing, coded_layers(inner), state_to_save(inner), auto_classes_of(inner), tables)


def as_packed(model: Any) -> None:
    """Have a packed model of transformers say what it is: to `save_pretrained`, to the trainer, to its configuration.

    Raises:
        BellboxError: it has no packed layer.
    """
    layers = coded_layers(model)
    if not layers:
        raise BellboxError(
            "the model has no packed layers: call bellbox.prepare, train, and bellbox.convert first"
        )
    config = BellboxConfig.from_dict({**description.section(model, layers, {}), "sha256": ""})
    model.config.quantization_config = config
    model.hf_quantizer = BellboxHfQuantizer(config)
    adopt(model)


def new_packed_folder(target: Path) -> Any:
    """`new_folder` in place of nothing, or of an earlier packed model.

    Raises:
        BellboxError: the folder holds something else.
    """
    if (target / CONFIG).is_file() and not is_packed(target):
        raise BellboxError(f"{target}: the folder holds something else; name a new or empty folder")
    return new_folder(target, replaces=CONFIG)
