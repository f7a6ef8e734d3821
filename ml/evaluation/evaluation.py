"""The evaluation of one side: metrics, image- and patient-level, with intervals, whole, by class and in slices."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ml.core.store import Json
from ml.core.taxonomy import Task, class_names
from ml.evaluation.decision_rule import DecisionRule
from ml.evaluation.intervals import bootstrap_weights, compute_metrics_with_intervals, confidence_interval
from ml.evaluation.metrics import ratio
from ml.evaluation.scores import LabelledPredictions

_OF_SLICES = {
    "binary": ("accuracy", "balanced_accuracy", "macro_f1", "roc_auc", "recall", "specificity"),
    "subtype": ("accuracy", "balanced_accuracy", "macro_f1", "roc_auc_ovr"),
}

SLICES: dict[Task, tuple[str, ...]] = {
    "binary": ("magnification", "source", "subtype"),
    "subtype": ("magnification", "source"),  # its classes are the subtypes
}


@dataclass(frozen=True)
class Evaluation:
    """The result of scoring one side once.

    Attributes:
        metrics: by name; finite floats. A metric that cannot be computed is missing, never NaN. Names that begin with
            ``patient_`` are of patients, all others of images.
        intervals: 95% interval of each metric that has one, by draws of patients unless ``notes`` says otherwise.
        interval_notes: by metric, where draws of patients give no interval since all are the same: which exact
            interval stands in its place, or that there is none.
        draws: of the bootstrap.
        confusion: int (classes, classes) of images; rows are true, columns predicted classes.
        per_class: by class name precision, recall, f1 and support, ``cases``, ``recognised`` (cases whose mean
            probability leads to the right label), ``intervals`` of recall and f1, and a ``note`` where they are none or
            exact.
        absent_classes: classes without a single image on this side; macro figures are means over the others.
        slices: by column and value: images, cases (a patient with images of two classes is two), how many of them are
            recognised, metrics, intervals unless there is one case only, and notes.
        patients: a record for each patient and class, the worst first.
        rules: how labels were taken; several where each fold had its own.
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
        """Everything, for the run's artifacts and the evidence."""
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


def evaluate(scores: LabelledPredictions, *, draws: int, seed: int = 0) -> Evaluation:
    """Score one side.

    Args:
        scores: what the model said.
        draws: of the patient bootstrap; 0: no intervals.
        seed: of the draws.
    """
    names, truth = class_names(scores.task), scores.truth
    metrics, intervals, notes = compute_metrics_with_intervals(scores, draws, seed)
    if scores.task == "binary" and isinstance(scores.rule, DecisionRule) and scores.rule.threshold is not None:
        metrics["threshold"] = scores.rule.threshold
    confusion = np.zeros((len(names), len(names)), np.int64)
    np.add.at(confusion, (truth, scores.predicted), 1)
    slices: dict[str, dict[str, Json]] = {}
    for column in SLICES[scores.task]:
        values = scores.rows[column].astype(str).to_numpy()
        order = sorted(set(values), key=lambda value: (len(value), value))
        shown = ("accuracy",) if column == "subtype" else _OF_SLICES[scores.task]  # of a subtype, one class is there
        slices[column] = {value: _slice(scores.subset(values == value), shown, draws, seed) for value in order}
    return Evaluation(
        scores.task,
        metrics,
        confusion,
        _report(scores, confusion, draws, seed),
        tuple(name for k, name in enumerate(names) if not (truth == k).any()),
        intervals,
        notes,
        draws,
        slices,
        _worst_first(scores),
        tuple(scores.rules),
    )


def _slice(scores: LabelledPredictions, shown: Sequence[str], draws: int, seed: int) -> Json:
    metrics, intervals, notes = compute_metrics_with_intervals(scores, draws, seed)
    units = scores.cases
    return {
        "images": len(scores.truth),
        "cases": len(units.truth),
        "recognised": int((units.predicted == units.truth).sum()),
        "metrics": {name: metrics[name] for name in shown if name in metrics},
        "intervals": {name: list(intervals[name]) for name in shown if name in intervals},
        "interval_notes": {name: notes[name] for name in shown if name in notes},
    }


def _report(scores: LabelledPredictions, confusion: NDArray[np.int64], draws: int, seed: int) -> dict[str, Json]:
    units, report = scores.cases, {}
    precision = np.nan_to_num(ratio(np.diag(confusion).astype(float), confusion.sum(axis=0)))
    for k, name in enumerate(class_names(scores.task)):
        support, right = int(confusion[k].sum()), int(confusion[k, k])
        mine = units.truth == k
        cases = int(mine.sum())
        report[name] = {
            "precision": float(precision[k]),
            "recall": right / support if support else 0.0,
            "f1": float(2 * right / max(1, support + confusion[:, k].sum())),
            "support": float(support),
            "cases": cases,
            "recognised": int((units.predicted[mine] == k).sum()),
            "intervals": {},
            "note": "",
        }
        if cases < 2:
            report[name]["note"] = "one case: no interval" if cases else "no case on this side"
        elif draws:
            report[name] |= _class_intervals(scores, k, cases, draws, seed)
    return report


def _class_intervals(scores: LabelledPredictions, k: int, cases: int, draws: int, seed: int) -> Json:
    of, called = (scores.truth == k).astype(float), (scores.predicted == k).astype(float)
    recalls, f1s = [], []
    for weights in bootstrap_weights(scores, draws, seed):
        right, support, predicted = weights @ (of * called), weights @ of, weights @ called
        recalls.append(ratio(right, support))
        f1s.append(ratio(2 * right, support + predicted))
    found = {
        "recall": confidence_interval(np.concatenate(recalls), cases),
        "F1": confidence_interval(np.concatenate(f1s)),
    }
    return {
        "intervals": {name.lower(): list(ends) for name, (ends, _) in found.items() if ends},
        "note": "; ".join(f"{name}: {note}" for name, (_, note) in found.items() if note),
    }


def _worst_first(scores: LabelledPredictions) -> list[Json]:
    units, names = scores.cases, class_names(scores.task)
    own = units.probabilities
    own = np.stack([1 - own, own], axis=1) if scores.task == "binary" else own
    own = own[np.arange(len(own)), units.truth]
    return [
        {
            "patient": str(units.patients[row]),
            "class": names[units.truth[row]],
            "images": int(units.image_counts[row]),
            "right": float(units.correct_shares[row]),
            "probability": float(own[row]),
            "label": names[units.predicted[row]],
        }
        for row in np.lexsort((own, units.correct_shares))
    ]
