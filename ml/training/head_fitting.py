"""Fitting one network on some images of a dataset: a head on cached features, then, if asked for, the backbone's top.

Order, views and dropout of an epoch are made of the seed and its number alone: so it does not matter in how many
processes the epochs were done.
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
from ml.training.examples import Examples, choose_batches, feature_statistics
from ml.training.fine_tuning import FineTuner, fine_tuning_applies, predict_pixels, trace_network
from ml.training.networks import Logits, dropout_states, loss_of, new_head, set_standardization
from ml.training.presets import Recipe
from ml.training.sampling import Indices

if TYPE_CHECKING:
    import keras


_STEPS = 16
"""Steps whose features are held in memory at a time."""


class FittedNetwork(NamedTuple):
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
        import_tensorflow_quietly()
        self._examples = examples
        self._load_backbone = backbone
        self._head = _compiled_head(examples.task, examples.recipe)
        self._initial = [np.asarray(v) for v in self._head.optimizer.variables]
        self._steps = _steps_of(self._head, examples.recipe.training.batch_size)
        self.fine_tunes = fine_tuning_applies(examples.recipe.fine_tuning)

    @cached_property
    def _tuning(self) -> "FineTuner":
        return FineTuner(self._examples, self._load_backbone)

    def fit(
        self,
        name: str,
        learnt: Indices,
        watched: Indices,
        seed: int,
        checkpoint: Checkpoint,
        *,
        epochs: int | None = None,
    ) -> FittedNetwork:
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

    def head(self, fitted: FittedNetwork) -> "keras.Model":
        """The head of a fit as a network: features -> logits."""
        head = new_head(self._examples.task, self._examples.recipe)
        head.set_weights(fitted.head)
        return head

    def backbone(self, fitted: FittedNetwork) -> "keras.Model":
        """The backbone that belongs to a fit's head."""
        backbone = self._load_backbone()
        if fitted.backbone is not None:
            backbone.set_weights(fitted.backbone)
        return backbone

    def predict(self, fitted: FittedNetwork, rows: Indices) -> Logits:
        """Logits (rows, 1 or 8) of what a fit came to."""
        head = self.head(fitted)
        if fitted.backbone is None:
            return np.asarray(head(self._examples.features[0, rows], training=False))
        backbone = self.backbone(fitted)
        traced = trace_network(lambda x: head(backbone(x, training=False), training=False))
        return predict_pixels(traced, self._examples, rows)

    def _fit_head(
        self, name: str, learnt: Indices, watched: Indices, seed: int, epochs: int, checkpoint: Checkpoint
    ) -> FittedNetwork:
        import keras

        examples, head = self._examples, self._head
        if done := checkpoint.read_finished(name):
            return FittedNetwork(done.arrays[:-1], None, done.arrays[-1].astype(np.float32), done.history)
        keras.utils.set_random_seed(seed)
        fresh = new_head(examples.task, examples.recipe)
        if examples.recipe.head.standardize:
            set_standardization(fresh, *feature_statistics(examples.features, learnt))
        head.set_weights(fresh.get_weights())
        for variable, value in zip(head.optimizer.variables, self._initial, strict=True):
            variable.assign(value)
        drops = dropout_states(head.layers)

        def learn(left: range) -> Iterator[None]:
            size = _STEPS * examples.recipe.training.batch_size
            for epoch in left:
                for _, rows, numbers, targets, weights in choose_batches(
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
        return FittedNetwork(kept, None, logits, history)

    def _fine_tune(
        self,
        name: str,
        fitted: FittedNetwork,
        learnt: Indices,
        watched: Indices,
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
        return FittedNetwork(kept, tuned, logits, history)


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
        reached = self._checkpoint.read_unfinished(self._name)
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
            if epoch + 1 < self._epochs and self._checkpoint.is_due():
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


def _compiled_head(task: Task, recipe: Recipe) -> "keras.Model":
    """The head, compiled, with an optimizer that has its variables already."""
    import keras

    head, spec = new_head(task, recipe), recipe.training
    optimizer = (
        keras.optimizers.AdamW(spec.learning_rate, weight_decay=spec.weight_decay)
        if spec.weight_decay
        else keras.optimizers.Adam(spec.learning_rate)
    )
    head.compile(_in_one_kernel(optimizer), loss=loss_of(task, recipe), jit_compile=False)
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
