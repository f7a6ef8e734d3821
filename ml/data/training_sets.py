"""Training sets: the sources to train on together, with their split ledger, preset and promotion policy.

``dags/training_sets/NAME.yaml`` declares one; :func:`assemble_dataset` makes a dataset of its sources' published
versions.
"""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, PrivateAttr

from ml.core.errors import ConfigError, DataError
from ml.core.messages import MAX_FAULT, list_items, quote_value
from ml.core.names import suggest_name
from ml.core.settings import Settings
from ml.core.store import Json, Store
from ml.core.taxonomy import TASKS, Task, parse_name
from ml.core.yaml_files import Name, Schedule, YamlModel, find_yaml, list_yaml, read_yaml
from ml.data.identifiers import normalize_names
from ml.data.sources import load_source
from ml.data.sources.check_settings import NearDuplicates
from ml.data.stored_tables import read_stored_table

if TYPE_CHECKING:
    import pandas as pd

PresetName = Literal["paper", "default", "demo"]
SplitMethod = Literal["allocator", "sgkf", "stratified"]
SplitLevel = Literal["case", "slide"]


class SplitSpec(YamlModel):
    """How a new ledger is split. A ledger keeps the method and the group of its first entry."""

    method: SplitMethod = Field(
        "allocator",
        description="allocator: a search that keeps every class in train and in test wherever that can be; sgkf: two "
        "stages of scikit-learn's StratifiedGroupKFold, the baseline's protocol of the subtype model, which may leave "
        "classes out; stratified: by chance within benign and malignant, the baseline's protocol of the binary model.",
    )
    group: SplitLevel = Field(
        "case",
        description="What lies on one side as a whole: the case (patient), or the slide, to compare with published "
        "work; slides of one patient may then lie on two sides, and the model cannot be promoted.",
    )


class TrainingSet(YamlModel):
    """A training set, as its YAML file declares it."""

    name: Name = Field(description="Becomes retrain_<name>, <name>-binary and <name>-subtype.")
    description: str = Field("", description="For the people who watch the DAG.")
    sources: tuple[str, ...] = Field(min_length=1, description="Names of sources, or paths of YAML files beside this.")
    ledger: Name = Field(description="The split ledger: which side each case is on, for ever.")
    split: SplitSpec = Field(SplitSpec(), description="How the ledger is split; fixed with its first entry.")
    policy: str = Field(description="Name of the promotion policy, or the path of a YAML file beside this one.")
    preset: PresetName = Field(description="The recipe, unless the form of the DAG says otherwise.")
    schedule: Schedule | None = Field("@monthly", description="When retrain runs by itself; null: by hand.")
    seed: int = Field(0, ge=0, description="Seed of the split's search and of the training.")

    _file: Path = PrivateAttr(default=Path())

    @property
    def file(self) -> Path:
        """The YAML file that this was read from."""
        return self._file

    @property
    def models(self) -> dict[Task, str]:
        """The registered model of each task: ``NAME-binary`` and ``NAME-subtype``."""
        return name_models(self.name)


def name_models(training_set: str) -> dict[Task, str]:
    """Returns the name of each task's registered model: ``NAME-binary`` and ``NAME-subtype``."""
    return {task: f"{training_set}-{task}" for task in TASKS}


def load_training_set(reference: str, conf: Path) -> TrainingSet:
    """Reads a training set by name (looked up in ``conf``/training_sets) or by the path of its YAML.

    Raises:
        ConfigError: missing or invalid; names the file and the key.
    """
    file = find_yaml(conf / "training_sets", reference)
    training_set = read_yaml(file, TrainingSet)
    if training_set.name != file.stem:
        raise ConfigError(
            f"{file}: 'name' is {quote_value(training_set.name)}; call it {file.stem!r} or rename the file"
        )
    training_set._file = file
    return training_set


def training_set_files(settings: Settings) -> list[Path]:
    """Returns all training-set YAML files: those in the conf folder, and those that the settings name."""
    return [*list_yaml(settings.conf / "training_sets"), *settings.training_sets]


def find_training_set(model: str, settings: Settings) -> tuple[TrainingSet, Task]:
    """Finds the training set and the task of a registered model by its name.

    Raises:
        ConfigError: the file that is called like the model's set cannot be used. Another file of that name does not
            stand in for it, since it may bring another policy.
        DataError: no training set declares such a model.
    """
    known: list[str] = []
    broken: list[str] = []
    for file in training_set_files(settings):
        try:
            training_set = load_training_set(str(file), settings.conf)
        except ConfigError as error:
            if model in name_models(file.stem).values():
                raise
            broken.append(str(error))  # another set that is broken does not hide this one
            continue
        for task, name in training_set.models.items():
            if name == model:
                return training_set, task
            known.append(name)
    meant = suggest_name(model, known)
    unread = f"; not read: {list_items(broken, '; ', limit=MAX_FAULT)}" if broken else ""
    raise DataError(
        f"no training set declares the model {quote_value(model)}; known models: {list_items(known)}{meant}{unread}"
    )


def registered_model_names(settings: Settings) -> list[str]:
    """Returns the names of all training sets' registered models. YAML files that cannot be used are left out."""
    names: list[str] = []
    for file in training_set_files(settings):
        with suppress(ConfigError):
            names += load_training_set(str(file), settings.conf).models.values()
    return names


def assemble_dataset(training_set: TrainingSet, store: Store, settings: Settings) -> Json:
    """Makes a dataset from the published versions of the set's sources (the ``assemble`` stage).

    The same pixels in two sources are one image: the first source's. Within a cohort, the same BreakHis file name is
    also one image: the larger picture, or of equals the first source's. The copies that are left out tie the patients
    and slides under which a picture was published, as do those that each manifest left out. Sources that contradict
    each other about an image or a slide are an error, since nobody here can say which of them is right.

    Pictures of two sources that look the same under two patients are a warning, or an error if one of the sources has
    made that of its validation (``near_duplicates``), which compares the pictures within a source.

    Returns:
        ``{dataset, set, images, cases, duplicates, ties, sources, ledger, seed, split, near_copies, preset}``;
        ``near_copies`` counts the pairs of pictures that look the same.

    Raises:
        DataError: a source has no published version, two sources contradict each other, or pictures look the same.
    """
    import pandas as pd

    # These import Pillow, which DAG files need not wait for.
    from ml.data.manifest import TIE_COLUMNS
    from ml.data.near_copies import report_near_copies

    versions, frames, ties_before, near_duplicates = _read_sources(training_set, store, settings)
    published = pd.concat(frames, ignore_index=True)
    _refuse_contradictions(published, training_set.file)
    rows, ties = _remove_copies(published)
    ties = pd.concat([ties, *ties_before]).sort_values(list(TIE_COLUMNS), ignore_index=True)
    near_copies = report_near_copies(rows, near_duplicates, training_set.file)
    payload = {
        "set": training_set.name,
        "sources": versions,
        "ledger": training_set.ledger,
        "seed": training_set.seed,
        "split": training_set.split.model_dump(),
        "images": rows[["pixel_sha256", "sha256", "patient", "subtype"]].to_numpy().tolist(),
        "ties": ties.to_numpy().tolist(),
    }
    result: Json = {
        "set": training_set.name,
        "images": len(rows),
        "cases": int(rows["patient"].nunique()),
        "duplicates": len(published) - len(rows),
        "ties": len(ties),
        "sources": versions,
        "ledger": training_set.ledger,
        "seed": training_set.seed,
        "split": training_set.split.model_dump(),
    }

    def fill(folder: Path) -> None:
        rows.to_parquet(folder / "dataset.parquet", index=False)
        ties.to_parquet(folder / "ties.parquet", index=False)

    dataset = store.create("dataset", payload, result, fill)
    return {"dataset": dataset, **result, "near_copies": near_copies, "preset": training_set.preset}


def _read_sources(
    training_set: TrainingSet, store: Store, settings: Settings
) -> tuple[dict[str, str], list["pd.DataFrame"], list["pd.DataFrame"], dict[str, NearDuplicates]]:
    """Reads the published version of each source.

    Returns:
        the versions' ids by source; their manifests; their ties; by source, what it demands of near duplicates.
    """
    import pandas as pd

    from ml.data.manifest import read_erased_patients, read_ties

    versions: dict[str, str] = {}
    frames: list[pd.DataFrame] = []
    ties: list[pd.DataFrame] = []
    near_duplicates: dict[str, NearDuplicates] = {}
    for reference in training_set.sources:
        source = load_source(reference, settings.conf, relative_to=training_set.file.parent)
        ref, _ = store.read(f"refs/sources/{source.name}.json")
        if ref is None:
            raise DataError(
                f"{training_set.file}: source {quote_value(source.name)} has no published version yet; "
                f"run the DAG ingest_{source.name}, or: breakhis ingest {reference}"
            )
        versions[source.name] = ref["version"]
        near_duplicates[source.name] = source.validation.near_duplicates
        frame = read_stored_table(ref["manifest"], "manifest.parquet", store)
        if "cohort" not in frame:
            raise DataError(
                f"{training_set.file}: the version of source {source.name!r} has no cohorts, as in early releases; "
                f"run the DAG ingest_{source.name}, or: breakhis ingest {reference}"
            )
        # A version that an early release published may have names such as 1001.0.
        frame = frame.assign(**{name: normalize_names(frame[name]) for name in ("patient", "slide")})
        for cohort, patients in frame.groupby("cohort")["patient"]:
            if returned := sorted(read_erased_patients(str(cohort), store) & set(patients)):
                raise DataError(
                    f"{training_set.file}: the version of source {source.name!r} has images of {returned[0]}, who was "
                    f"erased; erase these too, then ingest the source: breakhis erase {returned[0]} --cohort {cohort} "
                    f"--why …, breakhis ingest {reference}"
                )
        frames.append(frame)
        left_out = read_ties(ref["manifest"], store)
        names = ("patient", "slide", "kept_patient", "kept_slide")
        ties.append(left_out.assign(**{name: normalize_names(left_out[name]) for name in names}))
    return versions, frames, ties, near_duplicates


def _refuse_contradictions(rows: "pd.DataFrame", file: Path) -> None:
    """Raises DataError if two sources contradict each other about an image, or about a slide of their cohort."""
    rows = rows.assign(name=_read_image_names(rows))
    for keys, column, what in (
        (["pixel_sha256"], "subtype", "image(s)"),
        (["cohort", "name"], "subtype", "image(s)"),
        (["cohort", "slide"], "subtype", "slide(s)"),
        (["cohort", "slide"], "patient", "slide(s)"),
    ):
        groups = rows.groupby(keys)
        # Contradictions within a source are the manifest's to find.
        conflicts = rows[(groups[column].transform("nunique") > 1) & (groups["source"].transform("nunique") > 1)]
        if not conflicts.empty:
            _, example = next(iter(conflicts.groupby(keys)))
            raise DataError(
                f"{file}: sources contradict each other about {conflicts.groupby(keys).ngroups} {what}, e.g. "
                + "; ".join(
                    f"{row['source']}: {row['path']} is {'' if column == 'subtype' else 'of patient '}{row[column]}"
                    for row in example.drop_duplicates(column).to_dict("records")[:2]
                )
                + "; mend one of them, or leave it out of the training set"
            )


def _remove_copies(published: "pd.DataFrame") -> tuple["pd.DataFrame", "pd.DataFrame"]:
    """Keeps one row per image, sorted by pixel hash; returns also the ties of the others (:data:`TIE_COLUMNS`)."""
    import pandas as pd

    from ml.data.manifest import TIE_COLUMNS

    rows = published.assign(order=range(len(published)), area=published["width"] * published["height"])
    larger_first = rows.sort_values(["area", "order"], ascending=[False, True])
    # Within a source, a file name may occur twice if a table describes the images.
    copies_by_name = _find_copies(
        larger_first.assign(name=_read_image_names(rows)).dropna(subset="name"), ["cohort", "name"]
    )
    copies_by_name = copies_by_name[copies_by_name["source"] != copies_by_name["kept_source"]]
    left_out = pd.concat([copies_by_name, _find_copies(rows.drop(copies_by_name.index), ["pixel_sha256"])])
    differs = pd.concat(
        [left_out[key] != left_out[f"kept_{key}"] for key in ("pixel_sha256", "patient", "slide")], axis=1
    )
    ties = left_out.loc[differs.any(axis=1), list(TIE_COLUMNS)].sort_values(list(TIE_COLUMNS), ignore_index=True)
    return published.drop(left_out.index).sort_values("pixel_sha256", ignore_index=True), ties


def _find_copies(rows: "pd.DataFrame", keys: list[str]) -> "pd.DataFrame":
    """Returns all rows but the first of each group, with the first's columns as ``kept_order``, ``kept_source``, …"""
    columns = ["order", "source", "pixel_sha256", "patient", "slide"]
    first = rows.groupby(keys, sort=False)[columns].transform("first").add_prefix("kept_")
    return rows.join(first)[rows["order"] != first["kept_order"]]


def _read_image_names(rows: "pd.DataFrame") -> "pd.Series[str]":
    """Returns the BreakHis file name of each row; null for other files."""
    return rows["path"].map(_read_image_name)


def _read_image_name(path: str) -> str | None:
    """Returns the BreakHis file name at the end of a path, which states subtype, slide, magnification and number."""
    name = path.rpartition("/")[2]
    try:
        parse_name(name)
    except ValueError:
        return None
    return name


def read_dataset(dataset: str, store: Store) -> "pd.DataFrame":
    """Reads the rows of a dataset, one per image, with the manifest's columns, sorted by pixel hash.

    Raises:
        StoreError: no such dataset.
    """

    store.meta(dataset)
    return read_stored_table(dataset, "dataset.parquet", store)


def compare_datasets(before: str, after: str, store: Store) -> dict[str, Json]:
    """Counts what changed from one dataset to another, by source.

    Images with the same pixels are the same. ``relabelled`` counts those in both whose subtype or case changed.

    Returns:
        by source, ``{added, removed, relabelled}``, each with the number of ``{images, cases}``; zeros where nothing
        changed.

    Raises:
        StoreError: no such dataset.
    """
    old, new = (read_dataset(dataset, store).set_index("pixel_sha256", drop=False) for dataset in (before, after))
    kept = new.index.intersection(old.index)
    labels = ["subtype", "patient"]
    before_and_after = [rows.loc[kept, labels].apply(normalize_names) for rows in (old, new)]
    relabelled = (before_and_after[0] != before_and_after[1]).any(axis=1)
    changes = {
        "added": new.drop(kept),
        "removed": old.drop(kept),
        "relabelled": new.loc[kept[relabelled]],
    }
    return {
        source: {what: _count_images_and_cases(rows[rows["source"] == source]) for what, rows in changes.items()}
        for source in sorted({*old["source"], *new["source"]})
    }


def _count_images_and_cases(rows: "pd.DataFrame") -> Json:
    return {"images": len(rows), "cases": int(rows["patient"].nunique())}
