"""Facts about the image in each file: its hashes and its size. Each file is decoded once."""

import io
from collections.abc import Collection
from dataclasses import astuple, dataclass, replace
from typing import Any, NamedTuple

from ml.core.errors import ImageError
from ml.core.progress import track
from ml.core.store import Store, digest
from ml.core.workers import Death, map_surviving_crashes
from ml.images.decoding import MEMORY, Pixels, decode, explained_errors, pixel_hash
from ml.images.deep_pictures import decode_scaled

VERSION = 4
"""Version of the cache. Raise it when decoding the same file would find other facts, so that old ones are not used."""

UNSETTLED = frozenset({"memory", "crashed", "time"})
"""Reasons that another machine or setting may not give: such facts are not remembered, and the file is tried again."""

CPU_SECONDS = 120.0
"""CPU time that reading one picture may take. docs/sources.md says what the slowest ones take that are allowed."""

ORIENTATIONS = (
    *("UPRIGHT", "FLIP_LEFT_RIGHT", "FLIP_TOP_BOTTOM", "ROTATE_180"),
    *("TRANSPOSE", "ROTATE_90", "ROTATE_270", "TRANSVERSE"),
)
"""The ways in which a copy of an image may be mirrored or turned, by Pillow's names."""

HASH_DIGITS = 16
"""Hex digits of one perceptual hash."""

_HASHED_SIZE = (32, 32)

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
    scaled_sha256: str = ""
    """SHA-256 of the file in the store that was made of a deeper picture, with 8 bits a channel; else empty."""


def inspect_files(
    hashes: set[str], store: Store, workers: int, significant_bits: int | None = None, memory: int = MEMORY
) -> tuple[dict[str, PictureFacts], int]:
    """Returns the facts of each file by its SHA-256, and the number of files that had to be decoded.

    A file is decoded once, whichever sources and versions contain it. One that kills the process that decodes it has
    the reason ``crashed``, and one that takes more than ``CPU_SECONDS`` the reason ``time``.

    Args:
        hashes: SHA-256 of each file in the store.
        store: the store with the files and the cache of facts.
        workers: processes that decode; with none, this process does, for as long as it takes, and a crash ends it.
        significant_bits: bits that deeper pictures fill, which are scaled to 8; None refuses such pictures.
        memory: bytes that decoding a picture may take.
    """
    cache = PictureFactsCache(store, significant_bits)
    known = {sha256: facts for sha256, facts in cache.read().items() if sha256 in hashes and _is_kept(facts, store)}
    missing = sorted(hashes - known.keys())
    if not missing:
        return known, 0
    jobs = (_DecodingJob(store.root, sha256, significant_bits, memory) for sha256 in missing)
    fresh: dict[str, PictureFacts] = {}
    decoded = map_surviving_crashes(_decode_file, jobs, workers, _explain_death, CPU_SECONDS)
    for sha256, facts in track(decoded, total=len(missing), what="reading images"):
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
    significant_bits: int | None = None

    @property
    def prefix(self) -> str:
        """Where the parts are; another decoder, rule of scaling or perceptual hash has another cache."""
        rule = f"-bits-{self.significant_bits}" if self.significant_bits else ""
        return f"objects/caches/pictures-{VERSION}{rule}"

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
        """Adds these facts to the cache as one part, but for those that are not settled."""
        settled = {sha256: picture for sha256, picture in pictures.items() if picture.reason not in UNSETTLED}
        if settled:
            _write_part(self.prefix, [[sha256, *astuple(picture)] for sha256, picture in settled.items()], self.store)


def _write_part(folder: str, part: list[list[Any]], store: Store) -> None:
    store.put_json(f"{folder}/{digest(part)[:16]}.json", part)


def _is_kept(facts: PictureFacts, store: Store) -> bool:
    """Returns whether the store still has what was made of a deeper picture; erasing a patient removes it."""
    return not facts.scaled_sha256 or store.path(store.blob_key(facts.scaled_sha256)).exists()


class _DecodingJob(NamedTuple):
    """A file in a store, and how it may be decoded."""

    root: str
    sha256: str
    significant_bits: int | None
    memory: int


def _decode_file(job: _DecodingJob) -> tuple[str, PictureFacts]:
    store = Store(job.root)
    content = store.blob(job.sha256)
    try:
        if job.significant_bits is None:
            # From memory, so that a disk's or a network's errors are not taken for those of the picture.
            pixels, readable = decode(io.BytesIO(content), strict=True, memory=job.memory), content
        else:
            pixels, readable = decode_scaled(content, job.significant_bits, job.memory)
        with explained_errors():
            height, width, _ = pixels.shape
            facts = PictureFacts(pixel_hash(pixels), perceptual_hashes(pixels), width, height)
    except ImageError as error:
        return job.sha256, PictureFacts(reason=error.reason, detail=error.detail)
    return job.sha256, replace(facts, scaled_sha256="" if readable is content else store.put_blob(readable))


def _explain_death(job: _DecodingJob, why: Death) -> tuple[str, PictureFacts]:
    what_happened = {
        "crashed": "reading it killed the process that did, also alone: the decoder crashed, or memory ran out",
        "time": f"reading it takes more than {CPU_SECONDS:,.0f} s of a core, which no ordinary picture needs",
    }
    advice = "look at the file with other software, export it anew, or remove it"
    return job.sha256, PictureFacts(reason=why, detail=f"{what_happened[why]}; {advice}")


def perceptual_hashes(pixels: Pixels) -> str:
    """Returns hashes that barely change when an image is resized or compressed: one for each orientation.

    They are 64 bits each, as 16 hex digits, in the order of :data:`ORIENTATIONS`. The distance of two hashes is the
    number of bits in which they differ. Two images show the same, mirrored or turned, if the first hash of one is near
    to any of the other's.

    ImageHash's ``phash`` computes a hash from the green channel, where both stains absorb: it compares the 8 x 8 lowest
    frequencies of the cosine transform with their median (C. Zauner, "Implementation and Benchmarking of Perceptual
    Image Hash Functions", 2010). So half of its bits are set, and distances are even.

    Args:
        pixels: uint8 (height, width, 3).
    """
    import imagehash
    from PIL import Image

    # The size that phash works on, which it leaves as it is: the large picture is resized once, not eight times.
    small = Image.fromarray(pixels[:, :, 1]).reduce(4).resize(_HASHED_SIZE, Image.Resampling.LANCZOS)
    upright = str(imagehash.phash(small))
    turned = (str(imagehash.phash(small.transpose(Image.Transpose[name]))) for name in ORIENTATIONS[1:])
    return "".join((upright, *turned))
