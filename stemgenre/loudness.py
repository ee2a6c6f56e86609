"""Integrated loudness of a wave, as broadcasters measure it (ITU-R BS.1770-4, EBU R 128)."""

import numpy as np
from scipy.signal import sosfilt

STEP = 0.1  # s between blocks of 0.4 s, of which three quarters overlap
STEPS = 4  # in a block
ABSOLUTE_GATE = -70.0  # LUFS; quieter blocks are silence
RELATIVE_GATE = -10.0  # LU below the mean of the others; such blocks are pauses


def integrated_loudness(wave, rate):
    """LUFS of `wave` (channels, samples) at `rate` Hz; -inf if all of it is below -70 LUFS.

    A mono file counts as one channel, as in the standard.
    """
    weighted = sosfilt(k_weighting(rate), np.asarray(wave, dtype=np.float64))
    step = max(1, round(STEP * rate))
    steps = max(1, weighted.shape[1] // step)
    power = weighted[:, : steps * step].reshape(len(wave), steps, -1)
    power = np.square(power).mean(axis=2).sum(axis=0)  # of each step, over the channels
    length = min(STEPS, steps)
    blocks = np.convolve(power, np.full(length, 1 / length), mode="valid")
    loud = blocks[_lufs(blocks) > ABSOLUTE_GATE]
    if not len(loud):
        return -np.inf
    loud = loud[_lufs(loud) > _lufs(loud.mean()) + RELATIVE_GATE]
    return float(_lufs(loud.mean()))


def _lufs(power):
    return -0.691 + 10 * np.log10(np.maximum(power, 1e-30))


def k_weighting(rate):
    """The standard's two filters, a high shelf and a high pass, as second-order sections.

    The standard gives them at 48 kHz; for other rates the analogue prototypes are used, as in
    libebur128.
    """
    shelf, high = np.tan(np.pi * 1681.974450955533 / rate), np.tan(np.pi * 38.13547087602444 / rate)
    gain, q = 10 ** (3.999843853973347 / 20), 0.7071752369554196
    middle = gain**0.4996667741545416
    over = 1 + shelf / q + shelf**2
    first = [
        (gain + middle * shelf / q + shelf**2) / over,
        2 * (shelf**2 - gain) / over,
        (gain - middle * shelf / q + shelf**2) / over,
        1,
        2 * (shelf**2 - 1) / over,
        (1 - shelf / q + shelf**2) / over,
    ]
    q = 0.5003270373238773
    over = 1 + high / q + high**2
    second = [1, -2, 1, 1, 2 * (high**2 - 1) / over, (1 - high / q + high**2) / over]
    return np.array([first, second])
