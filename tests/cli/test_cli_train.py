from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bellbox.cli import train
from bellbox.cli.main import main
from bellbox.cli.train import parse
from bellbox.errors import BellboxError
from bellbox.runs.build import make_model
from bellbox.runs.config import ModelSection, QuantizationSection
from bellbox.training import TrainConfig, load_run
from waiting import finish, wait_for

TINY = [
    "--model.overrides", "num_hidden_layers=1", "hidden_size=32", "intermediate_size=64",
    "num_attention_heads=2", "--data.context", "32", "--batch.tokens", "128", "--batch.micro-sequences", "2",
    "--precision", "fp32", "--no-tensorboard", "--device", "cpu", "--threads", "1",
]  # fmt: skip


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        "optimizer: {lr: 0.5, weight_decay: 0.3}\nsteps: 7\nmodel: {overrides: {rope_theta: 5.0}}\n"
    )
    config, resume = parse(
        ["--config", str(file), "--optimizer.lr", "6e-4", "--quantization.bits", "3", "--debug",
         "--model.overrides", "num_hidden_layers=4", "tie_word_embeddings=true", "--resume", "none"]
    )  # fmt: skip
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.optimizer.clip) == (6e-4, 0.3, 1.0)
    assert (config.quantization.bits, config.steps, config.debug, resume) == (3, 7, True, "none")
    assert config.model.overrides == {"rope_theta": 5.0, "num_hidden_layers": 4, "tie_word_embeddings": True}


def test_a_null_in_place_of_a_number_switches_the_budget(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("steps: 7\n")
    config, _ = parse(["--config", str(file), "--steps", "None", "--tokens", "10000"])
    assert config.total_steps == 2


def test_a_recipe_of_the_file_stays_and_one_in_a_flag_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("quantization: {recipe: {rules: [{pattern: '*.q_proj'}], share_inputs: false}}\n")
    config, _ = parse(["--config", str(file)])
    assert config.quantization.recipe == {"rules": [{"pattern": "*.q_proj"}], "share_inputs": False}
    config, _ = parse(["--quantization.recipe", "{rules: []}"])
    assert config.quantization.recipe == {"rules": []}


def test_an_unknown_flag_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "--optimizer.lrr", "3"])
    assert caught.value.code == 2
    assert "--optimizer.lrr" in capsys.readouterr().err


def test_a_wrong_value_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "a.yaml").write_text("optimizer: {lrr: 1}\n")
    for arguments, message in (
        (["--config", str(tmp_path / "a.yaml")], "unknown key 'optimizer.lrr'"),
        (["--config", str(tmp_path / "none.yaml")], "none.yaml: cannot be read"),
        (["--batch.tokens", "1000"], "batch.tokens is 1000"),
        (["--model.preset", "huge", "--folder", str(tmp_path / "r")], "no model preset 'huge'"),
        (["--quantization.bits", "99", "--folder", str(tmp_path / "r")], "99"),
        (["--data.source", str(tmp_path / "nowhere"), "--folder", str(tmp_path / "r")], "no such folder"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["train", *arguments])
        error = capsys.readouterr().err
        assert caught.value.code == 2
        assert error.startswith("bellbox: error: ")
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "r").exists()


def test_an_override_that_is_no_pair_is_refused() -> None:
    with pytest.raises(BellboxError, match="'layers' must be written KEY=VALUE"):
        parse(["--model.overrides", "layers"])


def test_help_lists_the_flags_with_their_docs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for flag in (
        "--config",
        "--resume",
        "--folder",
        "--optimizer.lr",
        "--quantization.bits",
        "--batch.tokens",
    ):
        assert flag in text
    assert "Peak learning rate" in text


def test_it_trains_and_says_what_to_do_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bellbox.training.tasks import language as task

    # The whole validation split of the books would take most of the time here.
    whole = task.perplexity
    monkeypatch.setattr(task, "perplexity", lambda *a, **k: whole(*a, **k, max_tokens=500))
    folder = tmp_path / "run"
    main(["train", "--folder", str(folder), "--steps", "2", *TINY])
    out = capsys.readouterr().out
    assert re.search(r"[\d,]+ quantized", out)
    assert f"bellbox convert {folder}" in out
    assert load_run(folder).step == 2
    main(["train", "--config", str(folder / "config.yaml")])
    assert "step 2 of 2" in capsys.readouterr().out
    with pytest.raises(BellboxError, match="already holds a run"):
        train.main(["--config", str(folder / "config.yaml"), "--resume", "none"])


@pytest.mark.parametrize(
    ("quantization", "commands"),
    [
        ({"method": "none"}, ["eval", "report", "generate"]),
        ({"granularity": "tensor"}, ["eval", "report"]),
        ({"method": "nf"}, ["eval", "report", "generate"]),
        ({"weight_only": "float"}, ["eval", "report", "convert", "generate"]),
        ({}, ["eval", "report", "convert", "generate"]),
    ],
)
def test_what_comes_next_is_what_the_run_can_do(quantization: dict[str, str], commands: list[str]) -> None:
    overrides: dict[str, bool | int | float | str] = {
        "vocab_size": 16, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    }  # fmt: skip
    config = TrainConfig(
        model=ModelSection(overrides=overrides), quantization=QuantizationSection(**quantization)
    )
    told = train._farewell(Path("run"), make_model(config))
    assert re.findall(r"bellbox (\w+) run", told) == commands


def test_ctrl_c_in_a_real_process_saves_and_exits_with_130(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [
        sys.executable,
        "-c",
        "from bellbox.cli.main import main; main()",
        "train",
        "--folder",
        str(folder),
    ]
    command += ["--steps", "100000", "--eval-every", "100000", "--log-every", "1", *TINY]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = folder / "metrics.jsonl"

    def some_steps() -> bool:
        assert process.poll() is None, process.communicate()
        return metrics.exists() and metrics.stat().st_size > 200

    wait_for(some_steps, "some steps", process.pid)
    process.send_signal(signal.SIGINT)
    out, error = finish(process)
    assert process.returncode == 130, error
    assert "saved; go on with: bellbox train --config" in out
    assert "Traceback" not in error
    assert load_run(folder).step >= 1


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_a_closed_pipe_ends_a_run_in_a_line_and_exit_code_2(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from bellbox.cli.main import main; main()", "train"]
    command += ["--folder", str(tmp_path / "run"), "--steps", "100000", "--log-every", "1", *TINY]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    process.stdout = None
    _, error = finish(process)
    assert process.returncode == 2
    assert error.count("\n") == 1, error
    assert error.startswith("bellbox: error: standard output was closed")
