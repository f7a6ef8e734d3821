"""Macro-F1 and the area under the ROC curve of many data sets at once, under draws of patients.

Both are computed from sums over cases. For the areas as sums over pairs of cases: N. A. Obuchowski, "Nonparametric
analysis of clustered ROC curve data", Biometrics 53(2), 1997.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ml.evaluation.scores import ClassNumbers, Probabilities

Numbers = NDArray[np.float64]


def count_confusions(case_of_image: ClassNumbers, truth: ClassNumbers, predicted: ClassNumbers, n: int) -> Numbers:
    """Count images by case, true class and predicted class.

    Args:
        case_of_image: (images,) the case of each image.
        truth: (images,) true class numbers.
        predicted: (images,) predicted class numbers.
        n: number of classes.

    Returns:
        (1, cases, n * n).
    """
    counts = np.zeros((int(case_of_image.max()) + 1, n * n))
    np.add.at(counts, (case_of_image, truth * n + predicted), 1)
    return counts[None]


def compute_macro_f1(confusions: Numbers, weights: Numbers) -> Numbers:
    """Compute macro-F1 over the classes that are present.

    Args:
        confusions: (sets, cases, n * n).
        weights: (draws, cases).

    Returns:
        (sets, draws).
    """
    n = round(confusions.shape[-1] ** 0.5)
    cells = (weights @ confusions).reshape(len(confusions), len(weights), n, n)
    support, support_and_predicted = cells.sum(-1), cells.sum(-1) + cells.sum(-2)
    f1 = 2 * np.einsum("sdkk->sdk", cells) / np.where(support_and_predicted > 0, support_and_predicted, 1)
    present = support > 0
    mean: Numbers = np.where(present, f1, 0.0).sum(-1) / np.maximum(present.sum(-1), 1)
    return mean


def count_pair_wins(case_of_image: ClassNumbers, truth: ClassNumbers, probabilities: Probabilities) -> list[Numbers]:
    """Count, for each class against the rest, the pairs of images that the probabilities order correctly.

    A pair is an image of the class and an image of another class. It counts 1 if the image of the class has the higher
    probability of that class, and half if both have the same.

    Args:
        case_of_image: (images,) the case of each image.
        truth: (images,) true class numbers.
        probabilities: (images,) of class 1, or (images, classes).

    Returns:
        For each class (1, cases of the class, other cases); of two classes only the counts of class 1.
    """
    columns = probabilities if probabilities.ndim == 2 else probabilities[:, None]
    class_of_case = np.zeros(int(case_of_image.max()) + 1, np.int64)
    class_of_case[case_of_image] = truth
    wins = []
    for k, score in zip(range(columns.shape[1]) if probabilities.ndim == 2 else (1,), columns.T, strict=True):
        cases, others = np.flatnonzero(class_of_case == k), np.flatnonzero(class_of_case != k)
        counts = np.zeros((len(cases), len(others)))
        sorted_others = [np.sort(score[case_of_image == case]) for case in others]
        for row, case in enumerate(cases):
            scores = score[case_of_image == case]
            counts[row] = [
                (np.searchsorted(s, scores, "left") + np.searchsorted(s, scores, "right")).sum() / 2
                for s in sorted_others
            ]
        wins.append(counts[None])
    return wins


def compute_roc_auc(wins: Sequence[Numbers], truth: ClassNumbers, images: Numbers, weights: Numbers) -> Numbers:
    """Compute the area under the ROC curve; of several classes, the mean area of each class against the rest.

    Args:
        wins: as :func:`count_pair_wins` returns them, for any number of data sets with the same cases.
        truth: (cases,) true class numbers.
        images: (cases,) numbers of images.
        weights: (draws, cases).

    Returns:
        (sets, draws); NaN where no class has both cases of it and other cases.
    """
    areas = []
    for k, counts in zip(range(len(wins)) if len(wins) > 1 else (1,), wins, strict=True):
        case_weights, other_weights = weights[:, truth == k], weights[:, truth != k]
        pairs = (case_weights @ images[truth == k]) * (other_weights @ images[truth != k])
        won = ((case_weights @ counts) * other_weights).sum(-1)
        areas.append(np.where(pairs > 0, won / np.where(pairs > 0, pairs, 1), np.nan))
    stacked = np.stack(areas)
    present = np.isfinite(stacked)
    total = present.sum(0)
    return np.where(total > 0, np.where(present, stacked, 0.0).sum(0) / np.maximum(total, 1), np.nan)
