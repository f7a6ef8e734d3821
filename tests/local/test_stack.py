"""The stack's bookkeeping: ports, processes, passwords, environment, training sets. Servers are stood in for."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
from filelock import FileLock

from ml.core.errors import StackError, TryAgain
from ml.core.settings import Settings
from ml.local import stack as module
from ml.local.stack import Process, Service, Stack, State, expected_dags, free_ports, gpu_slots

SLEEPERS = "import subprocess, sys, time; p = [subprocess.Popen(['sleep', '300']) for _ in range(2)]; time.sleep(300)"


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name in [name for name in os.environ if name.startswith(("BREAKHIS_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    conf = tmp_path / "conf"
    for folder in ("sources", "training_sets", "policies"):
        (conf / folder).mkdir(parents=True)
    return Settings(home=tmp_path / "home", conf=conf)


@pytest.fixture
def children() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for child in started:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def sleeper(children: list[subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    """A process with two children, in a session of its own, as a server is started."""
    child = subprocess.Popen([sys.executable, "-c", SLEEPERS], start_new_session=True)
    children.append(child)
    deadline = time.monotonic() + 20
    while len(psutil.Process(child.pid).children()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return child


def recorded(settings: Settings, *processes: Process, family: list[Process] | None = None) -> None:
    """Write a stack.json that says these are our servers."""
    settings.home.mkdir(exist_ok=True)
    services = {
        name: Service(process=process, url="http://127.0.0.1:9", log=settings.home / f"{name}.log")
        for name, process in zip(("airflow", "mlflow"), processes, strict=False)
    }
    state = State(started=datetime.now(UTC), services=services, family=family or [], settings={})
    (settings.home / "stack.json").write_text(state.model_dump_json())


# --- ports ------------------------------------------------------------------------------------------------------------


def test_a_preferred_port_is_taken_if_it_is_free() -> None:
    with free_ports(0) as [free]:
        pass
    with free_ports(free) as again:
        assert again == [free]


def test_a_port_somebody_listens_on_is_left_alone() -> None:
    for host in ("127.0.0.1", "0.0.0.0"):
        with socket.create_server((host, 0)) as server:
            taken = server.getsockname()[1]
            with free_ports(taken) as [other]:
                assert other != taken


def test_ports_are_all_different() -> None:
    with free_ports(0) as [free]:
        pass
    with free_ports(free, free, 0, 0) as ports:
        assert len(set(ports)) == 4


def test_a_port_of_a_stack_that_is_starting_is_left_alone() -> None:
    ask = "import sys; from ml.local.stack import free_ports\nwith free_ports(int(sys.argv[1])) as [port]: print(port)"
    with free_ports(0) as [held]:
        other = subprocess.run([sys.executable, "-c", ask, str(held)], capture_output=True, text=True, check=True)
        assert int(other.stdout) != held
    again = subprocess.run([sys.executable, "-c", ask, str(held)], capture_output=True, text=True, check=True)
    assert int(again.stdout) == held


# --- processes --------------------------------------------------------------------------------------------------------


def test_a_process_is_known_by_more_than_its_pid(children: list[subprocess.Popen[bytes]]) -> None:
    child = sleeper(children)
    process = Process.of(child.pid)
    assert process.alive()
    assert not Process(pid=process.pid, birth=process.birth + "1").alive()


def test_a_dead_process_and_a_zombie_are_not_alive(children: list[subprocess.Popen[bytes]]) -> None:
    child = sleeper(children)
    process = Process.of(child.pid)
    os.killpg(child.pid, signal.SIGKILL)
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert not process.alive()
    child.wait()
    assert not process.alive()


def test_down_stops_servers_and_their_children(settings: Settings, children: list[subprocess.Popen[bytes]]) -> None:
    child = sleeper(children)
    family = psutil.Process(child.pid).children()
    recorded(settings, Process.of(child.pid))
    assert Stack(settings).down()
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family)
    assert child.wait(5) == -signal.SIGTERM
    assert not (settings.home / "stack.json").exists()
    assert not Stack(settings).down()


def test_down_stops_what_a_server_that_died_has_left(
    settings: Settings, children: list[subprocess.Popen[bytes]]
) -> None:
    child = sleeper(children)
    one, other = psutil.Process(child.pid).children()
    # Only one of the two was there when the stack was recorded; the other is found since it shares the session.
    recorded(settings, Process.of(child.pid), family=[Process.of(one.pid)])
    child.kill()
    child.wait()
    assert Stack(settings).down()
    _, alive = psutil.wait_procs([one, other], timeout=5)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


def test_down_never_touches_a_process_that_got_an_old_pid(
    settings: Settings, children: list[subprocess.Popen[bytes]]
) -> None:
    stranger = sleeper(children)
    recorded(settings, Process(pid=stranger.pid, birth="an earlier boot:1"))
    assert not Stack(settings).down()
    assert stranger.poll() is None
    assert len(psutil.Process(stranger.pid).children()) == 2


def test_down_kills_what_does_not_listen(
    settings: Settings, children: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SECONDS_TO_STOP", 0.5)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(300)"
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE)
    children.append(child)
    assert child.stdout
    child.stdout.readline()
    recorded(settings, Process.of(child.pid))
    assert Stack(settings).down()
    assert child.wait(5) == -signal.SIGKILL
    child.stdout.close()


def test_down_does_not_stop_the_caller(settings: Settings, children: list[subprocess.Popen[bytes]]) -> None:
    child = subprocess.Popen(["sleep", "300"])  # in our own session, as a careless test might start it
    children.append(child)
    recorded(settings, Process.of(child.pid))
    assert Stack(settings).down()
    assert child.wait(5) == -signal.SIGTERM


# --- what is running --------------------------------------------------------------------------------------------------


def test_nothing_runs(settings: Settings) -> None:
    stack = Stack(settings)
    found = stack.status()
    assert (found["running"], found["healthy"], found["services"]) == (False, False, {})
    with pytest.raises(StackError, match="breakhis up"):
        stack.api("admin")
    assert not settings.home.exists()  # asking leaves no trace


def test_servers_that_died_are_not_running(settings: Settings) -> None:
    recorded(settings, Process(pid=1, birth="x"), Process(pid=1, birth="x"))
    found = Stack(settings).status()
    assert not found["running"]
    assert found["services"]["airflow"]["trouble"] == "not running"


def test_servers_that_do_not_answer_are_not_healthy(
    settings: Settings, children: list[subprocess.Popen[bytes]]
) -> None:
    process = Process.of(sleeper(children).pid)
    recorded(settings, process, process)
    found = Stack(settings).status()
    assert found["running"]
    assert not found["healthy"]
    assert "reached" in found["services"]["airflow"]["trouble"]
    assert "does not answer" in found["services"]["mlflow"]["trouble"]


def test_a_damaged_record_is_said_to_be_one(settings: Settings) -> None:
    settings.home.mkdir()
    (settings.home / "stack.json").write_text("{")
    with pytest.raises(StackError, match=r"stack\.json is damaged"):
        Stack(settings).down()


def test_two_commands_at_once(settings: Settings) -> None:
    settings.home.mkdir()
    with FileLock(settings.home / "stack.lock"), pytest.raises(TryAgain, match="another command"):
        Stack(settings).up()


# --- starting ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the Python that runs the servers: a shell script, to be filled in."""
    script = tmp_path / "python"
    script.touch(mode=0o755)
    monkeypatch.setattr(module.sys, "executable", str(script))
    return script


def test_a_server_that_ends_while_starting_shows_its_last_words(settings: Settings, servers: Path) -> None:
    servers.write_text('#!/bin/sh\n[ "$2" = mlflow ] && exec sleep 300\necho "no such table: dag"; exit 1\n')
    with pytest.raises(StackError, match=r"airflow ended(.|\n)*airflow\.log(.|\n)*no such table: dag"):
        Stack(settings).up()
    assert not (settings.home / "stack.json").exists()
    assert not [p for p in psutil.process_iter(["cmdline", "cwd"]) if _runs_in(p, settings.home)]


def test_a_component_that_ends_is_noticed(settings: Settings, servers: Path) -> None:
    # As 'airflow standalone' does: a child ends, and its parent does not care.
    code = "import subprocess, time; subprocess.Popen(['false']); time.sleep(300)"
    servers.write_text(f'#!/bin/sh\nexec {Path(sys.prefix) / "bin" / "python"} -c "{code}"\n')
    with pytest.raises(StackError, match="ended while it was starting"):
        Stack(settings).up()


def test_a_server_that_never_becomes_healthy(
    settings: Settings, servers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SECONDS_TO_START", 1.0)
    servers.write_text("#!/bin/sh\nexec sleep 300\n")
    with pytest.raises(StackError, match="not healthy after 1 s"):
        Stack(settings).up()
    assert not [p for p in psutil.process_iter(["cmdline", "cwd"]) if _runs_in(p, settings.home)]


def test_the_last_logs_are_kept_once(settings: Settings, servers: Path) -> None:
    for words in ("first", "second", "third"):
        servers.write_text(f"#!/bin/sh\necho {words}; exit 1\n")
        with pytest.raises(StackError):
            Stack(settings).up()
    logs = settings.home / "logs"
    assert (logs / "airflow.log").read_text() == "third\n"
    assert (logs / "airflow.previous.log").read_text() == "second\n"


def _runs_in(process: psutil.Process, folder: Path) -> bool:
    try:
        return process.cwd() == str(folder)
    except psutil.Error:
        return False


# --- passwords and environment ----------------------------------------------------------------------------------------


def test_passwords_are_random_private_and_kept(settings: Settings) -> None:
    settings.home.mkdir()
    first = Stack(settings).passwords()
    assert set(first) == {"admin", "engineer", "reviewer", "viewer", "breakhis-service"}
    assert len(set(first.values())) == 5
    assert all(len(password) >= 16 for password in first.values())
    assert stat.S_IMODE((settings.home / "passwords.json").stat().st_mode) == 0o600
    more = Stack(settings.model_copy(update={"reviewers": ("dr_who",)})).passwords()
    assert {name: more[name] for name in first} == first
    assert more["dr_who"] not in first.values()


def test_damaged_passwords_are_said_to_be(settings: Settings) -> None:
    settings.home.mkdir()
    (settings.home / "passwords.json").write_text("?")
    with pytest.raises(StackError, match=r"passwords\.json is damaged"):
        Stack(settings).passwords()


def environment(settings: Settings) -> dict[str, str]:
    settings.home.mkdir(exist_ok=True)
    return Stack(settings)._environment("http://127.0.0.1:8080", "http://127.0.0.1:5000", [1, 2])


def test_the_environment_of_another_airflow_stays_out(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW__DATABASE__SQL_ALCHEMY_CONN", "postgresql://production")
    monkeypatch.setenv("AIRFLOW_CONN_PROD", "http://production")
    monkeypatch.setenv("BREAKHIS_AIRFLOW_PASSWORD", "somebody's")
    monkeypatch.setenv("KAGGLE_API_TOKEN", "token")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://s3")
    monkeypatch.setenv("BREAKHIS_WORKERS", "3")
    found = environment(settings)
    assert not {"AIRFLOW_CONN_PROD", "BREAKHIS_AIRFLOW_PASSWORD"} & found.keys()
    assert found["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"] == f"sqlite:///{settings.home}/airflow/airflow.db"
    assert (found["KAGGLE_API_TOKEN"], found["AWS_ENDPOINT_URL"], found["BREAKHIS_WORKERS"]) == (
        "token",
        "http://s3",
        "3",
    )


def test_stages_find_the_store_mlflow_and_themselves(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(settings.conf)
    found = environment(settings.model_copy(update={"weights": "b0.h5", "gpus": 1}))
    assert found["BREAKHIS_STORE"] == settings.store
    assert found["BREAKHIS_MLFLOW_URI"] == found["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:5000"
    assert found["BREAKHIS_WEIGHTS"] == str(settings.conf / "b0.h5")
    assert found["BREAKHIS_GPUS"] == "1"
    assert found["PATH"].split(os.pathsep)[0] == str(Path(sys.prefix) / "bin")
    assert {"127.0.0.1", "localhost"} <= set(found["NO_PROXY"].split(","))


def test_keys_stay_the_same_over_restarts(settings: Settings) -> None:
    keys = ("AIRFLOW__API_AUTH__JWT_SECRET", "AIRFLOW__CORE__FERNET_KEY", "AIRFLOW__API__SECRET_KEY")
    first, second = environment(settings), environment(settings)
    assert [first[key] for key in keys] == [second[key] for key in keys]
    assert len({first[key] for key in keys}) == 3
    assert stat.S_IMODE((settings.home / "secrets.json").stat().st_mode) == 0o600


def test_promotion_reads_under_a_service_account(settings: Settings) -> None:
    found = environment(settings)
    connection = json.loads(found["AIRFLOW_CONN_BREAKHIS_AIRFLOW"])
    assert connection["host"] == "http://127.0.0.1:8080"
    assert connection["login"] == "breakhis-service"
    assert connection["password"] == Stack(settings).passwords()["breakhis-service"]
    assert "breakhis-service:viewer" in found["AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS"].split(",")


def test_stages_are_the_trainer_in_mlflow_unless_they_decide(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "somebody")
    found = environment(settings.model_copy(update={"connections": ("lab_store",)}))
    assert found["BREAKHIS_CONNECTIONS"] == "lab_store,breakhis_mlflow"
    trainer, promoter = (json.loads(found[f"AIRFLOW_CONN_BREAKHIS_MLFLOW{name}"]) for name in ("", "_PROMOTER"))
    assert (trainer["login"], promoter["login"]) == ("breakhis-trainer", "breakhis-promoter")
    assert len({trainer["password"], promoter["password"], *Stack(settings).passwords().values()}) == 7
    assert "MLFLOW_TRACKING_USERNAME" not in found


def test_mlflow_has_its_own_secrets_and_none_of_airflows(settings: Settings) -> None:
    airflows = environment(settings)
    users = settings.home / "mlflow_users.db"
    users.write_text("of another administrator")
    found = Stack(settings)._mlflow_environment(airflows)
    assert not users.exists()
    assert not [name for name in found if name.startswith("AIRFLOW")]
    own = {name for name in found if name not in airflows}
    assert own == {"MLFLOW_AUTH_CONFIG_PATH", "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"}
    assert found["MLFLOW_AUTH_ADMIN_PASSWORD"] == Stack(settings).passwords()["admin"]
    told = Path(found["MLFLOW_AUTH_CONFIG_PATH"]).read_text()
    assert f"database_uri = sqlite:///{users}" in told
    assert not [name for name in own - {"MLFLOW_AUTH_CONFIG_PATH"} if found[name] in told]


def test_every_reviewer_is_a_user(settings: Settings) -> None:
    users = Stack(settings.model_copy(update={"reviewers": ("dr_who", "viewer")})).users()
    assert (users["dr_who"], users["viewer"], users["reviewer"]) == ("user", "viewer", "user")


@pytest.mark.parametrize(("listing", "slots"), [("GPU 0: H200\nGPU 1: H200\nGPU 2: H200\n", 3), ("", 2)])
def test_a_training_per_gpu_or_two(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listing: str, slots: int
) -> None:
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text(f"#!/bin/sh\nprintf '{listing}'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(smi.parent))
    assert gpu_slots(settings) == slots
    assert gpu_slots(settings.model_copy(update={"gpus": 1})) == 1
    assert gpu_slots(settings.model_copy(update={"gpus": 0})) == 2


# --- training sets and DAGs -------------------------------------------------------------------------------------------

SOURCE = "name: {name}\nkind: demo\n"
TRAINING_SET = "name: {name}\nsources: [{source}]\nledger: {name}\npolicy: demo\npreset: demo\n"


def test_a_training_set_given_by_path_is_remembered(settings: Settings, tmp_path: Path) -> None:
    extra = tmp_path / "mine.yaml"
    extra.touch()
    settings.home.mkdir()
    assert Stack(settings)._remember(extra)
    assert Stack(settings).settings.training_sets == (extra,)
    assert str(extra) in environment(settings)["BREAKHIS_TRAINING_SETS"]
    extra.unlink()
    assert Stack(settings).settings.training_sets == ()


def test_a_training_set_of_the_conf_folder_needs_no_remembering(settings: Settings) -> None:
    settings.home.mkdir()
    assert not Stack(settings)._remember(settings.conf / "training_sets" / "demo.yaml")
    assert not (settings.home / "training_sets.json").exists()


def test_a_running_stack_that_knows_the_set_is_not_restarted(settings: Settings, tmp_path: Path) -> None:
    extra = tmp_path / "mine.yaml"
    extra.touch()
    settings.home.mkdir()
    Stack(settings)._remember(extra)
    assert Stack(settings)._remember(extra)  # nothing runs with it
    state = State(started=datetime.now(UTC), services={}, settings={"BREAKHIS_TRAINING_SETS": str(extra)})
    (settings.home / "stack.json").write_text(state.model_dump_json())
    assert not Stack(settings)._remember(extra)


def test_expected_dags_come_from_the_yaml_files(settings: Settings, tmp_path: Path) -> None:
    (settings.conf / "sources" / "one.yaml").write_text(SOURCE.format(name="one"))
    (settings.conf / "sources" / "bad.yaml").write_text("name: bad\nkind: demo\ncolour: red\n")
    (settings.conf / "training_sets" / "one.yaml").write_text(TRAINING_SET.format(name="one", source="one"))
    (tmp_path / "two.yaml").write_text(SOURCE.format(name="two"))
    extra = tmp_path / "extra.yaml"
    extra.write_text(TRAINING_SET.format(name="extra", source="./two.yaml"))
    ids, problems = expected_dags(settings.model_copy(update={"training_sets": (extra,)}))
    of_no_file = {"promote", "rollback", "withdraw", "audit", "remind"}
    assert ids == {*of_no_file, "ingest_one", "ingest_two", "retrain_one", "retrain_extra"}
    assert len(problems) == 1
    assert "bad.yaml" in problems[0]
    assert "colour" in problems[0]


class Dags:
    """As much of the API as check_dags asks."""

    def __init__(self, dags: list[dict[str, Any]], errors: list[dict[str, Any]]) -> None:
        self._dags, self._errors = dags, errors

    def dags(self) -> list[dict[str, Any]]:
        return self._dags

    def import_errors(self) -> list[dict[str, Any]]:
        return self._errors


def dag(name: str, at: str = "2026-01-02T00:00:00Z", **more: Any) -> dict[str, Any]:
    return {"dag_id": name, "last_parsed_time": at, "tags": [], "description": "", **more}


@pytest.fixture
def check(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Checks the given DAGs and import errors, of a stack that was started on 1 January 2026."""
    state = State(started=datetime(2026, 1, 1, tzinfo=UTC), services={}, settings={})
    (settings.conf / "sources" / "one.yaml").write_text(SOURCE.format(name="one"))
    ticks = iter(range(0, 100_000, 5))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(ticks)))
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)

    def run(dags: list[dict[str, Any]], errors: list[dict[str, Any]]) -> list[str]:
        stack = Stack(settings)
        always = [dag(name) for name in ("rollback", "withdraw", "audit", "remind")]
        monkeypatch.setattr(stack, "api", lambda user: Dags([*dags, *always], errors))
        return stack.check_dags(state)

    return run


def test_all_dags_are_there(check: Any) -> None:
    assert check([dag("promote"), dag("ingest_one")], []) == []


def test_dags_of_an_earlier_start_do_not_count(check: Any) -> None:
    old = "2025-12-31T00:00:00Z"
    problems = check([dag("promote"), dag("ingest_one", at=old)], [])
    assert problems == ["these DAGs are missing: ingest_one"]


def test_import_errors_are_shown(check: Any) -> None:
    error = {"filename": "ingest.py", "stack_trace": "ImportError: no", "timestamp": "2026-01-02T00:00:00Z"}
    problems = check([dag("promote")], [error, {**error, "filename": "old", "timestamp": "2025-01-01T00:00:00Z"}])
    assert problems == ["ingest.py does not import: ImportError: no", "these DAGs are missing: ingest_one"]


def test_dags_of_unusable_files_say_why(check: Any) -> None:
    invalid = dag("retrain_x", tags=[{"name": "invalid"}], description="x.yaml: 'sources' is missing")
    assert check([dag("promote"), dag("ingest_one"), invalid], []) == ["x.yaml: 'sources' is missing"]


@pytest.mark.parametrize(
    ("text", "there"), [("", False), ("on_failure: []", False), ("on_failure: [{notifier: some.Notifier}]", True)]
)
def test_a_notifier_brings_a_dag_to_try_it(settings: Settings, text: str, there: bool) -> None:
    settings.conf.mkdir(parents=True, exist_ok=True)
    (settings.conf / "notifications.yaml").write_text(text)
    ids, _ = expected_dags(settings)
    assert ("try_notifications" in ids) is there
