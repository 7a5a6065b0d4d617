"""Every model of the zoo in tests/zoo: whether prepare, a step, convert and equal outputs work, and how long it took.

python benchmarks/zoo.py [NAME ...]        # all, or those whose names hold one of these
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "zoo"))
import zoo_check
import zoo_models
from zoo_packages import package


def main() -> None:
    warnings.simplefilter("ignore")
    failed = count = 0
    for library, group in zoo_models.ALL.items():
        if package(library) is None:
            print(f"{library} is not installed: {len(group)} models skipped")
            continue
        for model in group:
            if sys.argv[1:] and not any(name in model.name for name in sys.argv[1:]):
                continue
            start, result = time.perf_counter(), "ok"
            try:
                zoo_check.check(model)
            except Exception as error:  # whatever it is belongs into the table
                result = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
                failed += 1
            count += 1
            known = f" (known: {model.fails})" if model.fails and result != "ok" else ""
            print(
                f"{library:12} {model.name:44} {time.perf_counter() - start:5.1f} s  {result}{known}",
                flush=True,
            )
    print(f"{count - failed} of {count} hold")


if __name__ == "__main__":
    main()
