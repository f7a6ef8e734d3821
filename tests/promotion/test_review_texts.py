from typing import Any

from ml.core.store import Json
from ml.promotion.gates import judge_evidence
from ml.promotion.policies import Policy
from ml.promotion.review_texts import format_review_body, format_rollback_body
from ml.promotion.reviews import parse_bundle_id
from tests.helpers.made_up import evidence


def bundle(policy: Policy, champion: Json | None = None, **changes: Any) -> Json:
    candidate = evidence(**changes)
    verdict = judge_evidence(candidate, policy)
    made = {"evidence_id": candidate["id"], "evidence": candidate, "champion": champion, "comparison": None}
    return made | verdict


STRICT = Policy(name="p", binary={"roc_auc": 0.95, "macro_f1": 0.7})


def test_the_review_says_what_would_replace_what() -> None:
    champion = evidence(version=2, metrics={"roc_auc": 0.95, "ece": 0.1})
    metrics = {"roc_auc": 0.9, "macro_f1": 0.8, "ece": 0.05}
    changes = {"weights": {"id": "w", "kind": "random"}, "absent_classes": ["PT"], "metrics": metrics}
    body = format_review_body(bundle(STRICT, champion, **changes), "bundle-0", {"MLflow": "http://localhost/x"})
    assert "in place of version 2" in body
    assert "| ROC AUC | 0.9000 |  | 0.9500 | -0.0500 |" in body
    assert "Random backbone weights" in body
    assert "FAILED" in body
    assert "no test image:** PT" in body
    assert "[MLflow](http://localhost/x)" in body
    assert "evidence-0123456789ab" in body
    assert "judged as `bundle-0` (SHA-256 `" in body
    assert body.index("| train |") < body.index("| validation |") < body.index("| test |")
    worse = body[body.index("### What got worse") : body.index("### Gates")]
    assert "ROC AUC 0.9500 → 0.9000" in worse
    assert "ECE" not in worse  # less is better
    assert "no champion yet" in format_review_body(bundle(STRICT), "bundle-0", {})


def test_the_split_is_told() -> None:
    assert "split-0, by case." in format_review_body(bundle(STRICT), "b", {})
    assert "split-0, by slide with the method sgkf." in format_review_body(
        bundle(STRICT, split_method="sgkf", split_group="slide"), "b", {}
    )


def test_the_comparison_and_its_warnings_are_told() -> None:
    pair = {
        "metric": "roc_auc",
        "where": "out of fold",
        "images": 100,
        "cases": 57,
        "champion": 0.9,
        "candidate": 0.91,
        "difference": 0.01,
        "low": -0.02,
        "size": 0.046,
        "power": 0.6,
    }
    made = bundle(STRICT, evidence(version=2)) | {
        "comparison": {"version": 2, "pairs": [pair, {**pair, "where": "on the test side", "difference": None}]},
        "warnings": ["too few cases"],
    }
    body = format_review_body(made, "b", {})
    assert "| ROC AUC, out of fold | 100 (57) | 0.9000 | 0.9100 | +0.0100 | -0.0200 | 4.6% | 60% |" in body
    assert "| ROC AUC, on the test side | 100 (57) | | | not estimable | | | |" in body
    assert "> - ⚠ too few cases" in body


def test_a_review_leads_to_its_page_and_to_the_report() -> None:
    body = format_review_body(bundle(STRICT), "bundle-0123456789ab", {"MLflow": "http://localhost/x"})
    assert "](/breakhis/reviews/bundle-0123456789ab/)" in body
    assert "](/breakhis/reviews/bundle-0123456789ab/candidate/report.html)" in body
    assert parse_bundle_id(body) == "bundle-0123456789ab"


def test_a_rollback_leads_to_what_both_were_approved_on() -> None:
    old, now = evidence(version=1), evidence(version=2)
    body = format_rollback_body(
        old, "evidence-0123456789ab", now, "fails on 400X", {1: "bundle-111111111111", 2: "bundle-222222222222"}
    )
    assert "[What version 1 was approved on](/breakhis/reviews/bundle-111111111111/)" in body
    assert "[What version 2 was approved on](/breakhis/reviews/bundle-222222222222/)" in body
    assert parse_bundle_id(body) == "bundle-111111111111"


def test_a_reason_cannot_name_the_bundle() -> None:
    forged = "judged as `bundle-666666666666`. Your answer is"
    assert parse_bundle_id(
        format_rollback_body(evidence(version=1), "evidence-0123456789ab", None, forged, {1: "bundle-111111111111"})
    ) == ("bundle-111111111111")
    assert parse_bundle_id(format_rollback_body(evidence(version=1), "evidence-0123456789ab", None, forged, {})) is None
    assert parse_bundle_id(None) is None
    assert parse_bundle_id("see bundle-666666666666") is None


def test_the_bundle_is_told_by_the_last_words_alone() -> None:
    own, forged = "bundle-0123456789ab", "bundle-ba9876543210"
    words = f"judged as `{forged}` (SHA-256 `{'0' * 64}`). Your answer is recorded."
    body = format_review_body(bundle(STRICT, absent_classes=[words]), own, {words: words})
    assert forged in body
    assert parse_bundle_id(body) == own
    assert parse_bundle_id(format_rollback_body(evidence(), "evidence-0123456789ab", None, words, {})) is None
    assert parse_bundle_id(None) is None
