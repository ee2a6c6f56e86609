"""Hashes of audio files, to tell whether what was made from one belongs to its present content."""

import contextlib
import functools
import json
import os
import stat
import time
from pathlib import Path
from typing import NamedTuple

from stemgenre.data.find_files import clip_sha256, stem_files
from stemgenre.errors import ClipError, UserError
from stemgenre.files import sha256

SETTLED_SECONDS = 2.0  # since a file's last change: the times of some file systems are as coarse
HASHES_FILE = ".source_hashes.jsonl"  # in a cache's folder: what SourceHashes remembers


class FileState(NamedTuple):
    """What changes with a file's content: ctime too, which cannot be set as mtime can."""

    path: str  # absolute
    inode: int
    ctime_ns: int
    mtime_ns: int
    size: int  # bytes


def file_state(path: Path | str) -> FileState:
    """The FileState of a regular file.

    Raises ClipError if it is gone, and for a pipe, which would be waited for, or a device.
    """
    with _reading(path):
        status = os.stat(path)  # noqa: PTH116 half the time of Path's, for 100,000 clips
    if not stat.S_ISREG(status.st_mode):
        raise ClipError(f"{path} is not a file")
    times = status.st_ctime_ns, status.st_mtime_ns
    return FileState(os.path.abspath(path), status.st_ino, *times, status.st_size)  # noqa: PTH100


def clip_bytes(clip: Path | str) -> int:
    """The size of a clip, of its file or of all its stems. Raises ClipError as file_state does."""
    with _reading(clip):
        files = stem_files(clip).values() if Path(clip).is_dir() else [clip]
        return sum(file_state(file).size for file in files)


class SourceHashes:
    """SHA-256 of source files; each file is read once, and again when its FileState has changed.

    They are remembered in the file `path`, one line each: several processes can append to it.
    """

    def __init__(self, path: Path):
        self.path = path

    def sha256(self, source: Path | str) -> str:
        """The SHA-256 of a clip's content, in hex: of a file, or of a song's stems.

        Raises ClipError if it cannot be read.
        """
        with _reading(source):
            return clip_sha256(source, self._file_sha256)

    def _file_sha256(self, source):
        state = file_state(source)
        if digest := self._known.get(state):
            return digest
        with _reading(source):
            digest = sha256(source)
        settled = time.time() - state.ctime_ns / 1e9 > SETTLED_SECONDS
        if settled and file_state(source) == state:
            self._remember(state, digest)
        return digest

    @functools.cached_property
    def _known(self):
        known = {}
        with contextlib.suppress(OSError):
            for line in self.path.read_bytes().splitlines():
                with contextlib.suppress(ValueError, TypeError, RecursionError):  # damaged
                    *state, digest = json.loads(line)
                    known[FileState(*state)] = digest
        return known

    def _remember(self, state, digest):
        self._known[state] = digest
        with contextlib.suppress(OSError):  # a read-only folder, a full disk: hashed again
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:
                file.write(f"\n{json.dumps([*state, digest])}".encode())  # lines stay whole


@contextlib.contextmanager
def _reading(source):
    """ClipError instead of other errors if a clip is gone, incomplete, or cannot be read."""
    try:
        yield
    except OSError as error:
        raise ClipError(f"{source} can no longer be read: {error.strerror}") from None
    except UserError as error:  # a song that has lost a stem
        raise ClipError(str(error)) from None
