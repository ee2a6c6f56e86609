"""What several tests need: short real audio, small tables, and a script run on its own."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile

ROOT = Path(__file__).parents[1]


def tone(*, frequency=440.0, seconds=0.05, sr=8000, peak=0.5):
    """A sine wave: (samples,) float64."""
    return peak * np.sin(2 * np.pi * frequency * np.arange(round(seconds * sr)) / sr)


def put_audio(*paths):
    """Writes a short sound to each path, a different one to each."""
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, tone(frequency=200 + 10 * number), 8000)


def put_table(path, rows, *, separator="\t", line_end="\n", encoding="utf-8"):
    """Writes rows of cells as a text table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(separator.join(map(str, row)) + line_end for row in rows)
    path.write_bytes(text.encode(encoding))


def run_python(*arguments):
    """A finished Python process, started from the repository's root, with its output as text."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def run_with_full_disk(code, *arguments, limit=20_000):
    """run_python of `code` in a process that cannot write files longer than `limit` bytes."""
    lines = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    return run_python("-c", lines + code, *arguments)
