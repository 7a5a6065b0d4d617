from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import bellbox as bb
from bellbox.models import build, preset, vision_preset
from bellbox.structure import ends


def blocks(width: int, number: int = 2) -> nn.ModuleList:
    return nn.ModuleList(
        nn.ModuleDict({"up": nn.Linear(width, 2 * width), "down": nn.Linear(2 * width, width)})
        for _ in range(number)
    )


class Network(nn.Module):
    """Layers by name in the order that they are given."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)


def test_the_last_layer_after_the_body_gives_the_outputs_whatever_its_name_and_size() -> None:
    for classes in (5, 32):
        layers = Network(body=blocks(32), before=nn.Linear(32, 32), zebra=nn.Linear(32, classes))
        assert set(ends(layers)) == {"zebra"}
    assert set(ends(Network(zebra=nn.Linear(32, 5), body=blocks(32)))) == {"zebra"}  # registered first
    assert not ends(Network(body=blocks(32)))


def test_several_outputs_are_several_heads() -> None:
    body = blocks(32)
    boxes = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 4)])
    assert set(ends(Network(body=body, kinds=nn.Linear(32, 91), boxes=boxes))) == {"kinds", "boxes.1"}
    aux = nn.ModuleDict({"fc1": nn.Linear(32, 16), "fc2": nn.Linear(16, 10)})
    early = Network(aux=aux, body=body, fc=nn.Linear(32, 10))
    assert set(ends(early)) == {"aux.fc2", "fc"}


def test_a_network_without_repeated_blocks() -> None:
    net = Network(
        one=nn.Conv2d(3, 8, 3), two=nn.Conv2d(8, 16, 3), wide=nn.Linear(64, 20), last=nn.Linear(20, 10)
    )
    assert ends(net) == {"last": "gives the outputs", "one": "reads the input (3 channels)"}
    block = Network(q=nn.Linear(8, 8), k=nn.Linear(8, 4), v=nn.Linear(8, 4))
    assert not ends(block)
    assert not ends(Network(gate=nn.Linear(8, 16), up=nn.Linear(8, 16), down=nn.Linear(16, 8)))


def test_stacks_of_numbered_layers_are_quantized_whole_unless_they_read_pictures() -> None:
    linear = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    assert not ends(linear)
    assert not ends(nn.Sequential(nn.Conv2d(3, 8, 3)))
    assert not ends(nn.Linear(8, 3))
    pictures = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 10))
    assert set(ends(pictures)) == {"0", "3"}


def test_what_reads_the_input() -> None:
    assert "root" in ends(Network(root=nn.Conv2d(12, 32, 4), body=blocks(32), out=nn.Linear(32, 5)))
    assert "a.0" in ends(Network(a=nn.Sequential(nn.Linear(48, 32)), body=blocks(32), out=nn.Linear(32, 5)))
    text = Network(wte=nn.Embedding(9, 16), up=nn.Linear(16, 32), body=blocks(32), out=nn.Linear(32, 5))
    assert set(ends(text)) == {"out"}


def test_a_weight_that_is_an_embedding_is_kept_wherever_it_is() -> None:
    tied = nn.Linear(32, 64, bias=False)
    net = Network(table=nn.Embedding(64, 32), first=tied, body=blocks(32), out=nn.Linear(32, 5))
    net.table.weight = tied.weight
    assert ends(net)["first"] == "tied to the embedding table"


class Mixture(nn.Module):
    def __init__(self, router: str, experts: nn.Module | None) -> None:
        super().__init__()
        setattr(self, router, nn.Linear(32, 4))
        if experts is None:
            self.weights = nn.Parameter(torch.zeros(4, 32, 32))
        else:
            self.paths = experts
        self.shared = nn.Linear(32, 32)


@pytest.mark.parametrize("router", ["gate", "chooser"])
@pytest.mark.parametrize("tensor", [False, True])
def test_routers_are_kept_by_the_number_of_their_experts(router: str, tensor: bool) -> None:
    layers = nn.ModuleList(Mixture(router, None if tensor else blocks(32, 4)) for _ in range(2))
    found = ends(Network(layers=layers, out=nn.Linear(32, 7)))
    assert set(found) == {f"layers.0.{router}", f"layers.1.{router}", "out"}
    assert found[f"layers.0.{router}"] == "routes to 4 experts"


@pytest.mark.parametrize("name", ["tiny", "gpt-tiny"])
def test_own_language_models_keep_their_head_alone(name: str) -> None:
    assert set(ends(build(preset(name, vocab_size=50), seed=0))) == {"lm_head"}


@pytest.mark.parametrize("name", ["resnet-20", "vit-small"])
def test_own_vision_models_keep_what_their_names_say(name: str) -> None:
    model = build(vision_preset(name), seed=0)
    named = {layer for layer in ends(model) if bb.Recipe.bbq(2).rule_for(layer) is None}
    assert set(ends(model)) == named
    assert len(named) == 2


def test_explicit_rules_reach_the_ends_and_reasons_stay_after_preparing() -> None:
    def network() -> nn.Module:
        return Network(body=blocks(32), fc=nn.Linear(32, 10))

    spec = bb.QuantizerSpec("bbq", 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = bb.prepare(network(), bb.Recipe.of("bbq", 2, rules=(bb.Rule("fc", spec, spec),)))
        assert "left:" not in bb.summary(model)
        model = bb.prepare(network(), bb.Recipe.bbq(2))
    assert ends(model) == ends(network())
    assert "left: fc, 320 weights (gives the outputs)" in bb.summary(model)
