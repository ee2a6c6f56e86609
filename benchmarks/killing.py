"""Real runs of `python train.py --demo`, killed at random moments and resumed.

    python benchmarks/killing.py --times 50 [--epochs 3] [--jobs 2] [--seed 0]

Clips of 2 seconds, half of them for validation, one thread per run, a checkpoint every three
seconds: a run takes about 20 seconds on an idle core. Each trial begins from scratch in the folder
of an older, finished run with other settings. It is killed by SIGKILL once, at a random moment
within the length of an uninterrupted run, and resumed with RESUME_FROM_CHECKPOINT=True; without a
checkpoint of its own, that must be refused, and it begins from scratch again. It is equal if
weights, best weights, metrics without seconds and submit.csv are those of an uninterrupted run in
an empty folder, bit for bit. Work lost is the time from the last checkpoint to the kill; without
one, from the start. The last line is one JSON object.
"""

import argparse
import concurrent.futures
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from stemgenre.training import checkpoint

ROOT = Path(__file__).parents[1]
SETTINGS = (
    "CLIP_SECONDS=2", "TEST_SIZE=0.5", "IMG_SIZE=64", "FREEZE_STAGES=6", "CHECKPOINT_MINUTES=0.05",
    "DEVICE=cpu",
)  # fmt: skip
OLDER = ("LR=3e-3", "EPOCHS=2")  # of the run that has used each trial's folder before


@dataclass(frozen=True)
class Trial:
    """One run: killed after so many seconds, with so many seconds of work lost.

    `left` is what the kill left: the "older" run's checkpoint in its place, "none", or its "own".
    """

    killed_after: float
    lost: float
    left: str
    equal: bool


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--times", type=int, default=50, help="number of killed runs")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trials, seconds = kill_runs(Path(folder), options)
    equal = sum(trial.equal for trial in trials)
    with_checkpoint = [trial.lost for trial in trials if trial.left == "own"]
    print(f"{equal} of {len(trials)} ended equal to the uninterrupted run of {seconds:.1f} s")
    most, saved = max(trial.lost for trial in trials), max(with_checkpoint, default=0)
    print(f"most work lost: {most:.1f} s; of a run that had saved a checkpoint: {saved:.1f} s")
    result = {
        "times": len(trials),
        "equal": equal,
        "most_lost_seconds": round(most, 1),
        "most_lost_seconds_with_checkpoint": round(saved, 1),
        "killed_with_checkpoint": len(with_checkpoint),
        "killed_before_the_first": sum(trial.left == "none" for trial in trials),
        "killed_before_the_data_was_read": sum(trial.left == "older" for trial in trials),
        "run_seconds": round(seconds, 1),
    }
    print(json.dumps(result))


def kill_runs(folder, options):
    """(the Trials, seconds of an uninterrupted run)."""
    settings = [*SETTINGS, f"DATA_DIR={folder / 'data'}", f"EPOCHS={options.epochs}"]
    finish(settings, folder / "first")  # makes the demo, too
    older = folder / "older"
    finish([*settings, *OLDER], older)
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        outs = [folder / f"uninterrupted_{number}" for number in range(options.jobs)]
        seconds = min(pool.map(lambda out: finish(settings, out), outs))
        expected = result(folder / "first")
        if not all(is_equal(result(out), expected) for out in outs):
            raise SystemExit("uninterrupted runs differ from each other")
        waiting = [
            pool.submit(kill_and_finish, settings, older, out, seconds, options.seed + number)
            for number, out in enumerate(folder / str(number) for number in range(options.times))
        ]
        trials = []
        for future in concurrent.futures.as_completed(waiting):
            out, trial = future.result()
            trial = Trial(**trial, equal=is_equal(result(out), expected))
            shutil.rmtree(out)
            trials.append(trial)
            print(f"{len(trials)} {trial}", flush=True)
    return trials, seconds


def start(settings, out, *, resume=False):
    """train.py's process."""
    command = [sys.executable, "train.py", "--demo", *settings, f"OUTPUT_DIR={out}"]
    return subprocess.Popen(
        [*command, f"RESUME_FROM_CHECKPOINT={resume}"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(settings, out, *, resume=False):
    """Runs to the end and returns the seconds it took."""
    started = time.monotonic()
    process = start(settings, out, resume=resume)
    errors = process.communicate()[1]
    if process.returncode:
        raise SystemExit(f"{out} ended with {process.returncode}: {errors}")
    return time.monotonic() - started


def kill_and_finish(settings, older, out, seconds, seed):
    """Kills a run within `seconds` of its start and finishes it: (out, fields of a Trial)."""
    rng = random.Random(seed)
    while True:
        shutil.copytree(older, out)
        moment, started = rng.uniform(0, seconds), time.time()
        process = start(settings, out)
        try:
            process.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            killed = time.time()
            process.communicate()
        if process.returncode == -signal.SIGKILL:
            break
        shutil.rmtree(out)  # it had ended before
    path = out / "checkpoint.pth"
    if not path.exists():
        left, saved = "none", started
        expect_refusal(settings, out)
    elif path.read_bytes() == (older / path.name).read_bytes():
        left, saved = "older", started  # it had not come to its first step: nothing to resume
    else:
        left, saved = "own", path.stat().st_mtime
    finish(settings, out, resume=left == "own")
    if list(out.glob("*older*")):
        raise SystemExit(f"{out} still has a checkpoint of the older run")
    return out, {"killed_after": round(moment, 1), "lost": killed - saved, "left": left}


def expect_refusal(settings, out):
    """Resumes a run without a checkpoint of its own, which has to end in one line."""
    process = start(settings, out, resume=True)
    errors = process.communicate()[1]
    if process.returncode != 2 or "there is no checkpoint" not in errors:
        raise SystemExit(f"{out} was resumed without a checkpoint: {errors}")


def result(out):
    """Weights, best weights, metrics without the seconds, submission."""
    weights = checkpoint.load(out / "checkpoint.pth", "checkpoint")["weights"]
    best = checkpoint.load(out / "best_model.pth", "model")["weights"]
    metrics = pd.read_csv(out / "metrics.csv").drop(columns=["seconds", "run_id"])
    return [weights, best], metrics, (out / "submit.csv").read_bytes()


def is_equal(found, expected):
    """Whether two results are the same, bit for bit."""
    pairs = zip(found[0], expected[0], strict=True)
    same = all(
        left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
        for left, right in pairs
    )
    return same and found[1].equals(expected[1]) and found[2] == expected[2]


if __name__ == "__main__":
    main()
