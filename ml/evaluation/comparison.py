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
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ml.core.store import Json
from ml.core.taxonomy import LABELS, SUBTYPES, Task, classes, label_of
from ml.evaluation.decision_rule import Rule
from ml.evaluation.metrics import Probabilities, Scores, Truth, bootstrap_weights
from ml.promotion.policies import REQUIRED_LIMITS, Comparison

if TYPE_CHECKING:
    import pandas as pd

Numbers = NDArray[np.float64]
Singles = NDArray[np.float32]

SIZE = 0.05
"""How often a version that is worse by the margin may pass."""

LEAST = 1.6448536269514722
"""The critical value of endlessly many cases, the normal distribution's 95% quantile. With fewer it is larger."""

_DRAWS = 2000  # of patients, for the standard error of a real comparison
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


class Predictions(NamedTuple):
    """What two models said of the same images of one side.

    ``rows`` has the column patient; ``candidate`` and ``champion`` are probabilities, (n,) of malignant or (n, 8), and
    the ``called`` are (n,) class numbers.
    """

    task: Task
    rows: "pd.DataFrame"
    truth: Truth
    candidate: Probabilities
    champion: Probabilities
    called_by_candidate: Truth
    called_by_champion: Truth


@dataclass(frozen=True)
class Critical:
    """What simulation says of a comparison at given numbers of cases.

    Attributes:
        value: the critical value, the largest that any of the simulated worlds needs.
        size: share of fresh data sets in which a version worse by the margin passes, in the worst of the worlds.
        errors: median standard error of the difference in each world, for a version as good as the champion.
        powers: share of data sets in which a version as good as the champion passes, in each world.
    """

    value: float
    size: float
    errors: tuple[float, ...]
    powers: tuple[float, ...]

    def power(self, error: float) -> float:
        """The power where the standard error is the one that was found: between the two worlds that are nearest."""
        ordered = np.argsort(self.errors)
        return float(np.interp(error, np.array(self.errors)[ordered], np.array(self.powers)[ordered]))


def compare(where: str, both: Predictions, rule: Comparison, memos: Memos) -> list[Json]:
    """Compare on one side, in AUC and in macro-F1.

    Returns:
        For each ``{metric, where, images, cases, candidate, champion, difference, error, critical, low, size, power,
        estimable, reason}``; figures that could not be had are None.
    """
    rule_of_units = Rule(threshold=0.5) if both.task == "binary" else Rule()  # any: of units only cases are needed
    scores = Scores(both.task, both.rows, both.truth, both.candidate, rule_of_units)
    units = scores.patients
    n = len(classes(both.task))
    counts = tuple(int((units.truth == k).sum()) for k in range(n))
    ones, draws = np.ones((1, len(units.truth))), None
    told = []
    for metric in REQUIRED_LIMITS[both.task]:
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
            draws = np.concatenate([w[:, units.first] for w in bootstrap_weights(scores, _DRAWS, 0)])
        if metric == "macro_f1":
            called = (both.called_by_candidate, both.called_by_champion)
            sums = [confusions(units.of, both.truth, one_called, n) for one_called in called]
            (new, old), drawn = ([f1_of(one_sum, w)[0] for one_sum in sums] for w in (ones, draws))
        else:
            areas = [pairs(units.of, both.truth, p) for p in (both.candidate, both.champion)]
            (new, old), drawn = (
                [area_of(one_area, units.truth, units.images, w)[0] for one_area in areas] for w in (ones, draws)
            )
        spread = float(np.nanstd(drawn[0] - drawn[1], ddof=1))
        new, old = new[0], old[0]
        found = critical(both.task, metric, counts, float(old), rule.margin, memos)
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
        if power < rule.least_power:
            one["reason"] = (
                f"with {one['cases']} cases a version as good as the champion would pass in only {power:.0%} of draws "
                f"(the policy asks for {rule.least_power:.0%}); found {new - old:+.4f}, at least {low:+.4f}"
            )
        one["estimable"] = not one["reason"]
    return told


def _too_few(task: Task, counts: Sequence[int]) -> str:
    """Why these numbers of cases allow no comparison, or nothing."""
    names = classes(task)
    sides = dict(zip(names, counts, strict=True))
    if task == "subtype":
        sides = {label: sum(n for s, n in zip(names, counts, strict=True) if label_of(s) == label) for label in LABELS}
    few = [f"{name} {n}" for name, n in sides.items() if n < 2]
    return f"two cases each are the least, but there are: {', '.join(few)}" if few else ""


# --- metrics under draws of patients ----------------------------------------------------------------------------------


def confusions(of: Truth, truth: Truth, called: Truth, n: int) -> Numbers:
    """Images by unit, true and called class: (1, units, n * n).

    Args:
        of: (images,) the unit of each image.
        truth: (images,) class numbers.
        called: (images,) class numbers.
        n: number of classes.
    """
    found = np.zeros((int(of.max()) + 1, n * n))
    np.add.at(found, (of, truth * n + called), 1)
    return found[None]


def f1_of(confusion: Numbers, weights: Numbers) -> Numbers:
    """Macro-F1 over the classes that are there: (sets, draws).

    Args:
        confusion: (sets, units, n * n).
        weights: (draws, units).
    """
    n = round(confusion.shape[-1] ** 0.5)
    cells = (weights @ confusion).reshape(len(confusion), len(weights), n, n)
    support, both = cells.sum(-1), cells.sum(-1) + cells.sum(-2)
    f1 = 2 * np.einsum("sdkk->sdk", cells) / np.where(both > 0, both, 1)
    there = support > 0
    mean: Numbers = np.where(there, f1, 0.0).sum(-1) / np.maximum(there.sum(-1), 1)
    return mean


def pairs(of: Truth, truth: Truth, probabilities: Probabilities) -> list[Numbers]:
    """For each class that is told from the rest, sums over the pairs of images of a unit of it and one of the rest.

    A pair counts 1 if the image of the class has the higher probability of it, and half where they are the same.

    Args:
        of: (images,) the unit of each image.
        truth: (images,) class numbers.
        probabilities: (images,) of class 1, or (images, classes).

    Returns:
        Of each class (1, units of it, other units); of two classes only that of class 1.
    """
    wide = probabilities if probabilities.ndim == 2 else probabilities[:, None]
    class_of = np.zeros(int(of.max()) + 1, np.int64)
    class_of[of] = truth
    found = []
    for k, score in zip(range(wide.shape[1]) if probabilities.ndim == 2 else (1,), wide.T, strict=True):
        mine, others = np.flatnonzero(class_of == k), np.flatnonzero(class_of != k)
        sums = np.zeros((len(mine), len(others)))
        sorted_others = [np.sort(score[of == unit]) for unit in others]
        for row, unit in enumerate(mine):
            own = score[of == unit]
            sums[row] = [
                (np.searchsorted(s, own, "left") + np.searchsorted(s, own, "right")).sum() / 2 for s in sorted_others
            ]
        found.append(sums[None])
    return found


def area_of(found: Sequence[Numbers], truth: Truth, images: Numbers, weights: Numbers) -> Numbers:
    """Area under the ROC curve, of several classes the mean of each against the rest: (sets, draws).

    Args:
        found: what :func:`pairs` returned, of any number of data sets with the same units.
        truth: (units,) class numbers.
        images: (units,) numbers of images.
        weights: (draws, units).
    """
    areas = []
    for k, sums in zip(range(len(found)) if len(found) > 1 else (1,), found, strict=True):
        mine, others = weights[:, truth == k], weights[:, truth != k]
        all_pairs = (mine @ images[truth == k]) * (others @ images[truth != k])
        won = ((mine @ sums) * others).sum(-1)
        areas.append(np.where(all_pairs > 0, won / np.where(all_pairs > 0, all_pairs, 1), np.nan))
    stacked = np.stack(areas)
    there = np.isfinite(stacked)
    total = there.sum(0)
    return np.where(total > 0, np.where(there, stacked, 0.0).sum(0) / np.maximum(total, 1), np.nan)


# --- the simulation ---------------------------------------------------------------------------------------------------


def critical(task: Task, metric: str, counts: tuple[int, ...], level: float, margin: float, memos: Memos) -> Critical:
    """The critical value of a comparison, its size and its power; simulated once and kept.

    Args:
        task: whose classes.
        metric: macro_f1, or the area under the ROC curve.
        counts: cases of each class.
        level: the champion's metric, of which the steps of 0.05 are told apart.
        margin: of the comparison.
        memos: where it is kept. What cannot have come of the simulation is simulated anew.
    """
    least = World(task, metric, counts, 0.5, 0.5).chance + margin
    near = min((one for one in _LEVELS if one >= least), key=lambda one: abs(one - level), default=_LEVELS[-1])
    inputs = [_VERSION, task, metric, list(counts), near, margin, _SIMULATED, _DRAWS_SIMULATED, _IMAGES]
    known = memos.memo("critical", inputs)
    if not known or not _is_possible(known):
        made = simulate(task, metric, counts, near, margin)
        memos.set_memo("critical", inputs, made)
        known = memos.memo("critical", inputs) or made
    return Critical(known["value"], known["size"], tuple(known["errors"]), tuple(known["powers"]))


def is_alike(one: Json, other: Json) -> bool:
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


def simulate(task: Task, metric: str, counts: tuple[int, ...], level: float, margin: float) -> Json:
    """Find the critical value in all worlds, and its size and power on fresh draws: ``{value, size, errors, powers}``.

    A world is a share of the variance that lies between cases, and a correlation between the two models.
    """
    worlds = [World(task, metric, counts, share, like) for share in _CASE_SHARES for like in _CORRELATIONS]
    worse, same = (worlds[0].signals(level, level - loss) for loss in (margin, 0.0))
    needed, errors, powers = [], [], []
    for seed, world in enumerate(worlds):
        difference, error = world.draw(*worse, _SIMULATED, seed)
        with np.errstate(divide="ignore", invalid="ignore"):  # of a data set in which both say the same
            needed.append(float(np.quantile(np.nan_to_num((difference + margin) / error), 1 - SIZE)))
    value = max(LEAST, *needed)
    worst = int(np.argmax(needed))
    sizes = passes(*worlds[worst].draw(*worse, _SIMULATED, 100 + worst), value, margin)
    for seed, world in enumerate(worlds):
        difference, error = world.draw(*same, _SIMULATED, 200 + seed)
        powers.append(float(passes(difference, error, value, margin).mean()))
        errors.append(float(np.median(error)))  # of these draws: of a version that is worse it is larger
    return {"value": value, "size": float(sizes.mean()), "errors": errors, "powers": powers}


def passes(difference: Numbers, error: Numbers, value: float, margin: float) -> NDArray[np.bool_]:
    """The decision: whether the lower end of the difference is above the margin."""
    return difference - value * error > -margin


@dataclass(frozen=True)
class World:
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
    def truth(self) -> Truth:
        """(cases,) class numbers."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    @cached_property
    def chance(self) -> float:
        """The metric of a model that has learnt nothing."""
        return self._metric_at(0.0) if self.metric == "macro_f1" else 0.5

    def signals(self, champion: float, candidate: float) -> tuple[float, float]:
        """The signals (champion, candidate) with which the metric has these values in an endless data set."""
        return self._signal(champion), self._signal(candidate)

    def draw(self, champion: float, candidate: float, sets: int, seed: int) -> tuple[Numbers, Numbers]:
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

    def _shown(self, truth: Truth) -> Numbers:
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


def _resampled(task: Task, truth: Truth, rng: np.random.Generator) -> Numbers:
    """How often each case comes in each draw of cases within benign and malignant, as in a real comparison."""
    malignant = truth if task == "binary" else np.array([LABELS.index(label_of(name)) for name in SUBTYPES])[truth]
    weights = np.zeros((_DRAWS_SIMULATED, len(truth)))
    for label in np.unique(malignant):
        members = np.flatnonzero(malignant == label)
        weights[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), _DRAWS_SIMULATED)
    return weights
