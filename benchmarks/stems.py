"""Accuracy with the mix alone, with each stem alone, with all stems, and with mix and stems.

    python benchmarks/stems.py [--seeds 3] [--quick] [KEY=VALUE ...]     on the demo
    python benchmarks/stems.py --data data [--seeds 3] [KEY=VALUE ...]   on your competition

Each row of the table is train.py with another CHANNELS, in a process of its own. The network has
five input channels in all of them, CHANNELS in turn, and so as many weights; clips, split, order of
the clips and augmentation are the same for the same seed. Another seed is another split, too:
`against mix` compares within each seed. What follows +- is the standard deviation over the seeds;
divided by the square root of their number it is the standard error of the mean. --channels selects
rows, of which the first is what the others are compared with.

Limits. A split has few validation clips, 32 in the demo: an accuracy p has the standard error
sqrt(p (1 - p) / clips), which is printed below the table, and smaller differences mean nothing
without many seeds. The validation accuracy is that of the best epoch and therefore optimistic, in
all rows alike; the test accuracy, where the data has a test_master, is not. Seeds have most of
their training clips in common, so their deviation is smaller than that of independent data. The
demo's music is synthesised and its stems are the true ones: its results hold for the demo only.
The last line is one JSON object.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import pandas as pd

from stemgenre import cli
from stemgenre.errors import UserError
from stemgenre.settings import STEMS

TRAIN = Path(__file__).parents[1] / "train.py"
BOTH = ("mix", *STEMS)
CHANNELS = (*BOTH, ",".join(STEMS), ",".join(BOTH))
QUICK = ("CLIP_SECONDS=2", "IMG_SIZE=64", "EPOCHS=2")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="for every run")
    parser.add_argument("--data", type=Path, help="DATA_DIR of a competition (default: the demo)")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds, from SEED upwards")
    parser.add_argument("--channels", nargs="+", default=CHANNELS, metavar="CHANNELS")
    parser.add_argument("--out", type=Path, help="keep the runs' outputs, and the demo, there")
    parser.add_argument("--quick", action="store_true", help="2 epochs of 2 s clips at 64 pixels")
    args = parser.parse_intermixed_args()
    words = [*(QUICK if args.quick else ()), *args.settings]
    first_seed = cli.parse_settings(words, demo=not args.data).machine.seed
    seeds = range(first_seed, first_seed + args.seeds)
    with tempfile.TemporaryDirectory() as folder:
        folder = args.out or Path(folder)
        words = [f"DATA_DIR={args.data or folder / 'data'}", *words]
        words = words if args.data else ["--demo", *words]
        runs = [train(words, name, seed, folder) for seed in seeds for name in args.channels]
    print_table(pd.DataFrame(runs).astype({"test": float}))  # NaN where it is unknown
    print(json.dumps(summarise(runs)))


def train(words, channels, seed, folder):
    """Results of one train.py with these words. Raises UserError if it fails."""
    out = folder / f"{channels}-{seed}"
    words = [*words, f"CHANNELS={channels}", f"NUM_CHANNELS={len(BOTH)}"]
    words += [f"SEED={seed}", f"OUTPUT_DIR={out}"]
    command = [sys.executable, str(TRAIN), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        message = done.stderr[done.stderr.rfind("error: ") :].strip()
        raise UserError(f"train.py {' '.join(words)} failed with {done.returncode}:\n{message}")
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    result = {
        "valid": summary["valid_accuracy"],
        "test": summary["test_accuracy"],
        "epoch": summary["best_epoch"],
        "seconds": summary["seconds"]["training"],
    }
    print(f"seed {seed}, {channels}: {result}", flush=True)
    clips = {f"{split}_clips": summary["clips"][split] for split in ("valid", "test")}
    return {"channels": channels, "seed": seed, **result, **clips}


def print_table(runs):
    """Prints a row per CHANNELS: means over the seeds, +- standard deviations."""
    first = runs["channels"][0]
    base = runs[runs["channels"] == first].set_index("seed")
    for split in ("valid", "test"):
        runs[f"{split}_difference"] = runs[split] - runs["seed"].map(base[split])
    columns = {  # heading -> (column, digits)
        "validation": ("valid", 3),
        f"against {first}": ("valid_difference", 3),
        "test": ("test", 3),
        "test, against": ("test_difference", 3),
        "best epoch": ("epoch", 1),
        "training s": ("seconds", 0),
    }
    print(f"{'channels':<28}" + "".join(f"{heading:>18}" for heading in columns))
    for channels, rows in runs.groupby("channels", sort=False):
        cells = [mean_and_std(rows[name], digits) for name, digits in columns.values()]
        print(f"{channels:<28}" + "".join(f"{cell:>18}" for cell in cells))
    for split in ("valid", "test"):
        clips, accuracy = runs[f"{split}_clips"][0], runs[split].mean()
        if not math.isnan(accuracy):
            error = math.sqrt(accuracy * (1 - accuracy) / clips)
            print(f"{split}: {clips} clips, standard error of an accuracy about {error:.3f}")


def mean_and_std(values, digits):
    """A column's mean and standard deviation as text; "-" where it is unknown."""
    values = values.dropna()
    if values.empty:
        return "-"
    deviation = f" +- {values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{deviation}"


def summarise(runs):
    """All results as plain values: per CHANNELS a list in the order of the seeds."""
    return {
        "clips": {split: runs[0][f"{split}_clips"] for split in ("valid", "test")},
        "seeds": sorted({run["seed"] for run in runs}),
        "channels": {
            channels: {
                name: [run[name] for run in runs if run["channels"] == channels]
                for name in ("valid", "test", "epoch", "seconds")
            }
            for channels in dict.fromkeys(run["channels"] for run in runs)
        },
    }


if __name__ == "__main__":
    cli.run_script(main)
