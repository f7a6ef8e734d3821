"""Registration: a finished training run becomes a candidate version, with its evidence."""

from ml.core.errors import RegistryError
from ml.core.mlflow_client import connect
from ml.core.settings import Settings
from ml.core.store import Json, Store
from ml.data.training_sets import find_training_set
from ml.evaluation.report import render_model_card
from ml.promotion.evidence import check_training_set, collect_evidence, list_changes, read_verified_object
from ml.promotion.run_claims import check_tags
from ml.registry.registered_model import CHAMPION, RegisteredModel, find_training_run


def register_run(run_id: str, store: Store, settings: Settings) -> Json:
    """Register a finished training run as a candidate version, with its evidence (the ``register`` stage).

    Doing it again for the same run returns the same version.

    Args:
        run_id: the run in MLflow.
        store: has the run's dataset and split, and takes the evidence.
        settings: say where MLflow is.

    Returns:
        ``{model, version, evidence}``; ``evidence`` is the id of the evidence.

    Raises:
        RegistryError: there is no such run, it is unfinished, or it is not a training run of breakhis.
        DataError: no training set declares the model.
        Refused: its tags or metrics are not of the kind that a training logs, its tags name another training set than
            its dataset belongs to, its metrics are not those of its predictions, or these not those of its network.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    client = connect(settings)
    run = find_training_run(run_id, settings)
    tags = run.data.tags
    check_tags(f"run {run_id}", tags)
    model = f"{tags['breakhis.set']}-{tags['breakhis.task']}"
    find_training_set(model, settings)  # a set without a YAML file has no policy to judge its model by
    check_training_set(run_id, tags, store)
    earlier = client.search_model_versions(f"name='{model}' and run_id='{run_id}'")
    if earlier:
        version = min(earlier, key=lambda v: int(v.version))
    else:
        # Not the run's own list: it still names a model that a killed training left half-written and that was deleted.
        logged = client.search_logged_models([run.info.experiment_id], filter_string=f"source_run_id = '{run_id}'")
        if len(logged) != 1:
            raise RegistryError(f"run {run_id} logged {len(logged)} models; a training run logs exactly one")
        try:
            version = mlflow.register_model(f"models:/{logged[0].model_id}", model)
        except MlflowException as error:
            raise RegistryError(f"run {run_id} cannot be registered as {model}: {error}") from None
    number = str(version.version)
    registered = RegisteredModel(model, settings)
    evidence = collect_evidence(version, store, settings, recompute=True, rescore=True)
    oid = _find_recorded(registered, int(number), evidence, store) or store.create("evidence", evidence, evidence)
    client.set_model_version_tag(model, number, "breakhis.evidence", oid)
    client.set_model_version_tag(model, number, "breakhis.weights_kind", tags["breakhis.weights_kind"])
    client.update_model_version(model, number, description=_describe(evidence))
    if registered.alias(CHAMPION) != int(number):
        registered.set_candidate(int(number))
    return {"model": model, "version": int(number), "evidence": oid}


def _find_recorded(model: RegisteredModel, number: int, evidence: Json, store: Store) -> str | None:
    """Returns the id of the version's recorded evidence if it says the same; None if it says otherwise, or is none.

    Reviews and champions name the evidence by its id. So it keeps it, also where an earlier release recorded less.
    """
    recorded = model.find_version(number).tags.get("breakhis.evidence")
    if recorded and store.exists(recorded) and not list_changes(read_verified_object(recorded, store), evidence):
        return str(recorded)
    return None


def _describe(evidence: Json) -> str:
    """Returns the version's description: the model card, made of the evidence and not of the run's own text."""
    facts = {
        **evidence,
        "weights_kind": evidence["weights"]["kind"],
        "sources": {name: {"version": version} for name, version in evidence["sources"].items()},
        "split_group": evidence.get("split_group", "case"),
    }
    return render_model_card({"intervals": {}, "interval_notes": {}, **evidence}, facts)
