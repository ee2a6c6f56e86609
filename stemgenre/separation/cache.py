"""The waves of each clip as one .npz: which entries are current, atomic writes.

An entry has the float16 arrays vocals, drums, bass and other, not compressed, and `meta`: JSON
that says what they were made from. For CHANNELS=mix, the entries of another folder have the array
mix alone, and nothing is separated. How entries are read, older ones too: entry_reader.py.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stemgenre.data.source_hashes import HASHES_FILE, SourceHashes, clip_bytes, file_state
from stemgenre.errors import ClipError, UserError
from stemgenre.files import atomic_write
from stemgenre.separation.entry_reader import (
    FORMAT,
    CacheError,
    cached_blocks,
    read_entry,
    read_header,
    read_meta,
)
from stemgenre.settings import STEMS, Settings

if TYPE_CHECKING:
    import torch

MIX = ("mix",)  # the waves of an entry for CHANNELS=mix
MIX_FOLDER = "mix"  # below SEPARATION_CACHE_DIR: its entries, so that stems are never replaced
NO_MODEL = "none"  # in their meta
OWN_STEMS = "files"  # in the meta of stems that are the files of a song's folder
LENGTH_TOLERANCE = 0.01  # of a clip's length, between it and an entry without meta


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
        self._undamaged = set()  # entries as read() has found them, see entry_reader

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
            meta, samples = read_header(self.path(clip), self.waves)
        except UserError:
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
            meta = read_meta(self.path(clip))
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
        with self._removing_damaged(path):
            waves, meta = read_entry(path, self.waves, section, undamaged=self._undamaged)
        if meta is not None:
            self._check_own(path, meta, source)
        return waves

    @contextlib.contextmanager
    def _removing_damaged(self, path):
        """Removes the entry if it is found to be damaged, and says so in the CacheError."""
        action = "separate" if self.waves == STEMS else "decode"
        try:
            yield
        except CacheError as error:
            try:
                path.unlink(missing_ok=True)
            except OSError:  # a read-only cache
                raise CacheError(f"{error}; delete it to {action} the clip again") from None
            raise CacheError(f"{error}; it was removed, run again to {action} the clip") from None

    def _check_own(self, path, meta, source):
        """Raises CacheError for the stems of another run that shares the folder."""
        way_out = "does another run use this cache? Set SEPARATION_CACHE_DIR elsewhere, run again"
        model, rate = meta.get("model"), meta.get("sample_rate")
        expected = self._model_for(source) if source else self.model
        if model == OWN_STEMS and not (source and Path(source).exists()):
            expected = model  # of a song, as far as can be told
        if (model, rate) != (expected, self.sample_rate):
            was, wanted = f"{rate} Hz", f"{self.sample_rate} Hz"
            if model != expected:
                was, wanted = f"stems by {model} at {was}", f"{expected} at {wanted}"
            raise CacheError(f"{path} has {was} instead of {wanted}; {way_out}")
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
        path = self.path(clip)
        with self._removing_damaged(path):
            meta = read_meta(path)
        if meta is not None:
            self._check_own(path, meta, source)
        with self._removing_damaged(path):
            yield from cached_blocks(
                path, waves=self.waves, samples=samples, undamaged=self._undamaged
            )

    def read_file(self, path: Path | str) -> tuple[np.ndarray, int]:
        """(waves, sample rate in Hz) of any entry; without meta, it has the rate of this cache.

        Raises CacheError if the entry is damaged, UserError if the disk cannot be read.
        """
        waves, meta = read_entry(path, self.waves)
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
