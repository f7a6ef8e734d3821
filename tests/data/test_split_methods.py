import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ml.core.errors import DataError
from ml.core.taxonomy import DUPLICATED_SLIDE, SIDES, SUBTYPES, case_of, label_of, read_inventory
from ml.data import split_methods
from ml.data.ledger import FRACTIONS
from ml.data.split_methods import split_by_group_folds, split_by_label, split_by_search


def breakhis_counts() -> dict[str, list[int]]:
    counts: dict[str, list[int]] = {}
    for row in read_inventory():
        if row.slide != DUPLICATED_SLIDE:
            case = counts.setdefault(case_of(row.slide), [0] * len(SUBTYPES))
            case[SUBTYPES.index(row.subtype)] += row.images
    return counts


def cases_of(counts, sides, side, k):
    return sum(counts[c][k] > 0 for c in counts if sides[c] == side)


@pytest.mark.parametrize("seed", range(3))
def test_breakhis_keeps_every_class_in_train_and_test(seed):
    counts = breakhis_counts()
    sides = split_by_search(counts, {}, seed=seed)
    assert sides == split_by_search(counts, {}, seed=seed)
    total = sum(map(sum, counts.values()))
    for side, wanted in zip(SIDES, FRACTIONS, strict=True):
        share = sum(sum(counts[c]) for c in counts if sides[c] == side) / total
        assert share == pytest.approx(wanted, abs=0.02)
    for k in range(len(SUBTYPES)):
        assert cases_of(counts, sides, "train", k) >= 1
        assert cases_of(counts, sides, "test", k) >= 1


def test_two_thousand_groups_keep_their_shares():
    rng = np.random.default_rng(0)
    counts = {f"c{n}": [int(k == n % 8) * int(rng.integers(20, 200)) for k in range(8)] for n in range(2000)}
    sides = split_by_search(counts, {}, seed=0)
    for k in range(8):
        images = [sum(counts[c][k] for c in counts if sides[c] == side) for side in SIDES]
        assert np.array(images) / sum(images) == pytest.approx(FRACTIONS, abs=0.005)


def padded(rows):
    return {f"c{i}": [*row, *[0] * (len(SUBTYPES) - len(row))] for i, row in enumerate(rows)}


def few_cases(classes, images=(1, 7)):
    return st.lists(
        st.lists(st.sampled_from([0, 0, *images]), min_size=classes, max_size=classes).filter(any),
        min_size=3,
        max_size=7,
    ).map(padded)


def penalty(counts, sides):
    classes = [k for k in range(len(SUBTYPES)) if any(c[k] for c in counts.values())]
    return sum(
        weight * (cases_of(counts, sides, side, k) == 0)
        for side, weight in (("train", 100), ("test", 10))
        for k in classes
    )


def least_penalty(counts, frozen):
    free = [c for c in counts if c not in frozen]
    return min(
        penalty(counts, {**frozen, **dict(zip(free, sides, strict=True))})
        for sides in itertools.product(SIDES, repeat=len(free))
    )


@settings(max_examples=60)
@given(few_cases(5), st.integers(0, 5), st.data())
def test_no_more_classes_are_missing_than_by_brute_force(counts, seed, data):
    frozen = data.draw(st.dictionaries(st.sampled_from(sorted(counts)), st.sampled_from(SIDES), max_size=4))
    sides = split_by_search(counts, frozen, seed=seed)
    assert set(sides) == set(counts)
    assert all(sides[c] == side for c, side in frozen.items())
    assert penalty(counts, sides) == least_penalty(counts, frozen)


@settings(max_examples=60)
@given(few_cases(5), st.data())
def test_the_covering_program_is_exact_by_itself(counts, data):
    frozen = data.draw(st.dictionaries(st.sampled_from(sorted(counts)), st.sampled_from(SIDES), max_size=3))
    cases = sorted(counts)
    free = np.array([i for i, c in enumerate(cases) if c not in frozen], dtype=np.int64)
    start = np.array([SIDES.index(frozen.get(c, data.draw(st.sampled_from(SIDES)))) for c in cases])
    found = split_methods._cover(np.array([counts[c] for c in cases]) > 0, start, free)
    sides = {c: SIDES[side] for c, side in zip(cases, found, strict=True)}
    assert all(sides[c] == side for c, side in frozen.items())
    assert penalty(counts, sides) == least_penalty(counts, frozen)


def test_what_the_search_misses_the_covering_program_finds(monkeypatch):
    counts = padded([[int(n) for n in row] for row in ("00101001", "00000010", "00101000", "10000011", "10011000")])
    monkeypatch.setattr(split_methods, "_RESTARTS", 1)
    assert penalty(counts, split_by_search(counts, {}, seed=0)) == least_penalty(counts, {})
    monkeypatch.setattr(split_methods, "_cover", lambda has, sides, free: sides)
    assert penalty(counts, split_by_search(counts, {}, seed=0)) > least_penalty(counts, {})


def test_groups_that_belong_together_stay_together():
    counts = padded([[4, 0], [4, 0], [4, 4], [0, 4], [0, 4]])
    sides = split_by_search(counts, {}, seed=0, together=[{"c0", "c3"}, {"c1", "c4"}])
    assert sides["c0"] == sides["c3"]
    assert sides["c1"] == sides["c4"]
    assert penalty(counts, sides) == 0


def breakhis_images():
    counts = breakhis_counts()
    return zip(
        *((c, SUBTYPES[k]) for c, row in counts.items() for k, n in enumerate(row) for _ in range(n)), strict=True
    )


def test_sgkf_is_two_stages_of_scikit_learns():
    from sklearn.model_selection import StratifiedGroupKFold

    groups, subtypes = (np.array(column) for column in breakhis_images())
    sides = split_by_group_folds(groups.tolist(), subtypes.tolist(), seed=5)
    rest, test = next(StratifiedGroupKFold(7, shuffle=True, random_state=5).split(subtypes, subtypes, groups))
    _, validation = next(
        StratifiedGroupKFold(6, shuffle=True, random_state=5).split(subtypes[rest], subtypes[rest], groups[rest])
    )
    assert {g for g, side in sides.items() if side == "test"} == set(groups[test])
    assert {g for g, side in sides.items() if side == "validation"} == set(groups[rest][validation])
    share = np.array([sum(sides[g] == side for g in groups) for side in SIDES]) / len(groups)
    assert share == pytest.approx(FRACTIONS, abs=0.06)


@settings(max_examples=60)
@given(few_cases(4, images=(2, 7)), st.integers(0, 5))
def test_sgkf_of_a_few_cases_has_three_sides(counts, seed):
    images = [(c, SUBTYPES[k]) for c, row in counts.items() for k, n in enumerate(row) for _ in range(n)]
    groups, subtypes = zip(*images, strict=True)
    sides = split_by_group_folds(list(groups), list(subtypes), seed=seed)
    assert set(sides) == set(counts)
    assert set(sides.values()) == set(SIDES)


@pytest.mark.parametrize("subtypes", [["A", "F", "DC"], ["A", "A", "DC"]])
def test_sgkf_needs_two_images_of_a_class_at_both_stages(subtypes):
    with pytest.raises(DataError, match="no class has two images, too few to be folded"):
        split_by_group_folds(["c0", "c1", "c2"], subtypes, seed=0)


COHORT = st.lists(
    st.lists(st.sampled_from(["A", "F", "DC", "LC"]), min_size=1, max_size=4), min_size=1, max_size=14
).map(lambda cohort: [(f"c{n}", subtype) for n, subtypes in enumerate(cohort) for subtype in subtypes])


@settings(max_examples=80)
@given(COHORT, st.sampled_from([split_by_group_folds, split_by_label]), st.integers(0, 5), st.data())
def test_no_side_of_any_cohort_is_empty(images, split, seed, data):
    """Or the error says how many groups there are of what."""
    groups, subtypes = (list(column) for column in zip(*images, strict=True))
    tied = [data.draw(st.sets(st.sampled_from(sorted(set(groups))), min_size=1))]
    try:
        sides = split(groups, subtypes, seed=seed, together=tied)
    except DataError as error:
        said = str(error)
    else:
        assert set(sides) == set(groups)
        assert set(sides.values()) == set(SIDES)
        assert all(len({sides[group] for group in together}) == 1 for together in tied)
        if split is split_by_label:
            on_side = {(sides[group], max(label_of(s) for g, s in images if g == group)) for group in groups}
            malignant = {side for side, label in on_side if label == "malignant"}
            assert malignant == set(SIDES)
        return
    assert re.search(r"[0-9]+ benign and [0-9]+ malignant|[0-9]+ of (A|F|DC|LC)", said)
    assert "add data" in said
    if split is split_by_group_folds:
        units = {min(tied[0]) if tied and group in tied[0] else group for group in groups}
        assert len(units) < 3 or "no class has two images" in said
