"""Isolation of logged code: what a process can see and do in each way of it, and which way a machine gets."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from contextlib import closing
from pathlib import Path
from typing import get_args

import mlflow
import psutil
import pytest

from ml.registry import sandbox, version_scoring
from ml.registry.sandbox import Isolation, find_isolation, isolate_command, make_environment
from ml.registry.version_scoring import ModelProcess

pytestmark = pytest.mark.integration

SPY = textwrap.dedent(
    """
    import json
    import os
    import socket
    from pathlib import Path

    import mlflow.pyfunc
    import pandas as pd


    def attempt(action):
        try:
            return str(action())
        except Exception as error:
            return f"failed: {type(error).__name__}"


    class Spy(mlflow.pyfunc.PythonModel):
        def predict(self, context, model_input: pd.DataFrame, params=None):
            asked = json.loads(model_input.iloc[0, 0])
            model = Path(context.artifacts["own"])
            return pd.DataFrame([{
                "own": attempt(model.read_text),
                "key": attempt(lambda: os.environ["BREAKHIS_AUDIT_KEY"]),
                "store": attempt(lambda: os.listdir(asked["store"])),
                "file": attempt(lambda: Path(asked["store"], "secret").read_text()),
                "parent": attempt(lambda: b"BREAKHIS_AUDIT_KEY" in Path("/proc", asked["pid"], "environ").read_bytes()),
                "processes": attempt(lambda: asked["pid"] in os.listdir("/proc")),
                "network": attempt(lambda: socket.create_connection(("127.0.0.1", asked["port"]), 2).close()),
                "change": attempt(lambda: model.write_text("changed")),
                "scratch": attempt(lambda: Path(os.environ["HOME"], "x").write_text("x")),
            }])


    mlflow.models.set_model(Spy())
    """
)

NAMESPACES = {
    **{"own": "of the model", "key": "failed: KeyError", "store": "failed: FileNotFoundError"},
    **{"file": "failed: FileNotFoundError", "parent": "failed: FileNotFoundError", "processes": "False"},
    **{"change": "failed: OSError", "scratch": "1"},
}
SEEN = {
    "bubblewrap": {**NAMESPACES, "network": "failed: ConnectionRefusedError"},
    "unshare": {**NAMESPACES, "network": "failed: OSError"},
    "none": {"own": "of the model", "key": "failed: KeyError", "store": "['secret']", "network": "None"},
}
"""What the spy reports, by isolation."""


def run_isolated(isolation, command, scratch, **options):
    return subprocess.run(
        isolate_command(isolation, command, readable=[], scratch=scratch),
        env=make_environment(scratch),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        **options,
    )


def require(isolation: Isolation, scratch: Path) -> None:
    """Skips a test where the machine does not allow an isolation, and says so."""
    try:
        done = run_isolated(isolation, [sys.executable, "-c", ""], scratch)
        reason = done.stderr.strip()[-200:] if done.returncode else ""
    except OSError as error:
        reason = str(error)
    if reason:
        pytest.skip(f"this machine does not allow {isolation}: {reason}")


@pytest.fixture
def folder(tmp_path_factory):
    """A folder beside that of the test, to be the scratch folder."""
    return tmp_path_factory.mktemp("scratch")


@pytest.mark.parametrize("isolation", SEEN)
def test_what_a_logged_model_sees(isolation, tmp_path, folder, monkeypatch):
    require(isolation, folder)
    monkeypatch.setattr(version_scoring, "find_isolation", lambda: isolation)
    monkeypatch.setenv("BREAKHIS_AUDIT_KEY", "the key of the audit log")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "secret").write_text("a secret")
    (tmp_path / "model.py").write_text(SPY)
    (tmp_path / "own").write_text("of the model")
    artifacts = {"own": str(tmp_path / "own")}
    saved = tmp_path / "saved"
    mlflow.pyfunc.save_model(saved, python_model=str(tmp_path / "model.py"), artifacts=artifacts, pip_requirements=[])
    with closing(socket.create_server(("127.0.0.1", 0))) as server, ModelProcess(saved, "made version 1") as process:
        asked = {"store": str(tmp_path / "store"), "pid": str(os.getpid()), "port": server.getsockname()[1]}
        (row,) = process.predict([json.dumps(asked).encode()])
    assert {name: row[name] for name in SEEN[isolation]} == SEEN[isolation]


def test_without_isolation_it_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(version_scoring, "find_isolation", lambda: "none")
    with pytest.raises(Exception, match="cannot be loaded"):
        ModelProcess(tmp_path, "made version 1").__enter__()
    assert "made version 1: its logged code runs as the same user, with network and" in capsys.readouterr().err


@pytest.mark.parametrize("isolation", ["bubblewrap", "unshare"])
def test_exit_status_and_output_are_those_of_the_program(isolation, folder):
    require(isolation, folder)
    done = run_isolated(isolation, ["/bin/sh", "-c", "cat; echo told >&2; exit 9"], folder, input="given")
    assert (done.returncode, done.stdout, done.stderr) == (9, "given", "told\n")
    assert run_isolated(isolation, ["/bin/sh", "-c", "kill -9 $$"], folder).returncode in {-9, 128 + 9}


@pytest.mark.parametrize("isolation", ["bubblewrap", "unshare"])
def test_nothing_is_left_of_what_was_killed(isolation, folder):
    require(isolation, folder)
    command = isolate_command(isolation, ["/bin/sh", "-c", "sleep 600 & echo ready; wait"], readable=[], scratch=folder)
    process = subprocess.Popen(command, env=make_environment(folder), stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    inner = psutil.Process(process.pid).children(recursive=True)
    assert inner
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(inner, timeout=30)
    assert not alive
    process.stdout.close()


@pytest.mark.parametrize("isolation", ["bubblewrap", "unshare"])
def test_data_that_lies_beside_python_is_hidden(isolation, tmp_path, folder, monkeypatch):
    require(isolation, folder)
    for name in ("project/package", "project/home/store", "project/home/python"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "project" / "home" / "secrets.json").write_text("{}")
    monkeypatch.setattr(sandbox, "_find_data", lambda: [tmp_path / "project" / "home"])
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'project'}{os.pathsep}{tmp_path / 'project' / 'home' / 'python'}")
    done = run_isolated(isolation, ["/bin/sh", "-c", f"cd {tmp_path}/project && find . -type d -o -type f"], folder)
    assert sorted(done.stdout.split()) == [".", "./home", "./home/python", "./package"]


def test_as_another_user(folder):
    """Run by root: the program is nobody, and reads what nobody may read."""
    folder.chmod(0o755)
    secret = folder / "secret"
    secret.write_text("a secret")
    done = run_isolated("user", ["/bin/sh", "-c", "id -u; id -G; cat /proc/1/environ"], folder)
    if os.geteuid() != 0:
        assert done.returncode != 0
        assert "Operation not permitted" in done.stderr
        return
    assert done.stdout.split() == ["65534", "65534"]
    assert "Permission denied" in done.stderr
    assert secret.stat().st_uid == 65534


@pytest.mark.parametrize("best", get_args(Isolation))
def test_the_best_that_works_is_found_once(best, monkeypatch):
    tried = []

    def make_command(isolation, command, *, readable, scratch):
        tried.append(isolation)
        if isolation == "bubblewrap" != best:
            return ["/no/such/program"]
        return ["/bin/sh", "-c", "exit 0" if isolation == best else "exit 1"]

    monkeypatch.setattr(sandbox, "isolate_command", make_command)
    find_isolation.cache_clear()
    try:
        assert find_isolation() == find_isolation() == best
    finally:
        find_isolation.cache_clear()
    order = [*get_args(Isolation)]
    assert tried == order[: order.index(best) + 1] if best != "none" else order[:-1]


def test_the_environment_is_a_short_list(tmp_path, monkeypatch):
    for name in ("BREAKHIS_STORE", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "HTTP_PROXY", "HOME"):
        monkeypatch.setenv(name, "of the parent")
    assert "of the parent" not in make_environment(tmp_path).values()
    assert make_environment(tmp_path)["HOME"] == str(tmp_path)
