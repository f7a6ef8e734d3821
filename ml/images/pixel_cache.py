"""The cache of decoded and resized pictures: each is made once, whatever is trained on it."""

from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ml.core.errors import ImageError, StoreError
from ml.core.progress import track
from ml.core.store import Store, digest
from ml.core.workers import map_in_processes, prefetch
from ml.images.augmentation import IDENTITY_VIEW
from ml.images.decoding import INPUT_SIZE, Pixels, decode, pixel_hash, resize

if TYPE_CHECKING:
    import pandas as pd

_Room = np.memmap[Any, np.dtype[np.uint8]]

_PART = 512  # pictures a cache part: 77 MB
_AHEAD = 64  # batches that may have been decoded before they are asked for; they lie in the parts' files
_BATCH = 64  # pictures between two looks at the progress where nothing but decoding is done


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
        return f"objects/caches/pixels-{digest(IDENTITY_VIEW.key)[:12]}"

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
            StoreError: a file cannot be decoded, or its picture is not the one the manifest recorded.
        """
        known = self.index()
        files = dict(zip(rows["pixel_sha256"], rows["sha256"], strict=True))
        missing = {h: sha256 for h, sha256 in files.items() if h not in known}
        total = -(-len(missing) // _BATCH)
        for _ in track(self._decoded(missing, _BATCH, workers), total=total, what=f"decoding, batches of {_BATCH}"):
            pass
        return len(missing)

    def stream(
        self, files: Mapping[str, str], size: int, workers: int
    ) -> Generator[tuple[list[str], Pixels], None, None]:
        """Pictures a batch at a time: those that are cached, then the others as they are decoded, and cached as well.

        A part is kept when its last picture has been decoded: whoever is killed loses one part at the most.

        Args:
            files: pixel hash -> hash of the file, of every picture that is wanted.
            size: pictures a batch; the last of the cached ones and that of the decoded ones may be smaller.
            workers: processes that decode, some batches ahead.

        Yields:
            the hashes of the batch, and uint8 (n, 224, 224, 3).

        Raises:
            StoreError: a file cannot be decoded, or its picture is not the one the manifest recorded.
        """
        known = self.index()
        yield from self.batches([h for h in files if h in known], size)
        missing = {h: sha256 for h, sha256 in files.items() if h not in known}
        with prefetch(self._decoded(missing, size, workers), _AHEAD) as decoded:
            yield from decoded

    def batches(self, hashes: list[str], size: int) -> Iterator[tuple[list[str], Pixels]]:
        """The cached pictures of these hashes, ``size`` at a time, in the order they lie on disk.

        Yields:
            the hashes of the batch, and uint8 (n, 224, 224, 3).
        """
        known = self.index()
        wanted = sorted(hashes, key=lambda h: known[h])
        part = lru_cache(maxsize=2)(self._part)  # a batch may reach into the next one
        for start in range(0, len(wanted), size):
            batch = wanted[start : start + size]
            yield batch, np.stack([part(known[h][0])[known[h][1]] for h in batch])

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
        opened = cache(self._part)
        pictures = [opened(part)[row] for part, row in places]
        return np.stack(pictures) if pictures else np.empty((0, INPUT_SIZE, INPUT_SIZE, 3), np.uint8)

    @cached_property
    def _places(self) -> dict[str, tuple[str, int]]:
        return self.index()

    @staticmethod
    def remove_images(hashes: Collection[str], store: Store) -> None:
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
                    with store.staging() as scratch:
                        room = _room(scratch / "left.npy", len(left))
                        room[:] = pixels[left]
                        room.flush()
                        _keep_part(folder, [part[row] for row in left], room, store)
                store.remove(f"{folder}/{name}")
                store.remove(arrays)

    def _decoded(
        self, missing: Mapping[str, str], size: int, workers: int
    ) -> Generator[tuple[list[str], Pixels], None, None]:
        todo, parts = list(missing), dict[int, _Room]()
        with self.store.staging() as scratch:

            def jobs() -> Iterator[_Job]:
                for start in range(0, len(todo), _PART):
                    hashes = todo[start : start + _PART]
                    parts[start] = _room(scratch / f"{start}.npy", len(hashes))
                    for row, h in enumerate(hashes):
                        place = parts[start].offset + row * parts[start][row].nbytes
                        yield _Job(self.store.root, missing[h], h, scratch / f"{start}.npy", place)

            with closing(map_in_processes(_load_resized, jobs(), workers)) as done:
                for start in range(0, len(todo), _PART):
                    hashes = todo[start : start + _PART]
                    for begin in range(0, len(hashes), size):
                        batch = hashes[begin : begin + size]
                        for _ in islice(done, len(batch)):
                            pass
                        yield batch, parts[start][begin : begin + len(batch)]
                    _keep_part(self.prefix, hashes, parts.pop(start), self.store)

    def _part(self, name: str) -> Pixels:
        array: Pixels = np.load(self.store.local(f"{self.prefix}/{name}.npy"), mmap_mode="r")
        return array


def _room(file: Path, pictures: int) -> _Room:
    """A new file for so many pictures, mapped: it takes up no memory, and whoever has mapped it sees what comes in."""
    return np.lib.format.open_memmap(file, "w+", np.uint8, (pictures, INPUT_SIZE, INPUT_SIZE, 3))


def _keep_part(folder: str, hashes: list[str], part: _Room, store: Store) -> None:
    """Make a filled room a part of a cache."""
    name = digest(hashes)[:16]
    store.put_file(f"{folder}/{name}.npy", Path(str(part.filename)))
    store.put_json(f"{folder}/{name}.json", hashes)


class _Job(NamedTuple):
    """One file of a store, and where in which part's file its picture goes."""

    root: str
    sha256: str
    pixel_sha256: str
    part: Path
    place: int


def _load_resized(job: _Job) -> None:
    pixels = resize(_load(job))
    # Written from here, not handed back: a process that imports TensorFlow or converts a network takes nothing for a
    # second or two, and these would wait for it.
    with job.part.open("r+b") as file:
        file.seek(job.place)
        file.write(np.ascontiguousarray(pixels).data)


def _load(job: _Job) -> Pixels:
    store = Store(job.root)
    with store.open_blob(job.sha256) as file:
        data = file.read()
    quick = _quickly(data)
    if quick is not None and pixel_hash(quick) == job.pixel_sha256:
        return quick
    try:
        pixels = decode(data)
    except ImageError as error:  # the manifest has it, so it could be decoded once
        where = store.uri(store.blob_key(job.sha256))
        raise StoreError(f"{where} is damaged ({error}); remove it and fetch its source again") from None
    if pixel_hash(pixels) != job.pixel_sha256:
        raise StoreError(
            f"file {job.sha256} in {job.root} does not hold the picture its manifest recorded; run manifest again"
        )
    return pixels


_SIGNATURE, _EIGHT_BIT_RGB = b"\x89PNG\r\n\x1a\n", b"\x08\x02"


def _quickly(data: bytes) -> Pixels | None:
    """The picture of an ordinary PNG, by libspng, in half of Pillow's time; nothing of any other file.

    libspng takes a damaged file for whole: what comes of it is no more than a guess until its hash is known.
    """
    if data[:8] != _SIGNATURE or data[24:26] != _EIGHT_BIT_RGB:
        return None
    import pyspng

    try:
        return np.asarray(pyspng.load(data, format="RGB"))
    except (RuntimeError, ValueError):
        return None
