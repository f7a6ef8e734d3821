"""What the fits of one training learn from, and the batches of an epoch.

Order, views and dropout of an epoch are made of the seed and its number alone: so it does not matter in how many
processes the epochs were done.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ml.core.taxonomy import Task, class_names
from ml.images.decoding import Pixels
from ml.training.backbone_weights import FEATURE_SIZE
from ml.training.features import Features
from ml.training.presets import Recipe
from ml.training.sampling import Indices, class_weights, sample_epoch

_CHUNK = 1024
"""Rows at a time where features are only looked through."""


@dataclass(frozen=True)
class Examples:
    """What the fits of one training learn from.

    Attributes:
        task: which classes.
        recipe: the recipe.
        truth: (images,) class numbers.
        features: float32 (views, images, 1280), kept on disk; what an image has no view of is not read.
        views: (images,) how many views there are of each.
        pixels: positions -> uint8 (n, 224, 224, 3), for fine-tuning.
        names: (images,) pixel hashes, from which views are made.
    """

    task: Task
    recipe: Recipe
    truth: Indices
    features: Features
    views: Indices
    pixels: Callable[[Indices], Pixels]
    names: list[str]

    @property
    def outputs(self) -> int:
        """1 or 8."""
        return 1 if self.task == "binary" else len(class_names(self.task))


def choose_batches(
    examples: Examples, learnt: Indices, seed: int, epochs: range, size: int
) -> Iterator[tuple[Any, ...]]:
    """Some at a time, through all these epochs: epoch, positions, numbers of views, targets and weights."""
    truth = examples.truth[learnt]
    weights = class_weights(truth, examples.recipe.imbalance.class_weights)
    by_class = np.array([weights.get(k, 0.0) for k in range(max(weights) + 1)], np.float32)
    for epoch in epochs:
        rows = learnt[sample_epoch(truth, examples.recipe.imbalance.sampling, seed, epoch)]
        numbers = np.random.default_rng([seed, epoch, 1]).integers(0, examples.views[rows])
        for start in range(0, len(rows), size):
            few = rows[start : start + size]
            labels = examples.truth[few]
            targets = labels[:, None] if examples.outputs == 1 else np.eye(examples.outputs)[labels]
            yield epoch, few, numbers[start : start + size], targets.astype(np.float32), by_class[labels]


def feature_statistics(features: Features, rows: Indices) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and variance of view 0, (1280,) each, without holding all of it."""
    total, squares = np.zeros(FEATURE_SIZE), np.zeros(FEATURE_SIZE)
    first = features[0, rows[0]].astype(np.float64)  # taken off, so that squares of large numbers do not cancel
    for start in range(0, len(rows), _CHUNK):
        part = features[0, rows[start : start + _CHUNK]].astype(np.float64) - first
        total += part.sum(axis=0)
        squares += (part**2).sum(axis=0)
    mean = total / len(rows)
    return mean + first, squares / len(rows) - mean**2
