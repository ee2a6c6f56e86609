"""What the clips of a split are sampled from: keys, tempi, instruments, levels, bleed, noise.

A demo is hard if these differ between train and test: what a network has learnt from the training
clips has to hold for clips that sound different.
"""

from dataclasses import dataclass

import numpy as np

from stemgenre.demo.instruments import INSTRUMENT_STD
from stemgenre.demo.styles import GENRES
from stemgenre.settings import STEMS


@dataclass(frozen=True)
class Variation:
    """What the clips of a split are sampled from; the defaults are the ordinary demo's."""

    keys: tuple[int, int] = (0, 12)  # of the tonic, in semitones above C: first, and end
    tempi: tuple[float, float] = (0.0, 1.0)  # fractions of the style's range: slowest, fastest
    instruments: tuple[int | None, int | None] = (None, None)  # slice of a part's instruments
    instrument_std: float = INSTRUMENT_STD
    stem_gain_db: float = 0.0  # each stem is louder or quieter by at most this
    bleed: float = 0.0  # fraction of each stem that is in the other stems, as after separation
    noise_db: float = 200.0  # level of the noise below the mix; audible from 60 or so


PLAIN = Variation()


def degrade(stems: np.ndarray, variation: Variation, seed: int) -> np.ndarray:
    """Stems (4, samples) as `variation` mixes, separates and records them; PLAIN changes none.

    The stems add up to the mix: what bleeds into a stem is missing in the others.
    """
    if variation == PLAIN:
        return stems
    rng = np.random.default_rng([seed, len(GENRES)])  # not the score's, which has a genre's index
    gains = 10 ** (rng.uniform(-1, 1, (len(stems), 1)) * variation.stem_gain_db / 20)
    stems = stems * gains.astype(np.float32)
    mix = stems.sum(axis=0)
    noise_rms = np.sqrt(np.mean(mix**2)) * 10 ** (-variation.noise_db / 20)
    stems[STEMS.index("other")] += noise_rms * rng.standard_normal(len(mix), dtype=np.float32)
    return stems + variation.bleed * (stems.mean(axis=0) - stems)
