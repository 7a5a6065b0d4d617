"""What kernels meet in use: views, offsets, empty and enormous tensors, values that are no numbers, replays.

Each situation was reported of other libraries' kernels; here the answer is that of the torch reference, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bellbox.core.grid import Levels
from bellbox.core.hadamard import block_size
from bellbox.errors import BellboxError
from bellbox.ops import kept as bytes_of
from bellbox.ops.backends.triton import LINEAR
from bellbox.ops.encode import encode, row_rms
from bellbox.ops.fake_quantize import bbq_forward
from bellbox.ops.packed_linear import operation as packed_linear
from bellbox.ops.rotate import rotate
from bellbox.ops.weight_layout import prepack_operation

# numpy, which interprets, tells of NaN and overflow; a GPU does not.
pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning", "ignore:.*no factor of two", "ignore:one input channel"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bits, NaN included."""
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(7.25), b.nan_to_num(7.25))


def layer(
    x: Tensor, outputs: int, weights: int = 16, inputs: int = 16, normalise: str = "rms", signs: bool = False
) -> list[Any]:
    """Arguments of `packed_linear` for an input."""
    columns = x.shape[-1]
    draw = torch.Generator().manual_seed(columns + outputs)
    w, a = Levels.gaussian(weights), Levels.gaussian(inputs)
    codes = torch.randint(0, weights, (outputs, columns), dtype=torch.uint8, generator=draw)
    return [
        x, prepack_operation.reference(codes, weights, 1), torch.rand(outputs, generator=draw),
        torch.randn(outputs, generator=draw), torch.rand(1, generator=draw), torch.tensor(a.thresholds),
        torch.tensor([0.9]) if normalise == "static" else None,
        torch.randint(0, 2, (columns,), generator=draw).mul(2).sub(1).to(torch.int8) if signs else None,
        columns, weights, w.zero_point, a.zero_point, 1 if normalise == "absmax" else block_size(columns), normalise,
        normalise in ("absmax", "norm"), x.dtype,
    ]  # fmt: skip


def check(arguments: list[Any]) -> None:
    assert same(packed_linear(*arguments), packed_linear.reference(*arguments))


def inside(x: Tensor, offset: int, poison: int = 0xFF) -> Tensor:
    """The same numbers, `offset` of them behind the start of a buffer whose other bytes are NaN in every float."""
    size = x.element_size()
    whole = torch.full(((x.numel() + 2 * offset) * size,), poison, dtype=torch.uint8).view(x.dtype)
    found = whole[offset : offset + x.numel()].view(x.shape)
    return found.copy_(x)


@pytest.mark.parametrize("blocks", range(1, 18))
def test_nothing_beside_an_input_is_read_into_a_result(blocks: int) -> None:
    """bitsandbytes 2042, the other way round: scales and codes as views between NaN, at odd offsets."""
    levels, dtype = (2, 4, 8, 16)[blocks % 4], DTYPES[blocks % 3]
    x = torch.randn(1 + blocks % 5, 64 * blocks - blocks % 3).to(dtype)
    arguments = layer(
        x, 7 + blocks, levels, (16, 4, 2)[blocks % 3], ("rms", "static")[blocks % 2], blocks % 5 == 0
    )
    expected = packed_linear.reference(*arguments)
    views = [inside(each, 1 + blocks % 7) if isinstance(each, Tensor) else each for each in arguments]
    assert same(packed_linear(*views), expected)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.t().contiguous().t(),
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "every other column": lambda x: x.repeat_interleave(2, 1)[:, 1::2],
    "one row for all": lambda x: x[:1].expand(len(x), -1),
    "a slice of wider rows": lambda x: torch.cat((x, x.neg()), 1)[:, : x.shape[1]],
    "behind an odd offset": lambda x: inside(x, 3),
    "four dimensions": lambda x: x.reshape(2, 1, -1, x.shape[1]),
    "one dimension": lambda x: x[0],
    "a parameter": lambda x: torch.nn.Parameter(x),
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_view_of_an_input_is_coded_as_a_copy(name: str, dtype: torch.dtype) -> None:
    x = VIEWS[name](torch.randn(4, 96).to(dtype))
    arguments = layer(x, 9)
    with torch.no_grad():
        assert same(packed_linear(*arguments), packed_linear(x.clone().contiguous(), *arguments[1:]))
        check(arguments)
        rows = x.reshape(-1, 96)
        assert torch.equal(row_rms(rows), row_rms(rows.contiguous().clone()))
        assert same(rotate(x, 0.25, 32, dtype), rotate.reference(x, 0.25, 32, dtype))
        r, thresholds = torch.rand(len(rows), 1), Levels.gaussian(8).thresholds
        assert torch.equal(encode(rows, r, thresholds, 32), encode.reference(rows, r, thresholds, 32))
        assert torch.equal(
            bytes_of.keep(rows, r, thresholds, 32), bytes_of.keep.reference(rows, r, thresholds, 32)
        )


def test_any_view_of_a_weight_multiplies_as_a_copy() -> None:
    """Offsets that no 16-byte copy can start at, and buffers with steps between their numbers."""
    for levels in (2, 4, 8, 16):
        arguments = layer(torch.randn(3, 130), 21, levels, signs=True)
        expected = packed_linear.reference(*arguments)
        for place in (1, 2, 3, 5, 7):
            given = arguments[place]
            stepped = torch.stack((given, torch.full_like(given, 1)), -1).flatten()[::2]
            assert not stepped.is_contiguous() or given.numel() < 2
            for view in (stepped, inside(given, 3, 0x7F)):
                changed = [*arguments]
                changed[place] = view
                assert same(packed_linear(*changed), expected)


@pytest.mark.parametrize("columns", [1, 3, 31, 63, 65, 127, 129, 191, 257])
@pytest.mark.parametrize(("outputs", "levels"), [(1, 16), (15, 2), (17, 8), (33, 4)])
def test_odd_widths(columns: int, outputs: int, levels: int) -> None:
    check(layer(torch.randn(1 + columns % 4, columns), outputs, levels, (16, 2, 4)[columns % 3]))


VALUES = (math.inf, -math.inf, math.nan, 3e38, -1e30, 1e-45, 0.0, -0.0, 65504.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalise", ["rms", "absmax", "norm", "static"])
def test_values_that_are_no_numbers_spoil_their_own_row_alone(normalise: str, dtype: torch.dtype) -> None:
    x = torch.randn(len(VALUES) + 1, 64)
    for row, value in enumerate(VALUES):
        x[row, row * 7] = value
    arguments = layer(x.to(dtype), 5, normalise=normalise)
    check(arguments)
    arguments[0] = torch.full((2, 64), math.inf).to(dtype)
    check(arguments)
    arguments[0] = torch.zeros(2, 64).to(dtype)
    check(arguments)


def test_calls_without_rows_go_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = layer(torch.randn(2, 64), 5)
    for shape in ((0, 64), (2, 0, 64)):
        empty = torch.empty(shape)
        monkeypatch.setenv("BELLBOX_BACKEND", "triton")
        with pytest.raises(BellboxError, match="does not take packed_linear: there are no numbers"):
            packed_linear(empty, *arguments[1:])
        monkeypatch.setenv("BELLBOX_BACKEND", "")
        assert packed_linear(empty, *arguments[1:]).shape == (*shape[:-1], 5)


def test_more_outputs_than_a_launch_has_programs_are_refused() -> None:
    from bellbox.ops.backends.triton import limits

    arguments: dict[str, Any] = dict(zip(LINEAR, layer(torch.randn(1, 64), 5), strict=True))
    assert limits.WHY_NOT["packed_linear"](arguments) is None
    arguments["weight_scale"] = torch.ones(1).expand(65_535 * 32 + 1)
    assert limits.WHY_NOT["packed_linear"](arguments) == "2097121 outputs"
    arguments["weight_scale"] = torch.empty(0)
    assert limits.WHY_NOT["packed_linear"](arguments) == "there are no outputs"


class _NoNumberRead(TorchDispatchMode):
    """Refuses what waits for a device: reading a number of a tensor, or shapes that depend on numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "item", "nonzero", "equal", "masked_select", "unique_dim"):
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


def test_twenty_calls_on_new_values_in_the_same_buffers() -> None:
    """SageAttention 392: what a graph replays must read its buffers anew, and nothing may be read back meanwhile."""
    from bellbox.ops.backends.triton.launch import TABLE

    arguments = layer(torch.randn(3, 96), 20, signs=True)
    levels = Levels.gaussian(8)
    for turn in range(20):
        for place in (0, 2, 3, 4):
            arguments[place].copy_(torch.rand_like(arguments[place]) * (100.0 if turn % 3 == 0 else 1.0))
        arguments[0][turn % 3] = 0
        arguments[1].random_(0, 256)
        arguments[7].mul_(-1)
        r = torch.rand(3, 1) + 0.5
        with _NoNumberRead():
            found = TABLE["packed_linear"](*arguments)
            kept = TABLE["keep"](arguments[0], r, levels.thresholds, 32)
            out, value = TABLE["bbq_forward"](arguments[0], r, r, levels.thresholds, 4.0, 32, torch.float32)
            TABLE["bbq_backward"](out, value, out, r, r, torch.ones_like(r), 32, False)
        assert same(found, packed_linear.reference(*arguments))
        assert torch.equal(kept, bytes_of.keep.reference(arguments[0], r, levels.thresholds, 32))
        expected = bbq_forward.reference(arguments[0], r, r, levels.thresholds, 4.0, 32, torch.float32)
        assert same(out, expected[0])


# --- offsets above 2^31: tensors of many gigabytes that nobody has written are no memory yet ---


@pytest.fixture
def last_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every launch the last program alone runs; the others would take the interpreter days."""
    import triton.runtime.interpreter as interpreting

    def run(self: Any, *given: Any, **named: Any) -> None:
        inspect = interpreting.inspect
        wanted = inspect.getfullargspec(self.fn).args
        named = {name: value for name, value in named.items() if name in wanted}
        held, held_named = self._init_args_hst(given, named)
        scope = interpreting._patch_lang(self.fn)
        try:
            arguments = {
                name: value if name in self.constexprs else interpreting._implicit_cvt(value)
                for name, value in inspect.getcallargs(self.fn, *held, **held_named).items()
            }
            grid = (*self.grid, 1, 1)[:3]
            interpreting.interpreter_builder.set_grid_dim(*grid)
            interpreting.interpreter_builder.set_grid_idx(*(each - 1 for each in grid))
            self.fn(**arguments)
        finally:
            scope.restore()  # nothing is copied back: the tensors lie on the CPU already

    monkeypatch.setattr(interpreting.GridExecutor, "__call__", run)


FAR = 2**31


@pytest.mark.usefixtures("last_program")
class TestFarOffsets:
    """Numbers behind the first 2^31."""

    columns = 8192

    def rows(self, dtype: torch.dtype = torch.float16) -> Tensor:
        """More than 2^31 numbers, zero but for the last row."""
        x = torch.empty(FAR // self.columns + 3, self.columns, dtype=dtype)
        x[-1] = torch.randn(self.columns)
        return x

    def test_rows(self) -> None:
        from bellbox.ops.backends.triton.launch import TABLE

        x, levels = self.rows(), Levels.gaussian(8)
        last, r = x[-1:], torch.full((len(x), 1), 0.7)
        thresholds, steps = levels.thresholds, bytes_of.stepped(levels.thresholds)
        assert steps is not None
        assert torch.equal(TABLE["row_rms"](x)[-1:], row_rms(last))
        piece = slice(-2048, None)  # a row comes in pieces: the last program has the end of it
        codes = TABLE["encode"](x, r, thresholds, 128)
        assert torch.equal(codes[-1:, piece], encode.reference(last, r[-1:], thresholds, 128)[:, piece])
        kept = TABLE["keep"](x, r, thresholds, 128)
        expected = bytes_of.keep.reference(last, r[-1:], thresholds, 128)
        assert torch.equal(kept[-1:, piece], expected[:, piece])
        turned = TABLE["rotate"](x, 0.5, 128, torch.float16)
        assert same(turned[-1:, piece], rotate.reference(last, 0.5, 128, torch.float16)[:, piece])
        decoded = TABLE["decode_kept"](kept, r, steps, levels.offset, torch.float16)
        wanted = bytes_of.decode_kept.reference(kept[-1:], r[-1:], steps, levels.offset, torch.float16)
        assert same(decoded[-1:, piece], wanted[:, piece])
        assert torch.equal(
            TABLE["kept_codes"](kept, steps)[-1, -4096:], bytes_of.kept_codes(kept[-1:], steps)[0, -4096:]
        )

    def test_forward_and_backward(self) -> None:
        from bellbox.ops.backends.triton.launch import TABLE

        x, levels = self.rows(), Levels.gaussian(8)
        r, one = torch.full((len(x), 1), 0.7), torch.ones(1, 1)
        out, value = TABLE["bbq_forward"](x, r, one, levels.thresholds, levels.offset, 128, torch.float16)
        expected = bbq_forward.reference(
            x[-1:], r[-1:], one, levels.thresholds, levels.offset, 128, torch.float16
        )
        assert same(out[-1:, -2048:], expected[0][:, -2048:])
        assert same(value[-1:, -2048:], expected[1][:, -2048:])
        out[-1], value[-1] = expected[0], expected[1]
        grad, dots = TABLE["bbq_backward"](x, value, out, r, one, torch.ones(len(x), 1), 128, False)
        from bellbox.ops.fake_quantize import bbq_backward

        wanted = bbq_backward.reference(
            x[-1:], value[-1:], out[-1:], r[-1:], one, torch.ones(1, 1), 128, False
        )
        assert torch.allclose(grad[-1:].float(), wanted[0].float(), rtol=0.01, atol=0.01)
        assert torch.allclose(dots[-1:], wanted[1], rtol=1e-3, atol=1e-2)

    @pytest.mark.parametrize(("weights", "inputs", "planes"), [(16, 16, 0), (4, 4, 1 << 30)])
    def test_coded_rows_and_products_with_them(
        self, weights: int, inputs: int, planes: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Inputs and codes; with bit planes more than 2^31 bytes of neither, so results and rows stand for them."""
        from bellbox.ops.backends.triton import plan
        from bellbox.ops.backends.triton.launch import coding, products

        monkeypatch.setattr(plan, "plane_rows", lambda on: planes)
        x = self.rows()
        arguments = layer(x[-1:], 1, weights, inputs)
        own = coding.Weights(arguments[1], arguments[2], None, Levels.gaussian(weights).grid, self.columns)
        grid = Levels.gaussian(inputs).grid
        rows = coding.code_rows(x, own, grid, arguments[4], arguments[5], None, None, 128, "rms", False)
        arguments[12], arguments[3] = 128, None
        assert same(products.multiply(rows, own, torch.float16)[-1:], packed_linear.reference(*arguments))

    def test_weights_and_results(self) -> None:
        """Words of weights, and places of results, behind 2^31."""
        from bellbox.ops.backends.triton import plan
        from bellbox.ops.backends.triton.launch import coding, products

        columns, outputs = 64, (FAR // 8 // 16 + 3) * 16
        w, a = Levels.gaussian(16), Levels.gaussian(16)
        strip = prepack_operation.reference(torch.randint(0, 16, (16, columns), dtype=torch.uint8), 16, 1)
        packed = torch.empty(outputs // 16 * len(strip), dtype=torch.uint8)
        assert packed.numel() // 4 > FAR
        packed[-len(strip) :] = strip
        scale = torch.empty(outputs)
        scale[-16:] = torch.rand(16)
        own = coding.Weights(packed, scale, None, w.grid, columns)
        x, one = torch.randn(1, columns), torch.ones(1)
        rows = coding.code_rows(x, own, a.grid, one, torch.tensor(a.thresholds), None, None, 64, "rms", False)
        found = products.multiply(rows, own, torch.float16, plan.Tiles(16, 16, 1, 4, 1))
        arguments = layer(x, 16)
        arguments[1], arguments[2], arguments[3], arguments[4], arguments[15] = (
            strip,
            scale[-16:],
            None,
            one,
            torch.float16,
        )
        assert same(found[:, -16:], packed_linear.reference(*arguments))

    def test_the_layout_of_weights(self) -> None:
        from bellbox.ops.backends.triton.launch import TABLE

        outputs = FAR // self.columns + 16
        codes = torch.empty(outputs, self.columns, dtype=torch.uint8)
        codes[-16:] = torch.randint(0, 16, (16, self.columns), dtype=torch.uint8)
        packed = TABLE["prepack"](codes, 16, 1)
        expected = prepack_operation.reference(codes[-16:], 16, 1)
        assert torch.equal(packed[-512:], expected[-512:])
        packed[-len(expected) :] = expected
        assert torch.equal(TABLE["unpack"](packed, outputs, self.columns, 16)[-1, -1024:], codes[-1, -1024:])
