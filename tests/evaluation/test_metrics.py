import math
import re
from typing import get_args

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, softmax
from sklearn import metrics as sk

from ml.core.errors import DataError
from ml.core.settings import PROJECT
from ml.core.taxonomy import class_names
from ml.evaluation.decision_rule import DecisionRule
from ml.evaluation.evaluation import evaluate
from ml.evaluation.intervals import NO_INTERVAL, bootstrap_weights
from ml.evaluation.metric_names import LOWER_IS_BETTER, METRIC_NAMES
from ml.evaluation.metrics import average_precision, compute_weighted_metrics, roc_auc
from ml.evaluation.scores import LabelledPredictions
from ml.evaluation.thresholds import youden_threshold
from ml.promotion.policies import BinaryMetric, SubtypeMetric
from tests.evaluation.coverage import DRAWS, METRICS, SETS, measure_coverage


def make_predictions(task, truth, p, rule=None, patients=None):
    truth = np.asarray(truth)
    n = len(truth)
    rows = pd.DataFrame(
        {
            "patient": [str(k) for k in range(n)] if patients is None else patients,
            "magnification": [40, 100] * (n // 2) + [40] * (n % 2),
            "source": "made",
            "subtype": np.where(truth == 1, "DC", "A") if task == "binary" else [class_names(task)[k] for k in truth],
        }
    )
    return LabelledPredictions(
        task, rows, truth, np.asarray(p, float), rule or DecisionRule(threshold=0.5 if task == "binary" else None)
    )


def test_binary_by_hand():
    # 2 of 3 malignant and 1 of 2 benign called malignant at 0.5.
    result = evaluate(make_predictions("binary", [1, 1, 1, 0, 0], [0.9, 0.8, 0.2, 0.6, 0.1]), draws=0)
    m = result.metrics
    assert m["accuracy"] == m["micro_f1"] == pytest.approx(3 / 5)
    assert m["precision"] == pytest.approx(2 / 3)
    assert m["recall"] == pytest.approx(2 / 3)
    assert m["specificity"] == pytest.approx(1 / 2)
    assert m["balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert m["f1"] == pytest.approx(2 / 3)
    assert m["macro_f1"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert m["roc_auc"] == pytest.approx(5 / 6)  # of 6 pairs, only (0.2, 0.6) is the wrong way round
    assert m["brier"] == pytest.approx((0.01 + 0.04 + 0.64 + 0.36 + 0.01) / 5)
    assert m["ece"] == pytest.approx((0.1 + 0.2 + 0.8 + 0.6 + 0.1) / 5)  # a bin each
    assert m["threshold"] == 0.5
    assert result.confusion.tolist() == [[1, 1], [1, 2]]
    assert result.per_class["malignant"]["support"] == 3
    assert result.intervals == {}


def test_patients_by_hand():
    """Patient a is right in 2 of 3 and by its mean; b in none; c has both classes and is a unit for each."""
    truth, p = [1, 1, 1, 0, 0, 0, 1], [0.9, 0.9, 0.3, 0.7, 0.6, 0.2, 0.6]
    result = evaluate(make_predictions("binary", truth, p, patients=list("aaabbcc")), draws=0)
    assert result.metrics["patient_recognition_rate"] == pytest.approx((2 / 3 + 0 + 1 + 1) / 4)
    assert result.metrics["patient_accuracy"] == pytest.approx(3 / 4)
    assert result.metrics["patient_roc_auc"] == pytest.approx(3 / 4)  # of 4 pairs, b above c's malignant images
    assert (result.per_class["malignant"]["recognised"], result.per_class["malignant"]["cases"]) == (2, 2)
    assert (result.per_class["benign"]["recognised"], result.per_class["benign"]["cases"]) == (1, 2)
    assert result.patients[0] == {
        "patient": "b",
        "class": "benign",
        "images": 2,
        "right": 0.0,
        "probability": pytest.approx(0.35),
        "label": "malignant",
    }


def test_a_side_with_one_class_has_no_auc_and_says_which_is_absent():
    result = evaluate(make_predictions("binary", [1, 1], [0.9, 0.2]), draws=20)
    assert "roc_auc" not in result.metrics
    assert "specificity" not in result.metrics
    assert result.absent_classes == ("benign",)
    assert all(math.isfinite(value) for value in result.metrics.values())
    assert result.per_class["benign"]["note"] == "no case on this side"


def test_subtype_macro_figures_are_means_over_the_classes_present():
    truth = np.array([0, 0, 4, 4, 4])
    p = np.full((5, 8), 0.01)
    p[[0, 2, 3], [0, 4, 4]] = 0.9
    p[1, 4] = p[4, 7] = 0.9  # one A called DC, one DC called PC
    result = evaluate(make_predictions("subtype", truth, p), draws=0)
    assert result.absent_classes == ("F", "PT", "TA", "LC", "MC", "PC")
    assert result.metrics["accuracy"] == pytest.approx(3 / 5)
    assert result.metrics["macro_f1"] == pytest.approx(np.mean([2 / 3, 2 / 3]))
    assert result.metrics["macro_f1"] > sk.f1_score(
        truth, p.argmax(1), labels=range(8), average="macro", zero_division=0
    )
    assert result.per_class["A"]["recall"] == pytest.approx(1 / 2)


def test_perfect_and_useless_subtype_scores():
    truth = np.arange(8).repeat(3)
    perfect = evaluate(make_predictions("subtype", truth, np.eye(8)[truth]), draws=0).metrics
    assert (perfect["macro_f1"], perfect["roc_auc_ovr"], perfect["mcc"], perfect["brier"], perfect["ece"]) == (
        1,
        1,
        1,
        0,
        0,
    )
    useless = evaluate(make_predictions("subtype", truth, np.full((24, 8), 1 / 8)), draws=0).metrics
    assert useless["roc_auc_ovr"] == pytest.approx(0.5)


images = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 6), st.integers(0, 3)), min_size=1, max_size=30)


@given(images)
def test_weighted_areas_equal_scikit_learns_of_repeated_images(drawn):
    truth, score, times = (np.array(column) for column in zip(*drawn, strict=True))
    many, repeated = truth.repeat(times), (score / 6).repeat(times)
    auc, ap = (f(truth == 1, score / 6, times[None].astype(float))[0] for f in (roc_auc, average_precision))
    if len(set(many)) == 2:
        assert auc == pytest.approx(sk.roc_auc_score(many, repeated))
        assert ap == pytest.approx(sk.average_precision_score(many, repeated))
    else:
        assert math.isnan(auc)


@pytest.mark.filterwarnings("ignore:A single label was found:UserWarning")
@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7), st.integers(0, 3)), min_size=1, max_size=30).filter(
        lambda drawn: any(times for *_, times in drawn)
    )
)
def test_weighted_metrics_equal_scikit_learns_of_repeated_images(drawn):
    truth, called, times = (np.array(column) for column in zip(*drawn, strict=True))
    p = softmax(2 * np.eye(8)[called] + np.random.default_rng(0).normal(0, 0.1, (len(called), 8)), axis=1)
    found = compute_weighted_metrics(make_predictions("subtype", truth, p), times[None].astype(float))
    t, c, q = truth.repeat(times), called.repeat(times), p.repeat(times, axis=0)
    present = sorted(set(t))
    macro = {"labels": present, "average": "macro", "zero_division": 0}
    expected = {
        "accuracy": sk.accuracy_score(t, c),
        "micro_f1": sk.f1_score(t, c, average="micro", labels=range(8), zero_division=0),
        "macro_f1": sk.f1_score(t, c, **macro),
        "weighted_f1": sk.f1_score(t, c, average="weighted", zero_division=0),
        "precision": sk.precision_score(t, c, **macro),
        "recall": sk.recall_score(t, c, **macro),
        "balanced_accuracy": sk.recall_score(t, c, **macro),
        "mcc": sk.matthews_corrcoef(t, c),
        "brier": ((q - np.eye(8)[t]) ** 2).sum(axis=1).mean(),
    }
    if len(present) > 1:
        expected["roc_auc_ovr"] = np.mean([sk.roc_auc_score(t == k, q[:, k]) for k in present])
        expected["pr_auc_ovr"] = np.mean([sk.average_precision_score(t == k, q[:, k]) for k in present])
    assert {name: found[name][0] for name in expected} == pytest.approx(expected)


def test_binary_brier_and_mcc_equal_scikit_learns():
    rng = np.random.default_rng(0)
    truth, p = rng.integers(0, 2, 200), rng.random(200)
    found = evaluate(make_predictions("binary", truth, p), draws=0).metrics
    assert found["brier"] == pytest.approx(sk.brier_score_loss(truth, p))
    assert found["mcc"] == pytest.approx(sk.matthews_corrcoef(truth, p >= 0.5))


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20)), min_size=2, max_size=40))
def test_no_threshold_beats_youdens(pairs):
    truth = np.array([int(t) for t, _ in pairs])
    p = np.array([v / 20 for _, v in pairs])
    if len(set(truth)) < 2:
        with pytest.raises(DataError, match="one class only"):
            youden_threshold(truth, p)
        return

    def j(threshold: float) -> float:
        called = p >= threshold
        return called[truth == 1].mean() - called[truth == 0].mean()

    best = youden_threshold(truth, p)
    assert j(best) == pytest.approx(max(j(t) for t in [*p, 2.0]))


def clustered(rng, patients=40, each=10, effect=1.0):
    """Draw images with an effect of the patient: (truth, probability, patient of each image)."""
    of = np.repeat(np.arange(patients), each)
    truth = (np.arange(patients) % 2)[of]
    z = (2 * truth - 1) * 0.8 + rng.normal(0, effect, patients)[of] + rng.normal(0, 1, len(of))
    return truth, expit(z), [f"p{k}" for k in of]


def test_intervals_cover_the_true_value_about_as_often_as_they_should():
    """Of 200 sets of 40 patients; the true values are those of a very large one."""
    names = ("accuracy", "roc_auc", "brier")
    truth, p, patients = clustered(np.random.default_rng(1), 20_000)
    true = {
        name: float(value[0])
        for name, value in compute_weighted_metrics(make_predictions("binary", truth, p), np.ones((1, len(p)))).items()
    }
    covered = dict.fromkeys(names, 0)
    for seed in range(200):
        truth, p, patients = clustered(np.random.default_rng([2, seed]))
        found = evaluate(make_predictions("binary", truth, p, patients=patients), draws=200).intervals
        for name in names:
            covered[name] += found[name][0] <= true[name] <= found[name][1]
    # 95% less what so few patients cost a percentile interval, give or take the noise of 200 sets.
    assert all(0.87 <= n / 200 <= 0.99 for n in covered.values()), covered


@pytest.mark.parametrize(("task", "sets", "draws"), [("binary", 80, DRAWS), ("subtype", 60, 300)])
def test_on_the_ledgers_test_side_intervals_cover_what_the_docs_say(task, sets, draws):
    """The first sets that `python -m tests.evaluation.coverage` draws; for the larger model with fewer draws each."""
    page = (PROJECT / "docs" / "training-and-promotion.md").read_text()
    documented_coverage = dict(
        re.findall(rf"^\| {task} \| `(\w+)` \| .* \| ([\d.]+)% \| [\d.]+ \|$", page, re.MULTILINE)
    )
    measured = {row.metric: row for row in measure_coverage(task, sets, draws)}
    assert documented_coverage.keys() == measured.keys() == set(METRICS[task])
    for metric, row in measured.items():
        documented = float(documented_coverage[metric]) / 100
        noise = math.sqrt(documented * (1 - documented) * (1 / (sets * row.given) + 1 / (SETS * row.given)))
        assert abs(row.covered - documented) <= 3 * noise, (metric, row, documented)
    # With a dozen cases, intervals of macro-F1 cover less often than 95%, and the docs must not say otherwise.
    assert measured["macro_f1"].covered < 0.95


def test_draws_keep_a_patients_images_together_and_strata_whole():
    truth, p, patients = clustered(np.random.default_rng(0), 12, 3)
    made = make_predictions("binary", truth, p, patients=patients)
    weights = np.concatenate(list(bootstrap_weights(made, 300, 0)))
    assert weights.shape == (300, 36)
    assert (weights.reshape(300, 12, 3) == weights.reshape(300, 12, 3)[:, :, :1]).all()
    assert (weights[:, truth == 1].sum(axis=1) == 18).all()
    assert np.allclose(weights.mean(axis=0), 1, atol=0.3)
    assert np.array_equal(weights, np.concatenate(list(bootstrap_weights(made, 300, 0))))


def test_a_class_with_one_case_has_no_interval_and_says_so():
    truth = np.array([0] * 4 + [4] * 8)
    p = np.eye(8)[truth] * 0.5 + 0.05
    result = evaluate(make_predictions("subtype", truth, p, patients=["a"] * 4 + ["b"] * 4 + ["c"] * 4), draws=50)
    assert result.per_class["A"]["note"] == "one case: no interval"
    assert result.per_class["A"]["intervals"] == {}
    # Of two cases, both right: 0.025 = p^2 at the lower end.
    assert result.per_class["DC"]["intervals"] == {"recall": [pytest.approx(0.025**0.5), 1]}
    assert result.per_class["DC"]["note"] == f"recall: exact interval of 2 of 2 cases; F1: {NO_INTERVAL}"
    alone = evaluate(make_predictions("subtype", truth, p, patients=["a"] * 4 + ["b"] * 8), draws=50)
    assert alone.intervals == {}  # no draw could be another


def test_where_every_draw_is_the_same_shares_of_cases_have_exact_intervals_and_others_none():
    truth = np.repeat([0, 0, 0, 1, 1, 1, 1], 3)
    patients = [f"p{k}" for k in np.repeat(range(7), 3)]
    result = evaluate(make_predictions("binary", truth, np.where(truth == 1, 0.9, 0.1), patients=patients), draws=100)
    ends = {"accuracy": 7, "micro_f1": 7, "recall": 4, "specificity": 3}
    ends |= {f"patient_{name}": cases for name, cases in ends.items()} | {"patient_recognition_rate": 7}
    for name, cases in ends.items():
        assert result.metrics[name] == 1
        assert result.intervals[name] == (pytest.approx(0.025 ** (1 / cases)), 1)
        assert result.interval_notes[name] == f"exact interval of {cases} of {cases} cases"
    assert result.intervals.keys() == ends.keys()
    others = result.metrics.keys() - ends.keys() - {"threshold"}
    assert {"roc_auc", "macro_f1", "patient_mcc", "brier"} <= others
    assert {result.interval_notes[name] for name in others} == {NO_INTERVAL}
    assert result.to_json()["interval_notes"] == result.interval_notes
    none = evaluate(make_predictions("binary", truth, np.where(truth == 1, 0.1, 0.9), patients=patients), draws=100)
    assert none.intervals["recall"] == (0, pytest.approx(1 - 0.025 ** (1 / 4)))
    assert none.interval_notes["recall"] == "exact interval of 0 of 4 cases"


def test_a_single_benign_case_has_no_interval():
    """Each draw has it once, so its share of right images is the same in all of them."""
    p = [0.1, 0.1, 0.9, 0.9, 0.2, 0.9, 0.9]
    result = evaluate(make_predictions("binary", [0, 0, 0, 1, 1, 1, 1], p, patients=list("aaabbcc")), draws=100)
    assert result.metrics["specificity"] == pytest.approx(2 / 3)
    assert "specificity" not in result.intervals
    assert "patient_specificity" not in result.intervals
    assert result.interval_notes["specificity"] == result.interval_notes["patient_specificity"] == NO_INTERVAL
    assert result.intervals["recall"] == pytest.approx((0.5, 1))
    assert "recall" not in result.interval_notes


def test_patients_have_every_metric_that_images_have_and_policies_know_them_all():
    rng = np.random.default_rng(0)
    truths = {"binary": np.arange(80) % 2, "subtype": np.arange(80) % 8}
    for task, p in (("binary", rng.random(80)), ("subtype", softmax(rng.normal(size=(80, 8)), axis=1))):
        found = evaluate(make_predictions(task, truths[task], p), draws=0).metrics
        assert all(math.isfinite(value) for value in found.values())
        # Each image is a patient here, so what is of patients is what is of images.
        of_images = {name for name in found if not name.startswith("patient_")} - {"threshold"}
        assert {name: found[f"patient_{name}"] for name in of_images} == pytest.approx(
            {name: found[name] for name in of_images}
        )
        assert found.keys() <= METRIC_NAMES.keys()
        known = get_args(BinaryMetric if task == "binary" else SubtypeMetric)
        assert set(known) == found.keys() - {"threshold"}
        assert {name for name in known if name.endswith(("brier", "ece"))} <= LOWER_IS_BETTER


def test_shuffled_labels_have_an_auc_of_a_half():
    rng = np.random.default_rng(5)
    _, p, patients = clustered(rng, 60)
    shuffled = rng.permutation(60)[np.repeat(np.arange(60), 10)] % 2
    low, high = evaluate(make_predictions("binary", shuffled, p, patients=patients), draws=500).intervals["roc_auc"]
    assert low < 0.5 < high


def test_slices_have_their_own_metrics():
    truth, p, patients = clustered(np.random.default_rng(0))
    result = evaluate(make_predictions("binary", truth, p, patients=patients), draws=50)
    assert list(result.slices["magnification"]) == ["40", "100"]
    slice_ = result.slices["magnification"]["40"]
    even = np.arange(len(truth)) % 2 == 0
    assert slice_["images"] == even.sum()
    assert slice_["metrics"]["roc_auc"] == pytest.approx(sk.roc_auc_score(truth[even], p[even]))
    assert slice_["intervals"]["roc_auc"][0] < slice_["metrics"]["roc_auc"] < slice_["intervals"]["roc_auc"][1]


def test_a_binary_model_has_slices_by_subtype():
    # Case a, DC: 2 of 3 right, its mean too; case b, DC: wrong; case c, A: right.
    made = make_predictions("binary", [1, 1, 1, 1, 0], [0.9, 0.8, 0.3, 0.2, 0.1], patients=["a", "a", "a", "b", "c"])
    slices = evaluate(made, draws=50).slices["subtype"]
    assert list(slices) == ["A", "DC"]
    counts = {"images": 1, "cases": 1, "recognised": 1}
    assert slices["A"] == {**counts, "metrics": {"accuracy": 1.0}, "intervals": {}, "interval_notes": {}}
    assert (slices["DC"]["images"], slices["DC"]["cases"], slices["DC"]["recognised"]) == (4, 2, 1)
    assert slices["DC"]["metrics"] == {"accuracy": 0.5}
    assert slices["DC"]["intervals"]["accuracy"] == pytest.approx([0, 2 / 3])
    assert "subtype" not in evaluate(make_predictions("subtype", [0, 1], np.eye(8)[[0, 1]]), draws=0).slices


def test_a_rule_for_each_row():
    rules = [DecisionRule(threshold=0.2), DecisionRule(threshold=0.2), DecisionRule(threshold=0.9)]
    made = make_predictions("binary", [1, 1, 1], [0.5, 0.1, 0.5], rules, patients=["a", "a", "b"])
    assert made.predicted.tolist() == [1, 0, 0]
    assert made.cases.predicted.tolist() == [1, 0]
    result = evaluate(made, draws=0)
    assert result.rules == (DecisionRule(threshold=0.2), DecisionRule(threshold=0.9))
    assert "threshold" not in result.metrics
    assert made.subset(np.array([True, False, True])).predicted.tolist() == [1, 0]


def test_a_patient_whose_slides_lie_in_several_folds_is_called_by_the_mean_of_their_rules():
    """Whatever the order of the rows: 0.45 on average, and thresholds 0.2 and 0.8 of two images each or 2 to 1."""
    rules = [DecisionRule(threshold=0.2), DecisionRule(threshold=0.8)]
    for order in ([0, 1], [1, 0]):
        few = make_predictions("binary", [1, 1], [0.45, 0.45], [rules[k] for k in order], patients=["a", "a"])
        assert few.cases.predicted.tolist() == [0]
        assert sorted(few.predicted.tolist()) == [0, 1]
    most = make_predictions("binary", [1, 1, 1], [0.45] * 3, [rules[0], rules[1], rules[0]], patients=["a"] * 3)
    assert most.cases.predicted.tolist() == [1]  # 0.4
    p = np.full((2, 8), 0.1)
    p[:, 3] = 0.3
    offsets = tuple(2.5 * np.eye(8)[5])
    assert np.log(0.3 / 0.1) < 2.5 / 2
    both = make_predictions("subtype", [5, 5], p, [DecisionRule(), DecisionRule(offsets=offsets)], patients=["a", "a"])
    assert both.predicted.tolist() == [3, 5]
    assert both.cases.predicted.tolist() == [5]
