"""The `bellbox` program: finds the command, imports only that, turns user errors into one line and exit code 2."""

from __future__ import annotations

import errno
import importlib
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

from bellbox.errors import BellboxError

COMMANDS = {
    "data": "turn text into token shards",
    "plan": "how much of a token budget to train quantized",
    "train": "train a model, low-bit or not",
    "eval": "perplexity, bits per byte and entropy of a model",
    "convert": "pack a trained run into integers",
    "ptq": "binarize a trained Hugging Face model without training",
    "generate": "continue a prompt",
    "serve": "answer other programs, as OpenAI's API does",
    "export": "write a model for another program: transformers, ONNX, GGUF",
    "report": "write an HTML page with pictures of a run",
    "bench": "measure speed: single layers, or a whole model",
    "compare": "train methods, bit widths and seeds alike, and draw the table",
    "demo": "the main job end to end, on bundled text",
}
# What the machine refuses without naming a file: a full disk, most of all.
_MACHINE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EROFS,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
}

_RUNS = ("train", "compare", "demo")
_WITH_METHODS = ("train", "eval", "convert", "generate", "serve", "export", "report", "compare")
"""Commands that take `--import MODULE`, for methods of the user's own."""


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    lines += [
        "",
        f"{', '.join(_WITH_METHODS)} also take --import MODULE: a module of yours that brings a quantization method",
    ]
    return "usage: bellbox COMMAND [...]   (bellbox COMMAND --help)\n\n" + "\n".join(lines)


def _version() -> str:
    from bellbox.ops import native
    from bellbox.version import __version__

    return f"bellbox {__version__}, kernels: {native.describe()}"


def _details() -> str:
    """What decides how fast things run here: processor, versions, and which backend has a kernel for an operation."""
    import platform

    import torch

    from bellbox.nn import PackedLayer  # what defines the operations of layers
    from bellbox.ops import binarized_linear, dispatch, native
    from bellbox.utils.processor import choose_precision

    del PackedLayer, binarized_linear
    precision, why = choose_precision(torch.device("cpu"))
    lines = [
        _version(),
        f"python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}",
        f"instruction sets: {', '.join(native.instruction_sets()) or 'kernels were not built'}",
        f"precision auto on the CPU: {precision}, {why}",
        f"backends, first asked first: {', '.join((*dispatch.backends(), dispatch.REFERENCE))}",
    ]
    lines += [f"  {name}: {', '.join(dispatch.kernels_of(name))}" for name in sorted(dispatch.OPERATIONS)]
    return "\n".join(lines)


def _nobody_reads(command: str) -> int:
    """The exit code where standard output was closed. A run ends by that, and says so; others were only read from."""
    # Python would try once more to write what it holds, when it leaves.
    with suppress(OSError, ValueError):  # a stream without a file has nothing to hold back
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if command not in _RUNS:
        return 141
    with suppress(OSError):  # the same pipe, perhaps
        print(
            "bellbox: error: standard output was closed, so it ends here; start it again to go on",
            file=sys.stderr,
        )
        sys.stderr.flush()
    return 2


def _warn_in_a_line() -> None:
    """A checkpoint that had to be passed over is news for the user, not for a programmer."""
    from bellbox.runs.checkpoint import CheckpointWarning

    usual = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, CheckpointWarning):
            print(f"bellbox: warning: {message}", file=sys.stderr)
        else:
            usual(message, category, *rest, **more)

    warnings.simplefilter("always", CheckpointWarning)
    warnings.showwarning = show


def main(argv: list[str] | None = None) -> None:
    """Run one command. Exits with 0, with 2 on a user's error, with 130 on Ctrl-C, 143 on SIGTERM.

    Args:
        argv: the arguments after the program's name; `sys.argv[1:]` where None.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # text of any language, on a terminal of any encoding
            stream.reconfigure(errors="replace")
    received: list[int] = []
    try:
        with _terminated_cleanly(received):
            try:
                _run(arguments)
            except Exception:
                if received:  # inside of a library that took the exception of a signal for one of its own
                    _fail("interrupted", 128 + received[0])
                raise
            sys.stdout.flush()
    except BellboxError as error:
        _fail(str(error), speaks=error.speaks)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:
        raise SystemExit(_nobody_reads(arguments[0] if arguments else "")) from None
    except UnicodeEncodeError:
        broken = next((one for one in arguments if not _is_utf8(one)), None)
        if broken is None:
            raise
        _fail(f"argument {broken!r} is not UTF-8")
    except OSError as error:
        if error.filename is None and error.errno not in _MACHINE:
            raise
        named = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        _fail(str(BellboxError(f"{named}{error.strerror}")))
    except (MemoryError, RuntimeError) as error:
        # Torch's allocator raises a RuntimeError; any other one is a defect and keeps its traceback.
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        _fail("out of memory; make the model, the batch or the context smaller")


def _run(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        raise SystemExit(0 if arguments else 2)
    command, rest = arguments[0], arguments[1:]
    if command in ("-V", "--version"):
        print(_details() if rest in (["-v"], ["--verbose"]) else _version())
        return
    if command not in COMMANDS:
        raise BellboxError(f"no command {command!r}; there are: {', '.join(COMMANDS)}")
    with warnings.catch_warnings():
        _warn_in_a_line()
        if command in _WITH_METHODS:
            rest = _import_methods(rest)
        importlib.import_module(f"bellbox.cli.{command}").main(rest)


def _import_methods(arguments: list[str]) -> list[str]:
    """Import what `--import` names, as often as it is given, and return the other arguments."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    modules: list[str] = []
    others: list[str] = []
    words = iter(arguments[:end])
    for word in words:
        if word == "--import":
            modules.append(next(words, ""))
        elif word.startswith("--import="):
            modules.append(word.partition("=")[2])
        else:
            others.append(word)
    if any(not name or name.startswith("-") for name in modules):
        raise BellboxError("--import needs the name of a module after it, which brings methods of your own")
    if modules:
        from bellbox.quantizers.own import import_modules

        import_modules(modules)
    return others + arguments[end:]


def _fail(message: str, code: int = 2, speaks: bool | None = None) -> NoReturn:
    """One line on standard error; of processes that a launcher started together, from one of them."""
    if speaks is None:
        speaks = os.environ.get("RANK") is None or _speaks(message)
    if speaks:
        print(f"bellbox: {'error: ' if code == 2 else ''}{message}", file=sys.stderr, flush=True)
    raise SystemExit(code) from None


def _speaks(message: str) -> bool:
    from bellbox.training.distributed import speaks_for_all

    return speaks_for_all(message)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def _terminated_cleanly(received: list[int]) -> Iterator[None]:
    """Leave by an exception on SIGTERM (and when the terminal closes), so that half-made folders are cleared away.

    What came is put into `received`, Ctrl-C too.

    Training and comparisons have their own way of stopping, which holds while they run.
    """
    numbers = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)  # a second one must not interrupt the clearing
        raise SystemExit(128 + number)

    # What was ignored before (nohup) stays ignored.
    before = {number: signal.getsignal(number) for number in (*numbers, signal.SIGINT)}
    usual = (signal.SIG_DFL, signal.default_int_handler)
    taken = {number for number, handler in before.items() if handler in usual}
    for number in taken:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])
