"""Atomic writes, reading of tensors, file hashes, and one run at a time in a folder."""

import contextlib
import datetime
import errno
import hashlib
import io
import logging
import os
import re
import secrets
import shutil
import socket
import tempfile
import threading
import time
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import filelock

from stemgenre.errors import UserError, first_line

log = logging.getLogger(__name__)

LOCK_NAME = ".run.lock"  # in OUTPUT_DIR; LOCK_INFO_NAME says who holds it
LOCK_INFO_NAME = ".run.txt"
TEMP_NAME = re.compile(r"\..+\.\d+\.[0-9a-f]{8}\.part")  # .NAME.PROCESS.RANDOM.part
STALE_SECONDS = 3600.0  # without a write, in a folder that other runs may be writing to
# NumPy reads the header of an array with Python's parser, which in CPython up to 3.11 fails now and
# then when two threads parse at once ("AST constructor recursion depth mismatch", gh-106905).
NPY_HEADER_LOCK = threading.Lock()
ANY_NAME = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}  # names of any bytes
DAMAGED_NPZ = (  # what zipfile and NumPy raise for a damaged .npz
    (OSError, EOFError, LookupError, ValueError, RuntimeError)
    + (zipfile.BadZipFile, zlib.error)
    + (SyntaxError, TypeError, tokenize.TokenError)  # for the header of an array
)
WAYS_OUT = {
    errno.ENOSPC: "free space on that disk",
    errno.EDQUOT: "free space in your quota of that disk",
    errno.EFBIG: "files may not be that large there; see `ulimit -f`",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "choose a folder that can be written",
    errno.EPERM: "choose a folder that can be written",
}


@contextlib.contextmanager
def atomic_write(
    path: Path | str,
    mode: str = "wb",
    *,
    previous: Path | None = None,
    durable: bool = True,
    **options: Any,
) -> Iterator[IO]:
    """An open file that replaces `path` when the block has ended.

    Written beside its place, flushed to the disk, then renamed: a reader, or a run after a crash,
    sees the old file or the new one. With `previous`, the old one stays under that name, and there
    is always a complete file at `path`. A link stays, and the file that it leads to is replaced; a
    device or a pipe is written to. Raises UserError if it cannot be written. Without `durable`, it
    is not waited for the disk: only after a power loss, the new file may be empty.
    """
    path = named = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        with _named_errors(named), path.open(mode, **options) as file:
            yield file
        return
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    temp = path.with_name(f".{path.name[:40]}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        with _named_errors(named):
            if path.is_symlink():  # realpath leaves a link to itself
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            path.parent.mkdir(parents=True, exist_ok=True)
            with temp.open(mode, **options) as file:
                yield file
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            if previous:
                _link_previous(path, previous)
            temp.replace(path)
            if durable:
                _sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)


@contextlib.contextmanager
def _named_errors(path):
    """Turns an OSError while `path` is written into a UserError."""
    try:
        yield
    except OSError as error:
        way_out = WAYS_OUT.get(error.errno)
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}"
            + (f"; {way_out}" if way_out else "")
        ) from None


def write_text(path: Path | str, text: str) -> None:
    """Writes a text file atomically, as UTF-8 with the line ends of `text`."""
    with atomic_write(path, "w", encoding="utf-8", newline="") as file:
        file.write(text)


def check_writable(folder: Path) -> None:
    """Creates `folder`. Raises UserError if that fails or no file can be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}); choose another folder"
        ) from None


def remove_stale_temp_files(*folders: Path | str, older_than: float = STALE_SECONDS) -> None:
    """Deletes the unfinished files of killed runs in `folders`, unless written to so recently.

    `older_than` is in seconds; 0 is for folders that no other process writes to.
    """
    for folder in folders:
        for path in Path(folder).glob(".*.part"):
            if TEMP_NAME.fullmatch(path.name):
                with contextlib.suppress(OSError):
                    if time.time() - path.stat().st_mtime >= older_than:
                        path.unlink()


def _link_previous(path, previous):
    """Makes `previous` a second name of the file at `path`, if there is one."""
    if not path.is_file():
        return
    Path(previous).unlink(missing_ok=True)
    try:
        os.link(path, previous)
    except OSError:  # no hard links, or another disk: briefly only `previous` exists
        shutil.move(path, previous)


def _sync_folder(folder):
    """Makes a rename survive a power loss, where a folder can be flushed."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256(path: Path | str) -> str:
    """The SHA-256 of a file's content, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_tensors(path: Path | str, what: str, *, classes: Sequence[type] = ()) -> Any:
    """What torch.save wrote to `path`, on the CPU, without running any code in it.

    Only `classes` may be in it beside tensors and plain values. Raises UserError, which calls it
    `what`, for a file that cannot be read, is damaged or holds more.
    """
    import torch  # only here: arguments are read before its seconds of import

    try:
        with Path(path).open("rb") as file:
            start = file.read(2)
            if start == b"PK":
                _check_archive(file)
            elif start[:1] != b"\x80":  # a pickle, as older versions of PyTorch write it
                raise ValueError("it is no file of torch.save")
        with torch.serialization.safe_globals([*classes]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can make the unpickler raise anything
        reason = first_line(error, max_length=120)
        raise UserError(f"{path} cannot be read as {what}: {reason}") from None


def _check_archive(file):
    """Raises ValueError or BadZipFile for what torch.load would not notice: sizes and CRCs."""
    with zipfile.ZipFile(file) as archive:
        claimed = sum(info.file_size for info in archive.infolist())
        if claimed > file.seek(0, io.SEEK_END):  # torch.save does not compress
            raise ValueError(f"it claims to hold {claimed} bytes")
        for info in archive.infolist():  # torch leaves the memory of a folder's tensor as it is
            if info.is_dir() or info.external_attr & 0x10:  # MS-DOS' sign of a folder
                raise ValueError(f"{info.filename} in it is a folder")
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} in it is damaged")


@contextlib.contextmanager
def output_lock(folder: Path | str, *, is_main: bool = True) -> Iterator[None]:
    """Holds `folder` for this run while the block runs; only the main process locks.

    The system releases the lock when the process ends, however it ends. Raises UserError if
    another run holds it, with who and since when, or if the folder cannot be written.
    """
    if not is_main:
        yield
        return
    folder = Path(folder)
    lock = filelock.FileLock(folder / LOCK_NAME, timeout=0)
    info = folder / LOCK_INFO_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        holder = "another run"
        with contextlib.suppress(OSError):
            holder = info.read_text(encoding="utf-8", errors="replace").strip() or holder
        raise UserError(
            f"{folder} is in use by {holder}; wait until it ends, or set OUTPUT_DIR elsewhere"
        ) from None
    except NotImplementedError:
        log.warning("%s does not support locks: make sure that no other run writes there", folder)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}); set OUTPUT_DIR elsewhere"
        ) from None
    now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    with contextlib.suppress(OSError):  # a full disk: the lock itself needs no space
        info.write_text(f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            info.unlink(missing_ok=True)
        lock.release()
