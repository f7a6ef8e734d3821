"""The training procedure of a recipe on one split, from the data to the predictions of the test side.

If the recipe selects on out-of-fold predictions, the train and the validation side are cross-validated, the parameters
are selected, one more network is trained on both sides, and it predicts the test side once. If the recipe selects on
the validation side, one network is trained on the train side.
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

from ml.core.columns import read_texts
from ml.core.devices import convert_memory_errors, import_tensorflow_quietly, require_gpu
from ml.core.errors import DataError
from ml.core.hashes import digest
from ml.core.progress import track
from ml.core.settings import Settings
from ml.core.store import Store
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
from ml.training.extractors import Features
from ml.training.features import FeatureCache, extract_features
from ml.training.fine_tuning import fine_tuning_applies
from ml.training.head_fitting import Fitter
from ml.training.presets import Preset, Recipe
from ml.training.sampling import Indices, effective_class_prior

if TYPE_CHECKING:
    import keras
    import pandas as pd


_VERSION = 4
"""Raised whenever the same inputs give another result: finished runs of before are then trained again."""

OUT_OF_FOLD, VALIDATION = "out_of_fold", "validation"


class TrainingData(NamedTuple):
    """The images, features and sides that a training uses."""

    rows: "pd.DataFrame"
    """The dataset, one row an image."""
    groups: NDArray[np.str_]
    """(images,) the case or slide of each, as the split groups them."""
    truth: Indices
    """(images,) class numbers."""
    rows_by_side: dict[str, Indices]
    """Side -> positions of the images on it."""
    features: Features
    """float32 (views, images, 1280), on disk."""
    view_counts: Indices
    """(images,) number of views of each."""
    weights: Weights
    inputs_digest: str
    """Digest of everything that the result depends on, except the seed."""


class TrainedModel(NamedTuple):
    """A trained network with its selected parameters and its predictions."""

    head: "keras.Model"
    """Features (n, 1280) -> logits."""
    backbone: Callable[[], "keras.Model"]
    """Loads the backbone with the weights that belong to the head: fine-tuned, if it was."""
    selected: SelectedParameters
    held_out: str
    """``out_of_fold`` or ``validation``: which predictions the next three fields hold."""
    held_out_rows: Indices
    """(n,) positions of the images."""
    held_out_probabilities: NDArray[np.float64]
    """(n,) of malignant, or (n, 8)."""
    held_out_rules: list[DecisionRule]
    """(n,) the rule of each image: out of fold, each fold has the rule that was selected without it."""
    history: History
    """Training curves: name -> one value an epoch."""
    test_logits: NDArray[np.float32]
    """(images of the test side, 1 or 8)."""


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
    """Prepare the data of one training. Within the block the features lie in a scratch file, which costs no memory.

    Args:
        task: the model's task.
        dataset: the dataset's id.
        split: the side of each case or slide.
        preset: holds the task's recipe.
        store: the store that holds the dataset and the caches.
        settings: weights, backend, workers and whether a GPU is required.
        weights_id: weights in the store, instead of those that the settings name.

    Raises:
        DataError: a side is empty, or the training images lack a class.
        NoGpuError: the settings ask for a GPU and there is none.
    """
    if settings.gpu_required:
        require_gpu()
    recipe, rows = preset.recipe(task), read_dataset(dataset, store)
    sides = look_up_sides(rows, split)
    truth = _class_numbers(task, rows)
    rows_by_side = {side: np.flatnonzero(sides == side) for side in SIDES}
    _check_sides(task, recipe, dataset, truth, rows_by_side)
    plan = plan_views(recipe.views, rows, sides)
    hashes = read_texts(rows, "pixel_sha256")
    wanted_hashes = [(view, hashes[wanted].tolist()) for view, wanted in plan]
    extraction = extract_features(dataset, preset, store, settings, weights_id=weights_id, plan=wanted_hashes)
    weights = Weights(extraction["weights"], extraction["weights_kind"])
    views, content = np.zeros(len(rows), np.int64), hashlib.sha256()
    with tempfile.TemporaryDirectory(prefix="breakhis-") as scratch:
        file = Path(scratch) / "features.npy"
        features = np.lib.format.open_memmap(file, "w+", np.float32, (len(plan), len(rows), FEATURE_SIZE))
        for number, (view, wanted) in enumerate(plan):
            vectors = FeatureCache(store, weights.id, extraction["backend"], view).read(hashes[wanted].tolist())
            content.update(np.ascontiguousarray(vectors).data)
            features[number, wanted] = vectors
            views += wanted
        # The features stand for backend, device and views: computed again, their last bits may differ.
        is_fine_tuned = fine_tuning_applies(recipe.fine_tuning)  # by when: gpu, one recipe gives different results
        inputs = digest(
            [_VERSION, task, dataset, split.group, sides.tolist(), recipe.model_dump(), weights.id, is_fine_tuned]
        )
        inputs = digest([inputs, content.hexdigest()])
        groups = read_texts(rows, GROUP_COLUMNS[split.group])
        yield TrainingData(rows, groups, truth, rows_by_side, np.load(file, mmap_mode="r"), views, weights, inputs)


def _check_sides(task: Task, recipe: Recipe, dataset: str, truth: Indices, rows_by_side: dict[str, Indices]) -> None:
    """Raise DataError where a side is empty or the training images lack a class."""
    for side, indices in rows_by_side.items():
        if not len(indices):
            raise DataError(f"{dataset}: no image on the {side} side; the set needs more cases")
    training_rows = _select_training_rows(recipe, rows_by_side)
    if task == "binary" and recipe.selection.using == VALIDATION:
        check_both_classes(truth[rows_by_side["validation"]])  # before minutes of training rather than after them
    missing = [name for k, name in enumerate(class_names(task)) if not (truth[training_rows] == k).any()]
    if missing:
        raise DataError(f"{dataset}: no training image of {', '.join(missing)}; the set needs some to train on")


def _select_training_rows(recipe: Recipe, rows_by_side: dict[str, Indices]) -> Indices:
    """Returns the positions of the images that the final model is trained on."""
    if recipe.selection.using == VALIDATION:
        return rows_by_side["train"]
    return np.sort(np.concatenate([rows_by_side["train"], rows_by_side["validation"]]))


def fit_and_calibrate(
    task: Task, recipe: Recipe, seed: int, data: TrainingData, checkpoint: Checkpoint, store: Store
) -> TrainedModel:
    """Select the parameters, train the final network, and predict the test side with it.

    Args:
        task: the model's task.
        recipe: the model's recipe.
        seed: seed of initial weights, order, views and dropout.
        data: what :func:`prepare_training_data` yields.
        checkpoint: where a killed training resumes.
        store: the store that holds pixels and weights.

    Raises:
        DataError: no parameters can be selected on this data.
        DeviceError: memory does not suffice.
        ConfigError: the loss or the outputs become infinite or NaN.
    """
    advice = f"the head trains on {recipe.training.batch_size} images a step, fine-tuning on "
    advice += f"{recipe.fine_tuning.batch_size}; lower batch_size in the preset"
    with convert_memory_errors(advice):
        return _run_procedure(task, recipe, seed, data, checkpoint, store)


def _run_procedure(
    task: Task, recipe: Recipe, seed: int, data: TrainingData, checkpoint: Checkpoint, store: Store
) -> TrainedModel:
    import_tensorflow_quietly()
    import tensorflow as tf

    # Otherwise sums are added up in the order in which threads finish, and a seed gives another model each time.
    tf.config.experimental.enable_op_determinism()
    pixels, pixel_hashes = PixelCache(store), data.rows["pixel_sha256"].tolist()
    examples = Examples(
        task,
        recipe,
        data.truth,
        data.features,
        data.view_counts,
        lambda rows: pixels.read([pixel_hashes[row] for row in rows]),
        pixel_hashes,
    )
    fitter = Fitter(examples, lambda: load_backbone(data.weights.id, store))
    training_rows, no_rows = _select_training_rows(recipe, data.rows_by_side), np.empty(0, np.int64)
    if recipe.selection.using == VALIDATION:
        rows = data.rows_by_side["validation"]
        final = fitter.fit("the model", training_rows, rows, seed, checkpoint)
        selected = cross_validation.select_on_validation(task, recipe, data.truth[rows], final.logits[-1])
        probabilities, rules = selected.probabilities(final.logits[-1]), [selected.rule] * len(rows)
        validation_predictions = HeldOutPredictions(rows, final.logits, np.ones(len(rows), dtype=bool))
        curve, name = cross_validation.loss_by_epoch(data.truth, validation_predictions), "validation_loss"
    else:
        rows = training_rows
        selected, probabilities, rules, curve = _cross_validate(task, recipe, seed, data, fitter, checkpoint)
        final = fitter.fit("the model", training_rows, no_rows, seed, checkpoint, epochs=selected.epochs)
        name = "out_of_fold_loss"
    if fitter.fine_tunes:
        name = f"fine_tuning_{name}"
    logits = fitter.predict(final, data.rows_by_side["test"])
    return TrainedModel(
        fitter.head(final),
        lambda: fitter.backbone(final),
        selected,
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
    """Cross-validate the training images.

    Returns:
        the selected parameters; nested out-of-fold probabilities and a rule for each training image; the loss by epoch.
    """
    rows = _select_training_rows(recipe, data.rows_by_side)
    subtypes, selection = read_texts(data.rows, "subtype")[rows], recipe.selection
    folds_by_repeat = cross_validation.assign_folds(subtypes, data.groups[rows], selection.folds, selection.repeats)
    truth, trainings = data.truth[rows], cross_validation.list_trainings(selection.folds, selection.repeats)
    predictions: dict[FoldTraining, HeldOutPredictions] = {}
    for number, training in enumerate(track(trainings, total=len(trainings), what="cross-validation, models")):
        folds = folds_by_repeat[training.repeat]
        trained, held_out = training.training_rows(folds), training.held_out_rows(folds)
        # Each training has its own seed, so that not every fold shares an unlucky draw of initial weights.
        fit = fitter.fit(training.name, rows[trained], rows[held_out], seed + 1000 * (number + 1), checkpoint)
        predictions[training] = HeldOutPredictions(held_out, fit.logits, np.isin(truth[held_out], truth[trained]))
    correct_prior = partial(_correct_prior, task, recipe)
    first_epoch = 0 if fitter.fine_tunes else 1
    pooled = cross_validation.pool_predictions(
        [p for training, p in predictions.items() if len(training.left_out) == 1]
    )
    bias, log_prior = correct_prior(truth)
    selected = cross_validation.select_parameters(task, recipe, truth, pooled, bias, log_prior, first_epoch=first_epoch)
    probabilities, fold_parameters = cross_validation.nest_selection(
        task, recipe, truth, folds_by_repeat[0], predictions, correct_prior, first_epoch=first_epoch
    )
    curve = cross_validation.loss_by_epoch(truth, pooled, bias if selection.calibrate else None)
    return selected, probabilities, [fold_parameters[k].rule for k in folds_by_repeat[0]], curve


def _correct_prior(task: Task, recipe: Recipe, truth: Indices) -> PriorCorrection:
    """Returns the bias and the log class prior of training images with these class numbers.

    An absent class gets nothing added, neither to its logit nor by the rule.
    """
    shares = np.bincount(truth, minlength=len(class_names(task))) / len(truth)
    effective, present = effective_class_prior(truth, recipe), shares > 0
    log_prior, bias = np.zeros(len(shares)), np.zeros(len(shares))
    log_prior[present] = np.log(shares[present])
    bias[present] = log_prior[present] - np.log([effective[int(k)] for k in np.flatnonzero(present)])
    # One logit stands for the difference of two logits.
    return (np.array([bias[1] - bias[0]]) if task == "binary" else bias), log_prior


def _class_numbers(task: Task, rows: "pd.DataFrame") -> Indices:
    index = {name: k for k, name in enumerate(class_names(task))}
    return np.asarray(rows["label" if task == "binary" else "subtype"].map(index), dtype=np.int64)


def collect_scores(task: Task, trained: TrainedModel, data: TrainingData) -> dict[str, LabelledPredictions]:
    """Returns the predictions of the test side, named ``test``, and the held-out ones, named ``trained.held_out``."""
    selected, test, held_out = trained.selected, data.rows_by_side["test"], trained.held_out_rows
    probabilities = selected.probabilities(trained.test_logits)
    return {
        "test": LabelledPredictions(task, data.rows.iloc[test], data.truth[test], probabilities, selected.rule),
        trained.held_out: LabelledPredictions(
            task, data.rows.iloc[held_out], data.truth[held_out], trained.held_out_probabilities, trained.held_out_rules
        ),
    }
