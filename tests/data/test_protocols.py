import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ml.core.errors import DataError
from ml.core.store import Store
from ml.core.taxonomy import DUPLICATED_SLIDE, SIDES, case_of, label_of, read_inventory
from ml.data.ledger import FRACTIONS
from ml.data.protocols import SPANHOL_FOLDS, make_protocol_splits, spanhol_test_folds
from ml.data.split_methods import split_by_group_folds, split_by_label
from ml.data.splits import look_up_sides, read_split, split_dataset
from ml.data.training_sets import read_dataset
from tests.helpers import made_up

SLIDES = sorted({(row.subtype, row.slide) for row in read_inventory()})


def whole_breakhis():
    """Two images of each slide of BreakHis but the one that stands under two labels."""
    rows = made_up.manifest_rows({slide: (subtype, 2) for subtype, slide in SLIDES if slide != DUPLICATED_SLIDE})
    return rows.assign(patient=rows["slide"].map(case_of))


@pytest.fixture
def store(tmp_path):
    return Store((tmp_path / "store").as_uri())


@pytest.fixture
def dataset(store):
    return made_up.create_dataset(store, whole_breakhis())


def test_the_published_folds_know_every_slide_and_have_28_to_test_on():
    folds = spanhol_test_folds()
    assert sorted(folds) == SLIDES
    for number in range(1, SPANHOL_FOLDS + 1):
        assert sum(number in of for of in folds.values()) == 28
    # Two lines of the published lists: it is tested on in folds 4 and 5, and never.
    assert folds["A", "14-22549AB"] == {4, 5}
    assert folds["MC", "14-10147"] == frozenset()


def test_spanhol_tests_on_the_published_slides_and_validates_on_others(store, dataset):
    rows = read_dataset(dataset, store)
    made = make_protocol_splits("spanhol", "subtype", dataset, store)
    assert [trial.name for trial in made] == [f"spanhol fold {n}" for n in range(1, 6)]
    for number, trial in enumerate(made, start=1):
        sides = look_up_sides(rows, trial.split)
        on = {side: set(rows["slide"][sides == side]) for side in SIDES}
        published = {slide for (_, slide), of in spanhol_test_folds().items() if number in of}
        assert on["test"] == published - {DUPLICATED_SLIDE}
        assert on["validation"]
        assert not on["validation"] & on["test"]
        assert sum(map(len, on.values())) == 80
    assert make_protocol_splits("spanhol", "binary", dataset, store) == made


def test_spanhol_is_for_breakhis_alone(store):
    rows = made_up.manifest_rows({"14-22549AB": ("A", 2), "17-1": ("DC", 2)})
    with pytest.raises(DataError, match=r"for BreakHis alone, whose folds have no slide 17-1 of DC"):
        make_protocol_splits("spanhol", "binary", made_up.create_dataset(store, rows), store)


@pytest.mark.parametrize(("task", "method"), [("binary", split_by_label), ("subtype", split_by_group_folds)])
def test_the_notebooks_split_by_slide_each_model_by_its_own_method(store, dataset, task, method):
    rows = read_dataset(dataset, store)
    (trial,) = make_protocol_splits("notebooks", task, dataset, store)
    assert trial.split.group == "slide"
    assert trial.split.sides == method(rows["slide"].tolist(), rows["subtype"].tolist(), seed=0)
    sides = look_up_sides(rows, trial.split)
    assert {(side, label) for side, label in zip(sides, rows["label"], strict=True)} == {
        (side, label) for side in SIDES for label in ("benign", "malignant")
    }


def test_the_ledger_is_the_training_sets_own(store, dataset):
    (trial,) = make_protocol_splits("ledger", "binary", dataset, store)
    assert trial.split == read_split(split_dataset(dataset, store)["split"], store)
    assert trial.split.group == "case"


@settings(max_examples=50)
@given(st.integers(7, 60), st.integers(7, 60), st.integers(0, 5))
def test_stratified_sides_have_their_shares_of_both_labels(benign, malignant, seed):
    groups = [f"b{n}" for n in range(benign)] + [f"m{n}" for n in range(malignant)]
    subtypes = ["A"] * benign + ["DC"] * malignant
    sides = split_by_label(groups, subtypes, seed=seed, together=[{"b0", "b1", "b2"}])
    assert len({sides["b0"], sides["b1"], sides["b2"]}) == 1
    for label, n in (("benign", benign - 2), ("malignant", malignant)):
        mine = [group for group, subtype in zip(groups, subtypes, strict=True) if label_of(subtype) == label]
        mine = [group for group in mine if group not in {"b1", "b2"}]
        for side, share in zip(SIDES, FRACTIONS, strict=True):
            assert abs(sum(sides[group] == side for group in mine) - share * n) <= 2
    assert sides == split_by_label(groups, subtypes, seed=seed, together=[{"b0", "b1", "b2"}])


def test_too_few_groups_to_be_stratified():
    with pytest.raises(DataError, match=r"3 group\(s\) cannot be dealt to three sides by benign and malignant"):
        split_by_label(["a", "b", "c"], ["A", "A", "DC"], seed=0)
