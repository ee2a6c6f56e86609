"""What tells a recording again: a small print to search with, and the wave itself to be sure.

Prints find where two clips could lie on top of each other; `similarity` then compares the waves
there, in small cells of time and pitch. Another take, or another song on the same drum machine, has
the same rhythm and even the same drum hits, but between them its waves are its own.
"""

import librosa
import numpy as np
from scipy import fft
from scipy.ndimage import uniform_filter1d

RATE = 4000  # Hz: what is compared lies below 2 kHz, which every codec keeps
WINDOW = 2048  # samples, 0.5 s: half a hop more or less then changes little
HOP = 256  # samples, 64 ms
BANDS = 24  # mel bands from 60 Hz to 1.9 kHz
SLOW = 23  # frames, 1.5 s: what stays as long is the song's colour or a codec's, and is taken off
QUIETEST = 1e-4  # of the loudest magnitude, -80 dB: codecs agree on little below it

EDGES = np.geomspace(100, 1800, 9)  # Hz of the eight bands, half an octave each, of the waves
CELL = 500  # samples, 1/8 s: shorter than the pause between two drum hits
AUDIBLE = 1e-4  # of a loud cell's energy, -40 dB; quieter cells are not compared
ALIKE = 0.6  # correlation above which two cells count as the same; noise at 0 dB gives 0.7
REACH = 0.15  # s around the prints' answer in which the waves' offset is looked for
FINER = 4  # parts of a sample to which it is found


def fingerprint(wave):
    """(BANDS - 1, frames) float16 of a mono wave at RATE: log-mel, differences in time and pitch.

    Taking differences leaves out gain and equalisation (compare Haitsma and Kalker, ISMIR 2002).
    A wave shorter than WINDOW has no frames.
    """
    if len(wave) < WINDOW:
        return np.zeros((BANDS - 1, 0), dtype=np.float16)
    mel = librosa.feature.melspectrogram(
        y=wave, sr=RATE, n_fft=WINDOW, hop_length=HOP, n_mels=BANDS, fmin=60, fmax=1900, power=1
    )
    level = np.log(mel + QUIETEST * mel.max() + 1e-9)
    return np.diff(level - uniform_filter1d(level, SLOW, axis=1), axis=0).astype(np.float16)


def similarity(first, second, offset):
    """(similarity from 0 to 1, exact offset in s) of two mono waves at RATE.

    `offset`: s into the first at which the second begins, to about a hop. The similarity is the
    share of cells whose waves are alike, in the lower quarter of the bands that can be heard: a
    shared beat is not enough. 0 if too little can be heard.
    """
    shift = round(offset * RATE)
    start, stop = max(0, shift), min(len(first), len(second) + shift)
    length = stop - start
    padded = fft.next_fast_len(length + round(2 * REACH * RATE), real=True)
    spectra = [
        fft.rfft(part, padded) for part in (first[start:stop], second[start - shift : stop - shift])
    ]
    hertz = fft.rfftfreq(padded, 1 / RATE)
    slices = [slice(*np.searchsorted(hertz, pair)) for pair in zip(EDGES, EDGES[1:], strict=False)]
    late, sign = _exact_shift(spectra, slices, padded)
    spectra[1] = sign * spectra[1] * np.exp(-2j * np.pi * hertz * late / RATE).astype(np.complex64)
    margin = int(abs(late)) + 1  # where one of the two has nothing
    cells = (length - 2 * margin) // CELL
    shares = []
    if cells > 0:
        parts = [np.zeros_like(spectrum) for spectrum in spectra]
        energies, products = [], []
        for band in slices:
            waves = []
            for part, spectrum in zip(parts, spectra, strict=True):
                part[:] = 0
                part[band] = spectrum[band]
                wave = fft.irfft(part, padded)[margin : margin + cells * CELL]
                waves.append(wave.reshape(cells, CELL))
            energies.append([np.square(wave).sum(axis=1) for wave in waves])
            products.append((waves[0] * waves[1]).sum(axis=1))
        shares = _shares_alike(np.array(energies), np.array(products))
    return float(np.quantile(shares, 0.25)) if len(shares) > 1 else 0.0, (shift + late) / RATE


def _exact_shift(spectra, slices, padded):
    """(samples, sign): how much later the second wave has to be, to 1/FINER, and its polarity.

    The peak of a cross-correlation to which every band has contributed as much.
    """
    cross = np.zeros_like(spectra[0])
    for band in slices:
        one, two = spectra[0][band], spectra[1][band]
        energy = np.sqrt(np.vdot(one, one).real * np.vdot(two, two).real)
        cross[band] = one * two.conj() / max(energy, 1e-20)
    correlation = fft.irfft(cross, padded * FINER)
    reach = round(REACH * RATE * FINER)
    near = np.concatenate([correlation[-reach:], correlation[: reach + 1]])
    peak = int(np.abs(near).argmax())
    return (peak - reach) / FINER, np.sign(near[peak]) or 1.0


def _shares_alike(energies, products):
    """Of each band with enough to hear, the share of cells that are alike.

    `energies` (bands, 2, cells) of the two waves, `products` (bands, cells) of one with the other.
    """
    loud = np.quantile(energies, 0.95, axis=(0, 2))[:, None]
    audible = (energies > AUDIBLE * np.maximum(loud, 1e-12)).all(axis=1)
    alike = audible & (products > ALIKE * np.sqrt(energies.prod(axis=1)))
    heard = audible.mean(axis=1) > 0.2
    return alike[heard].sum(axis=1) / audible[heard].sum(axis=1)
