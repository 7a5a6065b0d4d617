"""The `HfQuantizer`: what transformers asks while it loads and saves a model with low-bit layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from bellbox.convert import prepare
from bellbox.errors import BellboxError
from bellbox.formats.description import QUANT_METHOD
from bellbox.interop.transformers import packed, prepared
from bellbox.interop.transformers.classes import adopt
from bellbox.interop.transformers.config import BellboxConfig
from bellbox.interop.transformers.remote_code import forget_missing_file
from bellbox.interop.transformers.saving import guarded_state
from bellbox.nn.pretrained import Allowing


class BellboxHfQuantizer(Allowing, HfQuantizer):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Loads packed layers, prepares a plain model, or loads a prepared one; see the package."""

    requires_calibration = False
    quantization_config: BellboxConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, quantization_config: BellboxConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._plan: packed.Packed | prepared.Prepared | None = None

    # --- loading ---

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what packed layers cannot have.

        Raises:
            BellboxError: a device map with `disk`, or a section that describes nothing.
        """
        del args
        packed.refuse_devices(kwargs.get("device_map"))
        if self.pre_quantized and self.quantization_config.section is None:
            raise BellboxError(
                "config.json says bellbox and describes neither packed layers nor a prepared model; save it again"
            )

    def update_attn_implementation(self, config: Any) -> Any:
        """The first place where the configuration passes by: its file of weights is there after all."""
        return forget_missing_file(config)

    def update_tp_plan(self, config: Any) -> Any:
        """The same place in transformers before 5.18."""
        return forget_missing_file(config)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of what is not low-bit.

        Raises:
            BellboxError: another one than fp32 beside rounded embeddings, which give fp32.
        """
        section = self.quantization_config.section or {}
        if section.get("embeddings") and dtype not in (None, torch.float32):
            raise BellboxError(
                f"dtype is {dtype}, but this folder's embeddings are rounded and give fp32; load with torch.float32"
            )
        return dtype

    def update_weight_conversions(self, weight_conversions: Any, *rest: Any) -> Any:  # pyright: ignore
        """The names in a file of ours are the model's own: nothing is renamed or merged."""
        if self.pre_quantized:
            return []
        return super().update_weight_conversions(weight_conversions, *rest)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        del kwargs
        if not self.pre_quantized:
            return model
        root = packed.folder_of(checkpoint_files)
        if self.quantization_config.is_packed:
            self._plan = packed.plan(model, root)
        else:
            assert self.quantization_config.recipe is not None
            self._plan = prepared.plan(model, root, self.quantization_config.recipe)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        del kwargs
        plan, self._plan = self._plan, None
        if plan is not None:
            plan.put_into(model)
        else:
            assert self.quantization_config.recipe is not None
            prepare(model, self.quantization_config.recipe)
        adopt(model)
        return model

    # --- saving and training ---

    @property
    def is_qat_trainable(self) -> bool:
        """Whether it trains without adapters."""
        return not self.quantization_config.is_packed

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        del model, dtype
        raise BellboxError(
            "dequantize: floats in place of integers are another function; load the model that this one was made of"
        )

    def get_state_dict_and_metadata(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model: Any
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors as files have them."""
        return guarded_state(model), {}


def register() -> None:
    """Tell transformers of both classes, once.

    Raises:
        BellboxError: somebody else has taken the name.
    """
    for mapping, add, ours in (
        (AUTO_QUANTIZATION_CONFIG_MAPPING, register_quantization_config, BellboxConfig),
        (AUTO_QUANTIZER_MAPPING, register_quantizer, BellboxHfQuantizer),
    ):
        there: Any = mapping.get(QUANT_METHOD)
        if there is None:
            add(QUANT_METHOD)(ours)
        elif (there.__module__, there.__qualname__) == (ours.__module__, ours.__qualname__):
            mapping[QUANT_METHOD] = ours  # the module was loaded anew
        else:
            raise BellboxError(
                f"transformers has a quantization method {QUANT_METHOD!r} that is not Bellbox's"
            )
