"""Clips -> stems in the cache: decoding ahead, Demucs in batches, writing behind."""

import collections
import concurrent.futures
import contextlib
import logging
import shutil
import time

import torch
from tqdm import tqdm

from stemgenre import audio
from stemgenre.cache import STEMS
from stemgenre.errors import ClipError, UserError
from stemgenre.prefetch import map_ahead
from stemgenre.runtime import worker_count
from stemgenre.separation import Separator

log = logging.getLogger(__name__)


def separate_missing(clips, cache, settings, runtime):
    """Puts into `cache` every clip of `clips` (columns clip, path) that it does not hold yet.

    Each process takes its share. A clip that fails does not stop the others: all failures are
    named at the end in one UserError, and the good ones stay cached.
    """
    todo = [
        row
        for row in clips.drop_duplicates("clip").itertuples()
        if not cache.is_current(row.clip, row.path)
    ]
    runtime.gather(None)  # nobody writes before everybody has looked
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
    seconds = [_seconds(row.path, settings.features.clip_seconds) for row in todo]
    _check_disk(sum(seconds), cache, settings.features)
    separator = Separator(
        settings.separation, sample_rate=settings.features.sr, device=runtime.device
    )
    workers = worker_count(settings.machine)
    share = _by_duration(todo, seconds)[runtime.rank :: runtime.world]
    failures = _separate(share, cache, separator, workers, runtime)
    if runtime.stop_requested():
        log.info(
            "stems: stopped; what is separated stays cached, the same command goes on from there"
        )
        raise runtime.interrupted()
    failures = [line for lines in runtime.gather(failures) for line in lines]
    if failures:
        raise UserError(
            f"{len(failures)} clips could not be separated; the others are cached:\n"
            + "\n".join(f"    {line}" for line in failures)
        )


def _by_duration(rows, seconds):
    """`rows`, the longest first: dealt out in turn, each process gets as much."""
    order = sorted(range(len(rows)), key=lambda i: -seconds[i])
    return [rows[i] for i in order]


def _check_disk(seconds, cache, features):
    """Raises UserError, before any work, if the disk has no room for so many seconds of stems."""
    needed = seconds * features.sr * len(STEMS) * 2
    try:
        cache.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{cache.folder} cannot be made ({error.strerror}); "
            "set SEPARATION_CACHE_DIR to a folder that can"
        ) from None
    free = shutil.disk_usage(cache.folder).free
    log.info("stems: they take %.1f GB of disk, %.1f GB are free", needed / 1e9, free / 1e9)
    if needed > free:
        raise UserError(
            f"{cache.folder} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
            "make room or set SEPARATION_CACHE_DIR to another disk"
        )


def _seconds(path, otherwise):
    try:
        return audio.probe(path).seconds
    except UserError:
        return otherwise


def _separate(rows, cache, separator, workers, runtime):
    """Separates the clips of `rows` into the cache; returns a line for each one that failed.

    Ends early, with what is finished written, when the runtime is asked to stop.
    """
    failures, writes = [], collections.deque()
    audio_seconds, started = 0.0, time.monotonic()
    with (
        contextlib.closing(_load_ahead(rows, cache, separator, workers, failures)) as loaded,
        concurrent.futures.ThreadPoolExecutor(1) as writer,
        tqdm(total=len(rows), desc="stems", unit="clip", disable=not runtime.is_main) as bar,
    ):
        for number, batch in enumerate(_batches(loaded, separator)):
            if number == 0 and separator.device.type == "cuda":
                separator.choose_precision(batch[0][1])
            clips, samples = len(batch), sum(wave.shape[-1] for _, wave in batch)
            writes += _start_writes(batch, cache, separator, writer)
            batch.clear()  # nor are the waves kept while the next ones are separated
            while len(writes) > 2 * separator.batch_size or (writes and writes[0].done()):
                _finish(writes.popleft(), failures)
            audio_seconds += samples / separator.model.samplerate
            speed = audio_seconds / (time.monotonic() - started)
            bar.set_postfix_str(f"{speed:.1f}x real time", refresh=False)
            bar.update(clips)
            if runtime.stop.signal_number:
                break
        for write in writes:
            _finish(write, failures)
    return failures


def _start_writes(batch, cache, separator, writer):
    """Separates a batch of (row, wave), and gives its stems to the writer: a future per clip."""
    stems = separate_fitting(separator, [wave for _, wave in batch])
    return [
        writer.submit(_write, cache, row, clip_stems)
        for (row, _), clip_stems in zip(batch, stems, strict=True)
    ]


def _write(cache, row, stems):
    """Fetches a clip's stems from the device, which meanwhile works on, and writes them."""
    cache.write(row.clip, stems.cpu().numpy(), row.path)


def _finish(write, failures):
    """Waits for a write. Raises UserError if none can succeed: a full disk, say."""
    try:
        write.result()
    except ClipError as error:
        failures.append(str(error))


def _load_ahead(rows, cache, separator, workers, failures):
    """Yields (row, wave) in order while others are decoded; failed clips go to `failures`.

    A clip that another run has put into the cache meanwhile is left out.
    """

    def load(row):
        return None if cache.is_current(row.clip, row.path) else separator.load(row.path)

    depth = max(separator.batch_size, workers)
    with contextlib.closing(map_ahead(load, rows, threads=workers, depth=depth)) as ahead:
        for row, future in ahead:
            try:
                wave = future.result()
            except UserError as error:
                failures.append(str(error))
                continue
            if wave is not None:
                yield row, wave


def _batches(loaded, separator):
    """Groups (row, wave) into batches of clips that take the same number of windows."""
    groups = {}
    for row, wave in loaded:
        windows = separator.windows(wave.shape[-1])
        group = groups.setdefault(windows, [])
        group.append((row, wave))
        if len(group) >= separator.batch_size:
            yield groups.pop(windows)
    yield from groups.values()


def separate_fitting(separator, waves):
    """The separator's stems of `waves`; the batch is halved for good when memory runs out."""
    try:
        return [
            stems
            for start in range(0, len(waves), separator.batch_size)
            for stems in separator(waves[start : start + separator.batch_size])
        ]
    except torch.OutOfMemoryError:
        if separator.batch_size == 1:
            raise UserError(
                "not even one clip's separation fits the card's memory; "
                "free the card or set DEVICE=cpu"
            ) from None
        separator.batch_size = max(1, min(separator.batch_size, len(waves)) // 2)
        log.warning("out of memory: Demucs now takes %d clips at once", separator.batch_size)
    torch.cuda.empty_cache()
    return separate_fitting(separator, waves)
