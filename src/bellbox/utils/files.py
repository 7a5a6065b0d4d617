"""Files and folders that are whole or not there, and bounded reads of what others have written."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import io
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bellbox.errors import BellboxError, require

if TYPE_CHECKING:
    from torch import Tensor

JSON_LIMIT = 64 << 20
HEADER_LIMIT = 64 << 20
TOKENIZER_LIMIT = 256 << 20
_POSIX = os.name == "posix"
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def kind_of_file(mode: int) -> str | None:
    """What a file of this mode is, such as "a pipe"; None where it is a regular one."""
    if stat.S_ISREG(mode):
        return None
    return next((name for test, name in _KINDS if test(mode)), "no regular file")


def open_regular(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Open a file for reading, unless it could be without end, or keep us waiting for a writer.

    Raises:
        BellboxError: a pipe, a device, a folder.
        OSError: it is not there, or may not be read.
    """
    # Not blocking: a pipe that nobody writes to would never open. Regular files know no such thing.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    kind = kind_of_file(os.fstat(handle).st_mode)
    if kind is not None:
        os.close(handle)
        raise BellboxError(
            f"{os.fspath(path)}: is {kind}, not a regular file; write the content to a file first"
        )
    return os.fdopen(handle, "rb")


def read_bytes(path: str | os.PathLike[str], limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises:
        BellboxError: missing, too large, or no regular file.
    """
    try:
        with open_regular(path) as file:
            content = file.read(
                min(os.fstat(file.fileno()).st_size, limit) + 1
            )  # a file may grow while it is read
    except OSError as error:
        raise BellboxError(f"{os.fspath(path)}: cannot be read ({error.strerror})") from None
    if len(content) > limit:
        raise BellboxError(f"{os.fspath(path)}: more than the {limit:,} bytes that such a file may have")
    return content


def read_text(path: str | os.PathLike[str], limit: int) -> str:
    """Likewise, as text.

    Raises:
        BellboxError: as `read_bytes`, or not UTF-8.
    """
    try:
        return read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise BellboxError(f"{os.fspath(path)}: not UTF-8 at byte {error.start}") from None


@contextmanager
def parsing(path: object, what: str) -> Iterator[None]:
    """Turn whatever another library's parser raises over a file's content into one line that names the file.

    Nobody lists what those parsers raise: struct.error, tokenize.TokenError, AttributeError, and panics of Rust, which
    are no `Exception`. To be entered around their calls and nothing else, so that no defect of ours hides in it.

    Args:
        path: of the file, for the message.
        what: the file should be, such as "an .npz file".

    Raises:
        BellboxError: the parser has raised.
    """
    try:
        yield
    except BellboxError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise  # Ctrl-C
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        raise BellboxError(f"{path}: cannot be read as {what} ({reason})") from None


def one_line(error: BaseException, most: int = 300) -> str:
    """What an exception says, in one line; the name of its kind where it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def sync(path: Path) -> None:
    """Have the operating system put a file or a folder on the disk.

    Windows opens no folders, and syncs a file only for those who may write to it: there a folder is left alone.
    """
    if not _POSIX and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if _POSIX else os.O_RDWR | getattr(os, "O_BINARY", 0))
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def named(error: Exception, path: Path) -> OSError:
    """What the system refused, with the file that it was about: errors of writing (a full disk) do not say which."""
    number = error.errno if isinstance(error, OSError) else None
    told = re.search(r"os error (\d+)", str(error))  # as libraries in Rust spell it
    if number is None and told:
        number = int(told[1])
    return OSError(number or errno.EIO, os.strerror(number) if number else str(error), str(path))


def sha256_file(path: Path) -> str:
    """Hex digest of a regular file, read in pieces.

    Raises:
        BellboxError: a pipe, a device, a folder.
        OSError: it cannot be read.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """A JSON object from a file of at most `limit` bytes.

    Raises:
        BellboxError: missing, too large, not JSON, or not an object.
    """
    try:
        value = json.loads(read_bytes(path, limit))
    except BellboxError:
        raise
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
    return canonical_sha256({key: value for key, value in config.items() if key != "sha256"})


def canonical_sha256(content: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON text of `content` (docs/format.md, checksums)."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, which stays mapped.

    Raises:
        BellboxError: it is damaged, or has numbers of a type that nothing here computes with.
    """
    import torch
    from safetensors.torch import load_file

    try:
        with open_regular(path) as file:
            header, size = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise BellboxError(f"{path}: cannot be read ({error.strerror})") from None
    if header > min(HEADER_LIMIT, size - 8):
        raise BellboxError(f"{path}: damaged, claims a header of {header} bytes")
    try:
        with parsing(path, "safetensors"):
            tensors = load_file(path)
    except BellboxError as error:
        raise BellboxError(f"{path}: damaged ({error})") from None
    plain = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool)
    plain += (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    for name, tensor in tensors.items():
        if tensor.dtype not in plain:
            raise BellboxError(f"{path}: tensor {name!r} is of type {tensor.dtype}, which is not supported")
    return tensors


def refuse_target(path: Path) -> None:
    """Refuse to put a file in the place of anything but a regular file or nothing.

    Raises:
        BellboxError: a folder, a device, a pipe, or a link that leads to one or nowhere.
    """
    try:
        kind = kind_of_file(path.stat().st_mode)
    except FileNotFoundError:
        if path.is_symlink():
            raise BellboxError(f"{path}: is a link that leads nowhere; name a regular file") from None
        return
    except OSError as error:
        raise BellboxError(f"{path}: cannot be written ({error.strerror})") from None
    if kind is not None:
        raise BellboxError(f"{path}: is {kind}; name a regular file")


@contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place at the end, on disk and in one step.

    Whatever goes wrong, what stood at `path` before still stands there, or the new file does. Of a link it is the file
    that it leads to: the link stays.

    Args:
        path: missing, or a regular file.

    Raises:
        BellboxError: something else stands at `path`.
        OSError: it cannot be written.
    """
    refuse_target(Path(path))
    target = Path(os.path.realpath(path))
    handle, name = tempfile.mkstemp(prefix=f".{target.name[:100]}.", suffix=".writing", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp and safetensors write for the owner alone
        sync(temporary)
        refuse_target(target)  # it may have appeared while we worked
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    sync(target.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file; a kill leaves the old one or the new one.

    Raises:
        BellboxError, OSError: as `new_file`; or the text holds what UTF-8 cannot.
    """
    try:
        content = text.encode()
    except UnicodeEncodeError as error:
        odd = text[max(0, error.start - 20) : error.end]
        raise BellboxError(
            f"{os.fspath(path)}: {odd!r} in it is not UTF-8; rename what is called so"
        ) from None
    with new_file(path) as temporary:
        temporary.write_bytes(content)


def write_tensors(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file; a kill leaves the old one or the new one.

    Raises:
        BellboxError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        with new_file(path) as temporary:
            save_file(tensors, temporary, metadata)
    except OSError as error:
        raise BellboxError(f"{os.fspath(path)}: cannot be written ({error.strerror})") from None
    except SafetensorError as error:
        raise BellboxError(f"{os.fspath(path)}: cannot be written ({error})") from None


def lock(folder: Path, doing: str = "training in") -> ExitStack:
    """Hold a folder until what is returned is closed; the system lets go of it when the process dies.

    Raises:
        BellboxError: another process holds it, or its file system knows no locks.
        OSError: it cannot be written to.
    """
    filelock = require("filelock", "cli")
    held = filelock.FileLock(folder / ".lock", timeout=0)
    try:
        held.acquire()
    except filelock.Timeout:
        raise BellboxError(
            f"another process is {doing} '{folder}'; wait for it or choose another folder"
        ) from None
    except NotImplementedError:
        raise BellboxError(f"'{folder}' lies on a file system without locks; choose another folder") from None
    stack = ExitStack()
    stack.callback(held.release)
    return stack


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
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if _POSIX else None
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
        replaces: the file that marks a folder which may be replaced.

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
        replaces: the file that marks a folder which may be replaced.

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
