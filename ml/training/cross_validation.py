"""Cross-validation: epochs, calibration and decision rule are selected on out-of-fold predictions.

Cases are assigned to folds, and a model that was trained on the other folds predicts each fold. Epochs, calibration
temperature, logit adjustment and decision threshold are selected on all these out-of-fold predictions together:
thresholds of one small validation side vary widely, those of pooled predictions carry over to other cases. All this
happens before the test side is scored.

Selected parameters fit the predictions that they were selected on a little better than new ones. The reported figures
are therefore nested: the parameters that apply to a fold are selected on predictions that this fold had no part in.
For that, a model is trained without each *pair* of folds: the models without fold k and another fold predict the
other fold.
"""

import warnings
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ml.core.errors import DataError
from ml.core.taxonomy import Task, class_names
from ml.evaluation.decision_rule import DecisionRule
from ml.evaluation.thresholds import youden_threshold
from ml.training.networks import Logits
from ml.training.presets import Recipe
from ml.training.sampling import Indices

PriorCorrection = tuple[NDArray[np.float64], NDArray[np.float64]]
"""The bias that undoes what sampling and weights did to logits, (1,) or (8,), and the log class prior, (classes,)."""

_MAX_RANDOM_STATES = 200
_MIN_TEMPERATURE, _MAX_TEMPERATURE = 0.05, 20.0


class FoldTraining(NamedTuple):
    """One training of a cross-validation."""

    name: str
    """Names the training in checkpoints and in the log."""
    repeat: int
    left_out: tuple[int, ...]
    """The fold, or the pair of folds, that the model is not trained on."""

    def training_rows(self, folds: Indices) -> Indices:
        """Returns the positions of the images to train on, given each image's fold, (images,)."""
        return np.flatnonzero(~np.isin(folds, self.left_out))

    def held_out_rows(self, folds: Indices) -> Indices:
        """Returns the positions of the images to predict, given each image's fold, (images,)."""
        return np.flatnonzero(np.isin(folds, self.left_out))


def list_trainings(folds: int, repeats: int) -> list[FoldTraining]:
    """Returns all trainings: one without each fold, in each repeat, and one without each pair, in the first repeat."""
    single = [FoldTraining(f"fold {k + 1} of repeat {r + 1}", r, (k,)) for r in range(repeats) for k in range(folds)]
    pairs = [FoldTraining(f"folds {j + 1} and {k + 1}", 0, (j, k)) for j, k in combinations(range(folds), 2)]
    return [*single, *pairs]


def assign_folds(subtypes: NDArray[np.str_], cases: NDArray[np.str_], folds: int, repeats: int) -> Indices:
    """Returns the fold of each image in each repeat: int (repeats, images). The same images get the same folds.

    No fold is empty, and each subtype with two cases or more lies in two folds or more; otherwise the model that
    predicts its images would not have been trained on it. The folds are those of scikit-learn's StratifiedGroupKFold
    with the first random states under which that holds. Where it holds under none, as in tiny sets, cases are moved.

    Args:
        subtypes: (images,) the classes to stratify by.
        cases: (images,) the groups that stay in one fold.
        folds: number of folds, two or more.
        repeats: number of repeats, each with other folds; a tiny set may not have that many ways to be assigned.

    Raises:
        DataError: there are fewer cases than folds, or no assignment was found; names the subtypes and their cases.
    """
    names, first, case_of_image = np.unique(cases, return_index=True, return_inverse=True)
    subtype_names = np.unique(subtypes)
    has = np.zeros((len(names), len(subtype_names)), bool)
    has[case_of_image, np.searchsorted(subtype_names, subtypes)] = True
    if len(names) < folds:
        counted = ", ".join(f"{n} of {name}" for name, n in zip(subtype_names, has.sum(axis=0), strict=True))
        raise DataError(
            f"{len(names)} cases to train on cannot be assigned to {folds} folds ({counted}); the set needs "
            f"{folds - len(names)} more"
        )
    spread = has[:, has.sum(axis=0) > 1]
    candidates: dict[bytes, tuple[int, int, Indices]] = {}
    for seed in range(_MAX_RANDOM_STATES):
        assignment = _deal_images(subtypes, cases, case_of_image, folds, seed)
        faults = _count_faults(assignment[first], spread, folds)
        candidates.setdefault(assignment.tobytes(), (faults, seed, assignment))
        if sum(not faults for faults, _, _ in candidates.values()) == repeats:
            break
    best: list[Indices] = []
    for faults, _, assignment in sorted(candidates.values(), key=lambda candidate: candidate[:2]):
        mended = _move_cases(assignment[first], spread, folds)[case_of_image] if faults else assignment
        if not _count_faults(mended[first], spread, folds):
            best.append(mended)
        if len(best) == repeats:
            break
    if not best:
        counted = ", ".join(f"{n} of {name}" for name, n in zip(subtype_names, has.sum(axis=0), strict=True))
        raise DataError(
            f"{len(names)} cases to train on ({counted}) cannot be assigned to {folds} folds with each subtype of two "
            "cases in two of them; the set needs more cases of the subtypes that have fewest"
        )
    return np.stack([best[r % len(best)] for r in range(repeats)])


def _deal_images(
    subtypes: NDArray[np.str_], cases: NDArray[np.str_], case_of_image: Indices, folds: int, seed: int
) -> Indices:
    """Returns the fold of each image by StratifiedGroupKFold; dealt in turn where it cannot stratify at all."""
    from sklearn.model_selection import StratifiedGroupKFold

    if max(np.unique(subtypes, return_counts=True)[1]) < folds:  # scikit-learn refuses
        return np.asarray(np.random.default_rng(seed).permutation(case_of_image.max() + 1) % folds)[case_of_image]
    assignment = np.empty(len(cases), np.int64)
    with warnings.catch_warnings():
        # The warning is about a subtype with fewer pictures than folds, which the caller looks at.
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        for number, (_, held_out) in enumerate(splitter.split(cases, subtypes, cases)):
            assignment[held_out] = number
    return assignment


def _count_faults(fold_of_case: Indices, spread: NDArray[np.bool_], folds: int) -> int:
    """Returns the number of empty folds, and of subtypes in ``spread`` (cases, subtypes) that lie in one fold only."""
    empty = folds - len(np.unique(fold_of_case))
    return empty + sum(len(np.unique(fold_of_case[has])) < 2 for has in spread.T)


def _move_cases(fold_of_case: Indices, spread: NDArray[np.bool_], folds: int) -> Indices:
    """Moves one case at a time to another fold, as long as that leaves fewer faults."""
    faults = _count_faults(fold_of_case, spread, folds)
    while faults:
        moves = []
        for case in range(len(fold_of_case)):
            for fold in range(folds):
                moved = fold_of_case.copy()
                moved[case] = fold
                moves.append((_count_faults(moved, spread, folds), case, fold))
        fewest, case, fold = min(moves)
        if fewest >= faults:
            break
        fold_of_case = fold_of_case.copy()
        fold_of_case[case], faults = fold, fewest
    return fold_of_case


class HeldOutPredictions(NamedTuple):
    """Predictions of images by models that were not trained on their cases."""

    rows: Indices
    """(n,) positions of the images."""
    logits: Logits
    """(epochs, n, 1 or 8), after each epoch."""
    knows_class: NDArray[np.bool_]
    """(n,) whether the model was trained on the image's class, from other cases."""


class SelectedParameters(NamedTuple):
    """The parameters that were selected before the test side is scored."""

    epochs: int
    bias: tuple[float, ...]
    """Added to the logits, (1,) or (8,): undoes what sampling and class weights did to the class prior."""
    temperature: float
    rule: DecisionRule
    tau: float = 0.0
    """Strength of the logit adjustment (arXiv:2007.07314) in the rule."""

    def probabilities(self, logits: Logits) -> NDArray[np.float64]:
        """Returns calibrated probabilities, (n,) of malignant or (n, 8), from logits (n, 1 or 8)."""
        return to_probabilities((logits.astype(np.float64) + np.asarray(self.bias)) / self.temperature)


def to_probabilities(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns probabilities: (n,) of malignant from logits (n, 1), by sigmoid; (n, 8) from (n, 8), by softmax."""
    from scipy.special import expit, softmax

    probabilities = expit(logits[:, 0]) if logits.shape[1] == 1 else softmax(logits, axis=1)
    return np.asarray(probabilities, dtype=np.float64)


def select_on_validation(task: Task, recipe: Recipe, truth: Indices, logits: Logits) -> SelectedParameters:
    """Select on the validation side: the last epoch, uncalibrated logits, and the threshold by Youden's J.

    Args:
        task: the model's task.
        recipe: the model's recipe.
        truth: (n,) class numbers of the validation side.
        logits: (n, 1 or 8) after the last epoch.
    """
    bias = (0.0,) * logits.shape[1]
    probabilities = to_probabilities(logits.astype(np.float64))
    rule = DecisionRule(threshold=youden_threshold(truth, probabilities)) if task == "binary" else DecisionRule()
    return SelectedParameters(recipe.training.epochs, bias, 1.0, rule)


def select_parameters(
    task: Task,
    recipe: Recipe,
    truth: Indices,
    pooled: HeldOutPredictions,
    bias: NDArray[np.float64],
    log_prior: NDArray[np.float64],
    *,
    first_epoch: int = 1,
) -> SelectedParameters:
    """Select epochs and temperature by log-loss, then the rule: Youden's J, or the tau with the best macro-F1.

    A class that some of the models were not trained on, since all its cases were left out, is not evaluated.

    Args:
        task: the model's task.
        recipe: says which parameters are selected at all.
        truth: (images,) class numbers of all that ``pooled.rows`` points to.
        pooled: out-of-fold predictions; an image may have several.
        bias: (1,) or (8,), see :class:`SelectedParameters`; used where the recipe calibrates.
        log_prior: (8,) log of each class's share of the development images, in the order of the classes.
        first_epoch: number of the first epoch in ``pooled.logits``.

    Raises:
        DataError: fewer than two classes can be evaluated.
    """
    truth = truth[pooled.rows]
    evaluated = [k for k in np.unique(truth) if pooled.knows_class[truth == k].all()]
    if len(evaluated) < 2:
        raise DataError(
            "fewer than two classes have two cases to train on, so nothing can be selected on out-of-fold predictions; "
            "the set needs more cases"
        )
    used = np.isin(truth, evaluated)
    logits, truth = pooled.logits[:, used].astype(np.float64), truth[used]
    selection = recipe.selection
    added_bias = bias if selection.calibrate else np.zeros_like(bias)
    candidates = range(len(logits)) if selection.choose_epochs else [len(logits) - 1]
    fitted = [_fit_temperature(logits[k] + added_bias, truth, free=selection.calibrate) for k in candidates]
    best = int(np.argmin([loss for _, loss in fitted]))
    temperature = fitted[best][0]
    probabilities = to_probabilities((logits[candidates[best]] + added_bias) / temperature)
    epochs = first_epoch + candidates[best]
    bias_values = tuple(float(b) for b in added_bias)
    if task == "binary":
        return SelectedParameters(
            epochs, bias_values, temperature, DecisionRule(threshold=youden_threshold(truth, probabilities))
        )
    tau = _best_tau(recipe.imbalance.logit_adjustment, log_prior, probabilities, truth, evaluated)
    return SelectedParameters(epochs, bias_values, temperature, _adjusted_rule(tau, log_prior), tau)


def nest_selection(
    task: Task,
    recipe: Recipe,
    truth: Indices,
    folds: Indices,
    predictions: dict[FoldTraining, HeldOutPredictions],
    correct_prior: Callable[[Indices], PriorCorrection],
    *,
    first_epoch: int = 1,
) -> tuple[NDArray[np.float64], list[SelectedParameters]]:
    """Compute nested out-of-fold probabilities: each fold's parameters are selected without that fold.

    Args:
        task: the model's task.
        recipe: says which parameters are selected at all.
        truth: (images,) class numbers.
        folds: (images,) the fold of each image in the first repeat.
        predictions: the held-out predictions of every training.
        correct_prior: class numbers of the training images -> ``bias`` and ``log_prior`` of
            :func:`select_parameters`.
        first_epoch: number of the first epoch in the logits.

    Returns:
        probabilities (images,) or (images, 8) of the first repeat, and the parameters that apply to each fold.
    """
    outer = {fold.left_out[0]: p for fold, p in predictions.items() if fold.repeat == 0 and len(fold.left_out) == 1}
    pairs = {fold.left_out: p for fold, p in predictions.items() if len(fold.left_out) == 2}
    shape = (len(truth),) if task == "binary" else (len(truth), len(class_names(task)))
    probabilities = np.empty(shape)
    selections = []
    for k in range(len(outer)):
        inner = [_select_fold(p, folds, j) for pair, p in pairs.items() if k in pair for j in pair if j != k]
        selected = select_parameters(
            task, recipe, truth, pool_predictions(inner), *correct_prior(truth[folds != k]), first_epoch=first_epoch
        )
        probabilities[outer[k].rows] = selected.probabilities(outer[k].logits[selected.epochs - first_epoch])
        selections.append(selected)
    return probabilities, selections


def pool_predictions(predictions: Sequence[HeldOutPredictions]) -> HeldOutPredictions:
    """Returns the predictions of several models as one."""
    return HeldOutPredictions(
        np.concatenate([p.rows for p in predictions]),
        np.concatenate([p.logits for p in predictions], axis=1),
        np.concatenate([p.knows_class for p in predictions]),
    )


def loss_by_epoch(truth: Indices, pooled: HeldOutPredictions, bias: NDArray[np.float64] | None = None) -> list[float]:
    """Returns the mean log-loss of the predictions after each epoch, by which the number of epochs is selected.

    Args:
        truth: class numbers of all that ``pooled.rows`` points to.
        pooled: the predictions.
        bias: added to the logits, which are then calibrated by the epoch's own temperature; None: uncalibrated.
    """
    added, calibrated = (0.0, False) if bias is None else (bias, True)
    return [
        _fit_temperature(logits.astype(np.float64) + added, truth[pooled.rows], free=calibrated)[1]
        for logits in pooled.logits
    ]


def _select_fold(predicted: HeldOutPredictions, folds: Indices, fold: int) -> HeldOutPredictions:
    kept = folds[predicted.rows] == fold
    return HeldOutPredictions(predicted.rows[kept], predicted.logits[:, kept], predicted.knows_class[kept])


def _fit_temperature(logits: NDArray[np.float64], truth: Indices, *, free: bool) -> tuple[float, float]:
    """Returns the temperature with the smallest log-loss (1 unless ``free``), and that loss.

    C. Guo et al., "On Calibration of Modern Neural Networks", ICML 2017 (arXiv:1706.04599).
    """
    from scipy.optimize import minimize_scalar

    if not free:
        return 1.0, _log_loss(logits, truth)
    bounds = (np.log(_MIN_TEMPERATURE), np.log(_MAX_TEMPERATURE))
    minimum = minimize_scalar(lambda t: _log_loss(logits / np.exp(t), truth), bounds=bounds, method="bounded")
    return float(np.exp(minimum.x)), float(minimum.fun)


def _log_loss(logits: NDArray[np.float64], truth: Indices) -> float:
    from scipy.special import logsumexp

    if logits.shape[1] == 1:
        # log(1 + exp(-z)) where malignant, log(1 + exp(z)) where benign
        signed = np.where(truth == 1, -logits[:, 0], logits[:, 0])
        return float(np.logaddexp(0, signed).mean())
    return float((logsumexp(logits, axis=1) - logits[np.arange(len(truth)), truth]).mean())


def _adjusted_rule(tau: float, log_prior: NDArray[np.float64]) -> DecisionRule:
    return DecisionRule(offsets=tuple(float(-tau * s) for s in log_prior)) if tau else DecisionRule()


def _best_tau(
    taus: Sequence[float],
    log_prior: NDArray[np.float64],
    probabilities: NDArray[np.float64],
    truth: Indices,
    evaluated: list[int],
) -> float:
    from sklearn.metrics import f1_score

    def macro_f1(tau: float) -> float:
        called = _adjusted_rule(tau, log_prior).assign_labels(probabilities)
        return float(f1_score(truth, called, labels=evaluated, average="macro", zero_division=0))

    return max(taus, key=lambda tau: (macro_f1(tau), -abs(tau)))  # of equals the weakest adjustment
