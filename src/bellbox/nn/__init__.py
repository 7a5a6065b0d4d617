"""The layers that `prepare` and `convert` make of `nn.Linear` and `nn.Conv2d`.

`QuantizedLinear` and `QuantizedConv2d` are for training: they keep the full-precision weight and quantize it, and
their input, in every forward. `PackedLinear` and `PackedConv2d` are for inference: they hold codes only. In evaluation
both run the same operation on the same arguments, so converting changes no bit of the result. `WeightOnlyLinear` is for
inference where the weight alone is quantized: codes, and a product of floats. All of them are the owner's layers with
another class: hooks, attributes and `isinstance` stay.

Layers that read the very same tensor (q, k, v; gate, up) can share one activation quantizer. `InputCache`
remembers what it made of a tensor until each of them has asked for it.
"""

from bellbox.nn.coded import CodedLayer
from bellbox.nn.held import weights_quantized_once
from bellbox.nn.input_cache import InputCache, PackedGroup, version_of
from bellbox.nn.packed import InputCoding, PackedLayer
from bellbox.nn.packed_conv import PackedConv2d
from bellbox.nn.packed_linear import PackedLinear
from bellbox.nn.quantized import ActivationQuantizer, QuantizedLayer, weights_coded_once
from bellbox.nn.quantized_conv import QuantizedConv2d
from bellbox.nn.quantized_linear import QuantizedLinear
from bellbox.nn.tools import quantized_layers, record_activation_codes, replace_layer, without_fused_paths
from bellbox.nn.weight_only import WeightOnlyLinear

__all__ = [
    "ActivationQuantizer",
    "CodedLayer",
    "InputCache",
    "InputCoding",
    "PackedConv2d",
    "PackedGroup",
    "PackedLayer",
    "PackedLinear",
    "QuantizedConv2d",
    "QuantizedLayer",
    "QuantizedLinear",
    "WeightOnlyLinear",
    "quantized_layers",
    "record_activation_codes",
    "replace_layer",
    "version_of",
    "weights_coded_once",
    "weights_quantized_once",
    "without_fused_paths",
]
