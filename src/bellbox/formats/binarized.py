"""A binarized model as a folder: a file a block, one for the rest, and `config.json`, which says what they are.

`block-0000.safetensors` and so on hold what `BinarizedLinear` stores, norms and biases of one block; in
`rest.safetensors` lie the embeddings, the last norm and the head, each in the narrowest of bf16, fp16 and fp32 that
holds it exactly. Names are those of the model's state dict. As with packed models, what is read is distrusted: sizes
and checksums first, then every name, shape and dtype.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bellbox.core.binarize import Method, Variant
from bellbox.errors import BellboxError
from bellbox.formats import BINARIZED
from bellbox.models import GPT, Llama, ModelConfig, build, config_from_dict
from bellbox.models.blocks import layer_names
from bellbox.models.hf import filled
from bellbox.nn import replace_layer
from bellbox.nn.binarized_linear import BinarizedLinear
from bellbox.nn.huge_pages import own_copy
from bellbox.utils.files import checksum, describe_file, listed_file, read_json, read_tensors, says_format
from bellbox.utils.skeleton import on_meta

CONFIG, REST, RECORD, TOKENIZER = "config.json", "rest.safetensors", "ptq.json", "tokenizer.json"
FORMAT, VERSION = BINARIZED, 1


@dataclass(frozen=True)
class Quantization:
    """What was done to the weights, and what is done to the inputs."""

    method: Method
    """Rounding to nearest, BiLLM, or BiLLM on weights that LTDB has transformed."""
    variant: Variant
    """As the authors' code, or cleaned up."""
    power: int
    """Of LTDB's loss; 1 or 2."""
    block: int
    """Columns that share scales."""
    activation_bits: int
    """What each token of a layer's input is rounded to; 16 for no rounding."""

    @property
    def residual(self) -> bool:
        """Whether weights have a second bit."""
        return self.method != "rtn"


def block_file(number: int) -> str:
    """The name of a block's file."""
    return f"block-{number:04d}.safetensors"


def narrowed(value: Tensor) -> Tensor:
    """A float tensor in the narrowest of bf16, fp16 and fp32 that holds its values exactly."""
    for dtype in (torch.bfloat16, torch.float16):
        narrow = value.to(dtype)
        if torch.equal(narrow.to(value.dtype), value):
            return narrow
    return value


def write_config(folder: Path, model: ModelConfig, quantization: Quantization) -> None:
    """Write `config.json` over the files that lie in a folder; with it the folder is whole."""
    names = [REST, *(block_file(number) for number in range(model.num_hidden_layers)), RECORD]
    names += [TOKENIZER] if (folder / TOKENIZER).is_file() else []
    config: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "model": model.to_dict(),
        "quantization": asdict(quantization),
        "files": {name: describe_file(folder / name) for name in names},
    }
    config["sha256"] = checksum(config)
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def is_binarized(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder says that it is a binarized model (its content is not looked at)."""
    return says_format(Path(folder) / CONFIG, FORMAT)


def read_config(root: Path) -> tuple[ModelConfig, Quantization, dict[str, Any]]:
    """What `config.json` says of the model, of its quantization, and of its files.

    Raises:
        BellboxError: another format or version, a wrong checksum, or fields that are not as they must be.
    """
    from pydantic import BaseModel, ConfigDict, Field, ValidationError

    class Strict(BaseModel):
        model_config = ConfigDict(extra="forbid", strict=True)

    class StoredQuantization(Strict):
        method: Literal["rtn", "billm", "dbellquant"]
        variant: Literal["released", "clean"]
        power: int = Field(ge=1, le=2)
        block: int = Field(ge=1, le=1 << 16)
        activation_bits: int = Field(ge=2, le=16)

    class StoredFile(Strict):
        bytes: int = Field(ge=0)
        sha256: str

    class StoredConfig(Strict):
        format: str
        version: int
        model: dict[str, Any]
        quantization: StoredQuantization
        files: dict[str, StoredFile]
        sha256: str

    path = root / CONFIG
    config = read_json(path)
    if config.get("format") != FORMAT or config.get("version") != VERSION:
        found = f"format {config.get('format')!r}, version {config.get('version')!r}"
        raise BellboxError(f"{path}: {found}; this Bellbox reads {FORMAT!r}, version {VERSION}")
    if config.get("sha256") != checksum(config):
        raise BellboxError(f"{path}: damaged, its checksum does not match; copy it again")
    try:
        stored = StoredConfig.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        raise BellboxError(f"{path}: field {'.'.join(map(str, first['loc']))!r}: {first['msg']}") from None
    try:
        model = config_from_dict(stored.model)
    except BellboxError as error:
        raise BellboxError(f"{path}: model: {error}") from None
    return model, Quantization(**stored.quantization.model_dump()), stored.model_dump()["files"]


def empty_model(config: ModelConfig, quantization: Quantization) -> Llama | GPT:
    """A model on the meta device whose blocks' linear layers are binarized ones."""
    with on_meta():
        model = build(config)
        for name in list(layer_names(config)):
            old = model.get_submodule(name)
            assert isinstance(old, nn.Linear)
            new = BinarizedLinear(
                old.in_features,
                old.out_features,
                old.bias is not None,
                quantization.block,
                quantization.residual,
                quantization.activation_bits,
            )
            replace_layer(model, old, new)
    return model


def load(folder: str | os.PathLike[str]) -> Llama | GPT:
    """Read a binarized model.

    Args:
        folder: what `bellbox ptq` wrote.

    Returns:
        The model in evaluation mode, without gradients.

    Raises:
        BellboxError: missing, truncated, altered, of another version, or not fitting its own description.
    """
    root = Path(folder)
    config, quantization, files = read_config(root)
    tensors: dict[str, Tensor] = {}
    for name in [REST, *(block_file(number) for number in range(config.num_hidden_layers))]:
        tensors.update(read_tensors(listed_file(root, files, name, CONFIG)))
    model = empty_model(config, quantization)
    _check(root, model, tensors)
    wide = {
        name: own_copy(t, dtype=torch.float32 if t.is_floating_point() and not _is_scale(name) else None)
        for name, t in tensors.items()
    }
    return filled(model, wide).requires_grad_(False)


def _is_scale(name: str) -> bool:
    return name.endswith(".scales")


def _check(root: Path, model: Llama | GPT, tensors: Mapping[str, Tensor]) -> None:
    expected = model.state_dict()
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    if odd := sorted(set(expected) ^ set(tensors)):
        what = "is missing" if odd[0] in expected else "is not in the model"
        raise BellboxError(f"{root}: tensor {odd[0]!r} {what}")
    for name, wanted in expected.items():
        found = tensors[name]
        alike = found.dtype == wanted.dtype or (found.is_floating_point() and wanted.dtype == torch.float32)
        if found.shape != wanted.shape or not alike:
            raise BellboxError(
                f"{root}: tensor {name!r} is {found.dtype} {tuple(found.shape)}, the model needs {wanted.dtype} "
                f"{tuple(wanted.shape)}"
            )
        if found.is_floating_point() and not bool(found.isfinite().all()):
            raise BellboxError(f"{root}: tensor {name!r} holds NaN or infinity")


def tokenizer_path(root: Path) -> Path | None:
    """The tokenizer stored with the model, its checksum compared; None where there is none.

    Raises:
        BellboxError: it is missing or altered.
    """
    files = read_config(root)[2]
    return None if files.get(TOKENIZER) is None else listed_file(root, files, TOKENIZER, CONFIG)


def read_record(root: Path) -> dict[str, Any]:
    """What `bellbox ptq` recorded on its way: settings, and of each block errors, steps and seconds.

    Raises:
        BellboxError: it is missing or altered.
    """
    return read_json(listed_file(root, read_config(root)[2], RECORD, CONFIG))


@dataclass(frozen=True)
class StoredSize:
    """What the binarized layers take, and the rest."""

    weights: int
    """Weights of the binarized layers."""
    bits: int
    """All that is stored for them."""
    other_bytes: int
    """Embeddings, head, norms and biases."""

    @property
    def bits_per_weight(self) -> float:
        """Honest ones: signs, second bits, salient columns, scales."""
        return self.bits / self.weights


def stored_size(model: nn.Module) -> StoredSize:
    """Count what a binarized model stores (without the file headers)."""
    named = {name: layer for name, layer in model.named_modules() if isinstance(layer, BinarizedLinear)}
    layers = list(named.values())
    inside = {f"{name}.{what}" for name, layer in named.items() for what in layer.stored_names}
    state = model.state_dict(keep_vars=True)
    rest = {id(tensor): tensor for name, tensor in state.items() if name not in inside}
    return StoredSize(
        sum(layer.in_features * layer.out_features for layer in layers),
        sum(layer.stored_bits() for layer in layers),
        sum(narrowed(t.detach()).nbytes for t in rest.values()),
    )


def set_activation_bits(model: nn.Module, bits: int) -> None:
    """Round the inputs of all binarized layers to so many bits; 16 for no rounding.

    Raises:
        BellboxError: not 2 to 16.
    """
    if not 2 <= bits <= 16:
        raise BellboxError(f"activation bits {bits}: must be from 2 to 16")
    for layer in model.modules():
        if isinstance(layer, BinarizedLinear):
            layer.activation_bits = bits
