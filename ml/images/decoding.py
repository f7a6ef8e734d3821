"""Pictures as arrays: decoding and resizing to the network's input.

One function decodes and one resizes, for training and for serving alike: a model never sees a picture made another way.
Needs NumPy and Pillow alone, since it travels with every logged model.
"""

import hashlib
import io
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ml.core.errors import ImageError

Pixels = NDArray[np.uint8]

INPUT_SIZE = 224
"""Side of the network's input in pixels."""

PREPROCESSING = {"size": INPUT_SIZE, "resize": "pillow-reduce-bicubic", "version": 2}
"""Names what :func:`resize` does. A cache or a model of another one is not for pictures that are made by this."""

MAX_PIXELS = 100_000_000
"""Pictures larger than this are refused before they are decoded (a decompression bomb, or a whole slide)."""

MIN_SIDE = 8
"""Pixels; what has fewer is no picture of tissue, whatever it was resized from."""


def decode(data: bytes | BinaryIO, *, strict: bool = False) -> Pixels:
    """The picture in an image file, as RGB.

    Greyscale, palette and transparent pictures are converted; 16-bit and floating-point ones are refused, since how to
    scale them to 8 bits is not for us to guess.

    Args:
        data: the file's bytes, or the open file, which is read as it is decoded.
        strict: refuse what no camera on a microscope makes, too: greyscale (what is learnt from is stained tissue, and
            its stain is half of what it tells), the colours of a printing press, and a side below ``MIN_SIDE`` pixels.

    Returns:
        uint8 array (height, width, 3).

    Raises:
        ImageError: ``undecodable`` (no picture), ``truncated``, ``mode`` (pixel format) or ``size`` (too large, or
            too small).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is checked below
            image = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError("size", f"{image.width}x{image.height} pixels; at most {MAX_PIXELS:,} are read")
            if image.mode not in {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}:
                raise ImageError("mode", f"pixel format {image.mode}; expected 8-bit RGB or greyscale")
            if strict and image.mode in {"1", "L", "LA"}:
                raise ImageError("mode", f"greyscale (pixel format {image.mode}); a stained section is in colour")
            if strict and image.mode == "CMYK":
                raise ImageError("mode", "pixel format CMYK, made for print; its colours are not those of the stain")
            if strict and min(image.size) < MIN_SIDE:
                raise ImageError("size", f"{image.width}x{image.height} pixels; a side has {MIN_SIDE} at the least")
            image.load()
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except Image.DecompressionBombError:  # Pillow has a limit of its own, which it looks at first
        raise ImageError("size", f"too many pixels; at most {MAX_PIXELS:,} are read") from None
    except UnidentifiedImageError as error:
        raise ImageError("undecodable", _one_line(error)) from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        # Pillow says "image file is truncated" or "broken PNG file"; a cut stream may also end in a struct error.
        reason = "truncated" if "truncated" in str(error).lower() else "undecodable"
        raise ImageError(reason, _one_line(error)) from None


def resize(pixels: Pixels) -> Pixels:
    """Any picture at the network's input size: uint8 (224, 224, 3). The aspect ratio is not kept, as in the recipe.

    Where a side has twice as many pixels or more, whole blocks of them are averaged first, and the rest is bicubic:
    every pixel counts, and a photograph of 700x460 takes half the time that bicubic takes for all of it. The two are
    1.7 of 255 apart on BreakHis' pictures, as far as bilinear is from bicubic.
    """
    if pixels.shape[:2] == (INPUT_SIZE, INPUT_SIZE):
        return pixels
    return np.asarray(
        Image.fromarray(pixels).resize((INPUT_SIZE, INPUT_SIZE), Image.Resampling.BICUBIC, reducing_gap=1.0)
    )


def pixel_hash(pixels: Pixels) -> str:
    """SHA-256 of a decoded picture: its shape and its bytes. The same picture in another file has the same hash."""
    hasher = hashlib.sha256(f"{pixels.shape}".encode())
    hasher.update(np.ascontiguousarray(pixels).data)
    return hasher.hexdigest()


def read_image(path: Path) -> Pixels:
    """The picture in a local file, as RGB uint8 (height, width, 3).

    Raises:
        ImageError: names the file and what is wrong with it. What training would not take is refused, too.
    """
    try:
        return decode(path.read_bytes(), strict=True)
    except OSError as error:
        raise ImageError("unreadable", f"{path}: {error.strerror}") from None
    except ImageError as error:
        raise ImageError(error.reason, f"{path}: {error.detail}") from None


def _one_line(error: Exception) -> str:
    # Pillow puts the BytesIO's address in its message, which says nothing to anyone.
    text = " ".join(str(error).split())
    return "not an image file" if "cannot identify image file" in text else text
