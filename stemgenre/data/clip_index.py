"""File names as tables have them -> the clips below the data folder that they mean."""

import filecmp
import functools
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from stemgenre.data.find_files import is_song, stem_files
from stemgenre.errors import UserError


class ClipIndex:
    """Clips, the paths of find_clips, by their names in tables; made when a table is first read."""

    def __init__(self, clips: Sequence[Path]):
        self.clips = clips

    @functools.cached_property
    def by_name(self) -> dict[str, list[Path]]:
        """{name of the file or folder, composed: its paths}."""
        found = {}
        for path in self.clips:
            found.setdefault(_composed(path.name), []).append(path)
        return found

    @functools.cached_property
    def has_songs(self) -> bool:
        """Whether a clip is a folder of stems."""
        return any(is_song(path) for path in self.clips)

    def find_paths(self, names: Iterable[str], table: Path) -> list[Path]:
        """The clip of each file name in `table`. Raises UserError for those without one."""
        paths, missing = [], []
        for text in names:
            plain = self.by_name.get(_composed(text), ())
            if len(plain) == 1 and not self.has_songs and "\\" not in text and text[1:2] != ":":
                paths += plain  # of most of 100,000 names, in a tenth of the time
                continue
            name = PurePosixPath(text.replace("\\", "/"))
            if not name.name or name.is_absolute() or ".." in name.parts or text[1:2] == ":":
                raise UserError(
                    f"{table} names {text!r}, which is not a file below the data folder"
                )
            found = self._find(name)
            if not found:
                missing.append(text)
                continue
            for other in found[1:]:
                if not is_copy(found[0], other):
                    raise UserError(
                        f"{text} is ambiguous: {found[0]} and {other} have different content; "
                        "keep one"
                    )
            paths.append(found[0])
        if missing:
            meant = self._similar(missing[0])
            way_out = "unpack all sound folders there"
            if meant:  # the names of sample_submit are those of the submission
                is_sample = table.name.lower().startswith("sample_sub")
                or_else = "" if is_sample else ", or write its name as it is"
                way_out = f"{missing[0]} may mean {meant}: rename that file{or_else}"
            raise UserError(
                f"{len(missing)} clips of {table} have no audio below {table.parent}: "
                f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}; {way_out}"
            )
        return paths

    def _find(self, name):
        """The clips that a file name can mean; songs, with its suffix or without, before files."""
        meant = dict.fromkeys((name, name.with_suffix(""))) if self.has_songs else ()
        for each in meant:
            if songs := [path for path in self._ending_with(each) if is_song(path)]:
                return songs
        return self._ending_with(name)

    def _ending_with(self, name):
        """The clips whose last parts are those of `name`."""
        ending, count = _composed(str(name)), len(name.parts)
        return [
            path
            for path in self.by_name.get(_composed(name.name), ())
            if _composed("/".join(path.parts[-count:])) == ending
        ]

    def _similar(self, text):
        """The name of a clip that differs from `text` in its suffix or in capitals, or None."""
        stem = PurePosixPath(text.replace("\\", "/")).stem.casefold()
        return next((path.name for path in self.clips if path.stem.casefold() == stem), None)


def is_copy(one: Path, other: Path) -> bool:
    """Whether two clips have the same content; of songs, the same four stems."""
    if one == other or not (is_song(one) and is_song(other)):
        return one == other or filecmp.cmp(one, other, shallow=False)
    pairs = zip(stem_files(one).values(), stem_files(other).values(), strict=True)
    return all(filecmp.cmp(*pair, shallow=False) for pair in pairs)


def _composed(text):
    """`text` with its accents composed, as tables have them: macOS takes them apart (NFD)."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)
