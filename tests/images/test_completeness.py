"""Pictures of which a part is missing are refused, and whole ones of every layout are not."""

import io
import re
import struct
import zlib
from collections.abc import Callable
from itertools import pairwise

import imagecodecs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ml.core.errors import ImageError
from ml.images.decoding import decode
from ml.images.deep_pictures import decode_scaled
from tests.helpers.pictures import pillow, planar_tiff, png, tiff, with_alpha

RNG = np.random.default_rng(0)
HEIGHT, WIDTH = 83, 101  # no multiples of a block or tile
SUMS = np.arange(WIDTH)[None, :, None] * [1, 2, 0] + np.arange(HEIGHT)[:, None, None] * [0, 1, 2]
COLOUR = (SUMS + RNG.integers(0, 40, (HEIGHT, WIDTH, 3))).clip(0, 255).astype(np.uint8)
DEEP = COLOUR.astype(np.uint16) * 16
IMAGE = Image.fromarray(COLOUR)
RGB = {"photometric": "rgb"}


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def rows_of(samples: np.ndarray) -> bytes:
    """The rows of a PNG before they are packed, each with its filter byte."""
    return b"".join(b"\0" + row.astype(samples.dtype.newbyteorder(">")).tobytes() for row in samples)


def own_png(
    samples: np.ndarray, share: float = 1, *, interlaced: bool = False, parts: int = 1, end: bytes = chunk(b"IEND", b"")
) -> bytes:
    """A PNG of which only this share of the rows was packed, and the stream closed properly."""
    height, width, channels = samples.shape
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    images = [samples[t::d, x::a] for x, t, a, d in passes] if interlaced else [samples]
    raw = b"".join(rows_of(image) for image in images if image.size)
    packed = zlib.compress(raw[: int(len(raw) * share)])
    kinds = {3: 2, 4: 6}
    head = struct.pack(">IIBBBBB", width, height, samples.dtype.itemsize * 8, kinds[channels], 0, 0, int(interlaced))
    cuts = np.linspace(0, len(packed), parts + 1).astype(int)
    data = b"".join(chunk(b"IDAT", packed[a:b]) for a, b in pairwise(cuts))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + data + end


def cut_jpeg(data: bytes, share: float) -> bytes:
    """A JPEG whose coded data end early, before a proper end."""
    start = data.index(b"\xff\xda")
    return data[: start + int((len(data) - start) * share)] + b"\xff\xd9"


JPEGS = {
    "baseline": pillow(IMAGE, "JPEG", quality=90),
    "4:4:4": pillow(IMAGE, "JPEG", quality=100, subsampling=0),
    "4:2:2": pillow(IMAGE, "JPEG", quality=60, subsampling=1),
    "4:2:0": pillow(IMAGE, "JPEG", quality=30, subsampling=2, optimize=True),
    "restart markers": pillow(IMAGE, "JPEG", restart_marker_blocks=3),
    "restart markers after each row": pillow(IMAGE, "JPEG", restart_marker_rows=1, subsampling=2),
    "progressive": pillow(IMAGE, "JPEG", progressive=True, quality=90),
    "progressive, 4:4:4": pillow(IMAGE, "JPEG", progressive=True, subsampling=0, quality=100),
    "progressive, restart markers": pillow(IMAGE, "JPEG", progressive=True, restart_marker_blocks=5),
    "RGB": pillow(IMAGE, "JPEG", keep_rgb=True),
    "MPO": pillow(IMAGE, "MPO"),
    "a comment and data behind it": pillow(IMAGE, "JPEG", comment=b"\xff\xd9\xff\xda") + b"\xff\xd8\xff\xd9 etc",
    "one block": pillow(IMAGE.crop((0, 0, 8, 8)), "JPEG"),
}
PNGS = {
    "plain": own_png(COLOUR),
    "interlaced": own_png(COLOUR, interlaced=True),
    "interlaced and small": own_png(COLOUR[:9, :8], interlaced=True),
    "in many parts": own_png(COLOUR, parts=50),
    "without an end": own_png(COLOUR, end=b""),
    "with a text between": own_png(COLOUR, end=chunk(b"tEXt", b"a\0b") + chunk(b"IEND", b"")),
    "opaque": own_png(with_alpha(COLOUR, 255), interlaced=True),
    "Pillow": pillow(IMAGE, "PNG", optimize=True),
    "libpng": png(COLOUR),
    **{f"palette of {n}": pillow(IMAGE.quantize(n), "PNG") for n in (2, 4, 16, 200)},
}
TIFFS = {
    "plain": tiff(COLOUR, **RGB),
    "strips": tiff(COLOUR, rowsperstrip=7, **RGB),
    "tiles": tiff(COLOUR, tile=(16, 32), **RGB),
    "planes": planar_tiff(COLOUR, rowsperstrip=10),
    "planes of tiles": planar_tiff(COLOUR, tile=(16, 16), compression="zlib"),
    "BigTIFF": tiff(COLOUR, rowsperstrip=9, bigtiff=True, **RGB),
    "turned": pillow(IMAGE, "TIFF", tiffinfo={274: 6}),
    "palette": pillow(IMAGE.quantize(100), "TIFF"),
    "opaque": tiff(with_alpha(COLOUR, 255), extrasamples=["unassalpha"], rowsperstrip=9, **RGB),
    **{f"{c} by tifffile": tiff(COLOUR, compression=c, rowsperstrip=11, **RGB) for c in ("lzw", "zlib", "packbits")},
    **{f"{c} in tiles": tiff(COLOUR, compression=c, tile=(32, 16), **RGB) for c in ("lzw", "zlib", "jpeg")},
    "zlib and predictor": tiff(COLOUR, compression="zlib", predictor=True, **RGB),
    **{
        f"{c} by Pillow": pillow(IMAGE, "TIFF", compression=c) for c in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits")
    },
}


@pytest.mark.parametrize("data", [*JPEGS.values(), *PNGS.values(), *TIFFS.values()], ids=[*JPEGS, *PNGS, *TIFFS])
def test_a_whole_picture_is_taken(data: bytes) -> None:
    decode(data, strict=True)
    decode_scaled(data, 12)


def refuse(data: bytes, read: Callable[[bytes], object] = lambda data: decode(data, strict=True)) -> None:
    with pytest.raises(ImageError) as caught:
        read(data)
    assert caught.value.reason == "truncated"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9, 0.9999])
@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("parts", [1, 7])
def test_a_png_without_its_last_rows_is_truncated(share: float, interlaced: bool, parts: int) -> None:
    refuse(own_png(COLOUR, share, interlaced=interlaced, parts=parts))
    refuse(own_png(COLOUR, share, interlaced=interlaced, parts=parts, end=b""))
    deep = own_png(DEEP, share, interlaced=interlaced, parts=parts)
    refuse(deep, lambda data: decode_scaled(data, 12))


def test_pixels_of_a_png_behind_another_chunk_are_not_read() -> None:
    parts = own_png(COLOUR, parts=2)
    second = parts.rindex(b"IDAT") - 4
    refuse(parts[:second] + chunk(b"tEXt", b"a\0b") + parts[second:])


@pytest.mark.parametrize("form", JPEGS)
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8, 0.93])
def test_a_cut_jpeg_that_was_closed_is_truncated(form: str, share: float) -> None:
    if form not in {"one block", "MPO", "a comment and data behind it"}:
        refuse(cut_jpeg(JPEGS[form], share))


@pytest.mark.parametrize("form", ["restart markers", "restart markers after each row"])
def test_a_jpeg_cut_at_a_restart_marker_is_truncated(form: str) -> None:
    data = JPEGS[form]
    start = data.index(b"\xff\xda")
    for marker in re.finditer(rb"\xff[\xd0-\xd7]", data[start:]):
        for cut in (marker.start(), marker.end()):
            refuse(data[: start + cut] + b"\xff\xd9")


@pytest.mark.parametrize("form", ["progressive", "progressive, 4:4:4"])
def test_a_jpeg_without_its_last_scans_is_truncated(form: str) -> None:
    data = JPEGS[form]
    scans = [found.start() for found in re.finditer(rb"\xff\xda", data)]
    assert len(scans) > 3
    for start in scans[1:]:
        tables = max(data.rfind(b"\xff\xc4", 0, start), 0)
        for cut in {start, tables if data.rfind(b"\xff\xda", 0, start) < tables else start}:
            refuse(data[:cut] + b"\xff\xd9")


def test_data_missing_in_a_scan_before_the_last_are_found() -> None:
    data = JPEGS["progressive"]
    [first, second] = [found.start() for found in re.finditer(rb"\xff\xda", data)][:2]
    tables = data.index(b"\xff\xc4", first)
    refuse(data[: tables - 60] + data[min(tables, second) :])


@given(st.floats(0.05, 0.97), st.sampled_from(["baseline", "4:4:4", "4:2:0", "restart markers", "progressive"]))
def test_wherever_a_jpeg_is_cut_it_is_refused(share: float, form: str) -> None:
    with pytest.raises(ImageError) as caught:
        decode(cut_jpeg(JPEGS[form], share), strict=True)
    # Between two scans are tables, and a cut one is an error of its own.
    assert caught.value.reason in {"truncated", *(["undecodable"] if form == "progressive" else [])}


def patch(data: bytes, tag: int, change: Callable[[list[int]], list[int]]) -> bytes:
    """Changes the values of a tag of whole numbers in a TIFF."""
    import tifffile

    with tifffile.TiffFile(buffer := io.BytesIO(data)) as file:
        entry = file.pages.first.tags[tag]
        values = entry.value if isinstance(entry.value, tuple) else (entry.value,)
        entry.overwrite(tuple(change(list(values))))
    return buffer.getvalue()


PLACES = {"strips": (273, 279), "tiles": (324, 325), "planes": (273, 279), "zlib in tiles": (324, 325)}


@pytest.mark.parametrize("form", PLACES)
@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("value", [0, 60_000])
def test_a_tiff_without_a_strip_or_tile_is_truncated(form: str, place: int, value: int) -> None:
    def change(values: list[int]) -> list[int]:
        values[place] = value
        return values

    for tag in PLACES[form]:
        refuse(patch(TIFFS[form], tag, change))


@pytest.mark.parametrize("form", PLACES)
def test_a_tiff_of_too_few_strips_or_tiles_is_truncated(form: str) -> None:
    for tag in PLACES[form]:
        refuse(patch(TIFFS[form], tag, lambda values: values[:-1]))


@pytest.mark.parametrize("form", ["strips", "tiles", "planes"])
def test_a_strip_with_fewer_bytes_than_its_rows_is_truncated(form: str) -> None:
    refuse(patch(TIFFS[form], PLACES[form][1], lambda values: [values[0] - 1, *values[1:]]))


def test_a_deep_tiff_with_a_part_missing_is_truncated() -> None:
    data = tiff(DEEP, rowsperstrip=10, compression="zlib", **RGB)
    for tag, value in ((273, 0), (279, 0), (273, 60_000)):
        broken = patch(data, tag, lambda values, value=value: [*values[:-1], value])
        refuse(broken, lambda data: decode_scaled(data, 12))


DEFLATED = {
    "strips": tiff(COLOUR, rowsperstrip=20, compression="zlib", **RGB),
    "one strip": tiff(COLOUR, rowsperstrip=HEIGHT, compression="zlib", **RGB),
    "tiles": tiff(COLOUR, tile=(32, 32), compression="zlib", predictor=True, **RGB),
    "planes": planar_tiff(COLOUR, compression="zlib"),
    "by Pillow": pillow(IMAGE, "TIFF", compression="tiff_adobe_deflate"),
}


@pytest.mark.parametrize("form", list(DEFLATED))
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_deflated_data_that_were_damaged_are_refused(form: str, share: float) -> None:
    """libtiff goes on without a word to Pillow, with pixels of whatever was in memory."""
    data = bytearray(DEFLATED[form])
    with Image.open(io.BytesIO(data)) as image:
        part = "tile" if 324 in image.tag_v2 else "strip"
        offsets, lengths = (image.tag_v2[tag] for tag in ((324, 325) if part == "tile" else (273, 279)))
    at = offsets[-1] + int(lengths[-1] * share)
    zeroed, flipped = data[:], data[:]
    zeroed[at : offsets[-1] + lengths[-1]] = bytes(offsets[-1] + lengths[-1] - at)
    flipped[at] ^= 16
    for broken in (zeroed, flipped):
        with pytest.raises(ImageError) as raised:
            decode(bytes(broken), strict=True)
        assert raised.value.reason in {"undecodable", "truncated"}
    assert decode(bytes(data), strict=True).shape == COLOUR.shape


def test_a_missing_checksum_of_deflated_data_is_not_missed() -> None:
    """All pixels are there: decoders do not ask for it either."""
    tag = PLACES["strips"][1]
    shorter = patch(DEFLATED["one strip"], tag, lambda values: [values[0] - 4])
    assert (decode(shorter, strict=True) == COLOUR).all()
    refuse(patch(DEFLATED["one strip"], tag, lambda values: [values[0] // 2]))


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_lossless_jpeg_that_ends_early_is_truncated(share: float) -> None:
    data = bytes(imagecodecs.jpeg8_encode(COLOUR, lossless=True))
    assert (decode(data, strict=True) == COLOUR).all()
    refuse(cut_jpeg(data, share))
