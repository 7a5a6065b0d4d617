"""Single operations: codes against the CPU's, ceilings, kernels against their floors, one layer at every width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bench import Bench
from torch import Tensor
from torch.nn import functional as F

from bellbox.core.grid import Levels
from bellbox.core.hadamard import block_size
from bellbox.ops import dispatch
from bellbox.ops.backends.triton.launch.coding import Weights, code_rows
from bellbox.ops.backends.triton.launch.products import multiply
from bellbox.ops.encode import encode, normaliser, row_rms
from bellbox.ops.kept import bbq_backward_kept, keep, stepped
from bellbox.ops.packed_linear import operation as packed_linear


def environment(bench: Bench) -> None:
    """What this is measured on."""
    import triton

    gpu = torch.cuda.get_device_properties(0) if bench.cuda else None
    bench.note(
        "environment", torch=torch.__version__, triton=triton.__version__, cuda=str(torch.version.cuda),
        gpu="none" if gpu is None else f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.multi_processor_count} processors",
        backends=str(dispatch.statuses()),
    )  # fmt: skip


def codes(bench: Bench) -> None:
    """Codes and outputs of the device against the torch reference on the CPU."""
    for n in (2, 3, 4, 8, 16):
        levels = Levels.gaussian(n)
        for width in bench.sizes.widths:
            x = torch.randn(bench.sizes.rows, width)
            r = normaliser(row_rms.reference(x), block_size(width)).float()
            arguments = levels.thresholds, block_size(width)
            found = encode(x.to(bench.device), r.to(bench.device), *arguments).cpu()
            wrong = int((found != encode.reference(x, r, *arguments)).sum())
            bench.note("codes", what="codes", levels=n, columns=width, numbers=x.numel(), different=wrong)
    for bits in bench.sizes.bits:
        for rows in (1, 3, bench.sizes.rows):
            width = bench.sizes.widths[0]
            layer, x = bench.layer(width, width, bits), bench.randn(rows, width, dtype=torch.float32)
            with torch.no_grad():
                found = layer(x).cpu()
                expected = packed_linear.reference(
                    x.cpu(),
                    *(None if t is None else t.cpu() for t in layer.bound.tensors()),
                    *layer.numbers,
                    x.dtype,
                )
            wrong = int((found != expected).sum())
            bench.note(
                "codes", what="outputs", levels=2**bits, columns=width, numbers=found.numel(), different=wrong
            )


def ceilings(bench: Bench) -> None:
    """What the device does at best: copying, and products of torch's own library."""
    n, square = bench.sizes.copy, bench.sizes.square
    a, b = (torch.empty(n, dtype=torch.uint8, device=bench.device) for _ in range(2))
    bench.rates["copy"] = 2 * n / bench.seconds(lambda _: a.copy_(b))
    x, w = bench.randn(square, square), bench.randn(square, square)
    bench.rates["bf16"] = 2 * square**3 / bench.seconds(lambda _: x @ w)
    p, q = (torch.randint(-8, 8, (square, square), dtype=torch.int8, device=bench.device) for _ in range(2))
    bench.rates["int8"] = 2 * square**3 / bench.seconds(lambda _: torch._int_mm(p, q.t()))
    bench.note("ceilings", **{f"{name} (TB/s or TOPS)": rate / 1e12 for name, rate in bench.rates.items()})


def kernels(bench: Bench) -> None:
    """Each kernel as a fraction of its floor: bytes over the copy bandwidth, operations over the int8 rate."""
    if not bench.rates:
        ceilings(bench)
    copy, int8 = bench.rates["copy"], bench.rates["int8"]
    for width in bench.sizes.widths:
        for bits in bench.sizes.bits:
            levels = Levels.gaussian(2**bits)
            for rows in (bench.sizes.rows, 1):
                layer, x = bench.layer(width, width, bits), bench.randn(rows, width)
                weights = Weights(layer.packed, layer.weight_scale, None, levels.grid, width)
                coding = layer.act_scale, layer.act_thresholds, None, None, layer.coding.block, "rms", False

                def code(
                    _: int, x: Tensor = x, weights: Any = weights, coding: Any = coding, levels: Any = levels
                ) -> Any:
                    return code_rows(x, weights, levels.grid, *coding)

                coded = code(0)
                floors = {
                    "code_rows": (3 * rows * width / copy, code),
                    "multiply": (
                        max(2 * rows * width**2 / int8, (width**2 * bits / 8 + 3 * rows * width) / copy),
                        lambda _, coded=coded, weights=weights: multiply(coded, weights, torch.bfloat16),
                    ),
                }
                for name, (floor, call) in floors.items():
                    took = bench.seconds(call)
                    bench.note(
                        "kernels",
                        kernel=name,
                        columns=width,
                        rows=rows,
                        bits=bits,
                        microseconds=took * 1e6,
                        of_floor=floor / took,
                    )
        _of_training(bench, width, copy)


def _of_training(bench: Bench, width: int, copy: float) -> None:
    levels = Levels.gaussian(16)
    x, block = bench.randn(bench.sizes.rows, width), block_size(width)
    r, rows = normaliser(row_rms(x), block).float(), len(x)
    steps = stepped(levels.thresholds)
    assert steps is not None
    kept, one = keep(x, r, levels.thresholds, block), torch.ones(1, 1, device=bench.device)
    free = torch.ones(rows, 1, device=bench.device)

    def backward(_: int) -> object:
        return bbq_backward_kept(x, kept, r, one, free, steps, levels.offset, block, x.dtype)

    moved: dict[str, tuple[int, Callable[[int], object]]] = {
        "row_rms": (2, lambda _: row_rms(x)),
        "keep": (3, lambda _: keep(x, r, levels.thresholds, block)),
        "bbq_backward_kept": (5, backward),
    }
    for name, (bytes_each, call) in moved.items():
        took = bench.seconds(call)
        figures = {"microseconds": took * 1e6, "of_floor": bytes_each * x.numel() / copy / took}
        bench.note("kernels", kernel=name, columns=width, rows=rows, bits=4, **figures)


def _rotating(make: Callable[[], Any], nbytes: int, bench: Bench) -> list[Any]:
    """Copies that no cache holds together."""
    return [make() for _ in range(max(2, min(32, (256 << 20) // max(1, nbytes))) if bench.cuda else 1)]


def sweep(bench: Bench) -> None:
    """One layer from N = 512 to 8192: packed, bf16, and NF4 of bitsandbytes where it is (the paper's Figure 4)."""
    try:
        import bitsandbytes  # pyright: ignore[reportMissingImports]
    except ImportError:
        bitsandbytes = None
    for width in bench.sizes.widths:
        for rows in (bench.sizes.rows, 16, 1):
            x = bench.randn(rows, width)
            contenders: dict[str, Callable[[int], object]] = {}
            floats = _rotating(lambda width=width: bench.randn(width, width), 2 * width**2, bench)
            contenders["bf16"] = lambda turn, x=x, floats=floats: F.linear(x, floats[turn % len(floats)])
            for bits in bench.sizes.bits:
                layers = _rotating(
                    lambda width=width, bits=bits: bench.layer(width, width, bits),
                    width**2 * bits // 8,
                    bench,
                )
                contenders[f"{bits} bits"] = lambda turn, x=x, layers=layers: layers[turn % len(layers)](x)
            if bitsandbytes is not None and bench.cuda:
                nf4 = bitsandbytes.nn.Linear4bit(
                    width, width, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16
                )
                nf4 = nf4.to(bench.device)
                contenders["NF4 (bitsandbytes)"] = lambda _, x=x, nf4=nf4: nf4(x)
            times = {}
            with torch.no_grad():
                for name, call in contenders.items():
                    times[name] = bench.seconds(call)
            for name, took in times.items():
                bench.note(
                    "sweep",
                    N=width,
                    rows=rows,
                    name=name,
                    microseconds=took * 1e6,
                    times_bf16=times["bf16"] / took,
                )
