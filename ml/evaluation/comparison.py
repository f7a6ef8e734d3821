"""Non-inferiority comparison of a candidate with the champion, paired by case.

The question is whether the candidate is worse than the champion by more than a margin. Both models are scored on the
same images. The resampling unit is the patient, not the image, and both models get the same draws. The draws give the
standard error of the difference. The lower end of the difference is ``difference - critical * error``, and a candidate
passes where that end is above ``-margin``.

With as few cases as there are here, the textbook's critical value 1.645 passes too many candidates. So the critical
value is simulated, by :mod:`ml.evaluation.comparison_simulation`. The simulation also gives the comparison's power,
which is how often a candidate as good as the champion passes.

S. Wellek, "Testing Statistical Hypotheses of Equivalence and Noninferiority", 2010; N. A. Obuchowski, "Nonparametric
analysis of clustered ROC curve data", Biometrics 53(2), 1997, for the areas as sums over pairs of cases.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ml.core.store import Json
from ml.core.taxonomy import LABELS, Task, class_names, label_of
from ml.evaluation.comparison_simulation import Memos, find_critical_value
from ml.evaluation.decision_rule import DecisionRule
from ml.evaluation.intervals import bootstrap_weights
from ml.evaluation.metric_names import GATED_METRICS
from ml.evaluation.paired_metrics import (
    Numbers,
    compute_macro_f1,
    compute_roc_auc,
    count_confusions,
    count_pair_wins,
)
from ml.evaluation.scores import Cases, ClassNumbers, LabelledPredictions, Probabilities

if TYPE_CHECKING:
    import pandas as pd

_DRAWS = 2000  # of patients, for the standard error of the difference


class PairedPredictions(NamedTuple):
    """Predictions of two models of the same images of one side.

    Attributes:
        task: the task, which names the classes.
        rows: (n) rows of a dataset, with the column patient.
        truth: (n,) true class numbers.
        candidate_probabilities: (n,) of malignant, or (n, 8).
        champion_probabilities: likewise.
        candidate_predicted: (n,) predicted class numbers.
        champion_predicted: likewise.
    """

    task: Task
    rows: "pd.DataFrame"
    truth: ClassNumbers
    candidate_probabilities: Probabilities
    champion_probabilities: Probabilities
    candidate_predicted: ClassNumbers
    champion_predicted: ClassNumbers


def compare_models(
    where: str, both: PairedPredictions, memos: Memos, *, margin: float, least_power: float
) -> list[Json]:
    """Compare candidate and champion on one side, in ROC AUC and in macro-F1.

    Args:
        where: name of the side in tables.
        both: predictions of candidate and champion on the same images.
        memos: keep the simulation's results.
        margin: the non-inferiority margin.
        least_power: a comparison with less power is not estimable.

    Returns:
        For each metric ``{metric, where, images, cases, candidate, champion, difference, error, critical, low, size,
        power, estimable, reason}``. Figures that could not be computed are None.
    """
    any_rule = DecisionRule(threshold=0.5) if both.task == "binary" else DecisionRule()  # cases do not depend on it
    predictions = LabelledPredictions(both.task, both.rows, both.truth, both.candidate_probabilities, any_rule)
    cases = predictions.cases
    lacking = _explain_too_few_cases(both.task, _count_cases(both.task, cases))
    draws: Numbers | None = None
    if not lacking:
        chunks = [weights[:, cases.first_rows] for weights in bootstrap_weights(predictions, _DRAWS, 0)]
        draws = np.concatenate(chunks)
    results = []
    for metric in GATED_METRICS[both.task]:
        result: Json = {
            "metric": metric,
            "where": where,
            "images": len(both.truth),
            "cases": int(both.rows["patient"].nunique()),
            **dict.fromkeys(("candidate", "champion", "difference", "error", "critical", "low", "size", "power")),
            "estimable": False,
            "reason": lacking,
        }
        results.append(result)
        if draws is None:
            continue
        result |= _estimate_difference(metric, both, cases, draws, margin, memos)
        if result["power"] < least_power:
            result["reason"] = (
                f"with {result['cases']} cases a version as good as the champion would pass in only "
                f"{result['power']:.0%} of draws (the policy asks for {least_power:.0%}); found "
                f"{result['difference']:+.4f}, at least {result['low']:+.4f}"
            )
        result["estimable"] = not result["reason"]
    return results


def _estimate_difference(
    metric: str, both: PairedPredictions, cases: Cases, draws: Numbers, margin: float, memos: Memos
) -> Json:
    """Returns ``{candidate, champion, difference, error, critical, low, size, power}`` under draws (draws, cases)."""
    compute = _prepare_metric(metric, both, cases)
    candidate, champion = (values[0] for values in compute(np.ones((1, len(cases.truth)))))
    error = _standard_error(*compute(draws))
    critical = find_critical_value(both.task, metric, _count_cases(both.task, cases), float(champion), margin, memos)
    return {
        "candidate": float(candidate),
        "champion": float(champion),
        "difference": float(candidate - champion),
        "error": error,
        "critical": critical.value,
        # With few cases no critical value may hold, but a difference of two shares is never below -1.
        "low": max(float(candidate - champion - critical.value * error), -1.0),
        "size": critical.size,
        "power": critical.power(error),
    }


def _count_cases(task: Task, cases: Cases) -> tuple[int, ...]:
    """Returns the number of cases of each class."""
    return tuple(int((cases.truth == k).sum()) for k in range(len(class_names(task))))


def _prepare_metric(metric: str, both: PairedPredictions, cases: Cases) -> Callable[[Numbers], tuple[Numbers, Numbers]]:
    """Returns a function: weights (draws, cases) -> the metric of candidate and champion, (draws,) each."""
    if metric == "macro_f1":
        n = len(class_names(both.task))
        candidate_counts, champion_counts = (
            count_confusions(cases.case_of_row, both.truth, predicted, n)
            for predicted in (both.candidate_predicted, both.champion_predicted)
        )
        return lambda weights: (
            compute_macro_f1(candidate_counts, weights)[0],
            compute_macro_f1(champion_counts, weights)[0],
        )
    candidate_wins, champion_wins = (
        count_pair_wins(cases.case_of_row, both.truth, probabilities)
        for probabilities in (both.candidate_probabilities, both.champion_probabilities)
    )
    return lambda weights: (
        compute_roc_auc(candidate_wins, cases.truth, cases.image_counts, weights)[0],
        compute_roc_auc(champion_wins, cases.truth, cases.image_counts, weights)[0],
    )


def _standard_error(candidate: Numbers, champion: Numbers) -> float:
    """Returns the standard error of the difference of a metric, from its values under draws of patients."""
    return float(np.nanstd(candidate - champion, ddof=1))


def _explain_too_few_cases(task: Task, counts: Sequence[int]) -> str:
    """Returns why these numbers of cases of each class allow no comparison, or an empty string."""
    names = class_names(task)
    cases_of_labels = dict(zip(names, counts, strict=True))
    if task == "subtype":
        cases_of_labels = {
            label: sum(n for s, n in zip(names, counts, strict=True) if label_of(s) == label) for label in LABELS
        }
    few = [f"{name} {n}" for name, n in cases_of_labels.items() if n < 2]
    return f"two cases each are the least, but there are: {', '.join(few)}" if few else ""
