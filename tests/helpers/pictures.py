"""Encoded pictures of every depth, mode and layout that files come in."""

import io
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Samples = NDArray[Any]


def tiff(samples: Samples, **options: Any) -> bytes:
    """Returns a TIFF with these samples; options are tifffile's."""
    import tifffile

    buffer = io.BytesIO()
    tifffile.imwrite(buffer, samples, **options)
    return buffer.getvalue()


def planar_tiff(samples: Samples, **options: Any) -> bytes:
    """Returns a TIFF that holds the channels (height, width, channels) one after the other."""
    planes = np.ascontiguousarray(np.moveaxis(samples, -1, 0))
    return tiff(planes, photometric="rgb", planarconfig="separate", **options)


def bmp(samples: Samples, bits: int, masks: tuple[int, ...] = ()) -> bytes:
    """Returns a BMP of these values (height, width) of so many bits; of the channels' masks a fourth is alpha's."""
    pixels = np.ascontiguousarray(samples[::-1]).astype(f"<u{bits // 8}").tobytes()
    height, width = samples.shape
    fields = b"".join(struct.pack("<L", mask) for mask in masks)
    size = 108 if len(masks) == 4 else 40
    header = struct.pack("<LllHHLLllLL", size, width, height, 1, bits, 3 if masks else 0, len(pixels), 2835, 2835, 0, 0)
    header = (header + fields).ljust(size, b"\0")
    start = 14 + len(header)
    return b"BM" + struct.pack("<LHHL", start + len(pixels), 0, 0, start) + header + pixels


def png(samples: Samples) -> bytes:
    """Returns a PNG with 8 or 16 bits a channel: grey, grey and alpha, RGB or RGBA by the number of channels."""
    import imagecodecs

    return bytes(imagecodecs.png_encode(np.ascontiguousarray(samples)))


def pillow(image: Image.Image, file_format: str, **options: Any) -> bytes:
    """Returns a picture as Pillow saves it."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def with_alpha(samples: Samples, alpha: Samples | int) -> Samples:
    """Returns RGB samples with an alpha channel."""
    channel = np.broadcast_to(np.asarray(alpha, samples.dtype), samples.shape[:2])
    return np.concatenate([samples, channel[..., None]], axis=2)


def slow_bmp(side: int) -> bytes:
    """Returns a sound BMP, packed by runs of one pixel each: Pillow takes a third of a second a megapixel or more."""
    runs = np.ones((side, 2 * side + 2), np.uint8)
    runs[:, 1:-2:2] = np.random.default_rng(0).integers(0, 256, (side, side))
    runs[:, -2:] = 0  # the end of a row
    data = runs.tobytes() + b"\0\1"
    palette = b"".join(struct.pack("BBBB", 255 - value, value // 2, value, 0) for value in range(256))
    start = 54 + len(palette)
    header = struct.pack("<LllHHLLllLL", 40, side, side, 1, 8, 1, len(data), 2835, 2835, 256, 0)
    return b"BM" + struct.pack("<LHHL", start + len(data), 0, 0, start) + header + palette + data
