"""Vision models of `transformers`, built from their configurations: prepared by recipe, packed, the same function."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bellbox as bb
from bellbox.nn import quantized_layers

transformers = pytest.importorskip("transformers")


def deit(width: int, heads: int) -> nn.Module:
    """DeiT with the width of tiny (192) or small (384); fewer blocks, that a test can afford."""
    config = transformers.DeiTConfig(
        hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width, num_hidden_layers=2,
        image_size=64, num_labels=10,
    )  # fmt: skip
    return transformers.DeiTForImageClassification(config)


def resnet(depths: list[int]) -> nn.Module:
    """ResNet-18 with depths 2, 2, 2, 2; ResNet-10 with 1, 1, 1, 1."""
    config = transformers.ResNetConfig(
        depths=depths, hidden_sizes=[64, 128, 256, 512], embedding_size=64, layer_type="basic", num_labels=10
    )
    return transformers.ResNetForImageClassification(config)


KEPT = {
    "deit": {"deit.embeddings.patch_embeddings.projection", "classifier"},
    "resnet": {"resnet.embedder.embedder.convolution", "classifier.1"},
}


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("deit", lambda: deit(192, 3)),
        ("deit", lambda: deit(384, 6)),
        ("resnet", lambda: resnet([1, 1, 1, 1])),
        ("resnet", lambda: resnet([2, 2, 2, 2])),
    ],
    ids=["DeiT-tiny", "DeiT-small", "ResNet-10", "ResNet-18"],
)
def test_stem_and_head_are_kept_and_the_packed_model_is_the_trained_one(kind: str, make, tmp_path) -> None:
    torch.manual_seed(0)
    model = make()
    plain = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    bb.prepare(model, bb.Recipe.bbq_vision(bits=2))
    low = {name for name, _ in quantized_layers(model)}
    assert plain - low == KEPT[kind]
    x = torch.rand(2, 3, 64, 64)
    model.train()
    model(x).logits.square().mean().backward()
    assert all(layer.weight.grad is not None for _, layer in quantized_layers(model))
    packed = bb.convert(model.eval())
    with torch.no_grad():
        expected = model(x).logits
        assert torch.equal(packed(x).logits, expected)
        bb.save(packed, tmp_path / "m")
        torch.manual_seed(1)
        assert torch.equal(bb.load(tmp_path / "m", into=make())(x).logits, expected)
