"""Stems -> standardised log-mel images, with pitch shift and time stretch, on the training device.

The classifier only sees magnitudes, so neither needs a phase vocoder: a pitch shift scales the
frequency axis that the mel filters are laid on, a time stretch changes the STFT's hop length. For
data augmentation on mel spectrograms compare Schlueter and Grill, "Exploring Data Augmentation for
Improved Singing Voice Detection with Neural Networks", ISMIR 2015.
"""

import concurrent.futures
import functools
import math
from collections.abc import Sequence
from typing import Any

import librosa
import torch

from stemgenre.features.augmentation import NO_AUGMENT, AugmentParams
from stemgenre.runtime import to_device, use_one_core
from stemgenre.settings import STEMS, FeatureSettings

ChannelStats = tuple[Sequence[float], Sequence[float]]  # mean and std in dB of each channel
MelFilters = list[tuple[slice, torch.Tensor]]  # see group_bands()
SILENCE = 1e-10  # power of a mel band, 28 dB below noise of one step of 16-bit audio
MIN_LEFT = 1e-4  # of the clip's power, -40 dB: silencing stems has to leave more of it
FRAMES_AT_ONCE, BANDS_AT_ONCE = 128, 16  # on a CPU, see mel_power() and group_bands()
MIN_STD_DB = 5.0  # of a channel; music has 15 to 20, a stem that is silent in all clips none


class Frontend:
    """Computes the network's images from stems, on `device`.

    `channel_stats` are the mean and standard deviation in dB of each channel over the training
    clips (see RunningStats); the default leaves the images in dB.
    """

    def __init__(
        self,
        features: FeatureSettings,
        *,
        device: torch.device,
        channel_stats: ChannelStats | None = None,
    ):
        self.features = features
        channels = len(features.channel_names)
        channel_stats = channel_stats or ([0.0] * channels, [1.0] * channels)
        self.channel_stats = channel_stats
        self.device = device
        self.clip_samples = int(features.clip_seconds * features.sr)
        self.frames = 1 + self.clip_samples // features.hop_length
        mean, std = torch.tensor(channel_stats, dtype=torch.float32, device=device)
        self.mean, self.std = mean[:, None, None], std[:, None, None]
        window = torch.hann_window(features.n_fft, dtype=torch.float64)
        self.window = window.float().to(device)
        self.band_edges = torch.tensor(
            librosa.mel_frequencies(features.n_mels + 2, fmin=0.0, fmax=features.sr / 2),
            dtype=torch.float64,
            device=device if device.type == "cuda" else "cpu",  # MPS has no float64
        )
        self.filters = self._mel_filters(semitones=0.0)
        # A CPU computes the channels in threads of one core each, which do not wait for each other
        # after every operation, as PyTorch's own do. A GPU takes them together: larger kernels.
        self.pool = None
        if device.type == "cpu":
            self.pool = concurrent.futures.ThreadPoolExecutor(
                torch.get_num_threads(), initializer=use_one_core
            )

    def state(self) -> dict[str, Any]:
        """The settings and channel statistics that a saved model needs, as plain values."""
        return {"features": self.features.model_dump(), "channel_stats": self.channel_stats}

    @torch.no_grad()
    def __call__(
        self, stems: Sequence[torch.Tensor], params: Sequence[AugmentParams]
    ) -> torch.Tensor:
        """Standardised images (B, C, height, width) float32 of B clips, by IMG_SIZE.

        `stems` are tensors (4, samples), or (1, samples) of the mix alone, float16 or float32, on
        any device; `params` has one entry per clip. An image does not depend on the other clips of
        its batch. Masks are applied last, with 0, the mean (SpecAugment, Park et al., Interspeech
        2019).
        """
        images = torch.stack(
            [self._image(clip, augment) for clip, augment in zip(stems, params, strict=True)]
        )
        images = torch.nn.functional.interpolate(
            images, self.features.image_size, mode="bilinear", antialias=True
        )
        for image, augment in zip(images, params, strict=True):
            mask_axis(image, augment.time_mask, axis=2)
            mask_axis(image, augment.frequency_mask, axis=1)
        return images

    def _image(self, stems: torch.Tensor, params: AugmentParams) -> torch.Tensor:
        """The clip's standardised image (C, n_mels, frames), padded with the floor in dB."""
        db = self.log_mel(stems, params)
        missing = self.frames - db.shape[2]
        if missing:
            db = torch.nn.functional.pad(db, (0, missing), value=-self.features.top_db)
        return (db - self.mean).div_(self.std)

    @torch.no_grad()
    def log_mel(self, stems: torch.Tensor, params: AugmentParams = NO_AUGMENT) -> torch.Tensor:
        """Log-mel spectrogram (C, n_mels, frames) in dB below the reference, float32.

        `stems` is (4, samples), or (1, samples) of the mix alone. There are only the clip's own
        frames, at most as many as CLIP_SECONDS has. The masks of `params` are not applied.
        """
        features = self.features
        hop_length = round(features.hop_length * params.rate)
        waves = stems[:, : self.needed_samples(params)].to(self.device, torch.float32)
        waves = self.remix(waves, params)
        waves = shift_wave(waves, round(params.shift_seconds * features.sr))
        waves = add_noise(waves, level_db=params.noise_db, seed=params.noise_seed)
        waves = self.select_channels(waves)
        filters = (
            self.filters if params.semitones == 0 else self._mel_filters(semitones=params.semitones)
        )
        to_mel = functools.partial(
            mel_power, filters=filters, window=self.window, hop_length=hop_length
        )
        if self.pool:  # unless this thread has one core, as the loader's: others have other clips
            map_channels = self.pool.map if torch.get_num_threads() > 1 else map
            power = torch.cat(list(map_channels(to_mel, waves.split(1))))
        else:
            power = to_mel(waves)
        db = power_to_db(power, reference=features.db_reference, top_db=features.top_db)
        channels = len(features.channel_names)  # CHANNELS, repeated in turn
        if len(db) != channels:
            db = db[[i % len(db) for i in range(channels)]]
        return db[:, :, : self.frames]

    def needed_samples(self, params: AugmentParams) -> int:
        """Samples of a clip that its image covers: CLIP_SECONDS at the augmented tempo."""
        hop_length = self.features.hop_length
        return round(self.clip_samples * round(hop_length * params.rate) / hop_length)

    def remix(self, waves: torch.Tensor, params: AugmentParams) -> torch.Tensor:
        """The stems `waves` (4, T) float32 with their gains, and the silent ones at zero.

        None is silenced if what is left of CHANNELS would be silent too. A mix by itself, (1, T),
        gets the first gain.
        """
        if params.stem_gains_db == NO_AUGMENT.stem_gains_db and not any(params.silent_stems):
            return waves
        names = self.features.channels.split(",")
        shown = [name in names or "mix" in names for name in STEMS]
        values = torch.tensor([params.stem_gains_db, params.silent_stems, shown])
        gains_db, silent, shown = to_device(values, waves.device)
        gains = 10 ** (gains_db / 20)
        if any(params.silent_stems) and len(waves) > 1:
            power = (gains * torch.linalg.vector_norm(waves, dim=1)).square() * shown
            left = gains * (1 - silent)
            enough = (power * (1 - silent)).sum() > MIN_LEFT * power.sum()
            gains = torch.where(enough, left, gains)
        return gains[: len(waves), None] * waves

    def select_channels(self, stems: torch.Tensor) -> torch.Tensor:
        """The waves (C, samples) that CHANNELS names, on the device of `stems`.

        `stems` is (4, samples), whose sum is the mix, or (1, samples), the mix itself. float32 if
        the mix is among the channels: the sum of float16 stems can exceed what float16 holds.
        """
        names = self.features.channels.split(",")
        if names == list(STEMS):
            return stems
        if "mix" in names:
            stems = stems.float()
        return torch.stack(
            [stems.sum(0) if name == "mix" else stems[STEMS.index(name)] for name in names]
        )

    def _mel_filters(self, *, semitones: float) -> MelFilters:
        features = self.features
        filters = mel_filters(
            self.band_edges, sr=features.sr, n_fft=features.n_fft, semitones=semitones
        ).to(self.device)
        # A CPU leaves out most of the zeros. A GPU takes all bands together: a single kernel.
        return group_bands(filters, BANDS_AT_ONCE if self.device.type == "cpu" else len(filters))


def mel_filters(
    band_edges: torch.Tensor, *, sr: int, n_fft: int, semitones: float = 0.0
) -> torch.Tensor:
    """Mel filters (n_mels, n_fft // 2 + 1) float32 for power spectra, pitch-shifted by `semitones`.

    `band_edges` are n_mels + 2 frequencies in Hz, float64. The filters are triangles of area 1
    (Slaney's norm), those of librosa.filters.mel at 0 semitones. With `semitones` the frequencies
    of the FFT's bins are scaled by 2 ** (semitones / 12), as of a sound at that pitch.
    """
    bin_hz = sr / n_fft * 2 ** (semitones / 12)
    bins = torch.arange(n_fft // 2 + 1, dtype=torch.float64, device=band_edges.device) * bin_hz
    width = band_edges.diff()[:, None]
    rising = (bins - band_edges[:-2, None]) / width[:-1]
    falling = (band_edges[2:, None] - bins) / width[1:]
    norm = 2 / (band_edges[2:] - band_edges[:-2])[:, None]
    return (torch.minimum(rising, falling).clamp(min=0) * norm).float()


def group_bands(filters: torch.Tensor, size: int) -> MelFilters:
    """`filters` (n_mels, bins) in groups of `size` bands: [(bins, filters (size, those bins))].

    The bins of a group are a slice: all, if there is one group, else those that it covers.
    """
    if size >= len(filters):
        return [(slice(None), filters)]
    groups = []
    for group in filters.split(size):
        covered = group.any(0).nonzero()[:, 0].tolist()
        bins = slice(covered[0], covered[-1] + 1) if covered else slice(0)
        groups.append((bins, group[:, bins].contiguous()))
    return groups


def mel_power(
    waves: torch.Tensor, *, filters: MelFilters, window: torch.Tensor, hop_length: int
) -> torch.Tensor:
    """Mel power spectrogram (C, n_mels, 1 + samples // hop_length) of waves (C, samples).

    `filters` are those of group_bands(). Frames are centred, with zeros beyond the ends, as in
    librosa.feature.melspectrogram.
    """
    n_fft = len(window)
    padded = torch.nn.functional.pad(waves, (n_fft // 2, n_fft // 2))
    frames = padded.unfold(1, n_fft, hop_length)  # (C, frames, n_fft), a view
    power = waves.new_empty(*frames.shape[:2], n_fft // 2 + 1)
    # A CPU takes as many at once as its cache holds, a GPU all: fewer and larger kernels.
    at_once = FRAMES_AT_ONCE if waves.device.type == "cpu" else frames.shape[1]
    for part, part_power in zip(frames.split(at_once, 1), power.split(at_once, 1), strict=True):
        spectra = torch.fft.rfft(part * window)
        squares = torch.view_as_real(spectra).square_()
        torch.add(squares[..., 0], squares[..., 1], out=part_power)
    power = power.transpose(1, 2)  # (C, bins, frames)
    return torch.cat([group @ power[:, bins] for bins, group in filters], dim=1)


def power_to_db(power: torch.Tensor, *, reference: str, top_db: float) -> torch.Tensor:
    """Power (C, n_mels, frames) in dB below the reference, at least -top_db.

    The reference is the loudest cell of all channels ("clip") or of each channel ("stem"). A power
    of at most SILENCE is at the floor, -top_db; otherwise as librosa.power_to_db.
    """
    power = torch.nn.functional.threshold(power, SILENCE, 0.0)  # NaN stays NaN
    loudest = power.amax() if reference == "clip" else power.amax((1, 2), keepdim=True)
    db = power.log10_().sub_(loudest.clamp(min=SILENCE).log10())
    return db.mul_(10).clamp_(min=-top_db)


def shift_wave(waves: torch.Tensor, samples: int) -> torch.Tensor:
    """`waves` (C, T) delayed by `samples` (advanced if negative), filled with zeros."""
    if samples == 0:
        return waves
    samples = max(-waves.shape[1], min(waves.shape[1], samples))
    return torch.nn.functional.pad(waves, (samples, -samples))


def add_noise(stems: torch.Tensor, *, level_db: float, seed: int) -> torch.Tensor:
    """`stems` (C, T) plus Gaussian noise `level_db` below their mix, as RMS; infinite: none.

    The noise is one wave, that of the mix, and each stem gets a part of it in proportion to the
    stem's own RMS. As after separating a noisy mix, a stem that is nearly silent stays so.
    """
    if level_db == math.inf:
        return stems
    generator = torch.Generator(stems.device).manual_seed(seed)
    noise = torch.randn(stems.shape[1], generator=generator, device=stems.device)
    rms = torch.linalg.vector_norm(stems, dim=1, keepdim=True) / math.sqrt(stems.shape[1])  # (C, 1)
    mix_rms = torch.linalg.vector_norm(stems.sum(0)) / math.sqrt(stems.shape[1])
    parts = rms / rms.sum().clamp(min=torch.finfo(rms.dtype).tiny)
    return torch.addcmul(stems, noise, parts * mix_rms * 10 ** (-level_db / 20))


def mask_axis(image: torch.Tensor, mask: tuple[float, float], *, axis: int) -> None:
    """Sets a band of `image` to 0 in place; `mask` is (start, width) as fractions of the axis."""
    start, width = (round(fraction * image.shape[axis]) for fraction in mask)
    image.narrow(axis, start, min(width, image.shape[axis] - start)).zero_()


class RunningStats:
    """Mean and standard deviation in dB of each channel, accumulated clip by clip."""

    def __init__(self):
        self.count = 0  # cells of each channel
        self.sums = torch.zeros((), dtype=torch.float64)  # then one for each channel
        self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, db: torch.Tensor) -> None:
        """Accumulates the cells of one clip's log-mel spectrogram (C, n_mels, frames)."""
        values = db.cpu().flatten(1).double()  # on the CPU, as MPS has no float64
        self.count += values.shape[1]
        self.sums = self.sums + values.sum(1)
        self.squares = self.squares + values.square().sum(1)

    def merge(self, other: "RunningStats") -> None:
        """Adds what another process has accumulated."""
        self.count += other.count
        self.sums = self.sums + other.sums
        self.squares = self.squares + other.squares

    def mean_and_std(self) -> ChannelStats:
        """(means, standard deviations) of the channels in dB, the latter at least MIN_STD_DB."""
        mean = self.sums / self.count
        std = (self.squares / self.count - mean.square()).clamp(min=0).sqrt()
        return mean.tolist(), std.clamp(min=MIN_STD_DB).tolist()
