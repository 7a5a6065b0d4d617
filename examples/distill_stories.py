"""A trained model goes on at 2 bits with itself as the teacher, in a loop of one's own; then it is packed.

    python examples/distill_stories.py path/to/stories260K_hf --out stories-2bit
    python examples/distill_stories.py path/to/stories260K_hf --out stories-2bit --steps 20 --stories 16   # a look

The folder is any small language model of transformers with a tokenizer that Bellbox reads. No text is needed: the
teacher writes stories, and the student learns what it would have said next. docs/tutorials/distill.md goes through it.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import bellbox as bb
from bellbox.data.tokenizer import Tokenizer


@torch.no_grad()
def written_by(teacher: Any, count: int, length: int, seed: int) -> Tensor:
    """Token ids `[count, length]` of texts that the teacher writes from the beginning-of-text token on."""
    torch.manual_seed(seed)
    first = torch.full((count, 1), teacher.config.bos_token_id)
    return teacher.generate(
        first, attention_mask=torch.ones_like(first), do_sample=True, top_k=0, pad_token_id=0,
        min_length=length, max_length=length,
    )  # fmt: skip


@torch.no_grad()
def perplexity(model: nn.Module, texts: Tensor) -> float:
    """exp of the mean cross entropy of each token after the first, in evaluation."""
    logits = model.eval()(texts[:, :-1]).logits
    return math.exp(F.cross_entropy(logits.flatten(0, 1), texts[:, 1:].flatten()))


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of logits `[..., vocabulary]`: its mean over positions, in nats."""
    given, target = (F.log_softmax(each, dim=-1).flatten(0, -2) for each in (student, teacher))
    return F.kl_div(given, target, reduction="batchmean", log_target=True)


def continue_at_low_bits(
    student: nn.Module, teacher: nn.Module, texts: Tensor, steps: int, batch: int, lr: float, ball: float
) -> None:
    """The training loop, as its owner would write it."""
    # [1] groups: no decay on scales, norms, embeddings; each scale at its own rate
    groups = bb.optim.parameter_groups(student, lr=lr, weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    # [2] trained weights are no bells: keep their norm, and leave their order and values alone (every=0)
    if ball:
        bb.optim.hyperball(optimizer, student, lr=ball, every=0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        [group["lr"] for group in optimizer.param_groups],
        steps,
        pct_start=0.1,
        cycle_momentum=False,
    )
    draws = torch.Generator().manual_seed(0)
    for step in range(steps):
        chosen = texts[torch.randint(len(texts), (batch,), generator=draws)]
        with torch.no_grad():
            target = teacher(chosen).logits
        loss = divergence(student.train()(chosen).logits, target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % max(1, steps // 10) == 0 or step == steps - 1:
            print(f"step {step:4d}  divergence {loss.item():.3f}", flush=True)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it; the numbers that it prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a model of transformers")
    parser.add_argument("--out", type=Path, required=True, help="where the packed model goes")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument(
        "--stories",
        type=int,
        default=512,
        help="texts to learn from; a quarter as many, 64 at most, to measure on",
    )
    parser.add_argument("--length", type=int, default=192, help="tokens of each")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--ball", type=float, default=0.01, help="rate of the hyperball; 0 for plain AdamW")
    choices = parser.parse_args(arguments)

    teacher = AutoModelForCausalLM.from_pretrained(choices.model).eval().requires_grad_(False)
    teacher.generation_config.max_length = None
    tokenizer = Tokenizer.load(choices.model)
    begin = time.perf_counter()
    texts = written_by(teacher, choices.stories, choices.length, seed=0)
    held_out = written_by(teacher, max(4, min(64, choices.stories // 4)), choices.length, seed=1)
    print(f"{texts.numel():,} tokens written by the teacher in {time.perf_counter() - begin:.0f} s")

    # Two lines make the student: a copy, prepared. Scales of its inputs are set from a batch of the owner's choice.
    student = bb.prepare(copy.deepcopy(teacher).requires_grad_(True), bb.Recipe.bbq(bits=choices.bits))
    bb.calibrate(student, [texts[: choices.batch]])
    found = {"teacher": perplexity(teacher, held_out), "before": perplexity(student, held_out)}

    begin = time.perf_counter()
    continue_at_low_bits(student, teacher, texts, choices.steps, choices.batch, choices.lr, choices.ball)
    found["seconds"] = time.perf_counter() - begin
    found["after"] = perplexity(student, held_out)

    # Packed, it is the same function to the last bit, and its owner's class: `generate` works as ever.
    packed = bb.convert(student)
    found["packed"] = perplexity(packed, held_out)
    bb.save(packed, choices.out)
    again = bb.load(choices.out, into=copy.deepcopy(teacher))
    first = torch.tensor([[teacher.config.bos_token_id]])
    story = again.generate(
        first, attention_mask=torch.ones_like(first), do_sample=False, max_new_tokens=60, pad_token_id=0
    )
    found["story"] = tokenizer.decode(story[0].tolist())
    found["bytes"] = {
        "before": (choices.model / "model.safetensors").stat().st_size,
        "after": sum(file.stat().st_size for file in choices.out.glob("*.safetensors")),
    }
    print(json.dumps(found, indent=2))
    return found


if __name__ == "__main__":
    main()
