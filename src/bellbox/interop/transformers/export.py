"""Packed models of `bellbox.models` as folders of transformers: its own classes load them, our layers inside.

A LLaMA has the very names. A GPT becomes a GPT-2, whose q, k and v are one layer, `c_attn`: rows of codes under one
another, which is exact where the three code their input alike; else it is refused. A GPT with ReLU is an OPT, which has
them apart.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bellbox.errors import BellboxError
from bellbox.formats import description
from bellbox.formats.companions import copy_companions
from bellbox.formats.description import LAYER_NORM, RMS_NORM, TENSORS, TOKENIZER
from bellbox.formats.guard import guard
from bellbox.formats.packed import tensors_of
from bellbox.formats.schema import stored_buffers
from bellbox.interop.transformers.card import write_card
from bellbox.interop.transformers.folder import new_packed_folder
from bellbox.interop.transformers.remote_code import auto_classes
from bellbox.interop.transformers.saving import coded_layers, write_config
from bellbox.models import GPT, Llama
from bellbox.models.hf_config import write_config as config_for
from bellbox.models.hf_names import opt_name, to_hf
from bellbox.nn import CodedLayer
from bellbox.nn.compact import Compact
from bellbox.nn.rows import joined, split, why_apart
from bellbox.utils.files import describe_file, write_tensors, write_text

_CLASSES = {
    "llama": {"LlamaForCausalLM", "LlamaModel"},
    "gpt2": {"GPT2LMHeadModel", "GPT2Model"},
    "opt": {"OPTForCausalLM", "OPTModel"},
}
_OPT_EPSILON = 1e-5
_POSITIONS = "transformer.wpe"


@dataclass
class Parts:
    """What a folder is made of, under the names of transformers."""

    kind: str
    """The model_type."""
    config: dict[str, Any]
    """What transformers wants in `config.json`."""
    model: dict[str, Any] | None
    """What `bellbox.models` builds with these names; None where it has others."""
    layers: dict[str, CodedLayer] = field(default_factory=dict)
    tables: dict[str, Compact] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


def export_packed(
    model: nn.Module,
    folder: Path,
    *,
    tokenizer: str | None = None,
    end_of_text: int | None = None,
    end_token: str | None = None,
    companions: tuple[Path, ...] = (),
) -> None:
    """Write a packed LLaMA or GPT so that transformers' own class loads it; whole or not at all.

    Args:
        model: of `bellbox.models`, packed.
        folder: new, empty, or an earlier packed model, which is replaced.
        tokenizer: the text of a tokenizer.json.
        end_of_text: id of the token that ends a text; generation stops there.
        end_token: that token as text.
        companions: folders whose chat template, generation and tokenizer configuration come along; the first that has
            a file wins.

    Raises:
        BellboxError: another model, layers that transformers' class cannot have, or the folder cannot be used.
    """
    parts = parts_of(model)
    norm = {"llama": RMS_NORM, "gpt2": LAYER_NORM}.get(parts.kind)
    if norm is not None:
        parts.config[norm] = "bellbox"
    if end_of_text is not None:
        parts.config["eos_token_id"] = end_of_text
    autos = auto_classes(parts.kind, _CLASSES[parts.kind])
    with new_packed_folder(folder) as writing:
        tensors = _apart(parts.tensors)
        write_tensors(writing / TENSORS, tensors | guard(parts.layers), {"format": "pt"})
        files = {TENSORS: describe_file(writing / TENSORS)}
        if tokenizer is not None:
            write_text(writing / TOKENIZER, tokenizer)
            files[TOKENIZER] = describe_file(writing / TOKENIZER)
        for source in companions:
            copy_companions(source, writing)
        _write_defaults(writing, parts, tokenizer is not None, end_of_text, end_token)
        section = description.section_of(parts.model, parts.layers, parts.tables, {}, files)
        write_config(writing, parts.config, section, autos)
        tables = {name: each.rows * each.columns for name, each in parts.tables.items()}
        write_card(writing, parts.layers, tensors, autos, tables)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each in memory of its own: layers out of one layer hold the same constants."""
    found: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        start = value.untyped_storage().data_ptr()
        found[name] = value.clone() if start in memory else value
        memory.add(start)
    return found


def _write_defaults(
    root: Path, parts: Parts, has_tokenizer: bool, end_of_text: int | None, end_token: str | None
) -> None:
    """How to generate and what the tokenizer is, where no companion says it."""
    if not (root / "generation_config.json").exists():
        ids = {"eos_token_id": end_of_text, "pad_token_id": end_of_text}
        said = {"_from_model_config": True, **{key: value for key, value in ids.items() if value is not None}}
        write_text(root / "generation_config.json", json.dumps(said, indent=2, sort_keys=True) + "\n")
    if has_tokenizer and not (root / "tokenizer_config.json").exists():
        longest = parts.config.get("n_positions", parts.config.get("max_position_embeddings"))
        about = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": longest,
            "clean_up_tokenization_spaces": False,
            **({} if end_token is None else {"eos_token": end_token, "pad_token": end_token}),
        }
        write_text(root / "tokenizer_config.json", json.dumps(about, indent=2, sort_keys=True) + "\n")


def parts_of(model: nn.Module) -> Parts:
    """A packed LLaMA or GPT under the names of transformers.

    Raises:
        BellboxError: another model, or layers that transformers' class cannot have.
    """
    if not isinstance(model, Llama | GPT):
        raise BellboxError(f"export hf writes LLaMA and GPT models, not {type(model).__name__}")
    layers = coded_layers(model)
    if not layers:
        raise BellboxError("export hf writes packed models; this one has no packed layer")
    kind = _kind_of(model)
    parts = Parts(kind, config_for(model.config, "float32", kind), None)
    if kind == "llama" and not model.config.fused_qkv:
        parts.model = model.config.to_dict()
    parts.layers = _renamed_layers(model, layers, kind)
    parts.tables = {
        _renamed(name, kind): each
        for name, each in model.named_modules()
        if isinstance(each, Compact) and not (kind == "opt" and name == _POSITIONS)
    }
    inside = tuple(f"{name}." for name in layers)
    rest = {name: value for name, value in tensors_of(model).items() if not name.startswith(inside)}
    parts.tensors = _rest(model, rest, kind)
    for name, layer in parts.layers.items():
        parts.tensors.update({f"{name}.{key}": value for key, value in stored_buffers(layer).items()})
    return parts


def _kind_of(model: Llama | GPT) -> str:
    if isinstance(model, Llama):
        return "llama"
    config = model.config
    opt = config.activation == "relu" and config.bias and config.layer_norm_epsilon == _OPT_EPSILON
    return "opt" if opt and not config.fused_qkv else "gpt2"


def _renamed(name: str, kind: str) -> str:
    return opt_name(f"{name}.").removesuffix(".") if kind == "opt" else name


def _rest(model: Llama | GPT, rest: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """What is not packed, renamed; tables that are stored rounded have more tensors than a weight."""
    tables = {name: each for name, each in model.named_modules() if isinstance(each, Compact)}
    plain = {name: value for name, value in rest.items() if name.rpartition(".")[0] not in tables}
    if kind == "opt" and _POSITIONS in tables:  # OPT's is no plain embedding, so it holds the very values
        table = tables.pop(_POSITIONS)
        plain[f"{_POSITIONS}.weight"] = table(torch.arange(table.rows))
    found = to_hf(plain, kind, model.config.tie_word_embeddings)
    for name, value in rest.items():
        table_name, _, leaf = name.rpartition(".")
        if table_name in tables:
            found[f"{_renamed(table_name, kind)}.{leaf}"] = value
    return found


# --- low-bit layers ---


def _renamed_layers(model: Llama | GPT, layers: Mapping[str, CodedLayer], kind: str) -> dict[str, CodedLayer]:
    """Layers under the names of transformers, q, k and v in as many layers as it has."""
    found: dict[str, CodedLayer] = {}
    for name, layer in layers.items():
        if kind == "llama" and name.endswith(".qkv_proj"):
            head = model.config.head_size
            sizes = [head * model.config.num_attention_heads, *[head * model.config.key_value_heads] * 2]
            for part, piece in zip("qkv", split(layer, sizes), strict=True):
                found[name.replace("qkv_proj", f"{part}_proj")] = piece
        elif kind == "gpt2" and re.search(r"\.(q_proj|qkv_proj)$", name):
            before = name.rpartition(".")[0]
            three = [f"{before}.{part}_proj" for part in "qkv"]
            found[f"{before}.c_attn"] = layer if name.endswith(".qkv_proj") else _joined(three, layers)
        elif kind == "gpt2" and re.search(r"\.[kv]_proj$", name):
            if re.sub(r"[kv]_proj$", "q_proj", name) not in layers:
                _refuse_join(name, "q is in full precision")
        else:
            found[_renamed(name, kind)] = layer
    return found


def _refuse_join(name: str, why: str) -> None:
    raise BellboxError(
        f"{name}: transformers' GPT-2 has q, k and v as one layer, and here {why}; train them with one rule "
        "and a shared input (share_inputs), or use the packed folder as it is"
    )


def _joined(names: list[str], layers: Mapping[str, CodedLayer]) -> CodedLayer:
    """One layer with the rows of several that code their input, and their weights, alike.

    Raises:
        BellboxError: they do not.
    """
    parts = [layers.get(name) for name in names]
    first = parts[0]
    assert first is not None
    if any(each is None or type(each) is not type(first) for each in parts):
        _refuse_join(names[0], "they are not low-bit alike")
    some: list[Any] = list(parts)
    for each in some[1:]:
        if why := why_apart(some[0], each):
            _refuse_join(names[0], why)
    return joined(some)
