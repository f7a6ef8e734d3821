"""Finds what is missing of a picture that its decoder fills up without a word, with black, grey or less detail.

Pillow refuses a file that ends too early. It takes one whose compressed data end too early and are closed properly, as
software that repairs cut files writes it. docs/sources.md says what is found, and what is not.
"""

import io
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from itertools import dropwhile, pairwise, takewhile
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from ml.core.errors import ImageError
from ml.images.pixel_formats import pixel_hash, read_array

_BLOCK = 2**20
"""Bytes that are unpacked at once."""

# --- PNG --------------------------------------------------------------------------------------------------------------

_PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Samples of a pixel, by colour type."""

_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""The passes of an interlaced PNG: the first column and row, and the steps to the next (PNG specification, 8.2)."""


def check_png(file: BinaryIO) -> None:
    """Checks that the rows of a PNG are all there, by unpacking them once more.

    Args:
        file: a PNG that a decoder has read without an error.

    Raises:
        ImageError: its ``reason`` is ``truncated``.
    """
    chunks = _read_png_chunks(file)
    _, header = next(chunks)
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header[:13])
    bits = depth * _PNG_SAMPLES[colour]
    sizes = (
        (len(range(left, width, across)), len(range(top, height, down)))
        for left, top, across, down in (_ADAM7 if interlaced else ((0, 0, 1, 1),))
    )
    missing = sum(rows * (1 + (columns * bits + 7) // 8) for columns, rows in sizes if columns)
    for rows in _unpack_png_rows(chunks):
        missing -= len(rows)
        if missing <= 0:
            return
    raise ImageError("truncated", f"the PNG's data end {missing:,} bytes before its last row does")


def _unpack_png_rows(chunks: Iterator[tuple[bytes, bytes]]) -> Iterator[bytes]:
    """Yields the rows that a PNG's IDAT chunks unpack to, in parts; another chunk between ends them, as in Pillow."""
    unpacker = zlib.decompressobj()
    pixels = takewhile(lambda chunk: chunk[0] == b"IDAT", dropwhile(lambda chunk: chunk[0] != b"IDAT", chunks))
    for _, data in pixels:
        packed = data
        while packed and not unpacker.eof:
            yield unpacker.decompress(packed, _BLOCK)
            packed = unpacker.unconsumed_tail
    while not unpacker.eof and (rest := unpacker.decompress(b"", _BLOCK)):
        yield rest


def _read_png_chunks(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Yields the chunks of a PNG with their kinds; those without pixels, but for the header, are empty."""
    file.seek(8)
    while len(start := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", start)
        if kind == b"IEND":
            return
        wanted = kind in {b"IHDR", b"IDAT"}
        yield kind, file.read(length) if wanted else b""
        file.seek(4 if wanted else length + 4, io.SEEK_CUR)


# --- JPEG -------------------------------------------------------------------------------------------------------------

_JPEG_MARKER = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])", re.DOTALL)
"""A marker behind coded data, in which 0xFF is followed by 0 or by the number of a restart."""

_SOS, _EOI, _WITHOUT_LENGTH = 0xDA, 0xD9, frozenset({0x01, 0xD8})
_FRAMES, _LOSSLESS_FRAME, _ARITHMETIC = frozenset({0xC0, 0xC1, 0xC2}), 0xC3, frozenset({0xC9, 0xCA})
_COEFFICIENTS, _ALL_BITS = 64, 99

_JUNK = b"".join(
    bytes([0x5A, 0x33, 0xC4, 0x0F, 0x96, 0x21, 0xE8, 0x7B]) * 4 + bytes([0xFF, number]) for number in range(0xD0, 0xD8)
)
"""Data that a decoder skips behind a complete scan, and takes for the picture in an incomplete one. It has every
restart marker, since a decoder that waits for one skips all else."""


def hash_with_junk(file: BinaryIO) -> str | None:
    """Decodes a JPEG with further data behind each scan, and returns its :func:`ml.images.pixel_formats.pixel_hash`.

    libjpeg has no error for data that end too early: it goes on with grey. If the data are complete, it does not look
    at what follows, and the pixels are the same; else they differ. None where that says nothing: of data in arithmetic
    coding, whose last bytes may be left out, and of a file without an end, which Pillow checks.

    Raises:
        ImageError: its ``reason`` is ``truncated``: scans are missing.
    """
    before = file.tell()
    file.seek(0)
    content = file.read()
    file.seek(before)
    try:
        ends = _find_scan_ends(content)
    except (struct.error, IndexError, KeyError, ValueError):  # a damaged header, about which Pillow knows more
        return None
    if not ends:
        return None
    parts = (content[start:end] + _JUNK for start, end in pairwise([0, *ends]))
    with Image.open(io.BytesIO(b"".join(parts) + bytes([0xFF, _EOI])), formats=("JPEG",)) as image:
        image.load()
        return pixel_hash(read_array(image))


def check_hash(pixels: NDArray[np.uint8], with_junk: str | None) -> None:
    """Checks by :func:`hash_with_junk` that the data of a JPEG are complete.

    Raises:
        ImageError: its ``reason`` is ``truncated``.
    """
    if with_junk is not None and pixel_hash(pixels) != with_junk:
        raise ImageError("truncated", "the JPEG's data end before the picture does")


def _find_scan_ends(content: bytes) -> list[int]:
    """Returns where the coded data of each scan of a JPEG end; none where what follows them says nothing.

    Raises:
        ImageError: its ``reason`` is ``truncated``: the scans leave out coefficients, or bits of them.
    """
    at, ends = 2, list[int]()
    is_scanning = False
    lacking: dict[int, list[int]] = {}  # by component, the low bits that each coefficient lacks
    while (marker := _JPEG_MARKER.search(content, at)) is not None:
        kind, at = marker[1][0], marker.end()
        if is_scanning:
            ends.append(marker.start())
            is_scanning = False
        if kind == _EOI:
            if any(any(bits) for bits in lacking.values()):
                raise ImageError("truncated", "the JPEG ends before all of its scans have come")
            return ends
        if kind in _ARITHMETIC:
            return []
        if kind in _WITHOUT_LENGTH:
            continue
        [length] = struct.unpack_from(">H", content, at)
        segment = content[at + 2 : at + length]
        at += length
        if kind in _FRAMES:
            lacking = {number: [_ALL_BITS] * _COEFFICIENTS for number in segment[6 : 6 + 3 * segment[5] : 3]}
        if kind == _LOSSLESS_FRAME:  # it has no coefficients
            lacking = {number: [] for number in segment[6 : 6 + 3 * segment[5] : 3]}
        if kind == _SOS:
            is_scanning = True
            count = segment[0]
            first, last, bits = segment[1 + 2 * count : 4 + 2 * count]
            for number in segment[1 : 1 + 2 * count : 2]:
                if not lacking[number]:
                    continue
                lacking[number][first : last + 1] = [bits & 15] * (last + 1 - first)
    return []


# --- TIFF -------------------------------------------------------------------------------------------------------------

_WIDTH, _LENGTH, _BITS, _COMPRESSION, _PHOTOMETRIC, _PLANAR = 256, 257, 258, 259, 262, 284
_ROWS_PER_STRIP, _TILE_WIDTH, _TILE_LENGTH = 278, 322, 323
_PLACES = {"strip": (273, 279), "tile": (324, 325)}
"""The tags of their offsets and of their numbers of bytes."""

_UNCOMPRESSED, _OLD_JPEG, _YCBCR, _SEPARATE = 1, 6, 6, 2
_DEFLATE, _FILL_ORDER = frozenset({8, 32946}), 266


def check_tiff(image: TiffImagePlugin.TiffImageFile, file: BinaryIO) -> None:
    """Checks that a TIFF has all the strips or tiles that its size needs, within the file, and whole where deflated.

    Of deflated parts, libtiff writes to stderr what is wrong and goes on, and Pillow gives whatever was in memory.

    Args:
        image: the opened picture.
        file: its file, whose position stays as it is.

    Raises:
        ImageError: its ``reason`` is ``truncated``, or ``undecodable`` where deflated data are damaged.
    """
    tags = image.tag_v2
    if tags.get(_COMPRESSION) == _OLD_JPEG:  # other tags say where its data are
        return
    width, height = tags[_WIDTH], tags[_LENGTH]  # the image's own may be turned
    part = "tile" if _TILE_WIDTH in tags else "strip"
    offsets, lengths = (_read_numbers(tags, tag) for tag in _PLACES[part])
    if part == "tile":
        needed = _count_bytes(tags, width, height, tags[_TILE_WIDTH], tags[_TILE_LENGTH], is_whole=True)
    else:
        rows = min(tags.get(_ROWS_PER_STRIP, height), height)
        needed = _count_bytes(tags, width, height, width, rows)
    if len(offsets) < len(needed) or 0 < len(lengths) < len(needed):
        raise ImageError("truncated", f"a TIFF of {len(offsets):,} {part}(s), and its size needs {len(needed):,}")
    before = file.tell()
    end = file.seek(0, io.SEEK_END)
    file.seek(before)
    for number, least in enumerate(needed):
        # Where the lengths are left out, decoders read to the next offset, or to the end.
        length = lengths[number] if lengths else 1
        if not offsets[number] or length < least:
            raise ImageError("truncated", f"the TIFF lacks data in {part} {number + 1:,} of {len(needed):,}")
        if offsets[number] + length > end:
            raise ImageError("truncated", f"the TIFF's {part} {number + 1:,} of {len(needed):,} lies beyond its end")
        if tags.get(_COMPRESSION) in _DEFLATE and lengths and tags.get(_FILL_ORDER, 1) == 1:
            file.seek(offsets[number])
            _check_deflated(file, length, f"{part} {number + 1:,} of {len(needed):,}")
            file.seek(before)


def _check_deflated(file: BinaryIO, length: int, name: str) -> None:
    """Checks that a deflated part of a TIFF ends as such data do, and agrees with its checksum (RFC 1950).

    A checksum that was left out is not missed, since the pixels before it are all there.

    Args:
        file: at the part.
        length: of the part, in bytes.
        name: of the part.

    Raises:
        ImageError: its ``reason`` is ``truncated`` where the data end too early, or ``undecodable``.
    """
    unpacker, checksum = zlib.decompressobj(-zlib.MAX_WBITS), 1
    left = max(length - len(file.read(2)), 0)  # without the header, so that the checksum is compared here
    try:
        while left and not unpacker.eof and (packed := file.read(min(left, _BLOCK))):
            left -= len(packed)
            while packed and not unpacker.eof:  # in parts, since little may unpack to much
                checksum = zlib.adler32(unpacker.decompress(packed, _BLOCK), checksum)
                packed = unpacker.unconsumed_tail
        while not unpacker.eof and (rest := unpacker.decompress(b"", _BLOCK)):
            checksum = zlib.adler32(rest, checksum)
    except zlib.error as error:
        raise ImageError("undecodable", f"the TIFF's {name} is damaged ({error})") from None
    if not unpacker.eof:
        raise ImageError("truncated", f"the TIFF's {name} ends before its data do")
    recorded = (unpacker.unused_data + file.read(min(left, 4)))[:4]
    if len(recorded) == 4 and int.from_bytes(recorded) != checksum:
        raise ImageError("undecodable", f"the TIFF's {name} is damaged (its checksum is another)")


def _count_bytes(
    tags: Mapping[int, Any], width: int, height: int, across: int, down: int, *, is_whole: bool = False
) -> list[int]:
    """Returns the number of bytes that each part of a TIFF has at the least: 1 where it is compressed.

    Args:
        tags: the picture's tags.
        width: of the picture, in pixels.
        height: of the picture, in pixels.
        across: width of a part.
        down: height of a part.
        is_whole: whether parts at the edge are as large as the others.
    """
    depths = _read_numbers(tags, _BITS) or [1]
    planes = depths if tags.get(_PLANAR) == _SEPARATE else [sum(depths)]
    # Of YCbCr without compression, colour may have fewer samples.
    is_plain = tags.get(_COMPRESSION, _UNCOMPRESSED) == _UNCOMPRESSED and tags.get(_PHOTOMETRIC) != _YCBCR
    columns, rows = range(0, width, across), range(0, height, down)
    return [
        (down if is_whole else min(down, height - top)) * ((across * bits + 7) // 8) if is_plain else 1
        for bits in planes
        for top in rows
        for _ in columns
    ]


def _read_numbers(tags: Mapping[int, Any], tag: int) -> list[int]:
    value = tags.get(tag, ())
    return [int(one) for one in (value if isinstance(value, tuple) else (value,))]
