import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ml.core.settings import Settings
from ml.core.store import Store
from ml.core.taxonomy import SUBTYPES, Task, class_names, label_of
from ml.evaluation import comparison, comparison_simulation
from ml.evaluation.comparison import PairedPredictions, compare_models
from ml.evaluation.comparison_simulation import (
    CriticalValue,
    SimulationScenario,
    find_critical_value,
    have_equal_results,
    is_non_inferior,
    simulate_critical_value,
)
from ml.evaluation.decision_rule import DecisionRule
from ml.evaluation.metrics import compute_weighted_metrics
from ml.evaluation.paired_metrics import compute_macro_f1, compute_roc_auc, count_confusions, count_pair_wins
from ml.evaluation.scores import LabelledPredictions
from ml.promotion.audit_log import SealedMemos
from ml.promotion.policies import NonInferiorityRule

LOOSE = NonInferiorityRule(least_power=0)


def compare(where, both, rule, store):
    return compare_models(where, both, store, margin=rule.margin, least_power=rule.least_power)


@pytest.fixture
def quick(monkeypatch):
    """A simulation with a tenth of the draws, for tests of the code around it."""
    monkeypatch.setattr(comparison_simulation, "_SIMULATED", 200)
    monkeypatch.setattr(comparison_simulation, "_DRAWS_SIMULATED", 50)
    monkeypatch.setattr(comparison, "_DRAWS", 300)


@pytest.fixture
def store(tmp_path):
    return Store((tmp_path / "store").as_uri())


def make_predictions(
    task: Task, seed: int = 0, cases: int = 24, images: int = 5, skill: float = 2.0
) -> PairedPredictions:
    """Returns predictions of two models of the same skill. Each case has one class, but the first has two."""
    rng = np.random.default_rng(seed)
    n = len(class_names(task))
    of_case = np.arange(cases) % n
    truth = np.repeat(of_case, images)
    truth[0] = (truth[0] + 1) % n
    rows = pd.DataFrame({"patient": np.repeat([f"p{k}" for k in range(cases)], images)})
    probabilities = []
    for _ in range(2):
        logits = rng.normal(size=(len(truth), n)) + skill * np.eye(n)[truth]
        p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        probabilities.append(p if task == "subtype" else p[:, 1])
    called = [p.argmax(axis=1) if task == "subtype" else (p > 0.5).astype(np.int64) for p in probabilities]
    return PairedPredictions(task, rows, truth, *probabilities, *called)


@settings(max_examples=25)
@given(task=st.sampled_from(["binary", "subtype"]), seed=st.integers(0, 1000))
def test_sums_over_cases_give_the_metrics_of_images(task, seed):
    both = make_predictions(task, seed)
    n = len(class_names(task))
    rule = DecisionRule(threshold=0.5) if task == "binary" else DecisionRule()
    scores = LabelledPredictions(task, both.rows, both.truth, both.candidate_probabilities, rule)
    units = scores.cases
    of_patient = np.random.default_rng(seed).integers(0, 3, (4, both.rows["patient"].nunique())).astype(float)
    of_patient[:, :3] += 1
    number = pd.factorize(both.rows["patient"])[0]
    by_image = of_patient[:, number]
    by_unit = by_image[:, units.first_rows]
    known = compute_weighted_metrics(scores, by_image)
    f1 = compute_macro_f1(count_confusions(units.case_of_row, both.truth, scores.predicted, n), by_unit)
    assert f1[0] == pytest.approx(known["macro_f1"])
    area = compute_roc_auc(
        count_pair_wins(units.case_of_row, both.truth, both.candidate_probabilities),
        units.truth,
        units.image_counts,
        by_unit,
    )
    assert area[0] == pytest.approx(known["roc_auc" if task == "binary" else "roc_auc_ovr"], nan_ok=True)


@pytest.mark.parametrize("task", ["binary", "subtype"])
def test_a_model_compared_with_itself(task, store, quick):
    both = make_predictions(task)
    same = both._replace(
        champion_probabilities=both.candidate_probabilities, champion_predicted=both.candidate_predicted
    )
    for one in compare("out of fold", same, LOOSE, store):
        assert one["difference"] == one["low"] == one["error"] == 0
        assert one["estimable"]
        assert (one["images"], one["cases"]) == (120, 24)


def test_a_worse_model_has_a_negative_difference(store, quick):
    good, bad = make_predictions("binary", skill=4.0, cases=60), make_predictions("binary", skill=0.3, cases=60)
    worse = good._replace(
        candidate_probabilities=bad.candidate_probabilities, candidate_predicted=bad.candidate_predicted
    )
    for one in compare("out of fold", worse, LOOSE, store):
        assert one["difference"] < -0.1
        assert one["low"] < one["difference"]


def test_both_models_get_the_same_draws(store, quick):
    """What is hard for both models does not add to the standard error of their difference."""
    both = make_predictions("binary", cases=40)
    nearly = both._replace(
        champion_probabilities=np.clip(
            both.candidate_probabilities + np.random.default_rng(1).normal(0, 0.01, len(both.truth)), 0, 1
        )
    )
    apart, alike = compare("x", both, LOOSE, store)[0], compare("x", nearly, LOOSE, store)[0]
    assert alike["error"] < apart["error"] / 3


def test_too_few_cases(store):
    three_cases = make_predictions("binary", cases=3)._replace(rows=pd.DataFrame({"patient": ["a", "b", "c"] * 5}))
    of = np.array([0, 1, 1] * 5)
    few = three_cases._replace(truth=of)
    for one in compare("on the test side", few, LOOSE, store):
        assert not one["estimable"]
        assert one["reason"] == "two cases each are the least, but there are: benign 1"
        assert one["low"] is None


def test_a_comparison_with_little_power_is_not_estimable(store, quick):
    one = compare("x", make_predictions("binary", cases=6, skill=1.0), NonInferiorityRule(least_power=0.9), store)[0]
    assert not one["estimable"]
    assert "with 6 cases a version as good as the champion would pass in only" in one["reason"]
    assert one["low"] is not None


def test_a_difference_is_never_below_minus_one(store, quick, monkeypatch):
    """With few cases no critical value may hold, and the simulation then says the largest number there is."""
    none_holds = CriticalValue(value=1.8e308, size=0.0, standard_errors=(0.1,), powers=(0.02,))
    monkeypatch.setattr("ml.evaluation.comparison.find_critical_value", lambda *_: none_holds)
    for one in compare("x", make_predictions("binary", cases=6, skill=1.0), NonInferiorityRule(least_power=0.5), store):
        assert one["low"] == -1
        assert len(one["reason"]) < 200


def test_a_simulation_is_kept(store, quick, monkeypatch):
    first = find_critical_value("binary", "roc_auc", (4, 9), 0.9, 0.05, store)
    monkeypatch.setattr(comparison_simulation, "simulate_critical_value", lambda *_: pytest.fail("simulated again"))
    assert find_critical_value("binary", "roc_auc", (4, 9), 0.91, 0.05, store) == first


@pytest.mark.parametrize("metric", ["roc_auc", "macro_f1"])
def test_the_critical_value_holds_at_other_draws(metric):
    """A version worse by the margin passes in at most 5% of draws that the simulation has not seen."""
    counts, margin = (6, 16), 0.05
    found = simulate_critical_value("binary", metric, counts, 0.85, margin)
    assert found["value"] > 1.645  # more than with endless cases
    draws = 2000
    for share, like in ((0.2, 0.9), (0.8, 0.3)):
        world = SimulationScenario("binary", metric, counts, share, like)
        wrong = is_non_inferior(
            *world.simulate_differences(*world.find_signals(0.85, 0.85 - margin), draws, 999), found["value"], margin
        )
        assert wrong.mean() <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / draws)
        right = is_non_inferior(
            *world.simulate_differences(*world.find_signals(0.85, 0.85), draws, 998), found["value"], margin
        )
        assert right.mean() > wrong.mean()


def test_signals_give_the_levels_they_are_for():
    counts = (1, 5, 2, 4, 30, 3, 5, 4)
    assert len(counts) == len(SUBTYPES)
    assert label_of(SUBTYPES[0]) == "benign"
    for metric, level in (("roc_auc_ovr", 0.8), ("macro_f1", 0.5)):
        world = SimulationScenario("subtype", metric, tuple(40 * n for n in counts), 0.2, 0.5)
        same, worse = world.find_signals(level, level - 0.05)
        differences, _ = world.simulate_differences(same, worse, 3, 0)
        assert differences.mean() == pytest.approx(-0.05, abs=0.02)


def test_a_memo_that_the_simulation_cannot_have_given_is_simulated_again(store, quick, monkeypatch):
    arguments = ("binary", "roc_auc", (4, 4), 0.9, 0.05, store)
    known = find_critical_value(*arguments)
    memos = store.path("objects/memos/critical")
    (file,) = memos.iterdir()
    whole = json.loads(file.read_text())
    for harm in ({"value": 0.0}, {"value": 1.6}, {"value": math.nan}, {"powers": []}, {"errors": None}, {"size": "0"}):
        file.write_text(json.dumps(whole | harm))
        assert find_critical_value(*arguments) == known
    assert known.value >= 1.6448


def test_the_decision_simulates_again_and_keeps_a_correct_result(store, quick, tmp_path):
    """A memo that somebody wrote is used where it is the same but for the last digits; else it is replaced."""
    settings = Settings(home=tmp_path, store=store.root, audit_key="secret")
    arguments = ("binary", "roc_auc", (4, 9), 0.9, 0.05)
    plain = find_critical_value(*arguments, store)
    (file,) = store.path("objects/memos/critical").iterdir()
    whole = json.loads(file.read_text())
    for harm, kept in (({"value": whole["value"] + 1e-6}, True), ({"value": 1.7, "powers": [0.9] * 9}, False)):
        file.write_text(json.dumps(whole | harm))
        for sealed in store.path("objects/memos").glob("critical-sealed/*"):
            sealed.unlink()
        found = find_critical_value(*arguments, SealedMemos(store, settings, have_equal_results))
        assert found.value == ((whole | harm)["value"] if kept else plain.value)
        assert find_critical_value(*arguments, store) == found
