"""The operations as launches of kernels: arguments checked as everywhere, sizes from `plan`, results made.

Nothing here reads a number back from the device, so that launches may be recorded in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bellbox.ops.backends.triton.launch import layout, linear, rows
from bellbox.ops.backends.triton.launch.shared import on_device

TABLE: dict[str, Callable[..., Any]] = {
    run.__name__: on_device(run)
    for run in (
        linear.packed_linear,
        linear.packed_linear_group,
        linear.kept_linear,
        rows.row_rms,
        rows.rotate,
        rows.encode,
        rows.bbq_forward,
        rows.bbq_backward,
        rows.keep,
        rows.kept_codes,
        rows.decode_kept,
        rows.bbq_backward_kept,
        layout.prepack,
        layout.unpack,
    )
}
"""What runs an operation, by its name."""
