"""How long eda.py takes for 1,000 clips, and which copies it finds.

    python benchmarks/eda.py [--clips 1000] [--music FOLDER]

Most clips are of the synthesised band, 30 s at 22.05 kHz. A tenth are altered cuts: pieces of
other clips that begin up to 20 s later, 6 dB softer or louder, half of them by way of mp3. With
--music, a folder of real clips in the competition's layout with a provenance.tsv (file_name,
source, start_seconds), these are there too, whole and as altered cuts. The last line is one JSON
object; a pair counts as missed if it shares 10 s or more.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that make the clips
sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np
import pandas as pd
import soundfile

from stemgenre import audio
from stemgenre.band import render
from stemgenre.songbook import GENRES

ROOT = Path(__file__).parents[1]
SR, SECONDS = 22050, 30.0
LATEST = 20.0  # s after the beginning of its clip that a cut begins: 10 s are shared at least
SHARED = 10.0  # s that two clips share, from which on they have to be found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=1000)
    parser.add_argument("--music", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        clips = make_clips(folder / "data", options.clips, options.music)
        first = seconds_of_eda(folder)
        again = seconds_of_eda(folder)
        found = pd.read_csv(folder / "eda" / "copies.csv")
    result = {
        "clips": len(clips),
        "cores": len(os.sched_getaffinity(0)),
        "seconds": round(first, 1),
        "seconds_again": round(again, 1),
    }
    print(json.dumps(result | judge(clips, found)))


def seconds_of_eda(folder):
    """Seconds of one run of eda.py, in a process of its own with all cores."""
    command = ["eda.py", f"DATA_DIR={folder / 'data'}", f"EDA_DIR={folder / 'eda'}", "DEVICE=cpu"]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    started = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT, env=environment)
    return time.perf_counter() - started


def make_clips(folder, count, music):
    """Writes a competition of `count` clips; their names, recordings and starts as a table."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    clips = real_clips(folder, music) if music else []
    made = count - count // 10 - len(clips)
    with ProcessPoolExecutor() as pool:
        clips += pool.map(make_song, [folder] * made, range(made), chunksize=8)
    for number in range(count // 10):
        clips.append(altered_cut(folder, clips[number % len(clips)], number, rng))
    rows = [f"{clip['name']}\t{number % 2}\n" for number, clip in enumerate(clips)]
    (folder / "train_master.tsv").write_text("file_name\tlabel_id\n" + "".join(rows))
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
        place = {"source": row.source, "start": row.start_seconds, "stop": stop}
        clips.append({"name": row.file_name, **place})
    return clips


def altered_cut(folder, clip, number, rng):
    """A new clip that is the later part of another: 6 dB softer or louder, every second as mp3."""
    wave, rate = audio.decode(folder / clip["name"])
    late = rng.uniform(0, LATEST)
    wave = wave[0, round(late * rate) :] * (2 if number % 4 < 2 else 0.5)
    name = f"cut_{number}.{'mp3' if number % 2 else 'au'}"
    soundfile.write(folder / name, np.clip(wave, -1, 1), rate)
    return {**clip, "name": name, "start": clip["start"] + late}


def judge(clips, found):
    """How many pairs share 10 s or more, are missed or false, and how exact the offsets are."""
    answers = {}  # (name, name) in order -> s into the first at which the second begins
    for row in found.itertuples():
        answers[row.first, row.second] = row.offset_seconds
        answers[row.second, row.first] = -row.offset_seconds
    result = {"pairs": 0, "missed": 0, "pairs_found": len(found), "false": 0}
    errors = []
    for one, two in itertools.combinations(clips.to_dict("records"), 2):
        offset = answers.get((one["name"], two["name"]))
        if one["source"] != two["source"]:
            result["false"] += offset is not None
            continue
        shared = min(one["stop"], two["stop"]) - max(one["start"], two["start"])
        if shared >= SHARED:
            result["pairs"] += 1
            result["missed"] += offset is None
        if offset is not None:
            errors.append(abs(offset - (two["start"] - one["start"])))
    result["worst_offset_error_seconds"] = round(max(errors, default=0.0), 4)
    return result | {"least_similarity": round(float(found["similarity"].min()), 3)}


if __name__ == "__main__":
    main()
