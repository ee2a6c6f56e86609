"""Random augmentation parameters of a clip in an epoch; stems that are swapped between clips."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from stemgenre.runtime import derive_seed
from stemgenre.settings import STEMS, AugmentSettings


@dataclass(frozen=True)
class AugmentParams:
    """Augmentation parameters of one image; the defaults are no augmentation.

    A mask is (start, width) as fractions of its axis. All but the last two are the same for the
    four stems.
    """

    semitones: float = 0.0  # pitch shift, upwards
    rate: float = 1.0  # tempo; 1.2 is 1.2 times as fast
    noise_db: float = math.inf  # level of the noise, dB below the clip's own
    noise_seed: int = 0
    shift_seconds: float = 0.0  # delay
    time_mask: tuple[float, float] = (0.0, 0.0)
    frequency_mask: tuple[float, float] = (0.0, 0.0)
    stem_gains_db: tuple[float, ...] = (0.0,) * len(STEMS)
    silent_stems: tuple[bool, ...] = (False,) * len(STEMS)  # never all


NO_AUGMENT = AugmentParams()


def sample_params(
    augment: AugmentSettings, *, seed: int, epoch: int, clip_index: int
) -> AugmentParams:
    """The AugmentParams of a clip in an epoch: a pure function of (seed, epoch, clip_index).

    Every value is sampled whether or not its augmentation is on, so that switching one off leaves
    the others unchanged. AUGMENT_PROBABILITY is also that of the stems' gains, all or none of them.
    """
    rng = np.random.default_rng([seed, epoch, clip_index])
    applied = rng.random(6) < augment.augment_probability
    semitones = augment.pitch_shift_semitones * rng.uniform(-1, 1)
    rate = rng.uniform(*augment.time_stretch_rates)
    noise_db = rng.uniform(*augment.noise_levels_db)
    shift = augment.time_shift_seconds * rng.uniform(-1, 1)
    time_mask, frequency_mask = (_sample_mask(rng, augment.mask_fraction) for _ in range(2))
    # New parameters are sampled last, so that those above stay what they were for the same SEED.
    gains_on = rng.random() < augment.augment_probability
    gains_db = augment.stem_gain_db * rng.uniform(-1, 1, len(STEMS))
    silent_stems = _sample_stems(rng, augment.stem_dropout)
    on = applied & (
        augment.augment_pitch_shift,
        augment.augment_time_stretch,
        augment.augment_add_noise,
        augment.augment_time_shift,
        augment.augment_time_masking,
        augment.augment_frequency_masking,
    )
    return AugmentParams(
        semitones=semitones if on[0] else 0.0,
        rate=rate if on[1] else 1.0,
        noise_db=noise_db if on[2] else math.inf,
        noise_seed=derive_seed(seed, epoch, clip_index, 1),
        shift_seconds=shift if on[3] else 0.0,
        time_mask=time_mask if on[4] else (0.0, 0.0),
        frequency_mask=frequency_mask if on[5] else (0.0, 0.0),
        stem_gains_db=tuple(gains_db.tolist()) if gains_on else NO_AUGMENT.stem_gains_db,
        silent_stems=silent_stems,
    )


def tta_views(count: int) -> list[AugmentParams]:
    """A clip as it is, and `count` further views of it: slower, faster, lower and higher in turn.

    Each round of four goes as far again: 4 % of the tempo, half a semitone.
    """
    views = [NO_AUGMENT]
    for i in range(count):
        step = (1 + i // 4) * (-1, 1)[i % 2]
        by_tempo = i % 4 < 2
        views.append(AugmentParams(rate=1 + 0.04 * step) if by_tempo else
                     AugmentParams(semitones=0.5 * step))  # fmt: skip
    return views


@dataclass(frozen=True)
class StemSwap:
    """Which stems of a clip are taken from the clip in row `partner` of the training table."""

    partner: int
    stems: tuple[bool, ...]  # never all


def sample_swap(
    augment: AugmentSettings,
    same_genre: np.ndarray,
    *,
    row: int,
    seed: int,
    epoch: int,
    clip_index: int,
) -> StemSwap | None:
    """The StemSwap of the clip in a `row` in an epoch; None leaves the clip as it is.

    A pure function of (seed, epoch, clip_index) and the table: `same_genre` are the rows of all
    clips of its genre. The swapped stems have one partner, so that they fit each other. Their tempo
    and key stay; compare the random mixing of sources in Uhlich et al., "Improving music source
    separation based on deep neural networks through data augmentation and network blending",
    ICASSP 2017.
    """
    rng = np.random.default_rng(derive_seed(seed, epoch, clip_index, 4))
    stems = _sample_stems(rng, augment.stem_swap)
    others = same_genre[same_genre != row]
    if not any(stems) or not len(others):
        return None
    return StemSwap(int(rng.choice(others)), stems)


def swap_stems(
    stems: torch.Tensor, partner: torch.Tensor, swapped: tuple[bool, ...]
) -> torch.Tensor:
    """`stems` (4, T) with the `swapped` ones from `partner` (4, U), cut or padded with zeros."""
    samples = min(stems.shape[1], partner.shape[1])
    stems = stems.clone()  # those of the loader's GPU cache stay as they are
    for index, is_swapped in enumerate(swapped):
        if is_swapped:
            stems[index, :samples] = partner[index, :samples]
            stems[index, samples:] = 0
    return stems


def _sample_stems(rng: np.random.Generator, probability: float) -> tuple[bool, ...]:
    """Whether each stem is chosen, each with `probability`; of all four, one stays unchosen."""
    chosen = rng.random(len(STEMS)) < probability
    kept = rng.integers(len(STEMS))
    if chosen.all():
        chosen[kept] = False
    return tuple(chosen.tolist())


def _sample_mask(rng: np.random.Generator, max_fraction: float) -> tuple[float, float]:
    width = max_fraction * rng.random()
    return (1 - width) * rng.random(), width
