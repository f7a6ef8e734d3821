"""Facts about the image in each file: its hashes and its size. Each file is decoded once."""

from collections.abc import Collection
from dataclasses import astuple, dataclass
from typing import Any

from ml.core.errors import ImageError
from ml.core.progress import track
from ml.core.store import Store, digest
from ml.core.workers import map_in_processes
from ml.images.decoding import Pixels, decode, pixel_hash

VERSION = 1
"""Version of the cache. Raise it when decoding the same file would find other facts, so that old ones are not used."""

_PART = 1024  # files whose facts are written at once: a kill loses at most these


@dataclass(frozen=True, slots=True)
class PictureFacts:
    """Facts found by decoding a file: the image's hashes and size, or the reason why it has no usable image."""

    pixel_sha256: str = ""
    perceptual_hash: str = ""
    width: int = 0
    height: int = 0
    reason: str = ""
    detail: str = ""


def inspect_files(hashes: set[str], store: Store, workers: int) -> tuple[dict[str, PictureFacts], int]:
    """Returns the facts of each file by its SHA-256, and the number of files that had to be decoded.

    A file is decoded once, whichever sources and versions contain it.

    Args:
        hashes: SHA-256 of each file in the store.
        store: the store with the files and the cache of facts.
        workers: processes that decode.
    """
    cache = PictureFactsCache(store)
    known = {sha256: facts for sha256, facts in cache.read().items() if sha256 in hashes}
    missing = sorted(hashes - known.keys())
    if not missing:
        return known, 0
    jobs = ((store.root, sha256) for sha256 in missing)
    fresh: dict[str, PictureFacts] = {}
    for sha256, facts in track(
        map_in_processes(_decode_file, jobs, workers), total=len(missing), what="reading images"
    ):
        fresh[sha256] = facts
        if len(fresh) == _PART:
            cache.write(fresh)
            known |= fresh
            fresh = {}
    if fresh:
        cache.write(fresh)
    return known | fresh, len(missing)


@dataclass(frozen=True)
class PictureFactsCache:
    """Facts by the file's SHA-256, in parts under objects/caches/pictures-…/; each part is written in one step."""

    store: Store

    @property
    def prefix(self) -> str:
        """Where the parts are; another decoder or another perceptual hash has another cache."""
        return f"objects/caches/pictures-{VERSION}"

    def read(self) -> dict[str, PictureFacts]:
        """Returns the facts of all files in the cache."""
        known: dict[str, PictureFacts] = {}
        for name in self.store.keys(self.prefix):
            part, _ = self.store.read(f"{self.prefix}/{name}")
            known |= {sha256: PictureFacts(*values) for sha256, *values in part}
        return known

    @staticmethod
    def forget(hashes: Collection[str], store: Store) -> None:
        """Removes these files from every cache, of whatever version."""
        for folder in store.caches("pictures"):
            for name in store.keys(folder):
                part, _ = store.read(f"{folder}/{name}")
                remaining = [row for row in part if row[0] not in hashes]
                if len(remaining) == len(part):
                    continue
                if remaining:
                    _write_part(folder, remaining, store)
                store.remove(f"{folder}/{name}")

    def write(self, pictures: dict[str, PictureFacts]) -> None:
        """Adds these facts to the cache as one part."""
        part = [[sha256, *astuple(picture)] for sha256, picture in pictures.items()]
        _write_part(self.prefix, part, self.store)


def _write_part(folder: str, part: list[list[Any]], store: Store) -> None:
    store.put_json(f"{folder}/{digest(part)[:16]}.json", part)


def _decode_file(job: tuple[str, str]) -> tuple[str, PictureFacts]:
    root, sha256 = job
    try:
        with Store(root).open_blob(sha256) as file:
            pixels = decode(file, strict=True)
    except ImageError as error:
        return sha256, PictureFacts(reason=error.reason, detail=error.detail)
    height, width, _ = pixels.shape
    return sha256, PictureFacts(pixel_hash(pixels), perceptual_hash(pixels), width, height)


def perceptual_hash(pixels: Pixels) -> str:
    """Returns a hash that barely changes when an image is resized or compressed: 64 bits as 16 hex digits.

    The distance of two hashes is the number of bits in which they differ. ImageHash's ``phash`` computes the hash from
    the green channel, where both stains absorb: the signs of the 8 x 8 lowest frequencies of the cosine transform (C.
    Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010).

    Args:
        pixels: uint8 (height, width, 3).
    """
    import imagehash
    from PIL import Image

    return str(imagehash.phash(Image.fromarray(pixels[:, :, 1]).reduce(4)))
