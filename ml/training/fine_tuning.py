"""Fine-tuning: the backbone's upper blocks learn from pixels, together with a head that was fitted before."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ml.core.devices import has_gpu
from ml.images.augmentation import View
from ml.images.decoding import INPUT_SIZE, Pixels
from ml.training.checkpoints import Arrays
from ml.training.examples import Examples, choose_batches
from ml.training.networks import Logits, dropout_states, loss_of, new_head
from ml.training.presets import FineTuning
from ml.training.sampling import Indices

if TYPE_CHECKING:
    import keras
    import tensorflow as tf


class FineTuner:
    """Backbone and head as one network whose top learns from pixels, on all devices."""

    def __init__(self, examples: Examples, load_backbone: "Callable[[], keras.Model]") -> None:
        spec = examples.recipe.fine_tuning
        self._examples = examples
        self._strategy = _strategy()
        with self._strategy.scope():
            mixed = spec.mixed_precision and has_gpu()
            self.backbone = unfreeze_top(load_backbone(), spec, mixed=mixed)
            self.head = new_head(examples.task, examples.recipe)
            self.network = _whole(self.backbone, self.head, examples, spec, mixed=mixed)
        self.drops = dropout_states([*self.backbone.layers, *self.head.layers])
        self.step = _step_of(self.network)
        self._traced = trace_network(lambda x: self.network(x, training=False))
        self._initial = [(v, np.asarray(v)) for v in (*self.backbone.variables, *self.network.optimizer.variables)]

    def begin(self, head: Arrays) -> None:
        """Start anew, with this head."""
        for variable, value in self._initial:
            variable.assign(value)
        self.head.set_weights(head)

    def batches(self, learnt: Indices, seed: int, epochs: range) -> Iterator[Any]:
        """What these epochs learn from, batch by batch, shared out among the devices."""
        size, devices = self._examples.recipe.fine_tuning.batch_size, self._strategy.num_replicas_in_sync
        batches = _pixel_batches(self._examples, learnt, seed, epochs, size, devices)
        return iter(self._strategy.experimental_distribute_dataset(batches))

    def predict(self, rows: Indices) -> Logits:
        """Logits (rows, 1 or 8), in the precision that it learns in."""
        return predict_pixels(self._traced, self._examples, rows)


def fine_tuning_applies(spec: FineTuning) -> bool:
    """Whether the backbone is fine-tuned on this machine."""
    return spec.when == "always" or (spec.when == "gpu" and has_gpu())


def _strategy() -> "tf.distribute.Strategy":
    """All of this machine's GPUs, or its one device."""
    import tensorflow as tf

    several = len(tf.config.list_physical_devices("GPU")) > 1
    return tf.distribute.MirroredStrategy() if several else tf.distribute.get_strategy()


def _step_of(network: "keras.Model") -> Callable[[Any], Any]:
    """Keras' own training step with one batch, on all devices at once."""
    import tensorflow as tf

    def on_one(pixels: Any, targets: Any, weights: Any) -> Any:
        return network.train_step((tf.cast(pixels, tf.float32), targets, weights))

    def step(batch: Any) -> Any:
        return network.distribute_strategy.run(on_one, args=batch)

    return tf.function(step, autograph=False, reduce_retracing=True)  # type: ignore[no-any-return]


def trace_network(network: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A network, uint8 (n, 224, 224, 3) -> logits, as one graph for any n."""
    import tensorflow as tf

    pixels = tf.TensorSpec((None, INPUT_SIZE, INPUT_SIZE, 3), tf.uint8)
    return tf.function(lambda x: network(tf.cast(x, tf.float32)), [pixels], autograph=False)  # type: ignore[no-any-return]


def predict_pixels(traced: Callable[[Any], Any], examples: Examples, rows: Indices) -> Logits:
    """Logits (rows, 1 or 8), on one device: Keras' ``predict`` gives each of several GPUs the whole batch."""
    found = np.empty((len(rows), examples.outputs), np.float32)
    size = examples.recipe.fine_tuning.batch_size
    for start in range(0, len(rows), size):
        few = rows[start : start + size]
        found[start : start + len(few)] = np.asarray(traced(examples.pixels(few)))
    return found


def _whole(
    backbone: "keras.Model", head: "keras.Model", examples: Examples, spec: FineTuning, *, mixed: bool
) -> "keras.Model":
    """Backbone and head as one compiled network: pixels -> logits."""
    import keras

    pixels = keras.Input((INPUT_SIZE, INPUT_SIZE, 3), name="pixels")
    network = keras.Model(pixels, head(backbone(pixels)))
    optimizer = keras.optimizers.Adam(spec.learning_rate)
    if mixed:  # gradients below float16's smallest number would be lost
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    network.compile(optimizer, loss=loss_of(examples.task, examples.recipe), jit_compile=False)
    optimizer.build(network.trainable_variables)
    return network


def unfreeze_top(backbone: "keras.Model", spec: FineTuning, *, mixed: bool = False) -> "keras.Model":
    """A backbone whose upper blocks learn; its BatchNorm layers stay as they are, statistics and all.

    Args:
        backbone: EfficientNetB0 without its top.
        spec: how many of its seven blocks learn; what lies above them does, too.
        mixed: compute in float16, with weights in float32.
    """
    import keras

    if mixed:
        config = _in_float16(backbone.get_config())
        half = keras.Model.from_config(config)
        half.set_weights(backbone.get_weights())
        for layer in half.layers:
            if isinstance(layer, keras.layers.Normalization):  # keeps what it computes with apart from its weights
                layer.finalize_state()
        backbone = half
    backbone.trainable = True
    frozen = tuple(f"block{number}" for number in range(1, 8 - spec.blocks))
    for layer in backbone.layers:
        below = layer.name.startswith(frozen) or not layer.name.startswith(("block", "top"))
        layer.trainable = not (below or isinstance(layer, keras.layers.BatchNormalization))
    return backbone


def _in_float16(config: Any) -> Any:
    """A model's configuration in which each layer computes in float16; but the first ones, which scale the pixels."""
    if isinstance(config, list):
        return [_in_float16(one) for one in config]
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
    return {key: policy if key == "dtype" else _in_float16(value) for key, value in config.items()}


def _pixel_batches(
    examples: Examples, learnt: Indices, seed: int, epochs: range, size: int, devices: int
) -> "tf.data.Dataset":
    """Batches of pixels, each picture in a view of this epoch's own, and as many of them for one device as for another.

    What an epoch's last batch lacks is filled up with pictures of weight zero: a device cannot do a step with none.
    """
    import tensorflow as tf

    spec = examples.recipe.views

    def chosen() -> Iterator[tuple[Any, ...]]:
        for epoch, rows, _, targets, weights in choose_batches(examples, learnt, seed, epochs, size):
            whole = np.arange(-(-len(rows) // devices) * devices)
            kept = whole < len(rows)
            filled = np.minimum(whole, len(rows) - 1)
            # The loss is a mean over what is there: zeros are made up for.
            scale = np.float32(len(whole) / len(rows))
            yield np.int64(epoch), rows[filled], targets[filled], weights[filled] * kept * scale

    def seen(epoch: Any, rows: Indices) -> Pixels:
        pictures = examples.pixels(rows)
        if spec.augmentation is None:
            return pictures
        # Beyond the numbers of cached views: each epoch sees each picture in a way of its own.
        view = View(1000 + int(epoch), spec.augmentation)
        return np.stack([view.apply(picture, examples.names[row]) for picture, row in zip(pictures, rows, strict=True)])

    def load(epoch: Any, rows: Any, targets: Any, weights: Any) -> tuple[Any, ...]:
        # Said to be stateless, as it is: else the batches of a training that is to be deterministic come one by one.
        pictures = tf.numpy_function(seen, (epoch, rows), tf.uint8, stateful=False)
        return tf.ensure_shape(pictures, (None, INPUT_SIZE, INPUT_SIZE, 3)), targets, weights

    signature = (
        tf.TensorSpec((), tf.int64),
        tf.TensorSpec((None,), tf.int64),
        tf.TensorSpec((None, examples.outputs), tf.float32),
        tf.TensorSpec((None,), tf.float32),
    )
    rows = tf.data.Dataset.from_generator(chosen, output_signature=signature)
    return rows.map(load, num_parallel_calls=tf.data.AUTOTUNE).prefetch(2)
