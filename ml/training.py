"""Training: a head on cached features, logged to MLflow as one run with metrics, pictures and a model."""

import hashlib
import json
import platform
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

import ml
from ml.checkpoints import Checkpoint, sweep, wait_for_others
from ml.devices import name_exhaustion, quiet_tensorflow, require_gpu
from ml.errors import DataError, StoreError
from ml.evaluation import (
    Evaluation,
    check_both_classes,
    evaluate,
    plot_confusion,
    plot_history,
    plot_roc,
    youden_threshold,
)
from ml.features import Features, read_features
from ml.imaging import SIZE
from ml.models import Weights, build_head, join, load_backbone
from ml.pixels import PixelCache
from ml.presets import Preset
from ml.progress import say
from ml.settings import Settings
from ml.splits import read_split, sides_of
from ml.store import Json, Store, digest
from ml.taxonomy import SIDES, Task, classes
from ml.tracking import connect
from ml.training_sets import read_dataset

if TYPE_CHECKING:
    import keras
    import pandas as pd
    import tensorflow as tf
    from mlflow.tracking import MlflowClient


class Prepared(NamedTuple):
    """What a training starts from."""

    rows: "pd.DataFrame"
    truth: NDArray[np.int64]
    """(images,) class numbers."""
    on: dict[str, NDArray[np.int64]]
    """Side -> rows on it."""
    features: Features
    weights: Weights


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
    """Train one model and log it (the ``train`` stage). The test side is scored once, with what was chosen before.

    A training that was killed goes on where it was, in the same MLflow run, and comes to the same result. Where another
    process is at the same training, its end is waited for. What was trained to its end from the same inputs is not
    trained again: its run is the result, until somebody deletes it in MLflow.

    Returns:
        ``{run_id, task, set, metrics, reused}``; metrics are named ``test_<metric>``, and ``reused`` says that nothing
        had to be trained.

    Raises:
        DataError: a class is missing on the training side, or validation cannot give a threshold.
        NoGpuError: the settings ask for a GPU and there is none.
        DeviceError: memory does not suffice.
        TryAgain: another process has begun the same training at the same moment.
    """
    if settings.gpu_required:
        require_gpu()
    data = _prepare(task, dataset, split, preset, store, settings, weights_id)

    quiet_tensorflow()
    import tensorflow as tf

    # Without it sums are added up in whatever order threads finish, and a seed gives another model each time.
    tf.config.experimental.enable_op_determinism()
    name, experiment = f"{task} {preset.name} seed {seed}", store.meta(dataset)["set"]
    job = _job(task, dataset, split, preset, seed, data)
    wait_for_others(store, job)
    if finished := _finished(job, experiment, settings):
        return {**finished, "task": task, "set": experiment, "reused": True}
    sweep(store)
    checkpoint = Checkpoint(store, job)
    with checkpoint.alive():
        with _mlflow_run(checkpoint, name, experiment, preset.epochs, settings) as run_id:
            _log_inputs(job, task, dataset, split, preset, seed, store, data.weights)
            advice = f"the head trains on {preset.batch_size} images a step; lower batch_size in the preset"
            with name_exhaustion(advice):
                head, history = _fit(task, preset, seed, data, checkpoint)
            metrics = _evaluate_and_log(task, head, history, data, run_id, store)
        checkpoint.forget()
    return {"run_id": run_id, "task": task, "set": experiment, "metrics": metrics, "reused": False}


def _finished(job: str, experiment: str, settings: Settings) -> Json | None:
    """The latest run in which a training was brought to its end, if there is one: ``{run_id, metrics}``."""
    client = connect(settings)
    found = client.get_experiment_by_name(experiment)
    runs = client.search_runs(
        [found.experiment_id] if found else [],
        f"tags.`breakhis.job` = '{job}' and attributes.status = 'FINISHED'",
        order_by=["attributes.end_time DESC"],
        max_results=1,
    )
    for run in runs:
        say(f"nothing to train: these very inputs were trained to the end in MLflow run {run.info.run_id}")
        return {"run_id": run.info.run_id, "metrics": _of_test(run.data.metrics)}
    return None


def _of_test(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name.startswith("test_")}


def _job(task: Task, dataset: str, split: str, preset: Preset, seed: int, data: Prepared) -> str:
    """A name for all that a training's result depends on: 64 hex."""
    # The features themselves stand for backend, device and view: those computed anew may differ in their last bits.
    features = hashlib.sha256(np.ascontiguousarray(data.features).data).hexdigest()
    return digest([task, dataset, split, preset.model_dump(exclude={"description"}), seed, data.weights.id, features])


def _prepare(
    task: Task, dataset: str, split: str, preset: Preset, store: Store, settings: Settings, weights_id: str | None
) -> Prepared:
    rows = read_dataset(dataset, store)
    sides = sides_of(rows, read_split(split, store))
    truth = _truth(task, rows)
    on = {side: np.flatnonzero(sides == side) for side in SIDES}
    for side, indices in on.items():
        if not len(indices):
            raise DataError(f"{dataset} under {split}: no image on the {side} side; the set needs more cases")
    if task == "binary":
        check_both_classes(truth[on["validation"]])  # before minutes of training, rather than after
    missing = [name for k, name in enumerate(classes(task)) if not (truth[on["train"]] == k).any()]
    if missing:
        raise DataError(f"{dataset} under {split}: no training image of {', '.join(missing)}; it cannot be learnt")
    features, weights = read_features(dataset, preset, store, settings, weights_id=weights_id)
    return Prepared(rows, truth, on, features, weights)


@contextmanager
def _mlflow_run(checkpoint: Checkpoint, name: str, experiment: str, epochs: int, settings: Settings) -> Iterator[str]:
    """The MLflow run of a training: the one that it was left in, or a new one if that was deleted."""
    client = connect(settings)
    import mlflow

    experiment_id = mlflow.set_experiment(experiment).experiment_id
    left = _left_run(checkpoint.run_id, experiment_id, client)
    with mlflow.start_run(run_id=left) if left else mlflow.start_run(run_name=name) as run:
        run_id = str(run.info.run_id)
        if not left:
            checkpoint.begin(run_id)
        for model in client.search_logged_models([experiment_id], filter_string=f"source_run_id = '{run_id}'"):
            client.delete_logged_model(model.model_id)  # whole or not; the run is to have exactly one
        resumed = f"resuming after epoch {checkpoint.epoch} of {epochs} in " if left or checkpoint.epoch else ""
        say(f"{resumed}MLflow run {run_id} of experiment {experiment}")
        yield run_id


def _left_run(run_id: str | None, experiment_id: str, client: "MlflowClient") -> str | None:
    """``run_id``, if there is such a run in the experiment."""
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # begun in another MLflow than this
            raise
        return None
    there = run.info.lifecycle_stage == "active" and run.info.experiment_id == experiment_id
    return run_id if there else None


def _log_inputs(
    job: str, task: Task, dataset: str, split: str, preset: Preset, seed: int, store: Store, weights: Weights
) -> None:
    import mlflow

    split_meta = store.meta(split)
    mlflow.set_tags(
        {
            "breakhis.job": job,
            "breakhis.set": store.meta(dataset)["set"],
            "breakhis.task": task,
            "breakhis.dataset": dataset,
            "breakhis.split": split,
            "breakhis.ledger": split_meta["ledger"],
            "breakhis.split_method": split_meta["method"],
            "breakhis.split_group": split_meta.get("group", "case"),  # without it: from before there was a choice
            "breakhis.preset": preset.name,
            "breakhis.seed": str(seed),
            "breakhis.weights": weights.id,
            "breakhis.weights_kind": weights.kind,
        }
    )
    if not weights.pretrained:
        mlflow.set_tag("mlflow.note.content", "**Random backbone weights**: not fit for any use but trying things.")
    mlflow.log_params({**preset.model_dump(exclude={"description"}), "seed": seed, "weights": weights.kind})
    mlflow.log_params({f"{side}_{what}": split_meta[side][what] for side in SIDES for what in ("images", "cases")})


def _evaluate_and_log(
    task: Task,
    head: "keras.Model",
    history: dict[str, list[float]],
    data: Prepared,
    run_id: str,
    store: Store,
) -> dict[str, float]:
    """Score validation and test, and log all there is to know; returns the metrics of the test side."""
    import mlflow

    rows, truth, on = data.rows, data.truth, data.on
    scores = {side: _predict(head, data.features[on[side]]) for side in ("validation", "test")}
    threshold = youden_threshold(truth[on["validation"]], scores["validation"]) if task == "binary" else None
    evaluations = {side: evaluate(task, truth[on[side]], scores[side], threshold) for side in scores}
    metrics = {f"{side}_{name}": value for side, e in evaluations.items() for name, value in e.metrics.items()}
    with tempfile.TemporaryDirectory(prefix="breakhis-") as scratch:
        folder = Path(scratch)
        _draw(folder / "evaluation", evaluations["test"], truth[on["test"]], scores["test"], history)
        _save_predictions(folder / "evaluation", rows.iloc[on["test"]], task, scores["test"])
        mlflow.log_artifacts(str(folder))
        network = join(load_backbone(data.weights.id, store), head)
        _check_network(network, rows.iloc[on["test"]], scores["test"], store)
        _log_model(network, task, threshold, run_id)
    _log_metrics(run_id, metrics, history)
    shown = ", ".join(f"{name} {value:.3f}" for name, value in evaluations["test"].metrics.items())
    say(f"test: {shown}")
    return _of_test(metrics)


def _log_metrics(run_id: str, metrics: dict[str, float], history: dict[str, list[float]]) -> None:
    """Log the curves, one point an epoch, and the final metrics: each once, however often this is tried."""
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
    # By MLflow's short way, which puts them beside the model as well.
    mlflow.log_metrics({name: value for name, value in metrics.items() if name not in logged})


def _truth(task: Task, rows: "pd.DataFrame") -> NDArray[np.int64]:
    index = {name: k for k, name in enumerate(classes(task))}
    return np.asarray(rows["label" if task == "binary" else "subtype"].map(index), dtype=np.int64)


def _fit(
    task: Task, preset: Preset, seed: int, data: Prepared, checkpoint: Checkpoint
) -> tuple["keras.Model", dict[str, list[float]]]:
    """Train the head, from where the checkpoint is.

    Order and dropout of an epoch are made of the seed and its number alone: so it does not matter in how many processes
    the epochs were done.

    Returns:
        the head, and the curves: name -> a value an epoch.
    """
    import keras

    keras.utils.set_random_seed(seed)
    train, validation = data.on["train"], data.on["validation"]
    head = _new_head(task, preset, data.features[train])
    variables = [*head.weights, *head.optimizer.variables]
    if kept := checkpoint.arrays():
        for variable, array in zip(variables, kept, strict=True):
            variable.assign(array)
    history = checkpoint.history
    drops = [layer.seed_generator.state for layer in head.layers if isinstance(layer, keras.layers.Dropout)]

    def begin(epoch: int, _: object) -> None:
        # Spread out: from [seed, epoch] Keras would count on by one a step, through the masks of the next epoch.
        for k, state in enumerate(drops):
            state.assign(np.random.SeedSequence([seed, epoch, k]).generate_state(2))

    def end(epoch: int, logs: dict[str, float]) -> None:
        done = epoch + 1
        for name, value in logs.items():
            history.setdefault(name, []).append(float(value))
        if done % max(1, preset.epochs // 5) == 0:
            shown = ", ".join(f"{name} {value:.3f}" for name, value in logs.items())
            say(f"epoch {done} of {preset.epochs}: {shown}")
        if done == preset.epochs or checkpoint.due():
            checkpoint.save(done, history, [np.asarray(variable) for variable in variables])

    left = range(checkpoint.epoch, preset.epochs)
    if left:
        head.fit(
            _batches(data.features[train], data.truth[train], preset.batch_size, seed, left),
            validation_data=(data.features[validation], data.truth[validation]),
            validation_batch_size=preset.batch_size,
            initial_epoch=left.start,
            epochs=left.stop,
            steps_per_epoch=-(-len(train) // preset.batch_size),
            class_weight=_class_weights(data.truth[train]) if preset.class_weights == "sqrt" else None,
            shuffle=False,  # the pipeline does
            callbacks=[keras.callbacks.LambdaCallback(on_epoch_begin=begin, on_epoch_end=end)],
            verbose=0,
        )
    return head, history


def _new_head(task: Task, preset: Preset, features: Features) -> "keras.Model":
    """The head, compiled, with an optimizer that has its variables already. ``features``: of the training side."""
    import keras

    head = build_head(task, dropout=preset.dropout, features=features if preset.standardize else None)
    head.compile(
        optimizer=keras.optimizers.Adam(preset.learning_rate),
        loss="binary_crossentropy" if task == "binary" else "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    head.optimizer.build(head.trainable_variables)
    return head


def _batches(features: Features, truth: NDArray[np.int64], size: int, seed: int, epochs: range) -> "tf.data.Dataset":
    """The batches of all these epochs, one epoch after the other, each in an order of its own.

    One pipeline rather than one an epoch, whose making takes longer than a small head's epoch.
    """
    import tensorflow as tf

    orders = np.stack([np.random.default_rng([seed, epoch]).permutation(len(features)) for epoch in epochs])
    with tf.device("CPU:0"):
        x, y = tf.constant(features), tf.constant(truth)
        rows = tf.data.Dataset.from_tensor_slices(orders)
        batches = rows.flat_map(lambda order: tf.data.Dataset.from_tensor_slices(order).batch(size))
        return batches.map(lambda batch: (tf.gather(x, batch), tf.gather(y, batch))).prefetch(2)


def _class_weights(truth: NDArray[np.int64]) -> dict[int, float]:
    """1/sqrt of each class's share, scaled so that the mean weight of an image is 1."""
    labels, counts = np.unique(truth, return_counts=True)
    raw = 1 / np.sqrt(counts)
    scale = len(truth) / (raw * counts).sum()
    return {int(k): float(w * scale) for k, w in zip(labels, raw, strict=True)}


def _predict(head: "keras.Model", features: Features) -> NDArray[np.float64]:
    """Probabilities, float64: (n,) of malignant or (n, 8)."""
    output = np.asarray(head(features, training=False), dtype=np.float64)
    return output[:, 0] if output.shape[1] == 1 else output


def _draw(
    folder: Path,
    evaluation: Evaluation,
    truth: NDArray[np.int64],
    probabilities: NDArray[np.float64],
    history: dict[str, list[float]],
) -> None:
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps(evaluation.to_json(), indent=1))
    plot_confusion(evaluation, folder / "confusion_matrix.png")
    plot_roc(evaluation, truth, probabilities, folder / "roc.png")
    plot_history(history, folder / "training_curve.png")


def _save_predictions(folder: Path, rows: "pd.DataFrame", task: Task, probabilities: NDArray[np.float64]) -> None:
    table = rows[["pixel_sha256", "patient", "slide", "subtype", "label", "magnification"]].copy()
    if task == "binary":
        table["p_malignant"] = probabilities
    else:
        for k, name in enumerate(classes(task)):
            table[f"p_{name}"] = probabilities[:, k]
    table.to_parquet(folder / "test_predictions.parquet", index=False)


def _check_network(network: "keras.Model", rows: "pd.DataFrame", scores: NDArray[np.float64], store: Store) -> None:
    """Make sure that the network to be logged says of pictures what was scored on cached features."""
    few = rows.iloc[:8]
    pixels = PixelCache(store)
    pixels.fill(few, workers=1)
    order = {h: i for i, h in enumerate(few["pixel_sha256"])}
    ((hashes, pictures),) = pixels.batches(list(order), size=len(few))
    output = np.asarray(network(pictures.astype(np.float32), training=False), dtype=np.float64)
    expected = scores[[order[h] for h in hashes]].reshape(output.shape)
    if not np.allclose(output, expected, atol=1e-3):
        worst = float(np.abs(output - expected).max())
        raise StoreError(f"the whole network differs by {worst:.4f} from its head on cached features; clear the caches")


def _log_model(network: "keras.Model", task: Task, threshold: float | None, run_id: str) -> None:
    from importlib import metadata

    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, Schema

    names = classes(task)
    outputs = [ColSpec("string", "label"), *(ColSpec("double", f"p_{name}") for name in names)]
    outputs += [ColSpec("double", "threshold")] if threshold is not None else []
    # Inputs are left open: a schema of MLflow's would admit paths, bytes or arrays, but not all of them.
    signature = ModelSignature(outputs=Schema([*outputs, ColSpec("string", "run_id")]))
    facts = {"task": task, "classes": names, "threshold": threshold, "run_id": run_id, "size": SIZE}
    needs = ("mlflow", "tensorflow", "keras", "numpy", "pandas", "pillow")
    with tempfile.TemporaryDirectory(prefix="breakhis-") as scratch, warnings.catch_warnings():
        # Type hints cannot say "any image"; and an example would be run through a freshly loaded model, at the price of
        # loading it.
        warnings.filterwarnings("ignore", message=".*(Add type hints|An input example was not provided)")
        folder = Path(scratch)
        network.save(folder / "network.keras")
        (folder / "facts.json").write_text(json.dumps(facts, indent=1))
        mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(ml.__file__).with_name("serving.py")),
            artifacts={"network": str(folder / "network.keras"), "facts": str(folder / "facts.json")},
            signature=signature,
            code_paths=[str(Path(ml.__file__).parent)],
            # Named, not inferred: inference loads the model in another process for a quarter of a minute.
            pip_requirements=[f"{name}=={metadata.version(name)}" for name in needs],
            metadata={"python": platform.python_version(), "breakhis": metadata.version("breakhis")},
        )
