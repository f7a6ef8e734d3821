"""Decodes images to arrays and resizes them to the network's input.

Training and serving share one function that decodes and one that resizes, so a model never gets an image that was
preprocessed differently. The module needs only NumPy and Pillow, since every logged model carries a copy of it.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from ml.core.errors import ImageError
from ml.core.messages import cut_text
from ml.images.completeness import check_hash, check_png, check_tiff, hash_with_junk
from ml.images.pixel_formats import (
    EARLIER_FORMATS,
    FORMATS,
    check_colour,
    check_opacity,
    check_pixel_format,
    estimate_memory,
    explain_unidentified,
    read_array,
)

Pixels = NDArray[np.uint8]

INPUT_SIZE = 224
"""Side of the network's input in pixels."""

PREPROCESSING = {"size": INPUT_SIZE, "resize": "pillow-reduce-bicubic", "version": 2}
"""Identifies what :func:`resize` does. A cache or a model with another value does not fit images made by it."""

MAX_PIXELS = 100_000_000
"""Images with more pixels are refused before they are decoded (a decompression bomb, or a whole slide)."""

MEMORY = 512_000_000
"""Bytes that decoding one new picture may take where no setting says otherwise: some 64 megapixels of 8-bit RGB, or 32
with 16 bits a channel. The cameras of microscopes do not reach that."""

MIN_SIDE = 8
"""Smallest side in pixels; an image with a smaller side shows no tissue, whatever it was resized from."""


def decode(data: bytes | BinaryIO, *, strict: bool = False, memory: int = MEMORY) -> Pixels:
    """Decodes an image file to RGB.

    Args:
        data: the file's bytes, or the open file, which is read while it is decoded.
        strict: accept only what becomes 8-bit RGB without a loss and shows a stained section: no greyscale (models are
            trained on stained tissue, and its stain carries half of the information), no deeper channels, no
            transparent pixels, no further pages, no CMYK, which is made for print, no side below ``MIN_SIDE`` pixels.
            Whatever is new to the system is decoded so. Without it all that earlier releases took is decoded as they
            did, which a file in an older manifest needs; a picture that is accepted has the same pixels either way.
        memory: bytes that decoding may take if strict, as the header tells before anything is decoded.

    Returns:
        uint8 array (height, width, 3).

    Raises:
        ImageError: its ``reason`` is ``undecodable`` (no image), ``truncated``, ``mode`` (pixel format), ``size`` (too
            many pixels, or too few) or ``memory`` (more than may be taken, or than there is).
    """
    file = io.BytesIO(data) if isinstance(data, bytes) else data
    with explained_errors():
        pixels = _decode_rgb(file, strict, memory)
    if strict:
        check_colour(pixels)
    return pixels


def _decode_rgb(file: BinaryIO, strict: bool, memory: int) -> Pixels:
    with open_image(file, FORMATS if strict else EARLIER_FORMATS) as image:
        if image.mode not in {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}:
            raise ImageError("mode", f"pixel format {image.mode}; expected 8-bit RGB or greyscale")
        if strict:
            check_pixel_format(image)
            if min(image.size) < MIN_SIDE:
                raise ImageError("size", f"{image.width}x{image.height} pixels; a side has {MIN_SIDE} at the least")
            check_memory(image, memory)
            if isinstance(image, TiffImagePlugin.TiffImageFile):
                check_tiff(image, file)
        with_junk = hash_with_junk(file) if strict and image.format in {"JPEG", "MPO"} else None
        image.load()
        if strict:
            check_opacity(image)
        pixels = read_array(image)
        if strict and image.format == "PNG":
            check_png(file)
        check_hash(pixels, with_junk)
        return pixels


def open_image(file: BinaryIO, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Reads a picture's header, by its content and not by its name.

    Raises:
        ImageError: its ``reason`` is ``undecodable`` (no image), ``mode`` (pixel format) or ``size`` (too large).
    """
    with warnings.catch_warnings(), explained_errors():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is checked below
        try:
            image = Image.open(file, formats=formats)
        except UnidentifiedImageError as error:
            if pixel_format := explain_unidentified(file):
                raise ImageError("mode", f"{pixel_format}; export it as 8-bit RGB") from None
            raise ImageError("undecodable", _one_line(error)) from None
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise ImageError("size", f"{image.width}x{image.height} pixels; at most {MAX_PIXELS:,} are read")
    return image


def check_memory(image: Image.Image, memory: int, *, deep: bool = False) -> None:
    """Checks by its header that a picture can be decoded in so many bytes.

    Args:
        image: the opened picture.
        memory: bytes that decoding may take.
        deep: the picture is decoded with 16 bits a channel and scaled.

    Raises:
        ImageError: its ``reason`` is ``memory``.
    """
    needed = estimate_memory(image, deep=deep)
    if needed > memory:
        raise ImageError(
            "memory",
            f"{image.width}x{image.height} pixels take up to {needed / 1e6:,.0f} MB to decode, and {memory / 1e6:,.0f} "
            "MB are allowed; cut the picture into fields, or raise BREAKHIS_DECODING_MEMORY",
        )


@contextmanager
def explained_errors() -> Iterator[None]:
    """Has every error of a decoder, of whatever class, raised as an ImageError: decoders have many on damaged files."""
    try:
        yield
    except ImageError:
        raise
    except Image.DecompressionBombError:  # Pillow checks a limit of its own first
        raise ImageError("size", f"too many pixels; at most {MAX_PIXELS:,} are read") from None
    except MemoryError:
        raise ImageError("memory", "there was not enough memory to decode it; try again with fewer processes") from None
    except Exception as error:
        raise _explain_damage(error) from None


def _explain_damage(error: Exception) -> ImageError:
    """Returns the error for a picture whose decoder failed."""
    if "unknown raw mode" in str(error):  # such as separate planes with premultiplied alpha
        return ImageError("mode", "a layout of channels that is not read; export it as 8-bit RGB")
    # Pillow reports "image file is truncated" or "broken PNG file"; a cut stream may also raise a struct error.
    reason = "truncated" if "truncated" in str(error).lower() else "undecodable"
    ours = isinstance(error, OSError | SyntaxError | ValueError | EOFError | RuntimeError)
    return ImageError(reason, _one_line(error) if ours else f"damaged ({type(error).__name__}: {_one_line(error)})")


def resize(pixels: Pixels) -> Pixels:
    """Resizes an image to the network's input: uint8 (224, 224, 3). The aspect ratio is not kept, as in the recipe.

    Where a side has at least twice as many pixels, whole blocks of pixels are averaged first and the rest is bicubic.
    Every pixel counts, and an image of 700x460 takes half the time of bicubic alone. The two differ by 1.7 of 255 on
    BreakHis' images, as much as bilinear and bicubic do.
    """
    if pixels.shape[:2] == (INPUT_SIZE, INPUT_SIZE):
        return pixels
    return np.asarray(
        Image.fromarray(pixels).resize((INPUT_SIZE, INPUT_SIZE), Image.Resampling.BICUBIC, reducing_gap=1.0)
    )


def read_image(path: Path) -> Pixels:
    """Decodes a local file to RGB uint8 (height, width, 3). It refuses what training refuses.

    Raises:
        ImageError: the file is no usable image; the message names the file and what is wrong with it.
    """
    with named_in_errors(path):
        return decode(path.read_bytes(), strict=True)


@contextmanager
def named_in_errors(path: Path) -> Iterator[None]:
    """Has the errors raised inside name a local file."""
    try:
        yield
    except OSError as error:
        raise ImageError("unreadable", f"{path}: {error.strerror}") from None
    except ImageError as error:
        raise ImageError(error.reason, f"{path}: {error.detail}") from None


def _one_line(error: Exception) -> str:
    # Pillow's message contains the address of the BytesIO object, which helps nobody.
    text = cut_text(error) or type(error).__name__
    return "not an image file" if "cannot identify image file" in text else text
