"""A model of transformers in a loop of one's own: checkpointing, bf16, copies, averages, compilers, export."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import bellbox as bb
from bellbox.core.packing import pack, unpack
from bellbox.optim import hyperball, parameter_groups

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")
WHOLE = os.environ.get("BELLBOX_ZOO") == "all"
COMPILER = "inductor" if WHOLE else "eager"
"""Whether a graph is whole shows without the C++ compiler, which takes a minute."""
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "pad_token_id": 0, "use_cache": False,
}  # fmt: skip
IDS = torch.arange(1, 33).reshape(2, 16)
RECIPES = {
    "bbq": bb.Recipe.bbq(2),
    "on integers": bb.Recipe.bbq(2, integer_forward=True),
    "lsq": bb.Recipe.of("lsq", 3),
    "kmeans": bb.Recipe.of("kmeans", 2, weight_only="float"),
    "ternary": bb.Recipe.bbq(levels=3),
}


def llama(recipe: bb.Recipe | str = "bbq", dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).to(dtype)
    model = bb.prepare(model, RECIPES[recipe] if isinstance(recipe, str) else recipe)
    bb.calibrate(model, [IDS])
    return model


def learn(model: nn.Module, steps: int = 3, optimizer: Any = None, after: Any = None) -> list[float]:
    optimizer = optimizer or torch.optim.AdamW(parameter_groups(model, lr=1e-2, weight_decay=0.1))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model.train()(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if after is not None:
            after()
    return losses


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", RECIPES)
def test_a_plain_loop_learns_and_packs(name: str) -> None:
    model = llama(name)
    losses = learn(model, 8)
    assert losses[-1] < 0.8 * losses[0]
    without = [
        n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert without == []
    packed = bb.convert(model)
    if RECIPES[name].rules[-1].activations is None:
        torch.testing.assert_close(logits(packed), logits(model), rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(logits(packed), logits(model))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", RECIPES)
def test_checkpointed_it_has_the_same_gradients(name: str, reentrant: bool) -> None:
    model = llama(name)
    plain = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    calls = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: calls.append(None))
    again = gradients(model)
    assert len(calls) == 2  # computed anew
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[each], again[each]) for each in plain)


@pytest.mark.parametrize("first", ["prepare", "bf16"])
def test_weights_in_bf16_leave_the_scales_in_fp32(first: str) -> None:
    """So that a scale's small steps are not lost: bf16 tells numbers apart that differ by 0.4 %."""
    model = llama(dtype=torch.float32 if first == "prepare" else torch.bfloat16)
    if first == "prepare":
        model = model.to(torch.bfloat16)
    scales = {name: p for name, p in model.named_parameters() if "quantizer" in name}
    assert scales
    assert {p.dtype for p in scales.values()} == {torch.float32}
    assert model.model.layers[0].mlp.up_proj.stored_weight.dtype == torch.bfloat16
    before = {name: p.detach().clone() for name, p in scales.items()}
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3))
    learn(model, 2, optimizer)
    moved = [float(((p.detach() - before[name]).abs() / before[name]).max()) for name, p in scales.items()]
    assert all(0 < each < 0.05 for each in moved)
    packed = bb.convert(model)
    assert logits(packed).dtype == torch.bfloat16
    assert torch.equal(logits(packed), logits(model))
    again = llama(dtype=torch.bfloat16)
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again), logits(model))


def test_doubles_stay_a_reference() -> None:
    model = llama().double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_a_copy_goes_its_own_way() -> None:
    model = llama()
    learn(model, 1)
    before = logits(model)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), before)
    learn(copied, 2)
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(copied), before)
    learn(model, 2)
    assert torch.equal(logits(model), logits(copied))


def test_an_average_is_a_model_that_packs() -> None:
    model = llama()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen = []

    def update() -> None:
        average.update_parameters(model)
        for name, p in model.named_parameters():
            expected[name] = p.detach().clone() if not seen else expected[name].lerp(p.detach(), 0.5)
        seen.append(None)

    optimizer = hyperball(torch.optim.AdamW(parameter_groups(model, lr=1e-2)), model, every=2)
    learn(model, 4, optimizer, update)
    for name, p in average.module.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name])
    packed = bb.convert(average)
    assert torch.equal(logits(packed), logits(average.module))
    assert not torch.equal(logits(packed), logits(model))


@pytest.mark.parametrize("form", ["training"] + WHOLE * ["evaluation", "packed"])
def test_compiled_it_is_one_graph_and_the_same_function(form: str) -> None:
    model = llama().train(form == "training")
    model = bb.convert(model) if form == "packed" else model
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=COMPILER)
    with torch.set_grad_enabled(form == "training"):
        expected, found = model(input_ids=IDS).logits, compiled(input_ids=IDS).logits
    if WHOLE and form != "packed":
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(found, expected)
    if form == "training":
        ours = gradients(model)
        model.zero_grad()
        compiled(input_ids=IDS, labels=IDS).loss.backward()
        theirs = {name: p.grad for name, p in model.named_parameters()}
        for name, gradient in ours.items():
            torch.testing.assert_close(theirs[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not WHOLE, reason="BELLBOX_ZOO=all; tests/nn/test_export.py has layers")
@pytest.mark.parametrize("form", ["evaluation", "packed"])
def test_exported_it_gives_the_same_bits(form: str) -> None:
    model = llama().eval()
    model = bb.convert(model) if form == "packed" else model
    with torch.no_grad():
        program = torch.export.export(model, (IDS,))
        assert torch.equal(program.module()(IDS).logits, logits(model))


@pytest.mark.slow
def test_compiled_unpacking_of_a_slice_is_eager_unpacking() -> None:
    """Views of bytes with an offset, that inductor has taken for the whole (pytorch 172747)."""
    columns, levels = 37, (2, 3, 4, 8, 16)
    draws = torch.Generator().manual_seed(0)
    codes = [torch.randint(n, (80, columns), generator=draws, dtype=torch.uint8) for n in levels]

    def held(each: Tensor, n: int) -> Tensor:
        """Packed, as a view into a longer buffer."""
        packed = pack(each, n)
        buffer = torch.full((packed.numel() + 7,), 255, dtype=torch.uint8)
        return buffer[3 : 3 + packed.numel()].view(packed.shape).copy_(packed)

    def unpacked(first: Tensor, *rest: Tensor) -> list[Tensor]:
        return [unpack(part, columns, n) for part, n in zip((first, *rest), levels, strict=True)]

    torch._dynamo.reset()
    compiled = torch.compile(
        unpacked, fullgraph=True, dynamic=True, backend="inductor" if WHOLE else "aot_eager"
    )
    whole = [held(each, n) for each, n in zip(codes, levels, strict=True)]
    for rows in (1, 7, 64) if WHOLE else (7,):
        for start in (0, 1, 5):
            found = compiled(*(part[start : start + rows] for part in whole))
            expected = [each[start : start + rows] for each in codes]
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), (rows, start)
