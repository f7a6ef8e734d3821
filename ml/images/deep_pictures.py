"""Scales pictures with 16 bits a channel to 8 bits, by the number of bits that their camera fills.

A camera of 12 bits stores values from 0 to 4095 in channels of 16 bits. No file says so, and the greatest value in a
picture depends on what it shows. So the number is declared: ``significant_bits`` in a source's YAML, or an option of
``breakhis predict``.
"""

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from ml.core.errors import ImageError
from ml.images.completeness import check_png, check_tiff
from ml.images.decoding import (
    MEMORY,
    MIN_SIDE,
    Pixels,
    check_memory,
    decode,
    explained_errors,
    named_in_errors,
    open_image,
)
from ml.images.pixel_formats import DEEP_BITS, check_alpha, check_colour, check_pages, find_sample_bits


def decode_scaled(data: bytes, significant_bits: int | None, memory: int = MEMORY) -> tuple[Pixels, bytes]:
    """Decodes a picture to RGB as :func:`ml.images.decoding.decode` does if strict, and scales a deeper one.

    A value v becomes round(255 v / (2^b - 1)), where b are the significant bits. The same values become the same
    whatever else is in the picture.

    Args:
        data: the file's bytes.
        significant_bits: bits that the camera fills in channels of 16; None refuses such pictures.
        memory: bytes that decoding may take.

    Returns:
        uint8 (height, width, 3), and a file that holds exactly these pixels with 8 bits a channel: the given one, or a
        PNG in place of a deeper one.

    Raises:
        ImageError: as ``decode`` does; its ``reason`` is also ``mode`` where a value exceeds the declared bits.
    """
    if significant_bits is None or not _is_deep_colour(data):
        return decode(data, strict=True, memory=memory), data
    with explained_errors():
        pixels = _scale(_read_deep_samples(data, memory), significant_bits)
        check_colour(pixels)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
    return pixels, file.getvalue()


def _scale(samples: NDArray[np.uint16], significant_bits: int) -> Pixels:
    greatest = 2**significant_bits - 1
    if int(samples.max()) > greatest:
        raise ImageError(
            "mode",
            f"a value of {samples.max()}, and {significant_bits} significant bits allow {greatest} at most; the camera "
            "fills more bits than declared, or its software has shifted them (then declare 16)",
        )
    pixels = np.empty(samples.shape, np.uint8)
    for row, values in enumerate(samples):  # one at a time, since the products have 32 bits
        pixels[row] = (values.astype(np.uint32) * 255 + greatest // 2) // greatest
    return pixels


def read_scaled(path: Path, significant_bits: int | None, memory: int = MEMORY) -> bytes:
    """Returns a local picture's file with 8 bits a channel: its own content, or that of a PNG of a deeper one.

    Raises:
        ImageError: as :func:`decode_scaled` does; the message names the file and what is wrong with it.
    """
    with named_in_errors(path):
        return decode_scaled(path.read_bytes(), significant_bits, memory)[1]


def _is_deep_colour(data: bytes) -> bool:
    try:
        with explained_errors(), open_image(io.BytesIO(data)) as image:
            return (
                image.mode in {"RGB", "RGBA"}
                and image.format in {"PNG", "TIFF"}
                and find_sample_bits(image) == DEEP_BITS
            )
    except ImageError:
        return False  # decode says why


def _read_deep_samples(data: bytes, memory: int) -> NDArray[np.uint16]:
    """Returns the samples of a 16-bit RGB picture: uint16 (height, width, 3)."""
    with open_image(io.BytesIO(data)) as image:
        check_pages(image)
        if min(image.size) < MIN_SIDE:
            raise ImageError("size", f"{image.width}x{image.height} pixels; a side has {MIN_SIDE} at the least")
        check_memory(image, memory, deep=True)
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            check_tiff(image, io.BytesIO(data))
        size = (image.height, image.width)
        samples = _decode_tiff(data) if isinstance(image, TiffImagePlugin.TiffImageFile) else _decode_png(data, image)
    if samples.dtype != np.uint16 or samples.ndim != 3 or samples.shape[:2] != size or samples.shape[2] not in {3, 4}:
        kind = f"{samples.dtype}, shape {samples.shape}"
        raise ImageError("mode", f"channels of {DEEP_BITS} bits, but no RGB picture ({kind}); export it as 8-bit RGB")
    if samples.shape[2] == 4:
        check_alpha(samples[..., 3], 2**DEEP_BITS - 1)
    return samples[..., :3]


def _decode_png(data: bytes, image: Image.Image) -> NDArray[np.uint16]:
    import imagecodecs

    image.load()  # Pillow notices a cut file and a wrong checksum, and libpng does not
    check_png(io.BytesIO(data))
    samples: NDArray[np.uint16] = imagecodecs.png_decode(data)
    return samples


def _decode_tiff(data: bytes) -> NDArray[np.uint16]:
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages.first
        if page.tags.valueof("Orientation", 1) != 1:
            raise ImageError("mode", "TIFF of 16 bits that is to be turned (Orientation); export it upright")
        samples: NDArray[np.uint16] = page.asarray()
        if 0 in getattr(page, "extrasamples", ()):
            raise ImageError("mode", "TIFF with a further channel beside colour and alpha; export it as RGB alone")
        return np.moveaxis(samples, 0, -1) if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE else samples
