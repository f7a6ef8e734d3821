"""Choosing the decision threshold of the binary model."""

import math

import numpy as np

from ml.core.errors import DataError
from ml.evaluation.scores import ClassNumbers, Probabilities


def check_both_classes(truth: ClassNumbers) -> None:
    """Check that a decision threshold can be chosen on these images.

    Args:
        truth: (n,) 0 benign, 1 malignant.

    Raises:
        DataError: the images are all of one class.
    """
    if len(np.unique(truth)) < 2:
        raise DataError(
            "the validation side holds images of one class only, so no threshold can be chosen on it; "
            "the set needs more cases"
        )


def youden_threshold(truth: ClassNumbers, malignant: Probabilities) -> float:
    """Returns the decision threshold that maximises Youden's J = sensitivity + specificity - 1.

    The threshold lies in the middle between the best score and the next lower one, since a threshold that sits on a
    score is fragile. W. J. Youden, "Index for rating diagnostic tests", Cancer 3(1), 1950.

    Args:
        truth: (n,) 0 benign, 1 malignant.
        malignant: (n,) probability of malignant.

    Raises:
        DataError: the images are all of one class, so sensitivity or specificity is undefined.
    """
    from sklearn.metrics import roc_curve

    check_both_classes(truth)
    false_positive, true_positive, thresholds = roc_curve(truth, malignant, drop_intermediate=False)
    best = thresholds[int(np.argmax(true_positive - false_positive))]
    if not math.isfinite(best):  # the corner of the curve where no image is labelled malignant
        return math.nextafter(1.0, 2.0)
    below = malignant[malignant < best]
    return float((best + below.max()) / 2) if len(below) else float(best)
