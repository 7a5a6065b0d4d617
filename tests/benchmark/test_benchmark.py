from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bellbox.benchmark import Spread, bench_kernels, bench_model, measure_machine, take_turns
from bellbox.benchmark import machine as machine_module
from bellbox.benchmark.kernels import in_rotation, random_layer
from bellbox.benchmark.model import ModelResult
from bellbox.cli import bench
from bellbox.cli.main import main
from bellbox.models import preset
from bellbox.ops import native
from bellbox.utils import processor
from bellbox.utils.processor import fast_bf16


@pytest.fixture(autouse=True)
def one_small_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bandwidth of caches will do here."""
    monkeypatch.setattr(machine_module, "_BYTES", 1 << 20)


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_contenders_take_turns_and_the_spread_is_the_quartiles() -> None:
    order: list[str] = []
    found = take_turns({name: lambda _, name=name: order.append(name) for name in "ab"}, 0.0, least=6)
    assert order[:2] == ["a", "b"]
    rounds = ["".join(order[i : i + 4]) for i in range(2, len(order), 4)]
    assert len(rounds) == 6
    assert set(rounds) == {"aabb", "bbaa"}
    assert all(0 <= s.low <= s.median <= s.high for s in found.values())
    assert Spread.of([5.0, 1.0, 4.0, 2.0, 3.0]) == Spread(3.0, 2.0, 4.0)


def test_the_machine_is_measured() -> None:
    machine = measure_machine()
    assert machine.read_bandwidth > 1e8
    assert (machine.integer_rate is None) == (not native.available())
    assert machine.integer_rate is None or machine.integer_rate > 1e8
    assert machine.cpu in str(machine)


def test_layers_are_held_against_what_the_machine_can_do() -> None:
    machine = measure_machine()
    found = bench_kernels(machine, 32, 64, 2, bits=(2, 1), hot=True, seconds=0.0)
    by_name = {each.name: each for each in found}
    assert list(by_name)[-2:] == ["Bellbox 2 bits", "Bellbox 1 bit"]
    two = by_name["Bellbox 2 bits"]
    assert two.weight_bytes == 32 * 64 * 2 // 8
    bandwidths = [each.weight_bytes / each.read_fraction / each.seconds.median for each in found]
    assert bandwidths == pytest.approx([bandwidths[0]] * len(found))
    assert bandwidths[0] > 1e8
    assert random_layer(32, 64, 3)(torch.randn(5, 64)).isfinite().all()


def test_copies_in_rotation_are_larger_than_a_cache_and_hot_ones_are_one() -> None:
    assert len(in_rotation(dict, 1 << 26, hot=False)) == 2
    assert len(in_rotation(dict, 1 << 22, hot=False)) == 32
    assert len(in_rotation(dict, 1, hot=False)) == 64
    assert len(in_rotation(dict, 1, hot=True)) == 1


def test_models_are_timed_in_prefill_and_decode() -> None:
    config = preset("tiny", vocab_size=64, num_hidden_layers=1, hidden_size=64, intermediate_size=64)
    lines: list[str] = []
    found = bench_model(config, (2,), prompt=8, seconds=0.0, progress=lines.append)
    assert [each.name for each in found] == [
        "fp32",
        *(["bf16"] if fast_bf16() else []),
        "2 bits, fp32 embeddings",
        "2 bits, int8 embeddings",
        "2 bits, int4 embeddings",
    ]
    for each in found:
        assert each.prefill_tokens_per_second == 8 / each.prefill.median
        assert each.to_dict()["decode_tokens_per_second"] == 1 / each.decode.median
    assert lines[-1] == "single tokens"


def test_the_command_prints_figures_and_writes_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "figures.json"
    main(
        [
            *("bench", "kernels", "--shapes", "16x32", "--rows", "1", "--bits", "2", "--hot"),
            *("--threads", "1", "--seconds", "0.01", "--json", str(target)),
        ]
    )
    figures = json.loads(target.read_text())
    assert figures["machine"]["threads"] == 1
    assert [each["name"] for each in figures["results"]][-1] == "Bellbox 2 bits"
    assert "16 x 32, 1 row, weights hot" in capsys.readouterr().out


@pytest.mark.parametrize("features", [set(), {"avx512_bf16", "avx512_vnni"}])
def test_torch_competes_in_what_the_processor_does_fast(features, monkeypatch, capsys) -> None:
    monkeypatch.setattr(processor, "_features", lambda: frozenset(features))
    monkeypatch.delenv("BELLBOX_ISA", raising=False)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    short = ["--bits", "2", "--threads", "1", "--seconds", "0.01"]
    main(["bench", "kernels", "--shapes", "16x32", "--rows", "1", "--hot", *short])
    layers = capsys.readouterr().out
    assert ("x bf16" in layers) == ("_int_mm" in layers) == bool(features)
    assert "x fp32" in layers


def test_a_small_preset_is_timed_by_its_own_defaults(monkeypatch, capsys) -> None:
    asked: list[int] = []

    def timed(config, bits, *, prompt, **_):
        asked.append(prompt)
        spread = Spread(1.0, 1.0, 1.0)
        return [ModelResult("fp32", prompt, spread, spread, None)]

    monkeypatch.setattr(bench, "bench_model", timed)
    for name in ("tiny", "95M"):
        main(["bench", "model", "--preset", name])
    assert asked == [preset("tiny").max_position_embeddings - 1, 256]
    assert "1.00 x fp32" in capsys.readouterr().out


def test_packed_models_compete_with_each_cache(capsys) -> None:
    flags = ["--preset", "tiny", "--bits", "2", "--embeddings", "int4", "--threads", "1", "--seconds", "0.05"]
    main(["bench", "model", *flags, "--prompt", "16", "--kv-cache", "fp32", "int8", "int4"])
    out = capsys.readouterr().out
    for name in ("2 bits, int4 embeddings ", "embeddings, int8 cache", "embeddings, int4 cache"):
        assert out.count(name) == 1
    assert "fp32, int8 cache" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kernels", "--threads", "100000"], "threads 1 to 1024"),
        (["kernels", "--seconds", "1e40"], "at most 86,400"),
        (["kernels", "--shapes", "4096"], "write OUTPUTSxINPUTS"),
        (["kernels", "--bits", "5"], "bits are 1 to 4"),
        (["model", "--preset", "7B"], "no model preset '7B'"),
        (["model", "--prompt", "100000"], "one of them new"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_clock_that_stands_still_divides_nothing_by_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("process_time", "perf_counter"):
        monkeypatch.setattr(f"bellbox.benchmark.timing.time.{name}", lambda: 1.0)
    found = take_turns({"a": lambda _: None}, -1.0, least=3)
    assert found["a"].median > 0
