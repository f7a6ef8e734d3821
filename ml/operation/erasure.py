"""Erasure: a patient's rows, pixels and features leave the store on request, and never come back.

What stays is named here, since somebody will ask: the patient's name on a list of the erased (else the next delivery
would bring the images back) and in the split ledgers (else their side would be free again), file names in the lists of
what was delivered, and what MLflow keeps of trainings that took part: those are listed, to be decided on by people.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from ml.core.errors import DataError, RegistryError
from ml.core.mlflow_client import connect
from ml.core.progress import say
from ml.core.settings import Settings
from ml.core.store import Json, Store
from ml.core.taxonomy import parse_name
from ml.data.ledger import erase_from_ledgers
from ml.data.manifest import erased_patients_key, read_erased_patients
from ml.images.file_facts import PictureFactsCache
from ml.images.pixel_cache import PixelCache
from ml.training.features import FeatureCache

if TYPE_CHECKING:
    import pandas as pd


@dataclass
class _Found:
    """What the store has of a patient."""

    files: set[str] = field(default_factory=set)
    """SHA-256 of the files that no other patient has."""
    pictures: set[str] = field(default_factory=set)
    """Pixel hashes, likewise."""
    slides: set[str] = field(default_factory=set)
    datasets: list[str] = field(default_factory=list)
    sources: set[str] = field(default_factory=set)
    cohorts: set[str] = field(default_factory=set)
    """Every cohort that was met, for a message."""


def erase_patient(patient: str, cohort: str, why: str, store: Store, settings: Settings) -> Json:
    """Take a patient out of the store. Doing it again finishes what was interrupted, and erases what came meanwhile.

    Args:
        patient: as in the manifests: a case number, or ``<cohort>:<id>`` of a table's patients.
        cohort: whose patient it is.
        why: the request, for the list of the erased.
        store: where everything lies.
        settings: say where MLflow is.

    Returns:
        ``{patient, cohort, files, pictures, objects, sources, ledgers, trainings}``: how many files and pictures are
        gone, how many manifests, datasets and splits were rewritten, and of each MLflow run that the patient took part
        in ``{run_id, side, model, version, aliases}`` (the last three null where nothing was registered).

    Raises:
        DataError: nobody of that name is in the cohort.
        RegistryError: MLflow cannot be asked; little was erased then.
        StoreError: a ledger was edited.
    """
    found = _find(patient, cohort, store)
    known = read_erased_patients(cohort, store)
    if not (found.files or found.pictures or patient in known):
        there = ", ".join(sorted(found.cohorts)) or "none"
        raise DataError(f"no image of a patient {patient!r} in cohort {cohort!r}; cohorts with images: {there}")
    datasets, slides = _put_on_list(patient, cohort, why, found, store)
    trainings = _trainings(patient, datasets, slides, store, settings)
    ledgers = erase_from_ledgers(patient, slides, store, why)
    PictureFactsCache.forget(found.files, store)
    PixelCache.remove_images(found.pictures, store)
    FeatureCache.remove_images(found.pictures, store)
    for sha256 in sorted(found.files):
        store.remove(store.blob_key(sha256))
    # Last, since these tables tell what the patient's files and pictures are: whoever is interrupted can begin again.
    objects = _rewrite_objects(patient, cohort, store)
    say(f"{patient}: {len(found.files)} files and {len(found.pictures)} pictures erased from {store.root}")
    return {
        "patient": patient,
        "cohort": cohort,
        "files": len(found.files),
        "pictures": len(found.pictures),
        "objects": objects,
        "sources": sorted(found.sources),
        "ledgers": ledgers,
        "trainings": trainings,
    }


def _put_on_list(patient: str, cohort: str, why: str, found: _Found, store: Store) -> tuple[list[str], list[str]]:
    """Have manifests leave the patient out from here on; returns the patient's datasets and slides of any time."""
    known, tag = store.read(erased_patients_key(cohort))
    known = known or {}
    fresh = {"why": why, "when": datetime.now(UTC).isoformat(timespec="seconds"), "datasets": [], "slides": []}
    entry = known.get(patient, fresh)
    entry = {
        **entry,
        "datasets": sorted({*entry["datasets"], *found.datasets}),
        "slides": sorted({*entry["slides"], *found.slides}),
    }
    if entry != known.get(patient):
        store.compare_and_set(erased_patients_key(cohort), {**known, patient: entry}, tag)
    return entry["datasets"], entry["slides"]


def _find(patient: str, cohort: str, store: Store) -> _Found:
    import pandas as pd

    found = _Found()
    others_files: set[str] = set()
    others_pictures: set[str] = set()
    for manifest in store.keys("objects/manifest"):
        meta = store.meta(manifest)
        found.cohorts.add(str(meta.get("cohort")))
        for name in ("manifest.parquet", "quarantine.parquet"):
            rows = pd.read_parquet(store.file(manifest, name))
            here = (rows["patient"] == patient) & (meta.get("cohort") == cohort)
            files, rest = set(rows.loc[here, "sha256"].dropna()), set(rows.loc[~here, "sha256"].dropna())
            found.files |= files
            others_files |= rest
            if "pixel_sha256" in rows:
                found.pictures |= set(rows.loc[here, "pixel_sha256"])
                others_pictures |= set(rows.loc[~here, "pixel_sha256"])
            if here.any():
                found.slides |= set(rows.loc[here, "slide"])
                found.sources.add(str(meta["source"]))
    for raw in store.keys("objects/raw"):  # of which no manifest may have been made
        if store.meta(raw).get("cohort") == cohort:
            listing = pd.read_parquet(store.file(raw, "files.parquet"))
            found.files |= set(listing.loc[listing["path"].map(_case) == patient, "sha256"])
    for dataset in store.keys("objects/dataset"):
        rows = pd.read_parquet(store.file(dataset, "dataset.parquet"))
        if _of(rows, patient, cohort).any():
            found.datasets.append(dataset)
    found.files -= {*others_files, ""}
    found.pictures -= others_pictures
    return found


def _case(path: str) -> str | None:
    try:
        return parse_name(path.rpartition("/")[2]).case
    except ValueError:
        return None


def _of(rows: "pd.DataFrame", patient: str, cohort: str) -> "pd.Series[bool]":
    """Which rows are this patient's; those from before cohorts were told are by name alone."""
    mine: pd.Series[bool] = rows["patient"] == patient
    return mine & (rows["cohort"] == cohort) if "cohort" in rows else mine


def _rewrite_objects(patient: str, cohort: str, store: Store) -> int:
    """Take the patient's rows out of manifests, datasets and splits; of what is in quarantine, the way to the file."""

    def of_the_patient(rows: "pd.DataFrame") -> "pd.Series[bool]":
        return _of(rows, patient, cohort)

    count = 0
    for manifest in store.keys("objects/manifest"):
        if store.meta(manifest).get("cohort", cohort) == cohort:
            count += _drop(manifest, "manifest.parquet", of_the_patient, store)
            _blank(manifest, patient, store)
            _untie(manifest, patient, store)
    for dataset in store.keys("objects/dataset"):
        count += _drop(dataset, "dataset.parquet", of_the_patient, store)
        _untie(dataset, patient, store)
    for split in store.keys("objects/split"):
        if store.meta(split).get("quarantined"):
            count += _drop(split, "quarantine.parquet", lambda rows: rows["patient"] == patient, store)
    return count


def _drop(oid: str, name: str, which: "Callable[[pd.DataFrame], pd.Series[bool]]", store: Store) -> int:
    """Take rows out of a table; returns whether there were any, as 0 or 1."""
    import pandas as pd

    rows = pd.read_parquet(store.file(oid, name))
    gone = which(rows)
    if not gone.any():
        return 0
    _replace(oid, name, rows[~gone], store)
    return 1


def _blank(manifest: str, patient: str, store: Store) -> None:
    import pandas as pd

    rows = pd.read_parquet(store.file(manifest, "quarantine.parquet"))
    here = (rows["patient"] == patient) & (rows["sha256"] != "")
    if here.any():
        rows.loc[here, "sha256"] = ""
        _replace(manifest, "quarantine.parquet", rows, store)


def _untie(oid: str, patient: str, store: Store) -> None:
    if store.meta(oid).get("ties"):
        _drop(oid, "ties.parquet", lambda rows: (rows[["patient", "kept_patient"]] == patient).any(axis=1), store)


def _replace(oid: str, name: str, rows: "pd.DataFrame", store: Store) -> None:
    with store.staging() as scratch:
        rows.to_parquet(scratch / name, index=False)
        store.put_file(f"{store.object_key(oid)}/{name}", scratch / name)


def _trainings(patient: str, datasets: list[str], slides: list[str], store: Store, settings: Settings) -> list[Json]:
    """The MLflow runs whose dataset had the patient, with the side that the patient was on."""
    if not datasets:
        return []
    from mlflow.entities import ViewType
    from mlflow.exceptions import MlflowException

    try:
        return list(_runs_of(datasets, [patient], slides, ViewType.ALL, store, settings))
    except MlflowException as error:
        raise RegistryError(
            f"MLflow ({settings.mlflow_ui or settings.mlflow_uri}) cannot tell which trainings took part: {error}; "
            f"{patient} is left out of manifests from now on, call this again for the rest"
        ) from None


def _runs_of(
    datasets: list[str], cases: list[str], slides: list[str], view: int, store: Store, settings: Settings
) -> Iterator[Json]:
    client = connect(settings)
    experiments = [one.experiment_id for one in client.search_experiments(view_type=view)]
    for dataset in datasets:
        query = f"tags.`breakhis.dataset` = '{dataset}'"
        for run in client.search_runs(experiments, query, run_view_type=view, max_results=1000):
            split = store.meta(run.data.tags["breakhis.split"])
            groups = slides if split.get("group") == "slide" else cases
            sides = sorted({split["sides"][group] for group in groups if group in split["sides"]})
            one: Json = {"run_id": run.info.run_id, "side": ", ".join(sides) or "none"}
            versions = client.search_model_versions(f"run_id = '{run.info.run_id}'")
            for version in versions:
                full = client.get_model_version(version.name, version.version)
                number, aliases = int(version.version), sorted(full.aliases)
                yield {**one, "model": version.name, "version": number, "aliases": aliases}
            if not versions:
                yield {**one, "model": None, "version": None, "aliases": None}
