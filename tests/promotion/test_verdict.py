"""The verdict: what a reviewer reads first, in three planted cases and on evidence of earlier releases."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml.core.store import Json
from ml.core.taxonomy import LABELS, SUBTYPES, class_names, label_of
from ml.evaluation.metric_names import CLINICAL_ORDER, METRIC_NAMES
from ml.promotion.gates import count_outcomes
from ml.promotion.verdict import Verdict, describe_errors, give_verdict, list_regressions, rank_clinically
from tests.helpers.made_up import evidence


def bundle(candidate: Json, champion: Json | None = None, **changes: Any) -> Json:
    made = {"evidence": candidate, "champion": champion, "comparison": None, "gates": [], "warnings": []}
    return made | changes


def text(verdict: Verdict, title: str) -> str:
    return next(line.text for line in verdict.lines if line.title == title)


def of_binary(missed: int, of: int, false_alarms: int = 1, benign: int = 6, **changes: Any) -> Json:
    """Evidence of a binary model, with so many errors of patients and ten times as many of images."""
    cases = [[benign - false_alarms, false_alarms], [missed, of - missed]]
    metrics = {"patient_recall": 1 - missed / of, "patient_specificity": 1 - false_alarms / benign, "roc_auc": 0.9}
    confusions = {"cases": cases, "images": (10 * np.array(cases)).tolist()}
    return evidence(metrics=metrics | changes.pop("metrics", {}), confusions=confusions, **changes)


def test_one_more_missed_cancer_is_the_first_thing_that_is_told():
    verdict = give_verdict(bundle(of_binary(1, 6, version=4), of_binary(0, 6)))
    first = verdict.lines[0]
    assert first.title == "Cancers missed"
    assert (
        first.text
        == "1 of 6 malignant patients (champion 0 of 6, +1); 10 of 60 malignant images (champion 0 of 60, +10)."
    )
    assert first.is_worse
    assert not verdict.lines[1].is_worse
    assert verdict.warnings[0] == (
        "Worse than the champion by more than the margin of 0.05: recall (sensitivity) of patients 1.000 → 0.833"
    )


def of_subtypes(recognised: dict[str, int], **changes: Any) -> Json:
    """Evidence of a subtype model that has two test cases of each, of which so many are recognised."""
    scores = {"recall": 0.5, "precision": 0.5, "f1": 0.5, "support": 8.0, "cases": 2}
    per_class = {name: scores | {"recognised": recognised.get(name, 2)} for name in SUBTYPES}
    return evidence("subtype", per_class=per_class, **changes)


def test_a_rare_subtype_that_is_lost_is_named_with_its_cases():
    verdict = give_verdict(bundle(of_subtypes({"LC": 0}), of_subtypes({"LC": 1})))
    line = verdict.lines[2]
    assert line.text == "LC lobular carcinoma (2 cases; the champion recognised 1 of 2)."
    assert line.is_worse
    assert text(give_verdict(bundle(of_subtypes({}))), "Subtypes never recognised") == "none of the 8 on the test side."


def test_better_on_too_few_patients_says_how_sure_one_can_be():
    pair = {"difference": 0.02, "estimable": True, "power": 0.62}
    untold = {"difference": 0.01, "estimable": False, "power": 0.12}
    candidate = of_binary(0, 4, intervals={"patient_recall": [0.4, 1.0], "patient_specificity": [0.5, 0.9]})
    verdict = give_verdict(bundle(candidate, of_binary(1, 4), comparison={"pairs": [pair, untold]}))
    assert text(verdict, "How sure") == (
        "recall (sensitivity) of patients is 1.00, and with other patients could have been anything from 0.40 to 1.00; "
        "a version exactly as good as the champion would pass the weakest comparison in 12% of cases, and 1 of 2 "
        "comparisons could not be told."
    )


@pytest.mark.parametrize(
    ("comparison", "told"),
    [
        (None, "there is no champion to compare with"),
        ({"pairs": []}, "nothing could be compared with the champion"),
        ({"pairs": [{"difference": None, "power": None}]}, "nothing could be compared with the champion"),
    ],
)
def test_what_cannot_be_compared(comparison, told):
    candidate = of_binary(0, 4)
    line = text(give_verdict(bundle(candidate, comparison=comparison)), "How sure")
    assert line.endswith(f"{told}.")
    assert line.startswith("no interval tells how sure recall (sensitivity) of patients or specificity of patients is")


def test_a_patient_of_another_malignant_subtype_is_no_missed_cancer():
    matrix = np.zeros((8, 8), int)
    matrix[SUBTYPES.index("DC"), SUBTYPES.index("LC")] = 2  # called another cancer
    matrix[SUBTYPES.index("DC"), SUBTYPES.index("F")] = 1  # called benign
    matrix[SUBTYPES.index("A"), SUBTYPES.index("A")] = 4
    confusions = {"cases": matrix.tolist(), "images": matrix.tolist()}
    missed, alarms = describe_errors(evidence("subtype", confusions=confusions), None)
    assert missed.text == "1 of 3 malignant patients; 1 of 3 malignant images."
    assert alarms.text == "0 of 4 benign patients; 0 of 4 benign images."


def test_evidence_of_earlier_releases_says_what_it_knows():
    counted = {name: {"recall": 0.8, "precision": 0.7, "f1": 0.75, "support": 5.0} for name in LABELS}
    missed, _ = describe_errors(evidence(per_class=counted), None)
    assert missed.text == "1 of 5 malignant images."
    for scores in counted.values():
        scores |= {"cases": 3, "recognised": 2}
    missed, _ = describe_errors(evidence(per_class=counted), evidence())
    assert (
        missed.text
        == "1 of 3 malignant patients (champion: not recorded); 1 of 5 malignant images (champion 1 of 5, +0)."
    )
    for line in describe_errors(evidence("subtype"), None):
        assert "not recorded of this version" in line.text
    assert "not recorded" in text(give_verdict(bundle(evidence())), "Subtypes never recognised")


def test_gates_that_could_not_be_told_have_not_passed():
    gates = [
        {"name": "ROC AUC", "passed": True, "warning": ""},
        {"name": "ROC AUC out of fold, not worse than the champion (version 2)", "passed": True, "warning": "too few"},
        {"name": "isolation of the champion (version 2)", "passed": True, "warning": "it ran as root"},
        {"name": "macro-F1", "passed": False, "warning": ""},
    ]
    assert count_outcomes(gates) == "2 passed, 1 could not be told, 1 failed"
    assert (
        give_verdict(bundle(of_binary(0, 4), gates=gates)).lines[-1].text == "2 passed, 1 could not be told, 1 failed."
    )


def test_warnings_are_one_list_with_the_worst_first():
    candidate = of_binary(
        3, 6, false_alarms=3, metrics={"roc_auc": 0.5, "accuracy": 0.1}, weights={"id": "w", "kind": "random"}
    )
    made = bundle(
        candidate | {"absent_classes": ["benign"]}, of_binary(0, 6, metrics={"accuracy": 0.9}), warnings=["last"]
    )
    warnings = give_verdict(made).warnings
    assert "recall (sensitivity) of patients 1.000 → 0.500" in warnings[0]
    assert "specificity of patients" in warnings[1]
    assert warnings[3] == "1 further figures are worse by more than the margin, too"
    assert warnings[4].startswith("Random backbone weights")
    assert warnings[5].startswith("Not measured, since no test image shows it: benign")
    assert warnings[6] == "last"


def test_every_metric_has_its_place():
    assert set(CLINICAL_ORDER) == set(METRIC_NAMES)
    assert sorted(METRIC_NAMES, key=rank_clinically)[:2] == ["patient_recall", "recall"]
    assert rank_clinically("recall", "LC") < rank_clinically("recall", "A")


@given(
    st.sampled_from(["binary", "subtype"]).flatmap(
        lambda task: st.tuples(
            st.just(task),
            st.lists(st.integers(0, 50), min_size=len(class_names(task)) ** 2, max_size=len(class_names(task)) ** 2),
        )
    )
)
def test_every_case_is_an_error_of_one_kind_at_most(made):
    task, cells = made
    n = len(class_names(task))
    matrix = np.array(cells).reshape(n, n)
    confusions = {"cases": matrix.tolist(), "images": matrix.tolist()}
    lines = describe_errors(evidence(task, confusions=confusions), None)
    counts = [[int(word) for word in line.text.replace(",", "").split() if word.isdigit()] for line in lines]
    is_malignant = np.array(
        [(name if task == "binary" else label_of(name)) == "malignant" for name in class_names(task)]
    )
    assert counts[0][1] + counts[1][1] == matrix.sum()
    assert counts[0][0] == matrix[is_malignant][:, ~is_malignant].sum()
    assert counts[1][0] == matrix[~is_malignant][:, is_malignant].sum()


def test_of_a_binary_model_nothing_is_told_twice():
    metrics = {"recall": 0.5, "specificity": 0.9}
    worse = list_regressions(evidence(metrics=metrics), evidence(metrics={"recall": 0.9, "specificity": 0.95}), 0.1)
    assert [(one.metric, one.of_class, one.is_beyond_margin) for one in worse] == [
        ("recall", "", True),
        ("specificity", "", False),
    ]
