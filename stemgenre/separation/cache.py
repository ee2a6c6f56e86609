"""The waves of each clip as one .npz: which entries are current, atomic writes, checked reads.

An entry has the float16 arrays vocals, drums, bass and other, not compressed, and `meta`: JSON
that says what they were made from. Entries without meta, in float32, compressed or with an extra
`original`, are read too: the older form of this cache. For CHANNELS=mix, the entries of another
folder have the array mix alone, and nothing is separated.
"""

import contextlib
import errno
import json
import math
import os
import stat
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from stemgenre.data.source_hashes import HASHES_FILE, SourceHashes, clip_bytes, file_state
from stemgenre.errors import ClipError, UserError, first_line
from stemgenre.files import NPY_HEADER_LOCK, atomic_write
from stemgenre.settings import STEMS, Settings

if TYPE_CHECKING:
    import torch

FORMAT = 1
MIX = ("mix",)  # the waves of an entry for CHANNELS=mix
MIX_FOLDER = "mix"  # below SEPARATION_CACHE_DIR: its entries, so that stems are never replaced
NO_MODEL = "none"  # in their meta
OWN_STEMS = "files"  # in the meta of stems that are the files of a song's folder
LENGTH_TOLERANCE = 0.01  # of a clip's length, between it and an entry without meta
MAX_MEMBER_BYTES = 4 * 3600 * 48000 * 4  # 4 h at 48 kHz in float32
MAX_DEFLATE_RATIO = 1032  # bytes that a deflated byte can expand to
UNREADABLE = (  # what zipfile and NumPy raise for a damaged .npz
    (OSError, EOFError, LookupError, ValueError, RuntimeError)
    + (zipfile.BadZipFile, zlib.error)
    + (SyntaxError, TypeError, tokenize.TokenError)  # for the header of an array
)


class CacheError(ClipError):
    """An entry that cannot be trusted."""


class StemCache:
    """The entries of one folder, for stems of one model at one sample rate (Hz).

    `waves` names the arrays of its entries: STEMS, or MIX.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        model: str,
        sample_rate: int,
        waves: tuple[str, ...] = STEMS,
    ):
        self.folder = Path(folder)
        self.model = model
        self.sample_rate = sample_rate
        self.waves = waves
        self._folder_text = os.path.join(os.path.abspath(folder), "")  # noqa: PTH100, PTH118
        self._source_hashes = SourceHashes(self.folder / HASHES_FILE)

    def path(self, clip: str) -> Path:
        """The path of a clip's entry, whether it exists or not."""
        return self.folder / f"{clip}.npz"

    def hash_source(self, source: Path | str) -> str:
        """The SHA-256 of an audio file, remembered in the cache. Raises ClipError if it is gone."""
        return self._source_hashes.sha256(source)

    def is_current(
        self,
        clip: str,
        source: Path | str,
        *,
        hash_source: Callable[[Path | str], str] | None = None,
    ) -> bool:
        """Whether the clip has an entry that was made from the audio file `source` as it is now.

        That is told by the hash of its content, which `hash_source` gives if it is known already;
        an entry without meta has to fit its length. What an entry was made from is read once, and
        again when its file has changed in any way. Raises ClipError if `source` no longer exists.
        """
        try:
            state = file_state(f"{self._folder_text}{clip}.npz")
        except ClipError:
            return False
        hash_source = hash_source or self.hash_source
        name = os.path.basename(source)  # noqa: PTH119 half the time of Path's
        # A song's hash is that of its stems, so that no file's entry can pass for a song's.
        models = (self.model, OWN_STEMS) if self.waves == STEMS else (self.model,)
        expected = [[FORMAT, self.sample_rate, model, name] for model in models]
        notes = self._source_hashes.notes
        if made_from := notes.get(state):
            digest = hash_source(source)
            return made_from in [[*each, digest] for each in expected]
        try:
            with zipfile.ZipFile(self.path(clip)) as archive:
                sizes = {archive.getinfo(f"{name}.npy").file_size for name in self.waves}
                meta = _read_meta(archive)
                samples = _open_waves(archive, self.waves)[1] if meta is None else None
        except UNREADABLE:
            return False
        if len(sizes) != 1:
            return False
        if meta is None:
            return self._fits_length(samples, source)
        keys = ("format", "sample_rate", "model", "source", "source_sha256")
        made_from = [meta.get(key) for key in keys]
        if made_from[:-1] not in expected or made_from[-1] != hash_source(source):
            return False
        notes.add(state, made_from)
        return True

    def _model_for(self, source):
        """What the meta of the clip's entry has as its model."""
        own = self.waves == STEMS and os.path.isdir(source)  # noqa: PTH112 half Path's time
        return OWN_STEMS if own else self.model

    def made_by(self, clip: str) -> str | None:
        """The model that a clip's entry was made with; None if there is none or it is damaged."""
        try:
            with _open_entry(self.path(clip)) as archive:
                meta = _read_meta(archive)
        except UserError:
            return None
        return "an older pipeline" if meta is None else str(meta.get("model"))

    def _fits_length(self, samples, source):
        """Whether stems of so many samples can be those of `source`, by the length in its header.

        A file without a header that libsndfile reads has an unknown length, which nothing fits.
        """
        if os.path.isdir(source):  # noqa: PTH112 a song's folder: no older pipeline knew it
            return False
        from stemgenre.data import audio  # only here: the export needs neither it nor librosa

        file_state(source)  # raises ClipError if it is gone
        try:
            seconds = audio.probe(source).seconds
        except UserError:
            return False
        return abs(samples / self.sample_rate - seconds) <= max(0.05, LENGTH_TOLERANCE * seconds)

    def read(
        self,
        clip: str,
        *,
        source: Path | str | None = None,
        section: Callable[[int], tuple[int, int]] | None = None,
    ) -> np.ndarray:
        """The waves of a clip: (4, samples) of STEMS or (1, samples) of MIX, float16 or float32.

        `section` gives, for the clip's length in samples, (start, stop) of what is wanted. Raises
        CacheError with the reason if the entry is damaged: it is then removed, so that the next run
        makes it again. Raises CacheError, too, if it is another run's: of another model,
        rate or, with `source`, another audio file.
        """
        path = self.path(clip)
        action = "separate" if self.waves == STEMS else "decode"
        try:
            waves, meta = _read_entry(path, self.waves, section)
        except CacheError as error:
            try:
                path.unlink(missing_ok=True)
            except OSError:  # a read-only cache
                raise CacheError(f"{error}; delete it to {action} the clip again") from None
            raise CacheError(f"{error}; it was removed, run again to {action} the clip") from None
        if meta is not None:
            self._check_own(path, meta, source)
        return waves

    def _check_own(self, path, meta, source):
        """Raises CacheError for the stems of another run that shares the folder."""
        way_out = "does another run use this cache? Set SEPARATION_CACHE_DIR elsewhere, run again"
        model, rate = meta.get("model"), meta.get("sample_rate")
        expected = self._model_for(source) if source else self.model
        if model == OWN_STEMS and not (source and Path(source).exists()):
            expected = model  # of a song, as far as can be told
        if (model, rate) != (expected, self.sample_rate):
            raise CacheError(
                f"{path} has stems by {model} at {rate} Hz instead of {expected} at "
                f"{self.sample_rate} Hz; {way_out}"
            )
        try:
            same = source is None or meta.get("source_sha256") == self.hash_source(source)
        except ClipError:  # the clip is gone, and only its stems are needed
            return
        if not same:
            raise CacheError(f"{path} was not made from {source} as it is now; {way_out}")

    def blocks(
        self, clip: str, *, samples: int, source: Path | str | None = None
    ) -> "Iterator[torch.Tensor]":
        """Yields the stems of a clip as read() does, up to `samples` at a time, as tensors."""
        with _open_entry(self.path(clip)) as archive:
            meta = _read_meta(archive)
        if meta is not None:
            self._check_own(self.path(clip), meta, source)
        yield from cached_blocks(self.path(clip), waves=self.waves, samples=samples)

    def read_file(self, path: Path | str) -> tuple[np.ndarray, int]:
        """(waves, sample rate in Hz) of any entry; without meta, it has the rate of this cache.

        Raises CacheError if the entry is damaged, UserError if the disk cannot be read.
        """
        waves, meta = _read_entry(path, self.waves)
        return waves, (meta or {}).get("sample_rate", self.sample_rate)

    def write(
        self,
        clip: str,
        waves: np.ndarray,
        source: Path | str,
        *,
        precision: str = "float32",
        source_sha256: str | None = None,
    ) -> None:
        """Stores waves (4 or 1, samples), made from the audio file `source` in `precision`.

        `source` can be a song's folder, too. `source_sha256` is hash_source(source) from before it
        was decoded: a file that changed meanwhile is done again by the next run. Without it,
        `source` is hashed now. Raises ClipError if the waves are NaN or infinite or `source` no
        longer exists, UserError if the entry cannot be written.
        """
        meta = {
            "format": FORMAT,
            "sample_rate": self.sample_rate,
            "model": self._model_for(source),
            "precision": precision,
            "source": Path(source).name,
            "source_bytes": clip_bytes(source),
            "source_sha256": source_sha256 or self.hash_source(source),
        }
        arrays = dict(zip(self.waves, np.asarray(waves, dtype=np.float16), strict=True))
        if not all(np.isfinite(wave).all() for wave in arrays.values()):
            raise CacheError(
                f"separating {source} produced NaN or infinite samples; remove or replace the file"
            )
        with atomic_write(self.path(clip)) as file:
            np.savez(file, **arrays, meta=np.array(json.dumps(meta)))


def open_cache(settings: Settings, *, waves: tuple[str, ...] | None = None) -> StemCache:
    """The cache of `waves`, STEMS or MIX, in SEPARATION_CACHE_DIR; by default what CHANNELS needs.

    They lie in different folders: a run of CHANNELS=mix leaves separated stems as they are.
    """
    waves, sample_rate = waves or settings.features.cached_waves, settings.features.sr
    if waves == MIX:
        folder = settings.cache_folder / MIX_FOLDER
        return StemCache(folder, model=NO_MODEL, sample_rate=sample_rate, waves=MIX)
    model = settings.separation.separation_model
    return StemCache(settings.cache_folder, model=model, sample_rate=sample_rate)


def cached_blocks(
    path: Path | str, *, samples: int, waves: tuple[str, ...] = STEMS
) -> "Iterator[torch.Tensor]":
    """Yields `waves` (4 or 1, up to `samples`) of an entry, as stored: memory is that of one block.

    Raises CacheError before the first block if the entry is damaged.
    """
    import torch  # only here: is_current and the export need none

    with _open_entry(path) as archive:
        files, length, dtype = _open_waves(archive, waves)
        meta = _read_meta(archive)
        _check_crc(archive)
        for start in range(0, length, samples):
            block = _read_values(files, min(samples, length - start), dtype)
            _check_finite(block, meta)
            yield torch.from_numpy(block)


def _read_entry(path, waves, section=None) -> tuple[np.ndarray, dict[str, Any] | None]:
    """(the waves, meta) of an entry; meta is None in the older form. Raises as _open_entry does."""
    with _open_entry(path) as archive:
        files, length, dtype = _open_waves(archive, waves)
        start, stop = section(length) if section else (0, length)
        if stop - start > length // 2:  # reading to the end checks the CRC
            arrays = np.stack([np.frombuffer(file.read(), dtype)[start:stop] for file in files])
        else:  # of a long clip, no more is held than is wanted
            _check_crc(archive)
            for file in files:
                file.seek(start * dtype.itemsize, os.SEEK_CUR)
            arrays = _read_values(files, stop - start, dtype)
        meta = _read_meta(archive)
        _check_finite(arrays, meta)
    return arrays, meta


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
    except UNREADABLE as error:
        if getattr(error, "errno", None) not in (None, errno.EINVAL):  # EINVAL: a wrong offset
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        raise CacheError(f"{path} cannot be read as stems ({first_line(error)})") from None


def _open_waves(archive, waves) -> tuple[list[BinaryIO], int, np.dtype]:
    """(members at their first value, samples, dtype) of an entry's `waves`.

    Raises ValueError unless they are arrays of one length and one float type.
    """
    files, shapes, dtypes = zip(*(_open_array(archive, name) for name in waves), strict=True)
    if len(set(shapes)) != 1 or len(set(dtypes)) != 1:
        raise ValueError("its stems differ in shape or type")
    if dtypes[0].kind != "f" or len(shapes[0]) != 1 or shapes[0][0] == 0:
        raise ValueError(f"its stems are {dtypes[0]} of shape {shapes[0]}")
    return files, shapes[0][0], dtypes[0]


def _open_array(archive, name) -> tuple[BinaryIO, tuple[int, ...], np.dtype]:
    """(member `name`.npy at its first value, shape, dtype).

    Raises ValueError if the member claims more bytes than the file can hold, or its header claims
    another size than the member has: no header makes NumPy allocate what is not there.
    """
    info = archive.getinfo(f"{name}.npy")
    file_bytes = os.fstat(archive.fp.fileno()).st_size
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} has the unknown compression {info.compress_type}")
    if info.file_size > min(MAX_MEMBER_BYTES, MAX_DEFLATE_RATIO * file_bytes):
        raise ValueError(f"{name} claims {info.file_size} bytes")
    file = archive.open(info)
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"{name} has the unknown .npy version {version[0]}.{version[1]}")
    with NPY_HEADER_LOCK:
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if file.tell() + math.prod(shape) * dtype.itemsize != info.file_size:
        raise ValueError(f"{name} claims the shape {shape}, which its size does not fit")
    return file, shape, dtype


def _read_values(files, count, dtype) -> np.ndarray:
    """The next `count` values of each of an entry's arrays, (4, count)."""
    return np.stack([np.frombuffer(file.read(count * dtype.itemsize), dtype) for file in files])


def _check_crc(archive):
    """Raises ValueError if an entry is damaged; memory is that of a block."""
    if damaged := archive.testzip():
        raise ValueError(f"Bad CRC-32 for file {damaged!r}")


def _read_meta(archive) -> dict[str, Any] | None:
    """The meta of an open entry; None in the older form. Raises ValueError if it is damaged."""
    if "meta.npy" not in archive.namelist():
        return None
    file, _, dtype = _open_array(archive, "meta")
    meta = json.loads(str(np.frombuffer(file.read(), dtype)[0]))
    if not isinstance(meta, dict):
        raise ValueError("its meta is not a JSON object")
    return meta


def _check_finite(stems, meta):
    """Raises ValueError for NaN or infinite stems of an older entry; write() checked the others."""
    if (meta or {}).get("format") != FORMAT and not np.isfinite(stems).all():
        raise ValueError("it holds NaN or infinite samples")
