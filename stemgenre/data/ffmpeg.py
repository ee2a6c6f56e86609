"""ffmpeg as a decoder of what libsndfile cannot open: a process that is read block by block."""

import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from stemgenre.errors import UserError

MAX_LOST = 0.02  # of a file: what a decoder may leave out without an error
FFMPEG_SECONDS = 60.0  # s that ffmpeg may take for a block
FFMPEG_CPU_SECONDS = 3600  # s that it may take for a file
AU_HEADER = 24  # bytes
# What ffmpeg may open: containers of sound, but no playlists, which lead to other files.
DEMUXERS = (
    "aac,ac3,aiff,amr,ape,asf,au,caf,dsf,eac3,flac,loas,matroska,mov,mp3,mpc,mpc8,mpeg,mpegts,"
    "ogg,tak,tta,voc,w64,wav,webm,wv"
)


def read_with_ffmpeg(
    path: Path | str, reason: str, *, block_samples: Callable[[int, int], int]
) -> Iterator[tuple[np.ndarray, int]]:
    """Yields (block, rate in Hz) of a file's first audio stream, (samples, channels) float32.

    `block_samples` gives a block's size for a rate and a number of channels; `reason` is why
    libsndfile does not read the file. Raises UserError if ffmpeg is not installed, fails, or gives
    nothing for FFMPEG_SECONDS.
    """
    if Path(path).stat().st_size == 0:
        raise UserError(f"{path} cannot be decoded: it is empty")
    if shutil.which("ffmpeg") is None:
        raise UserError(f"{path} cannot be decoded: {reason}; installing ffmpeg may help")
    with tempfile.TemporaryFile() as messages:
        process = subprocess.Popen(
            _command(path), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=messages,
            start_new_session=True,  # Ctrl-C is for the run, which ends ffmpeg itself
        )  # fmt: skip
        hung = threading.Event()

        def end():
            hung.set()
            process.kill()

        def read(size):
            timer = threading.Timer(FFMPEG_SECONDS, end)
            timer.daemon = True
            timer.start()
            try:
                return process.stdout.read(size)
            finally:
                timer.cancel()

        try:
            yield from _au_blocks(read, block_samples)
            failed = process.wait()
            if hung.is_set():
                reason = f"ffmpeg gave nothing for {FFMPEG_SECONDS:g} s"
            elif failed:
                messages.seek(0)
                lines = messages.read().decode(errors="replace").strip().splitlines()
                reason = lines[-1].removeprefix(f"file:{path}: ") if lines else reason
            if failed:
                raise UserError(f"{path} cannot be decoded: {reason}")
        finally:
            process.stdout.close()
            process.kill()
            process.wait()


def _command(path):
    """The command line that writes the first audio stream to stdout, as .au with float samples.

    The header of .au allows a length that is not known yet.
    """
    with_parent = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
    limits = ["-timelimit", str(FFMPEG_CPU_SECONDS), "-max_error_rate", str(MAX_LOST)]
    allowed = ["-protocol_whitelist", "file", "-format_whitelist", DEMUXERS]
    source = ["-i", f"file:{path}", "-map", "0:a:0"]
    output = ["-c:a", "pcm_f32be", "-f", "au", "-"]
    ffmpeg = ["ffmpeg", "-nostdin", "-v", "error", *limits, *allowed, *source, *output]
    return [*with_parent, *ffmpeg]


def _au_blocks(read, block_samples):
    """(block, rate) of the .au of 32-bit floats that `read(size in bytes)` reads."""
    header = read(AU_HEADER)
    if len(header) < AU_HEADER:
        return
    _, offset, _, _, rate, channels = np.frombuffer(header, ">u4").tolist()
    read(offset - AU_HEADER)
    frame = 4 * channels  # bytes
    while data := read(block_samples(rate, channels) * frame):
        block = np.frombuffer(data, ">f4", count=len(data) // frame * channels)
        yield block.reshape(-1, channels).astype(np.float32), rate
