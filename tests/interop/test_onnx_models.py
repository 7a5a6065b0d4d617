"""Whole models as ONNX: LLaMA and GPT with their cache, ResNet and ViT, in onnxruntime and nothing else."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import bellbox as bb
from bellbox.cli.main import main
from bellbox.data.tokenizer import Tokenizer
from bellbox.errors import BellboxError
from bellbox.interop.onnx import check, export_model
from bellbox.models import GPTConfig, LlamaConfig, ResNetConfig, ViTConfig, build, load_hf

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("BELLBOX_SHARED_DATA") or ROOT.parent / "shared" / "data")
STORIES = SHARED / "models" / "stories260K_hf"
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason=f"no {STORIES}")

# A process that has onnxruntime and tokenizers, and neither Bellbox nor torch.
ALONE = """
import sys
sys.meta_path.insert(0, type("No", (), {"find_spec": lambda *a: (_ for _ in ()).throw(ImportError(a[1]))
    if a[1].split(".")[0] in ("bellbox", "torch", "transformers", "onnx") else None})())
"""
TEXT = (
    "Once upon a time there was a little girl who lived near a big forest. One day she found a small red ball under "
    "a tree. She was very happy and ran home to show it to her mother. "
)


def alone(code: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", ALONE + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT / "examples")},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def low_bit(model: nn.Module, recipe: bb.Recipe, example: torch.Tensor, embeddings="fp32") -> nn.Module:
    prepared = bb.prepare(model, recipe)
    with torch.no_grad():
        prepared(example)
    return bb.convert(prepared.eval(), embeddings)


def varied(model: nn.Module) -> nn.Module:
    """Norms as after training: with equal weights and no biases, sums over a row are zero, on a threshold."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, 1.0, 0.2)
            nn.init.normal_(module.bias, 0.0, 0.2)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(STORIES / "tokenizer.model").backend


@pytest.fixture(scope="module")
def story(tokenizer, tmp_path_factory):
    """stories260K, its first block (all five with BELLBOX_ZOO=all), packed; a folder with it, and text of its kind."""
    torch.manual_seed(0)
    model = load_hf(STORIES)
    if os.environ.get("BELLBOX_ZOO") != "all":
        model.model.layers = model.model.layers[:1]
        model.config = dataclasses.replace(model.config, num_hidden_layers=1)
    ids = torch.tensor(tokenizer.encode(TEXT * 6).ids)[: 4 * 100].view(4, 100)
    packed = low_bit(model, bb.Recipe.of("quest", 4), ids, "int8")
    folder = tmp_path_factory.mktemp("story")
    tokenizer.save(str(folder / "tokenizer.json"))
    bb.save(packed, folder / "packed", tokenizer=folder / "tokenizer.json")
    return packed, folder, ids


def exported(folder: Path) -> Path:
    """What the command made of the story, at the first call or before."""
    if not (folder / "onnx").is_dir():
        main(
            [
                "export",
                "onnx",
                str(folder / "packed"),
                str(folder / "onnx"),
                "--exact-attention",
                "--no-check",
            ]
        )
    return folder / "onnx"


@needs_stories
def test_the_command_writes_the_function_and_proves_it(story, capsys, monkeypatch):
    packed, folder, ids = story
    out = folder / "onnx"
    main(["export", "onnx", str(folder / "packed"), str(out), "--exact-attention"])
    said = capsys.readouterr().out
    assert "differ for the same input  0 (and 0 within 1e-6" in said
    assert said.rstrip().endswith("=> the same function")
    assert sorted(each.name for each in out.iterdir()) == ["README.md", "model.onnx", "tokenizer.json"]
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"| the file | {(out / 'model.onnx').stat().st_size:,} bytes" in card
    assert f"| parameters | {sum(p.numel() for p in build(packed.config).parameters()):,}," in card
    assert "=> the same function" in card
    monkeypatch.setattr(packed, "exact_attention", True)
    found = check.agreement(packed, out / "model.onnx", [ids])
    assert (found.wrong, found.ties, found.unexplained) == (0, 0, 0)
    assert found.moved <= 2  # one in 10^6 integers of the head, on a half
    assert found.farthest <= 1e-6
    assert found.codes > 100_000 * len(packed.model.layers)
    assert found.difference <= 1e-4


LOGITS = """
import json, numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx")
ids, pieces = np.load(sys.argv[1] + "/ids.npy"), json.loads(sys.argv[2])
caches = session.get_inputs()[3:]
cache = {c.name: np.zeros((len(ids), c.shape[1], 0, c.shape[3]), np.float32) for c in caches}
found, start = [], 0
for length in pieces:
    end = start + length
    feeds = {"input_ids": ids[:, start:end], "attention_mask": np.ones((len(ids), end), np.int64),
        "position_ids": np.arange(start, end)[None].repeat(len(ids), 0), **cache}
    logits, *present = session.run(None, feeds)
    cache, start = dict(zip(cache, present)), end
    found.append(logits)
np.save(sys.argv[1] + "/logits.npy", np.concatenate(found, 1))
"""


@needs_stories
@pytest.mark.parametrize("pieces", [[60], [7, 1, 1, 30, 1, 20]])
def test_logits_of_real_text_in_a_process_of_onnxruntime_alone(story, pieces, monkeypatch):
    packed, folder, ids = story
    out = exported(folder)
    np.save(out / "ids.npy", ids[:, :60].numpy())
    alone(LOGITS, out, json.dumps(pieces))
    monkeypatch.setattr(packed, "exact_attention", True)
    with torch.no_grad():
        expected = packed(ids[:, :60]).numpy()
    assert np.abs(np.load(out / "logits.npy") - expected).max() <= 1e-4 * np.abs(expected).max()


GENERATE = """
import json, onnxruntime
from onnx_generate import generate
session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx")
print(json.dumps(generate(session, json.loads(sys.argv[2]), 8, None)))
"""


def test_prompts_of_3_and_9_tokens_together_give_what_each_gives_alone(tmp_path):
    """optimum 1381: without position ids, batches above 1 were meaningless."""
    torch.manual_seed(0)
    config = LlamaConfig(300, 32, 48, 1, 4, 2, max_position_embeddings=64, initializer_range=0.3)
    model = low_bit(build(config, seed=0), bb.Recipe.bbq(bits=3), torch.randint(0, 300, (4, 32)))
    model.exact_attention = True
    export_model(model, tmp_path / "model.onnx", weights="int4")
    prompts = [[5, 17, 101], [250, 3, 3, 9, 44, 61, 7, 8, 299]]
    together = json.loads(alone(GENERATE, tmp_path, json.dumps(prompts)))
    for prompt, got in zip(prompts, together, strict=True):
        text = torch.tensor([prompt])
        with torch.no_grad():
            for _ in range(8):
                text = torch.cat((text, model(text)[:, -1:].argmax(-1)), 1)
        assert text[0, len(prompt) :].tolist() == got
    assert len(set(together[0] + together[1])) > 5  # no constant


@needs_stories
def test_the_example_writes_text(story):
    _, folder, _ = story
    out = exported(folder)
    code = "import runpy\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    said = alone(code, ROOT / "examples" / "onnx_generate.py", out, "Once upon a time", "The dog")
    lines = said.strip().split("\n")
    assert lines[0].startswith("Once upon a time")
    assert len(said) > 80


@needs_stories
def test_a_changed_file_is_found_out(story, tmp_path):
    packed, folder, ids = story
    out = exported(folder)
    model = onnx.load(out / "model.onnx")
    scale = next(each for each in model.graph.initializer if each.name.endswith("input_layernorm.weight"))
    changed = onnx.numpy_helper.to_array(scale).copy()
    changed[3] *= 1.01
    scale.CopyFrom(onnx.numpy_helper.from_array(changed, scale.name))
    onnx.save(model, tmp_path / "model.onnx")
    found = check.agreement(packed, tmp_path / "model.onnx", [ids])
    assert not found.holds
    assert found.unexplained > 0
    with pytest.raises(BellboxError, match="is of another model"):
        check.agreement(nn.Sequential(nn.Linear(2, 2)), out / "model.onnx", [ids])
    (tmp_path / "model.onnx").write_bytes((out / "model.onnx").read_bytes()[:-100])
    with pytest.raises(BellboxError, match="is no ONNX file"):
        check.agreement(packed, tmp_path / "model.onnx", [ids])


GPT = GPTConfig(256, 64, 128, 1, 4, max_position_embeddings=64)
VISION = {
    "resnet": ResNetConfig(num_labels=7, width=16, stages=2, blocks=1),
    "vit": ViTConfig(
        num_labels=7, image_size=16, patch_size=4, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("embeddings", ["int4"])
def test_gpt(embeddings, tmp_path):
    torch.manual_seed(0)
    ids = torch.randint(0, 256, (4, 33))
    model = low_bit(varied(build(GPT, seed=1)), bb.Recipe.bbq(bits=3), ids, embeddings)
    export_model(model, tmp_path / "gpt.onnx", weights="int8")
    found = check.agreement(model, tmp_path / "gpt.onnx", [ids])
    assert found.holds
    assert found.codes == 4 * 33 * (64 + 64 + 64 + 128 + 64)  # the head as well
    assert found.samples_moved <= 1
    assert found.farthest <= 1e-6


@pytest.mark.parametrize("name", list(VISION))
def test_vision(name, tmp_path):
    torch.manual_seed(0)
    images = torch.rand(6, 3, 16, 16)
    model = low_bit(varied(build(VISION[name], seed=1)), bb.Recipe.bbq_vision(bits=2), images)
    export_model(model, tmp_path / "model.onnx")
    found = check.agreement(model, tmp_path / "model.onnx", [images, images[:1].flip(3)])
    assert found.holds
    assert found.samples == 7
    assert found.samples_moved <= 1
    assert found.farthest <= 1e-6


def test_the_command_refuses_in_one_line(tmp_path, capsys):
    for arguments, said in (
        (["nowhere", "out"], "no such folder"),
        ([str(tmp_path), "out.onnx"], "a folder is made"),
        ([str(tmp_path), "out"], "no model here"),
        ([str(tmp_path), "out", "--weights", "int3"], "int3"),
        ([str(tmp_path), "out", "--no-check", "--data", "x"], "--data does not apply"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["export", "onnx", *arguments])
        assert caught.value.code == 2
        lines = capsys.readouterr().err.strip().split("\n")
        assert len(lines) == 1
        assert said in lines[0]
    with pytest.raises(BellboxError, match="is none of LLaMA, GPT, ResNet and ViT"):
        export_model(nn.Linear(2, 2), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
