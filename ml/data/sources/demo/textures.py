"""Textures of fibres, chromatin and camera noise, and operations on maps of stain."""

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ml.core.taxonomy import IMAGE_SIZES

Floats = NDArray[Any]  # float32, which NumPy's type hints lose at the first operator

WIDTH, HEIGHT = IMAGE_SIZES[0]

TILE_SIDE = 512


def stamp_each(
    canvas: Floats, bank: Floats, which: NDArray[np.intp], x: Floats, y: Floats, join: np.ufunc, neutral: float
) -> None:
    """Joins ``bank[which[i]]``, centred on pixel (x[i], y[i]), to ``canvas`` in place.

    Args:
        canvas: (height, width), changed in place.
        bank: (kinds, side, side), the stamps.
        which: (n,), the index of each stamp in the bank.
        x: (n,), columns in pixels.
        y: (n,), rows in pixels.
        join: np.minimum or np.maximum.
        neutral: the value outside a stamp's shape, which changes nothing.
    """
    half = bank.shape[1] // 2
    height, width = canvas.shape
    column, row = np.round(x).astype(np.intp), np.round(y).astype(np.intp)
    near = (column > -half) & (column < width + half) & (row > -half) & (row < height + half)
    column, row, which = column[near], row[near], which[near]
    # With a border for stamps that stick out, no stamp needs clipping.
    padded = np.full((height + 4 * half, width + 4 * half), neutral, np.float32)
    padded[2 * half : -2 * half, 2 * half : -2 * half] = canvas
    used = np.flatnonzero((bank != neutral).any(axis=0).ravel())
    down, right = np.divmod(used, bank.shape[2])
    offsets = (down + half) * padded.shape[1] + right + half
    corners = row * padded.shape[1] + column
    flat = padded.reshape(-1)
    values = bank.reshape(len(bank), -1)[:, used]
    join.at(flat, (corners[:, None] + offsets[None]).ravel(), values[which].ravel())
    canvas[:] = padded[2 * half : -2 * half, 2 * half : -2 * half]


def resize(values: Floats, shape: tuple[int, int], box: tuple[float, float, float, float] | None = None) -> Floats:
    """Scales a map to ``shape`` (height, width) by bicubic interpolation; ``box`` is the part to scale, in pixels."""
    image = Image.fromarray(np.ascontiguousarray(values, np.float32))
    return np.array(image.resize((shape[1], shape[0]), Image.Resampling.BICUBIC, box), np.float32)


def blur(values: Floats, sigma: float) -> Floats:
    """Blurs a map by three taps in each direction, for a lens of about a pixel; much faster than a true Gaussian."""
    side = np.float32(min(0.5 * sigma * sigma, 0.32))
    for axis in (0, 1):
        inner = np.swapaxes(values, 0, axis)
        blurred = (1 - 2 * side) * inner
        blurred[1:] += side * inner[:-1]
        blurred[:-1] += side * inner[1:]
        values = np.swapaxes(blurred, 0, axis)
    return values


@cache
def _fibre_tile() -> Floats:
    """Returns periodic streaks along x with unit spread: white noise, its spectrum narrow along x and wide along y."""
    rng = np.random.default_rng(1)
    frequency = np.fft.fftfreq(TILE_SIDE)
    along, across = frequency[None, :], frequency[:, None]
    filtered = np.exp(-0.5 * ((along * 130) ** 2 + (across * 9.0) ** 2)) * (np.abs(across) > 0.012)
    streaks = np.fft.ifft2(np.fft.fft2(rng.standard_normal((TILE_SIDE, TILE_SIDE))) * filtered).real
    tile: Floats = (streaks / streaks.std()).astype(np.float32)
    return tile


def sample_fibres(along: Floats, across: Floats, unit: float) -> Floats:
    """Samples the fibre tile at coordinates in micrometres, linear between pixels; a tile pixel is ``unit`` wide."""
    tile = _fibre_tile().ravel()
    x, y = along * np.float32(1 / unit), across * np.float32(1 / unit)
    left, above = np.floor(x), np.floor(y)
    x -= left
    y -= above
    column, row = left.astype(np.int32), above.astype(np.int32)
    last = np.int32(TILE_SIDE - 1)  # the tile's side is a power of two
    near, far = column & last, (column + 1) & last
    here, below = (row & last) * TILE_SIDE, ((row + 1) & last) * TILE_SIDE
    top = tile[here + near]
    top += x * (tile[here + far] - top)
    bottom = tile[below + near]
    bottom += x * (tile[below + far] - bottom)
    top += y * (bottom - top)
    return top


@cache
def chromatin_tile() -> Floats:
    """Returns periodic chromatin clumps of 1.5 to 3 um at 0.35 um per pixel, with unit spread."""
    rng = np.random.default_rng(3)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(TILE_SIDE), np.fft.fftfreq(TILE_SIDE)))
    band = np.exp(-0.5 * ((frequency - 0.15) / 0.05) ** 2)
    clumps = np.fft.ifft2(np.fft.fft2(rng.standard_normal((TILE_SIDE, TILE_SIDE))) * band).real
    tile: Floats = (clumps / clumps.std()).astype(np.float32)
    return tile


@cache
def camera_grain() -> Floats:
    """Returns the camera's noise as a factor of the light; each picture uses another window of it."""
    rng = np.random.default_rng(2)
    return (1 + 0.012 * rng.standard_normal((HEIGHT + 301, WIDTH + 301))).astype(np.float32)
