"""95% intervals of metrics, by resampling patients.

Where every draw of patients gives the same, such as a recall of 1 where all of two cases are right, percentiles would
speak of a certainty that nobody has. A share of cases then has the exact interval of so many cases (C. J. Clopper,
E. S. Pearson, Biometrika 26(4), 1934), and any other metric has none; which of the two is told beside the intervals.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ml.core.taxonomy import LABELS, SUBTYPES, label_of
from ml.evaluation.metrics import ImageWeights, compute_weighted_metrics
from ml.evaluation.scores import LabelledPredictions

_LEVEL = (2.5, 97.5)

_SAME = 1e-9

_CHUNK_BYTES = 64 * 2**20

NO_INTERVAL = "no interval: every draw of patients gives the same"
"""The note of a metric of which nothing can be said, though there are several cases."""

Interval = tuple[float, float]


def bootstrap_weights(scores: LabelledPredictions, draws: int, seed: int) -> Iterator[ImageWeights]:
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


def has_resampling_variance(scores: LabelledPredictions) -> bool:
    """Whether a draw of patients can be any other than the patients themselves."""
    return any(len(members) > 1 for members in _strata(scores)[0])


def compute_metrics_with_intervals(
    scores: LabelledPredictions, draws: int, seed: int
) -> tuple[dict[str, float], dict[str, Interval], dict[str, str]]:
    """Every metric, its 95% interval if it has one, and what has to be said of intervals; see :class:`Evaluation`.

    Args:
        scores: what the model said.
        draws: of the patient bootstrap; 0: no intervals.
        seed: of the draws.
    """
    point = compute_weighted_metrics(scores, np.ones((1, len(scores.truth))))
    metrics = {name: float(value[0]) for name, value in point.items() if np.isfinite(value[0])}
    if not draws or not has_resampling_variance(scores):
        return metrics, {}, {}
    drawn: dict[str, list[NDArray[np.float64]]] = {name: [] for name in metrics}
    for weights in bootstrap_weights(scores, draws, seed):
        values = compute_weighted_metrics(scores, weights)
        for name, parts in drawn.items():
            parts.append(values[name])
    cases = _cases_of(scores)
    found = {name: confidence_interval(np.concatenate(parts), cases.get(name)) for name, parts in drawn.items()}
    return (
        metrics,
        {name: ends for name, (ends, _) in found.items() if ends},
        {name: note for name, (_, note) in found.items() if note},
    )


def _cases_of(scores: LabelledPredictions) -> dict[str, int]:
    """Of how many cases each metric is a share: those for which it is 1 if all of them are right, and 0 if none is."""
    truth = scores.cases.truth
    shares = dict.fromkeys(("accuracy", "micro_f1"), len(truth))
    if scores.task == "binary":
        shares |= {"recall": int((truth == 1).sum()), "specificity": int((truth == 0).sum())}
    shares |= {f"patient_{name}": n for name, n in shares.items()}
    return {**shares, "patient_recognition_rate": len(truth)}


def confidence_interval(values: NDArray[np.float64], cases: int | None = None) -> tuple[Interval | None, str]:
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
        return None, NO_INTERVAL
    right = cases if share > 0.5 else 0
    exact = binomtest(right, cases).proportion_ci(0.95, method="exact")
    return (float(exact.low), float(exact.high)), f"exact interval of {right} of {cases} cases"


def _strata(scores: LabelledPredictions) -> tuple[list[NDArray[np.int64]], NDArray[np.int64], NDArray[np.str_]]:
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
