"""Training sets: which sources are trained on together, under which split ledger, preset and promotion policy.

``dags/training_sets/NAME.yaml`` declares one; :func:`assemble` makes a dataset of its sources' published versions.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, PrivateAttr

from ml.errors import ConfigError, DataError
from ml.presets import PresetName
from ml.settings import Settings
from ml.sources import load_source
from ml.store import Json, Store
from ml.taxonomy import TASKS, Task
from ml.yamlfile import NAME_PATTERN, Declared, Schedule, find, read_yaml

if TYPE_CHECKING:
    import pandas as pd


class TrainingSet(Declared):
    """One training-set YAML."""

    name: str = Field(pattern=NAME_PATTERN, description="Becomes retrain_<name>, <name>-binary and <name>-subtype.")
    description: str = Field("", description="For the people who watch the DAG.")
    sources: tuple[str, ...] = Field(min_length=1, description="Names of sources, or paths of YAML files beside this.")
    ledger: str = Field(pattern=NAME_PATTERN, description="The split ledger: which side each case is on, for ever.")
    policy: str = Field(description="Name of the promotion policy, or the path of a YAML file beside this one.")
    preset: PresetName = Field(description="The recipe, unless the form of the DAG says otherwise.")
    schedule: Schedule | None = Field("@monthly", description="When retrain runs by itself; null: by hand.")
    seed: int = Field(0, ge=0, description="Seed of the split's search and of the training.")

    _file: Path = PrivateAttr(default=Path())

    @property
    def file(self) -> Path:
        """The YAML this was read from."""
        return self._file

    @property
    def models(self) -> dict[Task, str]:
        """The registered model of each task: ``NAME-binary`` and ``NAME-subtype``."""
        return {task: f"{self.name}-{task}" for task in TASKS}  # type: ignore[misc]


def load_training_set(reference: str, conf: Path) -> TrainingSet:
    """Read a training set by name (looked up in ``conf``/training_sets) or by the path of its YAML.

    Raises:
        ConfigError: missing or invalid; names the file and the key.
    """
    file = find(conf / "training_sets", reference)
    training_set = read_yaml(file, TrainingSet)
    if training_set.name != file.stem:
        raise ConfigError(f"{file}: 'name' is {training_set.name!r}; call it {file.stem!r} or rename the file")
    training_set._file = file
    return training_set


def training_set_files(settings: Settings) -> list[Path]:
    """Every training-set YAML: those in the conf folder and the further ones that settings name."""
    return [*sorted((settings.conf / "training_sets").glob("*.yaml")), *settings.training_sets]


def training_set_of(model: str, settings: Settings) -> tuple[TrainingSet, Task]:
    """The training set and the task that a registered model's name stands for.

    Raises:
        DataError: no training set declares such a model.
    """
    known = []
    for file in training_set_files(settings):
        try:
            training_set = load_training_set(str(file), settings.conf)
        except ConfigError as error:  # somebody else's broken set is no reason not to find this one
            known.append(f"({error})")
            continue
        for task, name in training_set.models.items():
            if name == model:
                return training_set, task
            known.append(name)
    raise DataError(f"no training set declares the model {model!r}; known models: {', '.join(known)}")


def assemble(training_set: TrainingSet, store: Store, settings: Settings) -> Json:
    """Make a dataset of the published versions of the set's sources (the ``assemble`` stage).

    The same pixels published by two sources are one image (the first source's); sources that contradict each other
    about an image are an error, since nobody here can say which of them is right.

    Returns:
        ``{dataset, set, images, cases, sources, preset}``.

    Raises:
        DataError: a source has no published version, or two sources contradict each other.
    """
    import pandas as pd

    versions: dict[str, str] = {}
    frames: list[pd.DataFrame] = []
    for reference in training_set.sources:
        source = load_source(reference, settings.conf, relative_to=training_set.file.parent)
        ref, _ = store.read(f"refs/sources/{source.name}.json")
        if ref is None:
            raise DataError(
                f"{training_set.file}: source {source.name!r} has no published version yet; "
                f"run the DAG ingest_{source.name}, or: breakhis ingest {reference}"
            )
        versions[source.name] = ref["version"]
        frames.append(pd.read_parquet(store.file(ref["manifest"], "manifest.parquet")))
    rows = pd.concat(frames, ignore_index=True)
    labels = rows.groupby("pixel_sha256")["subtype"].nunique()
    if (labels > 1).any():
        bad = rows[rows["pixel_sha256"].isin(labels[labels > 1].index)]
        raise DataError(
            f"{training_set.file}: sources contradict each other about {int((labels > 1).sum())} image(s), e.g. "
            + "; ".join(f"{r.source}: {r.path} is {r.subtype}" for r in bad.head(2).itertuples())
        )
    rows = rows.drop_duplicates("pixel_sha256").sort_values("pixel_sha256", ignore_index=True)
    payload = {
        "set": training_set.name,
        "sources": versions,
        "ledger": training_set.ledger,
        "seed": training_set.seed,
        "images": rows[["pixel_sha256", "sha256", "patient", "subtype"]].to_numpy().tolist(),
    }
    result: Json = {
        "set": training_set.name,
        "images": len(rows),
        "cases": int(rows["patient"].nunique()),
        "sources": versions,
        "ledger": training_set.ledger,
        "seed": training_set.seed,
    }
    dataset = store.create(
        "dataset", payload, result, lambda folder: rows.to_parquet(folder / "dataset.parquet", index=False)
    )
    return {"dataset": dataset, **result, "preset": training_set.preset}


def read_dataset(dataset: str, store: Store) -> "pd.DataFrame":
    """The rows of a dataset, one an image (the manifest's columns), sorted by pixel hash.

    Raises:
        StoreError: no such dataset.
    """
    import pandas as pd

    store.meta(dataset)
    return pd.read_parquet(store.file(dataset, "dataset.parquet"))
