"""What every file's picture is: its hashes and its size, found by decoding it, once."""

from collections.abc import Collection
from dataclasses import astuple, dataclass
from typing import Any

from ml.core.errors import ImageError
from ml.core.progress import track
from ml.core.store import Store, digest
from ml.core.workers import map_in_processes
from ml.images.decoding import Pixels, decode, pixel_hash

VERSION = 1
"""Raised when the same file would be found to be another picture, so that what is known is not taken."""

_PART = 1024  # pictures that are noted at a time: what a kill loses


@dataclass(frozen=True, slots=True)
class PictureFacts:
    """What decoding a file found: the picture's hashes and size, or why there is none."""

    pixel_sha256: str = ""
    perceptual_hash: str = ""
    width: int = 0
    height: int = 0
    reason: str = ""
    detail: str = ""


def inspect_files(hashes: set[str], store: Store, workers: int) -> tuple[dict[str, PictureFacts], int]:
    """What each file holds, and how many had to be decoded: each is once, whichever sources and versions have it."""
    seen = PictureFactsCache(store)
    found = {sha256: picture for sha256, picture in seen.read().items() if sha256 in hashes}
    missing = sorted(hashes - found.keys())
    if not missing:
        return found, 0
    jobs = ((store.root, sha256) for sha256 in missing)
    fresh: dict[str, PictureFacts] = {}
    for sha256, picture in track(
        map_in_processes(_decode_one, jobs, workers), total=len(missing), what="reading images"
    ):
        fresh[sha256] = picture
        if len(fresh) == _PART:
            seen.write(fresh)
            found |= fresh
            fresh = {}
    if fresh:
        seen.write(fresh)
    return found | fresh, len(missing)


@dataclass(frozen=True)
class PictureFactsCache:
    """What decoding found, by the file's hash, in parts under objects/caches/pictures-…/, each written whole."""

    store: Store

    @property
    def prefix(self) -> str:
        """Another decoder or another perceptual hash is another cache."""
        return f"objects/caches/pictures-{VERSION}"

    def read(self) -> dict[str, PictureFacts]:
        """All that is known."""
        found: dict[str, PictureFacts] = {}
        for name in self.store.keys(self.prefix):
            part, _ = self.store.read(f"{self.prefix}/{name}")
            found |= {sha256: PictureFacts(*values) for sha256, *values in part}
        return found

    @staticmethod
    def forget(hashes: Collection[str], store: Store) -> None:
        """Take these files out of every cache, of whatever version."""
        for folder in store.caches("pictures"):
            for name in store.keys(folder):
                part, _ = store.read(f"{folder}/{name}")
                left = [row for row in part if row[0] not in hashes]
                if len(left) == len(part):
                    continue
                if left:
                    _write_part(folder, left, store)
                store.remove(f"{folder}/{name}")

    def write(self, pictures: dict[str, PictureFacts]) -> None:
        """Add one part."""
        part = [[sha256, *astuple(picture)] for sha256, picture in pictures.items()]
        _write_part(self.prefix, part, self.store)


def _write_part(folder: str, part: list[list[Any]], store: Store) -> None:
    store.put_json(f"{folder}/{digest(part)[:16]}.json", part)


def _decode_one(job: tuple[str, str]) -> tuple[str, PictureFacts]:
    root, sha256 = job
    try:
        with Store(root).open_blob(sha256) as file:
            pixels = decode(file, strict=True)
    except ImageError as error:
        return sha256, PictureFacts(reason=error.reason, detail=error.detail)
    height, width, _ = pixels.shape
    return sha256, PictureFacts(pixel_hash(pixels), perceptual_hash(pixels), width, height)


def perceptual_hash(pixels: Pixels) -> str:
    """A hash that stays nearly the same when a picture is resized or saved with loss: 64 bits as 16 hex digits.

    Two hashes are as far apart as the number of bits in which they differ. It is taken of the green channel, where both
    stains absorb, by ImageHash's ``phash``: the signs of the 8 x 8 lowest frequencies of the cosine transform (C.
    Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010).

    Args:
        pixels: uint8 (height, width, 3).
    """
    import imagehash
    from PIL import Image

    return str(imagehash.phash(Image.fromarray(pixels[:, :, 1]).reduce(4)))
