"""Random augmentation parameters of a clip in an epoch, the same for its four stems."""

import math
from dataclasses import dataclass

import numpy as np

from stemgenre.runtime import derive_seed
from stemgenre.settings import AugmentSettings


@dataclass(frozen=True)
class AugmentParams:
    """Augmentation parameters of one image; the defaults are no augmentation.

    A mask is (start, width) as fractions of its axis.
    """

    semitones: float = 0.0  # pitch shift, upwards
    rate: float = 1.0  # tempo; 1.2 is 1.2 times as fast
    noise_db: float = math.inf  # level of the noise, dB below the clip's own
    noise_seed: int = 0
    shift_seconds: float = 0.0  # delay
    time_mask: tuple[float, float] = (0.0, 0.0)
    frequency_mask: tuple[float, float] = (0.0, 0.0)


NO_AUGMENT = AugmentParams()


def sample_params(
    augment: AugmentSettings, *, seed: int, epoch: int, clip_index: int
) -> AugmentParams:
    """The AugmentParams of a clip in an epoch: a pure function of (seed, epoch, clip_index).

    Every value is sampled whether or not its augmentation is on, so that switching one off leaves
    the others unchanged.
    """
    rng = np.random.default_rng([seed, epoch, clip_index])
    applied = rng.random(6) < augment.augment_probability
    semitones = augment.pitch_shift_semitones * rng.uniform(-1, 1)
    rate = rng.uniform(*augment.time_stretch_rates)
    noise_db = rng.uniform(*augment.noise_levels_db)
    shift = augment.time_shift_seconds * rng.uniform(-1, 1)
    time_mask, frequency_mask = (_sample_mask(rng, augment.mask_fraction) for _ in range(2))
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


def _sample_mask(rng: np.random.Generator, max_fraction: float) -> tuple[float, float]:
    width = max_fraction * rng.random()
    return (1 - width) * rng.random(), width
