"""Who may know whom: no import goes in a circle, lazy and type-only ones counted, and each part knows what it may."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import bellbox as bb

ROOT = Path(bb.__file__).parent

# What a part of the package may import. The command line, at the top, may import everything.
MAY_KNOW = {
    "__main__": "cli",
    "version": "",
    "errors": "",
    "utils": "errors",
    "core": "errors",
    "objectives": "errors",
    "ops": "errors utils core",
    "quantizers": "errors core ops",
    "recipe": "errors core quantizers",
    "nn": "errors core ops quantizers recipe",
    "structure": "nn",
    "past_forward": "nn",
    "coverage": "nn past_forward quantizers recipe structure",
    "convert": "errors core nn past_forward quantizers recipe structure coverage",
    "listing": "core nn coverage",
    "calibrate": "errors quantizers",
    "optim": "errors core ops nn quantizers recipe structure",
    "models": "errors utils ops structure",
    "data": "errors utils",
    "inference": "errors ops nn models data convert",
    "evaluation": "errors core nn data",
    "runs": "errors utils version core ops quantizers recipe nn optim convert models data",
    "ptq": "errors utils core nn models data formats",
    "formats": "errors utils core nn models data runs",
    "interop": "errors utils version core ops quantizers nn convert models data inference recipe formats",
    "serve": "errors utils data inference",
    "training": (
        "errors utils core ops quantizers recipe nn optim convert calibrate models data objectives evaluation formats "
        "runs"
    ),
    "scaling": "errors utils recipe convert models",
    "benchmark": "utils core ops recipe nn convert models inference",
    "report": "errors utils runs comparison",
    "comparison": (
        "errors utils core quantizers recipe nn convert models data inference evaluation ptq formats runs training "
        "benchmark report"
    ),
}  # fmt: skip


def name_of(path: Path) -> str:
    parts = list(path.relative_to(ROOT.parent).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports() -> dict[str, set[str]]:
    """The modules of the package that each of them imports anywhere in its text."""
    files = {name_of(path): path for path in ROOT.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for name, path in files.items():
        of = found.setdefault(name, set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bellbox"):
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    of.add(full if full in files else str(node.module))
            elif isinstance(node, ast.Import):
                of |= {alias.name for alias in node.names if alias.name in files}
        of.discard(name)
    return found


def part(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_nothing_imports_itself_by_a_detour():
    assert len(imports()) > 100
    try:
        TopologicalSorter(imports()).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_each_part_knows_what_it_may():
    wrong = []
    for module, known in imports().items():
        if part(module) in ("", "cli"):
            continue
        assert part(module) in MAY_KNOW, f"{module}: say in this test what it may know"
        allowed = {part(module), *MAY_KNOW[part(module)].split()}
        wrong += [f"{module} -> {other}" for other in sorted(known) if part(other) not in allowed]
    assert wrong == []


def test_a_part_may_know_what_it_does_know():
    """A rule that nothing needs any longer goes."""
    known: dict[str, set[str]] = {}
    for module, others in imports().items():
        known.setdefault(part(module), set()).update(map(part, others))
    spare = {p: set(may.split()) - known[p] for p, may in MAY_KNOW.items()}
    assert {p: s for p, s in spare.items() if s} == {}
