"""The protocol: what is chosen before the test side is scored, and on which predictions.

Cases are dealt to folds, each fold is predicted by a model that learnt from the others, and epochs, temperature, logit
adjustment and threshold are chosen on all these out-of-fold predictions together: thresholds of one small validation
side swing widely, those of pooled predictions carry over to other cases.

What is chosen fits the very predictions it was chosen on a little better than new ones. The figures that are reported
are therefore nested: what applies to a fold is chosen on predictions that nothing of this fold went into. For that a
model is trained without each *pair* of folds: those without fold k and another one predict the other one.
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
"""What takes back the effect of sampling and weights on logits, (1,) or (8,), and the log of each class's share."""

_SEEDS = 200
_COLDEST, _HOTTEST = 0.05, 20.0


class FoldTraining(NamedTuple):
    """One training of a cross-validation."""

    name: str
    repeat: int
    left_out: tuple[int, ...]
    """The one fold that is not learnt from, or the pair."""

    def training_rows(self, folds: Indices) -> Indices:
        """Positions of the images it learns from, given each image's fold."""
        return np.flatnonzero(~np.isin(folds, self.left_out))

    def held_out_rows(self, folds: Indices) -> Indices:
        """Positions of the images it predicts."""
        return np.flatnonzero(np.isin(folds, self.left_out))


def list_trainings(folds: int, repeats: int) -> list[FoldTraining]:
    """What has to be trained: each fold left out, in each repeat, and each pair of folds in the first one."""
    each = [FoldTraining(f"fold {k + 1} of repeat {r + 1}", r, (k,)) for r in range(repeats) for k in range(folds)]
    pairs = [FoldTraining(f"folds {j + 1} and {k + 1}", 0, (j, k)) for j, k in combinations(range(folds), 2)]
    return [*each, *pairs]


def assign_folds(subtypes: NDArray[np.str_], cases: NDArray[np.str_], folds: int, repeats: int) -> Indices:
    """The fold of each image in each repeat: int (repeats, images), the same for the same images whoever asks.

    By scikit-learn's StratifiedGroupKFold, with the first random states under which each subtype with two cases or more
    lies in two folds or more; otherwise no model without a case of it could predict it.

    Args:
        subtypes: (images,) what is spread evenly.
        cases: (images,) what stays together.
        folds: how many.
        repeats: how often, with other folds.

    Raises:
        DataError: there are fewer cases than folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    n = len(np.unique(cases))
    if n < folds:
        raise DataError(f"{n} cases to learn from cannot be dealt to {folds} folds; the set needs more cases")
    several = [name for name in np.unique(subtypes) if len(np.unique(cases[subtypes == name])) > 1]
    found: dict[bytes, tuple[int, int, Indices]] = {}
    for seed in range(_SEEDS):
        dealt = np.empty(len(cases), np.int64)
        with warnings.catch_warnings():
            # Of a subtype with fewer pictures than folds, which is what the next lines look at.
            warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
            splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
            for number, (_, held_out) in enumerate(splitter.split(cases, subtypes, cases)):
                dealt[held_out] = number
        together = sum(len(np.unique(dealt[subtypes == name])) < 2 for name in several)
        found.setdefault(dealt.tobytes(), (together, seed, dealt))
        if sum(not bad for bad, _, _ in found.values()) == repeats:
            break
    best = [dealt for _, _, dealt in sorted(found.values(), key=lambda one: one[:2])][:repeats]
    # A tiny set may not have as many ways to be dealt.
    return np.stack([best[r % len(best)] for r in range(repeats)])


class HeldOutPredictions(NamedTuple):
    """Predictions of images by models that did not learn from their cases."""

    rows: Indices
    """(n,) positions of the images."""
    logits: Logits
    """(epochs, n, 1 or 8), after each epoch."""
    learnt: NDArray[np.bool_]
    """(n,) whether the model had learnt the image's class from another case."""


class SelectedParameters(NamedTuple):
    """What was chosen, and is locked."""

    epochs: int
    bias: tuple[float, ...]
    """Added to the logits, (1,) or (8,): takes back what sampling and weights did to the classes' shares."""
    temperature: float
    rule: DecisionRule
    tau: float = 0.0

    def probabilities(self, logits: Logits) -> NDArray[np.float64]:
        """Calibrated probabilities (n,) of malignant or (n, 8) of logits (n, 1 or 8)."""
        return to_probabilities((logits.astype(np.float64) + np.asarray(self.bias)) / self.temperature)


def to_probabilities(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,) of malignant from logits (n, 1), by the sigmoid; (n, 8) from (n, 8), by the softmax."""
    from scipy.special import expit, softmax

    probabilities = expit(logits[:, 0]) if logits.shape[1] == 1 else softmax(logits, axis=1)
    return np.asarray(probabilities, dtype=np.float64)


def select_on_validation(task: Task, recipe: Recipe, truth: Indices, logits: Logits) -> SelectedParameters:
    """The choice on a validation side: the last epoch, logits as they are, and the threshold by Youden's J.

    Args:
        task: whose.
        recipe: its recipe.
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
    log_shares: NDArray[np.float64],
    *,
    first: int = 1,
) -> SelectedParameters:
    """Choose epochs and temperature by log-loss, then the rule: Youden's J, or the tau with the best macro-F1.

    A class that some of the models had not learnt, since all its cases were left out, takes no part.

    Args:
        task: whose.
        recipe: what is to be chosen at all.
        truth: (images,) class numbers of all that ``pooled.rows`` points to.
        pooled: out-of-fold predictions; an image may be there several times.
        bias: (1,) or (8,), see :class:`SelectedParameters`; used where the recipe calibrates.
        log_shares: (8,) log of each class's share of the development images; its order is that of the classes.
        first: number of the first epoch in ``pooled.logits``.

    Raises:
        DataError: fewer than two classes take part.
    """
    truth = truth[pooled.rows]
    taking_part = [k for k in np.unique(truth) if pooled.learnt[truth == k].all()]
    if len(taking_part) < 2:
        raise DataError(
            "fewer than two classes have two cases to learn from, so nothing can be chosen out of fold; the set needs "
            "more cases"
        )
    used = np.isin(truth, taking_part)
    logits, truth = pooled.logits[:, used].astype(np.float64), truth[used]
    selection = recipe.selection
    shift = bias if selection.calibrate else np.zeros_like(bias)
    candidates = range(len(logits)) if selection.choose_epochs else [len(logits) - 1]
    fitted = [_fit_temperature(logits[k] + shift, truth, free=selection.calibrate) for k in candidates]
    best = int(np.argmin([loss for _, loss in fitted]))
    temperature = fitted[best][0]
    probabilities = to_probabilities((logits[candidates[best]] + shift) / temperature)
    epochs = first + candidates[best]
    chosen = tuple(float(b) for b in shift)
    if task == "binary":
        return SelectedParameters(
            epochs, chosen, temperature, DecisionRule(threshold=youden_threshold(truth, probabilities))
        )
    tau = _best_tau(recipe.imbalance.logit_adjustment, log_shares, probabilities, truth, taking_part)
    return SelectedParameters(epochs, chosen, temperature, _rule(tau, log_shares), tau)


def nest_selection(
    task: Task,
    recipe: Recipe,
    truth: Indices,
    folds: Indices,
    predictions: dict[FoldTraining, HeldOutPredictions],
    shares: Callable[[Indices], PriorCorrection],
    *,
    first: int = 1,
) -> tuple[NDArray[np.float64], list[SelectedParameters]]:
    """Out-of-fold probabilities of the first repeat, with what was chosen without anything of their own fold.

    Args:
        task: whose.
        recipe: what is to be chosen at all.
        truth: (images,) class numbers.
        folds: (images,) the fold of each.
        predictions: of every training.
        shares: class numbers of what is learnt from -> ``bias`` and ``log_shares`` of :func:`select_parameters`.
        first: number of the first epoch in the logits.

    Returns:
        probabilities (images,) or (images, 8), and the choice that applied to each fold.
    """
    outer = {fold.left_out[0]: p for fold, p in predictions.items() if fold.repeat == 0 and len(fold.left_out) == 1}
    pairs = {fold.left_out: p for fold, p in predictions.items() if len(fold.left_out) == 2}
    shape = (len(truth),) if task == "binary" else (len(truth), len(class_names(task)))
    probabilities = np.empty(shape)
    choices = []
    for k in range(len(outer)):
        inner = [_only(p, folds, j) for pair, p in pairs.items() if k in pair for j in pair if j != k]
        choice = select_parameters(
            task, recipe, truth, pool_predictions(inner), *shares(truth[folds != k]), first=first
        )
        mine = outer[k]
        probabilities[mine.rows] = choice.probabilities(mine.logits[choice.epochs - first])
        choices.append(choice)
    return probabilities, choices


def pool_predictions(predictions: Sequence[HeldOutPredictions]) -> HeldOutPredictions:
    """Several models' predictions as one."""
    return HeldOutPredictions(
        np.concatenate([p.rows for p in predictions]),
        np.concatenate([p.logits for p in predictions], axis=1),
        np.concatenate([p.learnt for p in predictions]),
    )


def loss_by_epoch(truth: Indices, pooled: HeldOutPredictions, shift: NDArray[np.float64] | None = None) -> list[float]:
    """Mean log-loss of the predictions after each epoch: what the number of epochs is chosen by.

    Args:
        truth: class numbers of all that ``pooled.rows`` points to.
        pooled: the predictions.
        shift: added to the logits, which are then calibrated by the epoch's own temperature; None: as they are.
    """
    added, calibrated = (0.0, False) if shift is None else (shift, True)
    return [
        _fit_temperature(logits.astype(np.float64) + added, truth[pooled.rows], free=calibrated)[1]
        for logits in pooled.logits
    ]


def _only(predicted: HeldOutPredictions, folds: Indices, fold: int) -> HeldOutPredictions:
    kept = folds[predicted.rows] == fold
    return HeldOutPredictions(predicted.rows[kept], predicted.logits[:, kept], predicted.learnt[kept])


def _fit_temperature(logits: NDArray[np.float64], truth: Indices, *, free: bool) -> tuple[float, float]:
    """The temperature with the smallest log-loss, and that loss.

    C. Guo et al., "On Calibration of Modern Neural Networks", ICML 2017 (arXiv:1706.04599).
    """
    from scipy.optimize import minimize_scalar

    if not free:
        return 1.0, _log_loss(logits, truth)
    bounds = (np.log(_COLDEST), np.log(_HOTTEST))
    found = minimize_scalar(lambda t: _log_loss(logits / np.exp(t), truth), bounds=bounds, method="bounded")
    return float(np.exp(found.x)), float(found.fun)


def _log_loss(logits: NDArray[np.float64], truth: Indices) -> float:
    from scipy.special import logsumexp

    if logits.shape[1] == 1:
        # log(1 + exp(-z)) where malignant, log(1 + exp(z)) where benign
        signed = np.where(truth == 1, -logits[:, 0], logits[:, 0])
        return float(np.logaddexp(0, signed).mean())
    return float((logsumexp(logits, axis=1) - logits[np.arange(len(truth)), truth]).mean())


def _rule(tau: float, log_shares: NDArray[np.float64]) -> DecisionRule:
    return DecisionRule(offsets=tuple(float(-tau * s) for s in log_shares)) if tau else DecisionRule()


def _best_tau(
    taus: Sequence[float],
    log_shares: NDArray[np.float64],
    probabilities: NDArray[np.float64],
    truth: Indices,
    taking_part: list[int],
) -> float:
    from sklearn.metrics import f1_score

    def macro_f1(tau: float) -> float:
        called = _rule(tau, log_shares).assign_labels(probabilities)
        return float(f1_score(truth, called, labels=taking_part, average="macro", zero_division=0))

    return max(taus, key=lambda tau: (macro_f1(tau), -abs(tau)))  # of equals the weakest
