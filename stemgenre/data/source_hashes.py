"""Hashes of audio files, to tell whether what was made from one belongs to its present content."""

import contextlib
import functools
import json
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from stemgenre.data.find_files import clip_sha256, paused_garbage_collector, stem_files
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
    try:
        status = os.stat(path)  # noqa: PTH116 half the time of Path's, for 100,000 clips
    except OSError as error:
        raise _gone(path, error) from None
    if not stat.S_ISREG(status.st_mode):
        raise ClipError(f"{path} is not a file")
    times = status.st_ctime_ns, status.st_mtime_ns
    return FileState(os.path.abspath(path), status.st_ino, *times, status.st_size)  # noqa: PTH100


def is_settled(ctime_ns: int) -> bool:
    """Whether a file's last change is so long ago that a further one would change its times."""
    return time.time() - ctime_ns / 1e9 > SETTLED_SECONDS


def clip_bytes(clip: Path | str) -> int:
    """The size of a clip, of its file or of all its stems. Raises ClipError as file_state does."""
    with _reading(clip):
        files = stem_files(clip).values() if Path(clip).is_dir() else [clip]
        return sum(file_state(file).size for file in files)


class FileNotes:
    """A value for each file, which is forgotten when the file's FileState has changed.

    They are remembered in the file `path`, one line each: several processes can append to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def get(self, state: FileState) -> Any:
        """The value of the file that is in this state now; None without one."""
        note = self._notes.get(state.path)
        return note[-1] if note and tuple(note[:-1]) == state else None

    def add(self, state: FileState, value: Any) -> None:
        """Remembers `value`, anything that JSON holds, unless the file has changed just now."""
        if not is_settled(state.ctime_ns):
            return
        self._notes[state.path] = note = [*state, value]
        with contextlib.suppress(OSError):  # a read-only folder, a full disk: read again
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:
                file.write(f"\n{json.dumps(note)}".encode())  # lines stay whole

    @functools.cached_property
    def _notes(self):
        """{path: [*FileState, value]}, of each path the last one."""
        try:
            lines = [line for line in self.path.read_bytes().split(b"\n") if line]
        except OSError:
            return {}
        try:
            with paused_garbage_collector():
                notes = json.loads(b"[%s]" % b",".join(lines))  # at once: a third of the time
        except (ValueError, RecursionError):
            notes = []
            for line in lines:
                with contextlib.suppress(ValueError, RecursionError):  # damaged
                    notes.append(json.loads(line))
        length = len(FileState._fields) + 1
        return {
            note[0]: note
            for note in notes
            if isinstance(note, list) and len(note) == length and isinstance(note[0], str)
        }


class SourceHashes:
    """SHA-256 of source files; each file is read once, and again when its FileState has changed.

    They are remembered in `notes`, in the file `path`.
    """

    def __init__(self, path: Path) -> None:
        self.notes = FileNotes(path)

    def sha256(self, source: Path | str) -> str:
        """The SHA-256 of a clip's content, in hex: of a file, or of a song's stems.

        Raises ClipError if it cannot be read.
        """
        try:
            if digest := self.notes.get(file_state(source)):
                return digest
        except ClipError:  # a song, or it is gone
            pass
        with _reading(source):
            return clip_sha256(source, self._file_sha256)

    def _file_sha256(self, source):
        state = file_state(source)
        if digest := self.notes.get(state):
            return digest
        with _reading(source):
            digest = sha256(source)
        if file_state(source) == state:
            self.notes.add(state, digest)
        return digest


def once_each(hash_source: Callable[[Path | str], str]) -> Callable[[Path | str], str]:
    """`hash_source`, which looks at each path once and then remembers it.

    By the path's text, whose hash() takes a seventh of a Path's.
    """
    known = functools.cache(hash_source)
    return lambda path: known(str(path))


@contextlib.contextmanager
def _reading(source):
    """ClipError instead of other errors if a clip is gone, incomplete, or cannot be read."""
    try:
        yield
    except OSError as error:
        raise _gone(source, error) from None
    except UserError as error:  # a song that has lost a stem
        raise ClipError(str(error)) from None


def _gone(source, error):
    return ClipError(f"{source} can no longer be read: {error.strerror}")
