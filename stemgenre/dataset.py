"""The split, the order of an epoch, and stems read from the cache ahead of the device."""

import contextlib
import logging
import math

import numpy as np
import torch
from sklearn.model_selection import train_test_split

from stemgenre.errors import UserError
from stemgenre.groups import split_groups
from stemgenre.prefetch import map_ahead
from stemgenre.runtime import seed_of, to_device

log = logging.getLogger(__name__)


def split_clips(clips, *, test_size, seed, label_names, groups=None):
    """(training rows, validation rows) of `clips`, stratified by genre, as two tables.

    The validation part has at least one clip of each genre. `groups`, a number for each clip, are
    kept on one side each. Raises UserError if a genre has a single clip, or too few are left to
    train on.
    """
    counts = clips["target"].value_counts()
    single = [label_names[target] for target, count in counts.items() if count < 2]
    if single:
        raise UserError(
            f"{', '.join(sorted(single))} has a single clip; the validation split needs two or "
            "more of each genre: one to train on, one to validate"
        )
    if len(counts) < 2:
        raise UserError(
            f"all training clips are {label_names[counts.index[0]]}; two genres are needed"
        )
    if groups is not None:
        train, valid = split_groups(
            clips["target"].to_numpy(),
            groups,
            test_size=test_size,
            seed=seed,
            label_names=label_names,
        )
        return clips.iloc[train], clips.iloc[valid]
    wanted = math.ceil(test_size * len(clips))
    held_out = min(max(wanted, len(counts)), len(clips) - len(counts))
    if held_out != wanted:
        log.info(
            "split: %d clips are held out for validation instead of %d, one or more per genre",
            held_out,
            wanted,
        )
    train, valid = train_test_split(
        np.arange(len(clips)), test_size=held_out, stratify=clips["target"], random_state=seed
    )
    return clips.iloc[np.sort(train)], clips.iloc[np.sort(valid)]


def epoch_batches(clips, *, batch_size, seed, epoch):
    """Row positions of `clips` in the order of an epoch, cut into batches of nearly equal size.

    A pure function of (seed, epoch). Nearly equal: no batch of one clip is left over, on which
    BatchNorm would fail.
    """
    order = np.random.default_rng(seed_of(seed, epoch, 2)).permutation(len(clips))
    return np.array_split(order, math.ceil(len(clips) / batch_size))


class StemReader:
    """Reads clips' stems from the cache in threads, cut to what an image can need.

    At the fastest tempo that is drawn, so much more of a long clip fits into the image. On a CUDA
    card, stems stay there from epoch to epoch as long as they fit into `device_cache` of the
    memory that is free now; the host's memory does not grow with the number of clips.
    """

    def __init__(self, cache, features, augment, *, threads, device, device_cache):
        self.cache = cache
        self.threads = threads
        self.device = device
        fastest = max(1.0, *augment.time_stretch_rates)
        self.samples = math.ceil(features.clip_seconds * features.sr * fastest) + features.n_fft
        self.kept = {}
        self.room = 0  # bytes left for what is kept
        if device.type == "cuda":
            self.room = device_cache * torch.cuda.mem_get_info(device)[0]

    def read(self, clip):
        """Stems of one clip: a tensor (4, samples), float16 or float32, on the device."""
        if clip in self.kept:
            return self.kept[clip]
        stems = torch.from_numpy(np.ascontiguousarray(self.cache.read(clip)[:, : self.samples]))
        stems = to_device(stems, self.device)
        if stems.nbytes <= self.room:
            self.room -= stems.nbytes
            self.kept[clip] = stems
        return stems

    def batches(self, clips, batches):
        """Yields (positions, list of those clips' stems) for each array of row positions."""
        names = clips["clip"].tolist()
        depth = 2 * max((len(batch) for batch in batches), default=0)
        ahead = map_ahead(
            self.read,
            (names[i] for batch in batches for i in batch),
            threads=self.threads,
            depth=depth,
        )
        with contextlib.closing(ahead):
            for batch in batches:
                yield batch, [next(ahead)[1].result() for _ in batch]
