"""Write a model for another program.

bellbox export FORMAT MODEL OUT [...]
bellbox export FORMAT --help
"""

from __future__ import annotations

import importlib

from bellbox.errors import BellboxError

FORMATS: dict[str, str] = {
    "onnx": "one file of standard ONNX operators, for onnxruntime and other runtimes",
    "gguf": "a GGUF file for llama.cpp, weights only: activations are not quantized there",
    "executorch": "a program of ExecuTorch, which needs the kernels of native/executorch",
    "hf": "a folder that transformers loads, packed layers inside",
}
"""FORMAT to what it writes; the command of one is `main` of `cli/export_FORMAT.py`."""


def _usage() -> str:
    width = max(map(len, FORMATS), default=0)
    lines = [f"  {name:<{width}}  {what}" for name, what in FORMATS.items()]
    return "usage: bellbox export FORMAT MODEL OUT [...]   (bellbox export FORMAT --help)\n\n" + "\n".join(
        lines
    )


def main(argv: list[str]) -> None:
    """Run `bellbox export` with the arguments after that.

    Raises:
        BellboxError: no such format, or what the format's own command refuses.
        SystemExit: 0 after --help, 2 without arguments.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        raise SystemExit(0 if argv else 2)
    if argv[0] not in FORMATS:
        raise BellboxError(f"no format {argv[0]!r}; there are: {', '.join(FORMATS)}")
    importlib.import_module(f"bellbox.cli.export_{argv[0]}").main(argv[1:])
