"""The comparison of a candidate with the champion: predictions of both on the same images, out of fold and test."""

import hashlib
import io
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ml.core.errors import Refused, RegistryError, TryAgain
from ml.core.messages import cut_text, hide_access
from ml.core.mlflow_client import fetch_artifacts
from ml.core.parquet_files import read_parquet
from ml.core.progress import say
from ml.core.store import Json, Store
from ml.core.taxonomy import SUBTYPES, Task, class_names
from ml.data.stored_tables import read_stored_table
from ml.evaluation.comparison import PairedPredictions, compare_models
from ml.evaluation.comparison_simulation import Memos
from ml.evaluation.metric_names import GATED_METRICS
from ml.evaluation.scores import ClassNumbers, Probabilities
from ml.promotion.policies import NonInferiorityRule
from ml.registry.sandbox import find_isolation
from ml.registry.version_scoring import classify_pictures

if TYPE_CHECKING:
    import pandas as pd

OUT_OF_FOLD, TEST = "out of fold", "on the test side"
"""Which predictions are compared, in the words of gates and review."""


def compare_with_champion(evidence: Json, champion: Json, rule: NonInferiorityRule, store: Store, memos: Memos) -> Json:
    """Compare a candidate with the champion for non-inferiority, paired by case, on the images that both can predict.

    Where the ledger has grown since the champion was trained, the champion classifies the new test images. Out-of-fold
    predictions of the champion exist only for the images it was trained with, so there the images in common are used.

    Args:
        evidence: of the candidate.
        champion: evidence of the champion.
        rule: non-inferiority margin and least power, from the policy.
        store: holds datasets and pictures.
        memos: keep the simulation's results.

    Returns:
        ``{version, comparable, reason, pairs}``: the champion's version, whether the two could be compared and, if not,
        why; the pairs are those of :func:`ml.evaluation.comparison.compare_models`, one per metric and set of images.
        Where the champion had to classify, ``isolation`` says how its logged code was isolated from this machine; see
        :mod:`ml.registry.sandbox`.

    Raises:
        TryAgain: predictions or the champion's files cannot be read.
        Refused: predictions are not what the evidence says.
        RegistryError: the champion cannot classify, or its output is not usable.
    """
    result: Json = {"version": champion["version"], "comparable": False, "reason": "", "pairs": []}
    own, other = ((one["ledger"], one.get("split_group", "case")) for one in (evidence, champion))
    if own != other:
        result["reason"] = (
            f"no comparison with version {champion['version']}: it was measured under the split ledger {other[0]} by "
            f"{other[1]}, this version under {own[0]} by {own[1]}; only the limits apply"
        )
        return result
    task: Task = evidence["task"]
    say(f"comparing version {evidence['version']} with the champion, version {champion['version']}")
    for where, name in ((OUT_OF_FOLD, "out_of_fold"), (TEST, "test")):
        new, old = (_read_predictions(version, name) for version in (evidence, champion))
        if new is None or old is None:
            lacking = champion if old is None else evidence
            reason = f"version {lacking['version']} has no such predictions"
            result["pairs"] += [_make_inestimable_pair(metric, where, reason) for metric in GATED_METRICS[task]]
            continue
        if where == TEST and (unseen := new.loc[~new["pixel_sha256"].isin(old["pixel_sha256"])]).size:
            old = _add_predictions(old, unseen, champion, evidence["dataset"], store)
            result["isolation"] = find_isolation()
        result["pairs"] += compare_models(
            where, _pair_predictions(task, new, old), memos, margin=rule.margin, least_power=rule.least_power
        )
    return {**result, "comparable": True}


def make_missing_comparison(champion: Json, reason: str) -> Json:
    """Returns the result for a champion whose run is gone from MLflow, as :func:`compare_with_champion` has it.

    Args:
        champion: its recorded evidence.
        reason: says that the run is gone.
    """
    return {"version": champion["version"], "comparable": False, "gone": True, "reason": reason, "pairs": []}


def _make_inestimable_pair(metric: str, where: str, reason: str) -> Json:
    figures = ("candidate", "champion", "difference", "error", "critical", "low", "size", "power")
    return {
        "metric": metric,
        "where": where,
        "images": 0,
        "cases": 0,
        **dict.fromkeys(figures),
        "estimable": False,
        "reason": reason,
    }


def _read_predictions(evidence: Json, name: str) -> "pd.DataFrame | None":
    """Returns a version's predictions as its evidence names them, one row per image, or None where it has none.

    Raises:
        TryAgain: they cannot be read.
        Refused: they were changed.
    """
    from mlflow.exceptions import MlflowException

    path = f"evaluation/{name}_predictions.parquet"
    expected = evidence["artifacts"].get(path)
    if expected is None:
        return None
    version = f"{evidence['model']} version {evidence['version']}"
    try:
        with tempfile.TemporaryDirectory(prefix="breakhis-") as scratch:
            data = fetch_artifacts(f"runs:/{evidence['run_id']}/{path}", Path(scratch)).read_bytes()
    except (MlflowException, OSError) as error:
        cause = cut_text(hide_access(error))
        raise TryAgain(f"{version}: {path} of its run cannot be read: {cause}") from None
    if hashlib.sha256(data).hexdigest() != expected:
        raise Refused(f"{version}: {path} of its run was changed: it is not what the evidence says")
    return read_parquet(io.BytesIO(data))


def _add_predictions(
    known: "pd.DataFrame", unseen: "pd.DataFrame", champion: Json, dataset: str, store: Store
) -> "pd.DataFrame":
    """Have the champion classify images that came after it, and add the predictions to its known ones.

    Raises:
        RegistryError: its output lacks columns or rows, or holds unknown classes or no probabilities.
    """
    import pandas as pd

    say(f"the ledger has grown: the champion classifies {len(unseen):,} further test images")
    files = read_stored_table(dataset, "dataset.parquet", store).set_index("pixel_sha256")["sha256"]
    pictures = (store.blob(files[pixels]) for pixels in unseen["pixel_sha256"])
    output = classify_pictures(champion["model"], champion["version"], pictures)
    names = class_names(champion["task"])
    columns = [f"p_{name}" for name in names]
    columns = columns[1:] if champion["task"] == "binary" else columns
    version = f"{champion['model']} version {champion['version']}"
    if not {*columns, "label"} <= set(output) or len(output) != len(unseen) or not set(output["label"]) <= set(names):
        raise RegistryError(f"{version} does not give {', '.join([*columns, 'label'])} for each picture")
    probabilities = output[columns].to_numpy(dtype=float)
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise RegistryError(f"{version} gives probabilities that are not numbers from 0 to 1")
    fresh = unseen.drop(columns=[c for c in unseen.columns if c.startswith("p_")]).reset_index(drop=True)
    fresh[columns] = probabilities
    fresh["called"] = output["label"].to_numpy()
    return pd.concat([known, fresh], ignore_index=True)


def _pair_predictions(task: Task, new: "pd.DataFrame", old: "pd.DataFrame") -> PairedPredictions:
    """Returns the predictions of candidate and champion on the images in common, in the same order.

    The true classes are the candidate's, since labels may have been corrected after the champion was trained.
    """
    by_image = old.drop_duplicates("pixel_sha256").set_index("pixel_sha256")
    rows = new[new["pixel_sha256"].isin(by_image.index)].reset_index(drop=True)
    other = by_image.loc[rows["pixel_sha256"]]
    index = {name: k for k, name in enumerate(class_names(task))}

    def to_numbers(names: "pd.Series[str]") -> ClassNumbers:
        return np.asarray(names.map(index), dtype=np.int64)

    def read_probabilities(table: "pd.DataFrame") -> Probabilities:
        if task == "binary":
            return table["p_malignant"].to_numpy(dtype=float)
        return table[[f"p_{name}" for name in SUBTYPES]].to_numpy(dtype=float)

    return PairedPredictions(
        task,
        rows,
        to_numbers(rows["label" if task == "binary" else "subtype"]),
        read_probabilities(rows),
        read_probabilities(other),
        to_numbers(rows["called"]),
        to_numbers(other["called"]),
    )
