"""A LLaMA of random weights in llama.cpp: written as GGUF, quantized by llama.cpp, run through its C interface."""

from __future__ import annotations

import ctypes
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import torch

from bellbox.models import LlamaConfig

_Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_silent = _Log(lambda *_: None)
llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))


def write(path: Path, config: LlamaConfig) -> None:
    """A GGUF file in fp16 without a vocabulary."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.key_value_heads)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    random = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int) -> None:
        values = random.standard_normal((rows, columns), dtype=np.float32) * 0.02
        writer.add_tensor(name, values.astype(np.float16))

    hidden, inner = config.hidden_size, config.intermediate_size
    keys = config.key_value_heads * config.head_size
    matrix("token_embd.weight", config.vocab_size, hidden)
    matrix("output.weight", config.vocab_size, hidden)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for layer in range(config.num_hidden_layers):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(hidden, np.float32))
        for name, rows, columns in (
            ("attn_q", hidden, hidden),
            ("attn_k", keys, hidden),
            ("attn_v", keys, hidden),
            ("attn_output", hidden, hidden),
            ("ffn_gate", inner, hidden),
            ("ffn_up", inner, hidden),
            ("ffn_down", hidden, inner),
        ):
            matrix(f"blk.{layer}.{name}.weight", rows, columns)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, target: Path, kind: str) -> None:
    """As `llama-quantize` does it: the head of Q2_K in Q6_K, and so on; rows that do not fit get another type."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    parameters.nthread = 2
    status = llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(parameters)
    )
    if status:
        raise RuntimeError(f"llama_model_quantize returned {status}")


class Decoding:
    """The model with a prompt in its cache, so that steps can be repeated from the same place."""

    def __init__(self, path: Path, vocabulary: int, prompt: int) -> None:
        settings = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        context = llama_cpp.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = prompt + 8, prompt, prompt
        context.n_threads = context.n_threads_batch = torch.get_num_threads()
        self._context = llama_cpp.llama_init_from_model(self._model, context)
        if not self._context:
            raise RuntimeError("llama.cpp made no context")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._length = prompt
        self._tokens = (llama_cpp.llama_token * prompt)(
            *np.random.default_rng(0).integers(0, vocabulary, prompt)
        )
        self.prefill(0)

    def prefill(self, _turn: int) -> None:
        llama_cpp.llama_memory_clear(self._memory, True)
        self._run(self._tokens, self._length)

    def decode(self, _turn: int) -> None:
        llama_cpp.llama_memory_seq_rm(self._memory, 0, self._length, -1)
        self._run(self._tokens, 1)

    def _run(self, tokens: ctypes.Array, count: int) -> None:
        status = llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(tokens, count))
        llama_cpp.llama_synchronize(self._context)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
