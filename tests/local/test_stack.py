"""What the stack records, starts and stops, and the training sets that it remembers. The servers are stand-ins."""

import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner
from filelock import FileLock

from ml.core.airflow_api import AirflowApi
from ml.core.errors import StackError, TryAgain
from ml.core.settings import Settings
from ml.local import cli, processes
from ml.local import stack as module
from ml.local.airflow_server import make_breakhis_environment
from ml.local.processes import Process
from ml.local.stack import Service, Stack, StackState
from tests.helpers.sleepers import sleeper


def recorded(settings: Settings, *processes: Process, family: list[Process] | None = None) -> None:
    """Writes a stack.json that records these processes as our servers."""
    settings.home.mkdir(exist_ok=True)
    services = {
        name: Service(process=process, url="http://127.0.0.1:9", log=settings.home / f"{name}.log")
        for name, process in zip(("airflow", "mlflow"), processes, strict=False)
    }
    state = StackState(started=datetime.now(UTC), services=services, family=family or [], settings={})
    (settings.home / "stack.json").write_text(state.model_dump_json())


# --- stopping ---------------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(processes, "_SECONDS_TO_STOP", 0.5)
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


@pytest.mark.parametrize(
    ("pools", "healthy", "status"), [(["gpu", "promotion"], True, 0), (["promotion"], False, 3), ([], False, 3)]
)
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_missing_pool_is_an_error_of_the_status(
    settings: Settings,
    children: list[subprocess.Popen[bytes]],
    monkeypatch: pytest.MonkeyPatch,
    pools: list[str],
    healthy: bool,
    status: int,
    options: list[str],
) -> None:
    process = Process.of(sleeper(children).pid)
    recorded(settings, process, process)
    monkeypatch.setattr(module, "_HEALTH_CHECKS", {name: lambda url: "" for name in ("airflow", "mlflow")})
    monkeypatch.setattr(AirflowApi, "pools", lambda self: [{"name": name, "slots": 1} for name in pools])
    monkeypatch.setattr(module, "find_hints", lambda api: ["candidates wait"])
    monkeypatch.setattr(cli, "read_settings", lambda: settings)
    assert Stack(settings).status()["healthy"] == healthy
    result = CliRunner().invoke(cli.status, options)
    assert "candidates wait" in result.stdout
    assert getattr(result.exception, "exit_code", 0) == status
    if status:
        assert isinstance(result.exception, StackError)
        assert "gpu (missing)" in str(result.exception)
        assert "gpu (missing)" in result.stdout


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
    code = "import subprocess, time; child = subprocess.Popen(['false']); time.sleep(300)"  # else Python may reap it
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


# --- training sets ----------------------------------------------------------------------------------------------------


def test_a_training_set_given_by_path_is_remembered(settings: Settings, tmp_path: Path) -> None:
    extra = tmp_path / "mine.yaml"
    extra.touch()
    settings.home.mkdir()
    assert Stack(settings)._remember_training_set(extra)
    assert Stack(settings).settings.training_sets == (extra,)
    assert (
        str(extra)
        in make_breakhis_environment(Stack(settings).settings, "http://127.0.0.1:5000")["BREAKHIS_TRAINING_SETS"]
    )
    extra.unlink()
    assert Stack(settings).settings.training_sets == ()


def test_a_training_set_of_the_conf_folder_needs_no_remembering(settings: Settings) -> None:
    settings.home.mkdir()
    assert not Stack(settings)._remember_training_set(settings.conf / "training_sets" / "demo.yaml")
    assert not (settings.home / "training_sets.json").exists()


def test_a_running_stack_that_knows_the_set_is_not_restarted(settings: Settings, tmp_path: Path) -> None:
    extra = tmp_path / "mine.yaml"
    extra.touch()
    settings.home.mkdir()
    Stack(settings)._remember_training_set(extra)
    assert Stack(settings)._remember_training_set(extra)  # nothing runs with it
    state = StackState(started=datetime.now(UTC), services={}, settings={"BREAKHIS_TRAINING_SETS": str(extra)})
    (settings.home / "stack.json").write_text(state.model_dump_json())
    assert not Stack(settings)._remember_training_set(extra)
