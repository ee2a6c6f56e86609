"""Clips -> waves at SR without Demucs; and how files are read ahead, with it or without."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stemgenre.data import audio
from stemgenre.errors import UserError
from stemgenre.prefetch import prefetch, prefetch_map
from stemgenre.settings import STEMS

BLOCK_SECONDS = 60  # s: a clip is a single block, a file of hours takes no more memory
READ_AHEAD = 2  # further chunks of a long file, decoded while another is processed


@dataclass(frozen=True)
class EndOfFile:
    """Follows a file's last waves: their precision, or the error that the file ended with."""

    precision: str | None = None
    error: UserError | None = None


@dataclass
class Source:
    """A file that is being read."""

    key: Any
    path: Path
    precision: str | None = None
    error: UserError | None = None


def decode_files(
    files: Iterable[tuple[Any, Path]],
    *,
    waves: tuple[str, ...],
    sample_rate: int,
    threads: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Any, torch.Tensor | EndOfFile]]:
    """Yields (key, waves) for each (key, path), then (key, EndOfFile); files in order.

    `waves` are those of a StemCache: MIX of any clip, or STEMS of songs. They are float16 (waves,
    samples) at `sample_rate`, block after block. Files are decoded in threads. One that cannot be
    decoded ends with that error. Once `should_stop`, nothing more is read; a file that is then
    incomplete gets no EndOfFile.
    """

    def read(path):
        return read_waves(path, waves, sample_rate)

    blocks = read_ahead(files, read, threads=threads, depth=threads, should_stop=should_stop)
    with contextlib.closing(blocks):
        for source, block in blocks:
            if block is None:
                block = EndOfFile(None if source.error else "float32", source.error)
            yield source.key, block


def read_waves(path: Path, waves: tuple[str, ...], sample_rate: int) -> Iterator[torch.Tensor]:
    """Yields a clip's waves, each mono, (waves, about BLOCK_SECONDS) float16 at `sample_rate` Hz.

    Of more than two channels the first two are used, as for the separation. Raises UserError as
    audio.read_blocks and audio.read_stem_blocks do, and for samples that float16 cannot hold.
    """
    if waves == STEMS:
        blocks = audio.read_stem_blocks(path)
    else:
        blocks = ((b[:, :2].mean(1, keepdims=True), rate) for b, rate in audio.read_blocks(path))
    held, samples = [], 0
    for block in audio.resample_blocks(blocks, to_rate=sample_rate):
        held.append(block)
        samples += len(block)
        if samples >= BLOCK_SECONDS * sample_rate:
            yield _to_half(held, path)
            held, samples = [], 0
    if samples:
        yield _to_half(held, path)


def _to_half(blocks, path):
    """Blocks (samples, waves) as one tensor (waves, samples) float16."""
    waves = torch.from_numpy(np.ascontiguousarray(np.concatenate(blocks).T)).half()
    if not waves.isfinite().all():
        raise UserError(f"{path} has samples above 65504 times full scale; scale it down")
    return waves


def read_ahead(
    files: Iterable[tuple[Any, Path]],
    read: Callable[[Path], Iterator],
    *,
    threads: int,
    depth: int,
    should_stop: Callable[[], bool],
) -> Iterator[tuple[Source, Any]]:
    """Yields (Source, chunk) of what `read` yields for each file, then (Source, None).

    The beginnings of the next `depth` files are read in threads, a long file's further chunks in
    one. A UserError becomes the Source's error; the other files continue.
    """

    def begin(item):
        chunks = read(item[1])
        return next(chunks), chunks

    with contextlib.closing(prefetch_map(begin, files, threads=threads, depth=depth)) as begun:
        for (key, path), future in begun:
            if should_stop():
                return
            source = Source(key, path)
            try:
                chunk, rest = future.result()
                yield source, chunk
                with contextlib.closing(prefetch(rest, depth=READ_AHEAD)) as further:
                    for chunk in further:
                        if should_stop():
                            return
                        if source.error:
                            break
                        yield source, chunk
            except UserError as error:
                source.error = error
            except MemoryError:
                source.error = UserError(f"{path} cannot be decoded: not enough memory")
            yield source, None
