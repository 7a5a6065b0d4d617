"""The layers that `prepare` and `convert` make of linear layers and convolutions.

`QuantizedLinear`, `QuantizedConv2d` and their like are for training: they keep the full-precision weight and quantize
it, and their input, in every forward. `PackedLinear`, `PackedConv2d` and so on are for inference: they hold codes only.
In evaluation both run the same operation on the same arguments, so converting changes no bit of the result.
`WeightOnlyLinear` is for inference where the weight alone is quantized: codes, and a product of floats. All of them are
the owner's layers with another class: hooks, attributes and `isinstance` stay. transformers' fused experts are modules
of such layers, one for each matrix of each expert (`experts.py`).

Layers that read the very same tensor (q, k, v; gate, up) can share one activation quantizer. `InputCache`
remembers what it made of a tensor until each of them has asked for it.
"""

from bellbox.nn.coded import CodedLayer
from bellbox.nn.experts import is_fused_experts
from bellbox.nn.held import weights_quantized_once
from bellbox.nn.input_cache import InputCache, PackedGroup, version_of
from bellbox.nn.packed import InputCoding, PackedLayer
from bellbox.nn.packed_conv import PackedConv, PackedConv1d, PackedConv2d
from bellbox.nn.packed_experts import ExpertStack, PackedExperts
from bellbox.nn.packed_linear import PackedLinear, PackedMatrix
from bellbox.nn.quantized import ActivationQuantizer, QuantizedLayer, weights_coded_once
from bellbox.nn.quantized_conv import QuantizedConv, QuantizedConv1d, QuantizedConv2d
from bellbox.nn.quantized_experts import QuantizedExpert, QuantizedExperts, quantized_inside
from bellbox.nn.quantized_linear import QuantizedLinear, QuantizedMatrix
from bellbox.nn.tools import quantized_layers, record_activation_codes, replace_layer, without_fused_paths
from bellbox.nn.transposed import (
    PackedTransposed,
    QuantizedTransposed,
    WeightOnlyTransposed,
    is_transposed_linear,
)
from bellbox.nn.weight_only import WeightOnlyLinear, WeightOnlyMatrix
from bellbox.nn.widths import nested_widths, set_bits, using_bits

__all__ = [
    "ActivationQuantizer",
    "CodedLayer",
    "ExpertStack",
    "InputCache",
    "InputCoding",
    "PackedConv",
    "PackedConv1d",
    "PackedConv2d",
    "PackedExperts",
    "PackedGroup",
    "PackedLayer",
    "PackedLinear",
    "PackedMatrix",
    "PackedTransposed",
    "QuantizedConv",
    "QuantizedConv1d",
    "QuantizedConv2d",
    "QuantizedExpert",
    "QuantizedExperts",
    "QuantizedLayer",
    "QuantizedLinear",
    "QuantizedMatrix",
    "QuantizedTransposed",
    "WeightOnlyLinear",
    "WeightOnlyMatrix",
    "WeightOnlyTransposed",
    "is_fused_experts",
    "is_transposed_linear",
    "nested_widths",
    "quantized_inside",
    "quantized_layers",
    "record_activation_codes",
    "replace_layer",
    "set_bits",
    "using_bits",
    "version_of",
    "weights_coded_once",
    "weights_quantized_once",
    "without_fused_paths",
]
