"""Fitting one network on some images of a dataset: a head on cached features, then, if asked for, fine-tuning.

Seed and number of an epoch alone determine its order, views and dropout. A training that was resumed in another process
therefore gives the same result.
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ml.core.devices import import_tensorflow_quietly
from ml.core.errors import ConfigError
from ml.core.progress import say
from ml.core.taxonomy import Task
from ml.evaluation.figures import History
from ml.training.checkpoints import Arrays, Checkpoint
from ml.training.examples import Examples, feature_statistics, iterate_batches
from ml.training.fine_tuning import FineTuner, fine_tuning_applies, predict_pixels, trace_network
from ml.training.networks import Logits, dropout_states, make_head, make_loss, set_standardization
from ml.training.presets import Recipe
from ml.training.sampling import Indices

if TYPE_CHECKING:
    import keras


_STEPS = 16
"""Training steps whose features are in memory at a time."""


class FittedNetwork(NamedTuple):
    """The weights of a fitted network, and its predictions after each epoch."""

    head: Arrays
    """Weights of the head after the last epoch."""
    backbone: Arrays | None
    """Weights of the backbone, if it was fine-tuned."""
    logits: Logits
    """(epochs, monitored images, 1 or 8); with fine-tuning, of the fitted head first, then after each of its epochs."""
    history: History
    """Training curves: name -> one value an epoch."""


class Fitter:
    """Fits networks on one training's examples, one after the other.

    Networks are built once. A new network for each fit would be traced again, which takes longer than the training of a
    small head, and as long as some epochs of fine-tuning.

    Args:
        examples: the images of the training.
        backbone: loads the backbone that is fine-tuned and predicted with.
    """

    def __init__(self, examples: Examples, backbone: "Callable[[], keras.Model]") -> None:
        import_tensorflow_quietly()
        self._examples = examples
        self._load_backbone = backbone
        self._head = _compile_head(examples.task, examples.recipe)
        self._initial_state = [np.asarray(v) for v in self._head.optimizer.variables]
        self._steps = _compile_steps(self._head, examples.recipe.training.batch_size)
        self.fine_tunes = fine_tuning_applies(examples.recipe.fine_tuning)

    @cached_property
    def _tuning(self) -> "FineTuner":
        return FineTuner(self._examples, self._load_backbone)

    def fit(
        self,
        name: str,
        training_rows: Indices,
        monitored: Indices,
        seed: int,
        checkpoint: Checkpoint,
        *,
        epochs: int | None = None,
    ) -> FittedNetwork:
        """Fit one network: resume it from the checkpoint, or read its result if it is finished.

        Args:
            name: name of this fit in the checkpoint and in the log.
            training_rows: positions of the images to train on.
            monitored: positions of the images to predict after each epoch.
            seed: seed of initial weights, order, views and dropout.
            checkpoint: the checkpoint of the training.
            epochs: number of epochs; default: the recipe's. With fine-tuning, number of its epochs, which may be 0.

        Raises:
            ConfigError: the loss or the outputs become infinite or NaN, as the learning rate is too high or float16 too
                coarse.
        """
        recipe = self._examples.recipe
        head_epochs = recipe.training.epochs if self.fine_tunes or epochs is None else epochs
        fitted = self._fit_head(name, training_rows, monitored, seed, head_epochs, checkpoint)
        if not self.fine_tunes:
            return fitted
        tuning_epochs = recipe.fine_tuning.epochs if epochs is None else epochs
        return self._fine_tune(
            f"{name}, fine-tuning", fitted, training_rows, monitored, seed, tuning_epochs, checkpoint
        )

    def head(self, fitted: FittedNetwork) -> "keras.Model":
        """Returns the fitted head as a network: features (n, 1280) -> logits."""
        head = make_head(self._examples.task, self._examples.recipe)
        head.set_weights(fitted.head)
        return head

    def backbone(self, fitted: FittedNetwork) -> "keras.Model":
        """Returns the backbone that belongs to the fitted head, fine-tuned if it was."""
        backbone = self._load_backbone()
        if fitted.backbone is not None:
            backbone.set_weights(fitted.backbone)
        return backbone

    def predict(self, fitted: FittedNetwork, rows: Indices) -> Logits:
        """Returns logits (rows, 1 or 8) of the fitted network."""
        head = self.head(fitted)
        if fitted.backbone is None:
            return np.asarray(head(self._examples.features[0, rows], training=False))
        backbone = self.backbone(fitted)
        traced = trace_network(lambda x: head(backbone(x, training=False), training=False))
        return predict_pixels(traced, self._examples, rows)

    def _fit_head(
        self, name: str, training_rows: Indices, monitored: Indices, seed: int, epochs: int, checkpoint: Checkpoint
    ) -> FittedNetwork:
        import keras

        examples, head = self._examples, self._head
        if done := checkpoint.read_finished(name):
            return FittedNetwork(done.arrays[:-1], None, done.arrays[-1].astype(np.float32), done.history)
        keras.utils.set_random_seed(seed)
        fresh = make_head(examples.task, examples.recipe)
        if examples.recipe.head.standardize:
            set_standardization(fresh, *feature_statistics(examples.features, training_rows))
        head.set_weights(fresh.get_weights())
        for variable, value in zip(head.optimizer.variables, self._initial_state, strict=True):
            variable.assign(value)
        states = dropout_states(head.layers)

        def train_epochs(epochs: range) -> Iterator[None]:
            size = _STEPS * examples.recipe.training.batch_size
            for epoch in epochs:
                for _, rows, views, targets, weights in iterate_batches(
                    examples, training_rows, seed, range(epoch, epoch + 1), size
                ):
                    self._steps(examples.features[views, rows], targets, weights)
                yield

        def predict() -> Logits:
            if not len(monitored):
                return np.empty((0, examples.output_size), np.float32)
            return np.asarray(head(examples.features[0, monitored], training=False))

        logits, history = _EpochLoop(name, head, states, seed, epochs, checkpoint).run(train_epochs, predict)
        head_weights: Arrays = [np.asarray(v) for v in head.weights]
        checkpoint.finish(name, history, [*head_weights, logits])
        return FittedNetwork(head_weights, None, logits, history)

    def _fine_tune(
        self,
        name: str,
        fitted: FittedNetwork,
        training_rows: Indices,
        monitored: Indices,
        seed: int,
        epochs: int,
        checkpoint: Checkpoint,
    ) -> FittedNetwork:
        parts = len(fitted.head)
        if done := checkpoint.read_finished(name):
            heads, backbones = done.arrays[:parts], done.arrays[parts:-1]
            return FittedNetwork(heads, backbones, done.arrays[-1].astype(np.float32), done.history)
        tuning = self._tuning
        tuning.begin(fitted.head)

        def train_epochs(epochs: range) -> Iterator[None]:
            batches = tuning.batches(training_rows, seed, epochs)
            for _ in epochs:
                for _ in range(-(-len(training_rows) // self._examples.recipe.fine_tuning.batch_size)):
                    tuning.step(next(batches))
                yield

        tuning_logits, history = _EpochLoop(name, tuning.network, tuning.dropout_states, seed, epochs, checkpoint).run(
            train_epochs, lambda: tuning.predict(monitored)
        )
        # The first logits are those before fine-tuning: the selection may find no epoch of it best.
        logits = np.concatenate([fitted.logits[-1:], tuning_logits])
        head_weights: Arrays = [np.asarray(v) for v in tuning.head.weights]
        backbone_weights: Arrays = [np.asarray(v, dtype=np.float32) for v in tuning.backbone.weights]
        history = {**fitted.history, **{f"fine_tuning_{curve}": values for curve, values in history.items()}}
        checkpoint.finish(name, history, [*head_weights, *backbone_weights, logits])
        return FittedNetwork(head_weights, backbone_weights, logits, history)


class _EpochLoop:
    """The epochs of one fit, which resumes after the last epoch in the checkpoint."""

    def __init__(
        self, name: str, network: "keras.Model", states: list[Any], seed: int, epochs: int, checkpoint: Checkpoint
    ) -> None:
        self._name, self._network, self._dropout_states = name, network, states
        self._seed, self._epochs, self._checkpoint = seed, epochs, checkpoint
        self._variables = [*network.trainable_variables, *network.optimizer.variables]

    def run(
        self, train_epochs: Callable[[range], Iterator[None]], predict: Callable[[], Logits]
    ) -> tuple[Logits, History]:
        """Returns the logits that ``predict`` gives after each epoch, (epochs, n, 1 or 8), and the training curves.

        Args:
            train_epochs: trains these epochs, one at each ``next``.
            predict: returns the logits of the monitored images.

        Raises:
            ConfigError: the loss or the outputs become infinite or NaN.
        """
        saved = self._checkpoint.read_unfinished(self._name)
        history, logits = saved.history, list(saved.arrays[-1]) if saved.arrays else []
        for variable, value in zip(self._variables, saved.arrays, strict=False):
            variable.assign(value)
        if saved.epoch:
            say(f"{self._name}: resuming after epoch {saved.epoch} of {self._epochs}")
        remaining = range(saved.epoch, self._epochs)
        epochs = train_epochs(remaining)
        for epoch in remaining:
            # A hash: from [seed, epoch] itself Keras would count up by one a step, into the masks of the next epoch.
            for k, state in enumerate(self._dropout_states):
                state.assign(np.random.SeedSequence([self._seed, epoch, k]).generate_state(2))
            self._network.reset_metrics()
            next(epochs)
            for curve, value in self._network.get_metrics_result().items():
                history.setdefault(curve, []).append(float(value))
            logits.append(predict())
            curves = [values[-1] for values in history.values()]
            if not (np.isfinite(logits[-1]).all() and np.isfinite(curves).all()):
                raise ConfigError(
                    f"{self._name}: loss or outputs are not finite after epoch {epoch + 1} of {self._epochs}; lower "
                    "learning_rate in the preset, or set mixed_precision to false if it happens in fine-tuning alone"
                )
            if epoch + 1 < self._epochs and self._checkpoint.is_due():
                self._checkpoint.save(self._name, epoch + 1, history, self._state(logits))
        shape = (0, *predict().shape)
        return (np.stack(logits).astype(np.float32) if logits else np.empty(shape, np.float32)), history

    def _state(self, logits: list[Logits]) -> Arrays:
        return [*(np.asarray(v) for v in self._variables), np.stack(logits)]


def _compile_steps(network: "keras.Model", size: int) -> Callable[..., Any]:
    """Returns a function of features, targets and weights that does Keras' own training step with each ``size`` rows.

    All steps are one graph: Keras' ``fit`` returns to Python after each step, and its pipelines cost more than the step
    of a small head.
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


def _compile_head(task: Task, recipe: Recipe) -> "keras.Model":
    """Returns the compiled head, with an optimizer whose variables exist already."""
    import keras

    head, spec = make_head(task, recipe), recipe.training
    optimizer = (
        keras.optimizers.AdamW(spec.learning_rate, weight_decay=spec.weight_decay)
        if spec.weight_decay
        else keras.optimizers.Adam(spec.learning_rate)
    )
    head.compile(_fuse_update(optimizer), loss=make_loss(task, recipe), jit_compile=False)
    optimizer.build(head.trainable_variables)
    return head


def _fuse_update(optimizer: "keras.optimizers.Adam") -> "keras.optimizers.Adam":
    """Have the optimizer update variables by TensorFlow's own Adam kernel, which has the same formula.

    Keras' own update passes over a variable and its moments a dozen times a step, which takes most of the time that a
    small head trains.
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
