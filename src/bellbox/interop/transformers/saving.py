"""`save_pretrained` of models with low-bit layers: what transformers writes, and then our section, sealed.

transformers writes `config.json` before the weights; our checksums are of both. So the class of a loaded model is
one derived from its own, with a `save_pretrained` that finishes the folder.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bellbox.errors import BellboxError
from bellbox.formats import description
from bellbox.formats.description import CONFIG, NO_SUCH_FILE, QUANT_METHOD, SECTION, TENSORS, WEIGHTS_FILE
from bellbox.formats.guard import guard
from bellbox.formats.packed import tensors_of
from bellbox.interop.transformers.config import PREPARED, PREPARED_VERSION
from bellbox.interop.transformers.remote_code import MODULE, auto_classes_of, modeling_text
from bellbox.nn import CodedLayer, PackedExperts, QuantizedLayer
from bellbox.nn.compact import Compact
from bellbox.nn.quantized import ROTATED
from bellbox.nn.quantized_table import QuantizedTable
from bellbox.nn.tools import unique_tensors
from bellbox.utils.files import describe_file, read_json, write_text


class SavedByBellbox(nn.Module):
    """What the class of a model with low-bit layers adds to its own."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """As in transformers; the folder also opens with `bellbox.load`.

        Raises:
            BellboxError: options that split the model over several files or rename them.
        """
        parent: Any = super()
        if getattr(self, "_hf_peft_config_loaded", False):
            parent.save_pretrained(save_directory, **kwargs)
            return
        push = kwargs.pop("push_to_hub", False)
        _refuse_options(self, kwargs)
        target = Path(save_directory)
        if target.is_file():
            raise BellboxError(f"{target}: is a file; name a folder")
        target.mkdir(parents=True, exist_ok=True)
        if not kwargs.get("is_main_process", True):
            return
        with tempfile.TemporaryDirectory(prefix=".writing.", dir=target) as scratch:
            parent.save_pretrained(scratch, **kwargs)
            finish(self, Path(scratch))
            names = sorted(path.name for path in Path(scratch).iterdir())
            for name in sorted(
                names, key=lambda each: each == CONFIG
            ):  # the configuration last: it vouches for all
                os.replace(Path(scratch) / name, target / name)
        if push:
            more = {key: kwargs[key] for key in ("token", "repo_id", "commit_message") if key in kwargs}
            parent.push_to_hub(more.pop("repo_id", target.name), **more)


def _refuse_options(model: Any, options: dict[str, Any]) -> None:
    for name in ("variant", "distributed_checkpoint"):
        if options.get(name):
            raise BellboxError(
                f"save_pretrained({name}=...): a Bellbox model is one file, {TENSORS}; leave it out"
            )
    options["save_original_format"] = False  # names of our file are the model's own
    # One file, however large: its checksum stands in config.json.
    options["max_shard_size"] = sum(t.nbytes for t in state_to_save(model).values()) + 1


def state_to_save(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a packed or prepared model as files have them, each once.

    Raises:
        BellboxError: a model that is partly packed and partly in training form.
    """
    packed = any(isinstance(module, CodedLayer) for module in model.modules())
    if not packed:
        return {name: value.detach() for name, value in unique_tensors(model).items()}
    if any(isinstance(module, QuantizedLayer | QuantizedTable) for module in model.modules()):
        raise BellboxError("some layers are packed and some in training form: convert the whole model")
    return {name: value.detach() for name, value in tensors_of(model).items()}


def guarded_state(model: nn.Module) -> dict[str, Tensor]:
    """`state_to_save` and the guard, unless some layer has a plain weight for transformers to load."""
    tensors = state_to_save(model)
    layers = coded_layers(model)
    if layers:
        stacks = (
            f"{name}.{stack}"
            for name, module in model.named_modules()
            if isinstance(module, PackedExperts)
            for stack in module.packed_stacks
        )
        return tensors | guard(layers, stacks)
    rotated = [name.removesuffix(f".{ROTATED}") for name in tensors if name.endswith(f".{ROTATED}")]
    return tensors | guard(rotated)


def coded_layers(model: nn.Module) -> dict[str, CodedLayer]:
    """The packed layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CodedLayer)}


def finish(model: Any, root: Path) -> None:
    """Put our section, its seal and the module for `trust_remote_code` into a folder that transformers wrote."""
    for old in root.glob("*.py"):
        old.unlink()  # the module that the model came from; it is written anew
    files = {TENSORS: describe_file(root / TENSORS)}
    layers = coded_layers(model)
    if layers:
        section = description.section(model, layers, files)
        section["model"] = known_model(model)
    else:
        recipe = model.hf_quantizer.quantization_config.recipe
        section = {
            "quant_method": QUANT_METHOD,
            PREPARED: PREPARED_VERSION,
            "recipe": recipe.to_dict(),
            "files": files,
        }
    write_config(root, read_json(root / CONFIG), section, auto_classes_of(model))


def write_config(
    root: Path, config: dict[str, Any], section: dict[str, Any], autos: Mapping[str, str]
) -> None:
    """Write `config.json` with our section, sealed, and the module that its `auto_map` names.

    Args:
        root: the folder.
        config: what transformers wants.
        section: ours, without its checksum.
        autos: Auto classes, and the classes that they give.
    """
    config = {key: value for key, value in config.items() if key not in ("auto_map", SECTION)}
    config[WEIGHTS_FILE] = NO_SUCH_FILE
    if autos:
        config["auto_map"] = {auto: f"{MODULE}.{name}" for auto, name in sorted(autos.items())}
        write_text(root / f"{MODULE}.py", modeling_text(sorted(set(autos.values()))))
    config[SECTION] = section
    section["sha256"] = description.seal(config)
    write_text(root / CONFIG, json.dumps(config, indent=2) + "\n")


def known_model(model: Any) -> dict[str, Any] | None:
    """What `bellbox.models` builds with the same names and the same function, as files say it; None for others."""
    from bellbox.models import build
    from bellbox.models.hf_config import config_of

    if type(model).__name__ != "LlamaForCausalLM":
        return None
    try:
        config = config_of(Path(CONFIG), model.config.to_dict() | {SECTION: None})
    except BellboxError:
        return None
    with torch.device("meta"):
        ours = build(config)
    inside = tuple(
        f"{name}." for name, each in model.named_modules() if isinstance(each, CodedLayer | Compact)
    )
    names = [set(unique_tensors(each, leave_out=inside)) for each in (ours, model)]
    places = dict(ours.named_modules())
    same = names[0] == names[1] and all(name[:-1] in places for name in inside)
    return config.to_dict() if same else None
