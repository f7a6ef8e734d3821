import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml.core.errors import ConfigError
from ml.core.taxonomy import MAGNIFICATIONS, SUBTYPES
from ml.evaluation.metric_names import GATED_METRICS
from ml.promotion.gates import judge_evidence
from ml.promotion.policies import Policy
from tests.helpers.made_up import evidence


def policy(**limits):
    return Policy(name="p", binary={"roc_auc": 0.85, "macro_f1": 0.7} | limits)


def failing(verdict):
    return [gate["name"] for gate in verdict["gates"] if not gate["passed"]]


def test_all_gates_pass():
    verdict = judge_evidence(evidence(), policy())
    assert verdict["passed"]
    assert [g["name"] for g in verdict["gates"]] == [
        "ROC AUC",
        "macro-F1",
        "every class recognised at least once",
        "every class in the test side",
        "report",
        "model card",
        "validated dataset",
        "pretrained weights",
        "split by case",
    ]
    assert verdict["gates"][0]["distance"] == pytest.approx(0.05)


def test_a_failing_gate_says_by_how_much():
    verdict = judge_evidence(evidence(), policy(roc_auc=0.999))
    assert not verdict["passed"]
    assert "ROC AUC 0.9000 is 0.0990 short of 0.999" in verdict["summary"]
    assert "blocked by 1 of 9 gates" in verdict["summary"]


@pytest.mark.parametrize(("group", "passed"), [("case", True), ("slide", False)])
def test_only_a_split_by_case_can_lead_to_promotion(group, passed):
    verdict = judge_evidence(evidence(split_method="sgkf", split_group=group), policy())
    assert verdict["passed"] is passed
    assert ("the split is by slide; only a split by case can lead to promotion" in verdict["summary"]) is not passed


def test_evidence_of_old_was_by_case():
    assert judge_evidence(evidence(), policy())["passed"]


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "0.99"])
def test_what_is_no_number_blocks(value):
    metrics = {"roc_auc": value, "macro_f1": 0.8}
    assert not judge_evidence(evidence(metrics=metrics), policy())["passed"]


@pytest.mark.parametrize("task", ["binary", "subtype"])
def test_an_empty_policy_blocks(task):
    verdict = judge_evidence(evidence(task), Policy(name="empty"))
    assert not verdict["passed"]
    assert sum("sets no" in g["reason"] for g in verdict["gates"]) == len(GATED_METRICS[task])


def test_a_policy_that_cannot_be_read_blocks_with_the_reason():
    verdict = judge_evidence(evidence(), ConfigError("policies/x.yaml: no such file"))
    assert not verdict["passed"]
    assert "policies/x.yaml: no such file" in verdict["summary"]


def test_random_weights_and_absent_classes():
    random = evidence(weights={"id": "w", "kind": "random"}, absent_classes=["PT"])
    failing = [g["name"] for g in judge_evidence(random, policy())["gates"] if not g["passed"]]
    assert failing == ["every class in the test side", "pretrained weights"]
    lenient = Policy(name="p", binary={"roc_auc": 0.1, "macro_f1": 0.1}, require=("report",), absent_classes="allow")
    assert judge_evidence(random, lenient)["passed"]


@given(st.floats(0, 1), st.floats(0, 1, exclude_min=True))
def test_a_floor_passes_exactly_at_and_above_the_limit(value, limit):
    metrics = {"roc_auc": value, "macro_f1": 1.0}
    assert judge_evidence(evidence(metrics=metrics), policy(roc_auc=limit, macro_f1=0.1))["passed"] == (value >= limit)


def test_an_upper_limit():
    limited = policy(ece={"at_most": 0.1})
    assert judge_evidence(evidence(metrics={"roc_auc": 0.9, "macro_f1": 0.8, "ece": 0.1}), limited)["passed"]
    verdict = judge_evidence(evidence(metrics={"roc_auc": 0.9, "macro_f1": 0.8, "ece": 0.125}), limited)
    assert "calibration error, ECE (0 is best) 0.1250 is 0.0250 above 0.1" in verdict["summary"]


@pytest.mark.parametrize(("draws", "passes"), [({"draws": 500}, True), ({"draws": 499}, False), ({}, False)])
def test_an_interval_of_few_draws_tells_nothing(draws, passes):
    """A run chooses how many it makes, and 8 make an interval narrow; before, their number was not recorded."""
    limited = Policy(
        name="p",
        binary={"roc_auc": {"at_least": 0.5, "of": "interval"}, "macro_f1": 0.5},
        slices={"binary": {"source": {"roc_auc": {"at_least": 0.5, "of": "interval"}}}},
    )
    ends = {"intervals": {"roc_auc": [0.8, 0.9]}}
    scores = {"images": 5, "cases": 2, "recognised": 1, "metrics": {"roc_auc": 0.85}} | ends
    verdict = judge_evidence(evidence(**ends, slices={"source": {"made": scores}}, **draws), limited)
    names = [f"ROC AUC{of}, lower end of its 95% interval" for of in ("", " of source made")]
    assert failing(verdict) == ([] if passes else names)
    number = draws.get("draws", "unknown")
    assert (f"could not be computed (an interval of {number} draws; 500 tell it" in verdict["summary"]) is not passes


def test_a_limit_on_the_interval_is_on_its_worse_end():
    limited = policy(macro_f1={"at_least": 0.7, "of": "interval"}, ece={"at_most": 0.1, "of": "interval"})
    metrics = {"roc_auc": 0.9, "macro_f1": 0.8, "ece": 0.05}
    good = evidence(metrics=metrics, intervals={"macro_f1": [0.7, 0.9], "ece": [0.01, 0.1]}, draws=500)
    assert judge_evidence(good, limited)["passed"]
    bad = evidence(metrics=metrics, intervals={"macro_f1": [0.69, 0.9], "ece": [0.01, 0.11]}, draws=500)
    assert failing(judge_evidence(bad, limited)) == [
        "macro-F1, lower end of its 95% interval",
        "calibration error, ECE (0 is best), upper end of its 95% interval",
    ]
    none = evidence(metrics=metrics, draws=500)
    assert len(failing(judge_evidence(none, limited))) == 2  # no interval is no evidence
    facts = {"intervals": {"ece": [0, 0]}, "interval_notes": {"macro_f1": "why"}, "draws": 500}
    same = evidence(metrics={**metrics, "macro_f1": 1.0}, **facts)
    assert "lower end of its 95% interval could not be computed (why)" in judge_evidence(same, limited)["summary"]


def test_every_slice_keeps_its_limit_and_a_missing_one_blocks():
    def limited(column, metric):
        slices = {"binary": {column: {metric: 0.7}}}
        return Policy(name="p", binary={"roc_auc": 0.85, "macro_f1": 0.7}, slices=slices)

    good = {str(m): {"metrics": {"roc_auc": 0.8}} for m in MAGNIFICATIONS}
    by_magnification = limited("magnification", "roc_auc")
    assert judge_evidence(evidence(slices={"magnification": good}), by_magnification)["passed"]
    worse = good | {"200": {"metrics": {"roc_auc": 0.6}}}
    verdict = judge_evidence(evidence(slices={"magnification": worse}), by_magnification)
    assert "ROC AUC of magnification 200X 0.6000 is 0.1000 short of 0.7" in verdict["summary"]
    missing = {key: one for key, one in good.items() if key != "400"}
    verdict = judge_evidence(evidence(slices={"magnification": missing}), by_magnification)
    assert "ROC AUC of magnification 400X: no test image" in verdict["summary"]
    one_class = good | {"40": {"metrics": {"accuracy": 1.0}}}
    assert not judge_evidence(evidence(slices={"magnification": one_class}), by_magnification)["passed"]
    assert len(failing(judge_evidence(evidence(), limited("subtype", "accuracy")))) == len(SUBTYPES)
    verdict = judge_evidence(evidence(), limited("source", "accuracy"))
    assert failing(verdict) == ["accuracy of source made"]


def test_a_class_that_is_never_recognised():
    def never(cases):
        scores = {"recall": 0.0, "precision": 0.0, "f1": 0.0, "support": 9.0, "cases": cases, "recognised": 0}
        return evidence(per_class={**evidence()["per_class"], "benign": scores})

    assert "never recognised: benign (2 cases)" in judge_evidence(never(2), policy())["summary"]
    assert judge_evidence(never(1), policy())["passed"]  # one case is no estimate
    allowed = Policy(name="p", binary={"roc_auc": 0.85, "macro_f1": 0.7}, zero_recall="allow")
    assert judge_evidence(never(2), allowed)["passed"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"artifacts": {"evaluation/report.html": "0"}}, "the run has no evaluation/model_card.md"),
        ({"artifacts": {"evaluation/model_card.md": "0"}}, "the run has no evaluation/report.html"),
        ({"validated": {}}, "not shown to have passed validation: made"),
        ({"validated": {"made": False}}, "not shown to have passed validation: made"),
    ],
)
def test_required_evidence(changes, reason):
    assert reason in judge_evidence(evidence(**changes), policy())["summary"]


@pytest.mark.parametrize("recall", [0.0, math.nan, None, "0.9"])
def test_zero_recall_blocks_whether_or_not_cases_are_told(recall):
    of_class = {"recall": recall, "precision": 0.7, "f1": 0.75, "support": 5.0}
    per_class = evidence()["per_class"] | {"malignant": of_class}
    assert (
        "never recognised: malignant (unknown cases)"
        in judge_evidence(evidence(per_class=per_class), policy())["summary"]
    )
    of_class["cases"] = 2
    assert "never recognised: malignant (2 cases)" in judge_evidence(evidence(per_class=per_class), policy())["summary"]
    del per_class["malignant"]
    assert "never recognised: malignant" in judge_evidence(evidence(per_class=per_class), policy())["summary"]


def test_only_known_kinds_of_weights_are_pretrained():
    kinds = {"imagenet": True, "file": True, "random": False, "whatever": False}
    for kind, passed in kinds.items():
        assert judge_evidence(evidence(weights={"id": "w", "kind": kind}), policy())["passed"] is passed


def pair(**changes):
    return {"metric": "roc_auc", "where": "out of fold", "low": -0.02, "difference": 0.0, "estimable": True} | changes


def test_the_comparison_is_a_gate():
    def judged(one, **rule):
        held = Policy(name="p", binary={"roc_auc": 0.85, "macro_f1": 0.7}, comparison=rule)
        comparison = {"version": 2, "comparable": True, "reason": "", "pairs": [one]}
        return judge_evidence(evidence(), held, comparison)

    assert judged(pair())["passed"]
    verdict = judged(pair(low=-0.08))
    assert "the difference is +0.0000 and may be as low as -0.0800" in verdict["summary"]
    assert "0.0300 beyond the margin of 0.05" in verdict["summary"]
    assert judged(pair(low=-0.08), margin=0.1)["passed"]
    unknown = pair(low=None, difference=None, estimable=False, reason="too few cases")
    verdict = judged(unknown)
    assert verdict["passed"]
    assert "not estimable: too few cases" in verdict["warnings"][0]
    assert "too few cases" in judged(unknown, not_estimable="block")["summary"]


@pytest.mark.parametrize(
    ("isolation", "told"),
    [
        ({}, None),  # no logged code had to run
        ({"isolation": "bubblewrap"}, None),
        ({"isolation": "unshare"}, None),
        ({"isolation": "user"}, "the network was not cut off"),
        ({"isolation": "none"}, "this machine allows no isolation"),
    ],
)
def test_logged_code_that_ran_with_little_isolation_is_a_warning(isolation, told):
    comparison = {"version": 2, "comparable": True, "reason": "", "pairs": [pair()]} | isolation
    verdict = judge_evidence(evidence(), policy(), comparison)
    assert verdict["passed"]
    assert len(verdict["warnings"]) == (told is not None)
    assert all("the champion (version 2) ran its logged code" in one and told in one for one in verdict["warnings"])


def test_without_a_comparison_the_reviewer_is_told():
    comparison = {"version": 2, "comparable": False, "reason": "another ledger", "pairs": []}
    verdict = judge_evidence(evidence(), policy(), comparison)
    assert verdict["passed"]
    assert verdict["warnings"] == ["another ledger"]
