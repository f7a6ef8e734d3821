from datetime import UTC, datetime, timedelta

import pytest
from airflow.sdk import DAG

from breakhis_airflow import reminders
from breakhis_airflow.review_operator import ReviewOperator
from ml.core.airflow_api import AirflowApi

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

    def detail(run, hours, dag="promote"):
        return {
            "task_instance": {"id": run, "dag_id": dag, "dag_run_id": run, "task_id": "review"},
            "created_at": (NOW - timedelta(hours=hours)).isoformat(),
            "subject": f"Promote {run}?",
            "body": BODY,
        }

    record = [detail("old", 30), detail("young", 2), detail("other", 30, dag="somebodys"), detail("over", 49)]
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
