"""What a stem is worth: the accuracy with the mix alone, with each stem alone, and with all four.

    python benchmarks/stems.py [--seeds 3] [--quick] [KEY=VALUE ...]     on the demo
    python benchmarks/stems.py --data data [--seeds 3] [KEY=VALUE ...]   on a competition of yours

Each line of the table is train.py in processes of its own, with another CHANNELS. The network has
four inputs in all of them, so it has as many weights; clips, split, order of the epochs and
augmentation of a seed are the same. Another seed is another split too: `against mix` compares
within each seed. What comes after +- is the standard deviation over the seeds.

What the table does not say. A split's validation clips are few, 32 in the demo: one accuracy has
the standard error sqrt(p (1 - p) / clips), which stands below the table, and differences within it
mean nothing without many seeds. The validation accuracy is that of the best epoch, so it is too
high, for all lines alike; the test accuracy, where the data has a test_master, is not. Seeds share
most of their training clips, so their spread is not that of fresh data. The demo's music is
synthesised and its stems are true ones: what it shows holds for the demo, not for music. The last
line is one JSON object.
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

import config
from stemgenre import demo, runtime
from stemgenre.errors import UserError
from stemgenre.settings import STEMS, load_settings

TRAIN = Path(__file__).parents[1] / "train.py"
CHOICES = ("mix", *STEMS, ",".join(STEMS))
QUICK = ("CLIP_SECONDS=2", "IMG_SIZE=64", "EPOCHS=2")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("knobs", nargs="*", metavar="KEY=VALUE", help="for every run of train.py")
    parser.add_argument("--data", type=Path, help="DATA_DIR of a competition; without it the demo")
    parser.add_argument("--seeds", type=int, default=1, help="SEED and the ones after it")
    parser.add_argument("--out", type=Path, help="keeps the runs' outputs there, and the demo")
    parser.add_argument("--quick", action="store_true", help="2 epochs of 2 s at 64 px")
    options = parser.parse_intermixed_args()
    knobs = [*(QUICK if options.quick else ()), *options.knobs]
    settings = load_settings(config, [*(() if options.data else demo.KNOBS), *knobs])
    seeds = range(settings.machine.seed, settings.machine.seed + options.seeds)
    with tempfile.TemporaryDirectory() as folder:
        folder = options.out or Path(folder)
        words = [f"DATA_DIR={options.data or folder / 'data'}", *knobs]
        words = words if options.data else ["--demo", *words]
        runs = [run(words, channels, seed, folder) for seed in seeds for channels in CHOICES]
    print_table(pd.DataFrame(runs).astype({"test": float}))  # NaN where it is not known
    print(json.dumps(result(runs)))


def run(words, channels, seed, folder):
    """The figures of one train.py with these `words`. Raises UserError if it fails."""
    out = folder / f"{channels}-{seed}"
    words = [*words, f"CHANNELS={channels}", f"SEED={seed}", f"OUTPUT_DIR={out}"]
    command = [sys.executable, str(TRAIN), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        told = done.stderr[done.stderr.rfind("error: ") :].strip()
        raise UserError(f"train.py {' '.join(words)} ended with {done.returncode}:\n{told}")
    found = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    figures = {"valid": found["valid_accuracy"], "test": found["test_accuracy"]}
    figures |= {"epoch": found["best_epoch"], "seconds": found["seconds"]["training"]}
    print(f"seed {seed}, {channels}: {figures}", flush=True)
    clips = {"valid_clips": found["clips"]["valid"], "test_clips": found["clips"]["test"]}
    return {"channels": channels, "seed": seed, **figures, **clips}


def print_table(runs):
    """Prints a line for each choice of channels: means over the seeds, +- standard deviations."""
    mix = runs[runs["channels"] == "mix"].set_index("seed")["valid"]
    runs = runs.assign(over_mix=runs["valid"] - runs["seed"].map(mix))
    heads = ("validation", "against mix", "test", "best epoch", "training s")
    print(f"{'channels':<24}" + "".join(f"{head:>18}" for head in heads))
    for channels, part in runs.groupby("channels", sort=False):
        cells = [spread(part[name], 3) for name in ("valid", "over_mix", "test")]
        cells += [spread(part["epoch"], 1), spread(part["seconds"], 0)]
        print(f"{channels:<24}" + "".join(f"{cell:>18}" for cell in cells))
    for name in ("valid", "test"):
        clips, share = runs[f"{name}_clips"][0], runs[name].mean()
        if not math.isnan(share):
            error = math.sqrt(share * (1 - share) / clips)
            print(f"{name}: {clips} clips, standard error of one accuracy near {error:.3f}")


def spread(values, digits):
    """A column's mean and standard deviation as text; "-" where it is not known."""
    values = values.dropna()
    if values.empty:
        return "-"
    deviation = f" +- {values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{deviation}"


def result(runs):
    """The figures of all runs as plain values, of each choice of channels in the seeds' order."""
    return {
        "clips": {name: runs[0][f"{name}_clips"] for name in ("valid", "test")},
        "seeds": sorted({run["seed"] for run in runs}),
        "channels": {
            channels: {
                figure: [run[figure] for run in runs if run["channels"] == channels]
                for figure in ("valid", "test", "epoch", "seconds")
            }
            for channels in CHOICES
        },
    }


if __name__ == "__main__":
    runtime.run_script(main)
