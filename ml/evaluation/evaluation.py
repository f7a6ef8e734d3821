"""The evaluation of one side: metrics by image and by case, with intervals, over the whole side, by class and slice."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ml.core.columns import read_texts
from ml.core.store import Json
from ml.core.taxonomy import Task, class_names
from ml.evaluation.decision_rule import DecisionRule
from ml.evaluation.intervals import bootstrap_weights, compute_metrics_with_intervals, confidence_interval
from ml.evaluation.metrics import ratio
from ml.evaluation.scores import ClassNumbers, LabelledPredictions

_SLICE_METRICS = {
    "binary": ("accuracy", "balanced_accuracy", "macro_f1", "roc_auc", "recall", "specificity"),
    "subtype": ("accuracy", "balanced_accuracy", "macro_f1", "roc_auc_ovr"),
}

SLICE_COLUMNS: dict[Task, tuple[str, ...]] = {
    "binary": ("magnification", "source", "subtype"),
    "subtype": ("magnification", "source"),  # its classes are the subtypes
}


@dataclass(frozen=True)
class Evaluation:
    """The result of one evaluation of one side.

    Attributes:
        task: the task, which names the classes.
        metrics: by name; finite floats. A metric that cannot be computed is missing, never NaN. Names that begin with
            ``patient_`` are of cases, all others of images.
        confusion: int (classes, classes), numbers of images; rows are true, columns predicted classes.
        per_class: by class name: precision, recall, f1, support, ``cases``, ``recognised`` (cases whose mean
            probability leads to the right label), ``intervals`` of recall and f1, and a ``note`` where an interval is
            missing or exact.
        absent_classes: classes without an image on this side. Macro figures are means over the other classes.
        intervals: 95% interval of each metric that has one, by draws of patients unless ``interval_notes`` says
            otherwise.
        interval_notes: by metric, where all draws of patients give the same value. The note says which exact interval
            stands in place of percentiles, or that there is no interval.
        draws: number of draws of the bootstrap.
        slices: by column and value: images, cases (a patient with images of two classes is two cases), recognised
            cases, metrics, intervals unless there is one case only, and interval notes.
        patients: a record for each patient and class, the worst first.
        rules: the decision rules; several where each fold had its own.
    """

    task: Task
    metrics: dict[str, float]
    confusion: NDArray[np.int64]
    per_class: dict[str, Json]
    absent_classes: tuple[str, ...]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    interval_notes: dict[str, str] = field(default_factory=dict)
    draws: int = 0
    slices: dict[str, dict[str, Json]] = field(default_factory=dict)
    patients: list[Json] = field(default_factory=list)
    rules: tuple[DecisionRule, ...] = ()

    def to_json(self) -> Json:
        """Returns all of it, as the run's artifacts and the evidence keep it."""
        return {
            "task": self.task,
            "metrics": self.metrics,
            "intervals": {name: list(ends) for name, ends in self.intervals.items()},
            "interval_notes": self.interval_notes,
            "draws": self.draws,
            "classes": list(class_names(self.task)),
            "confusion": self.confusion.tolist(),
            "per_class": self.per_class,
            "absent_classes": list(self.absent_classes),
            "slices": self.slices,
            "patients": self.patients,
            "rules": [rule.to_json() for rule in self.rules],
        }


def evaluate(predictions: LabelledPredictions, *, draws: int, seed: int = 0) -> Evaluation:
    """Evaluate the predictions of one side.

    Args:
        predictions: of the side's images.
        draws: of the bootstrap of patients; 0 leaves intervals out.
        seed: of the draws.
    """
    names, truth = class_names(predictions.task), predictions.truth
    metrics, intervals, notes = compute_metrics_with_intervals(predictions, draws, seed)
    rule = predictions.rule
    if predictions.task == "binary" and isinstance(rule, DecisionRule) and rule.threshold is not None:
        metrics["threshold"] = rule.threshold
    confusion = count_confusion(predictions.task, truth, predictions.predicted)
    slices: dict[str, dict[str, Json]] = {}
    for column in SLICE_COLUMNS[predictions.task]:
        values = read_texts(predictions.rows, column)
        ordered = sorted(set(values), key=lambda value: (len(value), value))
        # The images of one subtype are all of one class, so only accuracy says something of them.
        shown = ("accuracy",) if column == "subtype" else _SLICE_METRICS[predictions.task]
        slices[column] = {
            value: _evaluate_slice(predictions.subset(values == value), shown, draws, seed) for value in ordered
        }
    return Evaluation(
        predictions.task,
        metrics,
        confusion,
        _evaluate_classes(predictions, confusion, draws, seed),
        tuple(name for k, name in enumerate(names) if not (truth == k).any()),
        intervals,
        notes,
        draws,
        slices,
        _list_worst_cases(predictions),
        tuple(predictions.rules),
    )


def count_confusion(task: Task, truth: ClassNumbers, predicted: ClassNumbers) -> NDArray[np.int64]:
    """Returns how often each class was taken for each: (classes, classes), rows true, columns predicted.

    Args:
        task: the task, which names the classes.
        truth: (n,) true class numbers.
        predicted: (n,) predicted ones.
    """
    confusion = np.zeros((len(class_names(task)),) * 2, np.int64)
    np.add.at(confusion, (truth, predicted), 1)
    return confusion


def _evaluate_slice(predictions: LabelledPredictions, shown: Sequence[str], draws: int, seed: int) -> Json:
    metrics, intervals, notes = compute_metrics_with_intervals(predictions, draws, seed)
    cases = predictions.cases
    return {
        "images": len(predictions.truth),
        "cases": len(cases.truth),
        "recognised": int((cases.predicted == cases.truth).sum()),
        "metrics": {name: metrics[name] for name in shown if name in metrics},
        "intervals": {name: list(intervals[name]) for name in shown if name in intervals},
        "interval_notes": {name: notes[name] for name in shown if name in notes},
    }


def _evaluate_classes(
    predictions: LabelledPredictions, confusion: NDArray[np.int64], draws: int, seed: int
) -> dict[str, Json]:
    """Returns ``per_class`` of an evaluation."""
    cases = predictions.cases
    per_class: dict[str, Json] = {}
    precision = np.nan_to_num(ratio(np.diag(confusion).astype(float), confusion.sum(axis=0)))
    for k, name in enumerate(class_names(predictions.task)):
        support, correct = int(confusion[k].sum()), int(confusion[k, k])
        is_of_class = cases.truth == k
        case_count = int(is_of_class.sum())
        per_class[name] = {
            "precision": float(precision[k]),
            "recall": correct / support if support else 0.0,
            "f1": float(2 * correct / max(1, support + confusion[:, k].sum())),
            "support": float(support),
            "cases": case_count,
            "recognised": int((cases.predicted[is_of_class] == k).sum()),
            "intervals": {},
            "note": "",
        }
        if case_count < 2:
            per_class[name]["note"] = "one case: no interval" if case_count else "no case on this side"
        elif draws:
            per_class[name] |= _compute_class_intervals(predictions, k, case_count, draws, seed)
    return per_class


def _compute_class_intervals(predictions: LabelledPredictions, k: int, case_count: int, draws: int, seed: int) -> Json:
    """Returns ``intervals`` and ``note`` of class ``k``, which has ``case_count`` cases."""
    is_class = (predictions.truth == k).astype(float)
    is_predicted = (predictions.predicted == k).astype(float)
    recalls, f1s = [], []
    for weights in bootstrap_weights(predictions, draws, seed):
        correct, support, predicted = weights @ (is_class * is_predicted), weights @ is_class, weights @ is_predicted
        recalls.append(ratio(correct, support))
        f1s.append(ratio(2 * correct, support + predicted))
    intervals = {
        "recall": confidence_interval(np.concatenate(recalls), case_count),
        "F1": confidence_interval(np.concatenate(f1s)),
    }
    return {
        "intervals": {name.lower(): list(ends) for name, (ends, _) in intervals.items() if ends},
        "note": "; ".join(f"{name}: {note}" for name, (_, note) in intervals.items() if note),
    }


def _list_worst_cases(predictions: LabelledPredictions) -> list[Json]:
    """Returns a record of each case, by its share of correct images and the probability of its true class."""
    cases, names = predictions.cases, class_names(predictions.task)
    wide = cases.probabilities
    wide = np.stack([1 - wide, wide], axis=1) if predictions.task == "binary" else wide
    true_class = wide[np.arange(len(wide)), cases.truth]
    return [
        {
            "patient": str(cases.patients[row]),
            "class": names[cases.truth[row]],
            "images": int(cases.image_counts[row]),
            "right": float(cases.correct_shares[row]),
            "probability": float(true_class[row]),
            "label": names[cases.predicted[row]],
        }
        for row in np.lexsort((true_class, cases.correct_shares))
    ]
