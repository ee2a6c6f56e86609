"""A whole competition from files to submit.csv, with full-size networks of random weights.

    python benchmarks/competition.py [--clips 1000] [--epochs 50] [--size 600] [--quick]

Half of the clips are for training, half for the submission, 30 s each. They are synthesised music,
separated by an HTDemucs of full size. The last line is one JSON object:
`total_seconds` and, of each stage, `stage_seconds`.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the scripts do
sys.path.insert(0, str(Path(__file__).parents[1]))
import soundfile
from separation import save_network

import train
from stemgenre import cli
from stemgenre.demo.synth import GENRES, render
from stemgenre.runtime import start_runtime
from stemgenre.settings import load_settings

RENDERED = 20  # different clips; the others are links to them


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--size", type=int, default=600, help="IMG_SIZE")
    parser.add_argument("--seconds", type=float, default=30.0, help="length of a clip")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="40 clips of 6 s, 2 epochs at 64 px")
    options = parser.parse_args()
    if options.quick:
        options.clips, options.epochs, options.size, options.seconds = 40, 2, 64, 6.0
    cli.log_to_console()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        save_network(folder)
        write_competition(folder / "data", options)
        print(json.dumps(run(folder, options) | vars(options)))


def run(folder, options):
    """Seconds of train.py from the clips in `folder`/data, with its network, to `folder`/out."""
    words = [f"DATA_DIR={folder / 'data'}", f"OUTPUT_DIR={folder / 'out'}"]
    words += [f"SEPARATION_REPO={folder}", f"DEVICE={options.device}", "PRETRAINED=False"]
    words += [f"IMG_SIZE={options.size}", f"CLIP_SECONDS={options.seconds}"]
    words += [f"EPOCHS={options.epochs}", f"PATIENCE={options.epochs}"]
    settings = load_settings(words)
    started = time.perf_counter()
    with start_runtime(settings.machine) as runtime:
        train.run_competition(settings, runtime)
    total = time.perf_counter() - started
    seconds = json.loads((folder / "out" / "summary.json").read_text())["seconds"]
    return {"total_seconds": round(total, 1), "stage_seconds": seconds}


def write_competition(folder, options):
    """Masters and clips in the competition's layout."""
    sounds = {"train": folder / "train_sound_1", "test": folder / "test_sound_1"}
    for sound in sounds.values():
        sound.mkdir(parents=True)
    half = options.clips // 2
    paths = {name: [sounds[name] / f"{name}_{i}.au" for i in range(half)] for name in sounds}
    for name, split in paths.items():
        for i, path in enumerate(split):
            if i >= RENDERED:
                path.hardlink_to(split[i % RENDERED])
                continue
            genre, seed = GENRES[i % len(GENRES)], i + RENDERED * (name == "test")
            stems = render(genre, seed=seed, seconds=options.seconds)
            soundfile.write(path, stems.sum(0), 22050, format="AU", subtype="PCM_16")
    rows = [f"{path.name}\t{i % len(GENRES)}" for i, path in enumerate(paths["train"])]
    labels = [f"{genre}\t{i}" for i, genre in enumerate(GENRES)]
    sample = [f"{path.name}\t0" for path in paths["test"]]
    write_lines(folder / "train_master.tsv", ["file_name\tlabel_id", *rows])
    write_lines(folder / "label_master.tsv", ["label_name\tlabel_id", *labels])
    write_lines(folder / "sample_submit.tsv", sample)


def write_lines(path, lines):
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
