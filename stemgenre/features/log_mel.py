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
from stemgenre.features.mel_power import (
    BANDS_AT_ONCE,
    group_bands,
    mel_filters,
    mel_power,
    mel_powers,
    power_to_db,
)
from stemgenre.runtime import to_device, use_one_core
from stemgenre.settings import STEMS, FeatureSettings

ChannelStats = tuple[Sequence[float], Sequence[float]]  # mean and std in dB of each channel
MIN_LEFT = 1e-4  # of the clip's power, -40 dB: silencing stems has to leave more of it
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
        channels, computed = len(features.channel_names), len(features.channels.split(","))
        self.channel_order = torch.arange(channels, device=device) % computed  # repeated in turn
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
        self.filters = self._mel_filters([0.0])  # (1, n_mels, bins)
        # A CPU computes the channels in threads of one core each, which do not wait for each other
        # after every operation, as PyTorch's own do. A GPU takes channels and clips together, for
        # fewer and larger kernels: one by one, their launches would outnumber the network's.
        self.pool = None
        if device.type == "cpu":
            self.pool = concurrent.futures.ThreadPoolExecutor(
                torch.get_num_threads(), initializer=use_one_core
            )
            self.band_groups = group_bands(self.filters[0], BANDS_AT_ONCE)

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
        if self.pool:
            clips = zip(stems, params, strict=True)
            db = torch.cat([self._log_mels([clip], [augment]) for clip, augment in clips])
        else:
            db = self._log_mels(stems, params)
        images = torch.nn.functional.interpolate(
            db.sub_(self.mean).div_(self.std),
            self.features.image_size,
            mode="bilinear",
            antialias=True,
        )
        return mask_images(images, params)

    @torch.no_grad()
    def log_mel(self, stems: torch.Tensor, params: AugmentParams = NO_AUGMENT) -> torch.Tensor:
        """Log-mel spectrogram (C, n_mels, frames) in dB below the reference, float32.

        `stems` is (4, samples), or (1, samples) of the mix alone. There are only the clip's own
        frames, at most as many as CLIP_SECONDS has. The masks of `params` are not applied.
        """
        samples = min(stems.shape[1], self.needed_samples(params))
        own_frames = 1 + samples // self._hop_length(params)
        return self._log_mels([stems], [params])[0, :, :, :own_frames]

    def _log_mels(
        self, stems: Sequence[torch.Tensor], params: Sequence[AugmentParams]
    ) -> torch.Tensor:
        """Log-mel spectrograms (B, C, n_mels, frames) of B clips, padded with the floor."""
        features = self.features
        waves, lengths = self._augmented_waves(stems, params)
        margins = 2 * (features.n_fft // 2)
        waves = [wave[:, : length + margins] for wave, length in zip(waves, lengths, strict=True)]
        hop_lengths = [self._hop_length(augment) for augment in params]
        semitones = [augment.semitones for augment in params]
        filters = self._mel_filters(semitones) if any(semitones) else self.filters
        if self.pool:
            power = self._mel_power_on_cpu(waves[0], filters, hop_lengths[0])[None]
        else:
            power = mel_powers(
                waves,
                filters=filters,
                window=self.window,
                hop_lengths=hop_lengths,
                frames=self.frames,
            )
        db = power_to_db(power, reference=features.db_reference, top_db=features.top_db)
        return db if len(self.channel_order) == db.shape[1] else db[:, self.channel_order]

    def _mel_power_on_cpu(self, wave, filters, hop_length):
        """What mel_powers() gives for a clip, (C, n_mels, frames)."""
        groups = self.band_groups
        if filters is not self.filters:
            groups = group_bands(filters[0], BANDS_AT_ONCE)
        to_mel = functools.partial(
            mel_power, filters=groups, window=self.window, hop_length=hop_length
        )
        # A thread of one core is one of the loader's: its neighbours have other clips.
        map_channels = self.pool.map if torch.get_num_threads() > 1 else map
        mel = torch.cat(list(map_channels(to_mel, wave.split(1))))
        missing = self.frames - mel.shape[2]  # negative: too many
        return torch.nn.functional.pad(mel, (0, missing)) if missing else mel

    def _augmented_waves(self, stems, params):
        """(waves (B, channels, samples) of CHANNELS, augmented; the samples of each clip).

        Around each clip there are n_fft // 2 zeros, after a shorter one more.
        """
        features, margin = self.features, self.features.n_fft // 2
        lengths = [
            min(clip.shape[1], self.needed_samples(augment))
            for clip, augment in zip(stems, params, strict=True)
        ]
        padded = torch.zeros(
            len(stems), len(stems[0]), max(lengths) + 2 * margin, device=self.device
        )
        waves = padded[:, :, margin : margin + max(lengths)]
        for wave, clip, length, augment in zip(waves, stems, lengths, params, strict=True):
            put_shifted(wave[:, :length], clip[:, :length], augment.shift_seconds * features.sr)
        self.remix(waves, params)
        add_noise(
            waves,
            lengths,
            levels_db=[augment.noise_db for augment in params],
            seeds=[augment.noise_seed for augment in params],
        )
        return self.select_channels(padded), lengths

    def _hop_length(self, params):
        return round(self.features.hop_length * params.rate)

    def needed_samples(self, params: AugmentParams) -> int:
        """Samples of a clip that its image covers: CLIP_SECONDS at the augmented tempo."""
        return round(self.clip_samples * self._hop_length(params) / self.features.hop_length)

    def remix(self, waves: torch.Tensor, params: Sequence[AugmentParams]) -> None:
        """Gives the stems of `waves` (B, 4, T) float32 their gains, or silences them, in place.

        None is silenced if what is left of CHANNELS would be silent too. A mix by itself, (B, 1,
        T), gets the first gain.
        """
        silences = any(any(augment.silent_stems) for augment in params)
        unchanged = NO_AUGMENT.stem_gains_db
        if not silences and all(augment.stem_gains_db == unchanged for augment in params):
            return
        names = self.features.channels.split(",")
        shown = [name in names or "mix" in names for name in STEMS]
        values = [(augment.stem_gains_db, augment.silent_stems, shown) for augment in params]
        values = to_device(torch.tensor(values, dtype=torch.float32), waves.device)
        gains_db, silent, shown = values.unbind(1)  # (B, 4)
        gains = 10 ** (gains_db / 20)
        if silences and waves.shape[1] > 1:
            power = (gains * torch.linalg.vector_norm(waves, dim=2)).square() * shown
            left = gains * (1 - silent)
            enough = (power * (1 - silent)).sum(1) > MIN_LEFT * power.sum(1)
            gains = torch.where(enough[:, None], left, gains)
        waves.mul_(gains[:, : waves.shape[1], None])

    def select_channels(self, stems: torch.Tensor) -> torch.Tensor:
        """The waves (..., C, samples) that CHANNELS names, on the device of `stems`.

        `stems` is (..., 4, samples), whose sum is the mix, or (..., 1, samples), the mix itself.
        float32 if the mix is among the channels: the sum of float16 stems can exceed what float16
        holds.
        """
        names = self.features.channels.split(",")
        if names == list(STEMS):
            return stems
        if "mix" in names:
            stems = stems.float()
        waves = [
            stems.sum(-2) if name == "mix" else stems[..., STEMS.index(name), :] for name in names
        ]
        return torch.stack(waves, dim=-2)

    def _mel_filters(self, semitones):
        """Mel filters (B, n_mels, bins) of clips whose pitch is shifted by so many `semitones`."""
        return mel_filters(
            self.band_edges,
            sr=self.features.sr,
            n_fft=self.features.n_fft,
            semitones=semitones,
        ).to(self.device)


def put_shifted(target: torch.Tensor, waves: torch.Tensor, samples: float) -> None:
    """Puts `waves` (C, T) into zeros `target` (C, T), later by `samples`, earlier if negative."""
    length = waves.shape[1]
    delay = max(-length, min(length, round(samples)))
    target[:, max(0, delay) : length + min(0, delay)] = waves[
        :, max(0, -delay) : length - max(0, delay)
    ]


def add_noise(
    waves: torch.Tensor, lengths: Sequence[int], *, levels_db: Sequence[float], seeds: Sequence[int]
) -> None:
    """Adds Gaussian noise to clips' stems `waves` (B, C, T) float32 in place, in their `lengths`.

    It is that many `levels_db` below a clip's mix, as RMS; infinite: none. The noise is one wave,
    that of the mix, and each stem gets a part of it in proportion to the stem's own RMS. As after
    separating a noisy mix, a stem that is nearly silent stays so.
    """
    if all(level == math.inf for level in levels_db):
        return
    noise = waves.new_zeros(len(waves), waves.shape[2])
    for wave, length, level, seed in zip(noise, lengths, levels_db, seeds, strict=True):
        if level < math.inf:
            generator = torch.Generator(waves.device).manual_seed(seed)
            wave[:length].normal_(generator=generator)
    values = [
        (math.sqrt(length), 10 ** (-level / 20))
        for length, level in zip(lengths, levels_db, strict=True)
    ]
    root, level = to_device(torch.tensor(values), waves.device).unbind(1)  # (B,)
    rms = torch.linalg.vector_norm(waves, dim=2) / root[:, None]  # (B, C)
    mix_rms = torch.linalg.vector_norm(waves.sum(1), dim=1) / root
    parts = rms / rms.sum(1, keepdim=True).clamp(min=torch.finfo(rms.dtype).tiny)
    waves.addcmul_(noise[:, None], (parts * (mix_rms * level)[:, None])[:, :, None])


def mask_images(images: torch.Tensor, params: Sequence[AugmentParams]) -> torch.Tensor:
    """Sets the masked bands of each of `images` (B, C, height, width) to 0 in place; returns them.

    A mask is (start, width) as fractions of its axis.
    """
    if not any(augment.time_mask[1] or augment.frequency_mask[1] for augment in params):
        return images
    rows = _band_masks([augment.frequency_mask for augment in params], images.shape[2])
    columns = _band_masks([augment.time_mask for augment in params], images.shape[3])
    rows, columns = (to_device(masks, images.device) for masks in (rows, columns))
    return images.masked_fill_(rows[:, None, :, None] | columns[:, None, None, :], 0.0)


def _band_masks(bands, size):
    """(B, size) of bool, True in each band."""
    masks = torch.zeros(len(bands), size, dtype=torch.bool)
    for mask, band in zip(masks, bands, strict=True):
        start, width = (round(fraction * size) for fraction in band)
        mask[start : start + width] = True
    return masks


class RunningStats:
    """Mean and standard deviation in dB of each channel, accumulated clip by clip."""

    def __init__(self):
        self.count = 0  # cells of each channel
        self.sums = torch.zeros((), dtype=torch.float64)  # then one for each channel
        self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, db: torch.Tensor) -> None:
        """Accumulates the cells of one clip's log-mel spectrogram (C, n_mels, frames)."""
        if db.device.type == "mps":  # which has no float64
            db = db.cpu()
        values = db.flatten(1).double()
        self.count += values.shape[1]
        self.sums = self.sums + values.sum(1)
        self.squares = self.squares + values.square().sum(1)

    def cpu(self) -> "RunningStats":
        """These, with the sums on the CPU: to be sent to another process."""
        self.sums, self.squares = self.sums.cpu(), self.squares.cpu()
        return self

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
