"""The manifest of a source: a row for each usable image, and a quarantine row with the reason for each other file."""

from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml.core.errors import SourceError, StoreError
from ml.core.hashes import digest
from ml.core.messages import cut_text, quote_value
from ml.core.progress import say
from ml.core.store import Json, Store
from ml.core.taxonomy import detect_folder_layout
from ml.data.identifiers import normalize_name
from ml.data.image_facts import ReadFacts, SourceFile, UnusableFile, read_file_name_facts, read_table_facts
from ml.data.quarantine import make_quarantine_row, screen_files
from ml.data.sources import SourceSpec
from ml.data.sources.table_cells import MAX_ROWS
from ml.data.sources.tables import TableRow
from ml.data.stored_tables import read_stored_table
from ml.images.decoding import MEMORY
from ml.images.file_facts import CPU_SECONDS, HASH_DIGITS, UNSETTLED, inspect_files

if TYPE_CHECKING:
    import pandas as pd

VERSION = 9
"""Increased when the same raw files would give another manifest, so that stored results are not reused."""

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
or of what was made of it with 8 bits a channel where the source declares ``significant_bits``; ``pixel_sha256`` is of
the decoded picture, ``perceptual_hash`` as :func:`perceptual_hashes` makes it (one hash in manifests of earlier
releases); ``width`` and ``height`` are in pixels."""

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
"""Columns of quarantine.parquet; facts that are not known are null."""

TIE_COLUMNS = ("pixel_sha256", "patient", "slide", "source", "path", "kept_patient", "kept_slide")
"""Columns of the ties.parquet of a manifest or a dataset: whose a copy of an image is that was left out, and whose
image was kept in its place."""


def make_manifest(
    spec: SourceSpec,
    store: Store,
    workers: int,
    raw: str | None = None,
    memory: int = MEMORY,
    max_rows: int = MAX_ROWS,
    cpu_seconds: float = CPU_SECONDS,
) -> Json:
    """Reads every file of a raw version and separates usable images from the rest (the ``manifest`` stage).

    Args:
        spec: the source.
        store: where the raw version lies and the manifest goes.
        workers: processes that decode; with none, this process does.
        raw: the raw version's id; default: the source's latest.
        memory: bytes that decoding a picture may take.
        max_rows: rows that the source's table may have.
        cpu_seconds: CPU time that reading a picture may take.

    Returns:
        ``{source, manifest, images, duplicates, quarantined: {reason: n}, tree, decoded}``; ``tree`` is
        the published folder layout of BreakHis that was recognised; ``decoded`` counts the files that were decoded now,
        not in an earlier call.

    Raises:
        SourceError: the source was never fetched, or holds no usable image at all.
        StoreError: the raw version is another source's.
    """
    raw = _find_raw_version(spec, raw, store)
    declared = _describe_declaration(spec)
    assert spec.cohort
    erased = read_erased_patients(spec.cohort, store)
    inputs = {"raw": raw, **declared, "erased": sorted(erased), "version": VERSION}
    known = store.memo("manifest", inputs)
    if known and store.exists(known["manifest"]) and not erased:
        return {**known, "decoded": 0}
    files, read_facts, unmatched = _list_files(spec, raw, store, max_rows)
    files = _remove_erased_files(files, read_facts, erased, store)
    if known and store.exists(known["manifest"]):
        return {**known, "decoded": 0}
    hashes = {f.sha256 for f in files if f.sha256}
    pictures, decoded = inspect_files(hashes, store, workers, spec.significant_bits, memory, cpu_seconds)
    rows, quarantine, ties, duplicates = screen_files(files, pictures, spec, read_facts)
    quarantine += [
        make_quarantine_row(SourceFile(row.path, ""), None, spec.name, *(row.problem or ("", ""))) for row in unmatched
    ] + _list_rejected_files(spec, raw, store)
    if not rows:
        raise SourceError(_explain_no_image(spec, len(files), quarantine))
    result: Json = {
        "source": spec.name,
        "raw": raw,
        "images": len(rows),
        "duplicates": duplicates,
        "quarantined": _count_reasons(quarantine),
        "tree": "as its table says" if spec.table else detect_folder_layout([file.path for file in files]),
    }
    say(f"{spec.name}: {len(rows):,} images in {result['tree']}, {len(quarantine):,} files in quarantine")
    result = {"manifest": _store_manifest(spec, declared, result, rows, quarantine, ties, store), **result}
    if UNSETTLED.isdisjoint(result["quarantined"]):
        store.set_memo("manifest", inputs, result)
    return {**result, "decoded": decoded}


def _describe_declaration(spec: SourceSpec) -> Json:
    """Returns what a source's YAML says that its manifest depends on."""
    return {
        "layout": spec.table.model_dump() if spec.table else spec.layout,
        "cohort": spec.cohort,
        "trust": spec.trust,
        "inventory": spec.inventory,
        "validation": spec.validation.model_dump(exclude_defaults=True),
        **({"significant_bits": spec.significant_bits} if spec.significant_bits else {}),
    }


def _explain_no_image(spec: SourceSpec, files: int, quarantine: list[dict[str, Any]]) -> str:
    said = f"source {spec.name!r}: none of its {files} image file(s) can be used"
    if not quarantine:
        return said
    first = quarantine[0]
    return f"{said}: {_count_reasons(quarantine)}; first: {cut_text(first['path'])}: {cut_text(first['detail'])}"


def _find_raw_version(spec: SourceSpec, raw: str | None, store: Store) -> str:
    """Returns the id of the raw version to read: the given one, or the source's latest."""
    if raw is None:
        ref, _ = store.read(f"refs/raw/{spec.name}.json")
        if ref is None:
            raise SourceError(f"source {spec.name!r} was never fetched; run: breakhis fetch {spec.name}")
        raw = str(ref["raw"])
    source = store.meta(raw)["source"]
    if source != spec.name:
        raise StoreError(f"{raw} is a raw version of source {quote_value(source)}, not of {spec.name!r}")
    return raw


def _list_files(
    spec: SourceSpec, raw: str, store: Store, max_rows: int
) -> tuple[list[SourceFile], ReadFacts, list[TableRow]]:
    """Returns a raw version's image files, a reader of the facts about each, and table rows without an image."""

    listing = read_stored_table(raw, "files.parquet", store)
    files = [SourceFile(path, sha256) for path, sha256 in zip(listing["path"], listing["sha256"], strict=True)]
    return read_table_facts(spec, files, store, max_rows) if spec.table else (files, read_file_name_facts, [])


def _list_rejected_files(spec: SourceSpec, raw: str, store: Store) -> list[dict[str, Any]]:
    """Returns the quarantine rows of the image files that could not be fetched."""
    if not store.meta(raw).get("rejected"):
        return []
    rejected = read_stored_table(raw, "rejected.parquet", store)
    return [
        make_quarantine_row(SourceFile(path, ""), None, spec.name, reason, detail)
        for path, reason, detail in zip(rejected["path"], rejected["reason"], rejected["detail"], strict=True)
    ]


def _store_manifest(
    spec: SourceSpec,
    declared: Json,
    result: Json,
    rows: list[dict[str, Any]],
    quarantine: list[dict[str, Any]],
    ties: list[dict[str, str]],
    store: Store,
) -> str:
    """Writes the manifest's tables to the store; returns its id."""
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
        # With the first perceptual hash alone, as before there were several: the same images are no new version.
        "content": digest([[{**row, "perceptual_hash": row["perceptual_hash"][:HASH_DIGITS]} for row in rows], ties]),
    }
    return store.create("manifest", [VERSION, spec.name, declared, rows, quarantine, ties], meta, fill)


def erased_patients_key(cohort: str) -> str:
    """Returns the store's key of the list of a cohort's erased patients."""
    return f"refs/erased/{cohort}.json"


def read_erased_patients(cohort: str, store: Store) -> frozenset[str]:
    """Returns the patients of a cohort who were erased, as manifests name them: their images may not be used again."""
    known, _ = store.read(erased_patients_key(cohort))
    return frozenset(map(normalize_name, known or ()))


def _remove_erased_files(
    files: list[SourceFile], read_facts: ReadFacts, erased: Collection[str], store: Store
) -> list[SourceFile]:
    """Removes the files of erased patients from the store; returns all files, theirs with an empty hash.

    The source may still have these files, and the store must not.
    """
    if not erased:
        return files
    erased_files = {file for file in files if _find_patient(file.path, read_facts) in erased}
    for sha256 in {file.sha256 for file in erased_files} - {file.sha256 for file in files if file not in erased_files}:
        store.remove(store.blob_key(sha256))
    return [file._replace(sha256="") if file in erased_files else file for file in files]


def _find_patient(path: str, read_facts: ReadFacts) -> str | None:
    """Returns the patient of a file; None where it is not known."""
    try:
        return read_facts(path).patient
    except UnusableFile:
        return None


def read_manifest(manifest: str, store: Store) -> "pd.DataFrame":
    """Returns the rows of a manifest, with the columns :data:`MANIFEST_TYPES`.

    Raises:
        StoreError: no such manifest.
    """

    store.meta(manifest)
    return read_stored_table(manifest, "manifest.parquet", store)


def read_ties(oid: str, store: Store) -> "pd.DataFrame":
    """Returns the ties of a manifest or a dataset: the left-out copies whose patient or slide is not the kept image's.

    Each row is a copy: the hash of its pixels, its patient and slide, where it was published, and the patient and slide
    of the image that was kept. Both patients have the same picture, so they may be one person.

    Returns:
        a table with the columns :data:`TIE_COLUMNS`; without rows for an object from before ties were recorded.

    Raises:
        StoreError: no such object.
    """
    import pandas as pd

    if not store.meta(oid).get("ties"):
        return pd.DataFrame(columns=list(TIE_COLUMNS), dtype="str")
    return read_stored_table(oid, "ties.parquet", store)


def _count_reasons(quarantine: list[dict[str, Any]]) -> dict[str, int]:
    """Counts the quarantined files by reason."""
    return dict(sorted(Counter(str(row["reason"]) for row in quarantine).items()))
