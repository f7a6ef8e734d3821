import pytest
from airflow.sdk.exceptions import AirflowFailException
from airflow.serialization.serialized_objects import DagSerialization

from breakhis_airflow.notifications import notify_of_failure

SMTP = """
on_failure:
  - notifier: airflow.providers.smtp.notifications.smtp.SmtpNotifier
    arguments: {from_email: a@example.org, to: b@example.org, subject: "{{ failure.subject }}"}
"""


def test_there_is_nothing_to_try_without_a_notifier(conf, read):
    assert read("notifications") == {}


def test_a_good_file_can_be_tried_out(conf, read):
    (conf / "notifications.yaml").write_text(SMTP)
    dag = read("notifications")["try_notifications"]
    assert "SmtpNotifier" in dag.doc_md
    assert not dag.get_task("send").on_failure_callback  # it would tell of not being able to tell
    assert DagSerialization.to_dict(dag)


def test_a_wrong_file_says_so_and_takes_no_other_dag_down(conf, read):
    (conf / "notifications.yaml").write_text(SMTP.replace("subject:", "subjekt:"))
    bad = read("notifications")["try_notifications"]
    assert bad.tags == {"invalid"}
    assert "'subjekt'" in bad.doc_md
    (task,) = bad.tasks
    with pytest.raises(AirflowFailException, match="subjekt"):
        task.python_callable()
    assert read("ingest")["ingest_demo"].get_task("publish")


@pytest.mark.parametrize("name", ["ingest", "retrain", "promote"])
def test_every_task_of_every_dag_tells_of_its_failure(conf, read, name):
    for dag in read(name).values():
        assert all(notify_of_failure in task.on_failure_callback for task in dag.tasks)
