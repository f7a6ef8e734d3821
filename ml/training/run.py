"""Training one model and logging it to MLflow, as one run with metrics, plots and the model."""

import hashlib
import json
import platform
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

import ml
from ml.core.devices import describe_devices
from ml.core.errors import StoreError
from ml.core.hashes import digest, hash_file
from ml.core.mlflow_client import connect, find_outage, use_experiment
from ml.core.progress import say
from ml.core.settings import Settings
from ml.core.store import Json, Store
from ml.core.taxonomy import SIDES, Task
from ml.data.splits import read_split
from ml.evaluation.evaluation import Evaluation, evaluate
from ml.evaluation.metric_names import group_metrics, with_interval_ends
from ml.evaluation.predictions import save_predictions
from ml.evaluation.report import write_evaluation
from ml.images.pixel_cache import PixelCache
from ml.registry.packaging import log_classifier
from ml.training.checkpoints import Checkpoint, remove_abandoned, wait_for_concurrent_training
from ml.training.networks import build_classifier
from ml.training.presets import Preset
from ml.training.procedure import (
    OUT_OF_FOLD,
    VALIDATION,
    TrainedModel,
    TrainingData,
    collect_scores,
    fit_and_calibrate,
    prepare_training_data,
)
from ml.training.run_note import RANDOM_WEIGHTS, write_run_note

if TYPE_CHECKING:
    import keras
    import pandas as pd
    from mlflow.tracking import MlflowClient

_PREFIXES = {"test": "test", OUT_OF_FOLD: "oof", VALIDATION: "validation"}
"""Evaluation -> the prefix of its metrics in MLflow."""

_NOTE = "mlflow.note.content"
"""Tag whose text MLflow shows as a run's description."""

_MAX_METRICS = 1000
"""Metrics that MLflow takes in one batch. A training set of many sources has more."""


def train(
    task: Task,
    *,
    dataset: str,
    split: str,
    preset: Preset,
    seed: int,
    store: Store,
    settings: Settings,
    weights_id: str | None = None,
) -> Json:
    """Train one model and log it (the ``train`` stage). The test side is scored once, after the selection.

    A training that was killed resumes where it was, in the same MLflow run, and gives the same result. If another
    process works on the same training, this one waits for its end. A training of the same inputs that finished is not
    repeated: its run is the result, until somebody deletes it in MLflow.

    Args:
        task: the model's task.
        dataset: the dataset's id.
        split: the id of a split of that dataset.
        preset: holds the task's recipe.
        seed: seed of initial weights, order, views and dropout.
        store: the store that holds dataset, split, caches and checkpoints.
        settings: weights, backend, workers, MLflow, and whether a GPU is required.
        weights_id: weights in the store, instead of those that the settings name.

    Returns:
        ``{run_id, experiment_id, task, set, metrics, inputs, reused}``; metrics are named ``test_<metric>``, inputs are
        ids, preset and seed, and ``reused`` says that a finished run of them was found and nothing was trained.

    Raises:
        DataError: the training images lack a class, or no parameters can be selected.
        ConfigError: the loss or the outputs become infinite or NaN.
        NoGpuError: the settings ask for a GPU and there is none.
        DeviceError: memory does not suffice.
        TryAgain: another process has started the same training at the same moment.
    """
    with prepare_training_data(task, dataset, read_split(split, store), preset, store, settings, weights_id) as data:
        job = digest([data.inputs_digest, split, preset.bootstrap_draws, seed])
        name, experiment = f"{task} {preset.name} seed {seed}", store.meta(dataset)["set"]
        ids = {"dataset": dataset, "split": split, "ledger": store.meta(split)["ledger"], "weights": data.weights.id}
        inputs = {**ids, "preset": preset.name, "seed": seed}
        left = wait_for_concurrent_training(store, job)
        if finished := _finished(job, experiment, settings):
            return {**finished, "task": task, "set": experiment, "inputs": inputs, "reused": True}
        remove_abandoned(store)
        checkpoint = Checkpoint(store, job, left)
        with checkpoint.alive():
            with _mlflow_run(checkpoint, job, name, experiment, settings) as (run_id, experiment_id):
                _log_origin(run_id, settings)
                facts = _log_inputs(task, dataset, split, preset, seed, job, store, data)
                trained = fit_and_calibrate(task, preset.recipe(task), seed, data, checkpoint, store)
                metrics, test = _evaluate_and_log(task, preset, trained, data, run_id, facts, store)
                note = write_run_note(
                    facts,
                    test.metrics,
                    test.intervals,
                    run_id=run_id,
                    experiment_id=experiment_id,
                    pretrained=data.weights.pretrained,
                    settings=settings,
                )
                connect(settings).set_tag(run_id, _NOTE, note)
            checkpoint.forget()
    run = {"run_id": run_id, "experiment_id": experiment_id, "metrics": metrics}
    return {**run, "task": task, "set": experiment, "inputs": inputs, "reused": False}


def _finished(job: str, experiment: str, settings: Settings) -> Json | None:
    """Returns the latest finished run of a training, as ``{run_id, experiment_id, metrics}``, or None."""
    client = connect(settings)
    known = client.get_experiment_by_name(experiment)
    runs = client.search_runs(
        [known.experiment_id] if known else [],
        f"tags.`breakhis.job` = '{job}' and attributes.status = 'FINISHED'",
        order_by=["attributes.end_time DESC"],
        max_results=1,
    )
    for run in runs:
        say(f"nothing to train: these very inputs were trained to the end in MLflow run {run.info.run_id}")
        ids = {"run_id": run.info.run_id, "experiment_id": run.info.experiment_id}
        return {**ids, "metrics": _select_test_metrics(run.data.metrics)}
    return None


def _select_test_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """Returns the metrics of the test side without the ends of their intervals, which MLflow has beside them."""
    ends = ("_low", "_high")
    return {name: value for name, value in metrics.items() if name.startswith("test_") and not name.endswith(ends)}


@contextmanager
def _mlflow_run(
    checkpoint: Checkpoint, job: str, name: str, experiment: str, settings: Settings
) -> Iterator[tuple[str, str]]:
    """Open the MLflow run of a training: the run in which it was interrupted, or a new one if that was deleted.

    Yields:
        the ids of the run and of its experiment.
    """
    client, experiment_id = connect(settings), use_experiment(experiment, settings)
    import mlflow

    interrupted = _existing_run(checkpoint.run_id, experiment_id, client) or _unrecorded_run(job, experiment_id, client)
    tags = {"breakhis.job": job}
    with mlflow.start_run(run_id=interrupted) if interrupted else mlflow.start_run(run_name=name, tags=tags) as run:
        run_id = str(run.info.run_id)
        if interrupted != checkpoint.run_id or not interrupted:
            checkpoint.record_run(run_id)
        for model in client.search_logged_models([experiment_id], filter_string=f"source_run_id = '{run_id}'"):
            client.delete_logged_model(model.model_id)  # complete or not: the run must have exactly one
        resumed = f"resuming{checkpoint.progress} in " if interrupted or checkpoint.progress else ""
        say(f"{resumed}MLflow run {run_id} of experiment {experiment}")
        yield run_id, experiment_id


def _existing_run(run_id: str | None, experiment_id: str, client: "MlflowClient") -> str | None:
    """Returns ``run_id`` if the experiment has such a run, otherwise None."""
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # otherwise the run was started in another MLflow
            raise find_outage(error) or error from None
        return None
    is_usable = run.info.lifecycle_stage == "active" and run.info.experiment_id == experiment_id
    return run_id if is_usable else None


def _unrecorded_run(job: str, experiment_id: str, client: "MlflowClient") -> str | None:
    """Returns the run of a training that was killed before its checkpoint recorded the run, or None."""
    running = client.search_runs(
        [experiment_id], f"tags.`breakhis.job` = '{job}' and attributes.status = 'RUNNING'", max_results=1
    )
    return str(running[0].info.run_id) if running else None


def _log_origin(run_id: str, settings: Settings) -> None:
    """Tag the MLflow run with the run of the DAG that trains it: the person who started that cannot approve the model.

    A training that a second DAG run resumed has both in its tag.
    """
    if not settings.dag_run:
        return
    client = connect(settings)
    known = json.loads(client.get_run(run_id).data.tags.get("breakhis.dag_runs", "[]"))
    own = [settings.dag, settings.dag_run]
    if own not in known:
        client.set_tag(run_id, "breakhis.dag_runs", json.dumps([*known, own]))


def _log_inputs(
    task: Task, dataset: str, split: str, preset: Preset, seed: int, job: str, store: Store, data: TrainingData
) -> Json:
    """Tag the run with its inputs and log the recipe and the data.

    Returns:
        the same facts, for the report.
    """
    import mlflow

    split_meta, weights, recipe = store.meta(split), data.weights, preset.recipe(task)
    tags = {
        "job": job,
        "set": store.meta(dataset)["set"],
        "task": task,
        "dataset": dataset,
        "split": split,
        "ledger": split_meta["ledger"],
        "split_method": split_meta["method"],
        "split_group": split_meta.get("group", "case"),  # older splits have no group: they are by case
        "preset": preset.name,
        "seed": str(seed),
        "weights": weights.id,
        "weights_kind": weights.kind,
        "weights_sha256": store.meta(weights.id)["sha256"],
        **_code_facts(),
        "hardware": describe_devices(),
    }
    mlflow.set_tags({f"breakhis.{name}": value for name, value in tags.items()})
    if not weights.pretrained:
        mlflow.set_tag(_NOTE, RANDOM_WEIGHTS)  # a run that fails has this much of its note
    # MLflow returns a tuple as another string than a list, and a parameter that changes is an error.
    resolved = json.loads(recipe.model_dump_json())
    flat = {"bootstrap_draws": preset.bootstrap_draws, "seed": seed, "weights": weights.kind, **_flatten(resolved)}
    counts = {f"{side}_{what}": split_meta[side][what] for side in SIDES for what in ("images", "cases")}
    mlflow.log_params({**flat, **counts})
    mlflow.log_dict(preset.model_dump(mode="json"), "preset.json")
    for side in SIDES:
        _log_data(data.rows.iloc[data.rows_by_side[side]], dataset, side, store)
    sources = {name: store.meta(version) for name, version in store.meta(dataset)["sources"].items()}
    return {
        **tags,
        "recipe": resolved,
        "description": preset.description,
        "sources": {name: {"version": store.meta(dataset)["sources"][name], **meta} for name, meta in sources.items()},
        "sides": {side: {what: split_meta[side][what] for what in ("images", "cases")} for side in SIDES},
    }


def _flatten(values: Json, prefix: str = "") -> Json:
    flat: Json = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _log_data(rows: "pd.DataFrame", dataset: str, side: str, store: Store) -> None:
    """Log the images of a side as an input dataset of the run."""
    import mlflow
    from mlflow.data.code_dataset_source import CodeDatasetSource

    table = rows[["path", "pixel_sha256", "patient", "slide", "subtype", "label", "magnification", "source"]]
    # MLflow cannot load this source: the pictures lie in the store, under the hashes in this table.
    source = CodeDatasetSource({"store": store.uri(f"{store.object_key(dataset)}/dataset.parquet")})
    with warnings.catch_warnings():
        # MLflow's own code makes pandas warn of coming changes, and warns that whole numbers cannot be missing.
        warnings.simplefilter("ignore")
        data = mlflow.data.from_pandas(table, source=source, name=f"{dataset}, {side}", targets="subtype")
        mlflow.log_input(data, context={"train": "training", "test": "testing"}.get(side, side))


def _code_facts() -> dict[str, str]:
    """Returns the version of this code, the hash of its files, and that of the lock file if it is there."""
    package = Path(ml.__file__).parent
    hasher = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        hasher.update(file.relative_to(package).as_posix().encode())
        hasher.update(file.read_bytes())
    code = {"version": metadata.version("breakhis"), "code_sha256": hasher.hexdigest()}
    lock = package.parent / "uv.lock"
    if lock.is_file():
        code["lock_sha256"] = hash_file(lock)
    return {**code, "python": platform.python_version()}


def _evaluate_and_log(
    task: Task, preset: Preset, trained: TrainedModel, data: TrainingData, run_id: str, facts: Json, store: Store
) -> tuple[dict[str, float], Evaluation]:
    """Score the test side once, log evaluation, model and metrics.

    Returns:
        the metrics of the test side by their names in MLflow, and the evaluation of that side.
    """
    import mlflow

    selected, on_test, scores = trained.selected, data.rows_by_side["test"], collect_scores(task, trained, data)
    evaluations = {name: evaluate(predictions, draws=preset.bootstrap_draws) for name, predictions in scores.items()}
    chosen = {
        "epochs": selected.epochs,
        "tau": selected.tau,
        "temperature": selected.temperature,
        "bias": list(selected.bias),
    }
    facts = {**facts, "run_id": run_id, "chosen": {**chosen, **selected.rule.to_json()}, "held_out": trained.held_out}
    backbone = trained.backbone()
    network = build_classifier(backbone, trained.head, bias=selected.bias, temperature=selected.temperature)
    pixels = PixelCache(store)
    _check_network(network, data.rows.iloc[on_test], scores["test"].probabilities, pixels)
    with tempfile.TemporaryDirectory(prefix="breakhis-") as scratch:
        folder = Path(scratch) / "evaluation"
        folder.mkdir()
        held_out = trained.held_out
        write_evaluation(
            folder,
            (scores["test"], evaluations["test"]),
            (scores[held_out], evaluations[held_out]),
            trained.history,
            facts,
            pixels.read,
            (backbone, trained.head),
        )
        for name, predictions in scores.items():
            save_predictions(folder / f"{name}_predictions.parquet", predictions)
        mlflow.log_artifacts(scratch)
    example = store.blob(data.rows.iloc[on_test[0]]["sha256"])
    log_classifier(network, task, selected.rule, run_id, example, {"preset": preset.name, **chosen})
    metrics = {
        f"{_PREFIXES[name]}_{metric}": value
        for name, e in evaluations.items()
        for metric, value in with_interval_ends(e.metrics, e.intervals)
    }
    metrics |= {f"chosen_{name}": float(chosen[name]) for name in ("epochs", "tau", "temperature")}  # type: ignore[arg-type]
    grouped = {
        metric: value
        for name, e in evaluations.items()
        for metric, value in group_metrics(_PREFIXES[name], e.to_json()).items()
    }
    _log_metrics(run_id, {**metrics, **grouped}, trained.history)
    shown = ", ".join(f"{name} {value:.3f}" for name, value in evaluations["test"].metrics.items())
    say(f"test: {shown}")
    return _select_test_metrics(metrics), evaluations["test"]


def _log_metrics(run_id: str, metrics: dict[str, float], history: dict[str, list[float]]) -> None:
    """Log the curves, one point an epoch, and the final metrics: each once, however often this is called."""
    import mlflow
    from mlflow.entities import Metric

    client, now = mlflow.tracking.MlflowClient(), int(time.time() * 1000)
    logged = client.get_run(run_id).data.metrics
    steps = {name: {m.step for m in client.get_metric_history(run_id, name)} for name in history if name in logged}
    points = [
        Metric(name, value, now, epoch)
        for name, values in history.items()
        for epoch, value in enumerate(values, start=1)
        if epoch not in steps.get(name, ())
    ]
    client.log_batch(run_id, metrics=points)
    # By MLflow's fluent API, which links them to the logged model as well.
    new = [(name, value) for name, value in metrics.items() if name not in logged]
    for start in range(0, len(new), _MAX_METRICS):
        mlflow.log_metrics(dict(new[start : start + _MAX_METRICS]))


def _check_network(
    network: "keras.Model", rows: "pd.DataFrame", scores: NDArray[np.float64], pixels: PixelCache
) -> None:
    """Check on a few pictures that the network to be logged gives the probabilities that were scored.

    Raises:
        StoreError: it does not, so the cached features are not those of the pictures.
    """
    sample = rows.iloc[:8]
    pictures = pixels.read(sample["pixel_sha256"].tolist())
    output = np.asarray(network(pictures.astype(np.float32), training=False), dtype=np.float64)
    expected = scores[: len(sample)].reshape(output.shape)
    if not np.allclose(output, expected, atol=1e-3):
        worst = float(np.abs(output - expected).max())
        raise StoreError(
            f"the probabilities of the whole network differ by {worst:.4f} from those of its head on cached features; "
            "remove the folders under objects/caches of the store and train again"
        )
