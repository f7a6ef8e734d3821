"""Facts about the image in each file: its hashes and its size. Each file is decoded once."""

import io
from collections.abc import Collection
from dataclasses import astuple, dataclass, replace
from typing import Any, NamedTuple

from ml.core.errors import ImageError
from ml.core.hashes import digest
from ml.core.progress import track
from ml.core.store import Store
from ml.core.workers import Death, map_surviving_crashes
from ml.images.decoding import MEMORY, Pixels, decode, explained_errors
from ml.images.deep_pictures import decode_scaled
from ml.images.pixel_formats import pixel_hash

VERSION = 5
"""Version of the cache. Raise it when decoding the same file would find other facts, so that old ones are not used."""

_FORGOTTEN = frozenset({"memory", "crashed"})
"""Reasons that are not remembered, since such a file is soon tried again."""

UNSETTLED = _FORGOTTEN | {"time"}
"""Reasons that another machine or setting may not give. ``time`` is remembered with its limit, and the file is tried
again under a higher one."""

CPU_SECONDS = 120.0
"""CPU time that reading one picture may take where no setting says otherwise. docs/sources.md says what the slowest
ones take that the other limits allow."""

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
    cpu_seconds: float = 0.0
    """CPU time that did not suffice, if that is the reason; else 0."""


def inspect_files(
    hashes: set[str],
    store: Store,
    workers: int,
    significant_bits: int | None = None,
    memory: int = MEMORY,
    cpu_seconds: float = CPU_SECONDS,
) -> tuple[dict[str, PictureFacts], int]:
    """Returns the facts of each file by its SHA-256, and the number of files that had to be decoded.

    A file is decoded once, whichever sources and versions contain it. One that kills the process that decodes it has
    the reason ``crashed``, and one that takes more than ``cpu_seconds`` the reason ``time``.

    Args:
        hashes: SHA-256 of each file in the store.
        store: the store with the files and the cache of facts.
        workers: processes that decode; with none, this process does, for as long as it takes, and a crash ends it.
        significant_bits: bits that deeper pictures fill, which are scaled to 8; None refuses such pictures.
        memory: bytes that decoding a picture may take.
        cpu_seconds: CPU time that reading a picture may take.
    """
    cache = PictureFactsCache(store, significant_bits)
    known = {
        sha256: facts
        for sha256, facts in cache.read().items()
        if sha256 in hashes and _is_kept(facts, store) and not _may_suffice(cpu_seconds, facts)
    }
    missing = sorted(hashes - known.keys())
    if not missing:
        return known, 0
    jobs = (_DecodingJob(store.root, sha256, significant_bits, memory, cpu_seconds) for sha256 in missing)
    fresh: dict[str, PictureFacts] = {}
    decoded = map_surviving_crashes(_decode_file, jobs, workers, _describe_death, cpu_seconds)
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
        """Returns the facts of all files in the cache; those under the highest limit, if a file took too long once."""
        known: dict[str, PictureFacts] = {}
        for name in self.store.keys(self.prefix):
            part, _ = self.store.read(f"{self.prefix}/{name}")
            for sha256, *values in part:
                facts = PictureFacts(*values)
                if facts.reason != "time" or _may_suffice(facts.cpu_seconds, known.get(sha256, _NEVER_TRIED)):
                    known[sha256] = facts
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
        """Adds these facts to the cache as one part, but for those that depend on more than a remembered limit."""
        settled = {sha256: picture for sha256, picture in pictures.items() if picture.reason not in _FORGOTTEN}
        if settled:
            _write_part(self.prefix, [[sha256, *astuple(picture)] for sha256, picture in settled.items()], self.store)


_NEVER_TRIED = PictureFacts(reason="time")


def _may_suffice(cpu_seconds: float, facts: PictureFacts) -> bool:
    """Returns whether a file took too long when it was last tried, under a lower limit than this one."""
    return facts.reason == "time" and facts.cpu_seconds < cpu_seconds


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
    cpu_seconds: float


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


def _describe_death(job: _DecodingJob, why: Death) -> tuple[str, PictureFacts]:
    limit = float(job.cpu_seconds) if why == "time" else 0.0
    return job.sha256, PictureFacts(reason=why, detail=explain_death(why, job.cpu_seconds), cpu_seconds=limit)


def explain_death(why: Death, cpu_seconds: float) -> str:
    """Says in words why a picture ended the process that read it, and what to do.

    Args:
        why: the reason.
        cpu_seconds: CPU time that reading it was allowed.
    """
    advice = "look at the file with other software, export it anew, or remove it"
    if why == "time":
        limit = f"{cpu_seconds:,.0f} s of a core, which no ordinary picture needs"
        return f"reading it takes more than {limit}; {advice}, or raise BREAKHIS_DECODING_SECONDS"
    return f"reading it killed the process that did, also alone: the decoder crashed, or memory ran out; {advice}"


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
