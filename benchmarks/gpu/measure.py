"""Everything about speed on one GPU, part by part; `benchmarks/gpu/run.sh` runs all of it.

    python benchmarks/gpu/measure.py --out gpu-results                   # all parts, then the tables
    python benchmarks/gpu/measure.py --out gpu-results kernels decode    # some
    TRITON_INTERPRET=1 BELLBOX_BACKEND=triton python benchmarks/gpu/measure.py --tiny --out x    # tries the script

Each part appends lines to results.jsonl in the folder as it goes, so what was measured stays when a later part fails.
The last lines of a part count. tables.md is made of them at the end.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bellbox as bb
from bellbox.benchmark.profile import CLASSES, profile
from bellbox.core.grid import Levels
from bellbox.core.hadamard import block_size
from bellbox.inference.graphs import GraphSteps, StaticSteps
from bellbox.models import build, preset
from bellbox.nn import InputCoding, PackedLinear
from bellbox.ops import dispatch
from bellbox.ops.backends.triton import launch
from bellbox.ops.encode import encode, normaliser, row_rms
from bellbox.ops.kept import bbq_backward_kept, keep, stepped
from bellbox.ops.packed_linear import operation as packed_linear
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
                weights = launch.Weights(layer.packed, layer.weight_scale, None, levels.grid, width)
                coding = layer.act_scale, layer.act_thresholds, None, None, layer.coding.block, "rms", False

                def code(
                    _: int, x: Tensor = x, weights: Any = weights, coding: Any = coding, levels: Any = levels
                ) -> Any:
                    return launch.code_rows(x, weights, levels.grid, *coding)

                coded = code(0)
                floors = {
                    "code_rows": (3 * rows * width / copy, code),
                    "multiply": (
                        max(2 * rows * width**2 / int8, (width**2 * bits / 8 + 3 * rows * width) / copy),
                        lambda _, coded=coded, weights=weights: launch.multiply(
                            coded, weights, torch.bfloat16
                        ),
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


def _model(bench: Bench, config: dict[str, int], bits: int | None) -> nn.Module:
    """A LLaMA of random weights on the device, bf16 or packed."""
    room = max(bench.sizes.room, bench.sizes.prompt[1]) + 64
    made = (
        build(preset("95M", **config, max_position_embeddings=room), seed=0)
        .to(bench.device, torch.bfloat16)
        .eval()
    )
    if bits is None:
        return made
    prepared = bb.prepare(made, bb.Recipe.bbq(bits)).eval()
    with torch.no_grad():
        prepared(torch.zeros((1, 8), dtype=torch.int64, device=bench.device))
    return bb.convert(prepared)


def _each_model(bench: Bench) -> Iterator[tuple[str, str, nn.Module, int]]:
    for name, config in bench.sizes.models.items():
        for bits in (None, *bench.sizes.bits):
            model = _model(bench, config, bits)
            yield name, "bf16" if bits is None else f"{bits} bits", model, config["vocab_size"]
            del model
            gc.collect()
            if bench.cuda:
                torch.cuda.empty_cache()


def prefill(bench: Bench) -> None:
    """A prompt, split into product, quantization, element-wise operations and the rest (the paper's Figure 5)."""
    whole: dict[str, float] = {}
    for name, kind, model, vocabulary in _each_model(bench):
        tokens = torch.randint(0, vocabulary, bench.sizes.prompt, device=bench.device)
        bench.peak()
        found = profile(kind, model, tokens, bench.sizes.seconds)
        whole.setdefault(name, found.total)
        parts = {f"{each} (ms)": 1e3 * s for each, s in zip(CLASSES, found.seconds, strict=True)}
        bench.note(
            "prefill", model=name, name=kind, milliseconds=1e3 * found.total, times_bf16=whole[name] / found.total,
            **parts, peak_bytes=bench.peak(),
        )  # fmt: skip


@torch.no_grad()
def decode(bench: Bench) -> None:
    """Tokens a second after a prompt, one step at a time: as Python calls it, and as a CUDA graph."""
    for name, kind, model, vocabulary in _each_model(bench):
        for batch in bench.sizes.batches:
            cache = model.new_cache(batch, bench.sizes.room)  # pyright: ignore[reportCallIssue]
            prompt = torch.randint(0, vocabulary, (batch, bench.sizes.room // 2), device=bench.device)
            model(prompt, cache=cache, last_only=True)
            length, token = cache.length, prompt[:, :1]

            def eager(
                _: int, model: Any = model, cache: Any = cache, length: int = length, token: Tensor = token
            ) -> None:
                cache.length = length
                model(token, cache=cache, last_only=True)

            took = bench.seconds(eager)
            bench.note(
                "decode", model=name, name=kind, batch=batch, how="eager", tokens_per_second=batch / took
            )
            cache.length = length
            steps = (GraphSteps if bench.cuda else StaticSteps)(model, cache)  # type: ignore[arg-type]

            def static(
                _: int,
                steps: StaticSteps = steps,
                cache: Any = cache,
                length: int = length,
                token: Tensor = token,
            ) -> None:
                cache.length = length
                steps._expected = length  # the same place again
                steps.step(token)

            took = bench.seconds(static)
            bench.note(
                "decode", model=name, name=kind, batch=batch, how="graph", tokens_per_second=batch / took
            )


def training(bench: Bench) -> None:
    """Forward and backward of a training step in bf16 autocast, eager and compiled, against full precision."""
    for name in bench.sizes.steps:
        base: dict[str, float] = {}
        for bits in (None, *bench.sizes.bits[:2]):
            kind = "full precision" if bits is None else f"{bits} bits"
            torch.manual_seed(0)
            config = (
                preset(name)
                if bench.sizes is FULL
                else preset(name, **next(iter(bench.sizes.models.values())))
            )
            model = build(config, seed=0)
            model = (
                (model if bits is None else bb.prepare(model, bb.Recipe.bbq(bits))).to(bench.device).train()
            )
            tokens = torch.randint(0, config.vocab_size, bench.sizes.tokens, device=bench.device)
            for how in ("eager", "compiled"):
                run = model if how == "eager" else torch.compile(model, backend=bench.sizes.compiler)

                def step(_: int, run: Any = run, model: nn.Module = model, tokens: Tensor = tokens) -> None:
                    model.zero_grad(set_to_none=True)
                    with torch.autocast(bench.device.type, torch.bfloat16):
                        logits = run(tokens)
                    F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten()).backward()

                bench.peak()
                took = bench.seconds(step)
                base.setdefault(how, took)
                bench.note(
                    "training", model=name, name=kind, how=how, milliseconds=took * 1e3, over_bf16=took / base[how],
                    peak_bytes=bench.peak(),
                )  # fmt: skip
            torch.compiler.reset()


PARTS: dict[str, Callable[[Bench], None]] = {
    each.__name__: each for each in (environment, codes, ceilings, kernels, sweep, decode, training, prefill)
}


def tables(out: Path) -> str:
    """The last lines of each part as Markdown."""
    rows: dict[str, dict[str, Row]] = {}
    for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        part = row.pop("part")
        named = {
            k: v for k, v in row.items() if not isinstance(v, float) and k not in ("peak_bytes", "different")
        }
        rows.setdefault(part, {})[json.dumps(named, sort_keys=True)] = row
    text = ""
    for part, found in rows.items():
        heads = list(dict.fromkeys(key for row in found.values() for key in row))
        text += f"\n## {part}\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}\n"
        for row in found.values():
            cells = (
                f"{v:.4g}" if isinstance(v, float) else str(v) for v in (row.get(key, "") for key in heads)
            )
            text += f"| {' | '.join(cells)} |\n"
    return text.lstrip()


def pictures(out: Path) -> None:
    """Bars of prefill by class, where matplotlib is there."""
    try:
        from bellbox.report.profile import profile_picture
        from bellbox.report.sheet import standalone

        rows = [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]
        models = dict.fromkeys(row["model"] for row in rows if row["part"] == "prefill")
        for model in models:
            bars = {
                row["name"]: [row[f"{each} (ms)"] for each in CLASSES]
                for row in rows
                if row["part"] == "prefill" and row["model"] == model
            }
            svg = standalone(profile_picture(bars, CLASSES, f"{model}: a prompt of 64 x 512 tokens"))
            (out / f"prefill-{model}.svg").write_text(svg, encoding="utf-8")
    except bb.BellboxError as error:
        print(f"no pictures: {error}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all where none is named")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="on the CPU, at sizes that try the script alone")
    arguments = parser.parse_args()
    unknown = [each for each in arguments.parts if each not in PARTS]
    if unknown:
        parser.error(f"no part {unknown[0]!r}: they are {', '.join(PARTS)}")
    if not arguments.tiny and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --tiny tries the script on the CPU")
    arguments.out.mkdir(parents=True, exist_ok=True)
    bench = Bench("cpu" if arguments.tiny else "cuda", TINY if arguments.tiny else FULL, arguments.out)
    failed: list[str] = []
    for name in arguments.parts or PARTS:
        begun = time.perf_counter()
        print(name, flush=True)
        try:
            PARTS[name](bench)
        except Exception:
            failed.append(name)
            traceback.print_exc()
        gc.collect()
        if bench.cuda:
            torch.cuda.empty_cache()
        print(f"  {name} took {time.perf_counter() - begun:.0f} s", flush=True)
    (arguments.out / "tables.md").write_text(tables(arguments.out), encoding="utf-8")
    pictures(arguments.out)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
