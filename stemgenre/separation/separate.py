"""Audio files -> stems: decoding ahead, Demucs in batches, writing behind.

A file of any length is separated in chunks, each by itself, so that memory does not grow with it.
Demucs works in windows that begin every `stride` samples and fade into each other. A chunk
therefore begins and ends at multiples of the stride, and has as many further strides on either side
as one window can reach; of its stems only the middle is kept. The kept parts, one after the other,
are the stems of the file. A clip of up to 100 s is a single chunk.
"""

import collections
import concurrent.futures
import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from stemgenre.data import audio
from stemgenre.errors import ClipError, UserError
from stemgenre.prefetch import batch_values, prefetch, prefetch_map
from stemgenre.runtime import Runtime, thread_count
from stemgenre.separation.cache import StemCache, StemSpool
from stemgenre.separation.demucs_model import Separator
from stemgenre.settings import STEMS, Settings

log = logging.getLogger(__name__)

KEPT_STRIDES = 16  # kept of a chunk, per stride of margin: the margins cost an eighth
READ_AHEAD = 2  # further chunks of a long file, decoded while another is separated


@dataclass(frozen=True)
class Chunk:
    """A section of a file's wave, (2, samples), of which [keep_start, keep_end) is kept.

    `origin` is the file's sample that it begins with. All in samples at Demucs' rate.
    """

    wave: torch.Tensor
    origin: int
    keep_start: int
    keep_end: int


@dataclass(frozen=True)
class EndOfFile:
    """Follows a file's last stems: their precision, or the error that the file ended with."""

    precision: str | None = None
    error: UserError | None = None


@dataclass
class _Source:
    """A file that is being separated."""

    key: Any
    path: Path
    precision: str | None = None
    error: UserError | None = None


def separate_files(
    files: Iterable[tuple[Any, Path]],
    separator: Separator,
    *,
    threads: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Any, torch.Tensor | EndOfFile]]:
    """Yields (key, stems) for each (key, path), then (key, EndOfFile); files in order.

    Stems are float16 (4, samples) on the separator's device, block after block of the file. A
    file that cannot be decoded, or whose stems are NaN or infinite, ends with that error. Chunks
    of several files share a batch. Once `should_stop`, nothing more is read; a file that is then
    incomplete gets no EndOfFile. Raises UserError for what stops all files alike.
    """
    chunks = _read_ahead(files, separator, threads, should_stop)
    separated = batch_values(
        chunks,
        Chunk,
        lambda batch: _separate_chunks(batch, separator),
        size=lambda: separator.micro_batch.size,
        alike=lambda chunk: separator.windows(chunk.wave.shape[1]),
    )
    with contextlib.closing(chunks), contextlib.closing(separated):
        for source, value in separated:
            if value is None:
                yield source.key, EndOfFile(source.precision, source.error)
                continue
            stems, precision, finite = value
            if not finite and not source.error:
                source.error = UserError(
                    f"separating {source.path} produced NaN or infinite samples; "
                    "remove or replace the file"
                )
            if not source.error:  # half precision in any part of it is half precision
                source.precision = min(precision, source.precision or precision)
                yield source.key, stems


def _read_ahead(files, separator, threads, should_stop):
    """Yields (_Source, Chunk) of each file, then (_Source, None).

    The beginnings of the next files are decoded in threads, a long file's further chunks in one.
    """

    def begin(item):
        chunks = read_chunks(item[1], separator)
        return next(chunks), chunks

    depth = max(separator.micro_batch.size, threads)
    with contextlib.closing(prefetch_map(begin, files, threads=threads, depth=depth)) as begun:
        for (key, path), future in begun:
            if should_stop():
                return
            source = _Source(key, path)
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


def _separate_chunks(chunks, separator):
    """[(stems, precision, whether finite)] of chunks, float16 as the cache stores them."""
    rates = {"from_rate": separator.model.samplerate, "to_rate": separator.sample_rate}
    results = separator([chunk.wave for chunk in chunks])
    kept = [
        _keep(chunk, stems, **rates).half()
        for chunk, (stems, _) in zip(chunks, results, strict=True)
    ]
    finite = torch.stack([stems.isfinite().all() for stems in kept]).tolist()
    precisions = [precision for _, precision in results]
    return list(zip(kept, precisions, finite, strict=True))


def _keep(chunk, stems, *, from_rate, to_rate):
    """What is kept of a chunk's stems (4, samples at to_rate).

    Where a chunk does not begin with a whole sample at to_rate, it is less than half of one off.
    """
    begin, start, end = (
        round((chunk.origin + sample) * to_rate / from_rate)
        for sample in (0, chunk.keep_start, chunk.keep_end)
    )
    return stems[:, start - begin : end - begin]


def read_chunks(path: Path, separator: Separator) -> Iterator[Chunk]:
    """Yields the Chunks of an audio file, in order. Raises UserError as audio.read_blocks does."""
    front = ((block[:, :2], rate) for block, rate in audio.read_blocks(path))  # of surround sound
    blocks = audio.resample_blocks(front, to_rate=separator.model.samplerate)
    margin = int(1 / (1 - separator.overlap))  # strides that a window reaches into its neighbours
    return _cut(blocks, separator.stride(), margin=margin, kept=KEPT_STRIDES * margin)


def _cut(blocks, stride, *, margin, kept):
    """Yields Chunks of `kept` strides, with `margin` strides more on either side where there are.

    The last one is longer by up to the margin, so that none consists of a margin alone.
    """
    buffer = torch.empty(2, 0)
    origin = start = 0  # of the buffer; of what the next chunk keeps
    for block in blocks:
        wave = torch.from_numpy(np.ascontiguousarray(block.T)).expand(2, -1)  # mono: duplicated
        buffer = torch.cat([buffer, wave], dim=1)
        while origin + buffer.shape[1] > (end := start + (kept + margin) * stride):
            keep_end = start + kept * stride - origin
            yield Chunk(buffer[:, : end - origin], origin, start - origin, keep_end)
            start += kept * stride
            cut = start - margin * stride - origin
            buffer, origin = buffer[:, cut:], origin + cut
    yield Chunk(buffer, origin, start - origin, buffer.shape[1])


class EntryWriter:
    """Writes a file's stems, as they come block by block, as one entry of the cache.

    A single block is held in memory; more of them are collected on the disk.
    """

    def __init__(
        self, cache: StemCache, clip: str, source: Path, *, source_sha256: str | None = None
    ) -> None:
        """`source_sha256` is the hash of `source` from before it was decoded."""
        self.cache, self.clip, self.source = cache, clip, source
        self.source_sha256 = source_sha256
        self.block: torch.Tensor | None = None
        self.spool: StemSpool | None = None
        self.is_out_of_memory = False

    def add(self, stems: torch.Tensor) -> None:
        """Takes in stems (4, samples) float16. Raises UserError if the disk is full."""
        try:
            if self.block is None:
                self.block = stems.cpu()
                return
            if self.spool is None:
                self.spool = StemSpool(self.cache)
                self.spool.add(self.block)
            self.spool.add(stems.cpu())
        except MemoryError:
            self.is_out_of_memory = True  # which finish() says

    def finish(self, precision: str) -> None:
        """Writes the entry.

        Raises ClipError and UserError as StemCache.write does, ClipError if memory runs out.
        """
        with contextlib.closing(self):
            made_by = {"precision": precision, "source_sha256": self.source_sha256}
            try:
                if self.is_out_of_memory:
                    raise MemoryError
                if self.spool:
                    self.spool.store(self.clip, self.source, **made_by)
                else:
                    self.cache.write(self.clip, self.block.numpy(), self.source, **made_by)
            except MemoryError:
                raise ClipError(
                    f"the stems of {self.source} cannot be stored: not enough memory"
                ) from None

    def close(self) -> None:
        """Frees the disk space of stems that were collected."""
        if self.spool:
            self.spool.close()


def separate_missing(
    clips: pd.DataFrame, cache: StemCache, settings: Settings, runtime: Runtime
) -> None:
    """Puts into `cache` every clip of `clips` (columns clip, path) that it does not hold yet.

    Each process separates its part of them. A clip that fails does not stop the others: all
    failures are named at the end in one UserError, and the good ones stay cached. Raises
    Interrupted, with what is separated cached, if a stop was requested.
    """
    todo = [row for row in clips.drop_duplicates("clip").itertuples() if _is_missing(cache, row)]
    runtime.all_gather(None)  # nobody writes before everybody has looked
    if not todo:
        log.info("stems: all %d clips are cached in %s", len(clips), cache.folder)
        return
    log.info(
        "stems: %d of %d clips are to be separated by %s on %s into %s",
        len(todo),
        len(clips),
        settings.separation.separation_model,
        runtime.device,
        cache.folder,
    )
    runtime.status.stage("separation", total=len(todo))
    seconds = [_seconds(row.path, settings.features.clip_seconds) for row in todo]
    _check_disk(sum(seconds), cache, settings.features)
    separator = Separator(
        settings.separation, sample_rate=settings.features.sr, device=runtime.device
    )
    longest_first = sorted(range(len(todo)), key=lambda i: -seconds[i])
    rows = [todo[i] for i in longest_first[runtime.rank :: runtime.world_size]]
    failures = _separate_into(cache, rows, separator, thread_count(settings.machine), runtime)
    if runtime.sync_stop():
        log.info("stems: stopped; separated clips stay cached, the same command resumes")
        raise runtime.interrupted()
    failures = [line for lines in runtime.all_gather(failures) for line in lines]
    if failures:
        raise UserError(
            f"{len(failures)} clips could not be separated; the others are cached:\n"
            + "\n".join(f"    {line}" for line in failures)
        )


def _separate_into(cache, rows, separator, threads, runtime):
    """Separates the clips of `rows` into the cache; returns a line for each one that failed."""
    failures, writes, writer = [], collections.deque(), None
    samples, overflowed, started = 0, 0, time.monotonic()
    hashes = {}  # of clips, from before they are decoded

    def missing_clips():
        for row in rows:
            if _is_missing(cache, row):
                with contextlib.suppress(ClipError):  # it is gone: decoding it will say so
                    hashes[row.clip] = cache.hash_source(row.path)
                yield row, row.path

    results = separate_files(
        missing_clips(),
        separator,
        threads=threads,
        should_stop=lambda: bool(runtime.stop.signal_number),
    )
    with (
        contextlib.closing(results),
        concurrent.futures.ThreadPoolExecutor(1) as pool,  # writes while the next are separated
        tqdm(total=len(rows), desc="stems", unit="clip", disable=not runtime.is_main) as bar,
    ):
        for row, value in results:
            writer = writer or EntryWriter(
                cache, row.clip, row.path, source_sha256=hashes.get(row.clip)
            )
            if not isinstance(value, EndOfFile):
                writes.append(pool.submit(writer.add, value))
                samples += value.shape[1]
            elif value.error:
                failures.append(str(value.error))
                writes.append(pool.submit(writer.close))
            else:
                writes.append(pool.submit(writer.finish, value.precision))
                overflowed += separator.half and value.precision == "float32"
            if isinstance(value, EndOfFile):
                writer = None
                speed = samples / separator.sample_rate / (time.monotonic() - started)
                bar.set_postfix_str(f"{speed:.1f}x real time", refresh=False)
                bar.update()
                runtime.status.add_clips(runtime.world_size)
            while len(writes) > 4 * separator.micro_batch.size or (writes and writes[0].done()):
                _finish(writes.popleft(), failures)
        for write in writes:
            _finish(write, failures)
    if overflowed:
        log.warning("stems: half precision overflowed in %d clips: done in float32", overflowed)
    return failures


def _is_missing(cache, row):
    """Whether a clip is still to be separated; another run can cache it before its turn."""
    try:
        return not cache.is_current(row.clip, row.path)
    except ClipError:
        return True  # its file is gone, which decoding it will say


def _finish(write, failures):
    """Waits for a write. Raises UserError if none can succeed: a full disk, say."""
    try:
        write.result()
    except ClipError as error:
        failures.append(str(error))


def _check_disk(seconds, cache, features):
    """Raises UserError, before any work, if the disk has no room for so many seconds of stems."""
    needed = seconds * features.sr * len(STEMS) * 2
    try:
        cache.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{cache.folder} cannot be created ({error.strerror}); "
            "set SEPARATION_CACHE_DIR to a folder that can"
        ) from None
    free = shutil.disk_usage(cache.folder).free
    log.info("stems: they take %.1f GB of disk, %.1f GB are free", needed / 1e9, free / 1e9)
    if needed > free:
        raise UserError(
            f"{cache.folder} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
            "free disk space or set SEPARATION_CACHE_DIR to another disk"
        )


def _seconds(path, otherwise):
    try:
        return audio.probe(path).seconds
    except UserError:
        return otherwise
