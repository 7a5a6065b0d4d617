"""Text sampled from a language model itself, a sequence a line, for checkpoints whose own training text is not at hand.

python benchmarks/sampled_text.py stories260K_hf stories-fit.txt --seed 0
python benchmarks/sampled_text.py stories260K_hf stories-valid.txt --seed 1

The same seed gives the same text. A model's perplexity on its own samples is near the exponential of its entropy.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from bellbox.data.tokenizer import Tokenizer
from bellbox.inference.generation import generate
from bellbox.models import load_hf

END_OF_LINE = " "
"""For breaks of lines inside a sequence."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sequences", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--first", type=int, default=1, help="the token that starts a sequence; 1 is LLaMA's <s>"
    )
    options = parser.parse_args()
    model, tokenizer = load_hf(options.model).eval(), Tokenizer.load(options.model)
    prompt = torch.full((options.sequences, 1), options.first)
    steps = list(generate(model, prompt, options.tokens, seed=options.seed))
    texts = [
        tokenizer.decode(ids).replace("\n", END_OF_LINE).strip() for ids in torch.stack(steps, 1).tolist()
    ]
    options.out.write_text("".join(text + "\n" for text in texts), encoding="utf-8")


if __name__ == "__main__":
    main()
