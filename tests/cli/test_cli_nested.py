"""A model of several widths from the command line; two commands as processes of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bellbox.cli.main import main
from bellbox.formats import packed as io
from bellbox.runs.config import BatchSection, DataSection, ModelSection, QuantizationSection
from bellbox.runs.metrics import read_records
from bellbox.training import TrainConfig, train

CONTEXT = 32


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> Path:
    """A folder with a run of four widths, `run`, and what was packed of it, `packed`."""
    folder = tmp_path_factory.mktemp("nested")
    size = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    config = TrainConfig(
        folder=str(folder / "run"),
        model=ModelSection("tiny", {**size, "max_position_embeddings": 2 * CONTEXT}),
        data=DataSection(source=str(tokens), context=CONTEXT),
        quantization=QuantizationSection(nested=[4, 3, 2, 1], nested_schedule="sum"),
        batch=BatchSection(tokens=4 * CONTEXT, micro_sequences=4),
        steps=4,
        precision="fp32",
        device="cpu",
        eval_every=4,
        tensorboard=False,
    )
    train(config, show=False)
    main(["convert", str(folder / "run"), "--out", str(folder / "packed"), "--no-check"])
    return folder


def test_convert_compares_each_width_with_the_trained_one(
    nested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["convert", str(nested / "run"), "--out", str(tmp_path / "two"), "--bits", "2"])
    said = capsys.readouterr().out
    assert said.count("=> the same function") == 2
    assert f"at 1 bits, {io.file_bytes(tmp_path / 'two', 1):,} bytes read" in said
    names = sorted(path.name for path in (tmp_path / "two").glob("bits-*"))
    assert names == ["bits-1.safetensors", "bits-2.safetensors"]
    for name in names:
        assert (tmp_path / "two" / name).read_bytes() == (nested / "packed" / name).read_bytes()


def test_every_width_is_evaluated_as_it_was_trained(
    nested: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = read_records(nested / "run" / "metrics.jsonl")[-1]["widths"]
    for model, bits in (("packed", 2), ("packed", 4), ("run", 2)):
        capsys.readouterr()
        flags = {"--bits": str(bits), "--context": str(CONTEXT), "--json": "-", "--data": str(tokens)}
        main(["eval", str(nested / model), *(word for pair in flags.items() for word in pair)])
        found = json.loads(capsys.readouterr().out)
        assert found["loss"] == pytest.approx(trained[str(bits)]["loss"], rel=1e-5)
        assert (found["bits"], found["widths"]) == (bits, [4, 3, 2, 1])
        if model == "packed":
            assert found["file_bytes"] == io.file_bytes(nested / "packed", bits)


def test_text_is_written_at_a_width(
    nested: Path, bellbox_process: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--prompt", "Buck", "--seed", "1", "--max-new-tokens", "12", "--bits"]
    done = bellbox_process("generate", nested / "packed", *command, "1")
    assert done.returncode == 0, done.stderr
    texts = []
    for model, bits in (("packed", "1"), ("run", "1"), ("packed", "4"), ("run", "4")):
        capsys.readouterr()
        main(["generate", str(nested / model), *command, bits])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == done.stdout
    assert texts[2] == texts[3]


def test_a_wrong_width_gets_one_line(
    nested: Path, run: Path, packed: Path, hf: Path, bellbox_process: Callable, refused: Callable[..., str]
) -> None:
    done = bellbox_process("generate", nested / "packed", "--prompt", "Buck", "--bits", "5")
    assert done.returncode == 2
    assert done.stderr == (
        f"bellbox: error: {nested / 'packed'}: no width of 5 bits in this folder; it can be read at 4, 3, 2, 1 bits\n"
    )
    for model, said in (
        (nested / "run", "the model has no width of 5 bits; it has 4, 3, 2, 1"),
        (packed, "no width of 5 bits in this folder; its layers have one width"),
        (run, "the model has one width"),
        (hf, "--bits is for models of several widths"),
    ):
        assert said in refused("generate", model, "--prompt", "Buck", "--bits", "5")


def test_bad_widths_of_a_configuration_get_one_line(tmp_path: Path, refused: Callable[..., str]) -> None:
    said = refused("train", "--folder", tmp_path / "no", "--quantization.nested", "1", "4")
    assert said == (
        "bellbox: error: quantization.nested: nested widths 1, 4: must be at least two, the widest first, such as "
        "4, 3, 2, 1\n"
    )
    assert not (tmp_path / "no").exists()
