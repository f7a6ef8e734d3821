"""Metrics of one side, by image and by case.

Metric names are the field's, and are the names that policies use. Every metric is a function of the images' weights.
The value itself has all weights one; for an interval, a draw of patients gives the weights. So there is one way to
compute a metric, and a thousand draws take seconds.
"""

import numpy as np
from numpy.typing import NDArray

from ml.core.taxonomy import Task, class_names
from ml.evaluation.scores import ClassNumbers, LabelledPredictions, Probabilities

ImageWeights = NDArray[np.float64]
MetricValues = dict[str, NDArray[np.float64]]

_BINS = 10


def compute_weighted_metrics(predictions: LabelledPredictions, weights: ImageWeights) -> MetricValues:
    """Compute every metric under each row of weights.

    ``patient_recognition_rate`` is the mean over patients of the share of images that are classified correctly:
    F. A. Spanhol et al., IEEE TBME 63(7), 2016.

    Args:
        predictions: of n images.
        weights: (draws, n), the same for all images of a patient.

    Returns:
        name -> (draws,); NaN where a metric cannot be computed. Names that begin with ``patient_`` are of cases.
        Classes without weight do not count in means over classes.
    """
    values = _compute_metrics(
        predictions.task, predictions.truth, predictions.probabilities, predictions.predicted, weights
    )
    cases = predictions.cases
    case_weights = weights[:, cases.first_rows]
    case_values = _compute_metrics(predictions.task, cases.truth, cases.probabilities, cases.predicted, case_weights)
    values |= {f"patient_{name}": case_value for name, case_value in case_values.items()}
    values["patient_recognition_rate"] = ratio(case_weights @ cases.correct_shares, case_weights.sum(axis=1))
    return values


def _compute_metrics(
    task: Task, truth: ClassNumbers, probabilities: Probabilities, predicted: ClassNumbers, weights: ImageWeights
) -> MetricValues:
    n = len(class_names(task))
    cells = np.zeros((len(truth), n * n))
    cells[np.arange(len(truth)), truth * n + predicted] = 1
    confusion = (weights @ cells).reshape(-1, n, n)
    true_positives = np.einsum("dkk->dk", confusion)
    support, predicted_weight = confusion.sum(axis=2), confusion.sum(axis=1)
    total, present = support.sum(axis=1), support > 0
    recall, f1 = ratio(true_positives, support), ratio(2 * true_positives, support + predicted_weight)
    # A class that is present and never predicted has a precision of 0, which is scikit-learn's convention, too.
    precision = np.where(predicted_weight > 0, ratio(true_positives, predicted_weight), 0.0)
    wide = probabilities if task == "subtype" else np.stack([1 - probabilities, probabilities], axis=1)
    likeliest = wide.argmax(axis=1)
    confidence, is_correct = wide[np.arange(len(predicted)), likeliest], likeliest == truth
    squared_errors = ((wide - np.eye(n)[truth]) ** 2).sum(axis=1)
    accuracy = ratio(true_positives.sum(axis=1), total)
    values = {
        "accuracy": accuracy,
        "balanced_accuracy": _mean_over_present(present, recall),
        "micro_f1": accuracy,  # the same where each image has one label
        "macro_f1": _mean_over_present(present, f1),
        "weighted_f1": ratio((np.nan_to_num(f1) * support).sum(axis=1), total),
        "mcc": _matthews_correlation(true_positives.sum(axis=1), support, predicted_weight, total),
    }
    if task == "binary":
        both = present.all(axis=1)
        values |= {
            "precision": precision[:, 1],
            "recall": np.where(present[:, 1], recall[:, 1], 0.0),
            "specificity": np.where(present[:, 0], recall[:, 0], np.nan),
            "f1": np.nan_to_num(f1[:, 1]),
            "roc_auc": np.where(both, roc_auc(truth == 1, probabilities, weights), np.nan),
            "pr_auc": np.where(both, average_precision(truth == 1, probabilities, weights), np.nan),
            "brier": ratio(weights @ squared_errors, 2 * total),  # of one probability, as in scikit-learn
            "ece": _expected_calibration_error(probabilities, truth == 1, weights),
        }
        return values
    several = present.sum(axis=1) > 1
    areas = np.stack([roc_auc(truth == k, wide[:, k], weights) for k in range(n)], axis=1)
    precisions = np.stack([average_precision(truth == k, wide[:, k], weights) for k in range(n)], axis=1)
    return values | {
        "precision": _mean_over_present(present, precision),
        "recall": _mean_over_present(present, recall),
        "roc_auc_ovr": np.where(several, _mean_over_present(present, areas), np.nan),
        "pr_auc_ovr": np.where(several, _mean_over_present(present, precisions), np.nan),
        "brier": ratio(weights @ squared_errors, total),
        "ece": _expected_calibration_error(confidence, is_correct, weights),
    }


def roc_auc(positive: NDArray[np.bool_], score: NDArray[np.float64], weights: ImageWeights) -> NDArray[np.float64]:
    """Compute the area under the ROC curve under each row of weights; ties count half.

    Args:
        positive: (n,) whether an image is of the positive class.
        score: (n,) higher for the positive class.
        weights: (draws, n).

    Returns:
        (draws,); NaN where a draw lacks one of the two classes.
    """
    _, group = np.unique(score, return_inverse=True)
    starts = _group_starts(group)
    order = np.argsort(group, kind="stable")
    ordered = weights[:, order]
    positives = np.add.reduceat(ordered * positive[order], starts, axis=1)
    negatives = np.add.reduceat(ordered * ~positive[order], starts, axis=1)
    below = np.cumsum(negatives, axis=1) - negatives
    wins = (positives * (below + negatives / 2)).sum(axis=1)
    return ratio(wins, positives.sum(axis=1) * negatives.sum(axis=1))


def average_precision(
    positive: NDArray[np.bool_], score: NDArray[np.float64], weights: ImageWeights
) -> NDArray[np.float64]:
    """Compute the average precision under each row of weights, as scikit-learn defines it.

    Args:
        positive: (n,) whether an image is of the positive class.
        score: (n,) higher for the positive class.
        weights: (draws, n).

    Returns:
        (draws,); NaN where a draw has no positive image.
    """
    _, group = np.unique(-score, return_inverse=True)
    starts = _group_starts(group)
    order = np.argsort(group, kind="stable")
    ordered = weights[:, order]
    positives = np.add.reduceat(ordered * positive[order], starts, axis=1)
    predicted_positive = np.cumsum(np.add.reduceat(ordered, starts, axis=1), axis=1)
    precision = np.nan_to_num(ratio(np.cumsum(positives, axis=1), predicted_positive))
    return ratio((precision * positives).sum(axis=1), positives.sum(axis=1))


def _group_starts(group: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns where each group of equal scores begins in sorted order."""
    return np.searchsorted(np.sort(group), np.arange(group.max() + 1))


def _expected_calibration_error(
    probability: NDArray[np.float64], came_true: NDArray[np.bool_], weights: ImageWeights
) -> NDArray[np.float64]:
    """Expected calibration error in ten bins of equal width (C. Guo et al., arXiv:1706.04599): (draws,)."""
    bins = np.eye(_BINS)[np.minimum((probability * _BINS).astype(int), _BINS - 1)]
    gap = np.abs(weights @ (bins * (probability - came_true)[:, None])).sum(axis=1)
    return ratio(gap, weights.sum(axis=1))


def _matthews_correlation(
    correct: NDArray[np.float64], support: ImageWeights, predicted: ImageWeights, total: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Matthews correlation of any number of classes (J. Gorodkin, Comput Biol Chem 28, 2004); 0 where undefined."""
    covariance = correct * total - (support * predicted).sum(axis=1)
    variances = (total**2 - (support**2).sum(axis=1)) * (total**2 - (predicted**2).sum(axis=1))
    return np.where(variances > 0, covariance / np.sqrt(np.where(variances > 0, variances, 1)), 0.0)


def ratio(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns ``a / b``, and NaN where ``b`` is zero; the two have the same shape."""
    return np.where(b > 0, a / np.where(b > 0, b, 1), np.nan)


def _mean_over_present(present: NDArray[np.bool_], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns means (draws,) over the classes that are present; both arguments are (draws, classes)."""
    return ratio(np.where(present, values, 0.0).sum(axis=1), present.sum(axis=1).astype(float))
