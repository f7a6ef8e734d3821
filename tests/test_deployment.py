"""The scripts and files that the servers are deployed with."""

import importlib.util
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docker" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings(text: str) -> dict[str, str]:
    return dict(re.findall(r"^([A-Z0-9_]+)=(.*)$", text, re.MULTILINE))


def make_secrets(file: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "docker/make_secrets.py", ".env.example", str(file)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)


def test_secrets_are_made_by_chance_and_for_their_owner_alone(tmp_path: Path) -> None:
    first, second = tmp_path / "1.env", tmp_path / "2.env"
    make_secrets(first)
    make_secrets(second)
    assert stat.S_IMODE(first.stat().st_mode) == 0o600
    made, other = settings(first.read_text()), settings(second.read_text())
    example = settings((ROOT / ".env.example").read_text())
    assert made.keys() == example.keys()
    secret = {name for name, value in example.items() if value in {"<secret>", "<fernet>"}}
    assert len(secret) > 10
    assert len({made[name] for name in secret}) == len(secret)
    assert all(made[name] != other[name] and len(made[name]) >= 40 for name in secret)
    assert "<" not in "".join(made.values())


def test_what_is_set_stays_and_what_is_new_is_added(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("# mine\nBIND=10.0.0.1\nJWT_SECRET=kept")
    make_secrets(file)
    text = file.read_text()
    assert text.startswith("# mine\nBIND=10.0.0.1\nJWT_SECRET=kept\n")
    made = settings(text)
    assert (made["BIND"], made["JWT_SECRET"]) == ("10.0.0.1", "kept")
    assert made.keys() == settings((ROOT / ".env.example").read_text()).keys()
    assert "has everything already" in make_secrets(file).stdout
    assert file.read_text() == text


def test_every_secret_of_the_stack_is_in_the_example() -> None:
    text = (ROOT / "docker-compose.yaml").read_text()
    demanded = set(re.findall(r"\$\{([A-Z0-9_]+):\?", text))
    assert demanded <= settings((ROOT / ".env.example").read_text()).keys()


def test_nothing_is_published_beyond_localhost_unless_asked() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yaml").read_text())["services"]
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert published
    assert all(port.startswith("${BIND:-127.0.0.1}:") for port in published)


def test_trainings_cannot_reach_the_docker_engine() -> None:
    stack = yaml.safe_load((ROOT / "docker-compose.yaml").read_text())
    assert stack["services"]["engine-proxy"]["networks"] == ["engine"]
    assert stack["networks"]["engine"] == {"internal": True}
    beside = {name for name, service in stack["services"].items() if "engine" in service.get("networks", [])}
    assert beside == {"engine-proxy", "worker-gpu", "scheduler"}
    sockets = [name for name, service in stack["services"].items() if "docker.sock" in str(service.get("volumes"))]
    assert sockets == ["engine-proxy"]


class Became(Exception):
    pass


def become(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    ran: list[str] = []

    def execvp(_: str, command: list[str]) -> None:
        ran.extend(command)
        raise Became

    monkeypatch.setattr(module.os, "execvp", execvp)
    return ran


def test_each_start_sets_up_users_connections_and_names_of_models(monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("servers")
    example = settings((ROOT / ".env.example").read_text())
    for name in (*(name for name in example if name.endswith(("_PASSWORD", "_SECRET", "_KEY"))), "S3_ADDRESS"):
        monkeypatch.setenv(name, f"secret of {name}")
    ran: list[tuple[str, ...]] = []
    imported: dict[str, Any] = {}
    airflow: dict[str, str] = {}
    mlflow: list[Any] = []
    monkeypatch.setattr(module, "_airflow", lambda *arguments: ran.append(arguments))
    monkeypatch.setattr(module, "_import", lambda what, values, *_: imported.update({what: values}))
    monkeypatch.setattr(module, "_set_up_airflow", airflow.update)
    monkeypatch.setattr("ml.local.mlflow_users.set_up_mlflow_users", lambda *arguments: mlflow.extend(arguments))
    monkeypatch.setenv("BREAKHIS_CONF", str(ROOT / "dags"))
    module.init()
    assert ran == [("db", "migrate")]
    people = {name: f"secret of {name.upper()}_PASSWORD" for name in ("engineer", "reviewer", "viewer")}
    own = {"admin": "secret of ADMIN_PASSWORD", "breakhis-service": "secret of SERVICE_PASSWORD"}
    assert airflow == people | own
    url, passwords, models = mlflow
    services = {f"breakhis-{name}": f"secret of MLFLOW_{name.upper()}_PASSWORD" for name in ("trainer", "promoter")}
    assert url == "http://mlflow:5000"
    assert passwords == people | services | {"admin": "secret of MLFLOW_ADMIN_PASSWORD"}
    assert {"breakhis-binary", "breakhis-subtype", "demo-binary", "demo-subtype"} <= set(models)
    connections = imported["connections"]
    logins = {connections[name]["login"]: connections[name]["password"] for name in connections if "mlflow" in name}
    assert logins == services
    stack = yaml.safe_load((ROOT / "docker-compose.yaml").read_text())
    given = stack["services"]["airflow-init"]["environment"]
    assert {name for name in os.environ if os.environ[name].startswith("secret of ")} & set(example) <= {
        *given,
        *("FERNET_KEY", "JWT_SECRET", "API_SECRET", "POSTGRES_PASSWORD", "REDIS_PASSWORD", "MLFLOW_DB_PASSWORD"),
        "MLFLOW_SECRET_KEY",
    }
    # What stages are given unasked, by each host: the trainer's alone.
    shared = [stack["x-airflow-environment"], yaml.safe_load((ROOT / "docker/compose.worker.yaml").read_text())]
    shared[1] = shared[1]["services"]["worker-gpu"]["environment"]
    assert [one["BREAKHIS_CONNECTIONS"] for one in shared] == ["breakhis_store,breakhis_mlflow"] * 2


def test_mlflow_starts_without_a_password_on_its_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = script("servers")
    ran = become(module, monkeypatch)
    written: dict[str, str] = {}
    monkeypatch.setattr(module, "_write", lambda file, text: written.update({file: text}))
    for name in ("MLFLOW_DB_PASSWORD", "MLFLOW_ADMIN_PASSWORD"):
        monkeypatch.setenv(name, f"{name}-planted")
    monkeypatch.setenv("MLFLOW_ALLOWED_HOSTS", "mlflow:5000")
    for name in ("MLFLOW_AUTH_CONFIG_PATH", "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_BACKEND_STORE_URI"):
        monkeypatch.setenv(name, "")
    with pytest.raises(Became):
        module.mlflow()
    assert "planted" not in " ".join(ran)
    assert ":MLFLOW_DB_PASSWORD-planted@postgres/mlflow_users" in written["/tmp/users.ini"]
    assert "default_permission = READ" in written["/tmp/users.ini"]
    assert os.environ["MLFLOW_AUTH_ADMIN_PASSWORD"] == "MLFLOW_ADMIN_PASSWORD-planted"
    assert "MLFLOW_ADMIN_PASSWORD" not in os.environ
    assert os.environ["MLFLOW_BACKEND_STORE_URI"].endswith(":MLFLOW_DB_PASSWORD-planted@postgres/mlflow")
