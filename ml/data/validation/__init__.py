"""Validation: does a manifest hold to what every later stage relies on? The ``validate`` stage.

``checks`` declares what is demanded, ``expectations`` has the demands that Great Expectations lacks, ``suite`` runs
them, ``pages`` makes the Data Docs readable without a network.
"""

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from ml.core.errors import StoreError
from ml.core.progress import say
from ml.core.store import Json, Store
from ml.data.sources.check_settings import ValidationSettings
from ml.data.validation.checks import BEFORE, ONLY_IN_QUARANTINE, QUARANTINED, build_suite, suite_version

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["validate"]


def validate_manifest(manifest_id: str, store: Store) -> Json:
    """Check a manifest with Great Expectations and keep the result and its Data Docs in the store.

    The same manifest under the same suite, against the same version before it, is checked once; later calls answer from
    the store. A validation in which an
    expectation crashed is not remembered, so that the next call tries again.

    Returns:
        ``{manifest, validation, source, passed, failed, errored, warned, changes, quarantined, docs}``. The first three
        lists hold an entry a check: name, severity, status, sentence, observed, unexpected (rows, or None) and the
        first offending rows. ``passed`` says that no critical check failed and none crashed; ``changes`` what the
        source's YAML demands otherwise than usual; ``docs`` is the URI of the Data Docs.

    Raises:
        StoreError: there is no such manifest, or it was made by an earlier release.
        ConfigError: an expectation that the source's YAML adds does not exist or does not take its arguments.
    """
    meta = store.meta(manifest_id)
    if not manifest_id.startswith("manifest-"):
        raise StoreError(f"{manifest_id!r} is no manifest; give an id that breakhis manifest printed (manifest-…)")
    if "content" not in meta:
        raise StoreError(f"{manifest_id} was made by an earlier release; run: breakhis manifest {meta['source']}")
    demands = ValidationSettings.model_validate(meta["validation"])
    suite = build_suite(bool(meta["inventory"]), meta["layout"], demands)
    version = suite_version(suite)
    published, _ = store.read(f"refs/sources/{meta['source']}.json")
    if published and published["manifest"] == manifest_id:
        # Not held against itself: as it was when it was published, it holds.
        if store.meta(published["validation"])["suite"] == version:
            return _answer(published["validation"], store)
        published = None
    inputs = {"manifest": manifest_id, "suite": version, "before": published["manifest"] if published else None}
    known = store.memo("validate", inputs)
    if known and store.exists(known["validation"]):
        return _answer(known["validation"], store)

    import pandas as pd

    from ml.data.validation.pages import finish_docs
    from ml.data.validation.suite import run_suite, verify_expectations

    frame = pd.read_parquet(store.file(manifest_id, "manifest.parquet"))
    quarantine = pd.read_parquet(store.file(manifest_id, "quarantine.parquet"))
    say(f"validating {len(frame):,} images of {meta['source']} with Great Expectations")
    verify_expectations(suite, meta["file"])
    before = pd.read_parquet(store.file(published["manifest"], "manifest.parquet")) if published else None
    parameters = {
        ONLY_IN_QUARANTINE: only_in_quarantine(frame, quarantine),
        QUARANTINED: int((quarantine["reason"] != "erased").sum()),  # which is nobody's fault
        BEFORE: images_before(before, frame),
    }
    with store.staging() as scratch:
        docs = scratch / "docs"
        outcomes, complete = run_suite(suite, frame, parameters, manifest_id, docs)
        failed = [one.to_json() for one in outcomes if one.status == "failed"]
        result: Json = {
            "manifest": manifest_id,
            "source": meta["source"],
            "suite": version,
            "passed": not any(one.blocks for one in outcomes),
            "failed": [one for one in failed if one["severity"] == "critical"],
            "errored": [one.to_json() for one in outcomes if one.status == "errored"],
            "warned": [one for one in failed if one["severity"] != "critical"],
            "checks": [one.to_json() for one in outcomes],
            "changes": demands.changes(),
        }
        finish_docs(docs, outcomes, meta, quarantine, version, demands.changes())

        def fill(folder: Path) -> None:
            docs.rename(folder / "docs")
            (folder / "result.json").write_text(json.dumps({**result, "great_expectations": complete}, indent=1))

        validation = store.create("validation", {**inputs, "checks": result["checks"]}, result, fill)
    if not result["errored"]:
        store.set_memo("validate", inputs, {"validation": validation})
    return _answer(validation, store)


def only_in_quarantine(frame: "pd.DataFrame", quarantine: "pd.DataFrame") -> list[list[str | int]]:
    """Count the images that are in quarantine and not in the manifest, by the name they go under.

    A name met several times (another folder, a damaged copy beside a good one) is one image; rows whose name could not
    be read are none.

    Returns:
        ``[subtype, slide, magnification, images]`` for each that has any.
    """
    key = ["subtype", "slide", "magnification", "seq"]
    if not set(key) <= set(frame.columns):
        return []  # the schema check says so
    here = set(frame[key].itertuples(index=False, name=None))
    named = quarantine.dropna(subset=key).astype({"magnification": "int64", "seq": "int64"})
    there = set(named[key].itertuples(index=False, name=None)) - here
    counts = Counter(row[:3] for row in there)
    return [[*slide_at, images] for slide_at, images in sorted(counts.items())]


def images_before(before: "pd.DataFrame | None", now: "pd.DataFrame") -> dict[str, list[int]]:
    """How many images of each subtype another manifest has, and how many of these are gone, by their pixels.

    Returns:
        ``{subtype: [images, gone]}``; empty without another manifest.
    """
    if before is None or "pixel_sha256" not in now.columns:
        return {}
    gone = ~before["pixel_sha256"].isin(now["pixel_sha256"])
    return {str(subtype): [len(rows), int(gone[rows.index].sum())] for subtype, rows in before.groupby("subtype")}


def _answer(validation: str, store: Store) -> Json:
    meta = store.meta(validation)
    told = {key: meta[key] for key in ("manifest", "source", "passed", "failed", "errored", "warned", "changes")}
    docs = store.uri(f"{store.object_key(validation)}/docs/index.html")
    return {**told, "quarantined": store.meta(meta["manifest"])["quarantined"], "validation": validation, "docs": docs}
