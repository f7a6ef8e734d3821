"""Erasure: a patient's rows, pixels and features are removed from the store on request, and do not come back.

Some things stay. The patient's name stays on the list of erased patients, or the next delivery would bring the images
back, and in the split ledgers, or the patient's side would be free again. File names stay in the lists of delivered
files. MLflow keeps its data on the trainings whose dataset had the patient: these are listed, for people to decide on.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from ml.core.errors import ConfigError, DataError, RegistryError
from ml.core.messages import cut_text, hide_access, list_items, quote_value
from ml.core.mlflow_client import connect, find_outage
from ml.core.progress import say
from ml.core.settings import Settings
from ml.core.store import Json, Store
from ml.core.taxonomy import parse_name
from ml.core.yaml_files import is_name
from ml.data.identifiers import normalize_name, normalize_names
from ml.data.ledger import erase_from_ledgers
from ml.data.manifest import erased_patients_key, read_erased_patients
from ml.data.stored_tables import read_stored_table
from ml.images.file_facts import PictureFactsCache
from ml.images.pixel_cache import PixelCache
from ml.training.features import FeatureCache

if TYPE_CHECKING:
    import pandas as pd


@dataclass
class _PatientData:
    """What the store has of a patient."""

    files: set[str] = field(default_factory=set)
    """SHA-256 of the files that no other patient has."""
    pictures: set[str] = field(default_factory=set)
    """Pixel hashes of the pictures that no other patient has."""
    slides: set[str] = field(default_factory=set)
    datasets: list[str] = field(default_factory=list)
    """Ids of the datasets that have the patient."""
    sources: set[str] = field(default_factory=set)
    """Names of the sources that delivered the patient."""
    cohorts: set[str] = field(default_factory=set)
    """All cohorts in the store, for an error message."""


def erase_patient(patient: str, cohort: str, why: str, store: Store, settings: Settings) -> Json:
    """Erase a patient from the store.

    Calling it again finishes an interrupted erasure, and erases images that were delivered meanwhile.

    Args:
        patient: the patient's name in the manifests: a case number, or ``<cohort>:<id>`` for patients of a table.
            What an early release called ``<cohort>:1001.0`` is erased with ``<cohort>:1001``.
        cohort: the cohort that the patient belongs to.
        why: the request, recorded on the list of erased patients.
        store: the store to erase the patient from.
        settings: say where MLflow is.

    Returns:
        ``{patient, cohort, files, pictures, objects, sources, ledgers, trainings}``: the numbers of erased files and
        pictures, and of rewritten manifests, datasets and splits; the names of the patient's sources and ledgers; and
        for each MLflow run whose dataset had the patient ``{run_id, side, model, version, aliases}`` (the last three
        are null where no version was registered).

    Raises:
        DataError: the cohort has no such patient.
        BreakhisError: MLflow cannot be asked: RegistryError, or why it is out of reach. The patient is on the list of
            erased patients then, but nothing else was erased.
        StoreError: a ledger was edited.
    """
    if not is_name(cohort):
        raise DataError(f"{quote_value(cohort)} is no name of a cohort, such as breakhis")
    patient = normalize_name(patient)
    data = _find_patient(patient, cohort, store)
    erased = read_erased_patients(cohort, store)
    if not (data.files or data.pictures or patient in erased):
        cohorts = list_items(sorted(data.cohorts)) or "none"
        raise DataError(
            f"no image of a patient {quote_value(patient)} in cohort {quote_value(cohort)}; "
            f"cohorts with images: {cohorts}"
        )
    datasets, slides = _put_on_list(patient, cohort, why, data, store)
    trainings = _list_trainings(patient, datasets, slides, store, settings)
    ledgers = erase_from_ledgers(patient, slides, store, why)
    PictureFactsCache.forget(data.files, store)
    PixelCache.remove_images(data.pictures, store)
    FeatureCache.remove_images(data.pictures, store)
    for sha256 in sorted(data.files):
        store.remove(store.blob_key(sha256))
    # Last, since these tables name the patient's files and pictures: an interrupted erasure can start again.
    objects = _rewrite_objects(patient, cohort, store)
    say(f"{patient}: {len(data.files)} files and {len(data.pictures)} pictures erased from {store.root}")
    return {
        "patient": patient,
        "cohort": cohort,
        "files": len(data.files),
        "pictures": len(data.pictures),
        "objects": objects,
        "sources": sorted(data.sources),
        "ledgers": ledgers,
        "trainings": trainings,
    }


def _put_on_list(patient: str, cohort: str, why: str, data: _PatientData, store: Store) -> tuple[list[str], list[str]]:
    """Put the patient on the list of erased patients, so that new manifests leave the patient out.

    Returns:
        All datasets and slides of the patient, also those found by an earlier, interrupted erasure.
    """
    erased, tag = store.read(erased_patients_key(cohort))
    erased = erased or {}
    new_entry = {"why": why, "when": datetime.now(UTC).isoformat(timespec="seconds"), "datasets": [], "slides": []}
    known = next((name for name in erased if normalize_name(name) == patient), patient)
    entry = erased.get(known, new_entry)
    entry = {
        **entry,
        "datasets": sorted({*entry["datasets"], *data.datasets}),
        "slides": sorted({*entry["slides"], *data.slides}),
    }
    if entry != erased.get(known):
        store.compare_and_set(erased_patients_key(cohort), {**erased, known: entry}, tag)
    return entry["datasets"], entry["slides"]


def _find_patient(patient: str, cohort: str, store: Store) -> _PatientData:

    data = _PatientData()
    others_files: set[str] = set()
    others_pictures: set[str] = set()
    for manifest in store.keys("objects/manifest"):
        meta = store.meta(manifest)
        data.cohorts.add(str(meta.get("cohort")))
        for name in ("manifest.parquet", "quarantine.parquet"):
            rows = read_stored_table(manifest, name, store)
            is_patient = (normalize_names(rows["patient"]) == patient) & (meta.get("cohort") == cohort)
            data.files |= set(rows.loc[is_patient, "sha256"].dropna())
            others_files |= set(rows.loc[~is_patient, "sha256"].dropna())
            if meta.get("significant_bits"):  # the rows name what was made of the delivered files
                delivered = _find_delivered_files(str(meta["raw"]), store)
                data.files |= set(rows.loc[is_patient, "path"].map(delivered).dropna())
                others_files |= set(rows.loc[~is_patient, "path"].map(delivered).dropna())
            if "pixel_sha256" in rows:
                data.pictures |= set(rows.loc[is_patient, "pixel_sha256"])
                others_pictures |= set(rows.loc[~is_patient, "pixel_sha256"])
            if is_patient.any():
                data.slides |= set(rows.loc[is_patient, "slide"])
                data.sources.add(str(meta["source"]))
    for raw in store.keys("objects/raw"):  # raw files may have no manifest yet
        if store.meta(raw).get("cohort") == cohort:
            listing = read_stored_table(raw, "files.parquet", store)
            data.files |= set(listing.loc[listing["path"].map(_parse_case) == patient, "sha256"])
    for dataset in store.keys("objects/dataset"):
        rows = read_stored_table(dataset, "dataset.parquet", store)
        if _match_patient(rows, patient, cohort).any():
            data.datasets.append(dataset)
    data.files -= {*others_files, ""}
    data.pictures -= others_pictures
    return data


def _find_delivered_files(raw: str, store: Store) -> dict[str, str]:
    """Returns the SHA-256 of each file of a raw version by its path."""

    listing = read_stored_table(raw, "files.parquet", store)
    return dict(zip(listing["path"], listing["sha256"], strict=True))


def _parse_case(path: str) -> str | None:
    """Returns the case in a file's name, or None where the name has no case."""
    try:
        return parse_name(path.rpartition("/")[2]).case
    except ValueError:
        return None


def _match_patient(rows: "pd.DataFrame", patient: str, cohort: str) -> "pd.Series[bool]":
    """Returns which rows are this patient's. Older tables have no cohort; there the name alone decides."""
    is_patient: pd.Series[bool] = normalize_names(rows["patient"]) == patient
    return is_patient & (rows["cohort"] == cohort) if "cohort" in rows else is_patient


def _rewrite_objects(patient: str, cohort: str, store: Store) -> int:
    """Remove the patient's rows from manifests, datasets and splits; quarantined rows of manifests lose only the hash.

    Returns:
        The number of rewritten manifests, datasets and splits.
    """

    def is_patient(rows: "pd.DataFrame") -> "pd.Series[bool]":
        return _match_patient(rows, patient, cohort)

    count = 0
    for manifest in store.keys("objects/manifest"):
        if store.meta(manifest).get("cohort", cohort) == cohort:
            count += _remove_rows(manifest, "manifest.parquet", is_patient, store)
            _clear_quarantine_hashes(manifest, patient, store)
            _remove_ties(manifest, patient, store)
    for dataset in store.keys("objects/dataset"):
        count += _remove_rows(dataset, "dataset.parquet", is_patient, store)
        _remove_ties(dataset, patient, store)
    for split in store.keys("objects/split"):
        if store.meta(split).get("quarantined"):
            count += _remove_rows(
                split, "quarantine.parquet", lambda rows: normalize_names(rows["patient"]) == patient, store
            )
    return count


def _remove_rows(oid: str, name: str, select: "Callable[[pd.DataFrame], pd.Series[bool]]", store: Store) -> int:
    """Remove rows from a table of an object; returns the number of rewritten tables, 0 or 1."""

    rows = read_stored_table(oid, name, store)
    is_removed = select(rows)
    if not is_removed.any():
        return 0
    _replace_table(oid, name, rows[~is_removed], store)
    return 1


def _clear_quarantine_hashes(manifest: str, patient: str, store: Store) -> None:
    """Remove the file hashes from the patient's quarantined rows, which are the way to the files."""

    rows = read_stored_table(manifest, "quarantine.parquet", store)
    has_hash = (normalize_names(rows["patient"]) == patient) & (rows["sha256"] != "")
    if has_hash.any():
        rows.loc[has_hash, "sha256"] = ""
        _replace_table(manifest, "quarantine.parquet", rows, store)


def _remove_ties(oid: str, patient: str, store: Store) -> None:
    """Remove the patient's rows from the table of pictures that were published under two cases."""
    if store.meta(oid).get("ties"):
        _remove_rows(
            oid,
            "ties.parquet",
            lambda rows: (rows[["patient", "kept_patient"]].apply(normalize_names) == patient).any(axis=1),
            store,
        )


def _replace_table(oid: str, name: str, rows: "pd.DataFrame", store: Store) -> None:
    with store.staging() as scratch:
        rows.to_parquet(scratch / name, index=False)
        store.replace_file(oid, name, scratch / name)


def _list_trainings(
    patient: str, datasets: list[str], slides: list[str], store: Store, settings: Settings
) -> list[Json]:
    """Returns the MLflow runs whose dataset had the patient, with the side of the split that the patient was on.

    Raises:
        BreakhisError: MLflow cannot be asked: RegistryError, or why it is out of reach.
    """
    if not datasets:
        return []
    from mlflow.entities import ViewType
    from mlflow.exceptions import MlflowException

    try:
        return list(_find_runs(datasets, [patient], slides, ViewType.ALL, store, settings))
    except (ConfigError, MlflowException) as error:
        unreadable = RegistryError(f"MLflow: {cut_text(hide_access(error))}")
        cause = error if isinstance(error, ConfigError) else find_outage(error) or unreadable
        raise type(cause)(
            f"{cause}; so MLflow cannot tell which trainings took part. {quote_value(patient)} is left out of "
            "manifests from now on; call this again for the rest"
        ) from None


def _find_runs(
    datasets: list[str], cases: list[str], slides: list[str], view: int, store: Store, settings: Settings
) -> Iterator[Json]:
    client = connect(settings)
    experiments = [experiment.experiment_id for experiment in client.search_experiments(view_type=view)]
    for dataset in datasets:
        query = f"tags.`breakhis.dataset` = '{dataset}'"
        for run in client.search_runs(experiments, query, run_view_type=view, max_results=1000):
            split = store.meta(run.data.tags["breakhis.split"])
            groups = set(map(normalize_name, slides if split.get("group") == "slide" else cases))
            sides = sorted({side for group, side in split["sides"].items() if normalize_name(group) in groups})
            training: Json = {"run_id": run.info.run_id, "side": ", ".join(sides) or "none"}
            versions = client.search_model_versions(f"run_id = '{run.info.run_id}'")
            for version in versions:
                with_aliases = client.get_model_version(version.name, version.version)
                number, aliases = int(version.version), sorted(with_aliases.aliases)
                yield {**training, "model": version.name, "version": number, "aliases": aliases}
            if not versions:
                yield {**training, "model": None, "version": None, "aliases": None}
