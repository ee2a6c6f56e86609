"""What the headers of audio files promise about their size."""

import os
import struct
import zlib
from pathlib import Path

from stemgenre.errors import UserError

UNKNOWN_LENGTH = 2**62  # in samples or bytes; what is written for one not known is above
UNKNOWN_SIZES = (range(1), range(0x7FFF0000, 0x80000001), range(0xFFFF0000, 2**32))  # in 32 bits
SLACK = 1024  # bytes that a header may promise too many: some count their own
REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def check_size(path: Path | str) -> None:
    """Raises UserError if a file ends before its header says, or an .ogg lacks pages.

    libsndfile believes the file's size instead, and takes a truncated file for a shorter one.
    """
    with Path(path).open("rb") as file:
        there = file.seek(0, os.SEEK_END)
        file.seek(0)
        is_ogg = file.read(4) == b"OggS"
        file.seek(0)
        if is_ogg and not _has_all_pages(file):
            raise UserError(f"{path} is truncated or damaged: not all of its pages are whole")
        try:
            promised = _promised_size(file)
        except struct.error:  # it ends within a header, which libsndfile names
            return
    if promised > there + SLACK:
        raise UserError(
            f"{path} is truncated: its header promises {promised} bytes, {there} are there"
        )


def tells_mp3_length(path: Path | str) -> bool:
    """Whether the first frame of an .mp3, behind its ID3v2 tag, says how many frames follow.

    Without that, libsndfile guesses the length from the first frame's bit rate, and stops there.
    """
    with Path(path).open("rb") as file:
        header = file.read(10)
        if header[:3] == b"ID3":  # its size has 7 bits a byte
            high, *low = header[6:10]
            for byte in low:
                high = high << 7 | byte
            file.seek(10 + high)
        else:
            file.seek(0)
        frame = file.read(256)
    return any(name in frame for name in (b"Xing", b"Info", b"VBRI"))


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


def _has_all_pages(file):
    """Whether the pages of an open .ogg are whole, and lead to one that ends it (RFC 3533)."""
    is_last, numbers = False, {}  # of each stream's page before
    while True:
        header = file.read(27)
        if header[:4] != b"OggS" or len(header) < 27:
            return is_last and b"OggS" not in header + file.read()  # taggers append other things
        segments = file.read(header[26])
        page = header[:22] + bytes(4) + header[26:] + segments + file.read(sum(segments))
        if _ogg_checksum(page) != int.from_bytes(header[22:26], "little"):
            return False
        stream, number = struct.unpack("<II", header[14:22])
        if number != numbers.get(stream, number - 1) + 1:
            return False
        numbers[stream], is_last = number, bool(header[5] & 4)


def _ogg_checksum(page):
    """A page's CRC-32: zlib's with the bits in the other order, and without its inversions."""
    ones = 0xFFFFFFFF
    return int(f"{zlib.crc32(page.translate(REVERSED_BITS), ones) ^ ones:032b}"[::-1], 2)
