"""The cache of decoded and resized images: each is made once, for all trainings."""

from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ml.core.errors import ImageError, StoreError
from ml.core.hashes import digest
from ml.core.progress import track
from ml.core.store import Store
from ml.core.workers import map_in_processes, prefetch
from ml.images.augmentation import IDENTITY_VIEW
from ml.images.decoding import INPUT_SIZE, Pixels, decode, resize
from ml.images.pixel_formats import pixel_hash

if TYPE_CHECKING:
    import pandas as pd

_PartFile = np.memmap[Any, np.dtype[np.uint8]]

_PART = 512  # images in a part of the cache: 77 MB
_PREFETCHED_BATCHES = 64  # batches that may be decoded before they are consumed; they are in the parts' files
_PROGRESS_BATCH = 64  # images between two updates of the progress where images are only decoded


@dataclass(frozen=True)
class PixelCache:
    """Resized images by pixel hash, in parts of a few hundred under objects/caches/pixels-…/.

    A part is ``<name>.npy`` (uint8 (n, 224, 224, 3)) and ``<name>.json`` (its n hashes), which is written last. Two
    writers that make the same images at once only waste space.
    """

    store: Store

    @property
    def prefix(self) -> str:
        """Where the parts are; another view or decoder has another cache."""
        return f"objects/caches/pixels-{digest(IDENTITY_VIEW.key)[:12]}"

    def index(self) -> dict[str, tuple[str, int]]:
        """Returns the part and the row of each cached image: pixel hash -> (part, row)."""
        locations: dict[str, tuple[str, int]] = {}
        for name in self.store.keys(self.prefix):
            if name.endswith(".json"):
                hashes, _ = self.store.read(f"{self.prefix}/{name}")
                locations.update((h, (name.removesuffix(".json"), row)) for row, h in enumerate(hashes))
        return locations

    def fill(self, rows: "pd.DataFrame", workers: int) -> int:
        """Decodes and resizes the images that are not cached yet; returns their number.

        Args:
            rows: columns ``sha256`` (of the file) and ``pixel_sha256``.
            workers: processes that decode.

        Raises:
            StoreError: a file cannot be decoded, or its image is not the one the manifest recorded.
        """
        known = self.index()
        files = dict(zip(rows["pixel_sha256"], rows["sha256"], strict=True))
        missing = {h: sha256 for h, sha256 in files.items() if h not in known}
        total = -(-len(missing) // _PROGRESS_BATCH)
        for _ in track(
            self._decode_missing(missing, _PROGRESS_BATCH, workers),
            total=total,
            what=f"decoding, batches of {_PROGRESS_BATCH}",
        ):
            pass
        return len(missing)

    def stream(
        self, files: Mapping[str, str], size: int, workers: int
    ) -> Generator[tuple[list[str], Pixels], None, None]:
        """Yields images in batches: first the cached ones, then the others, which are decoded and cached meanwhile.

        A part is written to the cache once its last image is decoded, so a kill loses at most one part.

        Args:
            files: pixel hash -> hash of the file, for every image to be read.
            size: images in a batch; a batch at the end of the cached images or of a new part may be smaller.
            workers: processes that decode, some batches ahead.

        Yields:
            the hashes of the batch, and uint8 (n, 224, 224, 3).

        Raises:
            StoreError: a file cannot be decoded, or its image is not the one the manifest recorded.
        """
        known = self.index()
        yield from self.batches([h for h in files if h in known], size)
        missing = {h: sha256 for h, sha256 in files.items() if h not in known}
        with prefetch(self._decode_missing(missing, size, workers), _PREFETCHED_BATCHES) as decoded:
            yield from decoded

    def batches(self, hashes: list[str], size: int) -> Iterator[tuple[list[str], Pixels]]:
        """Yields the cached images of these hashes, ``size`` at a time, in the order in which they are stored.

        Yields:
            the hashes of the batch, and uint8 (n, 224, 224, 3).
        """
        known = self.index()
        ordered = sorted(hashes, key=lambda h: known[h])
        open_part = lru_cache(maxsize=2)(self._open_part)  # a batch may continue in the next part
        for start in range(0, len(ordered), size):
            batch = ordered[start : start + size]
            yield batch, np.stack([open_part(known[h][0])[known[h][1]] for h in batch])

    def read(self, hashes: Sequence[str]) -> Pixels:
        """Returns the cached images of these hashes, in this order: uint8 (n, 224, 224, 3).

        Raises:
            StoreError: an image is not cached.
        """
        if not self._locations.keys() >= set(hashes):
            self.__dict__.pop("_locations", None)  # images may have been cached since
        try:
            locations = [self._locations[h] for h in hashes]
        except KeyError as error:
            raise StoreError(f"the picture {error.args[0]} is not in {self.prefix}; run: features") from None
        open_part = cache(self._open_part)
        pictures = [open_part(part)[row] for part, row in locations]
        return np.stack(pictures) if pictures else np.empty((0, INPUT_SIZE, INPUT_SIZE, 3), np.uint8)

    @cached_property
    def _locations(self) -> dict[str, tuple[str, int]]:
        return self.index()

    @staticmethod
    def remove_images(hashes: Collection[str], store: Store) -> None:
        """Removes these images from every cache, of whatever view."""
        for folder in store.caches("pixels"):
            for name in [name for name in store.keys(folder) if name.endswith(".json")]:
                part, _ = store.read(f"{folder}/{name}")
                remaining = [row for row, h in enumerate(part) if h not in hashes]
                if len(remaining) == len(part):
                    continue
                arrays = f"{folder}/{name.removesuffix('.json')}.npy"
                if remaining:
                    pixels = np.load(store.local(arrays), mmap_mode="r")
                    with store.staging() as scratch:
                        copy = _create_part_file(scratch / "left.npy", len(remaining))
                        copy[:] = pixels[remaining]
                        copy.flush()
                        _store_part(folder, [part[row] for row in remaining], copy, store)
                store.remove(f"{folder}/{name}")
                store.remove(arrays)

    def _decode_missing(
        self, missing: Mapping[str, str], size: int, workers: int
    ) -> Generator[tuple[list[str], Pixels], None, None]:
        """Decodes files (pixel hash -> hash of the file), yields their images in batches and stores each full part."""
        ordered, parts = list(missing), dict[int, _PartFile]()
        with self.store.staging() as scratch:

            def jobs() -> Iterator[_DecodingJob]:
                for start in range(0, len(ordered), _PART):
                    hashes = ordered[start : start + _PART]
                    parts[start] = _create_part_file(scratch / f"{start}.npy", len(hashes))
                    for row, h in enumerate(hashes):
                        offset = parts[start].offset + row * parts[start][row].nbytes
                        yield _DecodingJob(self.store.root, missing[h], h, scratch / f"{start}.npy", offset)

            with closing(map_in_processes(_load_resized, jobs(), workers)) as done:
                for start in range(0, len(ordered), _PART):
                    hashes = ordered[start : start + _PART]
                    for begin in range(0, len(hashes), size):
                        batch = hashes[begin : begin + size]
                        for _ in islice(done, len(batch)):
                            pass
                        yield batch, parts[start][begin : begin + len(batch)]
                    _store_part(self.prefix, hashes, parts.pop(start), self.store)

    def _open_part(self, name: str) -> Pixels:
        array: Pixels = np.load(self.store.local(f"{self.prefix}/{name}.npy"), mmap_mode="r")
        return array


def _create_part_file(file: Path, images: int) -> _PartFile:
    """Creates a memory-mapped file for so many images: uint8 (images, 224, 224, 3).

    It takes up no memory, and every process that has mapped it sees what others write to it.
    """
    return np.lib.format.open_memmap(file, "w+", np.uint8, (images, INPUT_SIZE, INPUT_SIZE, 3))


def _store_part(folder: str, hashes: list[str], part: _PartFile, store: Store) -> None:
    """Moves a complete part file into a cache."""
    name = digest(hashes)[:16]
    store.put_file(f"{folder}/{name}.npy", Path(str(part.filename)))
    store.put_json(f"{folder}/{name}.json", hashes)


class _DecodingJob(NamedTuple):
    """A file in a store, and the part file and the offset in bytes where its image is written."""

    root: str
    sha256: str
    pixel_sha256: str
    part: Path
    offset: int


def _load_resized(job: _DecodingJob) -> None:
    pixels = resize(_decode_verified(job))
    # Pixels are written here, not sent back: a process that imports TensorFlow or converts a network consumes nothing
    # for a second or two, and the workers would wait for it.
    with job.part.open("r+b") as file:
        file.seek(job.offset)
        file.write(np.ascontiguousarray(pixels).data)


def _decode_verified(job: _DecodingJob) -> Pixels:
    """Decodes a file and verifies the pixel hash that its manifest recorded."""
    store = Store(job.root)
    with store.open_blob(job.sha256) as file:
        data = file.read()
    guess = _quickly(data)
    if guess is not None and pixel_hash(guess) == job.pixel_sha256:
        return guess
    try:
        pixels = decode(data)
    except ImageError as error:  # the file is in the manifest, so it could be decoded then
        where = store.uri(store.blob_key(job.sha256))
        raise StoreError(f"{where} is damaged ({error}); remove it and fetch its source again") from None
    if pixel_hash(pixels) != job.pixel_sha256:
        raise StoreError(
            f"file {job.sha256} in {job.root} does not hold the picture its manifest recorded; run manifest again"
        )
    return pixels


_PNG_SIGNATURE, _EIGHT_BIT_RGB = b"\x89PNG\r\n\x1a\n", b"\x08\x02"


def _quickly(data: bytes) -> Pixels | None:
    """Decodes an ordinary PNG by libspng in half of Pillow's time; returns None for any other file.

    libspng does not notice a damaged file, so the caller has to verify the result's pixel hash.
    """
    if data[:8] != _PNG_SIGNATURE or data[24:26] != _EIGHT_BIT_RGB:
        return None
    import pyspng

    try:
        return np.asarray(pyspng.load(data, format="RGB"))
    except Exception:  # the other decoder says what is wrong
        return None
