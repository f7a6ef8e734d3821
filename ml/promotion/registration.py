"""Registration: a finished training run becomes a candidate version, with its evidence."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ml.core.errors import BreakhisError, Refused, RegistryError
from ml.core.hashes import canonical
from ml.core.leases import hold_lease
from ml.core.messages import cut_text, hide_access, list_items
from ml.core.mlflow_client import connect, find_outage
from ml.core.progress import say
from ml.core.settings import Settings
from ml.core.store import Json, Store
from ml.data.training_sets import find_training_set
from ml.evaluation.report import render_model_card
from ml.promotion.alias_history import REGISTERED, STARTED, is_registered
from ml.promotion.answers import explain_unknown_starters
from ml.promotion.audit_log import AuditLog, find_last_sequence, format_anchor, read_unverified_records
from ml.promotion.evidence import RECORDED_AT_REGISTRATION, check_training_set, collect_evidence, verify_evidence
from ml.promotion.run_claims import check_tags
from ml.promotion.starters import find_training_starters
from ml.registry.registered_model import CHAMPION, RegisteredModel, find_training_run

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

_SECONDS_TO_WAIT = 1800.0
"""How long a registration waits for another of the same model, which may be scoring pictures."""


def register_run(run_id: str, store: Store, settings: Settings) -> Json:
    """Register a finished training run as a candidate version, with its evidence (the ``register`` stage).

    Doing it again for the same run returns the same version with the same evidence: a version's evidence is recorded
    once, since a rejection holds for it.

    Args:
        run_id: the run in MLflow.
        store: has the run's dataset and split, and takes the evidence.
        settings: say where MLflow is.

    Returns:
        ``{model, version, evidence}``; ``evidence`` is the id of the evidence.

    Raises:
        RegistryError: there is no such run, it is unfinished, or it is not a training run of breakhis.
        DataError: no training set declares the model.
        ConfigError: the file of its training set cannot be used.
        Refused: its tags or metrics are not of the kind that a training logs, its tags name another training set than
            its dataset belongs to, its metrics are not those of its predictions, or these not those of its network; it
            was changed after it was registered; or the registered model has something that neither this stage nor a
            decision has made. Nothing of a refused run stays in the registry.
        TryAgain: another registration of the model did not end.
    """
    client = connect(settings)
    run = find_training_run(run_id, settings)
    tags = run.data.tags
    check_tags(f"run {run_id}", tags)
    model = f"{tags['breakhis.set']}-{tags['breakhis.task']}"
    find_training_set(model, settings)  # a set without a YAML file has no policy to judge its model by
    check_training_set(run_id, tags, store)
    # One at a time, since another's version has no evidence while it is being checked.
    with hold_lease(store, f"register-{model}", timeout=_SECONDS_TO_WAIT):
        registered = RegisteredModel(model, settings)
        records = _read_records(model, store, settings)
        _check_made_by_us(registered, run_id, store)
        _make_model_our_own(registered, records)
        version = _find_or_make_version(model, run, client)
        number, recorded = str(version.version), version.tags.get("breakhis.evidence")
        if recorded and store.exists(recorded):
            is_known = records is None or is_registered(records, int(number), recorded)
            oid, evidence = verify_evidence(version, store, settings, recompute=True, is_taken_over=not is_known)
            if records is not None and not is_known:
                _take_over(version, evidence, records, store, settings)
        else:
            with _withdrawn_if_refused(version, client):
                evidence = collect_evidence(version, store, settings, recompute=True, rescore=True, is_new=True)
                evidence["starters"] = _find_starters(model, number, evidence["dag_runs"], records)
            oid = store.create("evidence", evidence, evidence)
            if recorded and recorded != oid:
                raise Refused(
                    f"{model} version {number}: its evidence {recorded} is gone from the store {store.root}, and "
                    f"what can be collected now is another ({oid}); restore the store from a backup, or train another "
                    "version"
                )
        if records is not None and not is_registered(records, int(number), oid):
            _record_registration(registered, int(number), run_id, oid, store, settings)
        client.set_model_version_tag(model, number, "breakhis.evidence", oid)
        client.set_model_version_tag(model, number, "breakhis.weights_kind", tags["breakhis.weights_kind"])
        client.update_model_version(model, number, description=_describe(evidence))
        if registered.alias(CHAMPION) != int(number):
            registered.set_candidate(int(number))
    return {"model": model, "version": int(number), "evidence": oid}


def _record_registration(
    registered: RegisteredModel, number: int, run_id: str, evidence: str, store: Store, settings: Settings
) -> None:
    """Record in the audit log that this stage has made this evidence of a version."""
    facts: Json = {"version": number, "run": run_id, "evidence": evidence}
    record = AuditLog(store, settings).append(REGISTERED, registered.name, **facts)
    registered.set_audit_anchor(format_anchor(record))


def _find_or_make_version(model: str, run: "Run", client: "MlflowClient") -> "ModelVersion":
    """Returns the version that was made of a run, or makes it.

    Raises:
        RegistryError: the run did not log exactly one model, or MLflow makes no version of it.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    run_id = run.info.run_id
    if earlier := client.search_model_versions(f"name='{model}' and run_id='{run_id}'"):
        return min(earlier, key=lambda v: int(v.version))
    # Not the run's own list: it still names a model that a killed training left half-written and that was deleted.
    logged = client.search_logged_models([run.info.experiment_id], filter_string=f"source_run_id = '{run_id}'")
    if len(logged) != 1:
        raise RegistryError(f"run {run_id} logged {len(logged)} models; a training run logs exactly one")
    try:
        return mlflow.register_model(f"models:/{logged[0].model_id}", model)
    except MlflowException as error:
        raise find_outage(error) or RegistryError(
            f"run {run_id} cannot be registered as {model}: {cut_text(hide_access(error))}"
        ) from None


@contextmanager
def _withdrawn_if_refused(version: "ModelVersion", client: "MlflowClient") -> Iterator[None]:
    """Delete a version whose evidence cannot be collected: without any it would pass for somebody else's.

    Its run and the model that this logged stay. A version that has recorded evidence is left as it is.
    """
    from mlflow.exceptions import MlflowException

    try:
        yield
    except BreakhisError:
        if "breakhis.evidence" not in version.tags:
            try:
                client.delete_model_version(version.name, str(version.version))
            except MlflowException as error:
                name, cause = f"{version.name} version {version.version}", cut_text(hide_access(error))
                say(f"warning: {name} has no evidence and is still there: {cause}")
        raise


def _read_records(model: str, store: Store, settings: Settings) -> list[Json] | None:
    """Returns the model's audit records, or None without the audit log's key: then the version cannot be promoted."""
    has_key = bool(settings.audit_key.get_secret_value())
    return AuditLog(store, settings).read_model_records(model) if has_key else None


def _take_over(version: "ModelVersion", evidence: Json, records: list[Json], store: Store, settings: Settings) -> None:
    """Check evidence of which nothing says that this stage has made it, as wholly as if it were collected now.

    An earlier release made it, which kept no record of that, or somebody who may write to MLflow and the store. It has
    been compared with both already, but for what is recorded at registration alone. Evidence of which it is unknown who
    started the trainings stays as it is, since nobody can approve it.

    Raises:
        Refused: it is not what is found now.
    """
    name = f"{version.name} version {version.version}"
    now = collect_evidence(version, store, settings, recompute=True, rescore="rescored" in evidence)
    now["starters"] = _find_starters(version.name, str(version.version), now["dag_runs"], records)
    now = json.loads(canonical(now))
    claimed = RECORDED_AT_REGISTRATION & evidence.keys()
    if evidence.get("starters", {}).get("unknown"):
        claimed -= {"starters"}
    if wrong := sorted(key for key in claimed if evidence[key] != now[key]):
        raise Refused(
            f"{name}: nothing says that breakhis made its evidence, and there {list_items(wrong)} is not what is found "
            "now; train another version"
        )
    say(
        f"warning: {name} was registered by an earlier release or by somebody else; it was checked and is taken over, "
        "but for the code that it brings along, which is not this release's own"
    )


def _find_starters(model: str, number: str, training_runs: list[list[str]], records: Sequence[Json] | None) -> Json:
    """Returns who started the trainings of a version, as the audit log has it: nobody else is believed."""
    starters = find_training_starters(training_runs, records)
    if starters.unknown:
        say(f"warning: {model} version {number}: {explain_unknown_starters(starters.unknown)}")
    return starters.to_json()


def _check_made_by_us(model: RegisteredModel, run_id: str, store: Store) -> None:
    """Check that a registered model has nothing that somebody made before its training set was declared.

    Raises:
        Refused: it has a version without evidence, or an alias that no decision has set.
    """
    remedy = (
        "whoever made it may have had rights in MLflow that only this system should have; an administrator of MLflow "
        "deletes or renames the registered model there and restarts the stack, which then makes it anew"
    )
    for version in model.list_versions():
        if "breakhis.evidence" not in version.tags and version.run_id != run_id:
            raise Refused(
                f"the registered model {model.name} has a version {version.version} that breakhis did not register: "
                f"{remedy}. If a registration was interrupted, finish it: breakhis register {version.run_id}"
            )
    aliases = model.aliases()
    if (aliases.champion or aliases.previous) and not find_last_sequence(read_unverified_records(store, model.name)):
        name, number = ("champion", aliases.champion) if aliases.champion else ("previous", aliases.previous)
        raise Refused(
            f"the registered model {model.name} has an alias {name} on version {number}, but the audit log has no "
            f"decision about it: {remedy}"
        )


def _make_model_our_own(model: RegisteredModel, records: Sequence[Json] | None) -> None:
    """Delete a registered model that is empty and of which nothing was recorded yet; it is then made by this stage.

    Somebody may have made it after its training set was declared and before the stack was started again. MLflow gives
    whoever makes a model all rights to it, and takes them away with the model.
    """
    is_new = records is not None and all(record["event"] == STARTED for record in records)
    if is_new and not any("breakhis.evidence" in version.tags for version in model.list_versions()):
        model.delete()


def _describe(evidence: Json) -> str:
    """Returns the version's description: the model card, made of the evidence and not of the run's own text."""
    facts = {
        **evidence,
        "weights_kind": evidence["weights"]["kind"],
        "sources": {name: {"version": version} for name, version in evidence["sources"].items()},
        "split_group": evidence.get("split_group", "case"),
    }
    return render_model_card({"intervals": {}, "interval_notes": {}, **evidence}, facts)
