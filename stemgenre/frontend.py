"""Stems -> images, on the training device, with pitch and tempo and without a phase vocoder.

The classifier only sees magnitudes, so a clip at another pitch is the same spectrogram read
through mel filters on a scaled frequency axis, and a clip at another tempo is the same wave
analysed with another hop (compare Schlueter and Grill, ISMIR 2015).
"""

import dataclasses

import librosa
import torch

from stemgenre.augmentation import PLAIN
from stemgenre.settings import STEMS


class FrontEnd:
    """Turns stems into standardised images on a device.

    `features` is a FeatureSettings; `channels` the mean and the standard deviation in dB of the
    training clips' channels, four numbers each (see DecibelStatistics).
    """

    def __init__(self, features, *, device, channels=((0.0,) * 4, (1.0,) * 4)):
        self.features = features
        self.channels = channels
        self.device = device
        self.clip_samples = int(features.clip_seconds * features.sr)
        self.frames = 1 + self.clip_samples // features.hop_length
        mean, std = torch.tensor(channels, dtype=torch.float32, device=device)
        self.mean, self.std = mean[:, None, None], std[:, None, None]
        window = torch.hann_window(features.n_fft, dtype=torch.float64)
        self.window = window.float().to(device)
        self.edges = torch.tensor(
            librosa.mel_frequencies(features.n_mels + 2, fmin=0.0, fmax=features.sr / 2),
            dtype=torch.float64,
            device=device if device.type == "cuda" else "cpu",  # mps has no float64
        )
        self.filters = mel_filters(self.edges, sr=features.sr, n_fft=features.n_fft).to(device)

    def state(self):
        """What a model is of no use without: the features and the channel statistics."""
        return {"features": dataclasses.asdict(self.features), "channels": self.channels}

    @torch.no_grad()
    def __call__(self, stems, draws):
        """Images (B, 4, IMG_SIZE, IMG_SIZE) float32 of B clips.

        `stems` is a list of tensors (4, samples), float16 or float32, on any device; `draws` a
        list of as many Draws. No clip's image depends on the others of its batch.
        """
        size = self.features.img_size
        images = torch.stack(
            [self._image(clip, one) for clip, one in zip(stems, draws, strict=True)]
        )
        images = torch.nn.functional.interpolate(
            images, (size, size), mode="bilinear", antialias=True
        )
        for image, one in zip(images, draws, strict=True):
            mask_axis(image, one.time_mask, axis=2)
            mask_axis(image, one.frequency_mask, axis=1)
        return images

    def _image(self, stems, one):
        """The standardised image (4, n_mels, frames) of one clip; what it lacks is at the floor."""
        floor = (-self.features.top_db - self.mean) / self.std
        image = floor.expand(-1, self.features.n_mels, self.frames).clone()
        decibels = self.decibels(stems, one)
        image[:, :, : decibels.shape[2]] = (decibels - self.mean) / self.std
        return image

    @torch.no_grad()
    def decibels(self, stems, one=PLAIN):
        """(4, n_mels, frames) in dB below the reference, of the clip's own frames only.

        There are at most as many frames as CLIP_SECONDS has.
        """
        features = self.features
        hop_length = round(features.hop_length * one.rate)
        samples = round(self.clip_samples * hop_length / features.hop_length)
        signals = self.signals(stems[:, :samples]).to(self.device, torch.float32)  # (C, samples)
        signals = shift_wave(signals, round(one.shift_seconds * features.sr))
        signals = add_noise(signals, sigma=one.noise_sigma, seed=one.noise_seed)
        filters = (
            self.filters
            if one.semitones == 0
            else mel_filters(
                self.edges, sr=features.sr, n_fft=features.n_fft, semitones=one.semitones
            ).to(self.device)
        )
        mel = mel_power(signals, filters=filters, window=self.window, hop_length=hop_length)
        decibels = power_to_db(mel, reference=features.db_reference, top_db=features.top_db)
        repeats = -(-features.num_channels // len(decibels))
        return decibels.repeat(repeats, 1, 1)[: features.num_channels, :, : self.frames]

    def signals(self, stems):
        """The waves (C, samples) that CHANNELS names, of stems (4, samples), on their device."""
        if self.features.channels == "mix":
            return stems.sum(0, keepdim=True, dtype=torch.float32)
        names = self.features.channels.split(",")
        return torch.stack([stems[STEMS.index(name)] for name in names])


def mel_filters(edges, *, sr, n_fft, semitones=0.0):
    """Triangular filters (n_mels, n_fft // 2 + 1), float32, Slaney norm, over power spectra.

    `edges` are n_mels + 2 band edges in Hz, float64. With `semitones` the bins' frequencies are
    scaled by 2^(semitones / 12): the filters then see the sound at that pitch. Without, they are
    librosa.filters.mel's.
    """
    bins = torch.arange(n_fft // 2 + 1, dtype=torch.float64, device=edges.device) * (
        sr / n_fft * 2 ** (semitones / 12)
    )
    width = edges.diff()[:, None]
    rising = (bins - edges[:-2, None]) / width[:-1]
    falling = (edges[2:, None] - bins) / width[1:]
    norm = 2 / (edges[2:] - edges[:-2])[:, None]
    return (torch.minimum(rising, falling).clamp(min=0) * norm).float()


def mel_power(stems, *, filters, window, hop_length):
    """Power mel spectra (C, n_mels, 1 + samples // hop_length) of waves (C, samples).

    Centred frames with zeros beyond the ends, as librosa.feature.melspectrogram computes them.
    """
    half = len(window) // 2
    padded = torch.nn.functional.pad(stems, (half, half))
    # A CPU is twice as fast channel by channel: blocks below 32 MB are not given back to the system
    # and taken again each time. A card wants few, large kernels.
    parts = padded.split(1 if stems.device.type == "cpu" else len(stems))
    return torch.cat([_mel_power(part, filters, window, hop_length) for part in parts])


def _mel_power(padded, filters, window, hop_length):
    frames = padded.unfold(1, len(window), hop_length) * window  # (C, frames, n_fft)
    spectra = torch.fft.rfft(frames)  # (C, frames, n_fft // 2 + 1)
    power = spectra.real.square() + spectra.imag.square()
    return (power @ filters.T).transpose(1, 2)


def power_to_db(power, *, reference, top_db):
    """dB of power (C, n_mels, frames) below its loudest cell, no lower than -top_db.

    The loudest cell is that of all channels (reference "clip") or each channel's own ("stem").
    Both it and the power are at least 1e-10, as in librosa.power_to_db.
    """
    power = power.clamp(min=1e-10)
    loudest = power.amax() if reference == "clip" else power.amax((1, 2), keepdim=True)
    return (10 * (power.log10() - loudest.log10())).clamp(min=-top_db)


def shift_wave(stems, samples):
    """`stems` (C, T) later by so many samples (earlier if negative), zeros in their place."""
    if samples == 0:
        return stems
    samples = max(-stems.shape[1], min(stems.shape[1], samples))
    return torch.nn.functional.pad(stems, (samples, -samples))


def add_noise(stems, *, sigma, seed):
    """`stems` (C, T) with Gaussian noise of standard deviation `sigma` on each channel."""
    if sigma == 0:
        return stems
    generator = torch.Generator(stems.device).manual_seed(seed)
    noise = torch.randn(stems.shape, generator=generator, device=stems.device)
    return stems + sigma * noise


def mask_axis(image, mask, *, axis):
    """Sets a band of `image`, in place, to 0: the mean, as it is standardised."""
    start, width = (round(share * image.shape[axis]) for share in mask)
    image.narrow(axis, start, min(width, image.shape[axis] - start)).zero_()


class DecibelStatistics:
    """Running mean and standard deviation per channel, in dB, over clips' own frames."""

    def __init__(self):
        self.count, self.total, self.squares = (
            0,
            torch.zeros(4, dtype=torch.float64),
            torch.zeros(4, dtype=torch.float64),
        )

    def add(self, decibels):
        """Takes in one clip's (4, n_mels, frames)."""
        values = decibels.flatten(1).double()
        self.count += values.shape[1]
        self.total += values.sum(1).cpu()
        self.squares += values.square().sum(1).cpu()

    def merge(self, other):
        """Takes in what another process has counted."""
        self.count += other.count
        self.total += other.total
        self.squares += other.squares

    def mean_and_std(self):
        """Two lists of four numbers in dB; a channel that never changes has the deviation 1."""
        mean = self.total / self.count
        std = (self.squares / self.count - mean.square()).clamp(min=0).sqrt()
        return mean.tolist(), [s if s > 1e-3 else 1.0 for s in std.tolist()]
