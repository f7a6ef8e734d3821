"""Critical value, size and power of the comparison with the champion, by simulation at given numbers of cases.

With as few cases as there are here, the textbook's critical value 1.645 passes too many candidates. So the critical
value is simulated at the very numbers of cases of each class. With it, a candidate that is worse by the margin passes
in at most 5% of data sets. How often a candidate as good as the champion passes is simulated as well: that is the
comparison's power.

S. Wellek, "Testing Statistical Hypotheses of Equivalence and Noninferiority", 2010.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ml.core.store import Json
from ml.core.taxonomy import LABELS, SUBTYPES, Task, label_of
from ml.evaluation.paired_metrics import Numbers, compute_macro_f1, compute_roc_auc, count_confusions
from ml.evaluation.scores import ClassNumbers

FloatNumbers = NDArray[np.float32]

SIGNIFICANCE_LEVEL = 0.05
"""How often a candidate that is worse by the margin may pass."""

_NORMAL_CRITICAL_VALUE = 1.6448536269514722
"""The critical value with infinitely many cases: the 95% quantile of the normal distribution. Fewer cases need more."""

_SIMULATED = 2000  # data sets in each scenario

_DRAWS_SIMULATED = 200  # draws of cases in each data set

_IMAGES = 4  # of a simulated case; the variance between cases matters, not the number of images of each

_CHUNK = 100  # data sets that are simulated at a time

_CASE_SHARES = (0.2, 0.5, 0.8)  # share of the variance of a model's scores that lies between cases

_CORRELATIONS = (0.3, 0.6, 0.9)  # between the scores of the two models

_LEVELS = tuple(round(0.05 * k, 2) for k in range(4, 20))  # the champion's metric is rounded to one of these

_VERSION = 2  # of the simulation; another version does not use the results of this one


class Memos(Protocol):
    """Keeps results of the simulation; a store does."""

    def memo(self, name: str, inputs: object) -> Json | None:
        """Returns the kept result of these inputs, or None."""

    def set_memo(self, name: str, inputs: object, result: Json) -> None:
        """Keep the result of these inputs."""


@dataclass(frozen=True)
class CriticalValue:
    """The critical value of a comparison at given numbers of cases, with its size and power.

    Attributes:
        value: the critical value, which is the largest that any scenario needs.
        size: share of fresh data sets in which a candidate that is worse by the margin passes, in the scenario that
            needs the largest critical value.
        standard_errors: of each scenario, the median standard error of the difference for a candidate as good as the
            champion.
        powers: of each scenario, the share of data sets in which a candidate as good as the champion passes.
    """

    value: float
    size: float
    standard_errors: tuple[float, ...]
    powers: tuple[float, ...]

    def power(self, error: float) -> float:
        """Returns the power at a standard error, interpolated between the two scenarios with the nearest ones."""
        order = np.argsort(self.standard_errors)
        return float(np.interp(error, np.array(self.standard_errors)[order], np.array(self.powers)[order]))


def find_critical_value(
    task: Task, metric: str, counts: tuple[int, ...], level: float, margin: float, memos: Memos
) -> CriticalValue:
    """Find the critical value of a comparison, with its size and power. It is simulated once and kept.

    Args:
        task: the task, which names the classes.
        metric: macro_f1, or the area under the ROC curve.
        counts: number of cases of each class.
        level: the champion's metric; the simulation rounds it to steps of 0.05.
        margin: the non-inferiority margin.
        memos: keep the result. A kept result that the simulation cannot have given is simulated again.
    """
    lowest = SimulationScenario(task, metric, counts, 0.5, 0.5).chance_level + margin
    rounded = min((step for step in _LEVELS if step >= lowest), key=lambda step: abs(step - level), default=_LEVELS[-1])
    inputs = [_VERSION, task, metric, list(counts), rounded, margin, _SIMULATED, _DRAWS_SIMULATED, _IMAGES]
    kept = memos.memo("critical", inputs)
    if not kept or not _is_possible_result(kept):
        simulated = simulate_critical_value(task, metric, counts, rounded, margin)
        memos.set_memo("critical", inputs, simulated)
        kept = memos.memo("critical", inputs) or simulated
    return CriticalValue(kept["value"], kept["size"], tuple(kept["errors"]), tuple(kept["powers"]))


def have_equal_results(one: Json, other: Json) -> bool:
    """Returns whether two simulations gave the same results, up to numerical differences between machines."""
    if not (_is_possible_result(one) and _is_possible_result(other)):
        return False
    a, b = ([result["value"], result["size"], *result["errors"], *result["powers"]] for result in (one, other))
    return bool(np.allclose(a, b, rtol=1e-3, atol=2e-3, equal_nan=True))


def _is_possible_result(result: Json) -> bool:
    """Returns whether the simulation can have given a result that was kept."""
    scenarios = len(_CASE_SHARES) * len(_CORRELATIONS)
    lists = [result.get("errors"), result.get("powers")]
    if not all(isinstance(values, list) and len(values) == scenarios for values in lists):
        return False
    numbers = [result.get("value"), result.get("size"), *lists[0], *lists[1]]  # type: ignore[misc]
    return all(isinstance(number, int | float) for number in numbers) and numbers[0] >= _NORMAL_CRITICAL_VALUE


def simulate_critical_value(task: Task, metric: str, counts: tuple[int, ...], level: float, margin: float) -> Json:
    """Simulate the critical value in all scenarios, and its size and power in fresh data sets.

    A scenario is a share of the variance that lies between cases, and a correlation between the two models.

    Args:
        task: the task, which names the classes.
        metric: macro_f1, or the area under the ROC curve.
        counts: number of cases of each class.
        level: the champion's metric.
        margin: the non-inferiority margin.

    Returns:
        ``{value, size, errors, powers}``, as :class:`CriticalValue` has them; ``errors`` are its standard errors.
    """
    scenarios = [
        SimulationScenario(task, metric, counts, case_share, correlation)
        for case_share in _CASE_SHARES
        for correlation in _CORRELATIONS
    ]
    worse, same = (scenarios[0].find_signals(level, level - loss) for loss in (margin, 0.0))
    needed, errors, powers = [], [], []
    for seed, scenario in enumerate(scenarios):
        difference, error = scenario.simulate_differences(*worse, _SIMULATED, seed)
        with np.errstate(divide="ignore", invalid="ignore"):  # where both models predict the same, the error is 0
            needed.append(float(np.quantile(np.nan_to_num((difference + margin) / error), 1 - SIGNIFICANCE_LEVEL)))
    value = max(_NORMAL_CRITICAL_VALUE, *needed)
    worst = int(np.argmax(needed))
    differences, standard_errors = scenarios[worst].simulate_differences(*worse, _SIMULATED, 100 + worst)
    size = float(is_non_inferior(differences, standard_errors, value, margin).mean())
    for seed, scenario in enumerate(scenarios):
        difference, error = scenario.simulate_differences(*same, _SIMULATED, 200 + seed)
        powers.append(float(is_non_inferior(difference, error, value, margin).mean()))
        errors.append(float(np.median(error)))  # a candidate that is worse has a larger standard error
    return {"value": value, "size": size, "errors": errors, "powers": powers}


def is_non_inferior(difference: Numbers, error: Numbers, value: float, margin: float) -> NDArray[np.bool_]:
    """Returns whether the lower end of each difference is above ``-margin``.

    Args:
        difference: (sets,) metric of the candidate less that of the champion.
        error: (sets,) standard errors of the differences.
        value: the critical value.
        margin: the non-inferiority margin.
    """
    return difference - value * error > -margin


@dataclass(frozen=True)
class SimulationScenario:
    """A model of how scores arise: ``signal * class + case + image``, where the last two terms are normal.

    Attributes:
        task: the task, which names the classes.
        metric: the metric that is compared.
        counts: number of cases of each class.
        case_share: share of the variance that the images of a case have in common.
        correlation: between the two models, of both normal terms: what is hard for one model is hard for the other.
    """

    task: Task
    metric: str
    counts: tuple[int, ...]
    case_share: float
    correlation: float

    @cached_property
    def truth(self) -> ClassNumbers:
        """(cases,) true class numbers."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    @cached_property
    def chance_level(self) -> float:
        """The metric of a model that guesses."""
        return self._macro_f1_at(0.0) if self.metric == "macro_f1" else 0.5

    def find_signals(self, champion: float, candidate: float) -> tuple[float, float]:
        """Returns the signals (champion, candidate) that give these values of the metric in an infinite data set."""
        return self._find_signal(champion), self._find_signal(candidate)

    def simulate_differences(self, champion: float, candidate: float, sets: int, seed: int) -> tuple[Numbers, Numbers]:
        """Simulate data sets of these cases, and compare the two models in each.

        Args:
            champion: its signal.
            candidate: its signal.
            sets: number of data sets.
            seed: of the random generator.

        Returns:
            The differences of the metric and their standard errors, (sets,) each.
        """
        rng, truth = np.random.default_rng(seed), self.truth
        weights = _draw_case_weights(self.task, truth, np.random.default_rng(seed + 1))
        weights = np.concatenate([np.ones((1, len(truth))), weights])
        chunks = []
        for start in range(0, sets, _CHUNK):
            n = min(_CHUNK, sets - start)
            case_terms = self._draw_correlated_terms(rng, (n, len(truth), 1, self._columns))
            image_terms = self._draw_correlated_terms(rng, (n, len(truth), _IMAGES, self._columns))
            case_scale, image_scale = np.float32(self.case_share**0.5), np.float32((1 - self.case_share) ** 0.5)
            noises = [case_scale * a + image_scale * b for a, b in zip(case_terms, image_terms, strict=True)]
            champion_values, candidate_values = (
                self._compute_metric(noise, signal, weights)
                for noise, signal in zip(noises, (champion, candidate), strict=True)
            )
            chunks.append(candidate_values - champion_values)
        differences = np.concatenate(chunks)
        return differences[:, 0], np.nanstd(differences[:, 1:], axis=1, ddof=1)

    @property
    def _columns(self) -> int:
        """Number of scores of an image."""
        return 1 if self.metric != "macro_f1" and self.task == "binary" else len(self.counts)

    def _draw_correlated_terms(
        self, rng: np.random.Generator, shape: tuple[int, ...]
    ) -> tuple[FloatNumbers, FloatNumbers]:
        """Draw one normal term of both models' scores, with the correlation between them."""
        common, own, other = (rng.standard_normal(shape, np.float32) for _ in range(3))
        a, b = np.float32(self.correlation**0.5), np.float32((1 - self.correlation) ** 0.5)
        return a * common + b * own, a * common + b * other

    def _compute_metric(self, noise: FloatNumbers, signal: float, weights: Numbers) -> Numbers:
        """Compute the metric of one model in each data set, under each row of weights: (sets, weights)."""
        truth, n = self.truth, len(self.counts)
        scores = noise + (signal * self._encode_classes(truth)[:, None, :]).astype(np.float32)
        if self.metric == "macro_f1":
            cell_of_image = truth[:, None] * n + scores.argmax(-1)
            confusions = np.stack([(cell_of_image == cell).sum(-1) for cell in range(n * n)], axis=-1)
            return compute_macro_f1(confusions.astype(float), weights)
        wins = []
        for k in (1,) if self.task == "binary" else range(n):
            column = scores[..., 0 if self.task == "binary" else k]
            of_class, of_others = column[:, truth == k], column[:, truth != k]
            is_above = of_class[:, :, :, None, None] > of_others[:, None, None, :, :]
            wins.append(is_above.sum(axis=(2, 4), dtype=float))
        return compute_roc_auc(wins, truth, np.full(len(truth), float(_IMAGES)), weights)

    def _encode_classes(self, truth: ClassNumbers) -> Numbers:
        """Returns the part of the class in the scores: (cases, columns), one-hot if there are several columns."""
        return truth[:, None].astype(float) if self._columns == 1 else np.eye(len(self.counts))[truth]

    def _find_signal(self, level: float) -> float:
        """Returns the signal that gives a value of the metric; for macro-F1 by bisection."""
        if self.metric != "macro_f1":  # the area under the ROC curve of two normal distributions of variance 1
            from scipy.stats import norm

            return float(np.sqrt(2) * norm.ppf(level))
        low, high = 0.0, 12.0
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if self._macro_f1_at(middle) < level else (low, middle)
        return (low + high) / 2

    def _macro_f1_at(self, signal: float) -> float:
        """Returns macro-F1 in a data set of many images."""
        rng = np.random.default_rng(0)
        truth = rng.choice(self.truth, 20_000)
        scores = rng.normal(size=(len(truth), self._columns)) + signal * self._encode_classes(truth)
        confusions = count_confusions(np.zeros_like(truth), truth, scores.argmax(-1), len(self.counts))
        return float(compute_macro_f1(confusions, np.ones((1, 1)))[0, 0])


def _draw_case_weights(task: Task, truth: ClassNumbers, rng: np.random.Generator) -> Numbers:
    """Returns how often each case is in each draw, (draws, cases).

    Cases are drawn within benign and malignant, as in a real comparison.
    """
    malignant = truth if task == "binary" else np.array([LABELS.index(label_of(name)) for name in SUBTYPES])[truth]
    weights = np.zeros((_DRAWS_SIMULATED, len(truth)))
    for label in np.unique(malignant):
        members = np.flatnonzero(malignant == label)
        weights[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), _DRAWS_SIMULATED)
    return weights
