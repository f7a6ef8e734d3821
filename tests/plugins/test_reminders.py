from datetime import UTC, datetime, timedelta

import pytest
from airflow.sdk import DAG

from breakhis_airflow import reminders
from breakhis_airflow.review_operator import ReviewOperator
from ml.core.airflow_api import AirflowApi
from ml.core.errors import AirflowError, TryAgain
from ml.core.settings import Settings
from ml.promotion.alias_history import ASKED
from ml.promotion.audit_log import AuditLog

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)

BODY = f"judged as `bundle-0123456789ab` (SHA-256 `{'0' * 64}`). Your answer is recorded."


@pytest.fixture
def sent_reminders(monkeypatch, store):
    """The messages sent for three reviews: one is due for a reminder, one is young, one is of somebody else's DAG."""
    monkeypatch.setenv("BREAKHIS_REVIEW_HOURS", "48")
    monkeypatch.setenv("AIRFLOW_CONN_BREAKHIS_AIRFLOW", "http://service:x@localhost:1")
    monkeypatch.setenv("AIRFLOW__API__BASE_URL", "https://airflow.example")
    sent = []
    monkeypatch.setattr(reminders, "notify_of_review", lambda context, review: sent.append(review))

    def detail(run, hours, dag="promote", state="awaiting_input"):
        return {
            "task_instance": {"id": run, "dag_id": dag, "dag_run_id": run, "task_id": "review", "state": state},
            "created_at": (NOW - timedelta(hours=hours)).isoformat(),
            "subject": f"Promote {run}?",
            "body": BODY,
        }

    record = [detail("old", 30), detail("young", 2), detail("other", 30, dag="somebodys"), detail("over", 49)]
    record += [detail("marked", 30, state="success"), detail("cleared", 30, state=None)]
    monkeypatch.setattr(AirflowApi, "list_pending_questions", lambda self: record)
    return sent


def test_each_review_is_reminded_of_once_when_half_its_time_has_passed(sent_reminders):
    assert reminders.send_reminders({}, NOW) == ["old"]
    (review,) = sent_reminders
    assert review.subject == "Reminder: Promote old?"
    assert review.form == "https://airflow.example/dags/promote/runs/old/tasks/review/required_actions"
    assert review.page == "https://airflow.example/breakhis/reviews/bundle-0123456789ab/"
    assert review.hours_left == pytest.approx(18)
    assert reminders.send_reminders({}, NOW + timedelta(hours=1)) == []
    assert reminders.send_reminders({}, NOW + timedelta(hours=23)) == ["young"]


def test_of_what_was_settled_nobody_is_reminded(sent_reminders, monkeypatch):
    asked = []
    monkeypatch.setattr(reminders, "is_settled", lambda *about: asked.append(about[:2]) or True)
    assert reminders.send_reminders({}, NOW) == []
    assert asked == [("promote", "bundle-0123456789ab")]
    assert sent_reminders == []


@pytest.mark.parametrize(
    ("state", "words"),
    [(None, "in Airflow no more"), ("failed", "failed on the way"), ("success", "somebody marked it")],
)
def test_what_nobody_can_answer_is_told_once(sent_reminders, store, tmp_path, monkeypatch, state, words):
    def read_run(_, dag, run):
        if state is None:
            raise AirflowError("no such run", status=404)
        return {"state": state}

    monkeypatch.setattr(AirflowApi, "dag_run", read_run)
    log = AuditLog(store, Settings(home=tmp_path, store=store.root, audit_key="k"))
    question = {"version": 3, "evidence": "evidence-0123456789ab", "review": "review-1"}
    log.append(ASKED, "made-binary", run="promote/r1", **question)
    assert reminders.tell_of_unanswerable_reviews({}) == ["r1"]
    assert reminders.tell_of_unanswerable_reviews({}) == []
    (message,) = sent_reminders
    assert message.subject.startswith("Not decided, and nobody can answer it: made-binary version 3")
    assert words in message.text
    assert words in message.html
    assert "https://airflow.example/breakhis/reviews/" in message.text
    assert "hours" not in message.text


@pytest.mark.parametrize("state", ["running", "queued"])
def test_of_what_goes_on_nobody_is_told(sent_reminders, store, tmp_path, monkeypatch, state):
    monkeypatch.setattr(AirflowApi, "dag_run", lambda *_: {"state": state})
    log = AuditLog(store, Settings(home=tmp_path, store=store.root, audit_key="k"))
    log.append(ASKED, "made-binary", run="promote/r1", version=3, evidence="evidence-0123456789ab", review="review-1")
    assert reminders.tell_of_unanswerable_reviews({}) == []
    assert sent_reminders == []


def test_an_airflow_that_cannot_be_asked_is_no_lost_review(sent_reminders, store, tmp_path, monkeypatch):
    def fail(*_):
        raise TryAgain("Airflow cannot be reached")

    monkeypatch.setattr(AirflowApi, "dag_run", fail)
    log = AuditLog(store, Settings(home=tmp_path, store=store.root, audit_key="k"))
    log.append(ASKED, "made-binary", run="promote/r1", version=3, evidence="evidence-0123456789ab", review="review-1")
    with pytest.raises(TryAgain):
        reminders.tell_of_unanswerable_reviews({})
    assert sent_reminders == []


def test_who_is_asked_is_told_at_once(monkeypatch):
    from breakhis_airflow import review_operator

    sent = []
    monkeypatch.setattr(review_operator, "notify_of_review", lambda context, message: sent.append(message))
    monkeypatch.setattr(review_operator.HITLOperator, "execute", lambda self, context: None)
    monkeypatch.setattr(ReviewOperator, "_record_question", lambda self, context: None)
    with DAG("promote"):
        task = ReviewOperator(task_id="review", subject="Promote?", body=BODY)

    class Instance:
        dag_id, run_id, task_id = "promote", "m v1", "review"

    task.execute({"ti": Instance})
    (message,) = sent
    assert message.form.endswith("/dags/promote/runs/m%20v1/tasks/review/required_actions")
    assert message.page.endswith("/breakhis/reviews/bundle-0123456789ab/")
    assert not message.reminder
