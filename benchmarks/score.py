"""What each lever does to the score: cross-validated runs, compared clip by clip.

    python benchmarks/score.py --data data/groove --folds 5 --seeds 2 --base "CHANNELS=mix"
    python benchmarks/score.py --data data/groove MIXUP_ALPHA=0.4 "CLIP_SECONDS=4 TTA=4"

Runs train.py with config.py's settings (plain), then with each lever (one argument of one or
several KEY=VALUE; without any, those of LEVERS), then with recipes/strong.py, all on the same folds
and with the settings of --base. Accuracies are out-of-fold. A difference is the mean over clips of
(correct with the lever) - (correct in plain); its standard error is that of this mean, over groups
of clips where train_master has a column `group`. Where a test_master has the labels of the test
clips, test accuracies are compared clip by clip, too. The cost is the seconds per epoch, as a
multiple of plain's. A run that is finished is not repeated, one that was stopped is resumed: it
takes hours. The last line is one JSON object.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[1]))
from stemgenre.data.find_files import find_master
from stemgenre.data.tables import read_master

ROOT = Path(__file__).parents[1]
LEVERS = (
    "SEEDS=3", "TTA=4", "EMA_DECAY=0.99", "MIXUP_ALPHA=0.4", "LABEL_SMOOTHING=0.1",
    "WARMUP_EPOCHS=3", "STEM_GAIN_DB=6", "STEM_DROPOUT=0.1", "STEM_SWAP=0.2", "BEST_BY=last",
    "CLASS_WEIGHTS=True", "CHANNELS=mix", "CHANNELS=mix,vocals,drums,bass,other", "BACKBONE=cnn",
    "BACKBONE=mobilenet_v3_small", "AUGMENT_PROBABILITY=0",
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """A finished run: which clips are predicted correctly, by file name, out-of-fold and test."""

    correct: pd.Series
    test_correct: pd.Series | None  # None where the test labels are unknown
    epoch_seconds: float


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="DATA_DIR of all runs")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--base", default="", help="KEY=VALUE and settings files of all runs")
    parser.add_argument("--out", type=Path, default=Path("runs/score"), help="folder of the runs")
    parser.add_argument("--no-strong", action="store_true", help="without recipes/strong.py")
    parser.add_argument("levers", nargs="*", help="KEY=VALUE, or several in one argument")
    options = parser.parse_args()
    common = [f"DATA_DIR={options.data}", f"FOLDS={options.folds}", f"SEEDS={options.seeds}"]
    runs = {"plain": options.base.split()}
    for lever in options.levers or LEVERS:
        runs[lever] = [*options.base.split(), *lever.split()]
    if not options.no_strong:
        runs["strong"] = [*options.base.split(), "recipes/strong.py"]
    groups, test_ids = groups_of(options.data), test_labels(options.data)
    results, rows = {}, {}
    for name, words in runs.items():
        print(f"\n== {name}", flush=True)
        folder = options.out / folder_name(name)
        results[name] = finished_run(folder, [*common, *words], test_ids)
        rows[name] = compare(results[name], results["plain"], groups)
        print(table(rows), flush=True)
    found = {"data": str(options.data), "folds": options.folds, "seeds": options.seeds,
             "base": options.base, "plain": rows["plain"]["accuracy"], "runs": rows}  # fmt: skip
    if "strong" in rows:
        found["strong"] = rows["strong"]["accuracy"]
        found |= {key: rows["strong"][key] for key in ("difference", "standard_error")}
    print(json.dumps(found))


def folder_name(name):
    """A run's folder for the text of its lever."""
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name)


def finished_run(folder, words, test_ids):
    """The Result of train.py with the settings `words`, which is run or resumed if need be."""
    command = [sys.executable, str(ROOT / "train.py"), *words, f"OUTPUT_DIR={folder}"]
    order, done = folder / "words.json", folder / "summary.json"
    if order.exists() and json.loads(order.read_text()) != words:
        sys.exit(f"{folder} has a run with other settings; delete it, or name another --out")
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        resume = any(folder.rglob("checkpoint.pth"))
        order.write_text(json.dumps(words))
        subprocess.run([*command, f"RESUME_FROM_CHECKPOINT={resume}"], cwd=ROOT, check=True)
    found = pd.read_csv(next(folder.glob("*_predictions.csv")), dtype=str)
    correct = (found["label"] == found["predicted"]).set_axis(found["file_name"])
    metrics = [pd.read_csv(path) for path in folder.rglob("metrics.csv")]
    seconds = float(np.median(pd.concat(metrics)["seconds"]))
    if test_ids is None:
        return Result(correct, None, seconds)
    submit = pd.read_csv(folder / "submit.csv", sep="\t", header=None, index_col=0, dtype=str)[1]
    return Result(correct, submit == test_ids[submit.index], seconds)


def test_labels(data):
    """The label ids of test_master by file name; None without one."""
    path = find_master(data, "test_master")
    if path is None:
        return None
    return read_master(path, ("file_name", "label_id")).set_index("file_name")["label_id"]


def groups_of(data):
    """{file name: group} of train_master's column `group`; None without one."""
    path = find_master(data, "train_master")
    if path is None:
        return None
    master = read_master(path, ("file_name",), optional="group")
    if "group" not in master:
        return None
    return dict(
        zip(
            master["file_name"],
            master["group"].mask(master["group"] == "", master["file_name"]),
            strict=True,
        )
    )


def compare(result, plain, groups):
    """A row of the table: accuracies, their differences to plain with standard errors, cost."""
    row = {
        "accuracy": float(result.correct.mean()),
        "cost": result.epoch_seconds / plain.epoch_seconds,
    }
    row |= paired(result.correct, plain.correct, groups)
    if result.test_correct is not None:
        found = paired(result.test_correct, plain.test_correct, None)
        row["test_accuracy"] = float(result.test_correct.mean())
        row |= {f"test_{key}": value for key, value in found.items()}
    return row


def paired(correct, plain, groups):
    """The mean difference of two runs over the same clips, and its standard error over groups."""
    difference = correct.astype(float) - plain[correct.index].astype(float)
    clusters = difference.index if groups is None else [groups[name] for name in difference.index]
    centred = (difference - difference.mean()).groupby(list(clusters)).sum()
    count = len(centred)
    error = np.sqrt((centred**2).sum() * count / max(1, count - 1)) / len(difference)
    return {"difference": float(difference.mean()), "standard_error": float(error)}


def table(rows):
    """The rows so far as a table in Markdown."""
    lines = ["| run | out-of-fold | difference to plain | test | difference to plain | cost |",
             "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for name, row in rows.items():
        cells = [name, f"{row['accuracy']:.3f}", difference_text(row, "")]
        if "test_accuracy" in row:
            cells += [f"{row['test_accuracy']:.3f}", difference_text(row, "test_")]
        else:
            cells += ["-", "-"]
        lines.append(f"| {' | '.join(cells)} | {row['cost']:.2f} |")
    return "\n".join(lines)


def difference_text(row, prefix):
    return f"{row[prefix + 'difference']:+.3f} ± {row[prefix + 'standard_error']:.3f}"


if __name__ == "__main__":
    main()
