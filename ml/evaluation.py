"""What a model is worth on the test side: metrics, and the pictures people look at first.

Metric names are the field's, and are the names that policies use. Every metric is computed by scikit-learn.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ml.errors import DataError
from ml.store import Json
from ml.taxonomy import Task, classes

Truth = NDArray[np.int64]
Probabilities = NDArray[np.float64]


@dataclass(frozen=True)
class Evaluation:
    """The result of scoring one side once.

    Attributes:
        metrics: by name; finite floats. A metric that cannot be computed is missing, never NaN.
        confusion: int (classes, classes); rows are true, columns predicted classes.
        report: precision, recall, f1 and support by class name.
        absent: classes without a single image on this side; macro figures are means over the others.
    """

    task: Task
    metrics: dict[str, float]
    confusion: NDArray[np.int64]
    report: dict[str, dict[str, float]]
    absent: tuple[str, ...]

    def to_json(self) -> Json:
        """Everything, for the run's artifacts and the evidence."""
        return {
            "task": self.task,
            "metrics": self.metrics,
            "classes": list(classes(self.task)),
            "confusion": self.confusion.tolist(),
            "per_class": self.report,
            "absent_classes": list(self.absent),
        }


def check_both_classes(truth: Truth) -> None:
    """Check that a threshold can be chosen on these images.

    Raises:
        DataError: only one class is there.
    """
    if len(np.unique(truth)) < 2:
        raise DataError(
            "the validation side holds images of one class only, so no threshold can be chosen on it; "
            "the set needs more cases"
        )


def youden_threshold(truth: Truth, malignant: Probabilities) -> float:
    """The probability above which calling malignant maximises Youden's J = sensitivity + specificity - 1.

    Between the best score and the next lower one, the middle is taken: a threshold that sits on a score is fragile.
    W. J. Youden, "Index for rating diagnostic tests", Cancer 3(1), 1950.

    Args:
        truth: (n,) 0 benign, 1 malignant.
        malignant: (n,) probability of malignant.

    Raises:
        DataError: only one class is there, so there is nothing to weigh.
    """
    from sklearn.metrics import roc_curve

    check_both_classes(truth)
    false_positive, true_positive, thresholds = roc_curve(truth, malignant, drop_intermediate=False)
    best = thresholds[int(np.argmax(true_positive - false_positive))]
    if not math.isfinite(best):  # the corner where nothing is called malignant
        return math.nextafter(1.0, 2.0)
    below = malignant[malignant < best]
    return float((best + below.max()) / 2) if len(below) else float(best)


def evaluate(task: Task, truth: Truth, probabilities: Probabilities, threshold: float | None) -> Evaluation:
    """Score predictions.

    Args:
        task: binary or subtype.
        truth: (n,) class indices.
        probabilities: (n,) of malignant, or (n, 8).
        threshold: for the binary task; malignant at or above it.
    """
    if task == "binary":
        assert threshold is not None
        return _binary(truth, probabilities, threshold)
    return _subtype(truth, probabilities)


def _binary(truth: Truth, malignant: Probabilities, threshold: float) -> Evaluation:
    from sklearn import metrics as sk

    called = (malignant >= threshold).astype(np.int64)
    scores = {
        "accuracy": sk.accuracy_score(truth, called),
        "precision": sk.precision_score(truth, called, zero_division=0),
        "recall": sk.recall_score(truth, called, zero_division=0),
        "f1": sk.f1_score(truth, called, zero_division=0),
        "threshold": threshold,
    }
    absent, present = _absent("binary", truth)
    if not absent:
        scores["roc_auc"] = sk.roc_auc_score(truth, malignant)
        scores["pr_auc"] = sk.average_precision_score(truth, malignant)
        scores["specificity"] = sk.recall_score(truth, called, pos_label=0)
    scores["macro_f1"] = sk.f1_score(truth, called, labels=present, average="macro", zero_division=0)
    return _evaluation("binary", truth, called, scores, absent)


def _subtype(truth: Truth, probabilities: Probabilities) -> Evaluation:
    from sklearn import metrics as sk

    called = probabilities.argmax(axis=1)
    absent, present = _absent("subtype", truth)
    macro: dict[str, Any] = {"labels": present, "average": "macro", "zero_division": 0}
    scores = {
        "accuracy": sk.accuracy_score(truth, called),
        "precision": sk.precision_score(truth, called, **macro),
        "recall": sk.recall_score(truth, called, **macro),
        "micro_f1": sk.f1_score(truth, called, labels=range(8), average="micro", zero_division=0),
        "macro_f1": sk.f1_score(truth, called, **macro),
    }
    if len(present) > 1:
        # One against the rest, class by class: scikit-learn's own multi-class form refuses a side that lacks a class.
        scores["roc_auc_ovr"] = np.mean([sk.roc_auc_score(truth == k, probabilities[:, k]) for k in present])
    return _evaluation("subtype", truth, called, scores, absent)


def _absent(task: Task, truth: Truth) -> tuple[tuple[str, ...], list[int]]:
    names = classes(task)
    present = sorted({int(k) for k in truth})
    return tuple(name for k, name in enumerate(names) if k not in present), present


def _evaluation(task: Task, truth: Truth, called: Truth, scores: dict[str, Any], absent: tuple[str, ...]) -> Evaluation:
    from sklearn import metrics as sk

    names = classes(task)
    labels = list(range(len(names)))
    report = sk.classification_report(
        truth, called, labels=labels, target_names=names, output_dict=True, zero_division=0
    )
    per_class = {
        name: {
            "precision": float(report[name]["precision"]),
            "recall": float(report[name]["recall"]),
            "f1": float(report[name]["f1-score"]),
            "support": float(report[name]["support"]),
        }
        for name in names
    }
    finite = {name: float(value) for name, value in scores.items() if math.isfinite(value)}
    return Evaluation(task, finite, sk.confusion_matrix(truth, called, labels=labels), per_class, absent)


def plot_confusion(evaluation: Evaluation, path: Path) -> None:
    """The confusion matrix as a picture: counts, shaded by the share of the true class."""
    from matplotlib.figure import Figure

    names = classes(evaluation.task)
    counts = evaluation.confusion
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 2.6 + 0.55 * len(names)
    figure = Figure(figsize=(side + 0.6, side), dpi=130, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(counts.shape):
        colour = "white" if shares[row, column] > 0.55 else "#333333"
        axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", color=colour, fontsize=10)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title("Confusion matrix, test images")
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    figure.savefig(path)


def plot_roc(evaluation: Evaluation, truth: Truth, probabilities: Probabilities, path: Path) -> None:
    """ROC curves as a picture: malignant against benign, or each subtype against the rest."""
    from matplotlib.figure import Figure
    from sklearn.metrics import auc, roc_curve

    names = classes(evaluation.task)
    figure = Figure(figsize=(6.4, 5.6), dpi=130, layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], linestyle=":", color="#888888", label="chance")
    curves = (
        [("malignant", truth == 1, probabilities)]
        if evaluation.task == "binary"
        else [(name, truth == k, probabilities[:, k]) for k, name in enumerate(names)]
    )
    for name, positive, score in curves:
        if 0 < positive.sum() < len(positive):
            x, y, _ = roc_curve(positive, score)
            axes.plot(x, y, label=f"{name}: AUC {auc(x, y):.3f}, {int(positive.sum())} images")
    if evaluation.task == "binary" and not evaluation.absent:
        negative, positive_row = evaluation.confusion
        axes.plot(
            negative[1] / negative.sum(),
            positive_row[1] / positive_row.sum(),
            "o",
            color="#b00020",
            label=f"at threshold {evaluation.metrics['threshold']:.3f}",
        )
    axes.set_xlabel("false positive rate (1 - specificity)")
    axes.set_ylabel("true positive rate (sensitivity)")
    axes.set_title("ROC, test images")
    axes.set_aspect("equal")
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path)


def plot_history(history: dict[str, list[float]], path: Path) -> None:
    """Loss by epoch on the training and validation side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), dpi=130, layout="constrained")
    axes = figure.subplots()
    for name, label in (("loss", "training"), ("val_loss", "validation")):
        if name in history:
            axes.plot(range(1, len(history[name]) + 1), history[name], label=label)
    axes.set_xlabel("epoch")
    axes.set_ylabel("cross-entropy")
    axes.set_title("Training curve")
    axes.legend()
    figure.savefig(path)
