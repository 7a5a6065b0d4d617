"""Generate text with what `bellbox export onnx MODEL OUT` wrote: onnxruntime and tokenizers, nothing of Bellbox.

python examples/onnx_generate.py OUT "Once upon a time" "The dog"      # prompts of any lengths, decoded together
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

NEW_TOKENS = 40


def generate(session, prompts: list[list[int]], new_tokens: int, end: int | None) -> list[list[int]]:
    """The likeliest tokens after each prompt, up to `end`."""
    longest, batch = max(map(len, prompts)), len(prompts)
    # Padding stands on the left, so that the newest token of every row is the last one.
    ids = np.array([[0] * (longest - len(p)) + p for p in prompts], np.int64)
    mask = np.array([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], np.int64)
    positions = (mask.cumsum(1) - 1).clip(0)
    caches = [each for each in session.get_inputs() if each.name.startswith("past_key_values")]
    cache = {c.name: np.zeros((batch, c.shape[1], 0, c.shape[3]), np.float32) for c in caches}
    rows: list[list[int]] = [[] for _ in prompts]
    for _ in range(new_tokens):
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **cache}
        logits, *present = session.run(None, feeds)
        cache = dict(zip(cache, present, strict=True))
        ids = logits[:, -1:].argmax(-1)
        for row, token in zip(rows, ids[:, 0].tolist(), strict=True):
            row.append(token)
        mask, positions = np.pad(mask, ((0, 0), (0, 1)), constant_values=1), positions[:, -1:] + 1
        if all(end in row for row in rows):
            break
    return [row[: row.index(end)] if end in row else row for row in rows]


if __name__ == "__main__":
    folder, *texts = sys.argv[1:]
    session = onnxruntime.InferenceSession(Path(folder) / "model.onnx", providers=["CPUExecutionProvider"])
    end = session.get_modelmeta().custom_metadata_map.get("bellbox.end_of_text")
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    prompts = [tokenizer.encode(text).ids for text in texts]
    for text, new in zip(texts, generate(session, prompts, NEW_TOKENS, end and int(end)), strict=True):
        print(tokenizer.decode(tokenizer.encode(text).ids + new))
