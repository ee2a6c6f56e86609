"""Batches of clips' stems: the order of an epoch, windows of stems read ahead in threads."""

import contextlib
import functools
import gc
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from stemgenre.errors import UserError
from stemgenre.features.augmentation import sample_swap, swap_stems
from stemgenre.features.windows import WindowCutter
from stemgenre.prefetch import prefetch_map
from stemgenre.runtime import derive_seed, is_out_of_memory, to_device
from stemgenre.settings import AugmentSettings

log = logging.getLogger(__name__)

Prepare = Callable[[int, torch.Tensor], torch.Tensor]  # (row position, its stems) -> a tensor
WHOLE_BYTES = 32e6  # of a cache entry, 3 minutes: more is read in parts


def epoch_batches(
    clips: pd.DataFrame, *, batch_size: int, seed: int, epoch: int
) -> list[np.ndarray]:
    """Row positions of `clips` in the order of an epoch, as batches of nearly equal size.

    A pure function of (seed, epoch). Nearly equal: no batch of a single clip remains, whose
    BatchNorm statistics would be poor, unless `batch_size` is 1 or 2.
    """
    order = np.random.default_rng(derive_seed(seed, epoch, 2)).permutation(len(clips))
    return np.array_split(order, math.ceil(len(clips) / batch_size))


def split_evenly(count: int, parts: int) -> list[slice]:
    """range(count) as so many slices, as equal as possible."""
    bounds = [count * part // parts for part in range(parts + 1)]
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


def check_batch_size(batch_size: int, *, world_size: int, clips: int) -> None:
    """Raises UserError unless every process gets equally many clips of a batch, two or more."""
    if batch_size % world_size or (world_size > 1 and batch_size < 2 * world_size):
        fitting = max(2, round(batch_size / world_size)) * world_size
        raise UserError(
            f"BATCH_SIZE={batch_size} does not divide by {world_size} processes into two clips or "
            f"more; try {fitting}"
        )
    if clips < 2 * world_size:
        raise UserError(f"{clips} training clips are too few for {world_size} processes")


class StemLoader:
    """Reads clips' stems from the cache in threads.

    On a CUDA GPU, stems stay in its memory from epoch to epoch, up to the fraction `device_cache`
    of what is free now, until drop_gpu_cache() is called. The host's memory grows neither with the
    number of clips nor with their length.
    """

    def __init__(
        self,
        cache: Any,  # a StemCache
        *,
        threads: int,
        device: torch.device,
        device_cache: float,
    ):
        self.cache = cache
        self.threads = threads
        self.device = device
        self.gpu_cache = {}
        self.budget_bytes = 0  # that may still be added to gpu_cache
        if device.type == "cuda":
            gc.collect()  # Demucs, of which cycles of references keep its weights
            torch.cuda.empty_cache()  # what the allocator still holds of its memory
            self.budget_bytes = device_cache * torch.cuda.mem_get_info(device)[0]

    def read(
        self,
        clip: str,
        *,
        source: Path | None = None,
        section: Callable[[int], tuple[int, int]] | None = None,
    ) -> torch.Tensor:
        """Stems (4, samples) of a clip, float16 or float32, on the device if they fit.

        `section` gives, for the clip's length in samples, (start, stop) of what is wanted. Raises
        ClipError if the entry is damaged or another run's; with `source`, the clip's audio file,
        also if the stems are another file's.
        """
        stems = self.gpu_cache.get(clip)  # other threads may drop the cache
        if stems is None and self.budget_bytes > 0 and self._is_short(clip):
            stems = self._to_device(torch.from_numpy(self.cache.read(clip, source=source)))
            if stems.nbytes <= self.budget_bytes:  # 0 if they did not fit
                self.budget_bytes -= stems.nbytes
                self.gpu_cache[clip] = stems
            else:  # from now on, of a clip that is not kept, only the section is read
                self.budget_bytes = 0
        if stems is not None:
            return stems[:, slice(*section(stems.shape[1]))] if section else stems
        stems = self.cache.read(clip, source=source, section=section)
        return self._to_device(torch.from_numpy(np.ascontiguousarray(stems)))

    def drop_gpu_cache(self) -> bool:
        """Frees the stems that stay on the GPU, from now on; whether there were any."""
        self.budget_bytes = 0
        had_any = bool(self.gpu_cache)
        if had_any:
            log.warning("GPU out of memory: stems are no longer kept on the GPU")
        self.gpu_cache = {}
        return had_any

    def batches(
        self,
        clips: pd.DataFrame,
        batches: Sequence[np.ndarray],
        *,
        section: Callable[[int, int], tuple[int, int]],
        prepare: Prepare = lambda row, stems: stems,
    ) -> Iterator[tuple[np.ndarray, list[torch.Tensor]]]:
        """Yields (row positions, those clips' stems) for each array of row positions in `batches`.

        `section` gives (start, stop) in samples for a row position and the clip's length. `prepare`
        gives what is yielded for a row position and its stems, and is called in the threads. Two
        batches are read ahead.
        """
        rows = _clips_and_sources(clips)

        def load(i):
            clip, source = rows[i]
            section_of_row = functools.partial(section, i)
            return prepare(i, self.read(clip, source=source, section=section_of_row))

        depth = 2 * max((len(batch) for batch in batches), default=0)
        items = (i for batch in batches for i in batch)
        ahead = prefetch_map(load, items, threads=self.threads, depth=depth)
        with contextlib.closing(ahead):
            for batch in batches:
                yield batch, [next(ahead)[1].result() for _ in batch]

    def windows(
        self, clips: pd.DataFrame, positions: Sequence[int], *, samples: int, overlap: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields (row position, stems of a window) for all windows of the clips at `positions`.

        Windows have up to `samples` samples, and `overlap` of them show each sample.
        """
        rows = _clips_and_sources(clips)

        def blocks(i):
            clip, source = rows[i]
            if clip in self.gpu_cache or self._is_short(clip):
                return [self.read(clip, source=source)]
            return self.cache.blocks(clip, samples=samples, source=source)

        depth = 2 * self.threads
        ahead = prefetch_map(blocks, positions, threads=self.threads, depth=depth)
        with contextlib.closing(ahead):
            for i, future in ahead:
                cutter = WindowCutter(samples, overlap=overlap)
                for stems in future.result():
                    for _, window in cutter.add(stems):
                        yield i, self._to_device(window)
                for _, window in cutter.finish():
                    yield i, self._to_device(window)

    def _to_device(self, stems):
        """The stems on the device; as they are while they do not fit its memory.

        The front end moves them then, where memory that runs out is dealt with; and from then on
        none are kept on the GPU.
        """
        try:
            return to_device(stems, self.device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self.drop_gpu_cache()
            return stems

    def _is_short(self, clip):
        """Whether a clip's entry is read as a whole. A missing one is, so that read() names it."""
        try:
            return self.cache.path(clip).stat().st_size <= WHOLE_BYTES
        except OSError:
            return True


def _clips_and_sources(clips):
    """[(name in the cache, audio file or None)] of a table of clips."""
    sources = clips["path"] if "path" in clips else [None] * len(clips)
    return list(zip(clips["clip"], sources, strict=True))


def training_batches(
    loader: StemLoader,
    clips: pd.DataFrame,
    batches: Sequence[np.ndarray],
    *,
    section: Callable[[int, int], tuple[int, int]],
    augment: AugmentSettings,
    seed: int,
    epoch: int,
    prepare: Prepare = lambda row, stems: stems,
) -> Iterator[tuple[np.ndarray, list[torch.Tensor]]]:
    """Yields what loader.batches() does, with STEM_SWAP some stems from clips of the same genre.

    See sample_swap. Only the partners that are used are read, by the thread that reads the clip.
    """
    if not augment.stem_swap:
        yield from loader.batches(clips, batches, section=section, prepare=prepare)
        return
    targets, indices = clips["target"].to_numpy(), clips.index.to_numpy()
    rows_of = {target: np.flatnonzero(targets == target) for target in np.unique(targets)}
    rows = _clips_and_sources(clips)

    def swap_and_prepare(row, stems):
        swap = sample_swap(
            augment,
            rows_of[targets[row]],
            row=row,
            seed=seed,
            epoch=epoch,
            clip_index=int(indices[row]),
        )
        if swap and len(stems) > 1:  # a mix by itself has no stems to swap
            clip, source = rows[swap.partner]
            section_of_row = functools.partial(section, row)  # at the row's tempo
            partner = loader.read(clip, source=source, section=section_of_row)
            stems = swap_stems(stems, partner, swap.stems)
        return prepare(row, stems)

    yield from loader.batches(clips, batches, section=section, prepare=swap_and_prepare)
