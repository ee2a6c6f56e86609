"""What is in a folder: audio files in natural order, and a dataset's masters."""

import os
import re
from pathlib import Path

from stemgenre.audio import SUFFIXES
from stemgenre.errors import UserError


def natural_key(text):
    """Sort key with which test_2 comes before test_10; no two texts have the same."""
    parts = [
        (0, int(part), "") if part.isdecimal() else (1, 0, part.casefold())
        for part in re.split(r"(\d+)", str(text))
    ]
    return parts, str(text)


def find_audio(folder, *, skip):
    """Paths of all audio files below `folder`, in natural order.

    Left out: hidden files, the folder `skip`, and folders with a train_master of their own, which
    are other datasets. Links are followed, each folder is entered once.
    """
    found, seen = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        root = Path(root)
        if (real := root.resolve()) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(
            (
                f
                for f in folders
                if not f.startswith((".", "__MACOSX"))
                and root / f != skip
                and not find_master(root / f, "train_master")
            ),
            key=natural_key,
        )
        found += [root / n for n in names if not n.startswith(".") and n.lower().endswith(SUFFIXES)]
    return sorted(found, key=natural_key)


def find_master(folder, name):
    """Path of `name`.csv or `name`.tsv in `folder`, or None. Raises UserError if both are there."""
    paths = [path for suffix in (".csv", ".tsv") if (path := folder / (name + suffix)).is_file()]
    if len(paths) > 1:
        raise UserError(f"{paths[0]} and {paths[1]} are both there; keep one")
    return paths[0] if paths else None
