"""Reading what others have written, and writing files that are whole or not there."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bellbox.utils.files as files
from bellbox.cli.output import require_writable, write_file
from bellbox.errors import BellboxError
from bellbox.utils.files import (
    lock,
    new_file,
    new_folder,
    open_regular,
    parsing,
    read_bytes,
    read_json,
    read_tensors,
    read_text,
    write_tensors,
    write_text,
)

posix = pytest.mark.skipif(os.name != "posix", reason="pipes and devices are POSIX's")


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


@posix
def test_pipes_and_devices_are_not_read(pipe: Path) -> None:
    for path, kind in ((pipe, "a pipe"), (Path("/dev/zero"), "a device"), (pipe.parent, "a folder")):
        for reader in (open_regular, read_json, read_tensors, lambda one: read_bytes(one, 100)):
            with pytest.raises(BellboxError, match=f"{path}: is {kind}, not a regular file"):
                reader(path)


def test_reading_is_bounded_and_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"abc\xff")
    assert read_bytes(file, 4) == b"abc\xff"
    with pytest.raises(BellboxError, match="file: more than the 3 bytes"):
        read_bytes(file, 3)
    with pytest.raises(BellboxError, match="file: not UTF-8 at byte 3"):
        read_text(file, 4)
    with pytest.raises(BellboxError, match="missing: cannot be read"):
        read_text(tmp_path / "missing", 4)
    file.write_text('{"a":' * 100_000)
    with pytest.raises(BellboxError, match="not readable as JSON"):
        read_json(file)


def test_whatever_a_parser_raises_is_one_line() -> None:
    panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})
    for error in (KeyError("a\nb"), panic("no regex"), OSError(28, "full")):
        with pytest.raises(BellboxError, match=r"^x: cannot be read as a y \(.+\)$"), parsing("x", "a y"):
            raise error
    for through in (KeyboardInterrupt(), BellboxError("mine")):
        with pytest.raises(type(through)) as caught, parsing("x", "a y"):
            raise through
        assert caught.value is through


def test_a_new_file_takes_its_place_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_text(target, "old")
    with pytest.raises(ZeroDivisionError), new_file(target) as writing:
        writing.write_text(f"half {1 // 0}")
    assert target.read_text() == "old"
    write_text(target, "new")
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]
    if os.name == "posix":
        umask = os.umask(0o022)
        write_text(target, "new")
        os.umask(umask)
        assert stat.S_IMODE(target.stat().st_mode) == 0o644


@posix
def test_what_is_no_regular_file_is_not_written_over(tmp_path: Path, pipe: Path) -> None:
    (tmp_path / "dead").symlink_to("nothing")
    for path, kind in (
        (pipe, "a pipe"),
        (Path("/dev/null"), "a device"),
        (tmp_path, "a folder"),
        (tmp_path / "dead", "a link that leads nowhere"),
    ):
        mode = path.lstat().st_mode
        for write in (require_writable, lambda one: write_file(one, "x"), lambda one: write_text(one, "x")):
            with pytest.raises(BellboxError, match=f"is {kind}; name a regular file"):
                write(path)
        with pytest.raises(BellboxError, match=f"is {kind}"):
            write_tensors(path, {"a": torch.ones(1)})
        assert path.lstat().st_mode == mode


@posix
def test_a_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    file, link = tmp_path / "far" / "file", tmp_path / "link"
    file.write_text("old")
    link.symlink_to(file)
    write_file(link, "new")
    assert link.is_symlink()
    assert file.read_text() == "new"


def test_text_that_is_not_utf8_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(BellboxError, match=r"x: 'run \\udcff' in it is not UTF-8"):
        write_text(tmp_path / "x", "run \udcff")
    assert not list(tmp_path.iterdir())


def test_tensors_of_types_that_nothing_computes_with_are_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "t", {"fine": torch.ones(2), "odd": torch.ones(2).to(torch.float8_e4m3fn)})
    with pytest.raises(BellboxError, match=r"tensor 'odd' is of type torch.float8_e4m3fn"):
        read_tensors(tmp_path / "t")
    (tmp_path / "t").write_bytes(b"")
    with pytest.raises(BellboxError, match="damaged"):
        read_tensors(tmp_path / "t")


@posix
@pytest.mark.parametrize("is_posix", [True, False])
def test_folders_are_synced_only_where_the_system_opens_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_posix: bool
) -> None:
    """What is asked of a system that is not POSIX: no folder is opened to be synced, and files are opened to write."""
    fcntl = pytest.importorskip("fcntl")
    synced: list[tuple[bool, bool]] = []

    def noted(handle: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(handle).st_mode)
        synced.append((is_folder, fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR))

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(files, "_POSIX", is_posix)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mark").write_text("old")
    with new_folder(tmp_path / "there", replaces="mark") as made:
        (made / "mark").write_text("new")
    write_text(tmp_path / "there" / "file", "text")
    assert (tmp_path / "there" / "mark").read_text() == "new"
    assert (tmp_path / "there" / "file").read_text() == "text"
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    # The new folder's file, that folder, and the one it stands in; the written file, and the folder that it stands in.
    on_posix = [(False, False), (True, False), (True, False), (False, False), (True, False)]
    assert synced == (on_posix if is_posix else [(False, True), (False, True)])


def test_a_folder_is_held_by_one_process_and_let_go_of_when_it_dies(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from bellbox.utils.files import lock; held = lock(pathlib.Path(sys.argv[1])); "
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code + "print('held', flush=True); sys.stdin.read()", str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(BellboxError, match="another process is baking in"):
            lock(tmp_path, "baking in")
    finally:
        holder.kill()
        holder.communicate()
    with lock(tmp_path), pytest.raises(BellboxError):
        lock(tmp_path)
    lock(tmp_path).close()
