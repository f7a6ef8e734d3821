"""Fine-tuning: the backbone's upper blocks train on pixels, together with a head that was fitted before."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ml.core.devices import has_gpu
from ml.images.augmentation import View
from ml.images.decoding import INPUT_SIZE, Pixels
from ml.training.checkpoints import Arrays
from ml.training.examples import Examples, iterate_batches
from ml.training.networks import Logits, dropout_states, make_head, make_loss
from ml.training.presets import FineTuning
from ml.training.sampling import Indices

if TYPE_CHECKING:
    import keras
    import tensorflow as tf


class FineTuner:
    """Backbone and head as one network whose upper blocks train on pixels, on all devices."""

    def __init__(self, examples: Examples, load_backbone: "Callable[[], keras.Model]") -> None:
        spec = examples.recipe.fine_tuning
        self._examples = examples
        self._strategy = _choose_strategy()
        with self._strategy.scope():
            mixed = spec.mixed_precision and has_gpu()
            self.backbone = unfreeze_top(load_backbone(), spec, mixed=mixed)
            self.head = make_head(examples.task, examples.recipe)
            self.network = _join_networks(self.backbone, self.head, examples, spec, mixed=mixed)
        self.dropout_states = dropout_states([*self.backbone.layers, *self.head.layers])
        self.step = _compile_step(self.network)
        self._traced = trace_network(lambda x: self.network(x, training=False))
        self._initial = [(v, np.asarray(v)) for v in (*self.backbone.variables, *self.network.optimizer.variables)]

    def begin(self, head: Arrays) -> None:
        """Reset backbone and optimizer to their initial state, and set these weights of the head."""
        for variable, value in self._initial:
            variable.assign(value)
        self.head.set_weights(head)

    def batches(self, training_rows: Indices, seed: int, epochs: range) -> Iterator[Any]:
        """Yields the training batches of these epochs, each divided among the devices.

        Args:
            training_rows: positions of the images to train on.
            seed: seed of the training.
            epochs: numbers of the epochs.
        """
        size, devices = self._examples.recipe.fine_tuning.batch_size, self._strategy.num_replicas_in_sync
        batches = _make_pixel_batches(self._examples, training_rows, seed, epochs, size, devices)
        return iter(self._strategy.experimental_distribute_dataset(batches))

    def predict(self, rows: Indices) -> Logits:
        """Returns logits (rows, 1 or 8), computed in the precision of the training."""
        return predict_pixels(self._traced, self._examples, rows)


def fine_tuning_applies(spec: FineTuning) -> bool:
    """Whether the backbone is fine-tuned on this machine."""
    return spec.when == "always" or (spec.when == "gpu" and has_gpu())


def _choose_strategy() -> "tf.distribute.Strategy":
    """Returns a strategy for all GPUs of this machine, or for its only device."""
    import tensorflow as tf

    several = len(tf.config.list_physical_devices("GPU")) > 1
    return tf.distribute.MirroredStrategy() if several else tf.distribute.get_strategy()


def _compile_step(network: "keras.Model") -> Callable[[Any], Any]:
    """Returns Keras' own training step with one batch, on all devices at once."""
    import tensorflow as tf

    def on_one_device(pixels: Any, targets: Any, weights: Any) -> Any:
        return network.train_step((tf.cast(pixels, tf.float32), targets, weights))

    def step(batch: Any) -> Any:
        return network.distribute_strategy.run(on_one_device, args=batch)

    return tf.function(step, autograph=False, reduce_retracing=True)  # type: ignore[no-any-return]


def trace_network(network: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Compile a network, pixels -> logits, into one graph: uint8 (n, 224, 224, 3) -> logits, for any n."""
    import tensorflow as tf

    pixels = tf.TensorSpec((None, INPUT_SIZE, INPUT_SIZE, 3), tf.uint8)
    return tf.function(lambda x: network(tf.cast(x, tf.float32)), [pixels], autograph=False)  # type: ignore[no-any-return]


def predict_pixels(traced: Callable[[Any], Any], examples: Examples, rows: Indices) -> Logits:
    """Returns logits (rows, 1 or 8), computed on one device.

    Keras' own ``predict`` would give each of several GPUs the whole batch.
    """
    logits = np.empty((len(rows), examples.output_size), np.float32)
    size = examples.recipe.fine_tuning.batch_size
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        logits[start : start + len(batch)] = np.asarray(traced(examples.load_pixels(batch)))
    return logits


def _join_networks(
    backbone: "keras.Model", head: "keras.Model", examples: Examples, spec: FineTuning, *, mixed: bool
) -> "keras.Model":
    """Returns backbone and head as one compiled network: pixels -> logits."""
    import keras

    pixels = keras.Input((INPUT_SIZE, INPUT_SIZE, 3), name="pixels")
    network = keras.Model(pixels, head(backbone(pixels)))
    optimizer = keras.optimizers.Adam(spec.learning_rate)
    if mixed:  # otherwise gradients below float16's smallest number are lost
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    network.compile(optimizer, loss=make_loss(examples.task, examples.recipe), jit_compile=False)
    optimizer.build(network.trainable_variables)
    return network


def unfreeze_top(backbone: "keras.Model", spec: FineTuning, *, mixed: bool = False) -> "keras.Model":
    """Make the upper blocks of a backbone trainable. BatchNorm layers stay frozen, their statistics included.

    Args:
        backbone: EfficientNetB0 without its top.
        spec: the number of trainable blocks out of seven; the layers above the blocks are trainable, too.
        mixed: compute in float16, with weights in float32.

    Returns:
        the backbone itself, or with ``mixed`` a copy.
    """
    import keras

    if mixed:
        config = _set_float16(backbone.get_config())
        half = keras.Model.from_config(config)
        half.set_weights(backbone.get_weights())
        for layer in half.layers:
            # It computes with constants that it derives from its weights.
            if isinstance(layer, keras.layers.Normalization):
                layer.finalize_state()
        backbone = half
    backbone.trainable = True
    frozen = tuple(f"block{number}" for number in range(1, 8 - spec.blocks))
    for layer in backbone.layers:
        is_frozen = layer.name.startswith(frozen) or not layer.name.startswith(("block", "top"))
        layer.trainable = not (is_frozen or isinstance(layer, keras.layers.BatchNormalization))
    return backbone


def _set_float16(config: Any) -> Any:
    """Returns a model's configuration with float16 for all layers but the first ones, which scale the pixels."""
    if isinstance(config, list):
        return [_set_float16(item) for item in config]
    if not isinstance(config, dict):
        return config
    if config.get("class_name") in {"InputLayer", "Rescaling", "Normalization"}:
        return config
    policy = {
        "module": "keras",
        "class_name": "DTypePolicy",
        "config": {"name": "mixed_float16"},
        "registered_name": None,
    }
    return {key: policy if key == "dtype" else _set_float16(value) for key, value in config.items()}


def _make_pixel_batches(
    examples: Examples, training_rows: Indices, seed: int, epochs: range, size: int, devices: int
) -> "tf.data.Dataset":
    """Returns batches of pixels, each picture in a view of its epoch, with equally many pictures for each device.

    The last batch of an epoch is filled up with pictures of weight zero, since a device cannot do a step with none.
    """
    import tensorflow as tf

    spec = examples.recipe.views

    def iterate_filled() -> Iterator[tuple[Any, ...]]:
        for epoch, rows, _, targets, weights in iterate_batches(examples, training_rows, seed, epochs, size):
            positions = np.arange(-(-len(rows) // devices) * devices)
            is_real = positions < len(rows)
            filled = np.minimum(positions, len(rows) - 1)
            # The loss is a mean over all pictures: the scale makes up for those of weight zero.
            scale = np.float32(len(positions) / len(rows))
            yield np.int64(epoch), rows[filled], targets[filled], weights[filled] * is_real * scale

    def load_views(epoch: Any, rows: Indices) -> Pixels:
        pictures = examples.load_pixels(rows)
        if spec.augmentation is None:
            return pictures
        # Numbers beyond those of cached views, so that each epoch sees each picture in another view.
        view = View(1000 + int(epoch), spec.augmentation)
        return np.stack(
            [view.apply(picture, examples.pixel_hashes[row]) for picture, row in zip(pictures, rows, strict=True)]
        )

    def load(epoch: Any, rows: Any, targets: Any, weights: Any) -> tuple[Any, ...]:
        # It is stateless, and TensorFlow must know: otherwise a deterministic training loads batches one by one.
        pictures = tf.numpy_function(load_views, (epoch, rows), tf.uint8, stateful=False)
        return tf.ensure_shape(pictures, (None, INPUT_SIZE, INPUT_SIZE, 3)), targets, weights

    signature = (
        tf.TensorSpec((), tf.int64),
        tf.TensorSpec((None,), tf.int64),
        tf.TensorSpec((None, examples.output_size), tf.float32),
        tf.TensorSpec((None,), tf.float32),
    )
    rows = tf.data.Dataset.from_generator(iterate_filled, output_signature=signature)
    return rows.map(load, num_parallel_calls=tf.data.AUTOTUNE).prefetch(2)
