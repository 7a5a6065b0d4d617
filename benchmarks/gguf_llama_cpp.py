"""Exported GGUF files in llama.cpp against Bellbox: logits, perplexity, tokens of the text.

    pip install --no-deps --target /tmp/llama llama-cpp-python==0.3.36     # compiled: some twenty minutes on one core
    PYTHONPATH=/tmp/llama python benchmarks/gguf_llama_cpp.py runs/llama-2 runs/gpt-4
    PYTHONPATH=/tmp/llama python benchmarks/gguf_llama_cpp.py --random     # every type, odd shapes, rotary positions

Four functions of each model on the same windows of validation text:

- *trained*: low-bit weights and activations, as Bellbox runs it;
- *weights only*: the low-bit weights in a plain float model, what the file shall be;
- *floats in llama.cpp*: those weights written as F32, which tells whether the graph is the same;
- *file in llama.cpp*: the exported file. Between the two last stand fp16 scales, and llama.cpp's own rounding of
  activations to 8 bits inside of products.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
from torch import Tensor, nn

from bellbox.formats.auto import open_data_for, open_model
from bellbox.interop.gguf import export_gguf
from bellbox.interop.gguf.weights import Coded, weight_of
from bellbox.models import build
from bellbox.nn.coded import CodedLayer
from bellbox.nn.quantized import QuantizedLayer
from bellbox.nn.quantized_table import QuantizedTable

_F32 = 0
_Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_silent = _Log(lambda *_: None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "models", nargs="*", help="run or packed folders with block: 1, or Hugging Face folders"
    )
    parser.add_argument("--random", action="store_true", help="models of random weights and odd shapes")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--verbose", action="store_true", help="what llama.cpp has to say")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.verbose:
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
    print("differences are relative to the largest logit of weights only\n")
    if args.random:
        print("| model | types | F32 there | file there | KL |\n|---|---|---|---|---|")
        for name, model in random_models().items():
            print("| " + " | ".join((name, *compare_random(model))) + " |", flush=True)
        return
    print(f"{args.windows} windows of {args.context} tokens\n")
    head = (
        "model",
        "types",
        "trained",
        "weights only",
        "F32 there",
        "file there",
        "dF32",
        "dfile",
        "KL",
        "same top",
    )
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for name in args.models:
        print("| " + " | ".join(compare(name, args.windows, args.context)) + " |", flush=True)


def compare(name: str, windows: int, context: int) -> list[str]:
    opened = open_model(name)
    dataset, _ = open_data_for(opened, None) if opened.run else (None, None)
    if dataset is None:
        text = "Once upon a time, there was a little girl named Lily. She liked to play in the park. " * 400
        ids = torch.tensor(opened.load_tokenizer().encode(text))
    else:
        ids = torch.from_numpy(dataset.split("valid").read(0, windows * context))
    ids = ids[: windows * context].reshape(-1, context)
    plain = weights_only(opened.model)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        trained = opened.model(ids).numpy()
        ours = plain(ids).numpy()
        low = export_gguf(opened.model, Path(folder) / "low.gguf", tokenizer=opened.tokenizer)
        high = export_gguf(plain, Path(folder) / "high.gguf", tokenizer=opened.tokenizer)
        floats, file = logits(high.path, ids, ours.shape[-1]), logits(low.path, ids, ours.shape[-1])
        if low.vocabulary:
            check_tokenizer(low.path, opened.load_tokenizer(), dataset)
    top = np.abs(ours).max()
    kinds = Counter(t.type for t in low.tensors if t.of_integers)
    return [
        Path(name).name,
        ", ".join(f"{count} {kind}" for kind, count in kinds.items()),
        *(f"{perplexity(each, ids):.3f}" for each in (trained, ours, floats, file)),
        f"{np.abs(floats - ours).max() / top:.1e}",
        f"{np.abs(file - ours).max() / top:.1e}",
        f"{divergence(ours, file):.1e}",
        f"{(ours.argmax(-1) == file.argmax(-1)).mean():.4f}",
    ]


def random_models() -> dict[str, nn.Module]:
    """Each type of blocks, and shapes that are not the usual."""
    import bellbox as bb
    from bellbox.models import GPTConfig, LlamaConfig

    llama = LlamaConfig(320, 256, 512, 2, 4, num_key_value_heads=2, initializer_range=0.1)
    gpt = GPTConfig(320, 256, 512, 2, 4, initializer_range=0.1)
    found: dict[str, nn.Module] = {}

    def add(name: str, config: Any, method: str = "bbq", bits: int | None = 2, **more: Any) -> None:
        recipe = bb.Recipe.of(method, bits, block=1, weight_only="float", **more)
        found[name] = bb.prepare(build(config, seed=0), recipe).eval()

    for config, kind in ((llama, "llama"), (gpt, "gpt")):
        for bits in (1, 2, 3, 4):
            add(f"{kind} bbq {bits}", config, bits=bits)
        add(f"{kind} ternary", config, bits=None, levels=3)
        for bits in (3, 4, 5, 6, 8):  # grids of half-integers
            add(f"{kind} rtn {bits}", config, "rtn", bits)
    add("llama, rows of 96", LlamaConfig(320, 96, 160, 2, 4, initializer_range=0.1), "rtn", 4)
    add("llama, head_dim 48", LlamaConfig(300, 256, 256, 2, 4, 1, 48, initializer_range=0.1))
    add("llama, fused qkv", LlamaConfig(320, 256, 256, 1, 4, fused_qkv=True, initializer_range=0.1))
    add(
        "llama, tied, embeddings of 8 bits",
        LlamaConfig(320, 256, 256, 1, 4, tie_word_embeddings=True, initializer_range=0.1),
        embedding_bits=8,
    )
    add("llama, embeddings of 4 bits", llama, embedding_bits=4)
    add(
        "gpt without biases, tied",
        GPTConfig(320, 256, 256, 1, 4, bias=False, tie_word_embeddings=True, initializer_range=0.1),
    )
    add("gpt, fused qkv", GPTConfig(320, 256, 256, 1, 4, fused_qkv=True, initializer_range=0.1))
    return {**found, **scaled_rotary_positions()}


def scaled_rotary_positions() -> dict[str, nn.Module]:
    """Models of transformers, in full precision, since Bellbox's own have plain positions."""
    import transformers

    kinds = {
        "default": {},
        "linear": {"factor": 4.0},
        "llama3": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64
        },
        "longrope": {
            "short_factor": [1.0 + 0.1 * i for i in range(32)], "long_factor": [2.0 + 0.5 * i for i in range(32)],
            "factor": 4.0, "original_max_position_embeddings": 64,
        },
    }  # fmt: skip
    found: dict[str, nn.Module] = {}
    for kind, more in kinds.items():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=320, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=256, rope_parameters={"rope_type": kind, "rope_theta": 5000.0, **more},
            initializer_range=0.1,
        )  # fmt: skip
        found[f"transformers' llama, rotary {kind}"] = transformers.LlamaForCausalLM(config).eval()
    return found


def compare_random(model: nn.Module) -> list[str]:
    ids = torch.randint(0, 300, (2, 128), generator=torch.Generator().manual_seed(0))
    own = type(model).__module__.startswith("bellbox")
    plain = weights_only(model) if own else model
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        found = plain(ids)
        ours = getattr(found, "logits", found).numpy()
        low, high = (export_gguf(m, Path(folder) / n) for m, n in ((model, "low.gguf"), (plain, "high.gguf")))
        floats, file = (logits(made.path, ids, ours.shape[-1]) for made in (high, low))
    kinds = Counter(t.type for t in low.tensors if t.of_integers)
    top = np.abs(ours).max()
    return [
        ", ".join(f"{count} {kind}" for kind, count in kinds.items()),
        f"{np.abs(floats - ours).max() / top:.1e}",
        f"{np.abs(file - ours).max() / top:.1e}",
        f"{divergence(ours, file):.1e}",
    ]


def weights_only(model: nn.Module) -> nn.Module:
    """A float model with the low-bit weights."""
    plain = build(model.config, seed=0).eval()  # type: ignore[attr-defined]
    state = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedLayer | CodedLayer | QuantizedTable):
            continue
        found = weight_of(name, module)
        assert isinstance(found, Coded)
        levels = torch.from_numpy(found.codes).float() - found.grid.offset
        scales = torch.from_numpy(found.scales).repeat_interleave(
            levels.shape[1] // found.scales.shape[1], dim=1
        )
        state[f"{name}.weight"] = levels * scales
        if getattr(module, "bias", None) is not None:
            state[f"{name}.bias"] = module.bias.detach()  # type: ignore[union-attr]
    wanted = plain.state_dict()
    plain.load_state_dict({key: state[key] for key in wanted})
    return plain


def logits(path: Path, ids: Tensor, vocabulary: int) -> np.ndarray:
    """fp32 `[windows, context, vocabulary]`, keys and values in fp32, no flash attention."""
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp does not load {path}")
    settings = llama_cpp.llama_context_default_params()
    context = ids.shape[1]
    settings.n_ctx = settings.n_batch = settings.n_ubatch = context
    settings.n_threads = settings.n_threads_batch = 1
    settings.type_k = settings.type_v = _F32
    settings.flash_attn_type = 0
    runner = llama_cpp.llama_init_from_model(model, settings)
    batch = llama_cpp.llama_batch_init(context, 0, 1)
    found = []
    for row in ids.tolist():
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(runner), True)
        batch.n_tokens = context
        for place, token in enumerate(row):
            batch.token[place], batch.pos[place] = token, place
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            batch.logits[place] = True
        if status := llama_cpp.llama_decode(runner, batch):
            raise SystemExit(f"llama_decode returned {status}")
        numbers = llama_cpp.llama_get_logits(runner)
        found.append(np.ctypeslib.as_array(numbers, (context, vocabulary)).copy())
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(runner)
    llama_cpp.llama_model_free(model)
    return np.stack(found)


def check_tokenizer(path: Path, own: Any, dataset: Any) -> None:
    """llama.cpp's token ids of texts against ours."""
    settings = llama_cpp.llama_model_default_params()
    settings.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    texts = [
        "Once upon a time, there was a fox.",
        "  two  spaces\n\nand it's 1984!",
        "naïve 東京 😀\t x",
        "aaaa  bbb ",
    ]
    if dataset is not None:
        texts.append(own.decode(dataset.split("valid").read(0, 20_000)))
    different = 0
    for text in texts:
        raw = text.encode()
        room = (llama_cpp.llama_token * (len(raw) + 8))()
        count = llama_cpp.llama_tokenize(vocabulary, raw, len(raw), room, len(room), False, False)
        different += list(room[:count]) != own.encode(text)
    if different:
        print(f"TOKENS DIFFER in {different} of {len(texts)} texts of {path}")
    llama_cpp.llama_model_free(model)


def perplexity(found: np.ndarray, ids: Tensor) -> float:
    scores = torch.from_numpy(found[:, :-1]).double().log_softmax(-1)
    return math.exp(-scores.gather(-1, ids[:, 1:, None]).mean())


def divergence(ours: np.ndarray, other: np.ndarray) -> float:
    """Mean KL(ours, other) of the next token, nats."""
    p, q = (torch.from_numpy(each).double().log_softmax(-1) for each in (ours, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


if __name__ == "__main__":
    main()
