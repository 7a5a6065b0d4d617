"""Calls that nobody should make, each with what must come of it: a refusal. `python abuses.py` makes them all."""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

import bellbox as bb
from bellbox.nn import PackedLayer  # what defines the operations of layers
from bellbox.ops import binarized_linear, native
from bellbox.ops.weight_layout import prepack
from bellbox.quantizers import QuantizerSpec
from bellbox.quantizers.bbq import BBQ

del PackedLayer
HUGE = 2**40
OVERFLOW = 2**62
LINEAR = (
    "x", "weight", "weight_scale", "bias", "act_scale", "act_thresholds", "act_rstd", "act_signs", "in_features",
    "weight_levels", "weight_zero_point", "act_zero_point", "block", "normalise", "rescale",
)  # fmt: skip


def linear(**changes: Any) -> None:
    """`packed_linear` of 64 inputs and 5 outputs, 4 levels on both sides."""
    codes = torch.zeros(5, 64, dtype=torch.uint8)
    good = (
        torch.ones(3, 64), prepack(codes, 4), torch.ones(5), None, torch.ones(1), torch.tensor([-1.0, 0, 1]), None,
        None, 64, 4, -0.5, -0.5, 64, "rms", False,
    )  # fmt: skip
    arguments = {**dict(zip(LINEAR, good, strict=True)), "dtype": torch.float32, **changes}
    torch.ops.bellbox.packed_linear(*arguments.values())


def conv(**changes: Any) -> None:
    """`packed_conv2d` of 16 channels, 3 x 3."""
    codes = torch.zeros(5, 144, dtype=torch.uint8)
    good = (
        torch.ones(2, 16, 6, 7), prepack(codes, 4, 9), torch.ones(5), None, torch.ones(1),
        torch.tensor([-1.0, 0, 1]), None, None, 144, 4, -0.5, -0.5, 16, "rms", False,
    )  # fmt: skip
    more = {
        "channels": 16, "geometry": [3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1], "add": None, "relu": False,
        "dtype": torch.float32,
    }  # fmt: skip
    arguments = {**dict(zip(LINEAR, good, strict=True)), **more, **changes}
    torch.ops.bellbox.packed_conv2d(*arguments.values())


def of_tensors() -> dict[str, list[Any]]:
    """Values of arguments that fit neither operation."""
    return {
        "x": [None, 3, torch.ones(3, 63), torch.ones(()), torch.ones(3, 64, dtype=torch.int64), torch.ones(0),
              torch.ones(3, 64, dtype=torch.complex64), "x"],
        "weight": [None, torch.zeros(10, dtype=torch.uint8), torch.zeros(0, dtype=torch.uint8), torch.zeros(9999),
                   torch.zeros(2, 9999, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8).expand(9)],
        "weight_scale": [torch.ones(5, dtype=torch.float16), torch.ones(50), torch.ones(5, dtype=torch.int32), None],
        "bias": [torch.ones(4), torch.ones(0), torch.ones(6), 1.0],
        "act_scale": [torch.ones(0), torch.ones(2), None],
        "act_thresholds": [torch.ones(0), torch.zeros(600), None],
        "act_rstd": ["no"],
        "act_signs": [torch.ones(3), torch.ones(0), torch.ones(65, dtype=torch.int8)],
        "in_features": [0, -64, 63, HUGE, OVERFLOW, None, 1.5],
        "weight_levels": [-4, 0, 1, 257, HUGE, None],
        "weight_zero_point": [0.3, float("nan"), float("inf"), 1e30, None],
        "act_zero_point": [0.3, float("nan"), -float("inf"), 1e30],
        "block": [0, -1, 3, 128, HUGE],
        "normalise": ["", "static", "absmax", "l2", None],
    }  # fmt: skip


def of_operations() -> Iterator[tuple[str, Callable[[], object]]]:
    """Abuses of every other operation: its arguments as they should be, with one of them spoilt."""
    f, r, one = torch.ones(4, 64), torch.ones(4, 1), torch.ones(1, 1)
    classes = torch.arange(4)
    u8, thresholds = torch.zeros(4, 64, dtype=torch.uint8), torch.tensor([-1.0, 0, 1])
    i8, words = torch.zeros(5, 64, dtype=torch.int8), prepack(u8, 4)
    i4, places = torch.zeros(5, 32, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)
    laid = binarized_linear.empty_layout(5, 64, 32)
    half, whole, flat = f.half(), f.long(), torch.ones(())
    dtype = torch.float32
    edges, scales = thresholds.clone(), list(BBQ(64, QuantizerSpec(), 4).own_scales().values())
    bad_x = (None, "x", f.to(torch.complex64))
    for name, good, spoilt in (
        ("binarized_linear", (f, *laid, None, 5, 32, 8), {
            0: (*bad_x, half, whole, f[:, :60], torch.ones(0), flat, torch.ones(4, 0)),
            1: (None, laid.planes[:0], laid.planes[:, :1], laid.planes.float()),
            2: (None, laid.scales.float(), laid.scales[:, :1], laid.scales[:0], laid.scales.transpose(0, 3)),
            3: (None, laid.order + 64, laid.order - 65, laid.order[:-4], laid.order.long()),
            4: (None, laid.steps + 1, -laid.steps, laid.steps[:1], laid.steps.long(), laid.steps.flatten(),
                torch.tensor([[-8, 16], [0, 8]], dtype=torch.int32), torch.full((2, 2), 2**31 - 1, dtype=torch.int32)),
            5: (torch.ones(4), torch.ones(5).half(), 1),
            6: (0, -5, 17, HUGE, OVERFLOW, None), 7: (0, -1, 16, HUGE, OVERFLOW, 1.5), 8: (0, 1, 9, 16, -8, HUGE),
        }),
        ("float_linear", (f, torch.ones(5, 64)), {
            0: (*bad_x, f[:, :63], flat),
            1: (None, u8, torch.ones(5, 63), torch.ones(64), torch.ones(1, 5, 64), f.double()),
        }),
        ("int8_linear", (f, i8, torch.ones(5)), {
            0: (*bad_x, f[:, :63], flat), 1: (None, u8, i8[:, :63], i8[0], i8[None]),
            2: (None, torch.ones(4), torch.ones(6), torch.ones(0), torch.ones(5, 5)),
        }),
        ("int4_linear", (f, i4, i4[:, :2], torch.ones(5)), {
            0: (*bad_x, f[:, :63], flat), 1: (None, i8, i4[:, :31], i4[0], i4[None], i4[:4]),
            2: (None, i8[:, :2], i4[:, :3], i4[:, :0], i4[:4, :2], i4[:, 0]),
            3: (None, torch.ones(4), torch.ones(6), torch.ones(0), torch.ones(5, 5)),
        }),
        ("table_rows", (places, i8, None, torch.ones(5)), {
            0: (None, f, places + 5, places - 9), 1: (None, u8, f, i8[0], i8[None], i8[:, :0], i8[:4]),
            2: (i4, i8), 3: (None, torch.ones(4), torch.ones(6), torch.ones(5, 5), torch.ones(5).half()),
        }),
        ("table_rows", (places, i4, i4[:, :2], torch.ones(5)), {
            0: (None, places + 5), 1: (None, i8, i4[0], i4[:4], i4[:, :0]),
            2: (None, i8[:, :2], i4[:, :3], i4[:, :0], i4[:4, :2], i4[:, 0]), 3: (None, torch.ones(4), torch.ones(6)),
        }),
        ("draw", (f, *[torch.ones(4, dtype=torch.float64), places.new_zeros(4), torch.ones(4, dtype=torch.float64),
                       torch.zeros(4, dtype=torch.float64)]), {
            0: (*bad_x, half, whole, flat, f[:3], f[:, :0]), 1: (None, r[:, 0], -torch.ones(4).double(), flat),
            2: (None, places, -places.new_ones(4), flat),
            3: (None, torch.zeros(4).double(), r[:, 0], 2 * torch.ones(4).double()),
            4: (None, torch.ones(4).double(), torch.full((4,), torch.nan).double(), r[:, 0], torch.zeros(5).double()),
        }),
        ("decode_bytes", (u8, torch.ones(256, 2), torch.ones(4, 2), 128), {
            0: (None, f, u8[0], u8[:, :63], u8[:3]),
            1: (None, f, torch.ones(256), torch.ones(256, 0), torch.ones(256, 2).half()),
            2: (None, torch.ones(4), torch.ones(3, 2), torch.ones(4, 3), torch.ones(4, 0), torch.ones(4, 2).double()),
            3: (0, -1, 126, 129, HUGE, OVERFLOW, None),
        }),
        ("prepack", (u8, 4, 1), {
            0: (None, f, u8 + 4, u8[0], u8[None]), 1: (0, 1, -4, 257, HUGE, None), 2: (0, -1, 7, HUGE, OVERFLOW),
        }),
        ("unpack", (words, 4, 64, 4), {
            0: (None, words[:9], words.float(), words[None], words[:0]), 1: (-1, 999, HUGE, OVERFLOW, None),
            2: (-1, 999, HUGE, OVERFLOW), 3: (0, 1, -4, 257, HUGE),
        }),
        ("encode", (f, r, [-1.0, 0.0, 1.0], 64), {
            0: (*bad_x, f[:, :63], flat), 1: (None, r[:3], torch.ones(9, 1), r[:0]), 2: (None, ["a"], [0.0] * 300),
            3: (0, -1, 3, 128, HUGE, None),
        }),
        ("rotate", (f, 1.0, 64, dtype), {0: (*bad_x, f[:, :63], flat), 2: (0, -1, 3, 128, HUGE), 3: ("no",)}),
        ("rms_norm", (f, torch.ones(64), 1e-5), {
            0: (*bad_x, f[:, :63], flat), 1: (None, torch.ones(63), torch.ones(0), torch.ones(2, 64)), 2: (None, "a"),
        }),
        ("layer_norm", (f, torch.ones(64), torch.ones(64), 1e-5), {
            0: (*bad_x, f[:, :63], flat), 1: (None, torch.ones(63), torch.ones(0), torch.ones(2, 64)),
            2: (torch.ones(63), "a"), 3: (None, "a"),
        }),
        ("activate", (f, f, "silu"), {0: (*bad_x, f[:, :63], flat), 1: (f[:3], f.double(), 1), 2: (None, "tanh", "")}),
        ("cross_entropy", (f, classes), {0: (*bad_x, f[:3], flat, f[:, :0]),
            1: (None, classes[:3], classes.int(), classes + 64, -1 - classes),
        }),
        ("cross_entropy_backward", (f, classes, r[:, 0], r[:, 0]), {
            0: (*bad_x, f[:3], flat), 1: (None, classes[:3], classes + 64), 2: (None, r[:3, 0]), 3: (None, r[:3, 0]),
        }),
        ("bbq_forward", (f, r, r, [-1.0, 0.0, 1.0], -0.5, 64, dtype), {
            0: (*bad_x, f[:, :63], flat), 1: (None, r[:3], torch.ones(9, 1)), 2: (None, r[:3], torch.ones(9, 1)),
            3: (None, ["a"]), 5: (0, -1, 3, 128, HUGE), 6: ("no",),
        }),
        ("bbq_backward", (f, f, f, r, one, one, 64, False), {
            0: (*bad_x, f[:, :63]), 1: (None, f[:3]), 2: (None, f[:3]), 3: (None, r[:3]), 4: (None, torch.ones(3)),
            6: (0, -1, 3, 128, HUGE),
        }),
        ("clip_backward", (f, f, None, -1.0, 1.0), {0: (*bad_x, f[:3]), 1: (None, f[:3]), 2: (f[:3], 1), 3: (None,)}),
        ("learned_encode", (f, r, edges), {0: (*bad_x, f[:, :63][:3]), 1: (None, r[:3]), 2: (None, edges[None, None])}),
        ("learned_forward", (f, r, one, edges, dtype), {0: bad_x, 1: (None, r[:3]), 2: (None,), 4: ("no",)}),
        ("learned_backward", (f, f, torch.arange(4.0), torch.ones(3)), {
            0: (*bad_x, f[:3]), 1: (None, f[:3]), 2: (None,),
        }),
        ("first_scale", (f, scales, '{"method": "bbq"}', 64, 4, "layer", False), {
            0: (None,), 1: (None, [None]), 2: (None, "", "[", "{}", '{"method": 3}'), 3: (None, "a"), 5: (None,),
        }),
    ):  # fmt: skip
        called = getattr(torch.ops.bellbox, name)
        called(*good)  # else every one of them would be refused for another reason
        for at, values in spoilt.items():
            for i, value in enumerate(values):
                yield f"{name} {at} {i}", lambda c=called, g=good, a=at, v=value: c(*g[:a], v, *g[a + 1 :])


def calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every abuse with a name."""
    for operation in (linear, conv):
        for name, values in of_tensors().items():
            for i, value in enumerate(values):
                yield f"{operation.__name__} {name} {i}", lambda o=operation, n=name, v=value: o(**{n: v})
    for i, channels in enumerate((0, -16, 8, HUGE)):
        yield f"conv channels {i}", lambda c=channels: conv(channels=c)
    plain = [3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    for at, value in (
        (0, 0), (0, -3), (1, HUGE), (2, 0), (3, -1), (4, -1), (8, 0), (9, HUGE), (10, 0), (10, 3), (0, 30), (10, -1),
    ):  # fmt: skip
        yield (
            f"conv geometry {at} {value}",
            lambda a=at, v=value: conv(geometry=[*plain[:a], v, *plain[a + 1 :]]),
        )
    yield "conv geometry short", lambda: conv(geometry=plain[:4])
    yield "conv add", lambda: conv(add=torch.ones(2, 5, 6, 8))
    yield from of_operations()
    if native.available():
        yield from of_module()


def of_module() -> Iterator[tuple[str, Callable[[], object]]]:
    """Abuses of `bellbox._native`."""
    module: Any = native.compiled()
    f, u8 = torch.ones(4, 64), torch.zeros(4, 64, dtype=torch.uint8)
    r, t = torch.ones(4), torch.tensor([-1.0, 0, 1])
    strided, half, meta = torch.ones(64, 4).t(), f.half(), f.to("meta")

    def buffers(**changes: Any) -> dict[str, Any]:
        good = {"packed": prepack(u8, 4), "weight_scale": torch.ones(4), "bias": None, "act_scale": torch.ones(1),
                "act_thresholds": t, "act_rstd": None, "act_signs": None}  # fmt: skip
        return {**good, **changes}

    numbers = 64, 4, -0.5, -0.5, 64, "rms", False
    plan = module.Plan(buffers(), *numbers)
    for name, value in (
        ("packed", None), ("packed", 3), ("packed", f), ("packed", u8[0]), ("packed", u8.to("meta")),
        ("packed", torch.zeros(9999, dtype=torch.uint8)[::2]), ("packed", torch.zeros(9999, dtype=torch.uint8)[1:]),
        ("weight_scale", None), ("weight_scale", half), ("weight_scale", torch.ones(0)), ("weight_scale", "scale"),
        ("weight_scale", torch.ones(8)[::2]), ("bias", torch.ones(3)), ("bias", 1), ("act_scale", torch.ones(0)),
        ("act_scale", None), ("act_thresholds", torch.ones(0)), ("act_thresholds", torch.ones(99)),
        ("act_thresholds", [1.0]), ("act_thresholds", t.double()),
    ):  # fmt: skip
        yield f"Plan {name}", lambda n=name, v=value: module.Plan(buffers(**{n: v}), *numbers)
    yield "Plan without buffers", lambda: module.Plan({}, *numbers)
    yield "Plan of None", lambda: module.Plan(None, *numbers)
    for at, values in {0: (0, -1, 63, HUGE, OVERFLOW), 1: (1, 17, -2), 2: (0.3, 1e30, float("nan")),
                       3: (0.3, 1e30, float("nan")), 4: (0, -8, 3, 128),
                       5: ("l2", None, "static"), 6: (None,)}.items():  # fmt: skip
        for value in values:
            changed = *numbers[:at], value, *numbers[at + 1 :]
            yield f"Plan number {at} {value}", lambda c=changed: module.Plan(buffers(), *c)
    for i, x in enumerate((None, 3, f[:, :63], half, meta, torch.ones(()), u8, [1.0] * 64)):
        yield f"Plan call {i}", lambda x=x: plan(x, torch.float32, 1)
        yield f"GroupPlan call {i}", lambda x=x: module.GroupPlan([plan])(x, torch.float32, 1)
    yield "Plan call dtype", lambda: plan(f, torch.int8, 1)
    yield "Plan call dtype None", lambda: plan(f, None, 1)
    yield "Plan call of 13 dimensions", lambda: plan(torch.ones(*[1] * 14, 64), torch.bfloat16, 1)
    yield "GroupPlan of nothing", lambda: module.GroupPlan([])
    yield "GroupPlan of None", lambda: module.GroupPlan([None])
    yield "GroupPlan of a number", lambda: module.GroupPlan([3])
    yield "encode block", lambda: module.encode(f, r, t, 4, 64, 3, u8, 1)
    yield "encode rows", lambda: module.encode(f, r, t, 5, 64, 64, u8, 1)
    yield "encode negative", lambda: module.encode(f, r, t, -4, 64, 64, u8, 1)
    yield "encode huge", lambda: module.encode(f, r, t, OVERFLOW, 64, 64, u8, 1)
    yield "encode out", lambda: module.encode(f, r, t, 4, 64, 64, u8[:2], 1)
    yield "encode strided", lambda: module.encode(strided, r, t, 4, 64, 64, u8, 1)
    yield "encode half", lambda: module.encode(half, r, t, 4, 64, 64, u8, 1)
    yield "encode meta", lambda: module.encode(meta, r, t, 4, 64, 64, u8, 1)
    yield "encode r", lambda: module.encode(f, r[:0], t, 4, 64, 64, u8, 1)
    yield "encode few r", lambda: module.encode(f, r[:2], t, 4, 64, 64, u8, 1)
    yield "encode thresholds", lambda: module.encode(f, r, t[:0], 4, 64, 64, u8, 1)
    yield "encode None", lambda: module.encode(None, r, t, 4, 64, 64, u8, 1)
    yield "encode thresholds None", lambda: module.encode(f, r, None, 4, 64, 64, u8, 1)
    yield "encode list", lambda: module.encode([1.0], r, t, 4, 64, 64, u8, 1)
    yield "rotate block", lambda: module.rotate(f, 64, 128, 1.0, f, 1)
    yield "rotate k", lambda: module.rotate(f, 0, 1, 1.0, f, 1)
    yield "rotate out", lambda: module.rotate(f, 64, 64, 1.0, f[:1], 1)
    yield "rotate None", lambda: module.rotate(None, 64, 64, 1.0, f, 1)
    yield "rms_norm weight", lambda: module.rms_norm(f, torch.ones(63), 1e-5, f, 1)
    yield "rms_norm none", lambda: module.rms_norm(f, torch.ones(0), 1e-5, f, 1)
    yield "rms_norm out", lambda: module.rms_norm(f, torch.ones(64), 1e-5, f[:1], 1)
    yield "layer_norm bias", lambda: module.layer_norm(f, torch.ones(64), torch.ones(63), 1e-5, f, 1)
    yield "layer_norm out", lambda: module.layer_norm(f, torch.ones(64), None, 1e-5, f[:1], 1)
    yield (
        "cross_entropy targets",
        lambda: module.cross_entropy(f, torch.full((len(f),), 64), f[:, 0], f[:, 1], 1),
    )
    yield (
        "cross_entropy rows",
        lambda: module.cross_entropy(f, torch.zeros(7, dtype=torch.int64), f[0], f[1], 1),
    )
    yield (
        "cross_entropy losses",
        lambda: module.cross_entropy(f, torch.arange(4), f[:1, 0], f[0], 1),
    )
    yield "activate kind", lambda: module.activate(f, None, 4, f, 1)
    yield "activate times", lambda: module.activate(f, f[:1], 0, f, 1)
    yield "rotary size", lambda: module.rotary(1e4, 8, 4, torch.ones(15), torch.ones(16))
    yield "rotary head", lambda: module.rotary(1e4, 7, 4, torch.ones(16), torch.ones(16))
    small, cache = torch.ones(1, 1, 8), torch.ones(1, 1, 4, 8)
    for i, (tokens, start) in enumerate(((5, 0), (2, 3), (1, -1), (0, 0), (HUGE, 0), (1, HUGE), (2, 0))):
        yield (
            f"attend_prompt {i}",
            lambda t=tokens, s=start: module.attend_prompt(
                small,
                small,
                small,
                None,
                None,
                cache,
                cache,
                None,
                None,
                1,
                1,
                t,
                1,
                1,
                8,
                4,
                s,
                True,
                small,
                1,
            ),
        )
    for i, sizes in enumerate(
        ((1, 1, 1, 8, 4, 4), (1, 1, 1, 8, 4, -1), (1, 1, 1, 8, 9, 0), (2, 1, 1, 8, 4, 0), (1, 1, 0, 8, 4, 0),
         (1, 3, 2, 8, 4, 0), (1, -1, 1, 8, 4, 0), (1, 1, 1, 0, 4, 0), (HUGE, HUGE, 1, 8, 4, 0))
    ):  # fmt: skip
        yield (
            f"attend {i}",
            lambda s=sizes: module.attend(
                small, small, small, None, None, cache, cache, None, None, 1, *s, small, 1
            ),
        )
    for i, places in enumerate(
        (torch.tensor([[1, 0]]), torch.tensor([[-1, 0]]), torch.tensor([[0, 4]]), torch.tensor([[0, -1]]),
         torch.tensor([[0, 0], [0, 0]]), torch.tensor([[0]]), torch.tensor([[0, 0]], dtype=torch.int32),
         torch.tensor([[2**62, 0]]), torch.zeros(1, 2), None, 1.5, "0", HUGE, 2**70)
    ):  # fmt: skip
        yield (
            f"attend places {i}",
            lambda p=places: module.attend(
                small, small, small, None, None, cache, cache, None, None, 1, 1, 1, 1, 8, 4, p, small, 1
            ),
        )
    two, both = torch.ones(2, 1, 8), torch.ones(2, 1, 4, 8)
    twice = torch.tensor([[1, 0], [1, 2]])
    yield (
        "attend one slot twice",
        lambda: module.attend(
            two, two, two, None, None, both, both, None, None, 1, 2, 1, 1, 8, 4, twice, two, 1
        ),
    )
    for columns in (0, -1, 63, HUGE, OVERFLOW):
        yield (
            f"float_linear {columns}",
            lambda c=columns: module.float_linear(f, torch.ones(5, 64), c, torch.ones(4, 5), 1),
        )
    yield "float_linear out", lambda: module.float_linear(f, torch.ones(5, 64), 64, torch.ones(5), 1)
    sizes = 1, 1, 1, 8, 4, 0, small, 1
    yield (
        "attend sines",
        lambda: module.attend(small, small, small, cache, None, cache, cache, None, None, 1, *sizes),
    )
    codes, bytes_, scales = cache.to(torch.int8), cache[..., :4].to(torch.uint8), cache[..., 0].contiguous()
    for i, held in enumerate(
        ((codes, codes, None, None, 8), (codes, codes, scales, None, 8), (codes, codes, scales, scales[:, :, :3], 8),
         (codes, codes, scales, scales, 3), (codes, codes, scales, scales, 16), (codes, codes, scales, scales, 0),
         (codes, bytes_, scales, scales, 8), (codes, cache, scales, scales, 8), (bytes_[:0], bytes_, scales, scales, 1),
         (cache, cache, scales, scales, 1), (cache, cache, None, None, 8), (codes.short(), codes, scales, scales, 8),
         (codes, codes, scales.double(), scales, 8), (codes, codes[:, :, :3], scales, scales, 8))
    ):  # fmt: skip
        yield f"attend codes {i}", lambda h=held: module.attend(small, small, small, None, None, *h, *sizes)
    i8 = torch.zeros(5, 64, dtype=torch.int8)
    for columns in (0, -1, 63, 9000, OVERFLOW):
        yield (
            f"int8_linear {columns}",
            lambda c=columns: module.int8_linear(f, i8, torch.ones(5), c, torch.ones(4, 5), 1),
        )
    yield "int8_linear scale", lambda: module.int8_linear(f, i8, torch.ones(6), 64, torch.ones(4, 6), 1)
    yield "int8_linear out", lambda: module.int8_linear(f, i8, torch.ones(5), 64, torch.ones(5), 1)
    i4, two = torch.zeros(5, 32, dtype=torch.uint8), torch.zeros(5, 2, dtype=torch.uint8)
    for columns in (0, -1, 63, 128, 9000, OVERFLOW):
        yield (
            f"int4_linear {columns}",
            lambda c=columns: module.int4_linear(f, i4, two, torch.ones(5), c, torch.ones(4, 5), 1),
        )
    for name, tables in (
        ("weight", (i4[:4], two, torch.ones(5))),
        ("multipliers", (i4, i4[:, :3], torch.ones(5))),
        ("no multipliers", (i4, two[:, :0], torch.ones(5))),
        ("scale", (i4, two, torch.ones(6))),
    ):
        yield (
            f"int4_linear {name}",
            lambda t=tables: module.int4_linear(f, *t, 64, torch.ones(4, len(t[2])), 1),
        )
    yield "int4_linear out", lambda: module.int4_linear(f, i4, two, torch.ones(5), 64, torch.ones(5), 1)
    even, none, tokens = (
        torch.ones(4, dtype=torch.float64),
        torch.zeros(4, dtype=torch.int64),
        torch.zeros(4, dtype=torch.int64),
    )
    for name, spoilt in (
        ("vocabulary", (f, 65, even, none, even, 0 * even, tokens)),
        ("no vocabulary", (f, 0, even, none, even, 0 * even, tokens)),
        ("overflow", (f, OVERFLOW, even, none, even, 0 * even, tokens)),
        ("temperature", (f, 64, -even, none, even, 0 * even, tokens)),
        ("temperatures", (f, 64, even[:3], none, even, 0 * even, tokens)),
        ("top_k", (f, 64, even, none - 1, even, 0 * even, tokens)),
        ("top_p", (f, 64, even, none, 0 * even, 0 * even, tokens)),
        ("drawn", (f, 64, even, none, even, even, tokens)),
        ("out", (f, 64, even, none, even, 0 * even, tokens.int())),
    ):
        yield f"draw {name}", lambda s=spoilt: module.draw(*s, 1)
    bytes_of, values = torch.zeros(4, 32, dtype=torch.uint8), torch.ones(256, 2)
    for name, spoilt in (
        ("columns", (bytes_of, values, torch.ones(4, 1), 4, 65)),
        ("no columns", (bytes_of, values, torch.ones(4, 1), 4, 0)),
        ("overflow", (bytes_of, values, torch.ones(4, 1), 4, OVERFLOW)),
        ("rows", (bytes_of, values, torch.ones(4, 1), 5, 64)),
        ("negative rows", (bytes_of, values, torch.ones(4, 1), -1, 64)),
        ("values", (bytes_of, values[:100], torch.ones(4, 1), 4, 64)),
        ("groups", (bytes_of, values, torch.ones(4, 3), 4, 64)),
    ):
        yield f"decode_bytes {name}", lambda s=spoilt: module.decode_bytes(*s, torch.ones(4, 64), 1)
    ids, out = torch.zeros(3, dtype=torch.int64), torch.ones(3, 64)
    for name, table in (
        ("columns", (i8, None, torch.ones(5), 65)),
        ("no columns", (i8, None, torch.ones(5), 0)),
        ("scale", (i8, None, torch.ones(6), 64)),
        ("dtype", (i4, None, torch.ones(5), 32)),
        ("multipliers", (i4, i4[:, :3], torch.ones(5), 64)),
        ("no multipliers", (i4, i4[:, :0], torch.ones(5), 64)),
        ("odd groups", (i4, torch.zeros(5, 64, dtype=torch.uint8), torch.ones(5), 64)),
        ("overflow", (i8, None, torch.ones(5), OVERFLOW)),
    ):
        yield f"table_rows {name}", lambda t=table: module.table_rows(ids, *t, out, 1)
    yield "table_rows out", lambda: module.table_rows(ids, i8, None, torch.ones(5), 64, out[:2], 1)
    yield "table_rows ids", lambda: module.table_rows(ids.int(), i8, None, torch.ones(5), 64, out, 1)
    one = torch.ones(1)
    yield "forward block", lambda: module.forward(f, 4, 64, 3, t, 0.0, r, r, f, f, 1)
    yield "forward scale", lambda: module.forward(f, 4, 64, 64, t, 0.0, r, r[:2], f, f, 1)
    yield "forward no r", lambda: module.forward(f, 4, 64, 64, t, 0.0, r[:0], r, f, f, 1)
    yield "forward out", lambda: module.forward(f, 4, 64, 64, t, 0.0, r, r, f[:2], f, 1)
    yield "forward dtypes", lambda: module.forward(f, 4, 64, 64, t, 0.0, r, r, f, f.bfloat16(), 1)
    yield "backward rows", lambda: module.backward(f, f, f, 5, 64, 64, one, one, one, f, torch.ones(5), 1)
    yield "backward dots", lambda: module.backward(f, f, f, 4, 64, 64, one, one, one, f, one, 1)
    yield "backward free", lambda: module.backward(f, f, f, 4, 64, 64, one, one, r[:3], f, r, 1)
    out = torch.zeros(9999, dtype=torch.uint8)
    for i, given in enumerate(
        ((u8, 4, 64, 5, 1, out), (u8, 4, 64, 0, 1, out), (u8, 5, 64, 2, 1, out), (u8, -1, 64, 2, 1, out),
         (u8, 4, 64, 2, 7, out), (u8, 4, 64, 2, 0, out), (u8, 4, 64, 2, 1, out[:9]), (u8, 4, 64, 2, 1, out[1:]),
         (u8 + 4, 4, 64, 2, 1, out), (u8, HUGE, HUGE, 2, 1, out), (f, 4, 64, 2, 1, out), (None, 4, 64, 2, 1, out))
    ):  # fmt: skip
        yield f"prepack {i}", lambda g=given: module.prepack(*g)
    for i, given in enumerate(
        ((out[:8], 4, 64, 2, u8), (out, 4, 64, 9, u8), (out, -4, 64, 2, u8), (out, 4, 64, 2, u8[:1]),
         (out, OVERFLOW, 64, 2, u8), (None, 4, 64, 2, u8), (out, 4, 64, 2, None))
    ):  # fmt: skip
        yield f"unpack {i}", lambda g=given: module.unpack(*g)
    yield "fingerprint bytes", lambda: module.fingerprint(f, 10**9)
    yield "fingerprint negative", lambda: module.fingerprint(f, -1)
    yield "fingerprint None", lambda: module.fingerprint(None, 0)
    yield "fingerprint meta", lambda: module.fingerprint(meta, meta.nbytes)
    planes, scales = torch.zeros(9999, dtype=torch.uint8), torch.zeros(9999, dtype=torch.float16)
    steps, order = torch.tensor([1, 0], dtype=torch.int32), torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    for i, (step, place, n, k, most) in enumerate(
        ((steps, order + 64, 4, 64, 7), (steps, order - 1, 4, 64, 7), (steps + 1, order, 4, 64, 7),
         (-steps, order, 4, 64, 7), (steps, order, 0, 64, 7), (steps, order, 4, 64, 128), (steps, order, HUGE, 64, 7),
         (steps, order.long(), 4, 64, 7))
    ):  # fmt: skip
        yield (
            f"binarized {i}",
            lambda s=step, p=place, n=n, k=k, m=most: module.binarized(
                planes, scales, s, p, None, n, k, f, m, torch.ones(4, 4), 1
            ),
        )


def main() -> None:
    """Make each call; say which were not refused."""
    faulthandler.enable()
    count = 0
    for name, call in calls():
        print(name, file=sys.stderr, flush=True)  # a crash is behind the last of these
        count += 1
        try:
            call()
        except (bb.BellboxError, ValueError, TypeError, RuntimeError):
            continue
        except BaseException as error:
            print(f"{name}: {type(error).__name__}: {error}")
        else:
            print(f"{name}: was not refused")
    print(count, "calls")


if __name__ == "__main__":
    main()
