"""Try the compiled module alone, on a Python that has no torch: the real kernels, and tensors that are arrays.

    python3.14 tests/install/try_module.py path/to/_native.abi3.so

One wheel serves Python 3.12 and all that follow. Where a torch for one of them is not at hand, this shows that the
module loads there, reads attributes, calls methods, refuses what does not fit, and computes on two threads.
"""

from __future__ import annotations

import array
import importlib.util
import math
import random
import sys
import types
from collections.abc import Iterable

DTYPES = ("float32", "bfloat16", "float16", "float64", "uint8", "int8", "int16", "int32", "int64")
ARRAYS = {"float32": "f", "float64": "d", "uint8": "B"}
ROWS, COLUMNS, EDGES = 7, 64, (-0.5, 0.0, 0.5)


class Tensor:
    """What the module asks of a tensor."""

    is_cpu = True

    def __init__(self, dtype: str, numbers: Iterable[float]) -> None:
        self.dtype = getattr(sys.modules["torch"], dtype)
        self.array = array.array(ARRAYS[dtype], numbers)  # type: ignore[arg-type]

    def data_ptr(self) -> int:
        """Its address."""
        return self.array.buffer_info()[0]

    def numel(self) -> int:
        """Numbers in it."""
        return len(self.array)

    def is_contiguous(self) -> bool:
        """Always."""
        return True


def main(path: str) -> None:
    """Load the module and hold two kernels of each instruction set against plain Python."""
    torch = types.ModuleType("torch")
    vars(torch).update({name: type("dtype", (), {})() for name in DTYPES}, Tensor=Tensor)
    sys.modules["torch"] = torch
    spec = importlib.util.spec_from_file_location("_native", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    draw = random.Random(0)
    x = Tensor("float32", (draw.gauss(0, 1) for _ in range(ROWS * COLUMNS)))
    ones, edges = Tensor("float32", [1.0] * ROWS), Tensor("float32", EDGES)
    for isa in module.available().split(", "):
        module.use(isa)
        rms, codes = Tensor("float64", [0.0] * ROWS), Tensor("uint8", [255] * len(x.array))
        module.row_rms(x, ROWS, COLUMNS, rms, 2)
        for row, found in enumerate(rms.array):
            numbers = x.array[row * COLUMNS : (row + 1) * COLUMNS]
            assert math.isclose(found, math.sqrt(math.fsum(v * v for v in numbers) / COLUMNS), rel_tol=1e-14)
        module.encode(x, ones, edges, ROWS, COLUMNS, 1, codes, 2)
        assert list(codes.array) == [sum(v >= edge for edge in EDGES) for v in x.array]
    refusal = ""
    try:
        module.encode(x, ones, "no tensor", ROWS, COLUMNS, 1, codes, 1)
    except ValueError as error:
        refusal = str(error)
    assert "tensor" in refusal, refusal
    threads = "threads" if module.threads else "one thread"
    print(f"Python {sys.version.split()[0]}: {module.available()}, {threads}: as plain Python computes")


if __name__ == "__main__":
    main(sys.argv[1])
