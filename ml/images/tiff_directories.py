"""The directories of a TIFF, each of which describes a picture, counted before any is parsed."""

import struct
from typing import BinaryIO

from PIL import TiffImagePlugin

from ml.core.errors import ImageError

MAX_DIRECTORIES = 100
"""Directories that a file may have: one for its picture, and some for smaller versions of it, as in a pyramid."""

_BIG = 43  # BigTIFF's version; a TIFF's is 42


def check_directories(file: BinaryIO) -> None:
    """Checks that a TIFF has no more than ``MAX_DIRECTORIES``; leaves the file at its start.

    Parsing each takes a while, and a file of 256 MB has room for millions. A file that is no TIFF passes, and so does
    one whose chain of directories is damaged: the decoder says what is wrong with it.

    Raises:
        ImageError: its ``reason`` is ``mode``.
    """
    try:
        found = _count_directories(file)
    finally:
        file.seek(0)
    if found > MAX_DIRECTORIES:
        raise ImageError(
            "mode",
            f"more than {MAX_DIRECTORIES} pictures in one file, and only the first would be read; save each as a file",
        )


def _count_directories(file: BinaryIO) -> int:
    """Returns how many directories a TIFF has, or one more than may be; 0 for any other file."""
    start = file.read(16)
    if not start.startswith(tuple(TiffImagePlugin.PREFIXES)):
        return 0
    is_big = _BIG in start[2:4]
    order = "<" if start.startswith(b"II") else ">"
    # A directory is the count of its entries, the entries, and where the next directory lies; 0 after the last.
    count, offset = struct.Struct(order + ("Q" if is_big else "H")), struct.Struct(order + ("Q" if is_big else "L"))
    entry_size = 20 if is_big else 12
    seen: set[int] = set()
    try:
        [place] = offset.unpack_from(start, 8 if is_big else 4)
        while place and place not in seen and len(seen) <= MAX_DIRECTORIES:
            seen.add(place)
            file.seek(place)
            [entries] = count.unpack(file.read(count.size))
            file.seek(place + count.size + entries * entry_size)
            [place] = offset.unpack(file.read(offset.size))
    except (struct.error, OverflowError, ValueError):  # it leads out of the file
        pass
    return len(seen)
