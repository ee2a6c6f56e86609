"""Audio files -> waves: decode, resample, probe. libsndfile decodes; ffmpeg what it cannot.

A file of any length is read block by block; reading a whole file is joining its blocks. In place of
a file, the folder of a song's stems (see find_files) is read as their sum.
"""

import contextlib
import itertools
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

from stemgenre.data.ffmpeg import MAX_LOST, read_with_ffmpeg
from stemgenre.data.find_files import stem_files
from stemgenre.data.headers import UNKNOWN_LENGTH, check_size, tells_mp3_length
from stemgenre.errors import UserError
from stemgenre.settings import STEMS

BLOCK_SECONDS = 10  # s of audio decoded at a time
MAX_BLOCK = 2**22  # samples: what a header claims as rate must not decide about memory
MIN_SECONDS = 0.005  # s: less has no pitch, and after resampling perhaps no sample
MAX_PEAK = 32768.0  # of full scale: 16-bit integers written as floats; float16 stems end at 65504
STEM_TOLERANCE = 0.1  # s by which the stems of a song may differ in length
MIN_RATE, MAX_RATE = 1000, 1_000_000  # Hz: a header that claims another is damaged
MAX_SAMPLES_PER_BYTE = 10_000  # of a file: flac's longest blocks of silence hold half as many
NO_HEADER = "it has no header that is known"


@dataclass(frozen=True)
class Probe:
    """A file's header: seconds, rate in Hz, channels, and codec as libsndfile names it."""

    seconds: float
    sample_rate: int
    channels: int
    codec: str


def probe(path: Path | str) -> Probe:
    """The Probe of an audio file, from its header; one without a length is decoded to measure it.

    Of a song, that of its first stem. Raises UserError if it has no header, or one that cannot be
    true.
    """
    if Path(path).is_dir():
        path = stem_files(path)[STEMS[0]]
    _check_file(path, "read")
    try:
        info = soundfile.info(_name(path))
    except (soundfile.LibsndfileError, OSError) as error:
        raise UserError(f"{path} cannot be read: {_reason(error)}") from None
    if info.format == "RAW":
        raise UserError(f"{path} cannot be read: {NO_HEADER}")
    _check_rate(path, info.samplerate)
    frames = info.frames
    if frames >= UNKNOWN_LENGTH:
        frames = sum(len(block) for block, _ in read_blocks(path))
    elif frames > (size := Path(path).stat().st_size) * MAX_SAMPLES_PER_BYTE:
        raise UserError(f"{path} is damaged: its header claims {frames} samples in {size} bytes")
    return Probe(frames / info.samplerate, info.samplerate, info.channels, info.subtype)


def decode(path: Path | str, *, seconds: float = math.inf) -> tuple[np.ndarray, int]:
    """(wave, rate) of the first `seconds`: float32 (channels, samples), full scale 1; rate in Hz.

    Nothing behind them is read. Raises UserError as read_blocks does.
    """
    parts, samples = [], 0
    with contextlib.closing(read_blocks(path)) as blocks:
        for block, rate in blocks:
            parts.append(block.T)
            samples += len(block)
            if samples >= seconds * rate:
                break
    return np.concatenate(parts, axis=1)[:, : round(min(samples, seconds * rate))], rate


def read_blocks(path: Path | str) -> Iterator[tuple[np.ndarray, int]]:
    """Yields (block, rate in Hz) of a file: float32 of shape (samples, channels), full scale 1.

    Of a song, the sum of its stems, in one channel. Raises UserError, at the end at the latest, if
    the file cannot be decoded or not to its end, is empty, silent, shorter than MIN_SECONDS, or has
    samples that are NaN, infinite or above MAX_PEAK; for a song as read_stem_blocks does.
    """
    if Path(path).is_dir():
        blocks = read_stem_blocks(path)
        with contextlib.closing(blocks):
            for block, rate in blocks:
                yield block.sum(axis=1, keepdims=True), rate
        return
    peak = yield from _read_file(path)
    if peak == 0:
        raise UserError(f"{path} is silent: every sample is zero")


def read_stem_blocks(song: Path | str) -> Iterator[tuple[np.ndarray, int]]:
    """Yields (block, rate in Hz) of a song's stems, float32 of shape (samples, 4), each mono.

    They are those of its folder, in the order of STEMS, at the rate of the first; a silent one is
    allowed. Raises UserError, at the end at the latest, if all are silent, if their lengths differ
    by more than STEM_TOLERANCE, and as stem_files and read_blocks do.
    """
    rate, peaks = None, []
    with contextlib.ExitStack() as stack:
        streams = []
        for path in stem_files(song).values():
            first, blocks = _begin(path, peaks)
            stack.callback(blocks.close)
            rate = rate or first[1]
            mono = ((b.mean(1, keepdims=True), r) for b, r in itertools.chain([first], blocks))
            streams.append(resample_blocks(mono, to_rate=rate))
        lengths = yield from _join_stems(streams, rate)
    if max(lengths) - min(lengths) > STEM_TOLERANCE * rate:
        seconds = [f"{stem} {n / rate:.2f} s" for stem, n in zip(STEMS, lengths, strict=True)]
        raise UserError(
            f"the stems of {song} differ in length: {', '.join(seconds)}; cut or fill them"
        )
    if not any(peaks):
        raise UserError(f"{song} is silent: every sample of its stems is zero")


def _begin(path, peaks):
    """(the first block, an iterator of the others) of a file, whose peak is added to `peaks`."""

    def read():
        peaks.append((yield from _read_file(path)))

    blocks = read()
    return next(blocks), blocks


def _join_stems(streams, rate):
    """Yields (block (samples, streams), rate); returns the number of samples of each stream.

    Streams of (samples, 1) that end before others are filled with zeros.
    """
    parts = [np.empty((0, 1), np.float32)] * len(streams)  # read and not yet yielded
    lengths, running = [0] * len(streams), list(range(len(streams)))
    while running:
        for i in tuple(running):
            block = next(streams[i], None)
            if block is None:
                running.remove(i)
            else:
                lengths[i] += len(block)
                parts[i] = np.concatenate([parts[i], block])
        ready = min((len(parts[i]) for i in running), default=max(map(len, parts)))
        if ready:
            yield np.concatenate([_fit(part[:ready], ready) for part in parts], axis=1), rate
            parts = [part[ready:] for part in parts]
    return lengths


def _read_file(path):
    """Yields (block, rate) as read_blocks does, of a file; returns its peak."""
    _check_file(path, "decoded")
    samples, rate, peak = 0, 0, 0.0
    blocks = _blocks(path)
    try:
        for block, rate in blocks:
            _check_rate(path, rate)
            samples += len(block)
            peak = max(peak, _peak(path, block))
            yield block, rate
    except OSError as error:
        raise UserError(f"{path} cannot be decoded: {_reason(error)}") from None
    except MemoryError:
        raise UserError(f"{path} cannot be decoded: not enough memory") from None
    finally:
        blocks.close()
    if not samples:
        raise UserError(f"{path} is empty: it holds no samples")
    if samples < MIN_SECONDS * rate:
        raise UserError(f"{path} is too short: {samples} samples at {rate} Hz")
    return peak


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


def _check_rate(path, rate):
    if not MIN_RATE <= rate <= MAX_RATE:
        raise UserError(f"{path} is damaged: its header claims a sample rate of {rate} Hz")


def _check_file(path, done):
    """UserError unless there is a file; a pipe with a clip's name would block forever."""
    if not Path(path).is_file():
        raise UserError(f"{path} cannot be {done}: there is no such file")


def _name(path):
    """A path as soundfile takes any: bytes, which on Windows are not those of all names."""
    return str(path) if os.name == "nt" else os.fsencode(path)


def _peak(path, block):
    """The largest absolute value of a block; UserError if it is NaN, infinite or above MAX_PEAK."""
    peak = max(block.max(), -block.min())
    if not np.isfinite(peak):
        raise UserError(f"{path} holds samples that are NaN or infinite")
    if peak > MAX_PEAK:
        raise UserError(f"{path} has samples of {peak:.3g} times full scale; scale it down")
    return peak


def _blocks(path):
    """(block, rate) of a file, from libsndfile, or from ffmpeg if libsndfile cannot open it."""
    check_size(path)
    try:
        file = soundfile.SoundFile(_name(path))
    except (soundfile.LibsndfileError, OSError) as error:
        yield from read_with_ffmpeg(path, _reason(error), block_samples=_block_samples)
        return
    if file.format == "RAW":  # libsndfile takes whatever is named .au or .snd for samples
        file.close()
        yield from read_with_ffmpeg(path, NO_HEADER, block_samples=_block_samples)
    elif file.format == "MP3" and not tells_mp3_length(path) and shutil.which("ffmpeg"):
        file.close()  # libsndfile may stop too early
        yield from read_with_ffmpeg(path, "its length is unknown", block_samples=_block_samples)
    else:
        yield from _read_with_libsndfile(path, file)


def _block_samples(rate, channels):
    """How many samples of each channel are read at a time."""
    return min(BLOCK_SECONDS * rate, max(1, MAX_BLOCK // channels))


def _read_with_libsndfile(path, file):
    """(block, rate) of an open file; UserError if its header promises more than there is."""
    size = _block_samples(file.samplerate, file.channels)
    samples, promised = 0, file.frames
    if promised >= UNKNOWN_LENGTH:
        promised, file.seekable = 0, lambda: False  # soundfile seeks after reading, which fails
    with file:
        while True:
            try:
                block = file.read(size, dtype="float32", always_2d=True)
            except soundfile.LibsndfileError as error:
                raise UserError(f"{path} cannot be decoded: {_reason(error)}") from None
            if not len(block):
                break
            samples += len(block)
            yield block, file.samplerate
    if samples < (1 - MAX_LOST) * promised:
        if file.format == "MP3" and not tells_mp3_length(path):  # promised is libsndfile's guess
            raise UserError(f"{path} cannot be decoded: its length is unknown; install ffmpeg")
        raise UserError(f"{path} is truncated: {samples} of {promised} samples are there")


def _reason(error):
    """libsndfile's or the system's own words, without the path again."""
    text = getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
    return "it holds no sound that can be read" if "File does not exist or" in text else text
