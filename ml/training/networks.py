"""Networks: a small head for each task on the backbone's features, and backbone and head as one classifier."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ml.core.taxonomy import Task, class_names
from ml.images.decoding import INPUT_SIZE
from ml.training.backbone_weights import FEATURE_SIZE
from ml.training.presets import Recipe

if TYPE_CHECKING:
    import keras

Logits = NDArray[np.float32]

_STANDARDIZE, _LOGITS = "standardize", "logits"  # names of layers of the head


def build_head(task: Task, *, hidden_units: int = 512, dropout: float, standardize: bool) -> "keras.Model":
    """Build the head on pooled features: Dense(hidden_units, relu) -> Dropout -> Dense(1) or Dense(8).

    Args:
        task: decides the number of outputs.
        hidden_units: width of the hidden layer.
        dropout: share of the hidden units that training drops.
        standardize: whether inputs are standardised first, by the statistics that :func:`set_standardization` sets. The
            published recipe does not.

    Returns:
        a network: float32 (n, 1280) -> logits, (n, 1) of malignant or (n, 8).
    """
    import keras

    inputs = keras.Input((FEATURE_SIZE,), name="features")
    x: Any = inputs
    if standardize:
        # A frozen BatchNorm is (x - mean) / sqrt(variance), and both can be set again without a new graph.
        layer = keras.layers.BatchNormalization(center=False, scale=False, epsilon=0.0, name=_STANDARDIZE)
        layer.trainable = False
        x = layer(x)
    x = keras.layers.Dense(hidden_units, activation="relu", name="hidden")(x)
    x = keras.layers.Dropout(dropout, name="dropout")(x)
    outputs = keras.layers.Dense(1 if task == "binary" else len(class_names(task)), name=_LOGITS)(x)
    return keras.Model(inputs, outputs, name=f"{task}_head")


def set_standardization(head: "keras.Model", mean: NDArray[np.float64], variance: NDArray[np.float64]) -> None:
    """Set the mean and variance by which a head standardises, (1280,) each, of the training images alone."""
    # Division by a tiny variance would amplify the noise of a feature that hardly varies.
    head.get_layer(_STANDARDIZE).set_weights([mean, np.maximum(variance, 1e-6)])


def build_classifier(
    backbone: "keras.Model", head: "keras.Model", *, bias: Sequence[float] = (0.0,), temperature: float = 1.0
) -> "keras.Model":
    """Join backbone and head: pixels (n, 224, 224, 3) in [0, 255] -> calibrated probabilities, (n, 1) or (n, 8).

    The calibration is part of the weights: the logits are (z + bias) / temperature.

    Args:
        backbone: pixels -> features.
        head: features -> logits.
        bias: (1,) or (8,), added to the logits.
        temperature: calibration temperature (C. Guo et al., arXiv:1706.04599).
    """
    import keras

    calibrated = keras.models.clone_model(head)
    calibrated.set_weights(head.get_weights())
    logits_layer = calibrated.get_layer(_LOGITS)
    kernel, own_bias = logits_layer.get_weights()
    logits_layer.set_weights([kernel / temperature, (own_bias + np.asarray(bias)) / temperature])
    pixels = keras.Input((INPUT_SIZE, INPUT_SIZE, 3), name="pixels")
    activation = keras.layers.Activation(
        "sigmoid" if own_bias.size == 1 else "softmax", dtype="float32", name="probability"
    )
    outputs = activation(calibrated(backbone(pixels)))
    return keras.Model(pixels, outputs, name=head.name.replace("head", "classifier"))


def make_head(task: Task, recipe: Recipe) -> "keras.Model":
    """Returns an untrained head as the recipe describes it: features (n, 1280) -> logits, (n, 1) or (n, 8)."""
    spec = recipe.head
    return build_head(task, hidden_units=spec.hidden_units, dropout=spec.dropout, standardize=spec.standardize)


def make_loss(task: Task, recipe: Recipe) -> "keras.losses.Loss":
    """Returns the loss of logits: cross-entropy or focal loss, with label smoothing.

    The focal loss is that of T.-Y. Lin et al., "Focal Loss for Dense Object Detection" (arXiv:1708.02002).
    """
    import keras

    gamma, smoothing = recipe.imbalance.focal_gamma, recipe.imbalance.label_smoothing
    common = {"from_logits": True, "label_smoothing": smoothing}
    if task == "binary":
        if gamma:
            return keras.losses.BinaryFocalCrossentropy(gamma=gamma, **common)
        return keras.losses.BinaryCrossentropy(**common)
    if gamma:
        return keras.losses.CategoricalFocalCrossentropy(alpha=1.0, gamma=gamma, **common)
    return keras.losses.CategoricalCrossentropy(**common)


def dropout_states(layers: "list[keras.layers.Layer]") -> list[Any]:
    """Returns the random states from which the dropout layers among these draw their masks."""
    import keras

    return [layer.seed_generator.state for layer in layers if isinstance(layer, keras.layers.Dropout) and layer.rate]
