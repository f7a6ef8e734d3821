"""The networks: a small head for each task on the backbone's features, and backbone and head joined."""

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
    """The head on pooled features: Dense(hidden_units, relu) -> Dropout -> Dense(1) or Dense(8).

    Args:
        task: which output to build.
        hidden_units: width of the hidden layer.
        dropout: share of the hidden units that are dropped in training.
        standardize: whether inputs are standardised first, by what :func:`set_standardization` is given. The published
            recipe does not.

    Returns:
        float32 (n, 1280) -> logits, (n, 1) of malignant or (n, 8).
    """
    import keras

    inputs = keras.Input((FEATURE_SIZE,), name="features")
    x: Any = inputs
    if standardize:
        # Frozen, it is nothing but (x - mean) / sqrt(variance), both of which can be set anew without a new graph.
        layer = keras.layers.BatchNormalization(center=False, scale=False, epsilon=0.0, name=_STANDARDIZE)
        layer.trainable = False
        x = layer(x)
    x = keras.layers.Dense(hidden_units, activation="relu", name="hidden")(x)
    x = keras.layers.Dropout(dropout, name="dropout")(x)
    outputs = keras.layers.Dense(1 if task == "binary" else len(class_names(task)), name=_LOGITS)(x)
    return keras.Model(inputs, outputs, name=f"{task}_head")


def set_standardization(head: "keras.Model", mean: NDArray[np.float64], variance: NDArray[np.float64]) -> None:
    """Have a head standardise by these, (1280,) each: of what is learnt from, and of nothing else."""
    # The variance of a feature that hardly varies would blow up what little noise it has.
    head.get_layer(_STANDARDIZE).set_weights([mean, np.maximum(variance, 1e-6)])


def build_classifier(
    backbone: "keras.Model", head: "keras.Model", *, bias: Sequence[float] = (0.0,), temperature: float = 1.0
) -> "keras.Model":
    """Backbone and head as one network: pixels (n, 224, 224, 3) in [0, 255] -> probabilities, (n, 1) or (n, 8).

    Calibration is built in: the logits are (z + bias) / temperature.
    """
    import keras

    calibrated = keras.models.clone_model(head)
    calibrated.set_weights(head.get_weights())
    last = calibrated.get_layer(_LOGITS)
    kernel, own = last.get_weights()
    last.set_weights([kernel / temperature, (own + np.asarray(bias)) / temperature])
    pixels = keras.Input((INPUT_SIZE, INPUT_SIZE, 3), name="pixels")
    activation = keras.layers.Activation("sigmoid" if own.size == 1 else "softmax", dtype="float32", name="probability")
    outputs = activation(calibrated(backbone(pixels)))
    return keras.Model(pixels, outputs, name=head.name.replace("head", "classifier"))


def new_head(task: Task, recipe: Recipe) -> "keras.Model":
    """Returns an untrained head as the recipe asks for: features (n, 1280) -> logits, (n, 1) or (n, 8)."""
    spec = recipe.head
    return build_head(task, hidden_units=spec.hidden_units, dropout=spec.dropout, standardize=spec.standardize)


def loss_of(task: Task, recipe: Recipe) -> "keras.losses.Loss":
    """Cross-entropy or focal loss of logits, with smoothed targets (T.-Y. Lin et al., arXiv:1708.02002)."""
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
    """The states that the masks of these layers' dropout are made of."""
    import keras

    return [layer.seed_generator.state for layer in layers if isinstance(layer, keras.layers.Dropout) and layer.rate]
