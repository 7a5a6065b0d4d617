from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bellbox.cli.eval import evaluate
from bellbox.cli.main import main
from bellbox.cli.report import collect
from bellbox.data.prepare import prepare
from bellbox.errors import BellboxError
from bellbox.formats.auto import open_model
from bellbox.report import render
from bellbox.runs.metrics import read_records


def test_it_prints_protocol_numbers_and_entropy(run: Path, bellbox_process: Callable) -> None:
    done = bellbox_process("eval", run)
    assert done.returncode == 0, done.stderr
    for text in (
        "at step 30",
        "scored once each, context 32, stride 32",
        "loss, nats per token",
        "perplexity",
        "bits per byte",
        "unigram floor",
        "entropy of the codes, bits per code (at most 2)",
        "model.layers.0.mlp.down_proj",
        "lowest",
    ):
        assert text in done.stdout
    last = read_records(run / "metrics.jsonl")[-1]
    assert f"{last['loss']:.4f}" in done.stdout  # what the run itself measured at its end
    assert f"{last['bits_per_byte']:.4f}" in done.stdout


def test_json_on_standard_output_is_all_there_is_on_it(
    packed: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["eval", str(packed), "--data", str(tokens), "--context", "32", "--json", "-"])
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "packed"
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["tokens"] > 1000
    assert (found["context"], found["stride"]) == (32, 32)
    assert 0 < found["weight_entropy"]["min"] <= found["weight_entropy"]["mean"] <= 2
    assert found["weight_entropy"]["limit"] == 2
    assert len(found["weight_entropy"]["layers"]) == 7
    assert len(found["activation_entropy"]["layers"]) == 4  # q, k, v share one; gate, up another
    assert found["unigram"]["bits_per_byte"] > 0


def test_a_coded_cache_is_scored_with_its_name(packed: Path, tokens: Path, hf: Path) -> None:
    losses = {}
    for precision in ("fp32", "int8", "int4"):
        found = evaluate(open_model(packed), str(tokens), context=32, kv_cache=precision).result
        losses[precision] = found.loss
        assert found.protocol.endswith("KV cache " + precision) == (precision != "fp32")
    assert 0 < abs(losses["int8"] - losses["fp32"]) < 0.01
    assert 0 < abs(losses["int4"] - losses["fp32"]) < 0.1
    stranger = torch.nn.Linear(1, 1)
    opened = open_model(hf)
    stranger.config = opened.model.config
    plain = dataclasses.replace(opened, model=stranger)
    with pytest.raises(BellboxError, match="is no LLaMA or GPT of Bellbox's own"):
        evaluate(plain, str(tokens), context=32, kv_cache="int8")


def test_packed_and_trained_model_get_the_same_numbers(run: Path, packed: Path, tokens: Path) -> None:
    trained = evaluate(open_model(run))
    small = evaluate(open_model(packed), str(tokens), context=32)
    assert small.result.loss == trained.result.loss
    assert small.codes == trained.codes
    assert trained.codes is not None
    recorded = read_records(run / "metrics.jsonl")[-1]
    assert trained.codes.weight == recorded["weight_entropy"]["layers"]
    assert trained.codes.activation == recorded["activation_entropy"]["layers"]


def test_a_full_precision_model_has_no_entropy(hf: Path, tokens: Path, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "result.json"
    main(
        ["eval", str(hf), "--data", str(tokens), "--max-tokens", "200", "--stride", "16", "--json", str(file)]
    )
    found = json.loads(file.read_text())
    assert found["weight_entropy"] is None
    assert found["unigram"] is None  # a floor over the whole split would not compare with a part of it
    assert (found["tokens"], found["context"], found["stride"]) == (200, 48, 16)
    assert found["loss"] == pytest.approx(math.log(320), rel=0.05)


def test_a_validation_split_without_bytes_to_score_has_no_bits_per_byte(
    hf: Path, run: Path, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.txt").write_text("the bell rings " * 50)
    (tmp_path / "valid.txt").write_text("a")
    tiny = tmp_path / "tiny"
    prepare([tmp_path / "train.txt"], tiny, tokenizer=tokens, valid=[tmp_path / "valid.txt"])
    main(["eval", str(hf), "--data", str(tiny)])
    assert re.search(r"bits per byte +- +-", capsys.readouterr().out)
    moved = shutil.copytree(run, tmp_path / "moved")
    config = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(config.replace(str(tokens), str(tiny)))
    content = collect(open_model(moved))
    assert content.unigram_loss is not None
    assert content.unigram_bits_per_byte is None
    assert "unigram model" in render(content)


def test_what_cannot_be_evaluated_is_refused(
    run: Path, hf: Path, other_tokens: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    for message, arguments in (
        ("another tokenizer", [run, "--data", other_tokens]),
        ("no such folder", [run, "--data", tmp_path / "missing"]),
        ("no split 'test'", [run, "--split", "test"]),
        ("takes at most 64 tokens", [run, "--context", "65"]),
        ("--kv-cache", [run, "--kv-cache", "fp8"]),
        ("stride 33", [run, "--stride", "33"]),
        ("at least 1", [run, "--max-tokens", "0"]),
        ("no checkpoint of step 5", [run, "--checkpoint", "5"]),
        ("is a folder", [run, "--json", tmp_path]),
        ("cannot be written", [run, "--json", "/proc/none/result.json"]),
    ):
        assert message in refused("eval", *arguments)
    assert not list(tmp_path.iterdir())
