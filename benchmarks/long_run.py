"""A long training on a tiny data set: growth of memory and of open files.

    python benchmarks/long_run.py [--epochs 300]

The demo's network on twenty clips of half a second. Memory is the resident set (Linux:
/proc/self/statm) after each epoch; growth compares the mean of the last tenth with that of the
second tenth. Fonts are not counted among the open files: matplotlib keeps those that it has used, a
few at most. The last line is one JSON object.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import train
from stemgenre.demo.demo import write_demo
from stemgenre.runtime import start_runtime
from stemgenre.separation.cache import StemCache
from stemgenre.settings import load_settings
from stemgenre.training.trainer import Trainer

SETTINGS = (
    "SR=11025", "CLIP_SECONDS=0.5", "N_FFT=512", "HOP_LENGTH=256", "N_MELS=32", "IMG_SIZE=64",
    "PRETRAINED=False", "FREEZE_STAGES=8", "TEST_SIZE=0.5", "SEPARATION_MODEL=synthesised",
    "PATIENCE=100000",
)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds, memory, files = long_run(Path(folder), options)
    tenth = max(1, options.epochs // 10)
    early, late = statistics.mean(memory[tenth : 2 * tenth]), statistics.mean(memory[-tenth:])
    result = {
        "epochs": len(memory),
        "seconds": round(seconds, 1),
        "memory_mb": [round(early / 1e6, 1), round(late / 1e6, 1)],
        "growth_percent": round(100 * (late / early - 1), 2),
        "open_files": [files[0], files[-1]],
    }
    print(json.dumps(result))


def long_run(folder, options):
    """(seconds, bytes in RAM after each epoch, open files after each epoch)."""
    cache = StemCache(folder / "data" / "separated", model="synthesised", sample_rate=11025)
    amounts = {"train_per_genre": 2, "test_per_genre": 1, "seconds": 0.5, "sr": 11025}
    write_demo(folder / "data", seed=0, cache=cache, **amounts)
    memory, files, save = [], [], Trainer.save

    def watched(self):
        save(self)
        memory.append(memory_bytes())
        files.append(open_files())

    Trainer.save = watched
    words = [f"EPOCHS={options.epochs}", f"DEVICE={options.device}"]
    words += [f"DATA_DIR={folder / 'data'}", f"OUTPUT_DIR={folder / 'out'}"]
    settings = load_settings([*SETTINGS, *words])
    started = time.monotonic()
    with start_runtime(settings.machine) as runtime:
        train.run_competition(settings, runtime)
    return time.monotonic() - started, memory, files


def open_files():
    links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]  # noqa: PTH208
    targets = [link.readlink() for link in links if link.is_symlink()]
    return sum(target.suffix not in (".ttf", ".otf") for target in targets)


def memory_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
