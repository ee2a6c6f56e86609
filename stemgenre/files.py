"""Files that appear whole or not at all, and what tells whether one has changed."""

import contextlib
import hashlib
import os
from pathlib import Path

from stemgenre.errors import UserError


@contextlib.contextmanager
def replacing(path, mode="wb", **options):
    """An open file that takes the place of `path` once the block is through.

    Written beside its place, flushed to the disk, then renamed: a reader, or a run that comes
    after a crash, sees the old file or the new one. Raises UserError if it cannot be written.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open(mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def sha256(path):
    """The SHA-256 of a file's content, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
