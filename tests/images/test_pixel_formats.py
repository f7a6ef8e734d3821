"""Pictures of every depth, mode and layout become the right 8-bit RGB, or are refused with the reason ``mode``.

One file, since all of it reads the same table of made pictures.
"""

import io
import logging
import re
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ml.core.errors import ImageError
from ml.images.decoding import Pixels, decode
from ml.images.deep_pictures import decode_scaled
from tests.helpers.pictures import bmp, pillow, planar_tiff, png, tiff, with_alpha

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (24, 32, 3), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (24, 32, 3), dtype=np.uint16)
FLOAT = (COLOUR / 255).astype(np.float32)
GREY = np.repeat(COLOUR[..., :1], 3, axis=2)
EDGE = np.where(np.arange(32) < 20, 255, 0).astype(np.uint8)  # alpha: the right part lies beyond the slide
BEYOND = np.where(EDGE[:, None] > 0, COLOUR, 0).astype(np.uint8)  # as openslide fills it: transparent black
SMOOTH_8 = np.stack(np.meshgrid(np.arange(0, 256, 4), np.arange(0, 256, 4)) * 2, axis=2)[..., :3].astype(np.uint8)
SMOOTH = np.stack(np.meshgrid(np.arange(0, 4096, 64), np.arange(0, 4096, 64)) * 2, axis=2)[..., :3].astype(np.uint16)
IMAGE = Image.fromarray(COLOUR)
PALETTE = IMAGE.quantize(200)


def scaled(samples: np.ndarray, bits: int) -> np.ndarray:
    return np.rint(samples.astype(np.float64) * 255 / (2**bits - 1)).astype(np.uint8)


def pyramid() -> bytes:
    import tifffile

    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as file:
        file.write(COLOUR, photometric="rgb")
        file.write(COLOUR[::2, ::2], photometric="rgb", subfiletype=1)
    return buffer.getvalue()


def tiff_of_two(second: np.ndarray, *, below: bool = False, big: bool = False, **options) -> bytes:
    """A TIFF with a second picture: a further page, or a SubIFD of the first."""
    import tifffile

    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer, bigtiff=big) as file:
        file.write(COLOUR, photometric="rgb", metadata=None, subifds=1 if below else None)
        file.write(second, photometric="rgb", metadata=None, **options)
    return buffer.getvalue()


def bgrx(fourth: np.ndarray | int) -> np.ndarray:
    """The pixels of a BMP of 32 bits, (height, width)."""
    red, green, blue = np.moveaxis(COLOUR.astype(np.uint32), -1, 0)
    return (np.asarray(fourth, np.uint32) << 24) | (red << 16) | (green << 8) | blue


def camera_jpeg(kind: int) -> bytes:
    """A JPEG with a second picture behind it (MPO), which is of this kind."""
    image = Image.fromarray(SMOOTH_8)
    data = pillow(image, "MPO", quality=100, subsampling=0, save_all=True, append_images=[image.resize((16, 12))])
    with Image.open(io.BytesIO(data)) as opened:
        size, offset = (opened.mpinfo[0xB002][1][name] for name in ("Size", "DataOffset"))
    entry = struct.pack("<LLL", 0, size, offset)  # of kind 0: undefined
    assert data.count(entry) == 1
    return data.replace(entry, struct.pack("<LLL", kind, size, offset))


def jpeg_of_12_bits() -> bytes:
    import imagecodecs

    return bytes(imagecodecs.jpeg8_encode(SMOOTH, level=100, bitspersample=12, subsampling="444"))


def jpeg_2000() -> bytes:
    import imagecodecs

    return bytes(imagecodecs.jpeg2k_encode(DEEP, level=0, reversible=True))


RGB = {"photometric": "rgb"}
HALF = COLOUR[::2, ::2]
MASKS = (0xFF0000, 0xFF00, 0xFF)
FIVE_BITS = COLOUR >> 3
IN_16_BITS = (FIVE_BITS.astype(np.uint16) << [10, 5, 0]).sum(axis=2)
EXTRA = {"extrasamples": ["unspecified"]}

PICTURES: dict[str, tuple[bytes, np.ndarray]] = {
    "8-bit RGB, PNG": (png(COLOUR), COLOUR),
    "8-bit RGB, BMP": (pillow(IMAGE, "BMP"), COLOUR),
    "8-bit RGB, TIFF": (tiff(COLOUR, **RGB), COLOUR),
    "8-bit RGB, TIFF with separate planes": (planar_tiff(COLOUR), COLOUR),
    "8-bit RGB, TIFF with smaller versions behind it": (pyramid(), COLOUR),
    "8-bit RGB, TIFF with smaller versions in SubIFDs": (tiff_of_two(HALF, below=True, subfiletype=1), COLOUR),
    "8-bit RGB, JPEG with large thumbnails behind it (MPO)": (camera_jpeg(0x010001), SMOOTH_8),
    "8-bit RGB, BMP of 32 bits": (bmp(bgrx(0), 32), COLOUR),
    "5-bit RGB, BMP of 16 bits": (bmp(IN_16_BITS, 16), (FIVE_BITS * 255.0 // 31).astype(np.uint8)),
    "opaque RGBA, BMP of 32 bits": (bmp(bgrx(255), 32, (*MASKS, 0xFF000000)), COLOUR),
    "palette, PNG": (pillow(PALETTE, "PNG"), np.asarray(PALETTE.convert("RGB"))),
    "opaque RGBA, PNG": (png(with_alpha(COLOUR, 255)), COLOUR),
    "16-bit RGB, PNG": (png(DEEP), DEEP),
    "16-bit RGB, TIFF": (tiff(DEEP, **RGB), DEEP),
    "16-bit RGB, TIFF with separate planes": (planar_tiff(DEEP), DEEP),
    "opaque 16-bit RGBA, PNG": (png(with_alpha(DEEP, 65535)), DEEP),
    "16-bit grey, PNG": (png(DEEP[..., 0]), DEEP[..., :1].repeat(3, axis=2)),
    "16-bit grey, TIFF": (tiff(DEEP[..., 0]), DEEP[..., :1].repeat(3, axis=2)),
    "8-bit grey, PNG": (png(COLOUR[..., 0]), GREY),
    "grey stored as RGB, PNG": (png(GREY), GREY),
    "palette with a transparent colour, PNG": (
        pillow(PALETTE, "PNG", transparency=3),
        np.asarray(PALETTE.convert("RGB")),
    ),
    "RGBA beyond a slide's edge, PNG": (png(with_alpha(BEYOND, EDGE)), BEYOND),
    "RGBA beyond a slide's edge, TIFF": (
        tiff(with_alpha(BEYOND, EDGE), extrasamples=["unassalpha"], **RGB),
        BEYOND,
    ),
    "RGBA beyond a slide's edge, BMP of 32 bits": (bmp(bgrx(EDGE), 32, (*MASKS, 0xFF000000)), COLOUR),
    "RGB and a fourth byte, BMP of 32 bits": (bmp(bgrx(EDGE), 32), COLOUR),
    "RGB and a fourth byte, BMP of 32 bits with masks": (bmp(bgrx(EDGE), 32, MASKS), COLOUR),
    "wholly transparent RGBA, PNG": (png(with_alpha(COLOUR, 0)), COLOUR),
    "CMYK, JPEG": (pillow(IMAGE.convert("CMYK"), "JPEG", quality=100), COLOUR),
    "CMYK, TIFF": (pillow(IMAGE.convert("CMYK"), "TIFF"), COLOUR),
    "YCbCr, TIFF without compression": (pillow(IMAGE.convert("YCbCr"), "TIFF"), COLOUR),
    "12-bit RGB, JPEG": (jpeg_of_12_bits(), SMOOTH),
    "32-bit RGB, TIFF": (tiff(COLOUR.astype(np.uint32), **RGB), COLOUR.astype(np.uint32)),
    "floating-point RGB, TIFF": (tiff(FLOAT, **RGB), FLOAT),
    "floating-point grey, TIFF": (tiff(FLOAT[..., 0]), FLOAT[..., :1].repeat(3, axis=2)),
    "RGB and a fourth channel, TIFF": (tiff(with_alpha(COLOUR, 7), **EXTRA, **RGB), COLOUR),
    "two pages, TIFF": (pillow(IMAGE, "TIFF", save_all=True, append_images=[IMAGE.rotate(180)]), COLOUR),
    "two pages of one size, TIFF that calls one a smaller version": (tiff_of_two(COLOUR[::-1], subfiletype=1), COLOUR),
    "two pictures, TIFF with a SubIFD": (tiff_of_two(COLOUR[::-1], below=True), COLOUR),
    "two pictures, BigTIFF with a SubIFD": (tiff_of_two(COLOUR[::-1], below=True, big=True), COLOUR),
    "two pictures, JPEG (MPO)": (camera_jpeg(0x020002), SMOOTH_8),
    "two pictures, PNG (animated)": (pillow(IMAGE, "PNG", save_all=True, append_images=[IMAGE.rotate(180)]), COLOUR),
    "16-bit RGB, JPEG 2000": (jpeg_2000(), DEEP),
}
"""By the first column of the table in docs/sources.md: the file, and the colour samples that were put into it."""


def holds_more(kind: str) -> bool:
    """Says whether such a file holds more than these samples."""
    return any(word in kind for word in ("transparent", "beyond", "fourth", "two p"))


# --- the table of the documentation -----------------------------------------------------------------------------------


def read_table() -> dict[str, list[str]]:
    """Returns the table of pixel formats in docs/sources.md: the cells behind the first, by the first."""
    text = (Path(__file__).parents[2] / "docs" / "sources.md").read_text(encoding="utf-8")
    section = text.split("## Depths and modes")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in section.splitlines() if "|" in line]
    return {first: rest for first, *rest in rows[2:]}


def name_outcome(read: Callable[[bytes], np.ndarray], data: bytes, stored: np.ndarray, holds_more: bool) -> str:
    """Says what a decoder makes of the samples that were put into a file."""
    try:
        found = np.asarray(read(data))
    except Exception:
        return "refuses"
    if found.shape == stored.shape[:2]:
        found = found[..., None].repeat(3, axis=2)
    everything = found.shape != stored.shape
    found = (found[0] if found.ndim == 4 else found)[..., :3]
    if found.shape != stored.shape:
        return "other"
    difference = abs(found.astype(float) - stored)
    is_lossy = stored is SMOOTH or stored is SMOOTH_8
    if found.dtype == stored.dtype and difference.max() <= stored.max() * (0.02 if is_lossy else 0):
        return "drops the rest" if holds_more and not everything else "as stored"
    if found.dtype == np.uint8 and stored.dtype == np.uint16 and abs(found.astype(int) - (stored >> 8)).max() <= 1:
        return "high byte"
    return "clips" if (found == np.clip(stored, 0, 255).astype(np.uint8)).all() else "other"


def read_by_pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def read_by_tensorflow(data: bytes) -> np.ndarray:
    import tensorflow

    decoded: np.ndarray = tensorflow.io.decode_image(data, channels=3, expand_animations=False).numpy()
    return decoded


def read_by_tifffile_or_imagecodecs(data: bytes) -> np.ndarray:
    import imagecodecs
    import tifffile

    if data[:2] not in {b"II", b"MM"}:
        return imagecodecs.imread(data)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages.first
        return np.moveaxis(page.asarray(), 0, -1) if page.planarconfig == 2 else page.asarray()


def say_what_we_do(data: bytes) -> str:
    outcomes = []
    for bits in (None, 16):
        try:
            decode_scaled(data, bits)
            outcomes.append("read")
        except ImageError as error:
            outcomes.append(f"`{error.reason}`")
    return {("`mode`", "read"): "`mode`, or scaled"}.get(tuple(outcomes), outcomes[0])


@pytest.mark.integration
def test_the_documented_table_is_what_the_decoders_and_we_do(caplog):
    caplog.set_level(logging.CRITICAL)
    decoders = (read_by_pillow, read_by_tensorflow, read_by_tifffile_or_imagecodecs)
    found = {
        kind: [*(name_outcome(read, data, stored, holds_more(kind)) for read in decoders), say_what_we_do(data)]
        for kind, (data, stored) in PICTURES.items()
    }
    assert read_table() == found


# --- whatever the file ------------------------------------------------------------------------------------------------


@st.composite
def files(draw) -> tuple[bytes, np.ndarray | None, str]:
    """A file; its colour samples if it holds nothing but opaque RGB of 8 or 16 bits; and how it was made."""
    kinds = ["uint8", "uint16"] if draw(st.booleans()) else ["int8", "int16", "uint32", "float16", "float32", "float64"]
    dtype = np.dtype(draw(st.sampled_from(kinds)))
    channels = draw(st.sampled_from([1, 2, 3, 3, 3, 4, 4, 5]))
    height, width = draw(st.integers(8, 40)), draw(st.integers(8, 40))
    greatest = draw(st.sampled_from([255, 1023, 4095, 65535]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = rng.integers(
        0,
        min(greatest, 127 if dtype == np.int8 else 255 if dtype.itemsize == 1 else 32767) + 1,
        (height, width, channels),
    )
    if dtype == np.uint16 and greatest == 65535:
        values *= 2
    samples = values.astype(dtype)
    grey = draw(st.integers(0, 5)) == 0
    if grey and channels >= 3:
        samples[..., :3] = samples[..., :1]
    opaque = draw(st.booleans())
    if channels == 4 and opaque and dtype.kind == "u":
        samples[..., 3] = np.iinfo(dtype).max
    pages = draw(st.sampled_from([1, 1, 1, 2]))
    clean = dtype in {np.dtype(np.uint8), np.dtype(np.uint16)} and channels in {3, 4} and not grey and pages == 1
    if draw(st.booleans()) and dtype in {np.dtype(np.uint8), np.dtype(np.uint16)} and channels <= 4:
        data, how, pages_ignored = png(samples if channels > 1 else samples[..., 0]), f"PNG {dtype} {channels}", True
        clean = dtype in {np.dtype(np.uint8), np.dtype(np.uint16)} and channels in {3, 4} and not grey
        assert pages_ignored
    else:
        data, how, named_alpha = draw(tiff_files(samples, pages))
        clean = clean and (channels == 3 or named_alpha)
    clean = clean and (channels == 3 or bool((samples[..., -1] == np.iinfo(dtype).max).all()))
    return data, samples[..., :3] if clean else None, how


@st.composite
def tiff_files(draw, samples: np.ndarray, pages: int) -> tuple[bytes, str, bool]:
    """A TIFF of these samples in some layout; how it was made; and whether its fourth channel is called alpha."""
    channels, compressed = samples.shape[2], draw(st.sampled_from([None, "lzw", "deflate", "zstd", "packbits"]))
    compressed = None if compressed == "packbits" and samples.dtype.itemsize > 1 else compressed
    big, byteorder = draw(
        st.sampled_from([(False, "<"), (False, ">"), (True, "<")])
    )  # Pillow opens no big-endian BigTIFF
    options = {"compression": compressed, "bigtiff": big, "byteorder": byteorder}
    if compressed in {"lzw", "deflate", "zstd"} and samples.dtype.kind in "ui":
        options["predictor"] = draw(st.booleans())
    tile = {"tile": (16, 16)} if draw(st.booleans()) else {"rowsperstrip": draw(st.integers(1, 50))}
    alpha = draw(st.sampled_from(["unassalpha", "assocalpha", "unspecified"]))
    if channels >= 3:
        options |= {"photometric": "rgb", "extrasamples": [alpha, *["unspecified"] * 2][: channels - 3]}
    else:
        options |= {"photometric": "minisblack", "extrasamples": [alpha][: channels - 1]}
    planar = channels > 1 and draw(st.booleans())
    page = np.ascontiguousarray(np.moveaxis(samples, -1, 0)) if planar else samples if channels > 1 else samples[..., 0]
    options |= {"planarconfig": "separate" if planar else "contig"} if channels > 1 else {}
    stack = page if pages == 1 else np.stack([page] * pages)
    how = f"TIFF {samples.dtype} {samples.shape} {options} {tile} {pages}"
    return tiff(stack, metadata=None, **options, **tile), how, alpha != "unspecified"


@settings(max_examples=150)
@given(files(), st.sampled_from([None, 10, 12, 16]))
def test_a_picture_becomes_the_right_8_bit_rgb_or_is_refused_for_its_mode(made, bits):
    data, samples, how = made
    deep = samples is not None and samples.dtype == np.uint16
    expected = None
    if samples is not None and not deep:
        expected = samples
    elif deep and bits and samples.max() < 2**bits:
        expected = scaled(samples, bits)
    if expected is None:
        with pytest.raises(ImageError) as caught:
            decode_scaled(data, bits)
        assert caught.value.reason == "mode", how
        return
    pixels, readable = decode_scaled(data, bits)
    assert pixels.dtype == np.uint8
    assert (pixels == expected).all(), how
    assert (decode(readable, strict=True) == expected).all()
    assert (readable is data) == (not deep)
    if not deep:
        assert (decode(data) == expected).all()  # as earlier releases did


@given(st.sampled_from(["png", "tiff", "lzw", "planar"]), st.floats(0, 1, exclude_max=True), st.booleans())
def test_a_damaged_deep_picture_is_refused_or_whole(kind, where, cut):
    made = {
        "png": lambda: png(DEEP),
        "tiff": lambda: tiff(DEEP, **RGB),
        "lzw": lambda: tiff(DEEP, compression="lzw", **RGB),
        "planar": lambda: planar_tiff(DEEP),
    }[kind]()
    at = int(where * len(made))
    damaged = made[:at] if cut else made[:at] + bytes([made[at] ^ 0xFF]) + made[at + 1 :]
    with suppress(ImageError):
        pixels = decode_scaled(damaged, 16)[0]
        if cut:
            assert (pixels == scaled(DEEP, 16)).all()


# --- what is said -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("16-bit RGB, TIFF with separate planes", "16 bits a channel, .* 'significant_bits: 12' in the source's YAML"),
        ("floating-point RGB, TIFF", "floating-point channels of 32 bits; export it as 8-bit RGB"),
        ("12-bit RGB, JPEG", "12-bit layers"),
        ("RGBA beyond a slide's edge, TIFF", "288 of 768 pixels are transparent, as beyond a slide's edge; cut"),
        ("two pages, TIFF", "2 pictures in one file, and only the first would be read; save each as a file"),
        ("grey stored as RGB, PNG", "greyscale, stored as RGB"),
        ("16-bit RGB, JPEG 2000", "file format JPEG2000, and only PNG, TIFF, JPEG and BMP are read"),
        ("RGB and a fourth channel, TIFF", "a further channel beside colour and alpha"),
    ],
)
def test_a_refusal_says_what_the_file_has_and_what_to_do(kind, message):
    with pytest.raises(ImageError, match=re.compile(message)) as caught:
        decode(PICTURES[kind][0], strict=True)
    assert caught.value.reason == "mode"


def test_a_value_above_the_declared_bits_is_refused():
    deep = np.minimum(DEEP, 4095)
    assert (decode_scaled(png(deep), 12)[0] == scaled(deep, 12)).all()
    deep[3, 4, 1] = 4096
    with pytest.raises(ImageError, match="mode: a value of 4096, and 12 significant bits allow 4095 at most"):
        decode_scaled(png(deep), 12)


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize(
    ("shape", "kind", "pictures"),
    [
        ((12, 16), 1, 1),
        ((24, 16), 1, 1),
        ((12, 16), 9, 1),  # as slide scanners mark the picture of the whole glass
        ((24, 32), 1, 2),
        ((25, 8), 1, 2),
        ((48, 64), 1, 2),
        ((12, 16), 0, 2),
        ((12, 16), 2, 2),
        ((24, 32), 0, 2),
    ],
)
def test_a_smaller_version_says_so_and_is_smaller(big, order, below, shape, kind, pictures):
    import tifffile

    from ml.images.tiff_directories import count_pictures

    file = io.BytesIO()
    with tifffile.TiffWriter(file, bigtiff=big, byteorder=order) as writer:
        writer.write(COLOUR, photometric="rgb", metadata=None, subifds=2 if below else None)
        writer.write(HALF, photometric="rgb", metadata=None, subfiletype=1)
        writer.write(np.resize(COLOUR, (*shape, 3)), photometric="rgb", metadata=None, subfiletype=kind)
    file.seek(7)
    assert (count_pictures(file), file.tell()) == (pictures, 7)


def test_tiff_directories_in_a_circle_or_beyond_the_end_are_counted_in_bounded_time():
    from ml.images.tiff_directories import count_pictures

    def directory(*entries: tuple[int, int, int, int], following: int) -> bytes:
        return (
            struct.pack("<H", len(entries))
            + b"".join(struct.pack("<HHLL", *e) for e in entries)
            + struct.pack("<L", following)
        )

    size = ((256, 4, 1, 32), (257, 4, 1, 24))
    first = b"II*\0" + struct.pack("<L", 8)
    assert count_pictures(io.BytesIO(first + directory(*size, following=8))) == 1
    assert count_pictures(io.BytesIO(first + directory(*size, (330, 4, 1, 8), following=8))) == 1
    assert count_pictures(io.BytesIO(first + directory(*size, following=10**9))) == 2
    assert count_pictures(io.BytesIO(first + directory(*size, (330, 12, 1, 8), following=0))) == 2
    assert count_pictures(io.BytesIO(first + directory(*size, following=0)[:-4])) == 1
    many = directory(*size, (330, 4, 2**31, 8), following=0)
    assert count_pictures(io.BytesIO(first + many)) == 2
    many = directory(*size, (330, 4, 10_000, 100), following=0).ljust(92, b"\0")
    assert count_pictures(io.BytesIO(first + many + struct.pack("<10000L", *range(200, 10_200)))) > 2


def test_the_fourth_byte_of_a_bmp_is_0_or_255_or_it_says_something():
    for fourth in (0, 255):
        for masks in ((), MASKS):
            assert (decode(bmp(bgrx(fourth), 32, masks), strict=True) == COLOUR).all()
    one_opaque = np.zeros(COLOUR.shape[:2], np.uint32)
    one_opaque[-1, -1] = 255
    for fourth in (one_opaque, 255 - one_opaque, 7):
        with pytest.raises(ImageError, match=r"mode: BMP of 32 bits whose fourth byte differs .* with 24 bits"):
            decode(bmp(bgrx(fourth), 32), strict=True)
        assert (decode(bmp(bgrx(fourth), 32)) == COLOUR).all()  # as earlier releases did


def test_a_cut_bmp_of_32_bits_is_truncated():
    with pytest.raises(ImageError) as caught:
        decode(bmp(bgrx(0), 32)[:-40], strict=True)
    assert caught.value.reason == "truncated"


def test_a_palette_of_deeper_colours_is_refused():
    def paletted(factor: int, more: int = 0) -> bytes:
        colours = np.arange(256, dtype=np.uint16) * factor
        colours[9] += more
        colormap = np.stack([colours, colours[::-1], colours])
        return tiff(COLOUR[..., 0], photometric="palette", colormap=colormap)

    expected = np.stack([COLOUR[..., 0], 255 - COLOUR[..., 0], COLOUR[..., 0]], axis=2)
    for factor in (257, 256):
        assert (decode(paletted(factor), strict=True) == expected).all()
    for deep in (paletted(1), paletted(257, 30)):
        with pytest.raises(ImageError, match="mode: TIFF with a palette of 16-bit colours"):
            decode(deep, strict=True)


def test_a_picture_of_before_is_decoded_as_before():
    """A file in the manifest of an earlier release: its pixels are compared with what was recorded."""
    kinds = ["8-bit grey, PNG", "RGBA beyond a slide's edge, PNG", "16-bit RGB, PNG", "two pages, TIFF"]
    for kind in kinds:
        data, _ = PICTURES[kind]
        pixels: Pixels = decode(data)
        assert (pixels == read_by_pillow(data)).all()


@pytest.mark.parametrize("samples", [COLOUR, DEEP >> 4], ids=["8 bits", "16 bits"])
@pytest.mark.parametrize(("tag", "what"), [(32997, "planes"), (32998, "planes a tile")])
def test_a_stack_of_planes_is_no_picture(samples: np.ndarray, tag: int, what: str) -> None:
    data = tiff(samples, photometric="rgb", extratags=[(65_000, 4, 1, 1, True)])
    own = struct.pack("<HHLL", 65_000, 4, 1, 1)
    assert data.count(own) == 1
    one, two = (data.replace(own, struct.pack("<HHLL", tag, 4, 1, planes)) for planes in (1, 2))
    assert decode_scaled(one, 12)[0].shape == COLOUR.shape
    with pytest.raises(ImageError, match=f"^mode: TIFF of 2 {what}; save each plane as a file"):
        decode_scaled(two, 12)
