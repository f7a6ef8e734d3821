"""Messages about failures: the YAML file, and mails that real task runs send to a server of this process."""

import socketserver
import threading
from collections.abc import Iterator
from datetime import timedelta
from email import message_from_string, policy
from email.message import EmailMessage
from pathlib import Path
from uuid import uuid4

import pytest
import structlog
from airflow.api_fastapi.execution_api.datamodels.taskinstance import TaskInstance
from airflow.callbacks.callback_requests import TaskCallbackRequest
from airflow.dag_processing.dagbag import DagBag
from airflow.dag_processing.processor import _execute_task_callbacks

from breakhis_airflow.notifications import (
    Failure,
    Review,
    find_notification_files,
    notify_of_review,
    read_notifications,
    send_notifications,
)
from ml.core.errors import ConfigError
from ml.core.settings import PROJECT

SMTP = """
on_failure:
  - notifier: airflow.providers.smtp.notifications.smtp.SmtpNotifier
    arguments:
      smtp_conn_id: smtp_default
      from_email: airflow@example.org
      to: [data-team@example.org]
      subject: "{{ failure.subject }}"
      html_content: "{{ failure.html }}"
"""


class _Session(socketserver.StreamRequestHandler):
    """As much of SMTP as smtplib speaks."""

    def handle(self) -> None:
        self.wfile.write(b"220 test\r\n")
        for line in self.rfile:
            verb = line[:4].upper()
            if verb == b"DATA":
                self.wfile.write(b"354 go on\r\n")
                lines = iter(lambda: self.rfile.readline().decode(), ".\r\n")
                self.server.mails.append(message_from_string("".join(lines), policy=policy.default))
            self.wfile.write(b"221 bye\r\n" if verb == b"QUIT" else b"250 ok\r\n")
            if verb == b"QUIT":
                return


@pytest.fixture
def mails(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[EmailMessage]]:
    """What the server behind the connection smtp_default has got."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Session) as server:
        server.mails = []
        host, port = server.server_address
        options = "disable_ssl=true&disable_tls=true&retry_limit=0"
        monkeypatch.setenv("AIRFLOW_CONN_SMTP_DEFAULT", f"smtp://{host}:{port}?{options}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.mails
        server.shutdown()


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "conf"
    folder.mkdir()
    monkeypatch.setenv("BREAKHIS_CONF", str(folder))
    return folder


def write(conf: Path, text: str) -> Path:
    file = conf / "notifications.yaml"
    file.write_text(text)
    return file


# --- the file -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [None, "", "# nothing\n", "on_failure: []\n"])
def test_without_a_notifier_nobody_is_told(conf, text):
    if text is not None:
        write(conf, text)
    assert find_notification_files(conf) == []


def test_the_example_that_is_shipped_is_good_once_its_marks_are_gone(conf):
    lines = (PROJECT / "dags" / "notifications.yaml").read_text().splitlines()
    example = lines[lines.index("# on_failure:") : lines.index("on_failure: []")]
    file = write(conf, "\n".join(line.removeprefix("# ") for line in example))
    assert find_notification_files(conf) == [file]
    (one,) = read_notifications(file).on_failure
    assert one.arguments["subject"] == "{{ failure.subject }}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("on_failur: []", "unknown key 'on_failur'"),
        ("on_failure: [", "is not valid YAML"),
        ("on_failure: [{arguments: {}}]", "'on_failure.0.notifier' is missing"),
        ("on_failure: [{notifier: SmtpNotifier}]", "not the import path of a class"),
        ("on_failure: [{notifier: no.such.Notifier}]", "No module named 'no'"),
        ("on_failure: [{notifier: airflow.sdk.NoNotifier}]", "NoNotifier"),
        ("on_failure: [{notifier: airflow.sdk.BaseOperator}]", "not the import path of a class"),
        (SMTP.replace("smtp_conn_id:", "smtp_conn:"), "unexpected keyword argument 'smtp_conn'"),
        (SMTP.replace("to: [data-team@example.org]", ""), "missing 1 required positional argument: 'to'"),
        (SMTP.replace("failure.subject }}", "failure.subject }"), "unexpected '}'"),
        (SMTP.replace("smtp_conn_id: smtp_default", "password: hush"), "'password' is, or holds, a secret"),
        (
            SMTP.replace("smtp_conn_id: smtp_default", "x: {headers: [{Api-Key: hush}]}"),
            "'Api-Key' is, or holds, a secret",
        ),
        (SMTP.replace("smtp_default", "smtp://me:hush@mail"), "'smtp_conn_id' is, or holds, a secret"),
    ],
)
def test_a_wrong_file_is_said_to_be_wrong(conf, text, words):
    file = write(conf, text)
    assert find_notification_files(conf) == [file]
    with pytest.raises(ConfigError, match=words) as caught:
        read_notifications(file)
    assert str(file) in str(caught.value)
    assert "hush" not in str(caught.value)


# --- the message ----------------------------------------------------------------------------------------------------


def test_what_came_with_the_data_is_escaped():
    links = (("Data Docs", "http://a/?b=1&c=2"),)
    failure = Failure("ingest_ours", "manual__1", "validate", "<b>.png is no picture", "http://a/log", links)
    assert "&lt;b&gt;.png is no picture" in failure.html
    assert 'href="http://a/?b=1&amp;c=2"' in failure.html
    assert failure.text == (
        "ingest_ours: validate failed in the run manual__1\n\n<b>.png is no picture\n\n"
        "Log: http://a/log\nData Docs: http://a/?b=1&c=2"
    )


def test_a_notifier_that_fails_keeps_back_no_other(conf, mails):
    lost = SMTP.replace("smtp_default", "no_such_connection")
    wanted = read_notifications(write(conf, lost + SMTP.removeprefix("\non_failure:\n")))
    problems = send_notifications(wanted.on_failure, {}, failure=Failure("d", "r", "t", "an error", "http://a/log", ()))
    assert len(mails) == 1
    assert ["not found" in str(one) for one in problems] == [True]


REVIEW = SMTP.replace("on_failure", "on_review").replace("failure.", "review.")


def test_a_review_is_told_of(conf, mails):
    wanted = read_notifications(write(conf, REVIEW))
    assert (wanted.on_failure, len(wanted.on_review)) == ((), 1)
    review = Review("Promote <m> version 3?", "http://a/form", "http://a/page", 23.6, reminder=True)
    notify_of_review({}, review)
    (mail,) = mails
    assert mail["subject"] == "Reminder: Promote <m> version 3?"
    assert "Promote &lt;m&gt; version 3?" in mail.get_body().get_content()
    assert "Without an answer within 24 hours it is rejected." in mail.get_body().get_content()
    assert "http://a/page" in mail.get_body().get_content()
    assert review.text.endswith("Evidence: http://a/page\nAnswer: http://a/form")


def test_a_review_waits_though_nobody_can_be_told(conf, caplog):
    write(conf, "on_review: 7\n")
    notify_of_review({}, Review("Promote?", "http://a/form", "", 1))


def test_a_wrong_notifier_of_reviews_says_where(conf):
    with pytest.raises(ConfigError, match=r"on_review\.0: nonsense"):
        read_notifications(write(conf, "on_review: [{notifier: nonsense}]\n"))


# --- real runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def database() -> None:
    """Airflow's own, which a run of a DAG needs."""
    from airflow.utils.db import initdb

    initdb()


@pytest.fixture
def run(database, conf):
    """Run ``ingest_ours`` to its end, with whatever ``breakhis`` does; returns the run's state."""
    (conf / "sources").mkdir()
    (conf / "sources" / "ours.yaml").write_text("name: ours\nkind: demo\n")

    def to_the_end() -> str:
        dag = DagBag(str(PROJECT / "dags" / "ingest.py")).dags["ingest_ours"]
        for task in dag.tasks:
            task.retry_delay = timedelta(0)
        return str(dag.test().state)

    return to_the_end


VALIDATE = """
if arguments[0] == "validate":
    write({"validation": "validation-0123456789ab", "passed": False})
    say("error: 3 of 12 <images> have lost their slide; the key is planted-key")
    sys.exit(4)
write({"version": "raw-1", "manifest": "manifest-1", "changed": False})
"""


def test_a_failed_validation_sends_one_mail_with_all_that_is_needed(conf, mails, breakhis, run, monkeypatch):
    key = '{"conn_type": "aws", "login": "me", "password": "planted-key"}'
    monkeypatch.setenv("AIRFLOW_CONN_BREAKHIS_STORE", key)
    monkeypatch.setenv("BREAKHIS_CONNECTIONS", "breakhis_store")
    monkeypatch.setenv("AIRFLOW__API__BASE_URL", "https://airflow.example")
    write(conf, SMTP)
    breakhis(VALIDATE)
    assert run() == "failed"
    (mail,) = mails  # refused for good: not tried again, and what came after it did not run
    assert (mail["To"], mail["From"]) == ("data-team@example.org", "airflow@example.org")
    assert mail["Subject"] == "ingest_ours: validate failed"
    body = mail.get_body().get_content()
    for words in (
        "breakhis validate: 3 of 12 &lt;images&gt; have lost their slide",
        "https://airflow.example/dags/ingest_ours/runs/",
        "https://airflow.example/breakhis/docs/validation-0123456789ab/index.html",
        "https://airflow.example/breakhis/docs/validation-0123456789ab/quarantine.html",
    ):
        assert words in body
    assert "planted-key" not in mail.as_string()


FLAKY = """
if arguments[0] == "fetch" and not os.path.exists({seen!r}):
    open({seen!r}, "w").close()
    say("error: the server is away")
    sys.exit(75)
write({{"version": "raw-1", "manifest": "manifest-1", "changed": False}})
"""


def test_a_retry_that_succeeds_sends_none(conf, mails, breakhis, run, tmp_path):
    write(conf, SMTP)
    seen = tmp_path / "seen"
    breakhis(FLAKY.format(seen=str(seen)))
    assert run() == "success"
    assert seen.exists()
    assert mails == []


@pytest.mark.parametrize("text", [None, "on_failure: 3", SMTP.replace("smtp_default", "no_such_connection")])
def test_a_failure_is_a_failure_even_if_nobody_can_be_told(conf, mails, breakhis, run, text):
    if text:
        write(conf, text)
    breakhis(VALIDATE)
    assert run() == "failed"
    assert mails == []


def test_a_task_whose_worker_died_is_told_of_by_the_dag_processor(conf, mails, run):
    write(conf, SMTP)
    bag = DagBag(str(PROJECT / "dags" / "ingest.py"))
    lost = TaskInstance(
        **{"id": uuid4(), "task_id": "manifest", "dag_id": "ingest_ours", "run_id": "manual__1", "try_number": 3},
        dag_version_id=uuid4(),
    )
    request = TaskCallbackRequest(filepath="ingest.py", bundle_name="dags-folder", bundle_version=None, ti=lost)
    _execute_task_callbacks(bag, request, structlog.get_logger())
    (mail,) = mails
    assert mail["Subject"] == "ingest_ours: manifest failed"
    assert "the task was lost with its worker" in mail.get_body().get_content()
