"""Files of any length -> stems -> windows, in memory that does not grow with the length.

A file is decoded in blocks and brought to Demucs' rate by one resampler that runs through all of
it, so that blocks leave no seams. Demucs works in windows that begin every `stride` samples and
fade into each other. A piece therefore begins and ends at multiples of the stride, and has so many
further strides on either side as one window can reach; of its stems only the middle is kept. The
kept parts, one after the other, are the stems that the whole file gives at once.
"""

import math
import subprocess
import tempfile
from dataclasses import dataclass

import numpy as np
import soundfile
import soxr
import torch

from stemgenre import audio
from stemgenre.errors import UserError

BLOCK_SECONDS = 10  # s of audio decoded at a time
PIECE_STRIDES = 16  # kept of a piece, per stride of margin: the margins cost an eighth
TAIL = 0.1  # of the step from window to window: so much at the end of a file may stay unseen
AU_HEADER = 24  # bytes


@dataclass(frozen=True)
class Piece:
    """A stretch of a file's wave (2, samples), of which [first, last) is to be kept.

    `origin` is the file's sample that it begins with. All in samples at Demucs' rate.
    """

    wave: torch.Tensor
    origin: int
    first: int
    last: int


def read_pieces(path, separator):
    """Yields the Pieces of an audio file, in order. Raises UserError as audio.decode does."""
    margin = int(1 / (1 - separator.overlap))  # strides that a window reaches into its neighbours
    waves = resampled(decoded(path), to_rate=separator.model.samplerate)
    return cut_pieces(waves, stride=separator.stride(), margin=margin, kept=PIECE_STRIDES * margin)


def decoded(path):
    """Yields (rate in Hz, float32 block (samples, 1 or 2)) of a file, full scale 1.

    Beyond stereo, the front left and right channels come first. Raises UserError, at the end at
    the latest, for what audio.decode refuses.
    """
    samples, peak = 0, 0.0
    for rate, block in _blocks(path):
        samples += len(block)
        peak = max(peak, audio.check_loudness(path, block))
        yield rate, block[:, :2]
    audio.check_content(path, samples=samples, rate=rate if samples else 0, peak=peak)


def _blocks(path):
    """(rate, block with all channels) of a file, by libsndfile or else by ffmpeg."""
    try:
        file = soundfile.SoundFile(str(path))
    except (soundfile.LibsndfileError, OSError) as error:
        yield from _ffmpeg_blocks(path, audio.reason(error))
        return
    samples = 0
    with file:
        while True:
            try:
                block = file.read(BLOCK_SECONDS * file.samplerate, dtype="float32", always_2d=True)
            except soundfile.LibsndfileError as error:
                raise UserError(f"{path} cannot be decoded: {audio.reason(error)}") from None
            if not len(block):
                break
            samples += len(block)
            yield file.samplerate, block
    audio.check_whole(path, samples=samples, promised=file.frames)


def _ffmpeg_blocks(path, reason):
    """(rate, block) of a file that only ffmpeg reads, from its output as it comes: .au."""
    with tempfile.TemporaryFile() as messages:
        try:
            process = subprocess.Popen(
                audio.ffmpeg_command(path), stdout=subprocess.PIPE, stderr=messages
            )
        except OSError:
            raise UserError(
                f"{path} cannot be decoded: {reason}; installing ffmpeg may help"
            ) from None
        try:
            header = process.stdout.read(AU_HEADER)
            if len(header) == AU_HEADER:
                _, offset, _, _, rate, channels = np.frombuffer(header, ">u4").tolist()
                process.stdout.read(offset - AU_HEADER)
                while data := process.stdout.read(BLOCK_SECONDS * rate * channels * 4):
                    samples = np.frombuffer(
                        data, ">f4", count=len(data) // (4 * channels) * channels
                    )
                    yield rate, samples.reshape(-1, channels).astype(np.float32)
            if process.wait():
                messages.seek(0)
                lines = messages.read().decode(errors="replace").strip().splitlines() or [reason]
                raise UserError(f"{path} cannot be decoded: {lines[-1]}")
        finally:
            process.stdout.close()
            process.kill()
            process.wait()


def resampled(blocks, *, to_rate):
    """Yields float32 waves (2, samples) at `to_rate` of (rate, block) one after the other.

    A single channel is doubled. Together they are what audio.resample makes of the whole wave.
    """
    stream, taken, given = None, 0, 0
    for rate, block in blocks:
        taken += len(block)
        if rate != to_rate:
            stream = stream or soxr.ResampleStream(rate, to_rate, block.shape[1], quality="HQ")
            block = stream.resample_chunk(np.ascontiguousarray(block))
        given += len(block)
        yield _stereo(block)
    if stream:
        rest = stream.resample_chunk(np.empty((0, block.shape[1]), np.float32), last=True)
        missing = math.ceil(taken * to_rate / rate) - given
        rest = rest[: max(0, missing)]
        yield _stereo(np.pad(rest, ((0, max(0, missing) - len(rest)), (0, 0))))


def _stereo(block):
    return torch.from_numpy(np.ascontiguousarray(block.T)).expand(2, -1)


def cut_pieces(waves, *, stride, margin, kept):
    """Yields Pieces of `kept` strides, with `margin` strides more on either side where there are.

    The last one is longer by up to the margin, so that none consists of a margin alone.
    """
    buffer = torch.empty(2, 0)
    origin = start = 0  # of the buffer; of what the next piece keeps
    for wave in waves:
        buffer = torch.cat([buffer, wave], dim=1)
        while origin + buffer.shape[1] > (end := start + (kept + margin) * stride):
            first, last = start - origin, start + kept * stride - origin
            yield Piece(buffer[:, : end - origin], origin, first, last)
            start += kept * stride
            cut = start - margin * stride - origin
            buffer, origin = buffer[:, cut:], origin + cut
    yield Piece(buffer, origin, start - origin, buffer.shape[1])


def kept_stems(piece, stems, *, from_rate, to_rate):
    """What is kept of a piece's stems (4, samples at to_rate), as the cache stores it: float16.

    Where a piece does not begin with a whole sample at to_rate, it is less than half of one off.
    """
    begin, first, last = (
        round((piece.origin + sample) * to_rate / from_rate)
        for sample in (0, piece.first, piece.last)
    )
    return stems[:, first - begin : last - begin].to("cpu", torch.float16)


class WindowCutter:
    """Cuts stems that come block by block into windows of `samples`, half overlapping.

    A file that is shorter gives one window as short as it is. The last window of a longer one ends
    with the file, unless all but a TAIL has been seen: a clip that is a little longer than a
    window gives one window, its beginning, which is what the training pipeline sees.
    """

    def __init__(self, samples):
        self.samples, self.step = samples, max(1, samples // 2)
        self.buffer, self.origin, self.next = torch.empty(4, 0), 0, 0

    def add(self, stems):
        """The windows [(first sample, stems)] that are whole with these further stems (4, n)."""
        self.buffer = torch.cat([self.buffer.to(stems.dtype), stems], dim=1)
        windows = []
        while self.origin + self.buffer.shape[1] >= self.next + self.samples:
            windows.append(self._window(self.next))
            self.next += self.step
        keep = max(0, self.next - self.step - self.origin)  # the last window may begin there
        self.buffer, self.origin = self.buffer[:, keep:], self.origin + keep
        return windows

    def finish(self):
        """The window that is left at the end of the file, as a list of one or none."""
        end = self.origin + self.buffer.shape[1]
        if self.next == 0:
            return [self._window(0)]
        unseen = end - (self.next - self.step + self.samples)
        return [self._window(end - self.samples)] if unseen > TAIL * self.step else []

    def _window(self, start):
        begin = start - self.origin
        return start, self.buffer[:, begin : begin + self.samples].clone()
