"""The `bellbox` program: finds the command, imports only that, turns user errors into one line and exit code 2."""

from __future__ import annotations

import importlib
import sys

from bellbox.errors import BellboxError

COMMANDS = {
    "data": "turn text into token shards",
    "plan": "how much of a token budget to train quantized",
    "train": "train a model, low-bit or not",
    "eval": "perplexity, bits per byte and entropy of a model",
    "convert": "pack a trained run into integers",
    "ptq": "binarize a trained Hugging Face model without training",
    "generate": "continue a prompt",
    "report": "write an HTML page with pictures of a run",
    "bench": "measure speed: single layers, or a whole model",
    "compare": "train methods, bit widths and seeds alike, and draw the table",
    "demo": "the main job end to end, on bundled text",
}


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "usage: bellbox COMMAND [...]   (bellbox COMMAND --help)\n\n" + "\n".join(lines)


def _version() -> str:
    from bellbox.ops import native
    from bellbox.version import __version__

    return f"bellbox {__version__}, kernels: {native.describe()}"


def main(argv: list[str] | None = None) -> None:
    """Run one command. Exits with 0, with 2 on a user's error, with 130 on Ctrl-C.

    Args:
        argv: the arguments after the program's name; `sys.argv[1:]` where None.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        raise SystemExit(0 if arguments else 2)
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS and command not in ("-V", "--version"):
        print(f"bellbox: error: no command '{command}'; there are: {', '.join(COMMANDS)}", file=sys.stderr)
        raise SystemExit(2)
    try:
        if command in ("-V", "--version"):
            print(_version())
            return
        importlib.import_module(f"bellbox.cli.{command}").main(rest)
    except BellboxError as error:
        print(f"bellbox: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("bellbox: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        sys.stderr.close()
        raise SystemExit(141) from None
    except OSError as error:
        if error.filename is None:
            raise
        print(f"bellbox: error: {error.filename}: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
