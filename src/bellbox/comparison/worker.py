"""Worker: one run in its own process trains as `bellbox train --resume auto` does, then measures, then leaves.

    python -m bellbox.comparison.worker RUN/asked.yaml [MODULE ...]

The modules bring methods of the user's own.

It holds on to its standard input, which the grid's process keeps open: when that closes, because the grid stops or
was killed, the run saves and leaves too. Ctrl-C is the grid's business, so it is not heard here; otherwise the
terminal would send it to both, and the second signal means: at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

from bellbox.comparison.measure import measure
from bellbox.errors import BellboxError
from bellbox.quantizers.own import import_modules
from bellbox.training import Trainer, load_config
from bellbox.utils.files import write_text
from bellbox.utils.malloc import keep_freed_memory

MEASURED = "measured.json"
SYSTEM = 3
"""Exit status where the system refused something, such as space on the disk: no fault of the run."""


def main(argv: list[str]) -> None:
    """Run the configuration of a file; what came out stands in `measured.json` in its folder.

    Raises:
        SystemExit: 2 for what cannot be trained, `SYSTEM` where the system refuses, 128 + signal where it was stopped.
    """
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    threading.Thread(target=_leave_with_the_grid, daemon=True).start()
    keep_freed_memory()
    try:
        import_modules(argv[1:])
        trainer = Trainer(load_config(argv[0]), resume="auto")
        result = trainer.run()
    except BellboxError as error:
        print(f"bellbox: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        print(f"bellbox: error: {error.filename or 'the run'}: {error.strerror or error}", file=sys.stderr)
        raise SystemExit(SYSTEM) from None
    if result.stopped_by is not None:
        raise SystemExit(128 + result.stopped_by)
    found = measure(trainer.model, result.folder)
    write_text(Path(result.folder) / MEASURED, json.dumps(found, indent=1, allow_nan=False) + "\n")


def _leave_with_the_grid() -> None:
    # Not through sys.stdin: its lock, held by this thread, would abort the interpreter when it shuts down.
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main(sys.argv[1:])
