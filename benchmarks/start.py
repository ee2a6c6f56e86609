"""Seconds from the start of train.py to its first step, for clips that are all cached.

    python benchmarks/start.py [--clips 100000] [--repeats 5]

What is timed: finding the audio files, reading the masters and joining them, looking for leakage
and duplicates by content, the split, and the check of each clip's cache entry against its audio
file. Not timed: Python's imports, and what does not depend on the number of clips (the network,
the channel statistics of the first clips). Half of the clips are for training, half for the
submission. Files and entries are small, since their size does not matter, and in the system's
memory, as they are soon after they were written. The last line is one JSON object.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np
import soundfile
from tqdm import trange

import train
from stemgenre import cli
from stemgenre.data.source_hashes import SETTLED_SECONDS
from stemgenre.files import atomic_write
from stemgenre.runtime import start_runtime
from stemgenre.separation import cache
from stemgenre.settings import load_settings
from stemgenre.training import stem_loader

MAX_LINKS = 50_000  # to one file: the sources are the same few, the entries each their own


class Ready(Exception):  # noqa: N818 it is no error
    """Every clip is checked."""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="keeps the clips there for another time")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        words = [f"DATA_DIR={folder / 'data'}", f"OUTPUT_DIR={folder / 'out'}", "DEVICE=cpu"]
        words += ["SEPARATION_MODEL=m", "NUM_CLASSES=auto", "BACKBONE=cnn"]
        words += ["PRETRAINED=False", "FREEZE_STAGES=0"]
        settings = load_settings(words)
        if not (folder / "data").exists():
            write_competition(folder / "data", options.clips)
            write_entries(settings, options.clips)
        seconds_of_start(settings)  # with the imports
        seconds = [seconds_of_start(settings) for _ in range(options.repeats)]
    result = {"clips": options.clips, "cores": len(os.sched_getaffinity(0))}
    result |= {"seconds": round(statistics.median(seconds), 2)}
    result |= {"lowest": round(min(seconds), 2), "highest": round(max(seconds), 2)}
    print(json.dumps(result))


def write_competition(folder, count):
    """Masters and clips in the competition's layout."""
    names = {"train": count // 2, "test": count - count // 2}
    rows = {}
    for split, clips in names.items():
        sounds = folder / f"{split}_sound_1"
        sounds.mkdir(parents=True)
        rows[split] = [f"{split}_{i}.au\t{i % 2}" for i in range(clips)]
        for i in range(clips):
            path = sounds / f"{split}_{i}.au"
            if i % MAX_LINKS == 0:
                source = path
                wave = np.full(100, 0.1 if split == "train" else 0.2)
                soundfile.write(source, wave, 22050)
            else:
                path.hardlink_to(source)
    labels = ["label_name\tlabel_id", "a\t0", "b\t1"]
    (folder / "label_master.tsv").write_text("\n".join(labels))
    (folder / "train_master.tsv").write_text("\n".join(["file_name\tlabel_id", *rows["train"]]))
    (folder / "sample_submit.tsv").write_text("\n".join(rows["test"]))


def write_entries(settings, count):
    """An entry of the cache for each clip, written without waiting for the disk."""
    time.sleep(SETTLED_SECONDS + 0.5)  # hashes of younger files are not remembered
    cache.atomic_write = functools.partial(atomic_write, durable=False)
    entries, waves = cache.open_cache(settings), np.zeros((4, 100), np.float32)
    for i in trange(count, desc="writing the cache"):
        split, number = ("train", i) if i < count // 2 else ("test", i - count // 2)
        source = Path(settings.paths.data_dir) / f"{split}_sound_1" / f"{split}_{number}.au"
        entries.write(source.stem, waves, source)
    time.sleep(SETTLED_SECONDS + 0.5)


def seconds_of_start(settings):
    """Seconds of train.py from its arguments to where it would read the first stems."""

    def ready(*_, **__):
        raise Ready

    stem_loader.StemLoader.__init__ = ready
    with start_runtime(settings.machine) as runtime:
        started = time.perf_counter()
        try:
            train.run_competition(settings, runtime)
        except Ready:
            return time.perf_counter() - started
    raise AssertionError("train.py has not come to its first step")


if __name__ == "__main__":
    cli.log_to_console()
    main()
