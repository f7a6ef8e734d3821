"""The cache of decoded and resized pictures: each is made once, whatever is trained on it."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ml.errors import StoreError
from ml.imaging import SIZE, Pixels, decode, pixel_hash, resize
from ml.progress import track
from ml.store import Store, digest
from ml.views import IDENTITY
from ml.workers import in_processes

if TYPE_CHECKING:
    import pandas as pd

_PART = 512  # pictures a cache part and so in memory at once: 77 MB


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
        return f"objects/caches/pixels-{digest(IDENTITY.key)[:12]}"

    def index(self) -> dict[str, tuple[str, int]]:
        """Pixel hash -> (part, row)."""
        found: dict[str, tuple[str, int]] = {}
        for name in self.store.keys(self.prefix):
            if name.endswith(".json"):
                hashes, _ = self.store.read(f"{self.prefix}/{name}")
                found.update((h, (name.removesuffix(".json"), row)) for row, h in enumerate(hashes))
        return found

    def fill(self, rows: "pd.DataFrame", workers: int) -> int:
        """Decode and resize what is not cached yet; returns how many pictures that were. See :meth:`made`."""
        return sum(len(hashes) for hashes, _ in self.made(rows, workers, _PART))

    def made(self, rows: "pd.DataFrame", workers: int, size: int) -> Iterator[tuple[list[str], Pixels]]:
        """Decode, resize and cache what is not cached yet, and hand it over as it is made.

        Other processes decode ahead while the caller is at a batch. A part is written as soon as it is full; left
        before its end, this loses no more than one.

        Args:
            rows: columns ``sha256`` (of the file) and ``pixel_sha256``.
            workers: processes that decode.
            size: pictures a batch.

        Yields:
            the hashes of the batch, and uint8 (n, 224, 224, 3).

        Raises:
            StoreError: a file's picture is not the one the manifest recorded.
        """
        known = self.index()
        missing = rows[~rows["pixel_sha256"].isin(known)].drop_duplicates("pixel_sha256")
        todo = list(zip(missing["sha256"], missing["pixel_sha256"], strict=True))
        jobs = ((self.store.root, sha256, pixel_sha256) for sha256, pixel_sha256 in todo)
        shown = (
            track(in_processes(_load_resized, jobs, workers), total=len(todo), what="decoding") if todo else iter(())
        )
        hashes = [pixel_sha256 for _, pixel_sha256 in todo]
        part: list[str] = []
        pictures = np.empty((min(_PART, len(todo)), SIZE, SIZE, 3), np.uint8)
        for begin in range(0, len(todo), size):
            batch = hashes[begin : begin + size]
            made = np.stack([next(shown) for _ in batch])
            if len(part) + len(batch) > _PART:
                _write_part(self.prefix, part, pictures[: len(part)], self.store)
                part = []
            pictures[len(part) : len(part) + len(batch)] = made
            part += batch
            yield batch, made
        if part:
            _write_part(self.prefix, part, pictures[: len(part)], self.store)
        for _ in shown:  # let the progress say its last line
            pass

    def batches(self, hashes: Iterable[str], size: int) -> Iterator[tuple[list[str], Pixels]]:
        """The cached pictures of these hashes, ``size`` at a time, in the order they lie on disk.

        Yields:
            the hashes of the batch, and uint8 (n, 224, 224, 3).
        """
        known = self.index()
        wanted = sorted(hashes, key=lambda h: known[h])
        for start in range(0, len(wanted), size):
            batch = wanted[start : start + size]
            yield batch, np.stack([self._part(known[h][0])[known[h][1]] for h in batch])

    def read(self, hashes: Sequence[str]) -> Pixels:
        """The cached pictures of these hashes, in this order: uint8 (n, 224, 224, 3).

        Raises:
            StoreError: one is not cached.
        """
        if not self._places.keys() >= set(hashes):
            self.__dict__.pop("_places", None)  # what was cached since
        try:
            places = [self._places[h] for h in hashes]
        except KeyError as error:
            raise StoreError(f"the picture {error.args[0]} is not in {self.prefix}; run: features") from None
        return (
            np.stack([self._part(part)[row] for part, row in places]) if places else np.empty((0, SIZE, SIZE, 3), "u1")
        )

    @cached_property
    def _places(self) -> dict[str, tuple[str, int]]:
        return self.index()

    @staticmethod
    def forget(hashes: Collection[str], store: Store) -> None:
        """Take these pictures out of every cache, of whatever view."""
        for folder in store.caches("pixels"):
            for name in [name for name in store.keys(folder) if name.endswith(".json")]:
                part, _ = store.read(f"{folder}/{name}")
                left = [row for row, h in enumerate(part) if h not in hashes]
                if len(left) == len(part):
                    continue
                arrays = f"{folder}/{name.removesuffix('.json')}.npy"
                if left:
                    pixels = np.load(store.local(arrays), mmap_mode="r")
                    _write_part(folder, [part[row] for row in left], pixels[left], store)
                store.remove(f"{folder}/{name}")
                store.remove(arrays)

    def _part(self, name: str) -> Pixels:
        array: Pixels = np.load(self.store.local(f"{self.prefix}/{name}.npy"), mmap_mode="r")
        return array


def _write_part(folder: str, hashes: list[str], pixels: Pixels, store: Store) -> None:
    name = digest(hashes)[:16]
    with store.staging() as scratch:
        np.save(scratch / "part.npy", pixels)
        store.put_file(f"{folder}/{name}.npy", scratch / "part.npy")
    store.put_json(f"{folder}/{name}.json", hashes)


def _load_resized(job: tuple[str, str, str]) -> Pixels:
    root, sha256, expected = job
    with Store(root).open_blob(sha256) as file:
        pixels = decode(file)
    if pixel_hash(pixels) != expected:
        raise StoreError(f"file {sha256} in {root} does not hold the picture its manifest recorded; run manifest again")
    return resize(pixels)
