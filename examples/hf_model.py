"""A model of transformers at 2 bits in a loop of one's own; packed, it generates by transformers' `generate`.

    python examples/hf_model.py --out packed                         # a small LLaMA with random weights
    python examples/hf_model.py --out packed --model path/to/folder  # any folder of a causal language model

The task is a toy, so that it runs anywhere: a token is followed by the one three places on.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import bellbox as bb

STRIDE, ENTRIES = 3, 64


def untrained() -> Any:
    """A LLaMA of two blocks."""
    config = LlamaConfig(
        vocab_size=ENTRIES,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config)


def texts(count: int, length: int) -> torch.Tensor:
    """Token ids `[count, length]`, each row counting by `STRIDE` from a place of its own."""
    begin = torch.randint(ENTRIES, (count, 1))
    return (begin + STRIDE * torch.arange(length)) % ENTRIES


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it; the losses, and what the packed model says after 1, 4, 7."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where the packed model goes")
    parser.add_argument(
        "--model", type=Path, help="folder of a model; a small one is made where none is named"
    )
    parser.add_argument("--steps", type=int, default=150)
    choices = parser.parse_args(arguments)

    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_pretrained(choices.model) if choices.model else untrained()
    # q, k, v read one tensor: an example lets them share one quantizer of the input.
    model = bb.prepare(copy.deepcopy(plain), bb.Recipe.bbq(bits=2), example={"input_ids": texts(1, 8)})
    bb.calibrate(model, [{"input_ids": texts(8, 16)}])
    optimizer = torch.optim.AdamW(bb.optim.parameter_groups(model.train(), lr=5e-3, weight_decay=0.01))
    losses = []
    for _ in range(choices.steps):
        ids = texts(16, 16)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    bb.save(bb.convert(model.eval()), choices.out)
    packed = bb.load(choices.out, into=plain)
    prompt = torch.tensor([[1, 4, 7]])
    said = packed.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=5, pad_token_id=0
    )
    found = {"first": losses[0], "last": losses[-1], "said": said[0].tolist()}
    print(f"loss {losses[0]:.2f} to {losses[-1]:.2f}; after 1, 4, 7 it says {found['said'][3:]}")
    return found


if __name__ == "__main__":
    main()
