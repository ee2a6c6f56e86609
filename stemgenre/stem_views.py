"""What the network sees of each genre: example images, mean images, and each stem's energy."""

import contextlib
import logging
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from stemgenre.augmentation import PLAIN
from stemgenre.cache import STEMS
from stemgenre.errors import UserError
from stemgenre.frontend import DecibelStatistics, FrontEnd
from stemgenre.prefetch import map_ahead

log = logging.getLogger(__name__)

SAMPLE = 20  # training clips of a genre at most: enough for a mean, and seconds instead of minutes


@dataclass(frozen=True)
class StemViews:
    """Of each genre with separated clips: {genre: ...}, and what was measured over all of them.

    `examples`: (clip, stems (4, samples), image (4, S, S) as the network gets it); `means`: mean
    image (4, S, S); `energy`: a table of genre, clips, and the stems' mean shares of the energy;
    `channels`: mean and deviation in dB by which the images are standardised.
    """

    examples: dict
    means: dict
    energy: pd.DataFrame
    channels: tuple


def view_stems(clips, cache, features, *, labels, device, seed, threads, stopped):
    """The StemViews of a sample of the training clips (columns clip, path, label), or None.

    `labels`: the genres in their order. None without separated clips, or once `stopped()`. The
    cache is read and left as it is.
    """
    sample = _sample(clips, cache, seed)
    sample = sample.sort_values("label", key=lambda c: c.map(labels.index), kind="stable")
    frontend, statistics = FrontEnd(features, device=device), DecibelStatistics()
    shares = {}
    for row, stems in _stems(sample, cache, threads, "stems"):
        statistics.add(frontend.decibels(stems))
        energy = stems.float().square().sum(1)
        shares.setdefault(row.label, []).append((energy / energy.sum().clamp(min=1e-20)).tolist())
        if stopped():
            return None
    if not shares:
        return None
    frontend = FrontEnd(features, device=device, channels=statistics.mean_and_std())
    examples, means = {}, {}
    for row, stems in _stems(sample, cache, threads, "images"):
        image = frontend([stems], [PLAIN])[0].cpu()  # (4, S, S)
        examples.setdefault(row.label, (row.clip, stems, image))
        means[row.label] = means.get(row.label, 0) + image / len(shares[row.label])
        if stopped():
            return None
    energy = pd.DataFrame(
        [[genre, len(rows), *np.mean(rows, axis=0)] for genre, rows in shares.items()],
        columns=["genre", "clips", *STEMS],
    )
    return StemViews(examples, means, energy, frontend.channels)


def _sample(clips, cache, seed):
    """Up to SAMPLE separated clips of each label, in the order of the labels' clips."""
    order = np.random.default_rng(seed).permutation(len(clips))
    rows, counts = [], {}
    for row in (clips.iloc[[i]] for i in order):
        label = row["label"].iloc[0]
        if counts.get(label, 0) < SAMPLE and cache.is_current(
            row["clip"].iloc[0], row["path"].iloc[0]
        ):
            counts[label] = counts.get(label, 0) + 1
            rows.append(row)
    return pd.concat(rows).sort_index() if rows else clips.iloc[:0]


def _stems(sample, cache, threads, title):
    """Yields (row, stems (4, samples)) of what can be read; the rest is named."""

    def read(row):
        return torch.from_numpy(cache.read_file(cache.path(row.clip))[0])

    ahead = map_ahead(read, sample.itertuples(), threads=threads, depth=2 * threads)
    with contextlib.closing(ahead):
        for row, future in tqdm(ahead, total=len(sample), desc=title, unit="clip"):
            try:
                yield row, future.result()
            except UserError as error:
                log.warning("%s", error)
