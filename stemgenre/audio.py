"""Audio files -> waves: decode, resample, probe. libsndfile decodes; ffmpeg what it cannot."""

import io
import shutil
import subprocess
from dataclasses import dataclass

import librosa
import numpy as np
import soundfile

from stemgenre.errors import UserError

WITHOUT_FFMPEG = (".au", ".wav", ".flac", ".ogg", ".mp3", ".aif", ".aiff", ".oga", ".opus", ".snd")
WITH_FFMPEG = (".m4a", ".aac", ".mp4", ".webm", ".wma")
SUFFIXES = WITHOUT_FFMPEG + WITH_FFMPEG  # what is looked for in a folder


@dataclass(frozen=True)
class Probe:
    """A file's header: seconds, rate in Hz, channels, and codec as libsndfile names it."""

    seconds: float
    sample_rate: int
    channels: int
    codec: str


def probe(path):
    """The Probe of an audio file, from its header alone. Raises UserError if there is none."""
    try:
        info = soundfile.info(str(path))
    except (soundfile.LibsndfileError, OSError) as error:
        raise UserError(f"{path} cannot be read: {_reason(error)}") from None
    return Probe(info.frames / info.samplerate, info.samplerate, info.channels, info.subtype)


def decode(path):
    """(wave, rate): float32 of shape (channels, samples), full scale 1, and its rate in Hz.

    Raises UserError if the file cannot be decoded or not to its end, is empty, silent, or has
    samples that are no numbers.
    """
    try:
        file = soundfile.SoundFile(str(path))
    except (soundfile.LibsndfileError, OSError) as error:
        wave, rate = _decode_with_ffmpeg(path, error)
    else:
        wave, rate = _read_whole(path, file), file.samplerate
    if not len(wave):
        raise UserError(f"{path} is empty: it holds no samples")
    if not np.isfinite(wave).all():
        raise UserError(f"{path} holds samples that are no numbers (NaN or infinite)")
    if not wave.any():
        raise UserError(f"{path} is silent: every sample is zero")
    return np.ascontiguousarray(wave.T), rate


def resample(wave, *, from_rate, to_rate):
    """`wave` (..., samples) brought from one rate to another, in Hz, by soxr's HQ recipe."""
    if from_rate == to_rate:
        return wave
    return librosa.resample(wave, orig_sr=from_rate, target_sr=to_rate, res_type="soxr_hq")


def _read_whole(path, file):
    """All samples of an open file; UserError if there are fewer than its header promises."""
    try:
        with file:
            wave = file.read(dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise UserError(f"{path} cannot be decoded: {_reason(error)}") from None
    if len(wave) < 0.98 * file.frames:
        raise UserError(f"{path} is cut short: {len(wave)} of {file.frames} samples are there")
    return wave


def _decode_with_ffmpeg(path, error):
    if not path.is_file() or path.stat().st_size == 0 or shutil.which("ffmpeg") is None:
        hint = (
            "" if shutil.which("ffmpeg") or not path.is_file() else "; installing ffmpeg may help"
        )
        raise UserError(f"{path} cannot be decoded: {_reason(error)}{hint}") from None
    # .au holds float samples, rate and channels, and its header allows a length not yet known.
    command = ["ffmpeg", "-nostdin", "-v", "error", "-protocol_whitelist", "file,pipe"]
    command += ["-i", f"file:{path}", "-map", "0:a:0", "-c:a", "pcm_f32be", "-f", "au", "-"]
    done = subprocess.run(command, capture_output=True, check=False)
    try:
        return soundfile.read(io.BytesIO(done.stdout), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [_reason(error)]
        raise UserError(f"{path} cannot be decoded: {lines[-1]}") from None


def _reason(error):
    """libsndfile's or the system's own words, without the path again."""
    return getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
