"""Try an installed Bellbox as its user does: kernels, no compiler, one OpenMP in the process, the README's program.

    python tests/install/try_installed.py README.md

For a fresh environment that holds a wheel and torch; `make wheel` and the forge's workflow run it there, where no
compiler is on the path. A wheel without kernels (`--reference`) is tried for saying so.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

COMPILERS = ("c++", "g++", "clang++", "cc", "gcc", "clang", "cl")


def said(*command: str, folder: str | None = None) -> str:
    """What a command prints; it must end well."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def runtimes() -> list[str]:
    """The OpenMP libraries in a process that has used torch and our kernels, by file."""
    program = (
        "import bellbox as bb, torch\n"
        "model = bb.prepare(torch.nn.Sequential(torch.nn.Linear(256, 256)), bb.Recipe.bbq(bits=2))\n"
        "model(torch.randn(64, 256) @ torch.randn(256, 256))\n"
        "bb.convert(model.eval())(torch.randn(64, 256))\n"
        "print(open('/proc/self/maps').read())\n"
    )
    return sorted(set(re.findall(r"/\S*lib[a-z]*omp[^/\s]*", said("-c", program))))


def readme(path: Path) -> None:
    """Its first program prints what stands below it."""
    blocks = re.findall(r"```(\w*)\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
    place = next(i for i, (language, _) in enumerate(blocks) if language == "python")
    with tempfile.TemporaryDirectory() as folder:
        printed = said("-c", blocks[place][1], folder=folder)
    if printed != blocks[place + 1][1]:
        raise SystemExit(f"the README's first program printed\n{printed}\ninstead of\n{blocks[place + 1][1]}")


def main() -> None:
    """Try everything; exit with a line that says what is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("readme", type=Path)
    parser.add_argument("--reference", action="store_true", help="the wheel has no kernels")
    asked = parser.parse_args()
    found = [name for name in COMPILERS if shutil.which(name)]
    version = said("-m", "bellbox", "--version").strip()
    print(f"{version}; Python {sys.version.split()[0]}, torch {importlib.metadata.version('torch')}")
    print(f"compilers on the path: {', '.join(found) or 'none'}")
    if ("kernels: native" in version) == asked.reference:
        raise SystemExit(f"kernels: {version}")
    if sys.platform == "linux":
        names = runtimes()
        print(f"OpenMP in the process: {', '.join(names)}")
        if len(names) != 1:
            raise SystemExit(f"{len(names)} OpenMP libraries in one process: {', '.join(names)}")
    readme(asked.readme)
    print("the README's first program prints what stands below it")


if __name__ == "__main__":
    main()
