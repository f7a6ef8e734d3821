"""Where a network looks: Grad-CAM, with a control that shows whether the map depends on what was learnt.

R. R. Selvaraju et al., "Grad-CAM", ICCV 2017 (arXiv:1610.02391). J. Adebayo et al., "Sanity Checks for Saliency Maps",
NeurIPS 2018 (arXiv:1810.03292): a map that a network with random weights gives as well says nothing of the model.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ml.evaluation.scores import LabelledPredictions
from ml.images.decoding import INPUT_SIZE, Pixels

if TYPE_CHECKING:
    import keras

Maps = NDArray[np.float32]

_LAST_CONVOLUTION = "top_activation"


def grad_cam(backbone: "keras.Model", head: "keras.Model", pixels: Pixels, classes: NDArray[np.int64]) -> Maps:
    """Which parts of pictures speak for a class.

    Args:
        backbone: EfficientNetB0 without its top, globally average-pooled.
        head: features -> logits, (n, 1) of malignant or (n, 8).
        pixels: uint8 (n, 224, 224, 3).
        classes: (n,) class numbers; of the binary model 0 is benign, whose logit is the other's negative.

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
            spoken = logits[:, 0] * tf.cast(2 * classes - 1, logits.dtype)
        else:
            spoken = tf.gather(logits, classes, batch_dims=1)
    gradient = tf.reduce_mean(tape.gradient(spoken, activation), axis=(1, 2), keepdims=True)
    maps = np.maximum(np.asarray(tf.reduce_sum(gradient * activation, axis=3)), 0)
    top = maps.max(axis=(1, 2), keepdims=True)
    scaled = np.where(top > 0, maps / np.where(top > 0, top, 1), 0).astype(np.float32)
    large = [Image.fromarray(one).resize((INPUT_SIZE, INPUT_SIZE), Image.Resampling.BILINEAR) for one in scaled]
    return np.stack([np.asarray(one) for one in large])


def randomized(backbone: "keras.Model") -> "keras.Model":
    """The same backbone with freshly drawn weights; only how it scales pixels stays."""
    import keras

    keras.utils.set_random_seed(0)
    control = keras.models.clone_model(backbone)
    for new, old in zip(control.layers, backbone.layers, strict=True):
        if isinstance(old, keras.layers.Normalization):
            new.set_weights(old.get_weights())
            new.finalize_state()
    return control


def agreement(maps: Maps, controls: Maps) -> NDArray[np.float64]:
    """Spearman's rank correlation of each map with its control, (n,); near 1, the map does not show what was learnt."""
    from scipy.stats import spearmanr

    few = slice(16, None, 32)  # a point for each cell of the last convolution
    found = []
    for one, other in zip(maps[:, few, few], controls[:, few, few], strict=True):
        varies = np.ptp(one) > 0 and np.ptp(other) > 0
        found.append(float(spearmanr(one.ravel(), other.ravel()).statistic) if varies else np.nan)
    return np.array(found)


def choose_cases(scores: LabelledPredictions, per_kind: int = 3) -> dict[str, list[int]]:
    """Rows to look at: ``correct`` and ``wrong``, the surest first, and ``borderline``, the least sure.

    Of different patients, as far as there are any.
    """
    wide = scores.probabilities
    if scores.task == "binary":
        threshold = np.array([rule.threshold for rule in _rules(scores)], dtype=float)
        # How far to the threshold, of what there is on that side of it.
        room = np.where(wide >= threshold, np.maximum(1 - threshold, 1e-9), np.maximum(threshold, 1e-9))
        sure = np.abs(wide - threshold) / room
    else:
        shifted = np.log(np.maximum(wide, 1e-12)) + np.array([rule.offsets or (0.0,) * 8 for rule in _rules(scores)])
        ordered = np.sort(shifted, axis=1)
        sure = ordered[:, -1] - ordered[:, -2]
    right = scores.predicted == scores.truth
    patients = scores.rows["patient"].to_numpy(dtype=str)
    surest = np.argsort(-sure, kind="stable")
    return {
        "correct": _spread([k for k in surest if right[k]], patients, per_kind),
        "wrong": _spread([k for k in surest if not right[k]], patients, per_kind),
        "borderline": _spread(list(surest[::-1]), patients, per_kind),
    }


def _rules(scores: LabelledPredictions) -> list:  # type: ignore[type-arg]
    return list(scores.rule) if isinstance(scores.rule, list) else [scores.rule] * len(scores.truth)


def _spread(rows: list[int], patients: NDArray[np.str_], most: int) -> list[int]:
    """The first rows, of as many patients as there are."""
    taken: list[int] = []
    seen: dict[str, int] = {}
    for row in rows:
        seen[patients[row]] = seen.get(patients[row], 0) + 1
        if seen[patients[row]] == 1:
            taken.append(int(row))
    taken += [int(row) for row in rows if row not in set(taken)]
    return taken[:most]
