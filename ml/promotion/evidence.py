"""The MLflow registry: candidate versions with their evidence, verdicts, and the champion.

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
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ml.core.errors import ConfigError, DataError, Refused, RegistryError
from ml.core.mlflow_client import connect, fetch_artifacts
from ml.core.settings import Settings
from ml.core.store import Json, Store, canonical, digest, object_id
from ml.core.taxonomy import SIDES, Task, classes
from ml.data.training_sets import training_set_of
from ml.evaluation.comparison import Memos
from ml.evaluation.predictions import check_predictions
from ml.promotion.alias_history import Aliases, evidence_behind, standing, unfinished
from ml.promotion.audit_log import unchecked
from ml.promotion.champion_comparison import compare_with_champion
from ml.promotion.gates import METRIC_NAMES, judge_evidence
from ml.promotion.policies import Policy, load_policy
from ml.promotion.reviews import review_body, review_title

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

CANDIDATE, CHAMPION = "candidate", "champion"
"""Aliases of a registered model. ``champion`` is what is used; ``previous`` is what was, for going back."""

_ANCHOR = "breakhis.audit"


def register_run(run_id: str, store: Store, settings: Settings) -> Json:
    """Make a model version of a finished training run, once (the ``register`` stage).

    Returns:
        ``{model, version, evidence}``.

    Raises:
        RegistryError: no such run, or it is unfinished or not a training run of ours.
        Refused: it says that it is of another training set than its dataset is.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    client = connect(settings)
    run = _training_run(client, run_id)
    tags = run.data.tags
    model = f"{tags['breakhis.set']}-{tags['breakhis.task']}"
    training_set_of(model, settings)  # a set that no YAML declares has no policy, so its model could never be judged
    _check_set(run_id, tags, store)
    known = client.search_model_versions(f"name='{model}' and run_id='{run_id}'")
    if known:
        version = min(known, key=lambda v: int(v.version))
    else:
        # Not the run's own list: that keeps naming a model which a killed training left half-written and deleted since.
        logged = client.search_logged_models([run.info.experiment_id], filter_string=f"source_run_id = '{run_id}'")
        if len(logged) != 1:
            raise RegistryError(f"run {run_id} logged {len(logged)} models; a training run logs exactly one")
        try:
            version = mlflow.register_model(f"models:/{logged[0].model_id}", model)
        except MlflowException as error:
            raise RegistryError(f"run {run_id} cannot be registered as {model}: {error}") from None
    evidence = collect_evidence(version, store, settings, anew=True)
    oid = store.create("evidence", evidence, evidence)
    number = str(version.version)
    client.set_model_version_tag(model, number, "breakhis.evidence", oid)
    client.set_model_version_tag(model, number, "breakhis.weights_kind", tags["breakhis.weights_kind"])
    if "evaluation/model_card.md" in evidence["artifacts"]:
        card = mlflow.artifacts.load_text(f"{run.info.artifact_uri}/evaluation/model_card.md")
        client.update_model_version(model, number, description=card)
    if _alias(client, model, CHAMPION) != int(number):
        client.set_registered_model_alias(model, CANDIDATE, number)
    return {"model": model, "version": int(number), "evidence": oid}


def _check_set(run_id: str, tags: dict[str, str], store: Store) -> None:
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
    run = _training_run(client, version.run_id)
    tags = run.data.tags
    _check_set(version.run_id, tags, store)
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
    validations = {source: read_content(oid, store)["validation"] for source, oid in sources.items()}
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
        "per_class": {name: evaluation["per_class"][name] for name in classes(tags["breakhis.task"])},
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
    known = {"metrics": set(METRIC_NAMES), "intervals": set(METRIC_NAMES), "absent_classes": set(classes(task))}
    for what, names in known.items():
        if strange := sorted(set(map(str, evaluation.get(what, ()))) - names):
            raise Refused(f"{name}: its metrics.json has {what} that nobody knows: {strange[0][:80]!r}")
    lacking = [one for one in classes(task) if one not in evaluation.get("per_class", {})]
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


def judge(
    model: str,
    number: str,
    store: Store,
    settings: Settings,
    *,
    evidence: str | None = None,
    policy: str | None = None,
    records: Sequence[Json] | None = None,
    memos: Memos | None = None,
) -> Json:
    """Hold a version against its training set's promotion policy (the ``gate`` stage), or against another file.

    What is decided on is one *bundle*: the version's evidence, the champion's, the gates with what each found, the
    comparison and the policy with its hash. Its id is its hash, and an approval holds for exactly that. Another
    policy's verdict is only shown; it is not recorded and promotes nothing. ``records`` are the model's in the audit
    log, by who has checked them; ``memos`` keep the simulation's results, by default as anybody may write them.

    Returns:
        ``{model, version, passed, gates, warnings, evidence, bundle, bundle_sha256, dag_runs, policy, policy_hash,
        approvals, summary, title, review}``.

    Raises:
        RegistryError: no such version, or it was never registered by us.
        Refused: the version or the champion is not what its evidence says, or ``evidence`` is another one.
    """
    client = connect(settings)
    version = find_version(client, model, number)
    recorded = verify_evidence(version, store, settings, evidence, anew=True)
    facts = read_content(recorded, store)
    champion = champion_of(model, store, settings, records)
    if champion and champion["version"] == facts["version"]:
        champion = None  # a version is not compared with itself
    found = _policy(model, settings, policy)
    comparison = None
    if champion and isinstance(found, Policy):
        comparison = compare_with_champion(facts, champion, found.comparison, store, memos or store)
    verdict = judge_evidence(facts, found, comparison)
    bundle = {
        "evidence_id": recorded,
        "evidence": facts,
        "champion": champion,
        "comparison": comparison,
        "policy_content": found.model_dump(mode="json") if isinstance(found, Policy) else None,
        **verdict,
    }
    oid = object_id("bundle", bundle)
    result: Json = {
        "model": model,
        "version": int(version.version),
        "evidence": recorded,
        "bundle": oid,
        "bundle_sha256": digest(bundle),
        "dag_runs": facts.get("dag_runs", []),
        **verdict,
        "title": review_title(facts),
        "review": review_body(bundle, oid, _links(facts, settings)),
    }
    if policy is None:
        shown = {CANDIDATE: facts, **({CHAMPION: champion} if champion else {})}
        store.create("bundle", bundle, bundle, lambda folder: _copy_evaluations(shown, folder))
        client.log_dict(version.run_id, bundle, f"gates/{model}-v{version.version}/{oid}.json")
        client.set_model_version_tag(model, str(version.version), "breakhis.bundle", oid)
        client.set_model_version_tag(model, str(version.version), "breakhis.gates", _outcome(verdict))
    return result


def _copy_evaluations(shown: dict[str, Json], folder: Path) -> None:
    """Put beside a bundle what its reviewer looks at: of candidate and champion, pictures, report and model card."""
    for name, evidence in shown.items():
        (folder / name).mkdir()
        with tempfile.TemporaryDirectory(prefix="breakhis-") as scratch:
            for file in fetch_artifacts(f"runs:/{evidence['run_id']}/evaluation", Path(scratch)).iterdir():
                if file.suffix in {".png", ".html", ".md"}:
                    shutil.copyfile(file, folder / name / file.name)


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
    said = read_content(recorded, store)
    # What an earlier release recorded is less than what is collected now, and it is all that has to hold.
    found = json.loads(canonical(collect_evidence(version, store, settings, anew=anew)))
    changed = sorted(key for key in said if said[key] != found.get(key))
    if changed:
        raise Refused(f"{name}: changed after {recorded} was recorded: {', '.join(changed)}")
    return str(recorded)


def read_content(oid: str, store: Store) -> Json:
    """An object of the store that is named by the hash of all it says, such as evidence.

    Raises:
        Refused: it was changed since.
        StoreError: there is no such object.
    """
    said = {key: value for key, value in store.meta(oid).items() if key != "id"}
    if object_id(oid.rpartition("-")[0], said) != oid:
        raise Refused(f"{oid} in the store {store.root} was changed: it is not what was recorded under that id")
    return said


def champion_of(model: str, store: Store, settings: Settings, records: Sequence[Json] | None = None) -> Json | None:
    """The evidence of a model's champion, or None where there is no champion: it still is what it became champion as.

    The champion is the one that the audit log names: while a decision is carried out, the alias may be late.

    Args:
        model: whose.
        store: holds evidence and log.
        settings: say where the registry is.
        records: of the model, checked; default: what lies in the store, which is not checked without a key.

    Raises:
        Refused: the alias was moved behind the log's back, or the champion was changed after it became it.
    """
    told = unchecked(store, model) if records is None else records
    while True:
        expected, found = standing(told).champion, _alias(connect(settings), model, CHAMPION)
        if found == expected or unfinished(told):
            break
        later = unchecked(store, model) if records is None else told
        if later == told:
            raise Refused(moved(model, CHAMPION, found, expected))
        told = later  # a decision was carried out between the two readings
    return None if expected is None else verified_evidence(model, expected, told, store, settings)


def verified_evidence(model: str, number: int, records: Sequence[Json], store: Store, settings: Settings) -> Json:
    """The evidence of a version that is or was champion, if it still is what it became champion as.

    Raises:
        RegistryError: there is no such version.
        Refused: it never was, or its tag, evidence, run, metrics or model files were changed since.
    """
    expected = evidence_behind(number, records)
    if not expected:
        raise Refused(f"{model} version {number}: no record of the audit log says on which evidence it became champion")
    verify_evidence(find_version(connect(settings), model, str(number)), store, settings, expected)
    return read_content(expected, store)


def moved(model: str, alias: str, found: int | None, expected: int | None) -> str:
    """What to say of an alias that is not where the audit log says."""
    mend = "put it right with the DAG rollback" if expected else f"take the alias {alias} away in MLflow"
    return (
        f"{model}: the alias {alias} is on version {found or 'none'}, but by the audit log it belongs to version "
        f"{expected or 'none'}: it was moved behind the log's back; {mend}"
    )


def our_models(settings: Settings) -> list[str]:
    """The registered models that a training set declares."""
    found, token = [], None
    while True:
        page = connect(settings).search_registered_models(max_results=100, page_token=token)
        found += [str(one.name) for one in page if _is_declared(str(one.name), settings)]
        token = page.token
        if not token:
            return found


def _is_declared(model: str, settings: Settings) -> bool:
    try:
        training_set_of(model, settings)
    except DataError:
        return False
    return True


def evidence_of(model: str, number: int, store: Store, settings: Settings) -> Json | None:
    """A version's evidence as it was recorded, or None of a version that has none.

    Raises:
        RegistryError: there is no such version.
        Refused: the evidence was changed in the store.
    """
    recorded = find_version(connect(settings), model, str(number)).tags.get("breakhis.evidence")
    return read_content(recorded, store) if recorded else None


def find_version(client: "MlflowClient", model: str, number: str) -> "ModelVersion":
    """A model version.

    Raises:
        RegistryError: there is none.
    """
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version(model, str(number))
    except MlflowException:
        raise RegistryError(f"no version {number} of a registered model {model!r} in MLflow") from None


def aliases_of(model: str, settings: Settings) -> Aliases:
    """A model's aliases as the registry has them."""
    client = connect(settings)
    return Aliases(*(_alias(client, model, name) for name in Aliases._fields))


def set_aliases(model: str, wanted: Aliases, settings: Settings, *, over: int | None = None) -> None:
    """Bring a model's aliases to where they belong. Calling it twice changes nothing.

    Args:
        model: whose.
        wanted: where champion and previous belong.
        settings: say where the registry is.
        over: the candidate that is one no longer; a newer one that was registered meanwhile stays.
    """
    client, found = connect(settings), aliases_of(model, settings)
    # The champion last: until it moves, everything is as it was but for the name of the one before.
    for name in ("previous", "champion"):
        number = getattr(wanted, name)
        if number == getattr(found, name):
            continue
        if number is None:
            client.delete_registered_model_alias(model, name)
        else:
            client.set_registered_model_alias(model, name, str(number))
    if over is not None and _alias(client, model, CANDIDATE) == over:
        client.delete_registered_model_alias(model, CANDIDATE)


def anchored(model: str, settings: Settings) -> str:
    """What the registry was told of a model's last record, or nothing."""
    return anchors(settings).get(model, "")


def anchors(settings: Settings) -> dict[str, str]:
    """The same of every model that has one."""
    found: dict[str, str] = {}
    token = None
    while True:
        page = connect(settings).search_registered_models(max_results=100, page_token=token)
        found |= {str(one.name): one.tags[_ANCHOR] for one in page if _ANCHOR in one.tags}
        token = page.token
        if not token:
            return found


def anchor_audit(model: str, told: str, settings: Settings) -> None:
    """Tell the registry of a model's last record, unless it knows of that or a later one."""
    known = anchored(model, settings).partition(":")[0]
    if known and int(known) >= int(told.partition(":")[0]):
        return
    connect(settings).set_registered_model_tag(model, _ANCHOR, told)


def _alias(client: "MlflowClient", model: str, alias: str) -> int | None:
    from mlflow.exceptions import MlflowException

    try:
        return int(client.get_model_version_by_alias(model, alias).version)
    except MlflowException as error:
        # A missing alias is INVALID_PARAMETER_VALUE, a missing model RESOURCE_DOES_NOT_EXIST.
        if error.error_code in {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"}:
            return None
        raise


def _training_run(client: "MlflowClient", run_id: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException:
        raise RegistryError(f"no run {run_id!r} in MLflow") from None
    if "breakhis.task" not in run.data.tags:
        raise RegistryError(f"run {run_id} is not a training run of breakhis (it has no tag breakhis.task)")
    if run.info.status != "FINISHED":
        raise RegistryError(f"run {run_id} is {run.info.status}; only a finished run can become a model version")
    return run


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


def _policy(model: str, settings: Settings, other: str | None) -> Policy | ConfigError:
    try:
        if other:
            return load_policy(other, settings.conf)
        training_set, _ = training_set_of(model, settings)
        return load_policy(training_set.policy, settings.conf, training_set.file.parent)
    except ConfigError as error:
        return error


def _links(evidence: Json, settings: Settings) -> dict[str, str]:
    links = {}
    if settings.mlflow_ui:
        ui = settings.mlflow_ui.rstrip("/")
        links["The training run in MLflow: plots and metrics"] = f"{ui}/#/runs/{evidence['run_id']}"
        links["The model version in MLflow"] = f"{ui}/#/models/{evidence['model']}/versions/{evidence['version']}"
    for source, validation in evidence["validations"].items():
        links[f"Validation of the source {source} (Data Docs)"] = f"/breakhis/docs/{validation}/index.html"
    return links


def _outcome(verdict: Json) -> str:
    return "passed" if verdict["passed"] else "blocked"
