"""Tests size and power of the comparison with the champion, at the case counts of the real ledger.

The cases of BreakHis are split as by a retraining. Predictions are simulated for the resulting numbers of cases, in
scenarios that the critical value was not found in.
"""

import math
from collections.abc import Iterator

from ml.core.store import Store
from ml.core.taxonomy import DUPLICATED_SLIDE, SUBTYPES, Task, label_of, read_inventory
from ml.data.splits import read_split, split_dataset
from ml.evaluation.comparison_simulation import (
    SIGNIFICANCE_LEVEL,
    CriticalValue,
    SimulationScenario,
    is_non_inferior,
    simulate_critical_value,
)
from tests.helpers import made_up
from tests.trust.rows import Row

DRAWS = 2000
MARGIN = 0.05
STATED_WITHIN = 0.05
"""Three standard errors of two shares of 2,000 draws, and half a point for scenarios between two simulated ones."""
LEVELS = {"roc_auc": 0.9, "roc_auc_ovr": 0.85, "macro_f1": 0.6}
_NEW_SCENARIOS = ((0.35, 0.75), (0.65, 0.45))
"""Scenarios between the simulated ones: share of variance between cases, correlation of the two models."""


def rows(store: Store) -> Iterator[Row]:
    """Yields two rows for each comparison: of a version worse by the margin, and of one as good as the champion."""
    error = 3 * math.sqrt(SIGNIFICANCE_LEVEL * (1 - SIGNIFICANCE_LEVEL) / DRAWS)
    for where, of_subtypes in counts(store).items():
        for task, metric in (
            ("binary", "roc_auc"),
            ("binary", "macro_f1"),
            ("subtype", "roc_auc_ovr"),
            ("subtype", "macro_f1"),
        ):
            of_classes = tuple(of_subtypes[s] for s in SUBTYPES) if task == "subtype" else binary(of_subtypes)
            level = max(LEVELS[metric], SimulationScenario(task, metric, of_classes, 0.5, 0.5).chance_level + MARGIN)  # type: ignore[arg-type]
            yield from _rows(where, task, metric, of_classes, level, error)  # type: ignore[arg-type]


def _rows(
    where: str, task: Task, metric: str, of_classes: tuple[int, ...], level: float, error: float
) -> Iterator[Row]:
    critical = simulate_critical_value(task, metric, of_classes, level, MARGIN)
    title = f"{task} {metric}, {where} ({sum(of_classes)} cases)"
    stated = CriticalValue(critical["value"], critical["size"], tuple(critical["errors"]), tuple(critical["powers"]))
    sizes, powers, stated_powers = [], [], []
    for seed, (share, correlation) in enumerate(_NEW_SCENARIOS):
        scenario = SimulationScenario(task, metric, of_classes, share, correlation)
        differences, errors = scenario.simulate_differences(
            *scenario.find_signals(level, level - MARGIN), DRAWS, 5000 + seed
        )
        sizes.append(float(is_non_inferior(differences, errors, critical["value"], MARGIN).mean()))
        differences, errors = scenario.simulate_differences(*scenario.find_signals(level, level), DRAWS, 6000 + seed)
        powers.append(float(is_non_inferior(differences, errors, critical["value"], MARGIN).mean()))
        stated_powers.append(stated.power(sorted(errors)[DRAWS // 2]))
    shown_sizes = ", ".join(f"{size:.1%}" for size in sizes)
    yield Row(
        f"{title}: worse by {MARGIN:g}",
        f"passes in {shown_sizes} of {DRAWS} draws (allowed: {SIGNIFICANCE_LEVEL:.0%}; critical value "
        f"{critical['value']:.2f})",
        max(sizes) <= SIGNIFICANCE_LEVEL + error,
    )
    pairs = list(zip(powers, stated_powers, strict=True))
    shown_powers = ", ".join(f"{power:.0%} (stated {stated_power:.0%})" for power, stated_power in pairs)
    yield Row(
        f"{title}: as good as the champion",
        f"passes in {shown_powers}",
        all(abs(power - stated_power) <= STATED_WITHIN for power, stated_power in pairs),
    )


def counts(store: Store) -> dict[str, dict[str, int]]:
    """Returns the numbers of BreakHis' cases by subtype, in train and validation together and in test."""
    subtype_of = {row.slide: row.subtype for row in read_inventory() if row.slide != DUPLICATED_SLIDE}
    frame = made_up.manifest_rows({slide: (subtype, 2) for slide, subtype in subtype_of.items()})
    frame["patient"] = frame["slide"].str.rstrip("ABCDEFGH")
    split = read_split(split_dataset(made_up.create_dataset(store, frame), store)["split"], store)
    cases: dict[str, dict[str, int]] = {where: dict.fromkeys(SUBTYPES, 0) for where in ("out of fold", "on test")}
    for (subtype, patient), _ in frame.groupby(["subtype", "patient"]):
        cases["on test" if split.sides[patient] == "test" else "out of fold"][subtype] += 1
    return cases


def binary(of_subtypes: dict[str, int]) -> tuple[int, ...]:
    """Returns the numbers of benign and of malignant cases."""
    labels = ("benign", "malignant")
    return tuple(sum(n for s, n in of_subtypes.items() if label_of(s) == label) for label in labels)
