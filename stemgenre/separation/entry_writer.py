"""Entries of the cache that are written block by block, as a file's waves come."""

import contextlib
import tempfile
from pathlib import Path

import numpy as np
import torch

from stemgenre.errors import ClipError, UserError
from stemgenre.separation.cache import StemCache


class EntryWriter:
    """Writes a file's waves, as they come block by block, as one entry of the cache.

    A single block is held in memory; more of them are collected on the disk.
    """

    def __init__(
        self, cache: StemCache, clip: str, source: Path, *, source_sha256: str | None = None
    ) -> None:
        """`source_sha256` is the hash of `source` from before it was decoded."""
        self.cache, self.clip, self.source = cache, clip, source
        self.source_sha256 = source_sha256
        self.block: torch.Tensor | None = None
        self.spool: StemSpool | None = None
        self.error: Exception | None = None  # of a block that is missing; finish() raises it

    def add(self, waves: torch.Tensor) -> None:
        """Takes in waves (4 or 1, samples), float16 on the CPU.

        Raises UserError if the disk is full.
        """
        try:
            if self.block is None:
                self.block = waves
                return
            if self.spool is None:
                self.spool = StemSpool(self.cache)
                self.spool.add(self.block)
            self.spool.add(waves)
        except MemoryError as error:
            self.error = error
        except UserError as error:  # the blocks behind it may find space again
            self.error = error
            raise

    def finish(self, precision: str) -> None:
        """Writes the entry.

        Raises ClipError and UserError as StemCache.write does, ClipError if memory runs out.
        """
        with contextlib.closing(self):
            made_by = {"precision": precision, "source_sha256": self.source_sha256}
            try:
                if self.error:
                    raise self.error
                if self.spool:
                    self.spool.store(self.clip, self.source, **made_by)
                else:
                    self.cache.write(self.clip, self.block.numpy(), self.source, **made_by)
            except MemoryError:
                raise ClipError(f"{self.source} cannot be stored: not enough memory") from None

    def close(self) -> None:
        """Frees the disk space of waves that were collected."""
        if self.spool:
            self.spool.close()


class StemSpool:
    """Collects a file's waves on disk, block by block, until the cache's entry can be written."""

    def __init__(self, cache: StemCache):
        self.cache = cache
        with self._named_errors():
            cache.folder.mkdir(parents=True, exist_ok=True)
            self.file = tempfile.TemporaryFile(dir=cache.folder)  # noqa: SIM115 see close

    def add(self, waves: torch.Tensor) -> None:
        """Appends waves (4 or 1, n) float16. Raises UserError if the disk is full."""
        with self._named_errors():
            self.file.write(waves.T.contiguous().numpy())

    def store(
        self,
        clip: str,
        source: Path | str,
        *,
        precision: str = "float32",
        source_sha256: str | None = None,
    ) -> None:
        """Writes the entry, as StemCache.write does, without holding the waves in memory."""
        with self._named_errors():
            self.file.flush()
            waves = np.memmap(self.file, np.float16, mode="r").reshape(-1, len(self.cache.waves))
            self.cache.write(
                clip, waves.T, source, precision=precision, source_sha256=source_sha256
            )

    def close(self) -> None:
        """Frees the disk space."""
        self.file.close()

    @contextlib.contextmanager
    def _named_errors(self):
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.cache.folder} cannot be written: {error.strerror}") from None
