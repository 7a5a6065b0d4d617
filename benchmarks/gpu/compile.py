"""Compile every kernel of the Triton backend for GPUs that need not be there, and show what came out.

    python benchmarks/gpu/compile.py                        # all kernels, sm_80, 90, 100 and 120; a few minutes
    python benchmarks/gpu/compile.py --arch 90 --record     # one, into its column of benchmarks/gpu/compiled.md
    python benchmarks/gpu/compile.py --arch 90 --only multiply --markdown table.md
    python benchmarks/gpu/compile.py --arch 90 --only "code_rows: 2048 rows, weights 4" --block 1     # no rotation

The launches are those of the library at the shapes below: they are recorded, on tensors without memory, and compiled
with Triton's own tools. A row of the table is one compiled kernel: registers a thread, bytes of stack and instructions
that spill, shared memory, and instructions of the machine code by class. Exit code 1 where a kernel spills, or where a
product on tensor cores has no integer tensor-core instruction, or multiplications and additions were fused.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from bellbox.core.grid import Grid, Levels
from bellbox.ops.backends.triton import plan
from bellbox.ops.backends.triton.launch import coding, layout, linear, products, rows
from bellbox.ops.weight_layout import packed_size

BLOCK = 128
MANY = 2048
"""Rows of a prompt."""
RECORD = Path(__file__).with_name("compiled.md")
ARCHITECTURES = (80, 90, 100, 120)
GPUS = {
    80: plan.Gpu((8, 0), 108), 90: plan.Gpu((9, 0), 132), 100: plan.Gpu((10, 0), 148), 120: plan.Gpu((12, 0), 170),
}  # fmt: skip
"""A100, H100, B200 and RTX 5090, which tiles and pieces depend on."""
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)")
PRODUCTS = ("multiply", "multiply_planes", "multiply_fp4", "finish")
TENSOR = ("IMMA", "IGMMA", "UTCIMMA")
FP4 = ("OMMA", "QMMA", "UTCOMMA", "UTCQMMA")
CLASSES = {
    "tensor": (*TENSOR, *FP4),
    "load": ("LDG", "LDGSTS", "UTMALDG"),
    "store": ("STG", "UTMASTG"),
    "shared": ("LDS", "STS", "LDSM", "STSM", "LDTM", "STTM"),
    "shuffle": ("SHFL",),
    "integer": (
        "LOP3",
        "SHF",
        "PRMT",
        "IADD3",
        "IMAD",
        "LEA",
        "IADD",
        "IMNMX",
        "VIMNMX",
        "ISETP",
        "SEL",
        "VIADD",
        "POPC",
        "I2F",
        "I2FP",
    ),
    "float": (
        "FADD",
        "FMUL",
        "FFMA",
        "FSETP",
        "FSEL",
        "FMNMX",
        "DADD",
        "DMUL",
        "DFMA",
        "F2F",
        "F2FP",
        "MUFU",
    ),
    "spill": ("LDL", "STL"),
}


HEAD = f"""# Compiled kernels

Written by `python benchmarks/gpu/compile.py --record`, Triton {triton.__version__}. A cell: registers of a thread,
instructions of its longest loop (0: none), tensor-core instructions, bytes spilled. A dash: not launched there, or
not compiled since the last change.
"""


@dataclass
class Launch:
    """A kernel with the arguments of one launch."""

    what: str
    function: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


@dataclass
class Recorder:
    """Takes launches down in place of launching."""

    what: str = ""
    found: list[Launch] = field(default_factory=list)

    def launcher(self, function: Any) -> Any:
        """What a function subscripted by a grid is to be."""

        def take_down(*positional: Any, **named: Any) -> None:
            names = function.arg_names
            arguments = dict(zip(names, positional, strict=False))
            arguments |= {name: value for name, value in named.items() if name in names}
            options = {name: value for name, value in named.items() if name not in names}
            self.found.append(Launch(self.what, function, arguments, options))

        return take_down


def recorded(on: plan.Gpu, block: int) -> list[Launch]:
    """Every kernel at the shapes of a LLaMA 7B: hidden 4096, intermediate 11008, prompts of 2048 rows, single rows."""
    recorder = Recorder()
    JITFunction.__getitem__ = lambda function, _: recorder.launcher(function)  # type: ignore[method-assign]
    plan.gpu = lambda _: on  # type: ignore[assignment]
    with torch.device("meta"):
        for what, call in _calls(block):
            recorder.what = what
            call()
            if what.startswith(f"{MANY} rows, weights"):
                recorder.what, plan.packs_rows = f"{what}, packed", lambda *_: True  # type: ignore[assignment]
                call()
                plan.packs_rows = lambda *_: False  # type: ignore[assignment]
            if on.takes_fp4 and what.startswith(f"{MANY} rows, weights"):
                recorder.what, plan.fp4 = f"{what}, e2m1", lambda _: True  # type: ignore[assignment]
                call()
                plan.fp4 = lambda _: False  # type: ignore[assignment]
    return recorder.found


def _calls(block: int) -> Iterator[tuple[str, Any]]:
    def floats(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    columns, outputs = 4096, 4096
    for weight_bits, act_bits, count in (
        *((bits, bits, MANY) for bits in (4, 3, 2, 1)),
        *((bits, 4, 1) for bits in (4, 3, 2, 1)),
        (4, 4, 64),
        (2, 2, 1),
        (1, 1, 1),
    ):
        weights, inputs = Levels.gaussian(2**weight_bits), Levels.gaussian(2**act_bits)

        def layer(
            weights: Levels = weights,
            inputs: Levels = inputs,
            count: int = count,
            columns: int = columns,
            outputs: int = outputs,
        ) -> None:
            linear.packed_linear(
                floats(count, columns),
                torch.empty(packed_size(outputs, columns, weights.n), dtype=torch.uint8),
                floats(outputs, dtype=torch.float32), None, floats(1, dtype=torch.float32),
                floats(inputs.n - 1, dtype=torch.float32), None, None,
                columns, weights.n, weights.zero_point, inputs.zero_point, min(block, columns & -columns), "rms",
                False, torch.bfloat16,
            )  # fmt: skip

        yield f"{count} rows, weights {weight_bits} bits, activations {act_bits}", layer
        if (weight_bits, count) == (4, MANY):
            yield f"{count} rows of 11008", lambda layer=layer: layer(columns=11008)
            yield f"{count} rows of 1024", lambda layer=layer: layer(columns=1024)
            yield f"{count} rows of 24576", lambda layer=layer: layer(columns=24576)
        if weight_bits in (4, 1):  # numbers that are 1 are no variables when a kernel is compiled
            yield f"a column, {act_bits} bits", lambda layer=layer: layer(count=1, columns=1, outputs=1)
    levels = Levels.gaussian(16)
    x, r = floats(MANY, columns), floats(MANY, 1, dtype=torch.float32)
    yield "row_rms of a column", lambda: rows.row_rms(floats(1, 1))
    one = floats(1, 1, dtype=torch.float32)
    thresholds, offset = levels.thresholds, levels.offset
    kept = torch.empty((MANY, columns), dtype=torch.int8)
    yield "row_rms", lambda: rows.row_rms(x)
    yield "rotate", lambda: rows.rotate(x, block**-0.5, block, torch.bfloat16)
    yield "encode", lambda: rows.encode(x, r, thresholds, block)
    yield "keep", lambda: rows.keep(x, r, thresholds, block)
    yield "kept_codes", lambda: rows.kept_codes(kept, thresholds)
    yield "decode_kept", lambda: rows.decode_kept(kept, r, thresholds, offset, torch.bfloat16)
    yield "bbq_forward", lambda: rows.bbq_forward(x, r, one, thresholds, offset, block, torch.bfloat16)
    yield "bbq_backward", lambda: rows.bbq_backward(x, x, x, r, one, r, block, False)
    yield (
        "bbq_backward_kept",
        lambda: rows.bbq_backward_kept(x, kept, r, one, r, thresholds, offset, block, torch.bfloat16),
    )
    packed = torch.empty(packed_size(outputs, columns, 16), dtype=torch.uint8)
    scale = floats(outputs, dtype=torch.float32)
    yield (
        "kept_linear",
        lambda: linear.kept_linear(
            kept, r, packed, scale, None, one, thresholds, 16, Grid(16, 0.0).zero_point, 0.0, torch.bfloat16
        ),
    )
    for bits in (4, 3, 2, 1):
        levels = Levels.gaussian(2**bits)
        held = torch.empty(packed_size(outputs, columns, levels.n), dtype=torch.uint8)
        weights = coding.Weights(held, scale, None, levels.grid, columns)
        sums = torch.empty(MANY, dtype=torch.int32)
        coded = coding.Rows(kept, columns, sums, scale[:MANY], one, Grid(16, 0.0))
        yield (
            f"library, {bits} bits",
            lambda weights=weights, coded=coded: products.multiply_by_library(coded, weights, torch.bfloat16),
        )
    codes = torch.empty((outputs, columns), dtype=torch.uint8)
    for bits in (4, 3, 2, 1):
        yield f"prepack, {bits} bits", lambda bits=bits: layout.prepack(codes, 2**bits, 1)
        yield f"unpack, {bits} bits", lambda bits=bits: layout.unpack(packed, outputs, columns, 2**bits)


TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float64: "*fp64", torch.int8: "*i8", torch.uint8: "*u8",
    torch.int32: "*i32", torch.float16: "*fp16",
}  # fmt: skip


def compiled(launched: Launch, architecture: int) -> Any:
    """What Triton would have compiled at that launch: arguments that are 1 or multiples of 16 are known as such."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for place, (name, parameter) in enumerate(
        zip(launched.function.arg_names, launched.function.params, strict=True)
    ):
        value = launched.arguments[name]
        if parameter.is_constexpr or value is None or value is True or (type(value) is int and value == 1):
            signature[name] = "constexpr"
            constants[(place,)] = value
        elif isinstance(value, Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    source = ASTSource(launched.function, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launched.options)


@dataclass
class Row:
    """What a compiled kernel needs and does."""

    kernel: str
    what: str
    architecture: int
    registers: int
    stack: int
    shared: int
    warps: int
    instructions: Counter[str]
    looped: int
    """Instructions of the longest loop, without the loops within: what a row, or a step along the columns, costs."""
    fused: int
    """Fused multiply-adds of fp32 in a product: none, or results are not the reference's."""

    def count(self, kind: str) -> int:
        """Instructions of a class, in the text of the machine code: loops count once."""
        return sum(self.instructions[name] for name in CLASSES[kind])

    @property
    def cell(self) -> str:
        """For the table of all architectures."""
        return f"{self.registers}, {self.looped}, {self.count('tensor')}, {self.stack}"

    def wrong(self) -> str | None:
        """What must not be, or None."""
        if self.count("spill") or self.stack:
            return f"{self.count('spill')} instructions spill, {self.stack} bytes of stack"
        if self.shared > GPUS[self.architecture].shared:
            return f"{self.shared} bytes of shared memory"
        if self.fused:
            return f"{self.fused} fused multiply-adds"
        if self.kernel in ("multiply", "multiply_fp4") and not self.count("tensor"):
            return "no tensor-core instruction of its kind"
        return None


def read(launched: Launch, architecture: int) -> Row:
    """Compile, and take the machine code apart."""
    binary = compiled(launched, architecture)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(binary.asm["cubin"])
        usage = _run("cuobjdump", "-res-usage", path)
        code = _run("nvdisasm", "-c", path)
    instructions = Counter(found[1] for found in map(INSTRUCTION.match, code.splitlines()) if found)

    def used(name: str) -> int:
        found = re.search(rf"{name}:(\d+)", usage)
        return int(found[1]) if found else 0

    name = launched.function.__name__
    # Coding has some of its own, whose product is exact (`steps.butterfly`).
    fused = binary.asm["ptx"].count("fma.rn.f32") if name in PRODUCTS else 0
    return Row(
        name, launched.what, architecture, used("REG"), used("STACK"), binary.metadata.shared,
        binary.metadata.num_warps, instructions, looped(code), fused,
    )  # fmt: skip


def looped(code: str) -> int:
    """Instructions of the longest loop of machine code, without the loops within it."""
    lines = code.splitlines()
    labels = {
        line[: line.index(":")]: number for number, line in enumerate(lines) if re.match(r"\.L_x_\d+:", line)
    }
    loops = []
    for number, line in enumerate(lines):
        back = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
        if back and labels[back[1]] < number - 2:  # a branch to itself ends every program
            loops.append((labels[back[1]], number))
    if not loops:
        return 0
    start, end = max(loops, key=lambda pair: pair[1] - pair[0])
    inner = {
        n for a, b in loops if start <= a and b <= end and (a, b) != (start, end) for n in range(a, b + 1)
    }
    return sum(bool(INSTRUCTION.match(lines[n])) for n in range(start, end + 1) if n not in inner)


def _run(tool: str, *arguments: Any) -> str:
    done = subprocess.run([TOOLS / tool, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{tool}: {done.stderr.strip()}")
    return done.stdout


def table(rows: list[Row]) -> str:
    """As Markdown."""
    kinds = [kind for kind in CLASSES if kind != "spill"]
    heads = ("kernel", "call", "sm", "warps", "registers", "spills", "shared, KiB", "loop", *kinds)
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in rows:
        counts = " | ".join(str(row.count(kind)) for kind in kinds)
        lines.append(
            f"| {row.kernel} | {row.what} | {row.architecture} | {row.warps} | {row.registers} | "
            f"{row.count('spill')} | {row.shared / 1024:.1f} | {row.looped} | {counts} |"
        )
    return "\n".join(lines) + "\n"


def record(path: Path, cells: dict[tuple[str, str], str], architecture: int) -> None:
    """Write one architecture's column of the table of all, the others as they stand there."""
    known: dict[tuple[str, str], dict[str, str]] = {}
    heads = [f"sm_{each}" for each in ARCHITECTURES]
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        parts = [each.strip() for each in line.strip("|").split("|")]
        if line.startswith("| `"):
            known[parts[0].strip("`"), parts[1]] = dict(zip(heads, parts[2:], strict=True))
    for row in known.values():
        row.pop(f"sm_{architecture}", None)  # what is compiled no more
    for key, cell in cells.items():
        known.setdefault(key, {})[f"sm_{architecture}"] = cell
    lines = [HEAD, f"| kernel | call | {' | '.join(heads)} |", "|" + "---|" * (len(heads) + 2)]
    for (kernel, call), row in sorted(known.items()):
        if row:
            lines.append(f"| `{kernel}` | {call} | {' | '.join(row.get(head, '-') for head in heads)} |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="*", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--only", default="", help="kernels whose name or call contains this")
    parser.add_argument("--markdown", type=Path, help="write the table here too")
    parser.add_argument(
        "--record", type=Path, nargs="?", const=RECORD, help="write the table of all architectures"
    )
    parser.add_argument("--block", type=int, default=BLOCK, help="of the rotation; 1: none")
    arguments = parser.parse_args()
    if arguments.record and (arguments.only or arguments.block != BLOCK):
        parser.error("--record is for all kernels at the block that is shipped")
    found: list[Row] = []
    for architecture in arguments.arch:
        seen: set[str] = set()
        for launched in recorded(GPUS[architecture], arguments.block):
            label = f"{launched.function.__name__}: {launched.what}"
            if arguments.only not in label or label in seen:
                continue
            seen.add(label)
            row = read(launched, architecture)
            found.append(row)
            if arguments.markdown:  # as it comes: a run that is cut short leaves what it had
                arguments.markdown.write_text(table(found), encoding="utf-8")
            print(
                f"sm_{architecture} {label}: {row.registers} registers, {row.stack} stack, "
                f"tensor {row.count('tensor')} of {sum(row.instructions.values())}"
                + (f"  WRONG: {row.wrong()}" if row.wrong() else ""),
                flush=True,
            )
        if arguments.record:
            own = [row for row in found if row.architecture == architecture]
            record(arguments.record, {(row.kernel, row.what): row.cell for row in own}, architecture)
    print(table(found))
    wrong = [row for row in found if row.wrong()]
    for row in wrong:
        print(f"sm_{row.architecture} {row.kernel} ({row.what}): {row.wrong()}", file=sys.stderr)
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
