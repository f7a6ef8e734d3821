"""The manifest: one row an image that can be used, and a quarantine row with a reason for each that cannot."""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ml.errors import ImageError, SourceError, StoreError
from ml.imaging import decode, pixel_hash
from ml.progress import track
from ml.sources import SourceSpec
from ml.sources.tables import Row, read_table
from ml.store import Json, Store
from ml.taxonomy import label_of, parse_name
from ml.workers import in_processes

if TYPE_CHECKING:
    import pandas as pd

VERSION = 2
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


class Facts(NamedTuple):
    """What is known of an image besides its pixels, by its file name or by the source's table."""

    key: str
    """Two files with one key are the same image."""
    patient: str
    slide: str
    subtype: str
    label: str
    magnification: int
    seq: int


class Unusable(Exception):
    """A file of which nothing is known that could be used; says why."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


Describe = Callable[[str], Facts]
"""From a file's path to what is known of it; raises :class:`Unusable`."""


class _Named(NamedTuple):
    file: _File
    name: Facts
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
    layout = spec.table.model_dump() if spec.table else spec.layout
    inputs = {"raw": raw, "inventory": spec.inventory, "layout": layout, "version": VERSION}
    known = store.memo("manifest", inputs)
    if known and store.exists(known["manifest"]):
        return known

    import pandas as pd

    listing = pd.read_parquet(store.file(raw, "files.parquet"))
    files = [_File(path, sha256) for path, sha256 in zip(listing["path"], listing["sha256"], strict=True)]
    describe: Describe = by_file_name
    lost: list[Row] = []
    if spec.table:
        files, describe, lost = _by_table(spec, files, store)
    pictures = _decode_all({f.sha256 for f in files}, store, workers)
    rows, quarantine, duplicates = classify(files, pictures, spec.name, describe)
    quarantine += [_quarantined(_File(row.path, ""), None, spec.name, *(row.problem or ("", ""))) for row in lost]
    if not rows:
        first = (
            f": {_reasons(quarantine)}; first: {quarantine[0]['path']}: {quarantine[0]['detail']}" if quarantine else ""
        )
        raise SourceError(f"source {spec.name!r}: none of its {len(files)} image file(s) can be used{first}")
    result: Json = {
        "source": spec.name,
        "raw": raw,
        "images": len(rows),
        "duplicates": duplicates,
        "quarantined": _reasons(quarantine),
        "inventory": spec.inventory,
        "layout": spec.layout,
    }
    manifest_frame = pd.DataFrame(rows, columns=list(MANIFEST_TYPES)).astype(MANIFEST_TYPES)
    quarantine_frame = pd.DataFrame(quarantine, columns=list(QUARANTINE_TYPES)).astype(QUARANTINE_TYPES)

    def fill(folder: Path) -> None:
        manifest_frame.to_parquet(folder / "manifest.parquet", index=False)
        quarantine_frame.to_parquet(folder / "quarantine.parquet", index=False)

    payload = [spec.name, spec.inventory, layout, rows, quarantine]
    manifest = store.create("manifest", payload, result, fill)
    result = {"manifest": manifest, **result}
    store.set_memo("manifest", inputs, result)
    return result


def by_file_name(path: str) -> Facts:
    """What the name of a BreakHis file tells.

    Raises:
        Unusable: it is outside the grammar.
    """
    basename = path.rpartition("/")[2]
    try:
        name = parse_name(basename)
    except ValueError as error:
        raise Unusable("name", str(error)) from None
    return Facts(basename, name.case, name.slide, name.subtype, name.label, name.magnification, name.seq)


def _by_table(spec: SourceSpec, files: list[_File], store: Store) -> tuple[list[_File], Describe, list[Row]]:
    """The images without the table, what it tells of each, and its rows without an image."""
    assert spec.table
    table = next((file for file in files if file.path == spec.table.file), None)
    if not table:
        raise SourceError(f"{spec.file}: the source has no file {spec.table.file!r} (table: file)")
    images = [file for file in files if file is not table]
    told = read_table(spec, store.blob(table.sha256), [file.path for file in images])
    # A number for each image of a slide at a magnification, which is what BreakHis' names have.
    numbers: Counter[tuple[str, str, int]] = Counter()
    known: dict[str, Facts] = {}
    for file in images:
        row = told.get(file.path)
        if row and not row.problem:
            place = (row.subtype, row.slide, row.magnification)
            numbers[place] += 1
            label = label_of(row.subtype)
            known[file.path] = Facts(
                file.path, row.patient, row.slide, row.subtype, label, row.magnification, numbers[place]
            )

    def describe(path: str) -> Facts:
        if path in known:
            return known[path]
        row = told.get(path)
        raise Unusable(*(row.problem if row and row.problem else ("not_in_table", f"no row in {table.path}")))

    there = {file.path for file in images}
    return images, describe, [row for path, row in told.items() if path not in there]


def classify(
    files: list[_File], pictures: dict[str, _Picture], source: str, describe: Describe = by_file_name
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """Turn decoded files into manifest rows and quarantine rows.

    In this order: a file that nothing usable is known of; a name whose letter contradicts its subtype; a picture that
    does not decode; the same name again (the larger picture stays, then the first path); a slide under two subtypes
    (all its images, since nobody can say which label is right); the same pixels under names of another subtype (all of
    them); the same pixels again (the first stays).

    Returns:
        manifest rows, quarantine rows, and how many files were one more copy of an image that is in the manifest.
    """
    quarantine: list[dict[str, Any]] = []
    by_name: dict[str, list[_Named]] = defaultdict(list)
    for file in sorted(files):
        try:
            name = describe(file.path)
        except Unusable as why:
            quarantine.append(_quarantined(file, None, source, why.reason, why.detail))
            continue
        picture = pictures[file.sha256]
        if name.label != label_of(name.subtype):
            detail = f"the name says {name.label}, but {name.subtype} is {label_of(name.subtype)}"
            quarantine.append(_quarantined(file, name, source, "label", detail))
        elif picture.reason:
            quarantine.append(_quarantined(file, name, source, picture.reason, picture.detail))
        else:
            by_name[name.key].append(_Named(file, name, picture))
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
        "patient": one.name.patient,
        "slide": one.name.slide,
        "subtype": one.name.subtype,
        "label": one.name.label,
        "magnification": one.name.magnification,
        "seq": one.name.seq,
        "width": one.picture.width,
        "height": one.picture.height,
    }


def _quarantined(file: _File, name: Facts | None, source: str, reason: str, detail: str) -> dict[str, Any]:
    return {
        "path": file.path,
        "sha256": file.sha256,
        "source": source,
        "reason": reason,
        "detail": detail,
        "patient": name.patient if name else None,
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
        pixels = decode(Store(root).blob(sha256), colour=True)
    except ImageError as error:
        return sha256, _Picture(reason=error.reason, detail=error.detail)
    height, width, _ = pixels.shape
    return sha256, _Picture(pixel_sha256=pixel_hash(pixels), width=width, height=height)


def _reasons(quarantine: list[dict[str, Any]]) -> dict[str, int]:
    return dict(sorted(Counter(str(row["reason"]) for row in quarantine).items()))
