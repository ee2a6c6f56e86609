"""The stems of each clip as one .npz: key, validity, atomic write, checked read.

An entry has the float16 arrays vocals, drums, bass and other, not compressed, and `meta`: json
that says what they were made from. Entries without meta, in float32, compressed or with an extra
`original`, are read too: the older form of this cache.
"""

import contextlib
import errno
import functools
import io
import json
import lzma
import math
import os
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np

from stemgenre.errors import ClipError, UserError
from stemgenre.files import replacing, sha256
from stemgenre.settings import STEMS

FORMAT = 1
UNREADABLE = (  # what zipfile and NumPy raise on a file that is not a whole entry
    OSError,
    KeyError,
    ValueError,
    EOFError,
    RuntimeError,
    NotImplementedError,
    SyntaxError,
    TypeError,
    tokenize.TokenError,
    struct.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    zlib.error,
)
MOST_PACKED = 1032  # bytes that deflate can make of one
LONGEST = 4 * 3600 * 48000  # samples a stem may have: no header makes us take memory beyond it


class CacheError(ClipError):
    """An entry that cannot be trusted."""


class StemCache:
    """The entries of one folder, for stems of one model at one sample rate (Hz)."""

    def __init__(self, folder, *, model, sample_rate):
        self.folder = Path(folder)
        self.model = model
        self.sample_rate = sample_rate

    def path(self, clip):
        """Where the entry of a clip is."""
        return self.folder / f"{clip}.npz"

    def is_current(self, clip, source):
        """Whether the clip's entry is there and was made from the file `source` as it is now.

        Reads no audio: names, sizes and meta only. A file that was touched but not changed is
        recognised by its hash. Raises ClipError if `source` is not there any more.
        """
        try:
            with zipfile.ZipFile(self.path(clip)) as archive:
                sizes = {archive.getinfo(f"{stem}.npy").file_size for stem in STEMS}
                meta = _read_meta(archive)
        except UNREADABLE:
            return False
        if len(sizes) != 1:
            return False
        if meta is None:
            return True
        made = {"format": FORMAT, "sample_rate": self.sample_rate, "model": self.model}
        with _reading(source):
            status = os.stat(source)  # noqa: PTH116 half the time of Path's, for 100,000 clips
            made |= {"source": os.path.basename(source), "source_bytes": status.st_size}  # noqa: PTH119
            if any(meta.get(key) != value for key, value in made.items()):
                return False
            if meta.get("source_time") == status.st_mtime_ns:
                return True
            return meta.get("source_sha256") == sha256(source)

    def read(self, clip):
        """The stems of a clip: (4, samples), float16 or float32 as stored, in the order of STEMS.

        Raises CacheError with the reason if the entry is not whole. It is then removed, so that
        the next run separates the clip anew.
        """
        path = self.path(clip)
        try:
            return self.read_file(path)[0]
        except CacheError as error:
            try:
                path.unlink(missing_ok=True)
            except OSError:  # a read-only cache
                raise CacheError(f"{error}; delete it to have it separated anew") from None
            raise CacheError(
                f"{error}; it has been removed, run again to separate it anew"
            ) from None

    def read_file(self, path):
        """(stems, rate in Hz) of any entry; one without meta has the rate of this cache."""
        try:
            with zipfile.ZipFile(path) as archive:
                stems = [_read_array(archive, stem) for stem in STEMS]
                rate = (_read_meta(archive) or {}).get("sample_rate", self.sample_rate)
        except FileNotFoundError:
            raise UserError(f"{path} is not there any more; run again") from None
        except UNREADABLE as error:
            if getattr(error, "errno", None) not in (None, errno.EINVAL):  # the disk's fault
                raise UserError(f"{path} cannot be read: {error.strerror}") from None
            raise CacheError(f"{path} cannot be read as stems ({error})") from None
        if len({len(stem) for stem in stems}) != 1 or not len(stems[0]):
            raise CacheError(f"{path} has stems of different or no length")
        stems = np.stack(stems)
        if not np.isfinite(stems).all():
            raise CacheError(f"{path} holds samples that are no numbers")
        return stems, rate

    def write(self, clip, stems, source):
        """Stores stems (4, samples), made from the audio file `source`.

        Raises ClipError if they are no numbers or `source` is not there any more, UserError if
        nothing can be stored there.
        """
        with _reading(source):
            status, digest = Path(source).stat(), sha256(source)
        meta = {
            "format": FORMAT,
            "sample_rate": self.sample_rate,
            "model": self.model,
            "source": Path(source).name,
            "source_bytes": status.st_size,
            "source_time": status.st_mtime_ns,
            "source_sha256": digest,
        }
        arrays = dict(zip(STEMS, np.asarray(stems, dtype=np.float16), strict=True))
        if not all(np.isfinite(wave).all() for wave in arrays.values()):
            raise CacheError(f"the stems of {source} are no numbers; leave it out or replace it")
        with replacing(self.path(clip)) as file:
            np.savez(file, **arrays, meta=np.array(json.dumps(meta)))


@contextlib.contextmanager
def _reading(source):
    """ClipError instead of OSError if an audio file is gone or cannot be read."""
    try:
        yield
    except OSError as error:
        raise ClipError(f"{source} cannot be read any more: {error.strerror}") from None


def _read_meta(archive):
    """The meta of an open entry; None in the older form."""
    if "meta.npy" not in archive.namelist():
        return None
    meta = json.loads(str(_read_member(archive, "meta.npy", kinds="U")))
    if not isinstance(meta, dict):
        raise ValueError("meta is no json object")
    return meta


def _read_array(archive, stem):
    array = _read_member(archive, f"{stem}.npy", kinds="f")
    if array.ndim != 1:
        raise ValueError(f"{stem} has {array.ndim} dimensions")
    return array


def _read_member(archive, name, *, kinds):
    """The array in an .npy member, without pickle and without trusting its header."""
    info = archive.getinfo(name)
    if info.file_size > LONGEST * 4 + 1024:
        raise ValueError(f"{name} claims {info.file_size} bytes")
    if info.file_size > MOST_PACKED * info.compress_size + 1024:
        raise ValueError(f"{name} claims {info.file_size} bytes in {info.compress_size}")
    data = archive.read(info)  # reading to the end checks the CRC
    width = {1: 2, 2: 4}.get(data[6] if len(data) > 6 else 0, 0)  # of the header's length
    start = 8 + width + int.from_bytes(data[8 : 8 + width], "little")
    shape, dtype = _read_header(data[:start])
    body = memoryview(data)[start:]
    if dtype.kind not in kinds or math.prod(shape) * dtype.itemsize != len(body):
        raise ValueError("header and content of an array do not agree")
    return np.frombuffer(body, dtype).reshape(shape)


@functools.lru_cache(maxsize=1024)
def _read_header(header):
    """(shape, dtype) in the first bytes of an .npy file; most entries share a few of them."""
    return read_npy_header(io.BytesIO(header))


def read_npy_header(stream):
    """(shape, dtype) of an open .npy, which then stands at its first value."""
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"unknown .npy version {version}")
    shape, _, dtype = getattr(np.lib.format, f"read_array_header_{version[0]}_0")(stream)
    return shape, dtype
