"""What all launches share: options, tables on the device, the dtype that a kernel writes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bellbox.ops.backends.triton.availability import interpreted

# Separate roundings: a fused multiply-add would round the scaled product and the bias once where the reference
# rounds twice.
OPTIONS = {"enable_fp_fusion": False}


@functools.lru_cache(maxsize=256)
def table(numbers: tuple[float, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers as a tensor on a device; made once."""
    return torch.tensor(numbers, dtype=dtype, device=device)


def on_device(run: Callable[..., Any]) -> Callable[..., Any]:
    """Launches go to the current device, which need not be that of the tensors."""

    @functools.wraps(run)
    def launched(*arguments: Any) -> Any:
        x = arguments[0]
        if not x.is_cuda or x.device.index == torch.cuda.current_device():
            return run(*arguments)
        with torch.cuda.device(x.device):
            return run(*arguments)

    return launched


def stored(dtype: torch.dtype) -> torch.dtype:
    """What a kernel writes for a result: the interpreter cuts fp32 down to bf16 where a GPU rounds, so torch rounds."""
    return torch.float32 if dtype == torch.bfloat16 and interpreted() else dtype


def stages(block: int) -> int:
    """Of the butterfly that rotates blocks of a size."""
    return block.bit_length() - 1


def step(of_rows: Tensor) -> int:
    """From a row's number to the next one's: 0 where there is one for all."""
    return int(of_rows.numel() > 1)
