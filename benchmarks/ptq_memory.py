"""The memory model of `bellbox ptq` (ptq/memory.py) against the peak of real processes, and what it says of a 7B model.

python benchmarks/ptq_memory.py
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from bellbox.data.tokenizer import Tokenizer
from bellbox.models import LlamaConfig, build, save_hf
from bellbox.ptq.memory import working_memory

SAMPLES, CONTEXT, BATCH = 32, 256, 4
# A process that does the same on a model of next to no size is what Python, torch and the tokenizer take.
SIZES = ((16, 32), (256, 704), (512, 1408), (1024, 2816), (1536, 4224))
JOB = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from bellbox.utils.memory import peak_memory
from bellbox.ptq import Job, Settings, binarize_folder
binarize_folder(Job(*map(Path, sys.argv[1:4]), Settings(), *map(int, sys.argv[4:])), show=False)
print(peak_memory())
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        root, bare = Path(name), 0
        text = "It was a dark and stormy night; the rain fell in torrents. " * 4000
        (root / "text.txt").write_text(text)
        tokenizer = Tokenizer.train([text[:5000]], 300)
        for hidden, inner in SIZES:
            config = LlamaConfig(
                tokenizer.vocab_size,
                hidden,
                inner,
                1,
                4,
                max_position_embeddings=CONTEXT,
                tie_word_embeddings=True,
            )
            save_hf(build(config, seed=0), root / "model")
            tokenizer.save(root / "model" / "tokenizer.json")
            folders = [str(root / "model"), str(root / "out"), str(root / "text.txt")]
            numbers = [str(n) for n in (SAMPLES, CONTEXT, BATCH)]
            done = subprocess.run(
                [sys.executable, "-c", JOB, *folders, *numbers], capture_output=True, text=True, check=True
            )
            peak = int(done.stdout.split()[-1])
            bare = bare or peak
            predicted = working_memory(config, SAMPLES, CONTEXT, BATCH)
            print(
                f"hidden {hidden}, inner {inner}: predicted {predicted / 2**20:,.0f} MiB, measured "
                f"{(peak - bare) / 2**20:,.0f} MiB above the {bare / 2**20:,.0f} of a bare process",
                flush=True,
            )
    large = LlamaConfig(32000, 4096, 11008, 32, 32, max_position_embeddings=4096)
    for samples in (128, 32):
        print(
            f"LLaMA-2-7B, {samples} x 2048 tokens: predicted {working_memory(large, samples, 2048, 1) / 2**30:.1f} GiB"
        )


if __name__ == "__main__":
    main()
