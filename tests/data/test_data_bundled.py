from __future__ import annotations

import lzma
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import bellbox.data
from bellbox.data import bundled
from bellbox.data.prepare import prepare
from bellbox.errors import BellboxError
from waiting import finish

SHARED = Path(os.environ.get("BELLBOX_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))


def test_the_novels_open_quickly_and_are_made_once(tmp_path: Path) -> None:
    begin = time.process_time()  # of all threads; the wall clock belongs to other processes too
    first = bundled.open_classics(tmp_path)
    assert time.process_time() - begin < 3
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    second = bundled.open_classics(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == made
    assert first.path == second.path
    assert (first.train.bytes, first.valid.bytes) == (1_594_194, 175_636)
    assert first.vocab_size == 2048
    start = first.tokenizer.decode(first.train.read(0, 40))
    assert start.startswith("ALICE'S ADVENTURES IN WONDERLAND")


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("BELLBOX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert bundled.default_cache() == tmp_path / "home" / ".cache" / "bellbox"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert bundled.default_cache() == tmp_path / "xdg" / "bellbox"
    monkeypatch.setenv("BELLBOX_CACHE", str(tmp_path / "own"))
    assert bellbox.data.open("classics").path.parent == tmp_path / "own"


def test_a_damaged_cache_is_made_again(tmp_path: Path) -> None:
    shard = bundled.open_classics(tmp_path).path / "train-00000.bin"
    good = shard.read_bytes()
    shard.write_bytes(b"\x01" + good[1:])
    bundled.open_classics(tmp_path)
    assert shard.read_bytes() == good


def test_a_cache_that_cannot_be_written_names_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BellboxError, match=r"file: a file, so .*; BELLBOX_CACHE names another cache folder"):
        bundled.open_classics(tmp_path / "file")


@pytest.mark.slow
def test_two_processes_at_once_end_with_one_whole_dataset(tmp_path: Path) -> None:
    script = (
        "import sys; from bellbox.data.bundled import open_classics as o; print(o(sys.argv[1]).train.bytes)"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in running:
        assert finish(process)[0].strip() == "1594194"
        assert process.returncode == 0
    assert len(list(tmp_path.iterdir())) == 1
    bundled.open_classics(tmp_path)


def test_the_loser_of_the_race_takes_the_winners_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def beaten(inputs, out, **options):  # type: ignore[no-untyped-def]
        prepare(inputs, out, **options)
        return prepare(inputs, out, **options)

    monkeypatch.setattr(bundled, "prepare", beaten)
    assert bundled.open_classics(tmp_path).train.bytes == 1_594_194


def test_the_tokenizer_is_what_the_readme_says_makes_it(tmp_path: Path) -> None:
    readme = " ".join((bundled.FOLDER / "README.md").read_text(encoding="utf-8").replace("\\\n", " ").split())
    assert (
        "data/classics/train.txt.xz --valid src/bellbox/data/classics/valid.txt.xz --vocab-size 2048"
        in readme
    )
    again = prepare([bundled.TRAIN], tmp_path / "classics", valid=[bundled.VALID], vocab_size=2048)
    assert again.tokenizer.text == bundled.TOKENIZER.read_text(encoding="utf-8")


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no shared data at {SHARED}")
def test_the_bundled_text_is_the_shared_one() -> None:
    for file, name in ((bundled.TRAIN, "train"), (bundled.VALID, "valid")):
        assert (
            lzma.decompress(file.read_bytes()) == (SHARED / "text" / f"pd_classics_{name}.txt").read_bytes()
        )
