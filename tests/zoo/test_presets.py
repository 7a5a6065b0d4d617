"""Presets of vision models against timm's and torchvision's: as many parameters, and the same function."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from zoo_packages import package

from bellbox.models import build, vision_preset

RESNET = (
    (r"^conv1\.", "stem.conv."),
    (r"^bn1\.", "stem.norm."),
    (r"^layer(\d)", lambda found: f"stages.{int(found[1]) - 1}"),
    (r"\.conv1\.", ".first.conv."),
    (r"\.bn1\.", ".first.norm."),
    (r"\.conv2\.", ".second.conv."),
    (r"\.bn2\.", ".second.norm."),
    (r"\.downsample\.0\.", ".shortcut.conv."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
    (r"^fc\.", "head."),
)
DEIT = (
    (r"^cls_token", "class_token"),
    (r"^pos_embed", "positions"),
    (r"^patch_embed\.proj", "patch_embed"),
    (r"\.attn\.qkv\.", ".attention.qkv_proj."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
)


def resnet(blocks: int) -> nn.Module:
    if package("torchvision") is None:
        pytest.skip("torchvision is not installed")
    theirs = importlib.import_module("torchvision.models.resnet")
    return theirs.ResNet(theirs.BasicBlock, [blocks] * 4)


def deit(name: str) -> nn.Module:
    timm = package("timm")
    if timm is None:
        pytest.skip("timm is not installed")
    return timm.create_model(name)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "parameters", "make", "names"),
    [
        ("resnet-10", 5_418_792, lambda: resnet(1), RESNET),
        ("resnet-18", 11_689_512, lambda: resnet(2), RESNET),
        ("deit-tiny", 5_717_416, lambda: deit("deit_tiny_patch16_224"), DEIT),
        ("deit-small", 22_050_664, lambda: deit("deit_small_patch16_224"), DEIT),
    ],
)
def test_a_preset_is_the_known_network(name, parameters, make, names) -> None:
    with torch.device("meta"):
        ours = build(vision_preset(name))
    assert sum(p.numel() for p in ours.parameters()) == parameters
    torch.manual_seed(0)
    theirs = make().eval()
    assert sum(p.numel() for p in theirs.parameters()) == parameters
    state = {}
    for key, value in theirs.state_dict().items():
        for pattern, replacement in names:
            key = re.sub(pattern, replacement, key)
        state[key] = value
    ours = ours.to_empty(device="cpu").eval()
    ours.normalise.set([0.0] * 3, [1.0] * 3)
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert (set(missing), unexpected) == ({"normalise.mean", "normalise.std"}, [])
    images = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        expected = theirs(images)
        assert expected.std() > 1e-3
        torch.testing.assert_close(ours(images), expected, rtol=1e-4, atol=1e-5)
