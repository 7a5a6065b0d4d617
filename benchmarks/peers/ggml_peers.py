"""llama.cpp's products, through the shared libraries of a build for one processor (llama-cpp-python compiles one).

Weights go where llama.cpp would put them: into the repacked buffer where the CPU back end has one for the type, else
into its plain one.
"""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from typing import Any

import numpy as np
import torch
from llama_library import Log, declare, load
from torch import Tensor

TYPES = {"Q4_0": 2, "Q4_K": 12, "Q2_K": 10, "TQ2_0": 35}
FP32 = 0

_base = load("ggml-base")
_cpu = load("ggml-cpu")


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


_init = declare(_base, "ggml_init", c_void_p, _InitParams)
_tensor = declare(_base, "ggml_new_tensor_2d", c_void_p, c_void_p, c_int, c_int64, c_int64)
_mul_mat = declare(_base, "ggml_mul_mat", c_void_p, c_void_p, c_void_p, c_void_p)
_graph = declare(_base, "ggml_new_graph", c_void_p, c_void_p)
_expand = declare(_base, "ggml_build_forward_expand", None, c_void_p, c_void_p)
_row_size = declare(_base, "ggml_row_size", c_size_t, c_int, c_int64)
_quantize = declare(
    _base, "ggml_quantize_chunk", c_size_t, c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p
)
_alloc = declare(_base, "ggml_backend_alloc_ctx_tensors_from_buft", c_void_p, c_void_p, c_void_p)
_set = declare(_base, "ggml_backend_tensor_set", None, c_void_p, c_void_p, c_size_t, c_size_t)
_get = declare(_base, "ggml_backend_tensor_get", None, c_void_p, c_void_p, c_size_t, c_size_t)
_compute = declare(_base, "ggml_backend_graph_compute", c_int, c_void_p, c_void_p)
_device = declare(_base, "ggml_backend_reg_dev_get", c_void_p, c_void_p, c_size_t)
_address = declare(_base, "ggml_backend_reg_get_proc_address", c_void_p, c_void_p, c_char_p)
_supports = declare(_base, "ggml_backend_dev_supports_op", c_bool, c_void_p, c_void_p)
_default = declare(_base, "ggml_backend_get_default_buffer_type", c_void_p, c_void_p)
_backend_init = declare(_cpu, "ggml_backend_cpu_init", c_void_p)
_reg = declare(_cpu, "ggml_backend_cpu_reg", c_void_p)
_threads = declare(_cpu, "ggml_backend_cpu_set_n_threads", None, c_void_p, c_int)

_silent = Log(lambda *_: None)
declare(_base, "ggml_log_set", None, Log, c_void_p)(_silent, None)


def _context() -> int:
    return _init(_InitParams(1 << 20, None, True))


def _extra_buffer_types() -> list[int]:
    reg = _reg()
    address = _address(reg, b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return []
    function = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)
    listed, found = function(_device(reg, 0)), []
    while listed and listed[len(found)]:
        found.append(listed[len(found)])
    return found


class Product:
    """One weight of one type and the graph that multiplies the common input with it."""

    def __init__(self, backend: int, kind: int, outputs: int, values: np.ndarray, quantized: bytes) -> None:
        rows, inputs = values.shape
        plain = _default(backend)
        self._backend = backend
        for buffer in (*_extra_buffer_types(), plain):
            holder = _context()
            weight = _tensor(holder, kind, inputs, outputs)
            _alloc(holder, buffer)
            work = _context()
            x = _tensor(work, FP32, inputs, rows)
            self._y = _mul_mat(work, weight, x)
            if buffer == plain or _supports(_device(_reg(), 0), self._y):
                break
        _alloc(work, plain)
        self._graph = _graph(work)
        _expand(self._graph, self._y)
        _set(weight, quantized, 0, len(quantized))
        _set(x, values.ctypes.data, 0, values.nbytes)
        self.repacked = buffer != plain
        self.shape = rows, outputs

    def __call__(self) -> None:
        _compute(self._backend, self._graph)

    def result(self) -> np.ndarray:
        out = np.empty(self.shape, np.float32)
        _get(self._y, out.ctypes.data, 0, out.nbytes)
        return out


def contenders(x: Tensor, outputs: int, copies: Any) -> dict[str, Any]:
    backend = _backend_init()
    _threads(backend, torch.get_num_threads())
    values = np.ascontiguousarray(x.float().numpy())
    inputs = values.shape[1]
    weight = np.random.default_rng(0).standard_normal((outputs, inputs), dtype=np.float32)
    found: dict[str, Any] = {}
    for name, kind in TYPES.items():
        if inputs % 256 and name != "Q4_0":
            continue  # its blocks are of 256
        size = _row_size(kind, inputs) * outputs
        buffer = ctypes.create_string_buffer(size)
        _quantize(kind, weight.ctypes.data, buffer, 0, outputs, inputs, None)
        made = copies(lambda kind=kind, data=buffer.raw: Product(backend, kind, outputs, values, data), size)
        made[0]()
        error = np.abs(made[0].result() - values @ weight.T).mean() / np.abs(values @ weight.T).mean()
        assert error < 1, f"{name}: relative error {error}"
        label = f"llama.cpp {name}" + (", repacked" if made[0].repacked else "")
        found[label] = (lambda turn, made=made: made[turn % len(made)](), size)
    return found
