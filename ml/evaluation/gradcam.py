"""Grad-CAM: maps of where a network looks, with a control that shows whether they depend on what it has learnt.

R. R. Selvaraju et al., "Grad-CAM", ICCV 2017 (arXiv:1610.02391). J. Adebayo et al., "Sanity Checks for Saliency Maps",
NeurIPS 2018 (arXiv:1810.03292): where a network with random weights
gives the same map, the map says nothing of the model.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ml.core.columns import read_texts
from ml.evaluation.scores import LabelledPredictions
from ml.images.decoding import INPUT_SIZE, Pixels

if TYPE_CHECKING:
    import keras

Maps = NDArray[np.float32]

_LAST_CONVOLUTION = "top_activation"


def compute_grad_cam(backbone: "keras.Model", head: "keras.Model", pixels: Pixels, classes: NDArray[np.int64]) -> Maps:
    """Compute which parts of pictures speak for a class.

    Args:
        backbone: EfficientNetB0 without its top, globally average-pooled.
        head: features -> logits, (n, 1) of malignant or (n, 8).
        pixels: uint8 (n, 224, 224, 3).
        classes: (n,) class numbers; of the binary model 0 is benign, whose logit is the negative of malignant's.

    Returns:
        float32 (n, 224, 224), each scaled to [0, 1]; all 0 where nothing speaks for the class.
    """
    import keras
    import tensorflow as tf

    convolution = keras.Model(backbone.input, backbone.get_layer(_LAST_CONVOLUTION).output)
    activation = convolution(pixels.astype(np.float32), training=False)
    with tf.GradientTape() as tape:
        tape.watch(activation)
        logits = head(tf.reduce_mean(activation, axis=(1, 2)), training=False)
        if logits.shape[1] == 1:
            class_logits = logits[:, 0] * tf.cast(2 * classes - 1, logits.dtype)
        else:
            class_logits = tf.gather(logits, classes, batch_dims=1)
    gradient = tf.reduce_mean(tape.gradient(class_logits, activation), axis=(1, 2), keepdims=True)
    maps = np.maximum(np.asarray(tf.reduce_sum(gradient * activation, axis=3)), 0)
    top = maps.max(axis=(1, 2), keepdims=True)
    scaled = np.where(top > 0, maps / np.where(top > 0, top, 1), 0).astype(np.float32)
    resized = [Image.fromarray(m).resize((INPUT_SIZE, INPUT_SIZE), Image.Resampling.BILINEAR) for m in scaled]
    return np.stack([np.asarray(m) for m in resized])


def randomize_weights(backbone: "keras.Model") -> "keras.Model":
    """Returns the same backbone with random weights. Its normalisation of pixels stays the same."""
    import keras

    keras.utils.set_random_seed(0)
    control = keras.models.clone_model(backbone)
    for new, old in zip(control.layers, backbone.layers, strict=True):
        if isinstance(old, keras.layers.Normalization):
            new.set_weights(old.get_weights())
            new.finalize_state()
    return control


def correlate_maps(maps: Maps, controls: Maps) -> NDArray[np.float64]:
    """Compute Spearman's rank correlation of each map with its control.

    A correlation near 1 means that the map does not show what the network has learnt.

    Args:
        maps: (n, 224, 224).
        controls: likewise, of the network with random weights.

    Returns:
        (n,); NaN where one of the two maps is constant.
    """
    from scipy.stats import spearmanr

    points = slice(16, None, 32)  # one for each cell of the last convolution
    correlations = []
    for heat, control in zip(maps[:, points, points], controls[:, points, points], strict=True):
        both_vary = np.ptp(heat) > 0 and np.ptp(control) > 0
        correlations.append(float(spearmanr(heat.ravel(), control.ravel()).statistic) if both_vary else np.nan)
    return np.array(correlations)


def choose_examples(predictions: LabelledPredictions, per_kind: int = 3) -> dict[str, list[int]]:
    """Choose images to show: ``correct`` and ``wrong``, the surest first, and ``borderline``, the least sure first.

    They are of different patients, as far as there are enough.

    Args:
        predictions: of one side.
        per_kind: number of images of each kind.

    Returns:
        kind -> row numbers.
    """
    wide = predictions.probabilities
    if predictions.task == "binary":
        threshold = np.array([rule.threshold for rule in _rules_by_row(predictions)], dtype=float)
        # The distance to the threshold, as a share of the largest possible distance on that side.
        largest = np.where(wide >= threshold, np.maximum(1 - threshold, 1e-9), np.maximum(threshold, 1e-9))
        sure = np.abs(wide - threshold) / largest
    else:
        adjusted = np.log(np.maximum(wide, 1e-12)) + np.array(
            [rule.offsets or (0.0,) * 8 for rule in _rules_by_row(predictions)]
        )
        ordered = np.sort(adjusted, axis=1)
        sure = ordered[:, -1] - ordered[:, -2]
    is_correct = predictions.predicted == predictions.truth
    patients = read_texts(predictions.rows, "patient")
    surest = np.argsort(-sure, kind="stable")
    return {
        "correct": _prefer_new_patients([k for k in surest if is_correct[k]], patients, per_kind),
        "wrong": _prefer_new_patients([k for k in surest if not is_correct[k]], patients, per_kind),
        "borderline": _prefer_new_patients(list(surest[::-1]), patients, per_kind),
    }


def _rules_by_row(predictions: LabelledPredictions) -> list:  # type: ignore[type-arg]
    return list(predictions.rule) if isinstance(predictions.rule, list) else [predictions.rule] * len(predictions.truth)


def _prefer_new_patients(rows: list[int], patients: NDArray[np.str_], limit: int) -> list[int]:
    """Returns at most ``limit`` rows, in order: the first row of each patient, and then the other rows."""
    taken: list[int] = []
    seen: dict[str, int] = {}
    for row in rows:
        seen[patients[row]] = seen.get(patients[row], 0) + 1
        if seen[patients[row]] == 1:
            taken.append(int(row))
    taken += [int(row) for row in rows if row not in set(taken)]
    return taken[:limit]
