from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import bellbox
from bellbox.data.tokenizer import Tokenizer
from bellbox.errors import BellboxError
from bellbox.models import GPTConfig, LlamaConfig, build, load_hf, save_hf
from bellbox.nn.binarized_linear import round_activations
from bellbox.ptq import (
    BinarizedLinear,
    Job,
    Settings,
    binarize_folder,
    is_binarized,
    load,
    set_activation_bits,
    stored_size,
)
from bellbox.utils.files import checksum
from waiting import wait_for

TEXT = "The quick brown fox jumps over the lazy dog, and then some words follow, many of them twice. " * 40
SHAPE = {"max_position_embeddings": 48, "initializer_range": 0.2}


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """A text, and a LLaMA, a GPT-2 and an OPT-like model (a GPT with ReLU) with one tokenizer."""
    root = tmp_path_factory.mktemp("ptq")
    (root / "text.txt").write_text(TEXT)
    tokenizer = Tokenizer.train([TEXT], 300)
    size = tokenizer.vocab_size
    configs = {
        "llama": LlamaConfig(size, 40, 72, 4, 4, 2, tie_word_embeddings=True, **SHAPE),
        "gpt": GPTConfig(size, 40, 72, 2, 4, **SHAPE),
        "relu": GPTConfig(size, 40, 72, 2, 4, activation="relu", **SHAPE),
    }
    for name, config in configs.items():
        model = build(config, seed=1)
        for parameter in (p for p in model.parameters() if p.dim() == 1):
            torch.nn.init.normal_(parameter, mean=1.0 if parameter.mean() == 1 else 0.0, std=0.2)
        save_hf(model, root / name)
        tokenizer.save(root / name / "tokenizer.json")
    return {path.stem: path for path in root.iterdir()}


def job(places: dict[str, Path], out: Path, model: str = "llama", **settings) -> Job:
    return Job(places[model], out, places["text"], Settings(**settings), samples=6, context=32, batch=4)


IDS = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("model", ["llama", "gpt", "relu"])
@pytest.mark.parametrize("method", ["rtn", "billm", "dbellquant"])
def test_every_method_binarizes_every_architecture_and_the_folder_is_the_function(
    places, tmp_path, model, method
):
    record = binarize_folder(job(places, tmp_path / "out", model, method=method), show=False)
    first, second = load(tmp_path / "out"), bellbox.load(tmp_path / "out")
    layers = [layer for layer in first.modules() if isinstance(layer, BinarizedLinear)]
    assert len(layers) == sum(len(block["layers"]) for block in record["blocks"])
    assert not any(isinstance(m, torch.nn.Linear) and "layers" in n for n, m in first.named_modules())
    with torch.no_grad():
        logits = first(IDS)
        assert torch.equal(logits, second(IDS))
        assert float((logits - load_hf(places[model])(IDS)).abs().max()) > 1e-3
    assert logits.isfinite().all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_what_is_loaded_is_what_was_fitted_bit_for_bit(places, tmp_path, monkeypatch):
    """The hidden states behind the last block, as the driver saw them, against those of the model from the disk."""
    from bellbox.ptq import driver

    kept = {}
    save = driver.write_tensors
    monkeypatch.setattr(
        driver,
        "write_tensors",
        lambda path, tensors, *rest: (kept.update(tensors), save(path, tensors, *rest)),
    )
    binarize_folder(job(places, tmp_path / "out"), show=False)
    model = load(tmp_path / "out")
    seen = []
    model.model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    tokens = driver.calibration_tokens(Tokenizer.load(places["llama"]), places["text"], 6, 32)
    with torch.no_grad():
        for part in tokens.split(4):
            model(part)
    assert torch.equal(torch.cat(seen), kept["hidden"])


def test_true_bits_count_planes_bitmaps_and_scales(places, tmp_path):
    binarize_folder(job(places, tmp_path / "a", method="billm"), show=False)
    binarize_folder(job(places, tmp_path / "b", method="rtn"), show=False)
    # 40 inputs, one block: 5 bytes of signs, 5 of bits, 7 fp16 a row, 5 bytes of salient columns a layer.
    a, b = (stored_size(load(tmp_path / name)) for name in "ab")
    rows, wide = 4 * (40 + 20 + 20 + 40 + 72 + 72), 4 * 40
    bits = 8 * (rows * (5 + 5 + 14) + 4 * 6 * 5 + wide * (9 + 9 + 14) + 4 * 9)
    assert (a.weights, a.bits) == (rows * 40 + wide * 72, bits)
    assert b.bits == 8 * (rows * (5 + 4) + wide * (9 + 4))
    on_disk = sum(path.stat().st_size for path in (tmp_path / "a").glob("*.safetensors"))
    assert 0 <= on_disk - a.bits // 8 - a.other_bytes < 12_000  # headers


def test_activations_are_rounded_token_by_token(places, tmp_path):
    x = torch.tensor([[1.1, -2.0, 0.3], [0.0, 0.0, 0.0], [100.0, 1.0, -100.0]])
    rounded = round_activations(x, 4)  # max|x| is 7
    torch.testing.assert_close(rounded, torch.tensor([[8 / 7, -2.0, 2 / 7], [0, 0, 0], [100.0, 0, -100.0]]))
    assert torch.equal(round_activations(x, 16), x)
    binarize_folder(job(places, tmp_path / "out", activation_bits=6), show=False)
    model = load(tmp_path / "out")
    assert {m.activation_bits for m in model.modules() if isinstance(m, BinarizedLinear)} == {6}
    with torch.no_grad():
        six = model(IDS)
        set_activation_bits(model, 16)
        whole = model(IDS)
    assert 1e-6 < float((six - whole).abs().max()) < float(whole.abs().max())


def test_variants_powers_and_exponents_differ(places, tmp_path):
    values = []
    for number, (variant, power, exponent) in enumerate(
        (
            ("released", 1, None),
            ("released", 2, None),
            ("clean", 1, None),
            ("clean", 2, None),
            ("clean", 2, 0.85),
        )
    ):
        how = {"variant": variant, "power": power, "exponent": exponent}
        binarize_folder(job(places, tmp_path / str(number), "relu", **how), show=False)
        values.append(load(tmp_path / str(number))(IDS))
    assert all(not torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ({"power": 3}, "power is 3, must be 1 or 2"),
        ({"exponent": 1.5}, "exponent is 1.5, must be from 0 to 1"),
        ({"block": 12}, "block is 12, must be a multiple of 8, from 8 to 65536"),
    ],
)
def test_a_setting_out_of_range_is_one_line(setting, line):
    with pytest.raises(BellboxError, match=f"^{line}$"):
        Settings(**setting).check()


COMMAND = """
import sys, time, torch
torch.set_num_threads(1)
from pathlib import Path
from bellbox.ptq import Job, Settings, binarize_folder, driver
slow = driver.filled_block
def wait(*a):
    time.sleep(float(sys.argv[4]))
    return slow(*a)
driver.filled_block = wait
binarize_folder(Job(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), Settings(), 6, 32, 4))
"""


@pytest.mark.slow
def test_killed_after_a_block_it_goes_on_there_and_ends_with_the_same_bytes(places, tmp_path):
    arguments = [str(places["llama"]), str(tmp_path / "out"), str(places["text"])]
    run = [sys.executable, "-c", COMMAND, *arguments]
    process = subprocess.Popen([*run, "1"], stdout=subprocess.PIPE, text=True)
    work = tmp_path / "out.unfinished"

    def one_done() -> bool:
        assert process.poll() is None
        return (work / "block-0001.json").is_file()

    wait_for(one_done, "a block", process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    with pytest.raises(BellboxError, match=r"cannot be read"):
        load(tmp_path / "out")
    again = subprocess.run([*run, "0"], capture_output=True, text=True, check=True)
    assert "going on" in again.stdout
    assert "block   1/4" not in again.stdout
    assert "block   4/4" in again.stdout
    binarize_folder(job(places, tmp_path / "whole"), show=False)
    for path in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name
    assert not work.exists()


def test_an_unfinished_folder_of_another_job_is_not_gone_on_with(places, tmp_path):
    work = tmp_path / "out.unfinished"
    work.mkdir()
    from bellbox.ptq import driver

    tokenizer = Tokenizer.load(places["llama"])
    tokens = driver.calibration_tokens(tokenizer, places["text"], 6, 32)
    begun = driver._described(job(places, tmp_path / "out", method="billm"), 32, tokens, tokenizer)
    (work / "settings.json").write_text(json.dumps(begun))
    save_file({"hidden": torch.zeros(6, 32, 40)}, work / "hidden.safetensors", {"done": "1"})
    with pytest.raises(BellboxError, match=r"begun with another method \('billm', now 'dbellquant'\)"):
        binarize_folder(job(places, tmp_path / "out"), show=False)


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("block-0000.safetensors", -9),
        ("rest.safetensors", -9),
        ("block-0000.json", 20),
        ("hidden.safetensors", -9),
    ],
)
def test_an_unfinished_block_that_was_changed_is_refused_by_name(places, tmp_path, monkeypatch, name, at):
    from bellbox.ptq import driver

    begun, run = job(places, tmp_path / "out", method="rtn"), driver._Run.block
    with monkeypatch.context() as stopped:
        stopped.setattr(
            driver._Run, "block", lambda self, number, bar: 1 / 0 if number else run(self, number, bar)
        )
        with pytest.raises(ZeroDivisionError):
            binarize_folder(begun, show=False)
    file = tmp_path / "out.unfinished" / name
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)
    with pytest.raises(BellboxError, match=rf"{name}: was changed since it was written; delete"):
        binarize_folder(begun, show=False)
    content[at] ^= 1
    file.write_bytes(content)
    assert len(binarize_folder(begun, show=False)["blocks"]) == 4


def test_a_resume_with_other_weights_is_refused_by_name(places, tmp_path, monkeypatch):
    from bellbox.ptq import driver

    model = tmp_path / "model"
    shutil.copytree(places["llama"], model)
    begun = Job(
        model, tmp_path / "out", places["text"], Settings(method="rtn"), samples=6, context=32, batch=4
    )
    run = driver._Run.block
    monkeypatch.setattr(
        driver._Run, "block", lambda self, number, bar: run(self, number, bar) if not number else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        binarize_folder(begun, show=False)
    weights = model / "model.safetensors"
    about = weights.stat()
    os.utime(weights, ns=(about.st_atime_ns, about.st_mtime_ns + 1))
    with pytest.raises(BellboxError, match=r"begun with another model\.safetensors \(\[\d+, \d+\], now"):
        binarize_folder(begun, show=False)


def test_refused_at_the_very_end_only_the_swap_is_redone(places, tmp_path, monkeypatch):
    from bellbox.ptq import driver

    out = tmp_path / "out"

    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(driver, "put_in_place", refuse)
        with pytest.raises(BellboxError, match="out: cannot be written \\(No space left on device"):
            binarize_folder(job(places, out, method="rtn"), show=False)
    with monkeypatch.context() as patch:
        patch.setattr(driver._Run, "block", None)  # no block is done again
        binarize_folder(job(places, out, method="rtn"), show=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    names = {path.name for path in out.iterdir()}
    assert names == {"ptq.json", *json.loads((out / "config.json").read_text())["files"], "config.json"}
    load(out)


def test_an_out_that_cannot_be_made_is_refused_in_one_line(places):
    with pytest.raises(BellboxError, match=r"^/proc/nope/out\.unfinished: cannot be written \(.*\)$"):
        binarize_folder(job(places, Path("/proc/nope/out")), show=False)


def test_an_earlier_model_is_replaced_and_anything_else_is_not(places, tmp_path):
    binarize_folder(job(places, tmp_path / "out", method="rtn"), show=False)
    before = load(tmp_path / "out")(IDS)
    binarize_folder(job(places, tmp_path / "out", method="billm"), show=False)
    assert not torch.equal(load(tmp_path / "out")(IDS), before)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(BellboxError, match="holds something else"):
        binarize_folder(job(places, tmp_path / "mine"), show=False)
    with pytest.raises(BellboxError, match="holds something else"):
        binarize_folder(job(places, places["gpt"]), show=False)
    assert not is_binarized(places["gpt"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda root: (root / "block-0001.safetensors").unlink(), "cannot be read"),
        (lambda root: os.truncate(root / "rest.safetensors", 100), "truncated"),
        (lambda root: flip(root / "block-0000.safetensors"), "damaged, its checksum"),
        (lambda root: edit(root, version=2), "version 2"),
        (lambda root: edit(root, keep=True, model={}), "damaged, its checksum"),
        (lambda root: edit(root, model={"architecture": "llama", "hidden_size": -1}), "hidden_size is -1"),
        (lambda root: edit(root, model={"head_dim": 2**24}), "largest table of rotary positions"),
        (lambda root: edit(root, quantization={"method": "magic"}), "field 'quantization.method'"),
        (lambda root: retype(root, "scales", torch.float32), r"q_proj\.scales' is torch.float32"),
        (lambda root: retype(root, "scales", None), r"scales' is missing"),
        (lambda root: retype(root, "scales", torch.float16, float("nan")), "NaN or infinity"),
    ],
)
def test_a_damaged_folder_is_refused(places, tmp_path, change, says):
    binarize_folder(job(places, tmp_path / "out", method="billm"), show=False)
    change(tmp_path / "out")
    with pytest.raises(BellboxError, match=says) as caught:
        load(tmp_path / "out")
    assert "\n" not in str(caught.value)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def edit(root: Path, keep: bool = False, **fields) -> None:
    path = root / "config.json"
    config = json.loads(path.read_text())
    for key, value in fields.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
        if value == {}:
            config[key] = {}
    if not keep:
        config["sha256"] = checksum(config)
    path.write_text(json.dumps(config))


def retype(root: Path, leaf: str, dtype: torch.dtype | None, fill: float | None = None) -> None:
    """Spoil one tensor, with checksums that fit."""
    from bellbox.utils.files import describe_file

    path = root / "block-0000.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(f"q_proj.{leaf}"))
    if dtype is None:
        del tensors[name]
    else:
        tensors[name] = tensors[name].to(dtype)
        if fill is not None:
            tensors[name][0] = fill
    save_file(tensors, path)
    files = json.loads((root / "config.json").read_text())["files"]
    edit(root, files={**files, path.name: describe_file(path)})
