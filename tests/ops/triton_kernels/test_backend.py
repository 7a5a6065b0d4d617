"""Triton as a backend: whole models run through it, and a machine that lacks something says what, once."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import bellbox as bb
from bellbox.cli.main import main
from bellbox.models import build, preset
from bellbox.nn import weights_quantized_once
from bellbox.ops import dispatch
from bellbox.ops.backends.triton import TritonBackend, availability
from bellbox.ops.encode import encode, row_rms


def packed(bits: int) -> tuple[nn.Module, torch.Tensor]:
    """A LLaMA of one block, packed, and tokens."""
    torch.manual_seed(0)
    config = preset(
        "tiny", vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    model = bb.prepare(build(config, seed=0), bb.Recipe.bbq(bits)).eval()
    tokens = torch.randint(0, 32, (1, 3))
    with torch.no_grad():
        model(tokens)
        return bb.convert(model), tokens


def test_a_packed_model_gives_the_same_logits_and_codes_a_shared_input_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from bellbox.ops.backends.triton.launch import linear

    monkeypatch.setenv("BELLBOX_BACKEND", "reference")
    model, tokens = packed(4)
    with torch.no_grad():
        expected = model(tokens)
    monkeypatch.setenv("BELLBOX_BACKEND", "triton")
    lines = bb.backend_report(model).splitlines()
    assert len(lines) == 7
    assert all(line.endswith("packed_linear: triton") for line in lines)
    code_rows, coded = linear.code_rows, list[int]()

    def counted(*arguments: Any) -> Any:
        coded.append(1)
        return code_rows(*arguments)

    monkeypatch.setattr(linear, "code_rows", counted)
    with torch.no_grad():
        assert torch.equal(model(tokens), expected)
    assert len(coded) == 4  # q, k, v; o; gate, up; down


def step_of(model: nn.Module, run: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of one training step in bf16."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y = run(x)
    y.float().square().sum().backward()
    grads = [each.grad for each in model.parameters() if each.grad is not None]
    return [y.detach(), *(each.clone() for each in grads)]


@pytest.mark.parametrize(("on_integers", "rows"), [(True, 3), (False, 2)])
def test_a_training_step_is_that_of_the_reference_eager_and_compiled(
    on_integers: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BELLBOX_BACKEND", "reference")
    torch.manual_seed(0)
    model = bb.prepare(nn.Linear(64, 6), bb.Recipe.bbq(4, integer_forward=on_integers)).train()
    x = torch.randn(rows, 64)
    step_of(model, model, x)  # sets the scale of the input
    expected = step_of(model, model, x)
    monkeypatch.setenv("BELLBOX_BACKEND", "triton")
    eager = step_of(model, model, x)
    torch.compiler.reset()
    compiled = step_of(model, torch.compile(model, fullgraph=True, backend="aot_eager"), x)
    assert len(expected) >= 3  # output, weight, bias, gammas
    for found in (eager, compiled):
        assert len(found) == len(expected)
        assert torch.equal(found[0], expected[0])
        for mine, other in zip(found[1:], expected[1:], strict=True):
            scale = float(other.float().abs().max())
            assert torch.allclose(mine.float(), other.float(), rtol=0.02, atol=0.01 * scale)


def test_training_runs_on_these_kernels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forced, the backend is asked for every operation; what it lacks would be refused, not taken silently."""
    asked: set[str] = set()
    implementation = TritonBackend.implementation

    def watched(self: TritonBackend, operation: str) -> Any:
        asked.add(operation)
        return implementation(self, operation)

    monkeypatch.setattr(TritonBackend, "implementation", watched)
    model = bb.prepare(nn.Linear(64, 3), bb.Recipe.bbq(4, integer_forward=True)).train()
    x = torch.randn(3, 64)
    step_of(model, model, x)
    assert {
        "row_rms",
        "keep",
        "kept_codes",
        "prepack",
        "kept_linear",
        "bbq_backward_kept",
        "decode_kept",
    } <= asked


LACKING = [
    ((False, (9, 0), None), "Triton is not installed"),
    ((True, (7, 5), None), "the GPU has compute capability 7.5, the kernels need 8.0"),
    ((True, (9, 0), "6.0"), "the kernels are not tried on ROCm"),
    ((True, (8, 0), None), None),
    ((True, (12, 0), None), None),
]


@pytest.mark.parametrize(("machine", "reason"), LACKING)
def test_what_keeps_the_kernels_from_a_gpu(machine: Any, reason: str | None) -> None:
    assert availability.lacking(*machine) == reason


NO_COMPILER = "Triton does not start: Failed to find C compiler."


@pytest.mark.parametrize(
    ("machine", "trouble"),
    [((False, (9, 0)), None), ((True, (7, 5)), None), ((True, (9, 0)), None), ((True, (9, 0)), NO_COMPILER)],
)
def test_a_gpu_without_kernels_runs_the_reference_and_says_so_once(
    machine: tuple[bool, tuple[int, int]], trouble: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BELLBOX_BACKEND", "")
    monkeypatch.setattr(availability, "installed", lambda: machine[0])
    monkeypatch.setattr(availability, "_capability", lambda index: machine[1])
    availability._tell.cache_clear()
    monkeypatch.setattr(availability, "trouble", lambda: trouble)
    reason = availability.lacking(*machine, None) or trouble
    with FakeTensorMode(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        x, r = torch.empty(2, 64, device="cuda"), torch.empty(2, 1, device="cuda")
        for _ in range(2):
            backend, choice = encode.choose((x, r, [0.0], 64))
            assert (None if backend is None else backend.name) == ("triton" if reason is None else None)
            row_rms.choose((x,))
    assert reason is None or ("triton", reason) in choice.refused
    told = [str(each.message) for each in said if "Bellbox" in str(each.message)]
    assert len(told) == (reason is not None)
    assert reason is None or (reason in told[0] and "\n" not in told[0])


class _Driver:
    """Of a Triton whose first launch fails, as `triton.runtime.driver`."""

    @property
    def active(self) -> Any:
        raise RuntimeError("Failed to find C compiler.\nSecond line")


def test_a_triton_that_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton.runtime

    monkeypatch.setattr(triton.runtime, "driver", _Driver())
    assert availability.trouble.__wrapped__() == NO_COMPILER
    monkeypatch.setitem(sys.modules, "triton.runtime", None)
    why = availability.trouble.__wrapped__()
    assert why is not None
    assert why.startswith("Triton does not start: import of triton.runtime halted")


@pytest.mark.parametrize("machine", [(False, (9, 0)), (True, (7, 5))])
def test_a_model_on_such_a_gpu_answers_as_the_reference(
    machine: tuple[bool, tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way through layers and operations, here with tensors of the CPU taken for those of such a GPU."""
    model, tokens = packed(2)
    with torch.no_grad():
        monkeypatch.setenv("BELLBOX_BACKEND", "reference")
        expected = model(tokens)
        monkeypatch.setenv("BELLBOX_BACKEND", "")
        reason = availability.lacking(*machine, None)
        assert reason is not None

        def told(device: torch.device) -> str | None:
            assert device.type == "cpu"
            availability._tell(reason)
            return reason

        availability._tell.cache_clear()
        monkeypatch.setattr(availability, "why_not_on", told)
        others = [each for each in dispatch._backends if each.name != "triton"]
        for each in others:
            dispatch.unregister(each.name)
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                assert torch.equal(model(tokens), expected)
                assert torch.equal(model(tokens), expected)
            lines = bb.backend_report(model).splitlines()
        finally:
            for each in others:
                dispatch.register(each)
    assert all(f"packed_linear: reference (not triton: {reason})" in line for line in lines)
    assert sum("no Bellbox kernels on this GPU" in str(each.message) for each in said) == 1


def test_tensors_elsewhere_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    x, r = torch.ones(2, 64), torch.ones(2, 1)
    backend = TritonBackend()
    arguments = {"x": x, "r": r, "thresholds": [0.0], "block": 64}
    assert backend.why_not("encode", arguments) is None
    assert backend.why_not("rms_norm", {"x": x}) == "has no kernel for it"
    assert backend.why_not("encode", {**arguments, "x": x.to("meta")}) == "tensors are on cpu and meta"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert backend.why_not("encode", arguments) == "a tensor is on cpu: Triton's kernels are for CUDA"
    assert not backend.may_take("encode", {"x": x})
    monkeypatch.delenv("BELLBOX_BACKEND")
    assert dispatch.backends().index("cpu") < dispatch.backends().index("triton")


def test_the_command_line_says_whether_it_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BELLBOX_BACKEND")
    main(["--version", "-v"])
    assert "  triton: interpreted, on the CPU (TRITON_INTERPRET=1)" in capsys.readouterr().out
    monkeypatch.delenv("TRITON_INTERPRET")
    main(["--version", "-v"])
    printed = capsys.readouterr().out
    assert "packed_linear: cpu, triton, reference" in printed
    if not torch.cuda.is_available():
        assert "  triton: no CUDA device" in printed


def test_importing_bellbox_imports_no_triton() -> None:
    code = "import sys, bellbox; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("on_integers", [True, False])
def test_weights_are_quantized_once_in_a_step_of_several_batches(
    on_integers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within an optimizer step weights stand still: whatever codes them runs once, not for each batch."""
    rows: list[int] = []
    implementation = TritonBackend.implementation

    def watched(self: TritonBackend, operation: str) -> Any:
        run = implementation(self, operation)

        def counted(x: torch.Tensor, *rest: Any) -> Any:
            rows.extend([len(x)] * (operation in ("keep", "bbq_forward")))
            return run(x, *rest)

        return counted

    torch.manual_seed(0)
    model = bb.prepare(nn.Linear(32, 5), bb.Recipe.bbq(4, integer_forward=on_integers)).train()
    batches = [torch.randn(3, 32) for _ in range(3)]
    step_of(model, model, batches[0])  # sets the scale of the input
    monkeypatch.setattr(TritonBackend, "implementation", watched)
    with weights_quantized_once(model, torch.bfloat16):
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16):
                model(batch).float().square().sum().backward()
    assert sorted(rows) == [3, 3, 3, 5]  # three batches of three rows, one weight of five
