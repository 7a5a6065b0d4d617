"""What all measurements on one GPU share: sizes, a clock, a folder for what is found."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bellbox.core.grid import Levels
from bellbox.core.hadamard import block_size
from bellbox.nn import InputCoding, PackedLinear
from bellbox.ops.weight_layout import prepack

Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Of everything that is measured."""

    copy: int
    square: int
    widths: tuple[int, ...]
    rows: int
    models: dict[str, dict[str, int]]
    prompt: tuple[int, int]
    batches: tuple[int, ...]
    room: int
    steps: tuple[str, ...]
    tokens: tuple[int, int]
    bits: tuple[int, ...]
    compiler: str
    seconds: float


def _llama(layers: int, hidden: int, heads: int, inner: int, vocabulary: int = 32_000) -> dict[str, int]:
    return {
        "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
        "num_key_value_heads": heads, "intermediate_size": inner, "vocab_size": vocabulary,
    }  # fmt: skip


FULL = Sizes(
    1 << 30, 8192, (512, 1024, 2048, 4096, 8192), 2048,
    {"700M": _llama(24, 1536, 12, 4096), "2.4B": _llama(30, 2560, 20, 6912)}, (64, 512), (1, 16), 512,
    ("95M", "300M"), (16, 512), (4, 2, 1), "inductor", 0.3,
)  # fmt: skip
TINY = Sizes(
    1 << 16, 64, (32,), 5, {"none": _llama(1, 32, 2, 32, 32)}, (1, 2), (1,), 4, ("tiny",), (1, 2), (4,), "aot_eager",
    0.0,
)  # fmt: skip


class Bench:
    """A device, sizes, and a folder for what is found."""

    def __init__(self, device: str, sizes: Sizes, out: Path) -> None:
        self.device, self.sizes, self.out = torch.device(device), sizes, out
        self.cuda = self.device.type == "cuda"
        self.rates: dict[str, float] = {}

    def note(self, part: str, **row: Any) -> Row:
        """One result, into the file and on the screen."""
        line = {"part": part, **row}
        with (self.out / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(
            "  " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()),
            flush=True,
        )
        return line

    def seconds(self, call: Callable[[int], object]) -> float:
        """Median of one call; it gets a number that rises, so that it can change its weights."""
        for turn in range(3 if self.sizes.seconds else 1):
            call(turn)
        self.wait()
        times: list[float] = []
        deadline = time.perf_counter() + self.sizes.seconds
        turn = 0
        while len(times) < (5 if self.sizes.seconds else 1) or time.perf_counter() < deadline:
            if self.cuda:
                begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begun.record()
                call(turn)
                ended.record()
                ended.synchronize()
                times.append(begun.elapsed_time(ended) / 1e3)
            else:
                start = time.perf_counter()
                call(turn)
                times.append(time.perf_counter() - start)
            turn += 1
        return statistics.median(times)

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.cuda:
            torch.cuda.synchronize()

    def peak(self) -> int | None:
        """Bytes of the device in use at most since the last call."""
        if not self.cuda:
            return None
        most = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return most

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """On the device."""
        return torch.randn(shape, device=self.device).to(dtype)

    def layer(self, outputs: int, inputs: int, bits: int) -> PackedLinear:
        """A packed layer of random codes."""
        levels = Levels.gaussian(2**bits)
        layer = PackedLinear(
            inputs, outputs, levels.grid, InputCoding(levels, block_size(inputs)), bias=False
        )
        layer = layer.to(self.device).eval()
        codes = torch.randint(0, levels.n, (outputs, inputs), dtype=torch.uint8, device=self.device)
        layer.packed = prepack(codes, levels.n)
        layer.weight_scale.fill_(inputs**-0.5)
        layer.act_scale.fill_(1.0)
        return layer
