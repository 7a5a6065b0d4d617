"""The operations that everything runs on, each with a plain torch reference (`dispatch` says how they find a backend).

The modules here take and give tensors and small numbers, and know neither models nor files. Where the compiled
kernels for CPUs are there and take a call, they run it, with the same bits; everywhere else the reference does.
"""

from bellbox.ops import dispatch, packed_conv2d, packed_linear, weight_layout

__all__ = ["dispatch", "packed_conv2d", "packed_linear", "weight_layout"]

dispatch.load_backends()
