"""How often a 95% interval holds the true value, at the case counts of BreakHis' own ledger: a simulation.

``python -m tests.evaluation.coverage`` prints the table of docs/training-and-promotion.md, in some minutes. Cases are
drawn at the counts of the test side; a case's images share an effect of the case, which is half of the variance within
a class. The true value is that of very many cases in the same shares of classes.
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


class Covered(NamedTuple):
    """What became of one metric's intervals."""

    task: Task
    metric: str
    true: float
    given: float
    """Share of the sets in which there was an interval."""
    held: float
    """Share of those intervals that held the true value."""
    width: float
    """Their median width."""


def made(
    task: Task, of_classes: tuple[int, ...], rng: np.random.Generator, images: int | None = None
) -> LabelledPredictions:
    """What a model says of cases of classes, of so many images each or of 5 to 40."""
    of_case = np.repeat(np.arange(len(of_classes)), of_classes)
    sizes = rng.integers(5, 41, len(of_case)) if images is None else np.full(len(of_case), images)
    case = np.repeat(np.arange(len(of_case)), sizes)
    truth, wide = of_case[case], 1 if task == "binary" else len(of_classes)
    z = rng.normal(size=(len(of_case), wide))[case] + rng.normal(size=(len(case), wide))
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
def on_test() -> dict[Task, tuple[int, ...]]:
    """Cases by class on the test side."""
    with tempfile.TemporaryDirectory() as scratch:
        found = counts(Store(Path(scratch).as_uri()))["on test"]
    return {"binary": binary(found), "subtype": tuple(found[s] for s in SUBTYPES)}


def coverage(task: Task, sets: int = SETS, draws: int = DRAWS) -> Iterator[Covered]:
    """The intervals of one model's metrics on ``sets`` sets of cases."""
    of_classes = on_test()[task]
    many = made(task, tuple(1000 * n for n in of_classes), np.random.default_rng(1), 5)
    true = {
        name: float(value[0]) for name, value in compute_weighted_metrics(many, np.ones((1, len(many.truth)))).items()
    }
    found = [
        compute_metrics_with_intervals(made(task, of_classes, np.random.default_rng([2, k])), draws, 0)[1]
        for k in range(sets)
    ]
    for metric in METRICS[task]:
        ends = np.array([one[metric] for one in found if metric in one])
        held = (ends[:, 0] <= true[metric]) & (true[metric] <= ends[:, 1])
        width = float(np.median(ends[:, 1] - ends[:, 0]))
        yield Covered(task, metric, true[metric], len(ends) / sets, float(held.mean()), width)


def main() -> None:
    """Print the table."""
    print("| model | metric | true value | has an interval | which holds it | its median width |")
    print("|---|---|---|---|---|---|")
    for task in on_test():
        for one in coverage(task):
            told = f"{one.true:.3f} | {one.given:.1%} | {one.held:.1%} | {one.width:.2f}"
            print(f"| {task} | `{one.metric}` | {told} |", flush=True)


if __name__ == "__main__":
    main()
