import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from airflow.sdk import Asset, AssetAlias
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from airflow.sdk.execution_time.context import OutletEventAccessors

from breakhis_airflow.connections import _format_url
from breakhis_airflow.operators import StageOperator, _OutputLogger
from breakhis_airflow.places import stage
from breakhis_airflow.process import ProcessStageOperator
from ml.core.store import Store


def gone(pid: int, within: float = 5.0) -> bool:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        with suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.05)
                continue
        return True
    return False


def when(path: Path) -> str:
    """The text of a file, once there is one."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with suppress(FileNotFoundError):
            if text := path.read_text():
                return text
        time.sleep(0.02)
    raise AssertionError(f"{path} never came")


# --- what runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changed", [True, False])
def test_the_result_is_the_xcom_and_goes_with_the_event_of_news(breakhis, context, changed):
    breakhis(f"write({{'arguments': arguments, 'changed': {changed}}}); print('not the result')")
    asset = Asset("a_version", uri="x-breakhis://a_version")
    task = stage("publish", "manifest-1", outlet_asset=asset)
    run = context()
    [alias] = task.outlets
    assert alias == AssetAlias("a_version_news")  # an asset there would have an event each time
    run["outlet_events"] = OutletEventAccessors()

    result = task.execute(run)

    assert result["arguments"][:4] == ["publish", "manifest-1", "--json", "--result"]
    events = run["outlet_events"][alias].asset_alias_events
    assert [(event.dest_asset_key.uri, event.extra) for event in events] == (
        [("x-breakhis://a_version", result)] if changed else []
    )


def test_the_class_is_that_of_the_place():
    task = stage("train", "binary", task_id="train_binary", pool="gpu")
    assert type(task) is ProcessStageOperator
    assert (task.task_id, task.pool, task.arguments) == ("train_binary", "gpu", ["binary"])
    assert stage("fetch", "demo").task_id == "fetch"


def test_what_stands_behind_the_dashes_can_be_no_option(breakhis, context):
    breakhis("write({'arguments': arguments})")
    ran = ProcessStageOperator(task_id="t", stage="gate", arguments=["--reason", "no", "--", "--help", "1"])
    assert ran.execute(context())["arguments"][:5] == ["gate", "--reason", "no", "--json", "--result"]
    assert ran.execute(context(2))["arguments"][6:] == ["--", "--help", "1"]


@pytest.mark.parametrize("value", ["a\0b", "\ud800", "x" * 100_001])
def test_a_value_that_no_command_line_holds_is_refused(breakhis, context, value):
    breakhis("write({})")
    with pytest.raises(
        AirflowFailException, match=r"^breakhis rollback cannot be called with .*start a new run"
    ) as caught:
        stage("rollback", "--reason", value).execute(context())
    assert len(str(caught.value)) < 500


def test_a_value_of_an_earlier_task_is_a_template():
    assert stage("fetch", "demo").value("version") == "{{ ti.xcom_pull(task_ids='fetch')['version'] }}"
    assert StageOperator.template_fields == ("arguments",)


@pytest.mark.parametrize("status", [2, 3, 4])
def test_what_cannot_get_better_is_not_tried_again(breakhis, context, status):
    breakhis(f"say('error: an old one'); say('working'); say('error: macro_f1 is 0.29'); sys.exit({status})")
    with pytest.raises(AirflowFailException, match=r"^breakhis gate: macro_f1 is 0\.29$"):
        stage("gate", "m", "1").execute(context())


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("say('error: the server is away'); sys.exit(75)", "^breakhis gate: the server is away$"),
        ("say('Traceback'); sys.exit(1)", "ended with status 1; its last lines above say why"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL, most often for want of memory"),
        ("pass", "ended well but wrote no result"),
    ],
)
def test_what_may_get_better_is_tried_again(breakhis, context, script, message):
    breakhis(script)
    with pytest.raises(AirflowException, match=message) as caught:
        stage("gate", "m", "1").execute(context())
    assert not isinstance(caught.value, AirflowFailException)


@pytest.mark.parametrize(
    ("number", "is_final", "words"),
    [(errno.EACCES, True, "/store/x: user .+ has no right to it"), (errno.ENFILE, False, "as many open files as")],
)
def test_what_the_worker_itself_may_not_read_is_told(breakhis, context, monkeypatch, number, is_final, words):
    def refuse(*_):
        raise OSError(number, os.strerror(number), "/store/x")

    breakhis("write({'a': 1})")
    monkeypatch.setattr(Store, "read", refuse)
    with pytest.raises(AirflowException, match=f"^breakhis gate, on the worker: .*{words}") as caught:
        stage("gate", "m", "1").execute(context())
    assert isinstance(caught.value, AirflowFailException) == is_final


def test_the_report_of_a_blocked_gate_is_an_xcom_all_the_same(breakhis, context):
    breakhis("write({'passed': False, 'model': 'm', 'version': 1}); say('error: blocked'); sys.exit(4)")
    run = context()
    with pytest.raises(AirflowFailException):
        stage("gate", "m", "1").execute(run)
    assert run["ti"].pushed == {"return_value": {"passed": False, "model": "m", "version": 1}}


def test_the_result_of_another_try_is_not_taken_for_this_one(breakhis, context):
    breakhis("write({'passed': True})")
    stage("gate", "m", "1").execute(context(1))
    breakhis("sys.exit(4)")
    run = context(2)  # same DAG, run, task and number of the try: an old store under a new Airflow database
    with pytest.raises(AirflowFailException):
        stage("gate", "m", "1").execute(run)
    assert run["ti"].pushed == {}


def test_the_task_log_has_the_output_and_the_links(breakhis, context, capsys, monkeypatch):
    monkeypatch.setenv("BREAKHIS_MLFLOW_URI", "http://mlflow:5000")
    breakhis(
        "say('épreuve 1 of 2'); sys.stdout.buffer.write(b'\\xff and no newline'); "
        "write({'run_id': 'abc', 'experiment_id': '7'})"
    )
    stage("train", "binary").execute(context())
    log = capsys.readouterr().out
    page = "http://mlflow:5000/#/experiments/7/runs/abc"
    for line in ("épreuve 1 of 2", "\ufffd and no newline", f"MLflow run: {page}"):
        assert line in log


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"stage": "rm -rf"}, "must be a command of breakhis"),
        ({"stage": "fetch", "arguments": "demo"}, "must be a list of strings"),
        ({"stage": "fetch", "arguments": ["demo", 3]}, "must be a list of strings"),
    ],
)
def test_arguments_are_checked_when_the_dag_is_read(wrong, message):
    with pytest.raises(ValueError, match=message):
        ProcessStageOperator(task_id="t", **wrong)


# --- what it may know -----------------------------------------------------------------------------------------------

SECRETS = {
    "AIRFLOW__CORE__FERNET_KEY": "planted-1",
    "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": "postgresql://airflow:planted-2@db/airflow",
    "AIRFLOW__API_AUTH__JWT_SECRET": "planted-3",
    "AIRFLOW_CONN_BREAKHIS_AIRFLOW": '{"conn_type": "http", "host": "http://a:80", "password": "planted-4"}',
    "BREAKHIS_AIRFLOW_PASSWORD": "planted-5",
    "MLFLOW_FLASK_SERVER_SECRET_KEY": "planted-6",
    "BREAKHIS_AUDIT_KEY": "planted-9",
    "TF_TOKEN_app_terraform_io": "planted-7",
    "POSTGRES_PASSWORD": "planted-8",
}
DUMP = "write(dict(os.environ)); say('environment: ' + json.dumps(dict(os.environ)))"


@pytest.fixture
def planted(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


def test_a_stage_sees_none_of_airflows_secrets(breakhis, context, planted, monkeypatch):
    passed = {
        "BREAKHIS_WEIGHTS": "random",
        "MLFLOW_TRACKING_URI": "http://mlflow",
        "KAGGLE_API_TOKEN": "k",
        "AWS_SECRET_ACCESS_KEY": "a",
        "https_proxy": "http://proxy",
        "OMP_NUM_THREADS": "2",
    }
    for name, value in passed.items():
        monkeypatch.setenv(name, value)
    breakhis(DUMP)
    seen = stage("fetch", "demo").execute(context())
    assert "planted" not in json.dumps(seen)
    assert passed.items() <= seen.items()
    assert {"PATH", "HOME"} <= seen.keys()
    assert seen["PYTHONUNBUFFERED"] == "1"


def test_only_the_stage_with_the_connection_gets_the_password_and_the_log_does_not(breakhis, context, planted, capsys):
    breakhis(DUMP + "; say('error: no entry with planted-4'); sys.exit(75)")
    task = stage("promote", "m", "1", connections=["breakhis_airflow"])
    run = context()
    with pytest.raises(AirflowException, match=r"no entry with \*\*\*"):
        task.execute(run)
    seen = {name: value for name, value in run["ti"].pushed["return_value"].items() if "planted" in value}
    assert seen == {"BREAKHIS_AIRFLOW_PASSWORD": "planted-4"}
    assert run["ti"].pushed["return_value"]["BREAKHIS_AIRFLOW_URL"] == "http://a:80"
    log = capsys.readouterr().out
    assert "BREAKHIS_AIRFLOW_USER" in log  # the stage printed all it knew
    assert "planted" not in log


def test_a_stage_that_decides_is_the_promoter_in_mlflow_and_any_other_the_trainer(
    breakhis, context, monkeypatch, capsys
):
    for name, user in (("", "trainer"), ("_PROMOTER", "promoter")):
        connection = {"conn_type": "http", "login": user, "password": f"planted-{user}"}
        monkeypatch.setenv(f"AIRFLOW_CONN_BREAKHIS_MLFLOW{name}", json.dumps(connection))
    monkeypatch.setenv("BREAKHIS_CONNECTIONS", "breakhis_mlflow")
    breakhis(DUMP)
    for task, user in (
        (stage("fetch", "demo"), "trainer"),
        (stage("gate", "m", "1", connections=["breakhis_mlflow_promoter"]), "promoter"),
    ):
        seen = task.execute(context())
        assert (seen["MLFLOW_TRACKING_USERNAME"], seen["MLFLOW_TRACKING_PASSWORD"]) == (user, f"planted-{user}")
        assert json.dumps(seen).count("planted") == 1
    assert "planted" not in capsys.readouterr().out


def test_a_stage_knows_where_airflows_pages_are(breakhis, context, monkeypatch):
    breakhis(DUMP)
    for address, passed_on in (("http://airflow:8080/a", "http://airflow:8080/a/"), ("/a", "")):
        monkeypatch.setenv("AIRFLOW__API__BASE_URL", address)
        assert stage("train", "binary").execute(context())["BREAKHIS_AIRFLOW_UI"] == passed_on


def test_secrets_are_struck_out_before_airflow_sees_them():
    # Airflow masks what goes to the task's log, but its supervisor repeats that log unmasked on its own output.
    lines = []
    output = _OutputLogger(SimpleNamespace(error=lambda _, line: lines.append(line)), hidden=["planted-4", ""])
    output("error: user:planted-4@host")
    assert lines == ["error: user:***@host"]
    assert output.error == "user:***@host"


@pytest.mark.parametrize(
    ("line", "level"),
    [
        ("error: made.yaml: no such folder", "error"),
        ("Error: Missing argument 'SOURCE'.", "error"),  # as click says it
        ("warning: 3 of 640 files", "warning"),
        ("reading images: 640 in 2.0 s", "info"),
        ("test: error: 0.1, warning: none", "info"),
    ],
)
def test_a_line_reaches_the_tasks_log_at_its_level(line, level):
    seen = []
    log = {name: lambda _, text, name=name: seen.append((name, text)) for name in ("info", "warning", "error")}
    _OutputLogger(SimpleNamespace(**log), hidden=[])(line)
    assert seen == [(level, line)]


@pytest.mark.parametrize(
    ("line", "logged"),
    [
        ('{"dataset": "dataset-1", "metrics": {"a": 1}, "new": true}', "result: dataset dataset-1, new True"),
        (f'{{"body": "{"x" * 5000}"}}', None),
        ("{not JSON}", "{not JSON}"),
        ("[" * 9, "[" * 9),
    ],
)
def test_the_log_has_a_short_line_of_the_result(line, logged):
    seen = []
    _OutputLogger(SimpleNamespace(info=lambda _, text: seen.append(text)), hidden=[])(line)
    assert len(seen[0]) < 1000
    assert logged is None or seen == [logged]


def test_a_missing_connection_says_what_to_do(breakhis, context):
    breakhis("write({})")
    task = stage("promote", "m", "1", connections=["breakhis_mlflow"])
    with pytest.raises(AirflowFailException, match=r"'breakhis_mlflow'.*Admin > Connections"):
        task.execute(context())


@pytest.mark.parametrize(
    ("connection", "url"),
    [
        ({"host": "http://127.0.0.1:8080"}, "http://127.0.0.1:8080"),
        ({"host": "http://127.0.0.1", "port": 8080}, "http://127.0.0.1:8080"),
        ({"host": "airflow", "port": 8080, "conn_type": "http"}, "http://airflow:8080"),
        ({"host": "airflow", "schema": "https"}, "https://airflow"),
        ({"host": "airflow", "conn_type": "https"}, "https://airflow"),
    ],
)
def test_a_connection_may_be_written_in_any_of_airflows_ways(connection, url):
    nothing = {"host": None, "port": None, "schema": None, "conn_type": None}
    assert _format_url(SimpleNamespace(**{**nothing, **connection})) == url


# --- where it runs --------------------------------------------------------------------------------------------------

GROUP = """
child = subprocess.Popen(["sleep", "300"])
with open({pids!r} + ".part", "w") as file:
    file.write(f"{{os.getpid()}} {{child.pid}}")
os.rename({pids!r} + ".part", {pids!r})
"""


def test_lines_come_while_the_process_runs(breakhis, tmp_path):
    seen = tmp_path / "seen"
    breakhis(f"say('first')\nwhile not os.path.exists({str(seen)!r}): time.sleep(0.02)\nsay('second')")
    lines = []

    def output(line: str) -> None:
        lines.append(line)
        seen.touch()

    assert stage("fetch").run_command(["breakhis", "fetch"], dict(os.environ), output) == 0
    assert lines == ["first", "second"]


@pytest.mark.parametrize("manners", ["", "signal.signal(signal.SIGTERM, signal.SIG_IGN)"], ids=["polite", "stubborn"])
def test_stopping_the_task_ends_the_whole_group(breakhis, tmp_path, manners):
    pids = tmp_path / "pids"
    breakhis(manners + GROUP.format(pids=str(pids)) + "time.sleep(300)")
    task = stage("fetch")
    threading.Thread(target=lambda: (when(pids), task.on_kill())).start()
    started = time.monotonic()
    status = task.run_command(["breakhis", "fetch"], dict(os.environ), lambda line: None)
    assert status == -(signal.SIGKILL if manners else signal.SIGTERM)
    assert time.monotonic() - started < 15
    assert all(gone(int(pid)) for pid in pids.read_text().split())


def test_an_exception_such_as_a_timeout_ends_the_whole_group(breakhis, tmp_path):
    pids = tmp_path / "pids"
    breakhis(GROUP.format(pids=str(pids)) + "say('here'); time.sleep(300)")

    class TimedOut(BaseException):
        pass

    def output(line: str) -> None:
        raise TimedOut

    with pytest.raises(TimedOut):
        stage("fetch").run_command(["breakhis", "fetch"], dict(os.environ), output)
    assert all(gone(int(pid)) for pid in pids.read_text().split())


def test_a_killed_process_with_a_living_child_does_not_hang_the_task(breakhis, tmp_path):
    pids = tmp_path / "pids"  # the child holds the pipe open, as pool workers do when the kernel kills their parent
    breakhis(GROUP.format(pids=str(pids)) + "os.kill(os.getpid(), signal.SIGKILL)")
    started = time.monotonic()
    assert stage("fetch").run_command(["breakhis", "fetch"], dict(os.environ), print) == -signal.SIGKILL
    assert time.monotonic() - started < 15
    assert all(gone(int(pid)) for pid in pids.read_text().split())


def test_a_killed_worker_leaves_no_stage_behind(breakhis, tmp_path):
    pids = tmp_path / "pids"
    breakhis(GROUP.format(pids=str(pids)) + "time.sleep(300)")
    worker = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os; from breakhis_airflow.places import stage; "
            "stage('fetch').run_command(['breakhis', 'fetch'], dict(os.environ), print)",
        ],
        env={**os.environ, "PYTHONPATH": os.environ["AIRFLOW__CORE__PLUGINS_FOLDER"]},
    )
    leader, child = (int(pid) for pid in when(pids).split())
    try:
        worker.kill()
        worker.wait()
        assert gone(leader)
    finally:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def test_a_worker_without_the_command_says_so(tmp_path, monkeypatch, store, context):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(AirflowFailException, match="'breakhis' is not on this worker's PATH"):
        stage("fetch", "demo").execute(context())
