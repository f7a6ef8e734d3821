"""The critical value, the size and the power of a comparison, by simulation at given numbers of cases.

With as few cases as there are here, the textbook's critical value 1.645 passes too many versions. So it is found by
simulation at the very numbers of cases of each class: a version that is worse by the margin passes in at most 5% of
draws. What a version as good as the champion would do is simulated as well: that is the comparison's power.

S. Wellek, "Testing Statistical Hypotheses of Equivalence and Noninferiority", 2010.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ml.core.store import Json
from ml.core.taxonomy import LABELS, SUBTYPES, Task, label_of
from ml.evaluation.paired_metrics import Numbers, area_of, confusions, f1_of
from ml.evaluation.scores import ClassNumbers

Singles = NDArray[np.float32]

SIGNIFICANCE_LEVEL = 0.05
"""How often a version that is worse by the margin may pass."""

LEAST = 1.6448536269514722
"""The critical value of endlessly many cases, the normal distribution's 95% quantile. With fewer it is larger."""

_SIMULATED = 2000  # data sets a world

_DRAWS_SIMULATED = 200  # of patients, in each of them

_IMAGES = 4  # of a simulated case: what is between the cases matters, not how often each was photographed

_CHUNK = 100

_CASE_SHARES = (0.2, 0.5, 0.8)  # of the variance of a model's scores that lies between cases

_CORRELATIONS = (0.3, 0.6, 0.9)  # between the scores of the two models

_LEVELS = tuple(round(0.05 * k, 2) for k in range(4, 20))  # what the champion's metric is rounded to

_VERSION = 2  # of the simulation; another one finds its own critical values


class Memos(Protocol):
    """Where results of the simulation are kept, such as a store."""

    def memo(self, name: str, inputs: object) -> Json | None:
        """What was kept, or None."""

    def set_memo(self, name: str, inputs: object, result: Json) -> None:
        """Keep it."""


@dataclass(frozen=True)
class CriticalValue:
    """What simulation says of a comparison at given numbers of cases.

    Attributes:
        value: the critical value, the largest that any of the simulated worlds needs.
        size: share of fresh data sets in which a version worse by the margin passes, in the worst of the worlds.
        standard_errors: median standard error of the difference in each world, for a version as good as the champion.
        powers: share of data sets in which a version as good as the champion passes, in each world.
    """

    value: float
    size: float
    standard_errors: tuple[float, ...]
    powers: tuple[float, ...]

    def power(self, error: float) -> float:
        """The power where the standard error is the one that was found: between the two worlds that are nearest."""
        ordered = np.argsort(self.standard_errors)
        return float(np.interp(error, np.array(self.standard_errors)[ordered], np.array(self.powers)[ordered]))


def find_critical_value(
    task: Task, metric: str, counts: tuple[int, ...], level: float, margin: float, memos: Memos
) -> CriticalValue:
    """The critical value of a comparison, its size and its power; simulated once and kept.

    Args:
        task: whose classes.
        metric: macro_f1, or the area under the ROC curve.
        counts: cases of each class.
        level: the champion's metric, of which the steps of 0.05 are told apart.
        margin: of the comparison.
        memos: where it is kept. What cannot have come of the simulation is simulated anew.
    """
    least = SimulationScenario(task, metric, counts, 0.5, 0.5).chance_level + margin
    near = min((one for one in _LEVELS if one >= least), key=lambda one: abs(one - level), default=_LEVELS[-1])
    inputs = [_VERSION, task, metric, list(counts), near, margin, _SIMULATED, _DRAWS_SIMULATED, _IMAGES]
    known = memos.memo("critical", inputs)
    if not known or not _is_possible(known):
        made = simulate_critical_value(task, metric, counts, near, margin)
        memos.set_memo("critical", inputs, made)
        known = memos.memo("critical", inputs) or made
    return CriticalValue(known["value"], known["size"], tuple(known["errors"]), tuple(known["powers"]))


def have_equal_results(one: Json, other: Json) -> bool:
    """Whether two simulations of the same came to the same, but for what differs between machines."""
    if not (_is_possible(one) and _is_possible(other)):
        return False
    a, b = ([known["value"], known["size"], *known["errors"], *known["powers"]] for known in (one, other))
    return bool(np.allclose(a, b, rtol=1e-3, atol=2e-3, equal_nan=True))


def _is_possible(known: Json) -> bool:
    """Whether a memo may have come of the simulation."""
    worlds = len(_CASE_SHARES) * len(_CORRELATIONS)
    lists = [known.get("errors"), known.get("powers")]
    if not all(isinstance(one, list) and len(one) == worlds for one in lists):
        return False
    numbers = [known.get("value"), known.get("size"), *lists[0], *lists[1]]  # type: ignore[misc]
    return all(isinstance(one, int | float) for one in numbers) and numbers[0] >= LEAST


def simulate_critical_value(task: Task, metric: str, counts: tuple[int, ...], level: float, margin: float) -> Json:
    """Find the critical value in all worlds, and its size and power on fresh draws: ``{value, size, errors, powers}``.

    A world is a share of the variance that lies between cases, and a correlation between the two models.
    """
    worlds = [SimulationScenario(task, metric, counts, share, like) for share in _CASE_SHARES for like in _CORRELATIONS]
    worse, same = (worlds[0].find_signals(level, level - loss) for loss in (margin, 0.0))
    needed, errors, powers = [], [], []
    for seed, world in enumerate(worlds):
        difference, error = world.simulate_differences(*worse, _SIMULATED, seed)
        with np.errstate(divide="ignore", invalid="ignore"):  # of a data set in which both say the same
            needed.append(float(np.quantile(np.nan_to_num((difference + margin) / error), 1 - SIGNIFICANCE_LEVEL)))
    value = max(LEAST, *needed)
    worst = int(np.argmax(needed))
    sizes = is_non_inferior(*worlds[worst].simulate_differences(*worse, _SIMULATED, 100 + worst), value, margin)
    for seed, world in enumerate(worlds):
        difference, error = world.simulate_differences(*same, _SIMULATED, 200 + seed)
        powers.append(float(is_non_inferior(difference, error, value, margin).mean()))
        errors.append(float(np.median(error)))  # of these draws: of a version that is worse it is larger
    return {"value": value, "size": float(sizes.mean()), "errors": errors, "powers": powers}


def is_non_inferior(difference: Numbers, error: Numbers, value: float, margin: float) -> NDArray[np.bool_]:
    """The decision: whether the lower end of the difference is above the margin."""
    return difference - value * error > -margin


@dataclass(frozen=True)
class SimulationScenario:
    """A way in which scores come about: ``signal * class + case + image``, the last two normal.

    Attributes:
        task: whose classes.
        metric: what is compared.
        counts: cases of each class.
        case_share: of the variance, how much is common to the images of a case.
        correlation: of both terms between the two models: what is hard for the one is hard for the other.
    """

    task: Task
    metric: str
    counts: tuple[int, ...]
    case_share: float
    correlation: float

    @cached_property
    def truth(self) -> ClassNumbers:
        """(cases,) class numbers."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    @cached_property
    def chance_level(self) -> float:
        """The metric of a model that has learnt nothing."""
        return self._metric_at(0.0) if self.metric == "macro_f1" else 0.5

    def find_signals(self, champion: float, candidate: float) -> tuple[float, float]:
        """The signals (champion, candidate) with which the metric has these values in an endless data set."""
        return self._signal(champion), self._signal(candidate)

    def simulate_differences(self, champion: float, candidate: float, sets: int, seed: int) -> tuple[Numbers, Numbers]:
        """Draw data sets of these cases, and compare the models in each: differences and their errors, (sets,) each.

        Args:
            champion: its signal.
            candidate: its signal.
            sets: how many.
            seed: of the draws.
        """
        rng, truth = np.random.default_rng(seed), self.truth
        weights = _resampled(self.task, truth, np.random.default_rng(seed + 1))
        weights = np.concatenate([np.ones((1, len(truth))), weights])
        found = []
        for start in range(0, sets, _CHUNK):
            n = min(_CHUNK, sets - start)
            shape = (n, len(truth), _IMAGES, self._columns)
            between = self._two(rng, (n, len(truth), 1, self._columns))
            within = self._two(rng, shape)
            share, rest = np.float32(self.case_share**0.5), np.float32((1 - self.case_share) ** 0.5)
            noises = [share * a + rest * b for a, b in zip(between, within, strict=True)]
            old, new = (
                self._values(noise, signal, weights)
                for noise, signal in zip(noises, (champion, candidate), strict=True)
            )
            found.append(new - old)
        differences = np.concatenate(found)
        return differences[:, 0], np.nanstd(differences[:, 1:], axis=1, ddof=1)

    @property
    def _columns(self) -> int:
        """Scores of an image."""
        return 1 if self.metric != "macro_f1" and self.task == "binary" else len(self.counts)

    def _two(self, rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Singles, Singles]:
        """A term of the one model's scores and of the other's, which are correlated."""
        common, one, other = (rng.standard_normal(shape, np.float32) for _ in range(3))
        a, b = np.float32(self.correlation**0.5), np.float32((1 - self.correlation) ** 0.5)
        return a * common + b * one, a * common + b * other

    def _values(self, noise: Singles, signal: float, weights: Numbers) -> Numbers:
        """The metric of one model in each data set, under each row of weights: (sets, weights)."""
        truth, n = self.truth, len(self.counts)
        scores = noise + (signal * self._shown(truth)[:, None, :]).astype(np.float32)
        if self.metric == "macro_f1":
            called = truth[:, None] * n + scores.argmax(-1)
            cells = np.stack([(called == cell).sum(-1) for cell in range(n * n)], axis=-1)
            return f1_of(cells.astype(float), weights)
        won = []
        for k in (1,) if self.task == "binary" else range(n):
            column = scores[..., 0 if self.task == "binary" else k]
            mine, others = column[:, truth == k], column[:, truth != k]
            above = mine[:, :, :, None, None] > others[:, None, None, :, :]
            won.append(above.sum(axis=(2, 4), dtype=float))
        return area_of(won, truth, np.full(len(truth), float(_IMAGES)), weights)

    def _shown(self, truth: ClassNumbers) -> Numbers:
        """What of a class the scores show: (cases, columns)."""
        return truth[:, None].astype(float) if self._columns == 1 else np.eye(len(self.counts))[truth]

    def _signal(self, level: float) -> float:
        if self.metric != "macro_f1":  # the area under the curve of two normal distributions of variance 1
            from scipy.stats import norm

            return float(np.sqrt(2) * norm.ppf(level))
        low, high = 0.0, 12.0
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if self._metric_at(middle) < level else (low, middle)
        return (low + high) / 2

    def _metric_at(self, signal: float) -> float:
        """Macro-F1 in a data set of many images."""
        rng = np.random.default_rng(0)
        truth = rng.choice(self.truth, 20_000)
        called = (rng.normal(size=(len(truth), self._columns)) + signal * self._shown(truth)).argmax(-1)
        return float(f1_of(confusions(np.zeros_like(truth), truth, called, len(self.counts)), np.ones((1, 1)))[0, 0])


def _resampled(task: Task, truth: ClassNumbers, rng: np.random.Generator) -> Numbers:
    """How often each case comes in each draw of cases within benign and malignant, as in a real comparison."""
    malignant = truth if task == "binary" else np.array([LABELS.index(label_of(name)) for name in SUBTYPES])[truth]
    weights = np.zeros((_DRAWS_SIMULATED, len(truth)))
    for label in np.unique(malignant):
        members = np.flatnonzero(malignant == label)
        weights[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), _DRAWS_SIMULATED)
    return weights
