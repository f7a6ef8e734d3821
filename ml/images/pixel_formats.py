"""Finds what a decoder would drop from a picture without a word: bits, samples, transparency, pages, colour.

Pillow hands out many formats as 8-bit RGB, whatever the file holds. These checks read what its parsers know of the file
and refuse what cannot become 8-bit RGB without a loss. docs/sources.md has the table.
"""

import hashlib
from collections.abc import Mapping
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, JpegImagePlugin, TiffImagePlugin

from ml.core.errors import ImageError
from ml.core.messages import quote_value
from ml.images.tiff_directories import count_pictures

FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
"""Pillow's names of the file formats that are opened; a camera's JPEG with a thumbnail behind it calls itself MPO."""

EARLIER_FORMATS = (*FORMATS, "GIF", "WEBP")
"""Formats that earlier releases opened as well, under an image's suffix: their manifests may have such files."""

_OTHER_FORMATS = {
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"8BPS": "PSD",
    b"\x00\x00\x00\x0cjP  ": "JPEG2000",
    b"\xff\x4f\xff\x51": "JPEG2000",
    b"\xff\x0a": "JPEG XL",
    b"\x00\x00\x00\x0cJXL ": "JPEG XL",
}
"""What files of other formats begin with, for the message alone."""

DEEP_BITS = 16
"""Bits of a channel in the deeper pictures that a declared rule can scale to 8 bits."""

_BAND = 2**20
"""Pixels that are copied at once."""

_WIDTH, _LENGTH, _TILE_WIDTH, _TILE_LENGTH, _DEPTHS = 256, 257, 322, 323, {32997: "planes", 32998: "planes a tile"}
_BITS, _SAMPLE_FORMAT, _EXTRA_SAMPLES, _COLOUR_MAP = 258, 339, 338, 320
_SAMPLE_FORMATS = {1: "unsigned", 2: "signed", 3: "floating-point"}
_GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "F"})


def check_pixel_format(image: Image.Image) -> None:
    """Checks an opened picture before it is decoded: it is 8-bit colour, and nothing besides that would be dropped.

    Raises:
        ImageError: its ``reason`` is ``mode``.
    """
    if image.mode in _GREY_MODES or image.mode.startswith("I;16"):
        raise ImageError("mode", f"greyscale (pixel format {image.mode}); a stained section is in colour")
    if image.mode == "CMYK":
        raise ImageError("mode", "pixel format CMYK, made for print; its colours are not those of the stain")
    if image.mode not in {"P", "PA", "RGB", "RGBA"}:
        raise ImageError("mode", f"pixel format {image.mode}; expected 8-bit RGB")
    if find_sample_bits(image) == DEEP_BITS:
        raise ImageError(
            "mode",
            "16 bits a channel, and nothing says how to scale them to 8; export it with 8 bits a channel, or declare "
            "how many of them the camera fills: 'significant_bits: 12' in the source's YAML, --significant-bits 12 "
            "for predict",
        )
    check_pages(image)
    _check_fourth_byte(image)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        _check_tiff_samples(image.tag_v2)


def find_sample_bits(image: Image.Image) -> int:
    """Returns the bits of a channel in the file: 16 for deeper pictures, which Pillow may show as 8-bit, else 8."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return DEEP_BITS if max(image.tag_v2.get(_BITS, (1,))) == DEEP_BITS else 8
    raw_modes = (str(argument) for tile in getattr(image, "tile", ()) for argument in _as_tuple(tile[3]))
    return DEEP_BITS if any(";16B" in raw_mode for raw_mode in raw_modes) and image.format == "PNG" else 8


def check_pages(image: Image.Image) -> None:
    """Checks that a file holds one picture. Smaller versions of it, as in a pyramid, and thumbnails do not count.

    A page or a SubIFD of a TIFF is a smaller version if it says so and is smaller. It may also hold a stack of planes
    as one picture, whose tiles or strips then take up the memory of all.

    Raises:
        ImageError: its ``reason`` is ``mode``.
    """
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        for tag, what in _DEPTHS.items():
            if (planes := image.tag_v2.get(tag, 1)) != 1:
                raise ImageError("mode", f"TIFF of {quote_value(planes)} {what}; save each plane as a file")
    pages = _count_pages(image)
    if pages > 1:
        raise ImageError("mode", f"{pages} pictures in one file, and only the first would be read; save each as a file")


def estimate_memory(image: Image.Image, *, deep: bool) -> int:
    """Estimates from an opened picture's header how many bytes it takes to decode it; rather more than fewer.

    Pillow holds 4 bytes a pixel and the array 3; what decoders need besides was measured
    (tests/images/test_decoding_memory.py). A tile of a TIFF is decoded whole, however little of it shows.
    """
    pixels = image.width * image.height
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tags = image.tag_v2
        pixels = max(pixels, int(tags.get(_TILE_WIDTH, 0)) * int(tags.get(_TILE_LENGTH, 0)))
    each = 12 if image.info.get("progressive") else 8  # a progressive JPEG's coefficients lie in memory together
    return pixels * (16 if deep else each)


def read_array(image: Image.Image, channel: str | None = None) -> NDArray[np.uint8]:
    """Copies a loaded picture to an array in bands of rows: whole, Pillow would hold three copies of it.

    Returns:
        uint8 (height, width, 3), RGB; with ``channel`` "A", uint8 (height, width): the alpha.
    """
    array = np.empty((image.height, image.width, 3)[: 2 if channel else 3], np.uint8)
    rows = max(1, _BAND // image.width)
    for top in range(0, image.height, rows):
        band = image if rows >= image.height else image.crop((0, top, image.width, min(top + rows, image.height)))
        mode = "RGBA" if channel else "RGB"
        converted = band if band.mode == mode else band.convert(mode)
        array[top : top + rows] = np.asarray(converted.getchannel(channel) if channel else converted)
    return array


def pixel_hash(pixels: NDArray[np.uint8]) -> str:
    """Returns the SHA-256 of an image's shape and pixels. The same image in another file has the same hash."""
    hasher = hashlib.sha256(f"{pixels.shape}".encode())
    hasher.update(np.ascontiguousarray(pixels).data)
    return hasher.hexdigest()


def check_opacity(image: Image.Image) -> None:
    """Checks that no pixel of a picture is transparent: what would be under it is no tissue.

    Raises:
        ImageError: its ``reason`` is ``mode``.
    """
    if image.mode not in {"RGBA", "PA"} and "transparency" not in image.info:
        return
    check_alpha(read_array(image, "A"), 255)


def check_alpha(alpha: NDArray[Any], opaque: int) -> None:
    """Checks that an alpha channel (height, width) is ``opaque`` everywhere.

    Raises:
        ImageError: its ``reason`` is ``mode``.
    """
    transparent = int((alpha < opaque).sum())
    if transparent:
        raise ImageError(
            "mode",
            f"{transparent:,} of {alpha.size:,} pixels are transparent, as beyond a slide's edge; cut the picture "
            "where there is tissue, or export it without transparency",
        )


def check_colour(pixels: NDArray[np.uint8]) -> None:
    """Checks that the channels of a picture differ somewhere: a grey picture in RGB is as grey as one in greyscale.

    Args:
        pixels: uint8 (height, width, 3).

    Raises:
        ImageError: its ``reason`` is ``mode``.
    """
    # Nearly every picture shows its colour in a sample.
    for part in (pixels[::16, ::16], pixels):
        if (part[..., :1] != part[..., 1:]).any():
            return
    raise ImageError("mode", "greyscale, stored as RGB: all three channels are equal; a stained section is in colour")


def explain_unidentified(file: BinaryIO) -> str | None:
    """Says which pixel format a file has that Pillow does not open; None if it is no such picture."""
    file.seek(0)
    start = file.read(12)
    file.seek(0)
    if other := _find_other_format(start):
        return f"file format {other}, and only PNG, TIFF, JPEG and BMP are read"
    try:
        if start.startswith(b"\xff\xd8"):
            JpegImagePlugin.JpegImageFile(file)
        if start.startswith(tuple(TiffImagePlugin.PREFIXES)):
            file.seek(0)
            tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(16 if start[2] == 43 else 8))
            file.seek(tags.next)
            tags.load(file)
            other = "channels or a compression that are not read" if {_WIDTH, _LENGTH} <= set(tags) else None
            described = _describe_samples(tags) or other
            return described and f"TIFF with {described}"
    except SyntaxError as error:
        return f"JPEG ({error})" if "-bit layers" in str(error) else None
    except Exception:  # Pillow's parsers raise many kinds on a damaged header
        return None
    return None


def _find_other_format(start: bytes) -> str | None:
    """Returns the name of another file format by a file's first 12 bytes; None where they say nothing."""
    if start[:4] == b"RIFF" and start[8:] == b"WEBP":
        return "WEBP"
    if start[4:8] == b"ftyp":
        return {b"heic": "HEIC", b"mif1": "HEIC", b"avif": "AVIF"}.get(start[8:])
    return next((name for magic, name in _OTHER_FORMATS.items() if start.startswith(magic)), None)


def _check_tiff_samples(tags: Mapping[int, Any]) -> None:
    """Raises ImageError if a TIFF's samples are not colour (with alpha) of 8 unsigned bits, as its tags say."""
    if described := _describe_samples(tags):
        raise ImageError("mode", f"TIFF with {described}; export it with 8 bits a channel")
    if 0 in tags.get(_EXTRA_SAMPLES, ()):
        raise ImageError("mode", "TIFF with a further channel beside colour and alpha; export it as RGB alone")
    # Entries of a TIFF's palette have 16 bits. Those of 8-bit colours are multiples of 257, or of 256.
    palette = np.array(tags.get(_COLOUR_MAP, ()), dtype=np.int64)
    if ((palette % 257 != 0) & (palette % 256 != 0)).any():
        raise ImageError("mode", "TIFF with a palette of 16-bit colours; export it as 8-bit RGB")


def _describe_samples(tags: Mapping[int, Any]) -> str | None:
    """Describes a TIFF's samples if they are not unsigned integers of up to 8 bits."""
    bits, formats = tags.get(_BITS, (1,)), tags.get(_SAMPLE_FORMAT, (1,))
    if max(bits) <= 8 and set(formats) == {1}:
        return None
    kind = _SAMPLE_FORMATS.get(max(formats), "other")
    return f"{kind} channels of {max(bits)} bits"


def _count_pages(image: Image.Image) -> int:
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return count_pictures(_file_of(image))
    if image.format == "MPO":  # a JPEG of a camera with large thumbnails behind it
        kinds = [entry["Attribute"]["MPType"] for entry in getattr(image, "mpinfo", {}).get(0xB002, [])]
        return 1 + sum(not kind.startswith("Large Thumbnail") for kind in kinds[1:])
    return int(getattr(image, "n_frames", 1))


def _check_fourth_byte(image: Image.Image) -> None:
    """Checks the fourth byte of a 32-bit BMP's pixels where the header does not call it alpha: 0, or 255, in all.

    Other values are alpha to some software. Pillow drops them all.
    """
    for tile in getattr(image, "tile", ()):
        place = str(_as_tuple(tile[3])[0]).find("X")  # in the order of bytes, such as BGRX
        if image.format != "BMP" or place < 0:
            continue
        file, remaining, values = _file_of(image), image.width * image.height, set[int]()
        file.seek(tile[2])
        while remaining > 0 and (band := file.read(4 * min(remaining, _BAND))):
            values |= set(np.unique(np.frombuffer(band, np.uint8)[place::4]).tolist())
            remaining -= _BAND
        if not (values <= {0} or values <= {255}):
            raise ImageError(
                "mode",
                "BMP of 32 bits whose fourth byte differs between pixels: transparency to some software, dropped by "
                "other; export it as RGB, with 24 bits",
            )


def _file_of(image: Image.Image) -> BinaryIO:
    """Returns the file of an opened picture that is not loaded yet."""
    assert isinstance(image, ImageFile.ImageFile)
    return cast("BinaryIO", image.fp)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
