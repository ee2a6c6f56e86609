"""One run at a time in an OUTPUT_DIR: a lock that the system lets go when its process ends."""

import contextlib
import datetime
import logging
import os
import socket
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

from stemgenre.errors import UserError

log = logging.getLogger(__name__)

NAME = ".run.lock"  # in OUTPUT_DIR; says who has it, and is empty when nobody does
BEYOND = 2**30  # bytes: where Windows locks, so that the line itself can be read


def try_lock(file):
    """Whether this process now has the open `file` to itself, until it is closed or killed.

    Raises OSError on a file system without locks.
    """
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            os.lseek(file.fileno(), BEYOND, os.SEEK_SET)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            os.lseek(file.fileno(), 0, os.SEEK_SET)
    except (BlockingIOError, PermissionError):
        return False
    return True


@contextlib.contextmanager
def hold(folder, run):
    """Has `folder` for this run (its rank 0) while the block runs.

    Raises UserError, with who has it and since when, if another run does; or if there can be no
    such folder. What a killed run leaves behind holds nobody up.
    """
    if not run.is_main:
        yield
        return
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / NAME).open("ab+", buffering=0)  # does not empty what another one wrote
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}); set OUTPUT_DIR elsewhere"
        ) from None
    with file:
        try:
            free = try_lock(file)
        except OSError as error:
            log.warning("%s has no locks (%s): see that no other run writes there", folder, error)
            free = True
        if not free:
            file.seek(0)
            holder = file.read(500).decode(errors="replace").strip() or "another run"
            raise UserError(
                f"{folder} is in use by {holder}; wait for its end, or set OUTPUT_DIR elsewhere"
            )
        now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
        _put_line(file, f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
        try:
            yield
        finally:
            _put_line(file, "")


def _put_line(file, text):
    with contextlib.suppress(OSError):  # a full disk: the lock itself needs no room
        file.truncate(0)
        file.write(text.encode())
