"""Audio files -> cached stems: decoding ahead, Demucs in batches, writing behind.

A file of any length is separated in chunks, each by itself, so that memory does not grow with it.
Demucs works in windows that begin every `stride` samples and fade into each other. A chunk
therefore begins and ends at multiples of the stride, and has as many further strides on either side
as one window can reach; of its stems only the middle is kept. The kept parts, one after the other,
are the stems of the file. A clip of up to 100 s is a single chunk.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from stemgenre.data import audio
from stemgenre.data.find_files import paused_garbage_collector
from stemgenre.errors import ClipError, UserError
from stemgenre.prefetch import batch_values, prefetch_map
from stemgenre.runtime import Runtime, pinned, thread_count
from stemgenre.separation.cache import StemCache
from stemgenre.separation.decode import EndOfFile, decode_files, read_ahead
from stemgenre.separation.demucs_model import Separator
from stemgenre.separation.entry_writer import EntryWriter
from stemgenre.settings import STEMS, Settings

log = logging.getLogger(__name__)

KEPT_STRIDES = 16  # kept of a chunk, per stride of margin: the margins cost an eighth


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A section of a file's wave, (2, samples), of which [keep_start, keep_end) is kept.

    `origin` is the file's sample that it begins with. All in samples at Demucs' rate.
    """

    wave: torch.Tensor
    origin: int
    keep_start: int
    keep_end: int


def separate_files(
    files: Iterable[tuple[Any, Path]],
    separator: Separator,
    *,
    threads: int,
    device: torch.device | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Any, torch.Tensor | EndOfFile]]:
    """Yields (key, stems) for each (key, path), then (key, EndOfFile); files in order.

    Stems are float16 (4, samples) on `device`, by default the separator's, block after block. A
    file that cannot be decoded, or whose stems are NaN or infinite, ends with that error. Chunks
    of several files share a batch. Once `should_stop`, nothing more is read; a file that is then
    incomplete gets no EndOfFile. Raises UserError for what stops all files alike.
    """

    def read(path):
        for chunk in read_chunks(path, separator):
            yield dataclasses.replace(chunk, wave=pinned(chunk.wave, separator.device))

    depth = max(separator.micro_batch.size, threads)
    chunks = read_ahead(
        files,
        read,
        threads=threads,
        depth=depth,
        should_stop=should_stop,
    )
    separated = batch_values(
        chunks,
        Chunk,
        lambda batch: _separate_chunks(batch, separator, device or separator.device),
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


def _separate_chunks(chunks, separator, device):
    """[(stems, precision, whether finite)] of chunks, float16 as the cache stores them.

    They are on `device`, to which all of them are copied before the GPU is waited for.
    """
    rates = {"from_rate": separator.model.samplerate, "to_rate": separator.sample_rate}
    results = separator([chunk.wave for chunk in chunks])
    kept = [
        _keep(chunk, stems, **rates).half()
        for chunk, (stems, _) in zip(chunks, results, strict=True)
    ]
    finite = torch.stack([stems.isfinite().all() for stems in kept])
    kept = [stems.to(device, non_blocking=stems.is_cuda) for stems in kept]
    finite = finite.tolist()  # waits for all of these
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


def separate_missing(
    clips: pd.DataFrame,
    cache: StemCache,
    settings: Settings,
    runtime: Runtime,
    *,
    hash_source: Callable[[Path], str] | None = None,
) -> None:
    """Puts into `cache` every clip of `clips` (columns clip, path) that it does not hold yet.

    Songs whose stems are there, and all clips for a cache of the mix alone, are only decoded: then
    Demucs is not needed. Each process does its part of the clips. A clip that fails does not stop
    the others: all failures are named at the end in one UserError, and the good ones stay cached.
    `hash_source` gives the hashes of files where they are known already. Raises Interrupted, with
    what is done cached, if a stop was requested.
    """
    stems = cache.waves == STEMS
    name, done, failed = (
        ("stems", "separated", "clips could not be separated; the others are cached")
        if stems
        else ("clips", "decoded", "clips could not be decoded; the others are cached")
    )
    rows = clips.drop_duplicates("clip")[["clip", "path"]]
    with paused_garbage_collector():
        if runtime.is_main:  # another run may fill the cache while the ranks look
            is_missing = [_is_missing(cache, row, hash_source) for row in rows.itertuples()]
    is_missing = runtime.all_gather(is_missing if runtime.is_main else None)[0]
    todo = list(rows[np.array(is_missing, dtype=bool)].itertuples(index=False))
    if not todo:
        log.info("%s: all %d clips are cached in %s", name, len(clips), cache.folder)
        return
    to_decode = [row for row in todo if not stems or Path(row.path).is_dir()]
    to_separate = [row for row in todo if stems and not Path(row.path).is_dir()]
    _log_counts(cache, runtime, of=len(clips), decode=len(to_decode), separate=len(to_separate))
    runtime.status.stage("separation", total=len(todo))
    seconds = {row.clip: _seconds(row.path, settings.features.clip_seconds) for row in todo}
    _check_disk(sum(seconds.values()), cache)

    def part(rows):
        """This process's part of the clips: the longest first, so that all end together."""
        longest_first = sorted(rows, key=lambda row: -seconds[row.clip])
        return longest_first[runtime.rank :: runtime.world_size]

    threads, failures = thread_count(settings.machine), []
    if to_separate:  # before the decoding: loading it can fail
        separator = Separator(
            settings.separation, sample_rate=cache.sample_rate, device=runtime.device
        )
    if to_decode:
        failures += _decode_into(cache, part(to_decode), threads, runtime)
    if to_separate:
        failures += _separate_into(cache, part(to_separate), separator, threads, runtime)
    if runtime.sync_stop():
        raise runtime.interrupted(
            f"{name}: stopped; {done} clips stay cached, the same command resumes"
        )
    failures = [line for lines in runtime.all_gather(failures) for line in lines]
    if failures:
        raise UserError(
            f"{len(failures)} {failed}:\n" + "\n".join(f"    {line}" for line in failures)
        )


def _log_counts(cache, runtime, *, of, decode, separate):
    """Logs how many clips are to be decoded and to be separated."""
    if decode:
        name, are = (
            ("stems", "have their own, to be") if cache.waves == STEMS else ("clips", "are to be")
        )
        log.info("%s: %d of %d clips %s decoded into %s", name, decode, of, are, cache.folder)
    if separate:
        log.info(
            "stems: %d of %d clips are to be separated by %s on %s into %s",
            *(separate, of, cache.model, runtime.device, cache.folder),
        )


def _decode_into(cache, rows, threads, runtime):
    """Decodes the clips of `rows` into the cache; returns a line for each one that failed."""
    decode = functools.partial(
        decode_files, waves=cache.waves, sample_rate=cache.sample_rate, threads=threads
    )
    failures, _ = _write_entries(
        cache, rows, decode, runtime, threads=threads, pending=lambda: 4 * threads
    )
    return failures


def _separate_into(cache, rows, separator, threads, runtime):
    """Separates the clips of `rows` into the cache; returns a line for each one that failed."""
    separate = functools.partial(
        separate_files, separator=separator, threads=threads, device=torch.device("cpu")
    )
    failures, precisions = _write_entries(
        cache,
        rows,
        separate,
        runtime,
        threads=threads,
        pending=lambda: 4 * separator.micro_batch.size,
    )
    overflowed = precisions["float32"] if separator.half else 0
    if overflowed:
        log.warning("stems: half precision overflowed in %d clips: done in float32", overflowed)
    return failures


def _write_entries(cache, rows, process, runtime, *, threads, pending):
    """Caches what `process`, separate_files or decode_files, makes of the clips of `rows`.

    Returns (a line for each clip that failed, a Counter of the precisions). At most pending()
    writes wait for the disk.
    """
    failures, precisions, writes, writer = [], collections.Counter(), collections.deque(), None
    samples, started = 0, time.monotonic()
    hashes = {}  # of clips, from before they are decoded

    def hash_source(row):
        with contextlib.suppress(ClipError):  # it is gone: decoding it will say so
            hashes[row.clip] = cache.hash_source(row.path)

    def missing_clips():
        missing = (row for row in rows if _is_missing(cache, row))
        for row, hashed in prefetch_map(hash_source, missing, threads=threads, depth=threads):
            hashed.result()
            yield row, row.path

    results = process(missing_clips(), should_stop=lambda: bool(runtime.stop.signal_number))
    name = "stems" if cache.waves == STEMS else "clips"
    with (
        contextlib.closing(results),
        concurrent.futures.ThreadPoolExecutor(1) as pool,  # writes while the next are processed
        tqdm(total=len(rows), desc=name, unit="clip", disable=not runtime.is_main) as bar,
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
                precisions[value.precision] += 1
            if isinstance(value, EndOfFile):
                writer = None
                speed = samples / cache.sample_rate / (time.monotonic() - started)
                bar.set_postfix_str(f"{speed:.1f}x real time", refresh=False)
                bar.update()
                runtime.status.add_clips(runtime.world_size)
            while len(writes) > pending() or (writes and writes[0].done()):
                _finish(writes.popleft(), failures)
        for write in writes:
            _finish(write, failures)
    return failures, precisions


def _is_missing(cache, row, hash_source=None):
    """Whether a clip is still to be cached; another run can cache it before its turn."""
    try:
        return not cache.is_current(row.clip, row.path, hash_source=hash_source)
    except ClipError:
        return True  # its file is gone, which decoding it will say


def _finish(write, failures):
    """Waits for a write. Raises UserError if none can succeed: a full disk, say."""
    try:
        write.result()
    except ClipError as error:
        failures.append(str(error))


def _check_disk(seconds, cache):
    """Raises UserError, before any work, if the disk has no room for so many seconds of waves."""
    needed = seconds * cache.sample_rate * len(cache.waves) * 2  # bytes, of float16
    try:
        cache.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{cache.folder} cannot be created ({error.strerror}); "
            "set SEPARATION_CACHE_DIR to a folder that can"
        ) from None
    free = shutil.disk_usage(cache.folder).free
    log.info("cache: it takes %s of disk, %s are free", _size(needed), _size(free))
    if needed > free:
        raise UserError(
            f"{cache.folder} needs {_size(needed)}, {_size(free)} are free; "
            "free disk space or set SEPARATION_CACHE_DIR to another disk"
        )


def _size(num_bytes):
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def _seconds(path, otherwise):
    try:
        return audio.probe(path).seconds
    except UserError:
        return otherwise
