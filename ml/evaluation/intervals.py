"""95% intervals of metrics, by a bootstrap of patients.

Where every draw of patients gives the same value, such as a recall of 1 where both of two cases are correct,
percentiles would show a certainty that nobody has. A metric that is a share of cases then has the exact interval of a
binomial proportion (C. J. Clopper, E. S. Pearson, Biometrika 26(4), 1934). Any other metric then has no interval. A
note beside the intervals says which of the two applies.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ml.core.columns import read_texts
from ml.core.taxonomy import LABELS, SUBTYPES, label_of
from ml.evaluation.metrics import ImageWeights, compute_weighted_metrics
from ml.evaluation.scores import LabelledPredictions

_PERCENTILES = (2.5, 97.5)

_TOLERANCE = 1e-9

_CHUNK_BYTES = 64 * 2**20

NO_INTERVAL = "no interval: every draw of patients gives the same"
"""The note of a metric that has several cases and still no interval."""

Interval = tuple[float, float]


def bootstrap_weights(predictions: LabelledPredictions, draws: int, seed: int) -> Iterator[ImageWeights]:
    """Draw patients with replacement, and yield how often each image is in each draw.

    The resampling unit is the patient, not the image, since images of one patient look alike. Patients are drawn within
    three strata: benign, malignant and both. So no draw loses one of the two labels. Subtypes are no strata: most of
    them have a single test case, which would be in every draw, and the intervals would show a certainty that nobody
    has.
    B. Efron, R. Tibshirani, "An Introduction to the Bootstrap", 1993.

    Args:
        predictions: of n images.
        draws: number of draws.
        seed: of the random generator.

    Yields:
        (some draws, n), in chunks that together hold all draws.
    """
    rng = np.random.default_rng(seed)
    strata, patient_of_image, patients = _stratify_patients(predictions)
    chunk = max(1, _CHUNK_BYTES // (8 * max(1, len(predictions.truth))))
    for start in range(0, draws, chunk):
        counts = np.zeros((min(chunk, draws - start), len(patients)))
        for members in strata:
            p = np.full(len(members), 1 / len(members))
            counts[:, members] = rng.multinomial(len(members), p, size=len(counts))
        yield counts[:, patient_of_image]


def has_resampling_variance(predictions: LabelledPredictions) -> bool:
    """Returns whether draws of patients can differ, which takes a stratum with two patients."""
    return any(len(members) > 1 for members in _stratify_patients(predictions)[0])


def compute_metrics_with_intervals(
    predictions: LabelledPredictions, draws: int, seed: int
) -> tuple[dict[str, float], dict[str, Interval], dict[str, str]]:
    """Compute every metric with its 95% interval.

    Args:
        predictions: of one side.
        draws: of the bootstrap; 0 leaves intervals out.
        seed: of the draws.

    Returns:
        ``metrics``, ``intervals`` and ``interval_notes`` of :class:`ml.evaluation.evaluation.Evaluation`.
    """
    values = compute_weighted_metrics(predictions, np.ones((1, len(predictions.truth))))
    metrics = {name: float(value[0]) for name, value in values.items() if np.isfinite(value[0])}
    if not draws or not has_resampling_variance(predictions):
        return metrics, {}, {}
    chunks: dict[str, list[NDArray[np.float64]]] = {name: [] for name in metrics}
    for weights in bootstrap_weights(predictions, draws, seed):
        values = compute_weighted_metrics(predictions, weights)
        for name, parts in chunks.items():
            parts.append(values[name])
    case_counts = _count_cases_of_shares(predictions)
    results = {
        name: confidence_interval(np.concatenate(parts), case_counts.get(name)) for name, parts in chunks.items()
    }
    return (
        metrics,
        {name: ends for name, (ends, _) in results.items() if ends},
        {name: note for name, (_, note) in results.items() if note},
    )


def _count_cases_of_shares(predictions: LabelledPredictions) -> dict[str, int]:
    """Returns the number of cases behind each metric that is 1 if all of them are correct, and 0 if none is."""
    truth = predictions.cases.truth
    case_counts = dict.fromkeys(("accuracy", "micro_f1"), len(truth))
    if predictions.task == "binary":
        case_counts |= {"recall": int((truth == 1).sum()), "specificity": int((truth == 0).sum())}
    case_counts |= {f"patient_{name}": n for name, n in case_counts.items()}
    return {**case_counts, "patient_recognition_rate": len(truth)}


def confidence_interval(values: NDArray[np.float64], cases: int | None = None) -> tuple[Interval | None, str]:
    """Compute the 95% interval of a metric from its values under draws of patients.

    Args:
        values: (draws,) values of the metric; NaN where it could not be computed.
        cases: number of cases, for a metric that is 1 if all of them are correct and 0 if none is; None for any other
            metric.

    Returns:
        The interval and a note. Where draws differ, the interval is their percentiles and the note is empty. Where all
        draws are the same 0 or 1 and there are two or more ``cases``, it is the exact interval of none or all of them.
        Otherwise there is no interval. The last two have a note, unless no value is finite.
    """
    from scipy.stats import binomtest

    finite = values[np.isfinite(values)]
    if not len(finite):
        return None, ""
    if np.ptp(finite) > _TOLERANCE:
        low, high = np.percentile(finite, _PERCENTILES)
        return (float(low), float(high)), ""
    share = float(finite[0])
    if cases is None or cases < 2 or min(share, 1 - share) > _TOLERANCE:
        return None, NO_INTERVAL
    correct = cases if share > 0.5 else 0
    exact = binomtest(correct, cases).proportion_ci(0.95, method="exact")
    return (float(exact.low), float(exact.high)), f"exact interval of {correct} of {cases} cases"


def _stratify_patients(
    predictions: LabelledPredictions,
) -> tuple[list[NDArray[np.int64]], NDArray[np.int64], NDArray[np.str_]]:
    """Group patients by whether they have benign images, malignant images or both.

    Returns:
        The patients of each stratum as indices into the names, the index of each image's patient (n,), and the names.
    """
    patients, patient_of_image = np.unique(read_texts(predictions.rows, "patient"), return_inverse=True)
    malignant = predictions.truth
    if predictions.task == "subtype":
        malignant = np.array([LABELS.index(label_of(name)) for name in SUBTYPES])[predictions.truth]
    has_label = np.zeros((len(patients), len(LABELS)), dtype=np.int64)
    has_label[patient_of_image, malignant] = 1
    _, stratum = np.unique(has_label, axis=0, return_inverse=True)
    stratum = stratum.reshape(-1)
    strata = [np.flatnonzero(stratum == k) for k in range(stratum.max() + 1)] if len(patients) else []
    return strata, patient_of_image, patients
