"""Evidence: what a model version is made of and what it scored, collected and verified.

The evidence of a version is one JSON object: its data, split, preset and weights, its metrics, and the hashes of its
model's files. The evidence's id is its hash, so a decision about the evidence is a decision about exactly this model.
"""

import hashlib
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ml.core.errors import Refused, RegistryError, RunGone
from ml.core.hashes import canonical, hash_files, object_id
from ml.core.messages import cut_text, hide_access, list_items
from ml.core.mlflow_client import connect, fetch_artifacts, find_outage
from ml.core.settings import Settings
from ml.core.store import Json, Store
from ml.core.taxonomy import SIDES, class_names
from ml.evaluation.predictions import check_predictions
from ml.promotion.alias_history import find_champion_evidence_id
from ml.promotion.model_files import hash_model_files, is_used_in_place
from ml.promotion.rescoring import rescore_predictions
from ml.promotion.run_claims import check_evaluation, check_tags, parse_dag_runs
from ml.registry.registered_model import RegisteredModel, find_training_run

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


RECORDED_AT_REGISTRATION = frozenset({"starters", "rescored", "confusions"})
"""What is recorded when a version is registered, and need not be collected again later.

Who started its trainings may be gone from Airflow by then. What scoring the test side again gave, and what is taken for
what there, follow from files whose hashes are compared.
"""


_RECORDED_LATER = RECORDED_AT_REGISTRATION | {"draws"}
"""What evidence of the oldest release lacks whose versions are still taken over. Without draws an interval counts for
nothing."""

_WITHOUT_EFFECT = _RECORDED_LATER | {
    "intervals",
    "interval_notes",
    "slices",
    "split_method",
    "split_group",
    "validated",
}
"""What still older evidence may lack: policies then find it missing, or it has one meaning."""


def check_training_set(run_id: str, tags: dict[str, str], store: Store) -> None:
    """Check that a run belongs to the training set that its tags name: who may log may set tags, but not a dataset.

    Args:
        run_id: the run.
        tags: its tags.
        store: has its dataset.

    Raises:
        Refused: its dataset belongs to another training set.
    """
    dataset_set = store.meta(tags["breakhis.dataset"])["set"]
    if dataset_set != tags["breakhis.set"]:
        raise Refused(
            f"run {run_id} is tagged with the training set {tags['breakhis.set']}, but it was trained on "
            f"{tags['breakhis.dataset']}, of the set {dataset_set}"
        )


def collect_evidence(
    version: "ModelVersion",
    store: Store,
    settings: Settings,
    *,
    recompute: bool = False,
    rescore: bool = False,
    is_new: bool = False,
) -> Json:
    """Collect the evidence of a model version from MLflow and the store: what it is made of and what it scored.

    Args:
        version: the version.
        store: has its dataset and split.
        settings: say where MLflow is.
        recompute: whether to compute its metrics again from its predictions, too.
        rescore: whether to score the pictures of the test side again with its network, too, as
            :mod:`ml.promotion.rescoring` does; only with ``recompute``.
        is_new: whether the version is made now, of this release's code; only with ``rescore``.

    Returns:
        The evidence; with ``rescore`` it has ``rescored``.

    Raises:
        RegistryError: its run, evaluation or model files are missing.
        Refused: what its run logged is not of the kind that :mod:`ml.promotion.run_claims` demands, cannot be true, or
            is not what its predictions and its network give.
    """
    with tempfile.TemporaryDirectory(prefix="breakhis-") as scratch:
        return _collect(version, store, settings, Path(scratch), recompute=recompute, rescore=rescore, is_new=is_new)


class _Artifacts(NamedTuple):
    """What MLflow has of a version and its run."""

    evaluation_folder: Path
    evaluation: Json
    """Content of the evaluation's metrics.json."""
    preset: str
    """Content of preset.json."""
    model_folder: Path
    is_used_in_place: bool
    """Whether the model folder is MLflow's own, not a copy."""


def _read_artifacts(version: "ModelVersion", artifact_uri: str, settings: Settings, scratch: Path) -> _Artifacts:
    import mlflow
    from mlflow.exceptions import MlflowException

    client = connect(settings)
    try:
        in_place = is_used_in_place(version, client)
        evaluation_folder = fetch_artifacts(f"runs:/{version.run_id}/evaluation", scratch / "run")
        evaluation = json.loads((evaluation_folder / "metrics.json").read_bytes())
        preset = mlflow.artifacts.load_text(f"{artifact_uri}/preset.json")
        model = f"models:/{version.name}/{version.version}"
        model_folder = fetch_artifacts(model, None if in_place else scratch / "model")
    except (MlflowException, OSError) as error:
        raise find_outage(error) or RegistryError(
            f"{version.name} version {version.version}: artifacts cannot be read: {cut_text(hide_access(error))}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise Refused(
            f"{version.name} version {version.version}: its metrics.json is not JSON: {cut_text(error)}"
        ) from None
    return _Artifacts(evaluation_folder, evaluation, preset, model_folder, in_place)


class _Origin(NamedTuple):
    """What the store has of a version's origin, as its run's tags name it."""

    split: Json
    sources: dict[str, str]
    """Source -> id of its version in the dataset."""
    validations: dict[str, str]
    """Source -> id of its validation."""
    validated: dict[str, bool]
    """Source -> whether its validation passed."""
    weights: dict[str, str]
    """Id and kind of the backbone weights."""


def _read_origin(name: str, tags: dict[str, str], store: Store) -> _Origin:
    """Returns the version's origin. Who may log may set tags, so they are checked against the store.

    Raises:
        Refused: a tag says something else than the store.
    """
    split, weights = store.meta(tags["breakhis.split"]), store.meta(tags["breakhis.weights"])
    sources = store.meta(tags["breakhis.dataset"])["sources"]
    validations = {source: read_verified_object(oid, store)["validation"] for source, oid in sources.items()}
    validated = {source: store.meta(validation)["passed"] is True for source, validation in validations.items()}
    if tags["breakhis.ledger"] != split["ledger"]:
        raise Refused(
            f"{name}: its run is tagged with the ledger {tags['breakhis.ledger']}, but its split is of "
            f"{split['ledger']}"
        )
    oid, kind = tags["breakhis.weights"], tags["breakhis.weights_kind"]
    if object_id("weights", [weights["kind"], weights["sha256"]]) != oid or weights["kind"] != kind:
        raise Refused(f"{name}: its run says that {oid} are {kind} weights; in the store they are {weights['kind']}")
    return _Origin(split, sources, validations, validated, {"id": oid, "kind": kind})


def _collect(
    version: "ModelVersion",
    store: Store,
    settings: Settings,
    scratch: Path,
    *,
    recompute: bool,
    rescore: bool,
    is_new: bool,
) -> Json:
    name = f"{version.name} version {version.version}"
    run = find_training_run(version.run_id, settings)
    tags = run.data.tags
    check_tags(name, tags)
    check_training_set(version.run_id, tags, store)
    origin = _read_origin(name, tags, store)
    artifacts = _read_artifacts(version, run.info.artifact_uri, settings, scratch)
    evaluation = artifacts.evaluation
    check_evaluation(name, evaluation, tags["breakhis.task"])
    confusions = None
    if recompute:
        try:
            confusions = check_predictions(
                *(artifacts.evaluation_folder, evaluation, tags["breakhis.task"]),
                *(tags["breakhis.dataset"], tags["breakhis.split"], store),
            )
        except Refused as error:
            raise Refused(f"{name}, run {version.run_id}: {error}") from None
    split = origin.split
    evidence: Json = {
        "model": str(version.name),
        "version": int(version.version),
        "run_id": str(version.run_id),
        "set": tags["breakhis.set"],
        "task": tags["breakhis.task"],
        "dataset": tags["breakhis.dataset"],
        "sources": origin.sources,
        "validations": origin.validations,
        "validated": origin.validated,
        "split": tags["breakhis.split"],
        "ledger": tags["breakhis.ledger"],
        # Splits made before method and group could be chosen do not record them.
        **({"split_method": split["method"], "split_group": split["group"]} if "group" in split else {}),
        "sides": {side: {what: split[side][what] for what in ("images", "cases")} for side in SIDES},
        "preset": tags["breakhis.preset"],
        "preset_sha256": hashlib.sha256(artifacts.preset.encode()).hexdigest(),
        "code_sha256": tags.get("breakhis.code_sha256"),
        "lock_sha256": tags.get("breakhis.lock_sha256"),
        "dag_runs": parse_dag_runs(name, tags),
        "seed": int(tags["breakhis.seed"]),
        "weights": origin.weights,
        # The run's metrics and its metrics.json have to agree.
        "metrics": _match_logged_metrics(evaluation["metrics"], run.data.metrics, version),
        **{name: evaluation[name] for name in ("draws", "intervals", "interval_notes", "slices") if name in evaluation},
        "per_class": {name: evaluation["per_class"][name] for name in class_names(tags["breakhis.task"])},
        "absent_classes": list(evaluation["absent_classes"]),
        **({"confusions": confusions} if confusions else {}),
        "artifacts": {f"evaluation/{file}": sha256 for file, sha256 in hash_files(artifacts.evaluation_folder).items()},
        "model_files": hash_model_files(artifacts.model_folder, name, in_place=artifacts.is_used_in_place),
    }
    if rescore:
        folders = artifacts.evaluation_folder, artifacts.model_folder, scratch
        evidence["rescored"] = rescore_predictions(name, evidence, evaluation, *folders, store, is_new)
    return evidence


def verify_evidence(
    version: "ModelVersion",
    store: Store,
    settings: Settings,
    expected: str | None = None,
    *,
    recompute: bool = False,
    is_taken_over: bool = False,
) -> tuple[str, Json]:
    """Check that MLflow and the store still hold exactly what a version's evidence says. Returns its id and itself.

    Args:
        version: the version.
        store: has the evidence, its dataset and split.
        settings: say where MLflow is.
        expected: the id that the evidence must have; None accepts any.
        recompute: as of :func:`collect_evidence`. Where the evidence is of an earlier release, which did not score the
            test side again when it registered, that is done now.
        is_taken_over: whether nothing but this check says that breakhis made the evidence: it is then complete.

    Raises:
        RegistryError: the version was not registered by ``breakhis register``.
        Refused: something was changed since, or the evidence is not the expected one.
    """
    name = f"{version.name} version {version.version}"
    recorded = version.tags.get("breakhis.evidence")
    # A field that is missing could not be compared, and so would not be seen to be changed.
    may_lack = _RECORDED_LATER if is_taken_over else _WITHOUT_EFFECT
    if not recorded and expected:
        raise Refused(f"{name}: its tag breakhis.evidence, which said {expected}, was removed")
    if not recorded:
        raise RegistryError(f"{name} has no evidence; register its run with: breakhis register {version.run_id}")
    if expected and expected != recorded:
        raise Refused(f"{name}: its evidence is {recorded}, not {expected}")
    evidence = read_verified_object(recorded, store)
    rescore = recompute and "rescored" not in evidence
    collected = collect_evidence(version, store, settings, recompute=recompute, rescore=rescore)
    if lacking := sorted(collected.keys() - evidence.keys() - may_lack):
        raise Refused(
            f"{name}: {recorded} does not say {list_items(lacking)}; breakhis did not make it, train it again"
        )
    if changed := _list_changes(evidence, collected):
        raise Refused(f"{name}: changed after {recorded} was recorded: {list_items(changed)}")
    return str(recorded), evidence


def _list_changes(recorded: Json, collected: Json) -> list[str]:
    """Returns the names of what recorded evidence says otherwise than evidence that was collected now.

    An earlier release recorded fewer fields than are collected now: only the recorded ones are compared.
    """
    now = json.loads(canonical(collected))
    may_lack = RECORDED_AT_REGISTRATION - now.keys()
    return sorted(key for key in recorded.keys() - may_lack if recorded[key] != now.get(key))


def read_verified_object(oid: str, store: Store) -> Json:
    """Read an object of the store whose id is the hash of its content, such as evidence, and check the hash.

    Raises:
        Refused: the object was changed.
        StoreError: there is no such object.
    """
    content = {key: value for key, value in store.meta(oid).items() if key != "id"}
    try:
        is_unchanged = object_id(oid.rpartition("-")[0], content) == oid
    except (ValueError, RecursionError):  # it holds what is never hashed, such as NaN
        is_unchanged = False
    if not is_unchanged:
        raise Refused(f"{oid} in the store {store.root} was changed: it is not what was recorded under that id")
    return content


def read_verified_evidence(model: RegisteredModel, number: int, records: Sequence[Json], store: Store) -> Json:
    """Read the evidence of a version that is or was champion, and verify it against MLflow and the store.

    Args:
        model: the registered model.
        number: the version.
        records: audit records of the model.
        store: has the evidence.

    Raises:
        RegistryError: there is no such version.
        RunGone: its run was deleted and purged in MLflow; the message says what follows from that.
        Refused: it never was champion, or its tag, evidence, run, metrics or model files were changed since.
    """
    expected = find_champion_evidence_id(number, records)
    if not expected:
        raise Refused(
            f"{model.name} version {number}: no record of the audit log says on which evidence it became champion"
        )
    version = model.find_version(number)
    try:
        _, evidence = verify_evidence(version, store, model.settings, expected)
    except RunGone:
        raise RunGone(
            f"{model.name} version {number}: its run {version.run_id} was deleted in MLflow and purged, so what the "
            "version was promoted on cannot be checked any more, and no later version can be compared with it. Either "
            "make a former champion the champion again, by the DAG rollback; or let the policy say comparison: "
            "{champion_gone: warn}, and a reviewer may approve the next version without the comparison"
        ) from None
    return evidence


def read_evidence(model: RegisteredModel, number: int, store: Store) -> Json | None:
    """Read a version's evidence as it was recorded, without comparing it with MLflow; None if it has no evidence.

    Raises:
        RegistryError: there is no such version.
        Refused: the evidence was changed in the store.
    """
    recorded = model.find_version(number).tags.get("breakhis.evidence")
    return read_verified_object(recorded, store) if recorded else None


def _match_logged_metrics(
    evaluated: dict[str, float], logged: dict[str, float], version: "ModelVersion"
) -> dict[str, float]:
    """Returns the evaluation's metrics, which must equal the run's metrics.

    Raises:
        Refused: they differ.
    """
    for name, value in evaluated.items():
        if not math.isclose(logged.get(f"test_{name}", math.nan), value, rel_tol=1e-9, abs_tol=1e-12):
            raise Refused(
                f"{version.name} version {version.version}: run {version.run_id} shows test_{name} = "
                f"{logged.get(f'test_{name}')}, but its evaluation says {value}; one of them was changed"
            )
    return evaluated
