"""Fitting one network on some images of a dataset: a head on cached features, then, if asked for, the backbone's top.

Order, views and dropout of an epoch are made of the seed and its number alone: so it does not matter in how many
processes the epochs were done.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ml.core.devices import has_gpu, quiet_tensorflow
from ml.core.errors import ConfigError
from ml.core.progress import say
from ml.core.taxonomy import Task, classes
from ml.images.augmentation import View
from ml.images.decoding import SIZE, Pixels
from ml.training.checkpoints import Arrays, Checkpoint
from ml.training.features import Features
from ml.training.networks import FEATURES, build_head, set_statistics
from ml.training.presets import FineTuning, Recipe

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

Indices = NDArray[np.int64]
Logits = NDArray[np.float32]
History = dict[str, list[float]]

_STEPS = 16
"""Steps whose features are held in memory at a time."""

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
        return 1 if self.task == "binary" else len(classes(self.task))


class Fit(NamedTuple):
    """A network that was fitted."""

    head: Arrays
    """Weights of the head after the last epoch."""
    backbone: Arrays | None
    """Weights of the backbone, if it was fine-tuned."""
    logits: Logits
    """(epochs, watched, 1 or 8), after each epoch; with fine-tuning, of the head alone and then after its epochs."""
    history: History
    """Curves: name -> a value an epoch."""


class Fitter:
    """Fits networks on one training's examples, one after the other.

    Networks are built once: a new one for each fit would be traced anew, which takes longer than training a small head,
    and for the backbone's top as long as some epochs.
    """

    def __init__(self, examples: Examples, backbone: "Callable[[], keras.Model]") -> None:
        quiet_tensorflow()
        self._examples = examples
        self._load_backbone = backbone
        self._head = _compiled_head(examples.task, examples.recipe)
        self._initial = [np.asarray(v) for v in self._head.optimizer.variables]
        self._steps = _steps_of(self._head, examples.recipe.training.batch_size)
        self.fine_tunes = fine_tunes(examples.recipe.fine_tuning)

    @cached_property
    def _tuning(self) -> "_Tuning":
        return _Tuning(self._examples, self._load_backbone)

    def fit(
        self,
        name: str,
        learnt: Indices,
        watched: Indices,
        seed: int,
        checkpoint: Checkpoint,
        *,
        epochs: int | None = None,
    ) -> Fit:
        """Fit one network.

        Args:
            name: of this fit, for the checkpoint and the log.
            learnt: positions of the images to learn from.
            watched: positions of images to predict after each epoch.
            seed: of initial weights, order, views and dropout.
            checkpoint: where to go on, and where to keep what was reached.
            epochs: how many; default: what the recipe says. With fine-tuning, of that, and it may be 0.

        Raises:
            ConfigError: it is learnt so fast, or so roughly, that nothing finite comes of it.
        """
        recipe = self._examples.recipe
        of_head = recipe.training.epochs if self.fine_tunes or epochs is None else epochs
        fitted = self._fit_head(name, learnt, watched, seed, of_head, checkpoint)
        if not self.fine_tunes:
            return fitted
        of_backbone = recipe.fine_tuning.epochs if epochs is None else epochs
        return self._fine_tune(f"{name}, fine-tuning", fitted, learnt, watched, seed, of_backbone, checkpoint)

    def head(self, fitted: Fit) -> "keras.Model":
        """The head of a fit as a network: features -> logits."""
        head = _new_head(self._examples.task, self._examples.recipe)
        head.set_weights(fitted.head)
        return head

    def backbone(self, fitted: Fit) -> "keras.Model":
        """The backbone that belongs to a fit's head."""
        backbone = self._load_backbone()
        if fitted.backbone is not None:
            backbone.set_weights(fitted.backbone)
        return backbone

    def predict(self, fitted: Fit, rows: Indices) -> Logits:
        """Logits (rows, 1 or 8) of what a fit came to."""
        head = self.head(fitted)
        if fitted.backbone is None:
            return np.asarray(head(self._examples.features[0, rows], training=False))
        backbone = self.backbone(fitted)
        traced = _traced(lambda x: head(backbone(x, training=False), training=False))
        return _predict_pixels(traced, self._examples, rows)

    def _fit_head(
        self, name: str, learnt: Indices, watched: Indices, seed: int, epochs: int, checkpoint: Checkpoint
    ) -> Fit:
        import keras

        examples, head = self._examples, self._head
        if done := checkpoint.finished(name):
            return Fit(done.arrays[:-1], None, done.arrays[-1].astype(np.float32), done.history)
        keras.utils.set_random_seed(seed)
        fresh = _new_head(examples.task, examples.recipe)
        if examples.recipe.head.standardize:
            set_statistics(fresh, *_statistics(examples.features, learnt))
        head.set_weights(fresh.get_weights())
        for variable, value in zip(head.optimizer.variables, self._initial, strict=True):
            variable.assign(value)
        drops = _drops(head.layers)

        def learn(left: range) -> Iterator[None]:
            size = _STEPS * examples.recipe.training.batch_size
            for epoch in left:
                for _, rows, numbers, targets, weights in _chosen(
                    examples, learnt, seed, range(epoch, epoch + 1), size
                ):
                    self._steps(examples.features[numbers, rows], targets, weights)
                yield

        def predict() -> Logits:
            features = examples.features[0, watched]
            return np.asarray(head(features, training=False)) if len(watched) else np.empty((0, examples.outputs), "f4")

        logits, history = _Loop(name, head, drops, seed, epochs, checkpoint).run(learn, predict)
        kept: Arrays = [np.asarray(v) for v in head.weights]
        checkpoint.finish(name, history, [*kept, logits])
        return Fit(kept, None, logits, history)

    def _fine_tune(
        self,
        name: str,
        fitted: Fit,
        learnt: Indices,
        watched: Indices,
        seed: int,
        epochs: int,
        checkpoint: Checkpoint,
    ) -> Fit:
        parts = len(fitted.head)
        if done := checkpoint.finished(name):
            heads, backbones = done.arrays[:parts], done.arrays[parts:-1]
            return Fit(heads, backbones, done.arrays[-1].astype(np.float32), done.history)
        tuning = self._tuning
        tuning.begin(fitted.head)

        def learn(left: range) -> Iterator[None]:
            batches = tuning.batches(learnt, seed, left)
            for _ in left:
                for _ in range(-(-len(learnt) // self._examples.recipe.fine_tuning.batch_size)):
                    tuning.step(next(batches))
                yield

        after, history = _Loop(name, tuning.network, tuning.drops, seed, epochs, checkpoint).run(
            learn, lambda: tuning.predict(watched)
        )
        logits = np.concatenate([fitted.logits[-1:], after])  # none at all may be best
        kept: Arrays = [np.asarray(v) for v in tuning.head.weights]
        tuned: Arrays = [np.asarray(v, dtype=np.float32) for v in tuning.backbone.weights]
        history = {**fitted.history, **{f"fine_tuning_{curve}": values for curve, values in history.items()}}
        checkpoint.finish(name, history, [*kept, *tuned, logits])
        return Fit(kept, tuned, logits, history)


class _Tuning:
    """Backbone and head as one network whose top learns from pixels, on all devices."""

    def __init__(self, examples: Examples, load_backbone: "Callable[[], keras.Model]") -> None:
        spec = examples.recipe.fine_tuning
        self._examples = examples
        self._strategy = _strategy()
        with self._strategy.scope():
            mixed = spec.mixed_precision and has_gpu()
            self.backbone = unfrozen(load_backbone(), spec, mixed=mixed)
            self.head = _new_head(examples.task, examples.recipe)
            self.network = _whole(self.backbone, self.head, examples, spec, mixed=mixed)
        self.drops = _drops([*self.backbone.layers, *self.head.layers])
        self.step = _step_of(self.network)
        self._traced = _traced(lambda x: self.network(x, training=False))
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
        return _predict_pixels(self._traced, self._examples, rows)


def fine_tunes(spec: FineTuning) -> bool:
    """Whether the backbone is fine-tuned on this machine."""
    return spec.when == "always" or (spec.when == "gpu" and has_gpu())


def _strategy() -> "tf.distribute.Strategy":
    """All of this machine's GPUs, or its one device."""
    import tensorflow as tf

    several = len(tf.config.list_physical_devices("GPU")) > 1
    return tf.distribute.MirroredStrategy() if several else tf.distribute.get_strategy()


class _Loop:
    """The epochs of one fit, from where the checkpoint is."""

    def __init__(
        self, name: str, network: "keras.Model", drops: list[Any], seed: int, epochs: int, checkpoint: Checkpoint
    ) -> None:
        self._name, self._network, self._drops = name, network, drops
        self._seed, self._epochs, self._checkpoint = seed, epochs, checkpoint
        self._variables = [*network.trainable_variables, *network.optimizer.variables]

    def run(self, learn: Callable[[range], Iterator[None]], predict: Callable[[], Logits]) -> tuple[Logits, History]:
        """What ``predict`` gave after each epoch, and the curves.

        Args:
            learn: does these epochs, one whenever it is asked for the next.
            predict: logits of what is watched.

        Raises:
            ConfigError: what is learnt is no number any more.
        """
        reached = self._checkpoint.unfinished(self._name)
        history, logits = reached.history, list(reached.arrays[-1]) if reached.arrays else []
        for variable, value in zip(self._variables, reached.arrays, strict=False):
            variable.assign(value)
        if reached.epoch:
            say(f"{self._name}: resuming after epoch {reached.epoch} of {self._epochs}")
        left = range(reached.epoch, self._epochs)
        turns = learn(left)
        for epoch in left:
            # Spread out: from [seed, epoch] Keras would count on by one a step, through the masks of the next epoch.
            for k, state in enumerate(self._drops):
                state.assign(np.random.SeedSequence([self._seed, epoch, k]).generate_state(2))
            self._network.reset_metrics()
            next(turns)
            for curve, value in self._network.get_metrics_result().items():
                history.setdefault(curve, []).append(float(value))
            logits.append(predict())
            curves = [values[-1] for values in history.values()]
            if not (np.isfinite(logits[-1]).all() and np.isfinite(curves).all()):
                raise ConfigError(
                    f"{self._name}: loss or outputs are not finite after epoch {epoch + 1} of {self._epochs}; lower "
                    "learning_rate in the preset, or set mixed_precision to false if it happens in fine-tuning alone"
                )
            if epoch + 1 < self._epochs and self._checkpoint.due():
                self._checkpoint.save(self._name, epoch + 1, history, self._state(logits))
        shape = (0, *predict().shape)
        return (np.stack(logits).astype(np.float32) if logits else np.empty(shape, np.float32)), history

    def _state(self, logits: list[Logits]) -> Arrays:
        return [*(np.asarray(v) for v in self._variables), np.stack(logits)]


def _steps_of(network: "keras.Model", size: int) -> Callable[..., Any]:
    """What takes some features, targets and weights and does Keras' own training step with each ``size`` of them.

    In one graph: Keras' ``fit`` returns to Python after each, and its pipelines cost more than a small head's step.
    """
    import tensorflow as tf

    def steps(features: Any, targets: Any, weights: Any) -> Any:
        def step(start: Any) -> Any:
            part = slice(start, start + size)
            network.train_step((features[part], targets[part], weights[part]))
            return (start + size,)

        return tf.while_loop(lambda start: start < tf.shape(features)[0], step, (0,), parallel_iterations=1)

    signature = [tf.TensorSpec((None, *v.shape[1:]), tf.float32) for v in (*network.inputs, *network.outputs)]
    return tf.function(steps, [*signature, tf.TensorSpec((None,), tf.float32)], autograph=False)  # type: ignore[no-any-return]


def _step_of(network: "keras.Model") -> Callable[[Any], Any]:
    """Keras' own training step with one batch, on all devices at once."""
    import tensorflow as tf

    def on_one(pixels: Any, targets: Any, weights: Any) -> Any:
        return network.train_step((tf.cast(pixels, tf.float32), targets, weights))

    def step(batch: Any) -> Any:
        return network.distribute_strategy.run(on_one, args=batch)

    return tf.function(step, autograph=False, reduce_retracing=True)  # type: ignore[no-any-return]


def _traced(network: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A network, uint8 (n, 224, 224, 3) -> logits, as one graph for any n."""
    import tensorflow as tf

    pixels = tf.TensorSpec((None, SIZE, SIZE, 3), tf.uint8)
    return tf.function(lambda x: network(tf.cast(x, tf.float32)), [pixels], autograph=False)  # type: ignore[no-any-return]


def _predict_pixels(traced: Callable[[Any], Any], examples: Examples, rows: Indices) -> Logits:
    """Logits (rows, 1 or 8), on one device: Keras' ``predict`` gives each of several GPUs the whole batch."""
    found = np.empty((len(rows), examples.outputs), np.float32)
    size = examples.recipe.fine_tuning.batch_size
    for start in range(0, len(rows), size):
        few = rows[start : start + size]
        found[start : start + len(few)] = np.asarray(traced(examples.pixels(few)))
    return found


def _drops(layers: "list[keras.layers.Layer]") -> list[Any]:
    """The states that the masks of these layers' dropout are made of."""
    import keras

    return [layer.seed_generator.state for layer in layers if isinstance(layer, keras.layers.Dropout) and layer.rate]


def _new_head(task: Task, recipe: Recipe) -> "keras.Model":
    spec = recipe.head
    return build_head(task, hidden_units=spec.hidden_units, dropout=spec.dropout, standardize=spec.standardize)


def _compiled_head(task: Task, recipe: Recipe) -> "keras.Model":
    """The head, compiled, with an optimizer that has its variables already."""
    import keras

    head, spec = _new_head(task, recipe), recipe.training
    optimizer = (
        keras.optimizers.AdamW(spec.learning_rate, weight_decay=spec.weight_decay)
        if spec.weight_decay
        else keras.optimizers.Adam(spec.learning_rate)
    )
    head.compile(_in_one_kernel(optimizer), loss=_loss(task, recipe), jit_compile=False)
    optimizer.build(head.trainable_variables)
    return head


def _in_one_kernel(optimizer: "keras.optimizers.Adam") -> "keras.optimizers.Adam":
    """The optimizer with its step done by TensorFlow's own kernel for Adam, which has the same formula.

    Keras goes through a variable and its moments a dozen times a step, which is most of a small head's training.
    """
    import tensorflow as tf

    def update_step(gradient: Any, variable: Any, learning_rate: Any) -> None:
        number = optimizer._get_variable_index(variable)
        first, second = optimizer._momentums[number], optimizer._velocities[number]
        step = tf.cast(optimizer.iterations + 1, variable.dtype)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=first.value.handle,
            v=second.value.handle,
            beta1_power=tf.pow(tf.cast(optimizer.beta_1, variable.dtype), step),
            beta2_power=tf.pow(tf.cast(optimizer.beta_2, variable.dtype), step),
            lr=tf.cast(learning_rate, variable.dtype),
            beta1=optimizer.beta_1,
            beta2=optimizer.beta_2,
            epsilon=optimizer.epsilon,
            grad=gradient,
        )

    optimizer.update_step = update_step
    return optimizer


def _loss(task: Task, recipe: Recipe) -> "keras.losses.Loss":
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


def _whole(
    backbone: "keras.Model", head: "keras.Model", examples: Examples, spec: FineTuning, *, mixed: bool
) -> "keras.Model":
    """Backbone and head as one compiled network: pixels -> logits."""
    import keras

    pixels = keras.Input((SIZE, SIZE, 3), name="pixels")
    network = keras.Model(pixels, head(backbone(pixels)))
    optimizer = keras.optimizers.Adam(spec.learning_rate)
    if mixed:  # gradients below float16's smallest number would be lost
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    network.compile(optimizer, loss=_loss(examples.task, examples.recipe), jit_compile=False)
    optimizer.build(network.trainable_variables)
    return network


def unfrozen(backbone: "keras.Model", spec: FineTuning, *, mixed: bool = False) -> "keras.Model":
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


def order(truth: Indices, sampling: str, seed: int, epoch: int) -> Indices:
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


def learnt_shares(truth: Indices, recipe: Recipe) -> dict[int, float]:
    """The share of each class as sampling and weights let the network see it."""
    labels, counts = np.unique(truth, return_counts=True)
    seen = np.sqrt(counts) if recipe.imbalance.sampling == "sqrt" else counts.astype(float)
    weights = class_weights(truth, recipe.imbalance.class_weights)
    # Under sampling, the weights still are those of the images as they are.
    mass = seen * np.array([weights[int(k)] for k in labels])
    return {int(k): float(m / mass.sum()) for k, m in zip(labels, mass, strict=True)}


def _statistics(features: Features, rows: Indices) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and variance of view 0, (1280,) each, without holding all of it."""
    total, squares = np.zeros(FEATURES), np.zeros(FEATURES)
    first = features[0, rows[0]].astype(np.float64)  # taken off, so that squares of large numbers do not cancel
    for start in range(0, len(rows), _CHUNK):
        part = features[0, rows[start : start + _CHUNK]].astype(np.float64) - first
        total += part.sum(axis=0)
        squares += (part**2).sum(axis=0)
    mean = total / len(rows)
    return mean + first, squares / len(rows) - mean**2


def _chosen(examples: Examples, learnt: Indices, seed: int, epochs: range, size: int) -> Iterator[tuple[Any, ...]]:
    """Some at a time, through all these epochs: epoch, positions, numbers of views, targets and weights."""
    truth = examples.truth[learnt]
    weights = class_weights(truth, examples.recipe.imbalance.class_weights)
    by_class = np.array([weights.get(k, 0.0) for k in range(max(weights) + 1)], np.float32)
    for epoch in epochs:
        rows = learnt[order(truth, examples.recipe.imbalance.sampling, seed, epoch)]
        numbers = np.random.default_rng([seed, epoch, 1]).integers(0, examples.views[rows])
        for start in range(0, len(rows), size):
            few = rows[start : start + size]
            labels = examples.truth[few]
            targets = labels[:, None] if examples.outputs == 1 else np.eye(examples.outputs)[labels]
            yield epoch, few, numbers[start : start + size], targets.astype(np.float32), by_class[labels]


def _pixel_batches(
    examples: Examples, learnt: Indices, seed: int, epochs: range, size: int, devices: int
) -> "tf.data.Dataset":
    """Batches of pixels, each picture in a view of this epoch's own, and as many of them for one device as for another.

    What an epoch's last batch lacks is filled up with pictures of weight zero: a device cannot do a step with none.
    """
    import tensorflow as tf

    spec = examples.recipe.views

    def chosen() -> Iterator[tuple[Any, ...]]:
        for epoch, rows, _, targets, weights in _chosen(examples, learnt, seed, epochs, size):
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
        return tf.ensure_shape(pictures, (None, SIZE, SIZE, 3)), targets, weights

    signature = (
        tf.TensorSpec((), tf.int64),
        tf.TensorSpec((None,), tf.int64),
        tf.TensorSpec((None, examples.outputs), tf.float32),
        tf.TensorSpec((None,), tf.float32),
    )
    rows = tf.data.Dataset.from_generator(chosen, output_signature=signature)
    return rows.map(load, num_parallel_calls=tf.data.AUTOTUNE).prefetch(2)
