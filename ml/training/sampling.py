"""Class imbalance: how an epoch samples the classes, and what each class weighs in the loss."""

import numpy as np
from numpy.typing import NDArray

from ml.training.presets import Recipe

Indices = NDArray[np.int64]


def sample_epoch(truth: Indices, sampling: str, seed: int, epoch: int) -> Indices:
    """Returns the positions that an epoch trains on, in order, int (images,): as many as there are images.

    Args:
        truth: (images,) class numbers.
        sampling: ``none`` takes each image once. ``sqrt`` takes a class in proportion to the square root of its count,
            and its images equally often, give or take one.
        seed: seed of the training.
        epoch: number of the epoch; seed and epoch determine the order.
    """
    rng = np.random.default_rng([seed, epoch])
    n = len(truth)
    if sampling == "none":
        return rng.permutation(n)
    labels, counts = np.unique(truth, return_counts=True)
    roots = np.sqrt(counts)
    # Rounded so that the sum stays n: what rounding takes from one class is carried to the next.
    ends = np.rint(np.cumsum(roots) / roots.sum() * n).astype(int)
    draws = np.diff(ends, prepend=0)
    sampled = []
    for label, number in zip(labels, draws, strict=True):
        positions = np.flatnonzero(truth == label)
        rounds = [rng.permutation(positions) for _ in range(-(-number // len(positions)))]
        sampled.append(np.concatenate(rounds or [positions[:0]])[:number])
    return rng.permutation(np.concatenate(sampled))


def class_weights(truth: Indices, kind: str) -> dict[int, float]:
    """Returns the weight of each class in the loss, scaled so that the mean weight of an image is 1.

    Args:
        truth: (images,) class numbers.
        kind: ``none`` weighs all classes alike, ``sqrt`` by 1 / sqrt(count), ``balanced`` by 1 / count.
    """
    labels, counts = np.unique(truth, return_counts=True)
    raw = {"none": np.ones(len(counts)), "sqrt": 1 / np.sqrt(counts), "balanced": 1 / counts}[kind]
    scale = len(truth) / (raw * counts).sum()
    return {int(k): float(w * scale) for k, w in zip(labels, raw, strict=True)}


def effective_class_prior(truth: Indices, recipe: Recipe) -> dict[int, float]:
    """Returns the class prior that training sees: each class's share after sampling and class weights.

    Args:
        truth: (images,) class numbers of the training images.
        recipe: the model's recipe.
    """
    labels, counts = np.unique(truth, return_counts=True)
    sampled_counts = np.sqrt(counts) if recipe.imbalance.sampling == "sqrt" else counts.astype(float)
    weights = class_weights(truth, recipe.imbalance.class_weights)
    # With sampling, too, the weights are those of the unsampled counts.
    mass = sampled_counts * np.array([weights[int(k)] for k in labels])
    return {int(k): float(m / mass.sum()) for k, m in zip(labels, mass, strict=True)}
