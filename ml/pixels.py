"""Pictures as arrays: decoding, resizing to the network's input, and the cache of resized pictures.

One function decodes and one resizes, for training and for serving alike: a model never sees a picture made another way.
"""

import hashlib
import io
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ml.errors import ImageError, StoreError
from ml.progress import track
from ml.store import Store, digest

if TYPE_CHECKING:
    import pandas as pd

Pixels = NDArray[np.uint8]

SIZE = 224
"""Side of the network's input in pixels."""

VIEW = {"view": "identity", "size": SIZE, "resize": "pillow-bicubic", "version": 1}
"""What is done to a picture before the network sees it; part of every cache's name."""

MAX_PIXELS = 100_000_000
"""Pictures larger than this are refused before they are decoded (a decompression bomb, or a whole slide)."""

_PART = 512  # pictures a cache part and so in memory at once: 77 MB


def decode(data: bytes) -> Pixels:
    """The picture in an image file, as RGB.

    Greyscale, palette and transparent pictures are converted; 16-bit and floating-point ones are refused, since how to
    scale them to 8 bits is not for us to guess.

    Returns:
        uint8 array (height, width, 3).

    Raises:
        ImageError: ``undecodable`` (no picture), ``truncated``, ``mode`` (pixel format) or ``size`` (too large).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is checked below
            image = Image.open(io.BytesIO(data))
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError("size", f"{image.width}x{image.height} pixels; at most {MAX_PIXELS:,} are read")
            if image.mode not in {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}:
                raise ImageError("mode", f"pixel format {image.mode}; expected 8-bit RGB or greyscale")
            image.load()
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ImageError("undecodable", _one_line(error)) from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        # Pillow says "image file is truncated" or "broken PNG file"; a cut stream may also end in a struct error.
        reason = "truncated" if "truncated" in str(error).lower() else "undecodable"
        raise ImageError(reason, _one_line(error)) from None


def resize(pixels: Pixels) -> Pixels:
    """Any picture at the network's input size: uint8 (224, 224, 3). The aspect ratio is not kept, as in the recipe."""
    if pixels.shape[:2] == (SIZE, SIZE):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def pixel_hash(pixels: Pixels) -> str:
    """SHA-256 of a decoded picture: its shape and its bytes. The same picture in another file has the same hash."""
    hasher = hashlib.sha256(f"{pixels.shape}".encode())
    hasher.update(np.ascontiguousarray(pixels).data)
    return hasher.hexdigest()


@dataclass(frozen=True)
class PixelCache:
    """Resized pictures by pixel hash, in parts of a few hundred under objects/caches/pixels-…/.

    A part is ``<name>.npy`` (uint8 (n, 224, 224, 3)) and ``<name>.json`` (its n hashes), which is written last; two
    writers that make the same pictures at once only waste space.
    """

    store: Store

    @property
    def prefix(self) -> str:
        """Where the parts lie; another view or decoder is another cache."""
        return f"objects/caches/pixels-{digest(VIEW)[:12]}"

    def index(self) -> dict[str, tuple[str, int]]:
        """Pixel hash -> (part, row)."""
        found: dict[str, tuple[str, int]] = {}
        for name in self.store.keys(self.prefix):
            if name.endswith(".json"):
                hashes, _ = self.store.read(f"{self.prefix}/{name}")
                found.update((h, (name.removesuffix(".json"), row)) for row, h in enumerate(hashes))
        return found

    def fill(self, rows: "pd.DataFrame", workers: int) -> int:
        """Decode and resize what is not cached yet; returns how many pictures that were.

        Args:
            rows: columns ``sha256`` (of the file) and ``pixel_sha256``.
            workers: processes that decode.

        Raises:
            StoreError: a file's picture is not the one the manifest recorded.
        """
        known = self.index()
        missing = rows[~rows["pixel_sha256"].isin(known)]
        if missing.empty:
            return 0
        todo = list(zip(missing["sha256"], missing["pixel_sha256"], strict=True))
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            jobs = ((self.store.root, sha256, pixel_sha256) for sha256, pixel_sha256 in todo)
            pictures = pool.map(_load_resized, jobs, chunksize=8)
            shown = track(pictures, total=len(todo), what="decoding")
            for start in range(0, len(todo), _PART):
                hashes = [pixel_sha256 for _, pixel_sha256 in todo[start : start + _PART]]
                self._write(hashes, np.stack([next(shown) for _ in hashes]))
            for _ in shown:  # let the progress say its last line
                pass
        return len(todo)

    def batches(self, hashes: list[str], size: int) -> Iterator[tuple[list[str], Pixels]]:
        """The cached pictures of these hashes, ``size`` at a time, in the order they lie on disk.

        Yields:
            the hashes of the batch, and uint8 (n, 224, 224, 3).
        """
        known = self.index()
        wanted = sorted(hashes, key=lambda h: known[h])
        for start in range(0, len(wanted), size):
            batch = wanted[start : start + size]
            yield batch, np.stack([self._part(known[h][0])[known[h][1]] for h in batch])

    def _part(self, name: str) -> Pixels:
        array: Pixels = np.load(self.store.local(f"{self.prefix}/{name}.npy"), mmap_mode="r")
        return array

    def _write(self, hashes: list[str], pixels: Pixels) -> None:
        name = digest(hashes)[:16]
        with self.store.staging() as folder:
            np.save(folder / "part.npy", pixels)
            self.store.put_file(f"{self.prefix}/{name}.npy", folder / "part.npy")
        self.store.put_json(f"{self.prefix}/{name}.json", hashes)


def _load_resized(job: tuple[str, str, str]) -> Pixels:
    root, sha256, expected = job
    pixels = decode(Store(root).blob(sha256))
    if pixel_hash(pixels) != expected:
        raise StoreError(f"file {sha256} in {root} does not hold the picture its manifest recorded; run manifest again")
    return resize(pixels)


def read_image(path: Path) -> Pixels:
    """The picture in a local file, as RGB uint8 (height, width, 3).

    Raises:
        ImageError: names the file and what is wrong with it.
    """
    try:
        return decode(path.read_bytes())
    except OSError as error:
        raise ImageError("unreadable", f"{path}: {error.strerror}") from None
    except ImageError as error:
        raise ImageError(error.reason, f"{path}: {error.detail}") from None


def _one_line(error: Exception) -> str:
    # Pillow puts the BytesIO's address in its message, which says nothing to anyone.
    text = " ".join(str(error).split())
    return "not an image file" if "cannot identify image file" in text else text
