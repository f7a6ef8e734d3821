"""The ``validate`` stage: checks that a manifest fulfils what every later stage relies on.

``checks`` declares the checks, ``expectations`` defines those that Great Expectations lacks, ``suite`` runs them, and
``pages`` makes the Data Docs readable without a network.
"""

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from ml.core.errors import StoreError
from ml.core.messages import quote_value
from ml.core.progress import say
from ml.core.store import Json, Store
from ml.data.sources.check_settings import ValidationSettings
from ml.data.stored_tables import read_stored_table
from ml.data.validation.checks import BEFORE, ONLY_IN_QUARANTINE, QUARANTINED, Check, build_suite, suite_version

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["validate_manifest"]


def validate_manifest(manifest_id: str, store: Store) -> Json:
    """Validates a manifest with Great Expectations; stores the result and its Data Docs.

    The same manifest is validated once with the same suite and the same previous version; later calls return the stored
    result. A validation in which an expectation crashed is not reused, so the next call tries again.

    Returns:
        ``{manifest, validation, source, passed, failed, errored, warned, changes, quarantined, docs}``. The lists
        ``failed``, ``errored`` and ``warned`` hold an entry for each check: name, severity, status, sentence, observed,
        unexpected (number of rows, or None) and the first offending rows. ``passed`` says that no critical check failed
        and none crashed; ``changes`` lists the settings of the source's YAML that are not the default; ``docs`` is the
        URI of the Data Docs.

    Raises:
        StoreError: there is no such manifest, or it was made by an earlier release.
        ConfigError: an expectation that the source's YAML adds does not exist or does not accept its arguments.
    """
    meta = store.meta(manifest_id)
    if not manifest_id.startswith("manifest-"):
        raise StoreError(
            f"{quote_value(manifest_id)} is no manifest; give an id that breakhis manifest printed (manifest-…)"
        )
    if "content" not in meta:
        raise StoreError(f"{manifest_id} was made by an earlier release; run: breakhis manifest {meta['source']}")
    settings = ValidationSettings.model_validate(meta["validation"])
    suite = build_suite(bool(meta["inventory"]), meta["layout"], settings)
    version = suite_version(suite)
    published, _ = store.read(f"refs/sources/{meta['source']}.json")
    if published and published["manifest"] == manifest_id:
        # A published manifest is not compared with itself: its validation from before it was published counts.
        if store.meta(published["validation"])["suite"] == version:
            return _read_result(published["validation"], store)
        published = None
    inputs = {"manifest": manifest_id, "suite": version, "before": published["manifest"] if published else None}
    known = store.memo("validate", inputs)
    if known and store.exists(known["validation"]):
        return _read_result(known["validation"], store)
    return _read_result(_run_validation(manifest_id, meta, suite, settings, inputs, store), store)


def _run_validation(
    manifest_id: str, meta: Json, suite: tuple[Check, ...], settings: ValidationSettings, inputs: Json, store: Store
) -> str:
    """Runs the suite on a manifest and stores the validation; returns its id.

    Args:
        manifest_id: the manifest's id.
        meta: the manifest's object.json.
        suite: the checks.
        settings: the settings of the source's YAML.
        inputs: the suite's version, and the manifest that was published before or None; the result is stored for them.
        store: the store that holds the manifest and gets the validation.
    """
    from ml.data.validation.pages import finish_docs
    from ml.data.validation.suite import run_suite, verify_expectations

    frame = read_stored_table(manifest_id, "manifest.parquet", store)
    quarantine = read_stored_table(manifest_id, "quarantine.parquet", store)
    say(f"validating {len(frame):,} images of {meta['source']} with Great Expectations")
    verify_expectations(suite, meta["file"])
    before = read_stored_table(inputs["before"], "manifest.parquet", store) if inputs["before"] else None
    parameters = {
        ONLY_IN_QUARANTINE: count_only_in_quarantine(frame, quarantine),
        QUARANTINED: int((quarantine["reason"] != "erased").sum()),  # erased files are no fault of the delivery
        BEFORE: count_images_before(before, frame, quarantine),
    }
    with store.staging() as scratch:
        docs = scratch / "docs"
        outcomes, complete = run_suite(suite, frame, parameters, manifest_id, docs)
        failed = [outcome.to_json() for outcome in outcomes if outcome.status == "failed"]
        result: Json = {
            "manifest": manifest_id,
            "source": meta["source"],
            "suite": inputs["suite"],
            "passed": not any(outcome.blocks_publication for outcome in outcomes),
            "failed": [check for check in failed if check["severity"] == "critical"],
            "errored": [outcome.to_json() for outcome in outcomes if outcome.status == "errored"],
            "warned": [check for check in failed if check["severity"] != "critical"],
            "checks": [outcome.to_json() for outcome in outcomes],
            "changes": settings.changes(),
        }
        finish_docs(docs, outcomes, meta, quarantine, inputs["suite"], result["changes"])

        def fill(folder: Path) -> None:
            docs.rename(folder / "docs")
            (folder / "result.json").write_text(json.dumps({**result, "great_expectations": complete}, indent=1))

        validation = store.create("validation", {**inputs, "checks": result["checks"]}, result, fill)
    if not result["errored"]:
        store.set_memo("validate", inputs, {"validation": validation})
    return validation


def count_only_in_quarantine(frame: "pd.DataFrame", quarantine: "pd.DataFrame") -> list[list[str | int]]:
    """Counts the images that are in quarantine and not in the manifest, by their file names.

    A name that occurs several times (in another folder, or as a damaged copy beside a good one) counts as one image;
    rows whose name could not be read do not count.

    Returns:
        ``[subtype, slide, magnification, images]`` for each slide and magnification that has any.
    """
    key = ["subtype", "slide", "magnification", "seq"]
    if not set(key) <= set(frame.columns):
        return []  # the schema check reports this
    in_manifest = set(frame[key].itertuples(index=False, name=None))
    named = quarantine.dropna(subset=key).astype({"magnification": "int64", "seq": "int64"})
    missing = set(named[key].itertuples(index=False, name=None)) - in_manifest
    counts = Counter(row[:3] for row in missing)
    return [[*stratum, images] for stratum, images in sorted(counts.items())]


def count_images_before(
    before: "pd.DataFrame | None", now: "pd.DataFrame", quarantine: "pd.DataFrame"
) -> dict[str, list[int]]:
    """Counts the images of each subtype in the previous manifest, and those that are lost, by their pixels.

    A lost image whose file or path was delivered and set aside is not gone: it is in quarantine.

    Returns:
        ``{subtype: [images, lost, lost and in quarantine]}``; empty without a previous manifest.
    """
    if before is None or "pixel_sha256" not in now.columns:
        return {}
    delivered = quarantine[quarantine["reason"] != "missing_file"]  # those are rows of a table, without a file
    lost = ~before["pixel_sha256"].isin(now["pixel_sha256"])
    aside = lost & (before["path"].isin(delivered["path"]) | before["sha256"].isin(delivered["sha256"]))
    return {
        str(subtype): [len(rows), int(lost[rows.index].sum()), int(aside[rows.index].sum())]
        for subtype, rows in before.groupby("subtype")
    }


def _read_result(validation: str, store: Store) -> Json:
    """Returns the result of the ``validate`` stage from a stored validation."""
    meta = store.meta(validation)
    summary = {key: meta[key] for key in ("manifest", "source", "passed", "failed", "errored", "warned", "changes")}
    docs = store.uri(f"{store.object_key(validation)}/docs/index.html")
    return {
        **summary,
        "quarantined": store.meta(meta["manifest"])["quarantined"],
        "validation": validation,
        "docs": docs,
    }
