"""Packed layers in a model that transformers builds and fills, from a folder in our format.

All checks of `bellbox.load` come first, on the model without memory: checksums, names, shapes, dtypes and values. Then
transformers loads, with `Stored` in the places of the low-bit layers, and at last the layers take what was loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bellbox.errors import BellboxError
from bellbox.formats import packed as io
from bellbox.formats import schema
from bellbox.formats.description import TENSORS
from bellbox.formats.expert_places import PackedProjections, packed_projections
from bellbox.formats.guard import guard
from bellbox.interop.transformers.stored import Stored, below, pass_over, plain_dtype, tie_on_meta, untie
from bellbox.nn import CodedLayer, replace_layer, without_fused_paths
from bellbox.nn.compact import Compact
from bellbox.nn.experts import bias_name
from bellbox.nn.huge_pages import gather_in_huge_pages, own_copy


def folder_of(checkpoint_files: list[str] | None) -> Path:
    """The folder of the one file that transformers is to read.

    Raises:
        BellboxError: there are several, or it is not `model.safetensors`.
    """
    names = [Path(file).name for file in checkpoint_files or ()]
    if checkpoint_files is None or names != [TENSORS]:
        raise BellboxError(f"a Bellbox model is one file, {TENSORS}; this loads {', '.join(names) or 'none'}")
    return Path(checkpoint_files[0]).parent


@dataclass
class Packed:
    """What is to be put into a model once it is loaded."""

    layers: dict[str, CodedLayer]
    """Empty, by name; layers of experts among them."""
    tables: dict[str, Compact]
    """Empty embeddings and heads, tied ones sharing their tensors."""
    experts: PackedProjections

    def put_into(self, model: nn.Module) -> None:
        """Fill the layers with what was loaded and put them in their places."""
        for name, layer in self.layers.items():
            place = model.get_submodule(name)
            assert isinstance(place, Stored)
            tensors = place.tensors()
            device = next(iter(tensors.values())).device
            schema.fill(layer, {key: tensors.get(key) for key in schema.stored_buffers(layer)}, device)
        self._fill_tables(model)
        self.experts.put_into(model)
        for name, each in {**self.layers, **self.tables}.items():
            replace_layer(model, model.get_submodule(name), each)
        _leave_the_file(model)
        without_fused_paths(model)
        gather_in_huge_pages(model)
        model.requires_grad_(False).eval()

    def _fill_tables(self, model: nn.Module) -> None:
        filled: dict[int, Compact] = {}
        for name, table in self.tables.items():
            tensors = model.get_submodule(name).state_dict(keep_vars=True)
            twin = filled.setdefault(id(table.weight), table)
            for key in table._buffers:
                if key in tensors:
                    table._buffers[key] = tensors[key].clone()
            if twin is not table:
                table.tie(twin)


def _leave_the_file(model: nn.Module) -> None:
    """Have no tensor in the memory of the file, where transformers leaves what it need not convert."""
    found: dict[int, Tensor] = {}
    for module in model.modules():
        if not isinstance(module, CodedLayer | Compact):  # which have copies already
            own = (*module._parameters.values(), *module._buffers.values())
            found |= {id(tensor): tensor for tensor in own if tensor is not None and tensor.is_cpu}
    for tensor in found.values():
        tensor.data = own_copy(tensor.data)


def plan(model: Any, root: Path) -> Packed:
    """Look at a folder and a model without memory, and have the model ready for transformers to load it.

    Args:
        model: a `PreTrainedModel` on the meta device, as `from_pretrained` has just built it.
        root: the folder.

    Raises:
        BellboxError: what `bellbox.load` refuses.
    """
    config = io.read_config(root)
    _refuse_our_gpt(root, model, config)
    tensors = io.read_stored(root, config)
    config, tensors = _for_base_model(model, config, tensors)
    with plain_dtype():
        tie_on_meta(model)
        layers = schema.packed_layers(root, model, config["layers"])
        experts = packed_projections(root, model, layers, config["experts"])
        tables = schema.compact_tables(root, model, config["embeddings"])
        _refuse_own_forwards(root, model, tables)
        schema.check_fit(root, model, schema.all_replaced(root, layers, tables), experts, tensors)
        _make_room(model, layers, tables, experts, tensors)
    return Packed(layers, tables, experts)


def _refuse_our_gpt(root: Path, model: Any, config: Mapping[str, Any]) -> None:
    """Say what to do where a folder has the names of our GPT, which are not those of GPT-2."""
    known = config["model"] or {}
    if known.get("architecture") == "gpt" and model.config.model_type == "gpt2":
        raise BellboxError(
            f"{root}: transformers' GPT-2 has q, k and v as one layer; write a folder for it with: bellbox export hf "
            f"{root} OUT"
        )


def _refuse_own_forwards(root: Path, model: nn.Module, tables: Mapping[str, Compact]) -> None:
    """Refuse rounded tables in places that do more than look rows up, or multiply with them."""
    for name in tables:
        kind = type(model.get_submodule(name))
        if kind.forward not in (nn.Embedding.forward, nn.Linear.forward):
            raise BellboxError(
                f"{root}: {name!r} is a {kind.__name__} in the model, which cannot be stored rounded"
            )


def _for_base_model(
    model: Any, config: dict[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """A folder of a model with a head, as the body alone has it: without the head, and without the body's name."""
    body = model.base_model_prefix
    if not body or hasattr(model, body) or not any(name.startswith(f"{body}.") for name in tensors):
        return config, tensors
    layers: dict[str, Any] = below(config["layers"], body)
    for entry in layers.values():
        if "input" in entry:
            entry["input"] = entry["input"].removeprefix(f"{body}.")  # q, k and v lie in the body together
    rest = {kind: below(config[kind], body) for kind in ("experts", "embeddings")}
    return {**config, "layers": layers, **rest}, below(tensors, body)


def _make_room(
    model: nn.Module,
    layers: Mapping[str, CodedLayer],
    tables: Mapping[str, Compact],
    experts: PackedProjections,
    tensors: Mapping[str, Tensor],
) -> None:
    """Put `Stored` in the places of low-bit layers and tables."""
    for name, stacks in experts.items():
        module = model.get_submodule(name)
        for stack in stacks:
            for gone in (stack, bias_name(stack)):
                module._parameters.pop(gone, None)
            module._modules[stack] = Stored(below(tensors, f"{name}.{stack}"))
        module._is_hf_initialized = True  # pyright: ignore[reportArgumentType]
    ours = {name: each for name, each in (*layers.items(), *tables.items()) if not _is_stored(model, name)}
    for name in ours:
        place = model.get_submodule(name)
        replace_layer(model, place, Stored(below(tensors, name), place))
    untie(model, [*ours, *experts])
    pass_over(
        model, guard(layers, (f"{name}.{stack}" for name, stacks in experts.items() for stack in stacks))
    )


def _is_stored(model: nn.Module, name: str) -> bool:
    try:
        return isinstance(model.get_submodule(name), Stored)
    except AttributeError:
        return False


def refuse_devices(device_map: Any) -> None:
    """Refuse to leave codes on a disk.

    Raises:
        BellboxError: a device map with `disk`.
    """
    places: Iterable[Any] = device_map.values() if isinstance(device_map, Mapping) else (device_map,)
    if "disk" in places:
        raise BellboxError("device_map leaves layers on the disk, which packed layers cannot; load all of it")
