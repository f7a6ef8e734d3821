"""What an epoch takes of each class, and what each class weighs in the loss."""

import numpy as np
from numpy.typing import NDArray

from ml.training.presets import Recipe

Indices = NDArray[np.int64]


def sample_epoch(truth: Indices, sampling: str, seed: int, epoch: int) -> Indices:
    """Which positions an epoch takes, in which order: as many as there are.

    ``sqrt``: a class comes as often as the root of its share; its pictures come equally often, give or take one.
    """
    rng = np.random.default_rng([seed, epoch])
    n = len(truth)
    if sampling == "none":
        return rng.permutation(n)
    labels, counts = np.unique(truth, return_counts=True)
    roots = np.sqrt(counts)
    # Rounded so that the sum stays n: what is cut off one class is carried to the next.
    ends = np.rint(np.cumsum(roots) / roots.sum() * n).astype(int)
    wanted = np.diff(ends, prepend=0)
    taken = []
    for label, number in zip(labels, wanted, strict=True):
        mine = np.flatnonzero(truth == label)
        taken.append(
            np.concatenate([rng.permutation(mine) for _ in range(-(-number // len(mine)))] or [mine[:0]])[:number]
        )
    return rng.permutation(np.concatenate(taken))


def class_weights(truth: Indices, kind: str) -> dict[int, float]:
    """The weight of each class in the loss, scaled so that the mean weight of an image is 1."""
    labels, counts = np.unique(truth, return_counts=True)
    raw = {"none": np.ones(len(counts)), "sqrt": 1 / np.sqrt(counts), "balanced": 1 / counts}[kind]
    scale = len(truth) / (raw * counts).sum()
    return {int(k): float(w * scale) for k, w in zip(labels, raw, strict=True)}


def effective_class_prior(truth: Indices, recipe: Recipe) -> dict[int, float]:
    """The share of each class as sampling and weights let the network see it."""
    labels, counts = np.unique(truth, return_counts=True)
    seen = np.sqrt(counts) if recipe.imbalance.sampling == "sqrt" else counts.astype(float)
    weights = class_weights(truth, recipe.imbalance.class_weights)
    # Under sampling, the weights still are those of the images as they are.
    mass = seen * np.array([weights[int(k)] for k in labels])
    return {int(k): float(m / mass.sum()) for k, m in zip(labels, mass, strict=True)}
