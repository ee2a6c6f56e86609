"""Pairs of clips that contain the same recording: duplicates and overlapping cuts.

Every two fingerprints are cross-correlated at all offsets by FFT: half a million pairs of clips in
seconds. Pairs whose fingerprints correlate anywhere are then confirmed on their waveforms.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from scipy import fft
from tqdm import tqdm

from stemgenre.data.fingerprint import HOP_LENGTH, SAMPLE_RATE, similarity
from stemgenre.prefetch import prefetch_map

MIN_OVERLAP_SECONDS = 5.0  # of a pair; for clips shorter than 10 s, half of the shorter clip
CANDIDATE_THRESHOLD = 0.4  # correlation of two fingerprints from which the waveforms are compared
SIMILARITY_THRESHOLD = 0.85  # from which clips are one recording: cuts of real music by way of mp3
# at 32 to 128 kbit/s had 0.97 and more, melodies below one drum machine 6 dB louder 0.6, 18 dB 0.8
MAX_OFFSETS = 3  # tried per pair: a loop correlates with itself at several
PEAK_DISTANCE = 4  # frames between two of these offsets
ENERGY_FLOOR = 0.01  # of a fingerprint's mean square; less is a held tone or silence: no evidence
ROWS = 16  # clips compared with all others at once
COLUMNS = ("first", "second", "offset_seconds", "overlap_seconds", "similarity")


def find_duplicates(
    fingerprints: Sequence[np.ndarray],
    load_wave: Callable[[int], np.ndarray],
    *,
    num_queries: int | None = None,
    threads: int = 1,
    candidate_threshold: float = CANDIDATE_THRESHOLD,
    stopped: Callable[[], bool] = lambda: False,
) -> pd.DataFrame:
    """A table of the pairs that are the same recording, with COLUMNS.

    `fingerprints` are (bands, frames) each, see fingerprint(); `load_wave(position)` gives that
    clip's mono wave at SAMPLE_RATE. `first` and `second` are positions in `fingerprints`, first <
    second; the second clip begins `offset_seconds` into the first. With `num_queries`, only pairs
    of one of the first so many clips and one of the others. Ends early once `stopped()`.
    """
    candidates = []
    total = len(fingerprints) if num_queries is None else num_queries
    with tqdm(total=total, desc="comparing fingerprints", unit="clip") as progress:
        for rows, found in _candidates(fingerprints, candidate_threshold, num_queries):
            candidates += found
            progress.update(rows)
            if stopped():
                return pd.DataFrame(columns=list(COLUMNS))
    load_wave = functools.lru_cache(maxsize=64)(load_wave)

    def confirm(candidate):
        first, second, offsets = candidate
        waves = load_wave(first), load_wave(second)
        score, offset = max(similarity(*waves, offset) for offset in offsets)
        seconds = [len(wave) / SAMPLE_RATE for wave in waves]
        overlap = min(seconds[0], seconds[1] + offset) - max(0.0, offset)
        return first, second, offset, overlap, score

    confirmed = prefetch_map(confirm, candidates, threads=threads, depth=4 * threads)
    pairs = []
    with contextlib.closing(confirmed):
        for _, future in tqdm(
            confirmed,
            total=len(candidates),
            desc="comparing waveforms",
            unit="pair",
            disable=not candidates,
        ):
            pair = future.result()
            if pair[-1] >= SIMILARITY_THRESHOLD:
                pairs.append(pair)
            if stopped():
                break
    return pd.DataFrame(pairs, columns=list(COLUMNS))


def _candidates(
    fingerprints: Sequence[np.ndarray], threshold: float, num_queries: int | None
) -> Iterator[tuple[int, list[tuple[int, int, list[float]]]]]:
    """Yields (rows done, [(first, second, offsets in seconds), ...]) until all pairs are done."""
    lengths = np.array([part.shape[1] for part in fingerprints])
    longest = max(lengths, default=0)
    if longest == 0:
        return
    stack = torch.zeros(len(fingerprints), fingerprints[0].shape[0], longest)
    for row, part in zip(stack, fingerprints, strict=True):
        row[:, : part.shape[1]] = torch.from_numpy(part.astype(np.float32))
    size = fft.next_fast_len(2 * int(longest), real=True)
    spectra = torch.fft.rfft(stack, size).permute(2, 0, 1).contiguous()  # (frequencies, N, bands)
    norms = _OverlapNorms(stack, lengths, size)
    order = norms.lags.argsort()
    stop = len(fingerprints) if num_queries is None else num_queries
    for start in range(0, stop, ROWS):
        first_other = start if num_queries is None else num_queries
        rows, others = spectra[:, start : min(start + ROWS, stop)], spectra[:, first_other:]
        cross = rows @ others.conj().transpose(1, 2)
        sums = torch.fft.irfft(cross.permute(1, 2, 0).contiguous(), size)  # (rows, others, lags)
        found = []
        for number, products in enumerate(sums, start):
            begin = max(first_other, number + 1)
            correlation = norms.normalise(products[begin - first_other :], number)
            best = correlation.amax(1) if len(correlation) else torch.empty(0)
            for other in (best > threshold).nonzero().flatten().tolist():
                lags = norms.lags[order[_peaks(correlation[other][order], threshold)]]
                offsets = (lags * HOP_LENGTH / SAMPLE_RATE).tolist()
                found.append((number, begin + other, offsets))
        yield len(sums), found


class _OverlapNorms:
    """Norms of the overlapping parts of every two fingerprints, at every lag.

    `stack` (N, bands, frames), padded with zeros; `lengths` (N,) in frames. Inner products divided
    by them are correlation coefficients. Lags are in the order of an FFT of `size` frames: from 0
    up, then the negative ones up to -1.
    """

    def __init__(self, stack, lengths, size):
        self.energy = torch.nn.functional.pad(stack.square().sum(1).cumsum(1), (1, 0))
        self.lengths = torch.from_numpy(lengths)
        self.unique, self.inverse = self.lengths.unique(return_inverse=True)
        self.longest = stack.shape[2]
        self.lags = torch.fft.fftfreq(size, 1 / size).round().long()
        self.min_frames = MIN_OVERLAP_SECONDS * SAMPLE_RATE / HOP_LENGTH
        self.floor = ENERGY_FLOOR * stack.shape[1] * self.min_frames
        # cached, because most clips are equally long
        self.inverse_norms_of_all = functools.lru_cache(maxsize=8)(self._inverse_norms_of_all)

    def normalise(self, products, number):
        """Correlation coefficients from the inner products (M, lags) of fingerprint `number` with
        the last M fingerprints; 0 where their overlap is too short.
        """
        if not len(products):
            return products
        length = int(self.lengths[number])
        own = self._inverse_norms_of(number, length)[self.inverse[-len(products) :]]
        return own.mul_(products).mul_(self.inverse_norms_of_all(length)[-len(products) :])

    def _inverse_norms_of(self, number, length):
        """(unique lengths, lags): 1 / norm of the part of a fingerprint that overlaps with others
        of these lengths.
        """
        begin = self.lags.clamp(0, self.longest)
        end = torch.minimum(torch.tensor(length), self.unique[:, None] + self.lags)
        shorter = self.unique.clamp(max=length)[:, None]
        min_frames = (shorter / 2).clamp(max=self.min_frames)
        total = self.energy[number][end.clamp(min=0)] - self.energy[number][begin]
        return (total.clamp(min=0) + self.floor).rsqrt().where(end - begin >= min_frames, 0)

    def _inverse_norms_of_all(self, length):
        """(N, lags): 1 / norm of the part of each fingerprint that overlaps with one so long."""
        end = (length - self.lags).clamp(0, self.longest)
        total = self.energy[:, end] - self.energy[:, (-self.lags).clamp(0, self.longest)]
        return (total.clamp(min=0) + self.floor).rsqrt()


def _peaks(correlation, threshold):
    """The positions of the highest peaks above the threshold, best first."""
    correlation, peaks = correlation.clone(), []
    while len(peaks) < MAX_OFFSETS and correlation.max() > threshold:
        top = int(correlation.argmax())
        peaks.append(top)
        correlation[max(0, top - PEAK_DISTANCE) : top + PEAK_DISTANCE + 1] = 0
    return peaks
