"""Audio fingerprints to find candidate duplicates, and waveform correlation to confirm them.

A fingerprint says at which offset two clips may overlap; `similarity` then compares the waveforms
there, in small time-frequency cells. Another take, or another song on the same drum machine, has
the same rhythm and even the same drum hits, but between the hits its waveform differs.
"""

import functools

import librosa
import numpy as np
from scipy import fft
from scipy.ndimage import uniform_filter1d
from scipy.sparse import csr_array

SAMPLE_RATE = 4000  # Hz: what is compared lies below 2 kHz, which every codec keeps
N_FFT = 2048  # samples, 0.5 s: long enough that half a hop more or less changes little
HOP_LENGTH = 512  # samples, 128 ms: half of it finds no more, at twice the work
N_MELS = 24  # mel bands from 60 Hz to 1.9 kHz
TREND_FRAMES = 11  # frames, 1.4 s: slower changes are the song's timbre or a codec's, and removed
MIN_MAGNITUDE = 1e-4  # of the largest magnitude, -80 dB: codecs agree on little below it

BAND_EDGES = np.geomspace(100, 1800, 9)  # Hz: eight bands, half an octave each, of the waveforms
CELL_SAMPLES = 500  # 1/8 s: shorter than the pause between two drum hits
AUDIBLE_THRESHOLD = 1e-4  # of a loud cell's energy, -40 dB; quieter cells are not compared
CORRELATION_THRESHOLD = 0.6  # of two equal cells; noise at 0 dB still leaves 0.7
MIN_AUDIBLE_FRACTION = 0.2  # of a band's cells; other bands are not used
SEARCH_SECONDS = 0.15  # around the fingerprints' offset, where the waveforms' offset is searched
UPSAMPLE = 4  # of the cross-correlation: the offset is found to a quarter of a sample


def fingerprint(wave: np.ndarray) -> np.ndarray:
    """Log-mel differences over time and frequency, (N_MELS - 1, frames) float16.

    `wave` is mono, (samples,), at SAMPLE_RATE. Differences of neighbouring bands are invariant to
    gain and robust to equalisation (compare Haitsma and Kalker, ISMIR 2002). A wave shorter than
    N_FFT has no frames.
    """
    if len(wave) < N_FFT:
        return np.zeros((N_MELS - 1, 0), dtype=np.float16)
    padded = np.pad(np.asarray(wave, np.float32), N_FFT // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, N_FFT)[::HOP_LENGTH]
    window, filters = _window_and_filters()
    mel = filters @ np.abs(fft.rfft(frames * window)).T  # as librosa's, in a third of the time
    level = np.log(mel + MIN_MAGNITUDE * mel.max() + 1e-9)
    detrended = level - uniform_filter1d(level, TREND_FRAMES, axis=1)
    return np.diff(detrended, axis=0).astype(np.float16)


@functools.cache
def _window_and_filters():
    """(Hann window (N_FFT,), mel filters (N_MELS, N_FFT // 2 + 1)), float32.

    The filters are sparse, so that BLAS starts no threads below those that read the clips.
    """
    window = np.hanning(N_FFT + 1)[:-1].astype(np.float32)
    filters = librosa.filters.mel(sr=SAMPLE_RATE, n_fft=N_FFT, n_mels=N_MELS, fmin=60, fmax=1900)
    return window, csr_array(filters)


def similarity(first: np.ndarray, second: np.ndarray, offset: float) -> tuple[float, float]:
    """(similarity from 0 to 1, exact offset in seconds) of two mono waves at SAMPLE_RATE.

    `offset` in seconds, accurate to about a hop: where in `first` the `second` begins. The
    similarity is the fraction of audible cells whose waveforms correlate, in the lower quartile of
    the bands: a shared beat is not enough. 0 if too little is audible.
    """
    shift = round(offset * SAMPLE_RATE)
    start, stop = max(0, shift), min(len(first), len(second) + shift)
    length = stop - start
    size = fft.next_fast_len(length + round(2 * SEARCH_SECONDS * SAMPLE_RATE), real=True)
    spectra = [
        fft.rfft(wave, size) for wave in (first[start:stop], second[start - shift : stop - shift])
    ]
    hertz = fft.rfftfreq(size, 1 / SAMPLE_RATE)
    edges = np.searchsorted(hertz, BAND_EDGES)
    bands = [slice(*pair) for pair in zip(edges[:-1], edges[1:], strict=True)]
    delay, sign = _align(spectra, bands, size)
    phase = np.exp(-2j * np.pi * hertz * delay / SAMPLE_RATE).astype(np.complex64)
    spectra[1] = sign * spectra[1] * phase
    margin = int(abs(delay)) + 1  # samples at both ends where only one of the two has signal
    num_cells = (length - 2 * margin) // CELL_SAMPLES
    fractions = []
    if num_cells > 0:
        energies, products = [], []
        for band in bands:
            cells = [_band_cells(spectrum, band, size, margin, num_cells) for spectrum in spectra]
            energies.append([np.square(wave).sum(axis=1) for wave in cells])
            products.append((cells[0] * cells[1]).sum(axis=1))
        fractions = _matching_fractions(np.array(energies), np.array(products))
    score = float(np.quantile(fractions, 0.25)) if len(fractions) > 1 else 0.0
    return score, (shift + delay) / SAMPLE_RATE


def _align(spectra, bands, size):
    """(samples, sign): delay of the second wave, to 1/UPSAMPLE, and its polarity.

    The peak of a cross-correlation in which all bands have the same weight.
    """
    cross = np.zeros_like(spectra[0])
    for band in bands:
        first, second = spectra[0][band], spectra[1][band]
        energy = np.sqrt(np.square(np.abs(first)).sum() * np.square(np.abs(second)).sum())
        cross[band] = first * second.conj() / max(energy, 1e-20)
    correlation = fft.irfft(cross, size * UPSAMPLE)
    max_lag = round(SEARCH_SECONDS * SAMPLE_RATE * UPSAMPLE)
    near = np.concatenate([correlation[-max_lag:], correlation[: max_lag + 1]])
    peak = int(np.abs(near).argmax())
    return (peak - max_lag) / UPSAMPLE, np.sign(near[peak]) or 1.0


def _band_cells(spectrum, band, size, margin, num_cells):
    """The waveform of one band of a spectrum, (num_cells, CELL_SAMPLES), from sample `margin`."""
    filtered = np.zeros_like(spectrum)
    filtered[band] = spectrum[band]
    wave = fft.irfft(filtered, size)[margin : margin + num_cells * CELL_SAMPLES]
    return wave.reshape(num_cells, CELL_SAMPLES)


def _matching_fractions(energies, products):
    """The fraction of matching cells in each band that has enough audible cells.

    `energies` (bands, 2, cells) of the two waves; `products` (bands, cells), their inner products.
    """
    loud = np.quantile(energies, 0.95, axis=(0, 2))[:, None]
    audible = (energies > AUDIBLE_THRESHOLD * np.maximum(loud, 1e-12)).all(axis=1)
    matching = audible & (products > CORRELATION_THRESHOLD * np.sqrt(energies.prod(axis=1)))
    used = audible.mean(axis=1) > MIN_AUDIBLE_FRACTION
    return matching[used].sum(axis=1) / audible[used].sum(axis=1)
