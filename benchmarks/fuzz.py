"""Damaged files, each given to the function that reads it for a user: none may do harm.

    python benchmarks/fuzz.py [--files 10000] [--audio 1000] [--seed 0] [--jobs 1] [--only flac]

`--files` checkpoints, best models, ImageNet weights and Demucs files in all, and `--audio` audio
files of each kind, are damaged: bits flipped, blocks cut, zeroed, repeated, moved or inserted,
numbers overwritten by extreme ones. Networks are tiny, clips last three seconds. A checkpoint goes
through load_resume_checkpoint and restore, an audio file through probe and decode.

Each file ends as one of
  refused    a UserError of one line that names the file
  equal      read, and its content is that of the intact file
  unnoticed  read with other values, where nothing in the file could tell: a sample of sound without
             checksums, a weight in a file without them, a value in the text of a yaml. Names,
             shapes and types are those of the intact file (in a yaml: a usable model); a clip is as
             long as its header says, samples are finite
  edited     read, after somebody changed a value and wrote the whole file again, checksums and
             all: what follows works, or ends in a UserError. A checkpoint trains to its end
or as a failure: other (content, which must not be accepted), traceback (anything but a UserError),
unclear (a refusal that does not name the file, or in several lines), hang (over 10 seconds), memory
(over 4 GB). With a failure the exit code is 1. A file's damage is a function of (seed, kind,
number), which are printed with each failure. The last line is one JSON object.
"""

import argparse
import collections
import contextlib
import json
import logging
import multiprocessing
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import threading
import traceback
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from fuzz_readers import AUDIO, FILES, READERS, make_intact, use_tiny_backbone

sys.path.insert(0, str(Path(__file__).parents[1]))
from stemgenre.errors import UserError

HANG_SECONDS, MEMORY_BYTES = 10, 4e9
FAILURES = ("other", "traceback", "unclear", "hang", "memory")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--files", type=int, default=10_000, help="damaged models, all kinds")
    parser.add_argument("--audio", type=int, default=1000, help="damaged audio files of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="files at the same time")
    parser.add_argument("--only", nargs="+", metavar="KIND", help=", ".join([*FILES, *AUDIO]))
    options = parser.parse_args()
    kinds = {kind: -(-options.files // len(FILES)) for kind in FILES}
    kinds |= {kind: options.audio for kind in AUDIO if shutil.which("ffmpeg") or kind != "m4a"}
    cases = [
        (kind, number)
        for kind, count in kinds.items()
        for number in range(count)
        if not options.only or kind in options.only
    ]
    with tempfile.TemporaryDirectory() as folder:
        make_intact(Path(folder))
        results = fuzz(cases, Path(folder), options)
    counts = collections.defaultdict(collections.Counter)
    for kind, result in results:
        counts[kind][result["end"]] += 1
    for kind, ends in counts.items():
        print(f"{kind:26}", ", ".join(f"{count} {end}" for end, count in ends.most_common()))
    total = sum(counts.values(), collections.Counter())
    summary = {
        "files": total.total(),
        **{end: total[end] for end in ("refused", "equal", "unnoticed", "edited", *FAILURES)},
        "slowest_seconds": round(max(result["seconds"] for _, result in results), 1),
        "peak_memory_gb": round(max(result["memory"] for _, result in results) / 1e9, 2),
    }
    print(json.dumps(summary))
    sys.exit(any(total[end] for end in FAILURES))


# In the main process: a worker per job, started again when it hangs or dies


def fuzz(cases, folder, options):
    """[(kind, result of try_file)] of the cases (kind, number)."""
    todo, results, lock = iter(cases), [], threading.Lock()

    def run_job():
        worker = None
        while True:
            with lock:
                case = next(todo, None)
            if case is None:
                break
            worker = worker or Worker(folder, options.seed)
            result = worker.run(case)
            if result["end"] in ("hang", "died"):
                worker = worker.stop()
                result["end"] = "hang" if result["end"] == "hang" else "traceback"
            with lock:
                results.append((case[0], result))
                if result["end"] in FAILURES:
                    print(*case, result["end"], result["what"], flush=True)
                elif len(results) % 1000 == 0:
                    print(f"{len(results)} of {len(cases)}", flush=True)
        if worker:
            worker.stop()

    jobs = [threading.Thread(target=run_job) for _ in range(options.jobs)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    return results


class Worker:
    """A process that tries files, one after the other."""

    def __init__(self, folder, seed):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, folder, seed), daemon=True)
        self.process.start()
        theirs.close()
        self.connection.recv()  # it is ready

    def run(self, case):
        self.connection.send(case)
        result = {"what": "", "seconds": HANG_SECONDS, "memory": 0}
        if not self.connection.poll(HANG_SECONDS):
            return result | {"end": "hang"}
        try:
            return self.connection.recv()
        except EOFError:
            self.process.join()
            return result | {"end": "died", "what": f"exit code {self.process.exitcode}"}

    def stop(self):
        self.process.kill()
        self.process.join()


# In a worker


def work(connection, folder, seed):
    """Answers each case (kind, number) with what try_file says, until the connection is closed."""
    use_tiny_backbone()
    torch.set_num_threads(1)
    logging.disable()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)  # libraries' warnings about what they read
    with tempfile.TemporaryDirectory() as place:
        readers = {kind: READERS[kind](folder, kind) for kind in (*FILES, *AUDIO)}
        connection.send("ready")
        with contextlib.suppress(EOFError):
            while True:
                kind, number = connection.recv()
                connection.send(try_file(readers[kind], Path(place), kind, number, seed))


def try_file(reader, place, kind, number, seed):
    """{end: one of those above, what: of a failure, seconds, memory: bytes at the peak}."""
    rng = random.Random(f"{seed} {kind} {number}")
    for path in place.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    damage = reader.damage(place, rng)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins at what is in use now
    started, what = os.times().elapsed, ""
    try:
        end, what = reader.read(place)
    except UserError as error:
        end = "refused"
        named = any(name in str(error) for name in (reader.name, "SEPARATION_MODEL"))
        if not named or ("\n" in str(error) and "edited" not in kind):
            end, what = "unclear", str(error)
    except BaseException as error:  # noqa: BLE001 what must not be
        where = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {str(error)[:200]!r} ({where.filename}:{where.lineno})"
        end = "traceback"
    memory = max(peak_bytes(), 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    if memory > MEMORY_BYTES:
        end, what = "memory", f"{memory / 1e9:.1f} GB"
    seconds = os.times().elapsed - started
    return {"end": end, "what": f"[{damage}] {what}", "seconds": seconds, "memory": memory}


def peak_bytes():
    lines = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", lines)[1])


if __name__ == "__main__":
    main()
