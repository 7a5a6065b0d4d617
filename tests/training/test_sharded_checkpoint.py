"""Checkpoints in shards: written by several ranks, read by any number of them, and never believed when damaged."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sharding
import torch
from safetensors.torch import load_file
from torch import Tensor

from bellbox.errors import BellboxError
from bellbox.runs.checkpoint import MANIFEST, Checkpoint, Checkpoints, CheckpointWarning, State
from bellbox.runs.saver import Saver
from bellbox.runs.shards import parse_layout, shard_name
from bellbox.training import TrainConfig, load_run
from bellbox.utils.files import checksum

RANKS = 3
HERE = Path(__file__).parent


def tensors(step: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(step)
    return {
        "model/w": torch.randn(10, 6, generator=draw),
        "model/codes": torch.randint(0, 255, (7,), dtype=torch.uint8, generator=draw),
        "optimizer/w/exp_avg": torch.randn(10, 6, generator=draw),
        "optimizer/w/step": torch.tensor(float(step)),
    }


def save(checkpoints: Checkpoints, step: int) -> Path:
    state = State(step=step, tokens=step * 10, seconds=1.5, random={"rank": 0})
    sharding.save_in_shards(checkpoints, state, tensors(step), RANKS, {"config": None})
    return checkpoints.path(step)


def last_of(checkpoints: Checkpoints) -> Checkpoint:
    found = checkpoints.last()
    assert found is not None
    return found


def test_what_was_saved_in_shards_comes_back_whole(tmp_path: Path) -> None:
    save(Checkpoints(tmp_path), 3)
    found, wanted = last_of(Checkpoints(tmp_path)), tensors(3)
    assert (found.step, found.ranks, found.state.tokens) == (3, RANKS, 30)
    assert torch.equal(found.model_tensors()["w"], wanted["model/w"])
    assert torch.equal(found.model_tensors()["codes"], wanted["model/codes"])
    assert torch.equal(found.optimizer_tensors()["w/exp_avg"], wanted["optimizer/w/exp_avg"])
    assert found.optimizer_tensors()["w/step"].item() == 3.0
    # Its own random state for each rank; a rank that there was not goes on with that of the first.
    assert [found.random_of(rank) for rank in range(4)] == [{"rank": rank} for rank in (0, 1, 2, 0)]


def test_its_files_are_plain_safetensors(tmp_path: Path) -> None:
    shard = load_file(save(Checkpoints(tmp_path), 1) / shard_name(1, RANKS))
    assert torch.equal(shard["model/w@4,0"], tensors(1)["model/w"][4:8])
    assert shard["model/codes@3"].dtype == torch.uint8


@pytest.mark.parametrize("file", [shard_name(0, RANKS), shard_name(2, RANKS), "state.json", MANIFEST])
@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_a_damaged_shard_is_named_and_the_checkpoint_before_is_taken(
    tmp_path: Path, file: str, how: str
) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    victim = save(checkpoints, 2) / file
    content = bytearray(victim.read_bytes())
    if how == "remove":
        victim.unlink()
    elif how == "cut":
        victim.write_bytes(content[: len(content) // 2])
    else:
        # In the manifest, the file of a chunk: its own checksum must see it.
        position = content.index(b"[[0, [0, 0], [4,") + 2 if file == MANIFEST else len(content) - 3
        content[position] ^= 1
        victim.write_bytes(content)
    with pytest.warns(CheckpointWarning, match=r"step-00000002.*step-00000001 is taken") as caught:
        assert last_of(checkpoints).step == 1
    assert "\n" not in str(caught[0].message)
    with pytest.raises(BellboxError, match="step-00000002"):
        checkpoints.at(2)


def rewritten(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """A manifest that lies, with a checksum that fits."""
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    manifest["sha256"] = checksum(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["tensors"]["model/w"].update(shape=[10**6, 10**6]),
        lambda m: m["tensors"]["model/w"].update(dtype="F8"),
        lambda m: m["tensors"]["model/w"]["chunks"][0].__setitem__(0, 7),
        lambda m: m["tensors"]["model/w"]["chunks"][0].__setitem__(1, [-1, 0]),
        lambda m: m["tensors"]["model/w"]["chunks"][0].__setitem__(1, [8, 0]),
        lambda m: m["tensors"]["model/w"]["chunks"].pop(),
        lambda m: m["tensors"].update(
            {"model/x": {"dtype": "F32", "shape": [10**9], "chunks": [[0, [0], [10**9]]]}}
        ),
        lambda m: m.update(tensors=[1]),
        lambda m: m["files"].update({"../../other": m["files"].pop(shard_name(0, RANKS))}),
    ],
)
def test_a_manifest_that_lies_is_refused_in_a_line(
    tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    rewritten(save(Checkpoints(tmp_path), 1), change)
    with pytest.raises(BellboxError, match=MANIFEST) as caught:
        Checkpoints(tmp_path).at(1)
    assert "\n" not in str(caught.value)


def test_a_shard_that_holds_another_shape_than_the_manifest_says_is_refused(tmp_path: Path) -> None:
    def swap(manifest: dict[str, Any]) -> None:
        tensor = manifest["tensors"]["model/w"]
        tensor["shape"] = [6, 10]
        for number, (_, offsets, sizes) in enumerate(tensor["chunks"]):
            tensor["chunks"][number][1:] = [offsets[::-1], sizes[::-1]]

    path = save(Checkpoints(tmp_path), 1)
    rewritten(path, swap)
    with pytest.raises(BellboxError, match=r"damaged, holds no 'model/w@0,0' as the manifest"):
        Checkpoints(tmp_path).at(1).model_tensors()


def test_a_layout_whose_chunks_overlap_is_refused(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [4], "chunks": [[0, [0], [2]], [0, [0], [2]]]}
    with pytest.raises(BellboxError, match="layout of tensor 'w' cannot be"):
        parse_layout({"w": entry}, ["shard"], tmp_path)


def test_nothing_in_it_is_unpickled(tmp_path: Path) -> None:
    save(Checkpoints(tmp_path), 1)
    watch = (
        "import sys\n"
        "from pathlib import Path\n"
        "import torch\n"
        "from bellbox.runs.checkpoint import Checkpoints\n"
        "from bellbox.runs.distributed_checkpoint import load_pieces\n"
        "def look(event, args):\n"
        "    assert event != 'pickle.find_class', args\n"
        "found = Checkpoints(Path(sys.argv[1])).last()\n"
        "targets = {n: torch.zeros(t.shape, dtype=t.dtype) for n, t in found.layout.items()}\n"
        "sys.addaudithook(look)\n"
        "load_pieces(found.path, found.layout, targets)\n"
        "assert targets['model/w'].any()\n"
        "try:\n"
        "    import pickle; pickle.loads(pickle.dumps(Path('x')))\n"
        "except AssertionError:\n"
        "    print('watched')\n"
    )
    done = subprocess.run([sys.executable, "-c", watch, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout == "watched\n", done.stderr


# --- written in the background ---


def test_training_may_change_what_is_being_saved(tmp_path: Path) -> None:
    checkpoints, weight = Checkpoints(tmp_path), torch.ones(300, 400)
    saver = Saver(checkpoints)
    for step in (1, 2):
        weight.fill_(step)
        state = State(step, 0, 0.0, random={"draws": step})
        saver.save(state, {"w": weight}, {}, {})
        weight.fill_(-1.0)
        state.random = {}
    saver.wait()
    assert saver.durable == 2
    for step in (1, 2):
        found = checkpoints.at(step)
        assert torch.equal(found.model_tensors()["w"], torch.full((300, 400), float(step)))
        assert found.state.random == {"draws": step}


def test_what_must_be_on_the_disk_first_is(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    saver, seen = Saver(checkpoints), []
    saver.save(
        State(1, 0, 0.0), {"w": torch.ones(3)}, {}, {}, before=lambda: seen.append(checkpoints.steps())
    )
    saver.wait()
    assert seen == [[]]


@pytest.mark.parametrize("background", [True, False])
def test_a_writer_that_fails_raises_and_leaves_the_one_before(tmp_path: Path, background: bool) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    saver, big = Saver(checkpoints, background), {"w": torch.ones(1000, 100)}
    saver.save(State(1, 0, 0.0), big, {}, {})
    saver.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large.*step-00000002"):  # noqa: PT012 (by either call)
            saver.save(State(2, 0, 0.0), big, {}, {})
            saver.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert last_of(checkpoints).step == 1
    saver.save(State(3, 0, 0.0), big, {}, {})
    saver.wait()
    assert checkpoints.steps() == [3]


# --- by many ranks ---


def test_saved_by_three_ranks_it_is_read_by_one_two_and_four(tmp_path: Path) -> None:
    """Ten, five and one rows on three ranks: some hold fewer, some nothing."""
    done = subprocess.run(
        [sys.executable, HERE / "shard_ranks.py", tmp_path], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["read by"] == [1, 2, 4]
    # What all ranks hold alike is written once, by one of them; and a failure of one is told to all.
    assert told["bytes"] < 1.5 * told["tensor bytes"] + told["overhead"]
    assert told["failed"] == ["File too large"] * 3
    assert told["left"] == ["step-00000007"]


# --- in bounded memory ---

CONVERTER = """
import contextlib, io, sys
import torch
from bellbox.cli.convert import main
def memory(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))
def convert(run, out):
    with contextlib.redirect_stdout(io.StringIO()):
        main([run, "--out", out, "--no-check"])
torch.set_num_threads(1)
convert(sys.argv[1], sys.argv[1] + "-packed")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = memory("VmRSS")
convert(sys.argv[2], sys.argv[2] + "-packed")
print(memory("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured on Linux")
def test_converting_takes_the_model_and_not_its_checkpoint(
    tiny: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    weights = {name: sharding.write_run(tiny(name), width) for name, width in (("small", 64), ("big", 384))}
    done = subprocess.run(
        [sys.executable, "-c", CONVERTER, tmp_path / "small", tmp_path / "big"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # The checkpoint is three times the weights; the packed model comes on top of them, and slabs.
    assert int(done.stdout) < 1.6 * weights["big"]
    assert load_run(tmp_path / "small").step == 1
