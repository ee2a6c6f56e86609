"""Files that appear whole or not at all, and what tells whether one has changed."""

import contextlib
import errno
import hashlib
import os
import re
import secrets
from pathlib import Path

from stemgenre.errors import UserError
from stemgenre.lock import try_lock

PART = re.compile(r"\..+\.\d+\.[0-9a-f]{8}\.part")  # .NAME.PROCESS.RANDOM.part
WAYS_OUT = {
    errno.ENOSPC: "make room on that disk",
    errno.EDQUOT: "make room in your quota of that disk",
    errno.EFBIG: "a file may not be that long there; see `ulimit -f`",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "choose a folder that can be written",
    errno.EPERM: "choose a folder that can be written",
}


@contextlib.contextmanager
def replacing(path, mode="wb", *, previous=None, **options):
    """An open file that takes the place of `path` once the block is through.

    Written beside its place, flushed to the disk, then renamed: a reader, or a run that comes
    after a crash, sees the old file or the new one. With `previous`, the old one stays under that
    name, and there is no moment without a whole file at `path`. Raises UserError if it cannot be
    written.
    """
    path = Path(path)
    part = path.with_name(f".{path.name[:40]}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _open_part(part, mode, options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous:
            _keep(path, previous)
        part.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        way_out = WAYS_OUT.get(error.errno)
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}"
            + (f"; {way_out}" if way_out else "")
        ) from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def remove_leftovers(*folders):
    """Deletes the unfinished files that killed runs left in `folders`, none that is being written.

    A file in work is locked by its writer, and the system lets the lock of a dead one go.
    """
    for folder in folders:
        for path in Path(folder).glob(".*.part"):
            if PART.fullmatch(path.name):
                with contextlib.suppress(OSError), path.open("r+b") as file:
                    if try_lock(file):
                        path.unlink()


def _open_part(part, mode, options):
    """A new, locked file at `part`; remove_leftovers() of another run leaves it alone."""
    while True:
        file = part.open(mode, **options)
        with contextlib.suppress(OSError):  # a file system without locks
            if not try_lock(file) or not part.exists():  # taken for a leftover just before
                file.close()
                continue
        return file


def _keep(path, previous):
    """Makes `previous` a second name of the file at `path`, if there is one."""
    if not Path(path).is_file():
        return
    Path(previous).unlink(missing_ok=True)
    try:
        os.link(path, previous)
    except OSError:  # a file system without second names: for a moment only `previous` is there
        Path(path).replace(previous)


def _sync_folder(folder):
    """Makes a rename outlast a loss of power, where a folder can be flushed."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256(path):
    """The SHA-256 of a file's content, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
