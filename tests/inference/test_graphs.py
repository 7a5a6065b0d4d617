"""The decode step of fixed shapes: the tokens of the ordinary one, whatever lay in the cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bellbox.benchmark.model import random_model
from bellbox.errors import BellboxError
from bellbox.inference.generation import generate
from bellbox.inference.graphs import GraphSteps, StaticSteps
from bellbox.models import Llama, build, preset

CONFIG = preset(
    "tiny", vocab_size=96, num_hidden_layers=2, hidden_size=64, intermediate_size=96, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=40,
)  # fmt: skip


def model_of(bits: int | None) -> Llama:
    model = build(CONFIG, seed=0).eval() if bits is None else random_model(CONFIG, bits)
    assert isinstance(model, Llama)
    return model


@torch.no_grad()
def replayed(steps_type: type[StaticSteps], model: Llama, device: str = "cpu") -> None:
    """SageAttention 392: replays with other tokens, positions, fill and amplitude, the output zeroed before each."""
    model = model.to(device)
    draw = torch.Generator().manual_seed(1)
    ours, theirs = (model.new_cache(2, 40) for _ in range(2))
    for held in (*ours.keys, *ours.values):
        held.fill_(float("nan"))  # what was never written must not matter
    steps = steps_type(model, ours)
    logits: Tensor | None = None
    for turn in range(20):
        if turn % 7 == 0:  # another prompt, of another length, where the last one's keys still lie
            prompt = torch.randint(0, 96, (2, 3 + turn), generator=draw).to(device)
            for cache in (ours, theirs):
                cache.reset()
                model(prompt, cache=cache, last_only=True)
        if turn == 10:
            model.model.embed_tokens.weight.data.mul_(
                100
            )  # what a graph holds is where numbers lie, not the numbers
        token = torch.randint(0, 96, (2, 1), generator=draw).to(device)
        expected = model(token, cache=theirs, last_only=True)
        if logits is not None:
            logits.zero_()
        logits = steps.step(token)
        assert torch.equal(logits.argmax(-1), expected.argmax(-1))
        assert torch.allclose(logits, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("bits", [None, 4])
def test_steps_of_fixed_shapes_give_the_tokens_of_the_others(bits: int | None) -> None:
    replayed(StaticSteps, model_of(bits))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need CUDA")
@pytest.mark.parametrize("bits", [None, 4])
def test_a_recorded_graph_gives_them_too(bits: int | None) -> None:
    replayed(GraphSteps, model_of(bits), "cuda")


def test_what_has_no_fixed_shapes_is_refused() -> None:
    model = model_of(None)
    with pytest.raises(BellboxError, match="read no int8 cache"):
        StaticSteps(model, model.new_cache(1, 8, "int8"))
    with pytest.raises(BellboxError, match="for a LLaMA"):
        StaticSteps(build(preset("gpt-tiny"), seed=0), model.new_cache(1, 8))  # type: ignore[arg-type]
    steps = StaticSteps(model, model.new_cache(1, 8))
    with pytest.raises(BellboxError, match="made for a batch of 1"):
        steps.step(torch.zeros(2, 1, dtype=torch.int64))
    if not torch.cuda.is_available():
        with pytest.raises(BellboxError, match="a CUDA graph needs a model on CUDA; the cache is on cpu"):
            GraphSteps(model, model.new_cache(1, 8))


class NoWaiting(TorchDispatchMode):
    """Refuses operations for which a GPU would be waited for: numbers read back, shapes that depend on values."""

    WAIT = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "unique",
        "is_nonzero",
        "equal",
        "item",
        "bincount",
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        name = func.overloadpacket.__name__
        kwargs = kwargs or {}
        there = {each.device for each in args if isinstance(each, Tensor)}
        assert not name.startswith(self.WAIT), f"{name} waits for the device"
        assert kwargs.get("device", None) is None or not there or {torch.device(kwargs["device"])} == there, (
            name
        )
        if name == "index" and any(isinstance(each, Tensor) and each.dtype == torch.bool for each in args[1]):
            raise AssertionError("an index by a mask waits for the device")
        return func(*args, **kwargs)


@pytest.mark.parametrize("bits", [None, 4])
@torch.no_grad()
def test_a_step_waits_for_no_device(bits: int | None) -> None:
    model = model_of(bits)
    steps = StaticSteps(model, model.new_cache(2, 8))
    steps.step(torch.zeros(2, 1, dtype=torch.int64))
    with NoWaiting():
        steps.step(torch.ones(2, 1, dtype=torch.int64))
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        torch.ones(1).item()


@pytest.mark.parametrize(("temperature", "bits"), [(0.0, 4), (0.8, None)])
def test_generating_by_them_gives_the_same_tokens(temperature: float, bits: int | None) -> None:
    model, prompt = model_of(bits), torch.randint(0, 96, (3, 5))
    arguments = {"temperature": temperature, "seed": 1}
    expected = torch.stack(list(generate(model, prompt, 12, **arguments)))
    assert torch.equal(
        torch.stack(list(generate(model, prompt, 12, **arguments, fixed_shapes=True))), expected
    )
    with pytest.raises(BellboxError, match="read no int8 cache"):
        generate(model, prompt, 2, kv_cache="int8", fixed_shapes=True)
