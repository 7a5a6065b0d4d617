"""A LLaMA of random weights in llama.cpp: written as GGUF, quantized by llama.cpp, run through its C interface.

python benchmarks/peers/llama_model.py 95M-Q4_0.gguf --prompt 256 --new-tokens 100      # its times, as JSON
"""

from __future__ import annotations

import argparse
import ctypes
import json
import resource
import time
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import torch
from llama_library import Llama

from bellbox.models import LlamaConfig


@cache
def llama() -> Llama:
    """Loaded where it is first asked for."""
    return Llama()


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
    """`kind` as `llama-quantize` names it, such as Q2_K."""
    llama().quantize(source, target, gguf.LlamaFileType[f"MOSTLY_{kind}"])


class Decoding:
    """The model with a prompt in its cache, so that steps can be repeated from the same place."""

    def __init__(self, path: Path, vocabulary: int, prompt: int, more: int = 8) -> None:
        library = llama()
        self._model = library.load(str(path).encode(), library.model_params())
        settings = library.context_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = prompt + more, prompt, prompt
        self._context = library.context(self._model, settings)
        if not self._context:
            raise RuntimeError("llama.cpp made no context")
        library.set_threads(self._context, torch.get_num_threads(), torch.get_num_threads())
        self._memory = library.memory(self._context)
        self._vocabulary = vocabulary
        self._length = prompt
        self._tokens = (ctypes.c_int32 * prompt)(*np.random.default_rng(0).integers(0, vocabulary, prompt))
        self.prefill(0)

    def prefill(self, _turn: int) -> None:
        llama().clear(self._memory, True)
        self._run(self._tokens, self._length)

    def decode(self, _turn: int) -> None:
        llama().remove(self._memory, 0, self._length, -1)
        self._run(self._tokens, 1)

    def greedy(self, count: int) -> None:
        """The prompt's continuation by `count` tokens, each the likeliest."""
        for _ in range(count):
            logits = np.ctypeslib.as_array(llama().logits(self._context, -1), (self._vocabulary,))
            self._run((ctypes.c_int32 * 1)(int(logits.argmax())), 1)

    def _run(self, tokens: ctypes.Array, count: int) -> None:
        status = llama().decode(self._context, llama().batch(tokens, count))
        llama().synchronize(self._context)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--new-tokens", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    llama()
    begun = time.perf_counter()
    model = Decoding(asked.file, asked.vocabulary, asked.prompt, asked.new_tokens + 8)
    first = time.perf_counter()
    model.prefill(0)
    read = time.perf_counter()
    model.greedy(asked.new_tokens)
    ended = time.perf_counter()
    print(
        json.dumps(
            {
                "first_token_seconds": first - begun,
                "prefill_tokens_per_second": asked.prompt / (read - first),
                "decode_tokens_per_second": asked.new_tokens / (ended - read),
                "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
            }
        )
    )


if __name__ == "__main__":
    main()
