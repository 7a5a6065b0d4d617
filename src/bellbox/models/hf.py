"""To and from Hugging Face folders, `config.json` with `model.safetensors`, without `transformers`.

The folder is the exchange format of the field, and reading it needs only JSON and safetensors. `hf_config` says which
models are understood, `hf_names` how their tensors are called.

A file is somebody else's: names of shards may not leave the folder, every tensor's name, shape and type is
checked against the configuration before it is read, and no file is ever executed or unpickled.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bellbox.errors import BellboxError
from bellbox.models.config import LlamaConfig, ModelConfig
from bellbox.models.gpt import GPT
from bellbox.models.hf_config import read_config, read_json, write_config
from bellbox.models.hf_names import block_prefix, canonical, from_hf, to_hf
from bellbox.models.llama import Llama
from bellbox.utils.files import open_regular, write_tensors, write_text
from bellbox.utils.skeleton import give_memory, on_meta

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Buffers that older versions of transformers wrote beside the weights; they follow from the configuration.
_DERIVED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)$")
_HEAD = "lm_head.weight"


def load_hf(folder: str | os.PathLike[str]) -> Llama | GPT:
    """Read a LLaMA, GPT-2 or OPT that `transformers` (or `save_hf`) wrote, in one file or in shards.

    Args:
        folder: holds config.json and model.safetensors, or model.safetensors.index.json and its shards.

    Returns:
        the model on the CPU, in evaluation mode, in fp32: bf16 and fp16 weights are widened, which is exact.

    Raises:
        BellboxError: a missing or broken file, another architecture, an option that is not supported, a
            missing, unknown, misshapen or oddly typed tensor.
    """
    source = HFFolder(folder)
    model, state = source.empty_model(), source.rest()
    for number in range(source.config.num_hidden_layers):
        state.update(source.block(number))
    return filled(model, state)


def filled(model: Llama | GPT, state: dict[str, Tensor]) -> Llama | GPT:
    """A model from the meta device with these tensors; the head of a tied one may be left out."""
    if model.config.tie_word_embeddings:
        state = {**state, _HEAD: state[_embedding(model.config)]}
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    if isinstance(model, Llama):
        give_memory(model.model.rotary_emb, "cpu")  # which fills it
    return model.eval()


@dataclass(frozen=True)
class _Place:
    path: Path
    stored: str
    """The tensor's name in the file."""


class HFFolder:
    """A Hugging Face folder whose tensors are read as they are wanted: of a large model, a block at a time.

    Opening it reads the configuration and the files' headers, and checks every name, shape and dtype.

    Args:
        folder: as for `load_hf`.

    Raises:
        BellboxError: as `load_hf`.
    """

    config: ModelConfig
    """The model's shape."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.root = Path(folder)
        self.config, self.kind = read_config(self.root / "config.json")
        self.tied = self.config.tie_word_embeddings
        ours = self.empty_model().state_dict()
        expected = {name: tuple(t.shape) for name, t in to_hf(ours, self.kind, self.tied).items()}
        embedding = next(
            iter(to_hf({_embedding(self.config): ours[_embedding(self.config)]}, self.kind, True))
        )
        self._embedding = embedding
        if self.tied:  # its head may be stored as well, as a copy
            expected[_HEAD] = expected[embedding]
        self._places = _locate(self.root, expected, self.kind)
        missing = sorted(set(expected) - set(self._places) - ({_HEAD} if self.tied else set()))
        if missing:
            raise BellboxError(f"{self.root} has no tensor {missing[0]!r} ({len(missing)} missing in all)")

    def empty_model(self) -> Llama | GPT:
        """The model on the meta device."""
        with on_meta():
            return _new(self.config)

    def block(self, number: int) -> dict[str, Tensor]:
        """One transformer block's tensors by our names, fp32, in memory of their own.

        Raises:
            BellboxError: a damaged file.
        """
        prefix = block_prefix(self.kind, number)
        return from_hf(self._read(name for name in self._places if name.startswith(prefix)), self.kind)

    def rest(self) -> dict[str, Tensor]:
        """What belongs to no block, likewise: embeddings, last norm, and the head of one that is not tied.

        Raises:
            BellboxError: a damaged file, or a tied head that differs from the embedding.
        """
        blocks = tuple(block_prefix(self.kind, n) for n in range(self.config.num_hidden_layers))
        tensors = self._read(name for name in self._places if not name.startswith(blocks))
        head = tensors.pop(_HEAD, None) if self.tied else None
        if head is not None and not torch.equal(head, tensors[self._embedding]):
            raise BellboxError(
                f"{self.root}: tie_word_embeddings is true, but lm_head.weight differs from the embedding"
            )
        return from_hf(tensors, self.kind)

    def _read(self, names: Iterable[str]) -> dict[str, Tensor]:
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._places[name].path, []).append(name)
        tensors: dict[str, Tensor] = {}
        for path, inside in by_file.items():
            try:
                with safe_open(path, framework="pt") as file:
                    for name in inside:  # copied: a safetensors view maps the file
                        stored = file.get_tensor(self._places[name].stored)
                        tensors[name] = stored.to(torch.float32, copy=True)
            except (SafetensorError, OSError) as error:
                raise BellboxError(f"{path} cannot be read as safetensors: {error}") from error
        return tensors


def save_hf(model: Llama | GPT, folder: str | os.PathLike[str]) -> None:
    """Write a folder that `transformers` loads as LlamaForCausalLM or GPT2LMHeadModel; weights keep their
    dtype.

    The tokens that begin and end a text are the tokenizer's to say; config.json leaves them null.

    Args:
        model: with plain float layers; a quantized one has its own format (`bellbox.save`).
        folder: made if missing; files of these names in it are replaced, each in one step.

    Raises:
        BellboxError: a model that is no Llama or GPT, or whose layers are quantized.
    """
    if not isinstance(model, Llama | GPT):
        raise BellboxError(f"save_hf writes Llama and GPT models, not {type(model).__name__}")
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    with on_meta():
        plain = _new(model.config).state_dict()
    odd = sorted(set(state) ^ set(plain))
    if odd:
        raise BellboxError(
            f"save_hf writes plain float models, and {odd[0]!r} is not as in one; "
            "save a quantized model with bellbox.save"
        )
    kind = "llama" if isinstance(model.config, LlamaConfig) else "gpt2"
    renamed = to_hf(state, kind, model.config.tie_word_embeddings)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in renamed.items()}
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    dtype = str(state[_embedding(model.config)].dtype).removeprefix("torch.")
    write_tensors(root / _WEIGHTS, tensors, {"format": "pt"})
    write_text(root / "config.json", json.dumps(write_config(model.config, dtype), indent=2) + "\n")


def _new(config: ModelConfig) -> Llama | GPT:
    return Llama(config) if isinstance(config, LlamaConfig) else GPT(config)


def _embedding(config: ModelConfig) -> str:
    return "model.embed_tokens.weight" if isinstance(config, LlamaConfig) else "transformer.wte.weight"


# --- files ---


def _files(root: Path) -> dict[Path, set[str] | None]:
    """The weight files, and the tensors that the index says are in each (None: all that it holds)."""
    if (root / _WEIGHTS).is_file():
        return {root / _WEIGHTS: None}
    if not (root / _INDEX).is_file():
        raise BellboxError(f"{root} holds neither {_WEIGHTS} nor {_INDEX}")
    weight_map = read_json(root / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BellboxError(f"{root / _INDEX} has no weight_map")
    files: dict[Path, set[str] | None] = {}
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and re.fullmatch(r"[\w.-]+\.safetensors", shard)
        if not plain:
            raise BellboxError(
                f"{root / _INDEX}: {shard!r} is not the name of a .safetensors file in the folder"
            )
        shards.setdefault(shard, set()).add(name)
    for shard, names in shards.items():
        files[root / shard] = names
    return files


def _locate(root: Path, expected: dict[str, tuple[int, ...]], kind: str) -> dict[str, _Place]:
    """Where each tensor lies, after a look at the files' headers."""
    places: dict[str, _Place] = {}
    for path, listed in _files(root).items():
        try:
            open_regular(path).close()  # the library waits for a pipe
            with safe_open(path, framework="pt") as file:
                present = set(file.keys())
                absent = sorted((listed or set()) - present)
                if absent:
                    raise BellboxError(f"{path} has no tensor {absent[0]!r}, which {_INDEX} says it holds")
                for stored in sorted(present if listed is None else listed):
                    if not _DERIVED.search(stored):
                        name = canonical(stored, kind)
                        _check(path, stored, file.get_slice(stored), expected.get(name))
                        places[name] = _Place(path, stored)
        except (SafetensorError, OSError) as error:
            raise BellboxError(f"{path} cannot be read as safetensors: {error}") from error
    return places


def _check(path: Path, stored: str, view: object, shape: tuple[int, ...] | None) -> None:
    if shape is None:
        raise BellboxError(f"{path}: tensor {stored!r} has no place in this model")
    found: list[int] = view.get_shape()  # pyright: ignore[reportAttributeAccessIssue]
    dtype: str = view.get_dtype()  # pyright: ignore[reportAttributeAccessIssue]
    if tuple(found) != shape:
        raise BellboxError(
            f"{path}: {stored!r} has shape {list(found)}, but config.json asks for {list(shape)}"
        )
    if dtype not in _DTYPES:
        raise BellboxError(f"{path}: {stored!r} is of type {dtype}; Bellbox reads {', '.join(_DTYPES)}")
