"""Does the comparison with the champion keep what it promises, at the case counts of the real ledger?

BreakHis' own names are dealt to the sides as a retraining does it, and data sets are drawn at the case counts that come
of it, in worlds that the critical value was not found in.
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
"""Three standard errors of two shares of 2,000 draws, and half a point for what lies between two worlds."""
LEVELS = {"roc_auc": 0.9, "roc_auc_ovr": 0.85, "macro_f1": 0.6}
_UNSEEN = ((0.35, 0.75), (0.65, 0.45))
"""Worlds between those of the simulation: share of variance between cases, correlation of the two models."""


def rows(store: Store) -> Iterator[Row]:
    """Two rows a comparison: a version worse by the margin, and one as good as the champion."""
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
    found = simulate_critical_value(task, metric, of_classes, level, MARGIN)
    shown = f"{task} {metric}, {where} ({sum(of_classes)} cases)"
    said = CriticalValue(found["value"], found["size"], tuple(found["errors"]), tuple(found["powers"]))
    wrong, right, stated = [], [], []
    for seed, (share, like) in enumerate(_UNSEEN):
        world = SimulationScenario(task, metric, of_classes, share, like)
        differences, errors = world.simulate_differences(*world.find_signals(level, level - MARGIN), DRAWS, 5000 + seed)
        wrong.append(float(is_non_inferior(differences, errors, found["value"], MARGIN).mean()))
        differences, errors = world.simulate_differences(*world.find_signals(level, level), DRAWS, 6000 + seed)
        right.append(float(is_non_inferior(differences, errors, found["value"], MARGIN).mean()))
        stated.append(said.power(sorted(errors)[DRAWS // 2]))
    told = ", ".join(f"{share:.1%}" for share in wrong)
    yield Row(
        f"{shown}: worse by {MARGIN:g}",
        f"passes in {told} of {DRAWS} draws (allowed: {SIGNIFICANCE_LEVEL:.0%}; critical value {found['value']:.2f})",
        max(wrong) <= SIGNIFICANCE_LEVEL + error,
    )
    told = ", ".join(f"{share:.0%} (stated {said:.0%})" for share, said in zip(right, stated, strict=True))
    yield Row(
        f"{shown}: as good as the champion",
        f"passes in {told}",
        all(abs(share - said) <= STATED_WITHIN for share, said in zip(right, stated, strict=True)),
    )


def counts(store: Store) -> dict[str, dict[str, int]]:
    """Cases by subtype in train and validation together, and in test, under the ledger of BreakHis' own names."""
    subtype_of = {row.slide: row.subtype for row in read_inventory() if row.slide != DUPLICATED_SLIDE}
    frame = made_up.manifest_rows({slide: (subtype, 2) for slide, subtype in subtype_of.items()})
    frame["patient"] = frame["slide"].str.rstrip("ABCDEFGH")
    split = read_split(split_dataset(made_up.create_dataset(store, frame), store)["split"], store)
    found: dict[str, dict[str, int]] = {where: dict.fromkeys(SUBTYPES, 0) for where in ("out of fold", "on test")}
    for (subtype, patient), _ in frame.groupby(["subtype", "patient"]):
        found["on test" if split.sides[patient] == "test" else "out of fold"][subtype] += 1
    return found


def binary(of_subtypes: dict[str, int]) -> tuple[int, ...]:
    """The same by label: benign and malignant."""
    labels = ("benign", "malignant")
    return tuple(sum(n for s, n in of_subtypes.items() if label_of(s) == label) for label in labels)
