"""Files and folders that are whole or not there, and bounded reads of what others have written."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bellbox.errors import BellboxError

if TYPE_CHECKING:
    from torch import Tensor

JSON_LIMIT = 64 << 20
HEADER_LIMIT = 64 << 20


def sync(path: Path) -> None:
    """Have the operating system put a file or a folder on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_file(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """A JSON object from a file of at most `limit` bytes.

    Raises:
        BellboxError: missing, too large, not JSON, or not an object.
    """
    try:
        size = path.stat().st_size
        if size > limit:
            raise BellboxError(f"{path}: {size} bytes, more than the {limit} that such a file may have")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise BellboxError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise BellboxError(f"{path}: damaged, not readable as JSON") from None
    if not isinstance(value, dict):
        raise BellboxError(f"{path}: damaged, holds no JSON object")
    return value


def describe_file(path: Path) -> dict[str, Any]:
    """Its size and checksum, for a configuration that lists it."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def verify_file(path: Path, stated: Mapping[str, Any]) -> None:
    """Compare a file with what `describe_file` said of it.

    Raises:
        BellboxError: missing, truncated or altered.
    """
    try:
        size = path.stat().st_size
        if size != stated["bytes"]:
            raise BellboxError(f"{path}: {size} bytes instead of {stated['bytes']}: truncated; copy it again")
        if sha256_file(path) != stated["sha256"]:
            raise BellboxError(f"{path}: damaged, its checksum does not match config.json; copy it again")
    except OSError as error:
        raise BellboxError(f"{path}: cannot be read ({error.strerror})") from None


def listed_file(root: Path, files: Mapping[str, Any], name: str, config: str) -> Path:
    """The path of a file that a folder's configuration lists, once it is found to be as stated.

    Args:
        root: the folder.
        files: what the configuration says of each file, by name (`describe_file`).
        name: of the file.
        config: name of the configuration, for the message.

    Raises:
        BellboxError: it is not listed, missing or altered.
    """
    if name not in files:
        raise BellboxError(f"{root / config}: lists no {name}")
    verify_file(root / name, files[name])
    return root / name


def says_format(config: Path, name: str) -> bool:
    """Whether a configuration says that its folder is of a format (nothing else is looked at)."""
    try:
        return config.is_file() and read_json(config).get("format") == name
    except BellboxError:
        return False


def checksum(config: Mapping[str, Any]) -> str:
    """SHA-256 of a configuration's canonical text, its own key `sha256` left out."""
    content = {key: value for key, value in config.items() if key != "sha256"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, which stays mapped.

    Raises:
        BellboxError: it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > min(HEADER_LIMIT, path.stat().st_size - 8):
        raise BellboxError(f"{path}: damaged, claims a header of {header} bytes")
    try:
        return load_file(path)
    except (SafetensorError, ValueError, OverflowError, MemoryError) as error:
        raise BellboxError(f"{path}: damaged ({error})") from None


def refuse_foreign(target: Path, replaces: str) -> None:
    """Refuse a target that is neither missing nor empty nor holds a file called `replaces`.

    Raises:
        BellboxError: saying which.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise BellboxError(f"{target}: stands there already and is no folder; name a new or empty folder")
    if target.is_dir() and any(target.iterdir()) and not (target / replaces).is_file():
        raise BellboxError(f"{target}: the folder holds something else; name a new or empty folder")


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one step; False where this system or file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux, the one system with a renameat2
    arguments = (os.fsencode(first), os.fsencode(second))
    if rename(here, arguments[0], here, arguments[1], ctypes.c_uint(exchange)) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(second))


def put_in_place(folder: Path, target: Path, replaces: str) -> None:
    """Have a finished folder take the place of `target`, on disk and, where the system can, in one step.

    Args:
        folder: beside `target`; it is gone afterwards, unless it held what stood at `target` before.
        target: missing, empty, or with a file called `replaces`.
        replaces: the file that row_scales a folder which may be replaced.

    Raises:
        BellboxError: something else stands at `target`.
        OSError: it cannot be written.
    """
    umask = os.umask(0)
    os.umask(umask)
    for path in (*folder.rglob("*"), folder):  # mkdtemp and safetensors write for the owner alone
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
        sync(path)
    refuse_foreign(target, replaces)  # it may have appeared while we worked
    if not target.exists():
        folder.rename(target)
    elif not _exchange(folder, target):
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
        target.rename(old / target.name)
        folder.rename(target)
        shutil.rmtree(old)
    sync(target.parent)


@contextmanager
def new_folder(target: Path, replaces: str) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place at the end, on disk and in one step.

    Whatever goes wrong, what stood at `target` before still stands there, or the new folder does. (Where the system
    cannot exchange two folders in one step, a kill between two renames leaves the earlier one beside `target`, as
    `.NAME.old.*`; Linux can.)

    Args:
        target: where the folder shall be. It may be missing, empty, or hold a file called `replaces`.
        replaces: the file that row_scales a folder which may be replaced.

    Raises:
        BellboxError: something else stands at `target`, or it cannot be written.
    """
    target = target.absolute()
    refuse_foreign(target, replaces)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise BellboxError(f"{target}: cannot be written ({error.strerror})") from None
    try:
        yield folder
        put_in_place(folder, target, replaces)
    except OSError as error:
        raise BellboxError(f"{target}: cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
