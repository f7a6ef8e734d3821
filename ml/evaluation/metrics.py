"""What a model is worth on one side: metrics, image- and patient-level, with intervals, whole and in slices.

Metric names are the field's, and are the names that policies use. Every metric is a function of the images' weights:
all one for the value itself, and for an interval the weights that a draw of patients gives. So there is one way to
compute it, and a thousand draws take seconds.

Where every draw of patients gives the same, such as a recall of 1 where all of two cases are right, percentiles would
speak of a certainty that nobody has. A share of cases then has the exact interval of so many cases (C. J. Clopper,
E. S. Pearson, Biometrika 26(4), 1934), and any other metric has none; which of the two is told beside the intervals.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ml.core.errors import DataError
from ml.core.store import Json
from ml.core.taxonomy import LABELS, SUBTYPES, Task, classes, label_of
from ml.evaluation.decision_rule import Rule

if TYPE_CHECKING:
    import pandas as pd

Truth = NDArray[np.int64]
Probabilities = NDArray[np.float64]
Weights = NDArray[np.float64]
Values = dict[str, NDArray[np.float64]]

_LEVEL = (2.5, 97.5)
_SAME = 1e-9

DEGENERATE = "no interval: every draw of patients gives the same"
"""The note of a metric of which nothing can be said, though there are several cases."""
_BINS = 10
_CHUNK_BYTES = 64 * 2**20
_OF_SLICES = {
    "binary": ("accuracy", "balanced_accuracy", "macro_f1", "roc_auc", "recall", "specificity"),
    "subtype": ("accuracy", "balanced_accuracy", "macro_f1", "roc_auc_ovr"),
}
SLICES: dict[Task, tuple[str, ...]] = {
    "binary": ("magnification", "source", "subtype"),
    "subtype": ("magnification", "source"),  # its classes are the subtypes
}


@dataclass(frozen=True)
class Scores:
    """What a model said of the images of one side.

    Attributes:
        task: whose classes.
        rows: (n) rows of a dataset, with patient, magnification, source and so on.
        truth: (n,) class numbers.
        probabilities: (n,) of malignant, or (n, 8).
        rule: the rule by which labels are taken; out of fold, one a row. Where a patient's rows have several, as those
            of slides in several folds do, the patient's label is taken by the mean of them.
    """

    task: Task
    rows: "pd.DataFrame"
    truth: Truth
    probabilities: Probabilities
    rule: Rule | Sequence[Rule]

    @cached_property
    def called(self) -> Truth:
        """(n,) class numbers of the labels."""
        return _call(self.rule, self.probabilities)

    @property
    def rules(self) -> list[Rule]:
        """The rules, each once."""
        return [self.rule] if isinstance(self.rule, Rule) else list(dict.fromkeys(self.rule))

    @cached_property
    def patients(self) -> "Patients":
        """The same, a unit for each patient and class."""
        names = self.rows["patient"].to_numpy(dtype=str)
        keys = np.array([f"{name}\n{k}" for name, k in zip(names, self.truth, strict=True)])
        _, first, unit = np.unique(keys, return_index=True, return_inverse=True)
        images = np.bincount(unit).astype(float)
        wide = self.probabilities if self.probabilities.ndim == 2 else self.probabilities[:, None]
        sums = np.zeros((len(first), wide.shape[1]))
        np.add.at(sums, unit, wide)
        means = sums / images[:, None]
        means = means if self.probabilities.ndim == 2 else means[:, 0]
        right = np.bincount(unit, self.called == self.truth) / images
        rule = self.rule
        if not isinstance(rule, Rule):
            rule = [_mean_rule([rule[row] for row in np.flatnonzero(unit == k).tolist()]) for k in range(len(first))]
        return Patients(names[first], self.truth[first], means, _call(rule, means), images, right, first, unit)

    def only(self, rows: NDArray[np.bool_]) -> "Scores":
        """A part of them."""
        rule = self.rule if isinstance(self.rule, Rule) else [self.rule[k] for k in np.flatnonzero(rows).tolist()]
        return Scores(self.task, self.rows[rows], self.truth[rows], self.probabilities[rows], rule)


def _call(rule: Rule | Sequence[Rule], probabilities: Probabilities) -> Truth:
    """Labels of probabilities, by one rule or by one each."""
    if isinstance(rule, Rule):
        return rule.call(probabilities)
    called = np.empty(len(probabilities), np.int64)
    for each in set(rule):
        of = np.array([one == each for one in rule])
        called[of] = each.call(probabilities[of])
    return called


def _mean_rule(rules: Sequence[Rule]) -> Rule:
    if len(set(rules)) == 1:
        return rules[0]
    if rules[0].threshold is not None:
        return Rule(threshold=float(np.mean([rule.threshold for rule in rules])))
    width = max(len(rule.offsets or ()) for rule in rules)
    offsets = np.mean([rule.offsets or (0.0,) * width for rule in rules], axis=0)
    return Rule(offsets=tuple(map(float, offsets)))


@dataclass(frozen=True)
class Patients:
    """Units of a patient and a class: a patient may have slides of two classes."""

    names: NDArray[np.str_]
    truth: Truth
    probabilities: Probabilities
    """Means over the unit's images."""
    called: Truth
    images: NDArray[np.float64]
    right: NDArray[np.float64]
    """Share of the unit's images that got the right label."""
    first: NDArray[np.int64]
    """A row of each unit."""
    of: NDArray[np.int64]
    """The unit of each row."""


@dataclass(frozen=True)
class Evaluation:
    """The result of scoring one side once.

    Attributes:
        metrics: by name; finite floats. A metric that cannot be computed is missing, never NaN. Names that begin with
            ``patient_`` are of patients, all others of images.
        intervals: 95% interval of each metric that has one, by draws of patients unless ``notes`` says otherwise.
        notes: by metric, where draws of patients give no interval since all are the same: which exact interval stands
            in its place, or that there is none.
        draws: of the bootstrap.
        confusion: int (classes, classes) of images; rows are true, columns predicted classes.
        report: by class name precision, recall, f1 and support, ``cases``, ``recognised`` (cases whose mean probability
            leads to the right label), ``intervals`` of recall and f1, and a ``note`` where they are none or exact.
        absent: classes without a single image on this side; macro figures are means over the others.
        slices: by column and value: images, cases (a patient with images of two classes is two), how many of them are
            recognised, metrics, intervals unless there is one case only, and notes.
        patients: a record for each patient and class, the worst first.
        rules: how labels were taken; several where each fold had its own.
    """

    task: Task
    metrics: dict[str, float]
    confusion: NDArray[np.int64]
    report: dict[str, Json]
    absent: tuple[str, ...]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    draws: int = 0
    slices: dict[str, dict[str, Json]] = field(default_factory=dict)
    patients: list[Json] = field(default_factory=list)
    rules: tuple[Rule, ...] = ()

    def to_json(self) -> Json:
        """Everything, for the run's artifacts and the evidence."""
        return {
            "task": self.task,
            "metrics": self.metrics,
            "intervals": {name: list(ends) for name, ends in self.intervals.items()},
            "interval_notes": self.notes,
            "draws": self.draws,
            "classes": list(classes(self.task)),
            "confusion": self.confusion.tolist(),
            "per_class": self.report,
            "absent_classes": list(self.absent),
            "slices": self.slices,
            "patients": self.patients,
            "rules": [rule.to_json() for rule in self.rules],
        }


def check_both_classes(truth: Truth) -> None:
    """Check that a threshold can be chosen on these images.

    Raises:
        DataError: only one class is there.
    """
    if len(np.unique(truth)) < 2:
        raise DataError(
            "the validation side holds images of one class only, so no threshold can be chosen on it; "
            "the set needs more cases"
        )


def youden_threshold(truth: Truth, malignant: Probabilities) -> float:
    """The probability above which calling malignant maximises Youden's J = sensitivity + specificity - 1.

    Between the best score and the next lower one, the middle is taken: a threshold that sits on a score is fragile.
    W. J. Youden, "Index for rating diagnostic tests", Cancer 3(1), 1950.

    Args:
        truth: (n,) 0 benign, 1 malignant.
        malignant: (n,) probability of malignant.

    Raises:
        DataError: only one class is there, so there is nothing to weigh.
    """
    from sklearn.metrics import roc_curve

    check_both_classes(truth)
    false_positive, true_positive, thresholds = roc_curve(truth, malignant, drop_intermediate=False)
    best = thresholds[int(np.argmax(true_positive - false_positive))]
    if not math.isfinite(best):  # the corner where nothing is called malignant
        return math.nextafter(1.0, 2.0)
    below = malignant[malignant < best]
    return float((best + below.max()) / 2) if len(below) else float(best)


def evaluate(scores: Scores, *, draws: int, seed: int = 0) -> Evaluation:
    """Score one side.

    Args:
        scores: what the model said.
        draws: of the patient bootstrap; 0: no intervals.
        seed: of the draws.
    """
    names, truth = classes(scores.task), scores.truth
    metrics, intervals, notes = with_intervals(scores, draws, seed)
    if scores.task == "binary" and isinstance(scores.rule, Rule) and scores.rule.threshold is not None:
        metrics["threshold"] = scores.rule.threshold
    confusion = np.zeros((len(names), len(names)), np.int64)
    np.add.at(confusion, (truth, scores.called), 1)
    slices: dict[str, dict[str, Json]] = {}
    for column in SLICES[scores.task]:
        values = scores.rows[column].astype(str).to_numpy()
        order = sorted(set(values), key=lambda value: (len(value), value))
        shown = ("accuracy",) if column == "subtype" else _OF_SLICES[scores.task]  # of a subtype, one class is there
        slices[column] = {value: _slice(scores.only(values == value), shown, draws, seed) for value in order}
    return Evaluation(
        scores.task,
        metrics,
        confusion,
        _report(scores, confusion, draws, seed),
        tuple(name for k, name in enumerate(names) if not (truth == k).any()),
        intervals,
        notes,
        draws,
        slices,
        _worst_first(scores),
        tuple(scores.rules),
    )


def bootstrap_weights(scores: Scores, draws: int, seed: int) -> Iterator[Weights]:
    """How often each image comes in each draw of patients, some draws at a time: (draws, n).

    Patients are drawn, not images: those of one patient look alike. They are drawn within the strata of benign,
    malignant and both, so that no draw loses either. Not within subtypes, of which most have a single test case: these
    would always be there, and the intervals would tell of a certainty that nobody has.
    B. Efron, R. Tibshirani, "An Introduction to the Bootstrap", 1993.
    """
    rng = np.random.default_rng(seed)
    strata, image_of, names = _strata(scores)
    size = max(1, _CHUNK_BYTES // (8 * max(1, len(scores.truth))))
    for start in range(0, draws, size):
        counts = np.zeros((min(size, draws - start), len(names)))
        for members in strata:
            p = np.full(len(members), 1 / len(members))
            counts[:, members] = rng.multinomial(len(members), p, size=len(counts))
        yield counts[:, image_of]


def can_vary(scores: Scores) -> bool:
    """Whether a draw of patients can be any other than the patients themselves."""
    return any(len(members) > 1 for members in _strata(scores)[0])


def metrics_of(scores: Scores, weights: Weights) -> Values:
    """Every metric under each row of weights.

    Args:
        scores: of n images.
        weights: (draws, n), the same for all images of a patient.

    Returns:
        name -> (draws,); NaN where it cannot be computed. Classes without weight do not count in means over classes.
    """
    found = _metrics(scores.task, scores.truth, scores.probabilities, scores.called, weights)
    units = scores.patients
    of_units = weights[:, units.first]
    mine = _metrics(scores.task, units.truth, units.probabilities, units.called, of_units)
    found |= {f"patient_{name}": values for name, values in mine.items()}
    # F. A. Spanhol et al., IEEE TBME 63(7), 2016: the mean over patients of the share of images rightly classified.
    found["patient_recognition_rate"] = _ratio(of_units @ units.right, of_units.sum(axis=1))
    return found


Interval = tuple[float, float]


def with_intervals(
    scores: Scores, draws: int, seed: int
) -> tuple[dict[str, float], dict[str, Interval], dict[str, str]]:
    """Every metric, its 95% interval if it has one, and what has to be said of intervals; see :class:`Evaluation`.

    Args:
        scores: what the model said.
        draws: of the patient bootstrap; 0: no intervals.
        seed: of the draws.
    """
    point = metrics_of(scores, np.ones((1, len(scores.truth))))
    metrics = {name: float(value[0]) for name, value in point.items() if np.isfinite(value[0])}
    if not draws or not can_vary(scores):
        return metrics, {}, {}
    drawn: dict[str, list[NDArray[np.float64]]] = {name: [] for name in metrics}
    for weights in bootstrap_weights(scores, draws, seed):
        values = metrics_of(scores, weights)
        for name, parts in drawn.items():
            parts.append(values[name])
    cases = _cases_of(scores)
    found = {name: interval(np.concatenate(parts), cases.get(name)) for name, parts in drawn.items()}
    return (
        metrics,
        {name: ends for name, (ends, _) in found.items() if ends},
        {name: note for name, (_, note) in found.items() if note},
    )


def _cases_of(scores: Scores) -> dict[str, int]:
    """Of how many cases each metric is a share: those for which it is 1 if all of them are right, and 0 if none is."""
    truth = scores.patients.truth
    shares = dict.fromkeys(("accuracy", "micro_f1"), len(truth))
    if scores.task == "binary":
        shares |= {"recall": int((truth == 1).sum()), "specificity": int((truth == 0).sum())}
    shares |= {f"patient_{name}": n for name, n in shares.items()}
    return {**shares, "patient_recognition_rate": len(truth)}


def interval(values: NDArray[np.float64], cases: int | None = None) -> tuple[Interval | None, str]:
    """The 95% interval of a metric, and what has to be said of it.

    Args:
        values: (draws,) under draws of patients; NaN where it could not be computed.
        cases: how many it is a share of, so that it is 1 if all of them are right and 0 if none is; None: of none.

    Returns:
        The percentiles of the draws and no note. Where all draws are the same: the exact interval of ``cases`` of
        ``cases``, or of none of them, if there are two or more, and otherwise no interval; each with a note.
    """
    from scipy.stats import binomtest

    finite = values[np.isfinite(values)]
    if not len(finite):
        return None, ""
    if np.ptp(finite) > _SAME:
        low, high = np.percentile(finite, _LEVEL)
        return (float(low), float(high)), ""
    share = float(finite[0])
    if cases is None or cases < 2 or min(share, 1 - share) > _SAME:
        return None, DEGENERATE
    right = cases if share > 0.5 else 0
    exact = binomtest(right, cases).proportion_ci(0.95, method="exact")
    return (float(exact.low), float(exact.high)), f"exact interval of {right} of {cases} cases"


def _strata(scores: Scores) -> tuple[list[NDArray[np.int64]], NDArray[np.int64], NDArray[np.str_]]:
    """Patients by whether they have benign or malignant images, (patient of each image), and their names."""
    names, image_of = np.unique(scores.rows["patient"].to_numpy(dtype=str), return_inverse=True)
    malignant = scores.truth
    if scores.task == "subtype":
        malignant = np.array([LABELS.index(label_of(name)) for name in SUBTYPES])[scores.truth]
    has = np.zeros((len(names), len(LABELS)), dtype=np.int64)
    has[image_of, malignant] = 1
    _, stratum = np.unique(has, axis=0, return_inverse=True)
    stratum = stratum.reshape(-1)
    return [np.flatnonzero(stratum == k) for k in range(stratum.max() + 1)] if len(names) else [], image_of, names


def _metrics(task: Task, truth: Truth, probabilities: Probabilities, called: Truth, weights: Weights) -> Values:
    n = len(classes(task))
    cells = np.zeros((len(truth), n * n))
    cells[np.arange(len(truth)), truth * n + called] = 1
    confusion = (weights @ cells).reshape(-1, n, n)
    right = np.einsum("dkk->dk", confusion)
    support, predicted = confusion.sum(axis=2), confusion.sum(axis=1)
    total, present = support.sum(axis=1), support > 0
    recall, f1 = _ratio(right, support), _ratio(2 * right, support + predicted)
    # A class that is there and never called has a precision of 0, by scikit-learn's convention, too.
    precision = np.where(predicted > 0, _ratio(right, predicted), 0.0)
    wide = probabilities if task == "subtype" else np.stack([1 - probabilities, probabilities], axis=1)
    sure, hit = wide[np.arange(len(called)), wide.argmax(axis=1)], wide.argmax(axis=1) == truth
    squared = ((wide - np.eye(n)[truth]) ** 2).sum(axis=1)
    accuracy = _ratio(right.sum(axis=1), total)
    found = {
        "accuracy": accuracy,
        "balanced_accuracy": _mean_over(present, recall),
        "micro_f1": accuracy,  # the same where each image has one label
        "macro_f1": _mean_over(present, f1),
        "weighted_f1": _ratio((np.nan_to_num(f1) * support).sum(axis=1), total),
        "mcc": _mcc(right.sum(axis=1), support, predicted, total),
    }
    if task == "binary":
        both = present.all(axis=1)
        found |= {
            "precision": precision[:, 1],
            "recall": np.where(present[:, 1], recall[:, 1], 0.0),
            "specificity": np.where(present[:, 0], recall[:, 0], np.nan),
            "f1": np.nan_to_num(f1[:, 1]),
            "roc_auc": np.where(both, roc_auc(truth == 1, probabilities, weights), np.nan),
            "pr_auc": np.where(both, average_precision(truth == 1, probabilities, weights), np.nan),
            "brier": _ratio(weights @ squared, 2 * total),  # of the one probability, as scikit-learn has it
            "ece": _calibration_error(probabilities, truth == 1, weights),
        }
        return found
    several = present.sum(axis=1) > 1
    areas = np.stack([roc_auc(truth == k, wide[:, k], weights) for k in range(n)], axis=1)
    precisions = np.stack([average_precision(truth == k, wide[:, k], weights) for k in range(n)], axis=1)
    return found | {
        "precision": _mean_over(present, precision),
        "recall": _mean_over(present, recall),
        "roc_auc_ovr": np.where(several, _mean_over(present, areas), np.nan),
        "pr_auc_ovr": np.where(several, _mean_over(present, precisions), np.nan),
        "brier": _ratio(weights @ squared, total),
        "ece": _calibration_error(sure, hit, weights),
    }


def roc_auc(positive: NDArray[np.bool_], score: NDArray[np.float64], weights: Weights) -> NDArray[np.float64]:
    """Area under the ROC curve under each row of weights, ties counting half: (draws,); NaN without both classes."""
    _, group = np.unique(score, return_inverse=True)
    starts = _starts(group)
    order = np.argsort(group, kind="stable")
    w = weights[:, order]
    p = np.add.reduceat(w * positive[order], starts, axis=1)
    q = np.add.reduceat(w * ~positive[order], starts, axis=1)
    below = np.cumsum(q, axis=1) - q
    return _ratio((p * (below + q / 2)).sum(axis=1), p.sum(axis=1) * q.sum(axis=1))


def average_precision(positive: NDArray[np.bool_], score: NDArray[np.float64], weights: Weights) -> NDArray[np.float64]:
    """Average precision under each row of weights, as scikit-learn's: (draws,); NaN without a positive."""
    _, group = np.unique(-score, return_inverse=True)
    starts = _starts(group)
    order = np.argsort(group, kind="stable")
    w = weights[:, order]
    p = np.add.reduceat(w * positive[order], starts, axis=1)
    everything = np.cumsum(np.add.reduceat(w, starts, axis=1), axis=1)
    precision = np.nan_to_num(_ratio(np.cumsum(p, axis=1), everything))
    return _ratio((precision * p).sum(axis=1), p.sum(axis=1))


def _starts(group: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.searchsorted(np.sort(group), np.arange(group.max() + 1))


def _calibration_error(p: NDArray[np.float64], happened: NDArray[np.bool_], weights: Weights) -> NDArray[np.float64]:
    """Expected calibration error in ten bins of equal width (C. Guo et al., arXiv:1706.04599): (draws,)."""
    bins = np.eye(_BINS)[np.minimum((p * _BINS).astype(int), _BINS - 1)]
    gap = np.abs(weights @ (bins * (p - happened)[:, None])).sum(axis=1)
    return _ratio(gap, weights.sum(axis=1))


def _mcc(
    right: NDArray[np.float64], support: Weights, predicted: Weights, total: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Matthews correlation of any number of classes (J. Gorodkin, Comput Biol Chem 28, 2004); 0 where undefined."""
    across = right * total - (support * predicted).sum(axis=1)
    spread = (total**2 - (support**2).sum(axis=1)) * (total**2 - (predicted**2).sum(axis=1))
    return np.where(spread > 0, across / np.sqrt(np.where(spread > 0, spread, 1)), 0.0)


def _ratio(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(b > 0, a / np.where(b > 0, b, 1), np.nan)


def _mean_over(present: NDArray[np.bool_], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means over the classes that are there."""
    return _ratio(np.where(present, values, 0.0).sum(axis=1), present.sum(axis=1).astype(float))


def _slice(scores: Scores, shown: Sequence[str], draws: int, seed: int) -> Json:
    metrics, intervals, notes = with_intervals(scores, draws, seed)
    units = scores.patients
    return {
        "images": len(scores.truth),
        "cases": len(units.truth),
        "recognised": int((units.called == units.truth).sum()),
        "metrics": {name: metrics[name] for name in shown if name in metrics},
        "intervals": {name: list(intervals[name]) for name in shown if name in intervals},
        "interval_notes": {name: notes[name] for name in shown if name in notes},
    }


def _report(scores: Scores, confusion: NDArray[np.int64], draws: int, seed: int) -> dict[str, Json]:
    units, report = scores.patients, {}
    precision = np.nan_to_num(_ratio(np.diag(confusion).astype(float), confusion.sum(axis=0)))
    for k, name in enumerate(classes(scores.task)):
        support, right = int(confusion[k].sum()), int(confusion[k, k])
        mine = units.truth == k
        cases = int(mine.sum())
        report[name] = {
            "precision": float(precision[k]),
            "recall": right / support if support else 0.0,
            "f1": float(2 * right / max(1, support + confusion[:, k].sum())),
            "support": float(support),
            "cases": cases,
            "recognised": int((units.called[mine] == k).sum()),
            "intervals": {},
            "note": "",
        }
        if cases < 2:
            report[name]["note"] = "one case: no interval" if cases else "no case on this side"
        elif draws:
            report[name] |= _class_intervals(scores, k, cases, draws, seed)
    return report


def _class_intervals(scores: Scores, k: int, cases: int, draws: int, seed: int) -> Json:
    of, called = (scores.truth == k).astype(float), (scores.called == k).astype(float)
    recalls, f1s = [], []
    for weights in bootstrap_weights(scores, draws, seed):
        right, support, predicted = weights @ (of * called), weights @ of, weights @ called
        recalls.append(_ratio(right, support))
        f1s.append(_ratio(2 * right, support + predicted))
    found = {"recall": interval(np.concatenate(recalls), cases), "F1": interval(np.concatenate(f1s))}
    return {
        "intervals": {name.lower(): list(ends) for name, (ends, _) in found.items() if ends},
        "note": "; ".join(f"{name}: {note}" for name, (_, note) in found.items() if note),
    }


def _worst_first(scores: Scores) -> list[Json]:
    units, names = scores.patients, classes(scores.task)
    own = units.probabilities
    own = np.stack([1 - own, own], axis=1) if scores.task == "binary" else own
    own = own[np.arange(len(own)), units.truth]
    return [
        {
            "patient": str(units.names[row]),
            "class": names[units.truth[row]],
            "images": int(units.images[row]),
            "right": float(units.right[row]),
            "probability": float(own[row]),
            "label": names[units.called[row]],
        }
        for row in np.lexsort((own, units.right))
    ]
