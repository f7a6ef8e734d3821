"""Metrics of presets on the splits of a protocol, and the rows of the table that compares them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ml.core.store import Json
from ml.core.taxonomy import MAGNIFICATIONS, Task
from ml.evaluation.intervals import bootstrap_weights, confidence_interval, has_resampling_variance
from ml.evaluation.metrics import compute_weighted_metrics
from ml.evaluation.scores import LabelledPredictions

Draws = NDArray[np.float64]

NOTEBOOKS: dict[Task, dict[str, float]] = {
    "binary": {"roc_auc": 0.853, "pr_auc": 0.893, "recall": 0.888, "specificity": 0.576},
    "subtype": {"micro_f1": 0.788, "macro_f1": 0.327},
}
"""Test results of the notebooks that this system descends from, on their own split, which is not known."""

_IMAGE_METRICS: dict[Task, tuple[str, ...]] = {
    "binary": ("roc_auc", "pr_auc", "recall", "specificity", "macro_f1", "brier", "ece"),
    "subtype": ("micro_f1", "macro_f1", "balanced_accuracy", "roc_auc_ovr", "brier", "ece"),
}
_PATIENT_METRICS: dict[Task, tuple[str, ...]] = {
    "binary": ("patient_roc_auc", "patient_recall", "patient_specificity", "patient_recognition_rate"),
    "subtype": ("patient_accuracy", "patient_macro_f1", "patient_recognition_rate"),
}
NEVER_FOUND = "classes_never_found"
"""Metric: how many of the classes that are present have a recall of zero."""


class Figure(NamedTuple):
    """One number of the table."""

    value: float
    """Mean over seeds, and over folds where there are any."""
    low: float | None
    high: float | None
    """Ends of the 95% interval by patients; over folds, one standard deviation to both sides."""


class Row(NamedTuple):
    """One line of the table."""

    protocol: str
    task: Task
    level: str
    metric: str
    notebooks: float | None
    presets: dict[str, Figure]
    difference: Figure | None
    """The last preset minus the first, paired by patient."""

    def to_json(self) -> Json:
        """Returns the row as reproduction.json holds it."""
        figures = {name: figure._asdict() for name, figure in self.presets.items()}
        return {**self._asdict(), "presets": figures, "difference": self.difference and self.difference._asdict()}


class PresetMetrics(NamedTuple):
    """One preset's metrics on one split, means over its seeds."""

    values: dict[str, float]
    draws: dict[str, Draws]
    """Metric -> its value under each bootstrap draw of patients, (draws,). The same patients get the same draws."""


def compute_metrics(scores: Sequence[LabelledPredictions], draws: int) -> PresetMetrics:
    """Average each metric over several models, as it is and under bootstrap draws of patients.

    Args:
        scores: predictions of the same images, one per seed.
        draws: number of draws; 0: none.
    """
    unweighted = np.ones((1, len(scores[0].truth)))
    values = {
        name: float(value[0]) for name, value in _average_metrics(scores, unweighted).items() if np.isfinite(value[0])
    }
    present = np.unique(scores[0].truth)
    never_predicted = [sum(not (s.predicted[s.truth == k] == k).any() for k in present) for s in scores]
    values[NEVER_FOUND] = float(np.mean(never_predicted))
    drawn: dict[str, list[Draws]] = {}
    if draws and has_resampling_variance(scores[0]):
        for weights in bootstrap_weights(scores[0], draws, 0):
            for name, value in _average_metrics(scores, weights).items():
                drawn.setdefault(name, []).append(value)
    for magnification in MAGNIFICATIONS:
        at_magnification = (scores[0].rows["magnification"] == magnification).to_numpy()
        if at_magnification.any():
            parts = [s.subset(at_magnification) for s in scores]
            rate = _average_metrics(parts, np.ones((1, int(at_magnification.sum()))))["patient_recognition_rate"]
            values[f"patient_recognition_rate_{magnification}x"] = float(rate[0])
    return PresetMetrics(values, {name: np.concatenate(parts) for name, parts in drawn.items()})


def _average_metrics(scores: Sequence[LabelledPredictions], weights: Draws) -> dict[str, Draws]:
    by_model = [compute_weighted_metrics(predictions, weights) for predictions in scores]
    return {name: np.mean([metrics[name] for metrics in by_model], axis=0) for name in by_model[0]}


def compute_rows(protocol: str, task: Task, measured: Mapping[str, Sequence[PresetMetrics]]) -> Iterator[Row]:
    """Yields the table's rows of one protocol and task.

    Args:
        protocol: the protocol's name.
        task: the models' task.
        measured: preset -> its metrics on each split of the protocol, the same splits for all.
    """
    folds = len(next(iter(measured.values())))
    names = {"image": (*_IMAGE_METRICS[task], NEVER_FOUND), "patient": _PATIENT_METRICS[task]}
    if folds > 1:  # as results under this protocol are published
        names["patient"] += tuple(f"patient_recognition_rate_{m}x" for m in MAGNIFICATIONS)
    first, *_, last = [*measured, *measured]
    for level, metrics in names.items():
        for metric in metrics:
            if any(metric not in fold.values for by_fold in measured.values() for fold in by_fold):
                continue
            figures = {preset: _make_figure(by_fold, metric) for preset, by_fold in measured.items()}
            difference = _compute_difference(measured[first], measured[last], metric) if first != last else None
            yield Row(protocol, task, level, metric, NOTEBOOKS[task].get(metric), figures, difference)


def _make_figure(by_fold: Sequence[PresetMetrics], metric: str) -> Figure:
    if len(by_fold) > 1:
        return _summarize_folds([fold.values[metric] for fold in by_fold])
    return _add_interval(by_fold[0].values[metric], by_fold[0].draws.get(metric))


def _compute_difference(first: Sequence[PresetMetrics], last: Sequence[PresetMetrics], metric: str) -> Figure:
    if len(first) > 1:
        return _summarize_folds([b.values[metric] - a.values[metric] for a, b in zip(first, last, strict=True)])
    a, b = first[0], last[0]
    paired = b.draws[metric] - a.draws[metric] if metric in a.draws and len(a.draws[metric]) else None
    return _add_interval(b.values[metric] - a.values[metric], paired)


def _summarize_folds(values: Sequence[float]) -> Figure:
    mean, spread = float(np.mean(values)), float(np.std(values, ddof=1))
    return Figure(mean, mean - spread, mean + spread)


def _add_interval(value: float, draws: Draws | None) -> Figure:
    ends, _ = (None, "") if draws is None else confidence_interval(draws)
    return Figure(value, *(ends or (None, None)))
