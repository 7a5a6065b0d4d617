"""vLLM beside `bellbox generate`: greedy tokens of packed LLaMAs of random weights, 1 to 4 bits, in real vLLM.

python benchmarks/vllm_generate.py                    # in an environment with vLLM and Bellbox (docs/interop.md)
python benchmarks/vllm_generate.py --texts 32 --tokens 60 --compile
python benchmarks/vllm_generate.py --model OUT        # a folder of `bellbox export hf`

Of a text that differs the first other token is looked at: how far apart Bellbox's logits of the two tokens are. Beside
tokens the time of all texts together is told, without loading.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import torch

import bellbox as bb
from bellbox.inference.batching import generate_batch
from bellbox.inference.generation import generate
from bellbox.models import LlamaConfig, build


def packed_folder(folder: Path, bits: int) -> Path:
    """A LLaMA of random weights whose scales have seen data, as vLLM reads it."""
    from bellbox.interop.transformers.export import export_packed

    torch.manual_seed(bits)
    model = build(LlamaConfig(320, 128, 192, 2, 4, 2, max_position_embeddings=256), seed=bits)
    bb.prepare(model, bb.Recipe.bbq(bits))
    with torch.no_grad():
        model(torch.randint(0, 320, (4, 64)))
    export_packed(bb.convert(model), folder)
    return folder


def bellbox_tokens(model: Any, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """Greedy tokens of each prompt alone."""
    found = []
    for prompt in prompts:
        made = generate(model, torch.tensor([prompt]), tokens, temperature=0)
        found.append([int(each) for each in made])
    return found


def vllm_tokens(
    folder: Path, prompts: list[list[int]], tokens: int, compiled: bool
) -> tuple[list[list[int]], float]:
    """Greedy tokens of all prompts together in vLLM, and the seconds that it took."""
    from vllm import LLM, SamplingParams

    longest = max(map(len, prompts)) + tokens
    engine = LLM(
        str(folder),
        dtype="float32",
        enforce_eager=not compiled,
        max_model_len=longest,
        max_num_seqs=len(prompts),
        skip_tokenizer_init=True,
    )
    asked: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
    how = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    engine.generate(asked, how, use_tqdm=False)  # the first one makes what later ones have
    begun = time.perf_counter()
    outputs = engine.generate(asked, how, use_tqdm=False)
    return [list(each.outputs[0].token_ids) for each in outputs], time.perf_counter() - begun


@torch.no_grad()
def gap(model: Any, prompt: list[int], ours: list[int], theirs: list[int]) -> tuple[int, float]:
    """The first place where two texts part, and by how much the logits of the two tokens differ there, beside the
    largest one."""
    at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    logits = model(torch.tensor([prompt + ours[:at]]))[0, -1]
    return at, float((logits[ours[at]] - logits[theirs[at]]) / logits.abs().max())


def main() -> None:
    """Print a line for each model; exit code 1 where no text is the same."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path)
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--bits", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--compile", action="store_true")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        made = {f"{bits} bits": packed_folder(Path(scratch) / str(bits), bits) for bits in flags.bits}
        failed = False
        for name, folder in ({str(flags.model): flags.model} if flags.model else made).items():
            model: Any = bb.load(folder)
            torch.manual_seed(0)
            sizes = torch.randint(3, 30, (flags.texts,)).tolist()
            prompts = [torch.randint(0, model.config.vocab_size, (size,)).tolist() for size in sizes]
            ours = bellbox_tokens(model, prompts, flags.tokens)
            begun = time.perf_counter()
            generate_batch(model, prompts, flags.tokens, temperature=0)
            seconds = time.perf_counter() - begun
            theirs, spent = vllm_tokens(folder, prompts, flags.tokens, flags.compile)
            same = sum(a == b for a, b in zip(ours, theirs, strict=True))
            print(
                f"{name}: {same} of {len(ours)} texts have the same {flags.tokens} tokens; "
                f"all texts together: vLLM {spent:.2f} s, Bellbox's batch {seconds:.2f} s",
                flush=True,
            )
            failed |= same == 0
            for prompt, a, b in zip(prompts, ours, theirs, strict=True):
                if a != b:
                    at, by = gap(model, prompt, a, b)
                    print(f"    parts at token {at}; there our two logits differ by {by:.1e} of the largest")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
