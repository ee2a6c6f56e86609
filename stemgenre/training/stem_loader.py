"""Batches of clips' stems: the order of an epoch, stems read ahead in threads."""

import contextlib
import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from stemgenre.errors import UserError
from stemgenre.prefetch import prefetch_map
from stemgenre.runtime import derive_seed, to_device
from stemgenre.settings import AugmentSettings, FeatureSettings

log = logging.getLogger(__name__)


def epoch_batches(
    clips: pd.DataFrame, *, batch_size: int, seed: int, epoch: int
) -> list[np.ndarray]:
    """Row positions of `clips` in the order of an epoch, as batches of nearly equal size.

    A pure function of (seed, epoch). Nearly equal: no batch of one clip remains, on which BatchNorm
    would fail.
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
    """Reads clips' stems from the cache in threads, cut to the longest an image can need.

    At the fastest tempo, an image covers that much more of a long clip. On a CUDA GPU, stems stay
    in its memory from epoch to epoch, up to the fraction `device_cache` of what is free now, until
    drop_gpu_cache() is called; the host's memory does not grow with the number of clips.
    """

    def __init__(
        self,
        cache: Any,  # a StemCache
        features: FeatureSettings,
        augment: AugmentSettings,
        *,
        threads: int,
        device: torch.device,
        device_cache: float,
    ):
        self.cache = cache
        self.threads = threads
        self.device = device
        fastest = max(1.0, *augment.time_stretch_rates)
        self.samples = math.ceil(features.clip_seconds * features.sr * fastest) + features.n_fft
        self.gpu_cache = {}
        self.budget_bytes = 0  # that may still be added to gpu_cache
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what the allocator still holds of Demucs' memory
            self.budget_bytes = device_cache * torch.cuda.mem_get_info(device)[0]

    def read(self, clip: str, *, source: Path | None = None) -> torch.Tensor:
        """Stems (4, samples) of a clip, float16 or float32, on the device.

        Raises ClipError if the entry is damaged or another run's; with `source`, the clip's audio
        file, also if the stems are another file's.
        """
        if (stems := self.gpu_cache.get(clip)) is not None:  # other threads may drop the cache
            return stems
        stems = torch.from_numpy(
            np.ascontiguousarray(self.cache.read(clip, source=source)[:, : self.samples])
        )
        stems = to_device(stems, self.device)
        if stems.nbytes <= self.budget_bytes:
            self.budget_bytes -= stems.nbytes
            self.gpu_cache[clip] = stems
        return stems

    def drop_gpu_cache(self) -> bool:
        """Frees the stems that stay on the GPU, from now on; whether there were any."""
        self.budget_bytes = 0
        had_any = bool(self.gpu_cache)
        if had_any:
            log.warning("GPU out of memory: stems are no longer kept on the GPU")
        self.gpu_cache = {}
        return had_any

    def batches(
        self, clips: pd.DataFrame, batches: Sequence[np.ndarray]
    ) -> Iterator[tuple[np.ndarray, list[torch.Tensor]]]:
        """Yields (row positions, those clips' stems) for each array of row positions in `batches`.

        Two batches are read ahead.
        """
        sources = clips["path"] if "path" in clips else [None] * len(clips)
        rows = list(zip(clips["clip"], sources, strict=True))
        depth = 2 * max((len(batch) for batch in batches), default=0)
        ahead = prefetch_map(
            lambda row: self.read(row[0], source=row[1]),
            (rows[i] for batch in batches for i in batch),
            threads=self.threads,
            depth=depth,
        )
        with contextlib.closing(ahead):
            for batch in batches:
                yield batch, [next(ahead)[1].result() for _ in batch]
