"""Methods that give every group a side: the allocator, and the protocols of the baseline."""

import warnings
from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray

from ml.core.errors import DataError
from ml.core.taxonomy import SIDES, label_of
from ml.data.ledger import FRACTIONS

_TEST_FOLDS, _VALIDATION_FOLDS = 7, 6
"""One of 7 folds is 14% of all, and one of 6 of the rest again."""

_RESTARTS = 16

_PAIRS = 20_000
"""Swaps that are tried at once: all of them up to 200 groups, beyond that a new sample each time."""

_NO_TRAIN, _NO_TEST, _NO_VALIDATION = 1e6, 1e5, 1e1
"""What it costs to leave a class without a case on a side. Without train it cannot be learnt, without test it cannot be
measured; without validation it only takes no part in choosing the threshold."""


def split_by_group_folds(
    groups: list[str], subtypes: list[str], *, seed: int, together: Collection[set[str]] = ()
) -> dict[str, str]:
    """Give every group a side by two stages of scikit-learn's StratifiedGroupKFold: the baseline's protocol.

    The first fold of 7 is the test side, the first of 6 of the rest validation; with few groups or images there are
    fewer folds. It keeps shares of classes alike where it can, but promises no class a case in test. It knows no frozen
    sides: what is added to a ledger later is put around them by :func:`split_by_search`.

    Args:
        groups: the group of each image.
        subtypes: the class of each image.
        seed: of the shuffling.
        together: groups that must lie on one side.

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
    """Give every group a side by chance within benign and malignant: the baseline's protocol of the binary model.

    It promises no subtype anything. What is added to a ledger later is put around its sides by :func:`split_by_search`.

    Args:
        groups: the group of each image.
        subtypes: the class of each image.
        seed: of the shuffling.
        together: groups that must lie on one side.

    Raises:
        DataError: too few groups of benign or malignant for three sides.
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
    except ValueError as error:
        raise DataError(
            f"{len(units)} group(s) cannot be dealt to three sides by benign and malignant ({error}); add data, or "
            "take the method allocator and another ledger"
        ) from None
    names = dict.fromkeys(test, "test") | dict.fromkeys(validation, "validation")
    return {group: names.get(leaders.get(group, group), "train") for group in groups}


def choose_validation_groups(groups: list[str], subtypes: list[str], *, seed: int) -> set[str]:
    """One group in six for validation, by StratifiedGroupKFold, where train and test are given.

    Raises:
        DataError: too few groups or images.
    """
    return _one_fold(np.array(groups), np.array(subtypes), _VALIDATION_FOLDS, seed, leave=1)


def _one_fold(units: NDArray[np.str_], labels: NDArray[np.str_], folds: int, seed: int, leave: int) -> set[str]:
    """The groups in the first fold that has any and leaves at least so many others."""
    from sklearn.model_selection import StratifiedGroupKFold

    everyone = {str(unit) for unit in units}
    most = max(np.unique(labels, return_counts=True)[1])
    for number in range(min(folds, len(everyone), int(most)), 1, -1):
        splitter = StratifiedGroupKFold(number, shuffle=True, random_state=seed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
            for _, part in splitter.split(labels, labels, units):
                chosen = {str(unit) for unit in units[part]}
                if chosen and len(everyone - chosen) >= leave:
                    return chosen
    raise DataError(
        f"of {len(everyone)} group(s) no class has two images, too few to be folded; add data, or take the method "
        "allocator and another ledger"
    )


def split_by_search(
    counts: Mapping[str, list[int]],
    frozen: Mapping[str, str],
    *,
    seed: int,
    together: Collection[set[str]] = (),
) -> dict[str, str]:
    """Give every group a side: 70/15/15 of the images, of all and of each class, and no class missing where avoidable.

    Steepest descent from several random starts: the best single move, or else the best swap of two groups, as long as
    one lowers the cost; the best end wins. If that leaves a class out of train or test, one more descent starts where
    a solver found as few classes missing as there can be, so none is missing that another assignment around the frozen
    sides would keep. The same arguments give the same sides.

    Args:
        counts: images of each class, by group.
        frozen: sides that must not change; groups that are not in ``counts`` are ignored.
        seed: of the starts.
        together: new groups that must lie on one side.
    """
    leaders = _leaders(together)
    members: dict[str, list[str]] = {}
    for group in sorted(counts):
        members.setdefault(leaders.get(group, group), []).append(group)
    units = sorted(members)
    images = np.array([np.sum([counts[group] for group in members[unit]], axis=0) for unit in units], dtype=float)
    # A row a unit: its images by class, and a last column that counts its groups.
    weights = np.hstack([images, [[len(members[unit])] for unit in units]])
    fixed = np.array([SIDES.index(frozen[unit]) if unit in frozen else -1 for unit in units])
    free = np.flatnonzero(fixed < 0)
    rng = np.random.default_rng(seed)

    def start() -> NDArray[np.int64]:
        return np.where(fixed < 0, rng.choice(len(SIDES), size=len(units), p=FRACTIONS), fixed)

    # Many groups are near the wanted shares from any start, and each step takes longer.
    ends = [_descend(start(), free, weights, rng) for _ in range(_RESTARTS if len(units) <= 200 else 2)]
    best, cost = min(ends, key=lambda end: end[1])
    if cost >= _NO_TEST and len(free):
        best, _ = min((best, cost), _descend(_cover(images > 0, start(), free), free, weights, rng), key=lambda e: e[1])
    return {group: SIDES[side] for unit, side in zip(units, best, strict=True) for group in members[unit]}


def _leaders(together: Collection[set[str]]) -> dict[str, str]:
    """Group -> the group that stands for all that must lie on one side with it."""
    return {group: min(tied) for tied in together for group in tied}


def _cover(has: NDArray[np.bool_], sides: NDArray[np.int64], free: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sides with as few classes missing from train as there can be; of these, as few from test; then from validation.

    An integer program: groups with the same classes are of one kind, and it says how many of which kind are needed on
    which side (one at most: a second would cover nothing more). The other groups stay where they are.

    Args:
        has: (groups, classes), whether a group has images of a class.
        sides: (groups,) to begin with.
        free: the groups that may be moved.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    has = has[:, has.any(axis=0)]
    fixed = np.setdiff1d(np.arange(len(has)), free)
    there = np.stack([has[fixed[sides[fixed] == side]].any(axis=0) for side in range(len(SIDES))], axis=1)
    kinds, kind_of, available = np.unique(has[free], axis=0, return_inverse=True, return_counts=True)
    n_kinds, n_classes, n = len(kinds), has.shape[1], len(SIDES)
    # Variables: needed[kind, side], then covered[class, side]; the latter are whole where the former are.
    per_kind = np.hstack([np.kron(np.eye(n_kinds), np.ones(n)), np.zeros((n_kinds, n_classes * n))])
    per_class = np.hstack([np.kron(-kinds.T.astype(float), np.eye(n)), np.eye(n_classes * n)])
    # In the order of _NO_TRAIN, _NO_TEST and _NO_VALIDATION, but with numbers that a solver's tolerances cannot blur.
    worth = np.array([(n_classes + 1) ** 2, 1, n_classes + 1])
    found = milp(
        c=np.concatenate([np.zeros(n_kinds * n), np.tile(-worth, n_classes)]),
        integrality=np.concatenate([np.ones(n_kinds * n), np.zeros(n_classes * n)]),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(per_kind, ub=available),
            LinearConstraint(per_class, ub=there.ravel().astype(float)),
        ],
        options={"mip_rel_gap": 0},
    )
    if not found.success:
        raise RuntimeError(f"the covering problem was not solved: {found.message}")
    sides = sides.copy()
    needed = found.x[: n_kinds * n].reshape(n_kinds, n) > 0.5
    for kind in range(n_kinds):
        wanted = np.flatnonzero(needed[kind])
        sides[free[kind_of.ravel() == kind][: len(wanted)]] = wanted
    return sides


def _descend(
    sides: NDArray[np.int64], free: NDArray[np.int64], weights: NDArray[np.float64], rng: np.random.Generator
) -> tuple[NDArray[np.int64], float]:
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
            # By a sample there is nearly always something to be gained; what cannot be seen in a share is not sought.
            if not len(costs) or costs.min() >= cost - (1e-12 if every_pair is not None else 1e-6):
                return sides, cost
            best = int(costs.argmin())
            sides = sides.copy()
            sides[[x[best], y[best]]] = sides[[y[best], x[best]]]
        totals = one_hot[sides].T @ weights
        cost = float(_costs(totals[None], totals)[0])


def _costs(trials: NDArray[np.float64], totals: NDArray[np.float64]) -> NDArray[np.float64]:
    """The cost of each of n trial allotments, given as per-side totals (n, sides, classes + 1); lower is better."""
    everything = totals.sum(axis=0)
    present = everything > 0
    present[-1] = False  # the column that counts cases
    wanted = np.array(FRACTIONS)[None, :, None]
    of_class = trials[:, :, present]
    missing = (of_class < 0.5).sum(axis=2) @ np.array([_NO_TRAIN, _NO_VALIDATION, _NO_TEST])
    of_all = trials[:, :, :-1].sum(axis=2, keepdims=True) / everything[:-1].sum()
    of_cases = trials[:, :, -1:] / everything[-1]
    fit: NDArray[np.float64] = missing + ((of_class / everything[present] - wanted) ** 2).sum(axis=(1, 2))
    fit += 4 * (((of_all - wanted) ** 2).sum(axis=(1, 2)) + ((of_cases - wanted) ** 2).sum(axis=(1, 2)))
    return fit
