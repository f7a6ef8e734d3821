"""What a model said of the images of one side, and the same by patient."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ml.core.taxonomy import Task
from ml.evaluation.decision_rule import DecisionRule

if TYPE_CHECKING:
    import pandas as pd

ClassNumbers = NDArray[np.int64]

Probabilities = NDArray[np.float64]


@dataclass(frozen=True)
class LabelledPredictions:
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
    truth: ClassNumbers
    probabilities: Probabilities
    rule: DecisionRule | Sequence[DecisionRule]

    @cached_property
    def predicted(self) -> ClassNumbers:
        """(n,) class numbers of the labels."""
        return _call(self.rule, self.probabilities)

    @property
    def rules(self) -> list[DecisionRule]:
        """The rules, each once."""
        return [self.rule] if isinstance(self.rule, DecisionRule) else list(dict.fromkeys(self.rule))

    @cached_property
    def cases(self) -> "Cases":
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
        right = np.bincount(unit, self.predicted == self.truth) / images
        rule = self.rule
        if not isinstance(rule, DecisionRule):
            rule = [_mean_rule([rule[row] for row in np.flatnonzero(unit == k).tolist()]) for k in range(len(first))]
        return Cases(names[first], self.truth[first], means, _call(rule, means), images, right, first, unit)

    def subset(self, rows: NDArray[np.bool_]) -> "LabelledPredictions":
        """A part of them."""
        rule = (
            self.rule if isinstance(self.rule, DecisionRule) else [self.rule[k] for k in np.flatnonzero(rows).tolist()]
        )
        return LabelledPredictions(self.task, self.rows[rows], self.truth[rows], self.probabilities[rows], rule)


def _call(rule: DecisionRule | Sequence[DecisionRule], probabilities: Probabilities) -> ClassNumbers:
    """Labels of probabilities, by one rule or by one each."""
    if isinstance(rule, DecisionRule):
        return rule.assign_labels(probabilities)
    called = np.empty(len(probabilities), np.int64)
    for each in set(rule):
        of = np.array([one == each for one in rule])
        called[of] = each.assign_labels(probabilities[of])
    return called


def _mean_rule(rules: Sequence[DecisionRule]) -> DecisionRule:
    if len(set(rules)) == 1:
        return rules[0]
    if rules[0].threshold is not None:
        return DecisionRule(threshold=float(np.mean([rule.threshold for rule in rules])))
    width = max(len(rule.offsets or ()) for rule in rules)
    offsets = np.mean([rule.offsets or (0.0,) * width for rule in rules], axis=0)
    return DecisionRule(offsets=tuple(map(float, offsets)))


@dataclass(frozen=True)
class Cases:
    """Units of a patient and a class: a patient may have slides of two classes."""

    patients: NDArray[np.str_]
    truth: ClassNumbers
    probabilities: Probabilities
    """Means over the unit's images."""
    predicted: ClassNumbers
    image_counts: NDArray[np.float64]
    correct_shares: NDArray[np.float64]
    """Share of the unit's images that got the right label."""
    first_rows: NDArray[np.int64]
    """A row of each unit."""
    case_of_row: NDArray[np.int64]
    """The unit of each row."""
