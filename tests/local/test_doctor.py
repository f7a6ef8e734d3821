"""The checks of ``breakhis doctor``: what each finds and advises."""

import json
import re
import socket
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from ml.core.errors import BreakhisError, TryAgain
from ml.core.settings import PROJECT, Settings
from ml.local import cli, doctor
from ml.local.airflow_server import POOLS
from ml.local.doctor import GIB, Check


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole PATH, for stand-in commands."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def command(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("version", "state"), [((3, 10), "missing"), ((3, 11), "ok"), ((3, 13), "ok"), ((3, 14), "missing")]
)
def test_python(version: tuple[int, int], state: str) -> None:
    assert doctor.check_python(version).state == state


@pytest.mark.parametrize(("free", "state"), [(2, "missing"), (5, "warning"), (50, "ok")])
def test_disk(tmp_path: Path, free: int, state: str) -> None:
    check = doctor.check_disk(tmp_path / "not" / "there" / "yet", free * GIB)
    assert (check.state, str(tmp_path) in check.found) == (state, True)
    assert bool(check.advice) == (state != "ok")


@pytest.mark.parametrize(("total", "state"), [(2, "missing"), (4, "warning"), (16, "ok")])
def test_memory(total: int, state: str) -> None:
    assert doctor.check_memory(total * GIB).state == state


def test_ports(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("127.0.0.1", 8080))
            s.listen()
        except OSError:
            pass  # somebody else has it, which is as good
        check = doctor.check_ports(settings)
    assert check.state == "warning"
    assert "8080 (Airflow)" in check.found


def test_a_store_that_can_be_written(tmp_path: Path) -> None:
    assert doctor.check_store((tmp_path / "store").as_uri()).state == "ok"
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_cannot_be_written() -> None:
    check = doctor.check_store("file:///proc/nowhere")
    assert check.state == "missing"
    assert "BREAKHIS_STORE" in check.advice


def test_a_bucket_nobody_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    check = doctor.check_store("s3://bucket/store")
    assert check.state == "missing"
    assert "AWS_ENDPOINT_URL" in check.advice
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:planted2@127.0.0.1:9")
    assert "planted2" not in doctor.check_store("s3://bucket/store").found
    monkeypatch.setenv("AWS_SESSION_TOKEN", "planted2\n")
    assert "AWS_SESSION_TOKEN has a blank, a line break" in doctor.check_store("s3://bucket/store").found


def test_weights_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "b0.h5"
    assert doctor.check_weights(str(file)).state == "missing"
    file.touch()
    assert doctor.check_weights(str(file)).state == "ok"
    assert doctor.check_weights(file.as_uri()).state == "ok"
    assert doctor.check_weights("s3://bucket/b0.h5").state == "ok"
    assert doctor.check_weights("random").state == "warning"


def test_weights_that_keras_has_or_cannot_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    nowhere = "http://127.0.0.1:9/b0_notop.h5"
    check = doctor.check_weights("imagenet", nowhere)
    assert check.state == "warning"
    assert "cannot be reached" in check.found
    assert "b0_notop.h5" in check.advice
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "efficientnetb0_notop.h5").touch()
    assert doctor.check_weights("imagenet", nowhere).state == "ok"


def test_kaggle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLE_CONFIG_DIR", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    check = doctor.check_kaggle()
    assert check.state == "warning"
    assert "KAGGLE_API_TOKEN" in check.advice
    monkeypatch.setenv("KAGGLE_API_TOKEN", "secret-token")
    check = doctor.check_kaggle()
    assert check.state == "ok"
    assert "secret-token" not in str(check)


def test_no_gpu(path: Path) -> None:
    assert doctor.check_gpu().state == "warning"


@pytest.mark.parametrize(("seen", "state"), [("2", "ok"), ("1", "warning"), ("boom", "warning")])
def test_gpus_and_what_tensorflow_sees(path: Path, monkeypatch: pytest.MonkeyPatch, seen: str, state: str) -> None:
    command(path, "nvidia-smi", "echo 'GPU 0: H200'; echo 'GPU 1: H200'")
    command(path, "python", f"echo {seen}")
    monkeypatch.setattr(doctor.sys, "executable", str(path / "python"))
    assert doctor.check_gpu().state == state


def test_docker(path: Path) -> None:
    assert doctor.check_docker().found == "not installed"
    command(path, "docker", "echo 26.1.5; exit 1")
    assert "does not answer" in doctor.check_docker().found
    command(path, "docker", "echo 26.1.5")
    assert doctor.check_docker() == Check("Docker", "ok", "engine 26.1.5")


def test_the_command_shows_all_and_fails_only_for_what_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [Check("Python", "ok", "3.11"), Check("GPU", "warning", "none", "nothing: a CPU trains as well")]
    monkeypatch.setattr(cli, "check_machine", lambda settings: checks)
    result = CliRunner().invoke(cli.doctor)
    assert result.exit_code == 0
    assert "a CPU trains as well" in result.output
    checks.append(Check("Disk", "missing", "1 GiB", "free 3 GiB"))
    result = CliRunner().invoke(cli.doctor, ["--json"])
    assert isinstance(result.exception, BreakhisError)
    assert result.exception.exit_code == 3
    found = json.loads(result.output)
    assert (found["ok"], found["checks"][2]["name"]) == (False, "Disk")


def test_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setattr(
        doctor, "_check_imagenet", lambda name, url: Check(name, "ok", "not asked: no network in tests")
    )
    checks = doctor.check_machine(Settings(home=tmp_path))
    assert {c.name for c in checks} >= {"Python", "Disk", "Memory", "Ports", "Store", "Kaggle", "GPU", "Docker"}
    assert next(c for c in checks if c.name == "Python").found == sys.version.split()[0]


class Pools:
    """As much of Airflow's API as the check of its pools asks."""

    shown_url = "http://airflow"

    def __init__(self, *slots: tuple[str, int], error: BreakhisError | None = None) -> None:
        self._slots, self._error = slots, error

    def pools(self) -> list[dict[str, object]]:
        if self._error:
            raise self._error
        return [{"name": name, "slots": slots} for name, slots in self._slots]


@pytest.mark.parametrize(
    ("pools", "state", "found"),
    [
        (Pools(("default_pool", 128), ("gpu", 2), ("promotion", 1)), "ok", "gpu and promotion"),
        (Pools(("gpu", -1), ("promotion", 1)), "ok", "gpu and promotion"),
        (Pools(("default_pool", 128), ("promotion", 1)), "missing", "gpu (missing)"),
        (Pools(("gpu", 0)), "missing", "gpu (no slot), promotion (missing)"),
        (Pools(error=TryAgain("Airflow cannot be reached")), "warning", "cannot be reached"),
    ],
)
def test_pools_of_the_airflow_that_the_settings_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pools: Pools, state: str, found: str
) -> None:
    monkeypatch.setattr(doctor, "AirflowApi", lambda url, user, password, timeout: pools)
    check = doctor.check_pools(Settings(home=tmp_path, airflow_url="http://airflow", airflow_user="u"))
    assert (check.state, found in check.found) == (state, True)
    assert bool(check.advice) == (state != "ok")


def test_no_airflow_has_no_pools_to_lack(tmp_path: Path) -> None:
    assert doctor.check_pools(Settings(home=tmp_path)).state == "ok"


def test_the_pools_that_tasks_name_are_those_that_are_made_and_looked_for() -> None:
    named = {
        pool
        for file in (PROJECT / "dags").glob("*.py")
        for pool in re.findall(r"""["']?pool["']?\s*[=:]\s*["'](\w+)["']""", file.read_text())
    }
    assert named == set(POOLS)
    assert all(f'"{pool}": (' in (PROJECT / "docker" / "servers.py").read_text() for pool in POOLS)
