"""A packed model as a folder: `config.json` says what it is, `model.safetensors` has the numbers.

The format is written down in `docs/format.md`. Everything read is distrusted: sizes are bounded before
they are believed, checksums are compared before tensors are read, and every tensor must have the name, shape
and dtype that the configuration implies. A folder loads as the function that was saved, or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

from torch import Tensor, nn

from bellbox.errors import BellboxError
from bellbox.formats import BINARIZED, description, nested, schema
from bellbox.formats.description import CONFIG, TENSORS, TOKENIZER
from bellbox.formats.expert_places import packed_projections
from bellbox.formats.guard import guard, guards_in
from bellbox.nn import CodedLayer, PackedConv2d, PackedLayer, QuantizedLayer, without_fused_paths
from bellbox.nn.compact import Compact, Precision, compact
from bellbox.nn.huge_pages import gather_in_huge_pages, own_copy
from bellbox.nn.pretrained import refuse_plain_saving
from bellbox.nn.quantized_table import QuantizedTable
from bellbox.nn.tools import unique_tensors
from bellbox.utils.files import (
    describe_file,
    listed_file,
    new_folder,
    read_json,
    read_tensors,
    says_format,
)
from bellbox.utils.skeleton import on_meta

Model = TypeVar("Model", bound=nn.Module)


def save(
    model: nn.Module, folder: str | os.PathLike[str], *, tokenizer: str | os.PathLike[str] | None = None
) -> None:
    """Write a packed model; whole or not at all, and safely over an earlier one.

    Args:
        model: what `convert` gave. Models of `bellbox.models` load by themselves later; any other module
            loads with `load(folder, into=model)`.
        folder: new, empty, or an earlier packed model, which is replaced.
        tokenizer: a tokenizer.json to put beside it, or a sentencepiece `.model`, which is translated into one.

    Raises:
        BellboxError: the model is not packed, the tokenizer cannot be read, or the folder cannot be used.

    Examples:
        >>> model = bb.prepare(nn.Sequential(nn.Linear(64, 8)), bb.Recipe.of("bbq", 2, keep_ends=False))
        >>> bb.calibrate(model, [torch.randn(4, 64)])
        >>> bb.save(bb.convert(model.eval()), "folder")
        >>> import os
        >>> sorted(os.listdir("folder"))
        ['config.json', 'model.safetensors']
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    layers = {name: module for name, module in model.named_modules() if isinstance(module, CodedLayer)}
    if not layers:
        raise BellboxError("save takes a packed model: call bellbox.convert(model) first")
    if any(isinstance(module, QuantizedLayer | QuantizedTable) for module in model.modules()):
        raise BellboxError("save takes a packed model; this one still has layers in training form")
    if any(isinstance(layer, PackedConv2d) and layer.folded for layer in layers.values()):
        raise BellboxError("save takes the model as trained: save it before fold_batch_norms")
    target = Path(folder)
    if tokenizer is not None and not Path(tokenizer).is_file():
        raise BellboxError(f"{tokenizer}: no such file; name a tokenizer.json, or none")
    with new_folder(target, replaces=CONFIG) as writing:
        if (target / CONFIG).is_file() and not is_packed(target):
            raise BellboxError(f"{target}: the folder holds something else; name a new or empty folder")
        tensors = tensors_of(model)
        several = nested.nested_layers(layers)
        contents = {nested.file_of(bits): own for bits, own in nested.split(several, tensors).items()}
        if description.has_class_of_transformers(model):
            tensors |= guard(layers)
        for name, content in ((TENSORS, tensors), *contents.items()):
            try:
                save_file(_apart(content), writing / name)
            except SafetensorError as error:
                raise BellboxError(f"{target}: cannot be written ({error})") from None
        files = {name: describe_file(writing / name) for name in (TENSORS, *contents)}
        if tokenizer is not None:
            _write_tokenizer(Path(tokenizer), writing / TOKENIZER)
            files[TOKENIZER] = describe_file(writing / TOKENIZER)
        config = description.describe(model, layers, files, widths=bool(several))
        (writing / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each in memory of its own: safetensors refuses to write a view of another one's."""
    found: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, value in tensors.items():
        value = value.detach().contiguous().cpu()
        start = value.untyped_storage().data_ptr()
        found[name] = value.clone() if start in memory else value
        memory.add(start)
    return found


def _write_tokenizer(source: Path, target: Path) -> None:
    if source.suffix != ".model":
        shutil.copyfile(source, target)
        return
    from bellbox.data.tokenizer import Tokenizer

    Tokenizer.load(source).save(target)


@overload
def load(
    folder: str | os.PathLike[str],
    *,
    into: None = None,
    embeddings: Precision | None = None,
    bits: int | None = None,
) -> nn.Module: ...
@overload
def load(
    folder: str | os.PathLike[str],
    *,
    into: Model,
    embeddings: Precision | None = None,
    bits: int | None = None,
) -> Model: ...
def load(
    folder: str | os.PathLike[str],
    *,
    into: nn.Module | None = None,
    embeddings: Precision | None = None,
    bits: int | None = None,
) -> nn.Module:
    """Read a packed model, or one that `bellbox ptq` has binarized.

    The file of a packed one is mapped; on a CPU each layer is packed for the machine at once, a slab at a time, all
    else is copied, and its part of the file may leave memory again. So the model is its own: what is written into the
    file afterwards changes nothing.

    Args:
        folder: what `save` or `bellbox ptq` wrote.
        into: a module of the same shape (full precision, prepared or packed) whose layers are replaced, for
            models that Bellbox does not know how to build. It is changed only after everything was checked.
        embeddings: `bf16`, `int8` or `int4` rounds fp32 embeddings and heads now (`nn.compact`); None leaves what is
            stored.
        bits: of a nested model, the width to read it at; its widest where None. No file of a wider one is opened.

    Returns:
        The model in evaluation mode, without gradients; `into` itself where it is given.

    Raises:
        BellboxError: missing, truncated, altered, of another version, or not fitting the model; embeddings that
            are no longer fp32.

    Examples:
        >>> def network():
        ...     return nn.Sequential(nn.Linear(64, 8))
        >>> model = bb.prepare(network(), bb.Recipe.of("bbq", 2, keep_ends=False))
        >>> bb.calibrate(model, [torch.randn(4, 64)])
        >>> bb.save(bb.convert(model.eval()), "folder")
        >>> x = torch.randn(4, 64)
        >>> torch.equal(bb.load("folder", into=network())(x), model(x))
        True
    """
    root = Path(folder)
    if says_format(root / CONFIG, BINARIZED):
        from bellbox.formats import binarized

        if into is not None:
            raise BellboxError(f"{root}: a binarized model loads by itself; leave out into=")
        if bits is not None:
            raise BellboxError(f"{root}: a binarized model has one width; leave out bits=")
        found = binarized.load(root)
        return found if embeddings is None else compact(found, embeddings)
    config = nested.at_width(root, read_config(root), bits)
    if into is None and config["model"] is None:
        raise BellboxError(
            f"{root}: Bellbox cannot build this model itself; use load(folder, into=your_model)"
        )
    if into is not None and any(t.is_meta for t in (*into.parameters(), *into.buffers())):
        raise BellboxError("load(into=model): the model lies on the meta device; build it on a real one")
    tensors = _read_common(root, config)
    several = nested.read(root, config)
    tensors = _joined(root, tensors, several.tensors)
    model = _build(root, config["model"]) if into is None else into
    device = None if into is None else next((t.device for t in (*into.parameters(), *into.buffers())), None)
    layers = schema.packed_layers(root, model, config["layers"])
    experts = packed_projections(root, model, layers, config["experts"])
    replaced = schema.all_replaced(root, layers, schema.compact_tables(root, model, config["embeddings"]))
    schema.check_fit(root, model, replaced, experts, tensors)
    experts.put_into(model)
    model, replaced = schema.put_into(model, replaced)
    without_fused_paths(model)
    schema.assign(model, replaced, tensors, device, several.codes)
    for name, scales in several.narrower.items():
        own = {key: own_copy(value, device) for key, value in scales.items()}
        _keep_narrower(replaced[name], config["layers"][name]["nested"], own)
    del tensors, several
    gather_in_huge_pages(model)
    if embeddings is not None:
        compact(model, embeddings)
    refuse_plain_saving(model)
    return model.requires_grad_(False).eval()


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a packed model as files have them, each once, by name."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, CodedLayer)}
    everywhere = model.named_modules(remove_duplicate=False)
    inside = tuple(f"{name}." for name, module in everywhere if isinstance(module, CodedLayer))
    found = unique_tensors(model, leave_out=inside) if "" not in layers else {}
    for name, layer in layers.items():
        prefix = f"{name}." if name else ""
        found.update({prefix + key: value for key, value in schema.stored_buffers(layer).items()})
    return found


def is_packed(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder says that it is a packed model (its content is not looked at)."""
    config = Path(folder) / CONFIG
    try:
        return config.is_file() and description.is_description(read_json(config))
    except BellboxError:
        return False


def tokenizer_path(folder: str | os.PathLike[str]) -> Path | None:
    """The tokenizer stored with a packed model, its checksum compared; None where there is none.

    Raises:
        BellboxError: it is missing or altered.
    """
    root = Path(folder)
    files = read_config(root)["files"]
    return None if files.get(TOKENIZER) is None else listed_file(root, files, TOKENIZER, CONFIG)


def read_config(root: Path) -> dict[str, Any]:
    """`config.json`, verified, as `description.read` gives it.

    Raises:
        BellboxError: no such folder, or what `description.read` refuses.
    """
    if not root.is_dir():
        raise BellboxError(f"{root}: no such folder")
    return description.read(root / CONFIG)


@dataclass(frozen=True)
class Sizes:
    """Bytes of a packed model, and what the same parameters take in bf16."""

    quantized_parameters: int
    """Weights of the packed layers."""
    packed_bytes: int
    """Their codes, scales and activation constants."""
    other_parameters: int
    """Everything else: embeddings, head, norms, biases."""
    other_bytes: int
    """As stored."""
    embeddings: tuple[str, ...] = ()
    """What embeddings and heads are rounded to: bf16, int8, int4; none where they are in fp32."""

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return self.quantized_parameters + self.other_parameters

    @property
    def bf16_bytes(self) -> int:
        """The packed layers' weights at two bytes each."""
        return 2 * self.quantized_parameters

    @property
    def ratio(self) -> float:
        """How many times smaller the packed layers are than in bf16."""
        return self.bf16_bytes / self.packed_bytes


def sizes(model: nn.Module) -> Sizes:
    """Count the bytes that `save` would write for a packed model (without the file headers)."""
    tensors = tensors_of(model)
    packed_names = {
        f"{prefix}.{name}" if prefix else name
        for prefix, layer in model.named_modules()
        if isinstance(layer, CodedLayer)
        for name in schema.stored_buffers(layer)
        if name != "bias"
    }
    layers = [m for m in model.modules() if isinstance(m, PackedLayer)]
    narrower = sum(t.numel() * t.element_size() for m in layers for t in m.narrower_scales().values())
    quantized = sum(m.row_length * m.row_count for m in model.modules() if isinstance(m, CodedLayer))
    inside = sum(t.numel() * t.element_size() for name, t in tensors.items() if name in packed_names)
    inside += narrower
    rest = [t for name, t in tensors.items() if name not in packed_names]
    tables = [m for m in model.modules() if isinstance(m, Compact)]
    count = {id(m.weight): m.rows * m.columns for m in tables}  # two of 4 bits lie in a byte
    count |= {
        id(t): 0 for m in tables for t in (m.multipliers, m.scale) if t is not None
    }  # bytes, no parameters
    other = sum(count.get(id(t), t.numel()) for t in rest)
    kinds = tuple(sorted({m.precision for m in tables}))
    return Sizes(quantized, inside, other, sum(t.numel() * t.element_size() for t in rest), kinds)


def file_bytes(folder: str | os.PathLike[str], bits: int | None = None) -> int:
    """Bytes of a packed model on disk: `config.json`, `model.safetensors`, and of a nested one the files of its widths.

    Args:
        folder: of the model.
        bits: the width that is read; the widest where None.
    """
    root = Path(folder)
    widths = nested.widths_of(nested.at_width(root, read_config(root), bits))
    return sum((root / name).stat().st_size for name in (CONFIG, TENSORS, *map(nested.file_of, widths)))


def folder_widths(folder: str | os.PathLike[str]) -> tuple[int, ...]:
    """Bits of the widths that a packed folder can be read at, the widest first; empty where it has one.

    Raises:
        BellboxError: no packed folder.
    """
    return nested.widths_of(read_config(Path(folder)))


# --- reading ---


def read_stored(root: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a folder of one width, their file's checksum compared, by the names of the present version.

    Args:
        root: the folder.
        config: as `read_config` gives it.

    Raises:
        BellboxError: missing, altered or damaged; or a folder of several widths, which only `load` reads.
    """
    if nested.widths_of(config):
        raise BellboxError(
            f"{root}: holds one model at several widths, which bellbox.load reads; for other programs write one "
            f"of them: bellbox export hf {root} OUT --bits 2"
        )
    return _read_common(root, config)


def _joined(root: Path, common: dict[str, Tensor], of_width: dict[str, Tensor]) -> dict[str, Tensor]:
    if twice := sorted(common.keys() & of_width.keys()):
        raise BellboxError(f"{root / TENSORS}: tensor {twice[0]!r} stands in the files of the widths too")
    return {**common, **of_width}


def _keep_narrower(layer: nn.Module, said: dict[str, Any], scales: dict[str, Tensor]) -> None:
    assert isinstance(layer, PackedLayer)
    if len(said["widths"]) > 1:
        layer.keep_narrower(said["widths"], said["inputs"], scales)


def _read_common(root: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of `model.safetensors`, which all widths share."""
    tensors = read_tensors(listed_file(root, config["files"], TENSORS, CONFIG))
    for name in guards_in(tensors, config["layers"], config["experts"]):
        del tensors[name]
    if config["version"] < 4:
        for name in config["layers"]:
            _upgrade(root, f"{name}." if name else "", tensors)
    return tensors


def _upgrade(root: Path, prefix: str, tensors: dict[str, Tensor]) -> None:
    """A layer's tensors of versions 2 and 3 as version 4 has them: numbers were of shape [], one had another name.

    Raises:
        BellboxError: they are as version 4 has them already.
    """
    if prefix + "act_rstd" in tensors:
        raise BellboxError(
            f"{root / TENSORS}: tensor {prefix + 'act_rstd'!r} is of a later version than the folder"
        )
    for former, present in (("act_rsigma", "act_rstd"), ("act_scale", "act_scale")):
        value = tensors.pop(prefix + former, None)
        if value is None:
            continue
        if value.dim():
            shape = tuple(value.shape)
            raise BellboxError(
                f"{root / TENSORS}: tensor {prefix + former!r} is {shape}, this version has one of ()"
            )
        tensors[prefix + present] = value.reshape(1)


def _build(root: Path, description: dict[str, Any]) -> nn.Module:
    from bellbox.models import any_config_from_dict, build

    try:
        config = any_config_from_dict(description)
        with on_meta():
            return build(config)
    except BellboxError as error:
        raise BellboxError(f"{root / CONFIG}: model: {error}") from None
