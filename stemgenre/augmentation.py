"""What is drawn for a clip in an epoch: one set of parameters for its four stems together."""

from dataclasses import dataclass

import numpy as np

from stemgenre.runtime import seed_of


@dataclass(frozen=True)
class Draw:
    """Parameters of one augmented image; the defaults change nothing.

    A mask is (start, width), as shares of the axis.
    """

    semitones: float = 0.0  # up
    rate: float = 1.0  # tempo, 1.2 is faster
    noise_sigma: float = 0.0  # full scale is 1
    noise_seed: int = 0
    shift_seconds: float = 0.0  # later
    time_mask: tuple[float, float] = (0.0, 0.0)
    frequency_mask: tuple[float, float] = (0.0, 0.0)


PLAIN = Draw()


def draw(augment, *, seed, epoch, clip_index):
    """The Draw of clip `clip_index` in `epoch`: a pure function of (seed, epoch, clip_index).

    `augment` is an AugmentSettings. Every number is drawn whatever is switched on, so that
    switching one augmentation off leaves the others as they were.
    """
    rng = np.random.default_rng([seed, epoch, clip_index])
    chosen = rng.random(6) < augment.augment_probability
    semitones = augment.pitch_shift_semitones * rng.uniform(-1, 1)
    rate = rng.uniform(*augment.time_stretch_rates)
    sigma = rng.uniform(*augment.noise_sigmas)
    shift = augment.time_shift_seconds * rng.uniform(-1, 1)
    time_mask, frequency_mask = (_mask(rng, augment.mask_fraction) for _ in range(2))
    on = chosen & (
        augment.augment_pitch_shift,
        augment.augment_time_stretch,
        augment.augment_add_noise,
        augment.augment_time_shift,
        augment.augment_time_masking,
        augment.augment_frequency_masking,
    )
    return Draw(
        semitones=semitones if on[0] else 0.0,
        rate=rate if on[1] else 1.0,
        noise_sigma=sigma if on[2] else 0.0,
        noise_seed=seed_of(seed, epoch, clip_index, 1),
        shift_seconds=shift if on[3] else 0.0,
        time_mask=time_mask if on[4] else (0.0, 0.0),
        frequency_mask=frequency_mask if on[5] else (0.0, 0.0),
    )


def _mask(rng, fraction):
    width = fraction * rng.random()
    return (1 - width) * rng.random(), width
