"""llama.cpp's C interface, as far as the benchmarks call it, over any build of its shared libraries.

The libraries are those of an installed llama-cpp-python, or of the folder that `LLAMA_CPP_LIB_PATH` names. npm has
prebuilt ones, which spare a compilation of half an hour:

    npm pack @node-llama-cpp/linux-x64@3.22.1 && tar xzf node-llama-cpp-linux-x64-3.22.1.tgz
    export LLAMA_CPP_LIB_PATH=$PWD/package/bins/linux-x64

Structures of parameters grow from release to release. So they are blocks of bytes here, of which the first fields, the
same for years, are named; llama.cpp fills in the rest itself.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from ctypes import POINTER, Structure, byref, c_bool, c_char_p, c_int, c_int32, c_uint32, c_void_p
from pathlib import Path
from typing import Any

_ROOM = ctypes.c_byte * 1024


class ContextParams(Structure):
    """`llama_context_params`."""

    _fields_ = (("n_ctx", c_uint32), ("n_batch", c_uint32), ("n_ubatch", c_uint32), ("rest", _ROOM))


class ModelParams(Structure):
    """`llama_model_params`, never changed."""

    _fields_ = (("rest", ctypes.c_int64 * 128),)


class QuantizeParams(Structure):
    """`llama_model_quantize_params`."""

    _fields_ = (("nthread", c_int32), ("ftype", c_int), ("rest", _ROOM))


class Batch(Structure):
    """`llama_batch`."""

    _fields_ = (("n_tokens", c_int32), ("pointers", c_void_p * 6))


def folder() -> Path:
    """Where the shared libraries lie.

    Raises:
        ModuleNotFoundError: there are none.
    """
    asked = os.environ.get("LLAMA_CPP_LIB_PATH")
    if asked:
        return Path(asked)
    package = importlib.util.find_spec("llama_cpp")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("no llama_cpp, and LLAMA_CPP_LIB_PATH names no folder")
    return Path(package.origin).parent / "lib"


def load(name: str) -> ctypes.CDLL:
    """`lib{name}.so`, or the one with a version in its name."""
    where = folder()
    end = "dylib" if sys.platform == "darwin" else "so"
    for path in (where / f"lib{name}.{end}", *sorted(where.glob(f"lib{name}.v*.{end}"))):
        if path.exists():
            return ctypes.CDLL(str(path))
    raise ModuleNotFoundError(f"no lib{name}.{end} in {where}")


def declare(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
    """A function of a library with its types."""
    function = getattr(library, name)
    function.restype, function.argtypes = result, arguments
    return function


Log = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
_silent = Log(lambda *_: None)  # kept: the library holds its address


class Llama:
    """The functions by their names without `llama_`."""

    def __init__(self) -> None:
        declare(load("ggml-base"), "ggml_log_set", None, Log, c_void_p)(_silent, None)
        # Builds for many processors carry a library for each, and choose among them when they are told where to look.
        declare(load("ggml"), "ggml_backend_load_all_from_path", None, c_char_p)(str(folder()).encode())
        library = load("llama")
        declare(library, "llama_log_set", None, Log, c_void_p)(_silent, None)
        self.model_params = declare(library, "llama_model_default_params", ModelParams)
        self.load = declare(library, "llama_model_load_from_file", c_void_p, c_char_p, ModelParams)
        self.context_params = declare(library, "llama_context_default_params", ContextParams)
        self.context = declare(library, "llama_init_from_model", c_void_p, c_void_p, ContextParams)
        self.set_threads = declare(library, "llama_set_n_threads", None, c_void_p, c_int32, c_int32)
        self.memory = declare(library, "llama_get_memory", c_void_p, c_void_p)
        self.clear = declare(library, "llama_memory_clear", None, c_void_p, c_bool)
        self.remove = declare(library, "llama_memory_seq_rm", c_bool, c_void_p, c_int32, c_int32, c_int32)
        self.batch = declare(library, "llama_batch_get_one", Batch, POINTER(c_int32), c_int32)
        self.decode = declare(library, "llama_decode", c_int32, c_void_p, Batch)
        self.synchronize = declare(library, "llama_synchronize", None, c_void_p)
        self.logits = declare(library, "llama_get_logits_ith", POINTER(ctypes.c_float), c_void_p, c_int32)
        self.about = declare(library, "llama_print_system_info", c_char_p)
        self._quantize_params = declare(library, "llama_model_quantize_default_params", QuantizeParams)
        self._quantize = declare(
            library, "llama_model_quantize", c_uint32, c_char_p, c_char_p, POINTER(QuantizeParams)
        )

    def quantize(self, source: Path, target: Path, kind: int) -> None:
        """As `llama-quantize` does it: the head of Q2_K in Q6_K, and so on; rows that do not fit get another type.

        Args:
            source: a GGUF file in fp32 or fp16.
            target: where to.
            kind: of `gguf.LlamaFileType`.
        """
        parameters = self._quantize_params()
        parameters.nthread, parameters.ftype = 2, kind
        status = self._quantize(str(source).encode(), str(target).encode(), byref(parameters))
        if status:
            raise RuntimeError(f"llama_model_quantize returned {status}")
