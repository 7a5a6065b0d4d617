"""Baselines on one checkpoint: the command in a process, and its numbers against computations of their own."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import bellbox as bb
from bellbox.cli.main import main
from bellbox.comparison.baselines import Job, Line, Lines, baseline_of, bitsandbytes, registry, run_baselines
from bellbox.comparison.baselines import table as tables
from bellbox.comparison.baselines.job import prepare_job
from bellbox.comparison.baselines.measure import left_whole, quality, speed
from bellbox.comparison.baselines.own import FULL_BELLBOX
from bellbox.comparison.baselines.widen import widened
from bellbox.data.tokenizer import Tokenizer
from bellbox.errors import BellboxError
from bellbox.models import Llama, LlamaConfig, load_hf, save_hf
from bellbox.nn.coded import CodedLayer
from bellbox.nn.weight_only import WeightOnlyLinear

WORDS = "the cat sat on the mat and the dog on the log while a hen ran from a fox to its box . "
CONFIG = LlamaConfig(
    vocab_size=270, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.2,
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tiny`, a checkpoint with its tokenizer, and `text.txt`."""
    root = tmp_path_factory.mktemp("baselines")
    (root / "text.txt").write_text(WORDS * 60, encoding="utf-8")
    torch.manual_seed(0)
    save_hf(Llama(CONFIG), root / "tiny")
    Tokenizer.train([WORDS], 270).save(root / "tiny" / "tokenizer.json")
    return root


def flags(place: Path, out: Path) -> list[str]:
    text = str(place / "text.txt")
    numbers = [
        "--samples",
        "2",
        "--context",
        "32",
        "--tokens",
        "200",
        "--group",
        "32",
        "--seconds",
        "0.05",
        "--dtype",
        "float32",
    ]
    return [str(place / "tiny"), "--calibration", text, "--text", text, "--out", str(out), *numbers]


def job_of(place: Path, out: Path) -> Job:
    text = str(place / "text.txt")
    return Job(
        str(place / "tiny"),
        str(out),
        text,
        text,
        dtype="float32",
        samples=2,
        context=32,
        tokens=200,
        group=32,
        seconds=0.05,
    )


def command(*words: str) -> str:
    code = "from bellbox.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "compare", "--baselines", *words],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def loss_of(model: nn.Module, ids: Tensor, context: int) -> float:
    """Mean negative log likelihood in float64, window by window, one share of the text after the other."""
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, context):
        window = ids[start : start + context + 1]
        with torch.no_grad():
            shares = model(window[None, :-1])[0].double().log_softmax(-1)
        total -= float(shares[torch.arange(len(window) - 1), window[1:]].sum())
        count += len(window) - 1
    return total / count


def decoded(model: nn.Module) -> Llama:
    """A plain model of the numbers that a model's codes stand for."""
    plain = Llama(CONFIG)
    state = {name: value.float() for name, value in model.state_dict().items() if name in plain.state_dict()}
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, CodedLayer)}
    assert len(layers) == 14
    state |= {f"{name}.weight": layer.decoded_weight() for name, layer in layers.items()}
    plain.load_state_dict(state, strict=False)
    return plain.eval()


@pytest.mark.slow
def test_a_row_runs_from_the_command_to_the_table_and_is_not_run_twice(place: Path, tmp_path: Path) -> None:
    said = command(*flags(place, tmp_path), "--rows", "rtn", "--only", "quality")
    assert "rtn: perplexity" in said
    (first,) = Lines(tmp_path).all
    assert (first.task, first.row, first.package) == ("quality", "rtn", "bellbox")
    assert first.package_version == bb.__version__
    # Bytes: what the system says of the two files that the format has.
    (folder,) = (each for each in (tmp_path / "models" / "tiny" / "rows").iterdir() if each.is_dir())
    files = ("config.json", "model.safetensors")
    assert first.found["bytes"] == sum(os.stat(folder / name).st_size for name in files)
    weights = sum(
        parameter.numel() for parameter in Llama(CONFIG).parameters()
    )  # which gives a tied head once
    assert first.found["bits_per_weight"] == 8 * first.found["bytes"] / weights
    # Perplexity: that of the decoded weights in a plain model, by a loop over log-softmax.
    ids = torch.tensor(Tokenizer.load(place / "tiny").encode(WORDS * 60)[:201])
    model = bb.load(folder)
    assert any(isinstance(layer, WeightOnlyLinear) for layer in model.modules())
    expected = loss_of(decoded(model), ids, 32)
    assert first.found["loss"] == pytest.approx(expected, rel=1e-5)
    assert first.found["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)

    before = (tmp_path / "baselines.jsonl").read_bytes()
    assert run_baselines(job_of(place, tmp_path), ["rtn"], tasks=["quality"], tell=print) == []
    assert (tmp_path / "baselines.jsonl").read_bytes() == before
    drawn = (tmp_path / "baselines.md").read_text()
    assert f"{first.found['bytes']:,}" in drawn
    assert f"{first.found['bytes']:,}" in (tmp_path / "baselines.html").read_text()
    (tmp_path / "baselines.md").unlink()
    main(["compare", "--baselines", str(tmp_path), "--tables"])
    assert (tmp_path / "baselines.md").read_text() == drawn


@pytest.mark.parametrize("row", ["nf4", "billm"])
def test_perplexity_of_our_own_rows_is_that_of_the_decoded_weights(
    place: Path, tmp_path: Path, row: str
) -> None:
    job = job_of(place, tmp_path)
    prepare_job(job)
    job = dataclasses.replace(job, group=128)  # which divides down_proj's inputs and no others
    made = tmp_path / "made"
    made.mkdir()
    baseline_of(row, job).make(job, made)
    found = quality(baseline_of(row, job), made, job)
    model = bb.load(made) if row == "nf4" else bb.ptq.load(made)
    if row == "nf4":
        expected = decoded(model)
    else:
        expected = model
        for layer in [each for each in model.modules() if hasattr(each, "scales")]:
            assert layer.weight().unique().numel() > 4
    assert found["loss"] == pytest.approx(loss_of(expected, job.tensors()["text"], 32), rel=1e-5)
    assert found["left"] == []
    full = quality(FULL_BELLBOX, job.checkpoint, job)
    assert len(full["left"]) == 14
    assert found["bytes"] < full["bytes"]


def test_full_precision_is_the_checkpoint_rounded_as_asked(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    job = dataclasses.replace(job_of(place, tmp_path), dtype="bfloat16")
    prepare_job(job)
    rounded = load_hf(place / "tiny").to(torch.bfloat16).float()
    expected = loss_of(rounded, job.tensors()["text"], 32)
    for name in ("full", "full-bellbox"):
        assert quality(baseline_of(name, job), job.checkpoint, job)["loss"] == pytest.approx(
            expected, rel=1e-5
        )
    assert expected != pytest.approx(loss_of(load_hf(place / "tiny"), job.tensors()["text"], 32), rel=1e-6)


def test_speed_is_taken_in_turns_with_full_precision_and_stands_in_the_table(
    place: Path, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    job = job_of(place, tmp_path)
    prepare_job(job)
    found = speed(FULL_BELLBOX, job.checkpoint, job)
    assert found["times_full"] == pytest.approx(found["tokens_per_second"] / found["full_tokens_per_second"])
    for rate, (low, high) in (
        (found["tokens_per_second"], found["quartiles"]),
        (found["full_tokens_per_second"], found["full_quartiles"]),
    ):
        assert 0 < low <= rate <= high
    alone = speed(baseline_of("full", job), job.checkpoint, job)
    assert alone["times_full"] == 1
    line = Line(
        "tiny", "full-bellbox", "ours", "speed", "k", None, "bellbox", "1", dataclasses.asdict(job), found=found,
        machine={"cpu": "a cpu", "cpu_count": 2, "torch": "2"},
    )  # fmt: skip
    (table,) = tables.tables_of([line])
    low, high = found["quartiles"]
    assert tables.cells(table)[0][-3:] == [
        f"{found['tokens_per_second']:.1f}", f"{low:.1f} to {high:.1f}", f"{found['times_full']:.2f}",
    ]  # fmt: skip
    assert any(f"load of the machine up to {found['load']:.1f}" in note for note in tables.notes(table))


def test_a_package_that_is_not_here_is_a_row_that_says_so(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = dataclasses.replace(
        registry.BASELINES["hqq"], module="no_such_package", package="no-such-package"
    )
    monkeypatch.setitem(registry.BASELINES, "hqq", absent)
    job = job_of(place, tmp_path)
    (line,) = run_baselines(job, ["hqq"], tasks=["quality"])
    way = "no_such_package is not installed; install it with: pip install 'bellbox[baselines]'"
    assert (line.skipped, line.error, line.found) == (way, None, {})
    (again,) = run_baselines(job, ["hqq"], tasks=["quality"])  # it may have been installed
    assert again == line
    (table,) = tables.tables_of(Lines(tmp_path).all)
    assert tables.cells(table)[0][:4] == ["HQQ", "no-such-package", "4", "skipped"]
    assert f"HQQ (no-such-package): skipped: {way}." in tables.notes(table)


@pytest.mark.parametrize("name", ["gptq", "autoround", "hqq", "bitsandbytes", "torchao"])
def test_a_package_that_is_here_makes_and_opens_its_model(place: Path, tmp_path: Path, name: str) -> None:
    job = dataclasses.replace(job_of(place, tmp_path), dtype="bfloat16", iterations=2)
    prepare_job(job)
    reason = baseline_of(name, job).absent()
    if reason is not None:
        pytest.skip(reason)
    full = quality(FULL_BELLBOX, job.checkpoint, job)
    (line,) = run_baselines(job, [name], tasks=["quality"])
    assert line.error is None, line.error
    if line.skipped is not None:
        pytest.skip(line.skipped)
    assert line.found["loss"] != pytest.approx(full["loss"], rel=1e-6)
    assert line.found["loss"] == pytest.approx(full["loss"], rel=0.1)
    assert line.found["left"] == []
    assert line.found["bytes"] < full["bytes"]


def test_what_cannot_be_compared_is_refused_in_a_line(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantized = tmp_path / "two-bit"
    bb.save(
        bb.convert(bb.prepare(load_hf(place / "tiny"), bb.Recipe.of("rtn", 2, weight_only="float"))),
        quantized,
    )
    for arguments, message in (
        ([str(place / "tiny")], "--out is missing"),
        ([*flags(place, tmp_path), "--rows", "gguf"], "no row 'gguf'; there are: full, full-bellbox, rtn"),
        ([*flags(place, tmp_path), "--tokens", "99999999", "--rows", "rtn"], "is given twice"),
        ([*flags(place, tmp_path), "--threads", "0"], "--threads is 0"),
        ([*flags(place, tmp_path), "--iterations", "0"], "--iterations is 0"),
        (
            [*flags(place, tmp_path), "--packed", str(place / "tiny")],
            "--packed takes packed or binarized models",
        ),
        ([*flags(place, tmp_path), "--packed", str(quantized)], "has no tokenizer or another one"),
        ([str(quantized), *flags(place, tmp_path)[1:]], "the rows start from a checkpoint in full precision"),
        ([str(tmp_path), "--tables"], "holds no results yet"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["compare", "--baselines", *arguments])
        error = capsys.readouterr().err
        assert caught.value.code == 2
        assert error.startswith("bellbox: error: ")
        assert message in error
        assert error.count("\n") == 1


def test_a_packed_model_of_the_user_is_a_row(place: Path, tmp_path: Path) -> None:
    packed = tmp_path / "two-bit"
    model = bb.prepare(load_hf(place / "tiny"), bb.Recipe.of("rtn", 2, weight_only="float"))
    bb.save(bb.convert(model), packed, tokenizer=place / "tiny" / "tokenizer.json")
    job = job_of(place, tmp_path / "out")
    prepare_job(job)
    row = baseline_of(f"packed:{packed}", job)
    assert (row.title, row.made) == ("two-bit", packed)
    found = quality(row, packed, job)
    assert found["bytes"] == sum(os.stat(packed / n).st_size for n in ("config.json", "model.safetensors"))
    expected = loss_of(decoded(bb.load(packed)), job.tensors()["text"], 32)
    assert found["loss"] == pytest.approx(expected, rel=1e-5)


def test_around_a_packages_layers_everything_computes_in_fp32() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)).to(torch.bfloat16)
    weights = [layer.weight.detach().clone() for layer in (model[0], model[1])]
    widened(model, lambda module: module is model[1], torch.bfloat16)
    assert [model[0].weight.dtype, model[1].weight.dtype, model[2].weight.dtype] == [
        torch.float32, torch.bfloat16, torch.float32,
    ]  # fmt: skip
    assert torch.equal(model[0].weight, weights[0].float())
    x = torch.randn(3, 8)
    hidden = nn.functional.linear(x, weights[0].float(), model[0].bias)
    inner = nn.functional.linear(hidden.bfloat16(), weights[1], model[1].bias).float()
    assert torch.equal(model(x), nn.functional.layer_norm(inner, (8,), model[2].weight, model[2].bias))


@pytest.mark.parametrize(
    ("outputs", "inputs", "fits"), [(64, 128, True), (172, 64, False), (64, 172, False), (96, 64, True)]
)
def test_layers_that_a_kernel_of_bitsandbytes_would_fail_on_are_known(
    outputs: int, inputs: int, fits: bool
) -> None:
    weight = SimpleNamespace(quant_state=SimpleNamespace(blocksize=64))
    layer = SimpleNamespace(out_features=outputs, in_features=inputs, weight=weight)
    assert bitsandbytes._fits_kernel(layer) is fits


def test_a_line_that_is_no_measurement_is_named(tmp_path: Path) -> None:
    whole = {
        "model": "m", "row": "rtn", "title": "t", "task": "quality", "key": "k", "bits": 4.0, "package": "bellbox",
        "package_version": "1", "settings": {},
    }  # fmt: skip
    file = tmp_path / "baselines.jsonl"
    for change, message in (
        ({"task": "size"}, "line 1 is not a measurement (task:"),
        ({"bits": "four"}, "line 1 is not a measurement (bits:"),
        ({"found": {"perplexity": 3.0}}, "line 1 is not a measurement (no number 'loss')"),
    ):
        file.write_text(json.dumps({**whole, **change}) + "\n")
        with pytest.raises(BellboxError) as caught:
            Lines(tmp_path)
        assert message in str(caught.value)
    file.write_text(json.dumps({**whole, "skipped": "why"}) + "\n" + '{"half')
    assert [line.skipped for line in Lines(tmp_path).all] == ["why"]


def test_layers_left_whole_are_counted_by_name(place: Path, tmp_path: Path) -> None:
    job = job_of(place, tmp_path)
    prepare_job(job)
    model = bb.prepare(
        load_hf(job.checkpoint), bb.Recipe.of("rtn", 4, weight_only="float", keep=("*.down_proj",))
    )
    left = left_whole(bb.convert(model), job)
    assert left == [f"model.layers.{n}.mlp.down_proj" for n in (0, 1)]
