"""What operations promise torch: shapes without numbers, and one result for many samples at once (`vmap`)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bellbox.ops.clip_backward import clip_backward
from bellbox.ops.encode import encode
from bellbox.ops.fake_quantize import bbq_backward, bbq_forward
from bellbox.ops.learned_thresholds import learned_backward, learned_encode, learned_forward
from bellbox.ops.rotate import rotate
from bellbox.ops.weight_layout import prepack_operation, unpack_operation

ROWS, FEATURES, SAMPLES = 5, 16, 3
THRESHOLDS, LEARNED = [-0.5, 0.25, 1.0], torch.tensor([-0.5, 0.25, 1.0])


def rows(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, FEATURES, generator=draw).to(dtype)


def each(seed: int) -> Tensor:
    """A number for each row."""
    return torch.rand(ROWS, 1, generator=torch.Generator().manual_seed(seed)) + 0.5


ONE, HALF = torch.full((1, 1), 0.75), torch.tensor([0.5, 3.0])
EDGES = torch.tensor([-1.0, 0.25, 1.5])
CALLS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "encode": (encode, (rows(0), each(1), THRESHOLDS, 8)),
    "bbq_forward": (bbq_forward, (rows(0), each(1), each(2), THRESHOLDS, 1.5, 8, torch.float32)),
    "bbq_backward": (
        bbq_backward,
        (rows(0), rows(1), rows(2), each(3), each(4), torch.ones(ROWS, 1), 8, False),
    ),
    "bbq_backward, whole": (
        bbq_backward,
        (rows(0), rows(1), rows(2), ONE, ONE, torch.ones(1, 1), 8, True),
    ),
    "rotate": (rotate, (rows(0), 0.25, 8, torch.float32)),
    "clip_backward": (clip_backward, (rows(0), rows(1), rows(2), -0.5, 1.0)),
    "clip_backward, bf16": (
        clip_backward,
        (*(rows(i, torch.bfloat16) for i in range(3)), -0.5, 1.0),
    ),
    "clip_backward, fp64": (
        clip_backward,
        (*(rows(i, torch.float64) for i in range(3)), -0.5, 1.0),
    ),
    "clip_backward, without sums": (clip_backward, (rows(0), rows(1), None, -0.5, 1.0)),
    "learned_encode": (learned_encode, (rows(0), each(1), LEARNED)),
    "learned_forward": (learned_forward, (rows(0), each(1), each(2), LEARNED, torch.float32)),
    "learned_backward": (learned_backward, (rows(0), rows(1), EDGES, HALF)),
}


@pytest.mark.parametrize("name", CALLS)
def test_shapes_without_numbers_are_those_of_the_results(name):
    operation, arguments = CALLS[name]
    torch.library.opcheck(operation.call, arguments)  # pyright: ignore[reportFunctionMemberAccess]


@pytest.mark.parametrize(("levels", "places"), [(2, 1), (4, 2), (3, 4), (8, 2), (16, 1), (200, 2)])
def test_shapes_of_packed_weights_are_known_without_their_numbers(levels, places):
    codes = torch.randint(levels, (19, 68), dtype=torch.uint8)
    torch.library.opcheck(prepack_operation.call, (codes, levels, places))
    packed = prepack_operation(codes, levels, places)
    torch.library.opcheck(unpack_operation.call, (packed, 19, 68, levels))


def samples_of(value: Tensor) -> Tensor:
    """Three samples along the last dimension, each another."""
    return torch.stack([value, value.roll(1, 0) * 1.5, value.flip(-1) + 0.125], -1)


@pytest.mark.parametrize("name", CALLS)
def test_many_samples_at_once_are_one_after_the_other(name):
    operation, arguments = CALLS[name]
    places = [i for i, value in enumerate(arguments) if isinstance(value, Tensor)]
    for some in [*itertools.combinations(places, 1), *itertools.combinations(places, 2), tuple(places)]:
        given = [samples_of(v) if i in some else v for i, v in enumerate(arguments)]
        if name.startswith("learned") and not {2, 3}.isdisjoint(some):
            given = [v.abs().cumsum(0) if i in (2, 3) and i in some else v for i, v in enumerate(given)]
        dims = tuple(-1 if i in some else None for i in range(len(given)))
        batched = [i for i in range(len(given)) if i in some]

        def call(*values: Tensor, at: list[int] = batched, all_of: list[Any] = given) -> Any:
            whole = list(all_of)
            for i, value in zip(at, values, strict=True):
                whole[i] = value
            return operation(*whole)

        found = torch.vmap(call, in_dims=tuple(d for d in dims if d is not None))(*(given[i] for i in some))
        for sample in range(SAMPLES):
            expected = call(*(given[i][..., sample] for i in some))
            pairs = zip(*([r] if isinstance(r, Tensor) else r for r in (found, expected)), strict=True)
            for ours, theirs in pairs:
                torch.testing.assert_close(ours[sample], theirs)
