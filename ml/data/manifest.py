"""The manifest: one row an image that can be used, and a quarantine row with a reason for each that cannot."""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ml.core.errors import SourceError, StoreError
from ml.core.progress import say
from ml.core.store import Json, Store, digest
from ml.core.taxonomy import contradiction, label_of, parse_name, tree_of
from ml.data.sources import SourceSpec
from ml.data.sources.tables import Row, read_table
from ml.images.file_facts import Picture, look

if TYPE_CHECKING:
    import pandas as pd

VERSION = 4
"""Raised when the same raw files would give another manifest, so that remembered ones are not taken."""

MANIFEST_TYPES = {
    "path": "str",
    "sha256": "str",
    "pixel_sha256": "str",
    "perceptual_hash": "str",
    "source": "str",
    "cohort": "str",
    "patient": "str",
    "slide": "str",
    "subtype": "str",
    "label": "str",
    "magnification": "int64",
    "seq": "int64",
    "width": "int64",
    "height": "int64",
}
"""Columns of manifest.parquet. ``patient`` is the case number, unique within the ``cohort``; ``sha256`` is of the file,
``pixel_sha256`` of the decoded picture, ``perceptual_hash`` as :func:`perceptual_hash` makes it; ``width`` and
``height`` are in pixels."""

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


TIES = ("pixel_sha256", "patient", "slide", "source", "path", "kept_patient", "kept_slide")
"""Columns of ties.parquet, of a manifest and of a dataset: copies of images that were left out, and whose image was
kept in their place."""


class _File(NamedTuple):
    path: str
    sha256: str


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
    picture: Picture


def make_manifest(spec: SourceSpec, store: Store, workers: int, raw: str | None = None) -> Json:
    """Read every file of a raw version and tell images from what cannot be used (the ``manifest`` stage).

    Args:
        spec: the source.
        store: where the raw version lies and the manifest goes.
        workers: processes that decode.
        raw: the raw version's id; default: the source's latest.

    Returns:
        ``{source, manifest, images, duplicates, quarantined: {reason: n}, tree, decoded}``; ``tree`` is the one
        of BreakHis' trees that was recognised; ``decoded`` counts the files that had not been looked at before.

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
    declared = {
        "layout": layout,
        "cohort": spec.cohort,
        "trust": spec.trust,
        "inventory": spec.inventory,
        "validation": spec.validation.model_dump(exclude_defaults=True),
    }
    assert spec.cohort
    erased = erased_patients(spec.cohort, store)
    inputs = {"raw": raw, **declared, "erased": sorted(erased), "version": VERSION}
    known = store.memo("manifest", inputs)
    if known and store.exists(known["manifest"]) and not erased:
        return {**known, "decoded": 0}

    import pandas as pd

    listing = pd.read_parquet(store.file(raw, "files.parquet"))
    files = [_File(path, sha256) for path, sha256 in zip(listing["path"], listing["sha256"], strict=True)]
    describe: Describe = by_file_name
    lost: list[Row] = []
    if spec.table:
        files, describe, lost = _by_table(spec, files, store)
    files = _without_erased(files, describe, erased, store)
    if known and store.exists(known["manifest"]):
        return {**known, "decoded": 0}
    pictures, decoded = look({f.sha256 for f in files if f.sha256}, store, workers)
    rows, quarantine, ties, duplicates = classify(files, pictures, spec, describe)
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
        "tree": "as its table says" if spec.table else tree_of([file.path for file in files]),
    }
    say(f"{spec.name}: {len(rows):,} images in {result['tree']}, {len(quarantine):,} files in quarantine")
    meta = {
        **result,
        **declared,
        "ties": len(ties),
        "layout": spec.layout,
        "file": spec.file.name,
        "content": digest([rows, ties]),
    }
    manifest_frame = pd.DataFrame(rows, columns=list(MANIFEST_TYPES)).astype(MANIFEST_TYPES)
    quarantine_frame = pd.DataFrame(quarantine, columns=list(QUARANTINE_TYPES)).astype(QUARANTINE_TYPES)

    def fill(folder: Path) -> None:
        manifest_frame.to_parquet(folder / "manifest.parquet", index=False)
        quarantine_frame.to_parquet(folder / "quarantine.parquet", index=False)
        pd.DataFrame(ties, columns=list(TIES), dtype="str").to_parquet(folder / "ties.parquet", index=False)

    manifest = store.create("manifest", [VERSION, spec.name, declared, rows, quarantine, ties], meta, fill)
    result = {"manifest": manifest, **result}
    store.set_memo("manifest", inputs, result)
    return {**result, "decoded": decoded}


def list_of_erased(cohort: str) -> str:
    """The key of the list of a cohort's patients of whom nothing may be used again."""
    return f"refs/erased/{cohort}.json"


def erased_patients(cohort: str, store: Store) -> frozenset[str]:
    """The patients of a cohort of whom nothing may be used again."""
    known, _ = store.read(list_of_erased(cohort))
    return frozenset(known or ())


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


def _without_erased(files: list[_File], describe: Describe, erased: Collection[str], store: Store) -> list[_File]:
    """The files, those of erased patients without a hash: the source still has them, and the store must not."""
    if not erased:
        return files
    theirs = {file for file in files if _patient(file.path, describe) in erased}
    for sha256 in {file.sha256 for file in theirs} - {file.sha256 for file in files if file not in theirs}:
        store.remove(store.blob_key(sha256))
    return [file._replace(sha256="") if file in theirs else file for file in files]


def _patient(path: str, describe: Describe) -> str | None:
    try:
        return describe(path).patient
    except Unusable:
        return None


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
    files: list[_File], pictures: dict[str, Picture], spec: SourceSpec, describe: Describe = by_file_name
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, str]], int]:
    """Turn decoded files into manifest rows and quarantine rows.

    In this order: a file that nothing usable is known of; one of an erased patient; a folder that contradicts the name;
    a name whose letter contradicts its subtype; a picture that does not decode; the same name again (the larger picture
    stays, then the first path); an image whose slide the source trusts under another subtype; a slide under two
    subtypes (all its images, since nobody can say which label is right); the same pixels under names of another subtype
    (all of them); the same pixels again (the first stays).

    Returns:
        manifest rows, quarantine rows, what the copies that were left out tie together (see :data:`TIES`), and how many
        files were one more copy of an image that is in the manifest.
    """
    quarantine: list[dict[str, Any]] = []
    by_name: dict[str, list[_Named]] = defaultdict(list)
    for one in _usable(files, pictures, spec, describe, quarantine):
        by_name[one.name.key].append(one)
    # max keeps the first of equals, and the files came sorted by path.
    named = [max(copies, key=lambda c: c.picture.width * c.picture.height) for copies in by_name.values()]
    duplicates = sum(len(copies) - 1 for copies in by_name.values())

    by_pixels: dict[str, list[_Named]] = defaultdict(list)
    for one in _of_one_subtype(named, spec, quarantine):
        by_pixels[one.picture.pixel_sha256].append(one)
    rows, ties = [], []
    for same in by_pixels.values():
        if len({one.name.subtype for one in same}) > 1:
            paths = ", ".join(one.file.path for one in same)
            detail = f"the same pixels under names of different subtypes: {paths}"
            quarantine += [_quarantined(one.file, one.name, spec.name, "conflicting_labels", detail) for one in same]
        else:
            rows.append(_row(same[0], spec))
            duplicates += len(same) - 1
            ties += [tie for other in same[1:] if (tie := _tie(other, same[0], spec))]
    rows.sort(key=lambda row: str(row["path"]))
    quarantine.sort(key=lambda row: str(row["path"]))
    return rows, quarantine, ties, duplicates


def _tie(copy: _Named, kept: _Named, spec: SourceSpec) -> dict[str, str] | None:
    if (copy.name.patient, copy.name.slide) == (kept.name.patient, kept.name.slide):
        return None
    return {
        "pixel_sha256": copy.picture.pixel_sha256,
        "patient": copy.name.patient,
        "slide": copy.name.slide,
        "source": spec.name,
        "path": copy.file.path,
        "kept_patient": kept.name.patient,
        "kept_slide": kept.name.slide,
    }


def _usable(
    files: list[_File],
    pictures: dict[str, Picture],
    spec: SourceSpec,
    describe: Describe,
    quarantine: list[dict[str, Any]],
) -> Iterator[_Named]:
    """The files of which each by itself can be used, by path; the others go to quarantine."""
    for file in sorted(files):
        try:
            name = describe(file.path)
        except Unusable as why:
            quarantine.append(_quarantined(file, None, spec.name, why.reason, why.detail))
            continue
        if not file.sha256:
            quarantine.append(_quarantined(file, name, spec.name, "erased", "the patient was erased on request"))
            continue
        picture = pictures[file.sha256]
        if not spec.table and (against := contradiction(file.path)):
            quarantine.append(_quarantined(file, name, spec.name, "folder", against))
        elif name.label != label_of(name.subtype):
            detail = f"the name says {name.label}, but {name.subtype} is {label_of(name.subtype)}"
            quarantine.append(_quarantined(file, name, spec.name, "label", detail))
        elif picture.reason:
            quarantine.append(_quarantined(file, name, spec.name, picture.reason, picture.detail))
        else:
            yield _Named(file, name, picture)


def _of_one_subtype(named: list[_Named], spec: SourceSpec, quarantine: list[dict[str, Any]]) -> Iterator[_Named]:
    """The images whose slide stands under one subtype, or that the source trusts; the others go to quarantine."""
    subtypes = defaultdict(set)
    for one in named:
        subtypes[one.name.slide].add(one.name.subtype)
    for one in named:
        slide = one.name.slide
        trusted = spec.trusted(slide)
        if trusted and trusted != one.name.subtype:
            detail = f"{spec.file.name} trusts {trusted} for slide {slide}, and this says {one.name.subtype}"
            quarantine.append(_quarantined(one.file, one.name, spec.name, "not_trusted", detail))
        elif not trusted and len(subtypes[slide]) > 1:
            detail = f"slide {slide} stands under {' and '.join(sorted(subtypes[slide]))}"
            quarantine.append(_quarantined(one.file, one.name, spec.name, "slide_with_two_subtypes", detail))
        else:
            yield one


def _row(one: _Named, spec: SourceSpec) -> dict[str, Any]:
    return {
        "path": one.file.path,
        "sha256": one.file.sha256,
        "pixel_sha256": one.picture.pixel_sha256,
        "perceptual_hash": one.picture.perceptual_hash,
        "source": spec.name,
        "cohort": spec.cohort,
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


def read_ties(oid: str, store: Store) -> "pd.DataFrame":
    """The copies of a manifest's or a dataset's images that were left out, if they tell more than what was kept.

    A row a copy: the hash of its pixels, whose it is said to be, where it was published, and whose image was kept. So
    its patient and the kept one have the same picture, and may be one person.

    Returns:
        columns :data:`TIES`; no rows for what was made before ties were told.

    Raises:
        StoreError: no such object.
    """
    import pandas as pd

    if not store.meta(oid).get("ties"):
        return pd.DataFrame(columns=list(TIES), dtype="str")
    return pd.read_parquet(store.file(oid, "ties.parquet"))


def _reasons(quarantine: list[dict[str, Any]]) -> dict[str, int]:
    return dict(sorted(Counter(str(row["reason"]) for row in quarantine).items()))
