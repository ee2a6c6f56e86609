"""Waves -> mel power spectrograms -> dB: filters at any pitch, frames at any hop length."""

from collections.abc import Sequence

import torch

from stemgenre.runtime import to_device

MelFilters = list[tuple[slice, torch.Tensor]]  # see group_bands()
SILENCE = 1e-10  # power of a mel band, 28 dB below noise of one step of 16-bit audio
TINY = torch.finfo(torch.float32).tiny  # -379 dB: below any floor; of 0 the logarithm is slow
FRAMES_AT_ONCE, BANDS_AT_ONCE = 128, 16  # on a CPU, see mel_power() and group_bands()


def mel_filters(
    band_edges: torch.Tensor, *, sr: int, n_fft: int, semitones: Sequence[float]
) -> torch.Tensor:
    """Mel filters (B, n_mels, n_fft // 2 + 1) float32 for power spectra, each shifted in pitch.

    `band_edges` are n_mels + 2 frequencies in Hz, float64. The filters are triangles of area 1
    (Slaney's norm), those of librosa.filters.mel at 0 semitones. With `semitones` the frequencies
    of the FFT's bins are scaled by 2 ** (semitones / 12), as of a sound at that pitch.
    """
    bin_hz = [sr / n_fft * 2 ** (shift / 12) for shift in semitones]
    bin_hz = to_device(torch.tensor(bin_hz, dtype=torch.float64), band_edges.device)
    bins = torch.arange(n_fft // 2 + 1, dtype=torch.float64, device=band_edges.device)
    bins = bins * bin_hz[:, None, None]  # (B, 1, bins)
    width = band_edges.diff()[:, None]
    rising = (bins - band_edges[:-2, None]) / width[:-1]
    falling = (band_edges[2:, None] - bins) / width[1:]
    norm = 2 / (band_edges[2:] - band_edges[:-2])[:, None]
    return (torch.minimum(rising, falling).clamp(min=0) * norm).float()


def group_bands(filters: torch.Tensor, size: int) -> MelFilters:
    """`filters` (n_mels, bins) in groups of `size` bands: [(bins, filters (size, those bins))].

    The bins of a group are the slice that it covers.
    """
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

    `filters` are those of group_bands(). Around the samples `waves` has n_fft // 2 zeros each, so
    that frames are centred as in librosa.feature.melspectrogram. For a CPU: of as many frames at
    once as its cache holds, each band of the bins that it covers.
    """
    n_fft = len(window)
    frames = waves.unfold(1, n_fft, hop_length)  # (C, frames, n_fft), a view
    power = waves.new_empty(*frames.shape[:2], n_fft // 2 + 1)
    for part, part_power in zip(
        frames.split(FRAMES_AT_ONCE, 1), power.split(FRAMES_AT_ONCE, 1), strict=True
    ):
        squares = torch.view_as_real(torch.fft.rfft(part * window)).square_()
        torch.add(squares[..., 0], squares[..., 1], out=part_power)
    power = power.transpose(1, 2)  # (C, bins, frames)
    bands = [group @ power[:, bins] for bins, group in filters]
    return torch.cat(bands, dim=1) if len(bands) > 1 else bands[0]


def mel_powers(
    waves: Sequence[torch.Tensor],
    *,
    filters: torch.Tensor,
    window: torch.Tensor,
    hop_lengths: Sequence[int],
    frames: int,
) -> torch.Tensor:
    """Mel power spectrograms (B, C, n_mels, frames) of B clips, cut or padded with 0 in time.

    The same as mel_power() for each of the clips' `waves` (C, samples), with `filters` (B or 1,
    n_mels, bins) as they are, for a GPU: fewer, larger kernels that move fewer bytes.
    """
    n_fft = len(window)
    shape = len(waves), len(waves[0]), frames, n_fft // 2 + 1
    power = torch.empty(shape, device=window.device)
    for clip_power, wave, hop_length in zip(power, waves, hop_lengths, strict=True):
        own = wave.unfold(1, n_fft, hop_length)[:, :frames]  # (C, the clip's frames, n_fft), a view
        count = own.shape[1]
        real, imaginary = torch.view_as_real(torch.fft.rfft(own * window)).unbind(-1)
        torch.mul(real, real, out=clip_power[:, :count]).addcmul_(imaginary, imaginary)
        if count < frames:
            clip_power[:, count:] = 0
    return filters[:, None] @ power.transpose(2, 3)


def power_to_db(power: torch.Tensor, *, reference: str, top_db: float) -> torch.Tensor:
    """Power (..., C, n_mels, frames) in dB below the reference, at least -top_db.

    The reference is the loudest cell of all channels ("clip") or of each channel ("stem"). A power
    of at most SILENCE is at the floor, -top_db; otherwise as librosa.power_to_db.
    """
    power = torch.nn.functional.threshold(power, SILENCE, TINY)  # NaN stays NaN
    loudest = power.amax((-3, -2, -1) if reference == "clip" else (-2, -1), keepdim=True)
    db = power.log10_().sub_(loudest.clamp(min=SILENCE).log10())
    return db.mul_(10).clamp_(min=-top_db)
