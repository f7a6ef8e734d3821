"""A model's predictions of the images of one side, with their true classes, and the same by case."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ml.core.columns import read_texts
from ml.core.taxonomy import Task
from ml.evaluation.decision_rule import DecisionRule

if TYPE_CHECKING:
    import pandas as pd

ClassNumbers = NDArray[np.int64]

Probabilities = NDArray[np.float64]


@dataclass(frozen=True)
class LabelledPredictions:
    """Predicted probabilities of the images of one side, their true classes, and the decision rule.

    Attributes:
        task: the task, which names the classes.
        rows: (n) rows of a dataset, with patient, magnification, source and so on.
        truth: (n,) true class numbers.
        probabilities: (n,) of malignant, or (n, 8).
        rule: the decision rule; for out-of-fold predictions one rule a row. A patient's rows have several rules where
            its slides lie in several folds. The patient's label is then taken by the mean of these rules.
    """

    task: Task
    rows: "pd.DataFrame"
    truth: ClassNumbers
    probabilities: Probabilities
    rule: DecisionRule | Sequence[DecisionRule]

    @cached_property
    def predicted(self) -> ClassNumbers:
        """(n,) predicted class numbers, by the decision rule."""
        return _assign_labels(self.rule, self.probabilities)

    @property
    def rules(self) -> list[DecisionRule]:
        """The distinct decision rules."""
        return [self.rule] if isinstance(self.rule, DecisionRule) else list(dict.fromkeys(self.rule))

    @cached_property
    def cases(self) -> "Cases":
        """The predictions by case: one case for each patient and class."""
        patients = read_texts(self.rows, "patient")
        keys = np.array([f"{patient}\n{k}" for patient, k in zip(patients, self.truth, strict=True)])
        _, first_rows, case_of_row = np.unique(keys, return_index=True, return_inverse=True)
        image_counts = np.bincount(case_of_row).astype(float)
        columns = self.probabilities if self.probabilities.ndim == 2 else self.probabilities[:, None]
        sums = np.zeros((len(first_rows), columns.shape[1]))
        np.add.at(sums, case_of_row, columns)
        means = sums / image_counts[:, None]
        means = means if self.probabilities.ndim == 2 else means[:, 0]
        correct_shares = np.bincount(case_of_row, self.predicted == self.truth) / image_counts
        rule = self.rule
        if not isinstance(rule, DecisionRule):
            rows_of_cases = [np.flatnonzero(case_of_row == k).tolist() for k in range(len(first_rows))]
            rule = [_average_rules([rule[row] for row in rows]) for rows in rows_of_cases]
        return Cases(
            patients[first_rows],
            self.truth[first_rows],
            means,
            _assign_labels(rule, means),
            image_counts,
            correct_shares,
            first_rows,
            case_of_row,
        )

    def subset(self, rows: NDArray[np.bool_]) -> "LabelledPredictions":
        """Returns the predictions of the rows that are True in a mask (n,)."""
        rule = (
            self.rule if isinstance(self.rule, DecisionRule) else [self.rule[k] for k in np.flatnonzero(rows).tolist()]
        )
        return LabelledPredictions(self.task, self.rows[rows], self.truth[rows], self.probabilities[rows], rule)


def _assign_labels(rule: DecisionRule | Sequence[DecisionRule], probabilities: Probabilities) -> ClassNumbers:
    """Returns (n,) class numbers by one rule, or by one rule for each row."""
    if isinstance(rule, DecisionRule):
        return rule.assign_labels(probabilities)
    predicted = np.empty(len(probabilities), np.int64)
    for distinct in set(rule):
        has_rule = np.array([row_rule == distinct for row_rule in rule])
        predicted[has_rule] = distinct.assign_labels(probabilities[has_rule])
    return predicted


def _average_rules(rules: Sequence[DecisionRule]) -> DecisionRule:
    """Returns the rule with the mean threshold or the mean offsets; missing offsets count as zero."""
    if len(set(rules)) == 1:
        return rules[0]
    if rules[0].threshold is not None:
        return DecisionRule(threshold=float(np.mean([rule.threshold for rule in rules])))
    width = max(len(rule.offsets or ()) for rule in rules)
    offsets = np.mean([rule.offsets or (0.0,) * width for rule in rules], axis=0)
    return DecisionRule(offsets=tuple(map(float, offsets)))


@dataclass(frozen=True)
class Cases:
    """Predictions by case. A patient with slides of two classes is two cases: one for each class.

    Attributes:
        patients: (cases,) the patient of each case.
        truth: (cases,) true class numbers.
        probabilities: means over the case's images: (cases,) of malignant, or (cases, 8).
        predicted: (cases,) class numbers of the labels that the mean probabilities lead to.
        image_counts: (cases,) numbers of images.
        correct_shares: (cases,) share of the case's images that got the right label.
        first_rows: (cases,) the first row of each case.
        case_of_row: (n,) the case of each row.
    """

    patients: NDArray[np.str_]
    truth: ClassNumbers
    probabilities: Probabilities
    predicted: ClassNumbers
    image_counts: NDArray[np.float64]
    correct_shares: NDArray[np.float64]
    first_rows: NDArray[np.int64]
    case_of_row: NDArray[np.int64]
