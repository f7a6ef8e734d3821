"""Scoring the test side again with a version's network: whether the run's predictions are its model's.

Anybody who may log to MLflow can write predictions and, beside them, the metrics that follow from them. So a
registration scores the pictures of the test side itself. It takes the network of the version and no code that was
logged with it, and prepares the pictures and assigns labels by this release's code.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import yaml

from ml.core.errors import Refused, StoreError
from ml.core.hashes import hash_file
from ml.core.messages import quote_value
from ml.core.progress import say, track
from ml.core.store import Json, Store
from ml.core.taxonomy import Task, class_names
from ml.data.stored_tables import read_stored_table
from ml.evaluation.predictions import parse_rule, read_predictions
from ml.evaluation.scores import Probabilities
from ml.images.decoding import PREPROCESSING
from ml.registry.logged_code import check_logged_code
from ml.registry.network_archive import check_network_archive
from ml.registry.version_scoring import NetworkProcess, batches

if TYPE_CHECKING:
    import pandas as pd

TOLERANCE = 1e-3
"""Largest difference of a probability. Devices and releases of TensorFlow differ by less than a hundredth of it."""


def rescore_predictions(
    name: str,
    evidence: Json,
    evaluation: Json,
    evaluation_folder: Path,
    model_folder: Path,
    scratch: Path,
    store: Store,
    is_new: bool = False,
) -> Json:
    """Score the pictures of the test side with a version's network, and compare with the run's predictions.

    That the run's labels follow from its probabilities was checked before. With the same decision rule, and
    probabilities within the tolerance, a label can differ only where its probability is that close to the threshold.

    Args:
        name: of the version, for errors.
        evidence: ``task``, ``dataset``, ``run_id`` and ``model_files`` of the version.
        evaluation: content of the run's metrics.json.
        evaluation_folder: the run's evaluation, with its predictions.
        model_folder: the version's files.
        scratch: a folder to copy the network to.
        store: holds the pictures.
        is_new: whether the version is made now. Its code has to be this release's then; earlier ones had their own.

    Returns:
        ``{images, tolerance}``: how many pictures were scored, and how far probabilities may have differed. The
        differences themselves vary from machine to machine.

    Raises:
        Refused: the model is not as a training logs it, brings along other code, its network holds anything but known
            layers, it has another decision rule than the metrics, or a probability differs by more than the tolerance.
        RegistryError: the network cannot be loaded.
        StoreError: a picture is no longer in the store.
    """
    task: Task = evidence["task"]
    network, facts = (_copy_artifact(name, which, model_folder, evidence, scratch) for which in ("network", "facts"))
    _check_facts(name, facts, evidence, evaluation)
    try:
        check_network_archive(network)
        if is_new:
            check_logged_code(model_folder, evidence["model_files"])
    except Refused as error:
        raise Refused(f"{name}: {error}") from None
    table = read_predictions(evaluation_folder / "test_predictions.parquet")
    say(f"{name}: its network scores the {len(table):,} test images again")
    scored = _score(
        f"{name}: its network", network, _read_pictures(name, table, evidence["dataset"], store), len(table)
    )
    _compare(name, table, scored, task)
    return {"images": len(table), "tolerance": TOLERANCE}


def _compare(name: str, table: "pd.DataFrame", scored: Probabilities, task: Task) -> None:
    """Compare what a network gives with a run's table of predictions.

    Raises:
        Refused: a probability differs by more than the tolerance.
    """
    columns = ["p_malignant"] if task == "binary" else [f"p_{one}" for one in class_names(task)]
    recorded = table[columns].to_numpy(dtype=float)
    if scored.shape != recorded.shape or not np.isfinite(scored).all():
        raise Refused(f"{name}: its network gives no {len(columns)} finite probabilities for each picture")
    differences = np.abs(scored - recorded)
    if differences.max(initial=0.0) > TOLERANCE:
        row, column = np.unravel_index(int(differences.argmax()), differences.shape)
        count = int((differences.max(axis=1) > TOLERANCE).sum())
        raise Refused(
            f"{name}: its network does not give the predictions that its run logged: {columns[column]} of the test "
            f"image {table['pixel_sha256'].iloc[row]} is {scored[row, column]:.4f}, in test_predictions.parquet "
            f"{recorded[row, column]:.4f} ({count} of {len(table)} images differ by more than {TOLERANCE:g}); train "
            "the model again"
        )


def _copy_artifact(name: str, which: str, model_folder: Path, evidence: Json, scratch: Path) -> Path:
    """Copy the file that the model loads as ``which``, and check that the copy is the one that the evidence names.

    Raises:
        Refused: the model names no such file of its own, or it was changed in this moment.
    """
    try:
        model = yaml.safe_load((model_folder / "MLmodel").read_text(encoding="utf-8"))
        path = model["flavors"]["python_function"]["artifacts"][which]["path"]
        recorded = evidence["model_files"][path]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        raise Refused(
            f"{name}: its model has no {which} of its own, as a training logs it; only a model that 'breakhis train' "
            "has logged can be registered"
        ) from None
    copy = scratch / {"network": "network.keras", "facts": "facts.json"}[which]
    shutil.copyfile(model_folder / path, copy)
    if hash_file(copy) != recorded:
        raise Refused(f"{name}: {path} of its model was changed while it was read")
    return copy


def _check_facts(name: str, file: Path, evidence: Json, evaluation: Json) -> None:
    """Check that a model decides as its metrics say.

    Raises:
        Refused: it has another task, other classes, another decision rule, or pictures that are prepared otherwise.
    """
    try:
        facts = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise Refused(f"{name}: facts.json of its model is not JSON: {error}") from None
    task: Task = evidence["task"]
    rule = parse_rule(facts, task, f"{name}: facts.json of its model")
    expected = {
        "task": task,
        "classes": list(class_names(task)),
        "preparation": PREPROCESSING,
        "run_id": evidence["run_id"],
        **parse_rule(evaluation["rules"][0], task, "metrics.json").to_json(),
    }
    found = {**facts, **rule.to_json()}
    if wrong := [key for key, value in expected.items() if found.get(key) != value]:
        raise Refused(
            f"{name}: facts.json of its model says that {wrong[0]} is {quote_value(str(found.get(wrong[0])), 80)}; by "
            f"its run and this release it is {expected[wrong[0]]!r}. Train the model again"
        )


def _read_pictures(name: str, table: "pd.DataFrame", dataset: str, store: Store) -> Iterator[bytes]:
    """Yields the files of the pictures in a table of predictions.

    Raises:
        StoreError: a picture is no longer in the store.
    """

    files = read_stored_table(dataset, "dataset.parquet", store).drop_duplicates("pixel_sha256")
    sha256 = files.set_index("pixel_sha256")["sha256"]
    for pixels in table["pixel_sha256"]:
        try:
            yield store.blob(sha256[pixels])
        except StoreError as error:
            raise StoreError(
                f"{name}: its test images cannot be scored again: {error}. If a patient was erased, assemble and split "
                "the training set again, and train the model on that"
            ) from None


def _score(name: str, network: Path, pictures: Iterator[bytes], count: int) -> Probabilities:
    """Returns the outputs of a network for encoded pictures: (n, 1) or (n, classes).

    Raises:
        RegistryError: the network cannot be loaded.
        Refused: a picture cannot be scored, or not every picture has as many outputs.
    """
    outputs: list[list[float]] = []
    with NetworkProcess(network, name) as process:
        for batch in batches(track(pictures, total=count, what="scoring test images"), len):
            for row in process.predict(batch):
                if not isinstance(row.get("probabilities"), list):
                    raise Refused(f"{name} cannot score a test image: {row.get('error', 'it gives no probabilities')}")
                outputs.append(row["probabilities"])
    if len({len(row) for row in outputs}) > 1:
        raise Refused(f"{name} gives some pictures more outputs than others")
    return np.array(outputs, dtype=np.float64)
