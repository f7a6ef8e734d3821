from datetime import UTC, datetime

import pytest
from airflow.sdk import DAG, Param
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

from breakhis_airflow.operators import DEFAULT_ARGS
from breakhis_airflow.review_operator import ReviewOperator
from ml.promotion.reviews import APPROVE, REJECT


def review(**arguments) -> ReviewOperator:
    return ReviewOperator(**{"task_id": "review", "subject": "Promote?", "body": "**Evidence**", **arguments})


def answer(option=APPROVE, params={"reason": "fine on all slides"}):  # noqa: B006
    return {
        "chosen_options": [option] if option else [],
        "params_input": params,
        "responded_at": datetime(2026, 11, 22, tzinfo=UTC),
        "responded_by_user": {"id": "reviewer", "name": "reviewer"},
    }


@pytest.mark.parametrize("option", [APPROVE, REJECT])
def test_either_answer_with_a_reason_succeeds_and_says_who(option):
    result = review().execute_complete({}, answer(option))
    assert result["chosen_options"] == [option]
    assert result["params_input"] == {"reason": "fine on all slides"}
    assert result["responded_by_user"]["id"] == "reviewer"


@pytest.mark.parametrize("params", [None, {}, {"reason": None}, {"reason": ""}, {"reason": "  ok  "}, {"reason": 7}])
def test_an_answer_without_a_reason_does_not_count(params):
    with pytest.raises(
        AirflowFailException, match=r"no reason was given.*Nothing was promoted.*clear the task 'review'"
    ):
        review().execute_complete({}, answer(params=params))


def test_an_answer_without_a_choice_does_not_count():
    with pytest.raises(AirflowFailException, match="neither Approve nor Reject"):
        review().execute_complete({}, answer(option=None))


def test_the_reviewers_are_a_setting(monkeypatch):
    monkeypatch.setenv("BREAKHIS_REVIEWERS", "ada, grace")
    assert review().assigned_users == [{"id": "ada", "name": "ada"}, {"id": "grace", "name": "grace"}]


def test_the_form_asks_for_the_reason_alone():
    with DAG("a_dag", params={"model": Param("m")}):
        task = review()
    assert list(task.params) == ["reason"]
    assert task.defaults == [REJECT]  # nobody's silence approves
    task.params.validate()  # Airflow does so before it shows the form: an empty one must pass


def test_a_lost_answer_is_asked_for_again_at_once():
    with DAG("a_dag", default_args=DEFAULT_ARGS):
        task = review()
    assert task.retries > 0
    assert task.retry_delay.total_seconds() <= 10
    assert not task.retry_exponential_backoff


def test_subject_and_body_are_templates():
    assert {"subject", "body"} <= set(ReviewOperator.template_fields)


def test_the_deadline_rejects_without_a_reason(monkeypatch):
    monkeypatch.setenv("BREAKHIS_REVIEW_HOURS", "48")
    task = review()
    assert task.response_timeout.total_seconds() == 48 * 3600
    silence = answer(REJECT, params={}) | {"responded_by_user": None}
    assert task.execute_complete({}, silence)["chosen_options"] == [REJECT]


class Instance:
    def __init__(self, answered):
        self.answered = answered

    def xcom_pull(self, task_ids):
        return {"chosen_options": [self.answered]}


@pytest.mark.parametrize(
    ("approvals", "before", "message"), [("1", APPROVE, "1 have to approve"), ("2", REJECT, "was answered with Reject")]
)
def test_a_further_review_is_skipped(approvals, before, message):
    with DAG("a_dag"):
        first, second = review(), review(task_id="review_2", number=2, approvals=approvals)
        first >> second
    with pytest.raises(AirflowSkipException, match=message):
        second.execute({"ti": Instance(before)})
