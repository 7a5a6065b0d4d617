"""TRL's SFTTrainer around a prepared model: checkpoint and resume, groups, hyperball."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from zoo_models import DECODER
from zoo_packages import package

import bellbox as bb

pytestmark = pytest.mark.filterwarnings("ignore")


def llama() -> Any:
    import transformers

    torch.manual_seed(0)
    model = bb.prepare(transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER)), bb.Recipe.bbq(2))
    bb.calibrate(model, [torch.arange(2, 34).reshape(2, 16)])
    return model


def tokenizer() -> Any:
    """A word a token, made on the spot."""
    import tokenizers
    import transformers

    words = {"<pad>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, 96)}}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<pad>"
    )


def sentences() -> list[dict[str, str]]:
    draws = torch.Generator().manual_seed(0)
    lengths = [12, 5, 9, 14, 3, 11, 8, 13] * 3
    return [
        {"text": " ".join(f"w{i}" for i in torch.randint(2, 96, (n,), generator=draws).tolist())}
        for n in lengths
    ]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft_goes_on_from_a_checkpoint_to_the_same_bits(checkpointing: bool, tmp_path: Path) -> None:
    trl, datasets = package("trl"), package("datasets")
    if trl is None or datasets is None:
        pytest.skip("trl is not installed")

    class SFT(bb.interop.ExactCheckpoints, trl.SFTTrainer):
        def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
            if self.optimizer is None:
                groups = bb.optim.parameter_groups(self.model, lr=self.args.learning_rate, weight_decay=0.1)
                self.optimizer = bb.optim.hyperball(torch.optim.AdamW(groups), self.model, every=2)
            return self.optimizer

    def run(folder: Path, **more: Any) -> Any:
        model = llama()
        args = trl.SFTConfig(
            output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            save_steps=2, learning_rate=1e-3, use_cpu=True, bf16=False, report_to=[], max_length=16, seed=0,
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
        rows = datasets.Dataset.from_list(sentences())
        trainer = SFT(model=model, args=args, train_dataset=rows, processing_class=tokenizer())
        trainer.train(**more)
        return model

    whole = run(tmp_path)
    resumed = run(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    ours, theirs = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    before = llama().state_dict()
    assert not torch.equal(
        ours["model.layers.0.mlp.up_proj.rotated_weight"], before["model.layers.0.mlp.up_proj.rotated_weight"]
    )
    ids = torch.arange(2, 18)[None]
    with torch.no_grad():
        assert torch.equal(bb.convert(resumed)(ids).logits, whole.eval()(ids).logits)
