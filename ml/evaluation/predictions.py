"""Writing a run's predictions, and checking that its figures follow from them.

Anybody who may log to MLflow could have written the figures of a run. So the predictions of the test side are checked
against the split, and the figures are computed again from the predictions.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import numpy as np

from ml.core.errors import Refused
from ml.core.messages import cut_text, quote_value
from ml.core.parquet_files import read_parquet
from ml.core.store import Json, Store
from ml.core.taxonomy import LABELS, Task, class_names, label_of
from ml.data.splits import look_up_sides, read_split
from ml.data.training_sets import read_dataset
from ml.evaluation.decision_rule import DecisionRule
from ml.evaluation.draws import MAX_DRAWS
from ml.evaluation.evaluation import count_confusion, evaluate
from ml.evaluation.scores import LabelledPredictions, Probabilities

if TYPE_CHECKING:
    import pandas as pd

_FACTS = ["patient", "slide", "subtype", "label", "magnification", "source"]
_COMPUTED = ("metrics", "intervals", "interval_notes", "per_class", "absent_classes", "slices")
_MAX_THRESHOLD = math.nextafter(1.0, 2.0)  # under which no image is labelled malignant


def save_predictions(file: Path, predictions: LabelledPredictions) -> None:
    """Write predictions to a Parquet file, one row an image.

    The columns are the image's hash and facts, its probability ``p_<class>`` of each class (of the binary model only
    ``p_malignant``), and its predicted class ``called``.
    """
    table = predictions.rows[["pixel_sha256", *_FACTS]].copy()
    if predictions.task == "binary":
        table["p_malignant"] = predictions.probabilities
    else:
        for k, name in enumerate(class_names(predictions.task)):
            table[f"p_{name}"] = predictions.probabilities[:, k]
    table["called"] = [class_names(predictions.task)[k] for k in predictions.predicted]
    table.to_parquet(file, index=False)


def check_predictions(folder: Path, evaluation: Json, task: Task, dataset: str, split: str, store: Store) -> Json:
    """Check a run's predictions against its split, and its figures against its predictions.

    Args:
        folder: the run's folder ``evaluation``.
        evaluation: of the test side, as :meth:`ml.evaluation.evaluation.Evaluation.to_json` returns it.
        task: the task, which names the classes.
        dataset: id of the dataset that the run was trained on.
        split: id of its split.
        store: holds both.

    Returns:
        ``{images, cases}``: the confusion matrix of each on the test side, as lists; rows are true classes, columns
        predicted ones.

    Raises:
        Refused: the predictions are not of exactly the images of the test side with their true labels, the figures are
            not those of the predictions, or out-of-fold or validation predictions are of images outside the sides train
            and validation.
    """
    rows = read_dataset(dataset, store)
    sides = look_up_sides(rows, read_split(split, store))
    test = read_predictions(folder / "test_predictions.parquet")
    expected, predicted = set(rows["pixel_sha256"][sides == "test"]), set(test["pixel_sha256"])
    if predicted != expected or len(test) != len(predicted):
        raise Refused(
            f"test_predictions.parquet does not hold exactly the images of the test side of {split}: "
            f"{len(expected - predicted)} images are missing, and {len(test) - len(predicted & expected)} rows are of "
            "other images or duplicates; train the model again"
        )
    predictions = _label_predictions(test, rows, task, _read_rule(evaluation, task))
    if [class_names(task)[k] for k in predictions.predicted] != test["called"].tolist():
        raise Refused(
            "test_predictions.parquet: the labels in the column called do not follow from the probabilities and the "
            "decision rule in metrics.json; train the model again"
        )
    draws = evaluation.get("draws", 0)
    if not isinstance(draws, int) or not 0 <= draws <= MAX_DRAWS:
        raise Refused(f"metrics.json: draws is {quote_value(draws)}; it must be between 0 and {MAX_DRAWS}")
    recomputed = evaluate(predictions, draws=draws).to_json()
    cases = predictions.cases
    confusions = {
        "images": recomputed["confusion"],
        "cases": count_confusion(task, cases.truth, cases.predicted).tolist(),
    }
    for key in _COMPUTED:
        if differing := list(
            _find_differences(evaluation.get(key, {} if key != "absent_classes" else []), recomputed[key], key)
        ):
            raise Refused(f"metrics.json does not follow from test_predictions.parquet: {'; '.join(differing[:3])}")
    for held_out in ("out_of_fold", "validation"):
        if (file := folder / f"{held_out}_predictions.parquet").is_file():
            table = read_predictions(file)
            allowed = set(rows["pixel_sha256"][np.isin(sides, ["train", "validation"])])
            others = set(table["pixel_sha256"]) - allowed
            if others or table["pixel_sha256"].duplicated().any():
                raise Refused(
                    f"{file.name}: {len(others)} images are not on the sides train and validation of {split}, or some "
                    "images have two rows; train the model again"
                )
            _label_predictions(table, rows, task, DecisionRule(threshold=0.5) if task == "binary" else DecisionRule())
    return confusions


def read_predictions(file: Path) -> "pd.DataFrame":
    """Returns the predictions that a run logged, one row per image; see :func:`save_predictions`.

    Raises:
        Refused: the file cannot be read, or lacks a column.
    """
    try:
        table = read_parquet(file)
    except (OSError, ValueError) as error:
        raise Refused(f"the run's evaluation/{file.name} cannot be read: {cut_text(error)}") from None
    lacking = [column for column in ("pixel_sha256", *_FACTS, "called") if column not in table]
    if lacking:
        raise Refused(f"{file.name} has no column {', '.join(lacking)}")
    return table


def _read_rule(evaluation: Json, task: Task) -> DecisionRule:
    rules = evaluation.get("rules")
    if not isinstance(rules, list) or len(rules) != 1:
        raise Refused("metrics.json does not name exactly one decision rule of the test side; train the model again")
    return parse_rule(rules[0], task, "metrics.json")


def parse_rule(facts: object, task: Task, where: str) -> DecisionRule:
    """Returns the decision rule that a run logged as JSON.

    Args:
        facts: the JSON; keys other than those of the rule are ignored.
        task: the task: a binary model has a threshold, a subtype model may have offsets.
        where: the file, for the error.

    Raises:
        Refused: it is no rule of the task.
    """
    found = facts if isinstance(facts, dict) else {}
    threshold, offsets = found.get("threshold"), found.get("offsets")
    if task == "binary":
        is_rule = offsets is None and _is_number(threshold) and 0 <= threshold <= _MAX_THRESHOLD
    else:
        count = len(class_names(task))
        is_list = isinstance(offsets, list) and len(offsets) == count and all(map(_is_number, offsets))
        is_rule = threshold is None and (offsets is None or is_list)
    if not is_rule:
        raise Refused(f"{where}: holds no decision rule of a {task} model; train the model again")
    return DecisionRule.from_json(found)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _label_predictions(
    table: "pd.DataFrame", rows: "pd.DataFrame", task: Task, rule: DecisionRule
) -> LabelledPredictions:
    """Returns the predictions of a table with the true classes of the dataset.

    Raises:
        Refused: the table has other facts of an image than the dataset, or no valid probabilities.
    """
    known = rows.drop_duplicates("pixel_sha256").set_index("pixel_sha256").loc[table["pixel_sha256"]].reset_index()
    for column in _FACTS:
        differ = known[column].astype(str).to_numpy() != table[column].astype(str).to_numpy()
        if differ.any():
            pixels = table["pixel_sha256"][differ].iloc[0]
            raise Refused(f"predictions have another {column} than the dataset, such as of the image {pixels}")
    if task == "binary":
        truth = np.array([LABELS.index(label_of(name)) for name in known["subtype"]], dtype=np.int64)
    else:
        truth = np.array([class_names(task).index(name) for name in known["subtype"]], dtype=np.int64)
    return LabelledPredictions(task, known, truth, _read_probabilities(table, task), rule)


def _read_probabilities(table: "pd.DataFrame", task: Task) -> Probabilities:
    columns = ["p_malignant"] if task == "binary" else [f"p_{name}" for name in class_names(task)]
    lacking = [column for column in columns if column not in table]
    if lacking:
        raise Refused(f"predictions have no column {', '.join(lacking)}")
    values = table[columns].to_numpy(dtype=float)
    sums_to_one = task == "binary" or np.allclose(values.sum(axis=1), 1, atol=1e-3)
    if not sums_to_one or not ((values >= 0) & (values <= 1)).all():
        raise Refused("predictions hold numbers that are no probabilities")
    return values[:, 0] if task == "binary" else values


def _find_differences(recorded: object, recomputed: object, where: str) -> Iterator[str]:
    """Yields where recorded figures differ from recomputed ones; ``where`` is the path of the value in the JSON."""
    if isinstance(recorded, dict) and isinstance(recomputed, dict):
        for key in sorted({*recorded, *recomputed}):
            yield from _find_differences(recorded.get(key), recomputed.get(key), f"{where}.{key}")
    elif (
        isinstance(recorded, list | tuple) and isinstance(recomputed, list | tuple) and len(recorded) == len(recomputed)
    ):
        for k, (value, other) in enumerate(zip(recorded, recomputed, strict=True)):
            yield from _find_differences(value, other, f"{where}[{k}]")
    elif isinstance(recorded, int | float) and isinstance(recomputed, int | float) and not isinstance(recorded, bool):
        if not math.isclose(recorded, recomputed, rel_tol=1e-6, abs_tol=1e-9):
            yield f"{where} is {recorded}, computed again {recomputed}"
    elif recorded != recomputed:
        yield f"{where} is {recorded}, computed again {recomputed}"
