import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ml import splits
from ml.errors import DataError, StoreError
from ml.splits import Ledger, allocate, read_ledger, read_split, sides_of, split_dataset
from ml.store import Store
from ml.taxonomy import DUPLICATED_SLIDE, SIDES, SUBTYPES, case_of, inventory
from tests import made_up


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path.as_uri())


def breakhis_counts() -> dict[str, list[int]]:
    counts: dict[str, list[int]] = {}
    for row in inventory():
        if row.slide != DUPLICATED_SLIDE:
            case = counts.setdefault(case_of(row.slide), [0] * len(SUBTYPES))
            case[SUBTYPES.index(row.subtype)] += row.images
    return counts


def cases_of(counts, sides, side, k):
    return sum(counts[c][k] > 0 for c in counts if sides[c] == side)


@pytest.mark.parametrize("seed", range(3))
def test_breakhis_keeps_every_class_in_train_and_test(seed):
    counts = breakhis_counts()
    sides = allocate(counts, {}, seed=seed)
    assert sides == allocate(counts, {}, seed=seed)
    total = sum(map(sum, counts.values()))
    for side, wanted in zip(SIDES, splits.FRACTIONS, strict=True):
        share = sum(sum(counts[c]) for c in counts if sides[c] == side) / total
        assert share == pytest.approx(wanted, abs=0.02)
    for k in range(len(SUBTYPES)):
        assert cases_of(counts, sides, "train", k) >= 1
        assert cases_of(counts, sides, "test", k) >= 1


case_counts = st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any), min_size=3, max_size=7).map(
    lambda rows: {f"c{i}": [*row, 0, 0, 0, 0, 0] for i, row in enumerate(rows)}
)


def penalty(counts, sides):
    classes = [k for k in range(len(SUBTYPES)) if any(c[k] for c in counts.values())]
    return sum(
        weight * (cases_of(counts, sides, side, k) == 0)
        for side, weight in (("train", 100), ("test", 10))
        for k in classes
    )


@settings(max_examples=40, deadline=None)
@given(case_counts, st.integers(0, 5))
def test_small_instances_miss_no_more_classes_than_brute_force(counts, seed):
    best = min(
        penalty(counts, dict(zip(counts, sides, strict=True))) for sides in itertools.product(SIDES, repeat=len(counts))
    )
    assert penalty(counts, allocate(counts, {}, seed=seed)) == best


@settings(max_examples=40, deadline=None)
@given(case_counts, st.data())
def test_frozen_cases_never_move(counts, data):
    frozen = {c: data.draw(st.sampled_from(SIDES)) for c in counts if data.draw(st.booleans())}
    sides = allocate(counts, frozen, seed=0)
    assert set(sides) == set(counts)
    assert all(sides[c] == side for c, side in frozen.items())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sets(st.integers(0, 30), max_size=6), min_size=1, max_size=6))
def test_ledger_is_append_only_whatever_comes(batches):
    ledger = Ledger("l")
    for number, batch in enumerate(batches):
        before = ledger.sides
        new = {f"c{n}": SIDES[n % 3] for n in batch if f"c{n}" not in before}
        ledger = ledger.append(new, f"dataset-{number}", 0)
        assert {c: ledger.sides[c] for c in before} == before
    assert ledger.verify().hash == ledger.hash


def test_a_case_cannot_be_appended_twice():
    ledger = Ledger("l").append({"a": "train"}, "dataset-1", 0)
    with pytest.raises(DataError, match="case a has its side already"):
        ledger.append({"a": "test"}, "dataset-2", 0)


def test_an_edited_ledger_is_refused(store):
    oid = made_up.dataset(store, made_up.rows(made_up.every_class()))
    split_dataset(oid, store)
    value, _ = store.read("ledgers/made.json")
    case, side = next(iter(value["entries"][0]["added"].items()))
    value["entries"][0]["added"][case] = "test" if side != "test" else "train"
    store.put_json("ledgers/made.json", value)
    with pytest.raises(StoreError, match="entry 1 does not fit its hash"):
        read_ledger("made", store)


def test_split_reports_sides_and_is_the_same_again(store):
    oid = made_up.dataset(store, made_up.rows(made_up.every_class()))
    first = split_dataset(oid, store)
    assert split_dataset(oid, store) == first
    assert sum(first[side]["images"] for side in SIDES) == 8 * 3 * 4
    assert sum(first[side]["cases"] for side in SIDES) == 24
    assert first["not_estimable"] == []
    assert set(read_split(first["split"], store).values()) == set(SIDES)


def test_new_data_leaves_old_cases_where_they_were(store):
    old = made_up.every_class()
    before = read_split(split_dataset(made_up.dataset(store, made_up.rows(old)), store)["split"], store)
    new = {**old, "14-90001": ("PT", 5), "14-90002": ("DC", 5)}
    after = read_split(split_dataset(made_up.dataset(store, made_up.rows(new)), store)["split"], store)
    assert {case: after[case] for case in before} == before
    assert set(after) - set(before) == {"14-90001", "14-90002"}


def test_a_class_of_one_case_is_trained_on_and_named(store):
    cases = {**made_up.every_class(), "14-8": ("A", 3)}
    frame = made_up.rows(cases)
    frame = frame[(frame["subtype"] != "A") | (frame["patient"] == "14-8")]
    report = split_dataset(made_up.dataset(store, frame), store)
    assert report["not_estimable"] == ["A"]
    assert report["train"]["cases_by_subtype"]["A"] == 1


def test_too_few_cases(store):
    with pytest.raises(DataError, match="needs at least 3"):
        split_dataset(made_up.dataset(store, made_up.rows({"14-1": ("A", 2), "14-2": ("DC", 2)})), store)


def test_sides_of_refuses_unknown_cases_and_leaks():
    frame = made_up.rows({"14-1": ("A", 1), "14-2": ("DC", 1)})
    assert sides_of(frame, {"14-1": "train", "14-2": "test"}).tolist() == ["train", "test"]
    with pytest.raises(DataError, match="does not know case 14-2"):
        sides_of(frame, {"14-1": "train"})
    frame["pixel_sha256"] = "same"
    with pytest.raises(DataError, match="two sides"):
        sides_of(frame, {"14-1": "train", "14-2": "test"})


def test_allocation_of_sides_counts_only_given_cases():
    counts = {"a": [3] + [0] * 7, "b": [3] + [0] * 7, "c": [3] + [0] * 7}
    sides = allocate(counts, {"gone": "test"}, seed=0)
    assert set(sides) == set(counts)
    assert np.unique(list(sides.values())).size >= 2
