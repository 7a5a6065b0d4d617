from __future__ import annotations

from pathlib import Path

import pytest

from bellbox.errors import BellboxError
from bellbox.runs.build import make_recipe
from bellbox.runs.config import TrainConfig
from bellbox.runs.config_file import config_from_dict, differences, load_config, save_config


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"seed": 10**40}, "seed is 1000.*, must be from -9223372036854775808 to 9223372036854775807"),
        ({"seed": 1e40}, "'seed' is 1e\\+40"),
        ({"data": {"seed": -5}}, "data.seed is -5, must be from 0"),
        ({"threads": 100_000}, "threads is 100000, must be from 1 to 1024"),
        ({"steps": 10**20}, "steps is 1000.*, must be at most 1000000000000"),
    ],
)
def test_numbers_beyond_all_bounds_are_one_line(keys, says):
    with pytest.raises(BellboxError, match=says) as refused:
        config_from_dict(keys)
    assert "\n" not in str(refused.value)


def test_the_defaults_are_the_papers_recipe() -> None:
    config = TrainConfig().check()
    assert config.optimizer.betas == (0.9, 0.95)
    assert (config.optimizer.weight_decay, config.optimizer.clip, config.optimizer.lr) == (0.1, 1.0, 1.2e-3)
    schedule = config.schedule
    assert (schedule.warmup, schedule.start_factor, schedule.end_factor) == (0.1, 0.01, 0.1)
    assert config.precision == "auto"


def test_a_file_is_read_and_written_without_loss(tmp_path: Path) -> None:
    source = tmp_path / "a.yaml"
    source.write_text(
        "folder: runs/a\nmodel: {preset: small, overrides: {num_hidden_layers: 2, rope_theta: 5.0e+3}}\n"
        "quantization: {bits: 3, granularity: ema}\noptimizer: {lr: 1e-3, betas: [0.8, 0.9]}\ntokens: 100000\n"
    )
    config = load_config(source)
    # YAML 1.1 reads 1e-3 as text; it is meant as a number.
    assert config.optimizer.lr == 1e-3
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.model.overrides == {"num_hidden_layers": 2, "rope_theta": 5000.0}
    assert config.total_steps == -(-100000 // 8192)
    save_config(config, tmp_path / "b.yaml")
    assert load_config(tmp_path / "b.yaml") == config


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"optimizer": {"lrr": 1}}, r"unknown key 'optimizer.lrr'; did you mean 'lr'\?"),
        ({"zzz": 1}, "unknown key 'zzz'; there are: folder, task, model, "),
        ({"optimizer": {"lr": "fast"}}, "'optimizer.lr' is 'fast', must be a valid number"),
        ({"optimizer": {"betas": [0.9]}}, "'optimizer.betas' is"),
        ({"batch": {"tokens": 1.5}}, "'batch.tokens' is 1.5, must be a valid integer"),
        ({"batch": 3}, "'batch' is 3, must be a dictionary"),
        ({"model": {"overrides": {"rope_theta": [1]}}}, "'model.overrides.rope_theta' is"),
        (
            {"quantization": {"weight_only": "int4"}},
            "'quantization.weight_only' is 'int4', must be 'float' or 'int8'",
        ),
        ({"compile": "perhaps"}, "'compile' is 'perhaps', must be a valid boolean"),
        ([1], "holds list, must be a mapping"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_with_the_dotted_name(data: object, message: str) -> None:
    with pytest.raises(BellboxError, match=message) as caught:
        config_from_dict(data, "my.yaml")
    assert str(caught.value).startswith("my.yaml: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"batch": {"tokens": 1000}},
            "batch.tokens is 1000, not a whole number of sequences.*256; 1024 would be",
        ),
        (
            {"batch": {"tokens": 8192, "micro_sequences": 5}},
            "32 sequences of 256, which batch.micro_sequences 5",
        ),
        ({"steps": 0}, "steps is 0, must be at least 1"),
        ({"steps": 3, "tokens": 3}, "give one of them"),
        ({"optimizer": {"lr": -1}}, "optimizer.lr is -1.0, must be above 0"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, r"optimizer.betas is \(0.9, 1.0\), must be in \[0, 1\)"),
        ({"schedule": {"warmup": 1.5}}, "schedule.warmup is 1.5"),
        ({"eval_every": 0}, "eval_every is 0"),
        (
            {"quantization": {"method": "magic"}},
            "quantization: no quantization method 'magic'; there are: bbq",
        ),
        (
            {"quantization": {"activation_bits": 9}},
            "quantization: bits=9: must be a whole number from 1 to 8",
        ),
        (
            {"quantization": {"activation_bits": 4, "weight_only": "int8"}},
            "quantization.activation_bits is 4, but weight_only leaves activations no bits",
        ),
        ({"quantization": {"method": "quest", "options": {"rul": "clip"}}}, "'rul' of quest.*options: rule"),
        ({"distill": {"weight": 0.9}}, "distill.weight is 0.9, must be left at 0.5 without a teacher"),
        (
            {"distill": {"temperature": 2}},
            "distill.temperature is 2.0, must be left at 1.0 without a teacher",
        ),
    ],
)
def test_values_out_of_range_are_refused_with_the_limit(data: object, message: str) -> None:
    with pytest.raises(BellboxError, match=message):
        config_from_dict(data)


def test_accumulation_follows_from_the_global_batch() -> None:
    config = config_from_dict({"batch": {"tokens": 8192, "micro_sequences": 4}, "data": {"context": 128}})
    assert (config.sequences_per_step, config.accumulation) == (64, 16)


@pytest.mark.parametrize("method", ["bbq", "bbq_paper", "lsq"])
def test_activations_may_have_bits_of_their_own(method: str) -> None:
    section = config_from_dict(
        {"quantization": {"method": method, "bits": 2, "activation_bits": 4}}
    ).quantization
    rule = make_recipe(section).rules[-1]
    assert rule.weights is not None
    assert rule.activations is not None
    assert (rule.weights.levels, rule.activations.levels) == (4, 16)


def test_a_broken_or_missing_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("a: [1,\nb: }")
    with pytest.raises(BellboxError, match="not YAML") as caught:
        load_config(tmp_path / "bad.yaml")
    assert "\n" not in str(caught.value)
    with pytest.raises(BellboxError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "code.yaml").write_text("folder: !!python/object/apply:os.getcwd []")
    with pytest.raises(BellboxError, match="not YAML"):
        load_config(tmp_path / "code.yaml")


def test_differences_name_what_decides_the_numbers_only() -> None:
    left = config_from_dict({"optimizer": {"lr": 0.1}, "folder": "a"})
    right = config_from_dict({"optimizer": {"lr": 0.2}, "folder": "b", "checkpoint_every": 7})
    assert differences(left, right) == ["optimizer.lr is 0.1 there, 0.2 here"]
