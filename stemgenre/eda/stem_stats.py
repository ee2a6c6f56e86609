"""What the network gets of each genre: example images, mean images, and each stem's energy."""

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from stemgenre.errors import UserError
from stemgenre.features.augmentation import NO_AUGMENT
from stemgenre.features.log_mel import Frontend, RunningStats
from stemgenre.prefetch import prefetch_map
from stemgenre.separation.cache import StemCache
from stemgenre.separation.entry_reader import cached_blocks
from stemgenre.settings import FeatureSettings

log = logging.getLogger(__name__)

MAX_CLIPS_PER_GENRE = 20  # of train: enough for a mean image, in seconds instead of minutes


@dataclass(frozen=True)
class StemStats:
    """Statistics of the genres that have cached clips.

    `examples`: {genre: (clip, waves (4 or 1, samples), image (C, S, S) as the network gets it)};
    `mean_images`: {genre: (C, S, S)}; `energy`: a table of genre, clips, and the mean fraction of
    the energy of each stem, or of the mix, which has all; `channel_stats`: (mean, standard
    deviation) in dB of each channel, with which the images are standardised. All are of the first
    CLIP_SECONDS of each clip.
    """

    examples: dict[str, tuple[str, torch.Tensor, torch.Tensor]]
    mean_images: dict[str, torch.Tensor]
    energy: pd.DataFrame
    channel_stats: tuple


def compute_stem_stats(
    clips: pd.DataFrame,
    cache: StemCache,
    features: FeatureSettings,
    *,
    labels: list[str],
    device: torch.device,
    seed: int,
    threads: int,
    stopped: Callable[[], bool],
) -> StemStats | None:
    """The StemStats of a random sample of the training clips (columns clip, path, label).

    `labels`: the genres in their order. None without cached clips, or once `stopped()`. The
    cache is read and left as it is.
    """
    sample = _sample(clips, cache, seed)
    sample = sample.sort_values("label", key=lambda c: c.map(labels.index), kind="stable")
    frontend, running_stats = Frontend(features, device=device), RunningStats()
    readable, fractions = [], {}  # genre -> rows of a fraction for each wave
    for row, stems in _read_stems(sample, cache, frontend.clip_samples, threads, "stems"):
        readable.append(row.Index)
        running_stats.add(frontend.log_mel(stems))
        energy = stems.float().square().sum(1)
        energy = energy / energy.sum().clamp(min=1e-20)
        fractions.setdefault(row.label, []).append(energy.tolist())
        if stopped():
            return None
    if not fractions:
        return None
    frontend = Frontend(features, device=device, channel_stats=running_stats.mean_and_std())
    examples, mean_images = {}, {}
    for row, stems in _read_stems(
        sample.loc[readable], cache, frontend.clip_samples, threads, "images"
    ):
        image = frontend([stems], [NO_AUGMENT])[0].cpu()  # (C, S, S)
        examples.setdefault(row.label, (row.clip, stems, image))
        mean_images[row.label] = mean_images.get(row.label, 0) + image / len(fractions[row.label])
        if stopped():
            return None
    energy = pd.DataFrame(
        [[genre, len(rows), *np.mean(rows, axis=0)] for genre, rows in fractions.items()],
        columns=["genre", "clips", *cache.waves],
    )
    return StemStats(examples, mean_images, energy, frontend.channel_stats)


def _sample(clips, cache, seed):
    """Up to MAX_CLIPS_PER_GENRE cached clips of each label, drawn at random, in table order."""
    order = np.random.default_rng(seed).permutation(len(clips))
    chosen, counts = [], {}
    for position in order:
        row = clips.iloc[position]
        count = counts.get(row["label"], 0)
        if count < MAX_CLIPS_PER_GENRE and cache.is_current(row["clip"], row["path"]):
            counts[row["label"]] = count + 1
            chosen.append(position)
    return clips.iloc[sorted(chosen)]


def _read_stems(sample, cache, samples, threads, title):
    """Yields (row, waves (C, up to `samples`)) of entries that can be read; warns of the others."""

    def read(row):
        blocks = cached_blocks(cache.path(row.clip), samples=samples, waves=cache.waves)
        with contextlib.closing(blocks):
            return next(blocks)

    ahead = prefetch_map(read, sample.itertuples(), threads=threads, depth=2 * threads)
    with contextlib.closing(ahead):
        for row, future in tqdm(ahead, total=len(sample), desc=title, unit="clip"):
            try:
                yield row, future.result()
            except UserError as error:
                log.warning("%s", error)
