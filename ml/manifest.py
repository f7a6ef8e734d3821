"""The manifest: one row an image that can be used, and a quarantine row with a reason for each that cannot."""

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ml.errors import ImageError, SourceError, StoreError
from ml.imaging import decode, pixel_hash
from ml.progress import track
from ml.sources import SourceSpec
from ml.store import Json, Store
from ml.taxonomy import ImageName, label_of, parse_name
from ml.workers import in_processes

if TYPE_CHECKING:
    import pandas as pd

VERSION = 1
"""Raised when the same raw files would give another manifest, so that remembered ones are not taken."""

MANIFEST_TYPES = {
    "path": "str",
    "sha256": "str",
    "pixel_sha256": "str",
    "source": "str",
    "patient": "str",
    "slide": "str",
    "subtype": "str",
    "label": "str",
    "magnification": "int64",
    "seq": "int64",
    "width": "int64",
    "height": "int64",
}
"""Columns of manifest.parquet. ``patient`` is the case number; ``sha256`` is of the file, ``pixel_sha256`` of the
decoded picture; ``width`` and ``height`` are in pixels."""

QUARANTINE_TYPES = {
    "path": "str",
    "sha256": "str",
    "source": "str",
    "reason": "str",
    "detail": "str",
    "patient": "str",
    "slide": "str",
    "subtype": "str",
    "label": "str",
    "magnification": "Int64",
    "seq": "Int64",
}
"""Columns of quarantine.parquet; what the file name does not tell is null."""


class _File(NamedTuple):
    path: str
    sha256: str


@dataclass(frozen=True, slots=True)
class _Picture:
    """What decoding a file found: the picture's hash and size, or why there is none."""

    pixel_sha256: str = ""
    width: int = 0
    height: int = 0
    reason: str = ""
    detail: str = ""


class _Named(NamedTuple):
    file: _File
    name: ImageName
    picture: _Picture


def make_manifest(spec: SourceSpec, store: Store, workers: int, raw: str | None = None) -> Json:
    """Read every file of a raw version and tell images from what cannot be used (the ``manifest`` stage).

    Args:
        spec: the source.
        store: where the raw version lies and the manifest goes.
        workers: processes that decode.
        raw: the raw version's id; default: the source's latest.

    Returns:
        ``{source, manifest, images, duplicates, quarantined: {reason: n}}``.

    Raises:
        SourceError: the source was never fetched, or holds no usable image at all.
    """
    if raw is None:
        ref, _ = store.read(f"refs/raw/{spec.name}.json")
        if ref is None:
            raise SourceError(f"source {spec.name!r} was never fetched; run: breakhis fetch {spec.name}")
        raw = str(ref["raw"])
    raw_meta = store.meta(raw)
    if raw_meta["source"] != spec.name:
        raise StoreError(f"{raw} is a raw version of source {raw_meta['source']!r}, not of {spec.name!r}")
    inputs = {"raw": raw, "inventory": spec.inventory, "version": VERSION}
    known = store.memo("manifest", inputs)
    if known and store.exists(known["manifest"]):
        return known

    import pandas as pd

    listing = pd.read_parquet(store.file(raw, "files.parquet"))
    files = [_File(path, sha256) for path, sha256 in zip(listing["path"], listing["sha256"], strict=True)]
    pictures = _decode_all({f.sha256 for f in files}, store, workers)
    rows, quarantine, duplicates = classify(files, pictures, spec.name)
    if not rows:
        raise SourceError(
            f"source {spec.name!r}: none of its {len(files)} image file(s) can be used: {_reasons(quarantine)}; "
            f"first: {quarantine[0]['path']}: {quarantine[0]['detail']}"
        )
    result: Json = {
        "source": spec.name,
        "raw": raw,
        "images": len(rows),
        "duplicates": duplicates,
        "quarantined": _reasons(quarantine),
        "inventory": spec.inventory,
    }
    manifest_frame = pd.DataFrame(rows, columns=list(MANIFEST_TYPES)).astype(MANIFEST_TYPES)
    quarantine_frame = pd.DataFrame(quarantine, columns=list(QUARANTINE_TYPES)).astype(QUARANTINE_TYPES)

    def fill(folder: Path) -> None:
        manifest_frame.to_parquet(folder / "manifest.parquet", index=False)
        quarantine_frame.to_parquet(folder / "quarantine.parquet", index=False)

    payload = [spec.name, spec.inventory, rows, quarantine]
    manifest = store.create("manifest", payload, result, fill)
    result = {"manifest": manifest, **result}
    store.set_memo("manifest", inputs, result)
    return result


def classify(
    files: list[_File], pictures: dict[str, _Picture], source: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """Turn decoded files into manifest rows and quarantine rows.

    In this order: a name outside the grammar; a name whose letter contradicts its subtype; a picture that does not
    decode; the same name again (the larger picture stays, then the first path); a slide under two subtypes (all its
    images, since nobody can say which label is right); the same pixels under names of another subtype (all of them);
    the same pixels again (the first stays).

    Returns:
        manifest rows, quarantine rows, and how many files were one more copy of an image that is in the manifest.
    """
    quarantine: list[dict[str, Any]] = []
    by_name: dict[str, list[_Named]] = defaultdict(list)
    for file in sorted(files):
        basename = file.path.rpartition("/")[2]
        try:
            name = parse_name(basename)
        except ValueError as error:
            quarantine.append(_quarantined(file, None, source, "name", str(error)))
            continue
        picture = pictures[file.sha256]
        if name.label != label_of(name.subtype):
            detail = f"the name says {name.label}, but {name.subtype} is {label_of(name.subtype)}"
            quarantine.append(_quarantined(file, name, source, "label", detail))
        elif picture.reason:
            quarantine.append(_quarantined(file, name, source, picture.reason, picture.detail))
        else:
            by_name[basename].append(_Named(file, name, picture))
    # max keeps the first of equals, and the files came sorted by path.
    named = [max(copies, key=lambda c: c.picture.width * c.picture.height) for copies in by_name.values()]
    duplicates = sum(len(copies) - 1 for copies in by_name.values())

    subtypes = defaultdict(set)
    for one in named:
        subtypes[one.name.slide].add(one.name.subtype)
    by_pixels: dict[str, list[_Named]] = defaultdict(list)
    for one in named:
        if len(subtypes[one.name.slide]) > 1:
            detail = f"slide {one.name.slide} stands under {' and '.join(sorted(subtypes[one.name.slide]))}"
            quarantine.append(_quarantined(one.file, one.name, source, "slide_with_two_subtypes", detail))
        else:
            by_pixels[one.picture.pixel_sha256].append(one)

    rows = []
    for same in by_pixels.values():
        if len({one.name.subtype for one in same}) > 1:
            paths = ", ".join(one.file.path for one in same)
            detail = f"the same pixels under names of different subtypes: {paths}"
            quarantine += [_quarantined(one.file, one.name, source, "conflicting_labels", detail) for one in same]
        else:
            rows.append(_row(same[0], source))
            duplicates += len(same) - 1
    rows.sort(key=lambda row: str(row["path"]))
    quarantine.sort(key=lambda row: str(row["path"]))
    return rows, quarantine, duplicates


def _row(one: _Named, source: str) -> dict[str, Any]:
    return {
        "path": one.file.path,
        "sha256": one.file.sha256,
        "pixel_sha256": one.picture.pixel_sha256,
        "source": source,
        "patient": one.name.case,
        "slide": one.name.slide,
        "subtype": one.name.subtype,
        "label": one.name.label,
        "magnification": one.name.magnification,
        "seq": one.name.seq,
        "width": one.picture.width,
        "height": one.picture.height,
    }


def _quarantined(file: _File, name: ImageName | None, source: str, reason: str, detail: str) -> dict[str, Any]:
    return {
        "path": file.path,
        "sha256": file.sha256,
        "source": source,
        "reason": reason,
        "detail": detail,
        "patient": name.case if name else None,
        "slide": name.slide if name else None,
        "subtype": name.subtype if name else None,
        "label": name.label if name else None,
        "magnification": name.magnification if name else None,
        "seq": name.seq if name else None,
    }


def read_manifest(manifest: str, store: Store) -> "pd.DataFrame":
    """The rows of a manifest (columns as :data:`MANIFEST_TYPES`).

    Raises:
        StoreError: no such manifest.
    """
    import pandas as pd

    store.meta(manifest)
    return pd.read_parquet(store.file(manifest, "manifest.parquet"))


def _decode_all(hashes: set[str], store: Store, workers: int) -> dict[str, _Picture]:
    jobs = ((store.root, sha256) for sha256 in sorted(hashes))
    return dict(track(in_processes(_decode_one, jobs, workers), total=len(hashes), what="reading images"))


def _decode_one(job: tuple[str, str]) -> tuple[str, _Picture]:
    root, sha256 = job
    try:
        pixels = decode(Store(root).blob(sha256))
    except ImageError as error:
        return sha256, _Picture(reason=error.reason, detail=error.detail)
    height, width, _ = pixels.shape
    return sha256, _Picture(pixel_sha256=pixel_hash(pixels), width=width, height=height)


def _reasons(quarantine: list[dict[str, Any]]) -> dict[str, int]:
    return dict(sorted(Counter(str(row["reason"]) for row in quarantine).items()))
