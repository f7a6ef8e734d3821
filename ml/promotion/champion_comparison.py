"""A candidate beside the champion: what both said of the same images, out of fold and on the locked test side."""

import hashlib
import io
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ml.core.errors import Refused, RegistryError, TryAgain
from ml.core.mlflow_client import fetch_artifacts
from ml.core.progress import say
from ml.core.store import Json, Store
from ml.core.taxonomy import SUBTYPES, Task, class_names
from ml.evaluation.comparison import PairedPredictions, compare_models
from ml.evaluation.comparison_simulation import Memos
from ml.evaluation.metric_names import GATED_METRICS
from ml.evaluation.scores import ClassNumbers, Probabilities
from ml.promotion.policies import NonInferiorityRule
from ml.registry.version_scoring import classify_pictures

if TYPE_CHECKING:
    import pandas as pd

OUT_OF_FOLD, TEST = "out of fold", "on the test side"


def compare_with_champion(evidence: Json, champion: Json, rule: NonInferiorityRule, store: Store, memos: Memos) -> Json:
    """Compare a version with the champion, paired by case, on the images that both can be scored on.

    Where the ledger has grown since the champion was trained, the champion classifies the test images it has not seen;
    its out-of-fold predictions are of the images it was trained with, so there the two are compared on those in common.

    Args:
        evidence: of the candidate.
        champion: the same of the champion.
        rule: of the policy.
        store: holds pictures.
        memos: hold the simulation's results.

    Returns:
        ``{version, comparable, reason, pairs}``, the pairs as of :func:`ml.evaluation.comparison.compare_models`.

    Raises:
        TryAgain: predictions or the champion's files cannot be read.
        Refused: predictions are not what the evidence says.
        RegistryError: the champion cannot classify.
    """
    told: Json = {"version": champion["version"], "comparable": False, "reason": "", "pairs": []}
    mine, theirs = ((one["ledger"], one.get("split_group", "case")) for one in (evidence, champion))
    if mine != theirs:
        told["reason"] = (
            f"no comparison with version {champion['version']}: it was measured under the split ledger {theirs[0]} by "
            f"{theirs[1]}, this version under {mine[0]} by {mine[1]}; only the limits apply"
        )
        return told
    task: Task = evidence["task"]
    say(f"comparing version {evidence['version']} with the champion, version {champion['version']}")
    for where, name in ((OUT_OF_FOLD, "out_of_fold"), (TEST, "test")):
        new, old = (_predictions(one, name) for one in (evidence, champion))
        if new is None or old is None:
            whose = champion if old is None else evidence
            reason = f"version {whose['version']} has no such predictions"
            told["pairs"] += [_not_estimable(metric, where, reason) for metric in GATED_METRICS[task]]
            continue
        if where == TEST and (unseen := new.loc[~new["pixel_sha256"].isin(old["pixel_sha256"])]).size:
            old = _rescored(old, unseen, champion, evidence["dataset"], store)
        told["pairs"] += compare_models(
            where, _paired(task, new, old), memos, margin=rule.margin, least_power=rule.least_power
        )
    return {**told, "comparable": True}


def _not_estimable(metric: str, where: str, reason: str) -> Json:
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


def _predictions(evidence: Json, name: str) -> "pd.DataFrame | None":
    """A version's predictions as its evidence has them, or None where it has none.

    Raises:
        TryAgain: they cannot be read.
        Refused: they were changed.
    """
    import pandas as pd
    from mlflow.exceptions import MlflowException

    path = f"evaluation/{name}_predictions.parquet"
    expected = evidence["artifacts"].get(path)
    if expected is None:
        return None
    whose = f"{evidence['model']} version {evidence['version']}"
    try:
        with tempfile.TemporaryDirectory(prefix="breakhis-") as scratch:
            data = fetch_artifacts(f"runs:/{evidence['run_id']}/{path}", Path(scratch)).read_bytes()
    except (MlflowException, OSError) as error:
        raise TryAgain(f"{whose}: {path} of its run cannot be read: {error}") from None
    if hashlib.sha256(data).hexdigest() != expected:
        raise Refused(f"{whose}: {path} of its run was changed: it is not what the evidence says")
    return pd.read_parquet(io.BytesIO(data))


def _rescored(
    known: "pd.DataFrame", unseen: "pd.DataFrame", champion: Json, dataset: str, store: Store
) -> "pd.DataFrame":
    """The champion's predictions, with those of images that came after it.

    Raises:
        RegistryError: it says nothing of use of them.
    """
    import pandas as pd

    say(f"the ledger has grown: the champion classifies {len(unseen):,} further test images")
    files = pd.read_parquet(store.file(dataset, "dataset.parquet")).set_index("pixel_sha256")["sha256"]
    pictures = (store.blob(files[pixels]) for pixels in unseen["pixel_sha256"])
    said = classify_pictures(champion["model"], champion["version"], pictures)
    names = class_names(champion["task"])
    columns = [f"p_{name}" for name in names]
    columns = columns[1:] if champion["task"] == "binary" else columns
    if not {*columns, "label"} <= set(said) or len(said) != len(unseen) or not set(said["label"]) <= set(names):
        raise RegistryError(
            f"{champion['model']} version {champion['version']} does not say {', '.join([*columns, 'label'])} of each "
            "picture"
        )
    probabilities = said[columns].to_numpy(dtype=float)
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise RegistryError(f"{champion['model']} version {champion['version']} gives what are no probabilities")
    fresh = unseen.drop(columns=[c for c in unseen.columns if c.startswith("p_")]).reset_index(drop=True)
    fresh[columns] = probabilities
    fresh["called"] = said["label"].to_numpy()
    return pd.concat([known, fresh], ignore_index=True)


def _paired(task: Task, new: "pd.DataFrame", old: "pd.DataFrame") -> PairedPredictions:
    """Both on the images in common, in the same order. The truth is the candidate's: labels may have been corrected."""
    by_image = old.drop_duplicates("pixel_sha256").set_index("pixel_sha256")
    rows = new[new["pixel_sha256"].isin(by_image.index)].reset_index(drop=True)
    other = by_image.loc[rows["pixel_sha256"]]
    index = {name: k for k, name in enumerate(class_names(task))}

    def numbers(names: "pd.Series[str]") -> ClassNumbers:
        return np.asarray(names.map(index), dtype=np.int64)

    def probabilities(table: "pd.DataFrame") -> Probabilities:
        if task == "binary":
            return table["p_malignant"].to_numpy(dtype=float)
        return table[[f"p_{name}" for name in SUBTYPES]].to_numpy(dtype=float)

    return PairedPredictions(
        task,
        rows,
        numbers(rows["label" if task == "binary" else "subtype"]),
        probabilities(rows),
        probabilities(other),
        numbers(rows["called"]),
        numbers(other["called"]),
    )
