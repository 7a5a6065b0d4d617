"""Mutation testing of the numerical core: how many small mistakes in the source do the tests notice?

    python benchmarks/mutation.py core/grid quantizers/lsq --out mutation.jsonl
    python benchmarks/mutation.py --report mutation.jsonl

The mistakes are those of cosmic-ray (`pip install cosmic-ray`): an operator, a comparison, a number, a condition is
replaced by another, one at a time. Its own runner starts a process for each, 7 s with the import of PyTorch, and writes
into the source; here a process that has imported PyTorch forks, and the child imports the one changed module from
memory, so the working tree is never touched and several run beside each other.

Of each operator's replacements only those are tried that a person might type (`REPLACEMENTS`); annotations, which are
never run, are left alone. A mutant is killed where a test fails or the time is up; what survives is listed with its
line. Tests of a module are in `TESTS`, the ones that fail first coming first; of a quantization method those that bear
its name run before all of them.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.abc
import importlib.util
import json
import os
import random
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src"

_QUANTIZERS = ("tests/quantizers/test_formulas.py", "tests/quantizers/test_oracles.py")
_METHODS = ("tests/quantizers/test_methods.py", "tests/quantizers/test_scales.py")
TESTS: dict[str, tuple[str, ...]] = {
    "core/grid": ("tests/core/test_grid.py", "tests/quantizers/test_oracles.py"),
    "core/packing": ("tests/core/test_packing.py",),
    "core/hadamard": ("tests/core/test_hadamard.py", "tests/ops/test_rotate.py"),
    "core/entropy": ("tests/core/test_entropy.py",),
    "core/binarize": ("tests/ptq/test_ptq_binarize.py",),
    "core/geometry": ("tests/nn/test_conv.py", "tests/ops/test_convolution.py"),
    "quantizers/bbq": (
        "tests/quantizers/test_bbq.py",
        "tests/quantizers/test_bbq_options.py",
        "tests/quantizers/test_published_rules.py",
        *_METHODS,
    ),
    "quantizers/cewt": ("tests/quantizers/test_cewt_published.py", *_METHODS),
    "quantizers/kmeans": ("tests/quantizers/test_codebook_fits.py", *_QUANTIZERS, *_METHODS),
    "quantizers/seq": ("tests/quantizers/test_published_rules.py", *_QUANTIZERS, *_METHODS),
    "optim": ("tests/quantizers/test_codebook_fits.py", "tests/training/test_train_optimizer.py"),
    "quantizers/quest": (*_QUANTIZERS, "tests/quantizers/test_quest.py", *_METHODS),
    "quantizers/straight_through": (*_QUANTIZERS, "tests/quantizers/test_transforms.py", *_METHODS),
    "quantizers/learned": ("tests/quantizers/test_scales.py", "tests/quantizers/test_methods.py"),
    "training/schedule": ("tests/training/test_train_schedule.py",),
    "training/optim/cewt": ("tests/training/test_train_cewt.py",),
    "training/optim/groups": ("tests/training/test_train_optimizer.py", "tests/training/test_train_cewt.py"),
}
"""Tests of a module, by its path below `bellbox`; of the quantizers that are not here, `_QUANTIZERS` and `_METHODS`."""

REPLACEMENTS = {
    *("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul", "FloorDiv_Div", "Mod_Mul", "Pow_Mul"),
    *("LShift_RShift", "RShift_LShift", "BitAnd_BitOr", "BitOr_BitAnd", "BitXor_BitAnd"),
    *("Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt", "Lt_Gt", "Gt_Lt", "LtE_GtE", "GtE_LtE", "Eq_NotEq", "NotEq_Eq"),
    *("Is_IsNot", "IsNot_Is", "Delete_USub", "Delete_Not", "Delete_Invert"),
}
PLAIN = {
    *("AddNot", "NumberReplacer", "ReplaceAndWithOr", "ReplaceOrWithAnd", "ReplaceTrueWithFalse"),
    *("ReplaceFalseWithTrue", "ZeroIterationForLoop", "ReplaceBreakWithContinue", "ReplaceContinueWithBreak"),
}


@dataclass(frozen=True)
class Mutant:
    """One mistake, and the line that it is in."""

    module: str
    operator: str
    occurrence: int
    line: int
    before: str
    after: str

    @property
    def key(self) -> tuple[str, str, int]:
        """Which of all it is."""
        return self.module, self.operator, self.occurrence


def operators() -> list[str]:
    """The names of cosmic-ray's operators that are tried."""
    from cosmic_ray.plugins import operator_names

    def wanted(name: str) -> bool:
        kind, _, rest = name.removeprefix("core/").partition("_")
        return rest in REPLACEMENTS if rest else kind in PLAIN

    return sorted(filter(wanted, operator_names()))


def path_of(module: str) -> Path:
    return SOURCE / "bellbox" / f"{module}.py"


def tests_of(module: str) -> tuple[str, ...]:
    """The files of tests that exist."""
    files = TESTS.get(module, (*_QUANTIZERS, *_METHODS) if module.startswith("quantizers/") else ())
    if not files:
        raise SystemExit(f"{module}: which tests concern it is not said; add it to TESTS")
    return tuple(file for file in files if (ROOT / file).is_file())


def stages_of(module: str) -> list[list[str]]:
    """What pytest is given, the quick part first."""
    files, name = list(tests_of(module)), module.rpartition("/")[2]
    methods = ("bbq", "cewt", "kmeans", "lsq", "n2uq", "nf", "pact", "quest", "rtn", "seq", "ternary")
    quick = [[*files, "-k", name]] if module.startswith("quantizers/") and name in methods else []
    return [*quick, files]


def never_run(source: str) -> set[int]:
    """Lines and columns, as `line * 1000 + column`, of annotations."""
    found: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if isinstance(part, ast.expr):
                lines = range(part.lineno, (part.end_lineno or part.lineno) + 1)
                for line in lines:
                    first = part.col_offset if line == part.lineno else 0
                    last = part.end_col_offset if line == part.end_lineno else 999
                    found.update(line * 1000 + column for column in range(first, last or 999))
    return found


def mutants_of(module: str) -> Iterator[tuple[Mutant, str]]:
    """All mutants of a module with their source."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    source = path_of(module).read_text(encoding="utf-8")
    lines, tree, annotations = source.splitlines(), get_ast(source), never_run(source)
    for name in operators():
        operator = get_operator(name)()
        places = [start for node in ast_nodes(tree) for start, _ in operator.mutation_positions(node)]
        for occurrence, (line, column) in enumerate(places):
            if line * 1000 + column in annotations:
                continue
            changed = mutate_code(source, operator, occurrence)
            if changed is None:
                continue
            try:
                compile(changed, module, "exec")
            except (SyntaxError, ValueError):
                continue
            # A star that only separates keyword arguments is an operator to cosmic-ray.
            if lines[line - 1].strip() == "*,":
                continue
            after = changed.splitlines()
            pairs = enumerate(zip(lines, after, strict=False))
            at = next((i for i, (ours, theirs) in pairs if ours != theirs), None)
            if at is not None:
                texts = lines[at].strip(), after[at].strip()
                yield Mutant(module, name.removeprefix("core/"), occurrence, at + 1, *texts), changed


class _Changed(importlib.abc.MetaPathFinder):
    """Imports one module from a text."""

    def __init__(self, name: str, path: Path, source: str) -> None:
        self.name, self.path, self.source = name, path, source

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:  # noqa: ARG002
        if fullname != self.name:
            return None
        source, file = self.source, str(self.path)

        class Loader(SourceFileLoader):
            def get_code(self, fullname: str) -> CodeType:  # noqa: ARG002
                return compile(source, file, "exec", dont_inherit=True)

        return importlib.util.spec_from_file_location(fullname, file, loader=Loader(fullname, file))


def outcome(module: str, source: str | None, files: Sequence[str], timeout: float) -> tuple[str, float]:
    """`killed`, `timeout` or `survived`, and seconds, of the tests on a changed module (None: as it is)."""
    begun = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 3
        try:
            os.setsid()
            nothing = os.open(os.devnull, os.O_RDWR)
            for handle in (0, 1, 2):
                os.dup2(nothing, handle)
            os.chdir(ROOT)
            if source is not None:
                name = f"bellbox.{module.replace('/', '.')}"
                sys.meta_path.insert(0, _Changed(name, path_of(module), source))
            import pytest

            code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", *files]))
        finally:
            os._exit(code)
    while time.monotonic() - begun < timeout:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            seconds = time.monotonic() - begun
            return ("survived" if os.waitstatus_to_exitcode(status) == 0 else "killed"), seconds
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout", time.monotonic() - begun


def run(modules: Sequence[str], out: Path, sample: int, workers: int, factor: float, minutes: float) -> None:
    """Try the mutants of modules that the file does not have yet, and append what became of them."""
    import torch

    torch.set_num_threads(1)
    ends = time.monotonic() + 60 * minutes
    known = {(row["module"], row["operator"], row["occurrence"]) for row in rows_of(out)}
    for module in modules:
        stages = stages_of(module)
        took = [outcome(module, None, stage, 3600) for stage in stages]
        if any(became != "survived" for became, _ in took):
            raise SystemExit(f"{module}: its tests fail as it is: {' '.join(stages[-1])}")
        limits = [factor * seconds + 20 for _, seconds in took]
        everything = list(mutants_of(module))
        random.Random(0).shuffle(everything)
        chosen = [pair for pair in everything[: sample or None] if pair[0].key not in known]
        print(
            f"{module}: {len(chosen)} of {len(everything)} mutants, tests take {took[-1][1]:.0f} s",
            flush=True,
        )

        def attempt(
            pair: tuple[Mutant, str], stages: list[list[str]] = stages, limits: list[float] = limits
        ) -> tuple[Mutant, str, float] | None:
            (mutant, source), became, seconds = pair, "survived", 0.0
            if time.monotonic() > ends:
                return None
            for stage, limit in zip(stages, limits, strict=True):
                became, more = outcome(mutant.module, source, stage, limit)
                seconds += more
                if became != "survived":
                    break
            return mutant, became, seconds

        with ThreadPoolExecutor(workers) as pool, out.open("a", encoding="utf-8") as file:
            for done in pool.map(attempt, chosen):
                if done is not None:
                    mutant, became, seconds = done
                    file.write(
                        json.dumps({**asdict(mutant), "outcome": became, "seconds": round(seconds, 1)}) + "\n"
                    )
                    file.flush()


def rows_of(path: Path) -> list[dict[str, object]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def report(path: Path) -> None:
    """Print the score of each module, and what survived."""
    by_module: dict[str, list[dict[str, object]]] = defaultdict(list)
    for row in rows_of(path):
        by_module[str(row["module"])].append(row)
    total: Counter[str] = Counter()
    print("| module | mutants | killed | survived | score |\n| --- | ---: | ---: | ---: | ---: |")
    for module, rows in sorted(by_module.items()):
        counts = Counter("survived" if row["outcome"] == "survived" else "killed" for row in rows)
        total += counts
        print(f"| `{module}` | {len(rows)} | {counts['killed']} | {counts['survived']} | {score(counts)} |")
    print(f"| all | {total.total()} | {total['killed']} | {total['survived']} | {score(total)} |\n")
    for module, rows in sorted(by_module.items()):
        for row in sorted(rows, key=lambda row: (int(str(row["line"])), str(row["operator"]))):
            if row["outcome"] == "survived":
                print(f"{module}:{row['line']} {row['operator']}\n  - {row['before']}\n  + {row['after']}")


def score(counts: Counter[str]) -> str:
    return f"{100 * counts['killed'] / counts.total():.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("modules", nargs="*", help="below bellbox, such as core/grid")
    parser.add_argument("--out", type=Path, default=Path("mutation.jsonl"))
    parser.add_argument("--report", type=Path, help="only print what this file says")
    parser.add_argument(
        "--sample", type=int, default=0, help="at most so many mutants a module, drawn by a fixed seed"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--factor", type=float, default=3.0, help="time limit, as a multiple of what the tests take"
    )
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no further mutant after so long")
    given = parser.parse_args()
    if given.report is None:
        run(given.modules, given.out, given.sample, given.workers, given.factor, given.minutes)
    report(given.report or given.out)


if __name__ == "__main__":
    main()
