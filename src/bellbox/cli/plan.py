"""Plan a training budget: how much of it is best trained quantized (arXiv 2509.22935).

bellbox plan --parameters 95e6 --tokens 3e9
bellbox plan --preset 300M --tokens 20e9 --bits 4
bellbox plan cluster --help                          # another question: what a run takes on many GPUs
bellbox plan bits --help                             # another one: which layers of a nested model deserve more bits
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bellbox.cli.output import parse_flags
from bellbox.errors import BellboxError, require
from bellbox.models import build, preset
from bellbox.runs.planner import quantized_fraction, tokens_per_byte
from bellbox.utils.skeleton import on_meta

require("tyro", "cli")


@dataclass(frozen=True)
class Plan:
    """How much of a token budget is best trained quantized, after the rest in full precision."""

    tokens: float
    """Training tokens, such as 3e9."""
    preset: str | None = None
    """A preset of the models, to take the number of parameters from."""
    parameters: float | None = None
    """The number of parameters instead, such as 95e6."""
    bits: float = 2
    """Bits of a quantized parameter; 1.585 for ternary."""


def main(argv: list[str]) -> None:
    """Run `bellbox plan` with the arguments after that.

    Raises:
        BellboxError: a number out of range, or a budget that the law does not cover.
    """
    if argv[:1] == ["cluster"]:
        from bellbox.cli.plan_cluster import main as plan_cluster

        plan_cluster(argv[1:])
        return
    if argv[:1] == ["bits"]:
        from bellbox.cli.plan_bits import main as plan_bits

        plan_bits(argv[1:])
        return
    plan = parse_flags(Plan, argv, "bellbox plan", __doc__)
    if (plan.preset is None) == (plan.parameters is None):
        raise BellboxError("give one of --preset and --parameters")
    for name, value, low in (
        ("tokens", plan.tokens, 1),
        ("parameters", plan.parameters, 1),
        ("bits", plan.bits, 0.1),
    ):
        if value is not None and not low <= value < float("inf"):
            raise BellboxError(f"--{name} is {value:g}, must be a finite number of at least {low}")
    if plan.parameters is not None:
        parameters = round(plan.parameters)
    else:
        assert plan.preset is not None
        with on_meta():
            parameters = sum(parameter.numel() for parameter in build(preset(plan.preset)).parameters())
    tokens = round(plan.tokens)
    fraction = quantized_fraction(tokens, parameters, plan.bits)
    shape = "" if plan.preset is None else f" --model.preset {plan.preset}"
    print(
        f"{tokens:,} tokens, {parameters:,} parameters of {plan.bits:.4g} bits: "
        f"{tokens_per_byte(tokens, parameters, plan.bits):.4g} tokens a byte\n"
        f"full precision first: {1 - fraction:.1%} ({round((1 - fraction) * tokens):,} tokens)\n"
        f"then quantized:       {fraction:.1%} ({round(fraction * tokens):,} tokens), give or take 9 points\n"
        f"bellbox train{shape}{_levels_flag(plan.bits)} --tokens {tokens} --phases.quantized {fraction:.3f}"
    )


def _levels_flag(bits: float) -> str:
    """The flag of `bellbox train` for so many bits; none for what is no whole number of levels."""
    levels = round(2**bits)
    if bits == int(bits):
        return f" --quantization.bits {int(bits)}" if 1 <= bits <= 8 else ""
    return f" --quantization.levels {levels}" if abs(math.log2(levels) - bits) < 0.01 else ""
