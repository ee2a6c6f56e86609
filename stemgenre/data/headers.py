"""What the headers of audio files promise about their size."""

import os
import struct
from pathlib import Path

from stemgenre.errors import UserError

UNKNOWN_LENGTH = 2**62  # in samples or bytes; what is written for one not known is above
UNKNOWN_SIZES = (range(1), range(0x7FFF0000, 0x80000001), range(0xFFFF0000, 2**32))  # in 32 bits
SLACK = 1024  # bytes that a header may promise too many: some count their own


def check_size(path: Path | str) -> None:
    """Raises UserError if a file ends before its header says, or an .ogg lacks pages.

    libsndfile believes the file's size instead, and takes a truncated file for a shorter one.
    """
    with Path(path).open("rb") as file:
        there = file.seek(0, os.SEEK_END)
        file.seek(0)
        if file.read(4) == b"OggS":
            if not _has_all_pages(file, there):
                raise UserError(f"{path} is truncated or damaged: it has not all of its pages")
            return
        file.seek(0)
        try:
            promised = _promised_size(file)
        except struct.error:  # it ends within a header, which libsndfile names
            return
    if promised > there + SLACK:
        raise UserError(
            f"{path} is truncated: its header promises {promised} bytes, {there} are there"
        )


def _promised_size(file):
    """The bytes that .au, .wav, .w64 and .aiff headers say a file has; 0: unknown, or others."""
    magic = file.read(4)
    if magic == b"riff":
        return _w64_size(file)
    order = {b".snd": ">", b"dns.": "<", b"RIFX": ">", b"FORM": ">"}
    order |= dict.fromkeys((b"RIFF", b"RF64", b"BW64"), "<")
    if magic not in order:
        return 0
    length = order[magic] + "I"
    if magic in (b".snd", b"dns."):
        offset, data = (struct.unpack(length, file.read(4))[0] for _ in range(2))
        return 0 if _is_unknown(data) else offset + data
    file.seek(12)
    large = 0  # RF64's size of the sound, which 32 bits do not hold
    while len(name := file.read(4)) == 4:
        (data,) = struct.unpack(length, file.read(4))
        if name in (b"data", b"SSND"):
            if data == 0xFFFFFFFF and 0 < large < UNKNOWN_LENGTH:
                return file.tell() + large
            return 0 if _is_unknown(data) else file.tell() + data
        if name == b"ds64":
            _, large = struct.unpack("<QQ", file.read(16))
            file.seek(-16, os.SEEK_CUR)
        file.seek(data + data % 2, os.SEEK_CUR)
    return 0


def _is_unknown(size):
    """Whether a size in 32 bits is what programs write that stream into a pipe."""
    return any(size in sizes for sizes in UNKNOWN_SIZES)


def _w64_size(file):
    """_promised_size of an open .w64: chunks of a GUID, 64 bits of size (with both) and data."""
    file.seek(40)
    while len(name := file.read(16)) == 16:
        (size,) = struct.unpack("<Q", file.read(8))
        start = file.tell() - 24
        if name[:4] == b"data":
            return start + size if size < UNKNOWN_LENGTH else 0
        if not 24 <= size < UNKNOWN_LENGTH:
            return 0
        file.seek(start + size + -size % 8)
    return 0


def _has_all_pages(file, size):
    """Whether the pages of an open .ogg follow each other to one that ends the sound (RFC 3533)."""
    end, is_last = 0, False
    while True:
        file.seek(end)
        header = file.read(27)
        if header[:4] != b"OggS" or len(header) < 27:
            break
        segments = file.read(header[26])
        end += 27 + header[26] + sum(segments)
        is_last = header[5] & 4 and len(segments) == header[26] and end <= size
    return bool(is_last) and b"OggS" not in header + file.read()  # what taggers append is no page
