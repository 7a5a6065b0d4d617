"""Where LTDB should start: error of the outputs of the layers behind norms, by exponent, before and after learning.

python benchmarks/ltdb.py MODEL --calibration fit.txt --blocks 1 14 28 --exponents 0.4 0.5 0.6 0.85

Inputs are those of the float model, one token of sixteen, rounded to 16, 8 and 6 bits after the transformation; errors
are those of BiLLM's weights (clean) and of the rounding together, relative to the outputs' squares, mean over groups.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from bellbox.data.tokenizer import Tokenizer
from bellbox.models.blocks import Runner, embed, filled_block, groups_of
from bellbox.models.hf import HFFolder
from bellbox.nn.binarized_linear import round_activations
from bellbox.ptq.calibration import calibration_tokens
from bellbox.ptq.feedback import binarize_matrix
from bellbox.ptq.hessian import inverse_factor
from bellbox.ptq.ltdb import learn_scale

WIDTHS = (16, 8, 6)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    flags.add_argument("model", type=Path)
    flags.add_argument("--calibration", type=Path, required=True)
    flags.add_argument("--blocks", type=int, nargs="+", required=True)
    flags.add_argument("--exponents", type=float, nargs="+", default=[0.4, 0.5, 0.6, 0.85])
    flags.add_argument("--samples", type=int, default=16)
    flags.add_argument("--context", type=int, default=512)
    asked = flags.parse_args()
    torch.set_num_threads(1)
    groups = inputs_of(asked)
    ways: list[tuple[str, float | None, int]] = [("billm", None, 0)]
    ways += [(f"e = {e:g}, {steps} steps", e, steps) for e in asked.exponents for steps in (0, 200)]
    for name, exponent, steps in ways:
        found = torch.tensor([errors(weight, x, exponent, steps) for weight, x in groups]).mean(0)
        print(
            f"{name:20}",
            *(f"{width:2} bits {error:.4f} " for width, error in zip(WIDTHS, found, strict=True)),
            flush=True,
        )


@torch.no_grad()
def inputs_of(asked: argparse.Namespace) -> list[tuple[Tensor, Tensor]]:
    """Of the groups behind norms: weights `[out, in]` and inputs `[tokens, in]`."""
    source = HFFolder(asked.model)
    tokens = calibration_tokens(Tokenizer.load(asked.model), asked.calibration, asked.samples, asked.context)
    hidden, run = embed(source.config, source.rest(), tokens), Runner(source.config)
    found: list[tuple[Tensor, Tensor]] = []
    for number in range(max(asked.blocks) + 1):
        block = filled_block(source.config, number, source.block(number))
        seen: dict[str, list[Tensor]] = {}
        groups = [group for group in groups_of(source.config) if group.norm is not None]
        for group in groups if number in asked.blocks else ():
            kept = seen[group.layers[0]] = []
            block.get_submodule(group.layers[0]).register_forward_pre_hook(keeping(kept))
        for part in hidden.split(4):
            part.copy_(run(block, part))
        for group in groups if number in asked.blocks else ():
            layers = [block.get_submodule(layer) for layer in group.layers]
            weight = torch.cat([layer.weight for layer in layers if isinstance(layer, nn.Linear)])
            found.append((weight, torch.cat(seen[group.layers[0]])))
    return found


def keeping(kept: list[Tensor]):
    return lambda _, inputs: kept.append(inputs[0].flatten(0, -2).clone())


def errors(weight: Tensor, x: Tensor, exponent: float | None, steps: int) -> list[float]:
    """Relative errors of the outputs by width of the inputs; without an exponent, of the weights as they are."""
    scale = torch.ones(weight.shape[1])
    if exponent is not None:
        scale = learn_scale([weight], x.abs().amax(0), exponent=exponent, most_steps=steps).scale
    inputs = x / scale
    upper = inverse_factor(inputs.T @ inputs * (2 / len(x)), 0.01, "layer")
    binarized = binarize_matrix(weight * scale, upper)[1]
    wanted, some = x[::16] @ weight.T, inputs[::16]
    return [
        float((round_activations(some, width) @ binarized.T - wanted).square().sum() / wanted.square().sum())
        for width in WIDTHS
    ]


if __name__ == "__main__":
    main()
