"""Statistics of each clip's audio, cached so that a file is decoded once.

An entry of EDA_DIR/audio_stats is an .npz: `meta` (json) with the statistics and the file they
belong to, `fingerprint` and `wave`, with which duplicates are found and confirmed.
"""

import contextlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import pyloudnorm
from scipy import signal
from tqdm import tqdm

from stemgenre.data import audio
from stemgenre.data.fingerprint import SAMPLE_RATE, fingerprint
from stemgenre.data.source_hashes import HASHES_FILE, SourceHashes
from stemgenre.errors import UserError
from stemgenre.files import DAMAGED_NPZ, NPY_HEADER_LOCK, atomic_write
from stemgenre.prefetch import prefetch_map
from stemgenre.settings import Settings

FORMAT = 4  # to be raised whenever the same file would give another entry
MIN_COMPARED_SECONDS = 36.0  # of a clip that is longer, whatever the images show of it
SILENCE_DB = -60.0  # dBFS; a frame whose RMS is below it is silent
FRAME_SECONDS = 0.05  # of such a frame
CLIPPING_THRESHOLD = 0.999  # of full scale; three samples in a row beyond it are clipped
MAX_LOUDNESS_SECONDS = 120.0  # of a file, from its beginning; bounds the memory of a thread
MIN_FILTER_RATE = 8000  # Hz: the loudness filter's shelf at 1.7 kHz must lie below half the rate
GATING_SECONDS = 0.4  # block length of BS.1770, every 0.1 s; of shorter clips, the whole clip
SILENCE_LUFS = -70.0  # of a gating block that does not count
CHANNEL_WEIGHTS = np.array([1.0, 1.0, 1.0, 1.41, 1.41])  # of BS.1770: the surrounds count more
FULL_RANGE_CHANNELS = [0, 1, 2, 4, 5]  # of 5.1 and more: BS.1770 leaves out the LFE
STAT_COLUMNS = (
    "seconds",
    "sample_rate",
    "channels",
    "codec",
    "peak_db",
    "clipped_samples",
    "dc_offset",
    "silent_fraction",
    "loudness_lufs",
)


class AudioStatsCache:
    """Statistics, fingerprints and waveforms of clips, one entry per clip in `folder`.

    `seconds`: how much of each clip, from its beginning, is compared with the other clips.
    """

    def __init__(self, folder: Path | str, *, seconds: float) -> None:
        self.folder = Path(folder)
        self.seconds = seconds
        self.hash_source = SourceHashes(self.folder / HASHES_FILE).sha256

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """The cache below EDA_DIR; it compares as much of a clip as one image can show, or more."""
        fastest = max(1.0, *settings.augment.time_stretch_rates)
        seconds = max(MIN_COMPARED_SECONDS, settings.features.clip_seconds * fastest)
        return cls(Path(settings.paths.eda_dir) / "audio_stats", seconds=seconds)

    def path(self, clip: str) -> Path:
        """The path of a clip's entry."""
        return self.folder / f"{clip}.npz"

    def stats(self, clip: str, source: Path) -> dict[str, Any]:
        """{STAT_COLUMNS: value} of a clip, from its entry or else from the audio file `source`.

        An entry that is damaged, or that was made from another file, is computed again. Raises
        UserError if the file cannot be decoded.
        """
        signature = self._signature(source)  # of what is decoded: taken before
        if (stats := self._load_stats(clip, signature)) is None:
            held_seconds = max(self.seconds, MAX_LOUDNESS_SECONDS)
            stats, wave, rate = compute_stats(audio.read_blocks(source), held_seconds=held_seconds)
            stats["codec"] = _codec(source)
            mono = wave.mean(axis=0)[: round(self.seconds * rate)]
            mono = audio.resample(mono, from_rate=rate, to_rate=SAMPLE_RATE)
            mono /= max(float(np.abs(mono).max()), 1e-9)
            meta = signature | {"stats": stats}
            with atomic_write(self.path(clip), durable=False) as file:  # it is checked when read
                np.savez(
                    file,
                    meta=np.array(json.dumps(meta)),
                    fingerprint=fingerprint(mono),
                    wave=np.round(mono * 32767).astype(np.int16),
                )
        return stats

    def fingerprint(self, clip: str) -> np.ndarray:
        """The fingerprint of a clip that has an entry, (bands, frames) float16."""
        with NPY_HEADER_LOCK, np.load(self.path(clip)) as entry:
            return entry["fingerprint"]

    def load_wave(self, clip: str) -> np.ndarray:
        """A clip that has an entry: mono at SAMPLE_RATE, (samples,) float32, peak 1."""
        with NPY_HEADER_LOCK, np.load(self.path(clip)) as entry:
            return entry["wave"].astype(np.float32) / 32767

    def _load_stats(self, clip, signature):
        """The statistics in a clip's entry; None unless all of it is readable and up to date."""
        try:
            with NPY_HEADER_LOCK, self.path(clip).open("rb") as file, np.load(file) as arrays:
                entry = dict(arrays)  # reading each array to its end checks its CRC
            meta = json.loads(str(entry["meta"]))
            stats = meta.pop("stats")
        except DAMAGED_NPZ:
            return None
        current = {"fingerprint", "wave"} <= set(entry) and meta == signature
        return stats if current else None

    def _signature(self, source):
        """What an entry depends on."""
        return {
            "format": FORMAT,
            "source": str(source),
            "sha256": self.hash_source(source),
            "compared_seconds": self.seconds,
        }


def compute_audio_stats(
    clips: pd.DataFrame,
    stats_cache: AudioStatsCache,
    *,
    threads: int,
    stopped: Callable[[], bool] = lambda: False,
) -> pd.DataFrame:
    """`clips` (columns clip, path, ...) with STAT_COLUMNS and `error` as further columns.

    `error` is "", or why the file cannot be decoded; such clips have no statistics. The rows end
    early once `stopped()`.
    """

    def stats(row):
        try:
            return {"error": ""} | stats_cache.stats(row.clip, row.path)
        except UserError as error:
            return {"error": str(error)}

    rows = []
    ahead = prefetch_map(stats, clips.itertuples(), threads=threads, depth=4 * threads)
    with contextlib.closing(ahead):
        for _, future in tqdm(ahead, total=len(clips), desc="audio statistics", unit="clip"):
            rows.append(future.result())
            if stopped():
                break
    table = pd.DataFrame(rows, columns=[*STAT_COLUMNS, "error"], index=clips.index[: len(rows)])
    numeric = dict.fromkeys((name for name in STAT_COLUMNS if name != "codec"), float)
    return clips.iloc[: len(rows)].join(table.astype(numeric))


def compute_stats(
    blocks: Iterable[tuple[np.ndarray, int]], *, held_seconds: float = MAX_LOUDNESS_SECONDS
) -> tuple[dict[str, Any], np.ndarray, int]:
    """(statistics, beginning of the wave, its rate in Hz) of what audio.read_blocks yields.

    The statistics are STAT_COLUMNS but the codec: levels in dBFS and LUFS (None for silence),
    fractions from 0 to 1. The beginning is (channels, samples), `held_seconds` long at most: memory
    does not grow with the file. Frames and runs of clipped samples are counted within each block.
    """
    held, samples, peak, total, clipped, silent, num_frames = [], 0, 0.0, 0.0, 0, 0, 0
    for block, rate in blocks:  # (samples, channels)
        if samples < held_seconds * rate:
            held.append(block)
        samples += len(block)
        block_peak = float(max(block.max(), -block.min()))
        peak = max(peak, block_peak)
        total = total + block.sum(axis=0, dtype=np.float64)
        clipped += count_clipped(block) if block_peak >= CLIPPING_THRESHOLD else 0
        power = _frame_power(block, max(1, round(FRAME_SECONDS * rate)))
        silent += int((power < 10 ** (SILENCE_DB / 10)).sum())
        num_frames += len(power)
    wave = np.concatenate(held)[: round(held_seconds * rate)].T
    loudness = integrated_loudness(wave, rate)
    stats = {
        "seconds": samples / rate,
        "sample_rate": rate,
        "channels": len(wave),
        "peak_db": float(20 * np.log10(peak)),
        "clipped_samples": clipped,
        "dc_offset": float(np.abs(total / samples).max()),
        "silent_fraction": silent / num_frames,
        "loudness_lufs": loudness if np.isfinite(loudness) else None,
    }
    return stats, wave, rate


def _frame_power(block, frame):
    """Mean square of each whole frame of (samples, channels), over the channels too."""
    num_frames = max(1, len(block) // frame)
    frames = block[: num_frames * frame].reshape(num_frames, -1)
    return np.square(frames).mean(axis=1)


def integrated_loudness(wave: np.ndarray, rate: int) -> float:
    """LUFS of `wave`, (channels, samples) at `rate` Hz, by ITU-R BS.1770-4; -inf for silence.

    A mono file counts as one channel, as in the standard. A clip shorter than a gating block is
    measured as one block. As pyloudnorm's meter, whose loop over the blocks in Python keeps the
    other threads waiting.
    """
    if rate < MIN_FILTER_RATE:
        wave = audio.resample(wave, from_rate=rate, to_rate=MIN_FILTER_RATE)
        rate = MIN_FILTER_RATE
    channels = wave[FULL_RANGE_CHANNELS] if len(wave) > 5 else wave
    # "DeMan" has the standard's filters at any rate; the default is up to 0.2 dB off.
    filters = pyloudnorm.Meter(rate, filter_class="DeMan")._filters.values()
    sections = np.array([[*section.b, *section.a] for section in filters])
    squares = np.square(signal.sosfilt(sections, channels))
    samples = squares.shape[1]
    step = max(1, min(round(GATING_SECONDS / 4 * rate), samples // 4))
    steps = squares[:, : samples // step * step].reshape(len(squares), -1, step).mean(axis=2)
    blocks = np.lib.stride_tricks.sliding_window_view(steps, min(4, steps.shape[1]), axis=1)
    power = CHANNEL_WEIGHTS[: len(channels)] @ blocks.mean(axis=2)  # of each gating block
    loud = power[_lufs(power) > SILENCE_LUFS]
    if not len(loud):
        return -np.inf
    return float(_lufs(loud[loud > loud.mean() / 10].mean()))  # those above -10 LU of their mean


def _lufs(power):
    with np.errstate(divide="ignore"):
        return -0.691 + 10 * np.log10(power)


def count_clipped(block: np.ndarray) -> int:
    """The number of samples of (samples, channels) in runs of three or more at full scale."""
    full = np.pad(np.abs(block) >= CLIPPING_THRESHOLD, ((2, 2), (0, 0)))
    starts = full[:-2] & full[1:-1] & full[2:]  # of three in a row
    return int((starts[:-2] | starts[1:-1] | starts[2:]).sum())


def _codec(source):
    """The codec as libsndfile names it; for files that only ffmpeg reads, their suffix."""
    try:
        return audio.probe(source).codec
    except UserError:
        return Path(source).suffix.lstrip(".").upper()
