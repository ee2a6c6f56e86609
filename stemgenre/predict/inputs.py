"""Files, folders and patterns of a command line -> audio files."""

import contextlib
import glob
import math
from pathlib import Path

from stemgenre.data import audio
from stemgenre.data.find_files import AUDIO_SUFFIXES, clip_names, find_audio, natural_key
from stemgenre.errors import UserError


def find_inputs(words: list[str]) -> tuple[list[Path], list[dict[str, str]]]:
    """(audio paths in natural order, each once; failures) of files, folders and patterns.

    A failure is {"file": word, "reason": text}, for a word that leads to no audio. Raises UserError
    if there are no words.
    """
    if not words:
        raise UserError("nothing to predict; name files, folders or patterns such as 'album/*.mp3'")
    found, failures = {}, []
    for word in words:
        paths, reason = _find(word)
        for path in paths:
            found.setdefault(path.resolve(), path)
        if not paths:
            failures.append({"file": word, "reason": reason})
    return sorted(found.values(), key=natural_key), failures


def _find(word):
    """(paths, what is wrong if there are none) of one file, folder or pattern."""
    path = Path(word)
    if path.is_dir():
        return find_audio(path), f"there is no audio below {word}"
    if path.is_file():
        return [path], None
    if not glob.has_magic(word):
        return [], f"there is no file {word}"
    matches = [Path(match) for match in glob.glob(word, recursive=True)]  # noqa: PTH207 also absolute
    paths = [path for path in matches if path.name.lower().endswith(AUDIO_SUFFIXES)]
    folders = [path for path in matches if path.is_dir()]
    paths += [path for folder in folders for path in find_audio(folder)]
    return [path for path in paths if path.is_file()], f"{word} matches no audio file"


def readable_names(paths: list[Path]) -> dict[Path, str]:
    """{path: clip name} of the files that are there and can be read."""
    paths = [path for path in dict.fromkeys(paths) if path.is_file()]
    try:
        return dict(zip(paths, clip_names(paths), strict=True))
    except UserError:  # a file among those of one stem has vanished, or may not be read
        paths = [path for path in paths if _is_readable(path)]
        return dict(zip(paths, clip_names(paths), strict=True))


def _is_readable(path):
    try:
        with path.open("rb"):
            return True
    except OSError:
        return False


def total_seconds(paths: list[Path]) -> int | None:
    """Seconds of audio in all files, as far as headers tell; None if none does."""
    seconds = 0.0
    for path in paths:
        with contextlib.suppress(UserError):  # a bad file, or one for ffmpeg
            seconds += audio.probe(path).seconds
    return math.ceil(seconds) or None
