from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, logit

from ml.core.errors import DataError
from ml.training.cross_validation import (
    FoldTraining,
    HeldOutPredictions,
    assign_folds,
    list_trainings,
    loss_by_epoch,
    nest_selection,
    pool_predictions,
    select_on_validation,
    select_parameters,
    to_probabilities,
)
from ml.training.presets import load_preset
from ml.training.procedure import _correct_prior

RECIPE = load_preset("default").subtype
BINARY = load_preset("default").binary


def images(cases_of: dict[str, int], each: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Subtypes and cases of made-up images: ``{subtype: cases}``."""
    pairs = [(name, f"{name}{c}") for name, n in cases_of.items() for c in range(n) for _ in range(each)]
    subtypes, cases = zip(*pairs, strict=True)
    return np.array(subtypes), np.array(cases)


def recipe(base=RECIPE, **changes):
    other = {section: getattr(base, section).model_copy(update=values) for section, values in changes.items()}
    return base.model_copy(update=other)


@settings(max_examples=25)
@given(
    st.dictionaries(st.sampled_from(["A", "F", "PT", "DC", "LC"]), st.integers(1, 9), min_size=2, max_size=5).filter(
        lambda cases: sum(cases.values()) >= 5
    ),
    st.integers(3, 5),
)
def test_folds_keep_cases_whole_and_no_class_in_one_fold(cases_of, folds):
    subtypes, cases = images(cases_of)
    dealt = assign_folds(subtypes, cases, folds, 2)
    assert dealt.shape == (2, len(cases))
    assert np.array_equal(dealt, assign_folds(subtypes, cases, folds, 2))
    for one in dealt:
        assert set(one) <= set(range(folds))
        assert all(len(set(one[cases == case])) == 1 for case in set(cases))
        assert all(len(set(one[subtypes == s])) > 1 for s, n in cases_of.items() if n > 1)


COHORT = st.lists(
    st.tuples(st.sets(st.sampled_from(["A", "F", "PT", "DC"]), min_size=1, max_size=2), st.integers(1, 4)),
    min_size=1,
    max_size=7,
)


@settings(max_examples=60)
@given(COHORT, st.integers(2, 5), st.integers(1, 3))
def test_no_fold_of_any_cohort_is_empty(cohort, folds, repeats):
    """Or the error says how many cases of which subtype there are; where there is a way, it is found."""
    rows = [(name, f"c{n}") for n, (names, each) in enumerate(cohort) for name in sorted(names) for _ in range(each)]
    subtypes, cases = (np.array(column) for column in zip(*rows, strict=True))
    cases_of = {name: sum(name in names for names, _ in cohort) for name in set(subtypes)}

    def holds(fold_of_case):
        folds_of = {
            name: {f for f, (names, _) in zip(fold_of_case, cohort, strict=True) if name in names} for name in cases_of
        }
        return set(fold_of_case) == set(range(folds)) and all(
            len(folds_of[s]) > 1 for s, n in cases_of.items() if n > 1
        )

    try:
        dealt = assign_folds(subtypes, cases, folds, repeats)
    except DataError as error:
        said = str(error)
    else:
        for one in dealt:
            assert all(len(set(one[cases == case])) == 1 for case in set(cases))
            assert holds([one[cases == f"c{n}"][0] for n in range(len(cohort))])
        return
    assert all(f"{n} of {name}" in said for name, n in cases_of.items())
    assert not any(holds(ways) for ways in product(range(folds), repeat=len(cohort)))


def test_repeats_have_other_folds():
    subtypes, cases = images({"A": 2, "F": 7, "DC": 20, "LC": 4})
    first, second, third = assign_folds(subtypes, cases, 5, 3)
    assert not np.array_equal(first, second)
    assert not np.array_equal(second, third)


def test_too_few_cases_for_the_folds():
    with pytest.raises(DataError, match="2 cases to train on cannot be assigned to 3 folds"):
        assign_folds(*images({"A": 1, "F": 1}), 3, 1)


def test_each_fold_is_left_out_alone_and_in_pairs():
    folds = np.array([0, 1, 2, 3, 0])
    todo = list_trainings(4, 2)
    assert len(todo) == 2 * 4 + 6
    assert len({fold.name for fold in todo}) == len(todo)
    assert {fold.left_out for fold in todo if len(fold.left_out) == 2} == set(combinations(range(4), 2))
    pair = next(fold for fold in todo if fold.left_out == (0, 2))
    assert (pair.training_rows(folds).tolist(), pair.held_out_rows(folds).tolist()) == ([1, 3], [0, 2, 4])


def draw_planted(n: int = 4000, seed: int = 0):
    """Returns class numbers (n,) and the calibrated logits (n, 8) that they were drawn from."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (n, 8)) + np.array([-2, -1, -2, -1, 2, -1, -1, -1])
    p = to_probabilities(logits)
    truth = np.array([rng.choice(8, p=row) for row in p])
    return truth, logits


def predicted(logits, knows_class=None):
    rows = np.arange(logits.shape[1])
    return HeldOutPredictions(
        rows, logits.astype(np.float32), np.ones(len(rows), bool) if knows_class is None else knows_class
    )


def shares(truth):
    with np.errstate(divide="ignore"):  # of a class that is not there
        return np.log(np.bincount(truth, minlength=8) / len(truth))


def test_a_planted_temperature_and_epoch_are_found():
    truth, logits = draw_planted()
    noise = np.random.default_rng(1).normal(0, 3, logits.shape)
    epochs = np.stack([logits + noise, 2.5 * logits, logits + 2 * noise])
    choice = select_parameters("subtype", RECIPE, truth, predicted(epochs), np.zeros(8), shares(truth))
    assert choice.epochs == 2
    assert choice.temperature == pytest.approx(2.5, rel=0.1)
    assert np.allclose(choice.probabilities(epochs[1]), to_probabilities(logits), atol=0.05)


def test_what_is_not_to_be_chosen_stays():
    truth, logits = draw_planted(500)
    epochs = np.stack([logits, 3 * logits])
    plain = recipe(selection={"choose_epochs": False, "calibrate": False}, imbalance={"logit_adjustment": (0.0,)})
    choice = select_parameters("subtype", plain, truth, predicted(epochs), np.ones(8), shares(truth))
    assert (choice.epochs, choice.temperature, choice.bias, choice.tau) == (2, 1.0, (0.0,) * 8, 0.0)
    assert choice.rule.offsets is None


def test_the_effect_of_sampling_on_logits_is_taken_back():
    truth, logits = draw_planted()
    shift = np.array([1.0, 0.5, 1, 0.5, -1, 0.5, 0.5, 0.5])
    choice = select_parameters("subtype", RECIPE, truth, predicted((logits + shift)[None]), -shift, shares(truth))
    assert choice.temperature == pytest.approx(1, rel=0.1)
    assert np.allclose(choice.probabilities(logits + shift), to_probabilities(logits), atol=0.05)


def test_logit_adjustment_is_chosen_where_it_helps_the_rare():
    truth, logits = draw_planted()
    choice = select_parameters("subtype", RECIPE, truth, predicted(logits[None]), np.zeros(8), shares(truth))
    assert choice.tau > 0
    assert np.allclose(choice.rule.offsets, -choice.tau * shares(truth))


def test_the_threshold_is_youdens_of_what_is_calibrated():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 3000)
    logits = (rng.normal(0, 1, 3000) + 2 * truth - 1)[:, None]  # best at 0
    choice = select_parameters("binary", BINARY, truth, predicted(logits[None]), np.zeros(1), np.zeros(2))
    assert logit(choice.rule.threshold) * choice.temperature == pytest.approx(0, abs=0.3)


def test_a_class_that_was_not_learnt_takes_no_part():
    truth, logits = draw_planted(1000)
    gone = truth == 0
    spoilt = logits.copy()
    spoilt[gone] = np.eye(8)[4] * 50  # sure of another class, as a model that never saw this one
    knows_class = ~gone
    choice = select_parameters(
        "subtype", RECIPE, truth, predicted(spoilt[None], knows_class), np.zeros(8), shares(truth)
    )
    without = select_parameters(
        "subtype",
        RECIPE,
        truth,
        HeldOutPredictions(
            np.flatnonzero(knows_class), spoilt[None][:, knows_class].astype("f4"), knows_class[knows_class]
        ),
        np.zeros(8),
        shares(truth),
    )
    assert choice == without


def test_nothing_can_be_chosen_from_one_class():
    truth, logits = draw_planted(50)
    with pytest.raises(DataError, match="fewer than two classes have two cases"):
        select_parameters("subtype", RECIPE, np.zeros(50, int), predicted(logits[None]), np.zeros(8), shares(truth))


def test_nested_choices_know_nothing_of_their_own_fold():
    """Everything in fold 0 is changed: its own selection stays the same, and those of the other folds change."""
    truth, logits = draw_planted(600)
    folds = np.arange(600) % 3

    def predictions(truth, logits):
        made: dict[FoldTraining, HeldOutPredictions] = {}
        for fold in list_trainings(3, 1):
            rows = fold.held_out_rows(folds)
            made[fold] = HeldOutPredictions(rows, logits[None, rows].astype("f4"), np.ones(len(rows), bool))
        return made

    def of_learnt(truth):
        return np.zeros(8), shares(truth)

    _, before = nest_selection("subtype", RECIPE, truth, folds, predictions(truth, logits), of_learnt)
    other_truth, other_logits = truth.copy(), logits.copy()
    other_truth[folds == 0] = 7 - truth[folds == 0]
    other_logits[folds == 0] *= 5
    probabilities, after = nest_selection(
        "subtype", RECIPE, other_truth, folds, predictions(other_truth, other_logits), of_learnt
    )
    assert after[0] == before[0]
    assert after[0].tau  # else shares of the fold itself would not show
    assert after[1] != before[1]
    assert after[2] != before[2]
    assert np.allclose(probabilities[folds == 0], after[0].probabilities(other_logits[folds == 0]), atol=1e-5)


def test_a_class_that_only_the_fold_itself_has_is_left_as_it_is():
    truth = np.array([0] * 30 + [1] * 60 + [2] * 10)
    sampled = recipe(imbalance={"sampling": "sqrt", "class_weights": "none"})
    bias, logs = _correct_prior("subtype", sampled, truth)
    assert np.exp(logs[:3]) == pytest.approx([0.3, 0.6, 0.1])
    seen = np.sqrt([30, 60, 10]) / np.sqrt([30, 60, 10]).sum()
    assert bias[:3] == pytest.approx(np.log([0.3, 0.6, 0.1]) - np.log(seen))
    assert (bias[3:], logs[3:]) == (pytest.approx(np.zeros(5)), pytest.approx(np.zeros(5)))


def test_a_threshold_chosen_on_validation():
    truth, p = np.array([0, 0, 1, 1]), np.array([0.1, 0.4, 0.6, 0.9])
    paper = load_preset("paper").binary
    choice = select_on_validation("binary", paper, truth, logit(p)[:, None].astype("f4"))
    assert choice.rule.threshold == pytest.approx(0.5)
    assert (choice.epochs, choice.temperature) == (20, 1.0)


def test_pooling_and_the_loss_by_epoch():
    truth = np.array([0, 1, 2])
    logits = np.random.default_rng(0).normal(size=(2, 3, 8)).astype("f4")
    both = pool_predictions(
        [HeldOutPredictions(np.array([2]), logits[:, 2:], np.array([True])), predicted(logits[:, :2])]
    )
    assert both.rows.tolist() == [2, 0, 1]
    expected = [-log_softmax(one.astype(float), axis=1)[range(3), truth].mean() for one in logits]
    assert loss_by_epoch(truth, both) == pytest.approx(expected)


def test_the_epochs_that_are_chosen_are_those_of_the_curve_that_is_shown():
    rng = np.random.default_rng(1)
    truth = np.repeat(np.arange(8), 6)
    # Better and better, but ever too sure of itself: before calibration the second epoch would be the best.
    right = np.eye(8)[truth] * 2 + rng.normal(size=(4, 48, 8)) * np.array([3, 1.5, 1.2, 1])[:, None, None]
    logits = (right * np.array([1, 1, 4, 8])[:, None, None]).astype("f4")
    pooled = HeldOutPredictions(np.arange(48), logits, np.ones(48, bool))
    choice = select_parameters("subtype", RECIPE, truth, pooled, np.zeros(8), np.zeros(8))
    assert choice.epochs == 1 + int(np.argmin(loss_by_epoch(truth, pooled, np.zeros(8))))
    assert choice.epochs != 1 + int(np.argmin(loss_by_epoch(truth, pooled)))
