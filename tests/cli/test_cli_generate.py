from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bellbox.cli.generate import continue_text
from bellbox.cli.main import main
from bellbox.formats.auto import open_model


def test_text_goes_to_standard_output_and_speed_to_standard_error(
    packed: Path, bellbox_process: Callable
) -> None:
    arguments = ["generate", packed, "--prompt", "The dog", "--max-new-tokens", "20", "--seed", "3"]
    done = bellbox_process(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The dog")
    assert len(done.stdout) > len("The dog") + 10
    assert re.search(
        r"loaded in [\d.]+ s, prefill \d+ tokens at [\d,]+ tokens/s, decode 20 tokens at [\d,]+ tokens/s, "
        r"peak memory [\d,]+ MiB",
        done.stderr,
    )


def test_the_packed_model_writes_what_the_trained_one_writes(
    run: Path, packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for model in (run, packed):
        for seed in ("1", "2"):
            main(
                [
                    "generate",
                    str(model),
                    "--prompt",
                    "Buck",
                    "--seed",
                    seed,
                    "--top-k",
                    "50",
                    "--top-p",
                    "0.9",
                ]
            )
            texts.append(capsys.readouterr().out)
    assert texts[:2] == texts[2:]
    assert texts[0] != texts[1]


def test_a_stop_token_ends_the_text(packed: Path) -> None:
    opened = open_model(packed)
    free = continue_text(opened, "Buck", max_new_tokens=30, temperature=0)
    assert "".join(free) == free.text
    token = opened.load_tokenizer().decode([free.new_ids[9]])
    place = free.new_ids.index(free.new_ids[9])
    stopped = continue_text(opened, "Buck", max_new_tokens=30, temperature=0, stop=token)
    list(stopped)
    assert stopped.new_ids == free.new_ids[:place]


def test_new_tokens_fill_the_context_where_no_number_is_given(hf: Path) -> None:
    stream = continue_text(open_model(hf), "He was", temperature=1.0, seed=0)
    list(stream)
    assert len(stream.prompt_ids) + len(stream.new_ids) <= 48
    assert len(stream.new_ids) > 30


def test_a_tokenizer_that_cuts_or_pads_does_neither_to_the_prompt(hf: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    shutil.copytree(hf, tmp_path / "hf")
    path = str(tmp_path / "hf" / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=12)
    tokenizer.save(path)
    for prompt in ("He was", "He was not there when they came back to the house"):
        expected = continue_text(open_model(hf), prompt, max_new_tokens=1).prompt_ids
        assert continue_text(open_model(tmp_path / "hf"), prompt, max_new_tokens=1).prompt_ids == expected


def test_what_cannot_be_generated_is_refused(
    packed: Path, tensor_run: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    long = "It was a bright cold day. " * 40
    for message, arguments in (
        ("shorten it", [packed, "--prompt", long]),
        ("new tokens", [packed, "--prompt", "x", "--max-new-tokens", "500"]),
        ("the prompt is empty", [packed, "--prompt", ""]),
        ("granularity='tensor'", [tensor_run, "--prompt", "x"]),
        ("temperature is -1", [packed, "--prompt", "x", "--temperature", "-1"]),
        ("top_p is 2", [packed, "--prompt", "x", "--top-p", "2"]),
        ("it must be exactly one", [packed, "--prompt", "x", "--stop", "several words"]),
        ("only a run has checkpoints", [packed, "--prompt", "x", "--checkpoint", "best"]),
        ("seed is 18446744073709551616", [packed, "--prompt", "x", "--seed", 2**64]),
        ("--kv-cache", [packed, "--prompt", "x", "--kv-cache", "int3"]),
        ("is not text in UTF-8", [packed, "--prompt", "\udcff"]),
        ("File name too long", ["x" * 300, "--prompt", "x"]),
    ):
        assert message in refused("generate", *arguments)


def test_embeddings_of_a_packed_model_can_be_rounded(
    run: Path,
    packed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    refused: Callable[..., str],
) -> None:
    main(["convert", str(run), "--out", str(tmp_path / "small"), "--embeddings", "int8"])
    told = capsys.readouterr().out
    assert "embeddings and head are in int8" in told
    assert "codes that differ       0\n" in told
    texts = []
    for arguments in ([str(tmp_path / "small")], [str(packed), "--embeddings", "int8"]):
        main(["generate", *arguments, "--prompt", "The dog", "--seed", "3"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert "convert it first" in refused("generate", run, "--prompt", "x", "--embeddings", "int8")
