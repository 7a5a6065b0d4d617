"""transformers' Trainer around a prepared model: groups, hyperball, checkpoints, accumulation."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bellbox as bb
from bellbox.interop.trainer import FILE
from bellbox.optim import hyperball, parameter_groups, scale_gradients_by_row

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
STEPS = 6
WHOLE = os.environ.get("BELLBOX_ZOO") == "all"


def text(lengths: list[int]) -> list[dict[str, list[int]]]:
    draws = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 96, (length,), generator=draws).tolist() for length in lengths]
    return [{"input_ids": row, "labels": row} for row in rows]


def padded(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    most = max(len(row["input_ids"]) for row in rows)

    def filled(key: str, by: int) -> Tensor:
        return torch.tensor([[*row[key], *[by] * (most - len(row[key]))] for row in rows])

    ids = filled("input_ids", 0)
    return {"input_ids": ids, "labels": filled("labels", -100), "attention_mask": (ids != 0).long()}


def llama(recipe: bb.Recipe | None = None) -> Any:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    model = bb.prepare(model, recipe or bb.Recipe.bbq(2))
    bb.calibrate(model, [torch.arange(1, 33).reshape(2, 16)])
    return model


def arguments(folder: Path, **more: Any) -> Any:
    fixed = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "seed": 0, "logging_strategy": "no"}
    once = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "save_steps": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
    }
    return transformers.TrainingArguments(output_dir=str(folder), **{**fixed, **once, **more})


class LowBit(bb.interop.ExactCheckpoints, transformers.Trainer):
    """As docs/interop.md has it."""

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            groups = parameter_groups(self.model, lr=self.args.learning_rate, weight_decay=0.1)
            self.optimizer = hyperball(torch.optim.AdamW(groups), self.model, lr=0.02, every=3)
        return self.optimizer


def trainer(kind: Any, model: nn.Module, folder: Path, **more: Any) -> Any:
    roads = ("optimizers", "optimizer_cls_and_kwargs", "callbacks", "eval_dataset")
    given = {key: more.pop(key) for key in roads if key in more}
    rows = text([12, 16, 9, 16, 14, 7, 11, 16] * 3)
    return kind(
        model=model, args=arguments(folder, **more), train_dataset=rows, data_collator=padded, **given
    )


def same(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("recipe", [bb.Recipe.bbq(2)] + WHOLE * [bb.Recipe.of("lsq", 2)])
def test_a_resumed_run_is_the_uninterrupted_one(recipe: bb.Recipe, tmp_path: Path) -> None:
    whole, resumed = llama(recipe), llama(recipe)
    assert trainer(LowBit, whole, tmp_path).train().global_step == STEPS
    (ball,) = [g for g in _adam(tmp_path / "checkpoint-4")["param_groups"] if "hyperball_norms" in g]
    assert ball["hyperball_steps"] == 4
    with torch.no_grad():  # nothing of what it was is left
        for p in resumed.parameters():
            p.mul_(1.1)
    trainer(LowBit, resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same(resumed, whole)
    packed = bb.convert(resumed)
    ids = torch.arange(1, 17)[None]
    with torch.no_grad():
        assert torch.equal(packed(ids).logits, whole.eval()(ids).logits)


def _adam(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "optimizer.pt", weights_only=True)


def test_the_best_checkpoint_is_loaded_with_its_scales(tmp_path: Path) -> None:
    model = llama()
    states = []

    class Kept(transformers.TrainerCallback):
        def on_save(self, *_: Any, **__: Any) -> None:
            states.append({name: value.clone() for name, value in model.state_dict().items()})

    run = trainer(
        LowBit, model, tmp_path, callbacks=[Kept()], learning_rate=0.3, lr_scheduler_type="constant",
        load_best_model_at_end=True, eval_strategy="steps", eval_steps=2, save_steps=2, warmup_steps=0,
        eval_dataset=text([16, 12]),
    )  # fmt: skip
    run.train()
    best = int(run.state.best_model_checkpoint.rpartition("-")[2]) // 2 - 1
    assert best < len(states) - 1  # else nothing had to be loaded
    ours = model.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in states[best].items())


def test_a_checkpoint_of_a_plain_trainer_is_not_resumed_from(tmp_path: Path, caplog: Any) -> None:
    model = llama()
    trainer(transformers.Trainer, model, tmp_path, max_steps=1, save_steps=1).train()
    assert [r.message for r in caplog.records if r.name == "bellbox" and "ExactCheckpoints" in r.message]
    folder = tmp_path / "checkpoint-1"
    assert not (folder / FILE).exists()
    fresh = llama()
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    with pytest.raises(bb.BellboxError, match="without ExactCheckpoints"):
        trainer(LowBit, fresh, tmp_path).train(resume_from_checkpoint=str(folder))
    assert all(torch.equal(before[name], value) for name, value in fresh.state_dict().items())
    plain = transformers.LlamaForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(
        plain.model.layers[0].mlp.up_proj.weight.detach(), model.model.layers[0].mlp.up_proj.weight.detach()
    )


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    trainer(LowBit, llama(bb.Recipe.bbq(3)), tmp_path, max_steps=1, save_steps=1).train()
    with pytest.raises(bb.BellboxError, match="another recipe"):
        trainer(LowBit, llama(), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_model_that_is_stored_under_other_names_is_resumed_all_the_same(tmp_path: Path) -> None:
    """Of Mixtral, transformers' own resume finds no expert: they are stored one by one, and loaded as one."""

    def mixtral() -> Any:
        torch.manual_seed(0)
        config = transformers.MixtralConfig(**{**SIZES, "num_hidden_layers": 1}, num_local_experts=2)
        model = bb.prepare(transformers.MixtralForCausalLM(config), bb.Recipe.bbq(2))
        bb.calibrate(model, [torch.arange(1, 33).reshape(2, 16)])
        return model

    whole, resumed = mixtral(), mixtral()
    trainer(LowBit, whole, tmp_path, max_steps=2, save_steps=1).train()
    folder = tmp_path / "checkpoint-1"
    trainer(LowBit, resumed, tmp_path, max_steps=2).train(resume_from_checkpoint=str(folder))
    assert same(resumed, whole)
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-8])
    with pytest.raises(bb.BellboxError, match=FILE):
        trainer(LowBit, mixtral(), tmp_path).train(resume_from_checkpoint=str(folder))


def test_a_full_precision_model_is_checkpointed_as_ever(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))

    class Plain(bb.interop.ExactCheckpoints, transformers.Trainer):
        pass

    trainer(Plain, model, tmp_path, max_steps=1, save_steps=1).train()
    assert not (tmp_path / "checkpoint-1" / FILE).exists()
    trainer(Plain, model, tmp_path, max_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("road", ["optimizers", "class and arguments"])
def test_groups_reach_the_trainer_by_its_other_roads(road: str, tmp_path: Path) -> None:
    """The same weights as by `create_optimizer`."""

    def choices(model: nn.Module) -> dict[str, Any]:
        groups = parameter_groups(model, lr=1e-3, weight_decay=0.1)
        if road == "optimizers":
            return {"optimizers": (hyperball(torch.optim.AdamW(groups), model, lr=0.02, every=3), None)}
        return {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"params": groups, "lr": 1e-3})}

    class Grouped(LowBit):
        def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
            if self.optimizer is None:
                groups = parameter_groups(self.model, lr=self.args.learning_rate, weight_decay=0.1)
                self.optimizer = torch.optim.AdamW(groups)
            return self.optimizer

    one, other = llama(), llama()
    kind = LowBit if road == "optimizers" else Grouped
    trainer(kind, one, tmp_path / "one", save_strategy="no", max_steps=4).train()
    trainer(
        transformers.Trainer, other, tmp_path / "two", save_strategy="no", max_steps=4, **choices(other)
    ).train()
    assert same(one, other)


@pytest.mark.parametrize(
    "recipe",
    [bb.Recipe.bbq(2, integer_forward=True)]
    + WHOLE * [bb.Recipe.of("lsq", 3, integer_forward=True), bb.Recipe.of("quest", 3)],
)
def test_gradients_do_not_depend_on_accumulation(recipe: bb.Recipe, tmp_path: Path) -> None:
    """8 sequences of unequal length as 8 x 1, 2 x 4, 1 x 8 (transformers 37766)."""

    def gradients(batch: int, by_row: bool = True) -> dict[str, Tensor]:
        model = llama(recipe)
        scale_gradients_by_row(model, by_row)
        found: dict[str, Tensor] = {}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        optimizer.register_step_pre_hook(
            lambda *_: found.update({name: p.grad.double() for name, p in model.named_parameters()})
        )
        args = arguments(
            tmp_path, max_steps=1, per_device_train_batch_size=batch, save_strategy="no", max_grad_norm=0.0,
            gradient_accumulation_steps=8 // batch,
        )  # fmt: skip
        rows = text([3, 16, 9, 32, 14, 7, 2, 27])
        transformers.Trainer(
            model=model, args=args, train_dataset=rows, data_collator=padded, optimizers=(optimizer, None)
        ).train()
        return found

    whole = gradients(8)
    scales = [name for name in whole if "activation_quantizer" in name]
    for batch in (1, 4):
        pieces = gradients(batch)
        assert pieces.keys() == whole.keys()
        for name, gradient in whole.items():
            largest = float(gradient.abs().max())
            assert largest > 0, name
            # A scale of inputs is a sum over all tokens in which most cancels.
            most = 2e-4 if name in scales else 1e-5
            assert float((pieces[name] - gradient).abs().max()) <= most * largest, name
    if scales:
        published = gradients(8, by_row=False)
        for name, gradient in whole.items():  # of 8 rows of 32 tokens
            factor = 16 if name in scales else 1
            torch.testing.assert_close(published[name] * factor, gradient, rtol=1e-5, atol=1e-12)


def test_offloaded_scales_come_with_their_layer_or_are_asked_for():
    """accelerate brings a tensor for the forward of the module that has it, and a layer reads its quantizers."""
    import accelerate

    model = bb.prepare(torch.nn.Sequential(torch.nn.Linear(64, 8)), bb.Recipe.bbq(2, keep_ends=False))
    x = torch.randn(4, 64)
    model(x)
    model.eval()
    with torch.no_grad():
        offloaded = accelerate.cpu_offload(copy.deepcopy(model), torch.device("cpu"))
        with pytest.raises(
            bb.BellboxError, match=r"0\.input: its scale is offloaded .* preload_module_classes"
        ):
            offloaded(x)
        whole = accelerate.cpu_offload(
            copy.deepcopy(model), torch.device("cpu"), preload_module_classes=["QuantizedLinear"]
        )
        assert torch.equal(whole(x), model(x))
