"""What grows with the number of clips: memory of separation, epoch overhead.

    python benchmarks/scale.py [--clips 100000] [--quick]

Separates 50 and 500 clips of one second with a tiny HTDemucs, each in a process of its own; and
iterates over the batches of an epoch of so many clips without network or files. benchmarks/start.py
has the check of the cache. The last line is one JSON object.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the scripts do
sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np
import pandas as pd
import soundfile
from separation import TINY, save_network

from stemgenre.features.augmentation import sample_params
from stemgenre.runtime import start_runtime
from stemgenre.separation.cache import StemCache
from stemgenre.separation.separate import separate_missing
from stemgenre.settings import AugmentSettings, load_settings
from stemgenre.training.stem_loader import epoch_batches


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=100_000)
    parser.add_argument("--quick", action="store_true", help="10,000 clips; 50 and 150 separated")
    parser.add_argument("--separate", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.separate:
        print(peak_of_separation(options.separate))
        return
    if options.quick:
        options.clips = 10_000
    few, many = 50, 150 if options.quick else 500
    overhead = epoch_overhead(options.clips)
    peaks = {count: separation_in_own_process(count) for count in (few, many)}
    result = {
        "clips": options.clips,
        "epoch_overhead_seconds": overhead,
        "separation_peak_gigabytes": peaks,
        "separation_peak_ratio": round(peaks[many] / peaks[few], 3),
    }
    print(json.dumps(result))


def epoch_overhead(count):
    """Seconds of an epoch's bookkeeping: order, batches, one sampling per clip."""
    clips = pd.DataFrame({"clip": [f"train_{i}" for i in range(count)], "target": 0})
    started = time.perf_counter()
    batches = epoch_batches(clips, batch_size=24, seed=1, epoch=1)
    order = time.perf_counter() - started
    for batch in batches:
        for i in batch:
            sample_params(AugmentSettings.from_config(), seed=1, epoch=1, clip_index=int(i))
    return {"order": round(order, 3), "sampling": round(time.perf_counter() - started - order, 3)}


def separation_in_own_process(count):
    command = [sys.executable, __file__, "--separate", str(count)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return float(done.stdout.splitlines()[-1])


def peak_of_separation(count):
    """Peak memory in GB of separating so many clips of one second."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        save_network(folder, {**TINY, "segment": 2})
        rng = np.random.default_rng(0)
        rows = []
        for i in range(count):
            path = folder / f"clip_{i}.wav"
            soundfile.write(path, rng.normal(0, 0.1, 22050), 22050)
            rows.append({"clip": path.stem, "path": path})
        settings = load_settings([f"SEPARATION_REPO={folder}", "DEVICE=cpu"])
        cache = StemCache(folder / "separated", model="htdemucs", sample_rate=22050)
        with start_runtime(settings.machine) as runtime:
            separate_missing(pd.DataFrame(rows), cache, settings, runtime)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


if __name__ == "__main__":
    main()
