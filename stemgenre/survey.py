"""What is measured of each clip's file, and kept, so that it is decoded once.

An entry of EDA_DIR/measured is an .npz: `meta` (json) with the measures and what they belong to,
`fingerprint` and `wave`, with which copies are found and confirmed.
"""

import contextlib
import json
import logging
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from stemgenre import audio
from stemgenre.cache import UNREADABLE
from stemgenre.errors import UserError, first_line
from stemgenre.files import replacing
from stemgenre.fingerprint import RATE, fingerprint
from stemgenre.loudness import integrated_loudness
from stemgenre.prefetch import map_ahead

log = logging.getLogger(__name__)

FORMAT = 1  # to be raised whenever the same file would give another entry
SILENCE = -60.0  # dB of full scale; a frame whose RMS is below it is silent
FRAME = 0.05  # s of such a frame
FULL = 0.999  # of full scale; three samples in a row beyond it are clipped
MEASURES = (
    "seconds",
    "sample_rate",
    "channels",
    "codec",
    "peak_db",
    "clipped_samples",
    "dc",
    "silent_share",
    "loudness_lufs",
)


class Survey:
    """The measured clips of one folder; `seconds` is how much of each clip is kept to compare."""

    def __init__(self, folder, *, seconds):
        self.folder = Path(folder)
        self.seconds = seconds

    def path(self, clip):
        """Where a clip's entry is."""
        return self.folder / f"{clip}.npz"

    def measures(self, clip, source):
        """The measures of a clip, {name: value}: from its entry, or from the file `source`.

        Of a file that cannot be decoded, only the reason: {"error": text}.
        """
        if (measures := self._kept(clip, source)) is None:
            try:
                wave, rate = audio.decode(source)
            except UserError as error:
                return {"error": str(error)}
            measures = measure(wave, rate, codec=_codec(source))
            mono = wave.mean(axis=0)[: round(self.seconds * rate)]
            mono = audio.resample(mono, from_rate=rate, to_rate=RATE)
            scale = max(float(np.abs(mono).max()), 1e-9)
            meta = self._belongs_to(source) | {"measures": measures}
            with replacing(self.path(clip)) as file:
                np.savez(
                    file,
                    meta=np.array(json.dumps(meta)),
                    fingerprint=fingerprint(mono / scale),
                    wave=np.round(mono / scale * 32767).astype(np.int16),
                )
        return measures

    def fingerprint(self, clip):
        """A measured clip's print, (bands, frames) float16. Raises UserError if it is damaged."""
        return self._read(clip, "fingerprint")

    def wave(self, clip):
        """A measured clip in mono at RATE, float32, its peak at 1. UserError if it is damaged."""
        return self._read(clip, "wave").astype(np.float32) / 32767

    def _read(self, clip, name):
        try:
            with np.load(self.path(clip)) as entry:
                return entry[name]
        except UNREADABLE as error:
            raise UserError(
                f"{self.path(clip)} cannot be read ({first_line(error)}); delete it and run again"
            ) from None

    def _kept(self, clip, source):
        with contextlib.suppress(*UNREADABLE):
            with np.load(self.path(clip)) as entry:
                meta = json.loads(str(entry["meta"]))
                whole = {"fingerprint", "wave"} <= set(entry.files)
            measures = meta.pop("measures")
            if whole and meta == self._belongs_to(source) and set(measures) == set(MEASURES):
                return measures
        return None

    def _belongs_to(self, source):
        status = Path(source).stat()
        return {
            "format": FORMAT,
            "source": str(source),
            "bytes": status.st_size,
            "time": status.st_mtime_ns,
            "compared_seconds": self.seconds,
        }


def survey_clips(clips, survey, *, threads, stopped=lambda: False):
    """`clips` (columns clip, path, ...) with the MEASURES and `error` as further columns.

    `error` is the reason for a file that cannot be decoded, which has no measures, else "".
    """

    def measured(row):
        return {"error": ""} | survey.measures(row.clip, row.path)

    rows = []
    ahead = map_ahead(measured, clips.itertuples(), threads=threads, depth=4 * threads)
    with contextlib.closing(ahead):
        for _, future in tqdm(ahead, total=len(clips), desc="measuring", unit="clip"):
            rows.append(future.result())
            if stopped():
                break
    found = pd.DataFrame(rows, columns=[*MEASURES, "error"], index=clips.index[: len(rows)])
    numbers = dict.fromkeys((name for name in MEASURES if name != "codec"), float)
    return clips.iloc[: len(rows)].join(found.astype(numbers))


def measure(wave, rate, *, codec):
    """The MEASURES of `wave` (channels, samples): dB and LUFS of full scale, shares from 0 to 1."""
    frame = max(1, round(FRAME * rate))
    count = max(1, wave.shape[1] // frame)
    frames = wave[:, : count * frame].reshape(len(wave), count, -1)
    power = np.square(frames, dtype=np.float32).mean(axis=(0, 2))
    loudness = integrated_loudness(wave, rate)
    return {
        "seconds": wave.shape[1] / rate,
        "sample_rate": rate,
        "channels": len(wave),
        "codec": codec,
        "peak_db": float(20 * np.log10(np.abs(wave).max())),
        "clipped_samples": clipped_samples(wave),
        "dc": float(np.abs(wave.mean(axis=1, dtype=np.float64)).max()),
        "silent_share": float((power < 10 ** (SILENCE / 10)).mean()),
        "loudness_lufs": loudness if np.isfinite(loudness) else None,
    }


def clipped_samples(wave):
    """How many samples of (channels, samples) stand in runs of three or more at full scale."""
    full = np.pad(np.abs(wave) >= FULL, ((0, 0), (2, 2)))
    runs = full[:, :-2] & full[:, 1:-1] & full[:, 2:]  # one begins here
    return int((runs[:, :-2] | runs[:, 1:-1] | runs[:, 2:]).sum())


def _codec(source):
    """The codec as libsndfile names it; of files that only ffmpeg reads, their suffix."""
    try:
        return audio.probe(source).codec
    except UserError:
        return Path(source).suffix.lstrip(".").upper()
