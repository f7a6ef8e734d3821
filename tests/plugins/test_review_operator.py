import os
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from airflow.sdk import DAG, Param
from airflow.sdk.exceptions import AirflowException, AirflowSkipException

from breakhis_airflow import review_operator
from breakhis_airflow.connections import ConnectionValues
from breakhis_airflow.operators import DEFAULT_ARGS
from breakhis_airflow.review_operator import HITLOperator, ReviewOperator
from ml.core.airflow_api import AirflowApi
from ml.core.errors import AirflowError, TryAgain
from ml.promotion import questions
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


CONF = {"model": "made-binary", "version": "1", "evidence": "evidence-0123456789ab"}
REJECTION = answer(REJECT, params={"reason": "blurred"}) | {"responded_at": "2026-11-22T00:00:00Z"}


class Asking:
    """A review that is asked in a run of the DAG ``promote``: what Airflow has of it, and what is done."""

    def __init__(self, monkeypatch):
        self.detail = None
        self.done = []
        connections = {"BREAKHIS_AIRFLOW_URL": "http://localhost:1", "BREAKHIS_AIRFLOW_USER": "service"}
        self.connections = connections | {"BREAKHIS_AIRFLOW_PASSWORD": "x", "BREAKHIS_AUDIT_KEY": "k"}
        monkeypatch.setattr(os, "environ", dict(os.environ))
        monkeypatch.setattr(AirflowApi, "hitl_detail", lambda _, dag, run, task: self.read(task))
        monkeypatch.setattr(review_operator, "read_connections", lambda *_: ConnectionValues(self.connections, []))
        monkeypatch.setattr(review_operator, "notify_of_review", lambda *_: self.done.append("told"))
        monkeypatch.setattr(questions, "record_question", lambda *facts: self.done.append(("recorded", *facts[:3])))
        monkeypatch.setattr(HITLOperator, "execute", lambda *_: self.done.append("asked"))

    def read(self, task):
        if self.detail is None:
            raise AirflowError(f"no {task}", status=404)
        return self.detail

    def execute(self, dag="promote", started_by="engineer"):
        return self.make_task(dag).execute(self.make_context(dag, started_by))

    def make_task(self, dag):
        with DAG(dag):
            return review()

    def make_context(self, dag, started_by="engineer"):
        run = SimpleNamespace(conf=CONF, triggering_user_name=started_by)
        ti = SimpleNamespace(dag_id=dag, run_id="r1", task_id="review", id="review-1")
        return {"ti": ti, "dag_run": run}


@pytest.fixture
def asking(monkeypatch):
    return Asking(monkeypatch)


@pytest.mark.parametrize("before", [None, answer() | {"responded_at": "x"}, {"chosen_options": None}])
def test_a_question_is_recorded_before_it_is_asked(asking, before):
    """Again and again, but for a rejection: what was approved before a task was cleared does not count."""
    asking.detail = before
    asking.execute()
    assert asking.done == [("recorded", CONF, "r1", "review-1"), "told", "asked"]


def test_a_rejection_is_not_asked_about_again(asking):
    """Airflow has it under the cleared task, and would delete it."""
    asking.detail = REJECTION
    assert asking.execute()["params_input"] == {"reason": "blurred"}
    assert asking.done == []


@pytest.mark.parametrize("changed", [{"params_input": {"reason": " "}}, {"responded_by_user": None}])
def test_what_is_no_rejection_is_asked_about_again(asking, changed):
    asking.detail = REJECTION | changed
    asking.execute()
    assert asking.done[-1] == "asked"


def test_a_rejection_by_who_started_the_run_does_not_count(asking):
    asking.detail = REJECTION
    asking.execute(started_by="reviewer")
    assert asking.done[-1] == "asked"


def test_rollbacks_are_not_recorded(asking):
    asking.execute(dag="rollback")
    assert asking.done == ["told", "asked"]


def test_nothing_is_asked_that_cannot_be_recorded(asking, monkeypatch):
    def fail(*_):
        raise TryAgain("MLflow cannot be reached")

    monkeypatch.setattr(questions, "record_question", fail)
    with pytest.raises(AirflowException, match="recording the question, on the worker: MLflow cannot be reached"):
        asking.execute()
    assert asking.done == []


WITHOUT_REASON = [None, {}, {"reason": None}, {"reason": ""}, {"reason": "  ok  "}, {"reason": 7}]


@pytest.mark.parametrize("dag", ["promote", "rollback"])
@pytest.mark.parametrize(
    ("given", "problem"),
    [
        *((answer(params=params), "it has no reason of at least 3 letters") for params in WITHOUT_REASON),
        (answer(option=REJECT, params={}), "it has no reason of at least 3 letters"),
        (answer(option=None), "it says neither Approve nor Reject"),
    ],
)
def test_an_answer_that_does_not_count_is_kept_and_asked_for_again(asking, monkeypatch, dag, given, problem):
    """In the same try, and within the time that is left."""
    told, kept = [], []
    monkeypatch.setenv("BREAKHIS_REVIEW_HOURS", "48")
    monkeypatch.setattr(review_operator, "notify_of_review", lambda _, message: told.append(message))
    monkeypatch.setattr(questions, "record_uncounted_answer", lambda *facts: kept.append(facts[:5]))
    asking.detail = {"created_at": (datetime.now(UTC) - timedelta(hours=24)).isoformat()}
    task = asking.make_task(dag)
    monkeypatch.setattr(HITLOperator, "execute", lambda *_: asking.done.append("asked") or pytest.fail("waits"))
    with pytest.raises(pytest.fail.Exception, match="waits"):
        task.execute_complete(asking.make_context(dag), given)
    assert kept == [(CONF, f"{dag}/r1", "review-1", given, problem)]
    assert asking.done == ["asked"]
    assert told[0].remark.startswith(f"The answer of reviewer does not count, since {problem}.")
    assert 23.9 < task.response_timeout.total_seconds() / 3600 <= 24


def test_an_answer_that_cannot_be_kept_is_not_forgotten(asking, monkeypatch):
    def fail(*_):
        raise TryAgain("MLflow cannot be reached")

    asking.detail = {"created_at": datetime.now(UTC).isoformat()}
    monkeypatch.setattr(questions, "record_uncounted_answer", fail)
    with pytest.raises(AirflowException, match="MLflow cannot be reached"):
        asking.make_task("promote").execute_complete(asking.make_context("promote"), answer(params={}))
    assert asking.done == []
