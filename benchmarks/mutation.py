"""Mutation testing of the numerical core: how many small mistakes in the source do the tests notice?

    python benchmarks/mutation.py core/grid quantizers/lsq --out mutation.jsonl
    python benchmarks/mutation.py --report mutation.jsonl

The mistakes are those of cosmic-ray (`pip install cosmic-ray`): an operator, a comparison, a number, a condition is
replaced by another, one at a time. Its own runner starts a process for each, 7 s with the import of PyTorch, and writes
into the source. Here the tests of a module are collected once; for each mutant that process forks, gives the functions
of the module the changed code, and runs them. So the working tree is never touched. Where the mistake is outside of
functions (a constant, a default), a new process imports the changed module from memory.

Of each operator's replacements only those are tried that a person might type (`REPLACEMENTS`); annotations, which are
never run, are left alone. A mutant is killed where a test fails or takes ten times as long; what survives is listed
with its line. Tests of a module are in `TESTS`; those that killed before run first, then the quick ones.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import gc
import importlib.abc
import importlib.util
import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src"

_FORMULAS = ("tests/quantizers/test_formulas.py",)
_METHODS = (
    *_FORMULAS,
    "tests/core/test_values.py",
    "tests/quantizers/test_methods.py",
)
_LEARNED = ("tests/quantizers/test_scales.py", *_METHODS)
_OPTIMIZER = ("tests/training/test_train_optimizer.py", "tests/quantizers/test_codebook_fits.py")
TESTS: dict[str, tuple[str, ...]] = {
    "core/grid": ("tests/core/test_grid.py", "tests/core/test_values.py", "tests/quantizers/test_oracles.py"),
    "core/packing": ("tests/core/test_packing.py",),
    "core/hadamard": ("tests/core/test_hadamard.py", "tests/ops/test_rotate.py"),
    "core/entropy": ("tests/core/test_entropy.py",),
    "core/binarize": ("tests/ptq/test_ptq_binarize.py", "tests/core/test_values.py"),
    "core/geometry": ("tests/core/test_geometry.py", "tests/core/test_values.py", "tests/nn/test_conv.py"),
    "ops/weight_layout": ("tests/ops/test_weight_layout.py",),
    "ops/encode": (
        "tests/ops/test_encode.py",
        "tests/ops/test_contracts.py",
        "tests/quantizers/test_quest.py",
    ),
    "ops/fake_quantize": (
        "tests/ops/test_encode.py",
        "tests/ops/test_contracts.py",
        "tests/quantizers/test_bbq.py",
    ),
    "ops/clip_backward": ("tests/ops/test_clip_backward.py", "tests/ops/test_contracts.py"),
    "ops/integer": ("tests/ops/test_integer.py",),
    "ops/kept": ("tests/ops/test_kept.py",),
    "ops/learned_thresholds": ("tests/ops/test_learned.py", "tests/ops/test_contracts.py"),
    "ops/rotate": ("tests/ops/test_rotate.py", "tests/ops/test_contracts.py"),
    "quantizers/base": _LEARNED,
    "quantizers/bbq": (
        "tests/quantizers/test_bbq.py",
        "tests/quantizers/test_bbq_options.py",
        "tests/quantizers/test_transforms.py",
        "tests/quantizers/test_published_rules.py",
        "tests/core/test_values.py",
        *_FORMULAS,
    ),
    "quantizers/cewt": ("tests/quantizers/test_cewt_published.py", *_METHODS),
    "quantizers/codebook": ("tests/quantizers/test_codebook_fits.py", *_METHODS),
    "quantizers/first_scale": _LEARNED,
    "quantizers/kmeans": ("tests/quantizers/test_codebook_fits.py", *_METHODS),
    "quantizers/learned": _LEARNED,
    "quantizers/learned_thresholds": (
        "tests/ops/test_learned.py",
        "tests/quantizers/test_transforms.py",
        *_METHODS,
    ),
    "quantizers/lsq": _LEARNED,
    "quantizers/moments": ("tests/quantizers/test_moments.py",),
    "quantizers/n2uq": _LEARNED,
    "quantizers/nf": _METHODS,
    "quantizers/own": ("tests/quantizers/test_own.py",),
    "quantizers/pact": _LEARNED,
    "quantizers/quest": ("tests/quantizers/test_quest.py", *_METHODS),
    "quantizers/rtn": _METHODS,
    "quantizers/seq": ("tests/quantizers/test_published_rules.py", *_LEARNED),
    "quantizers/straight_through": (
        "tests/quantizers/test_transforms.py",
        "tests/core/test_values.py",
        *_FORMULAS,
    ),
    "quantizers/ternary": _METHODS,
    "optim/groups": _OPTIMIZER,
    "optim/codebooks": _OPTIMIZER,
    "optim/hyperball": ("tests/optim/test_hyperball.py",),
    "training/schedule": ("tests/training/test_train_schedule.py",),
    "optim/cewt": ("tests/training/test_train_cewt.py",),
    "training/optim/groups": ("tests/training/test_train_optimizer.py", "tests/training/test_train_cewt.py"),
    "training/loop": (
        "tests/training/test_train_step.py",
        "tests/training/test_train_loop.py",
        "tests/training/test_train_checkpoint.py",
    ),
    "training/distill": ("tests/training/test_train_distill.py",),
    "runs/average": ("tests/training/test_average.py",),
}
"""Tests of a module, by its path below `bellbox`."""
METHODS = {
    "base": "bbq",
    "codebook": "nf or kmeans",
    "first_scale": "lsq",
    "learned": "lsq",
    "learned_thresholds": "n2uq",
    "moments": "lsq",
    "own": "lsq",
}
"""With whose tests of `test_methods.py`, which holds every method to one contract, a module is tried."""

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
    files = TESTS.get(module, ())
    if not files:
        raise SystemExit(f"{module}: which tests concern it is not said; add it to TESTS")
    return tuple(file for file in files if (ROOT / file).is_file())


def filter_of(module: str) -> str:
    """What pytest's `-k` is given.

    Tests that wait for a compiler are left out: what they hold to the eager function, others hold to formulas.
    """
    name = module.rpartition("/")[2]
    return f"not compiled and ({METHODS.get(name, name)} or not test_methods.py)"


def environment_of(module: str) -> dict[str, str]:
    """The Python code of an operation is its reference: no compiled kernel may stand in for it."""
    return {"BELLBOX_BACKEND": "reference"} if module.startswith("ops/") else {}


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


def places_of(module: str) -> list[tuple[str, int]]:
    """Operators, and where of a module each applies: all mistakes that could be tried."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator

    source = path_of(module).read_text(encoding="utf-8")
    lines, tree, annotations = source.splitlines(), get_ast(source), never_run(source)
    found: list[tuple[str, int]] = []
    for name in operators():
        operator = get_operator(name)()
        starts = [start for node in ast_nodes(tree) for start, _ in operator.mutation_positions(node)]
        for occurrence, (line, column) in enumerate(starts):
            # A star that only separates keyword arguments is an operator to cosmic-ray.
            if line * 1000 + column not in annotations and lines[line - 1].strip() != "*,":
                found.append((name, occurrence))
    return found


def mutant_of(module: str, name: str, occurrence: int) -> tuple[Mutant, str] | None:
    """A mutant with its source; None where the source is no Python, or the same."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    source = path_of(module).read_text(encoding="utf-8")
    changed = mutate_code(source, get_operator(name)(), occurrence)
    try:
        compile(changed or "?", module, "exec")
    except (SyntaxError, ValueError):
        return None
    pairs = zip(source.splitlines(), changed.splitlines(), strict=False)
    for at, (ours, theirs) in enumerate(pairs):
        if ours != theirs:
            return Mutant(
                module, name.removeprefix("core/"), occurrence, at + 1, ours.strip(), theirs.strip()
            ), changed
    return None


def chosen_of(module: str, sample: int) -> tuple[list[tuple[Mutant, str]], int]:
    """At most `sample` mutants (0 for all), drawn by a fixed seed, and how many places there are."""
    places = places_of(module)
    random.Random(0).shuffle(places)
    chosen: list[tuple[Mutant, str]] = []
    for name, occurrence in places:
        if sample and len(chosen) == sample:
            break
        found = mutant_of(module, name, occurrence)
        if found is not None:
            chosen.append(found)
    return chosen, len(places)


def patch(module: str, source: str) -> bool:
    """Give the functions of an imported module the code of a changed source; False where more than functions differ."""
    path = str(path_of(module))
    before = compile(path_of(module).read_text(encoding="utf-8"), path, "exec", dont_inherit=True)
    after = compile(source, path, "exec", dont_inherit=True)
    live: dict[CodeType, list[FunctionType]] = defaultdict(list)
    for thing in gc.get_objects():
        if isinstance(thing, FunctionType) and thing.__code__.co_filename == path:
            live[thing.__code__].append(thing)
    pairs: list[tuple[FunctionType, CodeType]] = []

    def compare(ours: CodeType, theirs: CodeType) -> bool:
        owners = live.get(ours, [])
        pairs.extend((owner, theirs) for owner in owners if ours != theirs)
        parts = [[c for c in code.co_consts if isinstance(c, CodeType)] for code in (ours, theirs)]
        if len(parts[0]) != len(parts[1]):
            return bool(owners)
        inner = all(compare(*both) for both in zip(*parts, strict=True))
        return bool(owners) or (inner and _alone(ours) == _alone(theirs))

    if not compare(before, after):
        return False
    if any(owner.__code__.co_freevars != code.co_freevars for owner, code in pairs):
        return False
    for owner, code in pairs:
        owner.__code__ = code
    return bool(pairs)


def _alone(code: CodeType) -> tuple[object, ...]:
    """What a code object is without the functions and classes within."""
    constants = [(type(c), repr(c)) for c in code.co_consts if not isinstance(c, CodeType)]
    return code.co_code, code.co_names, code.co_varnames, tuple(constants)


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


class _Loop:
    """A plugin of pytest: in place of running the tests once, run them on each mutant, in a forked process."""

    def __init__(self, module: str, chosen: Sequence[tuple[Mutant, str]], out: Path, ends: float) -> None:
        self.module, self.chosen, self.out, self.ends = module, chosen, out, ends
        self.seconds: dict[str, float] = {}
        self.killers: list[str] = []
        self.pipe = -1

    def pytest_runtest_logreport(self, report: Any) -> None:
        """In a child: the first failure ends it."""
        if report.failed and self.pipe >= 0:
            os.write(self.pipe, f"f{report.nodeid}\n".encode())
            os._exit(1)

    def pytest_runtestloop(self, session: Any) -> bool:
        import pytest

        if session.testsfailed:
            raise pytest.UsageError("the tests cannot be collected")
        items = {item.nodeid: item for item in session.items}
        failed = self._run(list(items.values()), None, first=True)
        if failed != "survived":
            raise pytest.UsageError(f"fails as it is: {failed}")
        whole = sum(self.seconds.values())
        _say(f"{self.module}: {len(self.chosen)} mutants, {len(items)} tests in {whole:.0f} s")
        quick = sorted(items, key=lambda name: self.seconds.get(name, 0.0))
        for mutant, source in self.chosen:
            if time.monotonic() > self.ends:
                break
            begun = time.monotonic()
            order = [*self.killers, *(name for name in quick if name not in self.killers)]
            became = self._run([items[name] for name in order], source)
            how = "patched"
            if became == "elsewhere":
                how, became = "imported", fresh(self.module, source, 5 * whole + 60)
            elif became in items and became not in self.killers:
                # It runs first from now on, where it passes by itself on what is right.
                by_itself = self._run([items[became]], None)
                self.killers[:0] = [became] if by_itself == "survived" else []
            row = {
                **asdict(mutant),
                "outcome": "survived" if became == "survived" else "killed",
                "by": became,
                "how": how,
                "seconds": round(time.monotonic() - begun, 1),
            }
            with self.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        return True

    def _run(self, items: list[Any], source: str | None, first: bool = False) -> str:
        """`survived`, the name of the test that failed, `elsewhere` where patching is not enough, or `timeout`."""
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(ours)
                os.setsid()
                self.pipe = theirs
                if source is not None and not patch(self.module, source):
                    os.write(theirs, b"felsewhere\n")
                    os._exit(1)
                for item, following in zip(items, [*items[1:], None], strict=True):
                    os.write(theirs, f"s{item.nodeid}\n".encode())
                    item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                os.write(theirs, b"e\n")
            finally:
                os._exit(1)
        os.close(theirs)
        became, at, since, rest = "crashed", "", time.monotonic(), b""
        limit = 600.0
        while True:
            ready, _, _ = select.select([ours], [], [], max(0.0, since + limit - time.monotonic()))
            if not ready:
                became = "timeout"
                break
            got = os.read(ours, 1 << 16)
            if not got:
                break
            *lines, rest = (rest + got).split(b"\n")
            for line in map(bytes.decode, lines):
                now = time.monotonic()
                if first and at:
                    self.seconds[at] = now - since
                if line[0] == "s":
                    at, since = line[1:], now
                    limit = 600.0 if first else 10 * self.seconds.get(at, 1.0) + 10
                else:
                    became = line[1:] if line[0] == "f" else "survived"
        os.close(ours)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return became


def _say(text: str) -> None:
    os.write(_OUTPUT, f"{text}\n".encode())


_OUTPUT = os.dup(1)
"""Standard output, whatever pytest makes of it."""


def _forked(work: Callable[[], int], environment: Mapping[str, str]) -> str:
    """`survived` where `work` gives 0 in a process of its own, else `killed`; its output is thrown away."""
    child = os.fork()
    if child == 0:
        code = 3
        try:
            os.setsid()
            nothing = os.open(os.devnull, os.O_RDWR)
            for handle in (0, 1, 2):
                os.dup2(nothing, handle)
            os.chdir(ROOT)
            os.environ.update(environment)
            code = work()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return "survived" if os.waitstatus_to_exitcode(status) == 0 else "killed"


def _pytest(module: str, *plugins: object) -> int:
    import pytest

    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", "-k", filter_of(module)]
    return int(pytest.main([*options, *tests_of(module)], list(plugins)))


def fresh(module: str, source: str, timeout: float) -> str:
    """What becomes of a mutant that is imported anew, in a process that starts from nothing."""
    with tempfile.TemporaryDirectory() as folder:
        changed = Path(folder) / "changed.py"
        changed.write_text(source, encoding="utf-8")
        command = [sys.executable, __file__, "--changed", str(changed), module]
        nothing = subprocess.DEVNULL
        try:
            done = subprocess.run(
                command, cwd=ROOT, timeout=timeout, check=False, stdin=nothing, stdout=nothing, stderr=nothing
            )
        except subprocess.TimeoutExpired:
            return "timeout"
        return "survived" if done.returncode == 0 else "killed"


def run(modules: Sequence[str], out: Path, sample: int, minutes: float, again: bool) -> None:
    """Try the mutants of modules that the file does not have yet, and append what became of them."""
    import hypothesis
    import torch

    torch.set_num_threads(1)
    # The same examples for all, and none remembered from one mutant to the next.
    hypothesis.settings.register_profile("mutation", database=None, deadline=None, derandomize=True)
    hypothesis.settings.load_profile("mutation")
    ends = time.monotonic() + 60 * minutes
    known = {
        (row["module"], row["operator"], row["occurrence"])
        for row in rows_of(out)
        if not (again and row["outcome"] == "survived")
    }
    for module in modules:
        everything, places = chosen_of(module, sample)
        chosen = [pair for pair in everything if pair[0].key not in known]
        _say(f"{module}: {len(chosen)} to try of {places}")
        if chosen and time.monotonic() < ends:
            loop = _Loop(module, chosen, out, ends)
            became = _forked(partial(_pytest, module, loop), environment_of(module))
            if became != "survived":
                _say(f"{module}: its tests fail as it is, or cannot be collected")


def rows_of(path: Path) -> list[dict[str, object]]:
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    # What was tried again counts as it was last.
    return list({(row["module"], row["operator"], row["occurrence"]): row for row in rows}.values())


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
    parser.add_argument("--again", action="store_true", help="try what survived again")
    parser.add_argument("--changed", type=Path, help="only run the tests, with this as the module's source")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no further mutant after so long")
    given = parser.parse_args()
    if given.changed is not None:
        (module,) = given.modules
        name = f"bellbox.{module.replace('/', '.')}"
        sys.meta_path.insert(0, _Changed(name, path_of(module), given.changed.read_text(encoding="utf-8")))
        sys.exit(_pytest(module))
    if given.report is None:
        run(given.modules or list(TESTS), given.out, given.sample, given.minutes, given.again)
    report(given.report or given.out)


if __name__ == "__main__":
    main()
