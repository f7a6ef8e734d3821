"""A rejection is final for a version and its evidence, whatever somebody pauses, clears, deletes or runs again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml.core.errors import Refused
from ml.promotion.alias_history import ASKED, NOBODY_IN_TIME, REJECTED, find_rejection
from ml.promotion.judging import judge_version
from ml.promotion.registration import register_run
from tests.helpers.decisions import is_consistent, list_decisions, open_log, promote, read_aliases

FINAL = r"version 1 was rejected by reviewer on .*: not yet. That is final for this version and its evidence"


@pytest.fixture
def registered(world):
    return register_run(world.log_run(), world.store, world.settings)


@pytest.fixture
def asking(world):
    """The settings of a stage in a run of the DAG ``promote``."""
    return world.settings.model_copy(update={"dag": "promote", "dag_run": "asked-1"})


@pytest.mark.parametrize("run", ["made-binary-v1", "by hand"])
def test_neither_the_cleared_run_nor_another_one_undoes_it(world, airflow, registered, run):
    airflow.answer_promotion(registered, option="Reject", reason="not yet")
    promote(world, registered)
    airflow.answer_promotion(registered, at="2026-01-02T00:00:00Z")
    with pytest.raises(Refused, match=FINAL):
        promote(world, registered, run)
    assert read_aliases(world) == {}
    assert list_decisions(world) == [("rejected", 1, "reviewer")]


def test_training_another_version_is_the_way_on(world, airflow, registered):
    airflow.answer_promotion(registered, option="Reject", reason="not yet")
    promote(world, registered)
    second = register_run(world.log_run(auc=0.95), world.store, world.settings)
    airflow.answer_promotion(second)
    assert promote(world, second, "made-binary-v2")["decision"] == "approved"


@pytest.mark.parametrize("run", ["made-binary-v1", "paused"])
def test_one_that_was_not_carried_out_yet_is_carried_out_first(world, airflow, registered, run):
    """Somebody pauses the DAG after the answer, and has it reviewed again: in the same run, or in another one."""
    airflow.answer_promotion(registered, user="reviewer")
    airflow.reject_elsewhere(registered, run)
    done = promote(world, registered)
    assert (done["decision"], done["reason"]) == ("rejected", "blurred")
    assert read_aliases(world) == {}
    [record] = [r for r in open_log(world).read_model_records("made-binary") if r["event"] == REJECTED]
    assert record["run"] == f"promote/{run}"
    with pytest.raises(Refused, match=r"rejected by reviewer on .*: blurred"):
        promote(world, registered)
    assert is_consistent(world)


@pytest.mark.parametrize("written", ["1\n", " 1", 1, "+1", "01", "１"])
def test_another_way_to_write_the_version_hides_no_rejection(world, airflow, registered, written):
    """MLflow takes them all as the same number."""
    airflow.answer_promotion(registered)
    airflow.reject_elsewhere(registered | {"version": written}, "paused")
    assert promote(world, registered, "made-binary-v1")["decision"] == "rejected"


def test_its_own_run_then_finds_it_carried_out(world, airflow, registered):
    airflow.answer_promotion(registered)
    airflow.reject_elsewhere(registered, "paused")
    promote(world, registered)
    airflow.answer_promotion(registered, option="Reject", reason="blurred")
    assert promote(world, registered, "paused")["decision"] == "rejected"
    assert list_decisions(world) == [("rejected", 1, "reviewer")]


@pytest.mark.parametrize(
    "only", [{"option": "Approve"}, {"user": None, "reason": None}, {"reason": " "}, {"user": "engineer"}]
)
def test_what_is_no_rejection_elsewhere_ends_nothing(world, airflow, registered, only):
    airflow.answer_promotion(registered)
    airflow.reject_elsewhere(registered, "another", **only)
    assert promote(world, registered)["decision"] == "approved"


def test_one_of_another_version_ends_nothing(world, airflow, registered):
    airflow.answer_promotion(registered)
    airflow.reject_elsewhere(registered | {"version": 7}, "another")
    assert promote(world, registered)["decision"] == "approved"


@pytest.mark.parametrize("run", ["another", "made-binary-v1"])
@pytest.mark.parametrize("made_since", [[], ["review-2"]])
def test_a_review_that_was_deleted_may_have_held_one(world, airflow, registered, run, made_since):
    """With its run or alone; also where Airflow has a review of another id in its place, whatever else they share."""
    airflow.answer_promotion(registered)
    airflow.ask(registered, run, "review-1")
    airflow.reviews[run] = made_since
    with pytest.raises(Refused, match=f"asked about this version in run {run} as well, where the review was deleted"):
        promote(world, registered)
    assert read_aliases(world) == {"candidate": 1}


def test_reviewers_are_not_asked_again_after_a_review_was_deleted(world, airflow, registered, asking):
    airflow.answer_promotion(registered)
    airflow.ask(registered, "asked-1", "review-1")
    assert judge_version("made-binary", "1", world.store, asking, evidence=registered["evidence"])["passed"]
    airflow.reviews["asked-1"] = ["review-2"]
    with pytest.raises(Refused, match=r"where the review was deleted .*train it again"):
        judge_version("made-binary", "1", world.store, asking, evidence=registered["evidence"])


def test_a_review_of_other_evidence_may_be_gone(world, airflow, registered):
    airflow.answer_promotion(registered)
    airflow.ask(registered | {"evidence": "evidence-0123456789ab"}, "another", "review-1")
    airflow.ask(registered | {"version": 7}, "another", "review-2")
    airflow.reviews = {}
    assert promote(world, registered)["decision"] == "approved"


def test_a_review_may_be_gone_once_its_run_ended_without_an_answer(world, airflow, registered):
    airflow.answer_promotion(registered, option="Reject", user=None, reason=None)
    airflow.ask(registered, "was-there", "review-1")
    promote(world, registered, "was-there")
    airflow.reviews = {}
    airflow.answer_promotion(registered)
    assert promote(world, registered, "by hand")["decision"] == "approved"


def test_silence_settles_no_review_that_was_deleted_before(world, airflow, registered):
    """Somebody deletes a run that was rejected, and has another one of its name end without an answer."""
    airflow.answer_promotion(registered, option="Reject", user=None, reason=None)
    airflow.ask(registered, "was-there", "review-1")
    airflow.reviews["was-there"] = []
    airflow.ask(registered, "was-there", "review-2")
    promote(world, registered, "was-there")
    airflow.answer_promotion(registered)
    with pytest.raises(Refused, match="where the review was deleted"):
        promote(world, registered, "by hand")


def test_silence_does_not_hide_a_rejection_in_the_try_before(world, airflow, registered):
    """Somebody clears a review that was rejected, and waits until nobody has answered the new one."""
    airflow.answer_promotion(registered, option="Reject", user=None, reason=None)
    airflow.reject_elsewhere(registered, "made-binary-v1")
    for _ in range(2):
        assert promote(world, registered)["decision"] == "rejected"
    assert list_decisions(world)[0] == ("rejected", 1, "reviewer")
    airflow.answer_promotion(registered)
    with pytest.raises(Refused, match=r"rejected by reviewer on .*: blurred"):
        promote(world, registered, "by hand")


@pytest.mark.parametrize("run", ["deleted-1", "made-binary-v1"])
def test_a_run_in_which_an_earlier_release_asked_may_have_held_one(world, airflow, registered, run):
    """It recorded no review's id: the time of a run's start tells it from another of its name."""
    airflow.answer_promotion(registered)
    airflow.run["run_after"] = "2026-01-02T00:00:00Z"
    question = {"version": 1, "evidence": registered["evidence"], "begun": "2026-01-01T00:00:00Z"}
    open_log(world).append(ASKED, "made-binary", run=f"promote/{run}", **question)
    with pytest.raises(Refused, match=f"asked about this version in run {run} as well, where the review was deleted"):
        promote(world, registered)
    assert read_aliases(world) == {"candidate": 1}


def test_a_decision_of_an_earlier_run_of_the_name_says_nothing_of_a_later_one(world, airflow, registered):
    airflow.answer_promotion(registered, option="Reject", user=None, reason=None)
    promote(world, registered, "was-there")
    airflow.gone = {"was-there"}
    question = {"version": 1, "evidence": registered["evidence"], "begun": "2026-01-01T00:00:00Z"}
    open_log(world).append(ASKED, "made-binary", run="promote/was-there", **question)
    airflow.answer_promotion(registered)
    with pytest.raises(Refused, match="where the review was deleted"):
        promote(world, registered, "by hand")


def test_each_question_is_recorded_once(world, airflow, registered):
    airflow.answer_promotion(registered)
    for _ in range(2):
        airflow.ask(registered, "asked-1", "review-1")
    [asked] = [r for r in open_log(world).read_model_records("made-binary") if r["event"] == ASKED]
    assert (asked["run"], asked["review"], asked["version"]) == ("promote/asked-1", "review-1", 1)
    assert list_decisions(world) == []
    assert is_consistent(world)
    assert promote(world, registered, "asked-1")["decision"] == "approved"


def test_reviewers_are_not_asked_again(world, airflow, registered, asking):
    airflow.answer_promotion(registered, option="Reject", reason="not yet")
    promote(world, registered)
    with pytest.raises(Refused, match=FINAL):
        judge_version("made-binary", "1", world.store, asking, evidence=registered["evidence"])
    assert judge_version("made-binary", "1", world.store, world.settings)["passed"]  # by hand, to look at it


def test_reviewers_are_not_asked_again_before_a_rejection_is_carried_out_either(world, airflow, registered, asking):
    airflow.answer_promotion(registered)
    airflow.reject_elsewhere(registered, "paused")
    with pytest.raises(Refused, match="rejected by reviewer in the run promote/paused, which has not carried it out"):
        judge_version("made-binary", "1", world.store, asking, evidence=registered["evidence"])
    assert list_decisions(world) == []


def test_registering_again_makes_no_new_evidence(world, airflow, registered):
    """Otherwise a change that matters to nobody would have a rejected version judged anew."""
    run = world.client.get_model_version("made-binary", "1").run_id
    assert register_run(run, world.store, world.settings) == registered
    world.client.log_text(run, "harmless", "evaluation/note.md")
    with pytest.raises(Refused, match=r"changed after evidence-.* was recorded: artifacts"):
        register_run(run, world.store, world.settings)


records = st.fixed_dictionaries(
    {
        "event": st.sampled_from(["approved", REJECTED, "withdrawn", "carried out"]),
        "version": st.integers(1, 3),
        "by": st.sampled_from(["reviewer", "second", NOBODY_IN_TIME]),
        "run": st.sampled_from(["promote/a", "promote/b", "rollback/a"]),
        "evidence": st.sampled_from([None, "evidence-1", "evidence-2"]),
    }
)


@given(st.lists(records, max_size=8), st.lists(records, max_size=8), st.integers(1, 3))
def test_no_later_record_undoes_a_rejection(before, after, number):
    rejection = {"event": REJECTED, "version": number, "by": "reviewer", "run": "promote/a", "evidence": "evidence-1"}
    assert find_rejection([*before, rejection, *after], number, "evidence-1", "promote")
    found = find_rejection([*before, *after], number, "evidence-1", "promote")
    assert found is None or (
        found["event"] == REJECTED
        and found["version"] == number
        and found["by"] != NOBODY_IN_TIME
        and found["run"].startswith("promote/")
        and found["evidence"] in (None, "evidence-1")
    )
