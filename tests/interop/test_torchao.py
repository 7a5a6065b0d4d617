"""torchao's `quantize_` with Bellbox's layers: the codes of `bellbox.prepare`, and of packed what was trained."""

from __future__ import annotations

import copy
import dataclasses
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.distributed import checkpoint

import bellbox as bb
from bellbox.nn import PackedConv2d, PackedLayer, PackedLinear, QuantizedLinear, quantized_layers

pytestmark = pytest.mark.filterwarnings("ignore")

WHOLE = os.environ.get("BELLBOX_ZOO") == "all"


@pytest.fixture
def quantize() -> Any:
    return pytest.importorskip("torchao").quantize_


class Deep(nn.Module):
    """Eight layers with a residual stream, an embedding and a head."""

    def __init__(self, width: int = 32, depth: int = 8) -> None:
        super().__init__()
        self.words = nn.Embedding(40, width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width)) for _ in range(depth)
        )
        self.lm_head = nn.Linear(width, 40, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.lm_head(x)


IDS = torch.arange(32).reshape(2, 16)


def deep(dtype: torch.dtype = torch.float32) -> Deep:
    torch.manual_seed(0)
    return Deep().to(dtype)


def convert(config: Any) -> Any:
    return dataclasses.replace(config, step="convert")


def learn(model: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(bb.optim.parameter_groups(model, lr=1e-2), eps=1e-4)  # 1e-8 is 0 in fp16
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(
            model.train()(IDS).float().flatten(0, 1), IDS.flatten().roll(-1)
        ).backward()
        optimizer.step()


def codes_and_logits(model: nn.Module, names: list[str]) -> list[Tensor]:
    """Codes of each layer's weight and input, and what comes out of the model."""
    found: list[Tensor] = []

    def look(layer: Any, args: tuple[Tensor, ...]) -> None:
        found.extend((layer.weight_codes(), layer.input_codes(args[0])))

    handles = [model.get_submodule(name).register_forward_pre_hook(look) for name in names]
    with torch.no_grad():
        logits = model.eval()(IDS)
    for handle in handles:
        handle.remove()
    return [*found, logits]


@pytest.mark.parametrize("method", ["bbq", "lsq", "quest"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_prepared_and_converted_are_one_function_eight_layers_deep(
    quantize: Any, dtype: torch.dtype, method: str
) -> None:
    """ao 1964: their numerics drift apart with depth."""
    model = deep(dtype)
    config = bb.interop.TorchAOConfig(bits=2, method=method)
    quantize(model, config)
    names = [name for name, _ in quantized_layers(model)]
    assert len(names) == 9  # torchao's own filter takes the head too
    learn(model)
    prepared = codes_and_logits(model, names)
    layer = model.layers[3][1]
    quantize(model, convert(config))
    assert model.layers[3][1] is layer
    assert all(isinstance(model.get_submodule(name), PackedLinear) for name in names)
    assert not [name for name, _ in model.named_parameters() if name.endswith("1.weight")]
    packed = codes_and_logits(model, names)
    assert len(packed) == len(prepared) == 19
    for ours, theirs in zip(packed, prepared, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours.reshape(theirs.shape), theirs)


@pytest.mark.parametrize(
    "choices", [{}, {"levels": 3, "bits": None}, {"bits": 4, "method": "lsq"}, {"bits": 1}]
)
def test_it_gives_the_codes_of_prepare(quantize: Any, choices: dict[str, Any]) -> None:
    config = bb.interop.TorchAOConfig(**{"bits": 2, **choices})
    ours, theirs = deep(), deep()
    quantize(ours, config, filter_fn=bb.interop.torchao_filter(ours, config))
    bb.prepare(theirs, config.recipe())
    names = [name for name, _ in quantized_layers(theirs)]
    assert [name for name, _ in quantized_layers(ours)] == names
    assert "lm_head" not in names
    learn(ours)
    learn(theirs)
    expected = codes_and_logits(theirs, names)
    assert all(map(torch.equal, codes_and_logits(ours, names), expected))
    assert torch.equal(bb.convert(ours)(IDS), expected[-1])  # the whole road
    quantize(ours, convert(config))
    assert torch.equal(ours(IDS), expected[-1])


def test_a_rotated_weight_of_prepare_has_the_same_codes(quantize: Any) -> None:
    ours, theirs = deep(), bb.prepare(deep(), bb.Recipe.bbq(2))
    config = bb.interop.TorchAOConfig(bits=2)
    quantize(ours, config, filter_fn=bb.interop.torchao_filter(ours, config))
    for name, layer in quantized_layers(theirs):
        assert torch.equal(ours.get_submodule(name).weight_codes(), layer.weight_codes())


def test_a_tied_head_leaves_the_embedding_as_it_is(quantize: Any) -> None:
    model = deep()
    model.lm_head.weight = model.words.weight
    before = model.words.weight.detach().clone()
    config = bb.interop.TorchAOConfig(bits=2)
    quantize(model, config)
    assert torch.equal(model.words.weight, before)
    with torch.no_grad():
        logits = model.eval()(IDS)
        quantize(model, convert(config))
        assert torch.equal(model(IDS), logits)
    assert torch.equal(model.words.weight, before)


def test_other_layers_and_a_layer_by_itself(quantize: Any) -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 8, 8)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 16), nn.ReLU(), nn.Linear(16, 4),
    )  # fmt: skip
    config = bb.interop.TorchAOConfig(bits=2)
    quantize(net, config, filter_fn=bb.interop.torchao_filter(net, config))
    with torch.no_grad():
        expected = net.eval()(images)
        quantize(net, convert(config), filter_fn=bb.interop.torchao_filter(net, convert(config)))
        assert any(isinstance(module, PackedConv2d) for module in net)
        assert torch.equal(net(images), expected)
        layer, x = nn.Linear(16, 8), torch.randn(3, 16)
        quantize(layer, config)
        assert isinstance(layer, QuantizedLinear)
        expected = layer.eval()(x)
        quantize(layer, convert(config))
        assert isinstance(layer, PackedLinear)
        assert torch.equal(layer(x), expected)
        quantize(layer, convert(config))  # nothing is left to convert


def test_torchs_own_transformer_layers_call_theirs(quantize: Any) -> None:
    torch.manual_seed(0)
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True), 2)
    x = torch.randn(2, 5, 32)
    config = bb.interop.TorchAOConfig(bits=2)
    quantize(net, config, filter_fn=bb.interop.torchao_filter(net, config))
    net.train()(x)
    with torch.no_grad():
        expected = net.eval()(x)
        packed = bb.convert(net)
        assert torch.equal(packed(x), expected)
        quantize(net, convert(config))
        assert torch.equal(net(x), expected)


def test_hooks_attributes_and_the_mode_stay(quantize: Any) -> None:
    layer = nn.Linear(16, 8)
    layer.note, calls = "theirs", []
    layer.register_forward_hook(lambda *_: calls.append(None))
    net = nn.Sequential(layer)
    config = bb.interop.TorchAOConfig(bits=2)
    quantize(net, config)
    net.train()(torch.randn(2, 16))
    quantize(net, convert(config))
    assert net[0] is layer
    assert (layer.note, layer.training, net.training) == ("theirs", True, True)
    net(torch.randn(2, 16))
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (lambda quantize: bb.interop.TorchAOConfig(step="train"), "the step is 'train'"),
        (lambda quantize: bb.interop.TorchAOConfig(method="nothing"), "nothing"),
        (lambda quantize: bb.interop.TorchAOConfig(bits=2, levels=3), "give bits or levels"),
        (lambda quantize: quantize(nn.Linear(4, 4), bb.interop.TorchAOConfig(bits=9)), "9"),
        (lambda quantize: _twice(quantize), "already prepared"),
        (lambda quantize: _without_data(quantize), "no data ever reached a layer of shape 8 x 16"),
    ],
)
def test_what_cannot_be_is_one_line(quantize: Any, use: Any, says: str) -> None:
    with pytest.raises(bb.BellboxError, match=says):
        use(quantize)


def _twice(quantize: Any) -> None:
    net, config = nn.Sequential(nn.Linear(16, 8)), bb.interop.TorchAOConfig(bits=2)
    quantize(net, config)
    quantize(net, config)


def _without_data(quantize: Any) -> None:
    net, config = nn.Sequential(nn.Linear(16, 8)), bb.interop.TorchAOConfig(bits=2)
    quantize(net, config)
    quantize(net, convert(config))


def test_without_torchao_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [each for each in sys.modules if each.split(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "bellbox.interop.torchao", raising=False)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(bb.BellboxError, match=r"pip install 'bellbox\[torchao\]'"):
        _ = bb.interop.TorchAOConfig


def packed_network() -> nn.Module:
    """10 rows, and rows of 5 bytes at 2 bits."""
    torch.manual_seed(0)
    net = bb.prepare(
        nn.Sequential(nn.Linear(19, 19), nn.Linear(19, 10)), bb.Recipe.bbq(2, keep_ends=False, block=1)
    )
    with torch.no_grad():
        net(torch.randn(8, 19))
    return bb.convert(net)


def _save(net: nn.Module, folder: str) -> None:
    checkpoint.save({"net": net.state_dict()}, checkpoint_id=folder)


def _load(net: nn.Module, folder: str) -> None:
    x = torch.randn(4, 19, generator=torch.Generator().manual_seed(1))
    expected, product = {name: value.clone() for name, value in net.state_dict().items()}, net(x)
    for buffer in net.buffers():
        buffer.zero_()
    state = net.state_dict()
    checkpoint.load({"net": state}, checkpoint_id=folder)
    net.load_state_dict(state)
    assert all(torch.equal(net.state_dict()[name], value) for name, value in expected.items())
    assert torch.equal(net(x), product)


def _one_of(rank: int, world: int, port: int, folder: str, saves: bool) -> None:
    torch.set_num_threads(1)
    net = packed_network()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    (_save if saves else _load)(net, folder)
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def test_packed_layers_saved_by_two_ranks_are_read_by_one_and_by_three(tmp_path: Path) -> None:
    """ao 1217: packed weights in subclasses of tensors lack what sharded saving needs; these are plain buffers."""
    net = packed_network()
    last = net[1]
    assert isinstance(last, PackedLayer)
    assert last.weight_packed.shape == (10, 5)
    assert all(type(buffer) is Tensor for buffer in net.buffers())
    _save(net, str(tmp_path / "one"))
    _load(net, str(tmp_path / "one"))
    if WHOLE:
        mp.spawn(_one_of, (2, _free_port(), str(tmp_path / "two"), True), nprocs=2)
        _load(net, str(tmp_path / "two"))
        mp.spawn(_one_of, (3, _free_port(), str(tmp_path / "two"), False), nprocs=3)


def test_copies_of_a_config_are_configs() -> None:
    pytest.importorskip("torchao")
    config = bb.interop.TorchAOConfig(bits=3, options={"signs": True})
    assert copy.deepcopy(config) == config
    assert convert(config).step == "convert"
