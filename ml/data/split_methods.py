"""Methods that assign every group to a side: the allocator's search, and the two protocols of the baseline."""

import warnings
from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray

from ml.core.errors import DataError
from ml.core.taxonomy import LABELS, SIDES, label_of
from ml.data.ledger import FRACTIONS

_TEST_FOLDS, _VALIDATION_FOLDS = 7, 6
"""One of 7 folds is 14% of all groups, and so is one of 6 folds of the rest."""

_RESTARTS = 16

_PAIRS = 20_000
"""Number of swaps that are tried at once: all of them up to 200 groups, a new sample in each step beyond."""

_NO_TRAIN, _NO_TEST, _NO_VALIDATION = 1e6, 1e5, 1e1
"""Costs of a class without a case on a side. Without train it cannot be learnt, without test it cannot be measured;
without validation it only takes no part in the choice of the decision threshold."""


def split_by_group_folds(
    groups: list[str], subtypes: list[str], *, seed: int, together: Collection[set[str]] = ()
) -> dict[str, str]:
    """Assigns every group to a side by two stages of scikit-learn's StratifiedGroupKFold: the baseline's protocol.

    The first of 7 folds is the test side, and the first of 6 folds of the rest is validation; with few groups or images
    there are fewer folds. The shares of the classes are kept where possible, but a class may be missing in test. This
    method ignores frozen sides: :func:`split_by_search` assigns the groups that are added to a ledger later.

    Args:
        groups: the group of each image.
        subtypes: the class of each image.
        seed: the seed of the shuffling.
        together: sets of groups that must lie on one side.

    Returns:
        the side of each group.

    Raises:
        DataError: too few groups or images for three sides.
    """
    leaders = _leaders(together)
    units, labels = np.array([leaders.get(group, group) for group in groups]), np.array(subtypes)
    test = _one_fold(units, labels, _TEST_FOLDS, seed, leave=2)
    rest = ~np.isin(units, list(test))
    validation = _one_fold(units[rest], labels[rest], _VALIDATION_FOLDS, seed, leave=1)
    names = dict.fromkeys(test, "test") | dict.fromkeys(validation, "validation")
    return {group: names.get(str(unit), "train") for group, unit in zip(groups, units, strict=True)}


def split_by_label(
    groups: list[str], subtypes: list[str], *, seed: int, together: Collection[set[str]] = ()
) -> dict[str, str]:
    """Assigns every group to a side at random within benign and malignant: the baseline's protocol of the binary model.

    Each side has groups of both. The shares of the subtypes are not controlled. :func:`split_by_search` assigns the
    groups that are added to a ledger later.

    Args:
        groups: the group of each image.
        subtypes: the class of each image.
        seed: the seed of the shuffling.
        together: sets of groups that must lie on one side.

    Returns:
        the side of each group.

    Raises:
        DataError: too few groups of benign or malignant for three sides; says how many there are.
    """
    from sklearn.model_selection import train_test_split

    leaders = _leaders(together)
    labels: dict[str, str] = {}
    for group, subtype in zip(groups, subtypes, strict=True):
        unit = leaders.get(group, group)
        labels[unit] = max(labels.get(unit, ""), label_of(subtype))  # malignant wherever there is any
    units = sorted(labels)
    _, validation_share, test_share = FRACTIONS
    try:
        rest, test = train_test_split(
            units, test_size=test_share, random_state=seed, stratify=[labels[unit] for unit in units]
        )
        _, validation = train_test_split(
            rest,
            test_size=validation_share / (1 - test_share),
            random_state=seed,
            stratify=[labels[unit] for unit in rest],
        )
        problem = ""
    except ValueError as error:
        problem, test, validation = str(error), [], []
    names = dict.fromkeys(units, "train") | dict.fromkeys(test, "test") | dict.fromkeys(validation, "validation")
    found = {(labels[unit], side) for unit, side in names.items()}
    lacking = [f"no {label} on the {side} side" for label in LABELS for side in SIDES if (label, side) not in found]
    if problem or lacking:
        counted = " and ".join(f"{sum(label == one for one in labels.values())} {label}" for label in LABELS)
        raise DataError(
            f"{len(units)} group(s) cannot be dealt to three sides by benign and malignant: there are {counted} "
            f"({problem or ', '.join(lacking)}); add data, or take the method allocator and another ledger"
        )
    return {group: names[leaders.get(group, group)] for group in groups}


def choose_validation_groups(groups: list[str], subtypes: list[str], *, seed: int) -> set[str]:
    """Chooses one group in six for validation by StratifiedGroupKFold, where train and test are given.

    Args:
        groups: the group of each image of the training side.
        subtypes: the class of each of these images.
        seed: the seed of the shuffling.

    Returns:
        the groups for validation.

    Raises:
        DataError: too few groups or images.
    """
    return _one_fold(np.array(groups), np.array(subtypes), _VALIDATION_FOLDS, seed, leave=1)


def _one_fold(units: NDArray[np.str_], labels: NDArray[np.str_], folds: int, seed: int, leave: int) -> set[str]:
    """Returns the groups of the first fold that is not empty and leaves at least ``leave`` other groups."""
    from sklearn.model_selection import StratifiedGroupKFold

    all_units = {str(unit) for unit in units}
    most = max(np.unique(labels, return_counts=True)[1])
    for number in range(min(folds, len(all_units), int(most)), 1, -1):
        splitter = StratifiedGroupKFold(number, shuffle=True, random_state=seed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
            for _, part in splitter.split(labels, labels, units):
                chosen = {str(unit) for unit in units[part]}
                if chosen and len(all_units - chosen) >= leave:
                    return chosen
    counted = ", ".join(f"{len(set(units[labels == name]))} of {name}" for name in np.unique(labels))
    if len(all_units) <= leave:
        problem = f"{len(all_units)} group(s) cannot be folded, {leave + 1 - len(all_units)} too few ({counted})"
    else:
        problem = f"of {len(all_units)} group(s) ({counted}) no class has two images, too few to be folded"
    raise DataError(f"{problem}; add data, or take the method allocator and another ledger")


def split_by_search(
    counts: Mapping[str, list[int]],
    frozen: Mapping[str, str],
    *,
    seed: int,
    together: Collection[set[str]] = (),
) -> dict[str, str]:
    """Assigns every group to a side: 70/15/15 of all images and of each class, with as few classes missing as possible.

    The search is a steepest descent from several random starts. Each step takes the best move of one group, or else the
    best swap of two groups, as long as it lowers the cost; the result with the lowest cost is kept. If that result
    leaves a class out of train or test, one more descent starts from the assignment for which an integer program finds
    the fewest missing classes. So no class is missing that another assignment around the frozen sides would keep. The
    same arguments give the same sides.

    Args:
        counts: the number of images of each class, by group.
        frozen: sides that must not change; groups that are not in ``counts`` are ignored.
        seed: the seed of the random starts.
        together: sets of new groups that must lie on one side.

    Returns:
        the side of each group in ``counts``.
    """
    leaders = _leaders(together)
    members: dict[str, list[str]] = {}
    for group in sorted(counts):
        members.setdefault(leaders.get(group, group), []).append(group)
    units = sorted(members)
    images = np.array([np.sum([counts[group] for group in members[unit]], axis=0) for unit in units], dtype=float)
    # One row for each unit: its images by class, and its number of groups in the last column.
    weights = np.hstack([images, [[len(members[unit])] for unit in units]])
    fixed = np.array([SIDES.index(frozen[unit]) if unit in frozen else -1 for unit in units])
    free = np.flatnonzero(fixed < 0)
    rng = np.random.default_rng(seed)

    def draw_start() -> NDArray[np.int64]:
        return np.where(fixed < 0, rng.choice(len(SIDES), size=len(units), p=FRACTIONS), fixed)

    # With many groups, any start is near the target shares, and each step takes longer.
    results = [_descend(draw_start(), free, weights, rng) for _ in range(_RESTARTS if len(units) <= 200 else 2)]
    best, cost = min(results, key=lambda result: result[1])
    if cost >= _NO_TEST and len(free):
        covering = _descend(_cover(images > 0, draw_start(), free), free, weights, rng)
        best, _ = min((best, cost), covering, key=lambda result: result[1])
    return {group: SIDES[side] for unit, side in zip(units, best, strict=True) for group in members[unit]}


def _leaders(together: Collection[set[str]]) -> dict[str, str]:
    """Maps each group to the one that represents all groups that must lie on one side with it."""
    return {group: min(tied) for tied in together for group in tied}


def _cover(has: NDArray[np.bool_], sides: NDArray[np.int64], free: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns sides with the fewest classes missing from train; among these from test, then from validation.

    This is an integer program. Groups with the same classes are of one kind, and the program says how many groups of
    each kind are needed on each side: at most one, since a second would cover no further class. The other groups stay
    where they are.

    Args:
        has: (groups, classes), whether a group has images of a class.
        sides: (groups,), the indices of the sides to begin with.
        free: the indices of the groups that may be moved.

    Returns:
        (groups,), the indices of the sides.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    has = has[:, has.any(axis=0)]
    fixed = np.setdiff1d(np.arange(len(has)), free)
    covered = np.stack([has[fixed[sides[fixed] == side]].any(axis=0) for side in range(len(SIDES))], axis=1)
    kinds, kind_of, available = np.unique(has[free], axis=0, return_inverse=True, return_counts=True)
    n_kinds, n_classes, n = len(kinds), has.shape[1], len(SIDES)
    # Variables: needed[kind, side], then covered[class, side]; the latter are integers if the former are.
    per_kind = np.hstack([np.kron(np.eye(n_kinds), np.ones(n)), np.zeros((n_kinds, n_classes * n))])
    per_class = np.hstack([np.kron(-kinds.T.astype(float), np.eye(n)), np.eye(n_classes * n)])
    # The same ranking as _NO_TRAIN, _NO_TEST and _NO_VALIDATION, in numbers that are safe from a solver's tolerances.
    worth = np.array([(n_classes + 1) ** 2, 1, n_classes + 1])
    solution = milp(
        c=np.concatenate([np.zeros(n_kinds * n), np.tile(-worth, n_classes)]),
        integrality=np.concatenate([np.ones(n_kinds * n), np.zeros(n_classes * n)]),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(per_kind, ub=available),
            LinearConstraint(per_class, ub=covered.ravel().astype(float)),
        ],
        options={"mip_rel_gap": 0},
    )
    if not solution.success:
        raise RuntimeError(f"the covering problem was not solved: {solution.message}")
    sides = sides.copy()
    needed = solution.x[: n_kinds * n].reshape(n_kinds, n) > 0.5
    for kind in range(n_kinds):
        wanted = np.flatnonzero(needed[kind])
        sides[free[kind_of.ravel() == kind][: len(wanted)]] = wanted
    return sides


def _descend(
    sides: NDArray[np.int64], free: NDArray[np.int64], weights: NDArray[np.float64], rng: np.random.Generator
) -> tuple[NDArray[np.int64], float]:
    """Moves or swaps free groups as long as that lowers the cost; returns the sides' indices (groups,) and the cost.

    Args:
        sides: (groups,), the indices of the sides to begin with.
        free: the indices of the groups that may be moved.
        weights: (groups, classes + 1), images by class, and a last column that counts cases.
        rng: draws the swaps to try where there are too many.
    """
    one_hot = np.eye(len(SIDES))
    totals = one_hot[sides].T @ weights  # (sides, classes + 1)
    cost = float(_costs(totals[None], totals)[0])
    every_pair = np.stack(np.triu_indices(len(free), k=1)) if len(free) * (len(free) - 1) // 2 <= _PAIRS else None
    while True:
        a, to = (grid.ravel() for grid in np.meshgrid(free, np.arange(len(SIDES)), indexing="ij"))
        change = (one_hot[to] - one_hot[sides[a]])[:, :, None] * weights[a][:, None, :]
        costs = _costs(totals[None] + change, totals)
        if len(costs) and costs.min() < cost - 1e-12:
            best = int(costs.argmin())
            sides = sides.copy()
            sides[a[best]] = to[best]
        else:
            x, y = free[rng.integers(len(free), size=(2, _PAIRS)) if every_pair is None else every_pair]
            differ = sides[x] != sides[y]
            x, y = x[differ], y[differ]
            change = (one_hot[sides[y]] - one_hot[sides[x]])[:, :, None] * (weights[x] - weights[y])[:, None, :]
            costs = _costs(totals[None] + change, totals)
            # A sample nearly always has a swap that gains something; gains too small to show in a share are ignored.
            if not len(costs) or costs.min() >= cost - (1e-12 if every_pair is not None else 1e-6):
                return sides, cost
            best = int(costs.argmin())
            sides = sides.copy()
            sides[[x[best], y[best]]] = sides[[y[best], x[best]]]
        totals = one_hot[sides].T @ weights
        cost = float(_costs(totals[None], totals)[0])


def _costs(trials: NDArray[np.float64], totals: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the cost (n,) of each of n assignments; lower is better.

    Args:
        trials: (n, sides, classes + 1), images by class on each side, and a last column that counts cases.
        totals: (sides, classes + 1), those of the current assignment.
    """
    everything = totals.sum(axis=0)
    present = everything > 0
    present[-1] = False  # the column that counts cases
    wanted = np.array(FRACTIONS)[None, :, None]
    of_class = trials[:, :, present]
    missing = (of_class < 0.5).sum(axis=2) @ np.array([_NO_TRAIN, _NO_VALIDATION, _NO_TEST])
    of_all = trials[:, :, :-1].sum(axis=2, keepdims=True) / everything[:-1].sum()
    of_cases = trials[:, :, -1:] / everything[-1]
    costs: NDArray[np.float64] = missing + ((of_class / everything[present] - wanted) ** 2).sum(axis=(1, 2))
    costs += 4 * (((of_all - wanted) ** 2).sum(axis=(1, 2)) + ((of_cases - wanted) ** 2).sum(axis=(1, 2)))
    return costs
