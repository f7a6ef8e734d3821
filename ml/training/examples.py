"""The images that one training uses, and the batches of an epoch.

Seed and number of an epoch alone determine its order, views and dropout. A training that was resumed in another process
therefore gives the same result.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ml.core.taxonomy import Task, class_names
from ml.images.decoding import Pixels
from ml.training.backbone_weights import FEATURE_SIZE
from ml.training.extractors import Features
from ml.training.presets import Recipe
from ml.training.sampling import Indices, class_weights, sample_epoch

_CHUNK = 1024
"""Rows that are read at a time where features are only summed up."""


@dataclass(frozen=True)
class Examples:
    """The images of one training, of which each fit uses some.

    Attributes:
        task: the model's task.
        recipe: the model's recipe.
        truth: (images,) class numbers.
        features: float32 (views, images, 1280), on disk; rows of views that an image lacks are never read.
        view_counts: (images,) number of views of each.
        load_pixels: positions (n,) -> uint8 (n, 224, 224, 3), for fine-tuning.
        pixel_hashes: (images,) from which views are made.
    """

    task: Task
    recipe: Recipe
    truth: Indices
    features: Features
    view_counts: Indices
    load_pixels: Callable[[Indices], Pixels]
    pixel_hashes: list[str]

    @property
    def output_size(self) -> int:
        """Number of the network's logits: 1 or 8."""
        return 1 if self.task == "binary" else len(class_names(self.task))


def iterate_batches(
    examples: Examples, training_rows: Indices, seed: int, epochs: range, size: int
) -> Iterator[tuple[Any, ...]]:
    """Yields the batches of these epochs, in order.

    Args:
        examples: the images of the training.
        training_rows: (n,) positions of the images to train on.
        seed: seed of the training.
        epochs: numbers of the epochs.
        size: images a batch; the last batch of an epoch may have fewer.

    Yields:
        the epoch; positions (size,); the number of the view to take of each (size,); targets float32 (size, 1 or 8);
        weights in the loss, float32 (size,).
    """
    truth = examples.truth[training_rows]
    weights = class_weights(truth, examples.recipe.imbalance.class_weights)
    weight_of_class = np.array([weights.get(k, 0.0) for k in range(max(weights) + 1)], np.float32)
    for epoch in epochs:
        rows = training_rows[sample_epoch(truth, examples.recipe.imbalance.sampling, seed, epoch)]
        views = np.random.default_rng([seed, epoch, 1]).integers(0, examples.view_counts[rows])
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            labels = examples.truth[batch]
            targets = labels[:, None] if examples.output_size == 1 else np.eye(examples.output_size)[labels]
            yield epoch, batch, views[start : start + size], targets.astype(np.float32), weight_of_class[labels]


def feature_statistics(features: Features, rows: Indices) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns mean and variance of view 0 over these rows, float64 (1280,) each, reading a part at a time."""
    total, squares = np.zeros(FEATURE_SIZE), np.zeros(FEATURE_SIZE)
    first = features[0, rows[0]].astype(np.float64)  # subtracted, so that squares of large numbers do not cancel
    for start in range(0, len(rows), _CHUNK):
        part = features[0, rows[start : start + _CHUNK]].astype(np.float64) - first
        total += part.sum(axis=0)
        squares += (part**2).sum(axis=0)
    mean = total / len(rows)
    return mean + first, squares / len(rows) - mean**2
