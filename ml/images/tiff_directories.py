"""Counts the pictures in a TIFF: those of its pages and of their SubIFDs, which decoders drop without a word.

Pillow knows nothing of SubIFDs, and of a BigTIFF it does not even show the tag. So the directories are read here, and
of each the few tags that say what its picture is.
"""

import struct
from collections import deque
from typing import Any, BinaryIO, NamedTuple

_NEW_SUBFILE_TYPE, _SUBFILE_TYPE, _WIDTH, _LENGTH, _SUB_IFDS = 254, 255, 256, 257, 330
_TAGS = frozenset({_NEW_SUBFILE_TYPE, _SUBFILE_TYPE, _WIDTH, _LENGTH, _SUB_IFDS})
_INTEGERS = {1: "B", 3: "H", 4: "L", 6: "b", 8: "h", 9: "l", 13: "L", 16: "Q", 18: "Q"}
"""The types of a tag's values that are whole numbers, as :mod:`struct` calls them."""

_BIG = 43
"""The version of a BigTIFF in its header."""

_MOST = 64
"""Directories that are looked at, and SubIFDs of each; whatever is beyond counts as a further picture."""

_UNREADABLE = (struct.error, ValueError, OverflowError, OSError)
"""What reading at an odd offset raises, by what kind of file it is."""

_NOWHERE = -1
"""The offset of SubIFDs that are there and cannot be found."""

_MOST_ENTRIES = 2**16
"""Entries of a directory: a TIFF cannot have more, and a BigTIFF has no use for them."""


class _Form(NamedTuple):
    """How a file's directories are written: the formats of :mod:`struct` with the order of bytes."""

    order: str
    offset: str
    entries: str
    entry: str


def count_pictures(file: BinaryIO) -> int:
    """Counts the pictures in a TIFF, of which a decoder reads the first; the file's position stays as it is.

    A smaller version of the first does not count: its directory says that it is one (NewSubfileType, or SubfileType in
    old files), and it is smaller. A directory that cannot be read counts. So does one that is beyond those looked at:
    then the number is a lower limit.
    """
    before = file.tell()
    try:
        return _count_pictures(file)
    finally:
        file.seek(before)


def _count_pictures(file: BinaryIO) -> int:
    file.seek(0)
    start = file.read(16)
    order = "<" if start.startswith(b"II") else ">"
    is_big = start[2:4] == struct.pack(f"{order}H", _BIG)
    offset, count, entry = ("Q", "Q", "HHQ8s") if is_big else ("L", "H", "HHL4s")
    form = _Form(order, order + offset, order + count, order + entry)
    waiting = deque(struct.unpack_from(form.offset, start, 8 if is_big else 4))
    seen: set[int] = set()
    first: tuple[int, int] | None = None
    pictures = 0
    while waiting and len(seen) < _MOST:
        at = waiting.popleft()
        if at in seen:  # directories in a circle
            continue
        seen.add(at)
        try:
            tags, following = _read_directory(file, at, form)
        except _UNREADABLE:
            pictures += 1
            continue
        waiting += [*tags.get(_SUB_IFDS, ()), *following]
        size = (tags.get(_WIDTH, (0,))[0], tags.get(_LENGTH, (0,))[0])
        first = first or size
        pictures += not (_says_reduced(tags) and _is_smaller(size, first))
    return pictures + len(set(waiting) - seen)


def _says_reduced(tags: dict[int, tuple[int, ...]]) -> bool:
    return bool(tags.get(_NEW_SUBFILE_TYPE, (0,))[0] & 1) or tags.get(_SUBFILE_TYPE) == (2,)


def _is_smaller(size: tuple[int, int], first: tuple[int, int]) -> bool:
    return size != first and all(one <= other for one, other in zip(size, first, strict=True))


def _read_directory(file: BinaryIO, at: int, form: _Form) -> tuple[dict[int, tuple[int, ...]], tuple[int, ...]]:
    """Returns the values of the tags that say what a directory's picture is, and where the next directory begins.

    Raises:
        struct.error: the file ends before.
        ValueError: there are too many entries, or no file can have the offset.
    """

    def read(code: str) -> tuple[Any, ...]:
        return struct.unpack(code, file.read(struct.calcsize(code)))

    file.seek(at)
    [entries] = read(form.entries)
    if entries > _MOST_ENTRIES:
        raise ValueError(f"{entries} entries in one directory")
    raw = [read(form.entry) for _ in range(entries)]
    following = file.read(struct.calcsize(form.offset))
    tags: dict[int, tuple[int, ...]] = {}
    for tag, kind, count, inline in raw:
        if tag not in _TAGS or not count:
            continue
        code = f"{form.order}{min(count, _MOST + 1)}{_INTEGERS.get(kind, 'L')}"
        if struct.calcsize(code) <= len(inline) and kind in _INTEGERS:
            tags[tag] = struct.unpack_from(code, inline)
        elif tag == _SUB_IFDS:
            try:
                file.seek(*struct.unpack(form.offset, inline))
                tags[tag] = read(code) if kind in _INTEGERS else (_NOWHERE,)
            except _UNREADABLE:
                tags[tag] = (_NOWHERE,)
    is_cut = len(following) < struct.calcsize(form.offset)  # Pillow reads such a file, too
    return tags, () if is_cut else tuple(at for at in struct.unpack(form.offset, following) if at)
