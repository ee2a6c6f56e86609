"""Entries of the cache as they are read: each value checked, in any form that was ever written.

See cache.py for what an entry is. Entries without meta, in float32, compressed or with an extra
`original`, are of the older form.
"""

import contextlib
import errno
import json
import math
import os
import stat
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from stemgenre.data.source_hashes import is_settled
from stemgenre.errors import ClipError, UserError, first_line
from stemgenre.files import DAMAGED_NPZ, NPY_HEADER_LOCK
from stemgenre.settings import STEMS

if TYPE_CHECKING:
    import torch

FORMAT = 1  # in the meta of the entries that are written now
MAX_MEMBER_BYTES = 4 * 3600 * 48000 * 4  # 4 h at 48 kHz in float32
MAX_DEFLATE_RATIO = 1032  # bytes that a deflated byte can expand to


class CacheError(ClipError):
    """An entry that cannot be trusted."""


def cached_blocks(
    path: Path | str,
    *,
    samples: int,
    waves: tuple[str, ...] = STEMS,
    undamaged: set[tuple] | None = None,
) -> "Iterator[torch.Tensor]":
    """Yields `waves` (4 or 1, up to `samples`) of an entry, as stored: memory is that of one block.

    Raises CacheError before the first block if the entry is damaged.
    """
    import torch  # only here: is_current and the export need none

    with _open_entry(path) as archive:
        arrays, length = _open_waves(archive, waves)
        meta = _read_meta(archive)
        _check_crc(archive, undamaged)
        for start in range(0, length, samples):
            block = _read_values(arrays, start, min(start + samples, length))
            _check_finite(block, meta)
            yield torch.from_numpy(block)


def read_entry(
    path: Path | str,
    waves: tuple[str, ...],
    section: Callable[[int], tuple[int, int]] | None = None,
    *,
    undamaged: set[tuple] | None = None,
) -> tuple[np.ndarray, dict[str, Any] | None]:
    """(the waves, meta) of an entry; meta is None in the older form. See StemCache.read.

    The entries in `undamaged` are not checked again as long as they have not changed; others are
    added to it. Raises CacheError if the entry is damaged, UserError if it cannot be read.
    """
    with _open_entry(path) as archive:
        arrays, length = _open_waves(archive, waves)
        _check_crc(archive, undamaged)
        start, stop = section(length) if section else (0, length)
        values = _read_values(arrays, start, min(stop, length))
        meta = _read_meta(archive)
        _check_finite(values, meta)
    return values, meta


def read_header(
    path: Path | str, waves: tuple[str, ...]
) -> tuple[dict[str, Any] | None, int | None]:
    """(meta, None) of an entry, or (None, samples) in the older form: its values are not read.

    Raises CacheError if it has other arrays than `waves`, UserError if it cannot be read.
    """
    with _open_entry(path) as archive:
        if len({archive.getinfo(f"{name}.npy").file_size for name in waves}) != 1:
            raise ValueError("its stems differ in length")
        meta = _read_meta(archive)
        return meta, _open_waves(archive, waves)[1] if meta is None else None


def read_meta(path: Path | str) -> dict[str, Any] | None:
    """The meta of an entry; None in the older form. Raises as read_entry does."""
    with _open_entry(path) as archive:
        return _read_meta(archive)


@contextlib.contextmanager
def _open_entry(path):
    """The open zip file of an entry; whatever is wrong in the block raises one line with the path.

    UserError if the file is gone or the disk fails, CacheError if the entry is damaged.
    """
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise ValueError("it is not a file")
        with zipfile.ZipFile(path) as archive:
            yield archive
    except FileNotFoundError:
        raise UserError(f"{path} no longer exists; run again") from None
    except DAMAGED_NPZ as error:
        if getattr(error, "errno", None) not in (None, errno.EINVAL):  # EINVAL: a wrong offset
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        raise CacheError(f"{path} cannot be read as stems ({first_line(error)})") from None


class _Array(NamedTuple):
    """An array of an entry: its first value is at the position `start` of `file`."""

    file: BinaryIO
    start: int
    shape: tuple[int, ...]
    dtype: np.dtype


def _open_waves(archive, waves) -> tuple[list[_Array], int]:
    """(arrays, samples) of an entry's `waves`.

    Raises ValueError unless they are arrays of one length and one float type.
    """
    arrays = [_open_array(archive, name) for name in waves]
    *_, shape, dtype = arrays[0]
    if any(array.shape != shape or array.dtype != dtype for array in arrays):
        raise ValueError("its stems differ in shape or type")
    if dtype.kind != "f" or len(shape) != 1 or shape[0] == 0:
        raise ValueError(f"its stems are {dtype} of shape {shape}")
    return arrays, shape[0]


def _open_array(archive, name, *, direct=True) -> _Array:
    """The member `name`.npy; `direct`: if not compressed, without zipfile's copies and its CRC.

    Raises ValueError if the member claims more bytes than the file can hold, or its header claims
    another size than the member has: no header makes NumPy allocate what is not there.
    """
    info = archive.getinfo(f"{name}.npy")
    file_bytes = os.fstat(archive.fp.fileno()).st_size
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} has the unknown compression {info.compress_type}")
    if info.file_size > min(MAX_MEMBER_BYTES, MAX_DEFLATE_RATIO * file_bytes):
        raise ValueError(f"{name} claims {info.file_size} bytes")
    if direct and info.compress_type == zipfile.ZIP_STORED:
        file = archive.fp
        file.seek(info.header_offset + 26)  # of the lengths of a name and of an extra field
        lengths = [int.from_bytes(file.read(2), "little") for _ in range(2)]
        begin = file.seek(sum(lengths), os.SEEK_CUR)
    else:
        file, begin = archive.open(info), 0
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"{name} has the unknown .npy version {version[0]}.{version[1]}")
    with NPY_HEADER_LOCK:
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    start = file.tell()
    if start - begin + math.prod(shape) * dtype.itemsize != info.file_size:
        raise ValueError(f"{name} claims the shape {shape}, which its size does not fit")
    return _Array(file, start, shape, dtype)


def _read_values(arrays, start, stop) -> np.ndarray:
    """The values [start, stop) of each of an entry's arrays, (4, stop - start)."""
    values = np.empty((len(arrays), stop - start), arrays[0].dtype)
    for array, row in zip(arrays, values, strict=True):
        array.file.seek(array.start + start * array.dtype.itemsize)
        if array.file.readinto(row.view(np.uint8)) != row.nbytes:
            raise ValueError("it ends too early")
    return values


def _check_crc(archive, undamaged=None):
    """Raises ValueError unless an entry is undamaged, which it then adds to that set.

    Memory is that of a block.
    """
    status = os.fstat(archive.fp.fileno())
    times = status.st_ctime_ns, status.st_mtime_ns
    state = (status.st_dev, status.st_ino, *times, status.st_size)
    if undamaged and state in undamaged:
        return
    if damaged := archive.testzip():
        raise ValueError(f"Bad CRC-32 for file {damaged!r}")
    if undamaged is not None and is_settled(status.st_ctime_ns):
        undamaged.add(state)


def _read_meta(archive) -> dict[str, Any] | None:
    """The meta of an open entry; None in the older form. Raises ValueError if it is damaged."""
    if "meta.npy" not in archive.namelist():
        return None
    file, _, _, dtype = _open_array(archive, "meta", direct=False)
    meta = json.loads(str(np.frombuffer(file.read(), dtype)[0]))  # read to the end: CRC checked
    if not isinstance(meta, dict):
        raise ValueError("its meta is not a JSON object")
    return meta


def _check_finite(stems, meta):
    """Raises ValueError for NaN or infinite stems of an older entry; write() checked the others."""
    if (meta or {}).get("format") != FORMAT and not np.isfinite(stems).all():
        raise ValueError("it holds NaN or infinite samples")
