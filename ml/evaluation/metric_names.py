"""Names of metrics, their display names, and the metrics that policies and comparisons require.

The module imports little, since DAG files and forms import it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml.core.taxonomy import Task

GATED_METRICS: dict[Task, tuple[str, str]] = {
    "binary": ("roc_auc", "macro_f1"),
    "subtype": ("roc_auc_ovr", "macro_f1"),
}
"""The metrics that every policy has to limit, and by which a version is compared with the champion."""

LOWER_IS_BETTER = frozenset({"brier", "ece", "patient_brier", "patient_ece"})
"""Metrics of which a lower value is better."""


def is_worse(metric: str, before: float, now: float) -> bool:
    """Returns whether a metric got worse; of a threshold no value is better than another."""
    return metric != "threshold" and now != before and (now > before) == (metric in LOWER_IS_BETTER)


def group_metrics(side: str, evaluation: Mapping[str, Any]) -> dict[str, float]:
    """Names an evaluation's metrics by groups, for people who look at a run in MLflow; nothing reads these back.

    ``test_recall`` is ``test/recall`` and ``test_patient_recall`` ``test/patients/recall``. Only here are
    ``test/by_class/<class>/<metric>`` and ``test/by_<column>/<value>/<metric>``, of classes and slices.

    Args:
        side: the first part of the names: test, oof or validation.
        evaluation: JSON of an :class:`ml.evaluation.evaluation.Evaluation`.

    Returns:
        name -> value; the ends of a metric's interval follow it as ``…_low`` and ``…_high``.
    """
    grouped: dict[str, float] = {}
    for name, value in with_interval_ends(evaluation["metrics"], evaluation["intervals"]):
        is_of_patients = name.startswith("patient_")
        grouped[f"{side}/patients/{name.removeprefix('patient_')}" if is_of_patients else f"{side}/{name}"] = value
    for name, scores in evaluation["per_class"].items():
        if scores["support"]:  # a class without an image has no recall
            shown = {metric: scores[metric] for metric in ("recall", "precision", "f1")}
            for metric, value in with_interval_ends(shown, scores["intervals"]):
                grouped[f"{side}/by_class/{name}/{metric}"] = value
    for column, slices in evaluation["slices"].items():
        for of, scores in slices.items():
            for metric, value in with_interval_ends(scores["metrics"], scores["intervals"]):
                grouped[f"{side}/by_{column}/{of}/{metric}"] = value
    return grouped


def with_interval_ends(
    metrics: Mapping[str, float], intervals: Mapping[str, Sequence[float]]
) -> Iterator[tuple[str, float]]:
    """Yields each metric with its name, followed by the ends of its interval if it has one."""
    for name, value in metrics.items():
        yield name, value
        if name in intervals:
            low, high = intervals[name]
            yield f"{name}_low", low
            yield f"{name}_high", high


CLINICAL_ORDER = (
    *("patient_recall", "recall", "patient_specificity", "patient_balanced_accuracy", "patient_macro_f1"),
    *("patient_roc_auc", "patient_roc_auc_ovr", "patient_recognition_rate", "patient_accuracy", "patient_f1"),
    *("patient_pr_auc", "patient_pr_auc_ovr", "patient_precision", "patient_micro_f1", "patient_weighted_f1"),
    *("patient_mcc", "patient_brier", "patient_ece"),
    *("specificity", "balanced_accuracy", "macro_f1", "roc_auc", "roc_auc_ovr", "accuracy", "f1", "pr_auc"),
    *("pr_auc_ovr", "precision", "micro_f1", "weighted_f1", "mcc", "brier", "ece", "threshold"),
)
"""Metrics by clinical weight: the recall of malignant before all else, and patients before images."""

METRIC_NAMES = {
    "accuracy": "accuracy",
    "roc_auc": "ROC AUC",
    "pr_auc": "PR AUC",
    "precision": "precision",
    "recall": "recall (sensitivity)",
    "specificity": "specificity",
    "f1": "F1",
    "micro_f1": "micro-F1",
    "macro_f1": "macro-F1",
    "roc_auc_ovr": "ROC AUC, one against the rest",
    "threshold": "threshold",
    "balanced_accuracy": "balanced accuracy",
    "weighted_f1": "weighted F1",
    "mcc": "Matthews correlation",
    "brier": "Brier score (0 is best)",
    "ece": "calibration error, ECE (0 is best)",
    "pr_auc_ovr": "PR AUC, one against the rest",
    "patient_accuracy": "accuracy",
    "patient_balanced_accuracy": "balanced accuracy",
    "patient_precision": "precision",
    "patient_recall": "recall (sensitivity)",
    "patient_specificity": "specificity",
    "patient_f1": "F1",
    "patient_micro_f1": "micro-F1",
    "patient_macro_f1": "macro-F1",
    "patient_weighted_f1": "weighted F1",
    "patient_mcc": "Matthews correlation",
    "patient_roc_auc": "ROC AUC",
    "patient_pr_auc": "PR AUC",
    "patient_roc_auc_ovr": "ROC AUC, one against the rest",
    "patient_pr_auc_ovr": "PR AUC, one against the rest",
    "patient_brier": "Brier score (0 is best)",
    "patient_ece": "calibration error, ECE (0 is best)",
    "patient_recognition_rate": "recognition rate: mean share of a patient's images that are right",
}
"""Display names of metrics. Those of patients have the same names as those of images: they stand in other tables."""
