"""A model of transformers trained at 2 bits under accelerate: DDP, or FSDP2 where the launcher says so.

    accelerate launch --num_processes 2 --use_fsdp --fsdp_version 2 --fsdp_cpu_ram_efficient_loading false \\
        --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP examples/accelerate_fsdp.py     # GPUs
    ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 examples/accelerate_fsdp.py    # CPUs: DDP

The model has random weights and learns to count, so that nothing is fetched. What matters are the three lines that are
marked: prepare before accelerate does, calibrate before the first step, and the state of whole weights at the end.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import bellbox as bb
from bellbox.core.sharded import whole


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--steps", type=int, default=20)
    flags.add_argument("--out", help="folder for the packed model")
    options = flags.parse_args()

    set_seed(0)
    accelerator = Accelerator()
    shape = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = bb.prepare(LlamaForCausalLM(shape), bb.Recipe.bbq(bits=2))  # 1: before it is sharded
    optimizer = torch.optim.AdamW(bb.optim.parameter_groups(model, lr=3e-3, weight_decay=0.1))
    starts = torch.arange(options.steps * 4 * accelerator.num_processes)
    batches = DataLoader([(start + torch.arange(32)) % 64 for start in starts], batch_size=4)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)

    bb.calibrate(
        model, [next(iter(batches))], forward=lambda ids: model(input_ids=ids)
    )  # 2: in all processes
    for step, ids in enumerate(batches, 1):
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = accelerator.reduce(loss.detach(), "mean").item()
        accelerator.print(f"step {step}  loss {mean:.4f}")

    trained = accelerator.unwrap_model(model).state_dict()
    state = {name: whole(value) for name, value in trained.items()}  # 3: gathered from all processes
    if accelerator.is_main_process:
        alone = bb.prepare(LlamaForCausalLM(shape), bb.Recipe.bbq(bits=2))
        alone.load_state_dict(state)
        packed = bb.convert(alone.eval())
        print(f"packed: {sum(isinstance(m, bb.nn.PackedLinear) for m in packed.modules())} layers")
        if options.out:
            bb.save(packed, options.out)
    accelerator.end_training()


if __name__ == "__main__":
    main()
