"""Packed folders in vLLM: its own engine where it is installed, and the plug-in's half on vLLM's base classes."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
)
pytest.importorskip(
    "vllm", reason="vLLM is not installed; it wants an environment of its own (docs/interop.md)"
)

import bellbox as bb
from bellbox.inference.generation import generate
from bellbox.interop import vllm as plugin
from bellbox.interop.transformers.export import export_packed
from bellbox.models import LlamaConfig, build
from bellbox.ops.rms_norm import rms_norm

CONFIG = LlamaConfig(320, 128, 192, 2, 4, 2, max_position_embeddings=128)


def made(folder: Path, recipe: bb.Recipe, embeddings: Any = "fp32") -> Path:
    torch.manual_seed(1)
    model = bb.prepare(build(CONFIG, seed=1), recipe)
    with torch.no_grad():
        model(torch.randint(0, 320, (4, 64)))
    export_packed(bb.convert(model, embeddings), folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("vllm") / "m", bb.Recipe.of("lsq", 4, share_inputs=True))


@pytest.fixture
def config(folder: Path) -> plugin.BellboxVllmConfig:
    found = plugin.BellboxVllmConfig({"layers": {}})
    found.maybe_update_config(str(folder))
    found.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    return found


def norms_are_bellboxs(model: nn.Module) -> tuple[int, bool]:
    """How many norms a model of vLLM's has, and whether all are computed as they were trained, residuals included."""
    norms: list[Any] = [each for each in model.modules() if type(each).__name__.endswith("RMSNorm")]
    x, residual = torch.randn(2, 3, 128)
    ours = True
    for norm in norms:
        alone, (both, total) = norm(x), norm(x, residual)
        ours &= torch.equal(alone, rms_norm(x, norm.weight, norm.variance_epsilon))
        ours &= torch.equal(total, x + residual)
        ours &= torch.equal(both, rms_norm(total, norm.weight, norm.variance_epsilon))
        ours &= norm.as_trained
    return len(norms), ours


class FakeLinear(plugin._linear.LinearBase):
    """A linear layer of vLLM's without its engine."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


def test_the_engine_writes_bellboxs_tokens(folder: Path) -> None:
    from vllm import LLM, SamplingParams

    plugin.register()
    engine = LLM(
        str(folder),
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=4,
        skip_tokenizer_init=True,
    )
    assert engine.apply_model(norms_are_bellboxs) == [(2 * CONFIG.num_hidden_layers + 1, True)]
    prompts = [list(range(2, 9)), [300], list(range(40, 71))]
    how = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    asked: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
    found = [list(each.outputs[0].token_ids) for each in engine.generate(asked, how, use_tqdm=False)]
    model = bb.load(folder)
    for prompt, tokens in zip(prompts, found, strict=True):
        ours = generate(model, torch.tensor([prompt]), 24, temperature=0)
        assert tokens == [int(each) for each in ours]


@pytest.mark.parametrize("shared", [True, False], ids=["joined", "apart"])
def test_fused_layers_give_the_bits_of_their_parts(shared: bool, config: Any) -> None:
    model: Any = bb.load(config.root)
    attention = model.model.layers[1].self_attn
    if not shared:  # as layers that were trained each with its own scale of inputs
        for number, name in enumerate("qkv"):
            entry = f"model.layers.1.self_attn.{name}_proj.act_scale"
            config.folder.tensors[entry] = config.folder.tensors[entry] * (1 + number)
            getattr(attention, f"{name}_proj").act_scale.mul_(1 + number)
    layer = FakeLinear()
    method = config.get_quant_method(layer, "model.layers.1.self_attn.qkv_proj")
    method.create_weights(layer, 128, [128, 64, 64], 128, 256, torch.float32)
    assert not list(layer.parameters())
    method.process_weights_after_loading(layer)
    assert len(layer.bellbox) == (1 if shared else 3)
    x = torch.randn(5, 128)
    wanted = torch.cat([getattr(attention, f"{name}_proj")(x) for name in "qkv"], -1)
    assert torch.equal(method.apply(layer, x), wanted)
    bias = torch.randn(256)
    assert torch.equal(method.apply(layer, x, bias), wanted + bias)


def test_vllm_loads_what_is_not_packed_and_nothing_else(config: Any) -> None:
    from safetensors import safe_open

    mapper = config.get_checkpoint_weight_mapper()
    with safe_open(config.root / "model.safetensors", "pt") as file:
        names = list(file.keys())
    left = {name for name in names if mapper.map_name(name) is not None}
    assert left == {name for name in names if "proj" not in name}
    assert len(left) == 3 + 2 * CONFIG.num_hidden_layers
    assert type(config.get_quant_method(FakeLinear(), "model.other")).__name__ == "UnquantizedLinearMethod"
    assert config.get_quant_method(nn.Embedding(2, 2), "model.embed_tokens") is None


def test_the_configuration_goes_to_other_processes(config: Any) -> None:
    for again in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert again.root == config.root
        assert again.packed_modules_mapping == config.packed_modules_mapping
        assert again.folder.entries == config.folder.entries
    assert config.get_supported_act_dtypes() == [torch.float32]


def test_what_cannot_be_is_one_line(config: Any, tmp_path: Path) -> None:
    layer = FakeLinear()
    method = config.get_quant_method(layer, "model.layers.0.mlp.gate_up_proj")
    with pytest.raises(bb.BellboxError, match="tensor_parallel_size=1"):
        method.create_weights(layer, 128, [96, 96], 128, 384, torch.float32)
    with pytest.raises(bb.BellboxError, match="other inputs than the 64"):
        method.create_weights(layer, 64, [192, 192], 64, 384, torch.float32)
    with pytest.raises(bb.BellboxError, match="has \\[192, 192\\] outputs"):
        method.create_weights(layer, 128, [192, 160], 128, 352, torch.float32)
    with pytest.raises(bb.BellboxError, match="Embedding cannot be"):
        config.get_quant_method(nn.Embedding(2, 2), "model.layers.0.mlp.down_proj")
    del config.folder.entries["model.layers.0.mlp.up_proj"]
    with pytest.raises(bb.BellboxError, match=r"layers.0.mlp.up_proj is not packed"):
        config.get_quant_method(layer, "model.layers.0.mlp.gate_up_proj")
    with pytest.raises(bb.BellboxError, match="hf download"):
        config.maybe_update_config("someone/a-model")
    with pytest.raises(bb.BellboxError, match="describes no packed layers"):
        plugin.BellboxVllmConfig.from_config({"quant_method": "bellbox", "prepared": 1})
    rounded = made(tmp_path / "rounded", bb.Recipe.bbq(2), "int8")
    with pytest.raises(bb.BellboxError, match=r"'model.embed_tokens' is rounded"):
        config.maybe_update_config(str(rounded))


def test_a_damaged_folder_is_refused_before_vllm_builds_anything(
    folder: Path, config: Any, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "m")
    content = bytearray((tmp_path / "m" / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (tmp_path / "m" / "model.safetensors").write_bytes(bytes(content))
    fresh = plugin.BellboxVllmConfig({"layers": {}})
    with pytest.raises(bb.BellboxError, match="checksum"):
        fresh.maybe_update_config(str(tmp_path / "m"))
