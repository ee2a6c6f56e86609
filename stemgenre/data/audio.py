"""Audio files -> waves: decode, resample, probe. libsndfile decodes; ffmpeg what it cannot.

A file of any length is read block by block; reading a whole file is joining its blocks.
"""

import contextlib
import math
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

from stemgenre.errors import UserError

BLOCK_SECONDS = 10  # s of audio decoded at a time
MAX_BLOCK = 2**22  # samples: what a header claims as rate must not decide about memory
MIN_SECONDS = 0.005  # s: less has no pitch, and after resampling perhaps no sample
MAX_PEAK = 32768.0  # of full scale: 16-bit integers written as floats; float16 stems end at 65504
AU_HEADER = 24  # bytes


@dataclass(frozen=True)
class Probe:
    """A file's header: seconds, rate in Hz, channels, and codec as libsndfile names it."""

    seconds: float
    sample_rate: int
    channels: int
    codec: str


def probe(path: Path | str) -> Probe:
    """The Probe of an audio file, from its header alone. Raises UserError if it has none."""
    _check_file(path, "read")
    try:
        info = soundfile.info(str(path))
    except (soundfile.LibsndfileError, OSError) as error:
        raise UserError(f"{path} cannot be read: {_reason(error)}") from None
    return Probe(info.frames / info.samplerate, info.samplerate, info.channels, info.subtype)


def decode(path: Path | str) -> tuple[np.ndarray, int]:
    """(wave, rate): float32 of shape (channels, samples), full scale 1, and its rate in Hz.

    Raises UserError as read_blocks does.
    """
    blocks, rates = zip(*read_blocks(path), strict=True)
    return np.concatenate([block.T for block in blocks], axis=1), rates[0]


def read_blocks(path: Path | str) -> Iterator[tuple[np.ndarray, int]]:
    """Yields (block, rate in Hz) of a file: float32 of shape (samples, channels), full scale 1.

    Raises UserError, at the end at the latest, if the file cannot be decoded or not to its end, is
    empty, silent, shorter than MIN_SECONDS, or has samples that are NaN, infinite or above
    MAX_PEAK.
    """
    _check_file(path, "decoded")
    samples, rate, peak = 0, 0, 0.0
    try:
        file = soundfile.SoundFile(str(path))
    except (soundfile.LibsndfileError, OSError) as error:
        blocks = _read_with_ffmpeg(path, _reason(error))
    else:
        blocks = _read_with_libsndfile(path, file)
    with contextlib.closing(blocks):
        for block, rate in blocks:  # noqa: B007 the rate is used below
            samples += len(block)
            peak = max(peak, _peak(path, block))
            yield block, rate
    if not samples:
        raise UserError(f"{path} is empty: it holds no samples")
    if peak == 0:
        raise UserError(f"{path} is silent: every sample is zero")
    if samples < MIN_SECONDS * rate:
        raise UserError(f"{path} is too short: {samples} samples at {rate} Hz")


def resample(wave: np.ndarray, *, from_rate: int, to_rate: int) -> np.ndarray:
    """`wave`, (samples,) or (channels, samples), at `to_rate` Hz, by soxr's HQ recipe."""
    if from_rate == to_rate:
        return wave
    samples = math.ceil(wave.shape[-1] * to_rate / from_rate)
    resampled = soxr.resample(np.ascontiguousarray(wave.T), from_rate, to_rate, quality="HQ")
    return np.ascontiguousarray(_fit(resampled, samples).T)


def resample_blocks(
    blocks: Iterable[tuple[np.ndarray, int]], *, to_rate: int
) -> Iterator[np.ndarray]:
    """Yields float32 blocks (samples, channels) at `to_rate` Hz of what read_blocks yields.

    One resampler runs through all of them, so that blocks leave no seams: joined, they are what
    resample() makes of the whole wave.
    """
    stream, samples_in, samples_out = None, 0, 0
    for block, rate in blocks:
        samples_in += len(block)
        if rate != to_rate:
            stream = stream or soxr.ResampleStream(rate, to_rate, block.shape[1], quality="HQ")
            block = stream.resample_chunk(np.ascontiguousarray(block))
        samples_out += len(block)
        yield block
    if stream:
        rest = stream.resample_chunk(np.empty((0, block.shape[1]), np.float32), last=True)
        yield _fit(rest, max(0, math.ceil(samples_in * to_rate / rate) - samples_out))


def _fit(block, samples):
    """`block` (samples, ...) cut or filled with zeros to so many samples."""
    missing = max(0, samples - len(block))
    return np.pad(block[:samples], [(0, missing)] + [(0, 0)] * (block.ndim - 1))


def _check_file(path, done):
    """UserError unless there is a file; a pipe with a clip's name would block forever."""
    if not Path(path).is_file():
        raise UserError(f"{path} cannot be {done}: there is no such file")


def _peak(path, block):
    """The largest absolute value of a block; UserError if it is NaN, infinite or above MAX_PEAK."""
    peak = max(block.max(), -block.min())
    if not np.isfinite(peak):
        raise UserError(f"{path} holds samples that are NaN or infinite")
    if peak > MAX_PEAK:
        raise UserError(f"{path} has samples of {peak:.3g} times full scale; scale it down")
    return peak


def _read_with_libsndfile(path, file):
    """(block, rate) of an open file; UserError if its header promises more than there is."""
    samples, size = 0, min(BLOCK_SECONDS * file.samplerate, MAX_BLOCK)
    with file:
        while True:
            try:
                block = file.read(size, dtype="float32", always_2d=True)
            except (soundfile.LibsndfileError, OSError) as error:
                raise UserError(f"{path} cannot be decoded: {_reason(error)}") from None
            if not len(block):
                break
            samples += len(block)
            yield block, file.samplerate
        if samples < 0.98 * file.frames:
            raise UserError(f"{path} is truncated: {samples} of {file.frames} samples are there")


def _read_with_ffmpeg(path, reason):
    """(block, rate) of the first audio stream, as ffmpeg decodes it: .au with float samples.

    The header of .au allows a length that is not known yet. `reason` is libsndfile's error.
    """
    if Path(path).stat().st_size == 0:
        raise UserError(f"{path} cannot be decoded: {reason}")
    if shutil.which("ffmpeg") is None:
        raise UserError(f"{path} cannot be decoded: {reason}; installing ffmpeg may help")
    command = ["ffmpeg", "-nostdin", "-v", "error", "-protocol_whitelist", "file,pipe"]
    command += ["-i", f"file:{path}", "-map", "0:a:0", "-c:a", "pcm_f32be", "-f", "au", "-"]
    with tempfile.TemporaryFile() as messages:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages)
        try:
            header = process.stdout.read(AU_HEADER)
            if len(header) == AU_HEADER:
                _, offset, _, _, rate, channels = np.frombuffer(header, ">u4").tolist()
                process.stdout.read(offset - AU_HEADER)
                frame = 4 * channels  # bytes
                while data := process.stdout.read(min(BLOCK_SECONDS * rate, MAX_BLOCK) * frame):
                    block = np.frombuffer(data, ">f4", count=len(data) // frame * channels)
                    yield block.reshape(-1, channels).astype(np.float32), rate
            if process.wait():
                messages.seek(0)
                lines = messages.read().decode(errors="replace").strip().splitlines() or [reason]
                raise UserError(f"{path} cannot be decoded: {lines[-1]}")
        finally:
            process.stdout.close()
            process.kill()
            process.wait()


def _reason(error):
    """libsndfile's or the system's own words, without the path again."""
    return getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
