"""Comparison of a version with the champion: is it worse by more than a margin? Paired by case.

Both models are scored on the same images. Patients are drawn, not images, and both models get the same draws, which
gives the standard error of the difference. The lower end of the difference is ``difference - critical * error``, and a
version passes where that end is above ``-margin``. With as few cases as there are here, the textbook's critical value
1.645 passes too many: it is found by simulation at the very numbers of cases of each class, so that a version that is
worse by the margin passes in at most 5% of draws. What a version as good as the champion would do is simulated as well:
that is the comparison's power.

S. Wellek, "Testing Statistical Hypotheses of Equivalence and Noninferiority", 2010; N. A. Obuchowski, "Nonparametric
analysis of clustered ROC curve data", Biometrics 53(2), 1997, for the areas as sums over pairs of cases.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ml.core.store import Json
from ml.core.taxonomy import LABELS, Task, class_names, label_of
from ml.evaluation.comparison_simulation import Memos, find_critical_value
from ml.evaluation.decision_rule import DecisionRule
from ml.evaluation.intervals import bootstrap_weights
from ml.evaluation.metric_names import GATED_METRICS
from ml.evaluation.paired_metrics import area_of, confusions, f1_of, pairs
from ml.evaluation.scores import ClassNumbers, LabelledPredictions, Probabilities

if TYPE_CHECKING:
    import pandas as pd


_DRAWS = 2000  # of patients, for the standard error of a real comparison


class PairedPredictions(NamedTuple):
    """What two models said of the same images of one side.

    ``rows`` has the column patient; ``candidate`` and ``champion`` are probabilities, (n,) of malignant or (n, 8), and
    the ``called`` are (n,) class numbers.
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
    """Compare on one side, in AUC and in macro-F1.

    Args:
        where: the side, as people call it.
        both: predictions of candidate and champion on the same images.
        memos: keep the simulation's results.
        margin: the non-inferiority margin.
        least_power: a comparison with less power is not estimable.

    Returns:
        For each ``{metric, where, images, cases, candidate, champion, difference, error, critical, low, size, power,
        estimable, reason}``; figures that could not be had are None.
    """
    rule_of_units = (
        DecisionRule(threshold=0.5) if both.task == "binary" else DecisionRule()
    )  # any: of units only cases are needed
    scores = LabelledPredictions(both.task, both.rows, both.truth, both.candidate_probabilities, rule_of_units)
    units = scores.cases
    n = len(class_names(both.task))
    counts = tuple(int((units.truth == k).sum()) for k in range(n))
    ones, draws = np.ones((1, len(units.truth))), None
    told = []
    for metric in GATED_METRICS[both.task]:
        one: Json = {
            "metric": metric,
            "where": where,
            "images": len(both.truth),
            "cases": int(both.rows["patient"].nunique()),
            **dict.fromkeys(("candidate", "champion", "difference", "error", "critical", "low", "size", "power")),
            "estimable": False,
            "reason": _too_few(both.task, counts),
        }
        told.append(one)
        if one["reason"]:
            continue
        if draws is None:
            draws = np.concatenate([w[:, units.first_rows] for w in bootstrap_weights(scores, _DRAWS, 0)])
        if metric == "macro_f1":
            called = (both.candidate_predicted, both.champion_predicted)
            sums = [confusions(units.case_of_row, both.truth, one_called, n) for one_called in called]
            (new, old), drawn = ([f1_of(one_sum, w)[0] for one_sum in sums] for w in (ones, draws))
        else:
            areas = [
                pairs(units.case_of_row, both.truth, p)
                for p in (both.candidate_probabilities, both.champion_probabilities)
            ]
            (new, old), drawn = (
                [area_of(one_area, units.truth, units.image_counts, w)[0] for one_area in areas] for w in (ones, draws)
            )
        spread = float(np.nanstd(drawn[0] - drawn[1], ddof=1))
        new, old = new[0], old[0]
        found = find_critical_value(both.task, metric, counts, float(old), margin, memos)
        # With few cases no critical value may hold; a difference of two shares is never below -1, whatever was drawn.
        low, power = max(float(new - old - found.value * spread), -1.0), found.power(spread)
        one |= {
            "candidate": float(new),
            "champion": float(old),
            "difference": float(new - old),
            "error": spread,
            "critical": found.value,
            "low": low,
            "size": found.size,
            "power": power,
        }
        if power < least_power:
            one["reason"] = (
                f"with {one['cases']} cases a version as good as the champion would pass in only {power:.0%} of draws "
                f"(the policy asks for {least_power:.0%}); found {new - old:+.4f}, at least {low:+.4f}"
            )
        one["estimable"] = not one["reason"]
    return told


def _too_few(task: Task, counts: Sequence[int]) -> str:
    """Why these numbers of cases allow no comparison, or nothing."""
    names = class_names(task)
    sides = dict(zip(names, counts, strict=True))
    if task == "subtype":
        sides = {label: sum(n for s, n in zip(names, counts, strict=True) if label_of(s) == label) for label in LABELS}
    few = [f"{name} {n}" for name, n in sides.items() if n < 2]
    return f"two cases each are the least, but there are: {', '.join(few)}" if few else ""


# --- metrics under draws of patients ----------------------------------------------------------------------------------


# --- the simulation ---------------------------------------------------------------------------------------------------
