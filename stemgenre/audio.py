"""Audio files -> waves: decode, resample, probe. libsndfile decodes; ffmpeg what it cannot."""

import io
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import librosa
import numpy as np
import soundfile

from stemgenre.errors import UserError

WITHOUT_FFMPEG = (".au", ".wav", ".flac", ".ogg", ".mp3", ".aif", ".aiff", ".oga", ".opus", ".snd")
WITH_FFMPEG = (".m4a", ".aac", ".mp4", ".webm", ".wma")
BLOCK = 2**22  # samples read at once: memory follows what a file holds, not what it claims
SHORTEST = 0.005  # s: less has no pitch, and after resampling perhaps no sample
LOUDEST = 32768.0  # of full scale: 16-bit numbers written as floats; stems in float16 end at 65504
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
    _check_file(path, "read")
    try:
        info = soundfile.info(str(path))
    except (soundfile.LibsndfileError, OSError) as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None
    return Probe(info.frames / info.samplerate, info.samplerate, info.channels, info.subtype)


def decode(path):
    """(wave, rate): float32 of shape (channels, samples), full scale 1, and its rate in Hz.

    Raises UserError if the file cannot be decoded or not to its end, is empty, silent, shorter than
    SHORTEST, or has samples that are no numbers or beyond LOUDEST.
    """
    _check_file(path, "decoded")
    try:
        file = soundfile.SoundFile(str(path))
    except (soundfile.LibsndfileError, OSError) as error:
        wave, rate = _decode_with_ffmpeg(path, error)
    else:
        wave, rate = _read_whole(path, file), file.samplerate
    peak = check_loudness(path, wave) if len(wave) else 0.0
    check_content(path, samples=len(wave), rate=rate, peak=peak)
    return np.ascontiguousarray(wave.T), rate


def check_loudness(path, wave):
    """The peak of `wave`; UserError if a sample is no number or beyond LOUDEST."""
    peak = max(wave.max(), -wave.min())
    if not np.isfinite(peak):
        raise UserError(f"{path} holds samples that are no numbers (NaN or infinite)")
    if peak > LOUDEST:
        raise UserError(f"{path} has samples of {peak:.3g} times full scale; scale it down")
    return peak


def check_content(path, *, samples, rate, peak):
    """UserError if a whole file of so many samples is empty, silent or shorter than SHORTEST."""
    if not samples:
        raise UserError(f"{path} is empty: it holds no samples")
    if peak == 0:
        raise UserError(f"{path} is silent: every sample is zero")
    if samples < SHORTEST * rate:
        raise UserError(f"{path} is too short: {samples} samples at {rate} Hz")


def check_whole(path, *, samples, promised):
    """UserError if fewer samples could be decoded than the file's header promises."""
    if samples < 0.98 * promised:
        raise UserError(f"{path} is cut short: {samples} of {promised} samples are there")


def ffmpeg_command(path):
    """The command that writes the file's first audio stream to its output as .au.

    .au holds float samples, rate and channels, and its header allows a length not yet known.
    """
    command = ["ffmpeg", "-nostdin", "-v", "error", "-protocol_whitelist", "file,pipe"]
    return [*command, "-i", f"file:{path}", "-map", "0:a:0", "-c:a", "pcm_f32be", "-f", "au", "-"]


def resample(wave, *, from_rate, to_rate):
    """`wave` (..., samples) brought from one rate to another, in Hz, by soxr's HQ recipe."""
    if from_rate == to_rate:
        return wave
    return librosa.resample(wave, orig_sr=from_rate, target_sr=to_rate, res_type="soxr_hq")


def _check_file(path, done):
    """UserError unless there is a file; a pipe with a clip's name would be waited for forever."""
    if not Path(path).is_file():
        raise UserError(f"{path} cannot be {done}: there is no such file")


def _read_whole(path, file):
    """All samples of an open file; UserError if there are fewer than its header promises."""
    try:
        with file:
            blocks = [file.read(BLOCK, dtype="float32", always_2d=True)]
            while len(blocks[-1]) == BLOCK:
                blocks.append(file.read(BLOCK, dtype="float32", always_2d=True))
    except (soundfile.LibsndfileError, OSError) as error:
        raise UserError(f"{path} cannot be decoded: {reason(error)}") from None
    wave = np.concatenate(blocks) if len(blocks) > 1 else blocks[0]
    check_whole(path, samples=len(wave), promised=file.frames)
    return wave


def _decode_with_ffmpeg(path, error):
    if Path(path).stat().st_size == 0 or shutil.which("ffmpeg") is None:
        hint = "" if shutil.which("ffmpeg") else "; installing ffmpeg may help"
        raise UserError(f"{path} cannot be decoded: {reason(error)}{hint}") from None
    done = subprocess.run(ffmpeg_command(path), capture_output=True, check=False)
    try:
        return soundfile.read(io.BytesIO(done.stdout), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [reason(error)]
        raise UserError(f"{path} cannot be decoded: {lines[-1]}") from None


def reason(error):
    """libsndfile's or the system's own words, without the path again."""
    return getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
