"""Instructions of the inner loops of the ARM kernels, as the cross compiler made them, beside those of their design.

No ARM machine is asked: this compiles native/kernels/{neon,dotprod,i8mm} for aarch64 and reads the disassembly. Nothing
here is a time.

    python benchmarks/arm_instructions.py [--compiler aarch64-linux-gnu-g++] [--objects FOLDER]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLAGS = {"neon": [], "dotprod": ["-march=armv8.2-a+dotprod"], "i8mm": ["-march=armv8.2-a+dotprod+i8mm"]}
# As CMakeLists.txt has them.
COMMON = ["-std=c++20", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
          "-fno-schedule-insns", "-Wno-psabi", "-fPIC"]  # fmt: skip
# Products of one instruction; of CNT, of 16 bytes of bits.
PRODUCTS = {"smlal": 8, "smlal2": 8, "sdot": 16, "udot": 16, "smmla": 32, "cnt": 128}

# Operations that take the 1,024 codes of a block out of their bytes, 64 vectors: a mask, a shift, or both; of 3 bits a
# shift and a choice of the third bit more.
APART = {1: 112, 2: 96, 3: 96 + 128, 4: 64}
# The same where fields are left at their places: a mask or a shift each, and a shift for two fields of one bit.
IN_PLACE = {1: 64 + 8, 2: 64, 3: 64 + 64 + 32, 4: 64}


@dataclass(frozen=True)
class Case:
    """One inner loop: where it is, and the vector operations that its design asks for."""

    isa: str
    what: str
    function: str
    counted: str  # the instruction that multiplies
    design: float  # vector operations for a block of 16 outputs x 64 inputs and one row
    rows: int = 1


def named(bits: int) -> str:
    return "1 bit" if bits == 1 else f"{bits} bits"


CASES = [
    *[Case("dotprod", named(b) + ", 1 row", f"product::one<{b}>", "sdot", 64 + IN_PLACE[b]) for b in APART],
    *[
        Case("dotprod", named(b) + ", 4 rows", f"product::some<{b}, 4>", "sdot", 64 + APART[b] / 4, 4)
        for b in APART
    ],
    Case("dotprod", "unpacked, 4 rows", "product::multiply<4>", "sdot", 64, 4),
    # Two rows' levels are put side by side.
    Case("i8mm", "unpacked, 4 rows", "product::multiply<4>", "smmla", 32 + 8, 4),
    # Four levels are broadcast for each group.
    *[
        Case("neon", named(b) + ", 1 row", f"product::some<{b}, 1>", "smlal", 128 + 16 + APART[b])
        for b in APART
    ],
    Case("neon", "unpacked, 2 rows", "product::multiply<2>", "smlal", 128 + 16, 2),
    # And, count, add.
    Case("dotprod", "1 bit x 1 bit, 1 row", "binary::multiply<1>", "cnt", 24),
    Case("dotprod", "1 bit x 1 bit, 4 rows", "binary::multiply<4>", "cnt", 24, 4),
    Case("neon", "1 bit x 1 bit, 4 rows", "binary::multiply<4>", "cnt", 24, 4),
]


def compiled(compiler: str, isa: str, folder: Path) -> Path:
    made = folder / f"{isa}.o"
    source = ROOT / "native" / "kernels" / isa / "table.cpp"
    flags = [*COMMON, f"-I{ROOT / 'native'}", *FLAGS[isa]]
    subprocess.run([compiler, *flags, "-c", source, "-o", made], check=True)
    return made


def disassembly(objdump: str, made: Path) -> dict[str, list[tuple[int, str, str]]]:
    """(address, mnemonic, operands) of each instruction, by the demangled name of its function."""
    command = [objdump, "-d", "-C", "--no-show-raw-insn", made]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions: dict[str, list[tuple[int, str, str]]] = {}
    current: list[tuple[int, str, str]] = []
    for line in text.splitlines():
        if head := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            current = functions.setdefault(head[1], [])
        elif found := re.match(r"\s*([0-9a-f]+):\t(\S+)(?:\t(.*))?$", line):
            current.append((int(found[1], 16), found[2], found[3] or ""))
    return functions


def inner_loop(code: list[tuple[int, str, str]], counted: str) -> list[tuple[str, str]]:
    """The loop without another in it that has most of the instructions that multiply."""
    loops = []
    for at, name, operands in code:
        target = re.search(r"\b([0-9a-f]+) <", operands)
        if target and re.match(r"b(\.|$)|cbn?z|tbn?z", name) and int(target[1], 16) < at:
            loops.append((int(target[1], 16), at))
    innermost = [
        (a, b) for a, b in loops if not any((a, b) != (c, d) and a <= c and d <= b for c, d in loops)
    ]
    bodies = [[(name, operands) for at, name, operands in code if a <= at <= b] for a, b in innermost]
    return max(bodies, key=lambda body: sum(name.startswith(counted) for name, _ in body))


def kind(name: str, operands: str) -> str:
    if name.startswith("prfm"):
        return "prefetch"
    if name.startswith(("st", "ld")):
        if "[sp" in operands:
            return "spill"
        return "load" if name.startswith("ld") else "store"
    return "vector" if re.search(r"\bv\d+\.", operands) else "scalar"


def row_of(case: Case, functions: dict[str, list[tuple[int, str, str]]]) -> str:
    found = [code for name, code in functions.items() if f"::{case.function}(" in name]
    if not found:
        raise SystemExit(f"{case.isa}: no function is called {case.function}")
    body = inner_loop(found[0], case.counted)
    names = Counter(name for name, _ in body)
    products = sum(PRODUCTS[name] * count for name, count in names.items() if name.startswith(case.counted))
    share = 1024 * case.rows / products  # of a block for all rows
    kinds = Counter(kind(*each) for each in body)
    per_row = {each: count * share / case.rows for each, count in kinds.items()}
    multiply = (
        sum(count for name, count in names.items() if name.startswith(case.counted)) * share / case.rows
    )
    columns = [case.isa, case.what, *(f"{n:g}" for n in (
        multiply, case.design, per_row.get("vector", 0), per_row.get("load", 0),
        per_row.get("spill", 0), sum(per_row.values())))]  # fmt: skip
    return "| " + " | ".join(str(each) for each in columns) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compiler", default="aarch64-linux-gnu-g++")
    parser.add_argument(
        "--objects", type=Path, help="folder of neon.o, dotprod.o and i8mm.o, instead of compiling them"
    )
    flags = parser.parse_args()
    objdump = flags.compiler.replace("g++", "objdump")
    print("Instructions for a block of 16 outputs x 64 inputs (1,024 products) and one row:")
    print()
    print("| kernels | product | that multiply | vector, by design | vector, counted | loads | stack | all |")
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        read = {
            isa: disassembly(
                objdump,
                flags.objects / f"{isa}.o" if flags.objects else compiled(flags.compiler, isa, Path(folder)),
            )
            for isa in FLAGS
        }
    for case in CASES:
        print(row_of(case, read[case.isa]))


if __name__ == "__main__":
    main()
