"""The layers that `prepare` and `convert` put in place of `nn.Linear`.

`QuantizedLinear` is for training: it keeps the full-precision weight and quantizes it, and its input, in every
forward. `PackedLinear` is for inference: it holds codes only. In evaluation both compute the same integers and
the same epilogue, so converting changes no bit of the result.

Layers that read the very same tensor (q, k, v; gate, up) can share one activation quantizer. `SharedInput`
remembers what it made of a tensor until every sibling has asked for it.
"""

from bellbox.nn.once import weights_quantized_once
from bellbox.nn.packed import InputCoding, PackedLinear
from bellbox.nn.quantized import ActivationQuantizer, QuantizedLinear
from bellbox.nn.shared import SharedInput, version_of
from bellbox.nn.tools import quantized_layers, record_activation_codes, replace_layer, without_fused_paths

__all__ = [
    "ActivationQuantizer",
    "InputCoding",
    "PackedLinear",
    "QuantizedLinear",
    "SharedInput",
    "quantized_layers",
    "record_activation_codes",
    "replace_layer",
    "version_of",
    "weights_quantized_once",
    "without_fused_paths",
]
