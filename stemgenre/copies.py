"""Clips that hold the same recording, found from the sound: copies and overlapping cuts.

Every two prints are laid over each other at every offset, by way of their spectra: half a million
pairs of clips in seconds. Pairs whose prints agree anywhere are then confirmed on their waves.
"""

import functools

import numpy as np
import pandas as pd
import torch
from scipy import fft
from tqdm import tqdm

from stemgenre.fingerprint import HOP, RATE, similarity
from stemgenre.prefetch import map_ahead

FEWEST_SECONDS = 5.0  # that two clips must share; of clips shorter than 10 s, half the shorter one
WORTH_A_LOOK = 0.4  # correlation of two prints from which on the waves are compared
SAME = 0.85  # similarity from which on clips are one recording: cuts of real music by way of mp3
# at 32 to 128 kbit/s had 0.97 and more, melodies below one drum machine 6 dB louder 0.6, 18 dB 0.8
OFFSETS = 3  # of a pair that are tried: a loop agrees with itself at several
FLOOR = 0.01  # of a print's mean square; less is a held tone or silence, which prove nothing
ROWS = 16  # clips compared with all others at once
COLUMNS = ("first", "second", "offset_seconds", "overlap_seconds", "similarity")


def find_copies(prints, wave_of, *, threads=1, stopped=lambda: False):
    """A table of pairs (COLUMNS) that are the same recording, of clips given by their prints.

    `first` and `second` are positions in `prints`; the second clip begins `offset_seconds` into
    the first. `wave_of(position)` is a clip's mono wave at RATE. Ends early once `stopped()`.
    """
    candidates = []
    with tqdm(total=len(prints), desc="comparing", unit="clip") as bar:
        for rows, found in _candidates(prints):
            candidates += found
            bar.update(rows)
            if stopped():
                return pd.DataFrame(columns=list(COLUMNS))
    wave_of = functools.lru_cache(maxsize=64)(wave_of)

    def confirm(candidate):
        first, second, offsets = candidate
        waves = wave_of(first), wave_of(second)
        alike, offset = max(similarity(*waves, offset) for offset in offsets)
        shared = min(len(waves[0]) / RATE, len(waves[1]) / RATE + offset) - max(0.0, offset)
        return first, second, offset, shared, alike

    confirmed = map_ahead(confirm, candidates, threads=threads, depth=4 * threads)
    pairs = []
    for _, future in tqdm(
        confirmed, total=len(candidates), desc="confirming", unit="pair", disable=not candidates
    ):
        if future.result()[-1] >= SAME:
            pairs.append(future.result())
        if stopped():
            break
    return pd.DataFrame(pairs, columns=list(COLUMNS))


def _candidates(prints):
    """Yields (rows done, [(first, second, offsets in s), ...]) for all pairs worth a look."""
    lengths = np.array([part.shape[1] for part in prints])
    longest = max(lengths, default=0)
    if longest == 0:
        return
    stack = torch.zeros(len(prints), prints[0].shape[0], longest)
    for row, part in zip(stack, prints, strict=True):
        row[:, : part.shape[1]] = torch.from_numpy(part.astype(np.float32))
    size = fft.next_fast_len(2 * int(longest), real=True)
    spectra = torch.fft.rfft(stack, size).permute(2, 0, 1).contiguous()  # (frequencies, N, bands)
    norms = Norms(stack, lengths)
    for start in range(0, len(prints), ROWS):
        cross = spectra[:, start : start + ROWS] @ spectra[:, start:].conj().transpose(1, 2)
        sums = torch.fft.irfft(cross.permute(1, 2, 0).contiguous(), size)  # (rows, others, lags)
        sums = torch.cat([sums[..., 1 - longest :], sums[..., :longest]], dim=-1)
        found = []
        for row, products in enumerate(sums):
            agreement = norms.divide(products[row + 1 :], start + row)
            best = agreement.amax(1) if len(agreement) else torch.empty(0)
            for other in (best > WORTH_A_LOOK).nonzero().flatten().tolist():
                offsets = [lag * HOP / RATE for lag in _peaks(agreement[other], norms.lags)]
                found.append((start + row, start + row + 1 + other, offsets))
        yield len(sums), found


class Norms:
    """What the sums over two prints' products are divided by to become correlations.

    `stack` (N, bands, frames), filled up with zeros; `lengths` the frames of each.
    """

    def __init__(self, stack, lengths):
        self.energy = torch.nn.functional.pad(stack.square().sum(1).cumsum(1), (1, 0))
        self.lengths = torch.from_numpy(lengths)
        self.unique, self.inverse = self.lengths.unique(return_inverse=True)
        self.longest = stack.shape[2]
        self.lags = torch.arange(1 - self.longest, self.longest)
        self.weak = FLOOR * stack.shape[1] * FEWEST_SECONDS * RATE / HOP
        self.of_others = functools.lru_cache(maxsize=8)(self._of_others)  # most are equally long

    def divide(self, products, number):
        """`products` (M, lags) of print `number` with the last M prints, as correlations.

        0 where they share too little.
        """
        if not len(products):
            return products
        length = int(self.lengths[number])
        own = self._own(number, length)[self.inverse[-len(products) :]]
        return products * own * self.of_others(length)[-len(products) :]

    def _own(self, number, length):
        """(unique lengths, lags): a print's own share of the norm, beside prints so long."""
        begin = self.lags.clamp(min=0)
        end = torch.minimum(torch.tensor(length), self.unique[:, None] + self.lags)
        shorter = self.unique.clamp(max=length)[:, None]
        fewest = (shorter / 2).clamp(max=FEWEST_SECONDS * RATE / HOP)
        total = self.energy[number][end.clamp(min=0)] - self.energy[number][begin]
        return (total.clamp(min=0) + self.weak).rsqrt().where(end - begin >= fewest, 0)

    def _of_others(self, length):
        """(N, lags): every print's share of the norm beside one so long."""
        end = (length - self.lags).clamp(0, self.longest)
        total = self.energy[:, end] - self.energy[:, (-self.lags).clamp(min=0)]
        return (total.clamp(min=0) + self.weak).rsqrt()


def _peaks(agreement, lags):
    """The lags, in frames, of the highest peaks above WORTH_A_LOOK, best first."""
    agreement, peaks = agreement.clone(), []
    while len(peaks) < OFFSETS and agreement.max() > WORTH_A_LOOK:
        top = int(agreement.argmax())
        peaks.append(int(lags[top]))
        agreement[max(0, top - 8) : top + 9] = 0
    return peaks
