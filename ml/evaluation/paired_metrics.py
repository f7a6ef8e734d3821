"""Macro-F1 and the area under the ROC curve of many data sets at once, under draws of patients.

N. A. Obuchowski, "Nonparametric analysis of clustered ROC curve data", Biometrics 53(2), 1997, for the areas as sums
over pairs of cases.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ml.evaluation.scores import ClassNumbers, Probabilities

Numbers = NDArray[np.float64]


def confusions(of: ClassNumbers, truth: ClassNumbers, called: ClassNumbers, n: int) -> Numbers:
    """Images by unit, true and called class: (1, units, n * n).

    Args:
        of: (images,) the unit of each image.
        truth: (images,) class numbers.
        called: (images,) class numbers.
        n: number of classes.
    """
    found = np.zeros((int(of.max()) + 1, n * n))
    np.add.at(found, (of, truth * n + called), 1)
    return found[None]


def f1_of(confusion: Numbers, weights: Numbers) -> Numbers:
    """Macro-F1 over the classes that are there: (sets, draws).

    Args:
        confusion: (sets, units, n * n).
        weights: (draws, units).
    """
    n = round(confusion.shape[-1] ** 0.5)
    cells = (weights @ confusion).reshape(len(confusion), len(weights), n, n)
    support, both = cells.sum(-1), cells.sum(-1) + cells.sum(-2)
    f1 = 2 * np.einsum("sdkk->sdk", cells) / np.where(both > 0, both, 1)
    there = support > 0
    mean: Numbers = np.where(there, f1, 0.0).sum(-1) / np.maximum(there.sum(-1), 1)
    return mean


def pairs(of: ClassNumbers, truth: ClassNumbers, probabilities: Probabilities) -> list[Numbers]:
    """For each class that is told from the rest, sums over the pairs of images of a unit of it and one of the rest.

    A pair counts 1 if the image of the class has the higher probability of it, and half where they are the same.

    Args:
        of: (images,) the unit of each image.
        truth: (images,) class numbers.
        probabilities: (images,) of class 1, or (images, classes).

    Returns:
        Of each class (1, units of it, other units); of two classes only that of class 1.
    """
    wide = probabilities if probabilities.ndim == 2 else probabilities[:, None]
    class_of = np.zeros(int(of.max()) + 1, np.int64)
    class_of[of] = truth
    found = []
    for k, score in zip(range(wide.shape[1]) if probabilities.ndim == 2 else (1,), wide.T, strict=True):
        mine, others = np.flatnonzero(class_of == k), np.flatnonzero(class_of != k)
        sums = np.zeros((len(mine), len(others)))
        sorted_others = [np.sort(score[of == unit]) for unit in others]
        for row, unit in enumerate(mine):
            own = score[of == unit]
            sums[row] = [
                (np.searchsorted(s, own, "left") + np.searchsorted(s, own, "right")).sum() / 2 for s in sorted_others
            ]
        found.append(sums[None])
    return found


def area_of(found: Sequence[Numbers], truth: ClassNumbers, images: Numbers, weights: Numbers) -> Numbers:
    """Area under the ROC curve, of several classes the mean of each against the rest: (sets, draws).

    Args:
        found: what :func:`pairs` returned, of any number of data sets with the same units.
        truth: (units,) class numbers.
        images: (units,) numbers of images.
        weights: (draws, units).
    """
    areas = []
    for k, sums in zip(range(len(found)) if len(found) > 1 else (1,), found, strict=True):
        mine, others = weights[:, truth == k], weights[:, truth != k]
        all_pairs = (mine @ images[truth == k]) * (others @ images[truth != k])
        won = ((mine @ sums) * others).sum(-1)
        areas.append(np.where(all_pairs > 0, won / np.where(all_pairs > 0, all_pairs, 1), np.nan))
    stacked = np.stack(areas)
    there = np.isfinite(stacked)
    total = there.sum(0)
    return np.where(total > 0, np.where(there, stacked, 0.0).sum(0) / np.maximum(total, 1), np.nan)
