"""A run's predictions as it keeps them, and whether its figures follow from them.

What a training says of itself is a file that whoever may log could have written. What it says of the test side is
therefore held against the split, and its figures are computed again from its predictions.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ml.core.errors import Refused
from ml.core.store import Json, Store
from ml.core.taxonomy import LABELS, Task, class_names, label_of
from ml.data.splits import look_up_sides, read_split
from ml.data.training_sets import read_dataset
from ml.evaluation.decision_rule import DecisionRule
from ml.evaluation.evaluation import evaluate
from ml.evaluation.scores import LabelledPredictions, Probabilities

if TYPE_CHECKING:
    import pandas as pd

_FACTS = ["patient", "slide", "subtype", "label", "magnification", "source"]
_COMPUTED = ("metrics", "intervals", "per_class", "absent_classes", "slices")
_MOST_DRAWS = 10_000


def save_predictions(file: Path, scores: LabelledPredictions) -> None:
    """Write what a model said, a row an image: its hash and facts, ``p_…`` of each class, and the label ``called``."""
    table = scores.rows[["pixel_sha256", *_FACTS]].copy()
    if scores.task == "binary":
        table["p_malignant"] = scores.probabilities
    else:
        for k, name in enumerate(class_names(scores.task)):
            table[f"p_{name}"] = scores.probabilities[:, k]
    table["called"] = [class_names(scores.task)[k] for k in scores.predicted]
    table.to_parquet(file, index=False)


def check_predictions(folder: Path, evaluation: Json, task: Task, dataset: str, split: str, store: Store) -> None:
    """Compute a run's figures again from its predictions, and hold these against the split.

    Args:
        folder: the run's ``evaluation``.
        evaluation: what is said of the test side, as of :meth:`ml.evaluation.metrics.Evaluation.to_json`.
        task: whose classes.
        dataset: that the run was trained on.
        split: likewise.
        store: has both.

    Raises:
        Refused: the predictions are not of exactly the images of the test side with the labels that these have, the
            figures are not those of the predictions, or what was held out is not of the sides that were learnt from.
    """
    rows = read_dataset(dataset, store)
    sides = look_up_sides(rows, read_split(split, store))
    test = _read(folder / "test_predictions.parquet")
    wanted, found = set(rows["pixel_sha256"][sides == "test"]), set(test["pixel_sha256"])
    if found != wanted or len(test) != len(found):
        raise Refused(
            f"test_predictions.parquet is not of exactly the test side of {split}: {len(wanted - found)} images are "
            f"missing and {len(test) - len(found & wanted)} are of others or there twice; train it again"
        )
    scores = _scores(test, rows, task, _rule(evaluation))
    if [class_names(task)[k] for k in scores.predicted] != test["called"].tolist():
        raise Refused("the labels in test_predictions.parquet are not those of its probabilities and rule")
    draws = evaluation.get("draws", 0)
    if not isinstance(draws, int) or not 0 <= draws <= _MOST_DRAWS:
        raise Refused(f"metrics.json: {draws!r} draws; between 0 and {_MOST_DRAWS} can be computed again")
    again = evaluate(scores, draws=draws).to_json()
    for key in _COMPUTED:
        if differing := list(_differences(evaluation.get(key, {} if key != "absent_classes" else []), again[key], key)):
            raise Refused(f"metrics.json is not what its predictions give: {'; '.join(differing[:3])}")
    for held_out in ("out_of_fold", "validation"):
        if (file := folder / f"{held_out}_predictions.parquet").is_file():
            table = _read(file)
            learnt = set(rows["pixel_sha256"][np.isin(sides, ["train", "validation"])])
            others = set(table["pixel_sha256"]) - learnt
            if others or table["pixel_sha256"].duplicated().any():
                raise Refused(
                    f"{file.name}: {len(others)} images are not on the sides train and validation of {split}, or some "
                    "are there twice; train it again"
                )
            _scores(table, rows, task, DecisionRule(threshold=0.5) if task == "binary" else DecisionRule())


def _read(file: Path) -> "pd.DataFrame":
    import pandas as pd

    try:
        table = pd.read_parquet(file)
    except (OSError, ValueError) as error:
        raise Refused(f"the run's evaluation/{file.name} cannot be read: {error}") from None
    lacking = [column for column in ("pixel_sha256", *_FACTS, "called") if column not in table]
    if lacking:
        raise Refused(f"{file.name} has no column {', '.join(lacking)}")
    return table


def _rule(evaluation: Json) -> DecisionRule:
    rules = evaluation.get("rules")
    if not isinstance(rules, list) or len(rules) != 1:
        raise Refused("metrics.json does not say by which one rule labels were taken on the test side; train it again")
    return DecisionRule.from_json(rules[0])


def _scores(table: "pd.DataFrame", rows: "pd.DataFrame", task: Task, rule: DecisionRule) -> LabelledPredictions:
    """Predictions with the truth of the dataset, whatever they say themselves, as long as they say the same."""
    known = rows.drop_duplicates("pixel_sha256").set_index("pixel_sha256").loc[table["pixel_sha256"]].reset_index()
    for column in _FACTS:
        differ = known[column].astype(str).to_numpy() != table[column].astype(str).to_numpy()
        if differ.any():
            pixels = table["pixel_sha256"][differ].iloc[0]
            raise Refused(f"predictions have another {column} than the dataset, as of the image {pixels}")
    if task == "binary":
        truth = np.array([LABELS.index(label_of(name)) for name in known["subtype"]], dtype=np.int64)
    else:
        truth = np.array([class_names(task).index(name) for name in known["subtype"]], dtype=np.int64)
    return LabelledPredictions(task, known, truth, _probabilities(table, task), rule)


def _probabilities(table: "pd.DataFrame", task: Task) -> Probabilities:
    columns = ["p_malignant"] if task == "binary" else [f"p_{name}" for name in class_names(task)]
    lacking = [column for column in columns if column not in table]
    if lacking:
        raise Refused(f"predictions have no column {', '.join(lacking)}")
    found = table[columns].to_numpy(dtype=float)
    whole = task == "binary" or np.allclose(found.sum(axis=1), 1, atol=1e-3)
    if not whole or not ((found >= 0) & (found <= 1)).all():
        raise Refused("predictions hold what are no probabilities")
    return found[:, 0] if task == "binary" else found


def _differences(said: object, found: object, where: str) -> Iterator[str]:
    if isinstance(said, dict) and isinstance(found, dict):
        for key in sorted({*said, *found}):
            yield from _differences(said.get(key), found.get(key), f"{where}.{key}")
    elif isinstance(said, list | tuple) and isinstance(found, list | tuple) and len(said) == len(found):
        for k, (one, other) in enumerate(zip(said, found, strict=True)):
            yield from _differences(one, other, f"{where}[{k}]")
    elif isinstance(said, int | float) and isinstance(found, int | float) and not isinstance(said, bool):
        if not math.isclose(said, found, rel_tol=1e-6, abs_tol=1e-9):
            yield f"{where} is {said}, computed again {found}"
    elif said != found:
        yield f"{where} is {said}, computed again {found}"
