"""The package built and run where there is no C++ compiler: from the tree, and from a source distribution."""

from __future__ import annotations

import importlib.machinery
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = "import sys; from scikit_build_core.build import build_{0}; print(build_{0}(sys.argv[1]))"
RUN = """
import torch, bellbox as bb
model = bb.prepare(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)), bb.Recipe.bbq(bits=2))
model(torch.randn(2, 64)).sum().backward()
print(tuple(bb.convert(model.eval())(torch.randn(2, 64)).shape), bb.__file__)
"""
VERSION = "from bellbox.cli.main import main; main(['--version'])"


def run(
    code: str, *arguments: object, path: Path | None = None, cwd: Path
) -> subprocess.CompletedProcess[str]:
    """A process that sees this one's packages, but no editable installation of Bellbox, and no compiler."""
    before = [] if path is None else [str(path)]
    others = [each for each in sys.path if each and Path(each).resolve() != ROOT / "src"]
    return subprocess.run(
        [sys.executable, "-S", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={
            **{key: value for key, value in os.environ.items() if key != "BELLBOX_ISA"},
            "PYTHONPATH": os.pathsep.join(before + others),
            "CC": "/nonexistent",
            "CXX": "/nonexistent",
            "OMP_NUM_THREADS": "1",
        },
    )


def built(kind: str, tree: Path, out: Path) -> Path:
    done = run(BUILD.format(kind), out, cwd=tree)
    assert done.returncode == 0, done.stdout + done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("scikit_build_core", reason="the build backend is not installed here")
    copy = tmp_path_factory.mktemp("tree") / "bellbox"
    for name in ("src", "native"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def installed(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages of a wheel that was built from a source distribution."""
    out = tmp_path_factory.mktemp("installed")
    with tarfile.open(built("sdist", tree, out)) as archive:
        archive.extractall(out / "source", filter="data")
    wheel = built("wheel", next((out / "source").iterdir()), out)
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(out / "packages")
    return out / "packages"


def test_the_tree_gives_a_wheel_of_python_alone(tree: Path, tmp_path: Path) -> None:
    wheel = built("wheel", tree, tmp_path)
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "bellbox/py.typed" in names
    assert "bellbox/data/classics/train.txt.xz" in names
    assert "bellbox/report/templates/parts.html" in names
    assert not any("_native" in name for name in names)


def test_it_trains_packs_and_says_what_it_runs_on(installed: Path, tmp_path: Path) -> None:
    done = run(RUN + VERSION, path=installed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"(2, 64) {installed}")
    assert "torch reference (the compiled kernels were not built" in done.stdout


def test_kernels_that_cannot_be_loaded_are_reported(installed: Path, tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    shutil.copytree(installed, packages)
    module = packages / "bellbox" / f"_native{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    module.write_bytes(b"no library")
    done = run(VERSION, path=packages, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("bellbox: error: the compiled kernels cannot be loaded")
    assert done.stderr.count("\n") == 1
    assert "BELLBOX_ISA=reference" in done.stderr
