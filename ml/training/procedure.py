"""Learning: the protocol of a recipe carried out on one split, down to what the model says of the test side.

Where the recipe chooses out of fold: cross-validation in train and validation, the choice, one more network that learns
from both, and the test side, once. Where it chooses on validation: one network that learns from train.
"""

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ml.core.devices import convert_memory_errors, import_tensorflow_quietly, require_gpu
from ml.core.errors import DataError
from ml.core.progress import track
from ml.core.settings import Settings
from ml.core.store import Store, digest
from ml.core.taxonomy import SIDES, Task, class_names
from ml.data.splits import GROUP_COLUMNS, Split, look_up_sides
from ml.data.training_sets import read_dataset
from ml.evaluation.decision_rule import DecisionRule
from ml.evaluation.figures import History
from ml.evaluation.scores import LabelledPredictions
from ml.evaluation.thresholds import check_both_classes
from ml.images.augmentation import plan_views
from ml.images.pixel_cache import PixelCache
from ml.training import cross_validation
from ml.training.backbone_weights import FEATURE_SIZE, Weights, load_backbone
from ml.training.checkpoints import Checkpoint
from ml.training.cross_validation import FoldTraining, HeldOutPredictions, PriorCorrection, SelectedParameters
from ml.training.examples import Examples
from ml.training.features import FeatureCache, Features, extract_features
from ml.training.fine_tuning import fine_tuning_applies
from ml.training.head_fitting import Fitter
from ml.training.presets import Preset, Recipe
from ml.training.sampling import Indices, effective_class_prior

if TYPE_CHECKING:
    import keras
    import pandas as pd


_VERSION = 4
"""Raised whenever the same inputs come to another result: what was trained before is then trained anew."""

OUT_OF_FOLD, VALIDATION = "out_of_fold", "validation"


class TrainingData(NamedTuple):
    """What a training starts from."""

    rows: "pd.DataFrame"
    groups: NDArray[np.str_]
    """(images,) the case or slide of each, as the split has it."""
    truth: Indices
    """(images,) class numbers."""
    rows_by_side: dict[str, Indices]
    """Side -> rows on it."""
    features: Features
    """float32 (views, images, 1280), kept on disk."""
    view_counts: Indices
    """(images,) how many views there are of each."""
    weights: Weights
    inputs_digest: str
    """Names all that the result depends on, but the seed."""


class TrainedModel(NamedTuple):
    """What a training came to, before the test side was looked at."""

    head: "keras.Model"
    backbone: Callable[[], "keras.Model"]
    """Loads it, with the weights that belong to the head: fine-tuned, if that was done."""
    choice: SelectedParameters
    held_out: str
    """``out_of_fold`` or ``validation``: what the next ones are of."""
    rows: Indices
    probabilities: NDArray[np.float64]
    rules: list[DecisionRule]
    """One a row: out of fold, each fold has the rule that was chosen without it."""
    history: History
    test: NDArray[np.float32]
    """Logits of the test side."""


@contextmanager
def prepare_training_data(
    task: Task,
    dataset: str,
    split: Split,
    preset: Preset,
    store: Store,
    settings: Settings,
    weights_id: str | None = None,
) -> Iterator[TrainingData]:
    """What a training starts from. Features lie in a scratch file, which costs no memory, within the block.

    Raises:
        DataError: a side is empty, or a class is missing among what is learnt from.
        NoGpuError: the settings ask for a GPU and there is none.
    """
    if settings.gpu_required:
        require_gpu()
    recipe, rows = preset.recipe(task), read_dataset(dataset, store)
    sides = look_up_sides(rows, split)
    truth = _truth(task, rows)
    on = {side: np.flatnonzero(sides == side) for side in SIDES}
    for side, indices in on.items():
        if not len(indices):
            raise DataError(f"{dataset}: no image on the {side} side; the set needs more cases")
    learnt = _learnt_from(recipe, on)
    if task == "binary" and recipe.selection.using == VALIDATION:
        check_both_classes(truth[on["validation"]])  # before minutes of training, rather than after
    missing = [name for k, name in enumerate(class_names(task)) if not (truth[learnt] == k).any()]
    if missing:
        raise DataError(f"{dataset}: no training image of {', '.join(missing)}; it cannot be learnt")
    plan = plan_views(recipe.views, rows, sides)
    hashes = rows["pixel_sha256"].to_numpy(dtype=str)
    wanted_of = [(view, hashes[wanted].tolist()) for view, wanted in plan]
    made = extract_features(dataset, preset, store, settings, weights_id=weights_id, plan=wanted_of)
    weights = Weights(made["weights"], made["weights_kind"])
    views, content = np.zeros(len(rows), np.int64), hashlib.sha256()
    with tempfile.TemporaryDirectory(prefix="breakhis-") as scratch:
        file = Path(scratch) / "features.npy"
        features = np.lib.format.open_memmap(file, "w+", np.float32, (len(plan), len(rows), FEATURE_SIZE))
        for number, (view, wanted) in enumerate(plan):
            vectors = FeatureCache(store, weights.id, made["backend"], view).read(hashes[wanted].tolist())
            content.update(np.ascontiguousarray(vectors).data)
            features[number, wanted] = vectors
            views += wanted
        # The features themselves stand for backend, device and views: computed anew they may differ in their last bits.
        tunes = fine_tuning_applies(recipe.fine_tuning)  # "where there is a GPU": the same recipe, and another result
        inputs = digest([_VERSION, task, dataset, split.group, sides.tolist(), recipe.model_dump(), weights.id, tunes])
        inputs = digest([inputs, content.hexdigest()])
        groups = rows[GROUP_COLUMNS[split.group]].to_numpy(dtype=str)
        yield TrainingData(rows, groups, truth, on, np.load(file, mmap_mode="r"), views, weights, inputs)


def _learnt_from(recipe: Recipe, on: dict[str, Indices]) -> Indices:
    """Rows that the model learns from in the end."""
    if recipe.selection.using == VALIDATION:
        return on["train"]
    return np.sort(np.concatenate([on["train"], on["validation"]]))


def fit_and_calibrate(
    task: Task, recipe: Recipe, seed: int, data: TrainingData, checkpoint: Checkpoint, store: Store
) -> TrainedModel:
    """Choose and learn, and predict the test side with the outcome.

    Raises:
        DataError: nothing can be chosen.
        DeviceError: memory does not suffice.
        ConfigError: nothing finite is learnt.
    """
    advice = f"the head trains on {recipe.training.batch_size} images a step, fine-tuning on "
    advice += f"{recipe.fine_tuning.batch_size}; lower batch_size in the preset"
    with convert_memory_errors(advice):
        return _learn(task, recipe, seed, data, checkpoint, store)


def _learn(
    task: Task, recipe: Recipe, seed: int, data: TrainingData, checkpoint: Checkpoint, store: Store
) -> TrainedModel:
    import_tensorflow_quietly()
    import tensorflow as tf

    # Without it sums are added up in whatever order threads finish, and a seed gives another model each time.
    tf.config.experimental.enable_op_determinism()
    pixels, names = PixelCache(store), data.rows["pixel_sha256"].tolist()
    examples = Examples(
        task,
        recipe,
        data.truth,
        data.features,
        data.view_counts,
        lambda rows: pixels.read([names[row] for row in rows]),
        names,
    )
    fitter = Fitter(examples, lambda: load_backbone(data.weights.id, store))
    learnt, nobody = _learnt_from(recipe, data.rows_by_side), np.empty(0, np.int64)
    if recipe.selection.using == VALIDATION:
        rows = data.rows_by_side["validation"]
        final = fitter.fit("the model", learnt, rows, seed, checkpoint)
        choice = cross_validation.select_on_validation(task, recipe, data.truth[rows], final.logits[-1])
        probabilities, rules = choice.probabilities(final.logits[-1]), [choice.rule] * len(rows)
        everything = HeldOutPredictions(rows, final.logits, np.ones(len(rows), dtype=bool))
        curve, name = cross_validation.loss_by_epoch(data.truth, everything), "validation_loss"
    else:
        rows = learnt
        choice, probabilities, rules, curve = _cross_validate(task, recipe, seed, data, fitter, checkpoint)
        final = fitter.fit("the model", learnt, nobody, seed, checkpoint, epochs=choice.epochs)
        name = "out_of_fold_loss"
    if fitter.fine_tunes:
        name = f"fine_tuning_{name}"
    logits = fitter.predict(final, data.rows_by_side["test"])
    return TrainedModel(
        fitter.head(final),
        lambda: fitter.backbone(final),
        choice,
        recipe.selection.using,
        rows,
        probabilities,
        rules,
        {**final.history, name: curve},
        logits,
    )


def _cross_validate(
    task: Task, recipe: Recipe, seed: int, data: TrainingData, fitter: Fitter, checkpoint: Checkpoint
) -> tuple[SelectedParameters, NDArray[np.float64], list[DecisionRule], list[float]]:
    """The choice; nested out-of-fold probabilities of what is learnt from, a rule for each; the loss by epoch."""
    mine = _learnt_from(recipe, data.rows_by_side)
    subtypes, selection = data.rows["subtype"].to_numpy(dtype=str)[mine], recipe.selection
    dealt = cross_validation.assign_folds(subtypes, data.groups[mine], selection.folds, selection.repeats)
    truth, todo = data.truth[mine], cross_validation.list_trainings(selection.folds, selection.repeats)
    predictions: dict[FoldTraining, HeldOutPredictions] = {}
    for number, fold in enumerate(track(todo, total=len(todo), what="cross-validation, models")):
        folds = dealt[fold.repeat]
        learnt, predicted = fold.training_rows(folds), fold.held_out_rows(folds)
        # Seeds of their own: an unlucky draw of initial weights is then not the same in every fold.
        fit = fitter.fit(fold.name, mine[learnt], mine[predicted], seed + 1000 * (number + 1), checkpoint)
        predictions[fold] = HeldOutPredictions(predicted, fit.logits, np.isin(truth[predicted], truth[learnt]))
    shares = partial(_shares, task, recipe)
    first = 0 if fitter.fine_tunes else 1
    pooled = cross_validation.pool_predictions([p for fold, p in predictions.items() if len(fold.left_out) == 1])
    bias, log_shares = shares(truth)
    choice = cross_validation.select_parameters(task, recipe, truth, pooled, bias, log_shares, first=first)
    probabilities, choices = cross_validation.nest_selection(
        task, recipe, truth, dealt[0], predictions, shares, first=first
    )
    curve = cross_validation.loss_by_epoch(truth, pooled, bias if selection.calibrate else None)
    return choice, probabilities, [choices[k].rule for k in dealt[0]], curve


def _shares(task: Task, recipe: Recipe, truth: Indices) -> PriorCorrection:
    """Of what is learnt from. A class that is not there gets nothing added, neither to its logit nor by the rule."""
    shares = np.bincount(truth, minlength=len(class_names(task))) / len(truth)
    seen, there = effective_class_prior(truth, recipe), shares > 0
    logs, shift = np.zeros(len(shares)), np.zeros(len(shares))
    logs[there] = np.log(shares[there])
    shift[there] = logs[there] - np.log([seen[int(k)] for k in np.flatnonzero(there)])
    # One logit stands for the difference of two.
    return (np.array([shift[1] - shift[0]]) if task == "binary" else shift), logs


def _truth(task: Task, rows: "pd.DataFrame") -> Indices:
    index = {name: k for k, name in enumerate(class_names(task))}
    return np.asarray(rows["label" if task == "binary" else "subtype"].map(index), dtype=np.int64)


def collect_scores(task: Task, learnt: TrainedModel, data: TrainingData) -> dict[str, LabelledPredictions]:
    """What was said of the test side, by the name ``test``, and of what was held out, by the name of that."""
    choice, test, held_out = learnt.choice, data.rows_by_side["test"], learnt.rows
    probabilities = choice.probabilities(learnt.test)
    return {
        "test": LabelledPredictions(task, data.rows.iloc[test], data.truth[test], probabilities, choice.rule),
        learnt.held_out: LabelledPredictions(
            task, data.rows.iloc[held_out], data.truth[held_out], learnt.probabilities, learnt.rules
        ),
    }
