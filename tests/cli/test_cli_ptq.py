from __future__ import annotations

import json
import shutil

import pytest

from bellbox.models import LlamaConfig, build, save_hf

ARGUMENTS = ("--samples", 4, "--context", 24, "--method", "billm")


@pytest.fixture(scope="module")
def text(tmp_path_factory, prose):
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(prose[:6000], encoding="utf-8")
    return path


def test_a_binarized_model_is_made_evaluated_and_generated_from(bellbox_process, tmp_path, hf, text, tokens):
    made = bellbox_process(
        "ptq", hf, "--calibration", text, "--out", "one-bit", *ARGUMENTS, "--activations", 8
    )
    assert made.returncode == 0, made.stderr
    assert "block   1/1" in made.stdout
    assert (
        "weights in 5." in made.stdout
    )  # 32 and 64 inputs: seven scales a row weigh more than in a large layer
    scored = bellbox_process("eval", "one-bit", "--data", tokens, "--json", "-")
    found = json.loads(scored.stdout)
    assert found["kind"] == "binarized"
    assert 1 < found["perplexity"] < 10_000
    written = bellbox_process("generate", "one-bit", "--prompt", "It was", "--max-new-tokens", 5)
    assert written.returncode == 0, written.stderr
    assert written.stdout.startswith("It was")
    rounded = bellbox_process(
        "generate", "one-bit", "--prompt", "It was", "--max-new-tokens", 5, "--embeddings", "int8"
    )
    assert rounded.returncode == 0, rounded.stderr


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--samples", "400"), "too little calibration text for 400 samples of 24 tokens (9,600)"),
        (("--damping", "0"), "is singular with damping 0"),
        (("--damping", "-1"), "damping is -1"),
        (("--samples", "0"), "--samples is 0"),
    ],
)
def test_what_cannot_be_fitted_is_refused_in_one_line(refused, tmp_path, hf, text, flags, says):
    arguments = [
        "ptq",
        hf,
        "--calibration",
        text,
        "--out",
        tmp_path / "out",
        "--context",
        "24",
        *(() if "--samples" in flags else ("--samples", "1")),
    ]
    assert says in refused(*arguments, "--method", "billm", *flags)
    assert "--power does not apply to --method billm" in refused(
        *arguments, "--method", "billm", "--power", "1"
    )
    assert "--damping does not apply to --method rtn" in refused(
        *arguments, "--method", "rtn", "--damping", "1"
    )
    assert not (tmp_path / "out").exists()


def test_models_that_it_cannot_take_are_refused_in_one_line(refused, tmp_path, hf, run, text):
    def refusal(model) -> str:
        return refused("ptq", model, "--calibration", text, "--out", tmp_path / "out", "--samples", "1")

    assert "config.json does not exist" in refusal(run)
    other = tmp_path / "other"
    shutil.copytree(hf, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    assert "model_type is 'bert'; Bellbox reads 'llama', 'gpt2', 'opt'" in refusal(other)
    post_norm = {**config, "model_type": "opt", "do_layer_norm_before": False}
    (other / "config.json").write_text(json.dumps(post_norm))
    assert "no norm stands before this model's layers" in refusal(other)
    save_hf(build(LlamaConfig(64, 32, 64, 1, 2, max_position_embeddings=48)), tmp_path / "bare")
    assert "needs the model's tokenizer" in refusal(tmp_path / "bare")
    assert "no such file or folder" in refused(
        "ptq", hf, "--calibration", tmp_path / "gone.txt", "--out", tmp_path / "out"
    )
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.unfinished").exists()


@pytest.mark.slow
def test_a_page_shows_the_bells_before_and_after(bellbox_process, tmp_path, hf, text):
    made = bellbox_process("ptq", hf, "--calibration", text, "--out", "two", "--samples", 4, "--context", 24)
    assert made.returncode == 0, made.stderr
    done = bellbox_process("report", "two")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "two" / "report.html").read_text()
    assert page.count("<svg") == 2
    assert "Single bell, double bell?" in page
    assert "behind input_layernorm, 1 blocks" in page
    assert "after LTDB" in page
    assert "Relative error of the outputs" in page
    assert "bits a weight" in page
    assert "in its block of 128 columns" in page
    ignored = bellbox_process("report", "two", "--prompt", "Once")
    assert ignored.returncode == 2
    assert "--prompt does not apply to a binarized model; leave it out" in ignored.stderr
