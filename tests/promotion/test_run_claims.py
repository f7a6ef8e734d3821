"""What a run says of itself is refused, or reaches a reviewer as text that does nothing."""

import copy
import json
from datetime import timedelta

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ml.core.errors import Refused
from ml.core.taxonomy import SUBTYPES
from ml.evaluation.decision_rule import DecisionRule
from ml.evaluation.evaluation import evaluate
from ml.evaluation.report import render_model_card
from ml.evaluation.scores import LabelledPredictions
from ml.promotion.gates import judge_evidence
from ml.promotion.policies import Policy
from ml.promotion.review_texts import format_review_body, format_rollback_body
from ml.promotion.run_claims import check_evaluation, check_tags, parse_dag_runs
from tests.helpers import made_up
from tests.helpers.hostile_text import HOSTILE, STORABLE, read_structure

POLICY = Policy(name="p", binary={"roc_auc": 0.5, "macro_f1": 0.5}, slices={"binary": {"source": {"accuracy": 0.1}}})
TAGS = {
    "set": "made",
    "task": "binary",
    "dataset": "dataset-0123456789ab",
    "split": "split-0123456789ab",
    "weights": "weights-0123456789ab",
    "weights_kind": "imagenet",
    "ledger": "made",
    "preset": "demo",
    "seed": "0",
    "code_sha256": "0" * 64,
    "dag_runs": '[["retrain_made", "manual__2026-01-01T00:00:00+00:00"]]',
}


def make_evaluation():
    """Returns the metrics.json of a run in which everything occurs: intervals, notes of each kind, slices."""
    rows = made_up.manifest_rows(made_up.every_class(cases_per_class=2, images=2)).sample(frac=1, random_state=0)
    rows = rows.reset_index(drop=True)
    truth = (rows["label"] == "malignant").to_numpy(dtype=np.int64)
    noise = np.random.default_rng(0).normal(0, 0.3, len(rows))
    scores = LabelledPredictions("binary", rows, truth, np.clip(truth + noise, 0, 1), DecisionRule(threshold=0.5))
    evaluation = evaluate(scores, draws=20).to_json()
    evaluation["interval_notes"] = {"mcc": "no interval: every draw of patients gives the same"}
    return json.loads(json.dumps(evaluation))


EVALUATION = make_evaluation()
CLAIMED = ("metrics", "intervals", "interval_notes", "per_class", "absent_classes", "slices")


def list_places(value, path=()):
    """Yields the path of every value and, as (*path, key, None), of every key of nested JSON."""
    yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield (*path, key, None)
            yield from list_places(item, (*path, key))
    elif isinstance(value, list):
        for k, item in enumerate(value):
            yield from list_places(item, (*path, k))


def put(value, path, new):
    """Returns a copy of nested JSON with another value, or another key, at a path."""
    changed = copy.deepcopy(value)
    *above, last = path[:-1] if path[-1] is None else path
    parent = changed
    for key in above:
        parent = parent[key]
    if path[-1] is None:
        parent[str(new)] = parent.pop(last)
    else:
        parent[last] = new
    return changed


PLACES = sorted({place for key in CLAIMED for place in list_places(EVALUATION[key], (key,))}, key=str)


def write_texts(evaluation):
    """Returns all that is written of a version for people: both reviews, and the model card."""
    facts = {key: evaluation[key] for key in CLAIMED}
    evidence = made_up.evidence(**facts)
    bundle = {"evidence_id": evidence["id"], "evidence": evidence, "champion": None, "comparison": None}
    bundle |= judge_evidence(evidence, POLICY)
    card_facts = {**evidence, "set": "made", "preset": "demo", "seed": 0, "run_id": "0", "weights_kind": "file"}
    card_facts |= {"split_group": "case", "sources": {"made": {"version": "version-0"}}}
    return (
        format_review_body(bundle, "bundle-0123456789ab", {}),
        format_rollback_body(evidence, "evidence-0123456789ab", evidence, "reason", {}),
        render_model_card(evidence, card_facts),
    )


STRUCTURES = [read_structure(text) for text in write_texts(EVALUATION)]


def test_what_our_own_code_writes_is_accepted():
    check_evaluation("v", EVALUATION, "binary")
    check_tags("v", {f"breakhis.{key}": value for key, value in TAGS.items()})
    assert EVALUATION["slices"].keys() == {"magnification", "source", "subtype"}
    notes = [one["note"] for one in EVALUATION["per_class"].values()]
    notes += [note for one in EVALUATION["slices"]["subtype"].values() for note in one["interval_notes"].values()]
    assert any(notes)


@settings(max_examples=300, deadline=timedelta(seconds=5))
@given(place=st.sampled_from(PLACES), text=HOSTILE)
@example(place=("interval_notes", "mcc"), text="[read this](https://bad.example)")
@example(place=("slices", "source", "made", None), text="![x](https://bad.example/x.png)")
@example(place=("per_class", "benign", "note"), text="<img src=x>")
def test_no_text_of_an_evaluation_becomes_more_than_text(place, text):
    changed = put(EVALUATION, place, text)
    try:
        check_evaluation("v", changed, "binary")
    except Refused:
        return
    assert [read_structure(written) for written in write_texts(changed)] == STRUCTURES


@pytest.mark.parametrize("written", [0, 1, 2])
@settings(max_examples=100, deadline=timedelta(seconds=5))
@given(text=STORABLE)
def test_a_note_that_was_accepted_would_be_text_all_the_same(written, text):
    """The second of two locks: where the schema lets something through, it is escaped."""
    changed = put(EVALUATION, ("interval_notes", "mcc"), text)
    assert read_structure(write_texts(changed)[written]) == STRUCTURES[written]


_WRONG = st.one_of(
    HOSTILE, st.none(), st.booleans(), st.just([]), st.just({}), st.floats(2.1), st.floats(max_value=-1.1)
)


@settings(max_examples=200, deadline=timedelta(seconds=5))
@given(place=st.sampled_from([place for place in PLACES if isinstance(place[-1], str | int)]), wrong=_WRONG)
def test_a_number_is_a_number_within_its_range(place, wrong):
    value = EVALUATION
    for key in place:
        value = value[key]
    if not isinstance(value, float) or place[-1] == "support":
        return
    with pytest.raises(Refused, match=r"v: its metrics\.json "):
        check_evaluation("v", put(EVALUATION, place, wrong), "binary")


@pytest.mark.parametrize("evaluation", [None, [], "text", 1, {}, {"metrics": []}, {"metrics": {}, "per_class": []}])
def test_what_is_no_evaluation_at_all(evaluation):
    with pytest.raises(Refused, match=r"its metrics\.json"):
        check_evaluation("v", evaluation, "binary")


def test_a_subtype_model_has_no_slices_of_subtypes():
    scores = {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 1.0}
    evaluation = {"metrics": {}, "per_class": dict.fromkeys(SUBTYPES, scores), "absent_classes": []}
    check_evaluation("v", evaluation, "subtype")
    with pytest.raises(Refused, match=r"slices\.subtype: a subtype model has none"):
        check_evaluation("v", {**evaluation, "slices": {"subtype": {"DC": {}}}}, "subtype")


@settings(max_examples=200)
@given(key=st.sampled_from(sorted(TAGS.keys() - {"dag_runs"})), text=HOSTILE)
@example(key="preset", text="demo\n")
def test_a_tag_is_of_its_kind(key, text):
    if key == "seed" and text.lstrip("-").isdigit():
        return
    tags = {f"breakhis.{name}": value for name, value in {**TAGS, key: text}.items()}
    try:
        check_tags("v", tags)
    except Refused:
        with pytest.raises(Refused, match=rf"the run's tag breakhis\.{key} "):
            check_tags("v", tags)
        return
    assert text.isascii()
    assert text.replace("-", "").replace("_", "").isalnum()


def test_a_missing_tag_is_named():
    for key in TAGS.keys() - {"dag_runs", "code_sha256"}:
        tags = {f"breakhis.{name}": value for name, value in TAGS.items() if name != key}
        with pytest.raises(Refused, match=f"tag breakhis.{key} cannot be used: Field required"):
            check_tags("v", tags)


@pytest.mark.parametrize(
    "text",
    ["{", "[1]", '[["a"]]', '[["a", 1]]', '{"a": "b"}', '[["a", "b\\n"]]', json.dumps([["a", "b"]] * 101), "[" * 99999],
)
def test_what_names_no_runs(text):
    with pytest.raises(Refused, match=r"breakhis\.dag_runs does not name runs"):
        parse_dag_runs("v", {"breakhis.dag_runs": text})
