"""Evidence: what a model version is made of and what it scored, collected and verified.

The evidence of a version is one JSON object that says what it was made of and what it scored, down to the hashes of the
model's files. Its id is its hash: a decision about the evidence is a decision about exactly this model.
"""

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ml.core.errors import Refused, RegistryError
from ml.core.mlflow_client import connect, fetch_artifacts
from ml.core.settings import Settings
from ml.core.store import Json, Store, canonical, object_id
from ml.core.taxonomy import SIDES, Task, class_names
from ml.evaluation.metric_names import METRIC_NAMES
from ml.evaluation.predictions import check_predictions
from ml.promotion.alias_history import find_champion_evidence_id
from ml.registry.registered_model import RegisteredModel, find_training_run

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient


def check_training_set(run_id: str, tags: dict[str, str], store: Store) -> None:
    """Make sure that a run is of the training set that it says: who may log may set tags; a dataset is what it is."""
    of_set = store.meta(tags["breakhis.dataset"])["set"]
    if of_set != tags["breakhis.set"]:
        raise Refused(
            f"run {run_id} says that it is of the training set {tags['breakhis.set']}, but it was trained on "
            f"{tags['breakhis.dataset']}, of the set {of_set}"
        )


def collect_evidence(version: "ModelVersion", store: Store, settings: Settings, *, anew: bool = False) -> Json:
    """What a model version is and what it scored, read anew from MLflow and the store.

    Args:
        version: the version.
        store: has its dataset and split.
        settings: say where MLflow is.
        anew: whether to compute its figures again from its predictions, too.

    Raises:
        RegistryError: its run, evaluation or model files are missing.
        Refused: what its run says of itself cannot be, or is not what its predictions give.
    """
    with tempfile.TemporaryDirectory(prefix="breakhis-") as scratch:
        return _collect(version, store, settings, Path(scratch), anew=anew)


def _collect(version: "ModelVersion", store: Store, settings: Settings, scratch: Path, *, anew: bool) -> Json:
    import mlflow
    from mlflow.exceptions import MlflowException

    client = connect(settings)
    run = find_training_run(version.run_id, settings)
    tags = run.data.tags
    check_training_set(version.run_id, tags, store)
    try:
        in_place = _in_place(version, client)
        artifacts = fetch_artifacts(f"runs:/{version.run_id}/evaluation", scratch / "run")
        evaluation = json.loads((artifacts / "metrics.json").read_bytes())
        preset = mlflow.artifacts.load_text(f"{run.info.artifact_uri}/preset.json")
        model = f"models:/{version.name}/{version.version}"
        folder = fetch_artifacts(model, None if in_place else scratch / "model")
    except (MlflowException, OSError) as error:
        raise RegistryError(f"{version.name} version {version.version}: artifacts cannot be read: {error}") from None
    split = store.meta(tags["breakhis.split"])
    name = f"{version.name} version {version.version}"
    _check_evaluation(name, evaluation, tags["breakhis.task"])
    if tags["breakhis.ledger"] != split["ledger"]:
        raise Refused(
            f"{name}: it says that it is of the ledger {tags['breakhis.ledger']}, its split {split['ledger']}"
        )
    if anew:
        try:
            check_predictions(
                *(artifacts, evaluation, tags["breakhis.task"]),
                *(tags["breakhis.dataset"], tags["breakhis.split"], store),
            )
        except Refused as error:
            raise Refused(f"{name}, run {version.run_id}: {error}") from None
    sources = store.meta(tags["breakhis.dataset"])["sources"]
    validations = {source: read_verified_object(oid, store)["validation"] for source, oid in sources.items()}
    return {
        "model": str(version.name),
        "version": int(version.version),
        "run_id": str(version.run_id),
        "set": tags["breakhis.set"],
        "task": tags["breakhis.task"],
        "dataset": tags["breakhis.dataset"],
        "sources": sources,
        "validations": validations,
        "validated": {name: store.meta(validation)["passed"] is True for name, validation in validations.items()},
        "split": tags["breakhis.split"],
        "ledger": tags["breakhis.ledger"],
        # A split from before there was a choice does not say.
        **({"split_method": split["method"], "split_group": split["group"]} if "group" in split else {}),
        "sides": {side: {what: split[side][what] for what in ("images", "cases")} for side in SIDES},
        "preset": tags["breakhis.preset"],
        "preset_sha256": hashlib.sha256(preset.encode()).hexdigest(),
        "code_sha256": tags.get("breakhis.code_sha256"),
        "lock_sha256": tags.get("breakhis.lock_sha256"),
        "dag_runs": _dag_runs(name, tags),
        "seed": int(tags["breakhis.seed"]),
        "weights": _weights(name, tags, store),
        # From the run's metrics, not only its artifact: both have to tell the same, see _same_metrics.
        "metrics": _same_metrics(evaluation["metrics"], run.data.metrics, version),
        **{name: evaluation[name] for name in ("intervals", "interval_notes", "slices") if name in evaluation},
        "per_class": {name: evaluation["per_class"][name] for name in class_names(tags["breakhis.task"])},
        "absent_classes": list(evaluation["absent_classes"]),
        "artifacts": {f"evaluation/{name}": sha256 for name, sha256 in _hash_files(artifacts).items()},
        "model_files": _hash_model(folder, name, in_place=in_place),
    }


def _check_evaluation(name: str, evaluation: Json, task: Task) -> None:
    """Check that an evaluation has numbers only, of metrics and classes that there are: a reviewer reads their names.

    Raises:
        Refused: it has others.
    """
    try:
        canonical(evaluation)
    except ValueError:
        raise Refused(f"{name}: its metrics.json holds what is no number (NaN or infinite)") from None
    known = {"metrics": set(METRIC_NAMES), "intervals": set(METRIC_NAMES), "absent_classes": set(class_names(task))}
    for what, names in known.items():
        if strange := sorted(set(map(str, evaluation.get(what, ()))) - names):
            raise Refused(f"{name}: its metrics.json has {what} that nobody knows: {strange[0][:80]!r}")
    lacking = [one for one in class_names(task) if one not in evaluation.get("per_class", {})]
    if lacking:
        raise Refused(f"{name}: its metrics.json says nothing of {', '.join(lacking)}")


def _weights(name: str, tags: dict[str, str], store: Store) -> dict[str, str]:
    """The backbone's weights as the store has them: who may log may set tags."""
    oid, kind = tags["breakhis.weights"], tags["breakhis.weights_kind"]
    meta = store.meta(oid)
    if object_id("weights", [meta["kind"], meta["sha256"]]) != oid or meta["kind"] != kind:
        raise Refused(f"{name}: its run says that {oid} are {kind} weights; in the store they are {meta['kind']}")
    return {"id": oid, "kind": kind}


def _dag_runs(name: str, tags: dict[str, str]) -> list[list[str]]:
    """DAG and run of each training that had a part in it."""
    try:
        return [[str(dag), str(run)] for dag, run in json.loads(tags.get("breakhis.dag_runs", "[]"))]
    except (ValueError, TypeError):
        raise Refused(f"{name}: its tag breakhis.dag_runs does not name runs: {tags['breakhis.dag_runs']!r}") from None


def verify_evidence(
    version: "ModelVersion", store: Store, settings: Settings, expected: str | None = None, *, anew: bool = False
) -> str:
    """The id of a version's evidence, if MLflow and the store still hold exactly what it says; ``anew`` as above.

    Raises:
        RegistryError: the version was never registered by us.
        Refused: something was changed since, or the evidence is not the expected one.
    """
    name = f"{version.name} version {version.version}"
    recorded = version.tags.get("breakhis.evidence")
    if not recorded and expected:
        raise Refused(f"{name}: its tag breakhis.evidence, which said {expected}, was removed")
    if not recorded:
        raise RegistryError(f"{name} has no evidence; register its run with: breakhis register {version.run_id}")
    if expected and expected != recorded:
        raise Refused(f"{name}: its evidence is {recorded}, not {expected}")
    said = read_verified_object(recorded, store)
    # What an earlier release recorded is less than what is collected now, and it is all that has to hold.
    found = json.loads(canonical(collect_evidence(version, store, settings, anew=anew)))
    changed = sorted(key for key in said if said[key] != found.get(key))
    if changed:
        raise Refused(f"{name}: changed after {recorded} was recorded: {', '.join(changed)}")
    return str(recorded)


def read_verified_object(oid: str, store: Store) -> Json:
    """An object of the store that is named by the hash of all it says, such as evidence.

    Raises:
        Refused: it was changed since.
        StoreError: there is no such object.
    """
    said = {key: value for key, value in store.meta(oid).items() if key != "id"}
    if object_id(oid.rpartition("-")[0], said) != oid:
        raise Refused(f"{oid} in the store {store.root} was changed: it is not what was recorded under that id")
    return said


def read_verified_evidence(model: str, number: int, records: Sequence[Json], store: Store, settings: Settings) -> Json:
    """The evidence of a version that is or was champion, if it still is what it became champion as.

    Raises:
        RegistryError: there is no such version.
        Refused: it never was, or its tag, evidence, run, metrics or model files were changed since.
    """
    expected = find_champion_evidence_id(number, records)
    if not expected:
        raise Refused(f"{model} version {number}: no record of the audit log says on which evidence it became champion")
    verify_evidence(RegisteredModel(model, settings).find_version(number), store, settings, expected)
    return read_verified_object(expected, store)


def read_evidence(model: str, number: int, store: Store, settings: Settings) -> Json | None:
    """A version's evidence as it was recorded, or None of a version that has none.

    Raises:
        RegistryError: there is no such version.
        Refused: the evidence was changed in the store.
    """
    recorded = RegisteredModel(model, settings).find_version(number).tags.get("breakhis.evidence")
    return read_verified_object(recorded, store) if recorded else None


def _same_metrics(evaluated: dict[str, float], logged: dict[str, float], version: "ModelVersion") -> dict[str, float]:
    for name, value in evaluated.items():
        if not math.isclose(logged.get(f"test_{name}", math.nan), value, rel_tol=1e-9, abs_tol=1e-12):
            raise Refused(
                f"{version.name} version {version.version}: run {version.run_id} shows test_{name} = "
                f"{logged.get(f'test_{name}')}, but its evaluation says {value}; one of them was changed"
            )
    return evaluated


def _hash_files(folder: Path) -> dict[str, str]:
    # MLflow writes registered_model_meta into the folder when a version is loaded; it is not part of the model.
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file != folder / "registered_model_meta"
    }


def _in_place(version: "ModelVersion", client: "MlflowClient") -> bool:
    """Whether a model's files are used where they lie: on a disk, not in an object store."""
    location = client.get_model_version_download_uri(version.name, str(version.version))
    return urlsplit(location).scheme in {"", "file"}


def _hash_model(folder: Path, name: str, *, in_place: bool) -> dict[str, str]:
    """Hashes of a model's files, of which none may be compiled code: Python would run that in place of the source.

    Where files are used in place, Python itself leaves such code with whoever loads the model. It is removed: nothing
    is lost with it, and nothing of it is run.

    Raises:
        Refused: one is, and was not left by Python, or cannot be removed.
    """
    for cache in list(folder.rglob("__pycache__")) if in_place else ():
        with suppress(OSError):
            shutil.rmtree(cache)
    found = _hash_files(folder)
    compiled = sorted(file for file in found if file.endswith((".pyc", ".pyo")) or "__pycache__" in file.split("/"))
    if compiled:
        raise Refused(
            f"{name}: compiled code lies among its files, which whoever loads the model would run: "
            f"{', '.join(compiled[:3])}; find out how it came there, and delete it"
        )
    return found
