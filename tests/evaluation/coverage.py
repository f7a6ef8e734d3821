"""Simulates how often a 95% interval covers the true value, at the case counts of BreakHis' own ledger.

``python -m tests.evaluation.coverage`` prints the table of docs/training-and-promotion.md, in some minutes. Cases are
drawn at the counts of the test side. A case's images share an effect of the case, which is half of the variance within
a class. The true value is that of very many cases with the same class prior.
"""

import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from ml.core.store import Store
from ml.core.taxonomy import SUBTYPES, Task
from ml.evaluation.decision_rule import DecisionRule
from ml.evaluation.intervals import compute_metrics_with_intervals
from ml.evaluation.metrics import compute_weighted_metrics
from ml.evaluation.scores import LabelledPredictions
from tests.trust.simulation import binary, counts

SETS, DRAWS = 600, 1000
METRICS: dict[Task, tuple[str, ...]] = {
    "binary": ("roc_auc", "macro_f1", "recall", "specificity", "patient_roc_auc"),
    "subtype": ("roc_auc_ovr", "macro_f1", "accuracy", "patient_macro_f1"),
}
_SIGNAL: dict[Task, float] = {"binary": 0.8, "subtype": 1.8}


class Coverage(NamedTuple):
    """Coverage of one metric's intervals."""

    task: Task
    metric: str
    true_value: float
    given: float
    """Share of the sets in which there was an interval."""
    covered: float
    """Share of those intervals that cover the true value."""
    width: float
    """Median width of the intervals."""


def simulate_predictions(
    task: Task, cases_of_classes: tuple[int, ...], rng: np.random.Generator, images: int | None = None
) -> LabelledPredictions:
    """Draw predictions for cases of each class, with ``images`` images a case, or with 5 to 40."""
    class_of_case = np.repeat(np.arange(len(cases_of_classes)), cases_of_classes)
    sizes = rng.integers(5, 41, len(class_of_case)) if images is None else np.full(len(class_of_case), images)
    case = np.repeat(np.arange(len(class_of_case)), sizes)
    truth, columns = class_of_case[case], 1 if task == "binary" else len(cases_of_classes)
    z = rng.normal(size=(len(class_of_case), columns))[case] + rng.normal(size=(len(case), columns))
    if task == "binary":
        p = 1 / (1 + np.exp(-(z[:, 0] + _SIGNAL[task] * (2 * truth - 1))))
    else:
        z[np.arange(len(case)), truth] += _SIGNAL[task]
        p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    rows = pd.DataFrame({"patient": case.astype(str), "magnification": 40, "source": "made", "subtype": "DC"})
    return LabelledPredictions(
        task, rows, truth, p, DecisionRule(threshold=0.5) if task == "binary" else DecisionRule()
    )


@cache
def count_test_cases() -> dict[Task, tuple[int, ...]]:
    """Returns the number of cases of each class on the test side."""
    with tempfile.TemporaryDirectory() as scratch:
        cases_of_subtypes = counts(Store(Path(scratch).as_uri()))["on test"]
    return {"binary": binary(cases_of_subtypes), "subtype": tuple(cases_of_subtypes[s] for s in SUBTYPES)}


def measure_coverage(task: Task, sets: int = SETS, draws: int = DRAWS) -> Iterator[Coverage]:
    """Measure the coverage of the intervals of one model's metrics on ``sets`` sets of cases."""
    cases_of_classes = count_test_cases()[task]
    many = simulate_predictions(task, tuple(1000 * n for n in cases_of_classes), np.random.default_rng(1), 5)
    true_values = {
        name: float(value[0]) for name, value in compute_weighted_metrics(many, np.ones((1, len(many.truth)))).items()
    }
    intervals = [
        compute_metrics_with_intervals(
            simulate_predictions(task, cases_of_classes, np.random.default_rng([2, k])), draws, 0
        )[1]
        for k in range(sets)
    ]
    for metric in METRICS[task]:
        ends = np.array([of_set[metric] for of_set in intervals if metric in of_set])
        covered = (ends[:, 0] <= true_values[metric]) & (true_values[metric] <= ends[:, 1])
        width = float(np.median(ends[:, 1] - ends[:, 0]))
        yield Coverage(task, metric, true_values[metric], len(ends) / sets, float(covered.mean()), width)


def main() -> None:
    """Print the table."""
    print("| model | metric | true value | has an interval | which holds it | its median width |")
    print("|---|---|---|---|---|---|")
    for task in count_test_cases():
        for row in measure_coverage(task):
            figures = f"{row.true_value:.3f} | {row.given:.1%} | {row.covered:.1%} | {row.width:.2f}"
            print(f"| {task} | `{row.metric}` | {figures} |", flush=True)


if __name__ == "__main__":
    main()
