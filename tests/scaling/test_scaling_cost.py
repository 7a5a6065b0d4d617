"""The model of cost: counts against built models, and what must hold of any cluster."""

from __future__ import annotations

import dataclasses

import pytest

from bellbox.errors import BellboxError
from bellbox.models import LlamaConfig, build
from bellbox.scaling.cost import Network, shape_of, step_of
from bellbox.scaling.hardware import GPUS, LATENCY, Cluster
from bellbox.utils.skeleton import on_meta

H100 = GPUS["h100"]


def foreseen(size: str, gpus: int, **options):
    options = {"batch_tokens": 1 << 21, "context": 2048, **options}
    return step_of(Network(shape_of(size)), Cluster(H100, gpus), **options)


@pytest.mark.parametrize("name", ["95M", "300M", "1B", "7B"])
def test_parameters_are_those_of_the_built_model(name: str) -> None:
    network = Network(shape_of(name))
    with on_meta():
        model = build(network.shape)
    assert network.parameters == sum(p.numel() for p in model.parameters())
    blocks = sum(p.numel() for key, p in model.named_parameters() if p.dim() == 2 and "layers." in key)
    assert network.quantized == blocks


def test_published_sizes_are_what_they_are_called() -> None:
    assert Network(shape_of("7B")).parameters == 6_738_415_616  # LLaMA 7B
    with pytest.raises(BellboxError, match="of LLaMA's shape alone"):
        shape_of("gpt-95M")
    with pytest.raises(BellboxError, match="no model preset '8T'"):
        shape_of("8T")


def test_operations_are_those_that_a_dry_run_counts() -> None:
    """Six operations a multiplied parameter, and attention of queries with all keys: 4 T d in a forward."""
    shape = LlamaConfig(1000, 64, 160, 3, 4)
    wanted = 3 * 2 * (3 * (4 * 64 * 64 + 3 * 64 * 160) + 64 * 1000) + 3 * 3 * 4 * 128 * 64
    assert Network(shape).operations(128) == wanted


def test_what_autograd_keeps_is_linear_in_blocks_and_tokens() -> None:
    shape = LlamaConfig(1000, 64, 160, 2, 4)
    two = Network(shape).activations(256, 128, checkpointed=False)
    four = Network(dataclasses.replace(shape, num_hidden_layers=4)).activations(256, 128, checkpointed=False)
    eight = Network(dataclasses.replace(shape, num_hidden_layers=8)).activations(256, 128, checkpointed=False)
    assert eight - four == pytest.approx(2 * (four - two))
    assert Network(shape).activations(512, 128, checkpointed=False) == 2 * two
    assert Network(shape).activations(256, 128, checkpointed=True) < two


def test_a_collective_takes_what_a_ring_takes() -> None:
    cluster = Cluster(H100, 16)
    assert cluster.gather(1e9, 8) == pytest.approx(1e9 * 7 / 8 / H100.link + 7 * LATENCY)
    assert cluster.gather(1e9) == pytest.approx(1e9 * 15 / 16 / H100.network + 15 * LATENCY)
    assert Cluster(H100, 1).gather(1e9) == Cluster(H100, 1).reduce(1e9) == 0
    # Eight GPUs of a node send an eighth each over the network.
    assert cluster.reduce(1e10) < 2 * cluster.gather(1e10)


def test_more_gpus_take_less_memory_and_time_until_communication_shows() -> None:
    few, many = foreseen("7B", 64), foreseen("7B", 512)
    assert few is not None
    assert many is not None
    assert many.seconds < few.seconds
    assert many.products == pytest.approx(few.products / 8, rel=0.35)
    assert many.exposed / many.seconds >= few.exposed / few.seconds
    # Whole copies of 7B do not fit in 80 GB: 16 bytes a parameter are 108.
    assert foreseen("7B", 64, scheme="ddp") is None
    assert foreseen("95M", 64, scheme="ddp") is not None


def test_hybrid_gathers_within_nodes_alone() -> None:
    shared, hybrid = foreseen("1B", 512), foreseen("1B", 512, scheme="hybrid")
    assert shared is not None
    assert hybrid is not None
    assert hybrid.communication < shared.communication


def test_what_does_not_divide_is_one_line() -> None:
    with pytest.raises(BellboxError, match="take a multiple of 131,072"):
        foreseen("95M", 64, batch_tokens=100_000)
    with pytest.raises(BellboxError, match="12 GPUs are no whole number of nodes of 8"):
        Cluster(H100, 12)
