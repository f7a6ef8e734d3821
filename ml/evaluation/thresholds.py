"""Choosing the decision threshold of the binary model."""

import math

import numpy as np

from ml.core.errors import DataError
from ml.evaluation.scores import ClassNumbers, Probabilities


def check_both_classes(truth: ClassNumbers) -> None:
    """Check that a threshold can be chosen on these images.

    Raises:
        DataError: only one class is there.
    """
    if len(np.unique(truth)) < 2:
        raise DataError(
            "the validation side holds images of one class only, so no threshold can be chosen on it; "
            "the set needs more cases"
        )


def youden_threshold(truth: ClassNumbers, malignant: Probabilities) -> float:
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
