"""What is in a folder: audio files in natural order, the dataset's tables, and names for clips."""

import collections
import os
import re
from collections.abc import Sequence
from pathlib import Path

from stemgenre.errors import UserError
from stemgenre.files import sha256

AUDIO_SUFFIXES = (
    *(".au", ".wav", ".flac", ".ogg", ".mp3", ".aif", ".aiff", ".oga", ".opus", ".snd"),
    *(".m4a", ".aac", ".mp4", ".webm", ".wma"),  # these need ffmpeg
)


def natural_key(text: object) -> tuple[list[tuple[int, int, str]], str]:
    """Sort key that puts test_2 before test_10; different texts have different keys."""
    parts = [
        (0, int(part), "") if part.isdecimal() else (1, 0, part.casefold())
        for part in re.split(r"(\d+)", str(text))
    ]
    return parts, str(text)


def find_audio(folder: Path, *, skip: Path | None) -> list[Path]:
    """Paths of all audio files below `folder`, in natural order.

    Left out: hidden files, the folder `skip`, and folders with a train_master of their own, which
    are other datasets. Links are followed, each folder is entered once.
    """
    found, visited = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        root = Path(root)
        if (real_path := root.resolve()) in visited:
            folders.clear()
            continue
        visited.add(real_path)
        folders[:] = sorted(
            (
                name
                for name in folders
                if not name.startswith((".", "__MACOSX"))
                and root / name != skip
                and not find_master(root / name, "train_master")
            ),
            key=natural_key,
        )
        found += [
            root / name
            for name in names
            if not name.startswith(".") and name.lower().endswith(AUDIO_SUFFIXES)
        ]
    return sorted(found, key=natural_key)


def find_master(folder: Path, name: str) -> Path | None:
    """Path of `name`.csv or `name`.tsv in `folder`, or None. Raises UserError if both exist."""
    paths = [path for suffix in (".csv", ".tsv") if (path := folder / (name + suffix)).is_file()]
    if len(paths) > 1:
        raise UserError(f"both {paths[0]} and {paths[1]} exist; keep one of them")
    return paths[0] if paths else None


def clip_names(paths: Sequence[Path]) -> list[str]:
    """The name of each file in the cache, in the order of `paths`: the file's stem.

    Where several files share a stem (on some file systems A.wav and a.wav do), 8 hex digits of the
    content's SHA-256 are appended, so that the name is the same in any folder and on any machine.
    Raises UserError if such a file cannot be read.
    """
    counts = collections.Counter(path.stem.casefold() for path in set(paths))
    names = []
    for path in paths:
        name = path.stem
        if counts[name.casefold()] > 1:
            try:
                name += f"-{sha256(path)[:8]}"
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error.strerror}") from None
        names.append(name)
    return names
