"""How long eda.py takes for 1,000 clips, and which duplicates it finds.

    python benchmarks/eda.py [--clips 1000] [--repeats 3] [--music FOLDER]

Most clips are synthesised, 30 s at 22.05 kHz. A tenth are altered cuts: the later parts of other
clips, from up to 20 s on, 6 dB softer or louder, half of them encoded as mp3. One half of all is to
train on, the other one to test. With --music, a folder of real clips in the competition's layout
with a provenance.tsv (file_name, source, start_seconds), these are included, whole and as altered
cuts. The last line is one JSON object; a pair that overlaps by 10 s or more and is not found counts
as missed.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that synthesise the clips
sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np
import pandas as pd
import soundfile

from stemgenre.data import audio
from stemgenre.demo.styles import GENRES
from stemgenre.demo.synth import render

ROOT = Path(__file__).parents[1]
SR, SECONDS = 22050, 30.0
MAX_TRIM = 20.0  # s from the beginning of a clip to its cut: they overlap by 10 s at least
MIN_OVERLAP = 10.0  # s of two clips, from which they have to be found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--music", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        clips = make_clips(folder / "data", options.clips, options.music)
        seconds_of_eda(folder)  # reads Python's packages from the disk
        again = seconds_of_eda(folder)
        seconds = []
        for _ in range(options.repeats):
            shutil.rmtree(folder / "eda")
            seconds.append(seconds_of_eda(folder))
        found = pd.read_csv(folder / "eda" / "duplicates.csv")
    result = {
        "clips": len(clips),
        "cores": len(os.sched_getaffinity(0)),
        "seconds": round(statistics.median(seconds), 1),
        "lowest": round(min(seconds), 1),
        "highest": round(max(seconds), 1),
        "seconds_with_cached_statistics": round(again, 1),
    }
    print(json.dumps(result | evaluate(clips, found)))


def seconds_of_eda(folder):
    """Seconds of one run of eda.py, in a process of its own with all cores."""
    command = ["eda.py", f"DATA_DIR={folder / 'data'}", f"EDA_DIR={folder / 'eda'}", "DEVICE=cpu"]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    started = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT, env=environment)
    return time.perf_counter() - started


def make_clips(folder, count, music):
    """Writes `count` clips as a competition; a table of their names, recordings and starts."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    clips = real_clips(folder, music) if music else []
    num_songs = count - count // 10 - len(clips)
    with ProcessPoolExecutor() as pool:
        clips += pool.map(make_song, [folder] * num_songs, range(num_songs), chunksize=8)
    for number in range(count // 10):
        clips.append(altered_cut(folder, clips[number % len(clips)], number, rng))
    rows = [f"{clip['name']}\t{number % 2}\n" for number, clip in enumerate(clips)]
    half = len(rows) // 2  # for training, the others for the submission
    (folder / "train_master.tsv").write_text("file_name\tlabel_id\n" + "".join(rows[:half]))
    (folder / "sample_submit.tsv").write_text("".join(rows[half:]))
    (folder / "label_master.tsv").write_text("label_name\tlabel_id\na\t0\nb\t1\n")
    return pd.DataFrame(clips)


def make_song(folder, number):
    wave = render(GENRES[number % len(GENRES)], seed=number, seconds=SECONDS, sr=SR).sum(axis=0)
    soundfile.write(folder / f"song_{number}.au", wave, SR, subtype="PCM_16")
    return {"name": f"song_{number}.au", "source": number, "start": 0.0, "stop": SECONDS}


def real_clips(folder, music):
    """Links to the real clips below `folder`, and where they come from."""
    paths = {path.name: path for path in music.rglob("*.au")}
    clips = []
    for row in pd.read_csv(music / "provenance.tsv", sep="\t").itertuples():
        (folder / row.file_name).symlink_to(paths[row.file_name].resolve())
        stop = row.start_seconds + audio.probe(paths[row.file_name]).seconds
        origin = {"source": row.source, "start": row.start_seconds, "stop": stop}
        clips.append({"name": row.file_name, **origin})
    return clips


def altered_cut(folder, clip, number, rng):
    """A new clip, the later part of another: 6 dB softer or louder, every second as mp3."""
    wave, rate = audio.decode(folder / clip["name"])
    trim = rng.uniform(0, MAX_TRIM)
    wave = wave[0, round(trim * rate) :] * (2 if number % 4 < 2 else 0.5)
    name = f"cut_{number}.{'mp3' if number % 2 else 'au'}"
    soundfile.write(folder / name, np.clip(wave, -1, 1), rate)
    return {**clip, "name": name, "start": clip["start"] + trim}


def evaluate(clips, found):
    """The numbers of pairs that overlap, are missed and are false; the errors of the offsets."""
    offsets = {}  # (first name, second name) -> s into the first at which the second begins
    for row in found.itertuples():
        offsets[row.first, row.second] = row.offset_seconds
        offsets[row.second, row.first] = -row.offset_seconds
    result = {"pairs": 0, "missed": 0, "pairs_found": len(found), "false": 0}
    errors = []
    for first, second in itertools.combinations(clips.to_dict("records"), 2):
        offset = offsets.get((first["name"], second["name"]))
        if first["source"] != second["source"]:
            result["false"] += offset is not None
            continue
        overlap = min(first["stop"], second["stop"]) - max(first["start"], second["start"])
        if overlap >= MIN_OVERLAP:
            result["pairs"] += 1
            result["missed"] += offset is None
        if offset is not None:
            errors.append(abs(offset - (second["start"] - first["start"])))
    result["max_offset_error_seconds"] = round(max(errors, default=0.0), 4)
    return result | {"min_similarity": round(float(found["similarity"].min()), 3)}


if __name__ == "__main__":
    main()
