import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml.errors import ConfigError
from ml.gates import REQUIRED_FLOORS, Policy, judge_evidence, load_policy, review_body
from ml.settings import PROJECT
from ml.taxonomy import SIDES, classes


def evidence(task="binary", **changes):
    made = {
        "id": "evidence-0123456789ab",
        "model": f"made-{task}",
        "version": 3,
        "task": task,
        "metrics": {"roc_auc": 0.9, "roc_auc_ovr": 0.9, "macro_f1": 0.8, "accuracy": 0.85},
        "weights": {"id": "weights-0", "kind": "imagenet"},
        "absent_classes": [],
        "sides": {side: {"images": 10, "cases": 2} for side in sorted(SIDES)},
        "dataset": "dataset-0",
        "split": "split-0",
        "sources": {"made": "version-0"},
        "per_class": {
            name: {"recall": 0.8, "precision": 0.7, "f1": 0.75, "support": 5.0} for name in sorted(classes(task))
        },
    }
    return made | changes


def policy(**floors):
    return Policy(name="p", binary={"roc_auc": 0.85, "macro_f1": 0.7} | floors)


def test_all_gates_pass():
    verdict = judge_evidence(evidence(), policy())
    assert verdict["passed"]
    assert [g["name"] for g in verdict["gates"]] == [
        "ROC AUC",
        "macro-F1",
        "pretrained weights",
        "split by case",
        "every class in the test side",
    ]
    assert verdict["gates"][0]["distance"] == pytest.approx(0.05)


def test_a_failing_gate_says_by_how_much():
    verdict = judge_evidence(evidence(), policy(roc_auc=0.999))
    assert not verdict["passed"]
    assert "ROC AUC 0.9000 is 0.0990 short of 0.999" in verdict["summary"]
    assert "blocked by 1 of 5 gates" in verdict["summary"]


@pytest.mark.parametrize(("group", "passed"), [("case", True), ("slide", False)])
def test_only_a_split_by_case_can_lead_to_promotion(group, passed):
    verdict = judge_evidence(evidence(split_method="sgkf", split_group=group), policy())
    assert verdict["passed"] is passed
    assert ("the split is by slide; only a split by case can lead to promotion" in verdict["summary"]) is not passed
    body = review_body(evidence(split_method="sgkf", split_group=group), verdict, None, {})
    assert f"split-0, by {group} with the method sgkf." in body


def test_evidence_of_old_was_by_case():
    assert judge_evidence(evidence(), policy())["passed"]
    assert "split-0, by case." in review_body(evidence(), judge_evidence(evidence(), policy()), None, {})


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "0.99"])
def test_what_is_no_number_blocks(value):
    metrics = {"roc_auc": value, "macro_f1": 0.8}
    assert not judge_evidence(evidence(metrics=metrics), policy())["passed"]


@pytest.mark.parametrize("task", ["binary", "subtype"])
def test_an_empty_policy_blocks(task):
    verdict = judge_evidence(evidence(task), Policy(name="empty"))
    assert not verdict["passed"]
    assert sum("sets no" in g["reason"] for g in verdict["gates"]) == len(REQUIRED_FLOORS[task])


def test_a_policy_that_cannot_be_read_blocks_with_the_reason():
    verdict = judge_evidence(evidence(), ConfigError("policies/x.yaml: no such file"))
    assert not verdict["passed"]
    assert "policies/x.yaml: no such file" in verdict["summary"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing\n",
        "- a\n",
        "name: p\nbinary: {magic: 0.5}\n",
        "name: p\nfloor: 1\n",
        "name: p\nbinary: {roc_auc: .nan}\n",
    ],
)
def test_files_that_are_no_policy(tmp_path, text):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"p\.yaml"):
        load_policy(str(tmp_path / "p.yaml"), tmp_path)


def test_random_weights_and_absent_classes():
    random = evidence(weights={"id": "w", "kind": "random"}, absent_classes=["PT"])
    failing = [g["name"] for g in judge_evidence(random, policy())["gates"] if not g["passed"]]
    assert failing == ["pretrained weights", "every class in the test side"]
    lenient = Policy(name="p", binary={"roc_auc": 0, "macro_f1": 0}, pretrained_weights=False, absent_classes="allow")
    assert judge_evidence(random, lenient)["passed"]


@given(st.floats(0, 1), st.floats(0, 1))
def test_a_floor_passes_exactly_at_and_above_the_limit(value, limit):
    metrics = {"roc_auc": value, "macro_f1": 1.0}
    assert judge_evidence(evidence(metrics=metrics), policy(roc_auc=limit, macro_f1=0))["passed"] == (value >= limit)


def test_shipped_policies():
    conf = PROJECT / "dags"
    default = load_policy("default", conf)
    assert default.floors("binary") == {"roc_auc": 0.853, "macro_f1": 0.737}
    assert default.floors("subtype") == {"macro_f1": 0.327, "roc_auc_ovr": 0.75}
    assert default.pretrained_weights
    demo = load_policy("demo", conf)
    assert demo.floors("binary") == {"roc_auc": 0.75, "macro_f1": 0.35}
    assert not demo.pretrained_weights
    for file in Path(conf / "policies").glob("*.yaml"):
        assert load_policy(file.stem, conf).name == file.stem


def test_the_review_says_what_would_replace_what():
    candidate = evidence(weights={"id": "w", "kind": "random"}, absent_classes=["PT"])
    verdict = judge_evidence(candidate, policy())
    champion = evidence(version=2, metrics={"roc_auc": 0.95})
    body = review_body(candidate, verdict, champion, {"MLflow": "http://localhost/x"})
    assert "in place of version 2" in body
    assert "| ROC AUC | 0.9000 |  | 0.9500 | -0.0500 |" in body
    assert "Random backbone weights" in body
    assert "FAILED" in body
    assert "no test image:** PT" in body
    assert "[MLflow](http://localhost/x)" in body
    assert "evidence-0123456789ab" in body
    assert body.index("| train |") < body.index("| validation |") < body.index("| test |")
    assert "no champion yet" in review_body(candidate, verdict, None, {})
