"""What is in a folder: audio files and songs in natural order, tables, and names for clips.

A song is a folder of its stems, vocals, drums, bass and other: one clip, named after the folder.
"""

import collections
import contextlib
import difflib
import errno
import gc
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from stemgenre.errors import UserError
from stemgenre.files import sha256
from stemgenre.settings import STEMS

log = logging.getLogger(__name__)

AUDIO_SUFFIXES = (
    *(".au", ".wav", ".flac", ".ogg", ".mp3", ".aif", ".aiff", ".oga", ".opus", ".snd"),
    *(".m4a", ".aac", ".mp4", ".webm", ".wma"),  # these need ffmpeg
)
MASTER_SUFFIXES = (".csv", ".tsv")
NUMBER = re.compile(r"(\d+)")
MAX_DIGITS = 20  # of a number, to be sorted as one
MAX_STEM_BYTES = 200  # of a file name; file systems allow 255 with ".npz" and what is appended
SYSTEM_FOLDERS = ("lost+found", "System Volume Information", "$RECYCLE.BIN")


@contextlib.contextmanager
def paused_garbage_collector() -> Iterator[None]:
    """A block that makes many small objects, none of them garbage: a third of the time without."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def natural_key(text: object) -> tuple[str, str]:
    """Sort key that puts test_2 before test_10; different texts have different keys."""
    text = str(text)
    parts = NUMBER.split(text.casefold())  # text and number in turn: both keys begin with text
    parts[1::2] = [digits.zfill(MAX_DIGITS) for digits in parts[1::2]]
    return "\0".join(parts), text  # a string: comparing lists takes four times as long


def find_audio(folder: Path, *, skip: Iterable[Path] = ()) -> list[Path]:
    """Paths of all audio files below `folder`, in natural order.

    Left out: hidden files, the folders `skip` below it, and folders with a train_master of their
    own, which are other datasets. Links are followed, each folder is entered once. Raises UserError
    for a folder that cannot be listed, which would leave out a genre; SYSTEM_FOLDERS are only
    named.
    """
    found, folders = [], [folder]
    visited = {path.resolve() for path in skip} - {folder.resolve()}
    while folders:
        current = folders.pop()
        if (real_path := current.resolve()) in visited:
            continue
        visited.add(real_path)
        try:
            inner, files = _list_names(current)
        except UserError as error:
            if current.name not in SYSTEM_FOLDERS:
                raise
            log.warning("%s; it is left out", error)
            continue
        if current != folder and not {f"train_master{s}" for s in MASTER_SUFFIXES}.isdisjoint(
            map(str.lower, files)
        ):
            continue
        prefix = "" if current == Path() else os.path.join(current, "")  # noqa: PTH118 see is_song
        for name in files:
            if name.lower().endswith(AUDIO_SUFFIXES):
                found.append(prefix + name)
            elif (path := current / name).is_symlink() and not path.exists():  # to a genre's folder
                log.warning("%s is a link to something that is not there; it is left out", path)
        inner = [current / name for name in inner if not name.startswith("__MACOSX")]
        folders += sorted(inner, key=natural_key, reverse=True)
    return [Path(text) for text in sorted(found, key=natural_key)]


def find_clips(folder: Path, *, skip: Sequence[Path] = ()) -> list[Path]:
    """Paths of all clips below `folder`, in natural order: audio files, and folders of songs.

    A folder below `folder` is a song's if two or more of its audio files, or all, are named as
    stems are; its files are no clips of their own. Neither is song.wav beside the folder song.
    Raises UserError as find_audio and stem_files do.
    """
    audio, by_folder = find_audio(folder, skip=skip), {}
    if not any(_is_stem(path) for path in audio):
        return audio
    for path in audio:
        by_folder.setdefault(path.parent, []).append(path)
    songs = {f for f, paths in by_folder.items() if f != folder and _are_stems(paths)}
    clips = [*songs]
    for song in songs:
        stem_files(song)
        for path in by_folder[song]:
            if path.stem.casefold() not in STEMS:
                log.warning("%s is left out: it lies beside the stems of a song", path)
    for parent, paths in by_folder.items():
        if parent not in songs:
            clips += [path for path in paths if path.with_suffix("") not in songs]
    return sorted(clips, key=natural_key)


def _is_stem(path):
    """Whether an audio file is named as a stem is."""
    name = path.name
    return name[: name.rindex(".")].casefold() in STEMS


def _are_stems(paths):
    """Whether audio files of one folder are a song's stems, perhaps not all of them."""
    named = sum(map(_is_stem, paths))
    return named >= 2 or named == len(paths)


def stem_files(song: Path | str) -> dict[str, Path]:
    """{stem: path of its audio file} of a song's folder, in the order of STEMS.

    Raises UserError if one is missing or there twice.
    """
    found = {stem: [] for stem in STEMS}
    for path in sorted(_list_folder(Path(song))[1]):
        if path.stem.casefold() in STEMS and path.name.lower().endswith(AUDIO_SUFFIXES):
            found[path.stem.casefold()].append(path)
    if not any(found.values()):
        raise UserError(f"{song} cannot be decoded: it is a folder, and has no {', '.join(STEMS)}")
    missing = [stem for stem, paths in found.items() if not paths]
    if missing:
        raise UserError(
            f"{song} has no {' and no '.join(missing)}; a song's folder needs {', '.join(STEMS)}: "
            "add what is missing, or rename its files if they are clips of their own"
        )
    for stem, paths in found.items():
        if len(paths) > 1:
            names = f"{paths[0].name} and {paths[1].name}"
            raise UserError(f"{song} has {stem} twice, {names}; keep one")
    return {stem: path for stem, (path,) in found.items()}


def is_song(path: Path) -> bool:
    """Whether a clip is a folder of stems; files of AUDIO_SUFFIXES are not looked at."""
    return not path.name.lower().endswith(AUDIO_SUFFIXES) and path.is_dir()


def clip_sha256(path: Path | str, hash_file: Callable[[Path | str], str] = sha256) -> str:
    """The SHA-256 of a clip in hex: of its file, or of the hashes of a song's stems.

    Raises what `hash_file` does, and UserError for a song without all stems.
    """
    if not os.path.isdir(path):  # noqa: PTH112 half the time of Path's, for 100,000 clips
        return hash_file(path)
    digests = "".join(hash_file(stem) for stem in stem_files(path).values())
    return hashlib.sha256(digests.encode()).hexdigest()


def find_master(folder: Path, name: str) -> Path | None:
    """Path of `name`.csv or `name`.tsv in `folder`, in any case, or None.

    Raises UserError if there are both, or it is no file.
    """
    paths = _masters([path for paths in _list_folder(folder) for path in paths], name)
    if len(paths) > 1:
        raise UserError(f"both {paths[0]} and {paths[1]} exist; keep one of them")
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} is a link to something that is not there")
        if not path.is_file():
            raise UserError(f"{path} is not a file")
    return paths[0] if paths else None


def near_names(folder: Path, name: str) -> list[str]:
    """Names of files in `folder` that may be meant as `name`.csv, in natural order."""
    words = [word[:5] for word in name.split("_")]
    near = []
    for path in _list_folder(folder)[1]:
        stem = path.name.lower().partition(".")[0]
        similar = difflib.SequenceMatcher(None, stem, name).ratio() >= 0.8
        if similar or all(word in stem for word in words):
            near.append(path.name)
    return sorted(near, key=natural_key)


def _masters(paths, name):
    names = [f"{name}{suffix}" for suffix in MASTER_SUFFIXES]
    return sorted(path for path in paths if path.name.lower() in names)


def _list_folder(folder):
    """(folders, other paths) in `folder`, without the hidden ones. Raises UserError if it fails."""
    return tuple([folder / name for name in names] for names in _list_names(folder))


def _list_names(folder):
    """The names of what _list_folder gives."""
    folders, files = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    (folders if _is_folder(entry) else files).append(entry.name)
    except OSError as error:
        raise UserError(
            f"{error.filename or folder} cannot be listed: {error.strerror}; make it readable, or "
            "move it to another place"
        ) from None
    return folders, files


def _is_folder(entry):
    try:
        return entry.is_dir()  # no further read, unless it is a link
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself
            return False
        raise


def clip_names(paths: Sequence[Path]) -> list[str]:
    """The name of each clip in the cache, in the order of `paths`: the file's stem, or the song.

    Where several files share a stem (on some file systems A.wav and a.wav do), 8 hex digits of the
    content's SHA-256 are appended, so that the name is the same in any folder and on any machine.
    So they are where a stem is too long, of which MAX_STEM_BYTES are left. Raises UserError if such
    a file cannot be read.
    """
    stems = [_clip_name(path) for path in paths]
    by_path = {str(path): stem.casefold() for path, stem in zip(paths, stems, strict=True)}
    counts = collections.Counter(by_path.values())
    names = []
    for path, name in zip(paths, stems, strict=True):
        if counts[name.casefold()] > 1 or _is_too_long(name):
            if path.exists() and not path.is_file() and not path.is_dir():
                raise UserError(f"{path} cannot be read: it is a pipe or a device, not a file")
            try:
                name = with_digest(name, clip_sha256(path))
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error.strerror}") from None
        names.append(name)
    return names


def with_digest(stem: str, digest: str) -> str:
    """A name in the cache for the file of that stem and SHA-256, whatever others are called."""
    if _is_too_long(stem):
        stem = os.fsencode(stem)[:MAX_STEM_BYTES].decode(errors="ignore")
    return f"{stem}-{digest[:8]}"


def _is_too_long(stem):
    return 4 * len(stem) > MAX_STEM_BYTES and len(os.fsencode(stem)) > MAX_STEM_BYTES


def _clip_name(path):
    name = path.name
    if name.lower().endswith(AUDIO_SUFFIXES) and not name.startswith("."):
        return name[: name.rindex(".")]
    return name if is_song(path) else path.stem
