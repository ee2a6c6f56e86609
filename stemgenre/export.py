"""Cached stems -> wav files."""

import io
import logging
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from stemgenre.cache import STEMS
from stemgenre.errors import UserError
from stemgenre.files import replacing
from stemgenre.finding import natural_key

log = logging.getLogger(__name__)

FULL_SCALE = 32767 / 32768  # the loudest sample of 16-bit wav


def export_wavs(cache, wanted, *, channels, out):
    """Writes `out`/<clip>/<stem>.wav, 16 bit, for each of `channels` of the wanted clips.

    `wanted` are clip names or paths of .npz entries; none means every entry of the cache. The
    stems of a clip share one gain if any of them would clip, so that they still sum to the mix.
    Raises UserError, after the others are written, if some cannot be read.
    """
    paths = [_entry(cache, name) for name in wanted]
    if not wanted:
        paths = sorted(cache.folder.glob("*.npz"), key=natural_key)
    if not paths:
        raise UserError(f"{cache.folder} holds no stems yet; python train.py separates the clips")
    failures, lowered = [], []
    for path in tqdm(paths, desc="wav", unit="clip"):
        try:
            stems, rate = cache.read_file(path)
        except UserError as error:
            failures.append(str(error))
            continue
        gain = _export_clip(stems.astype(np.float32), rate, channels, Path(out) / path.stem)
        if gain < 1:
            lowered.append(f"{path.stem} by {-20 * np.log10(gain):.1f} dB")
    for line in lowered:
        log.info("turned down, all stems alike, so that none clips: %s", line)
    log.info("%d clips written below %s", len(paths) - len(failures), out)
    if failures:
        raise UserError("\n".join(failures))


def _entry(cache, name):
    path = Path(name) if name.endswith(".npz") else cache.path(name)
    if not path.is_file():
        raise UserError(
            f"{path} is not there; python export_separated_wav.py without a name exports all"
        )
    return path


def _export_clip(stems, rate, channels, folder):
    """Writes the stems (4, samples); returns the gain that they share."""
    chosen = stems[[STEMS.index(channel) for channel in channels]]
    gain = min(1.0, FULL_SCALE / max(np.abs(stems).max(), 1e-9))
    for channel, wave in zip(channels, chosen, strict=True):
        data = io.BytesIO()  # soundfile does not hand on the error of a file that cannot grow
        soundfile.write(data, wave * gain, rate, format="WAV", subtype="PCM_16")
        with replacing(folder / f"{channel}.wav") as file:
            file.write(data.getbuffer())
    return gain
