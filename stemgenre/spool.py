"""Stems too long to be held whole: read from the cache block by block, and collected on disk."""

import contextlib
import tempfile
import zipfile

import numpy as np
import torch

from stemgenre.cache import STEMS, UNREADABLE, CacheError, read_npy_header
from stemgenre.errors import UserError


def cached_blocks(path, *, samples):
    """Yields stems (4, up to `samples`) of a cache entry, as stored, without holding it whole.

    Raises CacheError before the first one if the entry is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive, contextlib.ExitStack() as stack:
            if archive.testzip():
                raise ValueError("its check sums do not fit")
            files = [stack.enter_context(archive.open(f"{stem}.npy")) for stem in STEMS]
            ((length,), dtype), *others = [read_npy_header(file) for file in files]
            if any(other != ((length,), dtype) for other in others) or dtype.kind != "f":
                raise ValueError("its stems are not alike")
            if not length:
                raise ValueError("it holds no samples")
            for start in range(0, length, samples):
                count = min(samples, length - start) * dtype.itemsize
                block = np.stack([np.frombuffer(file.read(count), dtype) for file in files])
                if not np.isfinite(block).all():
                    raise ValueError("it holds samples that are no numbers")
                yield torch.from_numpy(block)
    except UNREADABLE as error:
        raise CacheError(f"{path} cannot be read as stems ({error})") from None


class StemSpool:
    """Collects a file's stems on disk, block by block, until the cache's entry can be written."""

    def __init__(self, cache):
        self.cache = cache
        with self._named_errors():
            cache.folder.mkdir(parents=True, exist_ok=True)
            self.file = tempfile.TemporaryFile(dir=cache.folder)  # noqa: SIM115 see close

    def add(self, stems):
        """Takes in stems (4, n) float16."""
        with self._named_errors():
            self.file.write(stems.T.contiguous().numpy())

    def store(self, clip, source):
        """Writes the entry. The system pages the stems in and out as it needs the memory."""
        with self._named_errors():
            self.file.flush()
            stems = np.memmap(self.file, np.float16, mode="r").reshape(-1, len(STEMS))
            self.cache.write(clip, stems.T, source)

    def close(self):
        """Frees the disk."""
        self.file.close()

    @contextlib.contextmanager
    def _named_errors(self):
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.cache.folder} cannot be written: {error.strerror}") from None
