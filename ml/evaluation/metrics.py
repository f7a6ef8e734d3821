"""Metrics of one side, of images and of patients.

Metric names are the field's, and are the names that policies use. Every metric is a function of the images' weights:
all one for the value itself, and for an interval the weights that a draw of patients gives. So there is one way to
compute it, and a thousand draws take seconds.
"""

import numpy as np
from numpy.typing import NDArray

from ml.core.taxonomy import Task, class_names
from ml.evaluation.scores import ClassNumbers, LabelledPredictions, Probabilities

ImageWeights = NDArray[np.float64]
Values = dict[str, NDArray[np.float64]]

_BINS = 10


def compute_weighted_metrics(scores: LabelledPredictions, weights: ImageWeights) -> Values:
    """Every metric under each row of weights.

    Args:
        scores: of n images.
        weights: (draws, n), the same for all images of a patient.

    Returns:
        name -> (draws,); NaN where it cannot be computed. Classes without weight do not count in means over classes.
    """
    found = _metrics(scores.task, scores.truth, scores.probabilities, scores.predicted, weights)
    units = scores.cases
    of_units = weights[:, units.first_rows]
    mine = _metrics(scores.task, units.truth, units.probabilities, units.predicted, of_units)
    found |= {f"patient_{name}": values for name, values in mine.items()}
    # F. A. Spanhol et al., IEEE TBME 63(7), 2016: the mean over patients of the share of images rightly classified.
    found["patient_recognition_rate"] = ratio(of_units @ units.correct_shares, of_units.sum(axis=1))
    return found


def _metrics(
    task: Task, truth: ClassNumbers, probabilities: Probabilities, called: ClassNumbers, weights: ImageWeights
) -> Values:
    n = len(class_names(task))
    cells = np.zeros((len(truth), n * n))
    cells[np.arange(len(truth)), truth * n + called] = 1
    confusion = (weights @ cells).reshape(-1, n, n)
    right = np.einsum("dkk->dk", confusion)
    support, predicted = confusion.sum(axis=2), confusion.sum(axis=1)
    total, present = support.sum(axis=1), support > 0
    recall, f1 = ratio(right, support), ratio(2 * right, support + predicted)
    # A class that is there and never called has a precision of 0, by scikit-learn's convention, too.
    precision = np.where(predicted > 0, ratio(right, predicted), 0.0)
    wide = probabilities if task == "subtype" else np.stack([1 - probabilities, probabilities], axis=1)
    sure, hit = wide[np.arange(len(called)), wide.argmax(axis=1)], wide.argmax(axis=1) == truth
    squared = ((wide - np.eye(n)[truth]) ** 2).sum(axis=1)
    accuracy = ratio(right.sum(axis=1), total)
    found = {
        "accuracy": accuracy,
        "balanced_accuracy": _mean_over(present, recall),
        "micro_f1": accuracy,  # the same where each image has one label
        "macro_f1": _mean_over(present, f1),
        "weighted_f1": ratio((np.nan_to_num(f1) * support).sum(axis=1), total),
        "mcc": _mcc(right.sum(axis=1), support, predicted, total),
    }
    if task == "binary":
        both = present.all(axis=1)
        found |= {
            "precision": precision[:, 1],
            "recall": np.where(present[:, 1], recall[:, 1], 0.0),
            "specificity": np.where(present[:, 0], recall[:, 0], np.nan),
            "f1": np.nan_to_num(f1[:, 1]),
            "roc_auc": np.where(both, roc_auc(truth == 1, probabilities, weights), np.nan),
            "pr_auc": np.where(both, average_precision(truth == 1, probabilities, weights), np.nan),
            "brier": ratio(weights @ squared, 2 * total),  # of the one probability, as scikit-learn has it
            "ece": _calibration_error(probabilities, truth == 1, weights),
        }
        return found
    several = present.sum(axis=1) > 1
    areas = np.stack([roc_auc(truth == k, wide[:, k], weights) for k in range(n)], axis=1)
    precisions = np.stack([average_precision(truth == k, wide[:, k], weights) for k in range(n)], axis=1)
    return found | {
        "precision": _mean_over(present, precision),
        "recall": _mean_over(present, recall),
        "roc_auc_ovr": np.where(several, _mean_over(present, areas), np.nan),
        "pr_auc_ovr": np.where(several, _mean_over(present, precisions), np.nan),
        "brier": ratio(weights @ squared, total),
        "ece": _calibration_error(sure, hit, weights),
    }


def roc_auc(positive: NDArray[np.bool_], score: NDArray[np.float64], weights: ImageWeights) -> NDArray[np.float64]:
    """Area under the ROC curve under each row of weights, ties counting half: (draws,); NaN without both classes."""
    _, group = np.unique(score, return_inverse=True)
    starts = _starts(group)
    order = np.argsort(group, kind="stable")
    w = weights[:, order]
    p = np.add.reduceat(w * positive[order], starts, axis=1)
    q = np.add.reduceat(w * ~positive[order], starts, axis=1)
    below = np.cumsum(q, axis=1) - q
    return ratio((p * (below + q / 2)).sum(axis=1), p.sum(axis=1) * q.sum(axis=1))


def average_precision(
    positive: NDArray[np.bool_], score: NDArray[np.float64], weights: ImageWeights
) -> NDArray[np.float64]:
    """Average precision under each row of weights, as scikit-learn's: (draws,); NaN without a positive."""
    _, group = np.unique(-score, return_inverse=True)
    starts = _starts(group)
    order = np.argsort(group, kind="stable")
    w = weights[:, order]
    p = np.add.reduceat(w * positive[order], starts, axis=1)
    everything = np.cumsum(np.add.reduceat(w, starts, axis=1), axis=1)
    precision = np.nan_to_num(ratio(np.cumsum(p, axis=1), everything))
    return ratio((precision * p).sum(axis=1), p.sum(axis=1))


def _starts(group: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.searchsorted(np.sort(group), np.arange(group.max() + 1))


def _calibration_error(
    p: NDArray[np.float64], happened: NDArray[np.bool_], weights: ImageWeights
) -> NDArray[np.float64]:
    """Expected calibration error in ten bins of equal width (C. Guo et al., arXiv:1706.04599): (draws,)."""
    bins = np.eye(_BINS)[np.minimum((p * _BINS).astype(int), _BINS - 1)]
    gap = np.abs(weights @ (bins * (p - happened)[:, None])).sum(axis=1)
    return ratio(gap, weights.sum(axis=1))


def _mcc(
    right: NDArray[np.float64], support: ImageWeights, predicted: ImageWeights, total: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Matthews correlation of any number of classes (J. Gorodkin, Comput Biol Chem 28, 2004); 0 where undefined."""
    across = right * total - (support * predicted).sum(axis=1)
    spread = (total**2 - (support**2).sum(axis=1)) * (total**2 - (predicted**2).sum(axis=1))
    return np.where(spread > 0, across / np.sqrt(np.where(spread > 0, spread, 1)), 0.0)


def ratio(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns ``a / b``, and NaN where ``b`` is zero; the two have the same shape."""
    return np.where(b > 0, a / np.where(b > 0, b, 1), np.nan)


def _mean_over(present: NDArray[np.bool_], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means over the classes that are there."""
    return ratio(np.where(present, values, 0.0).sum(axis=1), present.sum(axis=1).astype(float))
