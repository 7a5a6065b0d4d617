"""Packed layers in vLLM: a quantization method `bellbox` for folders that `bellbox export hf` writes.

vLLM finds `register` by the entry point `vllm.general_plugins`, in each process. It builds its own model, whose linear
layers ask here how they are quantized. Layers that it fuses (q, k and v; gate and up) become one packed layer with the
rows of all, where these code their input alike; else each stands alone and the outputs are put together.

Norms of a LLaMA that `bellbox.models` trained (`"rms_norm": "bellbox"` in `config.json`) are computed by Bellbox's
operation: vLLM's rounds otherwise, and an input beside a threshold would get another code.

The folder is checked as `bellbox.load` checks it, before vLLM makes anything. Codes, scales and constants are read
here; vLLM loads the rest: norms, biases, and embeddings that are not rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bellbox.errors import BellboxError, require
from bellbox.formats import packed as io
from bellbox.formats import schema
from bellbox.formats.description import QUANT_METHOD, RMS_NORM
from bellbox.formats.guard import guard
from bellbox.nn import CodedLayer
from bellbox.nn.rows import joined, why_apart
from bellbox.ops.rms_norm import rms_norm

_config: Any = require("vllm.config", "vllm")
_custom_op: Any = require("vllm.model_executor.custom_op", "vllm")
_layernorm: Any = require("vllm.model_executor.layers.layernorm", "vllm")
_linear: Any = require("vllm.model_executor.layers.linear", "vllm")
_methods: Any = require("vllm.model_executor.layers.quantization", "vllm")
_base: Any = require("vllm.model_executor.layers.quantization.base_config", "vllm")
_weights: Any = require("vllm.model_executor.models.utils", "vllm")


def register() -> None:
    """Tell vLLM of the method and the norm; what the entry point calls. Calling it again changes nothing."""
    _methods.register_quantization_config(QUANT_METHOD)(BellboxVllmConfig)
    name = _layernorm.RMSNorm.__name__
    if name not in _custom_op.op_registry_oot:  # where another plug-in has taken it, norms are that one's
        _layernorm.RMSNorm.register_oot(BellboxRMSNorm, name=name)


class Folder:
    """A packed folder, read and checked once in a process; its file of weights stays mapped.

    Args:
        root: the folder.

    Raises:
        BellboxError: what `bellbox.load` refuses, fused experts, and rounded embeddings.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        config = io.read_config(root)
        self.entries: dict[str, dict[str, Any]] = config["layers"]
        if config["experts"]:
            raise BellboxError(
                f"{root}: has fused experts, which Bellbox does not run in vLLM; use transformers or bellbox serve"
            )
        if config["embeddings"]:
            name, kind = next(iter(config["embeddings"].items()))
            raise BellboxError(
                f"{root}: {name!r} is rounded ({kind}), which vLLM cannot hold; "
                "convert again with embeddings in fp32, or use bellbox serve"
            )
        self.tensors = io.read_stored(root, config)
        self.layers = schema.packed_layers(root, nn.Module(), self.entries)
        schema.check_layers(root, self.layers, self.tensors)

    def names_read_here(self) -> list[str]:
        """Tensors that vLLM is to pass over: those of packed layers but for the biases."""
        own = [f"{name}.{key}" for name, layer in self.layers.items() for key in schema.stored_buffers(layer)]
        return [*(name for name in own if not name.endswith(".bias")), *guard(self.layers)]

    def layer(self, name: str) -> CodedLayer:
        """A packed layer with its numbers, but without a bias, which is vLLM's."""
        entry = {name: {**self.entries[name], "bias": False, "input": name}}
        made = schema.packed_layers(self.root, nn.Module(), entry)[name]
        wanted = schema.stored_buffers(made)
        schema.fill(made, {key: self.tensors.get(f"{name}.{key}") for key in wanted}, torch.device("cpu"))
        return made


class BellboxVllmConfig(_base.QuantizationConfig):
    """How vLLM runs a packed folder.

    Args:
        section: `quantization_config` of its `config.json`.

    Raises:
        BellboxError: it is not that of packed layers.
    """

    def __init__(self, section: Mapping[str, Any]) -> None:
        super().__init__()
        if "layers" not in section:
            raise BellboxError(
                "quantization_config of config.json describes no packed layers; convert the model, and save it again"
            )
        self.root: Path | None = None
        self._folder: Folder | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What goes to another process of vLLM, which reads the folder itself."""
        return {**self.__dict__, "_folder": None}

    def __deepcopy__(self, memo: Any) -> BellboxVllmConfig:
        made = object.__new__(type(self))
        made.__dict__ = {**self.__dict__, "packed_modules_mapping": dict(self.packed_modules_mapping)}
        return made

    @property
    def folder(self) -> Folder:
        """The folder, read at the first look.

        Raises:
            BellboxError: see `Folder`.
        """
        if self._folder is None:
            if self.root is None:
                raise BellboxError(
                    "vLLM did not say which folder it loads; name a folder of bellbox export hf"
                )
            self._folder = Folder(self.root)
        return self._folder

    def get_name(self) -> Any:
        """`bellbox`."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """fp32: in another dtype the layers would get other inputs, and code them otherwise than they were trained."""
        return [torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Of a GPU: any, as the layers run on the processor."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: all of it stands in `config.json`."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BellboxVllmConfig:
        """See `BellboxVllmConfig`."""
        return cls(config)

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Where vLLM names the model: its folder is read and checked now, before anything is built.

        Raises:
            BellboxError: no folder, or see `Folder`.
        """
        del hf_config, revision
        if not Path(model_name).is_dir():
            raise BellboxError(
                f"{model_name}: no such folder; download the model first, and give vLLM the folder "
                "(hf download NAME --local-dir FOLDER)"
            )
        self.root = Path(model_name).resolve()
        self._folder = Folder(self.root)

    def get_checkpoint_weight_mapper(self) -> Any:
        """Names that vLLM passes over while it loads the rest."""
        return _weights.WeightsMapper(orig_to_new_substr=dict.fromkeys(self.folder.names_read_here()))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """How one layer of vLLM's model is run; None for what is no linear layer.

        Raises:
            BellboxError: a layer of vLLM's that is partly packed, or one that is packed and no linear layer.
        """
        before, _, leaf = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(leaf, [leaf])
        names = [f"{before}.{part}" if before else part for part in parts]
        packed = [name for name in names if name in self.folder.entries]
        if not packed:
            return _linear.UnquantizedLinearMethod() if isinstance(layer, _linear.LinearBase) else None
        if not isinstance(layer, _linear.LinearBase):
            raise BellboxError(
                f"{prefix}: is packed, and vLLM's {type(layer).__name__} cannot be: use keep for it"
            )
        if len(packed) < len(names):
            whole = sorted(set(names) - set(packed))[0]
            raise BellboxError(
                f"{prefix}: vLLM has {', '.join(parts)} as one layer, and {whole} is not packed; use one rule for all"
            )
        return BellboxLinearMethod(self.folder, names)


class BellboxRMSNorm(_layernorm.RMSNorm):
    """vLLM's norm; in a model that Bellbox's norm was trained with, that one."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        config: Any = _config.get_current_vllm_config_or_none()
        ours = isinstance(getattr(config, "quant_config", None), BellboxVllmConfig)
        self.as_trained = ours and getattr(config.model_config.hf_config, RMS_NORM, None) == "bellbox"

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """`[..., size]` to the same shape; with what it is added to first, and then that sum too."""
        if not self.as_trained:
            return super().forward(x) if residual is None else super().forward(x, residual)
        if residual is None:
            return rms_norm(x, self.weight, self.variance_epsilon)
        total = x + residual
        return rms_norm(total, self.weight, self.variance_epsilon), total


class BellboxLinearMethod(_linear.LinearMethodBase):
    """A linear layer of vLLM whose product is that of packed layers, one after another in its rows.

    Args:
        folder: where they are.
        names: of the layers there, in the order of the rows.
    """

    def __init__(self, folder: Folder, names: list[str]) -> None:
        self.folder, self.names = folder, names

    def create_weights(
        self,
        layer: nn.Module,  # noqa: ARG002  (vLLM's signature)
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Compare sizes; there are no weights for vLLM to load.

        Raises:
            BellboxError: the model is split over several processes, or has other sizes than the folder.
        """
        del params_dtype, extra_weight_attrs
        if (input_size_per_partition, sum(output_partition_sizes)) != (input_size, output_size):
            raise BellboxError(
                "packed layers are not split over processes; run vLLM with tensor_parallel_size=1"
            )
        sizes = [self.folder.layers[name].row_count for name in self.names]
        if any(self.folder.layers[name].row_length != input_size for name in self.names):
            raise BellboxError(f"{self.names[0]}: has other inputs than the {input_size} of vLLM's layer")
        if sizes != list(output_partition_sizes) and sum(sizes) != output_size:
            raise BellboxError(f"{self.names[0]}: has {sizes} outputs, vLLM's layer {output_partition_sizes}")

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Lay the codes out for this machine."""
        parts = [self.folder.layer(name) for name in self.names]
        if len(parts) > 1 and not any(why_apart(parts[0], each) for each in parts[1:]):
            parts = [joined(parts)]
        layer.bellbox = nn.ModuleList(parts).requires_grad_(False).eval()

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`[..., inputs]` to `[..., outputs]`."""
        parts: Any = layer.bellbox
        outputs = [part(x) for part in parts]
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return out if bias is None else out + bias
