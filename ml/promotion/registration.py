"""Registration: a finished training run becomes a candidate version, with its evidence."""

from ml.core.errors import RegistryError
from ml.core.mlflow_client import connect
from ml.core.settings import Settings
from ml.core.store import Json, Store
from ml.data.training_sets import find_training_set
from ml.promotion.evidence import check_training_set, collect_evidence
from ml.registry.registered_model import CHAMPION, RegisteredModel, find_training_run


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
    run = find_training_run(run_id, settings)
    tags = run.data.tags
    model = f"{tags['breakhis.set']}-{tags['breakhis.task']}"
    find_training_set(model, settings)  # a set that no YAML declares has no policy, so its model could never be judged
    check_training_set(run_id, tags, store)
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
    registered = RegisteredModel(model, settings)
    if registered.alias(CHAMPION) != int(number):
        registered.set_candidate(int(number))
    return {"model": model, "version": int(number), "evidence": oid}
