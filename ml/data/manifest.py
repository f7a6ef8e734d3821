"""The manifest: one row an image that can be used, and a quarantine row with a reason for each that cannot."""

from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml.core.errors import SourceError, StoreError
from ml.core.progress import say
from ml.core.store import Json, Store, digest
from ml.core.taxonomy import detect_folder_layout
from ml.data.image_facts import Describe, SourceFile, Unusable, by_file_name, by_table
from ml.data.quarantine import classify, quarantine_row
from ml.data.sources import SourceSpec
from ml.data.sources.tables import Row
from ml.images.file_facts import inspect_files

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


TIE_COLUMNS = ("pixel_sha256", "patient", "slide", "source", "path", "kept_patient", "kept_slide")
"""Columns of ties.parquet, of a manifest and of a dataset: copies of images that were left out, and whose image was
kept in their place."""


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
    raw = _raw_version(spec, raw, store)
    declared = {
        "layout": spec.table.model_dump() if spec.table else spec.layout,
        "cohort": spec.cohort,
        "trust": spec.trust,
        "inventory": spec.inventory,
        "validation": spec.validation.model_dump(exclude_defaults=True),
    }
    assert spec.cohort
    erased = read_erased_patients(spec.cohort, store)
    inputs = {"raw": raw, **declared, "erased": sorted(erased), "version": VERSION}
    known = store.memo("manifest", inputs)
    if known and store.exists(known["manifest"]) and not erased:
        return {**known, "decoded": 0}
    files, describe, lost = _files(spec, raw, store)
    files = _without_erased(files, describe, erased, store)
    if known and store.exists(known["manifest"]):
        return {**known, "decoded": 0}
    pictures, decoded = inspect_files({f.sha256 for f in files if f.sha256}, store, workers)
    rows, quarantine, ties, duplicates = classify(files, pictures, spec, describe)
    quarantine += [
        quarantine_row(SourceFile(row.path, ""), None, spec.name, *(row.problem or ("", ""))) for row in lost
    ]
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
        "tree": "as its table says" if spec.table else detect_folder_layout([file.path for file in files]),
    }
    say(f"{spec.name}: {len(rows):,} images in {result['tree']}, {len(quarantine):,} files in quarantine")
    result = {"manifest": _store_manifest(spec, declared, result, rows, quarantine, ties, store), **result}
    store.set_memo("manifest", inputs, result)
    return {**result, "decoded": decoded}


def _raw_version(spec: SourceSpec, raw: str | None, store: Store) -> str:
    """The id of the raw version to read: the one that is asked for, or the source's latest."""
    if raw is None:
        ref, _ = store.read(f"refs/raw/{spec.name}.json")
        if ref is None:
            raise SourceError(f"source {spec.name!r} was never fetched; run: breakhis fetch {spec.name}")
        raw = str(ref["raw"])
    source = store.meta(raw)["source"]
    if source != spec.name:
        raise StoreError(f"{raw} is a raw version of source {source!r}, not of {spec.name!r}")
    return raw


def _files(spec: SourceSpec, raw: str, store: Store) -> tuple[list[SourceFile], Describe, list[Row]]:
    """The image files of a raw version, what tells of each, and the rows of the source's table without an image."""
    import pandas as pd

    listing = pd.read_parquet(store.file(raw, "files.parquet"))
    files = [SourceFile(path, sha256) for path, sha256 in zip(listing["path"], listing["sha256"], strict=True)]
    return by_table(spec, files, store) if spec.table else (files, by_file_name, [])


def _store_manifest(
    spec: SourceSpec,
    declared: Json,
    result: Json,
    rows: list[dict[str, Any]],
    quarantine: list[dict[str, Any]],
    ties: list[dict[str, str]],
    store: Store,
) -> str:
    """Write the manifest's tables to the store; returns its id."""
    import pandas as pd

    manifest_frame = pd.DataFrame(rows, columns=list(MANIFEST_TYPES)).astype(MANIFEST_TYPES)
    quarantine_frame = pd.DataFrame(quarantine, columns=list(QUARANTINE_TYPES)).astype(QUARANTINE_TYPES)

    def fill(folder: Path) -> None:
        manifest_frame.to_parquet(folder / "manifest.parquet", index=False)
        quarantine_frame.to_parquet(folder / "quarantine.parquet", index=False)
        pd.DataFrame(ties, columns=list(TIE_COLUMNS), dtype="str").to_parquet(folder / "ties.parquet", index=False)

    meta = {
        **result,
        **declared,
        "ties": len(ties),
        "layout": spec.layout,
        "file": spec.file.name,
        "content": digest([rows, ties]),
    }
    return store.create("manifest", [VERSION, spec.name, declared, rows, quarantine, ties], meta, fill)


def erased_patients_key(cohort: str) -> str:
    """The key of the list of a cohort's patients of whom nothing may be used again."""
    return f"refs/erased/{cohort}.json"


def read_erased_patients(cohort: str, store: Store) -> frozenset[str]:
    """The patients of a cohort of whom nothing may be used again."""
    known, _ = store.read(erased_patients_key(cohort))
    return frozenset(known or ())


def _without_erased(
    files: list[SourceFile], describe: Describe, erased: Collection[str], store: Store
) -> list[SourceFile]:
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
        columns :data:`TIE_COLUMNS`; no rows for what was made before ties were told.

    Raises:
        StoreError: no such object.
    """
    import pandas as pd

    if not store.meta(oid).get("ties"):
        return pd.DataFrame(columns=list(TIE_COLUMNS), dtype="str")
    return pd.read_parquet(store.file(oid, "ties.parquet"))


def _reasons(quarantine: list[dict[str, Any]]) -> dict[str, int]:
    return dict(sorted(Counter(str(row["reason"]) for row in quarantine).items()))
