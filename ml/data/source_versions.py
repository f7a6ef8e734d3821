"""Source versions: validated manifests that are published as the current version of their source."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from ml.core.errors import Refused
from ml.core.store import Json, Store
from ml.data.manifest import read_manifest
from ml.data.validation import validate_manifest

if TYPE_CHECKING:
    import pandas as pd


def publish_manifest(manifest: str, store: Store) -> Json:
    """Makes a manifest the current version of its source (the ``publish`` stage). Publishing it again changes nothing.

    Returns:
        ``{source, version, changed, images, diff: {added, removed, relabelled}, quarantined, validation}``; the counts
        are of images (``quarantined``: of files, by reason), and ``validation`` is the id of the validation that the
        manifest passed.

    Raises:
        Refused: the manifest has not passed validation.
        Conflict: another publication of the same source came in between.
    """
    meta = store.meta(manifest)
    source = str(meta["source"])
    validation = validate_manifest(manifest, store)  # stored, so it is not computed twice
    if not validation["passed"]:
        raise Refused(f"{manifest} of source {source!r} has not passed validation, so it is not published")
    ref = f"refs/sources/{source}.json"
    current, tag = store.read(ref)
    rows = read_manifest(manifest, store)
    result: Json = {"source": source, "images": len(rows), "quarantined": meta["quarantined"]}
    result["validation"] = validation["validation"]
    # Compared by its rows: other validation settings for the same images make no new version.
    if current and store.meta(current["manifest"]).get("content") == meta["content"]:
        unchanged = {"added": 0, "removed": 0, "relabelled": 0}
        return {**result, "version": str(current["version"]), "changed": False, "diff": unchanged}
    diff = compare_manifests(read_manifest(current["manifest"], store) if current else None, rows)
    content = {
        "source": source,
        "manifest": manifest,
        "validation": validation["validation"],
        "images": len(rows),
    }
    version = store.create("version", content, content)
    value = {"version": version, **content, "diff": diff, "previous": current["version"] if current else None}
    store.compare_and_set(ref, {**value, "published": datetime.now(UTC).isoformat(timespec="seconds")}, tag)
    return {**result, "version": version, "changed": True, "diff": diff}


def compare_manifests(old: "pd.DataFrame | None", new: "pd.DataFrame") -> Json:
    """Counts the images added, removed and relabelled (same pixels, another subtype) between two manifests."""
    before = {} if old is None else dict(zip(old["pixel_sha256"], old["subtype"], strict=True))
    after = dict(zip(new["pixel_sha256"], new["subtype"], strict=True))
    return {
        "added": len(after.keys() - before.keys()),
        "removed": len(before.keys() - after.keys()),
        "relabelled": sum(before[pixels] != after[pixels] for pixels in after.keys() & before.keys()),
    }
